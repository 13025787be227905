"""Whether a variant played what the plan says, before any figure of it is shown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from metis_fast.config import Config
from metis_fast.score.scoring import score_groups
from metis_fast.testing.judge import FakeJudge
from metis_fast.types import Group, Outcome

from .jobs import Played
from .plan import Plan


def expected_restarts(plan: Plan, order: int, retries: int) -> tuple[int, bool]:
    """(failed calls, whether it answers) of a trajectory that a failed call starts again from its prompt."""
    made: Counter[int] = Counter()
    for failed in range(retries + 1):
        for turn in range(len(plan.messages[order]) - 1):
            made[turn] += 1
            if plan.draw(order, turn, made[turn] - 1)[1]:
                break
        else:
            return failed, True
    return retries + 1, False


def expected_repeats(plan: Plan, order: int, retries: int) -> tuple[int, bool]:
    """As `expected_restarts`, of one whose failed call is made again."""
    failed = 0
    for turn in range(len(plan.messages[order]) - 1):
        fails = [plan.draw(order, turn, attempt)[1] for attempt in range(retries + 1)]
        if all(fails):
            return failed + len(fails), False
        failed += fails.index(False)
    return failed, True


def check_played(plan: Plan, played: Sequence[Played], num: int, answers: Callable[[int], bool]) -> list[str]:
    """What is wrong with the trajectories that a job of `num` handed out; `answers`: whether one should end in an answer."""
    wrong = []
    orders = [one.order for one in played]
    if len(orders) != num or len(set(orders)) != num:
        wrong.append(f"{num} trajectories wanted, {len(orders)} handed out, {len(set(orders))} distinct")
    for one in played:
        messages = tuple(message.num_tokens for message in plan.messages[one.order])
        observations = tuple(len(plan.observation_tokens[one.order, turn]) for turn in range(len(messages) - 1))
        if not answers(one.order):
            if one.outcome is not Outcome.INFRASTRUCTURE_ERROR:
                wrong.append(f"trajectory {one.order} ended in {one.outcome} though its tools failed beyond all retries")
        elif one.outcome is not Outcome.ANSWERED:
            wrong.append(f"trajectory {one.order} ended in {one.outcome}, expected an answer")
        elif (one.messages, one.observations) != (messages, observations):
            wrong.append(
                f"trajectory {one.order} has messages of {one.messages} and observations of {one.observations} tokens, "
                f"expected {messages} and {observations}"
            )
    return wrong


async def check_rewards(groups: Sequence[Group]) -> list[str]:
    """Whether the scored groups have a verdict for every rollout but those that our own machinery ended."""
    scored = await score_groups(groups, FakeJudge(), Config())
    wrong = []
    for group in scored:
        for one, score in zip(group.rollouts, group.scores, strict=True):
            failed = one.outcome is Outcome.INFRASTRUCTURE_ERROR
            if failed != (score.verdict is None) or (failed and (score.r_acc or score.r_tool or score.needs_gradient)):
                wrong.append(f"rollout {one.prompt_uid}#{one.index} ended in {one.outcome} and was given {score}")
            elif not failed and not (score.verdict and score.verdict.correct):
                wrong.append(f"rollout {one.prompt_uid}#{one.index} gave the right answer and was judged {score.verdict}")
    return wrong
