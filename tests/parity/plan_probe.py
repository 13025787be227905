"""A worker of `test_plan_memory.py`: weighs what a real rank holds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from metis_fast.train.megatron.policy import MegatronPolicy
from metis_fast.train.megatron.step import Context, Worker
from metis_fast.train.megatron.task import Task

Seen = tuple[int, int, int, int]
"""Of one pass through a rank's chunk: tokens; image tokens; bytes that autograd keeps of decoder and final norm; of the tower.
A tuple, since the run's side does not import this."""


@dataclass
class Scale:
    """Bytes of distinct storages. known: those that are not weighed."""

    known: set[int] = field(default_factory=set)
    storages: dict[int, int] = field(default_factory=dict)
    alive: list[Tensor] = field(default_factory=list)

    def put(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.known:
            self.storages[storage.data_ptr()] = storage.nbytes()
            self.alive.append(tensor)  # so that no address comes twice
        return tensor

    @property
    def bytes(self) -> int:
        return sum(self.storages.values())


def weigh(tensors: Iterable[Tensor], known: Iterable[Tensor] = ()) -> tuple[int, list[Tensor]]:
    """Bytes of the tensors' storages, each once, without the known ones; and all of the tensors."""
    scale = Scale({tensor.untyped_storage().data_ptr() for tensor in known})
    tensors = list(tensors)
    for tensor in tensors:
        scale.put(tensor)
    return scale.bytes, tensors


class Probe:
    """Started once for many layouts of as many ranks, since starting is what takes long."""

    def __init__(self, context: Context, _: object) -> None:
        self.context = context
        torch.set_num_threads(1)

    def held(self, task: Task, steps: list[Any]) -> tuple[int, int, int]:
        """Bytes of weights, gradients and optimizer after the steps."""
        worker = Worker(self.context, task)
        for groups in steps:
            worker.update(groups)
        weights, known = weigh(p for policy in worker._policies for p in policy.parameters())
        buffers = [buffer for model in worker._models for buffer in cast(Any, model).buffers]
        gradients, more = weigh([buffer.grad_data for buffer in buffers], known)
        optimizer = worker._optimizer.inner
        states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
        masters = [master for group in optimizer.param_groups for master in group["params"]]
        gradients_of_masters = [master.grad for master in masters if master.grad is not None]
        beside, _ = weigh([*states, *masters, *gradients_of_masters], [*known, *more])
        return weights, gradients, beside

    def activations(self, task: Task, groups: Any) -> list[Seen]:
        """Of every pass of an update."""
        worker = Worker(self.context, task)
        seen: list[Seen] = []
        for policy in worker._policies:
            _watch(policy, worker._merge, seen)
        worker.update(groups)
        return seen


def _watch(policy: MegatronPolicy, merge: int, seen: list[Seen]) -> None:
    own = {p.untyped_storage().data_ptr() for p in policy.parameters()}
    forward, encode, rotary = policy.forward, policy._encode, policy.rotary.forward
    decoder, tower = Scale(), Scale()

    def watched(pack: Any, every_parameter: bool) -> Tensor:
        nonlocal decoder, tower
        decoder, tower = Scale(set(own)), Scale(set(own))
        with torch.autograd.graph.saved_tensors_hooks(decoder.put, lambda tensor: tensor):
            out = forward(pack, every_parameter)
        decoder.known |= tower.storages.keys()
        images = sum(t * h * w for t, h, w in (image.grid for image in pack.images)) // merge**2
        kept = sum(size for at, size in decoder.storages.items() if at not in tower.storages)
        seen.append((len(pack.tokens_N), images, kept, tower.bytes))
        return out

    def encoded(pack: Any) -> Any:
        with torch.autograd.graph.saved_tensors_hooks(tower.put, lambda tensor: tensor):
            return encode(pack)

    def rotated(*arguments: Any) -> Any:
        # recomputed layers hold them, not autograd
        return tuple(decoder.put(part) for part in rotary(*arguments))

    policy.forward, policy._encode, policy.rotary.forward = watched, encoded, rotated  # pyright: ignore[reportAttributeAccessIssue]
