"""One pass of the policy over a pack, as a module: what FSDP gathers parameters around.

Shape letters: T tokens of the loss, H hidden size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

from metis_fast.attention import PrefixShared
from metis_fast.model import Policy
from metis_fast.tower import ImageFeatures
from metis_fast.train.pack import Pack
from metis_fast.types import ImageBlob
from metis_kernels.prefix_attention.api import AttentionImpl

T = TypeVar("T")


class PackPass(nn.Module):
    """Vision tower, decoder, and whatever is done with the hidden states and the LM head.

    vision_trained: whether the tower needs a graph. split: weights are split over ranks, which gather them in step. kept_bytes:
    of the features of a tower that is neither trained nor split, for further passes over the same images, until `forget`:
    who calls this module does so before weights may change.
    """

    def __init__(self, policy: Policy, attention: AttentionImpl, vision_trained: bool, split: bool, kept_bytes: int) -> None:
        super().__init__()
        self.model = policy.model
        self._policy = policy
        self._attention: AttentionImpl = attention
        self._vision_trained = vision_trained
        self._split = split
        self._kept: dict[str, ImageFeatures] = {}
        self._room = self._kept_bytes = 0 if vision_trained or split else kept_bytes

    def forward(self, pack: Pack, tower: ImageBlob | None, then: Callable[[Tensor, Tensor], T]) -> T:
        """`then(hidden_TH, head_VH)`, with the hidden states that predict the pack's targets.

        tower: an image for the vision tower where the pack has none but another rank's has; it changes nothing.
        """
        policy, device = self._policy, policy_device(self._policy)
        features: ImageFeatures | None = None
        idle = None
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._vision_trained):
            if pack.images:
                features = self._features(pack.images).take(pack.image_order)
            elif tower is not None:
                idle = policy.encode_images([tower], whole=True)
        plan = PrefixShared(pack.segments, self._attention)
        tokens, positions = pack.tokens_N[None].to(device), pack.positions_3N[:, None].to(device)
        hidden_TH = policy.hidden(tokens, positions, features, plan)[0, pack.select_T.to(device)]
        if idle is not None:
            parts = [*idle.embeds, *(part for layer in idle.deepstack for part in layer)]
            hidden_TH = hidden_TH + torch.stack([0 * part.sum() for part in parts]).sum().to(hidden_TH.dtype)
        return then(hidden_TH, policy.head)

    def _features(self, images: Sequence[ImageBlob]) -> ImageFeatures:
        if not self._kept_bytes:
            return self._policy.encode_images(images, whole=self._split)
        new = [image for image in images if image.sha256 not in self._kept]
        found = self._policy.encode_images(new) if new else ImageFeatures((), ())
        features = self._kept | {image.sha256: found.take([i]) for i, image in enumerate(new)}
        for image in new:
            one = features[image.sha256]
            size = sum(part.nbytes for part in (*one.embeds, *(layer[0] for layer in one.deepstack)))
            if size <= self._room:
                self._kept[image.sha256] = one
                self._room -= size
        return ImageFeatures.join([features[image.sha256] for image in images])

    def forget(self) -> None:
        """The features that are kept go."""
        self._kept.clear()
        self._room = self._kept_bytes


def policy_device(policy: Policy) -> torch.device:
    """Where the policy computes."""
    return policy.head.device
