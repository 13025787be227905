"""Which part of the house may know which: CONTRIBUTING.md says it in words."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

_HOUSE = Path(__file__).parents[2] / "metis_fast"
GROUND = frozenset({"types", "errors", "compact", "config", "summary", "seal", "spans", "pixels", "machine", "open_files"})
STAGES = frozenset({"data", "tools", "rollout", "score", "sync", "train", "checkpoint", "workers", "recording"})
ABOVE = frozenset(
    {"run", "node", "demo", "report", "view", "evaluate", "serve", "sft", "doctor", "rehearse", "ablate", "profiling", "cli"}
)
ENDS = frozenset({"cli", "doctor", "rehearse", "ablate", "profiling"})
"""Verbs: nobody needs them but the command line."""
_ALLOWED = {("__main__.py", "cli")}


def _imports(path: Path) -> Iterator[str]:
    """Rooms of the house that a file imports, inside functions, too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module is not None and not node.level:
            words = node.module.split(".")
            if words[0] == "metis_fast":
                yield from words[1:2] or [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from (alias.name.split(".")[1] for alias in node.names if alias.name.startswith("metis_fast."))


def _found(rooms: frozenset[str], forbidden: frozenset[str]) -> list[str]:
    files = [path for path in sorted(_HOUSE.rglob("*.py")) if path.name != "command.py"]
    found = []
    for path in files:
        file = path.relative_to(_HOUSE)
        room = file.parts[0].removesuffix(".py")
        if room in rooms:
            reached = {one for one in _imports(path) if one in forbidden and one != room}
            found += [f"{file} imports {one}" for one in sorted(reached) if (str(file), one) not in _ALLOWED]
    return found


def test_the_ground_rests_on_nothing() -> None:
    rooms = frozenset(path.name.removesuffix(".py") for path in _HOUSE.iterdir())
    assert _found(GROUND, rooms - GROUND) == []


def test_stages_know_nothing_of_who_puts_them_together() -> None:
    assert _found(STAGES, ABOVE) == []


def test_nothing_but_the_command_line_needs_a_verb() -> None:
    rooms = frozenset(path.name.removesuffix(".py") for path in _HOUSE.iterdir())
    assert _found(rooms - ENDS, ENDS) == []


@pytest.mark.parametrize("package", ["metis_fast"])
def test_kernels_stand_on_their_own(package: str) -> None:
    kernels = _HOUSE.parent / "kernels" / "metis_kernels"
    assert [
        path
        for path in kernels.rglob("*.py")
        if f"import {package}" in path.read_text() or f"from {package}" in path.read_text()
    ] == []
