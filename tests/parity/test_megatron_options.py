"""The Megatron back end: every option of an update, and checkpoints, from layout to layout. Real ranks over gloo."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from megatron_cases import LAYOUTS, PP, TP, joined, settings_of
from trainer_cases import SWITCHES, score

from metis_fast.config import Config
from metis_fast.errors import CheckpointError, NonFiniteError
from metis_fast.model import load_policy
from metis_fast.train.megatron.task import Task
from metis_fast.train.torch_backend import TorchTrainer


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
    start, groups, models, tmp_path, dtype, model, written, others
):
    """Saved under one layout, loaded and saved by others in turn, and resumed under the first one: the step that follows is the
    one that would have followed, so weights, masters and moments are what they were."""

    def ask(layout, method, *arguments):
        settings = settings_of(groups, LAYOUTS[layout], {"dtype": dtype})
        task = Task(settings, models(model), settings.train.optim, 10)
        return start(settings.train.megatron).call(method, task, *arguments)

    folders = [tmp_path / str(i) for i in range(len(others) + 1)]
    for folder in folders:
        folder.mkdir()
    saved = ask(written, "run", [groups, groups[::-1]], [], folders[0], None)
    for layout, load, save in zip(others, folders[:-1], folders[1:], strict=True):
        ask(layout, "move", load, save)
    back = ask(written, "run", [groups[::-1]], [], None, folders[-1])
    assert back[0][1][0] == saved[0][1][1]
    whole, after = (joined(part for _, _, part in found) for found in (saved, back))
    assert after.keys() == whole.keys()
    for name, value in whole.items():
        assert torch.equal(after[name], value), name


def test_a_checkpoint_of_another_model_is_refused(start, models, groups, tmp_path):
    settings = settings_of(groups, PP)
    ranks = start(settings.train.megatron)
    task = Task(settings, models("tied"), settings.train.optim, 10)
    ranks.call("run", task, [groups], [], tmp_path, None)
    for model in ("deep", "text"):
        other = Task(settings, models(model), settings.train.optim, 10)
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
        load_policy(settings.model.model_copy(update={"path": models(model)})), settings, settings.train.optim, 10
    )
    stats = [alone.update(step) for step in steps]
    expected = {n: p.detach() for n, p in alone.policy.model.named_parameters()}
    task = Task(settings, models(model), settings.train.optim, 10)
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
        task = Task(settings, models("untied"), settings.train.optim, 10)
        found = start(settings.train.megatron).call("run", task, [groups, blank, groups], [], None, None)
        assert [step.norm for step in found[0][1][1]] == [0.0, 0.0]
        after.append(joined(part for _, _, part in found))
    for name, value in after[0].items():
        assert float((value - after[1][name]).norm()) <= 1e-5 * float(value.norm()), name


def test_nan_stops_the_step_on_every_rank_and_the_ranks_go_on(start, models, groups):
    settings = settings_of(groups, TP, eps=1e-8, lr=1e30)  # the first step leaves nothing finite
    task = Task(settings, models("untied"), settings.train.optim, 10)
    ranks = start(settings.train.megatron)
    with pytest.raises(NonFiniteError, match=r"(loss|gradient norm) is (nan|inf).* the step was not applied"):
        ranks.call("run", task, [groups, groups], [], None, None)
    fine = settings_of(groups, TP)
    ranks.call("run", Task(fine, models("untied"), fine.train.optim, 10), [groups], [], None, None)
