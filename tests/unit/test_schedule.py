"""The schedule: its bound on staleness, that no prompt is lost or trained twice, and that nothing is left running.

Groups are sampled by a fake whose latencies are random; `Run` plays the part of the spine, steps and checkpoints included.
"""

from __future__ import annotations

import asyncio
import math
import random
import selectors
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metis_fast.config import RolloutConfig
from metis_fast.errors import DataError, EngineFailure
from metis_fast.rollout.episode import SampleKey
from metis_fast.rollout.schedule import Pending, Rules, Schedule, group_player
from metis_fast.testing.fakes import FakeEngine, FakeToolbox
from metis_fast.testing.latency import Latency
from metis_fast.types import Group, Outcome

STEPS, P = 7, 3


class Rows:
    """A cursor over rows 0, 1, ...; every one is a prompt."""

    def __init__(self, make_prompt):
        self.make, self.next = make_prompt, 0

    def draw(self, n):
        rows = range(self.next, self.next + n)
        self.next += n
        return [(row, self.read(row)) for row in rows]

    def read(self, row):
        return self.make(uid=f"p{row}")


def config(mode, over=0.0, slow="carry", staleness=2, **more):
    return RolloutConfig.model_validate(
        {"mode": mode, "over_provision": over, "slow": slow, "max_staleness": staleness, "prompts_per_step": P} | more
    )


MODES = [
    ("sync", 0.5, "carry", 1),
    ("sync", 1.0, "carry", 1),
    ("sync", 0.5, "drop", 0),
    ("one_step_off", 0.0, "carry", 1),
    ("one_step_off", 1.0, "carry", 2),
    ("one_step_off", 0.5, "drop", 1),
    ("async", 0.0, "carry", 2),
    ("async", 0.5, "carry", 2),
    ("async", 0.0, "drop", 2),
    ("async", 1.0, "drop", 2),
]
"""Mode, over_provision, slow, and the largest number of updates that a trained group may lack."""


@dataclass
class Run:
    """A run of `STEPS` steps over a fake player. begun: version at which each prompt was begun last; trained: rows by step."""

    schedule: Schedule
    rows: Rows
    mode: str
    version: int = 0
    begun: dict[int, int] = field(default_factory=dict)
    running: set[int] = field(default_factory=set)
    trained: list[list[int]] = field(default_factory=list)
    ages: list[int] = field(default_factory=list)
    most: int = 0
    dropped: int = 0


def make_run(rules_of, mode, seed, make_prompt, rows=None):
    """latencies: of a group, in turns of the event loop; one in five is a straggler, one in three waits for a place before."""
    noise = random.Random(seed)
    rows = rows if rows is not None else Rows(make_prompt)

    async def play(prompt, place, started):
        for _ in range(noise.choice((0, 0, 8))):
            await asyncio.sleep(0)
        started()
        run.begun[place.row] = run.version
        assert place.row not in run.running
        assert place.number == place.row
        run.running.add(place.row)
        run.most = max(run.most, len(run.running))
        try:
            for _ in range(noise.choice((0, 1, 2, 3, 40))):
                await asyncio.sleep(0)
        finally:
            run.running.discard(place.row)
        return Group(prompt, ())

    run = Run(Schedule(Rules.of(rules_of, STEPS), rows, play), rows, mode)
    return run, noise


async def steps(run, noise, until, first=0):
    """What the spine does, from step `first` to before step `until`."""
    for step in range(first, until):
        if run.mode == "one_step_off":
            await run.schedule.ready(step)
        run.version = step
        taken = await asyncio.wait_for(run.schedule.batch(step), 20)
        rows = [int(group.prompt.uid[1:]) for group in taken.groups]
        run.ages += [step - run.begun[row] for row in rows]
        run.dropped += taken.dropped
        if run.mode != "sync":
            for _ in range(noise.randrange(30)):  # the update, beside which the others go on
                await asyncio.sleep(0)
        run.trained.append(rows)


@pytest.mark.parametrize(("mode", "over", "slow", "bound"), MODES)
@given(seed=st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_no_group_is_older_than_the_bound_and_no_prompt_is_lost_or_trained_twice(make_prompt, mode, over, slow, bound, seed):
    rules = config(mode, over, slow, deterministic=False)
    run, noise = make_run(rules, mode, seed, make_prompt)

    async def whole():
        await steps(run, noise, STEPS)
        pending = run.schedule.pending()
        await run.schedule.close()
        return pending

    pending = asyncio.run(whole())
    assert [len(rows) for rows in run.trained] == [P] * STEPS
    trained = [row for rows in run.trained for row in rows]
    assert max(run.ages) <= bound
    # trained once, or still in line: together all that was ever drawn
    assert sorted([*trained, *(place.row for place in pending)]) == list(range(run.rows.next))
    assert all(rows == sorted(rows) for rows in run.trained)
    extra = {0.0: 0, 0.5: 2, 1.0: 3}[over]
    assert run.most <= P * (1 + (bound if mode == "async" else 0)) + (extra if (mode, slow) != ("async", "carry") else 0)
    assert run.rows.next <= STEPS * P + extra
    if slow == "carry":
        assert run.dropped == 0 and not any(place.tries for place in pending)
    assert run.running == set()


@pytest.mark.parametrize(("mode", "over", "slow", "bound"), MODES)
@given(seed=st.integers(0, 10**6), stops=st.lists(st.integers(0, STEPS), min_size=1, max_size=4).map(sorted))
@settings(max_examples=15, deadline=None)
def test_a_run_that_is_killed_and_resumed_again_and_again_loses_no_prompt(make_prompt, mode, over, slow, bound, seed, stops):
    """At each stop all that is in flight is gone; what a checkpoint keeps are places."""
    rules = config(mode, over, slow, deterministic=False)
    trained, kept, cursor, done, ages = [], (), 0, 0, []

    async def part(until):
        rows = Rows(make_prompt)
        rows.next = cursor
        run, noise = make_run(rules, mode, seed + until, make_prompt, rows)
        run.schedule.restore(done, kept)
        await steps(run, noise, until, done)
        pending = run.schedule.pending()
        at = run.rows.next
        await run.schedule.close()
        return run, pending, at

    for until in [*stops, STEPS]:
        run, kept, cursor = asyncio.run(part(until))
        done = max(done, until)
        trained += [row for rows in run.trained for row in rows]
        ages += run.ages
    assert len(trained) == len(set(trained)) == P * STEPS
    assert sorted([*trained, *(place.row for place in kept)]) == list(range(cursor))
    assert cursor <= STEPS * P + {0.0: 0, 0.5: 2, 1.0: 3}[over]
    assert max(ages) <= bound


def test_one_step_off_without_extra_prompts_trains_them_in_order_each_one_update_old(make_prompt):
    run, noise = make_run(config("one_step_off"), "one_step_off", 3, make_prompt)
    asyncio.run(steps(run, noise, STEPS))
    assert run.trained == [list(range(step * P, (step + 1) * P)) for step in range(STEPS)]
    assert run.ages == [0] * P + [1] * P * (STEPS - 1)


class Gated:
    """Groups that end when the test says so."""

    def __init__(self, make_prompt, rules, steps=STEPS):
        self.gates, self.tries = {}, {}
        self.schedule = Schedule(Rules.of(rules, steps), Rows(make_prompt), self.play)

    async def play(self, prompt, place, started):
        started()
        self.tries[place.row] = place.tries
        self.gates[place.row] = asyncio.get_running_loop().create_future()
        await self.gates[place.row]
        return Group(prompt, ())

    async def end(self, *rows):
        """End the groups of some rows, once they are begun, and let the schedule take note."""
        await self.settle()
        for row in rows:
            self.gates[row].set_result(None)
        await self.settle()

    async def settle(self):
        for _ in range(5):
            await asyncio.sleep(0)


def rows_of(taken):
    return [int(group.prompt.uid[1:]) for group in taken.groups]


def test_what_is_too_slow_is_dropped_counted_and_begun_again_before_new_prompts_and_then_waited_for(make_prompt):
    async def run():
        gated = Gated(make_prompt, config("sync", 0.3, "drop", deterministic=False))
        batch = asyncio.create_task(gated.schedule.batch(0))
        await gated.end(0, 2, 3)
        taken = await batch
        assert rows_of(taken) == [0, 2, 3] and (taken.dropped, taken.in_flight) == (1, 0)
        assert gated.gates[1].cancelled()
        assert gated.schedule.pending() == (Pending(1, 1, tries=1),)
        batch = asyncio.create_task(gated.schedule.batch(1))
        await gated.end(4, 5, 6)
        assert gated.tries == {0: 0, 1: 1, 2: 0, 3: 0, 4: 0, 5: 0, 6: 0}
        assert not batch.done()  # three are there, but not the one that was dropped before
        await gated.end(1)
        taken = await batch
        assert rows_of(taken) == [1, 4, 5] and taken.dropped == 1  # of the others those that came first
        await gated.schedule.close()

    asyncio.run(run())


def test_what_is_carried_over_is_taken_when_its_time_has_come_and_waited_for_if_need_be(make_prompt):
    async def run():
        gated = Gated(make_prompt, config("sync", 0.3, "carry", deterministic=False))
        batch = asyncio.create_task(gated.schedule.batch(0))
        await gated.end(0, 2, 3)
        taken = await batch
        assert rows_of(taken) == [0, 2, 3] and (taken.dropped, taken.carried, taken.in_flight) == (0, 1, 1)
        assert 4 not in gated.gates  # the weights are about to change
        batch = asyncio.create_task(gated.schedule.batch(1))
        await gated.end(4, 5, 6)
        assert not batch.done()  # at the next step prompt 1 would be too old
        await gated.end(1)
        assert rows_of(await batch) == [1, 4, 5]
        await gated.schedule.close()

    asyncio.run(run())


def test_what_must_be_trained_soon_is_taken_early_enough_for_all_of_it(make_prompt):
    """P = 1, S = 2: 0, 1 and 2 are begun at version 0, so that step 1 has to take 1 or 2, though neither is too old yet."""

    async def run():
        gated = Gated(make_prompt, config("async", prompts_per_step=1))
        batch = asyncio.create_task(gated.schedule.batch(0))
        await gated.end(0)
        assert rows_of(await batch) == [0]
        batch = asyncio.create_task(gated.schedule.batch(1))
        await gated.end(3)
        assert not batch.done()
        await gated.end(2)
        assert rows_of(await batch) == [2]
        batch = asyncio.create_task(gated.schedule.batch(2))
        await gated.settle()
        assert not batch.done()  # 3 is there, and 1 is due
        await gated.end(1)
        assert rows_of(await batch) == [1]
        assert rows_of(await gated.schedule.batch(3)) == [3]
        await gated.schedule.close()

    asyncio.run(run())


def test_nothing_is_begun_while_a_whole_batch_waits_for_the_trainer(make_prompt):
    async def run():
        gated = Gated(make_prompt, config("async", prompts_per_step=1))
        batch = asyncio.create_task(gated.schedule.batch(0))
        await gated.end(1, 2)
        assert sorted(gated.gates) == [0, 1, 2] and not batch.done()
        await gated.end(0)
        assert rows_of(await batch) == [0]
        assert rows_of(await gated.schedule.batch(1)) == [1]
        await gated.settle()
        assert sorted(gated.gates) == [0, 1, 2]
        assert rows_of(await gated.schedule.batch(2)) == [2]  # now there is none left
        await gated.settle()
        assert sorted(gated.gates) == [0, 1, 2, 3, 4]
        await gated.schedule.close()

    asyncio.run(run())


def test_the_first_batch_is_the_first_prompts_and_no_choice_of_the_fastest(make_prompt):
    async def run():
        for first in (0, 2):
            gated = Gated(make_prompt, config("async"))
            gated.schedule.restore(first, [])
            batch = asyncio.create_task(gated.schedule.batch(first))
            await gated.end(1, 2, 3, 4, 5)
            assert sorted(gated.gates) == list(range(3 * P)) and not batch.done()  # the others are not held up
            await gated.end(0)
            assert rows_of(await batch) == [0, 1, 2]
            await gated.end(8)
            assert rows_of(await gated.schedule.batch(first + 1)) == [3, 4, 5]
            await gated.schedule.close()

    asyncio.run(run())


def test_new_groups_begin_while_a_batch_waits_for_what_is_due(make_prompt):
    """Enough have ended for the next batch, and it is not there: one that has to be trained now has not."""

    async def run():
        gated = Gated(make_prompt, config("async"))
        batch = asyncio.create_task(gated.schedule.batch(0))
        await gated.end(0, 1, 2)
        assert rows_of(await batch) == [0, 1, 2]
        batch = asyncio.create_task(gated.schedule.batch(1))
        await gated.end(3, 4, 5)
        assert rows_of(await batch) == [3, 4, 5]
        await gated.end(6, 7, 9, 10, 11)
        batch = asyncio.create_task(gated.schedule.batch(2))
        await gated.settle()
        assert sorted(gated.gates) == list(range(15)) and not batch.done()
        await gated.end(8)
        assert rows_of(await batch) == [6, 7, 8]
        await gated.schedule.close()

    asyncio.run(run())


@pytest.mark.parametrize("when", ["waiting", "between"])
def test_what_a_group_raises_ends_the_run_and_nothing_waits_for_ever(make_prompt, when):
    async def run():
        gated = Gated(make_prompt, config("async"))
        batch = asyncio.create_task(gated.schedule.batch(0))
        await gated.end(*([0, 1, 2] if when == "between" else [0]))
        if when == "between":
            await batch
            await gated.settle()
        row = 4 if when == "between" else 2
        gated.gates[row].set_exception(DataError(f"prompt p{row} is too long"))
        with pytest.raises(DataError, match=f"p{row} is too long"):
            await asyncio.wait_for(gated.schedule.batch(1) if when == "between" else batch, 10)
        await asyncio.wait_for(gated.schedule.close(), 10)
        assert all(gate.done() for gate in gated.gates.values())

    asyncio.run(run())


def test_a_group_that_somebody_else_cancelled_is_a_defect_and_is_not_waited_for(make_prompt):
    async def run():
        gated = Gated(make_prompt, config("async"))
        batch = asyncio.create_task(gated.schedule.batch(0))
        await gated.settle()
        gated.gates[0].cancel()
        with pytest.raises(RuntimeError, match="group of p0 was cancelled"):
            await asyncio.wait_for(batch, 10)
        await gated.schedule.close()

    asyncio.run(run())


def test_a_stop_while_a_batch_is_waited_for_leaves_every_prompt_in_line(make_prompt):
    async def run():
        gated = Gated(make_prompt, config("async"))
        batch = asyncio.create_task(gated.schedule.batch(0))
        await gated.end(0, 1)
        batch.cancel()
        with pytest.raises(asyncio.CancelledError):
            await batch
        assert [place.row for place in gated.schedule.pending()] == list(range(3 * P))
        await gated.schedule.close()
        assert all(gate.done() for gate in gated.gates.values())

    asyncio.run(run())


# -- how busy an engine is, in virtual time -------------------------------------------------------------------------------


class Waits(selectors.DefaultSelector):
    """Waits for nothing: `now` goes on by what it was asked to wait."""

    now = 0.0

    def select(self, timeout=None):
        assert timeout is not None, "everything waits for something that nobody does"
        self.now += max(0.0, timeout)
        return super().select(0)


class VirtualLoop(asyncio.SelectorEventLoop):
    def __init__(self):
        self.waits = Waits()
        super().__init__(self.waits)

    def time(self):
        return self.waits.now


class SteppingEngine:
    """Ten tokens of every message that is asked for, again and again; seconds as they were for the model of `bench rollout`."""

    def __init__(self):
        self.left, self.asked, self.spans = {}, asyncio.Event(), []

    async def generate(self, num_tokens):
        done = asyncio.get_running_loop().create_future()
        self.left[done] = num_tokens
        self.asked.set()
        await done

    async def run(self):
        loop = asyncio.get_running_loop()
        while True:
            self.asked.clear()
            if not self.left:
                await self.asked.wait()
            began = loop.time()
            await asyncio.sleep(10 * (0.0055 + 0.0006 * len(self.left)))
            self.spans.append((began, loop.time()))
            self.left = {done: left - 10 for done, left in self.left.items()}
            for done in [done for done, left in self.left.items() if left <= 0]:
                del self.left[done]
                done.set_result(None)


def busy_share(make_prompt, mode, places, batch, num, seed):
    """Share of the time until the last trajectory is begun (`async`) or ends (`sync`) in which the engine was in a step.

    Tools: median 1 s, 99th percentile 20 s. 8 trajectories a prompt, 1 to 3 calls, messages of 48 to 144 tokens.
    """
    G, tools = 8, Latency(failing=0.0)
    rules = config(mode, prompts_per_step=batch // G, deterministic=False)
    steps, begun = num // batch, []

    async def main():
        loop, engine, gate = asyncio.get_running_loop(), SteppingEngine(), asyncio.Semaphore(places)

        async def trajectory(noise, started):
            async with gate:
                started()
                begun.append(loop.time())
                for call in range(noise.randint(1, 3) + 1):
                    if call:
                        await asyncio.sleep(tools.median_s * math.exp(tools.sigma * noise.gauss(0, 1)))
                    await engine.generate(noise.randint(48, 144))

        async def play(prompt, place, started):
            await asyncio.gather(*(trajectory(random.Random(f"{seed} {place.number} {i}"), started) for i in range(G)))
            return Group(prompt, ())

        running = asyncio.create_task(engine.run())
        schedule = Schedule(Rules.of(rules, steps), Rows(make_prompt), play)
        for step in range(steps):
            assert len((await schedule.batch(step)).groups) == batch // G
        end = max(begun) if mode == "async" else loop.time()
        running.cancel()
        return sum(max(0.0, min(b, end) - a) for a, b in engine.spans if a < end) / end

    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main())


@pytest.mark.parametrize(("places", "batch"), [(64, 128), (128, 128)])
def test_tools_of_seconds_leave_an_engine_busy_where_steps_are_not_waited_for(make_prompt, places, batch):
    shares = [busy_share(make_prompt, "async", places, batch, 768, seed) for seed in range(3)]
    assert sorted(shares)[1] > 0.95 and min(shares) > 0.75, shares  # a call in 10,000 takes minutes
    assert busy_share(make_prompt, "sync", places, batch, 256, 0) < 0.8


# -- with real episodes ---------------------------------------------------------------------------------------------------

CALL = '<tool_call>{"name": "python", "arguments": {"code": "1"}}</tool_call>'
ANSWER = "<answer>Paris</answer><|im_end|>"


def played(chat, policy, make_prompt, scripts, limits=None, prompt=None, place=None):
    """The group that `group_player` makes of a prompt, and what was used."""
    engine, toolbox = FakeEngine(policy.tokenizer, scripts), FakeToolbox()
    rollout = config("async", rollouts_per_prompt=len(scripts), **(limits or {}))
    place = place if place is not None else Pending(0, 0)

    async def run():
        play = group_player(chat, engine, toolbox, rollout, 7)
        return await play(prompt if prompt is not None else make_prompt(), place, lambda: None)

    return asyncio.run(run()), engine, toolbox


def test_a_group_is_played_by_episodes_in_the_order_of_its_rollouts(chat, policy, make_prompt):
    scripts = [[CALL, ANSWER], [ANSWER], [CALL, EngineFailure("gone"), ANSWER]]
    group, engine, toolbox = played(chat, policy, make_prompt, scripts, {"max_concurrent": 1})
    assert [(r.index, r.num_tool_calls, r.outcome) for r in group.rollouts] == [
        (i, calls, Outcome.ANSWERED) for i, calls in enumerate((1, 0, 1))
    ]
    assert (engine.num_open, toolbox.num_open) == (0, 0) and len(toolbox.calls) == 2


def test_noise_is_that_of_the_prompts_place_and_another_one_after_a_drop(chat, policy, make_prompt):
    seeds = []
    for place in (Pending(0, 5), Pending(0, 9), Pending(0, 5, tries=1), Pending(P, 5)):
        _, engine, _ = played(chat, policy, make_prompt, [[ANSWER], [ANSWER]], place=place)
        seeds.append(tuple(sampling.seed for sampling in engine.sampling))
    assert seeds[0] == seeds[1] and len(set(seeds)) == 3
    assert seeds[0] == tuple(SampleKey(7, "train/0", order).turn_seed(0) for order in range(2))  # as the synchronous mode's


def test_a_defect_in_one_episode_closes_the_others_of_its_group(chat, policy, make_prompt):
    engine, toolbox = FakeEngine(policy.tokenizer, [[CALL], [CALL, ANSWER]]), FakeToolbox()

    async def run():
        play = group_player(chat, engine, toolbox, config("async", rollouts_per_prompt=2), 0)
        with pytest.raises(IndexError):  # the first script ends too soon
            await play(make_prompt(), Pending(0, 0), lambda: None)

    asyncio.run(run())
    assert (engine.num_open, toolbox.num_open) == (0, 0)
