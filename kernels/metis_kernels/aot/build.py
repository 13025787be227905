"""Compile the variants of the shipped configurations and write the sources of libmetis_aot.so around them.

    python -m metis_kernels.aot.build FOLDER [--arch 80 90 100]

writes into FOLDER: cubins/ (the machine code), variants.S (an assembler file that embeds it) and variants.h (the C table of
it, for csrc/aot/launch.c). No GPU and no driver are needed; kernels/aot.cmake calls this.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, get_args

from triton.runtime.jit import JITFunction

from metis_kernels.aot.lookup import slots_of
from metis_kernels.aot.variant import WARP_SIZE, Specialised, variant_key
from metis_kernels.inspect.offline import Arch, CompiledLaunch, compile_launches
from metis_kernels.inspect.shipped import shipped_launches

# MAX_PARAMS of csrc/aot/launch.c
MAX_PARAMS = 64


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the table. key: see `variant_key`. num_params: of the binary, the two scratch pointers included."""

    key: str
    kernel: str
    launch: CompiledLaunch
    num_params: int


def write_sources(launches: Iterable[CompiledLaunch], folder: Path) -> list[Path]:
    """Write the sources of a library with the variants of these launches, each once.

    Returns:
        The cubin of each variant, in the order of the table.

    Raises:
        ValueError: there is none, or the launcher cannot run one: it needs scratch memory, a cluster of blocks, a cooperative
            or dependent launch, or has a parameter that is no pointer and no number.
    """
    rows = list({row.key: row for row in map(row_of, launches)}.values())
    if not rows:
        raise ValueError("launches: expected at least one, got none")
    cubins = folder / "cubins"
    cubins.mkdir(parents=True, exist_ok=True)
    paths = []
    # 64-byte alignment is what the CUDA tools give an embedded image; the note says that the stack needs no execution rights
    assembler = ['.section .note.GNU-stack,"",@progbits', ".section .rodata"]
    declarations, table = [], []
    for index, row in enumerate(rows):
        path = cubins / f"{row.launch.kernel}_sm{row.launch.arch}_{row.key[:16]}.cubin"
        path.write_bytes(row.launch.cubin)
        paths.append(path)
        label = f"metis_cubin_{index}"
        assembler += [f".globl {label}", f".hidden {label}", ".balign 64", f"{label}: .incbin {_quoted(str(path.resolve()))}"]
        declarations.append(f"extern const unsigned char {label}[];")
        names = ", ".join(_quoted(name) for name in (row.key, row.kernel, row.launch.symbol))
        numbers = (
            len(row.launch.cubin),
            row.launch.arch,
            WARP_SIZE * row.launch.num_warps,
            row.launch.shared_bytes,
            row.num_params,
        )
        table.append(f"    {{{names}, {label}, {', '.join(map(str, numbers))}}},")
    (folder / "variants.S").write_text("\n".join(assembler) + "\n")
    (folder / "variants.h").write_text(
        "\n".join([*declarations, "static const struct variant VARIANTS[] = {", *table, "};"]) + "\n"
    )
    return paths


def _quoted(text: str) -> str:
    # what JSON escapes, C and the assembler escape alike, but for non-ASCII, which this leaves as it is
    return json.dumps(text, ensure_ascii=False)


def row_of(launch: CompiledLaunch) -> Row:
    """The line of the table for a launch.

    Raises:
        ValueError: see `write_sources`.
    """
    name = f"{launch.module}.{launch.kernel} (sm_{launch.arch})"
    refused = {
        "global scratch memory": launch.global_scratch_bytes,
        "profile scratch memory": launch.profile_scratch_bytes,
        "a cluster of blocks": launch.num_ctas != 1,
        "a cooperative launch": launch.cooperative_grid,
        "a dependent launch": launch.dependent_launch,
    }
    for what, wanted in refused.items():
        if wanted:
            raise ValueError(f"launches: {name} needs {what}, which the ahead-of-time launcher does not give")
    slots = slots_of([parameter.type for parameter in launch.parameters if parameter.type != "constexpr"])
    num_params = slots.size // 8
    if num_params > MAX_PARAMS:
        raise ValueError(f"launches: expected at most {MAX_PARAMS} parameters, {name} has {num_params}")
    parameters = [Specialised(parameter.type, parameter.value, parameter.divisible_by_16) for parameter in launch.parameters]
    key = variant_key(_kernel(launch), launch.arch, parameters, launch.num_warps, launch.num_stages)
    return Row(key, f"{launch.module}.{launch.kernel}", launch, num_params)


def _kernel(launch: CompiledLaunch) -> JITFunction[Any]:
    kernel = getattr(importlib.import_module(launch.module), launch.kernel)
    if not isinstance(kernel, JITFunction):
        raise ValueError(f"launches: expected {launch.module}.{launch.kernel} to be a triton.jit function, got {kernel!r}")
    return kernel


def _compile(arch: Arch) -> list[CompiledLaunch]:
    return compile_launches(shipped_launches, arch)


def main(arguments: Sequence[str]) -> None:
    """The command."""
    # Triton 3.10 turns the fusion of multiply and add off unless this asks for it; 3.9 warns if it is left open
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    parser = argparse.ArgumentParser(prog="python -m metis_kernels.aot.build", description="Sources of libmetis_aot.so.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--arch", type=int, nargs="+", choices=get_args(Arch), default=list(get_args(Arch)))
    options = parser.parse_args(arguments)
    start = time.monotonic()
    # a process an architecture; spawned, since PyTorch's threads do not survive a fork
    with ProcessPoolExecutor(min(len(options.arch), os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        launches = [launch for compiled in pool.map(_compile, options.arch) for launch in compiled]
    paths = write_sources(launches, options.folder)
    total = sum(path.stat().st_size for path in paths)
    print(f"{len(paths)} variants, {total} bytes of cubins, {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main(sys.argv[1:])
