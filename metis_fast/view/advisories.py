"""What is sick in a run: pure functions over its metrics. Each says from which step on, why it matters, and what to try.

Tuning advice (an engine that waits) is given only where nothing is sick: a fast sick run is no better.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import Any

from metis_fast.report.slices import KINDS, abilities_in, has_rates
from metis_fast.types import StepStats

_RECENT = 5  # steps that a state has to last before it is said
_LONG = 10
_FEW = 0.02  # share of groups with signal below which a channel has next to nothing
_GIVEN_UP = 0.5  # of the first rate
_GAP_GROWTH, _GAP_LEAST = 3.0, 0.01  # nats; below the least a gap is rounding, whatever it grew from
_FAILED = 0.05  # share of rollouts
_IDLE = 0.5  # share of a step's time
_LEAST = 8  # rollouts of a slice in a step


@dataclass(frozen=True, slots=True)
class Advisory:
    """One finding. step: from which on. sick: it spoils what is learnt; otherwise it costs time only."""

    name: str
    title: str
    step: int
    why: str
    attempt: str
    sick: bool = True


def _since(holds: Sequence[bool], steps: Sequence[StepStats], least: int) -> int | None:
    """The step from which on something holds up to now, if that is at least `least` steps."""
    length = 0
    for held in reversed(holds):
        if not held:
            break
        length += 1
    return steps[len(steps) - length].step if length >= least else None


def no_tool_signal(steps: Sequence[StepStats], config: Mapping[str, Any]) -> Advisory | None:
    """The tool channel, which HDPO alone has, has a weight and nothing to learn from."""
    if config.get("loss.w_tool", 0.15) == 0 or config.get("score.estimator", "hdpo") != "hdpo":
        return None
    since = _since([stats.signal_share <= _FEW for stats in steps], steps, _RECENT)
    if since is None:
        return None
    share = fmean(stats.signal_share for stats in steps[-_RECENT:])
    return Advisory(
        "no_tool_signal",
        f"No signal in the tool channel ({share:.1%} of groups)",
        since,
        "That channel learns only from groups with two right rollouts that differ in their number of calls. Without them "
        "the run is GRPO.",
        "Look at groups with several right rollouts: if all call a tool equally often, raise the sampling temperature or start "
        "from a model that is less sure of its habit; if few are right, wait, or give easier prompts.",
    )


def no_accuracy_signal(steps: Sequence[StepStats], acc_share: Mapping[int, float]) -> Advisory | None:
    """All rollouts of a group get the same accuracy reward. acc_share: step -> share of rollouts that the channel moves, of the
    steps whose rollouts are stored."""
    own = [stats for stats in steps if stats.step in acc_share]
    since = _since([acc_share[stats.step] <= _FEW for stats in own], own, _RECENT)
    if since is None:
        return None
    return Advisory(
        "no_accuracy_signal",
        "No signal in the accuracy channel",
        since,
        "Where all rollouts of a group are right, or all wrong, their advantage is 0 and nothing is learnt of the answer.",
        "Compare accuracy by kind: at 100 % the prompts are too easy, at 0 % too hard or the judge does not accept the "
        "form. Read some wrong rollouts before changing a setting.",
    )


def tools_given_up(steps: Sequence[StepStats]) -> Advisory | None:
    """Prompts that need a tool are answered without one."""
    own = [stats for stats in steps if "tool_needed" in stats.slices and has_rates(stats.slices["tool_needed"])]
    rates = [stats.slices["tool_needed"] for stats in own]
    if len(rates) < 2 * _RECENT:
        return None
    first = fmean(rate.tool_rate for rate in rates[:_RECENT])
    since = _since([rate.tool_rate < _GIVEN_UP * first for rate in rates], own, _RECENT)
    if since is None or first < 0.1:
        return None
    return Advisory(
        "tools_given_up",
        f"Tools are given up where they are needed ({first:.0%} to {rates[-1].tool_rate:.0%})",
        since,
        "Economy is to be learnt among right answers only. If prompts of the kind tool_needed lose their calls, their accuracy "
        "goes next.",
        "Look at the accuracy of tool_needed, and at the observations: a tool that fails teaches not to call it. If the tools "
        "work, lower loss.w_tool, the price of a call, counted in errors.",
    )


def gap_growing(steps: Sequence[StepStats]) -> Advisory | None:
    """Trainer and engine no longer compute the same."""
    own = [stats for stats in steps if any(not update.skipped_step for update in stats.updates)]
    gaps = [max(update.engine_gap for update in stats.updates if not update.skipped_step) for stats in own]
    if len(gaps) < 2 * _RECENT:
        return None
    first = median(gaps[:_RECENT])
    since = _since([gap > max(_GAP_GROWTH * first, _GAP_LEAST) for gap in gaps], own, _RECENT)
    if since is None:
        return None
    return Advisory(
        "gap_growing",
        f"The engine gap has grown ({first:.2g} to {median(gaps[-_RECENT:]):.2g} nats)",
        since,
        "The engine's log-probs leave the trainer's: either weights do not arrive whole, or the two round differently. "
        "Rollouts are then of another policy than the one that is trained.",
        "Look at sync/retries and staleness first. If weights arrive, compare number formats (model.dtype), or correct "
        "with loss.tis_cap.",
    )


def judge_failing(steps: Sequence[StepStats]) -> Advisory | None:
    """Verdicts are missing."""
    since = _since([stats.judge_failed_rate > _FAILED for stats in steps], steps, 2)
    if since is None:
        return None
    return Advisory(
        "judge_failing",
        f"A judge fails ({steps[-1].judge_failed_rate:.0%} of rollouts have no verdict)",
        since,
        "Rollouts without a verdict leave their group. If they fail for a reason that has to do with their answers, what is "
        "left is a biased sample.",
        "Filter for the outcome judge_error and read the reasons; metis-fast judge check tries the judge alone, and "
        "metis-fast judge rescore judges stored rollouts again.",
    )


def infrastructure_failing(steps: Sequence[StepStats]) -> Advisory | None:
    """Rollouts are broken off by our machinery."""
    since = _since([stats.infra_failed_rate > _FAILED for stats in steps], steps, 2)
    if since is None:
        return None
    return Advisory(
        "infrastructure_failing",
        f"Rollouts are broken off ({steps[-1].infra_failed_rate:.0%}) by failures that are not the agent's",
        since,
        "They leave their groups, which get small; where long rollouts break more often, the agent learns to be short.",
        "Filter for the outcome infrastructure_error and read the errors; look at the workers' logs in the run folder.",
    )


def never_varies(steps: Sequence[StepStats]) -> list[Advisory]:
    """A kind of prompt whose rollouts have all been alike for long."""
    recent = steps[-_LONG:]
    if len(recent) < _LONG:
        return []
    names = [name for name in (*KINDS, *abilities_in(recent[-1].slices)) if all(name in stats.slices for stats in recent)]
    found = []
    for name in names:
        own = [stats.slices[name] for stats in recent]
        if any(one.num - one.num_no_verdict < _LEAST for one in own):
            continue
        alike = all(one.accuracy in (0.0, 1.0) and one.tool_rate in (0.0, 1.0) and one.tool_calls.is_integer() for one in own)
        if not alike or len({(one.accuracy, one.tool_calls) for one in own}) > 1:
            continue
        last = own[-1]
        found.append(
            Advisory(
                "never_varies",
                f"Groups of {name} never vary (accuracy {last.accuracy:.0%}, tool rate {last.tool_rate:.0%})",
                recent[0].step,
                "Groups whose rollouts are all alike have no advantage: their rollouts cost time and teach nothing.",
                "Leave such prompts out for now, or mix in harder (or easier) ones of that kind.",
                sick=last.accuracy == 0.0,  # all right, and all with as few calls, is what was to be learnt
            )
        )
    return found


def not_finite(steps: Sequence[StepStats]) -> Advisory | None:
    """A number of an update that is none."""
    for stats in steps:
        for update in stats.updates:
            if not all(map(math.isfinite, (update.loss, update.grad_norm, update.engine_gap))):
                return Advisory(
                    "not_finite",
                    "Loss, gradient norm or engine gap is not a finite number",
                    stats.step,
                    "Weights may be lost from this step on.",
                    "Go back to the checkpoint before it, and look at the ratio extremes and the learning rate.",
                )
    return None


def engine_idle(steps: Sequence[StepStats], config: Mapping[str, Any]) -> Advisory | None:
    """Engines wait for the update."""
    if config.get("rollout.mode", "sync") != "sync":
        return None
    shares = []
    for stats in steps:
        total = sum(stats.seconds.values())
        shares.append(1 - stats.seconds.get("rollout", 0.0) / total if total > 0 else 0.0)
    since = _since([share > _IDLE for share in shares], steps, _RECENT)
    if since is None:
        return None
    return Advisory(
        "engine_idle",
        f"Engines are idle for {fmean(shares[-_RECENT:]):.0%} of a step",
        since,
        "With rollout.mode=sync nothing is sampled while the trainer works.",
        "rollout.mode=one_step_off samples the next batch during the update, at the price of rollouts that are one update old.",
        sick=False,
    )


def advisories(
    steps: Sequence[StepStats], config: Mapping[str, Any], acc_share: Mapping[int, float] | None = None
) -> list[Advisory]:
    """All that holds at the last step. steps: in order. config: dotted key -> value. acc_share: see `no_accuracy_signal`."""
    if not steps:
        return []
    found = [
        not_finite(steps),
        judge_failing(steps),
        infrastructure_failing(steps),
        gap_growing(steps),
        tools_given_up(steps),
        no_tool_signal(steps, config),
        no_accuracy_signal(steps, acc_share or {}),
        *never_varies(steps),
    ]
    said = [one for one in found if one is not None]
    tuning = engine_idle(steps, config)
    if tuning is not None and not any(one.sick for one in said):
        said.append(tuning)
    return said
