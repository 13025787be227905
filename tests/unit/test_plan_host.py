"""`metis-fast plan`: what machines need around the GPUs, by hand, and what is said when it is too much."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import cast

import pytest
from planning import CONFIGS, big, layout, setting

from metis_fast import cli
from metis_fast.data.parquet import CACHE_BYTES
from metis_fast.errors import ConfigError
from metis_fast.node import node
from metis_fast.plan import command
from metis_fast.plan.candidates import evaluate
from metis_fast.plan.duration import step_seconds
from metis_fast.plan.gpus import GIB
from metis_fast.plan.host import Host, HostMemory, HostSeconds, host
from metis_fast.plan.host_load import ASSUMED, HostCosts, HostOptions
from metis_fast.plan.shape import Shape

LAYOUT = {"tensor_parallel": 4, "sequence_parallel": True, "recompute": "full"}
SLEEP = {"engine": "vllm", "max_concurrent": 2048, "vllm": {"sleep": True, "gpu_memory": 0.6}}
NO_WEIGHTS = {"sync": {"transport": "nccl"}}
COSTS = HostCosts()
PARAMETERS = Shape.of(big()).num_parameters
SECONDS = [part.name for part in fields(HostSeconds)]
MEMORY = [part.name for part in fields(HostMemory)]


def plan(
    gpus: int = 64,
    *,
    nodes: int | None = None,
    ray: bool | None = None,
    changes: Mapping[str, object] | None = None,
    images: int = 1,
    share: float = 0.3,
    stages: int = 1,
    costs: HostCosts = COSTS,
    **options: float,
) -> Host:
    """nodes: one a machine. ray: where there are several machines."""
    machines = max(1, gpus // 8)
    launcher = "ray" if (machines > 1 if ray is None else ray) else "local"
    workers = {"launcher": launcher, "nodes": machines if nodes is None else nodes}
    given = dict(changes or {})
    workers |= cast(dict[str, object], given.pop("workers", {}))
    here = setting(gpus, given | {"workers": workers})
    here = replace(here, load=replace(here.load, images=images), engine_share=share)
    one = layout(**LAYOUT, pipeline_parallel=stages, data_parallel=gpus // 4 // stages)
    return host(here, evaluate(here, one), HostOptions(**options), costs)


def cpu(found: Host, part: str = "total", at: int = 0) -> float:
    return getattr(found.machines[at].seconds, part)


def held(found: Host, part: str = "total", at: int = 0) -> float:
    return getattr(found.machines[at].memory, part)


def kinds(found: Host) -> list[tuple[str, int, int]]:
    return [(machine.name, machine.count, machine.nodes) for machine in found.machines]


# -- sums -------------------------------------------------------------------------------------------------------------------


def test_totals_are_the_sums_of_their_parts_and_cores_are_seconds_of_seconds():
    for machine in plan().machines:
        for whole, names in ((machine.seconds, SECONDS), (machine.memory, MEMORY)):
            parts = [getattr(whole, name) for name in names]
            assert min(parts) >= 0 and whole.total == pytest.approx(sum(parts)) and whole.total > 0
        assert machine.cores == pytest.approx(machine.seconds.total / plan().step_s)


def test_assumed_costs_are_costs():
    assert set(ASSUMED) < {cost.name for cost in fields(HostCosts)}


def step_bytes(megapixels: float = 3.1, crops: float = 2048 / 3, rollouts: int = 2048) -> float:
    """A step's groups."""
    return 128 * megapixels * 1e6 * COSTS.encoded_bytes + crops * COSTS.crop_bytes + rollouts * 5120 * COSTS.token_bytes


def test_a_machine_by_hand():
    """128 prompts x 16 rollouts on 8 GPUs, an image of 2 megapixels, a call of three tools; 2 replicas of 4 ranks."""
    found = plan(8, image_megapixels=2, calls=3)
    assert kinds(found) == [("first", 1, 1)]
    rollouts, python, prepared = 2048, 2048, 2 * (COSTS.decode_ms + COSTS.resize_ms)
    looked_at = 128 * prepared + python * COSTS.crop_ms
    engines = 128 * (prepared + 1024 * COSTS.patch_ms) + python * COSTS.crop_engine_ms
    ranks = 8 * 0.8 * (128 * prepared + python * COSTS.crop_ms) / 2  # a fifth of the groups is left out
    assert cpu(found, "images") == pytest.approx((looked_at + engines + ranks) / 1e3)
    assert cpu(found, "episodes") == pytest.approx(rollouts * (COSTS.rollout_ms + 4 * COSTS.message_ms) / 1e3)
    sandbox = python * (COSTS.session_ms + 2 * COSTS.decode_ms + COSTS.python_ms + COSTS.crop_made_ms)
    assert cpu(found, "tools") == pytest.approx((sandbox + 2 * rollouts * COSTS.search_ms) / 1e3)
    assert cpu(found, "judging") == pytest.approx(rollouts * COSTS.judge_ms / 1e3)
    assert cpu(found, "run") == pytest.approx(rollouts * COSTS.run_ms / 1e3)
    size = 2 * PARAMETERS / 1e9
    assert cpu(found, "staging") == pytest.approx(size / COSTS.stage_gbs + 8 * size / COSTS.load_gbs)
    assert cpu(found, "sending") == pytest.approx(size / COSTS.gather_gbs)
    assert cpu(found, "driving") == pytest.approx(16 * found.step_s)
    step = step_bytes(2, python)
    assert held(found, "groups") == pytest.approx(step) and held(found, "store") == 0
    assert held(found, "rank_groups") == pytest.approx(0.8 * (1 + 8 / 2) * step)  # a file each, and half of them in each rank
    assert held(found, "summaries") == pytest.approx(rollouts * COSTS.summary_bytes)
    assert held(found, "pictures") == 9 * 2 * GIB and held(found, "engine_images") == 8 * 2 * 4 * GIB
    assert held(found, "models") == 2 * PARAMETERS and held(found, "weights") == 2 * 2 * PARAMETERS
    assert held(found, "data") == CACHE_BYTES + node._AHEAD_BYTES
    assert held(found, "processes") == 17 * COSTS.process_bytes


# -- nodes ------------------------------------------------------------------------------------------------------------------


def test_the_first_machine_differs_by_the_run_alone():
    """By what it does, holds, and is; where weights pass through hosts it publishes them, too."""
    found = plan(64, changes=NO_WEIGHTS)
    assert kinds(found) == [("first", 1, 1), ("other", 7, 1)]
    assert [name for name in SECONDS if cpu(found, name) != cpu(found, name, 1)] == ["run"]
    assert [name for name in MEMORY if held(found, name) != held(found, name, 1)] == ["summaries", "models", "processes"]
    assert cpu(found, "run") == pytest.approx((2048 * COSTS.run_ms + 8 * COSTS.poll_ms * found.step_s) / 1e3)
    assert cpu(found, "run", 1) == held(found, "summaries", 1) == 0
    assert held(found, "models") == 2 * held(found, "models", 1) == 2 * 2 * PARAMETERS
    assert held(found, "processes") - held(found, "processes", 1) == COSTS.process_bytes
    staged = plan(64)
    assert {name for name in SECONDS if cpu(staged, name) != cpu(staged, name, 1)} == {"run", "sending"}
    assert held(staged, "store") > held(staged, "store", 1)


OF_NODES = ("images", "episodes", "tools", "judging")


@pytest.mark.parametrize("gpus", [16, 64])
def test_twice_the_nodes_halve_what_a_machine_does_for_rollouts_and_keeps_of_them(gpus):
    """Where engines have machines of their own, nothing else is there."""
    few, many = (plan(gpus, share=0, nodes=nodes, changes=NO_WEIGHTS) for nodes in (gpus // 16, gpus // 8))
    for part in OF_NODES:
        assert cpu(few, part, 2) == pytest.approx(2 * cpu(many, part, 2)) and cpu(many, part, 2) > 0
    assert held(few, "store", 2) == pytest.approx(2 * held(many, "store", 2)) and held(many, "store", 2) > 0
    assert (few.machines[2].count, many.machines[2].count) == (gpus // 16, gpus // 8)


def test_all_machines_together_do_what_one_would():
    """Images of ranks beside: these grow with their number."""
    for part in ("episodes", "tools", "judging"):
        sums = [
            sum(machine.count * getattr(machine.seconds, part) for machine in plan(gpus, nodes=nodes).machines)
            for gpus, nodes in ((8, 1), (16, 2), (16, 1), (64, 8), (64, 16), (64, 4))
        ]
        assert sums == pytest.approx([sums[0]] * 6) and sums[0] > 0


def test_nodes_of_one_machine_are_processes_with_ray_alone():
    """Each has the model once more, rows, caches, and what it stages; together they do what one does."""
    local, two = plan(8, nodes=2), plan(8, nodes=2, ray=True)
    one = plan(8, ray=True)
    for part in OF_NODES:
        assert cpu(local, part) == cpu(two, part) == cpu(one, part)
    assert held(local, "models") == 2 * PARAMETERS and held(two, "models") == 3 * 2 * PARAMETERS
    assert held(two, "processes") == held(local, "processes") + 2 * COSTS.process_bytes
    assert held(two, "pictures") == held(local, "pictures") + 2 * GIB
    assert held(two, "data") == 2 * (CACHE_BYTES + node._AHEAD_BYTES) == held(local, "data") + CACHE_BYTES
    assert held(two, "weights") == held(local, "weights") == 2 * held(one, "weights")
    assert held(local, "groups") > 0 == held(two, "groups") and held(local, "store") == 0
    assert held(two, "store") == pytest.approx(held(local, "groups") + 2 * 2 * PARAMETERS)


def test_machines_without_a_node_have_ranks_alone():
    found = plan(64, nodes=2)
    assert kinds(found) == [("first", 1, 1), ("other", 1, 1), ("ranks", 6, 0)]
    assert all(cpu(found, part, 2) == 0 for part in ("episodes", "tools", "judging", "run", "staging", "sending"))
    assert all(held(found, part, 2) == 0 for part in ("groups", "store", "engine_images", "models", "weights", "data"))
    assert 0 < cpu(found, "images", 2) < cpu(found, "images", 1)  # of the first stage
    assert cpu(found, "driving", 2) == pytest.approx(8 * found.step_s) and held(found, "rank_groups", 2) > 0
    uneven = plan(16, nodes=3)
    assert kinds(uneven) == [("first", 1, 2), ("other", 1, 1)]
    assert cpu(uneven, "episodes") == pytest.approx(2 * cpu(uneven, "episodes", 1))


def test_only_ranks_of_the_first_stage_prepare_images_beside_nodes():
    """Of 16 ranks in two stages the first machine has the first."""
    found = plan(16, stages=2)
    assert held(found, "pictures") == (1 + 8) * 2 * GIB and held(found, "pictures", 1) == 1 * 2 * GIB
    assert cpu(found, "images") > cpu(found, "images", 1) > 0


def test_engines_of_their_own_stand_on_machines_of_their_own_with_the_nodes():
    found = plan(16, share=0)
    assert kinds(found) == [("first", 1, 0), ("other", 1, 0), ("engines", 2, 1)]
    assert held(found, "engine_images") == 0 < held(found, "engine_images", 2)
    assert held(found, "weights", 1) == 0 < held(found, "weights", 2)
    assert cpu(found, "sending", 1) == cpu(found, "staging", 1) == 0 < cpu(found, "sending", 2)
    assert cpu(found, "staging") == cpu(found, "episodes") == 0 < held(found, "store")  # weights are published there
    assert held(found, "rank_groups") > 0 == held(found, "rank_groups", 2)


def test_one_that_sleeps_takes_turns_with_a_rank():
    found = plan(8, share=0, changes={"rollout": SLEEP})
    assert cpu(found, "driving") == pytest.approx(8 * found.step_s)
    assert held(found, "engine_images") > 0


def test_weights_that_go_from_gpu_to_gpu_do_not_pass_through_the_host():
    found = plan(16, share=0, changes=NO_WEIGHTS)
    assert all(cpu(found, part, at) == 0 for part in ("staging", "sending") for at in range(3))
    assert all(held(found, "weights", at) == 0 for at in range(3)) and held(found, "store") == 0


# -- groups -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rollout", "steps"),
    [
        ({"mode": "sync"}, 1),
        ({"mode": "sync", "over_provision": 0.25, "slow": "drop", "deterministic": False}, 1.25),
        ({"mode": "one_step_off"}, 2),
        ({"mode": "async", "max_staleness": 3}, 4),
    ],
)
@pytest.mark.parametrize("gpus", [8, 64])
def test_groups_are_kept_until_they_are_trained_by_each_node_its_share(rollout, steps, gpus):
    found = plan(gpus, changes={"rollout": rollout, "loss": {"tis_cap": 2.0}} | NO_WEIGHTS)
    for at, machine in enumerate(found.machines):
        assert held(found, "groups" if gpus == 8 else "store", at) == pytest.approx(steps * step_bytes() * 8 / gpus)
        assert held(found, "summaries", at) == pytest.approx(steps * 2048 * COSTS.summary_bytes * (machine.name == "first"))


def test_ranks_fetch_the_groups_of_their_replica_and_machines_those_of_their_ranks():
    """Whole groups: of 16 replicas a machine has two, and a rank one."""
    found = plan(64)
    for at in range(2):
        assert held(found, "rank_groups", at) == pytest.approx(0.8 * (2 / 16 + 8 * 1 / 16) * step_bytes())


def test_replicas_that_have_parts_of_a_group_each_fetch_it_and_prepare_its_images():
    """One rollout a pass: four replicas and 16 parts. Of 4 parts a rank fetches 2.7 times an even share; 2.4 was seen."""
    whole, cut = (plan(16, calls=0, changes={"train": {"share_prompt": shared}}) for shared in (True, False))
    a_step, of_16 = step_bytes(crops=0), [1 - (1 - m / 4) ** 16 for m in (1, 2)]
    assert held(whole, "rank_groups") == pytest.approx(0.8 * (2 / 4 + 8 / 4) * a_step)
    assert held(cut, "rank_groups") == pytest.approx(0.8 * (of_16[1] + 8 * of_16[0]) * a_step)
    prepared = 3.1 * (COSTS.decode_ms + COSTS.resize_ms) / 1e3
    assert cpu(cut, "images") - cpu(whole, "images") == pytest.approx(8 * 128 * 0.8 * (of_16[0] - 1 / 4) * prepared)
    # 16 rollouts of 5,120 tokens, 2,048 of them of their own, in passes of 12,288: four parts
    longest = {"max_prompt_tokens": 6144, "max_response_tokens": 6144, "max_observation_tokens": 2048}
    four = plan(16, calls=0, changes={"rollout": longest, "train": {"tokens_per_micro_batch": 12288}})
    read = held(four, "rank_groups") / (0.8 * a_step) - (1 - (1 - 2 / 4) ** 4)
    assert 2.4 <= read / 8 * 4 == pytest.approx(2.73, abs=0.01)


# -- more is more -----------------------------------------------------------------------------------------------------------


def test_more_images_and_larger_ones_take_more():
    for less, more in ((plan(images=0), plan()), (plan(), plan(images=2)), (plan(), plan(image_megapixels=12))):
        assert cpu(less, "images") < cpu(more, "images") and cpu(less, "tools") < cpu(more, "tools")
        assert held(less, "store") < held(more, "store") and held(less, "rank_groups") < held(more, "rank_groups")
    assert cpu(plan(images=0), "images") == 0


def test_more_calls_take_more():
    for part in ("images", "episodes", "tools"):
        taken = [cpu(plan(calls=calls), part) for calls in (0, 1, 4)]
        assert taken == sorted(taken) and taken[0] < taken[2]
    assert cpu(plan(calls=0), "tools") == 0
    none = plan(calls=4, changes={"tools": {"enabled": []}})
    assert cpu(none, "tools") == 0 and held(none, "store") == held(plan(calls=0), "store")


@pytest.mark.parametrize("mode", ["full", "delta"])
def test_more_machines_are_no_more_to_send_from_any_of_them(mode):
    """Each pulls a version once, and Ray passes it on from those that have it."""
    found = [plan(gpus, changes={"sync": {"mode": mode}}) for gpus in (16, 64, 512)]
    for part in ("sending", "staging"):
        assert len({(cpu(one, part), cpu(one, part, 1)) for one in found}) == 1
    assert cpu(found[2], "images", 1) < cpu(found[0], "images", 1)  # and each has less of a step's images
    assert [sum(machine.count for machine in one.machines) for one in found] == [2, 8, 64]


@pytest.mark.parametrize("mode", ["full", "delta"])
def test_weights_through_ray_by_hand(mode):
    found, size = plan(16, changes={"sync": {"mode": mode}}), 2 * PARAMETERS
    changed = mode == "delta"
    pulled = size * (COSTS.delta_share if changed else 1)
    assert cpu(found, "sending") == pytest.approx((size / COSTS.put_gbs + pulled / COSTS.pull_gbs) / 1e9)
    assert cpu(found, "sending", 1) == pytest.approx(pulled / COSTS.pull_gbs / 1e9)
    taken = size / COSTS.stage_gbs + 8 * size / COSTS.load_gbs + changed * size / COSTS.decode_gbs
    assert cpu(found, "staging", 1) == pytest.approx(taken / 1e9)
    assert cpu(found, "staging") == pytest.approx((taken + changed * size / COSTS.encode_gbs) / 1e9)
    assert held(found, "weights") == held(found, "weights", 1) == 2 * size
    kept = step_bytes() / 2
    assert held(found, "store") == pytest.approx(2 * size + changed * pulled + kept)
    assert held(found, "store", 1) == pytest.approx(pulled + kept)


def test_on_one_machine_changes_are_for_ray_alone():
    delta = {"sync": {"mode": "delta"}}
    here, local, both = plan(8), plan(8, changes=delta), plan(8, changes=delta, ray=True)
    assert cpu(here, "staging") == cpu(local, "staging") < cpu(both, "staging")
    assert cpu(here, "sending") == cpu(local, "sending") > cpu(both, "sending")
    assert held(here, "store") == held(local, "store") == 0
    assert held(plan(8, ray=True), "store") - held(here, "groups") == pytest.approx(2 * 2 * PARAMETERS)


def seconds_of_sync(gpus: int, changes: Mapping[str, object]) -> float:
    """For a GB of weights."""
    one = step_seconds(setting(gpus, changes), layout(data_parallel=gpus))
    return one.weight_sync / (2 * PARAMETERS / 1e9)


def test_the_step_waits_for_changes_alone_and_for_finding_and_applying_them():
    delta, ray = {"sync": {"mode": "delta"}}, {"workers": {"launcher": "ray"}}
    made = 1 / (8 * 0.3) + 1 / (4 * 0.7)  # by eight threads, and by four
    assert seconds_of_sync(64, delta | ray) - seconds_of_sync(64, ray) == pytest.approx(0.15 - 1 + made)
    assert seconds_of_sync(8, delta | ray) - seconds_of_sync(8, ray) == pytest.approx(made)
    assert seconds_of_sync(8, delta) == seconds_of_sync(8, {})


# -- warnings ---------------------------------------------------------------------------------------------------------------


def test_a_warning_comes_with_too_few_cores_and_goes_with_enough():
    needed = plan(8).machines[0].cores
    assert plan(8, cores=needed + 0.1).warnings == ()
    (warning,) = plan(8, cores=needed - 0.1).warnings
    assert f"machine 'first' needs {needed:.1f} cores" in warning and "most of it for driving" in warning
    assert warning.endswith("take machines with more cores")
    (warning,) = plan(8, calls=9, image_megapixels=60, cores=20).warnings
    assert "most of it for tools" in warning and "rollout.max_turns" in warning


def test_advice_on_cores_is_taken_and_helps():
    """Nodes on all machines, where some have none."""
    few = plan(16, nodes=1, calls=9, image_megapixels=60, cores=25)
    first = next(warning for warning in few.warnings if "machine 'first' needs" in warning)
    assert "most of it for tools" in first and first.endswith("; set workers.nodes=2")
    assert plan(16, nodes=2, calls=9, image_megapixels=60, cores=25).machines[0].cores < few.machines[0].cores
    delta, whole = (plan(16, cores=1, changes={"sync": {"mode": mode}}) for mode in ("delta", "full"))
    assert "most of it for driving" in delta.warnings[0]
    assert cpu(whole, "staging") < cpu(delta, "staging")


def test_a_warning_comes_where_episodes_take_longer_than_the_step_and_goes_with_more_nodes():
    rollout = {"prompts_per_step": 1024, "rollouts_per_prompt": 64, "max_turns": 60, "max_concurrent": 65536}
    changes = {"rollout": rollout, "train": {"prompts_per_mini_batch": 1024}} | NO_WEIGHTS

    def slow(found: Host) -> list[str]:
        return [warning for warning in found.warnings if "episodes" in warning]

    def episodes(nodes: int) -> Host:
        return plan(512, nodes=nodes, calls=59, changes=changes, cores=4096, memory_gb=1 << 20)

    one = episodes(1)
    (warning,) = slow(one)
    assert cpu(one, "episodes") > one.step_s and f"take the one thread of a node {cpu(one, 'episodes'):.0f} s" in warning
    (named,) = re.findall(r"; set workers.nodes=(\d+): each has a thread$", warning)
    assert slow(episodes(int(named))) == [] and len(slow(episodes(int(named) - 1))) >= 1


def test_nodes_without_ray_share_a_thread():
    def warned(nodes: int, ray: bool, message_ms: float = 100) -> list[str]:
        found = plan(8, nodes=nodes, ray=ray, costs=replace(COSTS, message_ms=message_ms), cores=4096, memory_gb=1 << 20)
        return [warning for warning in found.warnings if "episodes" in warning]

    assert [len(warned(*one)) for one in ((1, False), (8, False), (1, True), (8, True))] == [1, 1, 1, 0]
    (local,), (one,) = warned(8, False), warned(1, True)
    assert local.endswith("set workers.launcher=ray and workers.nodes=2: each has a thread")
    assert one.endswith("set workers.nodes=2: each has a thread") and warned(2, True) == []
    (warning,) = warned(8, True, message_ms=1000)  # there are no more engines than eight
    assert warning.endswith("lower rollout.max_turns, or take fewer rollouts a step (rollout.prompts_per_step)")


def test_a_warning_comes_with_too_little_memory_and_goes_with_enough():
    needed = held(plan(8)) / GIB
    assert plan(8, memory_gb=needed + 1).warnings == ()
    (warning,) = plan(8, memory_gb=needed - 1).warnings
    assert "(--memory-gb), most of it for processes" in warning and warning.endswith("take machines with more memory")
    (warning,) = plan(8, memory_gb=needed, changes={"rollout": {"vllm": {"image_cache_gb": 8}}}).warnings
    assert warning.endswith("(128 GiB); lower rollout.vllm.image_cache_gb")


def test_a_store_that_ray_would_make_too_small_is_named_with_its_size():
    need = held(plan(16), "store") / GIB
    small, large = need / 0.3 - 1, need / 0.3 + 1
    named = [warning for warning in plan(16, memory_gb=small).warnings if "Ray's store" in warning]
    assert len(named) == 1 and "machine 'first'" in named[0] and "--object-store-memory=" in named[0]
    size = int(named[0].rpartition("=")[2])
    assert need * GIB <= size < need * GIB + 1e9
    assert not [warning for warning in plan(16, memory_gb=large).warnings if "Ray's store" in warning]
    local = plan(8, memory_gb=small, changes={"rollout": {"mode": "async"}, "loss": {"tis_cap": 2.0}}, image_megapixels=500)
    assert held(local, "groups") > need * GIB and not [one for one in local.warnings if "store" in one]  # there is none
    many = plan(16, images=3, image_megapixels=1000, memory_gb=1 << 20)
    assert held(many, "store") > 200e9 and [one for one in many.warnings if "has 186 unless" in one]  # never more by itself


@pytest.mark.parametrize(
    ("nodes", "ray", "says"),
    [
        (1, True, "workers.nodes=1 with workers.launcher=ray does not reach 2 machines; set workers.nodes=2"),
        (2, False, "does not reach 2 machines; set workers.launcher=ray and workers.nodes=2"),
    ],
)
def test_machines_without_a_node_are_named_with_what_puts_one_there(nodes, ray, says):
    (warning,) = plan(16, nodes=nodes, ray=ray).warnings
    assert warning.endswith(says) and plan(16, nodes=2).warnings == ()


def test_nodes_that_are_advised_are_some_that_ray_can_place():
    """Where engines sleep a node has GPUs of one machine, and of whole tensor-parallel groups, four of them."""
    asleep = {"rollout": {**SLEEP, "vllm": {"sleep": True, "replicas": 3, "gpu_memory": 0.6}}}
    (warning,) = plan(24, nodes=2, share=0, changes=asleep).warnings
    assert warning.endswith("set workers.nodes=3 and rollout.vllm.replicas=24")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"cores": 0}, "--cores: expected a number from 1 to 4096, got 0"),
        ({"memory_gb": float("nan")}, "--memory-gb: expected a number from 1 to 1048576, got nan"),
        ({"image_megapixels": 0}, "--image-megapixels: expected a number from 0.001 to 1000, got 0"),
        ({"calls": -1}, "--calls: expected 0 to 9, one less than rollout.max_turns=10, got -1"),
        ({"calls": 10}, "got 10; change one of the two"),
    ],
)
def test_options_out_of_range_are_refused(options, says):
    with pytest.raises(ConfigError) as refused:
        plan(8, **options)
    assert says in str(refused.value) and "\n" not in str(refused.value)


def test_in_the_published_protocol_every_turn_may_call():
    metis = {"rollout": {"protocol": "metis"}}
    assert plan(8, changes=metis, calls=10)
    with pytest.raises(ConfigError, match=r"expected 0 to 10, rollout.max_turns=10, got 11"):
        plan(8, changes=metis, calls=11)


# -- the command ------------------------------------------------------------------------------------------------------------


def run(name: str, *words: str, **options: float) -> int:
    args: argparse.Namespace = cli.parse(["plan", str(CONFIGS / f"{name}.yaml"), *words])
    vars(args).update(options)
    return command.run(args)


@pytest.fixture
def at_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIGS.parent)


def test_json_has_the_machines_of_the_layout_that_is_recommended(at_home, capsys):
    assert run("qwen3vl_8b_hdpo", "--json", cores=4.0, calls=2.0) == 0
    tree = json.loads(capsys.readouterr().out)
    around = tree["host"]
    assert set(around) == {"layout", "step_seconds", "options", "costs", "assumed_costs", "machines", "warnings"}
    (own,) = [one for one in tree["layouts"] if one["own"]]
    assert around["layout"] == own["layout"] and around["step_seconds"] == own["predicted"]["seconds"]["total"]
    assert around["options"] == {"cores": 4.0, "memory_gb": 1024, "image_megapixels": 3.1, "calls": 2.0}
    assert len(around["warnings"]) == 1
    for machine in around["machines"]:
        assert set(machine) == {"name", "count", "nodes", "predicted"}
        assert set(machine["predicted"]) == {"cpu_seconds", "cores", "memory_bytes"}
        for name, made in (("cpu_seconds", HostSeconds), ("memory_bytes", HostMemory)):
            assert set(machine["predicted"][name]) == {part.name for part in fields(made)} | {"total"}


def test_the_best_layout_stands_in_for_one_that_does_not_fit(at_home, capsys):
    assert run("qwen3vl_8b_hdpo", "--json", "train.megatron.recompute=none") == 1
    tree = json.loads(capsys.readouterr().out)
    assert tree["host"]["layout"] == tree["layouts"][0]["layout"] and not tree["layouts"][0]["own"]


@pytest.mark.parametrize("name", ["qwen3vl_8b_hdpo", "qwen3vl_8b_hdpo_64gpu", "qwen3vl_8b_hdpo_512gpu"])
def test_a_shipped_config_warns_of_nothing(name, at_home, capsys):
    assert run(name) == 0
    lines = capsys.readouterr().out.splitlines()
    assert not [line for line in lines if line.startswith("WARNING")]
    kinds = [line.split()[2] for line in lines if " x first " in line or " x other " in line]
    assert kinds == (["first"] * 2 if name == "qwen3vl_8b_hdpo" else ["first", "other"] * 2)


def test_the_page_names_every_cost_that_is_assumed():
    page = (Path(CONFIGS.parent) / "docs" / "plan.md").read_text(encoding="utf-8")
    costs = page[page.index("## Host") :]
    for cost in fields(HostCosts):
        assert f"`{cost.name}`" in costs, cost.name
