"""What a judge is, and what it is built from.

A judge reads a whole rollout. The part that differs between judge styles is smaller: does this answer match the prompt's
ground truths? That part is a `Matcher`.
"""

from __future__ import annotations

from typing import Protocol

from metis_fast.errors import InfrastructureError
from metis_fast.types import Prompt, Rollout, Verdict


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


class Matcher(Protocol):
    """One judge style: compares an answer with the ground truths of its prompt."""

    async def matches(self, prompt: Prompt, answer: str) -> bool:
        """Whether `answer` (stripped, not empty) matches any of `prompt.answers`.

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
