"""Ahead-of-time kernels: a library of a few variants, real machine code, launched into a libcuda.so.1 that records.

Everything that compiles or launches runs in processes of its own (aot_process.py), since the other kernel tests of this
process are interpreted.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import metis_kernels
from metis_kernels import _launch

HERE = Path(__file__).parent
SOURCES = HERE.parents[1] / "kernels"
STREAM = 0x123456789
NULL = "00" * 8


def call_process(*arguments: object, driver: Path | None = None, **environment: str) -> Any:
    """The JSON that aot_process.py prints. driver: folder of the libcuda.so.1 to open."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    if driver:
        inherited["LD_LIBRARY_PATH"] = ":".join(filter(None, [str(driver), inherited.get("LD_LIBRARY_PATH")]))
    done = subprocess.run(
        [sys.executable, "-W", "error", HERE / "aot_process.py", *map(str, arguments)],
        env={**inherited, "TRITON_DEFAULT_FP_FUSION": "1", "PYTHONPATH": str(SOURCES), "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def link(target: Path, *arguments: object) -> Path:
    """Build a shared library with the C compiler."""
    compiler = shutil.which("cc")
    assert compiler, "these tests need a C compiler: install gcc"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-o", target, *map(str, arguments), "-ldl", "-lpthread"],
        check=True,
    )
    return target


@pytest.fixture(scope="module")
def built(compiling_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Per case of aot_process.py: its cubin, symbol and shared memory."""
    cache = compiling_environment["TRITON_CACHE_DIR"]
    return call_process("build", tmp_path_factory.mktemp("sources"), TRITON_CACHE_DIR=cache)


@pytest.fixture(scope="module")
def library(built: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    sources = Path(built["plain"]["cubin"]).parents[1]
    target = tmp_path_factory.mktemp("library") / "libmetis_aot.so"
    return link(target, f"-I{sources}", "-fvisibility=hidden", SOURCES / "csrc/aot/launch.c", sources / "variants.S")


@pytest.fixture(scope="module")
def steps(library: Path, compiling_environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each step of aot_process.run did, driver calls included."""
    folder = tmp_path_factory.mktemp("driver")
    link(folder / "libcuda.so.1", HERE / "recording_libcuda.c")
    record = folder / "record"
    cache = compiling_environment["TRITON_CACHE_DIR"]
    return call_process("run", library, record, driver=folder, METIS_RECORD=str(record), TRITON_CACHE_DIR=cache)


CASES = ("plain", "bf16", "unaligned", "block", "offset is 1", "no bias", "2 warps", "sm_80", "product")


def calls(step: dict[str, Any], name: str) -> list[dict[str, Any]]:
    return [call for call in step["calls"] if call["call"] == name]


def fnv1a(data: bytes) -> int:
    """The hash that the recording library writes of an image."""
    value = 14695981039346656037
    for byte in data:
        value = (value ^ byte) * 1099511628211 % 2**64
    return value


def test_cases_differ_in_their_machine_code(built: dict[str, Any]) -> None:
    # otherwise the next test could not tell a wrong variant from the right one
    assert set(built) == set(CASES)
    assert len({Path(one["cubin"]).read_bytes() for one in built.values()}) == len(CASES)


@pytest.mark.parametrize("case", CASES)
def test_a_launch_loads_the_variant_of_its_types_alignment_constants_and_architecture(
    case: str, built: dict[str, Any], steps: dict[str, Any]
) -> None:
    cubin = Path(built[case]["cubin"]).read_bytes()
    assert steps[case]["taken"] is True
    [loaded] = calls(steps[case], "cuModuleLoadData")
    assert (loaded["bytes"], loaded["hash"]) == (len(cubin), fnv1a(cubin))
    [function] = calls(steps[case], "cuModuleGetFunction")
    assert function["name"] == built[case]["symbol"]


@pytest.mark.parametrize("case", CASES)
def test_grid_block_stream_and_shared_memory_reach_the_driver(case: str, built: dict[str, Any], steps: dict[str, Any]) -> None:
    [launched] = calls(steps[case], "cuLaunchKernel")
    assert launched["name"] == built[case]["symbol"]
    assert launched["grid"] == [7, 1, 1]
    assert launched["block"] == [64 if case == "2 warps" else 128, 1, 1]
    assert launched["shared"] == built[case]["shared"]
    assert launched["stream"] == STREAM
    assert launched["extra"] == 0


def test_a_grid_of_three_numbers_keeps_their_order(steps: dict[str, Any]) -> None:
    [launched] = calls(steps["again"], "cuLaunchKernel")
    assert launched["grid"] == [2, 3, 4]


def test_an_empty_grid_launches_nothing(steps: dict[str, Any]) -> None:
    assert steps["empty grid"]["taken"] is True
    assert steps["empty grid"]["calls"] == []


@pytest.mark.parametrize("case", [case for case in CASES if case != "product"])
def test_argument_bytes_are_those_of_the_call(case: str, steps: dict[str, Any]) -> None:
    x, y, bias, num, offset, scale, negate = steps[case]["arguments"]
    wanted = [struct.pack("<Q", x), struct.pack("<Q", y)]
    wanted += [struct.pack("<Q", bias)] if bias is not None else []  # None is compiled in
    wanted += [struct.pack("<i", num)]
    wanted += [struct.pack("<q", offset)] if offset != 1 else []  # and so is 1
    wanted += [struct.pack("<f", scale), struct.pack("<B", negate)]
    [launched] = calls(steps[case], "cuLaunchKernel")
    # the sizes are those that the cubin states; last, Triton's pointers to scratch memory
    assert launched["arguments"] == [*(value.hex() for value in wanted), NULL, NULL]
    assert (x % 16 == 0) == (case != "unaligned")


def test_shared_memory_above_48_kib_is_asked_for_once(built: dict[str, Any], steps: dict[str, Any]) -> None:
    assert built["product"]["shared"] > 48 * 1024
    [asked] = calls(steps["product"], "cuFuncSetAttribute")
    maximum_dynamic_shared = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    assert (asked["attribute"], asked["value"]) == (maximum_dynamic_shared, built["product"]["shared"])
    order = [call["call"] for call in steps["product"]["calls"]]
    assert order.index("cuFuncSetAttribute") < order.index("cuLaunchKernel")
    assert calls(steps["plain"], "cuFuncSetAttribute") == []


def test_a_module_is_loaded_once_per_context(steps: dict[str, Any]) -> None:
    assert calls(steps["again"], "cuModuleLoadData") == []
    assert len(calls(steps["second context"], "cuModuleLoadData")) == 1


def test_threads_that_launch_at_once_load_a_module_once(steps: dict[str, Any]) -> None:
    assert len(calls(steps["threads"], "cuLaunchKernel")) == 6
    assert len(calls(steps["threads"], "cuModuleLoadData")) == 1


def test_a_thread_without_a_context_gets_the_primary_one_of_the_device(steps: dict[str, Any]) -> None:
    [retained] = calls(steps["no context"], "cuDevicePrimaryCtxRetain")
    assert retained["device"] == 3
    [current] = calls(steps["no context"], "cuCtxSetCurrent")
    assert current["context"] == 103  # what the recording library gave
    assert len(calls(steps["no context"], "cuLaunchKernel")) == 1


@pytest.mark.parametrize(
    "step",
    [
        "float16",
        "offset not divisible",
        "32-bit offset",
        "other block",
        "block of another type",
        "8 warps",
        "3 stages",
        "sm_100",
        "register limit",
        "debugging",
        "callee edited",
    ],
)
def test_without_a_fitting_variant_nothing_is_launched(step: str, steps: dict[str, Any]) -> None:
    assert steps[step]["taken"] is False
    assert steps[step]["calls"] == []


def test_a_new_look_up_finds_what_an_edit_or_an_option_hid(steps: dict[str, Any]) -> None:
    # so that the refusals of "debugging" and "callee edited" are for the reason that they name
    assert steps["not debugging"]["taken"] is True


def test_tensors_that_are_not_on_a_gpu_go_to_the_just_in_time_compiler(steps: dict[str, Any]) -> None:
    assert steps["just in time"]["compiled"] == ["scale_add"]
    assert steps["just in time"]["calls"] == []


@pytest.mark.parametrize("call", ["cuModuleLoadData", "cuFuncSetAttribute", "cuLaunchKernel"])
def test_a_driver_error_names_the_call_the_kernel_and_the_reason(call: str, steps: dict[str, Any]) -> None:
    error = steps[f"failing {call}"]["error"]
    assert f"{call} for __main__.product (sm_90)" in error
    assert "no kernel image is available for execution on the device (CUDA error 209)" in error
    assert calls(steps[f"failing {call}"], "cuLaunchKernel") == []


def test_a_launch_after_a_driver_error_works(steps: dict[str, Any]) -> None:
    assert steps["after failing"]["taken"] is True
    assert len(calls(steps["after failing"], "cuLaunchKernel")) == 1


def test_a_missing_driver_is_named(library: Path, tmp_path: Path) -> None:
    # a file that is no library stands for a missing one, on a machine that has the real one too
    (tmp_path / "libcuda.so.1").touch()
    error = call_process("first", library, driver=tmp_path)
    assert "the NVIDIA driver's libcuda.so.1 cannot be opened" in error


@pytest.fixture
def fresh_status() -> Iterator[None]:
    _launch._ahead_of_time.cache_clear()
    yield
    _launch._ahead_of_time.cache_clear()


@pytest.mark.usefixtures("fresh_status")
def test_status_counts_the_variants_of_the_library(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metis_kernels, "__path__", [*metis_kernels.__path__, str(library.parent)])
    monkeypatch.delenv("METIS_AOT", raising=False)
    assert f"{library}: 9 variants (1 for sm_80, 8 for sm_90)" in _launch.aot_status()


@pytest.mark.usefixtures("fresh_status")
def test_metis_aot_0_switches_the_library_off(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metis_kernels, "__path__", [str(library.parent)])
    monkeypatch.setenv("METIS_AOT", "0")
    assert "METIS_AOT=0" in _launch.aot_status()
    assert _launch._ahead_of_time()[0] is None


@pytest.mark.usefixtures("fresh_status")
def test_a_library_that_does_not_load_is_named_and_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "libmetis_aot.so").write_text("no library")
    monkeypatch.setattr(metis_kernels, "__path__", [str(tmp_path)])
    monkeypatch.delenv("METIS_AOT", raising=False)
    assert "libmetis_aot.so does not load" in _launch.aot_status()
    assert _launch._ahead_of_time()[0] is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() not in ((8, 0), (9, 0)),
    reason="the library of this test is for sm_80 and sm_90",
)
def test_a_variant_computes_what_the_just_in_time_compiler_computes(library: Path) -> None:
    assert call_process("compare", library)


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("global scratch", "aot_process.scale_add (sm_90) needs global scratch memory"),
        ("cluster", "needs a cluster of blocks"),
        ("cooperative", "needs a cooperative launch"),
        ("descriptor", "expected pointers and scalars, got tensordesc<fp16[64, 64]>"),
        ("many parameters", "expected at most 64 parameters"),
        ("nothing", "expected at least one, got none"),
    ],
)
def test_build_refuses_what_the_launcher_does_not_give(what: str, message: str, steps: dict[str, Any]) -> None:
    assert message.replace("aot_process", "__main__") in steps["refused"][what]
