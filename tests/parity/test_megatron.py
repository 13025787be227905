"""The Megatron back end under every layout: real ranks over gloo, against transformers and the torch back end, in float32."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_shape import SHAPE, TEXTS
from trainer_cases import ANSWER, CALL, SWITCHES, config, derived_gradient, forward, longest, score
from transformers import AutoConfig, Qwen3Config, Qwen3ForCausalLM

from metis_fast.config import Config, ModelConfig
from metis_fast.errors import CheckpointError, Interrupted, NonFiniteError
from metis_fast.model import load_policy
from metis_fast.testing.tiny import TinyShape, build_tiny
from metis_fast.train.megatron.backend import MegatronTrainer
from metis_fast.train.megatron.launch import Ranks
from metis_fast.train.megatron.layout import check
from metis_fast.train.megatron.task import Task
from metis_fast.train.torch_backend import TorchTrainer
from metis_fast.types import Observation, ScoredGroup

HERE = Path(__file__).parent
STEP = 1e6  # of the probe's linear optimizer, lr / eps


def scaled_up(folder, embeddings=20.0):
    """Fresh weights of a narrow model predict the same for every context; norms of 1 hide a norm that is left out."""
    policy = load_policy(ModelConfig(path=folder, dtype="float32"))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in policy.model.named_parameters():
            if weight.ndim == 2 and "visual" not in name:
                weight.mul_(embeddings if "embed" in name else 8.0)
            elif "norm" in name:
                weight.add_(torch.randn(weight.shape, generator=generator) * 0.1)
    policy.model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory, policy):
    """Qwen3-VL of 4 layers, 2 of them fed by deepstack, with tied and with untied embeddings, and of 8; a text-only Qwen3."""
    out = {}
    for name, tied, num_layers in (("tied", True, 4), ("untied", False, 4), ("deep", False, 8)):
        folder = tmp_path_factory.mktemp(name)
        text = SHAPE.text_config | {"num_hidden_layers": num_layers, "tie_word_embeddings": tied}
        vision = SHAPE.vision_config | {"depth": 3, "deepstack_visual_indexes": [0, 1]}
        build_tiny(folder, TinyShape(SHAPE.vocab_size, SHAPE.image_px, text, vision), TEXTS * 5, seed=0)
        out[name] = scaled_up(folder, 10.0 if tied else 20.0)
    folder = tmp_path_factory.mktemp("text")
    torch.manual_seed(0)
    shape = {name: SHAPE.text_config[name] for name in ("hidden_size", "intermediate_size", "num_attention_heads", "head_dim")}
    heads = {"num_key_value_heads": 2, "num_hidden_layers": 4, "max_position_embeddings": 4096, "tie_word_embeddings": False}
    Qwen3ForCausalLM(Qwen3Config(vocab_size=len(policy.tokenizer), **shape, **heads)).save_pretrained(folder)
    policy.tokenizer.save_pretrained(folder)
    out["text"] = scaled_up(folder)
    return out


@pytest.fixture(scope="module")
def text_groups(play, make_prompt):
    """Two groups without images."""
    one, two = make_prompt("Which city?", uid="a"), make_prompt("And the other?", uid="b")
    said = [Observation("nothing to see"), Observation("4")]
    scores = ((score(0.7, 0.9), score(-1.1, -0.4)), (score(0.0, 0.3), score(1.0, 0.0)))
    return [
        ScoredGroup(
            prompt,
            (play(prompt, [ANSWER % "Paris"]), play(prompt, [CALL % "1", CALL % "2 + 2", ANSWER % "Lyon"], said, 1)),
            scored,
        )
        for prompt, scored in zip((one, two), scores, strict=True)
    ]


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Ranks by their number, started once."""
    patch, started = pytest.MonkeyPatch(), {}
    patch.setenv("PYTHONPATH", str(HERE))

    def ranks(layout):
        number = layout.num_ranks
        if number not in started:
            started[number] = Ranks(layout, "megatron_probe:Probe", None, tmp_path_factory.mktemp("logs"))
        return started[number]

    yield ranks
    for one in started.values():
        one.close()
    patch.undo()


def settings_of(data, layout=None, model=None, **optim):
    """Mini-batches of one prompt, so that old log-probabilities are owed, and packs that hold little.

    Adam's epsilon is above the rounding of gradients that are 0, such as those of a key's bias, which would become whole steps.
    """
    optim = {"eps": 1e-4} | optim
    train = {"tokens_per_micro_batch": longest(data) + 10, "prompts_per_mini_batch": 1, "megatron": layout or {}}
    return config(train=train, model=model, **optim)


def joined(parts):
    out: dict = {}
    for part in parts:
        assert not out.keys() & part.keys()
        out |= part
    return out


@pytest.fixture(scope="module")
def truth(models, groups, text_groups):
    """What each model gives in one process: gradients by transformers, rollout by rollout, the rest by the torch back end."""
    out = {}
    for name, folder in models.items():
        data = text_groups if name == "text" else groups
        load = lambda folder=folder: load_policy(ModelConfig(path=folder, dtype="float32"))  # noqa: E731
        settings = settings_of(data)
        trainer = TorchTrainer(load(), settings, settings.train.optim, 10)
        logp = trainer.logprobs([r for g in data for r in g.rollouts])
        stats = [trainer.update(step) for step in (data, data[::-1])]
        weights = {n: p.detach().clone() for n, p in trainer.policy.model.named_parameters()}
        with torch.no_grad():
            largest = max(float(forward(trainer.policy, r).abs().max()) for g in data for r in g.rollouts)
        gradient, loss = derived_gradient(load, data[-1:], settings, dtype=torch.float32)
        out[name] = (data, logp, largest, stats, weights, gradient, loss)
    return out


TP, PP, DP = ({name: 2} for name in ("tensor_parallel", "pipeline_parallel", "data_parallel"))
LAYOUTS = {
    "tp2": TP,
    "tp2 sp": TP | {"sequence_parallel": True},
    "pp2": PP,
    "pp2 uneven": PP | {"first_stage_layers": 3},
    "dp2": DP,
    "dp2 overlapped": DP | {"overlap_reduction": "on"},
    "dp2 whole optimizer": DP | {"distributed_optimizer": False},
    "pp2 interleaved": PP | {"virtual_pipeline": 2},
    "pp2 full recompute": PP | {"recompute": "full"},
    "tp2 sp selective recompute": TP | {"sequence_parallel": True, "recompute": "selective"},
    "tp2 pp2": TP | PP,
    "tp2 sp pp2 interleaved": TP | PP | {"virtual_pipeline": 2, "sequence_parallel": True},
    "tp2 sp pp2 full recompute": TP | PP | {"sequence_parallel": True, "recompute": "full"},
    "tp2 dp2 overlapped": TP | DP | {"overlap_reduction": "on"},
    "pp2 dp2": PP | DP,
}
CASES = [(name, "deep" if "interleaved" in name else "untied") for name in LAYOUTS] + [
    (name, model) for name in ("pp2", "tp2 sp", "tp2 pp2", "dp2") for model in ("tied", "text")
]


@pytest.mark.parametrize(("layout", "model"), CASES, ids=[" ".join(case) for case in CASES])
def test_a_layout_computes_what_one_process_does(start, truth, models, layout, model):
    data, logp, largest, stats, weights, gradient, loss = truth[model]
    settings = settings_of(data, LAYOUTS[layout])
    task = Task(settings, models[model], settings.train.optim, 10)
    ranks = start(settings.train.megatron)
    check(settings.train.megatron, AutoConfig.from_pretrained(models[model]))

    # one step of the loss of a mini-batch: every gradient, vision tower included, to 1e-5 of its own norm
    before = {
        n: p.detach().double()
        for n, p in load_policy(settings.model.model_copy(update={"path": models[model]})).model.named_parameters()
    }
    found = ranks.call("linear", task, data[-1:])
    after = joined(part for _, part in found)
    assert after.keys() == before.keys()
    for name, expected in gradient.items():
        got = (before[name] - after[name].double()) / STEP
        assert float((got - expected).norm()) <= 1e-5 * float(expected.norm()) + 1e-12, name
    (result,) = found[0][0]
    assert sum(values[0] for values, _ in result.table) == pytest.approx(loss, rel=1e-5, abs=3e-7)
    norm = float(torch.stack([g.norm() for g in gradient.values()]).norm())
    assert result.norm == pytest.approx(norm, rel=1e-5)

    # log-probabilities, two training steps of two mini-batches each by AdamW, and the weights after
    found = ranks.call("run", task, [data, data[::-1]], [r for g in data for r in g.rollouts], None, None)
    got_logp = joined(part for part, _, _ in found)
    for i, expected in enumerate(logp):
        # logits are sums of that size: 2e-6 for those of a real model
        np.testing.assert_allclose(got_logp[i], expected, rtol=0, atol=2e-6 * max(1, largest / 16))
    for got, expected in zip(found[0][1], stats, strict=True):
        for one, other in zip(got, expected, strict=True):
            assert one.norm == pytest.approx(other.grad_norm, rel=1e-5)
            assert sum(values[0] for values, _ in one.table) == pytest.approx(other.loss, rel=1e-5, abs=1e-6)
            assert one.lr == other.lr
    after = joined(part for _, _, part in found)
    for name, expected in weights.items():
        assert float((after[name] - expected).norm()) <= 1e-5 * float(expected.norm()), name


@pytest.mark.parametrize(
    ("model", "written", "others", "dtype"),
    [
        ("tied", "tp2 pp2", ["dp2", "pp2 dp2"], "float32"),
        ("tied", "pp2", ["tp2 sp", "dp2 whole optimizer"], "bfloat16"),
        ("untied", "dp2 overlapped", ["tp2 pp2"], "bfloat16"),
        ("untied", "dp2 whole optimizer", ["pp2 uneven"], "float32"),
        ("deep", "pp2 interleaved", ["tp2 dp2 overlapped"], "float32"),
    ],
)
def test_a_checkpoint_goes_from_layout_to_layout_without_losing_a_bit(
    start, truth, models, tmp_path, dtype, model, written, others
):
    """Saved under one layout, loaded and saved by others in turn, and resumed under the first one: the step that follows is the
    one that would have followed, so weights, masters and moments are what they were."""
    data = truth[model][0]

    def ask(layout, method, *arguments):
        settings = settings_of(data, LAYOUTS[layout], {"dtype": dtype})
        task = Task(settings, models[model], settings.train.optim, 10)
        return start(settings.train.megatron).call(method, task, *arguments)

    folders = [tmp_path / str(i) for i in range(len(others) + 1)]
    for folder in folders:
        folder.mkdir()
    saved = ask(written, "run", [data, data[::-1]], [], folders[0], None)
    for layout, load, save in zip(others, folders[:-1], folders[1:], strict=True):
        ask(layout, "move", load, save)
    back = ask(written, "run", [data[::-1]], [], None, folders[-1])
    assert back[0][1][0] == saved[0][1][1]
    whole, after = (joined(part for _, _, part in found) for found in (saved, back))
    assert after.keys() == whole.keys()
    for name, value in whole.items():
        assert torch.equal(after[name], value), name


def test_a_checkpoint_of_another_model_is_refused(start, models, tmp_path, truth):
    settings = settings_of(truth["tied"][0], PP)
    ranks = start(settings.train.megatron)
    task = Task(settings, models["tied"], settings.train.optim, 10)
    ranks.call("run", task, [truth["tied"][0]], [], tmp_path, None)
    for model in ("deep", "text"):
        other = Task(settings, models[model], settings.train.optim, 10)
        with pytest.raises(CheckpointError, match=r"does not fit this run \(.*resume with the model, model.freeze and"):
            ranks.call("move", other, tmp_path, tmp_path / model)


OPTIONS = {
    "kl": ({"loss": {"kl_coef": 0.3}}, {}),
    "entropy": ({"loss": {"entropy_coef": 0.05}}, {}),
    "truncated": ({"loss": {"tis_cap": 2.0}}, {}),
    "engine": ({"loss": {"proximal": "engine"}}, {}),
    "tower frozen": ({}, {"freeze": ["vision"]}),
    "embeddings frozen": ({}, {"freeze": ["vision", "embeddings"]}),
    "plain": ({"train": dict.fromkeys(SWITCHES, False)}, {}),
}


@pytest.mark.parametrize("layout", ["tp2 sp", "pp2"])
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_is_that_of_the_torch_back_end(start, models, groups, layout, option):
    model, (changes, part) = "tied", OPTIONS[option]
    near = [
        replace(g, rollouts=tuple(replace(r, logp=(r.sampled * -4.6).astype(np.float32)) for r in g.rollouts)) for g in groups
    ]
    steps = [near, near[::-1]]
    tree = settings_of(near, LAYOUTS[layout], {"dtype": "float32"} | part).model_dump(mode="json")
    for section, values in changes.items():
        tree[section] |= values
    settings = Config.model_validate(tree)
    alone = TorchTrainer(
        load_policy(settings.model.model_copy(update={"path": models[model]})), settings, settings.train.optim, 10
    )
    stats = [alone.update(step) for step in steps]
    expected = {n: p.detach() for n, p in alone.policy.model.named_parameters()}
    task = Task(settings, models[model], settings.train.optim, 10)
    found = start(settings.train.megatron).call("run", task, steps, [], None, None)
    for got, ours in zip(found[0][1], stats, strict=True):
        for one, other in zip(got, ours, strict=True):
            assert one.norm == pytest.approx(other.grad_norm, rel=1e-5)
            assert sum(values[0] for values, _ in one.table) == pytest.approx(other.loss, rel=1e-5, abs=1e-6)
    after = joined(part for _, _, part in found)
    for name, value in expected.items():
        assert float((after[name] - value).norm()) <= 1e-5 * float(value.norm()), name


def test_a_mini_batch_with_nothing_left_takes_the_step_of_an_unpruned_one(start, models, groups):
    blank = [replace(g, scores=tuple(score(0.0, 0.0) for _ in g.scores)) for g in groups]
    after = []
    for skip in (True, False):
        settings = settings_of(groups, PP, weight_decay=0.1)
        settings = settings.model_copy(update={"train": settings.train.model_copy(update={"skip_zero_advantage": skip})})
        task = Task(settings, models["untied"], settings.train.optim, 10)
        found = start(settings.train.megatron).call("run", task, [groups, blank, groups], [], None, None)
        assert [step.norm for step in found[0][1][1]] == [0.0, 0.0]
        after.append(joined(part for _, _, part in found))
    for name, value in after[0].items():
        assert float((value - after[1][name]).norm()) <= 1e-5 * float(value.norm()), name


def test_nan_stops_the_step_on_every_rank_and_the_ranks_go_on(start, models, groups):
    settings = settings_of(groups, TP, eps=1e-8, lr=1e30)  # the first step leaves nothing finite
    task = Task(settings, models["untied"], settings.train.optim, 10)
    ranks = start(settings.train.megatron)
    with pytest.raises(NonFiniteError, match=r"(loss|gradient norm) is (nan|inf).* the step was not applied"):
        ranks.call("run", task, [groups, groups], [], None, None)
    fine = settings_of(groups, TP)
    ranks.call("run", Task(fine, models["untied"], fine.train.optim, 10), [groups], [], None, None)


def test_the_runs_side_is_a_trainer_like_the_torch_one(truth, models, tmp_path):
    data, logp, _, stats, *_ = truth["untied"]
    settings = settings_of(data, PP)
    settings = settings.model_copy(update={"run": settings.run.model_copy(update={"dir": tmp_path})})
    model = AutoConfig.from_pretrained(models["untied"])
    trainer = MegatronTrainer(settings, settings.train.optim, 10, models["untied"], model)
    try:
        for got, expected in zip(trainer.logprobs([r for g in data for r in g.rollouts]), logp, strict=True):
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5)
        calls = iter([False, True])  # between the sending of the groups and the first optimizer step

        def check():
            if next(calls, True):
                raise Interrupted

        before = dict(trainer.weights())
        with pytest.raises(Interrupted):
            trainer.update(data * 20, check)  # 39 passes for old log-probabilities come before the first step
        assert trainer.num_updates == 0
        assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.weights())
        for one, other in zip(trainer.update(data), stats[0], strict=True):
            for field in ("loss", "loss_acc", "loss_tool", "grad_norm", "entropy", "engine_gap", "kl", "ratio_max", "clip_acc"):
                assert getattr(one, field) == pytest.approx(getattr(other, field), rel=1e-4, abs=1e-6), field
            assert (one.num_tokens, one.flops, one.avoided, one.n_acc) == (
                other.num_tokens,
                other.flops,
                other.avoided,
                other.n_acc,
            )
        assert trainer.num_updates == 2
    finally:
        trainer.close()


def test_a_step_that_was_half_taken_is_counted(models, groups, tmp_path):
    settings = settings_of(groups, PP, eps=1e-8, lr=1e30)  # the first mini-batch's step leaves nothing finite for the second
    settings = settings.model_copy(update={"run": settings.run.model_copy(update={"dir": tmp_path})})
    model = AutoConfig.from_pretrained(models["untied"])
    trainer = MegatronTrainer(settings, settings.train.optim, 10, models["untied"], model)
    try:
        with pytest.raises(NonFiniteError, match="in mini-batch 1"):
            trainer.update(groups)
        assert trainer.num_updates == 1
    finally:
        trainer.close()
