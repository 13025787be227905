"""The Megatron back end on two ranks: every layout, and every option of an update, against transformers and the torch back end.

Real ranks over gloo, in float32, started once for all tests of a file, since that is what takes long.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from megatron_cases import LAYOUTS, PP, TP, assert_layout_computes_what_one_process_does, cases, joined, settings_of
from trainer_cases import SWITCHES, score

from metis_fast.config import Config
from metis_fast.errors import NonFiniteError
from metis_fast.model import load_policy
from metis_fast.train.megatron.task import Task
from metis_fast.train.torch_backend import TorchTrainer

CASES = cases(2)


@pytest.mark.parametrize(("layout", "model"), CASES)
def test_a_layout_computes_what_one_process_does(start, truth, models, layout, model):
    assert_layout_computes_what_one_process_does(start, truth, models, layout, model)


OPTIONS = {
    "kl": ({"loss": {"kl_coef": 0.3}}, {}),
    "entropy": ({"loss": {"entropy_coef": 0.05}}, {}),
    "truncated": ({"loss": {"tis_cap": 2.0}}, {}),
    "engine": ({"loss": {"proximal": "engine"}}, {}),
    "tower frozen": ({}, {"freeze": ["vision"]}),
    "embeddings frozen": ({}, {"freeze": ["vision", "embeddings"]}),
    "plain": ({"train": dict.fromkeys(SWITCHES, False)}, {}),
}


QUICK = {
    **dict.fromkeys(("kl", "entropy", "tower frozen"), "tp2 sp"),
    **dict.fromkeys(("truncated", "engine", "embeddings frozen", "plain"), "pp2"),
}
"""Of each option the layout that is not slow."""


@pytest.mark.parametrize(
    ("option", "layout"),
    [
        pytest.param(option, layout, marks=() if QUICK[option] == layout else pytest.mark.slow)
        for option in OPTIONS
        for layout in ("tp2 sp", "pp2")
    ],
)
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
