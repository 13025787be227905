"""Several LLM judges that have to agree on a verdict."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from functools import reduce
from itertools import combinations
from operator import add

from metis_fast.config import LlmJudgeConfig
from metis_fast.errors import JudgeError
from metis_fast.score.llm import LlmMatcher
from metis_fast.score.protocol import Cost, JudgeUnavailable, Match
from metis_fast.types import Prompt

_LOG = logging.getLogger(__name__)


class QuorumMatcher:
    """Judge style "llm" with `score.llm.judges`: every answer goes to all of them, and enough must say the same.

    One that fails has no vote. All are waited for, so that a verdict and its reason do not depend on who was faster.
    """

    def __init__(self, config: LlmJudgeConfig, matchers: Sequence[LlmMatcher]) -> None:
        """matchers: one for each of `config.each()`, in that order."""
        self._matchers = list(matchers)
        self._name = config.quorum
        self._needed = len(matchers) if config.quorum == "unanimous" else len(matchers) // 2 + 1
        self._told: set[tuple[int, str]] = set()

    @property
    def cost(self) -> Cost:
        """Of all of them together."""
        return reduce(add, (matcher.cost for matcher in self._matchers))

    async def compare(self, prompt: Prompt, answer: str) -> Match:
        """See `Matcher.compare`.

        Raises:
            JudgeUnavailable: too few of them agree, because they say different things or because some failed.
            JudgeError: see `LlmMatcher.compare`.
        """
        asked = (matcher.compare(prompt, answer) for matcher in self._matchers)
        found = await asyncio.gather(*asked, return_exceptions=True)
        votes: list[Match] = []
        failures: list[tuple[int, JudgeUnavailable]] = []
        for number, one in enumerate(found, start=1):
            if isinstance(one, Match):
                votes.append(one)
            elif isinstance(one, JudgeUnavailable):
                failures.append((number, one))
            else:
                raise one
        self._tell(failures)
        if votes and not any(vote.judge for vote in votes):  # an answer that is wrong without a request
            return votes[0]
        for correct in (True, False):
            agreeing = [vote for vote in votes if vote.correct == correct]
            if len(agreeing) >= self._needed:
                counted = f"{len(agreeing)} of {len(self._matchers)}"
                reason = f"{counted} say {_word(correct)} ({self._name}); the first: {agreeing[0].reason}"
                return Match(correct, " + ".join(vote.judge for vote in agreeing), reason)
        raise self._no_verdict(votes, failures)

    def _no_verdict(self, votes: Sequence[Match], failures: Sequence[tuple[int, JudgeUnavailable]]) -> JudgeUnavailable:
        right = sum(vote.correct for vote in votes)
        said = [f"{vote.judge}: {_word(vote.correct)}" for vote in votes]
        said += [f"judge {number}: {failure.reason}" for number, failure in failures]
        detail = f"{', '.join(said)}; {self._needed} of {len(self._matchers)} have to agree"
        if max(right, len(votes) - right) + len(failures) < self._needed:  # whatever those who failed would have said
            return JudgeUnavailable("the judges disagree", detail)
        return JudgeUnavailable("too few of the judges gave a verdict", detail, failures[0][1].advice)

    def _tell(self, failures: Sequence[tuple[int, JudgeUnavailable]]) -> None:
        """Once for each judge and kind of failure: while the others agree, nobody else would tell of it."""
        for number, failure in failures:
            if (number, failure.reason) not in self._told:
                self._told.add((number, failure.reason))
                _LOG.warning("%s has no vote: %s", self._matchers[number - 1], failure)

    async def check(self) -> None:
        """Whether every one of them works, and is another model than the others.

        Raises:
            JudgeError: it does not; the message says what to do.
        """
        await asyncio.gather(*(matcher.check() for matcher in self._matchers))
        found = [matcher.found for matcher in self._matchers]
        for (first, one), (second, other) in combinations(enumerate(found, start=1), 2):
            if other.is_as(one):
                raise JudgeError(
                    f"judges {first} and {second} of score.llm.judges are both {one.model!r}, which would be one vote "
                    "counted twice; remove one of them, or name another model"
                )

    def close(self) -> None:
        """Close their caches. May be called twice."""
        for matcher in self._matchers:
            matcher.close()


def _word(correct: bool) -> str:
    return "CORRECT" if correct else "INCORRECT"
