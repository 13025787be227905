"""A trainer's step: what moves, what does not, and what is left when it cannot be taken."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from trainer_cases import assert_close, assert_equal, config, gradients, longest, weights

from metis_fast.errors import CheckpointError, NonFiniteError
from metis_fast.train.torch_backend import TorchTrainer


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


@pytest.mark.parametrize("freezes", [([], ["vision"]), (["vision"], [])])
def test_the_state_of_a_trainer_that_froze_other_parts_is_refused(freezes, trained, load_tiny, groups):
    before, now = (config(model={"freeze": parts}) for parts in freezes)
    trainer = TorchTrainer(load_tiny(), now, now.train.optim, 10)
    with pytest.raises(CheckpointError, match=r"`model\.freeze`.* of the run that wrote it"):
        trainer.load(trained(groups, before).state())


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


@pytest.mark.parametrize("kept_gb", [2.0, 0.0])
def test_a_frozen_tower_runs_once_for_an_image_of_an_update(load_tiny, groups, kept_gb):
    settings = config(
        train={"tokens_per_micro_batch": longest(groups), "prompts_per_mini_batch": 1, "skip_old_logprobs": False},
        model={"freeze": ["vision"], "image_cache_gb": kept_gb},
    )
    policy = load_tiny()
    trainer = TorchTrainer(policy, settings, settings.train.optim, 10)
    frames: list[int] = []
    hook = policy.model.model.visual.register_forward_hook(lambda _, args, out: frames.append(len(args[0])))
    trainer.update(groups)
    run = [r for g in groups for r, score in zip(g.rollouts, g.scores, strict=True) if score.needs_gradient]
    distinct = {span.sha256: span.grid for rollout in run for span in rollout.image_spans}
    patches = sum(t * h * w for t, h, w in distinct.values())
    assert sum(frames) == patches if kept_gb else sum(frames) > patches
    once, frames[:] = sum(frames), []
    trainer.update(groups)  # nothing is kept for the next step: it may have been long ago
    assert sum(frames) == once
    hook.remove()


def test_the_gradient_of_the_rest_is_the_same_with_features_that_were_kept(trained, groups):
    train = {"tokens_per_micro_batch": longest(groups)}
    kept, anew = (trained(groups, config(train=train, model={"freeze": ["vision"], "image_cache_gb": gb})) for gb in (2.0, 0.0))
    assert_close(gradients(kept), gradients(anew))
