"""The name of a variant: equal names mean that Triton's just-in-time compiler would have made the same machine code."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import CUDABackend
from triton.runtime.jit import JITFunction

WARP_SIZE = 32

# struct codes of the scalars that a kernel may take, by Triton's name of the type. Triton passes tensor descriptors and
# 16-bit floats by other ways.
SCALAR_CODES = {
    "i1": "b",
    "i8": "b",
    "i16": "h",
    "i32": "i",
    "i64": "q",
    "u1": "B",
    "u8": "B",
    "u16": "H",
    "u32": "I",
    "u64": "Q",
    "fp32": "f",
    "fp64": "d",
}


class Specialised(NamedTuple):
    """One parameter of a kernel as a launch specialises it.

    type: Triton's name, for example "*bf16" or "i32"; "constexpr" for what is compiled into the kernel: declared constants,
        integers equal to 1 and None.
    value: of a "constexpr", else None.
    divisible_by_16: whether that may be relied on (of a pointer: its address).
    """

    type: str
    value: object
    divisible_by_16: bool


def backend_of(arch: int) -> CUDABackend:
    """Triton's compiler back end for a compute capability times ten. Needs no driver."""
    return CUDABackend(GPUTarget("cuda", arch, WARP_SIZE))


def kernel_name(kernel: JITFunction[Any]) -> str:
    """Module and name."""
    return f"{kernel.__module__}.{kernel.__qualname__}"


def variant_key(kernel: JITFunction[Any], arch: int, parameters: Sequence[Specialised], num_warps: int, num_stages: int) -> str:
    """Hash of all that Triton compiles a kernel from.

    These are the sources of the kernel and of the functions and global constants that it uses, the parameters, the compile
    options (those that come from the environment included, so that a debugging or sanitizing run never meets a variant
    without its checks), the architecture and Triton's version. Triton's own hash of a binary has also the contents of its
    shared library, 500 MB that each of a thousand ranks would read at start.
    """
    options = backend_of(arch).parse_options(
        {
            "num_warps": num_warps,
            "num_stages": num_stages,
            "debug": kernel.debug or knobs.runtime.debug,
            "instrumentation_mode": knobs.compilation.instrumentation_mode,
            "fpsan_homomorphic_casts": knobs.compilation.fpsan_homomorphic_casts,
        }
    )
    parts = [triton.__version__, kernel_name(kernel), kernel.cache_key, str(arch), options.hash()]
    for parameter in parameters:
        if parameter.type == "constexpr":
            parts.append(f"= {_text(parameter.value)}")
        else:
            parts.append(f"{parameter.type} {'divisible by 16' if parameter.divisible_by_16 else ''}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _text(value: object) -> str:
    if isinstance(value, triton.language.constexpr):
        value = value.value
    return value.cache_key if isinstance(value, JITFunction) else repr(value)
