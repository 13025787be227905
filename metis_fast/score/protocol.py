"""What a judge is, and what it is built from.

A judge reads a whole rollout. The part that differs between judge styles is smaller: does this answer match the prompt's
ground truths? That part is a `Matcher`.
"""

from __future__ import annotations

from typing import Protocol

from metis_fast.errors import InfrastructureError
from metis_fast.types import Prompt, Rollout, Verdict


class JudgeUnavailable(InfrastructureError):
    """The judge could not be reached, timed out or answered nonsense, after its own retries: there is no verdict."""


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
