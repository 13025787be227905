"""`metis_kernels` is a package of its own, and the implementations of an op know nothing of each other."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import metis_kernels

SOURCES = Path(metis_kernels.__file__).parent
OPS = ("group_advantage", "linear_logprob", "hdpo_loss", "prefix_attention", "patchify")
IMPLEMENTATIONS = {"reference", "triton", "cpu", "flash"}

_ALONE = """
import sys
sys.modules["metis_fast"] = sys.modules["triton"] = None  # importing either fails
import torch
import metis_kernels as mk
hidden, head = torch.randn(3, 4, requires_grad=True), torch.randn(8, 4)
targets, ones = torch.tensor([0, 3, 7]), torch.ones(3)
old = mk.linear_logprob(hidden, head, targets)
mk.hdpo_loss(hidden, head, targets, old.logp_T, ones, ones, None, 3, 3, anchor_T=old.lse_T).loss.backward()
yes = torch.ones(3, dtype=torch.bool)
mk.group_advantage(ones, ones, yes, yes, targets, torch.tensor([0, 3]))
mk.full_attention(*[hidden[:, None]] * 3, (0, 3)).sum().backward()
image = torch.zeros(4, 4, 3, dtype=torch.uint8)
mk.patchify(image, patch=2, temporal=2, merge=2, mean=(0.5,) * 3, std=(0.5,) * 3, rescale=1 / 255)
"""


def test_works_without_the_trainer_and_without_triton():
    done = subprocess.run([sys.executable, "-W", "error", "-c", _ALONE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def imported(path: Path) -> set[str]:
    """Full names of what a file imports, wherever in it."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("op", OPS)
def test_implementations_do_not_import_each_other(op: str):
    files = [path for path in (SOURCES / op).glob("*.py") if path.stem in IMPLEMENTATIONS]
    assert len(files) >= 3
    for path in files:
        others = {f"metis_kernels.{op}.{name}" for name in IMPLEMENTATIONS - {path.stem}}
        assert not [name for name in imported(path) if any(name == o or name.startswith(f"{o}.") for o in others)], path.name
