"""Offline compilation and static figures of kernels whose figures are known.

This process interprets kernels, so it starts itself as a script in one that compiles them, and judges what that one says.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime import driver

from metis_kernels._launch import launch
from metis_kernels.inspect.offline import Arch, compile_launches, distinct
from metis_kernels.inspect.static import static_figures


@triton.jit
def add(x_ptr, y_ptr, out_ptr, size, step, bias_ptr, BLOCK: tl.constexpr):
    i = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)) * step
    out = tl.load(x_ptr + i, mask=i < size) + tl.load(y_ptr + i, mask=i < size)
    if bias_ptr is not None:
        out += tl.load(bias_ptr)
    tl.store(out_ptr + i, out, mask=i < size)


@triton.jit
def exponentials(x_ptr, out_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out_ptr + i, tl.exp2(tl.load(x_ptr + i)))


@triton.jit
def matmul(a_ptr, b_ptr, out_ptr, K, PRECISION: tl.constexpr, M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, BLOCK_K)
    out = tl.zeros((M, N), tl.float32)
    for start in range(0, K, BLOCK_K):
        a = tl.load(a_ptr + m[:, None] * K + (start + k)[None, :])
        b = tl.load(b_ptr + n[None, :] * K + (start + k)[:, None])
        out = tl.dot(a, b, out, input_precision=PRECISION)
    tl.store(out_ptr + m[:, None] * N + n[None, :], out)


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def run_add() -> None:
    x = meta(4097)
    aligned, shifted = x[:4096], x[1:]
    launch(add, (4, 2), aligned, aligned, aligned, 4096, 1, None, num_warps=4, BLOCK=1024)
    launch(add, (5,), aligned, shifted, aligned, 4096, 1, None, num_warps=4, BLOCK=1024)
    launch(add, (6,), aligned, aligned, aligned, 4095, 3, aligned, num_warps=4, BLOCK=1024)
    launch(add, (7,), aligned, aligned, aligned, 8192, 1, None, num_warps=4, BLOCK=1024)


def run_matmul(dtype: torch.dtype, precision: str, num_stages: int = 2) -> None:
    a, b = meta(128, 1024, dtype=dtype), meta(128, 1024, dtype=dtype)
    constants = {"PRECISION": precision, "M": 128, "N": 128, "BLOCK_K": 64}
    launch(matmul, (1,), a, b, meta(128, 128), 1024, num_warps=8, num_stages=num_stages, **constants)


def run_spilling() -> None:
    x = meta(2048)
    launch(exponentials, (1,), x, x, num_warps=1, BLOCK=2048, maxnreg=32)  # 64 values a thread


RUNS: dict[str, Callable[[], object]] = {
    "add": run_add,
    "exponentials": lambda: launch(exponentials, (1,), meta(4096), meta(4096), num_warps=4, BLOCK=4096),
    "matmul bf16": lambda: run_matmul(torch.bfloat16, "ieee"),
    "matmul float32": lambda: run_matmul(torch.float32, "ieee"),
    "matmul tf32": lambda: run_matmul(torch.float32, "tf32"),
    "matmul of 9 stages": lambda: run_matmul(torch.bfloat16, "ieee", num_stages=9),
    "spilling": run_spilling,
}


def written(arch: Arch) -> bool:
    """Whether a kernel that was compiled has written anything."""
    out = torch.full((4096,), torch.nan)
    compile_launches(lambda: launch(exponentials, (1,), out, out, num_warps=4, BLOCK=4096), arch)
    return not out.isnan().all()


def report(arch: Arch) -> Iterator[dict[str, Any]]:
    """What the compiling process says of every launch of RUNS."""
    active = driver._active
    for name, run in RUNS.items():
        launches = compile_launches(run, arch)
        again = compile_launches(run, arch)
        assert [launch.key for launch in again] == [launch.key for launch in launches]
        for one in launches:
            yield {
                **asdict(one),
                "cubin": one.cubin[:4].hex(),
                "run": name,
                "num_distinct": len(distinct(launches)),
                "figures": asdict(static_figures(one)),
                "spills_by_ptxas": spills_by_ptxas(one.ptx, arch) if name == "spilling" else None,
            }
    assert driver._active is active


def spills_by_ptxas(ptx: str, arch: Arch) -> list[int]:
    """Bytes of spill stores and loads in ptxas's own words."""
    from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx)
        name = sm_arch_from_capability(arch)
        command = [get_ptxas(arch).path, "-v", "--regAllocOptLevel=2", f"--gpu-name={name}", source, "-o", f"{folder}/cubin"]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    words = said.replace(",", "").split()
    return [int(words[i - 2]) for i, word in enumerate(words) if word == "spill"]


@pytest.fixture(scope="module", params=[90, *(pytest.param(arch, marks=pytest.mark.slow) for arch in (80, 100))])
def arch(request: pytest.FixtureRequest) -> Arch:
    return request.param


@pytest.fixture(scope="module")
def reported(arch: Arch, compiling_environment: dict[str, str]) -> dict[str, Any]:
    """written: see above. launches: a report."""
    run = subprocess.run([sys.executable, __file__, str(arch)], env=compiling_environment, check=True, stdout=subprocess.PIPE)
    return json.loads(run.stdout)


@pytest.fixture
def launches(reported: dict[str, Any]) -> Callable[[str], list[dict[str, Any]]]:
    return lambda run: [one for one in reported["launches"] if one["run"] == run]


Launches = Callable[[str], list[dict[str, Any]]]


def test_launches_are_recorded_in_order_with_their_grids(launches: Launches):
    assert [one["grid"] for one in launches("add")] == [[4, 2, 1], [5, 1, 1], [6, 1, 1], [7, 1, 1]]


def test_specialises_on_alignment_on_ones_and_on_none_as_a_launch_does(launches: Launches):
    signatures = [[(p["type"], p["value"], p["divisible_by_16"]) for p in one["parameters"]] for one in launches("add")]
    pointer, shifted, length, block = (
        ("*fp32", None, True),
        ("*fp32", None, False),
        ("i32", None, True),
        ("constexpr", 1024, False),
    )
    one, none = ("constexpr", 1, False), ("constexpr", None, False)
    assert signatures[0] == [pointer, pointer, pointer, length, one, none, block]
    assert signatures[1] == [pointer, shifted, pointer, length, one, none, block]
    assert signatures[2] == [pointer, pointer, pointer, ("i32", None, False), ("i32", None, False), pointer, block]
    assert signatures[3] == signatures[0]


def test_one_specialisation_is_one_binary(launches: Launches):
    keys = [one["key"] for one in launches("add")]
    assert keys[0] == keys[3]
    assert [one["num_distinct"] for one in launches("add")] == [3] * 4


def test_the_binary_is_for_the_architecture_and_has_the_symbol(launches: Launches, arch: Arch):
    (found,) = launches("exponentials")
    assert found["cubin"] == b"\x7fELF".hex()
    assert f".target sm_{arch}" in found["ptx"]
    assert f".entry {found['symbol']}(" in found["ptx"]
    assert (found["kernel"], found["num_warps"], found["shared_bytes"]) == ("exponentials", 4, 0)


def test_aligned_rows_are_read_128_bits_at_a_time_and_shifted_ones_are_not(launches: Launches):
    aligned, shifted, *_ = (one["figures"] for one in launches("add"))
    # 2 rows of 1024 float32 by 128 threads are 2 x 2 loads of 4 values
    assert (aligned["loads_128"], aligned["loads_narrow"]) == (4, 0)
    assert (shifted["loads_128"], shifted["loads_narrow"]) == (2, 8)


def test_one_instruction_an_exponential(launches: Launches):
    (found,) = launches("exponentials")
    assert found["figures"]["exp2"] == 4096 // 128


def test_tensor_cores_are_seen_where_they_work(launches: Launches):
    figures = {name: launches(name)[0]["figures"] for name in RUNS}
    for name, on_tensor_cores in (("matmul bf16", True), ("matmul tf32", True), ("matmul float32", False)):
        assert figures[name]["dots"] == 1
        assert figures[name]["dots_for_tensor_cores"] == on_tensor_cores
        assert (figures[name]["tensor_core"] > 0) == on_tensor_cores
    assert figures["add"]["dots"] == figures["add"]["tensor_core"] == 0


def test_a_launch_that_cannot_fit_comes_back_with_its_figures(launches: Launches):
    (found,) = launches("matmul of 9 stages")
    figures = found["figures"]
    # at least 8 in flight, each of two 128 x 64 tiles of bfloat16: 32 KiB
    assert figures["shared_bytes"] >= 8 * 32 * 1024 > figures["shared_limit_bytes"]
    assert (figures["blocks"], figures["occupancy"], figures["limited_by"]) == (0, 0.0, "shared memory")


def test_a_small_kernel_fills_all_warps_and_one_warp_blocks_do_not(launches: Launches):
    figures = launches("add")[0]["figures"]
    assert (figures["occupancy"], figures["blocks"]) == (1.0, 16)
    # at most 32 blocks of the 64 warps
    assert launches("spilling")[0]["figures"]["occupancy"] == 0.5


def test_spilled_bytes_are_those_that_ptxas_reports(launches: Launches):
    (found,) = launches("spilling")
    figures = found["figures"]
    assert figures["registers"] <= 32
    assert figures["spill_store_bytes"] > 0
    assert [figures["spill_store_bytes"], figures["spill_load_bytes"]] == found["spills_by_ptxas"]
    assert figures["stack_bytes"] > 0


def test_kernels_do_not_run(reported: dict[str, Any]):
    assert reported["written"] is False


def test_an_unknown_architecture_is_refused():
    with pytest.raises(ValueError, match="arch: expected one of 80, 90, 100, got 75"):
        compile_launches(run_add, 75)  # pyright: ignore[reportArgumentType]


def test_an_interpreting_process_is_refused():
    with pytest.raises(ValueError, match="TRITON_INTERPRET: expected a process in which it is not set, got 1"):
        compile_launches(run_add, 90)


if __name__ == "__main__":
    asked: Arch = int(sys.argv[1])  # pyright: ignore[reportAssignmentType]
    json.dump({"launches": list(report(asked)), "written": written(asked)}, sys.stdout)
