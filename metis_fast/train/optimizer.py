"""torch's AdamW, and Muon for matrices where asked for, over float32 masters of the trained parameters."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn

from metis_fast.config import OptimConfig
from metis_fast.train.muon import Muon
from metis_fast.train.sharding import whole


def trainable(model: nn.Module, freeze: Iterable[str]) -> dict[str, nn.Parameter]:
    """Turn gradients off for the frozen parts; the other parameters by name (tied ones once)."""
    frozen = tuple(freeze)
    out: dict[str, nn.Parameter] = {}
    for name, parameter in model.named_parameters():
        is_vision = ".visual." in name
        is_embedding = "embed_tokens" in name or name.startswith("lm_head")
        parameter.requires_grad_(not (("vision" in frozen and is_vision) or ("embeddings" in frozen and is_embedding)))
        if parameter.requires_grad:
            out[name] = parameter
    return out


class Schedule:
    """AdamW's learning rate: linear warm-up, then along a line, or half a wave of the cosine, to `final_lr` at the last of
    `total_steps` optimizer steps."""

    def __init__(self, config: OptimConfig, total_steps: int) -> None:
        self._config, self._total = config, total_steps

    def doubt(self, name: str) -> str:
        """What is to be told of a warm-up that the run does not get through; empty elsewhere. name: of the settings."""
        warmup = self._config.warmup_steps
        if warmup < self._total or warmup <= 1:
            return ""
        highest = self.lr(self._total - 1)
        return (
            f"{name}.warmup_steps={warmup} is no less than the {self._total} optimizer steps of the run, so the learning rate "
            f"gets to {highest:.2g} of {self._config.lr:.2g}; lower it, a tenth of the steps is usual"
        )

    def share(self, step: int) -> float:
        """At an optimizer step (from 0), as a share of the configured one."""
        config = self._config
        if step < config.warmup_steps:
            return (step + 1) / config.warmup_steps
        span = max(1, self._total - 1 - config.warmup_steps)  # the last step has index total - 1
        done = min(1.0, (step - config.warmup_steps) / span)
        if config.schedule == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return 1 - (1 - config.final_lr) * done

    def lr(self, step: int) -> float:
        """At an optimizer step (from 0)."""
        return self._config.lr * self.share(step)


class Optimizer:
    """Gradient clipping, learning-rate schedule, and the step, on float32 masters.

    Parameters that are float32 already are their own masters.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: OptimConfig, total_steps: int) -> None:
        self._config = config
        self._schedule = Schedule(config, total_steps)
        self.parameters = dict(parameters)
        self.masters: dict[str, Tensor] = {
            name: p if p.dtype == torch.float32 else nn.Parameter(p.detach().float().clone())
            for name, p in self.parameters.items()
        }
        muon = {
            name: w
            for name, w in self.masters.items()
            if config.muon_lr > 0 and w.ndim == 2 and not any(part in name for part in ("embed", "lm_head"))
        }
        rest = {name: w for name, w in self.masters.items() if name not in muon}
        groups = [
            {"params": [w for w in rest.values() if w.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [w for w in rest.values() if w.ndim < 2], "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]] or [{"params": []}],
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
        )
        # its products in what the model computes in: bfloat16 only where that is fast
        self.muon = Muon(muon.values(), config.muon_lr, next(iter(self.parameters.values())).dtype) if muon else None
        self.num_steps = 0

    def named(self) -> Iterator[tuple[str, torch.optim.Optimizer]]:
        """The torch optimizers by name, for checkpoints."""
        yield "adamw", self.adamw
        if self.muon is not None:
            yield "muon", self.muon

    def start(self) -> None:
        """Begin a step with zero gradients for every trained parameter.

        Zeros rather than None: a parameter that no micro-batch touches (or a mini-batch in which nothing has an advantage)
        gets the same decay of weights and averages, whatever was pruned and however the batch was cut.
        """
        for master in self.masters.values():
            master.grad = torch.zeros_like(master)
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                parameter.grad = None

    @torch.no_grad()
    def accumulate(self) -> None:
        """Add the gradients of one micro-batch to the masters', in float32."""
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            if master is not parameter and parameter.grad is not None:
                assert master.grad is not None
                master.grad += parameter.grad
                parameter.grad = None

    def step(self) -> float:
        """Clip, step, copy the masters to the parameters. Returns the gradient norm before clipping.

        A norm that is not finite leaves weights and state as they were; the caller decides what that means.
        """
        norm = float(whole(nn.utils.clip_grad_norm_(self.masters.values(), self._config.grad_clip)))
        if math.isfinite(norm):
            share = self._schedule.share(self.num_steps)
            for optimizer, lr in ((self.adamw, self._config.lr), (self.muon, self._config.muon_lr)):
                if optimizer is not None:
                    for group in optimizer.param_groups:
                        group["lr"] = lr * share
                    optimizer.step()
            self.num_steps += 1
            self.publish()
        for master in self.masters.values():
            master.grad = None
        return norm

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the masters to the parameters."""
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])

    @property
    def lr(self) -> float:
        """AdamW's learning rate of the next step."""
        return self._schedule.lr(self.num_steps)
