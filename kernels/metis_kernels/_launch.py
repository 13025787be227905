"""The one place where Triton kernels are launched.

CUDA tensors take an ahead-of-time compiled variant where libmetis_aot.so was built (CMake option METIS_AOT) and has one that
fits; METIS_AOT=0 in the environment switches that off. Variants bypass Triton's launch hooks, so its own profiler and
sanitizers see a kernel only with METIS_AOT=0 (tools of the driver, such as Nsight or torch.profiler, always do).
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from metis_kernels.aot.lookup import Lookup


def launch(kernel: Any, grid: Sequence[int], *arguments: Any, num_warps: int, num_stages: int = 2, **constants: Any) -> None:
    """Run `kernel` on `grid` (up to three numbers): positional arguments in order, constexpr ones by name.

    Takes the ahead-of-time compiled variant where there is one for this architecture, these dtypes, alignments and
    constants, and compiles just in time otherwise.

    Raises:
        RuntimeError: the CUDA driver refuses an ahead-of-time variant.
    """
    first = next((argument for argument in arguments if isinstance(argument, torch.Tensor)), None)
    if first is not None and first.is_cuda and first.device.index != torch.cuda.current_device():
        with torch.cuda.device(first.device):  # torch's own ops follow their tensors; Triton follows the current device
            launch(kernel, grid, *arguments, num_warps=num_warps, num_stages=num_stages, **constants)
        return
    if first is not None and first.is_cuda and (lookup := _ahead_of_time()[0]) is not None:
        # the current device, as Triton takes it
        device = torch.cuda.current_device()
        stream = torch.cuda.current_stream(device).cuda_stream
        arch = _arch(device)
        if lookup.launch(kernel, grid, arguments, constants, num_warps, num_stages, arch=arch, device=device, stream=stream):
            return
    # said here because Triton 3.10 turns fusion off by default, and 3.9 warns of it
    kernel[tuple(grid)](*arguments, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=True, **constants)


def aot_status() -> str:
    """What there is of ahead-of-time compiled kernels, for people."""
    return _ahead_of_time()[1]


@functools.cache
def _arch(device: int) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


@functools.cache
def _ahead_of_time() -> tuple[Lookup | None, str]:
    """The variants, None where there are none, and what to tell people. Looked at once a process."""
    import metis_kernels
    from metis_kernels.aot.library import NAME, Library

    if os.environ.get("METIS_AOT") == "0":
        return None, "off: METIS_AOT=0 is set; kernels are compiled just in time"
    # an editable install has two folders: the sources and what was built
    path = next((path for folder in metis_kernels.__path__ if (path := Path(folder) / NAME).exists()), None)
    if path is None:
        return None, f"{NAME} was not built (CMake option METIS_AOT); kernels are compiled just in time"
    try:
        library = Library(path)
    except OSError as error:
        return None, f"{path} does not load: {error}; kernels are compiled just in time"
    from metis_kernels.aot.lookup import Lookup

    variants = library.variants.values()
    by_arch = ", ".join(f"{num} for sm_{arch}" for arch, num in sorted(Counter(one.arch for one in variants).items()))
    megabytes = sum(one.cubin_bytes for one in variants) / 1e6
    return Lookup(library), f"{path}: {len(library.variants)} variants ({by_arch}), {megabytes:.1f} MB"
