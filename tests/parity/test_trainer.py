"""The trainer: the gradient is a property of the scored mini-batch, and of nothing about how it is run."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from trainer_cases import ANSWER, SWITCHES, assert_close, assert_equal, config, gradients, longest, score, weights

from metis_fast.errors import DataError
from metis_fast.train.minibatch import plan
from metis_fast.train.torch_backend import TorchTrainer
from metis_fast.types import Outcome, Savings, Score, ScoredGroup


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("more_tokens", [0, 50, 300, 100_000])
def test_loss_and_gradients_do_not_depend_on_packs_and_shared_prompts(trained, groups, more_tokens, share):
    whole = config(train={"tokens_per_micro_batch": 100_000, "skip_zero_advantage": False, "share_prompt": False})
    cut = config(train={"tokens_per_micro_batch": longest(groups) + more_tokens, "share_prompt": share})
    expected, got = trained(groups, whole), trained(groups, cut)
    assert_close(gradients(got), gradients(expected), share=3e-6)


def test_stats_do_not_depend_on_packs_and_shared_prompts(load_tiny, groups):
    stats = []
    for tokens, share in ((longest(groups), False), (longest(groups) + 100, True), (100_000, True)):
        settings = config(train={"tokens_per_micro_batch": tokens, "skip_zero_advantage": False, "share_prompt": share})
        (one,) = TorchTrainer(load_tiny(), settings, settings.train.optim, 10).update(groups)
        stats.append(one)
    for field in ("loss", "loss_acc", "loss_tool", "grad_norm", "entropy", "engine_gap", "n_acc", "n_tool"):
        values = [getattr(one, field) for one in stats]
        np.testing.assert_allclose(values, values[0], rtol=3e-6, atol=1e-7, err_msg=field)
    every = sum(len(r.tokens) for g in groups for r in g.rollouts)
    assert [one.num_tokens + one.avoided.prompts.tokens for one in stats] == [every] * 3
    prompts = sum((len(g.rollouts) - 1) * g.rollouts[0].prompt_len for g in groups)
    shared = [one.avoided.prompts.tokens for one in stats]
    assert shared[0] == 0 < shared[1] <= shared[2] == prompts


def test_a_rollout_that_fits_into_no_pack_is_named_before_anything_runs(load_tiny, groups):
    settings = config(train={"tokens_per_micro_batch": longest(groups) - 1})
    trainer = TorchTrainer(load_tiny(), settings, settings.train.optim, 10)
    before = weights(trainer)
    with (
        no_pass(trainer),
        pytest.raises(DataError, match=rf"#\d has {longest(groups)} tokens, more than the {longest(groups) - 1} of a pack"),
    ):
        trainer.update(groups)
    assert_equal(weights(trainer), before)


@pytest.mark.parametrize("first", [0, 1])
def test_what_is_wrong_in_any_mini_batch_is_named_before_anything_runs(load_tiny, groups, first):
    settings = config(train={"prompts_per_mini_batch": 1})
    trainer = TorchTrainer(load_tiny(), settings, settings.train.optim, 10)
    rollout = groups[1].rollouts[2]
    span = rollout.image_spans[0]
    torn = replace(rollout, image_spans=(replace(span, grid=(1, span.grid[1] + 1, span.grid[2])), *rollout.image_spans[1:]))
    bad = replace(groups[1], rollouts=(*groups[1].rollouts[:2], torn))
    with no_pass(trainer), pytest.raises(DataError, match=r"^rollout b#2: the image at tokens \d+ to \d+ has a grid of"):
        trainer.update([bad, groups[0]] if first else [groups[0], bad])


@contextmanager
def no_pass(trainer):
    """Fails where the model is run."""

    def run(*_):
        pytest.fail("a forward pass")

    hooks = [part.register_forward_pre_hook(run) for part in trainer.policy.model.modules()]
    yield
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("on", [(name,) for name in SWITCHES] + [SWITCHES])
def test_every_saving_leaves_both_mini_batches_as_they_are(trained, groups, on):
    """Two mini-batches, the second one with old log-probabilities, against the step that saves nothing."""
    plain = {"prompts_per_mini_batch": 1} | dict.fromkeys(SWITCHES, False)
    expected = trained(groups, config(train=plain))
    got = trained(groups, config(train=plain | dict.fromkeys(on, True)))
    assert_close(moments(got), moments(expected), share=1e-5)


def test_every_parameter_has_the_gradient_of_the_plain_run_to_1e_5_of_its_own_norm(trained, groups):
    """No parameter is excused: text, tower, merger, deepstack, with images in prompts and from tools."""
    plain, ours = (
        gradients(trained(groups, config(train={"tokens_per_micro_batch": 100_000} | dict.fromkeys(SWITCHES, on))))
        for on in (False, True)
    )
    for part in ("language_model", "visual.blocks", "visual.merger", "visual.deepstack_merger_list", "embed_tokens"):
        assert any(part in name and value.norm() > 0 for name, value in plain.items()), part
    off = {name: float((ours[name] - value).norm() / value.norm()) for name, value in plain.items()}
    assert max(off.values()) <= 1e-5, max(off, key=lambda name: off[name])


def moments(trainer):
    """Linear in the gradients of all steps."""
    return {name: trainer.optimizer.adamw.state[m]["exp_avg"] for name, m in trainer.optimizer.masters.items()}


def test_in_bfloat16_savings_are_within_the_noise_of_two_plain_runs(load_tiny, trained, groups):
    """Two runs without savings, their rollouts in another order, and one with all, against float32 of the same weights."""
    exact = config()
    rounded = load_tiny("bfloat16")
    rounded.model.float()
    trainer = TorchTrainer(rounded, exact, exact.train.optim, 10)
    trainer.update(groups)
    truth = gradients(trainer)

    def noise(batch, on):
        settings = config(train=dict.fromkeys(SWITCHES, on), model={"dtype": "bfloat16"})
        found = gradients(trained(batch, settings))
        off = torch.stack([(found[name] - value).norm() for name, value in truth.items()]).norm()
        return float(off / torch.stack([value.norm() for value in truth.values()]).norm())

    turned = [ScoredGroup(g.prompt, g.rollouts[::-1], g.scores[::-1]) for g in reversed(groups)]
    plain = [noise(groups, False), noise(turned, False)]
    assert min(plain) > 1e-3 and max(plain) < 0.1  # bfloat16 it is
    assert noise(groups, True) < 1.1 * max(plain)


def test_stats_do_not_depend_on_what_is_saved(load_tiny, groups):
    made = []
    for on in (False, True):
        settings = config(train={"prompts_per_mini_batch": 1} | dict.fromkeys(SWITCHES, on), lr=3e-3)
        made.append(TorchTrainer(load_tiny(), settings, settings.train.optim, 10).update([*groups, *groups]))
    for plain, saved in zip(*made, strict=True):
        for field in ("loss", "loss_acc", "loss_tool", "grad_norm", "clip_acc", "clip_tool", "n_acc", "n_tool"):
            np.testing.assert_allclose(getattr(saved, field), getattr(plain, field), rtol=1e-4, atol=1e-6, err_msg=field)
        parts = [getattr(saved.avoided, one.name).flops for one in fields(Savings)]
        assert saved.flops + sum(parts) == pytest.approx(plain.flops) and plain.avoided == Savings()
        assert saved.flops < 0.7 * plain.flops


@pytest.mark.parametrize(
    ("loss", "named"),
    [
        ({"entropy_coef": 0.1}, "loss.entropy_coef"),
        ({"kl_coef": 0.1}, "loss.kl_coef"),
        ({"normalization": "reference"}, "loss.normalization=reference"),
    ],
)
def test_pruning_that_would_not_be_exact_is_off_and_says_so(load_tiny, groups, caplog, loss, named):
    settings = config(loss=loss)
    (stats,) = TorchTrainer(load_tiny(), settings, settings.train.optim, 10).update(groups)
    assert stats.avoided.rollouts.tokens == 0
    (record,) = caplog.records
    assert record.message == f"train.skip_zero_advantage is off in this run: {named} needs every rollout"


def test_loss_and_gradients_do_not_depend_on_the_order_of_rollouts(trained, groups):
    turned = [ScoredGroup(g.prompt, g.rollouts[::-1], g.scores[::-1]) for g in reversed(groups)]
    settings = config(train={"tokens_per_micro_batch": longest(groups) + 100})
    assert_close(gradients(trained(turned, settings)), gradients(trained(groups, settings)))


@pytest.mark.parametrize("impl", ["cpu", "reference"])
def test_every_implementation_of_attention_and_loss_gives_the_same_gradients(trained, groups, impl):
    expected = gradients(trained(groups, config()))
    assert_close(gradients(trained(groups, config(train={"attention": impl}))), expected, share=1e-5)
    assert_close(gradients(trained(groups, config(loss={"impl": impl}))), expected, share=1e-5)


def test_activation_checkpointing_changes_nothing(trained, groups):
    got = trained(groups, config(train={"activation_checkpointing": True}))
    assert_close(gradients(got), gradients(trained(groups, config())))


@pytest.mark.parametrize("freeze", [[], ["vision", "embeddings"]])
def test_skipping_what_has_no_advantage_changes_nothing(trained, groups, freeze):
    settings = [
        config(train={"skip_zero_advantage": skip}, model={"freeze": freeze}, weight_decay=0.1) for skip in (True, False)
    ]
    got, expected = (trained(groups, one) for one in settings)
    assert_close(gradients(got), gradients(expected))


@pytest.mark.parametrize("weights_of", [{"w_tool": 0.0}, {"w_acc": 0.0}])
def test_rollouts_whose_only_advantages_have_no_weight_are_not_run_either(trained, load_tiny, groups, weights_of):
    economy = replace(groups[0], scores=(score(0.0, 0.9), score(0.0, -0.4), score(0.5, 0.0)))
    runs = []
    for skip in (True, False):
        settings = config(loss=weights_of, train={"skip_zero_advantage": skip})
        trainer = TorchTrainer(load_tiny(), settings, settings.train.optim, 10)
        (stats,) = trainer.update([economy])
        runs.append((stats, gradients(trainer)))
    (stats, got), (plain, expected) = runs
    without = [
        r
        for r, s in zip(economy.rollouts, economy.scores, strict=True)
        if not (s.adv_acc if "w_tool" in weights_of else s.adv_tool)
    ]
    assert stats.avoided.rollouts.tokens == sum(len(r.tokens) for r in without) > 0
    assert (stats.loss, stats.n_acc, stats.n_tool) == (pytest.approx(plain.loss), plain.n_acc, plain.n_tool)
    assert_close(got, expected)


def test_ranks_are_balanced_over_what_is_left_after_pruning(load_tiny, groups, monkeypatch):
    """One group's rollouts have no advantage. Shares that were dealt out before would leave a rank with nothing."""
    settings = config(train={"tokens_per_micro_batch": longest(groups), "share_packs": False})
    trainer = TorchTrainer(load_tiny(), settings, settings.train.optim, 10)
    blank = replace(groups[1], scores=tuple(score(0.0, 0.0) for _ in groups[1].scores))
    alive = replace(groups[0], scores=tuple(score(0.5, 0.0) for _ in groups[0].scores))
    batch = plan([blank, alive], True, settings, True, trainer._trained)
    monkeypatch.setattr(trainer, "_group", object())
    monkeypatch.setattr(dist, "get_world_size", lambda _: 2)
    shares = []
    for rank in range(2):
        monkeypatch.setattr(dist, "get_rank", lambda _, rank=rank: rank)
        shares.append([s.rollout for one in trainer._passes(batch.packs) for s in one.pack.samples])
    assert all(shares) and {r.prompt_uid for share in shares for r in share} == {"a"}
    assert sorted(r.index for share in shares for r in share) == [0, 1, 2]


def test_a_mini_batch_without_any_gradient_is_still_a_step_and_the_same_one_unskipped(trained, groups):
    blank = [replace(g, scores=tuple(score(0.0, 0.0) for _ in g.scores)) for g in groups]
    runs = []
    for skip in (True, False):
        settings = config(train={"skip_zero_advantage": skip}, weight_decay=0.1)
        trainer = trained(groups, settings)
        before = weights(trainer)
        (stats,) = trainer.update(blank)
        assert stats.skipped_step is skip and stats.loss == 0 and stats.grad_norm == 0
        every = sum(len(r.tokens) for g in groups for r in g.rollouts)
        run, avoided = stats.num_tokens + stats.avoided.prompts.tokens, stats.avoided.rollouts.tokens
        assert (run, avoided) == ((0, every) if skip else (every, 0))
        assert trainer.optimizer.num_steps == 2
        assert any(not torch.equal(before[name], w) for name, w in weights(trainer).items())  # decay and momentum go on
        runs.append(trainer)
    assert_close(weights(runs[0]), weights(runs[1]))
    assert_close(gradients(runs[0]), gradients(runs[1]))


def test_rollouts_without_a_verdict_change_nothing(trained, groups, play, make_prompt):
    lost = play(make_prompt("Which city?", uid="a"), [ANSWER % "lost" * 3], index=3)
    none = Score(None, Outcome.JUDGE_ERROR)
    more = [replace(groups[0], rollouts=(*groups[0].rollouts, lost), scores=(*groups[0].scores, none)), groups[1]]
    for normalization in ("global", "reference"):
        settings = config(loss={"normalization": normalization}, train={"skip_zero_advantage": False})
        assert_equal(weights(trained(more, settings)), weights(trained(groups, settings)))


def test_denominators_count_every_token_with_a_verdict_and_the_tools_only_groups_with_signal(load_tiny, groups):
    scores = (score(0.7, 0.9), score(-1.1, 0.0, signal=True), score(0.0, 0.0))  # an advantage of 0 within a set with signal
    several = [replace(groups[0], scores=scores), groups[1]]
    settings = config()
    (stats,) = TorchTrainer(load_tiny(), settings, settings.train.optim, 10).update(several)
    assert stats.n_acc == sum(r.num_sampled for g in groups for r in g.rollouts)
    assert stats.n_tool == sum(r.num_sampled for r in (*groups[0].rollouts[:2], groups[1].rollouts[2]))
