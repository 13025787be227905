"""The schedule over time, and over real episodes: how busy an engine is, in virtual time; what a group of a prompt is."""

from __future__ import annotations

import asyncio
import math
import random
import selectors

import pytest
from scheduling import P, Rows, config

from metis_fast.errors import EngineFailure
from metis_fast.rollout.episode import SampleKey, play_group
from metis_fast.rollout.schedule import Pending, Rules, Schedule
from metis_fast.run.parts import training_job
from metis_fast.testing.fakes import FakeEngine, FakeToolbox
from metis_fast.testing.latency import Latency
from metis_fast.types import Group, Outcome

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
    """The group that `play_group` makes of a prompt at its place in a run, and what was used."""
    engine, toolbox = FakeEngine(policy.tokenizer, scripts), FakeToolbox()
    rollout = config("async", rollouts_per_prompt=len(scripts), **(limits or {}))
    place = place if place is not None else Pending(0, 0)

    async def run():
        job = training_job(place, rollout.prompts_per_step, len(scripts))
        key, places = SampleKey(7, job.stream, job.order), asyncio.Semaphore(rollout.max_concurrent)
        own = prompt if prompt is not None else make_prompt()
        return await play_group(own, len(scripts), chat, engine, toolbox, rollout, key, places)

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
        places = asyncio.Semaphore(512)
        with pytest.raises(IndexError):  # the first script ends too soon
            await play_group(make_prompt(), 2, chat, engine, toolbox, config("async"), SampleKey(0, "a", 0), places)

    asyncio.run(run())
    assert (engine.num_open, toolbox.num_open) == (0, 0)
