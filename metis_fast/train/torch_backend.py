"""The torch trainer: one process, any device that torch runs on, weights shared with the native engine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from metis_fast.attention import AttentionPlan, CausalBmm, CausalSdpa
from metis_fast.checkpoint.optimizer import FlatOptimizer, flatten_optimizer, unflatten_optimizer
from metis_fast.checkpoint.params import MASTER, OPTIMIZER, WEIGHT, add_prefix, copy_exactly, take_prefix
from metis_fast.config import Config, OptimConfig
from metis_fast.errors import CheckpointError, NonFiniteError
from metis_fast.model import Policy
from metis_fast.train import loss as loss_terms
from metis_fast.train.optimizer import Optimizer, trainable
from metis_fast.train.pack import MicroBatch, Sample, pack, split
from metis_fast.train.protocol import TrainerState
from metis_fast.types import Rollout, Score, ScoredGroup, UpdateStats


@dataclass(slots=True)
class _Sums:
    """Running sums of one mini-batch; divided once, at its end."""

    loss: float = 0.0
    loss_acc: float = 0.0
    loss_tool: float = 0.0
    clipped_acc: int = 0
    live_acc: int = 0
    clipped_tool: int = 0
    live_tool: int = 0
    kl: float = 0.0
    entropy: float = 0.0
    engine_gap: float = 0.0
    ratio_max: float = 0.0
    ratio_min: float = math.inf
    sampled: int = 0
    tokens: int = 0
    padding: int = 0


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

    def _plan(self) -> AttentionPlan:
        return CausalBmm() if self._config.model.attention == "bmm" else CausalSdpa()

    def _logp(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Log-probability and entropy of the sampled tokens, [T] each."""
        device = self.policy.head.device
        features = None
        if batch.images:
            with torch.set_grad_enabled(torch.is_grad_enabled() and self._vision_trained):
                features = self.policy.encode_images(batch.images).take(batch.image_order)
        hidden = self.policy.hidden(batch.tokens_BS.to(device), batch.positions_3BS.to(device), features, self._plan())
        return loss_terms.head_logp(
            hidden.flatten(0, 1)[batch.select_T.to(device)],
            self.policy.head,
            batch.targets_T.to(device),
            self._config.rollout.temperature,
            self._config.loss.token_chunk,
        )

    @torch.no_grad()
    def logprobs(self, rollouts: Sequence[Rollout]) -> list[np.ndarray]:
        """Log-probability of every sampled token under the current weights, [S] float32 a rollout, 0 elsewhere."""
        blank = Score(None, rollouts[0].outcome) if rollouts else None
        out: dict[int, np.ndarray] = {}
        samples = [Sample(rollout, blank) for rollout in rollouts if blank is not None]
        for part in split(samples, self._config.train.tokens_per_micro_batch):
            batch = pack(part, self.policy.merge)
            logp = self._logp(batch)[0].cpu().numpy()
            row = batch.row_T.numpy()
            for i, sample in enumerate(part):
                full = np.zeros(len(sample.rollout.tokens), np.float32)
                full[sample.rollout.sampled] = logp[row == i]
                out[id(sample.rollout)] = full
        return [out[id(rollout)] for rollout in rollouts]

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
        old = self.logprobs([sample.rollout for sample in samples])
        return [replace(sample, old_logp=logp) for sample, logp in zip(samples, old, strict=True)]

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
        for part in split(run, self._config.train.tokens_per_micro_batch):
            check()
            batch = pack(part, self.policy.merge)
            if self._config.loss.normalization == "reference":
                # the public recipe: a mean over the micro-batch's own tokens, weighted by its share of the rows
                share = len(part) / len(every)
                own_acc, own_tool = len(batch.targets_T) / share, float(batch.in_tool_T.sum()) / share
            else:
                own_acc, own_tool = float(n_acc), float(n_tool)
            total = self._micro_loss(batch, own_acc, own_tool, sums)
            if not bool(torch.isfinite(total)):
                names = ", ".join(f"{s.rollout.prompt_uid}#{s.rollout.index}" for s in part[:4])
                raise NonFiniteError(
                    f"loss is {float(total.detach())} in mini-batch {index} (rollouts {names}, …); the step was not applied"
                )
            total.backward()
            self.optimizer.accumulate()
        norm = self.optimizer.step()
        if not math.isfinite(norm):
            raise NonFiniteError(f"gradient norm is {norm} in mini-batch {index}; the step was not applied")
        count = max(1, sums.sampled)
        return UpdateStats(
            loss=sums.loss,
            loss_acc=sums.loss_acc,
            loss_tool=sums.loss_tool,
            grad_norm=norm,
            lr=lr,
            clip_acc=sums.clipped_acc / max(1, sums.live_acc),
            clip_tool=sums.clipped_tool / max(1, sums.live_tool),
            kl=sums.kl / count,
            ratio_max=sums.ratio_max if sums.sampled else 1.0,
            ratio_min=sums.ratio_min if sums.sampled else 1.0,
            entropy=sums.entropy / count,
            engine_gap=sums.engine_gap / count,
            num_tokens=sums.tokens,
            num_padding=sums.padding,
            num_skipped=sum(len(s.rollout.tokens) for s in every) - sums.tokens,
            n_acc=n_acc,
            n_tool=n_tool,
            skipped_step=not run,
        )

    def _micro_loss(self, batch: MicroBatch, n_acc: float, n_tool: float, sums: _Sums) -> Tensor:
        config, device = self._config.loss, self.policy.head.device
        logp, entropy = self._logp(batch)
        old = logp.detach() if batch.old_logp_T is None else batch.old_logp_T.to(device)
        engine = batch.engine_logp_T.to(device)
        ratio = loss_terms.log_ratio_to_ratio(logp - old)
        weight = loss_terms.truncated_weight(old, engine, config.tis_cap) if config.tis_cap else None
        acc = loss_terms.surrogate(ratio, batch.adv_acc_T.to(device), weight, n_acc, config)
        tool = loss_terms.surrogate(ratio, batch.adv_tool_T.to(device), weight, n_tool, config)
        total = config.w_acc * acc.loss + config.w_tool * tool.loss
        if config.entropy_coef:
            total = total - config.entropy_coef * entropy.sum() / n_acc
        if config.kl_coef:
            assert batch.ref_logp_T is not None
            total = total + config.kl_coef * loss_terms.k3(logp, batch.ref_logp_T.to(device)).sum() / n_acc
        with torch.no_grad():
            sums.loss += float(total)
            sums.loss_acc += float(acc.loss)
            sums.loss_tool += float(tool.loss)
            sums.clipped_acc += int(acc.num_clipped)
            sums.live_acc += int(acc.num_live)
            sums.clipped_tool += int(tool.num_clipped)
            sums.live_tool += int(tool.num_live)
            sums.kl += float((old - logp).sum())
            sums.entropy += float(entropy.sum())
            sums.engine_gap += float((old - engine).abs().sum())
            sums.ratio_max = max(sums.ratio_max, float(ratio.max()))
            sums.ratio_min = min(sums.ratio_min, float(ratio.min()))
            sums.sampled += len(logp)
            sums.tokens += batch.num_tokens
            sums.padding += batch.num_padding
        return total

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
        for part in split([Sample(rollout, blank) for rollout in rollouts], self._config.sft.tokens_per_micro_batch):
            logp, _ = self._logp(pack(part, self.policy.merge))
            loss = -logp.sum() / count
            loss.backward()
            self.optimizer.accumulate()
            total += float(loss.detach())
        norm = self.optimizer.step()
        if not (math.isfinite(total) and math.isfinite(norm)):
            raise NonFiniteError(f"SFT loss is {total} with gradient norm {norm}; lower sft.optim.lr or check the trajectories")
        return total, norm
