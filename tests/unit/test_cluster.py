"""What Ray is asked for, and what is said where it cannot be given."""

from __future__ import annotations

import asyncio
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from metis_fast import config as config_module
from metis_fast.errors import ConfigError
from metis_fast.run.assembly import needs_hub, open_hub

cluster = pytest.importorskip("metis_fast.cluster")

VLLM = {"engine": "vllm", "vllm": {"replicas": 3, "tensor_parallel": 2}}
MEGATRON = {"backend": "megatron", "megatron": {"tensor_parallel": 2, "data_parallel": 3}}


def settings(**sections: object) -> config_module.Config:
    return config_module.build(sections)


def seats(bundles: list) -> list[tuple[str, int, int, list[tuple[str, tuple[int, int]]]]]:
    return [(each.role, each.cpus, each.gpus, [(seat.name, seat.gpus) for seat in each.seats]) for each in bundles]


def test_every_process_of_a_run_has_a_seat() -> None:
    config = settings(rollout=VLLM, train=MEGATRON, workers={"launcher": "ray", "tools": 2, "judges": 1})
    assert seats(cluster.plan(config, ranks=True, on_gpus=True)) == [
        ("ranks", 2, 2, [("rank-0", (0, 1)), ("rank-1", (1, 2))]),
        ("ranks", 2, 2, [("rank-2", (0, 1)), ("rank-3", (1, 2))]),
        ("ranks", 2, 2, [("rank-4", (0, 1)), ("rank-5", (1, 2))]),
        ("engine", 2, 2, [("engine-0", (0, 2))]),
        ("engine", 2, 2, [("engine-1", (0, 2))]),
        ("engine", 2, 2, [("engine-2", (0, 2))]),
        ("tools", 1, 0, [("tools-0", (0, 0))]),
        ("tools", 1, 0, [("tools-1", (0, 0))]),
        ("judge", 1, 0, [("judge-0", (0, 0))]),
    ]


def test_without_gpus_cpu_slots_are_asked_for() -> None:
    config = settings(rollout={"engine": "vllm", "vllm": {"cpu_threads": 4}}, train=MEGATRON)
    assert [(each.cpus, each.gpus) for each in cluster.plan(config, ranks=False, on_gpus=False)] == [(4, 0)]
    assert {(each.cpus, each.gpus) for each in cluster.plan(config, ranks=True, on_gpus=False)} == {(2, 0), (4, 0)}
    both = settings(rollout={"engine": "vllm", "vllm": {"cpu_threads": 3, "tensor_parallel": 2}}, train=MEGATRON)
    assert [each.cpus for each in cluster.plan(both, ranks=False, on_gpus=False)] == [6]  # threads of each of its ranks


@pytest.mark.parametrize(
    ("engine", "ranks", "wanted"),
    [
        # an engine on the GPUs of two ranks; the last ranks have none
        ((2, 2), (1, 6), [["rank-0", "rank-1", "engine-0"], ["rank-2", "rank-3", "engine-1"], ["rank-4", "rank-5"]]),
        # two engines beside the tensor-parallel ranks of a bundle
        ((3, 1), (2, 2), [["rank-0", "rank-1", "engine-0", "engine-1"], ["rank-2", "rank-3", "engine-2"]]),
    ],
)
def test_engines_that_sleep_sit_on_the_ranks_gpus(
    engine: tuple[int, int], ranks: tuple[int, int], wanted: list[list[str]]
) -> None:
    vllm = {"replicas": engine[0], "tensor_parallel": engine[1], "sleep": True}
    megatron = {"tensor_parallel": ranks[0], "data_parallel": ranks[1]}
    config = settings(rollout={"engine": "vllm", "vllm": vllm}, train={"backend": "megatron", "megatron": megatron})
    bundles = cluster.plan(config, ranks=True, on_gpus=True)
    assert [[seat.name for seat in each.seats] for each in bundles] == wanted
    for each in bundles:
        assert each.gpus == len([seat for seat in each.seats if seat.name.startswith("rank")])
        assert all(0 <= seat.gpus[0] < seat.gpus[1] <= each.gpus for seat in each.seats)


@pytest.mark.parametrize(
    ("engine", "megatron", "said"),
    [
        ((1, 1), None, "set train.backend=megatron"),
        ((4, 1), {"data_parallel": 3}, "4 engines of 1 GPUs do not fit on those of 3 ranks"),
        ((1, 3), {"tensor_parallel": 2, "data_parallel": 3}, "make one tensor_parallel a multiple of the other"),
        ((1, 4), {"tensor_parallel": 2, "data_parallel": 3}, "do not fit"),
    ],
)
def test_engines_that_cannot_sit_on_the_ranks_gpus_are_refused(
    engine: tuple[int, int], megatron: dict[str, int] | None, said: str
) -> None:
    vllm = {"replicas": engine[0], "tensor_parallel": engine[1], "sleep": True}
    train = {} if megatron is None else {"backend": "megatron", "megatron": megatron}
    config = settings(rollout={"engine": "vllm", "vllm": vllm}, train=train)
    with pytest.raises(ConfigError, match=said):
        cluster.plan(config, ranks=megatron is not None, on_gpus=True)


def test_temporary_files_of_a_keepers_worker_go_with_it_and_a_rank_has_those_of_its_node(tmp_path: Path) -> None:
    code = ("-c", "import tempfile; print(tempfile.mkdtemp(), flush=True); input()")

    async def go() -> list[Path]:
        keeper = cluster.Keeper()
        for name, scratch in (("tools-0", True), ("rank-0", False)):
            await keeper.start(name, code, {"TMPDIR": str(tmp_path)}, tmp_path / f"{name}.log", (0, 0), scratch)
        assert [await keeper.wait(name) for name in ("tools-0", "rank-0")] == [1, 1]  # nothing comes in
        made = [Path((tmp_path / f"{name}.log").read_text().splitlines()[0]) for name in ("tools-0", "rank-0")]
        assert made[0].is_dir() and made[1].parent == tmp_path != made[0].parent
        for name in ("tools-0", "rank-0"):
            await keeper.kill(name)
        return made

    made = asyncio.run(go())
    assert not made[0].parent.exists() and made[1].is_dir()


def test_a_run_without_ray_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "metis_fast.cluster")
    config = settings(run={"dir": tmp_path}, workers={"launcher": "ray", "tools": 1})
    with ExitStack() as stack, pytest.raises(ConfigError, match=r"pip install 'metis-fast\[ray\]'"):
        open_hub(config, stack, lambda: None)


def test_an_address_without_a_cluster_is_told(tmp_path: Path) -> None:
    workers = {"launcher": "ray", "tools": 1, "ray_address": "nonsense"}
    config = settings(run={"dir": tmp_path}, workers=workers)
    with ExitStack() as stack, pytest.raises(ConfigError, match=r"no Ray cluster at workers\.ray_address=nonsense"):
        open_hub(config, stack, lambda: None)


def test_only_what_needs_workers_has_a_hub() -> None:
    assert not needs_hub(settings())
    assert not needs_hub(settings(workers={"launcher": "ray"}))
    assert not needs_hub(settings(train=MEGATRON))
    ranks = settings(train=MEGATRON, workers={"launcher": "ray"})
    assert needs_hub(ranks) and not needs_hub(ranks, training=False)
    joined = {"backend": "megatron", "megatron": {"launch": "join"}}
    assert not needs_hub(settings(train=joined, workers={"launcher": "ray"}))
    for one in ({"rollout": VLLM}, {"workers": {"tools": 1}}, {"workers": {"judges": 1}}):
        assert needs_hub(settings(**one), training=False)
