"""Compile what host code would launch, for a GPU that is not there.

The host code runs as it is, on CPU or meta tensors, under a Triton driver that claims to be the asked-for GPU. Every
`kernel[grid](...)` goes through Triton's own specialisation (divisibility by 16, arguments equal to 1, constexpr
values) and compiler, and stops where the driver would load the binary: the launch is recorded and nothing runs. A
hand-written signature would drift from what the JIT does, and shows other registers and other spills.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import triton.language as tl
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.driver import Benchmarker, DriverBase
from triton.backends.nvidia.driver import ty_to_cpp
from triton.compiler import ASTSource
from triton.runtime import driver

Arch = Literal[80, 90, 100]

# Streaming multiprocessors of the GPU that each compute capability stands for: A100, H100 SXM, B200.
_NUM_MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}


@dataclass(frozen=True, slots=True)
class Parameter:
    """One parameter of a kernel as this launch specialised it.

    type: Triton's name, for example "*bf16", "i32", "fp32"; "constexpr" for what is compiled into the kernel: declared
        constants, integers equal to 1 and None. Only the others are arguments of the binary, in order.
    value: of a "constexpr", else None.
    divisible_by_16: whether the kernel was compiled on the promise that the value (of a pointer: the address) is.
    """

    name: str
    type: str
    value: object = None
    divisible_by_16: bool = False


@dataclass(frozen=True, slots=True)
class CompiledLaunch:
    """One `kernel[grid](...)` and what it compiled to.

    symbol: of the kernel in the cubin. The binary takes the parameters whose type is not "constexpr", in order, then
        the pointers to global and profile scratch memory (null where the size is 0).
    grid: programs along x, y and z.
    num_warps: of 32 threads each; what a block is launched with.
    num_stages: asked-for depth of software pipelining.
    num_ctas: blocks of a cluster.
    shared_bytes: dynamic shared memory of a block.
    tensor_memory_columns: of a block, 0 before sm_100.
    global_scratch_bytes, global_scratch_align: per block of the grid, and the alignment of the whole, bytes.
    profile_scratch_bytes: the same, for Triton's profiler.
    ttir: the kernel before it is lowered to a GPU, in Triton's intermediate representation.
    key: Triton's hash of source, specialisation, options and target: equal keys are one binary.
    compile_seconds: wall time of the compiler; 0.0 where the binary came from a cache.
    """

    kernel: str
    module: str
    symbol: str
    arch: Arch
    grid: tuple[int, int, int]
    parameters: tuple[Parameter, ...]
    num_warps: int
    num_stages: int
    num_ctas: int
    shared_bytes: int
    tensor_memory_columns: int
    global_scratch_bytes: int
    global_scratch_align: int
    profile_scratch_bytes: int
    cooperative_grid: bool
    dependent_launch: bool
    key: str
    compile_seconds: float
    cubin: bytes
    ptx: str
    ttir: str


def compile_launches(run: Callable[[], object], arch: Arch) -> list[CompiledLaunch]:
    """Run host code and compile, but not execute, every Triton kernel that it launches.

    Args:
        run: host code; launches Triton kernels on CPU or meta tensors. Kernels write nothing, so it must not look at
            their results (meta tensors see to that). Tensor addresses are specialised as they are: allocations are
            16-byte aligned as on a GPU, a view that starts elsewhere is not.
        arch: compute capability times ten: 80 (A100), 90 (H100), 100 (B200).

    Returns:
        The launches in order. Each distinct specialisation is compiled once, through Triton's cache on disk.

    Raises:
        ValueError: `arch` is another one, or kernels are interpreted in this process (TRITON_INTERPRET=1).
        triton.CompilationError: a kernel does not compile. One that needs more shared memory than the GPU has does: the
            limit is for `metis_kernels.inspect.static` to judge.
    """
    if arch not in get_args(Arch):
        raise ValueError(f"arch: expected one of {', '.join(map(str, get_args(Arch)))}, got {arch!r}")
    if knobs.runtime.interpret:
        raise ValueError(
            "TRITON_INTERPRET: expected a process in which it is not set, got 1: interpreted kernels do not compile"
        )
    recorder = _Recorder(arch)
    with _active(_DryDriver(arch, recorder.launcher)), _listening(recorder.compiled):
        run()
    return recorder.launches


def distinct(launches: Iterable[CompiledLaunch]) -> list[CompiledLaunch]:
    """The first launch of each binary, in order."""
    first: dict[str, CompiledLaunch] = {}
    for launch in launches:
        first.setdefault(launch.key, launch)
    return list(first.values())


@dataclass(frozen=True, slots=True)
class _Compiled:
    """files: of each stage of the compiler, by file name."""

    files: dict[str, str]
    seconds: float


class _Recorder:
    """Collects the launches of one `compile_launches`."""

    def __init__(self, arch: Arch) -> None:
        self.launches: list[CompiledLaunch] = []
        self._arch: Arch = arch
        self._compiled: dict[str, _Compiled] = {}

    def compiled(
        self, *, src: object, metadata: dict[str, Any], metadata_group: dict[str, str], times: Any, cache_hit: bool
    ) -> None:
        """Triton's `CompilationListener`; `times` are in microseconds."""
        self._compiled[metadata["hash"]] = _Compiled(metadata_group, 0.0 if cache_hit else times.total / 1e6)

    def launcher(self, src: ASTSource, metadata: Any) -> Callable[..., None]:
        """Stands for the driver's launcher class: called once a binary, returns what is called once a launch."""

        def launch(grid_x: int, grid_y: int, grid_z: int, *_: object) -> None:
            self.launches.append(self._record(src, metadata, (grid_x, grid_y, grid_z)))

        return launch

    def _record(self, src: ASTSource, metadata: Any, grid: tuple[int, int, int]) -> CompiledLaunch:
        compiled = self._compiled[metadata.hash]
        stages = {Path(name).suffix: Path(file) for name, file in compiled.files.items()}
        return CompiledLaunch(
            kernel=src.fn.__name__,
            module=src.fn.__module__,
            symbol=metadata.name,
            arch=self._arch,
            grid=grid,
            parameters=_parameters(src),
            num_warps=metadata.num_warps,
            num_stages=metadata.num_stages,
            num_ctas=metadata.num_ctas,
            shared_bytes=metadata.shared,
            tensor_memory_columns=metadata.tmem_size or 0,
            global_scratch_bytes=metadata.global_scratch_size,
            global_scratch_align=metadata.global_scratch_align,
            profile_scratch_bytes=metadata.profile_scratch_size,
            cooperative_grid=metadata.launch_cooperative_grid,
            dependent_launch=metadata.launch_pdl,
            key=metadata.hash,
            compile_seconds=compiled.seconds,
            cubin=stages[".cubin"].read_bytes(),
            ptx=stages[".ptx"].read_text(),
            ttir=stages[".ttir"].read_text(),
        )


def _parameters(src: ASTSource) -> tuple[Parameter, ...]:
    def value(index: int) -> object:
        constant = src.constants.get((index,))
        return constant.value if isinstance(constant, tl.constexpr) else constant

    return tuple(
        Parameter(name, str(kind), value(index), ["tt.divisibility", 16] in src.attrs.get((index,), []))
        for index, (name, kind) in enumerate(src.signature.items())
    )


class _DryUtils:
    """What Triton asks of a driver's `utils` between compiling and launching."""

    def __init__(self, arch: Arch) -> None:
        self._arch: Arch = arch

    def get_device_properties(self, device: int) -> dict[str, int]:
        # No limit on shared memory: a launch that cannot fit should come back with its figures, not raise here.
        return {"max_shared_mem": 2**31 - 1, "multiprocessor_count": _NUM_MULTIPROCESSORS[self._arch], "warpSize": 32}

    def load_binary(self, name: str, cubin: bytes, shared: int, device: int) -> tuple[None, int, int, int, int]:
        """(module, function, registers, spills, most threads of a block). Without a module there is nothing to unload."""
        return None, 0, 0, 0, 1024


class _DryDriver(DriverBase):
    """A Triton driver that claims to be a GPU of `arch` and hands every launch to `launcher`.

    Return types of Any: `DriverBase` leaves them out, and a type checker then reads its empty methods as returning None.
    """

    # Triton keeps compiled kernels by device number. One number a driver: no launch meets a kernel whose launcher
    # belongs to an earlier recorder. Negative: never a device that exists.
    _device_numbers = itertools.count(-1, -1)

    def __init__(self, arch: Arch, launcher: Callable[[ASTSource, Any], Callable[..., None]]) -> None:
        super().__init__()
        self.utils = _DryUtils(arch)
        self.launcher_cls = launcher
        self._target = GPUTarget("cuda", arch, 32)
        self._device = next(self._device_numbers)

    @classmethod
    def is_active(cls) -> Any:
        return False

    def get_current_target(self) -> Any:
        return self._target

    def get_current_device(self) -> int:
        return self._device

    def get_current_stream(self, device: int) -> int:
        return 0

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty_to_cpp(ty)

    def get_active_torch_device(self) -> Any:
        return torch.device("meta")

    def get_benchmarker(self) -> Benchmarker:
        raise NotImplementedError("autotuning needs a GPU: nothing runs in an offline compilation")


@contextlib.contextmanager
def _active(dry: _DryDriver) -> Iterator[None]:
    # `driver.active` cannot be read for this: it looks for a GPU, and raises without one.
    previous = driver._active
    driver.set_active(dry)
    try:
        yield
    finally:
        driver._active = previous


@contextlib.contextmanager
def _listening(listener: Callable[..., None]) -> Iterator[None]:
    with knobs.compilation.scope():
        knobs.compilation.listener = listener
        yield
