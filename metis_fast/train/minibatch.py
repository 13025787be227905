"""One optimizer step's worth of scored groups: what is run, what it is divided by, and what its numbers say.

Every trainer back end plans, computes its loss and reports by what stands here; they differ in how a pass is run.

Shape letters: T tokens of the loss of a pack, H hidden size, V vocabulary (of a tensor-parallel shard where there is one).
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from metis_fast.config import Config
from metis_fast.errors import NonFiniteError
from metis_fast.summary import Outline
from metis_fast.train.flops import FlopModel
from metis_fast.train.pack import UNSCORED, Family, Pack, Sample, itself, split
from metis_fast.train.savings import Passes, account
from metis_fast.types import Rollout, Savings, Score, UpdateStats
from metis_kernels import hdpo_loss, linear_logprob
from metis_kernels._shard import VocabShard

_LOG = logging.getLogger(__name__)

_SUMS = (
    "loss_acc", "loss_tool", "num_clipped_acc", "num_acc", "num_clipped_tool", "num_tool", "sum_kl", "sum_entropy",
    "sum_engine_gap", "num_live",
)  # fmt: skip
"""Metrics of the loss that add up over packs."""


class Scored(Protocol):
    """What of a group its plan follows from: a `ScoredGroup` is one, and so is its summary."""

    @property
    def rollouts(self) -> Sequence[Outline]: ...
    @property
    def scores(self) -> Sequence[Score]: ...


@dataclass(frozen=True, slots=True)
class Trained:
    """What of the model has gradients, and its FLOPs. vision: the tower; head: the LM head."""

    flops: FlopModel
    vision: bool
    head: bool


@dataclass(frozen=True, slots=True, eq=False)
class MiniBatch:
    """What one optimizer step runs, planned before anything does.

    packs: of all data-parallel ranks. every_row: a row of the loss for every token. owed: log-probabilities of the old policy
    are. n_acc, n_tool: the denominators.
    """

    packs: list[list[Family]]
    every_row: bool
    owed: bool
    num_rollouts: int
    num_run: int
    n_acc: int
    n_tool: int
    num_tokens: int
    flops: float
    avoided: Savings


def prunes(config: Config) -> bool:
    """Whether rollouts without an advantage are left out; a setting that needs them is named in the log."""
    if not config.train.skip_zero_advantage:
        return False
    if needed_by := _needs_every_rollout(config):
        _LOG.warning("train.skip_zero_advantage is off in this run: %s needs every rollout", needed_by)
    return not needed_by


def _needs_every_rollout(config: Config) -> str:
    """Which setting makes a rollout without an advantage count; "" if none does."""
    loss = config.loss
    if loss.entropy_coef:
        return "loss.entropy_coef"
    if loss.kl_coef:
        return "loss.kl_coef"
    return "loss.normalization=reference" if loss.normalization == "reference" else ""


def plan(groups: Sequence[Scored], first: bool, config: Config, prune: bool, trained: Trained) -> MiniBatch:
    """A mini-batch's plan; the same on every rank that is given the same groups.

    first: of a step, whose proximal policy is the current one. prune: see `prunes`.

    Raises:
        DataError: a rollout does not fit into a pass; it is named.
    """
    train = config.train
    # the others left their groups, denominators included
    every = [
        Sample(rollout, score)
        for group in groups
        for rollout, score in zip(group.rollouts, group.scores, strict=True)
        if score.verdict is not None and rollout.num_sampled
    ]
    run = [sample for sample in every if _has_coefficient(sample, config)] if prune else every
    packs = split(run, train.tokens_per_micro_batch, train.share_prompt, train.share_packs)
    owed = config.loss.proximal == "policy" and not (first and train.skip_old_logprobs)
    references = int(config.loss.kl_coef > 0)
    tokens, flops, avoided = account(
        every,
        run,
        packs,
        Passes(int(owed) + references, 1 + references, trained.vision, trained.head),
        trained.flops,
        train.share_images,
        (_num_live(run, config), sum(s.rollout.num_sampled for s in run)) if train.skip_head_rows else None,
    )
    return MiniBatch(
        packs=packs if run else [],
        every_row=not train.skip_head_rows,
        owed=owed,
        num_rollouts=len(every),
        num_run=len(run),
        n_acc=sum(sample.rollout.num_sampled for sample in every),
        n_tool=sum(sample.rollout.num_sampled for sample in every if sample.score.in_tool_denominator),
        num_tokens=tokens,
        flops=flops,
        avoided=avoided,
    )


def plans(groups: Sequence[Scored], config: Config, prune: bool, trained: Trained) -> list[MiniBatch]:
    """Of all mini-batches of a training step."""
    size = config.train.prompts_per_mini_batch
    return [plan(groups[i : i + size], i == 0, config, prune, trained) for i in range(0, len(groups), size)]


def _has_coefficient(sample: Sample, config: Config) -> bool:
    """Whether an advantage that has a weight is not 0: with w_tool = 0 (GRPO) one in the tool channel moves nothing."""
    score, loss = sample.score, config.loss
    return score.needs_gradient and bool(loss.w_acc * score.adv_acc or loss.w_tool * score.adv_tool)


def _num_live(run: Sequence[Sample], config: Config) -> int:
    """Tokens with a gradient coefficient."""
    every = bool(config.loss.entropy_coef or config.loss.kl_coef)
    return sum(sample.rollout.num_sampled for sample in run if every or _has_coefficient(sample, config))


def denominators(batch: MiniBatch, pack: Pack, config: Config) -> tuple[float, float]:
    """N_acc and N_tool of a pack: the mini-batch's, unless the public recipe's normalisation is asked for."""
    if config.loss.normalization == "global":
        return float(batch.n_acc), float(batch.n_tool)
    # the public recipe: a mean over the micro-batch's own tokens, weighted by its share of the rows
    share = max(len(pack.samples) / batch.num_rollouts, 1e-30)
    in_tool = sum(s.rollout.num_sampled for s in pack.samples if s.score.in_tool_denominator)
    return int(pack.sampled_T.sum()) / share, in_tool / share


def names(pack: Pack) -> str:
    """The pack's rollouts, for an error."""
    return ", ".join(f"{s.rollout.prompt_uid}#{s.rollout.index}" for s in pack.samples[:4])


def pack_loss(
    hidden_TH: Tensor,
    head_VH: Tensor,
    pack: Pack,
    config: Config,
    n_acc: float,
    n_tool: float,
    shard: VocabShard | None = None,
    reduce_hidden: bool = True,
    main_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The pack's share of the loss, and a row of numbers on the device: loss, largest and smallest ratio, `_SUMS`.

    shard, reduce_hidden, main_grad: see `metis_kernels.hdpo_loss`.
    """
    loss, device = config.loss, hidden_TH.device

    def there(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.to(device)

    out = hdpo_loss(
        hidden_TH,
        head_VH,
        pack.targets_T.to(device),
        there(pack.old_logp_T),
        # tokens that carry no loss are given no advantage either: NaN times 0 is none
        (pack.adv_acc_T * pack.sampled_T).to(device),
        (pack.adv_tool_T * pack.sampled_T).to(device),
        pack.sampled_T.to(device),
        n_acc,
        n_tool,
        w_acc=loss.w_acc,
        w_tool=loss.w_tool,
        eps_low=loss.eps_low,
        eps_high=loss.eps_high,
        dual_clip=loss.dual_clip,
        temperature=config.rollout.temperature,
        entropy_coef=loss.entropy_coef,
        with_entropy=True,
        kl_coef=loss.kl_coef,
        ref_logp_T=there(pack.ref_logp_T),
        tis_cap=loss.tis_cap,
        engine_logp_T=there(pack.engine_logp_T),
        anchor_T=there(pack.anchor_T),
        live_L=None if config.train.skip_head_rows else torch.arange(len(pack.targets_T), device=device),
        main_grad=main_grad,
        shard=shard,
        reduce_hidden=reduce_hidden,
        chunk=loss.token_chunk or None,
        impl=loss.impl,
    )
    m = out.metrics
    numbers = [out.loss.detach().double(), m.ratio_max, m.ratio_min, *(getattr(m, name) for name in _SUMS)]
    return out.loss, torch.stack(numbers)


def pack_logprobs(
    hidden_TH: Tensor, head_VH: Tensor, pack: Pack, config: Config, shard: VocabShard | None = None
) -> tuple[Tensor, Tensor]:
    """Log-probability and log-sum-exp of every target of a pack, [T] float32."""
    found = linear_logprob(
        hidden_TH,
        head_VH,
        pack.targets_T.to(hidden_TH.device),
        temperature=config.rollout.temperature,
        shard=shard,
        chunk=config.loss.token_chunk or None,
        impl=config.loss.impl,
    )
    return found.logp_T.float(), found.lse_T.float()


def imitation_packs(rollouts: Sequence[Outline], config: Config) -> list[list[Family]]:
    """The packs of an SFT step.

    Raises:
        DataError: a rollout does not fit into one; it is named.
    """
    train = config.train
    samples = [Sample(rollout, UNSCORED) for rollout in rollouts]
    return split(samples, config.sft.tokens_per_micro_batch, train.share_prompt, train.share_packs)


def imitation_loss(
    hidden_TH: Tensor,
    head_VH: Tensor,
    pack: Pack,
    config: Config,
    count: int,
    shard: VocabShard | None = None,
    reduce_hidden: bool = True,
    main_grad: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A loss with the gradient of the mean negative log-likelihood of `count` tokens, those of the pack among them, and the sum
    of the pack's log-likelihoods, float64 on the device.

    It is the loss of RL with advantage 1: on policy the ratio is 1, and the gradient of the surrogate that of the likelihood.
    shard, reduce_hidden, main_grad: see `metis_kernels.hdpo_loss`.
    """
    device = hidden_TH.device
    ones = torch.ones(len(hidden_TH), device=device)
    out = hdpo_loss(
        hidden_TH,
        head_VH,
        pack.targets_T.to(device),
        None,
        ones,
        ones,
        pack.sampled_T.to(device),
        count,
        0,
        w_tool=0.0,
        temperature=config.rollout.temperature,
        main_grad=main_grad,
        shard=shard,
        reduce_hidden=reduce_hidden,
        chunk=config.loss.token_chunk or None,
        impl=config.loss.impl,
    )
    return out.loss, out.logp_L.double().sum()


def imitation_result(total: float, count: int, norm: float) -> tuple[float, float]:
    """Mean negative log-likelihood and gradient norm of a step that was applied. total: the sum of log-likelihoods.

    Raises:
        NonFiniteError: one of them is none.
    """
    loss = -total / count
    if not (math.isfinite(loss) and math.isfinite(norm)):
        raise NonFiniteError(f"SFT loss is {loss} with gradient norm {norm}; lower sft.optim.lr or check the trajectories")
    return loss, norm


def spread(
    pack: Pack, logp_T: Tensor, whole: Callable[[Outline], Rollout] = itself
) -> Iterator[tuple[Sample, npt.NDArray[np.float32]]]:
    """Every rollout of a pack with its log-probabilities out of those of the pack's targets: [S], 0 where nothing was sampled.

    whole: see `build`.
    """
    values, which = logp_T.numpy(), pack.sample_T.numpy()
    for i, sample in enumerate(pack.samples):
        rollout = whole(sample.rollout)
        full = np.zeros(rollout.num_tokens, np.float32)
        full[rollout.sampled] = values[which == i]
        yield sample, full


def engine_gaps(rollout: Rollout, logp: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """How far the engine's log-probabilities of a rollout's sampled tokens are from these, [S]."""
    return np.abs(logp - rollout.logp)[rollout.sampled]


def update_stats(batch: MiniBatch, table: Sequence[Sequence[float]], norm: float, lr: float, config: Config) -> UpdateStats:
    """table: a row of `pack_loss` for every pack, of all ranks."""
    loss = config.loss
    columns = list(zip(*table, strict=True)) if table else [()] * (3 + len(_SUMS))
    sums = {name: sum(column) for name, column in zip(_SUMS, columns[3:], strict=True)}
    live = [row for row in table if row[-1]]
    count = max(1.0, sums["num_live"])
    return UpdateStats(
        loss=sum(columns[0]),
        loss_acc=sums["loss_acc"] / loss.w_acc if loss.w_acc else 0.0,
        loss_tool=sums["loss_tool"] / loss.w_tool if loss.w_tool else 0.0,
        grad_norm=norm,
        lr=lr,
        clip_acc=sums["num_clipped_acc"] / max(1, sums["num_acc"]),
        clip_tool=sums["num_clipped_tool"] / max(1, sums["num_tool"]),
        kl=sums["sum_kl"] / count,
        ratio_max=max((row[1] for row in live), default=1.0),
        ratio_min=min((row[2] for row in live), default=1.0),
        entropy=sums["sum_entropy"] / count,
        engine_gap=sums["sum_engine_gap"] / count,
        num_tokens=batch.num_tokens,
        flops=batch.flops,
        avoided=batch.avoided,
        n_acc=batch.n_acc,
        n_tool=batch.n_tool,
        skipped_step=not batch.num_run,
    )
