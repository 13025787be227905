"""Every instruction set of the C++ ops computes the same thing: each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import metis_kernels

PROCESS = Path(__file__).parent / "isa_process.py"


def run(isa: str, num_threads: int = 1) -> dict[str, Any]:
    """What isa_process.py prints."""
    environment = os.environ | {"METIS_CPU_ISA": isa, "OMP_NUM_THREADS": str(num_threads)}
    done = subprocess.run(
        [sys.executable, "-W", "error", PROCESS, str(num_threads)], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def flags() -> set[str]:
    """What an x86-64 processor says it has; elsewhere nothing is asked for."""
    info = Path("/proc/cpuinfo")
    return set(info.read_text().partition("flags")[2].partition("\n")[0].split()) if info.exists() else set()


NEEDS = {
    "portable": set(),  # what other processors than x86-64 have alone: forced here
    "avx2": {"avx2", "fma"},
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
    "avx512_bf16": {"avx512_bf16"},
    "amx_emulated": {"avx512_bf16"},  # the tile instructions done in C: the indexing around them is that of amx
    "amx": {"amx_tile", "amx_bf16"},
}


@pytest.mark.parametrize(("isa", "num_threads"), [*((isa, 1) for isa in NEEDS), ("avx2", 2), ("portable", 2)])
def test_an_instruction_set_computes_what_float64_computes(isa: str, num_threads: int) -> None:
    missing = NEEDS[isa] - flags()
    if missing:
        pytest.skip(f"this processor has no {', '.join(sorted(missing))}")
    out = run(isa, num_threads)
    assert (out["isa"], out["status"]) == (isa, "")
    for row in out["rows"]:
        assert row["logp"] < 5e-6 and row["alone"] < 5e-6, row
        # bfloat16: unit roundoff of the exponentials and of the scaled rows, 2^-9 each, and of what is handed back
        limit = 2**-8 if row["bf16"] else 2e-6
        assert row["d_hidden"] < limit and row["d_head"] < limit, row
        assert row["no_gradient"] == 0, row
    assert out["attention"]
    for row in out["attention"]:
        assert all(row[name] < (2**-7 if row["bf16"] else 2e-6) for name in ("out", "d_query", "d_key", "d_value")), row


def test_the_best_instruction_set_of_the_processor_is_taken() -> None:
    assert metis_kernels.cpu_library_status() == ""
    environment = {name: value for name, value in os.environ.items() if name != "METIS_CPU_ISA"}
    code = "import metis_kernels as mk, torch; mk.cpu_library_status(); print(torch.ops.metis_kernels_cpu.isa())"
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    order = ["amx", "avx512_bf16", "avx512", "avx2", "portable"]
    assert done.stdout.strip() == next(isa for isa in order if not NEEDS[isa] - flags())


def test_an_instruction_set_that_is_not_there_is_named() -> None:
    status = run("avx1024")["status"]
    assert "METIS_CPU_ISA=avx1024" in status and "portable" in status
