"""The update step as the public recipe takes it, in plain PyTorch over transformers' own Qwen3-VL.

Each rollout is a sequence of its own with a copy of its prompt and of its images; a pass for old log-probabilities over every
rollout of the step comes before the first update; logits of all tokens are made, in float32; the two surrogates are two losses
on them; groups that can teach nothing are run as well. Micro-batches are filled up to a number of tokens, without padding.

What differs from the recipe: losses are divided by the mini-batch's token counts, not by each micro-batch's, so that the
gradient is the number that ours is compared with. It costs the same.

Shape letters: S tokens of a rollout, V vocabulary, R sampled tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from metis_fast.config import Config
from metis_fast.model import Policy
from metis_fast.train.flops import FlopModel
from metis_fast.train.optimizer import Optimizer, trainable
from metis_fast.train.pack import Sample, itself
from metis_fast.types import Rollout, ScoredGroup


class ReferenceTrainer:
    """One step of the recipe. flops: model FLOPs of the steps so far; num_tokens: through the decoder."""

    def __init__(self, policy: Policy, config: Config) -> None:
        policy.model.set_attn_implementation("sdpa")
        self.policy = policy
        self.optimizer = Optimizer(trainable(policy.model, ()), config.train.optim, 10)
        self.flops, self.num_tokens = 0.0, 0
        self._config = config
        self._flop_model = FlopModel.of(policy.model.config)

    def update(self, groups: Sequence[ScoredGroup]) -> None:
        """Old log-probabilities, then an optimizer step for each mini-batch."""
        size = self._config.train.prompts_per_mini_batch
        batches = [
            [Sample(r, s) for group in groups[i : i + size] for r, s in zip(group.rollouts, group.scores, strict=True)]
            for i in range(0, len(groups), size)
        ]
        old: dict[int, Tensor] = {}
        with torch.no_grad():
            for micro in (micro for batch in batches for micro in self._micro_batches(batch)):
                for sample in micro:
                    logp, _ = self._logp(itself(sample.rollout), entropy=True)
                    old[id(sample)] = logp
                    self._count(itself(sample.rollout), passes=1)
        for batch in batches:
            self.optimizer.start()
            n_acc = sum(sample.rollout.num_sampled for sample in batch)
            n_tool = sum(sample.rollout.num_sampled for sample in batch if sample.score.in_tool_denominator)
            for micro in self._micro_batches(batch):
                self._loss(micro, old, n_acc, n_tool).backward()
                self.optimizer.accumulate()
                for sample in micro:
                    self._count(itself(sample.rollout), passes=3)
            self.optimizer.step()

    def _micro_batches(self, samples: Sequence[Sample]) -> Iterator[list[Sample]]:
        micro: list[Sample] = []
        used = 0
        for sample in samples:
            size = sample.rollout.num_tokens
            if micro and used + size > self._config.train.tokens_per_micro_batch:
                yield micro
                micro, used = [], 0
            micro.append(sample)
            used += size
        yield micro

    def _logp(self, rollout: Rollout, *, entropy: bool) -> tuple[Tensor, Tensor | None]:
        """(log-probability of each sampled token [R], entropy [R] if asked for)."""
        tokens = torch.from_numpy(rollout.tokens).long()[None]
        blobs = {image.sha256: image for image in rollout.images}
        patches = [self.policy.images(blobs[span.sha256]) for span in rollout.image_spans]
        pictures: dict[str, Tensor] = {}
        if patches:
            pictures = {
                "pixel_values": torch.cat([patch.pixels for patch in patches]).to(self.policy.head.dtype),
                "image_grid_thw": torch.tensor([patch.grid for patch in patches]),
                "mm_token_type_ids": (tokens == self.policy.image_token_id).int(),
            }
        logits_SV = self.policy.model(input_ids=tokens, use_cache=False, **pictures).logits[0].float()
        logits_SV = logits_SV / self._config.rollout.temperature
        where = torch.from_numpy(rollout.sampled.nonzero()[0])
        logp_RV = logits_SV.log_softmax(-1)[where - 1]
        logp_R = logp_RV.gather(1, tokens[0, where, None])[:, 0]
        return logp_R, -(logp_RV.exp() * logp_RV).sum(-1) if entropy else None

    def _loss(self, micro: Sequence[Sample], old: dict[int, Tensor], n_acc: int, n_tool: int) -> Tensor:
        config = self._config.loss
        loss_acc = loss_tool = torch.zeros(())
        for sample in micro:
            logp_R, _ = self._logp(itself(sample.rollout), entropy=False)
            log_ratio_R = (logp_R - old[id(sample)]).clamp(-20, 20)
            loss_acc = loss_acc + self._surrogate(log_ratio_R, sample.score.adv_acc).sum()
            if sample.score.in_tool_denominator:
                loss_tool = loss_tool + self._surrogate(log_ratio_R, sample.score.adv_tool).sum()
        return config.w_acc * loss_acc / n_acc + config.w_tool * loss_tool / max(1, n_tool)

    def _surrogate(self, log_ratio_R: Tensor, advantage: float) -> Tensor:
        """The clipped, dual-clipped surrogate of one reward."""
        config = self._config.loss
        ratio_R = log_ratio_R.exp()
        clipped_R = ratio_R.clamp(1 - config.eps_low, 1 + config.eps_high)
        loss_R = torch.maximum(-advantage * ratio_R, -advantage * clipped_R)
        if advantage < 0:
            loss_R = torch.minimum(loss_R, torch.full_like(loss_R, -advantage * config.dual_clip))
        return loss_R

    def _count(self, rollout: Rollout, passes: int) -> None:
        """passes: 1 for a forward pass, 3 with its backward pass."""
        size, model = len(rollout.tokens), self._flop_model
        pairs = size * (size + 1) // 2
        images = sum(model.image(span.grid) for span in rollout.image_spans)
        self.flops += passes * (model.decoder(size, pairs) + model.row * size + images)
        self.num_tokens += size
