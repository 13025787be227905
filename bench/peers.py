"""Other people's code for the LM head: imported where it is installed, never copied.

Each function here returns what gives log-probabilities [T] of hidden_TH, head_VH, targets_T, differentiable, or raises
PeerMissing with the reason.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .candidate import PeerMissing

LogpOf = Callable[[Tensor, Tensor, Tensor], Tensor]


def need_compiler(device: torch.device) -> None:
    """Raise PeerMissing where torch.compile cannot generate code."""
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            raise PeerMissing("torch.compile needs triton on a GPU (pip install triton)")
    elif not any(shutil.which(name) for name in (os.environ.get("CXX", "g++"), "g++", "clang++")):
        raise PeerMissing("torch.compile needs a C++ compiler on the CPU (apt-get install g++)")


def verl_logp() -> LogpOf:
    """verl's FusedLinearForPPO, its own defaults: chunks of 512 tokens, logits taken again in the backward pass."""
    spec = importlib.util.find_spec("verl")
    folders = spec.submodule_search_locations if spec is not None else None
    if not folders:
        raise PeerMissing("not installed (pip install --no-deps verl)")
    # `import verl` pulls in ray, tensordict and the rest of that trainer, which this one module does not use
    path = Path(folders[0]) / "utils" / "experimental" / "torch_functional.py"
    spec = importlib.util.spec_from_file_location("verl_torch_functional", path)
    if not path.exists() or spec is None or spec.loader is None:
        raise PeerMissing(f"this version of verl has no {path.relative_to(folders[0])}")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise PeerMissing(f"{path.name} does not import: {error}") from error
    fused = module.FusedLinearForPPO()
    return lambda hidden_TH, head_VH, targets_T: fused(hidden_TH, head_VH, targets_T)[0]


def cce_logp(device: torch.device) -> LogpOf:
    """cut-cross-entropy: its Triton kernels on a GPU, its torch.compile version on the CPU."""
    try:
        from cut_cross_entropy import linear_cross_entropy  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise PeerMissing(f"not installed (pip install cut-cross-entropy): {error}") from error
    need_compiler(device)
    impl = "cce" if device.type == "cuda" else "torch_compile"

    def logp(hidden_TH: Tensor, head_VH: Tensor, targets_T: Tensor) -> Tensor:
        return -linear_cross_entropy(hidden_TH, head_VH, targets_T, reduction="none", impl=impl)

    return logp
