"""What a judge is, and what it is built from.

A judge reads a whole rollout. The part that differs between judge styles is smaller: does this answer match the prompt's
ground truths? That part is a `Matcher`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from metis_fast.errors import InfrastructureError
from metis_fast.types import Prompt, Rollout, Verdict

_SHOWN = 80  # characters of a ground truth in a reason, which is kept with every rollout


class JudgeUnavailable(InfrastructureError):
    """The judge could not be reached, timed out or answered nonsense, after its own retries: there is no verdict.

    reason: the same words for the same kind of failure, since failures are counted by it.
    detail: what came. advice: what to do.
    """

    def __init__(self, reason: str, detail: str = "", advice: str = "") -> None:
        super().__init__(reason, detail, advice)
        self.reason, self.detail, self.advice = reason, detail, advice

    def __str__(self) -> str:
        return self.reason + (f" ({self.detail})" if self.detail else "") + (f"; {self.advice}" if self.advice else "")


class TryAgain(JudgeUnavailable):
    """A failure that may pass. wait_s: how long the judge asked to be left alone; 0: it did not say."""

    def __init__(self, reason: str, detail: str = "", advice: str = "", wait_s: float = 0.0) -> None:
        super().__init__(reason, detail, advice)
        self.wait_s = wait_s


class Judge(Protocol):
    """Decides whether a rollout is right."""

    async def judge(self, prompt: Prompt, rollout: Rollout) -> Verdict:
        """Judge one rollout of `prompt`. Safe to call many times at once.

        Raises:
            JudgeUnavailable: there is no verdict. Never raised for anything that the policy did.
        """
        ...


@dataclass(frozen=True, slots=True)
class Match:
    """Whether an answer matches a ground truth; judge, reason: as in `Verdict`."""

    correct: bool
    judge: str
    reason: str


def by_truth(judge: str, truth: str | None) -> Match:
    """The match of a judge that compares texts. truth: the ground truth that the answer equals, None: it equals none."""
    if truth is None:
        return Match(False, judge, "equals no ground truth")
    return Match(True, judge, f"equals the ground truth {shown(truth)}")


def shown(text: str) -> str:
    """A text from outside as part of a reason: quoted, in one line, its first 80 characters."""
    return repr(text) if len(text) <= _SHOWN else f"{text[:_SHOWN]!r}..."


@dataclass(frozen=True, slots=True)
class Cost:
    """What a judge has asked of others. requests: tries that failed included. prompt_tokens, completion_tokens: as the servers
    count them, 0 where they do not. seconds: that requests took, added up (several are under way at once).
    """

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.requests + other.requests,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.seconds + other.seconds,
        )

    def __sub__(self, other: Cost) -> Cost:
        return self + Cost(-other.requests, -other.prompt_tokens, -other.completion_tokens, -other.seconds)


class Matcher(Protocol):
    """One judge style: compares an answer with the ground truths of its prompt."""

    @property
    def cost(self) -> Cost:
        """Of all that was asked so far."""
        ...

    async def compare(self, prompt: Prompt, answer: str) -> Match:
        """Whether `answer` (stripped, not empty) matches any of `prompt.answers`, and why.

        Raises:
            JudgeUnavailable: there is no verdict.
        """
        ...

    async def check(self) -> None:
        """Find out, before any rollout depends on it, whether this matcher works.

        Raises:
            JudgeError: it does not; the message says what to set.
        """
        ...

    def close(self) -> None:
        """End helper processes and files. May be called twice."""
        ...
