"""Which part of the house may know which: CONTRIBUTING.md says it in words."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

_HOUSE = Path(__file__).parents[2] / "metis_fast"
_PAGE = _HOUSE.parent / "CONTRIBUTING.md"


def _layer(name: str) -> frozenset[str]:
    """Rooms in a layer's row of the table in CONTRIBUTING.md."""
    rows = [line for line in _PAGE.read_text(encoding="utf-8").splitlines() if line.startswith(f"| {name} |")]
    assert len(rows) == 1, f"CONTRIBUTING.md has {len(rows)} rows of the layer {name}"
    return frozenset(re.findall(r"`(\w+)`", rows[0].split("|")[2]))


ROOMS = frozenset(path.stem for path in _HOUSE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()) - {
    "__init__",
    "__main__",
}
GROUND, STAGES, ASSEMBLY, VERBS = (_layer(name) for name in ("ground", "stages", "assembly", "verbs"))
_ALLOWED = {
    ("__main__.py", "cli"),
    # ranks that Ray has placed: CONTRIBUTING.md names them
    ("train/megatron/backend.py", "cluster"),
    ("train/megatron/step.py", "cluster"),
}


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


def test_every_room_has_one_layer_and_a_line_that_says_what_it_is_for() -> None:
    assert Counter([*GROUND, *STAGES, *ASSEMBLY, *VERBS]) == Counter(ROOMS)
    rows = (_HOUSE.parent / "docs" / "architecture.md").read_text(encoding="utf-8")
    folders = {path.parent.name for path in _HOUSE.glob("*/__init__.py")}
    assert {folder for folder in folders if not re.search(rf"^\|[^|]*`{folder}/", rows, re.MULTILINE)} == set()


def test_the_ground_rests_on_nothing() -> None:
    assert _found(GROUND, ROOMS - GROUND) == []


def test_stages_know_nothing_of_who_puts_them_together() -> None:
    assert _found(STAGES, ASSEMBLY | VERBS) == []


def test_nothing_but_the_command_line_needs_a_verb() -> None:
    assert _found(ROOMS - VERBS, VERBS) == []


def test_an_exception_that_nobody_needs_any_more_is_not_one() -> None:
    for file, room in _ALLOWED:
        assert room in set(_imports(_HOUSE / file)), file


@pytest.mark.parametrize("package", ["metis_fast"])
def test_kernels_stand_on_their_own(package: str) -> None:
    kernels = _HOUSE.parent / "kernels" / "metis_kernels"
    assert [
        path
        for path in kernels.rglob("*.py")
        if f"import {package}" in path.read_text() or f"from {package}" in path.read_text()
    ] == []
