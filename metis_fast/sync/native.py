"""Trainer -> native engine, in one process: after an update, the engine samples with the new weights and says so in every
token's version."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from metis_fast.model import Policy

if TYPE_CHECKING:  # the engine may use this module
    from metis_fast.rollout.native import NativeEngine


@torch.no_grad()
def push_weights(engine: NativeEngine, policy: Policy, weights: Iterator[tuple[str, Tensor]], version: int) -> None:
    """Copy a trainer's weights into the policy that the engine runs; nothing where the trainer's own module is that policy.

    weights: by Hugging Face names, all of them or none. version: optimizer-visible training steps done;
    `Rollout.weight_version` of what is sampled from here on.
    """
    live = dict(policy.model.named_parameters())  # a tied LM head is in it once
    left = set(live)
    for name, tensor in weights:
        live[name].copy_(tensor)
        left.discard(name)
    assert not left or len(left) == len(live), f"the trainer sent no {sorted(left)[:3]}"
    engine.weight_version = version
