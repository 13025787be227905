"""Whose call it is: the rollout that is being played, for those who keep calls."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Played:
    """A rollout of a run.

    name: the same whenever the run comes to it: seed, stream and place. row: the prompt's uid and which of its rollouts it is,
    for people.
    """

    name: str
    row: str


NOBODY = Played("", "a session of no rollout")
PLAYED: ContextVar[Played] = ContextVar("played", default=NOBODY)
"""Set by the episode; each runs in a task of its own, or sets its own before it opens tools."""
