"""`train.backend=megatron` on the CPU: a run of real ranks computes what the torch back end does, ends cleanly whatever is
killed, and the same command, under this layout or another, goes on from the last checkpoint as if nothing had been."""

from __future__ import annotations

import json
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from disks import Disk
from harness import AGENT, Ended, Moment, cut, run, run_state, succeed
from test_run_disk_full import disk  # noqa: F401
from transformers import Qwen3VLForConditionalGeneration

from metis_fast.checkpoint.resume import CheckpointStore

STEPS = 4
FLOOR = 5e-7  # float32 rounds a log-probability to this; what is smaller is noise
AGAIN = "run the same command again: it resumes from the last checkpoint"
TP, PP, DP = (f"train.megatron.{axis}_parallel=2" for axis in ("tensor", "pipeline", "data"))


def train(job: Path, folder: Path, *settings: str) -> list[object]:
    """The command of a run, with one checkpoint a step, all of them kept."""
    often = (f"train.steps={STEPS}", "checkpoint.every=1", f"checkpoint.keep_last={STEPS}")
    return ["train", job, f"run.dir={folder}", *often, *settings]


def megatron(job: Path, folder: Path, *layout: str) -> list[object]:
    """The same with ranks, and everything trained, so that checkpoints hold states of every kind of weight."""
    return train(job, folder, "train.backend=megatron", "model.freeze=[]", *layout)


@pytest.fixture(scope="module")
def uninterrupted(job: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of two tensor-parallel ranks that nothing happens to. Tests do not write to it."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    succeed(megatron(job, folder / "run", TP), folder / "process")
    return folder / "run"


def metrics(folder: Path) -> list[dict[str, float]]:
    """Every number of every step but seconds, by its place."""

    def leaves(tree: Any, at: str) -> Iterator[tuple[str, Any]]:
        if isinstance(tree, dict | list):
            for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
                yield from leaves(value, f"{at}.{key}")
        else:
            yield at, tree

    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        dict(leaves({key: value for key, value in record.items() if key not in ("seconds", "cpu_seconds")}, ""))
        for record in records
    ]


def assert_same_curve(folder: Path, reference: Path, rel: float, floor: float = 0.0) -> None:
    """Whole numbers and what the rollouts did exactly; what the update computed to `rel`, or an absolute `floor` near 0."""
    got, expected = metrics(folder), metrics(reference)
    assert len(got) == len(expected) == STEPS
    for step, (one, other) in enumerate(zip(got, expected, strict=True)):
        assert one.keys() == other.keys()
        for name, value in other.items():
            if name.endswith(".engine_gap"):  # noise of float32, ours and theirs
                assert one[name] < 1e-5 and value < 1e-5, (step, name, one[name], value)
            elif name.startswith(".updates.") and isinstance(value, float):
                assert one[name] == pytest.approx(value, rel=rel, abs=floor), (step, name)
            elif name != ".sync_bytes":  # the torch back end's engine runs the trainer's own module
                assert one[name] == value, (step, name)
    # not in each mini-batch: the two groups of one may agree in all their rewards
    assert any(one[name] for one in expected for name in one if name.endswith(".grad_norm")), "nothing is learnt"


def failed(ended: Ended) -> str:
    """The one line of a run that ended with 2, and its processes with it; news of slow starts come before it."""
    assert ended.code == 2 and not ended.orphans and not ended.scratch, ended
    *news, line = ended.err.splitlines()
    assert all(one.startswith("waiting for rank") for one in news), ended.err
    return line


# -- the main job -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [(PP,), pytest.param((TP, PP), marks=pytest.mark.slow)], ids=["pp2", "tp2 pp2"])
def test_the_main_job_on_ranks_has_the_metrics_and_weights_of_the_torch_back_end(
    job: Path, tmp_path: Path, layout: tuple[str, ...]
) -> None:
    succeed(train(job, tmp_path / "torch"), tmp_path / "one")
    succeed(train(job, tmp_path / "ranks", "train.backend=megatron", *layout), tmp_path / "several")
    assert_same_curve(tmp_path / "ranks", tmp_path / "torch", 1e-4, FLOOR)
    evaluations = [(tmp_path / name / "eval.jsonl").read_text() for name in ("torch", "ranks")]
    assert evaluations[0] == evaluations[1]
    one, several = (
        Qwen3VLForConditionalGeneration.from_pretrained(tmp_path / name / "trained", dtype=torch.float32)
        for name in ("torch", "ranks")
    )
    weights = dict(several.named_parameters())
    moved = 0
    start = dict(Qwen3VLForConditionalGeneration.from_pretrained(AGENT).named_parameters())
    for name, expected in one.named_parameters():
        assert float((weights[name] - expected).detach().norm()) <= 1e-4 * float(expected.detach().norm()), name
        moved += not torch.equal(weights[name], start[name])
    assert moved > len(weights) / 3  # all but embeddings and tower, which the main job freezes
    assert {path.name for path in (tmp_path / "ranks" / "trained").iterdir()} == {
        path.name for path in (tmp_path / "torch" / "trained").iterdir()
    }


# -- ends -------------------------------------------------------------------------------------------------------------------


def killed_rank_says_so(ended: Ended, number: int, folder: Path) -> None:
    assert ended.hit and ended.after_s < 60, ended
    why = "was killed by SIGKILL (by the kernel, if memory ran out)"
    log = folder / "ranks" / f"rank-{number}.log"
    line = failed(ended)
    assert line.startswith(f"metis-fast: rank {number} {why}") and line.endswith(f" (log: {log}); {AGAIN}"), line


def test_kill_9_of_a_rank_and_of_the_run_amid_an_update_end_it_and_the_same_command_ends_like_an_uninterrupted_run(
    job: Path, uninterrupted: Path, tmp_path: Path
) -> None:
    folder, delays = tmp_path / "run", random.Random(0)
    command = megatron(job, folder, TP)
    rank = Moment("backend.update", signal.SIGKILL, entry=2, delay_s=delays.uniform(0, 0.1), rank=1)
    killed_rank_says_so(run(command, tmp_path / "first", rank), 1, folder)
    steps = len(metrics(folder))
    assert steps in (1, 2)  # 2: the rank was done with the update before it was killed
    ended = run(command, tmp_path / "second", Moment("backend.update", signal.SIGKILL, delay_s=delays.uniform(0, 0.1)))
    assert ended.hit and ended.code == -signal.SIGKILL and not ended.orphans, ended
    assert len(metrics(folder)) in (1, steps)  # as the last checkpoint has them
    succeed(command, tmp_path / "third")
    assert_same_curve(folder, uninterrupted, 1e-6)
    assert run_state(folder) == run_state(uninterrupted)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "entry", "longest"),
    [
        ("launch._gather", 1, 0.3),
        ("backend.update", 2, 0.1),
        ("pipeline._rollout", 2, 0.08),
        ("parts.sync", 2, 0.03),
        ("backend._begin", 2, 0.0),
        ("backend._finish", 2, 0.0),
    ],
)
def test_kill_9_of_a_rank_in_any_stage_is_said_and_the_run_goes_on(
    job: Path, uninterrupted: Path, tmp_path: Path, stage: str, entry: int, longest: float
) -> None:
    folder = tmp_path / "run"
    moment = Moment(stage, signal.SIGKILL, entry, random.Random(stage).uniform(0, longest), rank=0)
    command = megatron(job, folder, PP)
    killed_rank_says_so(run(command, tmp_path / "first", moment), 0, folder)
    succeed(command, tmp_path / "second")
    assert_same_curve(folder, uninterrupted, 1e-4, FLOOR)


@pytest.fixture(scope="module")
def stopped(job: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Ended]:
    """A run that SIGTERM ended in its third step, with no checkpoint but that of the interruption."""
    folder = tmp_path_factory.mktemp("stopped")
    command = [*megatron(job, folder / "run", TP), "checkpoint.every=0"]
    return folder / "run", run(command, folder / "process", Moment("backend.update", signal.SIGTERM, 3, 0.02))


def test_sigterm_checkpoints_the_last_whole_step(stopped: tuple[Path, Ended]) -> None:
    folder, ended = stopped
    assert ended.hit and ended.code == 130 and ended.after_s < 60, ended
    assert ended.err.splitlines()[-1] == "metis-fast: stopped; run the same command again to go on", ended
    assert not ended.orphans and not ended.scratch, ended
    steps = len(metrics(folder))
    assert steps in (2, 3)  # 3 where the signal came past the first optimizer step
    assert CheckpointStore(folder / "checkpoints", STEPS).steps() == (steps,)


@pytest.mark.slow  # the quick one of another layout goes on from that checkpoint, the one of kill -9 bit for bit
def test_a_run_that_sigterm_ended_goes_on_bit_for_bit(
    job: Path, uninterrupted: Path, stopped: tuple[Path, Ended], tmp_path: Path
) -> None:
    shutil.copytree(stopped[0], tmp_path / "run")
    succeed(megatron(job, tmp_path / "run", TP), tmp_path / "process")
    assert run_state(tmp_path / "run") == run_state(uninterrupted)


# -- another layout ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param((), marks=pytest.mark.slow),
        (DP,),
        pytest.param((PP, DP), marks=pytest.mark.slow),
        pytest.param((DP, "train.megatron.distributed_optimizer=false"), marks=pytest.mark.slow),
        pytest.param((TP, "train.megatron.sequence_parallel=true", "train.megatron.recompute=full"), marks=pytest.mark.slow),
        pytest.param((TP, PP, DP), marks=pytest.mark.slow),
    ],
    ids=lambda layout: " ".join(one.removeprefix("train.megatron.") for one in layout) or "one rank",
)
def test_a_run_of_two_tensor_parallel_ranks_goes_on_under_another_layout(
    job: Path, uninterrupted: Path, stopped: tuple[Path, Ended], tmp_path: Path, layout: tuple[str, ...]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(stopped[0], folder)
    command = megatron(job, folder, "train.megatron.tensor_parallel=1", *layout)
    succeed(command, tmp_path / "process")
    assert_same_curve(folder, uninterrupted, 1e-4, FLOOR)


@pytest.mark.slow
@pytest.mark.parametrize("layout", [(PP, DP), (DP, "train.megatron.distributed_optimizer=false"), (TP, DP)])
def test_a_run_under_another_layout_goes_on_with_two_tensor_parallel_ranks(
    job: Path, uninterrupted: Path, tmp_path: Path, layout: tuple[str, ...]
) -> None:
    folder = tmp_path / "run"
    ended = run(megatron(job, folder, *layout), tmp_path / "first", Moment("pipeline._rollout", signal.SIGTERM, 4))
    assert ended.hit and ended.code == 130 and not ended.orphans, ended
    succeed(megatron(job, folder, TP), tmp_path / "second")
    assert_same_curve(folder, uninterrupted, 1e-4, FLOOR)


def test_a_run_does_not_go_on_with_the_other_back_end(job: Path, uninterrupted: Path, tmp_path: Path) -> None:
    folder = cut(uninterrupted, tmp_path / "run", STEPS)
    line = failed(run(train(job, folder, "model.freeze=[]"), tmp_path / "process"))
    assert "holds a run with another train.backend ('megatron', now 'torch')" in line


# -- checkpoints ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow  # test_cli_errors.py has a quick one, of the torch back end
def test_a_truncated_checkpoint_is_warned_of_and_the_one_before_taken(job: Path, uninterrupted: Path, tmp_path: Path) -> None:
    folder = cut(uninterrupted, tmp_path / "run", STEPS - 1)
    part = max((folder / "checkpoints" / f"step-{STEPS - 1:06d}" / "trainer").glob("*.distcp"))
    part.write_bytes(part.read_bytes()[:-1])
    ended = run(megatron(job, folder, TP), tmp_path / "process")
    assert ended.code == 0, ended
    warning = next(line for line in ended.err.splitlines() if not line.startswith("waiting for rank"))
    assert part.name in warning and "falling back to an earlier checkpoint" in warning
    assert f"step-{STEPS - 1:06d}" in warning
    assert run_state(folder) == run_state(uninterrupted)


def check_disk_full(command: list[object], folder: Path, process: Path, reason: str) -> None:
    """The run cannot write the checkpoint of step 3 for a reason, says so, and leaves the older ones."""
    line = failed(run(command, process))
    assert line.startswith("metis-fast: cannot write checkpoint step-000003") and reason in line, line
    assert "training state up to step 2 is safe; free some space" in line, line
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["step-000001", "step-000002"]


@pytest.mark.slow
def test_a_disk_full_at_checkpoint_time_keeps_the_older_ones_and_the_run_resumes_exactly(
    job: Path,
    uninterrupted: Path,
    tmp_path: Path,
    disk: Disk,  # noqa: F811
) -> None:
    folder = disk.folder / "run"
    cut(uninterrupted, folder, 2)
    command = megatron(job, folder, TP)
    # Less than the ranks write, their formats' own pages included; more than is asked for beforehand, which is the tensors.
    written = sum(path.stat().st_blocks // 2 for path in (folder / "checkpoints" / "step-000002").rglob("*") if path.is_file())
    disk.leave(written - 40)
    check_disk_full(command, folder, tmp_path / "amid", "trainer: [Errno 28] No space left on device (needs ")
    disk.resize(64 << 10)
    succeed(command, tmp_path / "last")
    assert run_state(folder) == run_state(uninterrupted)


@pytest.mark.slow
def test_a_disk_too_full_for_a_checkpoint_is_said_before_one_is_begun(
    job: Path,
    uninterrupted: Path,
    tmp_path: Path,
    disk: Disk,  # noqa: F811
) -> None:
    folder = disk.folder / "run"
    cut(uninterrupted, folder, 2)
    disk.leave(500)
    check_disk_full(megatron(job, folder, TP), folder, tmp_path / "before", "not enough space (needs ")


# -- settings that cannot work ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (["tensor_parallel=3"], "tensor_parallel=3 does not divide the model's 4 attention heads"),
        (["listen=0.0.0.0:0"], "ranks join on their own machine only, at a loopback address such as 127.0.0.1:0; for several"),
        (["listen=no-such-host:29400"], "for several machines set workers.launcher=ray"),
        (["optim.muon_lr=0.01"], "optim.muon_lr works on whole matrices"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)  # unit/test_megatron_layout.py has quick ones
            for case in (
                (["tensor_parallel=4"], "tensor_parallel=4 does not divide the model's 2 key/value heads"),
                (["sequence_parallel=true"], "set tensor_parallel to 2 or more"),
                (["pipeline_parallel=3"], "2 layers cannot be dealt out to train.megatron.pipeline_parallel=3 stages"),
                (["pipeline_parallel=2", "first_stage_layers=2"], "2 layers cannot be dealt out"),
                (["virtual_pipeline=2"], "set pipeline_parallel to 2 or more"),
                (
                    ["pipeline_parallel=2", "virtual_pipeline=2"],
                    "2 layers do not divide into pipeline_parallel=2 x virtual_pipeline=2",
                ),
                (["listen=nowhere"], "train.megatron.listen must be HOST:PORT"),
                (["activation_checkpointing=true"], "set it to false and train.megatron.recompute instead"),
                (["loss.normalization=reference"], "set it to global"),
            )
        ),
    ],
)
def test_what_cannot_work_is_named_before_a_rank_starts_and_leaves_no_run(
    job: Path, tmp_path: Path, settings: list[str], says: str
) -> None:
    folder = tmp_path / "run"
    prefix = {"optim.muon_lr=0.01": "train.", "activation_checkpointing=true": "train.", "loss.normalization=reference": ""}
    overrides = [prefix.get(setting, "train.megatron.") + setting for setting in settings]
    line = failed(run(megatron(job, folder, *overrides), tmp_path / "process"))
    assert line.startswith("metis-fast: ") and says in line
    assert not folder.exists()
