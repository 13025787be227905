"""Every kernel of the shipped configurations, compiled: nothing spills, all fits, and the machine code does what the design
counts on. For sm_90, which takes a minute of the compiler; for all three architectures in the slow tests."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from metis_kernels.inspect.binaries import Binary, markdown, summary
from metis_kernels.inspect.shipped import configurations
from metis_kernels.inspect.static import StaticFigures

ALL_ARCHS = (80, 90, 100)

# Kernels that stream rows, which are as fast as their loads are wide.
STREAMING = {"anchored_rows", "row_logsumexp", "entropy_rows", "scale_rows", "target_logits"}

PAGE = Path(__file__).parents[2] / "docs" / "kernels.md"


@pytest.fixture(
    scope="module", params=[pytest.param((90,), id="sm_90"), pytest.param(ALL_ARCHS, id="all", marks=pytest.mark.slow)]
)
def archs(request: pytest.FixtureRequest) -> tuple[int, ...]:
    return request.param


@pytest.fixture(scope="module")
def static_figures(archs: tuple[int, ...], compiling_environment: dict[str, str]) -> list[Binary]:
    """What `python -m metis_kernels.inspect` finds."""
    command = [sys.executable, "-m", "metis_kernels.inspect", "--json", "--arch", *map(str, archs)]
    found = json.loads(subprocess.run(command, env=compiling_environment, check=True, stdout=subprocess.PIPE).stdout)
    return [Binary(**{**binary, "figures": StaticFigures(**binary["figures"])}) for binary in found]


def failing(binaries: list[Binary]) -> str:
    """The figures of those that fail, for people."""
    return f"\n{markdown(binaries)}" if binaries else ""


def test_every_configuration_of_every_op_is_compiled(static_figures: list[Binary], archs: tuple[int, ...]):
    found = {(binary.arch, binary.op, name) for binary in static_figures for name in binary.configurations}
    assert found == {(arch, configuration.op, configuration.name) for arch in archs for configuration in configurations()}


def test_nothing_spills(static_figures: list[Binary]):
    figures = [(binary, binary.figures) for binary in static_figures]
    spilling = [one for one, f in figures if f.spill_store_bytes or f.spill_load_bytes or f.stack_bytes]
    assert not spilling, failing(spilling)


def test_every_launch_fits_on_a_multiprocessor(static_figures: list[Binary]):
    too_large = [binary for binary in static_figures if binary.figures.blocks == 0]
    assert not too_large, failing(too_large)


def test_dots_run_on_tensor_cores(static_figures: list[Binary], archs: tuple[int, ...]):
    with_dots = [binary for binary in static_figures if binary.figures.dots_for_tensor_cores]
    assert {binary.arch for binary in with_dots} == set(archs)
    without = [binary for binary in with_dots if binary.figures.tensor_core == 0]
    assert not without, failing(without)


def test_kernels_that_stream_rows_load_128_bits_at_a_time(static_figures: list[Binary]):
    streaming = [binary for binary in static_figures if binary.kernel in STREAMING]
    assert {binary.kernel for binary in streaming} == STREAMING
    # the others are scalars of the row, a few whatever its length
    narrow = [one for one in streaming if one.figures.loads_128 <= one.figures.loads_64 + one.figures.loads_narrow]
    assert not narrow, failing(narrow)


def test_the_documentation_shows_these_figures(static_figures: list[Binary], archs: tuple[int, ...]):
    text = PAGE.read_text(encoding="utf-8")
    if archs != ALL_ARCHS:  # of each "sm_80 / sm_90 / sm_100" of the page, the one that was compiled
        (arch,) = archs
        text = re.sub(r"([\d.e+]+) / ([\d.e+]+) / ([\d.e+]+)", rf"\{ALL_ARCHS.index(arch) + 1}", text)
    assert summary(static_figures) in text, "python -m metis_kernels.inspect --summary"
    # the same binaries are what an ahead-of-time build embeds
    assert f"{len(static_figures) * len(ALL_ARCHS) // len(archs)} variants" in text


@pytest.mark.usefixtures("static_figures")  # whose binaries are looked up here, not compiled again
def test_batches_of_any_length_find_their_variants(compiling_environment: dict[str, str]):
    command = [sys.executable, "-W", "error", Path(__file__).parent / "aot_process.py", "lengths"]
    environment = {"TRITON_DEFAULT_FP_FUSION": "1"} | compiling_environment
    assert json.loads(subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout) == []
