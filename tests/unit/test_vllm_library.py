"""One door to vLLM (`metis_fast.rollout.vllm.library`): nothing of the project reaches it by another way."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
# behind the door: what vLLM itself loads, and what serves an engine that has been opened
BEHIND = {f"metis_fast/rollout/vllm/{name}.py" for name in ("plugin", "transfer", "service", "whole")}
DOOR = "metis_fast.rollout.vllm.library"


def _imports(tree: ast.AST) -> Iterator[str]:
    """Modules that a file imports when it runs; not those for a type checker alone."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        yield from _imports(node)


def _files() -> list[Path]:
    return sorted(path for folder in ("metis_fast", "bench", "tests", "kernels") for path in (ROOT / folder).rglob("*.py"))


def test_every_file_that_imports_vllm_comes_through_the_door() -> None:
    users = set()
    for path in _files():
        text = path.read_text()
        names = list(_imports(ast.parse(text)))
        if any(name.split(".")[0] == "vllm" for name in names):
            users.add(path.relative_to(ROOT).as_posix())
            assert (
                (DOOR in names and "library.load(" in text)
                or path.relative_to(ROOT).as_posix() in BEHIND
                or path.name == "library.py"
            ), path
    assert "metis_fast/rollout/vllm/library.py" in users and users > BEHIND
