"""Workers for `test_megatron_ranks.py`, and a run of them that a test kills: `python rank_workers.py FOLDER`."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from metis_fast.config import MegatronConfig
from metis_fast.errors import CheckpointError, NonFiniteError
from metis_fast.train.megatron.launch import Ranks
from metis_fast.train.megatron.rank import Aborted, Context


class Worker:
    """Small things that every rank does."""

    def __init__(self, context: Context, name: str) -> None:
        self.context, self.name = context, name
        self.made = 0

    def where(self):
        """Name, rank, its process and session, number of ranks, and variables of its environment."""
        names = ("METIS_RANK_KEY", "OMP_NUM_THREADS", "TORCHDYNAMO_DISABLE", "CUDA_DEVICE_MAX_CONNECTIONS")
        context = self.context
        variables = {name: os.environ.get(name) for name in names}
        return self.name, context.rank, os.getpid(), os.getsid(0), context.world_size, variables

    def sum(self, value):
        """Of value + rank over all ranks."""
        total = torch.tensor([value + self.context.rank])
        dist.all_reduce(total)
        return int(total)

    def digest(self, array, tensor, text):
        """Of the arguments; arrays may be written to."""
        array += 1
        return float(array.sum()), tensor.dtype, tensor.float().sum().item(), text

    def items(self, num, marks=None):
        """Pairs as weights come; how many were made is written down."""
        for i in range(num):
            if marks is not None:
                Path(marks, str(self.context.rank)).write_text(str(i + 1))
            yield f"w{i}", torch.full((2, 3), i + 0.5 * self.context.rank, dtype=torch.bfloat16).T

    def odd_tensors(self):
        """A scalar, an empty one, and one of other strides."""
        yield torch.tensor(3.5), torch.empty(0, 4, dtype=torch.int64), torch.arange(6).reshape(2, 3)[:, ::2]

    def wait(self, marks):
        """Passes without an end, until the run asks to leave."""
        for i in range(1000):
            Path(marks, f"pass-{self.context.rank}").write_text(str(i))
            if self.context.aborted():
                raise Aborted
            time.sleep(0.02)

    def deaf(self, marks):
        """Takes a second, past the point of no return."""
        Path(marks, f"pass-{self.context.rank}").touch()
        time.sleep(1)
        return self.context.rank

    def fail(self, ranks):
        """A typed error on some ranks, while the others wait for a collective operation."""
        if self.context.rank in ranks:
            raise NonFiniteError(f"loss of rank {self.context.rank} is NaN")
        return self.sum(0)

    def crash(self, rank):
        """A defect on one rank, while the others wait for it."""
        if self.context.rank == rank:
            raise KeyError("no such layer")
        return self.sum(0)

    def fork(self):
        """A forked process, as a checkpoint writer is; returns its id."""
        child = os.fork()
        if child == 0:
            time.sleep(600)
            os._exit(0)
        return child

    def hang(self, rank, mark):
        """All but one wait in a collective operation for that one, which sleeps."""
        if self.context.rank == rank:
            Path(mark).touch()
            time.sleep(600)
        return self.sum(0)


class Refusing(Worker):
    """Cannot be built."""

    def __init__(self, context: Context, name: str) -> None:
        raise CheckpointError(f"{name} holds no weights")


def main(folder: Path) -> None:
    with Ranks(MegatronConfig(data_parallel=2), "rank_workers:Worker", "run", folder / "ranks") as ranks:
        pids = [place[2] for place in ranks.call("where")] + ranks.call("fork")
        (folder / "pids.tmp").write_text(" ".join(map(str, pids)))
        (folder / "pids.tmp").rename(folder / "pids")
        ranks.call("hang", 0, folder / "hangs")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
