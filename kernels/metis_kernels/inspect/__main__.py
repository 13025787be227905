"""`python -m metis_kernels.inspect`: static figures of every kernel of the shipped configurations."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import get_args

from metis_kernels.inspect.binaries import markdown, shipped_binaries, summary
from metis_kernels.inspect.offline import Arch


def main(arguments: Sequence[str]) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m metis_kernels.inspect", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", choices=get_args(Arch), default=list(get_args(Arch)))
    parser.add_argument("--json", action="store_true", help="a JSON list, one object a binary, instead of Markdown")
    parser.add_argument("--summary", action="store_true", help="one row for the architectures together, as in docs/kernels.md")
    options = parser.parse_args(arguments)
    # Triton 3.10 turns the fusion of multiply and add off unless this asks for it; 3.9 warns if it is left open.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    start = time.monotonic()
    binaries = [binary for arch in options.arch for binary in shipped_binaries(arch)]
    if options.json:
        json.dump([asdict(binary) for binary in binaries], sys.stdout, indent=1)
        return
    if options.summary:
        print(summary(binaries))
        return
    compiling = [binary.compile_seconds for binary in binaries if binary.compile_seconds]
    print(markdown(binaries))
    print(f"\n{len(binaries)} binaries, {len(compiling)} of them compiled now, in {sum(compiling):.1f} s, the others cached.")
    print(
        f"{time.monotonic() - start:.0f} s in all. Static figures: nothing ran, and nothing here says how long a kernel takes."
    )


if __name__ == "__main__":
    main(sys.argv[1:])
