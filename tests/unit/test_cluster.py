"""What Ray is asked for, and what is said where it cannot be given; weights in buckets."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
import torch

from metis_fast import config as config_module
from metis_fast.cluster.weights import Bucket, pack
from metis_fast.errors import ConfigError

room = pytest.importorskip("metis_fast.cluster.room")

MEGATRON = {"backend": "megatron", "megatron": {"tensor_parallel": 2, "data_parallel": 3}}


def vllm(replicas: int, each: int, **more: object) -> dict[str, object]:
    return {"engine": "vllm", "vllm": {"replicas": replicas, "tensor_parallel": each, **more}}


def settings(**sections: object) -> config_module.Config:
    return config_module.build(sections)


def planned(config: config_module.Config, ranks: bool = True, on_gpus: bool = True) -> list[tuple[str, int, int, int]]:
    return [(each.role, each.cpus, each.gpus, each.ranks) for each in room.plan(config, ranks, on_gpus)]


# -- bundles ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("total", "nodes"), [(0, 3), (2, 3), (3, 3), (7, 3), (8, 1)])
def test_a_total_is_dealt_out_evenly_the_first_nodes_have_the_rest(total: int, nodes: int) -> None:
    shares = [room.share(total, nodes, i) for i in range(nodes)]
    assert sum(shares) == total and max(shares) - min(shares) <= 1 and shares == sorted(shares, reverse=True)


def test_a_node_is_one_bundle_with_all_that_plays_there_and_tensor_parallel_ranks_are_one() -> None:
    config = settings(rollout=vllm(3, 2), train=MEGATRON, workers={"launcher": "ray", "nodes": 2, "tools": 3, "judges": 1})
    ranks = [("ranks", 2, 2, 2)] * 3
    assert planned(config) == [("node", 1 + 2 + 1 + 4, 4, 0), ("node", 1 + 1 + 0 + 2, 2, 0), *ranks]
    assert planned(config, ranks=False) == planned(config)[:2]


def test_a_cold_start_has_room_for_its_ranks_alone() -> None:
    config = settings(rollout=vllm(3, 2, sleep=True), train=MEGATRON, workers={"launcher": "ray", "nodes": 2, "tools": 3})
    found = room.plan(config, True, on_gpus=True, plays=False)
    assert [(each.role, each.cpus, each.gpus, each.ranks) for each in found] == [("ranks", 2, 2, 2)] * 3
    assert room.plan(config, False, on_gpus=True, plays=False) == []


def test_without_gpus_cpu_slots_are_asked_for() -> None:
    config = settings(rollout=vllm(2, 2, cpu_threads=3), train=MEGATRON)
    assert planned(config, on_gpus=False) == [("node", 1 + 2 * 2 * 3, 0, 0), *[("ranks", 2, 0, 2)] * 3]


def test_the_native_engine_has_a_gpu_of_its_node_where_there_are_some() -> None:
    config = settings(workers={"launcher": "ray", "nodes": 3, "tools": 3})
    assert planned(config, ranks=False) == [("node", 2, 1, 0)] * 3
    assert planned(config, ranks=False, on_gpus=False) == [("node", 2, 0, 0)] * 3


@pytest.mark.parametrize(
    ("nodes", "engines", "ranks", "wanted"),
    [
        # an engine on the GPUs of two ranks; the last ranks have none
        (1, (2, 2), (1, 6), [("node", 1 + 6, 6, 6)]),
        (3, (3, 2), (1, 6), [("node", 1 + 2, 2, 2)] * 3),
        # two engines beside the tensor-parallel ranks of a bundle
        (2, (3, 1), (2, 2), [("node", 1 + 2, 2, 2)] * 2),
    ],
)
def test_engines_that_sleep_share_a_bundle_with_ranks(
    nodes: int, engines: tuple[int, int], ranks: tuple[int, int], wanted: list[tuple[str, int, int, int]]
) -> None:
    train = {"backend": "megatron", "megatron": {"tensor_parallel": ranks[0], "data_parallel": ranks[1]}}
    config = settings(rollout=vllm(*engines, sleep=True), train=train, workers={"nodes": nodes})
    assert planned(config) == wanted
    assert planned(config, on_gpus=False) == [(role, cpus, 0, own) for role, cpus, _, own in wanted]


@pytest.mark.parametrize(
    ("nodes", "engine", "megatron", "said"),
    [
        (1, (1, 1), None, "set train.backend=megatron"),
        (1, (4, 1), {"data_parallel": 3}, "4 engines of 1 GPUs do not fit on those of 3 ranks on 1 nodes"),
        (1, (1, 4), {"tensor_parallel": 2, "data_parallel": 3}, "choose other tensor_parallel sizes"),
        (2, (2, 1), {"tensor_parallel": 2, "data_parallel": 3}, "choose workers.nodes of 1, 3 "),
        (4, (4, 1), {"data_parallel": 6}, "choose workers.nodes of 1, 2, 3, 6 .* at most 1 a node"),
    ],
)
def test_engines_that_cannot_sit_on_the_ranks_gpus_are_refused(
    nodes: int, engine: tuple[int, int], megatron: dict[str, int] | None, said: str
) -> None:
    train = {} if megatron is None else {"backend": "megatron", "megatron": megatron}
    config = settings(rollout=vllm(*engine, sleep=True), train=train, workers={"nodes": nodes})
    with pytest.raises(ConfigError, match=said):
        room.plan(config, megatron is not None, True)


def test_more_nodes_than_engines_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"workers\.nodes=3 need an engine each, but rollout\.vllm\.replicas=2"):
        settings(rollout={"engine": "vllm", "vllm": {"replicas": 2}}, workers={"nodes": 3})


def test_an_address_without_a_cluster_is_told() -> None:
    config = settings(workers={"launcher": "ray", "ray_address": "nonsense"})
    with pytest.raises(ConfigError, match=r"no Ray cluster at workers\.ray_address=nonsense"):
        room.Room(config, False, lambda: None)


def test_a_keepers_process_has_the_temporary_files_of_its_machine_its_own_gpu_and_ends_when_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from metis_fast.cluster.keeper import Keeper

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,GPU-x")
    monkeypatch.setenv("SERPER_API_KEY", "of the nodes")
    shown = "tempfile.mkdtemp(), os.environ['CUDA_VISIBLE_DEVICES'], os.environ.get('SERPER_API_KEY')"
    code = f"import os, tempfile; print({shown}, flush=True); input()"

    async def go() -> None:
        keeper = Keeper()
        assert await keeper.gpus() == ["4", "GPU-x"]
        await keeper.start("rank-0", ("-c", code), {"TMPDIR": str(tmp_path)}, tmp_path / "log", 1, ["SERPER_API_KEY"])
        assert await keeper.wait("rank-0") == 1  # nothing comes in
        folder, gpu, key = (tmp_path / "log").read_text().splitlines()[0].split()
        assert Path(folder).is_dir() and Path(folder).parent == tmp_path and gpu == "GPU-x" and key == "None"
        await keeper.start("rank-1", ("-c", "import time; time.sleep(600)"), {}, tmp_path / "log", 0)
        await keeper.kill("rank-1")
        assert await keeper.wait("rank-1") == -9
        keeper._open_door().close()

    asyncio.run(go())


# -- weights ----------------------------------------------------------------------------------------------------------------


def test_weights_come_back_from_buckets_bit_for_bit_and_in_place() -> None:
    torch.manual_seed(0)
    tied = torch.randn(5, 3).bfloat16()
    weights = [
        ("embed", tied),
        ("small", torch.randn(7)),
        ("scalar", torch.tensor(2.5)),
        ("empty", torch.empty(0, 4)),
        ("strided", torch.randn(6, 8).T),
        ("large", torch.randn(100, 30).bfloat16()),
        ("behind", torch.arange(9)),
        ("lm_head", tied),
    ]
    buckets = list(pack(iter(weights), 1000))
    assert [[place.name for place in bucket.places] for bucket in buckets] == [
        ["embed", "small", "scalar", "empty", "strided"],
        ["large"],  # more than a bucket holds
        ["behind", "lm_head"],
    ]
    for bucket in buckets:
        bucket.data.flags.writeable = False  # as Ray gives them
    found = [(name, tensor, bucket) for bucket in buckets for name, tensor in bucket.tensors()]
    for (name, tensor), (got_name, got, bucket) in zip(weights, found, strict=True):
        assert got_name == name and got.dtype == tensor.dtype and torch.equal(got, tensor), name
        start = bucket.data.ctypes.data
        assert not tensor.numel() or start <= got.data_ptr() < start + bucket.data.nbytes


@pytest.mark.filterwarnings("error")
def test_a_bucket_holds_at_least_one_tensor_and_no_more_than_fits() -> None:
    weights = [(str(i), torch.full((16,), float(i))) for i in range(5)]  # 64 bytes each
    assert [len(bucket.places) for bucket in pack(iter(weights), 1)] == [1] * 5
    assert [len(bucket.places) for bucket in pack(iter(weights), 128)] == [2, 2, 1]
    assert list(pack(iter(()), 128)) == []
    (bucket,) = pack(iter(weights), 10_000)
    assert isinstance(bucket, Bucket) and [tensor[0].item() for _, tensor in bucket.tensors()] == [0, 1, 2, 3, 4]
