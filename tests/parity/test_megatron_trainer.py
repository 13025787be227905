"""The run's side of the Megatron back end, with ranks of its own: a trainer like the torch one."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from megatron_cases import DP, PP, settings_of
from trainer_cases import score
from transformers import AutoConfig

from metis_fast.errors import Interrupted, NonFiniteError, TrainerError
from metis_fast.sync.segment import FOLDER
from metis_fast.train.megatron.backend import MegatronTrainer
from metis_fast.train.megatron.shared import Shared, read
from metis_fast.types import Group


@pytest.fixture(scope="module")
def open_trainer(models, groups, tmp_path_factory):
    """Opens a trainer of a layout."""
    started = []

    def run(layout):
        settings = settings_of(groups, layout)
        settings = settings.model_copy(update={"run": settings.run.model_copy(update={"dir": tmp_path_factory.mktemp("run")})})
        model = AutoConfig.from_pretrained(models("untied"))
        started.append(MegatronTrainer(settings, settings.train.optim, 10, models("untied"), model))
        return started[-1]

    yield run
    for trainer in started:
        trainer.close()


@pytest.fixture(scope="module")
def trainer(open_trainer):
    """Its ranks are started once. The first test needs it as it was made, the others do not."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METIS_JUDGE_API_KEY", "of the judge")
        return open_trainer(PP)


def mine():
    """Files of this process in shared memory."""
    return [path for folder in FOLDER.glob(f"metis-fast-ranks-{os.getpid()}-*") for path in folder.iterdir()]


def test_ranks_get_the_environment_without_its_keys(trainer):
    assert trainer.num_updates == 0
    ranks = [child.environ() for child in psutil.Process().children() if "--rank" in child.cmdline()]
    assert len(ranks) >= 2 and all("PATH" in variables for variables in ranks)
    assert not any("METIS_JUDGE_API_KEY" in variables for variables in ranks)


def test_the_runs_side_is_a_trainer_like_the_torch_one(trainer, truth):
    data, logp, _, stats, *_ = truth("untied")
    for got, expected in zip(trainer.logprobs([r for g in data for r in g.rollouts]), logp, strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
    calls = iter([False, True])  # between the sending of the groups and the first optimizer step

    def check():
        if next(calls, True):
            raise Interrupted

    before = dict(trainer.weights())
    with pytest.raises(Interrupted):
        trainer.update(data * 20, check)  # 39 passes for old log-probabilities come before the first step
    assert trainer.num_updates == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.weights())
    for one, other in zip(trainer.update(data), stats[0], strict=True):
        for field in ("loss", "loss_acc", "loss_tool", "grad_norm", "entropy", "engine_gap", "kl", "ratio_max", "clip_acc"):
            assert getattr(one, field) == pytest.approx(getattr(other, field), rel=1e-4, abs=1e-6), field
        assert (one.num_tokens, one.flops, one.avoided, one.n_acc) == (
            other.num_tokens,
            other.flops,
            other.avoided,
            other.n_acc,
        )
    assert trainer.num_updates == 2


def test_a_step_that_was_half_taken_is_counted(trainer, groups):
    good, bad = groups
    bad = replace(bad, scores=(score(3e38, 0.0), *bad.scores[1:]))  # finite, but the square of its gradient is not
    before = trainer.num_updates
    with pytest.raises(NonFiniteError, match="in mini-batch 1"):
        trainer.update([good, bad])
    assert trainer.num_updates == before + 1


def test_shared_memory_without_room_for_the_groups_is_said_and_the_ranks_go_on(trainer, groups, monkeypatch):
    def full(self, number, group):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    before = trainer.num_updates
    with monkeypatch.context() as patch, pytest.raises(TrainerError, match=r"^cannot hand groups .*No space left.* --shm-size"):
        patch.setattr(Shared, "write", full)
        trainer.update(groups)
    trainer.update(groups)
    assert trainer.num_updates == before + len(groups)
    assert not mine()


def test_a_replica_reads_the_groups_of_its_own_packs(open_trainer, groups):
    trainer = open_trainer(DP)
    blank = replace(groups[1], scores=tuple(score(0.0, 0.0) for _ in groups[1].scores))
    several = [groups[0], blank, groups[1], groups[0], groups[1]]
    trainer.update(several)
    one, two = trainer.fetched()
    assert one.keys() | two.keys() == {0, 2, 3, 4}  # of the blank one nothing is learnt
    assert one.keys() != two.keys()
    assert not mine()


def test_files_of_a_process_that_died_are_removed_by_the_next_one_and_those_of_a_live_one_are_not(groups):
    code = """
import os, signal
from metis_fast.train.megatron.shared import Shared, read
from metis_fast.types import Group
print(Shared().path("x"), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""
    dead = Path(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False).stdout.strip())
    assert dead.parent.is_dir()
    with closing(Shared()) as one, closing(Shared()) as two:
        assert not dead.parent.exists()
        whole = Group(groups[0].prompt, groups[0].rollouts)
        again = read(str(one.write(3, whole)))
        assert isinstance(again, Group) and again.prompt == whole.prompt
        assert one.path("").stat().st_mode & 0o077 == 0  # nobody else reads them, or puts a pickle of his own there
        assert two.path("").is_dir()
    assert not one.path("").exists() and not two.path("").exists()
