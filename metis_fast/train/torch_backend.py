"""The torch trainer: one process, any device that torch runs on, weights shared with the native engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from metis_fast.attention import PrefixShared
from metis_fast.checkpoint.optimizer import FlatOptimizer, flatten_optimizer, unflatten_optimizer
from metis_fast.checkpoint.params import MASTER, OPTIMIZER, WEIGHT, add_prefix, copy_exactly, take_prefix
from metis_fast.config import Config, OptimConfig
from metis_fast.errors import CheckpointError, NonFiniteError
from metis_fast.model import Policy
from metis_fast.train.optimizer import Optimizer, trainable
from metis_fast.train.pack import Pack, Sample, build, split
from metis_fast.train.protocol import TrainerState
from metis_fast.types import Rollout, Score, ScoredGroup, UpdateStats
from metis_kernels import HdpoLoss, hdpo_loss, linear_logprob


@dataclass(slots=True)
class _Sums:
    """Running sums of one mini-batch; divided once, at its end."""

    loss: float = 0.0
    loss_acc: float = 0.0
    loss_tool: float = 0.0
    clipped_acc: float = 0.0
    live_acc: float = 0.0
    clipped_tool: float = 0.0
    live_tool: float = 0.0
    kl: float = 0.0
    entropy: float = 0.0
    engine_gap: float = 0.0
    ratio_max: float = 1.0
    ratio_min: float = 1.0
    live: float = 0.0
    tokens: int = 0
    shared: int = 0

    def add(self, out: HdpoLoss, pack: Pack) -> None:
        """One pack; one copy from the device."""
        m = out.metrics
        values = torch.stack(
            [
                out.loss.detach().double(), m.loss_acc, m.loss_tool, m.num_clipped_acc, m.num_acc, m.num_clipped_tool,
                m.num_tool, m.sum_kl, m.sum_entropy, m.sum_engine_gap, m.num_live, m.ratio_max, m.ratio_min,
            ]
        ).tolist()  # fmt: skip
        self.loss += values[0]
        self.loss_acc += values[1]
        self.loss_tool += values[2]
        self.clipped_acc += values[3]
        self.live_acc += values[4]
        self.clipped_tool += values[5]
        self.live_tool += values[6]
        self.kl += values[7]
        self.entropy += values[8]
        self.engine_gap += values[9]
        self.live += values[10]
        if values[10]:
            first = self.live == values[10]
            self.ratio_max = values[11] if first else max(self.ratio_max, values[11])
            self.ratio_min = values[12] if first else min(self.ratio_min, values[12])
        self.tokens += len(pack.tokens_N)
        self.shared += pack.num_shared


class TorchTrainer:
    """Forward and backward passes over a `Policy`, and the optimizer.

    optim: which learning rates apply (HDPO's or SFT's). total_steps: optimizer steps of the whole run, for the schedule.
    """

    def __init__(self, policy: Policy, config: Config, optim: OptimConfig, total_steps: int) -> None:
        self.policy = policy
        self._config = config
        self._vision_trained = "vision" not in config.model.freeze
        self.optimizer = Optimizer(trainable(policy.model, config.model.freeze), optim, total_steps)
        self._reference: dict[str, Tensor] | None = None
        if config.loss.kl_coef > 0:
            self._reference = {name: p.detach().clone() for name, p in self.optimizer.parameters.items()}
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
        tensors = add_prefix(WEIGHT, self.policy.model.state_dict()) | add_prefix(MASTER, self._masters())
        scalars: dict[str, object] = {"num_steps": self.optimizer.num_steps}
        for name, inner in self.optimizer.named():
            flat = flatten_optimizer(inner)
            tensors |= add_prefix(f"{OPTIMIZER}{name}.", flat.tensors)
            scalars[name] = flat.scalars
        return TrainerState(tensors, scalars)

    def load(self, state: TrainerState) -> None:
        """See `Trainer`."""
        for name, _ in self.optimizer.named():
            if name not in state.scalars:
                raise CheckpointError(
                    f"the checkpoint has no {name} state; resume with the optim settings of the run that wrote it"
                )
        copy_exactly(take_prefix(MASTER, state.tensors), self._masters())
        copy_exactly(take_prefix(WEIGHT, state.tensors), self.policy.model.state_dict())
        for name, inner in self.optimizer.named():
            flat = FlatOptimizer(take_prefix(f"{OPTIMIZER}{name}.", state.tensors), state.scalars[name])
            unflatten_optimizer(inner, flat)
        self.optimizer.num_steps = int(state.scalars["num_steps"])

    # -- forward ------------------------------------------------------------------------------------------------------

    def _hidden(self, pack: Pack) -> Tensor:
        """Hidden states that predict the sampled tokens, [T, H]."""
        device = self.policy.head.device
        features = None
        if pack.images:
            with torch.set_grad_enabled(torch.is_grad_enabled() and self._vision_trained):
                features = self.policy.encode_images(pack.images).take(pack.image_order)
        plan = PrefixShared(pack.segments, self._config.train.attention)
        tokens, positions = pack.tokens_N[None].to(device), pack.positions_3N[:, None].to(device)
        return self.policy.hidden(tokens, positions, features, plan)[0, pack.select_T.to(device)]

    def _packs(self, samples: Sequence[Sample], budget: int) -> list[Pack]:
        return [build(part, self.policy.merge) for part in split(samples, budget, self._config.train.share_prompt)]

    @torch.no_grad()
    def _logprobs(self, samples: Sequence[Sample]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """By id of the sample: log-probability and log-sum-exp of every sampled token, [tokens] float32, 0 elsewhere."""
        out: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for pack in self._packs(samples, self._config.train.tokens_per_micro_batch):
            found = linear_logprob(
                self._hidden(pack),
                self.policy.head,
                pack.targets_T.to(self.policy.head.device),
                temperature=self._config.rollout.temperature,
                chunk=self._config.loss.token_chunk or None,
                impl=self._config.loss.impl,
            )
            values = torch.stack([found.logp_T, found.lse_T]).float().cpu().numpy()
            which = pack.sample_T.numpy()
            for i, sample in enumerate(pack.samples):
                full = np.zeros((2, len(sample.rollout.tokens)), np.float32)
                full[:, sample.rollout.sampled] = values[:, which == i]
                out[id(sample)] = (full[0], full[1])
        return out

    def logprobs(self, rollouts: Sequence[Rollout]) -> list[np.ndarray]:
        """Log-probability of every sampled token under the current weights, [S] float32 a rollout, 0 elsewhere."""
        samples = [Sample(rollout, Score(None, rollout.outcome)) for rollout in rollouts]
        found = self._logprobs(samples)
        return [found[id(sample)][0] for sample in samples]

    # -- HDPO ---------------------------------------------------------------------------------------------------------

    def update(self, groups: Sequence[ScoredGroup], check: Callable[[], None] = lambda: None) -> tuple[UpdateStats, ...]:
        """One step: cut the groups into mini-batches of `prompts_per_mini_batch` and take an optimizer step for each.

        Old log-probabilities are computed where they are owed: not for the first mini-batch, whose proximal policy is the
        current one.

        check: called before every pass until the first optimizer step; what it raises leaves weights and state as they were.

        Raises:
            NonFiniteError: loss or gradient of a mini-batch is NaN or Inf; its step was not applied.
        """
        size = self._config.train.prompts_per_mini_batch
        mini_batches = [self._samples(groups[i : i + size]) for i in range(0, len(groups), size)]
        run = [self._select(batch) for batch in mini_batches]
        run = [batch if i == 0 else self._with_old(batch, check) for i, batch in enumerate(run)]
        if self._reference is not None:
            run = self._with_reference(run)
        return tuple(
            self._step(every, some, i, check if i == 0 else lambda: None)
            for i, (every, some) in enumerate(zip(mini_batches, run, strict=True))
        )

    def _samples(self, groups: Sequence[ScoredGroup]) -> list[Sample]:
        """Rollouts with a verdict; the others left their groups, denominators included."""
        return [
            Sample(rollout, score)
            for group in groups
            for rollout, score in zip(group.rollouts, group.scores, strict=True)
            if score.verdict is not None and rollout.num_sampled
        ]

    def _select(self, samples: list[Sample]) -> list[Sample]:
        """Leave out what has no gradient, where that is exact."""
        loss = self._config.loss
        exact = loss.entropy_coef == 0 and loss.kl_coef == 0 and loss.normalization == "global"
        if not (self._config.train.skip_zero_advantage and exact):
            return samples
        return [sample for sample in samples if sample.score.needs_gradient]

    def _with_old(self, samples: list[Sample], check: Callable[[], None]) -> list[Sample]:
        check()
        old = self._logprobs(samples)
        return [replace(sample, old_logp=old[id(sample)][0], anchor=old[id(sample)][1]) for sample in samples]

    @torch.no_grad()
    def _with_reference(self, batches: list[list[Sample]]) -> list[list[Sample]]:
        """Log-probabilities under the starting policy, whose weights stand in for the current ones meanwhile."""
        assert self._reference is not None
        current = {name: p.detach().clone() for name, p in self.optimizer.parameters.items()}
        for name, parameter in self.optimizer.parameters.items():
            parameter.copy_(self._reference[name])
        out = []
        for batch in batches:
            logp = self.logprobs([sample.rollout for sample in batch])
            out.append([replace(sample, ref_logp=value) for sample, value in zip(batch, logp, strict=True)])
        for name, parameter in self.optimizer.parameters.items():
            parameter.copy_(current[name])
        return out

    def _step(self, every: Sequence[Sample], run: Sequence[Sample], index: int, check: Callable[[], None]) -> UpdateStats:
        n_acc = sum(sample.rollout.num_sampled for sample in every)
        n_tool = sum(sample.rollout.num_sampled for sample in every if sample.score.in_tool_denominator)
        sums, lr = _Sums(), self.optimizer.lr
        self.optimizer.start()
        for pack in self._packs(run, self._config.train.tokens_per_micro_batch):
            check()
            if self._config.loss.normalization == "reference":
                # the public recipe: a mean over the micro-batch's own tokens, weighted by its share of the rows
                share = len(pack.samples) / len(every)
                in_tool = sum(s.rollout.num_sampled for s in pack.samples if s.score.in_tool_denominator)
                own_acc, own_tool = len(pack.targets_T) / share, in_tool / share
            else:
                own_acc, own_tool = float(n_acc), float(n_tool)
            total = self._micro_loss(pack, own_acc, own_tool, sums)
            if not bool(torch.isfinite(total)):
                names = ", ".join(f"{s.rollout.prompt_uid}#{s.rollout.index}" for s in pack.samples[:4])
                raise NonFiniteError(
                    f"loss is {float(total.detach())} in mini-batch {index} (rollouts {names}, …); the step was not applied"
                )
            total.backward()
            self.optimizer.accumulate()
        norm = self.optimizer.step()
        if not math.isfinite(norm):
            raise NonFiniteError(f"gradient norm is {norm} in mini-batch {index}; the step was not applied")
        count, loss = max(1.0, sums.live), self._config.loss
        return UpdateStats(
            loss=sums.loss,
            loss_acc=sums.loss_acc / loss.w_acc if loss.w_acc else 0.0,
            loss_tool=sums.loss_tool / loss.w_tool if loss.w_tool else 0.0,
            grad_norm=norm,
            lr=lr,
            clip_acc=sums.clipped_acc / max(1, sums.live_acc),
            clip_tool=sums.clipped_tool / max(1, sums.live_tool),
            kl=sums.kl / count,
            ratio_max=sums.ratio_max,
            ratio_min=sums.ratio_min,
            entropy=sums.entropy / count,
            engine_gap=sums.engine_gap / count,
            num_tokens=sums.tokens,
            num_shared=sums.shared,
            num_skipped=sum(len(s.rollout.tokens) for s in every) - sums.tokens - sums.shared,
            n_acc=n_acc,
            n_tool=n_tool,
            skipped_step=not run,
        )

    def _micro_loss(self, pack: Pack, n_acc: float, n_tool: float, sums: _Sums) -> Tensor:
        config, device = self._config.loss, self.policy.head.device

        def there(value: Tensor | None) -> Tensor | None:
            return None if value is None else value.to(device)

        out = hdpo_loss(
            self._hidden(pack),
            self.policy.head,
            pack.targets_T.to(device),
            there(pack.old_logp_T),
            pack.adv_acc_T.to(device),
            pack.adv_tool_T.to(device),
            None,
            n_acc,
            n_tool,
            w_acc=config.w_acc,
            w_tool=config.w_tool,
            eps_low=config.eps_low,
            eps_high=config.eps_high,
            dual_clip=config.dual_clip,
            temperature=self._config.rollout.temperature,
            entropy_coef=config.entropy_coef,
            with_entropy=True,
            kl_coef=config.kl_coef,
            ref_logp_T=there(pack.ref_logp_T),
            tis_cap=config.tis_cap,
            engine_logp_T=there(pack.engine_logp_T),
            anchor_T=there(pack.anchor_T),
            live_L=None if self._config.train.skip_zero_advantage else torch.arange(len(pack.targets_T), device=device),
            chunk=config.token_chunk or None,
            impl=config.impl,
        )
        sums.add(out, pack)
        return out.loss

    # -- SFT ----------------------------------------------------------------------------------------------------------

    def imitate(self, rollouts: Sequence[Rollout]) -> tuple[float, float]:
        """One SFT step: mean negative log-likelihood over every sampled token of the batch.

        Returns loss and gradient norm.

        Raises:
            NonFiniteError: loss or gradient is NaN or Inf; the step was not applied.
        """
        count = sum(rollout.num_sampled for rollout in rollouts)
        blank = Score(None, rollouts[0].outcome)
        self.optimizer.start()
        total = 0.0
        samples = [Sample(rollout, blank) for rollout in rollouts]
        for pack in self._packs(samples, self._config.sft.tokens_per_micro_batch):
            hidden = self._hidden(pack)
            targets, ones = pack.targets_T.to(hidden.device), torch.ones(len(hidden), device=hidden.device)
            # with advantage 1 and ratio 1 the gradient of the surrogate is that of the log-likelihood
            out = hdpo_loss(
                hidden,
                self.policy.head,
                targets,
                None,
                ones,
                ones,
                None,
                count,
                0,
                w_tool=0.0,
                temperature=self._config.rollout.temperature,
                engine_logp_T=None,
                chunk=self._config.loss.token_chunk or None,
                impl=self._config.loss.impl,
            )
            out.loss.backward()
            self.optimizer.accumulate()
            total -= float(out.logp_L.double().sum()) / count
        norm = self.optimizer.step()
        if not (math.isfinite(total) and math.isfinite(norm)):
            raise NonFiniteError(f"SFT loss is {total} with gradient norm {norm}; lower sft.optim.lr or check the trajectories")
        return total, norm
