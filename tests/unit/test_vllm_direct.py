"""vLLM's direct transfers, as far as they go without a GPU: who is asked what, in which order; and what engines are told."""

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from metis_fast.config import Config
from metis_fast.errors import EngineError
from metis_fast.model import Policy
from metis_fast.rollout.vllm import direct
from metis_fast.rollout.vllm.direct import Client, DirectTransfer, Source
from metis_fast.rollout.vllm.engine import VllmEngine, engine_settings
from metis_fast.tools.protocol import MAX_CALL_IMAGES


class _Hub:
    """Notes what workers are asked for, and starts none."""

    def __init__(self) -> None:
        self.launcher = self  # the part of one that is asked for
        self.host = "node-1"
        self.environments: list[dict[str, str]] = []

    def worker(self, *what: object, environment: Mapping[str, str], **more: object) -> None:
        """See `Hub.worker`."""
        self.environments.append(dict(environment))


def test_engines_get_their_own_ranks_and_stand_still_during_an_update() -> None:
    asked: list[tuple[str, Sequence[tuple[object, ...]]]] = []
    client = Client(lambda method, arguments: asked.append((method, arguments)), engines=2, ranks=4)
    client.init_weight_transfer_engine({"master_port": 1, "rank_offset": 1, "world_size": 9})
    (method, arguments), offsets = asked.pop(), []
    assert method == "transfer"
    for name, info in arguments:
        assert name == "init_weight_transfer_engine" and isinstance(info, dict) and info["world_size"] == 9
        offsets.append(info["rank_offset"])
    assert offsets == [1, 5]
    client.version = 7
    client.start_weight_update()
    client.update_weights({"names": ["a"]})
    client.finish_weight_update("ignored: the run counts")
    assert asked == [
        ("pause", [(), ()]),
        ("transfer", [("start_weight_update", None)] * 2),
        ("transfer", [("update_weights", {"names": ["a"]})] * 2),
        ("transfer", [("finish_weight_update", None)] * 2),
        ("resume", [(7,), (7,)]),
    ]


def test_a_source_yields_the_tensors_that_it_was_given_detached() -> None:
    source = Source(torch.device("cpu"))
    weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    source.pairs = [("b", weight), ("a", torch.zeros(1, dtype=torch.bfloat16))]
    sent = list(source)
    assert [name for name, _ in sent] == ["b", "a"] and torch.equal(sent[0][1], weight) and not sent[0][1].requires_grad
    assert list(source)[1][1].dtype is torch.bfloat16  # a second pass is a whole one


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("transport", ["nccl", "ipc"])
def test_without_a_gpu_it_says_so(transport: str) -> None:
    with pytest.raises(EngineError, match=f"sync.transport={transport} sends from a GPU"):
        DirectTransfer(transport, "127.0.0.1", lambda method, arguments: None, 1, 1, 0)


def test_a_rollout_whose_every_call_shows_as_many_pictures_as_it_may_is_taken(policy: Policy) -> None:
    config = Config.model_validate({"rollout": {"engine": "vllm", "max_turns": 10}})
    assert engine_settings(config, policy).images >= 1 + 10 * MAX_CALL_IMAGES


@pytest.mark.parametrize("transport", ["staged", "ipc"])
def test_vllm_takes_pickled_handles_from_its_run_only_where_it_gets_some(
    policy: Policy, transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct, "check", lambda transport: None)
    vllm = {"engine": "vllm", "vllm": {"sleep": True}}
    config = Config.model_validate({"rollout": vllm, "sync": {"transport": transport}})
    hub: Any = _Hub()
    VllmEngine(config, policy, hub)
    assert hub.environments == [{"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"} if transport == "ipc" else {}]
