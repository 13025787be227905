"""One variant in a process of its own, so that its memory is its own. Reads commands from stdin, answers in lines of JSON.

gradients PATH   the gradients of both mini-batches, written to PATH
step             one step, measured
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from metis_fast.types import ScoredGroup

from .shapes import SHAPES, build_batch
from .variants import Stepper

# A step that moves the weights so far that some ratios of the second mini-batch are clipped. With an epsilon far above the
# gradients AdamW is linear in them: it would else blow rounding up to a step's size wherever a gradient is almost 0.
CHECKED_OPTIM = {"lr": 3.0, "eps": 100.0, "weight_decay": 0.0, "grad_clip": 1e9}
TIMED_OPTIM = {"lr": 1e-6}

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


@dataclass(frozen=True, slots=True)
class Measured:
    """Of one step. peak_bytes: the most resident memory above what was resident before; None where Linux is not below."""

    cpu_s: float
    wall_s: float
    peak_bytes: int | None
    decoder_tokens: int
    vision_images: int
    flops: float


def _resident(field: str) -> int:
    """VmRSS or VmHWM, in bytes."""
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{field}:"))
    return int(line.split()[1]) * 1024


def _reset_peak() -> int | None:
    """Returns what is resident now; VmHWM counts from here."""
    gc.collect()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        _CLEAR.write_text("5")
    except OSError:  # no glibc, no Linux, or not allowed
        return None
    return _resident("VmRSS")


class Child:
    """The variant and the batch."""

    def __init__(self, variant: str, folder: Path, shape: str, dtype: str, seed: int) -> None:
        self._shape, self._seed = SHAPES[shape], seed
        self._made = variant, folder, self._shape, dtype
        self._stepper: Stepper | None = None
        self._groups: list[ScoredGroup] = []

    def gradients(self, path: Path) -> None:
        """Writes {"0.<parameter>": gradient of the first mini-batch, ...}."""
        stepper = Stepper(*self._made, CHECKED_OPTIM)
        found: list[dict[str, Tensor]] = []
        stepper.on_step(found.append)
        stepper.step(build_batch(stepper.policy, self._shape, self._seed))
        torch.save({f"{i}.{name}": value for i, part in enumerate(found) for name, value in part.items()}, path)

    def step(self) -> Measured:
        """One step. The first call takes another one before, which makes the optimizer's state and reads the images."""
        if self._stepper is None:
            self._stepper = Stepper(*self._made, TIMED_OPTIM)
            self._groups = build_batch(self._stepper.policy, self._shape, self._seed)
            self._stepper.step(self._groups)
        count = self._stepper.count_images()
        before = _reset_peak()
        cpu, wall = time.process_time(), time.perf_counter()
        self._stepper.step(self._groups)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        peak = None if before is None else _resident("VmHWM") - before
        return Measured(cpu, wall, peak, self._stepper.decoder_tokens, count(), self._stepper.flops)


def main(argv: list[str]) -> None:
    """Arguments: variant, folder of the policy, shape, dtype, seed, threads."""
    variant, folder, shape, dtype, seed, threads = argv
    torch.set_num_threads(int(threads))
    child = Child(variant, Path(folder), shape, dtype, int(seed))
    for line in sys.stdin:
        command, _, path = line.strip().partition(" ")
        if command == "gradients":
            child.gradients(Path(path))
            print("{}", flush=True)
        else:
            print(json.dumps(asdict(child.step())), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
