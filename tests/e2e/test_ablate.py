"""An ablation of two methods: stopped, killed and started again it ends as one to which nothing happened."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest
from disks import small_disk
from harness import PROGRAM, Command, error_line, run, run_state

from metis_fast.ablate import job
from metis_fast.ablate.process import Ended
from metis_fast.ablate.running import read_cost
from metis_fast.ablate.spec import Ablation, read_ablation
from metis_fast.errors import ConfigError, Interrupted
from metis_fast.run.folder import held

_LIMIT_S = 1800.0  # beside other work
_TABLES = ("results.md", "results.json", "results.csv")
_RUNS = [f"{variant}/seed-{seed}" for seed in (0, 1) for variant in ("hdpo", "grpo")]


class _Forked:
    """`metis-fast train` in a process that was forked, which starts sooner than the program."""

    def __init__(self, config: Path, log: Path, folder: Path | None = None) -> None:
        """folder: for its output; by default in that of the run."""
        self._command = Command(["train", config], folder or log.parent / "process")

    def poll(self) -> Ended | None:
        if self._command.alive:
            return None
        ended = self._command.wait()
        return Ended(ended.code, self.cpu_s(), 1.0, 1.0, ended.err.strip())

    def cpu_s(self) -> float:
        """That it says it took."""
        return 1.0

    def stop(self) -> None:
        os.kill(self._command.pid, signal.SIGTERM)

    def kill(self) -> None:
        os.kill(self._command.pid, signal.SIGKILL)


class _Stopping(_Forked):
    """Ctrl-C reaches the ablation when the third run has made its first step."""

    started = 0

    def __init__(self, config: Path, log: Path) -> None:
        super().__init__(config, log)
        _Stopping.started += 1
        self._metrics, self._number = log.parent / "metrics.jsonl", _Stopping.started

    def poll(self) -> Ended | None:
        if self._number == 3 and self._metrics.exists() and self._metrics.read_bytes():
            self._number = 0
            signal.raise_signal(signal.SIGINT)
        return super().poll()


def _file(folder: Path, demo: Path, out: str, more: str = "") -> Path:
    path = folder / f"{out}.yaml"
    path.write_text(f"""
out: {folder / out}
base:
  base: {demo / "config.yaml"}
  log: {{tensorboard: false}}
  eval: {{every: 0, rollouts_per_prompt: 2}}
seeds: [0, 1]
budget: {{steps: 2}}
variants:
  hdpo: {{loss: {{w_tool: 0.3}}}}
  grpo: {{score: {{estimator: grpo}}}}
{more}""")
    return path


@pytest.fixture(scope="module")
def whole(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Ablation:
    """One to which nothing happened."""
    ablation = read_ablation(_file(tmp_path_factory.mktemp("ablate"), demo, "whole"))
    assert job.make(ablation, start=_Forked) == 0
    return ablation


def _same(out: Path, other: Path) -> None:
    for name in _TABLES:
        assert (out / name).read_bytes() == (other / name).read_bytes(), name
    for name in _RUNS:
        assert run_state(out / name) == run_state(other / name), name


def test_every_variant_and_seed_is_a_run_of_its_own_from_one_cold_start(whole: Ablation, demo: Path) -> None:
    states = {name: run_state(whole.out / name) for name in _RUNS}
    weights = {name: state["trained/model.safetensors"] for name, state in states.items()}
    assert len(set(weights.values())) >= 3  # with one seed no set of right rollouts differs in its calls, and both do the same
    # the same prompts and noise for both methods: only what is learnt differs
    assert states["hdpo/seed-0"]["eval 0"] == states["grpo/seed-0"]["eval 0"]
    results = json.loads((whole.out / "results.json").read_text())
    assert {name: own["seeds"] for name, own in results["variants"].items()} == {"hdpo": [0, 1], "grpo": [0, 1]}
    summary = json.loads((whole.out / "hdpo" / "seed-1" / "summary.json").read_text())
    assert results["variants"]["hdpo"]["after"]["tool_rate"]["direct"]["seeds"][1] == pytest.approx(
        summary["after"]["direct"]["tool_rate"]
    )
    profile = json.loads((whole.out / "profile.json").read_text())["hdpo"]
    assert profile["steps"] == 4 and profile["cpu_s"].keys() == profile["wall_s"].keys() and profile["cpu_s"]["update"] > 0


def test_an_ablation_that_was_stopped_goes_on_and_has_the_same_tables(whole: Ablation, demo: Path, tmp_path: Path) -> None:
    ablation = read_ablation(_file(tmp_path, demo, "stopped"))
    with pytest.raises(Interrupted):
        job.make(ablation, start=_Stopping)
    ended = [name for name in _RUNS if (cost := read_cost(ablation.out / name)) is not None and cost.ended]
    assert ended == _RUNS[:2] and not (ablation.out / "results.json").exists()
    assert job.make(ablation, start=_Forked) == 0
    _same(ablation.out, whole.out)
    assert job.make(ablation, start=_none) == 0  # nothing is left to do


def _none(config: Path, log: Path) -> _Forked:
    raise AssertionError(f"{config} was started again")


def test_a_run_that_fails_is_said_and_the_others_go_on(
    whole: Ablation, demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ablation = read_ablation(_file(tmp_path, demo, "failing", "  bad: {model: {path: /nowhere}}\n"))
    for name in _RUNS:  # they have ended
        (ablation.out / name).parent.mkdir(parents=True, exist_ok=True)
        (ablation.out / name).symlink_to(whole.out / name)
    assert job.make(ablation, start=_Forked) == 2
    out = capsys.readouterr().out
    assert out.count("bad/seed-0: failed, metis-fast: ") == 1 and out.count("bad/seed-1: failed, ") == 1 and "/nowhere" in out
    results = json.loads((ablation.out / "results.json").read_text())
    assert set(results["variants"]) == {"hdpo", "grpo"} and set(results["missing"]) == {"bad/seed-0", "bad/seed-1"}
    assert job.tables(ablation) == 2


def test_a_variant_that_was_run_with_other_settings_is_refused(whole: Ablation, demo: Path, tmp_path: Path) -> None:
    path = _file(tmp_path, demo, "changed")
    path.write_text(path.read_text().replace("w_tool: 0.3", "w_tool: 0.4").replace(str(tmp_path / "changed"), str(whole.out)))
    with pytest.raises(ConfigError, match="holds a run with other settings"):
        job.make(read_ablation(path), start=_none)


def test_a_folder_that_cannot_be_used_is_named_as_it_was_given(demo: Path, tmp_path: Path) -> None:
    file, taken = _file(tmp_path, demo, "refused"), tmp_path / "taken"
    taken.write_text("mine")
    line = error_line(run(["ablate", file, "--out", taken], tmp_path / "a"))
    assert f"{taken}: a file stands there; set `out` (--out) to a folder" in line and taken.read_text() == "mine"
    with held(tmp_path / "refused"):
        line = error_line(run(["ablate", file], tmp_path / "b"))
    assert f"another process is running in {tmp_path / 'refused'}" in line and "set another `out` (--out)" in line


@pytest.mark.slow
def test_a_killed_ablation_leaves_no_run_behind_and_goes_on(whole: Ablation, demo: Path, tmp_path: Path) -> None:
    file = _file(tmp_path, demo, "killed")
    first = subprocess.Popen([PROGRAM, "ablate", file, "--jobs", "2"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + _LIMIT_S
    while not list((tmp_path / "killed").glob("*/seed-*/metrics.jsonl")):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    runs = psutil.Process(first.pid).children(recursive=True)
    assert runs
    first.kill()
    first.wait()
    _, left = psutil.wait_procs(runs, timeout=_LIMIT_S)
    assert not left
    assert job.make(read_ablation(file), start=_Forked) == 0
    _same(tmp_path / "killed", whole.out)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_program_and_its_runs_safely(
    whole: Ablation, demo: Path, tmp_path: Path, number: signal.Signals
) -> None:
    file = _file(tmp_path, demo, "terminal")
    first = subprocess.Popen([PROGRAM, "ablate", file], stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + _LIMIT_S
    while not list((tmp_path / "terminal").glob("*/seed-*/metrics.jsonl")):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    runs = psutil.Process(first.pid).children(recursive=True)
    os.killpg(first.pid, number)  # as a terminal does, to all in the foreground
    _, err = first.communicate(timeout=_LIMIT_S)
    assert not psutil.wait_procs(runs, timeout=_LIMIT_S)[1]
    assert first.returncode == 130 and err.splitlines()[-1] == "metis-fast: stopped; run the same command again to go on"
    assert job.make(read_ablation(file), start=_Forked) == 0
    _same(tmp_path / "terminal", whole.out)


@pytest.mark.parametrize("left", [0, pytest.param(300, marks=pytest.mark.slow)])
def test_a_full_disk_is_said_and_the_same_call_goes_on_with_room(
    whole: Ablation, demo: Path, tmp_path: Path, left: int, capsys: pytest.CaptureFixture[str]
) -> None:
    def start(config: Path, log: Path) -> _Forked:
        return _Forked(config, log, tmp_path / "processes" / config.parent.name / config.stem)

    with small_disk(tmp_path / "disk") as disk:
        ablation = read_ablation(_file(disk.folder, demo, "full"))
        disk.leave(left)  # KiB: for nothing, or for the start of a run
        try:
            assert job.make(ablation, start=start) > 0
            assert "free some space" in capsys.readouterr().out
        except OSError as error:  # the program makes one line of it
            assert error.errno == errno.ENOSPC
        disk.resize(64 << 10)
        assert job.make(ablation, start=start) == 0
        _same(ablation.out, whole.out)
        assert not list(ablation.out.glob("**/*.tmp"))


class _Counted(_Forked):
    """A second for the start and for every step."""

    def __init__(self, config: Path, log: Path) -> None:
        super().__init__(config, log)
        self._metrics = log.parent / "metrics.jsonl"

    def cpu_s(self) -> float:
        return 1.0 + len(self._metrics.read_text().splitlines())


def test_cpu_minutes_become_the_same_steps_for_all_runs(demo: Path, tmp_path: Path) -> None:
    file = _file(tmp_path, demo, "budget")
    file.write_text(file.read_text().replace("{steps: 2}", "{cpu_minutes: 0.22}").replace("[0, 1]", "[0]"))
    ablation = read_ablation(file)
    assert job.make(ablation, start=_Counted) == 0
    assert json.loads((ablation.out / "budget.json").read_text())["steps"] == 12  # 13.2 seconds
    for name in ("hdpo/seed-0", "grpo/seed-0"):
        assert len((ablation.out / name / "metrics.jsonl").read_text().splitlines()) == 12
    assert not (ablation.out / "pilot").exists()
    assert job.make(ablation, start=_none) == 0
