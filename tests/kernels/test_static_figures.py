"""Every kernel of the shipped configurations, compiled for three architectures: nothing spills, all fits, and the machine
code does what the design counts on."""

from __future__ import annotations

from pathlib import Path

import pytest

from metis_kernels.inspect.binaries import Binary, markdown, summary
from metis_kernels.inspect.shipped import configurations

ARCHS = (80, 90, 100)

# Kernels that stream rows, which are as fast as their loads are wide.
STREAMING = {"anchored_rows", "row_logsumexp", "entropy_rows", "scale_rows", "target_logits"}


def failing(binaries: list[Binary]) -> str:
    """The figures of those that fail, for people."""
    return f"\n{markdown(binaries)}" if binaries else ""


@pytest.mark.parametrize("arch", ARCHS)
def test_every_configuration_of_every_op_is_compiled(static_figures: list[Binary], arch: int):
    found = {(binary.op, name) for binary in static_figures if binary.arch == arch for name in binary.configurations}
    assert found == {(configuration.op, configuration.name) for configuration in configurations()}


def test_nothing_spills(static_figures: list[Binary]):
    figures = [(binary, binary.figures) for binary in static_figures]
    spilling = [one for one, f in figures if f.spill_store_bytes or f.spill_load_bytes or f.stack_bytes]
    assert not spilling, failing(spilling)


def test_every_launch_fits_on_a_multiprocessor(static_figures: list[Binary]):
    too_large = [binary for binary in static_figures if binary.figures.blocks == 0]
    assert not too_large, failing(too_large)


def test_dots_run_on_tensor_cores(static_figures: list[Binary]):
    with_dots = [binary for binary in static_figures if binary.figures.dots_for_tensor_cores]
    assert {binary.arch for binary in with_dots} == set(ARCHS)
    without = [binary for binary in with_dots if binary.figures.tensor_core == 0]
    assert not without, failing(without)


def test_kernels_that_stream_rows_load_128_bits_at_a_time(static_figures: list[Binary]):
    streaming = [binary for binary in static_figures if binary.kernel in STREAMING]
    assert {binary.kernel for binary in streaming} == STREAMING
    # the others are scalars of the row, a few whatever its length
    narrow = [one for one in streaming if one.figures.loads_128 <= one.figures.loads_64 + one.figures.loads_narrow]
    assert not narrow, failing(narrow)


def test_the_documentation_shows_these_figures(static_figures: list[Binary]):
    page = Path(__file__).parents[2] / "docs" / "kernels.md"
    text = page.read_text(encoding="utf-8")
    assert summary(static_figures) in text, "python -m metis_kernels.inspect --summary"
    # the same binaries are what an ahead-of-time build embeds
    assert f"{len(static_figures)} variants" in text
