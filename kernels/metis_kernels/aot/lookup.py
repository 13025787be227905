"""Find the variant that fits a launch and run it. In steady state: Triton's binding of the arguments and one dict look-up."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from triton.runtime.jit import JITFunction, create_function_from_signature

from metis_kernels.aot.library import Library, Variant
from metis_kernels.aot.variant import SCALAR_CODES, Specialised, backend_of, variant_key


@dataclass(frozen=True, slots=True)
class _Call:
    """How to call a variant. arguments: positions of those that the binary takes. pointers: which of them are tensors."""

    variant: Variant
    arguments: tuple[int, ...]
    pointers: tuple[bool, ...]
    slots: struct.Struct

    def pack(self, values: Sequence[Any]) -> bytes:
        taken = zip(self.arguments, self.pointers, strict=True)
        return self.slots.pack(*(values[index].data_ptr() if pointer else values[index] for index, pointer in taken))


class _Kernel:
    """One kernel on one architecture: Triton's own binder, and what was found before."""

    def __init__(self, kernel: JITFunction[Any], arch: int) -> None:
        self.kernel = kernel  # keeps its id from being used again
        # The binder gives each parameter (type, "D" where divisible by 16) or ("constexpr", value), as the JIT has it.
        self.bind: Callable[..., tuple[dict[str, Any], list[tuple[str, Any]], dict[str, Any]]]
        self.bind = create_function_from_signature(kernel.signature, kernel.params, backend_of(arch))
        self.calls: dict[tuple[object, ...], _Call | None] = {}


class Lookup:
    """The variants of a library, by launch."""

    def __init__(self, library: Library) -> None:
        self.library = library
        self._kernels: dict[tuple[int, int], _Kernel] = {}

    def launch(
        self,
        kernel: Any,
        grid: Sequence[int],
        arguments: Sequence[Any],
        constants: dict[str, Any],
        num_warps: int,
        num_stages: int,
        *,
        arch: int,
        device: int,
        stream: int,
    ) -> bool:
        """Run the variant that fits. False, and nothing is done, if there is none.

        Args:
            kernel, grid, arguments, constants, num_warps, num_stages: see `metis_kernels._launch.launch`.
            arch: compute capability of the device times ten.
            device: ordinal.
            stream: CUstream.

        Raises:
            RuntimeError: the driver reports an error.
        """
        if not isinstance(kernel, JITFunction):  # interpreted, or autotuned
            return False
        # by identity: a kernel's own hash takes a lock
        known = self._kernels.get((id(kernel), arch))
        if known is None:
            known = self._kernels[id(kernel), arch] = _Kernel(kernel, arch)
        bound, specialisation, options = known.bind(*arguments, **constants)
        if options:  # an option of the compiler that `launch` does not know by name: for the JIT
            return False
        # the types of the constants: True, 1 and 1.0 are equal and hash alike, and compile differently
        key = (num_warps, num_stages, *specialisation, *map(type, constants.values()))
        try:
            call = known.calls[key]
        except KeyError:
            call = known.calls[key] = self._find(kernel, arch, specialisation, num_warps, num_stages)
        if call is None:
            return False
        x, y, z = (*grid, 1, 1)[:3]
        if x and y and z:
            self.library.launch(call.variant, (x, y, z), device, stream, call.pack(tuple(bound.values())))
        return True

    def _find(
        self, kernel: JITFunction[Any], arch: int, specialisation: Sequence[tuple[str, Any]], num_warps: int, num_stages: int
    ) -> _Call | None:
        parameters = []
        for kind, value in specialisation:
            if not isinstance(kind, str):  # a tuple of arguments: no kernel here takes one
                return None
            constant = kind == "constexpr"
            parameters.append(Specialised(kind, value if constant else None, not constant and value == "D"))
        variant = self.library.variants.get(variant_key(kernel, arch, parameters, num_warps, num_stages))
        if variant is None:
            return None
        taken = [(index, parameter.type) for index, parameter in enumerate(parameters) if parameter.type != "constexpr"]
        slots = slots_of([kind for _, kind in taken])
        assert slots.size == 8 * variant.num_params, f"{variant.kernel}: the table disagrees with the launch"
        return _Call(variant, tuple(index for index, _ in taken), tuple(kind.startswith("*") for _, kind in taken), slots)


def slots_of(types: Sequence[str]) -> struct.Struct:
    """Packs the arguments of these types into slots of 8 bytes, and after them the null scratch pointers that Triton's
    kernels end with.

    Raises:
        ValueError: a type is one that cannot be passed this way.
    """
    codes = []
    for kind in types:
        if not kind.startswith("*") and kind not in SCALAR_CODES:
            raise ValueError(f"types: expected pointers and scalars, got {kind}")
        code = "Q" if kind.startswith("*") else SCALAR_CODES[kind]
        codes.append(f"{code}{8 - struct.calcsize(code)}x")
    return struct.Struct("<" + "".join(codes) + "16x")
