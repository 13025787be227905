"""The schedule: its bound on staleness, that no prompt is lost or trained twice, and that nothing is left running.

Groups are sampled by a fake whose latencies are random; `Run` plays the part of the spine, steps and checkpoints included.
"""

from __future__ import annotations

import asyncio
import random
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scheduling import STEPS, P, Rows, config

from metis_fast.errors import DataError
from metis_fast.rollout.schedule import Pending, Rules, Schedule
from metis_fast.types import Group

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


def test_prompts_of_a_checkpoint_are_read_beside_the_loop_which_may_have_to_bring_them(make_prompt):
    class Far(Rows):
        def read(self, row):
            assert loop is not None
            return asyncio.run_coroutine_threadsafe(self.begin(1), loop).result(10)[0][1] and self.make(uid=f"p{row}")

        async def begin(self, n):
            return [(row, self.make(uid=f"p{row}")) for row in range(self.next, self.next + n)]

    async def play(prompt, place, started):
        started()
        return Group(prompt, ())

    async def run():
        nonlocal loop
        loop = asyncio.get_running_loop()
        schedule = Schedule(Rules.of(config("one_step_off"), STEPS), Far(make_prompt), play)
        schedule.restore(1, [Pending(3, 8), Pending(4, 7), Pending(5, 9)])
        taken = await asyncio.wait_for(schedule.batch(1), 20)
        await schedule.close()
        return rows_of(taken)

    loop: asyncio.AbstractEventLoop | None = None
    assert asyncio.run(run()) == [8, 7, 9]


def test_one_step_off_without_extra_prompts_trains_them_in_order_each_one_update_old(make_prompt):
    run, noise = make_run(config("one_step_off"), "one_step_off", 3, make_prompt)
    asyncio.run(steps(run, noise, STEPS))
    assert run.trained == [list(range(step * P, (step + 1) * P)) for step in range(STEPS)]
    assert run.ages == [0] * P + [1] * P * (STEPS - 1)


class Gated:
    """Groups that end when the test says so."""

    def __init__(self, make_prompt, rules, steps=STEPS):
        self.gates, self.tries, self.discarded = {}, {}, []
        self.schedule = Schedule(Rules.of(rules, steps), Rows(make_prompt), self.play, self.discarded.append)

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
        assert [group.prompt.uid for group in gated.discarded] == ["p6"]  # it had ended; whoever keeps it is told
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
        with pytest.raises(RuntimeError, match="group of row 0 was cancelled"):
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
