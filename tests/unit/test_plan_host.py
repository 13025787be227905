"""`metis-fast plan`: what machines need around the GPUs, by hand, and what is said when it is too much."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path

import pytest
from planning import CONFIGS, big, layout, setting

from metis_fast import cli
from metis_fast.data.parquet import CACHE_BYTES
from metis_fast.errors import ConfigError
from metis_fast.plan import command
from metis_fast.plan.candidates import evaluate
from metis_fast.plan.gpus import GIB
from metis_fast.plan.host import ASSUMED, Host, HostCosts, HostMemory, HostOptions, HostSeconds, host
from metis_fast.plan.shape import Shape

LAYOUT = {"tensor_parallel": 4, "sequence_parallel": True, "recompute": "full"}
SLEEP = {"engine": "vllm", "max_concurrent": 2048, "vllm": {"sleep": True, "gpu_memory": 0.6}}
COSTS = HostCosts()
PARAMETERS = Shape.of(big()).num_parameters


def plan(
    gpus: int = 64,
    *,
    changes: Mapping[str, object] | None = None,
    images: int = 1,
    share: float = 0.3,
    stages: int = 1,
    **options: float,
) -> Host:
    here = setting(gpus, changes)
    here = replace(here, load=replace(here.load, images=images), engine_share=share)
    one = layout(**LAYOUT, pipeline_parallel=stages, data_parallel=gpus // 4 // stages)
    return host(here, evaluate(here, one), HostOptions(**options))


def cpu(found: Host, part: str = "total", at: int = 0) -> float:
    return getattr(found.machines[at].seconds, part)


def held(found: Host, part: str = "total", at: int = 0) -> float:
    return getattr(found.machines[at].memory, part)


# -- sums -------------------------------------------------------------------------------------------------------------------


def test_totals_are_the_sums_of_their_parts_and_cores_are_seconds_of_seconds():
    for machine in plan().machines:
        for whole, made in ((machine.seconds, HostSeconds), (machine.memory, HostMemory)):
            parts = [getattr(whole, part.name) for part in fields(made)]
            assert min(parts) >= 0 and whole.total == pytest.approx(sum(parts)) and whole.total > 0
        assert machine.cores == pytest.approx(machine.seconds.total / plan().step_s)


def test_assumed_costs_are_costs():
    assert set(ASSUMED) < {cost.name for cost in fields(HostCosts)}


def test_a_machine_by_hand():
    """128 prompts x 16 rollouts on 8 GPUs, an image of 2 megapixels, a call of three tools; 2 replicas of 4 ranks."""
    found = plan(8, image_megapixels=2, calls=3)
    assert [(machine.name, machine.count) for machine in found.machines] == [("first", 1)]
    rollouts, python, prepared = 2048, 2048, 2 * (COSTS.decode_ms + COSTS.resize_ms)
    run = 128 * prepared + python * COSTS.crop_ms
    engines = 128 * (prepared + 1024 * COSTS.patch_ms) + python * COSTS.crop_engine_ms
    ranks = 8 * 0.8 * (128 * prepared + python * COSTS.crop_ms) / 2  # a fifth of the groups is left out
    assert cpu(found, "images") == pytest.approx((run + engines + ranks) / 1e3)
    assert cpu(found, "episodes") == pytest.approx(rollouts * (COSTS.rollout_ms + 4 * COSTS.message_ms) / 1e3)
    sandbox = python * (COSTS.session_ms + 2 * COSTS.decode_ms + COSTS.python_ms + COSTS.crop_made_ms)
    assert cpu(found, "tools") == pytest.approx((sandbox + 2 * rollouts * COSTS.search_ms) / 1e3)
    assert cpu(found, "judging") == pytest.approx(rollouts * COSTS.judge_ms / 1e3)
    size = 2 * PARAMETERS / 1e9
    assert cpu(found, "staging") == pytest.approx(size / COSTS.stage_gbs + 8 * size / COSTS.load_gbs)
    assert cpu(found, "sending") == pytest.approx(size / COSTS.gather_gbs)
    assert cpu(found, "driving") == pytest.approx(16 * found.step_s)
    step = 128 * 2e6 * COSTS.encoded_bytes + python * COSTS.crop_bytes + rollouts * 5120 * COSTS.token_bytes
    assert held(found, "groups") == pytest.approx(step) and held(found, "rank_groups") == pytest.approx(16 * step)
    assert held(found, "pictures") == 9 * 2 * GIB and held(found, "engine_images") == 8 * 2 * 4 * GIB
    assert held(found, "weights") == 2 * 2 * PARAMETERS and held(found, "data") == CACHE_BYTES
    assert held(found, "processes") == 17 * COSTS.process_bytes


def test_the_run_is_on_the_first_machine_alone():
    found = plan(64)
    assert [(machine.name, machine.count) for machine in found.machines] == [("first", 1), ("other", 7)]
    for part in ("episodes", "tools", "judging"):
        assert cpu(found, part) > 0 and cpu(found, part, 1) == 0
    assert held(found, "groups", 1) == held(found, "data", 1) == 0
    spread = plan(64, changes={"workers": {"tools": 8, "judges": 1}})
    for part in ("tools", "judging"):
        assert cpu(spread, part) == pytest.approx(cpu(spread, part, 1)) == pytest.approx(cpu(found, part) / 8)


def test_only_ranks_of_the_first_stage_prepare_images():
    """Of 16 ranks in two stages the first machine has the first."""
    found = plan(16, stages=2)
    assert held(found, "pictures") == 9 * 2 * GIB and held(found, "pictures", 1) == 0
    assert cpu(found, "images") > cpu(found, "images", 1) > 0


def test_engines_of_their_own_stand_on_machines_of_their_own():
    found = plan(16, share=0)
    assert [(machine.name, machine.count) for machine in found.machines] == [("first", 1), ("other", 1), ("engines", 2)]
    assert held(found, "engine_images") == 0 < held(found, "engine_images", 2)
    assert held(found, "weights", 1) == 0 < held(found, "weights", 2)
    assert cpu(found, "sending", 1) == cpu(found, "staging", 1) == 0 < cpu(found, "sending", 2)
    assert cpu(found, "staging") == 0 < held(found, "weights")  # which are published there


def test_replicas_that_have_parts_of_a_group_each_prepare_its_images():
    whole, cut = (plan(64, calls=0, changes={"train": {"share_prompt": shared}}) for shared in (True, False))
    assert cpu(whole, "images") < cpu(cut, "images")


def test_one_that_sleeps_takes_turns_with_a_rank():
    found = plan(8, share=0, changes={"rollout": SLEEP})
    assert cpu(found, "driving") == pytest.approx(8 * found.step_s)
    assert held(found, "engine_images") > 0


def test_weights_that_go_from_gpu_to_gpu_do_not_pass_through_the_host():
    found = plan(16, share=0, changes={"sync": {"transport": "nccl"}})
    assert all(cpu(found, part, at) == 0 for part in ("staging", "sending") for at in range(3))
    assert all(held(found, "weights", at) == 0 for at in range(3))


@pytest.mark.parametrize(
    ("rollout", "steps"),
    [
        ({"mode": "sync"}, 1),
        ({"mode": "sync", "over_provision": 0.25, "slow": "drop", "deterministic": False}, 1.25),
        ({"mode": "one_step_off"}, 2),
        ({"mode": "async", "max_staleness": 3}, 4),
    ],
)
def test_groups_are_kept_until_they_are_trained(rollout, steps):
    found = plan(8, changes={"rollout": rollout, "loss": {"tis_cap": 2.0}})
    assert held(found, "groups") == pytest.approx(steps * held(plan(8), "groups"))


# -- more is more -----------------------------------------------------------------------------------------------------------


def test_more_images_and_larger_ones_take_more():
    for less, more in ((plan(images=0), plan()), (plan(), plan(images=2)), (plan(), plan(image_megapixels=12))):
        assert cpu(less, "images") < cpu(more, "images") and cpu(less, "tools") < cpu(more, "tools")
        assert held(less, "groups") < held(more, "groups") and held(less, "rank_groups") < held(more, "rank_groups")
    assert cpu(plan(images=0), "images") == 0


def test_more_calls_take_more():
    for part in ("images", "episodes", "tools"):
        taken = [cpu(plan(calls=calls), part) for calls in (0, 1, 4)]
        assert taken == sorted(taken) and taken[0] < taken[2]
    assert cpu(plan(calls=0), "tools") == 0
    none = plan(calls=4, changes={"tools": {"enabled": []}})
    assert cpu(none, "tools") == 0 and held(none, "groups") == held(plan(calls=0), "groups")


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
    pulled = size * (COSTS.delta_share if mode == "delta" else 1)
    assert cpu(found, "sending") == pytest.approx((size / COSTS.put_gbs + pulled / COSTS.pull_gbs) / 1e9)
    assert cpu(found, "sending", 1) == pytest.approx(pulled / COSTS.pull_gbs / 1e9)
    taken = size / COSTS.stage_gbs + 8 * size / COSTS.load_gbs + (mode == "delta") * size / COSTS.decode_gbs
    assert cpu(found, "staging", 1) == pytest.approx(taken / 1e9)
    assert cpu(found, "staging") == pytest.approx((taken + (mode == "delta") * size / COSTS.encode_gbs) / 1e9)
    assert held(found, "weights") == 4 * size and held(found, "weights", 1) == pytest.approx(2 * size + pulled)


def test_on_one_machine_changes_are_for_ray_alone():
    ray = {"workers": {"launcher": "ray"}}
    here, delta, both = (plan(8, changes=each) for each in ({}, {"sync": {"mode": "delta"}}, {"sync": {"mode": "delta"}} | ray))
    assert cpu(here, "staging") == cpu(delta, "staging") < cpu(both, "staging")
    assert cpu(here, "sending") == cpu(delta, "sending") > cpu(both, "sending")
    assert held(plan(8, changes=ray), "weights") == 2 * held(here, "weights")


# -- warnings ---------------------------------------------------------------------------------------------------------------


def test_a_warning_comes_with_too_few_cores_and_goes_with_enough():
    needed = plan(8).machines[0].cores
    assert plan(8, cores=needed + 0.1).warnings == ()
    (warning,) = plan(8, cores=needed - 0.1).warnings
    assert f"machine 'first' needs {needed:.1f} cores" in warning and "most of it for driving" in warning
    (warning,) = plan(8, calls=9, image_megapixels=60, cores=20).warnings
    assert "most of it for tools" in warning and "workers.tools" in warning
    spread = plan(8, calls=9, image_megapixels=60, cores=20, changes={"workers": {"tools": 4}})
    assert spread.warnings[0].endswith("take machines with more cores")


def test_a_warning_comes_with_too_little_memory_and_goes_with_enough():
    needed = held(plan(8)) / GIB
    assert plan(8, memory_gb=needed + 1).warnings == ()
    (warning,) = plan(8, memory_gb=needed - 1).warnings
    assert "(--memory-gb), most of it for processes" in warning
    (warning,) = plan(8, memory_gb=needed, changes={"rollout": {"vllm": {"image_cache_gb": 8}}}).warnings
    assert warning.endswith("(128 GiB); lower rollout.vllm.image_cache_gb")


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
        assert set(machine) == {"name", "count", "predicted"}
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
