"""`metis-fast plan`: weights and time against a count by hand or by torch, and the order of its layouts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace

import pytest
import torch
from planning import big, config, layout, setting, tiny
from transformers import Qwen3VLForConditionalGeneration

from metis_fast.config import build
from metis_fast.plan.candidates import candidates
from metis_fast.plan.duration import step_seconds
from metis_fast.plan.gpus import GPUS
from metis_fast.plan.memory import RankMemory, memory
from metis_fast.plan.shape import Shape
from metis_fast.plan.workload import Workload, mini_batch
from metis_fast.train.flops import FlopModel
from metis_fast.train.megatron.layout import check

# -- weights, gradients, optimizer ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [tiny(True), tiny(False), big()], ids=["tied", "untied", "8b"])
def test_parameters_are_those_of_the_model(model):
    with torch.device("meta"):
        real = Qwen3VLForConditionalGeneration(model)
    shape = Shape.of(model)
    assert shape.num_parameters == sum(p.numel() for p in real.parameters())
    assert shape.tower is not None
    assert sorted(shape.tower.parameters()) == sorted(p.numel() for p in real.model.visual.parameters())
    layer = real.model.language_model.layers[0]
    assert sum(shape.layer_parameters(1)) == sum(p.numel() for p in layer.parameters())


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("tied", [True, False])
def test_stages_hold_the_whole_model_and_a_tied_head_twice_where_there_are_two(tied, stages, dtype):
    model = tiny(tied)
    one = layout(pipeline_parallel=stages, distributed_optimizer=False)
    ranks = [memory(config(dtype=dtype), model, one, stage) for stage in range(stages)]
    shape, element = Shape.of(model), 2 if dtype == "bfloat16" else 4
    copies = 400 * 32 if tied and stages == 2 else 0
    number = shape.num_parameters + copies
    assert sum(rank.weights for rank in ranks) == number * element
    assert sum(rank.gradients for rank in ranks) == number * 4
    assert sum(rank.optimizer for rank in ranks) == number * (12 if dtype == "bfloat16" else 8)


def test_a_tensor_parallel_rank_by_hand():
    """8B, stage 1 of 2 with 17 layers, on 4 tensor-parallel ranks."""
    one = layout(
        tensor_parallel=4, pipeline_parallel=2, first_stage_layers=19, last_stage_layers=17, distributed_optimizer=False
    )
    held = memory(config(), big(), one, 4)
    matrices = (4096 * 6144 + 4096 * 4096 + 3 * 4096 * 12288) // 4
    number = 17 * (matrices + 2 * 4096 + 2 * 128) + 4096 + 151936 * 4096 // 4
    assert (held.weights, held.gradients, held.optimizer) == (2 * number, 4 * number, 12 * number)
    assert held.vision == 0


def test_the_distributed_optimizer_splits_its_states_alone():
    one, four = (memory(config(), big(), layout(data_parallel=n), 0) for n in (1, 4))
    assert four.optimizer == pytest.approx(one.optimizer / 4, rel=1e-6)
    assert (four.weights, four.gradients) == (one.weights, one.gradients)
    whole = memory(config(), big(), layout(data_parallel=4, distributed_optimizer=False), 0)
    assert whole.optimizer == pytest.approx(one.optimizer, rel=1e-6)


def test_its_buffers_align_every_parameter():
    """Norms of a model this small stand in 64 elements each."""
    model, shape = tiny(False), Shape.of(tiny(False))
    assert shape.tower is not None
    sizes = [*shape.layer_parameters(1) * 4, 32, 2 * [400 * 32], *shape.tower.parameters()]
    flat = [n for size in sizes for n in (size if isinstance(size, list) else [size])]
    elements = -(-sum(-(-n // 64) * 64 for n in flat) // 384) * 384  # 3 ranks: whole 128 each
    held = memory(config(dtype="float32"), model, layout(data_parallel=3), 0)
    assert (held.weights, held.gradients) == (4 * elements, 4 * elements)
    assert held.optimizer == -(-8 * sum(flat) // 3)  # states are made without the gaps


def test_frozen_parts_have_weights_only():
    def held(*freeze: str) -> RankMemory:
        return memory(config(freeze=freeze), tiny(True), layout(distributed_optimizer=False), 0)

    everything, shape = held(), Shape.of(tiny(True))
    assert shape.tower is not None
    for part, number in (("vision", sum(shape.tower.parameters())), ("embeddings", 400 * 32)):
        rest = held(part)
        assert rest.weights == everything.weights
        assert everything.gradients - rest.gradients == 4 * number
        assert everything.optimizer - rest.optimizer == 12 * number


def test_a_reference_policy_is_a_second_copy_of_the_weights_and_a_pass():
    plain, pulled = (setting(changes={"loss": {"kl_coef": kl}}) for kl in (0.0, 0.1))
    one = layout(tensor_parallel=8, data_parallel=8, distributed_optimizer=False)
    weights = [memory(here.config, big(), one, 0).weights for here in (plain, pulled)]
    assert weights[1] == 2 * weights[0]
    times = [step_seconds(here, one) for here in (plain, pulled)]
    assert times[1].old_logprobs > 2 * times[0].old_logprobs


# -- time -------------------------------------------------------------------------------------------------------------------


def test_a_mini_batch_is_what_packing_makes_of_it():
    """64 groups of 16, an eighth uniform; 3 rollouts of 10 fit behind a prompt of 10 into 40 tokens: 6 parts."""
    settings = build({"train": {"tokens_per_micro_batch": 40}, "rollout": {"max_prompt_tokens": 20, "max_response_tokens": 20}})
    load = Workload(10, 10, sampled=0.5, images=0, uniform=0.125)
    batch = mini_batch(settings, load, FlopModel(1, 1, 1))
    each = 16 / 6
    assert batch.passes == 56 * 6
    assert batch.tokens == pytest.approx(10 + each * 10)
    assert batch.pairs == pytest.approx(50 + each * 150)
    assert batch.rows == pytest.approx(each * 5)


def test_an_update_by_hand():
    """8B on 8 ranks of tensor parallelism: products of all live tokens, forward and twice backward."""
    here = setting(gpus=8)
    seconds = step_seconds(here, layout(tensor_parallel=8, sequence_parallel=True))
    batch = mini_batch(here.config, here.load, here.flops)
    tokens = 2 * batch.passes * batch.tokens
    assert seconds.dense == pytest.approx(3 * here.flops.token * tokens / 8 / (989e12 * 0.6))
    reduced = 5 * 36 * 2 * 7 / 8 * tokens * 4096 * 2  # all-reduces of a layer, bytes
    assert seconds.tensor_parallel == pytest.approx(reduced / (450e9 * 0.7))
    assert seconds.bubble == pytest.approx(0, abs=1e-9) and seconds.data_parallel == 0
    assert seconds.total == pytest.approx(sum(getattr(seconds, part.name) for part in fields(seconds)))


def test_more_stages_wait_longer_and_interleaving_waits_less():
    here = replace(setting(), load=Workload(3072, 2048, uniform=0.0))  # 64 passes: interleaving fills none up
    plain, deep, mixed = (
        step_seconds(here, layout(tensor_parallel=4, pipeline_parallel=p, virtual_pipeline=v, data_parallel=16 // p)).bubble
        for p, v in ((2, 1), (4, 1), (4, 3))
    )
    assert 0 < plain < deep and mixed < deep


def test_what_the_settings_save_is_saved_here_too():
    base = step_seconds(setting(), layout(tensor_parallel=8, data_parallel=8))
    for change, part in (
        ({"train": {"share_prompt": False}}, "dense"),
        ({"train": {"skip_old_logprobs": False}}, "old_logprobs"),
        ({"train": {"skip_head_rows": False}}, "head"),
        ({"train": {"skip_zero_advantage": False}}, "dense"),
    ):
        slower = step_seconds(setting(changes=change), layout(tensor_parallel=8, data_parallel=8))
        assert getattr(slower, part) > getattr(base, part), change
    engine = step_seconds(setting(changes={"loss": {"proximal": "engine"}}), layout(tensor_parallel=8, data_parallel=8))
    assert engine.old_logprobs == 0


def sync(gpus: int, changes: Mapping[str, object] | None = None, share: float = 0.3) -> float:
    """Seconds that 16 GB of weights take."""
    here = replace(setting(gpus, changes), engine_share=share)
    return 16e9 / (2 * here.shape.num_parameters) * step_seconds(here, layout(data_parallel=gpus)).weight_sync


def test_weights_that_pass_through_hosts_go_no_faster_than_was_measured():
    staged = 8.0 + 16 / 4.6  # copied into shared memory, loaded
    ray = {"workers": {"launcher": "ray"}}
    assert sync(8) == pytest.approx(16 / 0.7 + staged)  # from ranks to the run, over a connection
    assert sync(8, ray) == pytest.approx(8.0 + staged)  # one copy more, as an object of the same machine
    for gpus in (16, 64, 512):  # each machine gets it once
        assert sync(gpus, ray) == sync(gpus) == pytest.approx(16.0 + staged)
    assert sync(8, ray, share=0.0) == pytest.approx(16.0 + staged)  # engines have machines of their own
    asleep = {"rollout": {"engine": "vllm", "max_concurrent": 2048, "deterministic": False, "vllm": {"sleep": True}}}
    assert sync(8, asleep | ray, share=0.0) == pytest.approx(8.0 + staged)  # they take turns with the trainer


def test_weights_that_pass_between_gpus_go_over_their_link():
    direct = {"sync": {"transport": "nccl"}}
    assert sync(8, direct) == pytest.approx(16 / (450 * 0.7))
    assert sync(64, direct) == pytest.approx(16 / (50 * 0.7))


def test_faster_gpus_are_faster():
    one = layout(tensor_parallel=8, data_parallel=8)
    times = [step_seconds(replace(setting(), gpu=GPUS[name]), one) for name in ("h100", "h200", "b200")]
    assert times[0].rollout > times[1].rollout > times[2].rollout
    assert times[0].dense == times[1].dense > times[2].dense


# -- layouts ----------------------------------------------------------------------------------------------------------------


def test_layouts_are_valid_whole_and_ordered():
    here = setting()
    own = layout(tensor_parallel=2, pipeline_parallel=4, data_parallel=8)  # one that the search would not propose
    found = candidates(here, big(), own)
    for one in found:
        check(one.layout, big())
        assert one.layout.num_ranks == 64
        assert one.layout.sequence_parallel == (one.layout.tensor_parallel > 1) or one.own
        assert one.fits == (one.memory.total <= GPUS["h100"].memory)
    assert [one.layout for one in found if one.own] == [own]
    fitting = [one.seconds.total for one in found if one.fits]
    rest = [one.memory.total for one in found if not one.fits]
    assert fitting == sorted(fitting) and rest == sorted(rest)
    assert [one.fits for one in found] == sorted((one.fits for one in found), reverse=True)
    assert len({str(one.layout) for one in found}) == len(found)


def test_the_worst_stage_decides():
    here = setting()
    own = layout(tensor_parallel=2, pipeline_parallel=4, data_parallel=8, sequence_parallel=True, recompute="full")
    (one,) = [one for one in candidates(here, big(), own) if one.own]
    engine = int(0.3 * GPUS["h100"].memory)
    each = [memory(here.config, big(), own, stage * 16, engine=engine).total for stage in range(4)]
    assert one.memory.total == max(each) == each[one.stage]
