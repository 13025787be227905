"""Megatron-core's AdamW on one rank: made, stepped, and opened up for checkpoints."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from metis_fast.config import OptimConfig

_MOMENTS = ("exp_avg", "exp_avg_sq")


class Optimizer:
    """Of the trained parameters of all chunks of a rank.

    split: whether a replica has only its part of the state (Megatron's distributed optimizer). inner: torch's, or Transformer
    Engine's, which holds the float32 masters and their moments; those are there from the start.
    """

    def __init__(
        self,
        models: Sequence[DistributedDataParallel],
        optim: OptimConfig,
        dtype: torch.dtype,
        split: bool,
        groups: ProcessGroupCollection,
    ) -> None:
        self._optim, self._dtype, self.split = optim, dtype, split
        settings = OptimizerConfig(
            optimizer="adam",
            lr=optim.lr,
            min_lr=0.0,
            weight_decay=optim.weight_decay,
            adam_beta1=optim.betas[0],
            adam_beta2=optim.betas[1],
            adam_eps=optim.eps,
            clip_grad=optim.grad_clip,
            bf16=dtype == torch.bfloat16,
            params_dtype=dtype,
            use_distributed_optimizer=split,
        )
        optimizer = get_megatron_optimizer(settings, cast(Any, models), use_gloo_process_groups=False, pg_collection=groups)
        (self._whole,) = cast(Any, optimizer).chained_optimizers  # a second one would be of experts
        self.inner: torch.optim.Optimizer = self._whole.optimizer
        for group in self.inner.param_groups:
            for master in group["params"]:
                # from the start, so that a checkpoint has a place to be read into
                self.inner.state[master] = {name: torch.zeros_like(master) for name in _MOMENTS}
                if isinstance(self.inner, torch.optim.AdamW):
                    self.inner.state[master]["step"] = torch.tensor(0.0)

    def zero_grad(self) -> None:
        """Before the first pass of a step."""
        self._whole.zero_grad()

    def step(self, lr: float) -> float:
        """Clip and step; the gradient norm before clipping. One that is not finite leaves weights and state as they were."""
        for group in self._whole.param_groups:
            group["lr"], group["weight_decay"] = lr, self._optim.weight_decay * group["wd_mult"]
        self._whole.prepare_grads()
        norm = float(self._whole.get_grad_norm())
        if math.isfinite(norm):
            if parameters := self._whole.get_parameters():
                clip_grad_by_total_norm_fp32(parameters, self._optim.grad_clip, norm)
            self._whole.step_with_ready_grads()
        return norm

    def states(self, parameter: torch.nn.Parameter) -> tuple[int, int, dict[str, Tensor]]:
        """This replica's elements [start, stop) of a parameter, and its masters and moments for them, flat."""
        master = parameter
        start, stop = 0, parameter.numel()
        if self.split:
            where = self._whole.model_param_group_index_map.get(parameter)
            if where is None:
                return 0, 0, {name: torch.empty(0, device=parameter.device) for name in self._state_names}
            group, index = where
            master = self.inner.param_groups[group]["params"][index]
            own = self._whole._get_model_param_range_map(parameter)["param"]
            start, stop = own.start, own.end
        elif parameter.dtype != torch.float32:
            master = parameter.main_param  # pyright: ignore[reportAttributeAccessIssue]
        states = {name: self.inner.state[master][name].view(-1) for name in _MOMENTS}
        if parameter.dtype != torch.float32:
            states["master"] = master.detach().view(-1)
        return start, stop, states

    def set_updates(self, num_updates: int) -> None:
        """How many steps its state is of."""
        for group in self.inner.param_groups:
            if isinstance(self.inner, torch.optim.AdamW):
                for master in group["params"]:
                    self.inner.state[master]["step"] = torch.tensor(float(num_updates))
            else:  # Transformer Engine's counts by groups
                group["step"] = num_updates

    @property
    def _state_names(self) -> tuple[str, ...]:
        return _MOMENTS if self._dtype == torch.float32 else (*_MOMENTS, "master")
