"""What a run's parts do with signals and engines."""

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, zeros

from metis_fast.config import Config
from metis_fast.errors import Interrupted
from metis_fast.model import Policy
from metis_fast.node.protocol import Weights
from metis_fast.rollout.engine import SyncReport
from metis_fast.run.assembly import _device
from metis_fast.run.fleet import Fleet
from metis_fast.run.interrupt import Interrupts
from metis_fast.run.parts import Parts


class _Streams:
    """A trainer that is busy while its weights are read, and a node that reads them in a thread."""

    number, num_replicas, room, gone, alive = 0, 1, 1.0, "", True

    def __init__(self) -> None:
        self.busy, self.read = False, 0

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The second of three comes with a signal."""
        self.busy = True
        for number in range(3):
            if number == 1:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.05)  # whatever the signal cancels is over by then
            yield str(number), zeros(1)
        self.busy = False

    async def resume(self) -> None:
        """See `NodeClient.resume`."""

    async def update(self, weights: Weights) -> SyncReport:
        """See `NodeClient.update`."""
        self.read = len(await asyncio.to_thread(list, weights.tensors()))
        return SyncReport(weights.version, "full")


def test_a_stop_during_a_weight_update_leaves_no_trainer_half_read(policy: Policy) -> None:
    streams: Any = _Streams()
    with Interrupts() as interrupts:
        parts = Parts(Config(), interrupts, policy, Fleet([streams], Config()), None, None, None)
        parts.trainer = streams
        with pytest.raises(Interrupted):
            parts.sync(1)
        assert not streams.busy and streams.read == 3
        with pytest.raises(Interrupted):  # nor is one begun any more
            parts.sync(2)
        assert not streams.busy


@pytest.mark.parametrize(
    ("settings", "gpus", "expected"),
    [
        ({}, 1, "cuda"),
        ({}, 0, "cpu"),
        ({"train": {"backend": "megatron"}}, 8, "cpu"),  # its ranks have them
        ({"rollout": {"engine": "vllm"}}, 1, "cpu"),  # the engine has it
        ({"rollout": {"engine": "vllm"}}, 2, "cuda"),
        ({"rollout": {"engine": "vllm", "vllm": {"replicas": 2, "tensor_parallel": 2}}}, 4, "cpu"),
        ({"rollout": {"engine": "vllm", "vllm": {"replicas": 2, "tensor_parallel": 2}}}, 5, "cuda"),
        ({"rollout": {"engine": "vllm", "vllm": {"sleep": True}}}, 1, "cuda"),  # by turns
        ({"rollout": {"engine": "vllm", "vllm": {"sleep": True}}, "workers": {"launcher": "ray"}}, 1, "cpu"),
    ],
)
def test_the_policy_is_on_a_gpu_that_no_rank_and_no_engine_has(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], gpus: int, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    config = Config.model_validate(settings | {"rollout": {"deterministic": False} | settings.get("rollout", {})})
    assert _device(config, training=True).type == expected
