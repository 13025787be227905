"""What an installation holds: with a C++ compiler, without one, and with kernels compiled ahead of time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

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


def install(folder: Path, *settings: str, **environment: str) -> dict[str, str]:
    """Build a wheel, unpack it, use it: where metis_kernels is, and what it says of its compiled parts."""
    options = [argument for setting in (f"build-dir={folder / 'build'}", *settings) for argument in ("-C", setting)]
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", *options, "-w", folder, _ROOT],
        env=os.environ | environment,
        check=True,
        capture_output=True,
        text=True,
    )
    (wheel,) = folder.glob("*.whl")
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
