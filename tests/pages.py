"""The blocks of code in the documentation, for tests that run them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
_FENCE = re.compile(r"( *)(`{3,}|~{3,})(.*)")
_MARK = re.compile(r"<!-- not run: (.+) -->")


@dataclass(frozen=True, slots=True)
class Block:
    """page: from the root of the repository. line: of its fence, from 1. kind: what stands behind the fence; empty for one that
    has none, and for code that is only indented. why_not: why nobody runs it; empty where somebody does."""

    page: str
    line: int
    kind: str
    text: str
    why_not: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"

    def commands(self) -> Iterator[str]:
        """Of a shell's block: its lines, each whole, without comments of their own."""
        for line in self.text.replace("\\\n", " ").splitlines():
            if line.strip() and not line.startswith("#"):
                yield line.strip()


def blocks(page: Path) -> list[Block]:
    """All of a page. Directives of the site's (```{toctree}) are none: the site's own build runs them."""
    name, lines = str(page.relative_to(ROOT)), page.read_text(encoding="utf-8").splitlines()
    found: list[Block] = []
    number = 0
    while number < len(lines):
        line, before = lines[number], lines[number - 1].strip() if number else ""
        fence = _FENCE.fullmatch(line)
        if fence is not None:
            margin, marks, kind = len(fence[1]), fence[2], fence[3].strip()
            end = next((i for i in range(number + 1, len(lines)) if lines[i].strip() == marks), None)
            assert end is not None, f"{name}:{number + 1}: the fence is never closed"
            mark = _MARK.fullmatch(before)
            if not kind.startswith("{"):
                text = "".join(f"{one[margin:]}\n" for one in lines[number + 1 : end])
                found.append(Block(name, number + 1, kind, text, mark[1] if mark else ""))
            number = end
        elif line.startswith("    ") and not before:
            found.append(Block(name, number + 1, "", line, ""))
        number += 1
    return found


BLOCKS = [block for page in PAGES for block in blocks(page)]
SHELL = [block for block in BLOCKS if block.kind == "bash"]


def commands(program: str) -> list[tuple[str, str]]:
    """(page's name, line) of all that the pages show of a program, also where nobody runs it."""
    found = [(Path(block.page).name, line) for block in SHELL for line in block.commands()]
    return [(page, line) for page, line in found if line.split(" ", 1)[0] == program]
