"""What test_aot.py runs in processes of its own: without Triton's interpreter, and with another libcuda.so.1 each.

    python aot_process.py build FOLDER                  compile the variants of a small library, write its sources
    python aot_process.py run LIBRARY RECORD            one launch after another, as the recording libcuda.so.1 sees them
    python aot_process.py first LIBRARY                 one launch; its error
    python aot_process.py lengths                       kernels that other batch lengths would compile just in time
    python aot_process.py compare LIBRARY               on a GPU: whether a variant gives the result of the JIT's kernel

Each prints one JSON value.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton import knobs

import metis_kernels
from metis_kernels import _launch
from metis_kernels._launch import launch
from metis_kernels.aot.build import row_of, write_sources
from metis_kernels.aot.library import Library
from metis_kernels.aot.lookup import Lookup
from metis_kernels.inspect import shipped
from metis_kernels.inspect.offline import CompiledLaunch, compile_launches

STREAM = 0x123456789


@triton.jit
def twice(value):
    return value * 2


@triton.jit(do_not_specialize=["num"])
def scale_add(x_ptr, y_ptr, bias_ptr, num, offset, scale, negate, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    # without a mask, so that the alignment of x changes the machine code
    x = twice(tl.load(x_ptr + at).to(tl.float32)) * scale + offset
    if bias_ptr is not None:
        x += tl.load(bias_ptr + at, mask=at < num)
    if negate:
        x = -x
    tl.store(y_ptr + at, x, mask=at < num)


@triton.jit
def product(x_ptr, y_ptr, out_ptr, num, BLOCK: tl.constexpr, STEP: tl.constexpr):
    row, step = tl.arange(0, BLOCK), tl.arange(0, STEP)
    out = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, num, STEP):
        x = tl.load(x_ptr + row[:, None] * num + (k + step)[None, :])
        y = tl.load(y_ptr + (k + step)[:, None] * BLOCK + row[None, :])
        out = tl.dot(x, y, out)
    tl.store(out_ptr + row[:, None] * BLOCK + row[None, :], out)


def scale_arguments(dtype: torch.dtype = torch.float32, shift: int = 0, bias: bool = True, offset: int = 2**40) -> list[Any]:
    """Arguments of scale_add. shift: elements by which x starts past an address divisible by 16."""
    x = torch.ones(7 * 2048 + 1, dtype=dtype)
    y = torch.zeros(7 * 2048)
    return [x[shift:], y, torch.ones_like(y) if bias else None, 33, offset, 0.3, True]


def product_arguments() -> list[Any]:
    return [torch.ones(64, 512, dtype=torch.float16), torch.ones(512, 64, dtype=torch.float16), torch.ones(64, 64), 512]


# name, kernel, arguments, constants, num_warps, num_stages, architecture
CASES: dict[str, tuple[Any, Callable[[], list[Any]], dict[str, Any], int, int, Any]] = {
    "plain": (scale_add, scale_arguments, {"BLOCK": 1024}, 4, 2, 90),
    "bf16": (scale_add, lambda: scale_arguments(torch.bfloat16), {"BLOCK": 1024}, 4, 2, 90),
    "unaligned": (scale_add, lambda: scale_arguments(shift=1), {"BLOCK": 1024}, 4, 2, 90),
    "block": (scale_add, scale_arguments, {"BLOCK": 2048}, 4, 2, 90),
    "offset is 1": (scale_add, lambda: scale_arguments(offset=1), {"BLOCK": 1024}, 4, 2, 90),
    "no bias": (scale_add, lambda: scale_arguments(bias=False), {"BLOCK": 1024}, 4, 2, 90),
    "2 warps": (scale_add, scale_arguments, {"BLOCK": 1024}, 2, 2, 90),
    "sm_80": (scale_add, scale_arguments, {"BLOCK": 1024}, 4, 2, 80),
    "product": (product, product_arguments, {"BLOCK": 64, "STEP": 64}, 4, 4, 90),
}


def build(folder: Path) -> dict[str, Any]:
    """Cubin, symbol and shared memory of each case."""
    launches: list[CompiledLaunch] = []
    for kernel, arguments, constants, num_warps, num_stages, arch in CASES.values():

        def run(
            kernel: Any = kernel,
            arguments: Callable[[], list[Any]] = arguments,
            constants: dict[str, Any] = constants,
            num_warps: int = num_warps,
            num_stages: int = num_stages,
        ) -> None:
            launch(kernel, (1,), *arguments(), num_warps=num_warps, num_stages=num_stages, **constants)

        launches += compile_launches(run, arch)
    # a launch that is there twice gives one variant
    cubins = write_sources([*launches, launches[0]], folder)
    return {
        name: {"cubin": str(cubin), "symbol": one.symbol, "shared": one.shared_bytes}
        for name, cubin, one in zip(CASES, cubins, launches, strict=True)
    }


class Recorded:
    """Launches through a look-up, and what the recording libcuda.so.1 wrote meanwhile."""

    def __init__(self, library: Path, record: Path) -> None:
        self.library = Library(library)
        self.lookup = Lookup(self.library)
        self.record = record
        self.record.touch()
        self.read = 0
        self.steps: dict[str, dict[str, Any]] = {}

    def case(self, name: str, grid: Sequence[int] = (7,), step: str | None = None, **other: Any) -> None:
        """Launch a case as one step, with other constants, arguments, warps, stages or architecture if given."""
        result = self.launch(name, grid, **other)
        self.steps[step or name] = result | {"calls": self.calls()}

    def launch(self, name: str, grid: Sequence[int], **other: Any) -> dict[str, Any]:
        """Launch a case: whether a variant was taken, the error, the arguments. Threads may call it at once."""
        kernel, arguments, constants, num_warps, num_stages, arch = CASES[name]
        given = other.get("arguments", arguments)()
        result: dict[str, Any] = {"taken": None, "error": None}
        try:
            result["taken"] = self.lookup.launch(
                kernel,
                grid,
                given,
                other.get("constants", constants),
                other.get("num_warps", num_warps),
                other.get("num_stages", num_stages),
                arch=other.get("arch", arch),
                device=3,
                stream=STREAM,
            )
        except RuntimeError as error:
            result["error"] = str(error)
        result["arguments"] = [one.data_ptr() if isinstance(one, torch.Tensor) else one for one in given]
        return result

    def calls(self) -> list[dict[str, Any]]:
        """Those since the last time."""
        lines = self.record.read_text().splitlines()
        new, self.read = lines[self.read :], len(lines)
        return [json.loads(line) for line in new]


def run(library: Path, record: Path) -> dict[str, Any]:
    """Every step: whether a variant was taken, the error, the arguments, and the driver calls."""
    recorded = Recorded(library, record)
    for name in CASES:
        recorded.case(name)
    recorded.case("plain", (2, 3, 4), "again")
    recorded.case("plain", (0, 5), "empty grid")

    recorded.case("plain", step="float16", arguments=lambda: scale_arguments(torch.float16))
    recorded.case("plain", step="offset not divisible", arguments=lambda: scale_arguments(offset=2**40 + 1))
    recorded.case("plain", step="32-bit offset", arguments=lambda: scale_arguments(offset=16))
    recorded.case("plain", step="other block", constants={"BLOCK": 256})
    recorded.case("plain", step="block of another type", constants={"BLOCK": 1024.0})
    recorded.case("plain", step="8 warps", num_warps=8)
    recorded.case("plain", step="3 stages", num_stages=3)
    recorded.case("plain", step="sm_100", arch=100)
    recorded.case("plain", step="register limit", constants={"BLOCK": 1024, "maxnreg": 32})

    os.environ["METIS_RECORD_CONTEXT"] = "2"
    recorded.case("plain", step="second context")
    os.environ["METIS_RECORD_CONTEXT"] = "4"
    threads = [threading.Thread(target=recorded.launch, args=("bf16", (1,))) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    recorded.steps["threads"] = {"calls": recorded.calls()}
    os.environ["METIS_RECORD_CONTEXT"] = "5"
    for call in ("cuModuleLoadData", "cuFuncSetAttribute", "cuLaunchKernel"):
        os.environ["METIS_RECORD_FAIL"] = call
        recorded.case("product", step=f"failing {call}")
    del os.environ["METIS_RECORD_FAIL"]
    recorded.case("product", step="after failing")
    os.environ["METIS_RECORD_CONTEXT"] = "0"
    recorded.case("plain", step="no context")

    compiled = compile_launches(lambda: launch(scale_add, (7,), *scale_arguments(), num_warps=4, BLOCK=1024), 90)
    recorded.steps["just in time"] = {"compiled": [one.kernel for one in compiled], "calls": recorded.calls()}

    recorded.steps["refused"] = refused(compiled[0])

    # each with a look-up that remembers nothing, as a new process would
    knobs.runtime.debug = True
    recorded.lookup = Lookup(recorded.library)
    recorded.case("plain", step="debugging")
    knobs.runtime.debug = False
    recorded.lookup = Lookup(recorded.library)
    recorded.case("plain", step="not debugging")
    twice._unsafe_update_src(twice.src.replace("value * 2", "value * 3"))
    scale_add.hash = None
    recorded.lookup = Lookup(recorded.library)
    recorded.case("plain", step="callee edited")
    return recorded.steps


def refused(launched: CompiledLaunch) -> dict[str, str]:
    """What write_sources says of launches that the launcher cannot run."""
    pointer = launched.parameters[0]
    wrong = {
        "global scratch": [replace(launched, global_scratch_bytes=128)],
        "cluster": [replace(launched, num_ctas=2)],
        "cooperative": [replace(launched, cooperative_grid=True)],
        "descriptor": [replace(launched, parameters=(replace(pointer, type="tensordesc<fp16[64, 64]>"),))],
        "many parameters": [replace(launched, parameters=(pointer,) * 63)],
        "nothing": [],
    }
    errors = {}
    for what, launches in wrong.items():
        try:
            write_sources(launches, Path("/nowhere"))
        except ValueError as error:
            errors[what] = str(error)
    return errors


def lengths() -> list[str]:
    """Launches at other lengths than the shipped configurations have that would find no variant, each by its parameters."""
    shipped_keys = {row_of(one).key for one in compile_launches(shipped.shipped_launches, 90)}

    def run() -> None:
        for num_tokens in (5000, 1, 4096 + 16):
            shipped.NUM_TOKENS = num_tokens
            shipped.linear_logprob_launches(torch.bfloat16, 2)
        for num_live in (777, 1, 4096 + 16, 4096 + 131):
            shipped.hdpo_loss_launches(torch.bfloat16, 2, num_live=num_live)

    missing = [one for one in compile_launches(run, 90) if row_of(one).key not in shipped_keys]
    return [f"{one.kernel}: {', '.join(f'{p.name}={p.value or p.type}' for p in one.parameters)}" for one in missing]


def compare(library: Path) -> bool:
    """On a GPU: whether `launch` takes a variant, and it gives the bits that the just-in-time compiler's kernel gives."""
    kernel, arguments, constants, num_warps, num_stages, _ = CASES["plain"]
    metis_kernels.__path__.insert(0, str(library.parent))
    given = [one.cuda() if isinstance(one, torch.Tensor) else one for one in arguments()]
    given[0].normal_()
    expected = [given[0], torch.zeros_like(given[1]), *given[2:]]
    kernel[(7,)](*expected, num_warps=num_warps, num_stages=num_stages, **constants)
    launch(kernel, (7,), *given, num_warps=num_warps, num_stages=num_stages, **constants)
    lookup = _launch._ahead_of_time()[0]
    assert lookup is not None
    taken = any(call for known in lookup._kernels.values() for call in known.calls.values())
    return taken and bool(given[1].any()) and torch.equal(given[1], expected[1])


def first(library: Path) -> str:
    """The error of a launch."""
    kernel, arguments, constants, num_warps, num_stages, arch = CASES["plain"]
    lookup = Lookup(Library(library))
    try:
        lookup.launch(kernel, (1,), arguments(), constants, num_warps, num_stages, arch=arch, device=0, stream=0)
    except RuntimeError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    torch.set_num_threads(1)
    command = {"build": build, "run": run, "first": first, "compare": compare, "lengths": lengths}[sys.argv[1]]
    print(json.dumps(command(*map(Path, sys.argv[2:]))))
