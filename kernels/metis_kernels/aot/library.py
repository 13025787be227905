"""libmetis_aot.so through ctypes: the table of its variants, and launching one."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from pathlib import Path

NAME = "libmetis_aot.so"


class _Row(ctypes.Structure):
    """`struct variant` of csrc/aot/launch.c."""

    _fields_ = (
        ("key", ctypes.c_char_p),
        ("kernel", ctypes.c_char_p),
        ("symbol", ctypes.c_char_p),
        ("cubin", ctypes.c_void_p),
        ("cubin_bytes", ctypes.c_uint32),
        ("arch", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
        ("shared_bytes", ctypes.c_int32),
        ("num_params", ctypes.c_int32),
    )


@dataclass(frozen=True, slots=True)
class Variant:
    """One compiled kernel of the library. index: its number there. num_params: the two scratch pointers included."""

    index: int
    kernel: str
    arch: int
    num_params: int
    cubin_bytes: int


class Library:
    """A built library.

    Raises:
        OSError: the file is not there or does not load.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # CDLL lets go of the interpreter lock during a call: a launch waits where the GPU's queue is full
        self._library = ctypes.CDLL(str(path))
        self._launch = self._library.metis_aot_launch
        self._launch.argtypes = (
            ctypes.c_int32,
            *[ctypes.c_uint32] * 3,
            ctypes.c_int32,
            ctypes.c_void_p,
            ctypes.c_char_p,
        )
        self._launch.restype = ctypes.c_int
        self._error = self._library.metis_aot_error
        self._error.restype = ctypes.c_char_p
        table = self._library.metis_aot_variants
        table.restype = ctypes.POINTER(_Row)
        num_variants = ctypes.c_int32()
        rows = table(ctypes.byref(num_variants))
        self.variants: dict[str, Variant] = {}
        for index in range(num_variants.value):
            row = rows[index]
            self.variants[row.key.decode()] = Variant(index, row.kernel.decode(), row.arch, row.num_params, row.cubin_bytes)

    def launch(self, variant: Variant, grid: tuple[int, int, int], device: int, stream: int, slots: bytes) -> None:
        """Run a variant.

        Args:
            grid: blocks along x, y and z, all > 0.
            device: ordinal; its primary context is made current where this thread has none.
            stream: CUstream.
            slots: 8 bytes for each parameter.

        Raises:
            RuntimeError: there is no driver, or it reports an error.
        """
        if self._launch(variant.index, *grid, device, stream, slots):
            raise RuntimeError(f"ahead-of-time kernel: {self._error().decode(errors='replace')}")
