"""What a machine is asked for before a job."""

from __future__ import annotations

from pathlib import Path

from metis_fast.config import Config, build
from metis_fast.doctor.finding import Finding
from metis_fast.doctor.machine import machine
from metis_fast.machine import memory_bytes


def _trainer(config: Config, num_parameters: int) -> list[Finding]:
    return [one for one in machine(config, num_parameters, num_parameters) if one.what == "trainer"]


def test_a_model_too_large_for_one_process_is_said_and_a_small_one_is_not(tmp_path: Path) -> None:
    config = build({"run": {"dir": str(tmp_path)}, "model": {"dtype": "bfloat16"}})
    fits = memory_bytes() // 14  # bytes a parameter: weights, masters, two moments
    (small,), (large,) = _trainer(config, fits // 20), _trainer(config, 20 * fits)
    assert small.state == "ok" and not small.advice
    assert large.state == "warning" and "train.backend=megatron" in large.advice


def test_megatron_ranks_share_it() -> None:
    assert not _trainer(build({"train": {"backend": "megatron"}}), 10**12)
