"""The trainer: the gradient is a property of the scored mini-batch, and of nothing about how it is run.

Gradients are read from AdamW: with `grad_clip` out of reach, after one step `exp_avg` is (1 - beta1) * gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
import torch.distributed as dist

from metis_fast.config import Config
from metis_fast.errors import DataError, NonFiniteError
from metis_fast.train.minibatch import plan
from metis_fast.train.torch_backend import TorchTrainer
from metis_fast.types import Observation, Outcome, Savings, Score, ScoredGroup, Verdict

CALL = '<tool_call>{"name": "python", "arguments": {"code": "%s"}}</tool_call>'
ANSWER = "<reason>known</reason><answer>%s</answer><|im_end|>"


def config(loss=None, train=None, model=None, **optim) -> Config:
    """Two prompts a mini-batch, gradient clipping out of reach."""
    return Config.model_validate(
        {
            "loss": loss or {},
            "model": {"dtype": "float32"} | (model or {}),
            "rollout": {"prompts_per_step": 4, "rollouts_per_prompt": 3, "max_prompt_tokens": 1, "max_response_tokens": 1},
            "train": {"prompts_per_mini_batch": 2}
            | (train or {})
            | {"optim": {"lr": 1e-3, "grad_clip": 1e9, "weight_decay": 0.0} | optim},
        }
    )


def score(adv_acc, adv_tool, signal=None):
    signal = adv_tool != 0 if signal is None else signal
    return Score(
        Verdict(True, True, "Paris"),
        Outcome.ANSWERED,
        adv_acc=adv_acc,
        adv_tool=adv_tool,
        in_tool_denominator=signal,
        needs_gradient=bool(adv_acc or adv_tool),
    )


@pytest.fixture(scope="module")
def groups(play, make_prompt, picture) -> list[ScoredGroup]:
    """Two groups of odd lengths: text and images, in prompts and observations, advantages of all signs, one rollout without
    any, one without a verdict."""
    one, two = (
        make_prompt("Which city?", uid="a"),
        make_prompt("<image> or <image>?", [picture(0), picture(1, 96, 32)], uid="b"),
    )
    shown = [Observation("see <image>", (picture(2),)), Observation("nothing")]
    rollouts_of_one = (
        play(one, [ANSWER % "Paris"], index=0),
        play(one, [CALL % "1", "hm " + CALL % "2 + 2", ANSWER % "Lyon"], shown, index=1),
        play(one, [ANSWER % ("no " * 9)], index=2),
    )
    rollouts_of_two = (
        play(two, [CALL % "x", ANSWER % "first"], shown, index=0),
        play(two, [ANSWER % "second"], index=1),
        play(two, ["I look. " + CALL % "y", ANSWER % "both"], index=2),
    )
    return [
        ScoredGroup(one, rollouts_of_one, (score(0.7, 0.9), score(-1.1, -0.4), score(0.0, 0.0))),
        ScoredGroup(two, rollouts_of_two, (score(0.0, 0.0), score(0.5, 0.0), score(1.3, -0.6))),
    ]


@pytest.fixture
def trained(load_tiny):
    """A trainer after one `update` of a fresh policy."""

    def run(groups: Sequence[ScoredGroup], settings: Config, steps: int = 1) -> TorchTrainer:
        trainer = TorchTrainer(load_tiny(settings.model.dtype), settings, settings.train.optim, 10)
        for _ in range(steps):
            trainer.update(groups)
        return trainer

    return run


def gradients(trainer):
    """Exact gradient of the first step by parameter name."""
    beta1 = trainer.optimizer.adamw.param_groups[0]["betas"][0]
    state = trainer.optimizer.adamw.state
    return {name: state[master]["exp_avg"] / (1 - beta1) for name, master in trainer.optimizer.masters.items()}


def weights(trainer):
    return {name: p.detach().clone() for name, p in trainer.policy.model.named_parameters()}


def assert_close(got, expected, share=1e-6):
    """Every tensor within `share` of its norm; one that is nothing but rounding, within `share` of the largest norm."""
    assert got.keys() == expected.keys()
    largest = max(float(value.norm()) for value in expected.values())
    for name, value in expected.items():
        difference = float((got[name] - value).norm())
        assert difference <= share * max(float(value.norm()), 1e-3 * largest), name


def assert_equal(got, expected):
    assert got.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(got[name], expected[name])] == []


# -- one gradient, however it is run --------------------------------------------------------------------------------------


def longest(groups):
    """Tokens of the longest rollout: the smallest pack that there can be."""
    return max(len(r.tokens) for g in groups for r in g.rollouts)


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


SWITCHES = ("share_packs", "share_prompt", "share_images", "skip_zero_advantage", "skip_head_rows", "skip_old_logprobs")


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


def test_with_the_engine_as_proximal_policy_the_ratio_is_to_its_log_probabilities_and_no_pass_is_owed(load_tiny, groups):
    settings = config(loss={"proximal": "engine"}, train={"prompts_per_mini_batch": 1, "skip_head_rows": False})
    trainer = TorchTrainer(load_tiny(), settings, settings.train.optim, 10)
    rng = np.random.default_rng(0)
    moved = []
    for g in groups:
        logp = trainer.logprobs(g.rollouts)
        noisy = [np.minimum(v + rng.normal(0, 0.3, len(v)), 0) * r.sampled for v, r in zip(logp, g.rollouts, strict=True)]
        rollouts = tuple(replace(r, logp=m.astype(np.float32)) for r, m in zip(g.rollouts, noisy, strict=True))
        moved.append(replace(g, rollouts=rollouts))
    run = [(r, s) for r, s in zip(moved[0].rollouts, moved[0].scores, strict=True) if s.needs_gradient]
    new = trainer.logprobs([r for r, _ in run])
    ratio = np.concatenate([np.exp(v - r.logp)[r.sampled] for v, (r, _) in zip(new, run, strict=True)]).astype(np.float64)
    first, second = trainer.update(moved)
    assert first.kl == pytest.approx(-np.log(ratio).mean(), rel=1e-4)
    assert (first.ratio_max, first.ratio_min) == pytest.approx((ratio.max(), ratio.min()), rel=1e-4)
    assert first.clip_acc > 0.1 and first.engine_gap == 0.0
    for one in (first, second):
        assert one.avoided.old_logprobs.tokens > 0


def test_with_the_engine_as_proximal_policy_the_importance_weight_is_truncated(load_tiny, groups):
    """To its log-probabilities: 1 + eps_high where the advantage is positive, the dual clip where it is negative."""
    settings = config(loss={"proximal": "engine", "dual_clip": 1.5})
    trainer = TorchTrainer(load_tiny(), settings, settings.train.optim, 10)
    rng = np.random.default_rng(1)
    moved = []
    for g in groups:
        noisy = [np.minimum(v + rng.normal(0, 0.5, len(v)), 0) for v in trainer.logprobs(g.rollouts)]
        rollouts = tuple(replace(r, logp=(n * r.sampled).astype(np.float32)) for r, n in zip(g.rollouts, noisy, strict=True))
        moved.append(replace(g, rollouts=rollouts))
    rows = [(r, s) for g in moved for r, s in zip(g.rollouts, g.scores, strict=True)]
    n_acc = sum(r.num_sampled for r, _ in rows)
    n_tool = sum(r.num_sampled for r, s in rows if s.in_tool_denominator)
    policy = load_tiny()
    policy.model.double()
    total, truncated = torch.zeros((), dtype=torch.float64), 0
    for rollout, one in rows:
        where = torch.from_numpy(np.flatnonzero(rollout.sampled))
        tokens = torch.from_numpy(rollout.tokens.astype(np.int64))
        logp = forward(policy, rollout).log_softmax(-1)[where - 1, tokens[where]]
        ratio = (logp - torch.from_numpy(rollout.logp).double()[where]).exp()
        for weight, advantage in ((1 / n_acc, one.adv_acc), (0.15 / n_tool, one.adv_tool)):
            bounded = ratio.clamp(max=1.2) if advantage > 0 else ratio.clamp(0.8, 1.5)
            total = total - weight * (advantage * bounded).sum()
            truncated += int((bounded < ratio).sum()) if advantage else 0
    assert truncated > 20
    (stats,) = trainer.update(moved)
    assert stats.loss == pytest.approx(float(total.detach()), rel=1e-5, abs=3e-7)
    named = dict(policy.model.named_parameters())
    expected = dict(zip(named, torch.autograd.grad(total, list(named.values())), strict=True))
    assert_close({name: g.double() for name, g in gradients(trainer).items()}, expected, share=5e-5)


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


# -- what moves, and what does not ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("freeze", [["vision"], ["embeddings"], ["vision", "embeddings"], []])
def test_frozen_parts_do_not_move_and_everything_else_does(trained, load_tiny, groups, freeze):
    before = {name: p.detach() for name, p in load_tiny().model.named_parameters()}
    after = weights(trained(groups, config(model={"freeze": freeze})))
    still = {name for name in before if torch.equal(before[name], after[name])}
    expected = set()
    for name in before:
        if ("vision" in freeze and ".visual." in name) or ("embeddings" in freeze and "embed_tokens" in name):
            expected.add(name)
    assert still == expected


def test_freezing_a_part_leaves_the_gradients_of_the_others(trained, groups):
    every = gradients(trained(groups, config()))
    some = gradients(trained(groups, config(model={"freeze": ["vision"]})))
    assert_close(some, {name: every[name] for name in some}, share=1e-6)


def test_old_log_probabilities_are_those_before_the_first_step(load_tiny, groups):
    """The second mini-batch holds the first one's groups again; its ratio is new policy over the one before both steps."""
    settings = config(train={"skip_zero_advantage": False, "skip_head_rows": False}, lr=3e-3)
    trainer = TorchTrainer(load_tiny(), settings, settings.train.optim, 10)
    rollouts = [r for g in groups for r in g.rollouts]
    old = trainer.logprobs(rollouts)
    first = TorchTrainer(load_tiny(), settings, settings.train.optim, 10)
    first.update(groups)
    new = first.logprobs(rollouts)
    stats = trainer.update([*groups, *groups])
    difference = np.concatenate([(n - o)[r.sampled] for n, o, r in zip(new, old, rollouts, strict=True)]).astype(np.float64)
    assert (stats[0].kl, stats[0].ratio_max, stats[0].ratio_min) == (0.0, 1.0, 1.0)
    assert stats[1].kl == pytest.approx(-difference.mean(), rel=1e-4)
    assert stats[1].ratio_max == pytest.approx(np.exp(difference.max()), rel=1e-4)
    assert stats[1].ratio_min == pytest.approx(np.exp(difference.min()), rel=1e-4)
    assert stats[1].ratio_max > 1.25 and stats[1].clip_acc > 0.05  # the step was large enough for this to mean something


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nan_weights_stop_the_step_and_leave_everything_else_untouched(load_tiny, groups, dtype):
    settings = config(model={"dtype": dtype}, weight_decay=0.1)
    trainer = TorchTrainer(load_tiny(dtype), settings, settings.train.optim, 10)
    trainer.update(groups)
    with torch.no_grad():
        broken = trainer.policy.decoder.get_parameter("layers.1.mlp.up_proj.weight")
        broken[3, 5] = torch.nan
    before, state = weights(trainer), {n: v.clone() for n, v in gradients(trainer).items()}
    with pytest.raises(NonFiniteError, match=r"mini-batch 0 .*a#1.*not applied"):
        trainer.update(groups)
    after = weights(trainer)
    assert all(torch.equal(before[n].nan_to_num(7.0), w.nan_to_num(7.0)) for n, w in after.items())
    assert_equal(gradients(trainer), state)
    assert trainer.optimizer.num_steps == 1
    with torch.no_grad():
        broken[3, 5] = 0.0
    (stats,) = trainer.update(groups)  # nothing of the failed step is left in the gradients
    clean = TorchTrainer(load_tiny(dtype), settings, settings.train.optim, 10)
    clean.update(groups)
    with torch.no_grad():
        clean.policy.decoder.get_parameter("layers.1.mlp.up_proj.weight")[3, 5] = 0.0
    (expected,) = clean.update(groups)
    assert stats == expected


def test_an_infinite_gradient_of_a_finite_loss_stops_the_step(load_tiny, groups):
    settings = config()
    trainer = TorchTrainer(load_tiny(), settings, settings.train.optim, 10)
    before = weights(trainer)
    huge = [replace(g, scores=tuple(replace(s, adv_acc=s.adv_acc * 1e38) for s in g.scores)) for g in groups]
    with pytest.raises(NonFiniteError, match="not applied"):
        trainer.update(huge)
    assert_equal(weights(trainer), before)
    assert trainer.optimizer.num_steps == 0


def test_a_signal_before_the_first_step_leaves_weights_and_state(load_tiny, groups):
    settings = config(train={"tokens_per_micro_batch": longest(groups)})
    trainer = TorchTrainer(load_tiny(), settings, settings.train.optim, 10)
    before, calls = weights(trainer), []

    def check():
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        trainer.update([*groups, *groups], check)
    assert_equal(weights(trainer), before)
    trainer.update(groups)
    clean = TorchTrainer(load_tiny(), settings, settings.train.optim, 10)
    clean.update(groups)
    assert_equal(weights(trainer), weights(clean))


# -- the loss it computes -------------------------------------------------------------------------------------------------


def derived_gradient(load_tiny, groups, settings, reference=None, dtype=torch.float64):
    """Gradient of section 4: autograd through transformers' model, in float64, the loss written out over whole logits."""
    policy = load_tiny()
    policy.model.to(dtype)
    trainer = TorchTrainer(policy, settings, settings.train.optim, 10)  # for its attention and packing only
    loss_config = settings.loss
    rows = [(r, s) for g in groups for r, s in zip(g.rollouts, g.scores, strict=True) if s.verdict is not None]
    n_acc = sum(r.num_sampled for r, _ in rows)
    n_tool = sum(r.num_sampled for r, s in rows if s.in_tool_denominator)
    total = torch.zeros((), dtype=dtype)
    for i, (rollout, one) in enumerate(rows):
        logits = forward(policy, rollout) / settings.rollout.temperature
        all_logp = logits.log_softmax(-1)
        where = torch.from_numpy(np.flatnonzero(rollout.sampled))
        targets = torch.from_numpy(rollout.tokens[rollout.sampled].astype(np.int64))
        rows_logp = all_logp[where - 1]
        logp = rows_logp.gather(1, targets[:, None])[:, 0]
        ratio = (logp - logp.detach()).exp()  # first mini-batch: the proximal policy is the current one
        weight = torch.ones_like(logp)
        if loss_config.tis_cap:
            engine = torch.from_numpy(rollout.logp[rollout.sampled]).to(dtype)
            weight = (logp.detach() - engine).exp().clamp(max=loss_config.tis_cap)
        total = total - loss_config.w_acc * (weight * one.adv_acc * ratio).sum() / n_acc
        total = total - loss_config.w_tool * (weight * one.adv_tool * ratio).sum() / max(1, n_tool)
        total = total + loss_config.entropy_coef * (rows_logp.exp() * rows_logp).sum() / n_acc
        if reference is not None:
            d = torch.from_numpy(reference[i][rollout.sampled]).to(dtype) - logp
            total = total + loss_config.kl_coef * (d.exp() - d - 1).sum() / n_acc
    named = trainer.optimizer.parameters
    return dict(zip(named, torch.autograd.grad(total, list(named.values())), strict=True)), float(total.detach())


def forward(policy, rollout):
    """Logits of one rollout by transformers' own forward pass, images and positions included."""
    patches = [policy.images(next(i for i in rollout.images if i.sha256 == s.sha256)) for s in rollout.image_spans]
    tokens = torch.from_numpy(rollout.tokens.astype(np.int64))[None]
    images = {}
    if patches:
        images = {
            "pixel_values": torch.cat([p.pixels for p in patches]).to(policy.head.dtype),
            "image_grid_thw": torch.tensor([p.grid for p in patches]),
            "mm_token_type_ids": (tokens == policy.image_token_id).int(),
        }
    return policy.model(input_ids=tokens, **images).logits[0]


OPTIONS = [
    {},
    {"w_tool": 0.0},
    {"entropy_coef": 0.05},
    {"tis_cap": 2.0},
    {"entropy_coef": 0.02, "tis_cap": 1.5, "w_tool": 0.4},
]


@pytest.mark.parametrize("loss", OPTIONS)
def test_every_gradient_equals_the_float64_derivation(load_tiny, trained, groups, loss):
    # engine log-probs near the trainer's, so that the truncated weight has values on both sides of its cap
    settings = config(loss=loss)
    trainer = TorchTrainer(load_tiny(), settings, settings.train.optim, 10)
    near = []
    for g in groups:
        noise = np.random.default_rng(0)
        logp = trainer.logprobs(g.rollouts)
        moved = [np.minimum(v + noise.normal(0, 0.7, len(v)), 0) * r.sampled for v, r in zip(logp, g.rollouts, strict=True)]
        rollouts = tuple(replace(r, logp=m.astype(np.float32)) for r, m in zip(g.rollouts, moved, strict=True))
        near.append(replace(g, rollouts=rollouts))
    expected, value = derived_gradient(load_tiny, near, settings)
    (stats,) = trainer.update(near)
    # terms of size 0.1 that nearly cancel, from float32 log-probabilities
    assert stats.loss == pytest.approx(value, rel=1e-5, abs=3e-7)
    got = {name: g.double() for name, g in gradients(trainer).items()}
    assert_close(got, expected, share=5e-5)
    if loss:
        plain = gradients(trained(near, config()))
        assert any((plain[n].double() - g).abs().max() > 1e-3 * g.abs().max() for n, g in expected.items())


def test_kl_to_the_starting_policy_adds_its_gradient(load_tiny, groups):
    settings = config(loss={"kl_coef": 0.3}, lr=3e-3)
    trainer = TorchTrainer(load_tiny(), settings, settings.train.optim, 10)
    rollouts = [r for g in groups for r in g.rollouts]
    start = trainer.logprobs(rollouts)
    trainer.update(groups)
    moved = {name: p.detach().clone() for name, p in trainer.policy.model.named_parameters()}

    def load_moved():
        policy = load_tiny()
        with torch.no_grad():
            for name, parameter in policy.model.named_parameters():
                parameter.copy_(moved[name])
        return policy

    expected, _ = derived_gradient(load_moved, groups, settings, start)
    before = {n: s["exp_avg"].clone() for n, s in _states(trainer)}
    trainer.update(groups)
    got = {n: ((s["exp_avg"] - 0.9 * before[n]) / 0.1).double() for n, s in _states(trainer)}
    assert_close(got, expected, share=2e-4)


def _states(trainer):
    return [(name, trainer.optimizer.adamw.state[master]) for name, master in trainer.optimizer.masters.items()]


def test_the_sampling_temperature_is_in_the_gradient(load_tiny, groups):
    settings = config().model_copy(update={"rollout": config().rollout.model_copy(update={"temperature": 0.7})})
    expected, value = derived_gradient(load_tiny, groups, settings)
    trainer = TorchTrainer(load_tiny(), settings, settings.train.optim, 10)
    (stats,) = trainer.update(groups)
    assert stats.loss == pytest.approx(value, rel=1e-5, abs=1e-7)
    assert_close({n: g.double() for n, g in gradients(trainer).items()}, expected, share=5e-5)


def test_imitation_is_the_mean_negative_log_likelihood_of_the_sampled_tokens(load_tiny, groups):
    settings = config()
    trainer = TorchTrainer(load_tiny(), settings, settings.train.optim, 10)
    rollouts = [r for g in groups for r in g.rollouts]
    logp = np.concatenate([v[r.sampled] for v, r in zip(trainer.logprobs(rollouts), rollouts, strict=True)])
    loss, _ = trainer.imitate(rollouts)
    assert loss == pytest.approx(-logp.astype(np.float64).mean(), rel=1e-5)
    later = [trainer.imitate(rollouts)[0] for _ in range(20)]
    assert later[-1] < 0.5 * loss


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_gpu_takes_the_step_that_a_cpu_takes(load_tiny, trained, groups):
    settings = config()
    expected = trained(groups, settings)
    policy = load_tiny()
    policy.model.to("cuda")
    trainer = TorchTrainer(policy, settings, settings.train.optim, 10)
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    before = TorchTrainer(load_tiny(), settings, settings.train.optim, 10).logprobs(rollouts)
    for got, want in zip(trainer.logprobs(rollouts), before, strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=2e-5)
    trainer.update(groups)
    assert_close({name: value.cpu() for name, value in gradients(trainer).items()}, gradients(expected), share=1e-5)
