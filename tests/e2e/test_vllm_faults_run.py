"""Whole runs that are stopped, killed, or lose their engines: see test_vllm_faults.py."""

from __future__ import annotations

import json
import signal
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from harness import Command, Ended, Moment, checkpoint_state, rollout_state
from scripted import left_running, use

from metis_fast.checkpoint.resume import CheckpointStore
from metis_fast.config import Config, load
from metis_fast.data.cursor import prompt_cursor
from metis_fast.data.parquet import PromptFiles
from metis_fast.model import Policy, load_policy
from metis_fast.node import opening
from metis_fast.rollout.store import read_rollouts
from metis_fast.rollout.vllm.engine import VllmEngine
from metis_fast.testing.faults import Fault, Faults, Script
from metis_fast.types import Outcome
from metis_fast.workers.hub import Hub
from metis_fast.workers.launch import SCRATCH

_STEPS = 9  # so many that faults armed after the third still find the run, on a busy machine, too


class Run:
    """The demo's main job with scripted engines."""

    def __init__(self, demo: Path, folder: Path) -> None:
        self.folder, self._demo, self._number = folder, demo, 0
        self.faults = Faults(folder.parent / "faults")
        settings = f"{{replicas: 2, restarts: 1, arguments: {{faults: {folder.parent / 'faults'}}}}}"
        self._command = ["train", demo / "config.yaml", f"run.dir={folder}", "rollout.engine=vllm", f"rollout.vllm={settings}"]
        self._command += ["data.heldout=[]", "eval.every=0", "log.progress=false", "gate.prompts=0", "checkpoint.every=0"]
        self._command += [f"train.steps={_STEPS}"]
        tokenizer = load_policy(load(demo / "config.yaml").model).tokenizer
        calls = [
            '<tool_call>{"name": "python", "arguments": {"code": "print(6 * 7)"}}</tool_call>',
            "<answer>42</answer><|im_end|>",
        ]
        answers = ["<reason>Seen.</reason><answer>42</answer><|im_end|>", "42<|im_end|>"]
        turns = [[tokenizer.encode(text) for text in texts] for texts in (calls, answers)]
        Script(turns, tokenizer.convert_tokens_to_ids("<|im_start|>")).write(folder.parent / "faults")  # pyright: ignore[reportArgumentType]

    def begin(self, moment: Moment | None = None) -> Command:
        """The same command, once more."""
        self._number += 1
        return Command(self._command, self.folder.parent / f"{self.folder.name}-{self._number}", moment, use)

    def end(self, moment: Moment | None = None) -> Ended:
        """Begin, and wait for its end; nothing of it is left."""
        return self.ended(self.begin(moment))

    def ended(self, command: Command) -> Ended:
        """Wait for its end; nothing of it is left."""
        ended = command.wait()
        assert not ended.orphans and not left_running(self.folder / "workers"), ended
        return ended

    def steps(self) -> list[int]:
        """That are logged; a line that is just being written is none yet."""
        path = self.folder / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line)["step"] for line in text.rpartition("\n")[0].splitlines()]

    def saved(self) -> tuple[int, ...]:
        """Steps of the last checkpoint."""
        return CheckpointStore(self.folder / "checkpoints", 1).steps()[-1:]

    def check(self, steps: int, per_step: int = 4) -> None:
        """Every prompt was trained once, with all its rollouts, none of them failed."""
        assert self.steps() == list(range(steps))
        drawn = prompt_cursor(PromptFiles([self._demo / "data" / "train.parquet"]), 0).next(steps * per_step)
        for step in range(steps):
            stored = list(read_rollouts(self.folder / "rollouts" / f"step-{step:06d}.parquet"))
            uids = [one.rollout.prompt_uid for one in stored]
            assert uids == [prompt.uid for prompt in drawn[step * per_step : (step + 1) * per_step] for _ in range(4)]
            for one in stored:
                assert one.score.verdict is not None and one.rollout.outcome is Outcome.ANSWERED, one.rollout.error
                assert set(one.rollout.weight_version[one.rollout.sampled].tolist()) == {step}


def test_a_run_goes_on_after_ctrl_c_kill_and_the_loss_of_all_its_engines_as_if_nothing_had_been(
    demo: Path, tmp_path: Path
) -> None:
    whole, broken = Run(demo, tmp_path / "whole"), Run(demo, tmp_path / "broken")
    assert whole.end().code == 0
    whole.check(steps=_STEPS)

    ended = broken.end(Moment("pipeline._rollout", signal.SIGINT, entry=2))
    assert ended.hit and ended.code == 130 and ended.after_s < 30, ended
    assert ended.err.splitlines()[-1] == "metis-fast: stopped; run the same command again to go on"
    assert broken.steps() == [0] and broken.saved() == (1,)

    ended = broken.end(Moment("pipeline._update", signal.SIGKILL, entry=2))
    assert ended.hit and ended.code == -signal.SIGKILL, ended
    assert broken.saved() == (1,)

    running = broken.begin()
    while len(broken.steps()) < 3:
        assert running.alive, running.read("err")
        time.sleep(0.005)
    broken.faults.arm(Fault.NO_START, times=10)
    broken.faults.arm(Fault.KILL, times=2)
    ended = broken.ended(running)
    assert ended.code == 2, ended
    assert "metis-fast: no engine is left: its process ended with 3" in ended.err.splitlines()[-1]
    done = len(broken.steps())
    assert 3 <= done < _STEPS and broken.saved() == (done,)

    broken.faults.clear()
    broken.faults.arm(Fault.KILL)  # one that can be started again does not end the run
    broken.faults.arm(Fault.DAMAGE)  # nor does a version that can be staged again
    assert broken.end().code == 0
    retries = [json.loads(line)["sync_retries"] for line in (broken.folder / "metrics.jsonl").read_text().splitlines()]
    assert retries[done:] == [1] + [0] * (_STEPS - 1 - done), retries
    broken.check(steps=_STEPS)
    for state, name in ((checkpoint_state, "checkpoints"), (rollout_state, "rollouts")):
        assert state(broken.folder / name) == state(whole.folder / name)


def _use_faulty() -> None:
    class FaultyEngines(VllmEngine):
        def __init__(self, config: Config, policy: Policy, hub: Hub) -> None:
            super().__init__(config, policy, hub, "metis_fast.testing.faults:FaultyVllm")

    opening.VllmEngine = FaultyEngines


@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed")
def test_a_real_engine_goes_on_with_the_trainers_weights_after_each_fault_and_leaves_no_files(
    demo: Path, tmp_path: Path
) -> None:
    folder, faults, scratch = tmp_path / "run", Faults(tmp_path / "faults"), set[Path]()
    vllm = f"{{cpu_threads: 1, arguments: {{faults: {tmp_path / 'faults'}}}}}"
    command = ["train", demo / "config.yaml", f"run.dir={folder}", "rollout.engine=vllm", f"rollout.vllm={vllm}"]
    command += ["rollout.deterministic=false", "model.dtype=float32", "train.steps=6", "data.heldout=[]", "eval.every=0"]
    running = Command([*command, "log.progress=false", "log.tensorboard=false"], tmp_path / "process", before=_use_faulty)

    def records() -> list[dict[str, Any]]:
        path = folder / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        return [json.loads(line) for line in text.rpartition("\n")[0].splitlines()]  # whole lines: it is being written

    for fault in ((Fault.FORGET, Fault.REFUSE, Fault.DAMAGE), (Fault.RAISE,), (Fault.NAN,)):
        done = len(records())
        while len(records()) <= done:  # the start, and the gate, are over; an engine is up
            assert running.alive, running.read("err")
            time.sleep(0.02)
        (engine,) = running.named("engine-0")
        scratch.add(Path(engine.environ()[SCRATCH]))
        assert any(path.name.startswith("vllm_dist_") for folder in scratch if folder.exists() for path in folder.iterdir())
        for one in fault:
            faults.arm(one)
        while faults.armed():
            assert running.alive, running.read("err")
            time.sleep(0.02)
    ended = running.wait()
    assert ended.code == 0 and not ended.orphans and not ended.scratch, ended
    assert ended.err.count("; starting it again (") == 2 and "answered garbage" in ended.err, ended.err
    assert len(scratch) >= 2 and not any(folder.exists() for folder in scratch)
    assert sum(record["sync_retries"] for record in records()) == 1
    assert max(update["engine_gap"] for record in records() for update in record["updates"]) < 1e-4
    for step in range(6):
        stored = list(read_rollouts(folder / "rollouts" / f"step-{step:06d}.parquet"))
        assert len(stored) == 4 * 4
        for one in stored:
            assert one.score.verdict is not None, one.rollout.error
            assert set(one.rollout.weight_version[one.rollout.sampled].tolist()) == {step}
