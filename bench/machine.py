"""What the benchmark ran on."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

_ISA = ("avx2", "avx512f", "avx512_bf16", "amx_tile", "amx_bf16", "asimd", "sve", "bf16")
"""Names in /proc/cpuinfo of what matters to matrix products."""


@dataclass(frozen=True, slots=True)
class Machine:
    """cpu: model name. cores: those that this process may use. isa: see _ISA. gpu: name, None on the CPU. threads: of torch."""

    cpu: str
    cores: int
    isa: tuple[str, ...]
    torch: str
    gpu: str | None
    threads: int


def describe(device: torch.device) -> Machine:
    """This machine, for a run on `device`."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = fields.get("flags", fields.get("Features", "")).split()
    return Machine(
        cpu=fields.get("model name", platform.processor() or platform.machine()),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        isa=tuple(name for name in _ISA if name in flags),
        torch=torch.__version__,
        gpu=torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        threads=torch.get_num_threads(),
    )
