"""What an installation holds: with a C++ compiler, without one, and with kernels compiled ahead of time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from metis_fast import __version__

_ROOT = Path(__file__).parents[2]

# The editable install of this checkout must not be what is imported.
_LOOK = """
import json, sys
sys.meta_path = [finder for finder in sys.meta_path if "ScikitBuild" not in type(finder).__name__]
sys.path[:] = [sys.argv[1], *(p for p in sys.path if not p.startswith(sys.argv[2]) or "site-packages" in p)]
import torch
import metis_fast.bench.command
import metis_kernels as mk
logp = mk.linear_logprob(torch.ones(2, 4), torch.ones(8, 4), torch.tensor([0, 7])).logp_T
print(json.dumps({"file": mk.__file__, "cpu": mk.cpu_library_status(), "aot": mk.aot_status(), "logp": logp.tolist()}))
"""


# The demo in half a minute: every stage, none of them long enough to learn anything.
_TINY = (
    "run.threads=1", "demo.base_prompts=60", "demo.cold_start_prompts=20", "demo.train_prompts=8", "demo.heldout_prompts=6",
    "sft.phases=[{trajectories: base, steps: 3}, {trajectories: cold_start, steps: 2}]", "sft.batch_size=8",
    "rollout.prompts_per_step=4", "rollout.rollouts_per_prompt=2", "train.steps=2", "train.prompts_per_mini_batch=2",
)  # fmt: skip


def sdist(folder: Path) -> Path:
    """The source distribution of this checkout."""
    make = "import sys, scikit_build_core.build as backend; backend.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", make, folder], cwd=_ROOT, check=True, capture_output=True, text=True)
    (archive,) = folder.glob("*.tar.gz")
    return archive


def build(folder: Path, *settings: str, source: Path = _ROOT, environment: dict[str, str] | None = None) -> Path:
    """A wheel of this checkout, or of an sdist."""
    options = [argument for setting in (f"build-dir={folder / 'build'}", *settings) for argument in ("-C", setting)]
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", *options, "-w", folder, source],
        env=os.environ | (environment or {}),
        check=True,
        capture_output=True,
        text=True,
    )
    (wheel,) = folder.glob("*.whl")
    return wheel


def install(folder: Path, *settings: str, **environment: str) -> dict[str, str]:
    """Build a wheel, unpack it, use it: where metis_kernels is, and what it says of its compiled parts."""
    wheel = build(folder, *settings, environment=environment)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "installed")
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", _LOOK, folder / "installed", _ROOT], env=environ, capture_output=True, text=True, cwd=folder
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert Path(found["file"]).is_relative_to(folder)
    assert found["logp"] == pytest.approx([-2.0794415] * 2)
    return found


def test_without_a_compiler_it_installs_and_says_what_is_missing(tmp_path: Path) -> None:
    status = install(tmp_path, CXX="/no/compiler", CC="/no/compiler")
    assert "was not built" in status["cpu"] and "install g++" in status["cpu"]
    assert "was not built" in status["aot"]


@pytest.mark.slow
def test_kernels_compiled_ahead_of_time_come_with_the_option(tmp_path: Path) -> None:
    status = install(tmp_path, "cmake.define.METIS_AOT=ON")
    assert status["cpu"] == ""
    assert all(f"for sm_{arch}" in status["aot"] for arch in (80, 90, 100))


@pytest.mark.slow
def test_a_wheel_of_the_sdist_in_an_empty_environment_runs_the_demo_and_the_kernels(tmp_path: Path) -> None:
    """Installs torch and the rest by pip, at the versions of constraints.txt."""
    wheel = build(tmp_path, source=sdist(tmp_path))
    assert f"-{__version__}-" in wheel.name
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}

    def run(program: str, *arguments: str | Path) -> str:
        done = subprocess.run(
            [tmp_path / "venv/bin" / program, *arguments], cwd=folder, env=environment, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout

    run("python", "-m", "pip", "install", "-q", "--constraint", _ROOT / "constraints.txt", f"{wheel}[demo]")
    where = "import metis_kernels as mk; print(mk.__file__); print(mk.cpu_library_status() or 'compiled')"
    file, status = run("python", "-c", where).splitlines()
    assert Path(file).is_relative_to(tmp_path / "venv") and status == "compiled"
    bench = json.loads(run("metis-fast", "bench", "hdpo_loss", "--shape", "T=64,H=32,V=512", "--peers", "", "--json"))
    assert "ours" in json.dumps(bench)
    run("metis-fast", "demo", *_TINY)  # no config file
    assert "<html" in (folder / "runs/demo/report.html").read_text(encoding="utf-8").lower()
    assert len((folder / "runs/demo/metrics.jsonl").read_text(encoding="utf-8").splitlines()) >= 2
