"""The torch trainer: any device that torch runs on, weights shared with the native engine; one process, or FSDP2 over several.

Shape letters: T tokens of the loss of a pack, H hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from metis_fast.checkpoint.optimizer import FlatOptimizer, flatten_optimizer, unflatten_optimizer
from metis_fast.checkpoint.params import MASTER, OPTIMIZER, WEIGHT, add_prefix, copy_exactly, take_prefix
from metis_fast.config import Config, OptimConfig
from metis_fast.errors import CheckpointError, ConfigError, NonFiniteError
from metis_fast.model import Policy
from metis_fast.spans import Lane, span, spanned
from metis_fast.summary import ScoredSummary
from metis_fast.train.flops import FlopModel
from metis_fast.train.forward import PackPass
from metis_fast.train.minibatch import (
    MiniBatch,
    Trained,
    denominators,
    engine_gaps,
    imitation_loss,
    imitation_packs,
    imitation_result,
    names,
    pack_logprobs,
    pack_loss,
    plans,
    prunes,
    spread,
    update_stats,
)
from metis_fast.train.optimizer import Optimizer, trainable
from metis_fast.train.pack import UNSCORED, Family, Pack, Sample, build, filler, itself, split
from metis_fast.train.protocol import TrainerState
from metis_fast.train.savings import deal
from metis_fast.train.sharding import gather, gather_objects, shard, split_like, whole
from metis_fast.types import ImageBlob, Rollout, ScoredGroup, UpdateStats


@dataclass(frozen=True, slots=True, eq=False)
class _Pass:
    """A pack of this rank, and an image for the vision tower where only other ranks' packs have some (see `PackPass`)."""

    pack: Pack
    tower: ImageBlob | None


class TorchTrainer:
    """Forward and backward passes over a `Policy`, and the optimizer.

    optim: which learning rates apply (HDPO's or SFT's). total_steps: optimizer steps of the whole run, for the schedule.
    group: data-parallel ranks, each of which is given the same groups and runs its share of the packs; weights and states
    are split over them.

    Raises:
        ConfigError: an option does not go with several ranks.
    """

    def __init__(
        self, policy: Policy, config: Config, optim: OptimConfig, total_steps: int, group: dist.ProcessGroup | None = None
    ) -> None:
        self.policy = policy
        self._config = config
        self._group = group
        vision_trained = "vision" not in config.model.freeze
        kept = round(config.model.image_cache_gb * (1 << 30)) if config.train.share_images else 0
        self._forward = PackPass(policy, config.train.attention, vision_trained, group is not None, kept)
        parameters = trainable(policy.model, config.model.freeze)
        if group is not None:
            if optim.muon_lr:
                raise ConfigError("optim.muon_lr works on whole matrices, which FSDP splits over the ranks; set it to 0")
            shard(self._forward, policy, group)
            parameters = trainable(policy.model, config.model.freeze)
        self._trained = Trained(FlopModel.of(policy.model.config), vision_trained, policy.head.requires_grad)
        self.optimizer = Optimizer(parameters, optim, total_steps)
        self._reference: dict[str, Tensor] | None = None
        if config.loss.kl_coef > 0:
            self._reference = {name: p.detach().clone() for name, p in self.optimizer.parameters.items()}
        self._prunes = prunes(config)
        if config.train.activation_checkpointing:
            policy.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            policy.model.train()

    # -- state --------------------------------------------------------------------------------------------------------

    @property
    def num_updates(self) -> int:
        """See `Trainer`."""
        return self.optimizer.num_steps

    def _masters(self) -> dict[str, Tensor]:
        """The masters that are not the parameters themselves."""
        own = self.optimizer.parameters
        return {name: master.detach() for name, master in self.optimizer.masters.items() if master is not own[name]}

    def state(self) -> TrainerState:
        """See `Trainer`."""
        tensors = add_prefix(WEIGHT, gather(self.policy.model.state_dict())) | add_prefix(MASTER, gather(self._masters()))
        scalars: dict[str, object] = {"num_steps": self.optimizer.num_steps}
        for name, inner in self.optimizer.named():
            flat = flatten_optimizer(inner)
            tensors |= add_prefix(f"{OPTIMIZER}{name}.", gather(flat.tensors))
            scalars[name] = flat.scalars
        return TrainerState(tensors, scalars)

    @property
    def shares_policy(self) -> bool:
        """See `Trainer`."""
        return True

    @property
    def fetches(self) -> bool:
        """See `Trainer`."""
        return False

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """See `Trainer`; the module's own memory where nothing is split over ranks, which all call this together."""
        for name, parameter in self.policy.model.named_parameters():  # a tied LM head is in it once
            yield name, whole(parameter.detach())

    def close(self) -> None:
        """See `Trainer`."""

    def load(self, state: TrainerState, folder: Path | None = None) -> None:
        """See `Trainer`."""
        for name, _ in self.optimizer.named():
            if name not in state.scalars:
                raise CheckpointError(
                    f"the checkpoint has no {name} state; resume with the optim settings of the run that wrote it"
                )
        for prefix, live in ((MASTER, self._masters()), (WEIGHT, self.policy.model.state_dict())):
            copy_exactly(split_like(take_prefix(prefix, state.tensors), live), live)
        for name, inner in self.optimizer.named():
            moments = take_prefix(f"{OPTIMIZER}{name}.", state.tensors)
            masters = [master for part in inner.param_groups for master in part["params"]]
            # another `model.freeze` has fewer masters: `unflatten_optimizer` says so
            at = {path: int(path.split(".")[1]) for path in moments if path.startswith("state.")}
            live = {path: masters[i] for path, i in at.items() if i < len(masters)}
            unflatten_optimizer(inner, FlatOptimizer(split_like(moments, live), state.scalars[name]))
        self.optimizer.num_steps = int(state.scalars["num_steps"])

    # -- passes -------------------------------------------------------------------------------------------------------

    def _passes(self, packs: Sequence[Sequence[Family]], every_row: bool = False) -> list[_Pass]:
        """This rank's share of the packs, by predicted cost. Every rank gets as many passes as the others, because the
        gathering of split weights goes in step: where it has fewer packs, with nothing in them."""
        size, rank = (1, 0) if self._group is None else (dist.get_world_size(self._group), dist.get_rank(self._group))
        shares = deal(packs, self._trained.flops, size)
        # those with images first, so that few towers idle
        with_images = [any(s.rollout.image_spans for family in pack for s in family.samples) for pack in packs]
        shares = [sorted(share, key=lambda i: (not with_images[i], i)) for share in shares]
        passes: list[_Pass] = []
        for turn in range(max(map(len, shares))):
            others = [packs[share[turn]] for share in shares if turn < len(share)]
            images = [image for pack in others for family in pack for s in family.samples for image in itself(s.rollout).images]
            tower = min(images, key=lambda image: (len(image.data), image.sha256), default=None)
            pack = filler()
            if turn < len(shares[rank]):
                families = packs[shares[rank][turn]]
                pack = build(families, self.policy.merge, self._config.train.share_images, every_row)
            passes.append(_Pass(pack, tower if size > 1 and not pack.images else None))
        return passes

    def _split(self, samples: Sequence[Sample], budget: int) -> list[list[Family]]:
        train = self._config.train
        return split(samples, budget, train.share_prompt, train.share_packs)

    @spanned(Lane.TRAINER, "log-probs")
    @torch.no_grad()
    def _logprobs(self, one: _Pass) -> tuple[Tensor, Tensor]:
        """Log-probability and log-sum-exp of every target of a pack, [T] float32, on the CPU."""

        def run(hidden_TH: Tensor, head_VH: Tensor) -> tuple[Tensor, Tensor]:
            return pack_logprobs(hidden_TH, head_VH, one.pack, self._config)

        logp, lse = self._forward(one.pack, one.tower, run)
        return logp.cpu(), lse.cpu()

    def logprobs(self, rollouts: Sequence[Rollout]) -> list[np.ndarray]:
        """Log-probability of every sampled token under the current weights, [S] float32 a rollout, 0 elsewhere."""
        samples = [Sample(rollout, UNSCORED) for rollout in rollouts]
        place = {id(sample): i for i, sample in enumerate(samples)}
        own: dict[int, np.ndarray] = {}
        for one in self._passes(self._split(samples, self._config.train.tokens_per_micro_batch)):
            own |= {place[id(sample)]: logp for sample, logp in spread(one.pack, self._logprobs(one)[0])}
        self._forward.forget()
        found = {i: value for part in gather_objects(own, self._group) for i, value in part.items()}
        return [found[i] for i in range(len(rollouts))]

    def gaps(self, groups: Sequence[ScoredGroup | ScoredSummary]) -> list[np.ndarray]:
        """See `Trainer`."""
        rollouts = [itself(rollout) for group in groups for rollout in group.rollouts]
        return [engine_gaps(rollout, own) for rollout, own in zip(rollouts, self.logprobs(rollouts), strict=True)]

    # -- HDPO ---------------------------------------------------------------------------------------------------------

    def update(
        self, groups: Sequence[ScoredGroup | ScoredSummary], check: Callable[[], None] = lambda: None
    ) -> tuple[UpdateStats, ...]:
        """One step: cut the groups into mini-batches of `prompts_per_mini_batch` and take an optimizer step for each.

        Old log-probabilities are computed where they are owed: not for the first mini-batch, whose proximal policy is the
        current one.

        check: called before every pass until the first optimizer step; what it raises leaves weights and state as they were.

        Raises:
            DataError: a rollout does not fit into a pass; it is named, and nothing was run.
            NonFiniteError: loss or gradient of a mini-batch is NaN or Inf; its step was not applied.
        """
        batches = plans(groups, self._config, self._prunes, self._trained)
        passes = [self._passes(batch.packs, batch.every_row) if batch.packs else [] for batch in batches]
        if self._config.loss.proximal == "engine":
            passes = [
                [replace(one, pack=replace(one.pack, old_logp_T=one.pack.engine_logp_T)) for one in own] for own in passes
            ]
        for i, batch in enumerate(batches):
            if batch.owed:
                passes[i] = [self._with_old(one, check) for one in passes[i]]
        if self._reference is not None:
            passes = self._with_reference(passes)
        try:
            return tuple(
                self._step(batch, own, i, check if i == 0 else lambda: None)
                for i, (batch, own) in enumerate(zip(batches, passes, strict=True))
            )
        finally:
            self._forward.forget()

    def _with_old(self, one: _Pass, check: Callable[[], None]) -> _Pass:
        check()
        logp, lse = self._logprobs(one)
        return replace(one, pack=replace(one.pack, old_logp_T=logp, anchor_T=lse))

    @torch.no_grad()
    def _with_reference(self, passes: Sequence[Sequence[_Pass]]) -> list[list[_Pass]]:
        """Log-probabilities under the starting policy, whose weights stand in for the current ones meanwhile."""
        assert self._reference is not None
        current = {name: p.detach().clone() for name, p in self.optimizer.parameters.items()}
        for name, parameter in self.optimizer.parameters.items():
            parameter.copy_(self._reference[name])
        done = [[replace(one, pack=replace(one.pack, ref_logp_T=self._logprobs(one)[0])) for one in own] for own in passes]
        for name, parameter in self.optimizer.parameters.items():
            parameter.copy_(current[name])
        return done

    def _step(self, batch: MiniBatch, passes: Sequence[_Pass], index: int, check: Callable[[], None]) -> UpdateStats:
        lr = self.optimizer.lr
        self.optimizer.start()
        rows: list[Tensor] = []
        for one in passes:
            check()
            with span(Lane.TRAINER, "forward"):
                loss, metrics = self._loss(one, *denominators(batch, one.pack, self._config))
            with span(Lane.TRAINER, "backward"):
                loss.backward()
                self.optimizer.accumulate()
            rows.append(metrics)
        # the one wait for the device before the optimizer's step
        values = torch.stack(rows).tolist() if rows else []
        own = list(zip(values, [names(one.pack) for one in passes], strict=True))
        table = [row for part in gather_objects(own, self._group) for row in part]
        for values, which in table:
            if not math.isfinite(values[0]):
                raise NonFiniteError(
                    f"loss is {values[0]} in mini-batch {index} (rollouts {which}, …); the step was not applied"
                )
        with span(Lane.TRAINER, "optimizer"):
            norm = self.optimizer.step()
        if not math.isfinite(norm):
            raise NonFiniteError(f"gradient norm is {norm} in mini-batch {index}; the step was not applied")
        return update_stats(batch, [values for values, _ in table], norm, lr, self._config)

    def _loss(self, one: _Pass, n_acc: float, n_tool: float) -> tuple[Tensor, Tensor]:
        """See `pack_loss`."""

        def run(hidden_TH: Tensor, head_VH: Tensor) -> tuple[Tensor, Tensor]:
            return pack_loss(hidden_TH, head_VH, one.pack, self._config, n_acc, n_tool)

        return self._forward(one.pack, one.tower, run)

    # -- SFT ----------------------------------------------------------------------------------------------------------

    def imitate(self, rollouts: Sequence[Rollout]) -> tuple[float, float]:
        """One SFT step: mean negative log-likelihood over every sampled token of the batch.

        Returns loss and gradient norm.

        Raises:
            DataError: a rollout does not fit into a pass; it is named, and nothing was run.
            NonFiniteError: loss or gradient is NaN or Inf; the step was not applied.
        """
        count = sum(rollout.num_sampled for rollout in rollouts)
        passes = self._passes(imitation_packs(rollouts, self._config))
        self.optimizer.start()
        sums: list[Tensor] = []
        for one in passes:
            loss, total = self._likelihood(one, count)
            loss.backward()
            self.optimizer.accumulate()
            sums.append(total)
        self._forward.forget()
        own = float(torch.stack(sums).sum())
        total = sum(gather_objects(own, self._group))
        return imitation_result(total, count, self.optimizer.step() if math.isfinite(total) else math.nan)

    def _likelihood(self, one: _Pass, count: int) -> tuple[Tensor, Tensor]:
        """See `imitation_loss`."""

        def run(hidden_TH: Tensor, head_VH: Tensor) -> tuple[Tensor, Tensor]:
            return imitation_loss(hidden_TH, head_VH, one.pack, self._config, count)

        return self._forward(one.pack, one.tower, run)
