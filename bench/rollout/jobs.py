"""The variants: each plays trajectories of a plan and says what it handed out.

ours, ours_sync and ours_over are the real loop: `metis_fast.rollout` with its scheduler, episodes and chat. reference and raw
are written out here; gather is in `client` and `server`.

A failed tool call starts a trajectory of ours again from its prompt, since real tools have a state. The other two schemes call
the same tool again, which costs them less: a simulated tool has no state.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from metis_fast.config import RolloutConfig
from metis_fast.errors import InfrastructureError
from metis_fast.model import Policy
from metis_fast.rollout.calls import parse_turn
from metis_fast.rollout.chat import Chat
from metis_fast.rollout.engine import Sampling
from metis_fast.rollout.episode import SampleKey, play_group
from metis_fast.rollout.schedule import Pending, Rules, Schedule
from metis_fast.run.parts import training_job
from metis_fast.testing.latency import SlowToolbox
from metis_fast.tools.protocol import ToolSession
from metis_fast.types import Group, Outcome, Prompt, Rollout

from .plan import MAX_OBSERVATION, Plan
from .scripted import ScriptedEngine

ROOM = 1 << 20
"""Tokens of a trajectory at most, more than any has."""


@dataclass(frozen=True, slots=True)
class Played:
    """A trajectory as it was handed out. messages, observations: number of tokens of each."""

    order: int
    messages: tuple[int, ...]
    observations: tuple[int, ...]
    outcome: Outcome


@dataclass(slots=True)
class Handed:
    """What a job gave. groups: of the real loop, for the check that no failure became a reward. dropped: groups that were
    cancelled."""

    played: list[Played]
    groups: list[Group] = field(default_factory=list)
    dropped: int = 0


@dataclass(frozen=True, slots=True)
class Stage:
    """What a variant plays on. policy: of the engine, and of a trainer that changes nothing. batch: trajectories of a step."""

    plan: Plan
    policy: Policy
    chat: Chat
    engine: ScriptedEngine
    toolbox: SlowToolbox
    concurrency: int
    batch: int

    @property
    def config(self) -> RolloutConfig:
        """Of the real loop."""
        return RolloutConfig(
            deterministic=False,
            max_concurrent=self.concurrency,
            max_response_tokens=ROOM,
            max_observation_tokens=MAX_OBSERVATION,
            rollouts_per_prompt=self.plan.shape.rollouts,
        )

    def sampling(self, order: int, turn: int) -> Sampling:
        """Of one message."""
        return Sampling(ROOM, self.chat.stop_ids, seed=SampleKey(self.plan.seed, "bench", order).turn_seed(turn))


Variant = Callable[[Stage, int], Awaitable[Handed]]
"""Plays trajectories 0 to n - 1."""


def _played(plan: Plan, rollout: Rollout) -> Played:
    return Played(
        plan.order(rollout.prompt_uid, rollout.index),
        tuple(turn.stop - turn.start for turn in rollout.turns),
        tuple(turn.observation_stop - turn.stop for turn in rollout.turns[:-1]),
        rollout.outcome,
    )


class _Cursor:
    """The plan's prompts, in order."""

    def __init__(self, plan: Plan) -> None:
        self._plan, self._next = plan, 0

    async def begin(self, n: int) -> list[tuple[int, Prompt]]:
        """See `schedule.Cursor`."""
        rows = range(self._next, self._next + n)
        self._next += n
        return [(row, self._plan.prompts[row]) for row in rows]

    def read(self, row: int) -> Prompt:
        """See `schedule.Cursor`."""
        return self._plan.prompts[row]


async def _scheduled(stage: Stage, config: RolloutConfig, steps: int) -> Handed:
    """Steps of a run whose updates take no time; what goes on meanwhile has its cache computed again, as after any update."""
    places, G = asyncio.Semaphore(config.max_concurrent), config.rollouts_per_prompt

    async def play(prompt: Prompt, place: Pending, started: Callable[[], None]) -> Group:
        job = training_job(place, config.prompts_per_step, G)
        key = SampleKey(stage.plan.seed, job.stream, job.order)
        return await play_group(prompt, G, stage.chat, stage.engine, stage.toolbox, config, key, places, started)

    schedule = Schedule(Rules.of(config, steps), _Cursor(stage.plan), play)
    handed = Handed([])
    try:
        for step in range(steps):
            if step:
                await stage.engine.update(stage.policy.model.named_parameters(), step)
            taken = await schedule.batch(step)
            handed.groups += taken.groups
            handed.dropped += taken.dropped
    finally:
        await schedule.close()
    handed.played = [_played(stage.plan, rollout) for group in handed.groups for rollout in group.rollouts]
    return handed


async def ours(stage: Stage, num: int) -> Handed:
    """`rollout.mode: async`, as many steps as `num` trajectories make: those of later batches begin as places get free."""
    steps = max(1, num // stage.batch)
    size = stage.plan.shape.rollouts
    config = stage.config.model_copy(update={"mode": "async", "prompts_per_step": num // steps // size})
    return await _scheduled(stage, config, steps)


async def ours_sync(stage: Stage, num: int) -> Handed:
    """`rollout.mode: sync`: the batch is waited for; no turn of it is."""
    return await _scheduled(stage, stage.config.model_copy(update={"prompts_per_step": num // stage.plan.shape.rollouts}), 1)


async def ours_over(stage: Stage, num: int) -> Handed:
    """`rollout.mode: sync` with `over_provision` and `slow: drop`: more groups are begun than the batch needs, all at once, and
    those that are whole first are the batch."""
    shape = stage.plan.shape
    update = {
        "prompts_per_step": num // shape.rollouts,
        "over_provision": shape.over_provision,
        "slow": "drop",
        "max_concurrent": 2 * num,
    }
    return await _scheduled(stage, stage.config.model_copy(update=update), 1)


async def observe(chat: Chat, tools: ToolSession, text: str, last: int, retries: int) -> list[int] | None:
    """Run what a message calls, again where it failed; the observation's tokens. None: it was the answer.

    last: the message's last token.

    Raises:
        InfrastructureError: the call failed `retries` + 1 times.
    """
    parsed = parse_turn(text)
    if parsed.call is None:
        return None
    assert parsed.arguments is not None, parsed.error
    for attempt in range(retries + 1):
        try:
            observation = chat.dialect.word(await tools.call(parsed.call.name, parsed.arguments))
            return chat.encode_observation(observation, last, MAX_OBSERVATION).tokens
        except InfrastructureError:
            if attempt == retries:
                raise
    raise AssertionError("unreachable")


@dataclass(slots=True)
class Trajectory:
    """While it grows, in the two other schemes."""

    order: int
    tokens: list[int]
    messages: list[int] = field(default_factory=list)
    observations: list[int] = field(default_factory=list)
    outcome: Outcome | None = None

    def say(self, message: Sequence[int]) -> None:
        """Append a message."""
        self.tokens += message
        self.messages.append(len(message))

    async def hear(self, chat: Chat, tools: ToolSession, text: str, retries: int) -> None:
        """Append what the last message's call returns, or end."""
        try:
            observation = await observe(chat, tools, text, self.tokens[-1], retries)
        except InfrastructureError:
            self.outcome = Outcome.INFRASTRUCTURE_ERROR
            return
        if observation is None:
            self.outcome = Outcome.ANSWERED
            return
        self.tokens += observation
        self.observations.append(len(observation))

    def played(self) -> Played:
        """As it is handed out."""
        assert self.outcome is not None
        return Played(self.order, tuple(self.messages), tuple(self.observations), self.outcome)


async def reference(stage: Stage, num: int) -> Handed:
    """The batch goes on turn by turn: one generate call for all that are not done, which ends with its slowest message, then
    their tool calls side by side, and the slowest of them is waited for before the next generate call."""
    plan, chat = stage.plan, stage.chat
    retries = stage.config.retries
    tools = stage.toolbox.session(())
    batch = [Trajectory(order, chat.encode_prompt(plan.prompt_of(order)).tokens) for order in range(num)]
    sessions = [stage.engine.session(one.order, plan.prompt_of(one.order).uid) for one in batch]

    async def generate(one: Trajectory) -> str:
        sampling = stage.sampling(one.order, len(one.messages))
        message = (await sessions[one.order].generate(one.tokens, (), (), sampling)).tokens.tolist()
        one.say(message)
        return chat.message_text(message)

    left = batch
    while left:
        texts = await asyncio.gather(*(generate(one) for one in left))
        await asyncio.gather(*(one.hear(chat, tools, text, retries) for one, text in zip(left, texts, strict=True)))
        for one in left:
            if one.outcome is not None:
                sessions[one.order].close()
        left = [one for one in left if one.outcome is None]
    await tools.close()
    return Handed([one.played() for one in batch])


async def raw(stage: Stage, num: int) -> Handed:
    """The engine alone: the same messages and observations from the same contexts, as many at once, and nothing else. No text,
    no parsing, no tools, no rollouts. What it is given was encoded before."""
    plan = stage.plan
    orders = iter(range(num))
    played: list[Played] = []

    async def lane() -> None:
        for order in orders:
            session = stage.engine.session(order, plan.prompt_of(order).uid)
            tokens = list(plan.prompt_tokens[order // plan.shape.rollouts])
            turns = len(plan.messages[order])
            for turn in range(turns):
                message = await session.generate(tokens, (), (), stage.sampling(order, turn))
                tokens += message.tokens.tolist()
                if turn + 1 < turns:
                    tokens += plan.observation_tokens[order, turn]
            session.close()
            sizes = tuple(len(plan.observation_tokens[order, turn]) for turn in range(turns - 1))
            played.append(Played(order, tuple(m.num_tokens for m in plan.messages[order]), sizes, Outcome.ANSWERED))

    await asyncio.gather(*(lane() for _ in range(min(num, stage.concurrency))))
    return Handed(played)
