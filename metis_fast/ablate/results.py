"""What the runs of an ablation came to: means and spread over seeds, paired tests, and what a step cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import combinations
from statistics import fmean, stdev

from metis_fast.ablate.running import is_as_planned, read_cost
from metis_fast.ablate.spec import Planned
from metis_fast.errors import DataError
from metis_fast.evaluate.statistics import Comparison, compare
from metis_fast.report.heldout import HeldOut, read_heldout
from metis_fast.report.log import read_steps
from metis_fast.report.slices import KINDS, plain_kind
from metis_fast.types import Savings, StepStats

RATES = ("tool_rate", "accuracy")
_OF: Mapping[str, Callable[[bool, int], float]] = {
    "tool_rate": lambda correct, calls: float(calls > 0),
    "accuracy": lambda correct, calls: float(correct),
}


@dataclass(frozen=True, slots=True)
class Spread:
    """Over seeds. std: of single seeds (n - 1), None for one seed. seeds: their values, in the order of the runs."""

    mean: float
    std: float | None
    seeds: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Test:
    """Second minus first variant, paired.

    by_seed: over the means of seeds, which asks whether another seed would show it. by_prompt: over all held-out prompts of the
    seeds at hand, the values of one prompt as one cluster.
    """

    first: str
    second: str
    rate: str
    kind: str
    by_seed: Comparison
    by_prompt: Comparison


@dataclass(frozen=True, slots=True)
class Profile:
    """What the steps of a variant cost: means over the steps of all its runs.

    wall_s, cpu_s: stage -> seconds of the training process. tokens: through the decoder; sampled: by the policy. flops: of the
    update; avoided: saving -> share of what the plain update would compute. run_cpu_s, run_wall_s: of a whole run, with
    evaluations and start, all processes; peak_mib: of the largest process.
    """

    steps: int
    wall_s: Mapping[str, float]
    cpu_s: Mapping[str, float]
    tokens: float
    sampled: float
    flops: float
    avoided: Mapping[str, float]
    run_cpu_s: float
    run_wall_s: float
    peak_mib: float


@dataclass(frozen=True, slots=True)
class Variant:
    """Its runs that have ended. before, after: rate -> kind ("all" first) -> values on the held-out prompts."""

    name: str
    seeds: tuple[int, ...]
    before: Mapping[str, Mapping[str, Spread]]
    after: Mapping[str, Mapping[str, Spread]]
    profile: Profile


@dataclass(frozen=True, slots=True)
class Results:
    """Of an ablation, as far as it is. missing: runs without a result, and why. tests: of all pairs of variants."""

    variants: tuple[Variant, ...]
    kinds: tuple[str, ...]
    tests: tuple[Test, ...]
    missing: Mapping[str, str]


def collect(runs: Sequence[Planned]) -> Results:
    """Read all runs that have ended.

    Raises:
        DataError: one of them lacks what it must have written.
    """
    missing = {}
    ended: dict[str, list[Planned]] = {}
    for run in runs:
        ended.setdefault(run.variant, [])
        if why := why_none(run):
            missing[run.name] = why
        else:
            ended[run.variant].append(run)
    after = {run.name: read_heldout(run.folder, run.config.train.steps) for own in ended.values() for run in own}
    kinds = _kinds(after.values())
    return Results(
        variants=tuple(_variant(name, own, after, kinds) for name, own in ended.items() if own),
        kinds=kinds,
        tests=tuple(_tests(ended, after, kinds)),
        missing=missing,
    )


def why_none(run: Planned) -> str:
    """Why a run has no result; empty where it has one."""
    cost = read_cost(run.folder)
    if cost is None or not cost.ended:
        return cost.why if cost is not None and cost.why else "has not ended"
    return "" if is_as_planned(run, cost) else "was made with other settings"


def rates_of(prompts: Sequence[HeldOut], rate: str, kind: str) -> dict[str, float]:
    """Prompt -> mean over its rollouts. kind: "all", one of `KINDS`, or one of those with its grade."""
    return {
        prompt.uid: fmean(_OF[rate](*one) for one in zip(prompt.correct, prompt.calls, strict=True))
        for prompt in prompts
        if prompt.correct and (kind in ("all", prompt.kind) or (prompt.kind is not None and kind == plain_kind(prompt.kind)))
    }


def spread(values: Sequence[float]) -> Spread:
    """Of one value a seed."""
    return Spread(fmean(values), stdev(values) if len(values) > 1 else None, tuple(values))


def _kinds(evaluations: Iterable[Sequence[HeldOut]]) -> tuple[str, ...]:
    found = {plain_kind(prompt.kind) for prompts in evaluations for prompt in prompts if prompt.kind is not None}
    return ("all", *(kind for kind in KINDS if kind in found))


def _spreads(evaluations: Sequence[Sequence[HeldOut]], kinds: Sequence[str]) -> dict[str, dict[str, Spread]]:
    out: dict[str, dict[str, Spread]] = {}
    for rate in RATES:
        out[rate] = {}
        for kind in kinds:
            values = [list(rates_of(prompts, rate, kind).values()) for prompts in evaluations]
            if all(values):
                out[rate][kind] = spread([fmean(one) for one in values])
    return out


def _variant(name: str, runs: Sequence[Planned], after: Mapping[str, Sequence[HeldOut]], kinds: Sequence[str]) -> Variant:
    return Variant(
        name=name,
        seeds=tuple(run.seed for run in runs),
        before=_spreads([read_heldout(run.folder, 0) for run in runs], kinds),
        after=_spreads([after[run.name] for run in runs], kinds),
        profile=_profile(runs),
    )


def _test(pair: tuple[str, str], rate: str, kind: str, values: Mapping[str, Mapping[int, Mapping[str, float]]]) -> Test | None:
    """values: variant -> seed -> prompt -> value. None without a common prompt."""
    by_seed = [{str(seed): fmean(own.values()) for seed, own in values[name].items() if own} for name in pair]
    by_prompt = [{f"{seed} {uid}": value for seed, own in values[name].items() for uid, value in own.items()} for name in pair]
    if not (by_seed[0].keys() & by_seed[1].keys() and by_prompt[0].keys() & by_prompt[1].keys()):
        return None
    return Test(
        first=pair[0],
        second=pair[1],
        rate=rate,
        kind=kind,
        by_seed=compare(by_seed[0], by_seed[1], {seed: seed for seed in by_seed[0]}),
        by_prompt=compare(by_prompt[0], by_prompt[1], {key: key.partition(" ")[2] for key in by_prompt[0]}),
    )


def _tests(ended: Mapping[str, Sequence[Planned]], after: Mapping[str, Sequence[HeldOut]], kinds: Sequence[str]) -> list[Test]:
    tests = []
    for rate in RATES:
        for kind in kinds:
            values = {
                name: {run.seed: rates_of(after[run.name], rate, kind) for run in runs} for name, runs in ended.items() if runs
            }
            tests += [_test(pair, rate, kind, values) for pair in combinations(values, 2)]
    return [test for test in tests if test is not None]


def _mean_by_name(steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    names = dict.fromkeys(name for step in steps for name in step)
    return {name: fmean(step.get(name, 0.0) for step in steps) for name in names}


def _profile(runs: Sequence[Planned]) -> Profile:
    steps: list[StepStats] = [step for run in runs for step in read_steps(run.folder)]
    if not steps or any("all" not in step.slices for step in steps):
        raise DataError(f"{runs[0].folder} has ended without a whole step; remove it, and run the ablation again")
    updates = [update for step in steps for update in step.updates]
    avoided = {one.name: sum(getattr(update.avoided, one.name).flops for update in updates) for one in fields(Savings)}
    flops = sum(update.flops for update in updates)
    plain = flops + sum(avoided.values())
    costs = [cost for run in runs if (cost := read_cost(run.folder)) is not None]
    return Profile(
        steps=len(steps),
        wall_s=_mean_by_name([step.seconds for step in steps]),
        cpu_s=_mean_by_name([step.cpu_seconds for step in steps]),
        tokens=sum(update.num_tokens for update in updates) / len(steps),
        sampled=fmean(step.slices["all"].response_tokens * _num_judged(step) for step in steps),
        flops=flops / len(steps),
        avoided={name: value / plain if plain else 0.0 for name, value in avoided.items()},
        run_cpu_s=fmean(cost.cpu_s for cost in costs),
        run_wall_s=fmean(cost.wall_s for cost in costs),
        peak_mib=max(cost.peak_mib for cost in costs),
    )


def _num_judged(step: StepStats) -> int:
    return step.slices["all"].num - step.slices["all"].num_no_verdict
