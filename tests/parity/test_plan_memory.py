"""The memory model of `metis-fast plan` against the bytes that real ranks hold, within 5 %."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from tiny_shape import SHAPE, TEXTS
from trainer_cases import ANSWER, CALL, config, score
from transformers import AutoConfig

from metis_fast.plan.memory import Pass, memory, waiting
from metis_fast.testing.tiny import TinyShape, build_tiny
from metis_fast.train.megatron.launch import Ranks
from metis_fast.train.megatron.task import Task
from metis_fast.types import Observation, ScoredGroup

HERE = Path(__file__).parent
TP, PP, DP = ({name: 2} for name in ("tensor_parallel", "pipeline_parallel", "data_parallel"))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Wide enough that what goes with the hidden size outweighs a few bytes a token."""
    folder = tmp_path_factory.mktemp("model")
    rope = {"rope_type": "default", "mrope_section": [8, 4, 4], "mrope_interleaved": True, "rope_theta": 1e4}
    text = SHAPE.text_config | {
        "hidden_size": 192, "intermediate_size": 320, "num_hidden_layers": 4, "num_attention_heads": 8, "head_dim": 32,
        "rope_parameters": rope,
    }  # fmt: skip
    vision = SHAPE.vision_config | {"depth": 4, "hidden_size": 96, "intermediate_size": 160, "deepstack_visual_indexes": [0, 1]}
    build_tiny(folder, TinyShape(SHAPE.vocab_size, SHAPE.image_px, text, vision), TEXTS * 5, seed=0)
    return folder


@pytest.fixture(scope="module")
def groups(play, make_prompt, picture):
    """One group whose rollouts share a prompt with images."""
    prompt = make_prompt("<image> or <image> " + "or is it something else " * 10, [picture(0), picture(1, 96, 32)], uid="a")
    shown = [Observation("see <image>", (picture(2, 64, 64),)), Observation("nothing")]
    rollouts = (
        play(prompt, [CALL % "1", "hm " + CALL % "2 + 2", ANSWER % "Lyon"], shown, index=0),
        play(prompt, [ANSWER % ("no " * 20)], index=1),
    )
    return [ScoredGroup(prompt, rollouts, (score(0.7, 0.9), score(-1.1, -0.4)))]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Two, which become one layout after the other."""
    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONPATH", str(HERE))
    with Ranks(config(train={"megatron": TP}).train.megatron, "plan_probe:Probe", None, tmp_path_factory.mktemp("logs")) as two:
        yield two
    patch.undo()


def settings_of(layout, groups, dtype="float32", freeze=()):
    longest = max(len(rollout.tokens) for group in groups for rollout in group.rollouts)
    train = {"tokens_per_micro_batch": 2 * longest, "prompts_per_mini_batch": 1, "megatron": layout}
    return config(train=train, model={"dtype": dtype, "freeze": list(freeze)})


FULL = pytest.param("float32", marks=pytest.mark.slow)
"""bfloat16 has masters besides, and so every part that float32 has."""


@pytest.mark.parametrize("dtype", ["bfloat16", FULL])
@pytest.mark.parametrize(
    ("layout", "freeze"),
    [
        pytest.param(TP, (), id="tp2", marks=pytest.mark.slow),  # in float32 it is a test of its own
        pytest.param(PP, (), id="pp2", marks=pytest.mark.slow),
        pytest.param(DP, (), id="dp2"),
        pytest.param(DP | {"distributed_optimizer": False}, (), id="dp2 whole optimizer", marks=pytest.mark.slow),
        pytest.param(TP | {"distributed_optimizer": False}, ("embeddings",), id="tp2 frozen embeddings"),
        pytest.param(PP, ("vision", "embeddings"), id="pp2 frozen"),
    ],
)
def test_weights_gradients_and_optimizer_are_what_a_rank_holds(ranks, model, groups, layout, freeze, dtype):
    settings = settings_of(layout, groups, dtype, freeze)
    found = ranks.call("held", Task(settings, model, settings.train.optim, 10), [groups])
    for rank, (weights, gradients, optimizer) in enumerate(found):
        expected = memory(settings, AutoConfig.from_pretrained(model), settings.train.megatron, rank)
        assert weights == pytest.approx(expected.weights, rel=0.05)
        assert gradients == pytest.approx(expected.gradients, rel=0.05)
        assert optimizer == pytest.approx(expected.optimizer, rel=0.05)


def test_in_float32_the_weights_are_their_own_masters(ranks, model, groups):
    test_weights_gradients_and_optimizer_are_what_a_rank_holds(ranks, model, groups, TP, (), "float32")


PASSES = {"tp2": TP, "tp2 sp": TP | {"sequence_parallel": True}, "pp2": PP}
QUICK = (("tp2", "none"), ("tp2 sp", "selective"), ("pp2", "full"), ("pp2", "none"))
"""Each layout and each kind of recomputation."""


@pytest.mark.parametrize("dtype", ["bfloat16", FULL])
@pytest.mark.parametrize(
    ("name", "recompute"),
    [
        pytest.param(*case, marks=() if case in QUICK else pytest.mark.slow)
        for case in itertools.product(PASSES, ("none", "selective", "full"))
    ],
)
def test_activations_are_what_autograd_keeps_of_a_pass(ranks, model, groups, name, recompute, dtype):
    settings = settings_of(PASSES[name] | {"recompute": recompute}, groups, dtype)
    found = ranks.call("activations", Task(settings, model, settings.train.optim, 10), groups)
    images = found[0][0][1]
    for rank, ((tokens, _, *seen),) in enumerate(found):
        expected = waiting(
            settings, AutoConfig.from_pretrained(model), settings.train.megatron, rank, Pass(tokens, images, 0), fused=False
        )
        assert seen == [pytest.approx(part, rel=0.05) for part in expected]
