"""Which implementation of an op runs."""

from __future__ import annotations

import functools
import importlib.util
import os
from pathlib import Path
from typing import Literal, get_args

import torch

Impl = Literal["auto", "triton", "cpu", "reference"]
Chosen = Literal["triton", "cpu", "reference"]

_LIBRARY = "libmetis_cpu.so"
_NEWEST_OP = "patchify"


@functools.cache
def cpu_library_status() -> str:
    """Load the C++ side once. Returns "" if it is there, else why it is not, for people."""
    import metis_kernels

    for folder in metis_kernels.__path__:  # an editable install has two: the sources and what was built
        library = Path(folder) / _LIBRARY
        if library.exists():
            try:
                torch.ops.load_library(library)
            except OSError as error:
                return f"{library} does not load: {error}"
            if not hasattr(torch.ops.metis_kernels_cpu, _NEWEST_OP):  # of an editable install whose sources went on
                return f"{library} is older than these sources; build it again with pip install --no-build-isolation -e ."
            if torch.ops.metis_kernels_cpu.isa():
                return ""
            asked = os.environ.get("METIS_CPU_ISA")
            return f"this processor has no METIS_CPU_ISA={asked} (portable, avx2, avx512, avx512_bf16, amx, amx_emulated)"
    return (
        f"{_LIBRARY} was not built: no C++ compiler or no torch was found when the package was installed; "
        "install g++ (Debian: apt-get install g++; macOS: xcode-select --install), then reinstall with "
        "pip install --no-build-isolation ."
    )


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def triton_interpreted() -> bool:
    """Whether Triton kernels run in the interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def available(impl: Chosen, device: torch.device, dtype: torch.dtype) -> str:
    """Returns "" if `impl` can run on tensors of this device and dtype, else why it cannot."""
    if impl == "reference":
        return ""
    if impl == "cpu":
        if device.type != "cpu":
            return f"it needs CPU tensors, these are on {device}"
        if dtype not in (torch.bfloat16, torch.float32):
            return f"it takes bfloat16 and float32, not {dtype}"
        return cpu_library_status()
    if not _triton_installed():
        return "triton is not installed (pip install triton)"
    if dtype == torch.float64:
        return "it takes bfloat16, float16 and float32, not torch.float64"
    if device.type not in ("cuda", "meta") and not triton_interpreted():
        return f"it needs CUDA tensors, these are on {device} (TRITON_INTERPRET=1 runs it on the CPU, for tests)"
    return ""


@torch.compiler.assume_constant_result  # Dynamo cannot follow the cached look-ups; they do not change within a process
def choose(impl: Impl, device: torch.device, dtype: torch.dtype) -> Chosen:
    """The implementation to run.

    Raises:
        ValueError: `impl` is unknown or cannot run on these tensors.
    """
    if impl == "auto":
        if device.type == "cuda" and not available("triton", device, dtype):
            return "triton"
        if device.type == "cpu" and not available("cpu", device, dtype):
            return "cpu"
        return "reference"
    if impl not in get_args(Chosen):
        raise ValueError(f"impl: expected one of {', '.join(get_args(Impl))}, got {impl!r}")
    why_not = available(impl, device, dtype)
    if why_not:
        raise ValueError(f"impl={impl!r} cannot run here: {why_not}")
    return impl
