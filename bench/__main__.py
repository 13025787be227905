"""`python -m bench OP`: the same as `metis-fast bench OP`, from a source checkout."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from metis_fast.cli import parse
from metis_fast.errors import MetisError

from .command import run


def main(argv: Sequence[str] | None = None) -> int:
    """Options, output and exit codes of `metis-fast bench`."""
    args = parse(["bench", *(sys.argv[1:] if argv is None else argv)])
    try:
        return run(args)
    except MetisError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
