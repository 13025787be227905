"""The rollout benchmark's parts: simulated tools, prescribed messages, what counts as busy, and what it refuses to show."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from bench.candidate import BenchError
from bench.rollout import run as command
from bench.rollout.check import check_played, expected_repeats, expected_restarts
from bench.rollout.jobs import Played
from bench.rollout.measure import (
    NO_TOOLS,
    OURS,
    OVER,
    RAW,
    REFERENCE,
    SYNC,
    Client,
    Runner,
    WrongResult,
    to_overhead,
    to_row,
)
from bench.rollout.plan import SHAPES, build_model
from bench.rollout.scripted import Clock, ClockedNative, ClockedRequests, ScriptedEngine
from metis_fast.cli import parse
from metis_fast.config import ModelConfig
from metis_fast.errors import InfrastructureError
from metis_fast.model import Policy, load_policy
from metis_fast.rollout.engine import Completion, Sampling, SyncReport
from metis_fast.testing.latency import Latency, SlowToolbox
from metis_fast.types import Observation, Outcome

FAST = Latency(0.001, 0.01, 0.15)
CLIENT: Client = None  # pyright: ignore[reportAssignmentType] - only `gather` needs one, see tests/e2e/test_bench_rollout_run.py


@pytest.fixture(scope="module")
def bench_policy(tmp_path_factory: pytest.TempPathFactory) -> Policy:
    """The benchmark's own."""
    folder = tmp_path_factory.mktemp("bench") / "policy"
    build_model(folder, 0)
    return load_policy(ModelConfig(path=folder, dtype="float32"))


@pytest.fixture(scope="module")
def runner(bench_policy: Policy) -> Runner:
    """Of the tiny shape, with faster tools that fail more often."""
    clock = Clock()
    return Runner(bench_policy, replace(SHAPES["tiny"], latency=FAST), 1, ClockedNative(bench_policy, clock), clock)


def test_latencies_have_the_stated_median_99th_percentile_and_failures():
    latency = Latency(median_s=1.0, p99_s=20.0, failing=0.02)
    drawn = [latency.draw(0, f"call {i}", 0) for i in range(20_000)]
    seconds = np.array([s for s, _ in drawn])
    assert np.median(seconds) == pytest.approx(1.0, rel=0.05)
    assert np.percentile(seconds, 99) == pytest.approx(20.0, rel=0.15)
    assert seconds.mean() == pytest.approx(latency.mean_s, rel=0.1)
    assert np.mean([fails for _, fails in drawn]) == pytest.approx(0.02, abs=0.004)
    assert latency.sigma == pytest.approx(math.log(20) / 2.3263, rel=1e-4)


def test_latencies_depend_on_seed_call_and_repetition_alone():
    latency = Latency()
    assert latency.draw(3, "a", 1) == latency.draw(3, "a", 1)
    assert len({latency.draw(*key)[0] for key in [(3, "a", 1), (4, "a", 1), (3, "b", 1), (3, "a", 0)]}) == 4


@pytest.mark.parametrize("wrong", [(-1.0, 1.0, 0.0), (2.0, 1.0, 0.0), (1.0, 2.0, 1.5)])
def test_a_latency_that_cannot_be_is_refused(wrong):
    with pytest.raises(ValueError, match="expected 0 <= median_s <= p99_s and failing in"):
        Latency(*wrong)


def test_slow_tools_raise_their_failures_and_count_them():
    async def calls() -> tuple[SlowToolbox, list[Observation | InfrastructureError]]:
        toolbox = SlowToolbox(Latency(0.0, 0.0, 0.5), 0, lambda name, arguments: Observation(f"{name} {arguments['query']}"))
        session = toolbox.session(())
        found: list[Observation | InfrastructureError] = []
        for i in range(40):
            try:
                found.append(await session.call("text_search", {"query": i % 4}))
            except InfrastructureError as error:
                found.append(error)
        assert (await session.call("nothing", {})).outcome is Outcome.TOOL_ERROR
        await session.close()
        await session.close()
        return toolbox, found

    toolbox, found = asyncio.run(calls())
    failed = [one for one in found if isinstance(one, InfrastructureError)]
    assert (toolbox.num_calls, toolbox.num_failed, toolbox.num_open) == (40, len(failed), 0)
    assert 10 < len(failed) < 30
    assert {one.text for one in found if isinstance(one, Observation)} == {f"text_search {i}" for i in range(4)}


def test_busy_time_is_cut_at_the_window_and_rows_are_weighted_by_time():
    clock = Clock([0.0, 2.0, 5.0], [1.0, 4.0, 6.0], [0, 3, 9])  # a prefill, two decoding steps
    assert clock.busy_s(0.5, 5.5) == pytest.approx(0.5 + 2.0 + 0.5)
    assert clock.mean_rows(0.5, 5.5) == pytest.approx((2.0 * 3 + 0.5 * 9) / 2.5)
    assert clock.mean_rows(4.0, 5.0) == 0


class _Recorder:
    """An engine that samples 7s and keeps what it was given."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[int], Sampling]] = []

    def session(self, order: int, prompt: str = "") -> _Recorder:
        return self

    async def generate(self, tokens: Sequence[int], images: object, spans: object, sampling: Sampling) -> Completion:
        await asyncio.sleep(0.01)
        self.asked.append((list(tokens), sampling))
        num = sampling.max_tokens
        return Completion(np.full(num, 7, np.int32), np.full(num, -1, np.float32), np.zeros(num, np.int32), False)

    async def update(self, weights: object, version: int) -> SyncReport:
        return SyncReport(version, "shared")

    def close(self) -> None: ...


def test_the_engine_generates_every_token_and_is_given_its_own_ones_later(runner, bench_policy):
    recorder, plan = _Recorder(), runner.plan

    async def two() -> tuple[Completion, Completion, list[int]]:
        session = ScriptedEngine(recorder, plan, bench_policy.tokenizer).session(1, "bench/1")
        sampling = Sampling(500, runner.chat.stop_ids, seed=5)
        context = [1, 2, 3]
        first = await session.generate(context, (), (), sampling)
        context += [*first.tokens.tolist(), 4]
        return first, await session.generate(context, (), (), sampling), context

    first, second, context = asyncio.run(two())
    planned = plan.messages[plan.order("bench/1", 1)]
    for message, expected in zip((first, second), planned, strict=False):
        assert len(message.tokens) == expected.num_tokens and message.stopped
        assert tuple(message.tokens[-len(expected.tail) :]) == expected.tail
        assert message.tokens[-1] in runner.chat.stop_ids
    (_, asked), (again, _) = recorder.asked
    assert (asked.max_tokens, asked.stop_ids, asked.seed) == (planned[0].num_tokens, (), 5)
    assert again == [1, 2, 3, *[7] * planned[0].num_tokens, 4] != context


def test_an_engine_elsewhere_is_busy_while_it_has_a_request():
    clock = Clock()
    engine = ClockedRequests(_Recorder(), clock)
    sampling = Sampling(1, ())

    async def play() -> None:
        await asyncio.gather(*(engine.session(i).generate([1], (), (), sampling) for i in range(2)))
        await asyncio.sleep(0.05)
        await engine.session(0).generate([1], (), (), sampling)

    asyncio.run(play())
    assert max(clock.rows) == 2 and min(clock.rows) == 1
    whole = clock.ended[-1] - clock.began[0]
    assert 0.019 <= clock.busy_s(clock.began[0], clock.ended[-1]) < whole - 0.04


@pytest.mark.parametrize("variant", [OURS, SYNC, OVER, REFERENCE, RAW])
def test_every_variant_plays_the_plan(runner, variant):
    num = 12 if variant == OURS else 4
    job = asyncio.run(runner.run(variant, num, 4, NO_TOOLS if variant == RAW else FAST, CLIENT))  # it checks itself
    row = to_row(job, None)
    assert row.trajectories == num and row.infrastructure_errors <= 1
    assert 0 < row.busy_share <= 1 and 0 < row.busy_share_whole <= 1 and 0 < row.rows <= 6
    assert (row.dropped > 0) == (variant == OVER)
    if variant != OVER:  # what was begun there and dropped may have failed before
        assert (row.failed_calls > 0) == (variant != RAW)  # at seed 1
    if variant == OURS:
        assert job.window[1] < job.whole[1]  # the last trajectory begins before the last one ends


def test_failed_tools_start_ours_again_and_are_repeated_in_the_reference(runner):
    shape = replace(runner.shape, latency=Latency(0.001, 0.01, 0.5))
    plan = runner.plan.with_latency(shape.latency)
    restarts = [expected_restarts(plan, order, 2) for order in range(12)]
    repeats = [expected_repeats(plan, order, 2) for order in range(12)]
    assert not all(answers for _, answers in restarts) and not all(answers for _, answers in repeats)
    for variant, expected in ((OURS, restarts), (REFERENCE, repeats)):
        job = asyncio.run(runner.run(variant, 12, 12, shape.latency, CLIENT))
        broken = {one.order for one in job.handed.played if one.outcome is Outcome.INFRASTRUCTURE_ERROR}
        assert broken == {order for order, (_, answers) in enumerate(expected) if not answers}
        assert job.failed_calls == sum(failed for failed, _ in expected)


def test_overhead_compares_jobs_of_equal_steps(runner):
    jobs = {name: asyncio.run(runner.run(name, 4, 4, NO_TOOLS, CLIENT)) for name in (RAW, OURS)}
    assert len(jobs[RAW].clock.began) == len(jobs[OURS].clock.began)
    assert sorted(jobs[RAW].clock.rows) == sorted(jobs[OURS].clock.rows)
    overhead = to_overhead([jobs[OURS]], [jobs[RAW]])
    beyond = jobs[OURS].outside_s - jobs[RAW].outside_s  # above 0 on a quiet machine; the first job is also the first of all
    assert overhead.message_s == pytest.approx(beyond / jobs[OURS].num_messages)
    assert (overhead.outside.median > 0) == (beyond > 0)
    assert to_overhead([jobs[RAW]], [jobs[RAW]]).outside.most == 0


async def _swallow(self: object, name: str, arguments: dict[str, object], call: Callable[..., object]) -> Observation:
    try:
        return await call(self, name, arguments)  # pyright: ignore[reportGeneralTypeIssues]
    except InfrastructureError as error:
        return Observation(str(error), outcome=Outcome.TOOL_ERROR)


def test_a_failure_that_became_an_observation_is_found(runner, monkeypatch):
    call = SlowToolbox.call
    monkeypatch.setattr(SlowToolbox, "call", lambda self, name, arguments: _swallow(self, name, arguments, call))
    with pytest.raises(WrongResult, match=r"ours at 12: trajectory \d+ "):
        asyncio.run(runner.run(OURS, 12, 12, FAST, CLIENT))


def test_lost_repeated_and_shortened_trajectories_are_found(runner):
    plan = runner.plan
    whole = [
        Played(
            order,
            tuple(message.num_tokens for message in plan.messages[order]),
            tuple(len(plan.observation_tokens[order, turn]) for turn in range(len(plan.messages[order]) - 1)),
            Outcome.ANSWERED,
        )
        for order in range(3)
    ]
    assert check_played(plan, whole, 3, lambda _: True) == []
    assert check_played(plan, whole[:2], 3, lambda _: True) == ["3 trajectories wanted, 2 handed out, 2 distinct"]
    assert check_played(plan, [*whole[:2], whole[0]], 3, lambda _: True) == ["3 trajectories wanted, 3 handed out, 2 distinct"]
    short = replace(whole[2], messages=(1, *whole[2].messages[1:]))
    (line,) = check_played(plan, [*whole[:2], short], 3, lambda _: True)
    assert line.startswith("trajectory 2 has messages of (1, ")
    (line,) = check_played(plan, [*whole[:2], replace(whole[2], outcome=Outcome.LENGTH)], 3, lambda _: True)
    assert line == "trajectory 2 ended in length, expected an answer"
    (line,) = check_played(plan, whole, 3, lambda order: order > 0)
    assert line == "trajectory 0 ended in answered though its tools failed beyond all retries"


def test_no_figures_are_shown_when_a_variant_is_wrong(monkeypatch, capsys):
    async def wrong(*_: object) -> None:
        raise WrongResult("ours at 4: 3 trajectories wanted, 2 handed out, 2 distinct")

    monkeypatch.setattr(command, "measure", wrong)
    threads = torch.get_num_threads()
    try:
        assert command.run(parse(["bench", "rollout", "--shape", "tiny", "--json"])) == 1
    finally:
        torch.set_num_threads(threads)
    out, err = capsys.readouterr()
    assert out == "" and "2 handed out" in err and "no figures are shown" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shape", "T=1"], "--shape: expected one of default, tiny for rollout, got 'T=1'"),
        (["--runs", "4"], "--runs: expected 5 or more, got 4"),
        (["--threads", "0"], "--threads: expected 1 or more, got 0"),
        (["--peers", "eager"], "--peers: rollout has none; its shapes are default, tiny"),
        (["--dtype", "bf16"], "--dtype: rollout samples in fp32, got 'bf16'"),
        (["--device", "cuda"], "--device cuda: rollout counts CPU seconds, so its engine runs on the CPU"),
    ],
)
def test_options_that_do_not_fit_are_refused(words, message):
    with pytest.raises(BenchError) as caught:
        command.request(parse(["bench", "rollout", *words]))
    assert str(caught.value) == message
