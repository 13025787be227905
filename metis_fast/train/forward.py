"""One pass of the policy over a pack, as a module: what FSDP gathers parameters around.

Shape letters: T tokens of the loss, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from metis_fast.attention import PrefixShared
from metis_fast.model import ImageFeatures, Policy
from metis_fast.train.pack import Pack
from metis_fast.types import ImageBlob
from metis_kernels.prefix_attention.api import AttentionImpl

T = TypeVar("T")


class PackPass(nn.Module):
    """Vision tower, decoder, and whatever is done with the hidden states and the LM head.

    vision_trained: whether the tower needs a graph.
    """

    def __init__(self, policy: Policy, attention: AttentionImpl, vision_trained: bool) -> None:
        super().__init__()
        self.model = policy.model
        self._policy = policy
        self._attention: AttentionImpl = attention
        self._vision_trained = vision_trained

    def forward(self, pack: Pack, tower: ImageBlob | None, then: Callable[[Tensor, Tensor], T]) -> T:
        """`then(hidden_TH, head_VH)`, with the hidden states that predict the pack's targets.

        tower: an image for the vision tower where the pack has none but another rank's has; it changes nothing.
        """
        policy, device = self._policy, policy_device(self._policy)
        features: ImageFeatures | None = None
        idle = None
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._vision_trained):
            if pack.images:
                features = policy.encode_images(pack.images).take(pack.image_order)
            elif tower is not None:
                idle = policy.encode_images([tower])
        plan = PrefixShared(pack.segments, self._attention)
        tokens, positions = pack.tokens_N[None].to(device), pack.positions_3N[:, None].to(device)
        hidden_TH = policy.hidden(tokens, positions, features, plan)[0, pack.select_T.to(device)]
        if idle is not None:
            parts = [*idle.embeds, *(part for layer in idle.deepstack for part in layer)]
            hidden_TH = hidden_TH + torch.stack([0 * part.sum() for part in parts]).sum().to(hidden_TH.dtype)
        return then(hidden_TH, policy.head)


def policy_device(policy: Policy) -> torch.device:
    """Where the policy computes."""
    return policy.head.device
