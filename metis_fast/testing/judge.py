"""For tests of judges and scores: a judge that decides by a function, and rollouts made from plain text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from metis_fast.score.protocol import JudgeUnavailable
from metis_fast.score.response import format_ok, last_answer
from metis_fast.types import Outcome, Prompt, Rollout, ToolCall, Turn, Verdict


def literal_match(prompt: Prompt, answer: str) -> bool:
    """Whether the answer is, to the letter, one of the prompt's ground truths."""
    return answer in prompt.answers


class FakeJudge:
    """Reads the last answer and the format of a rollout like the real judges, then asks `correct`.

    correct: (prompt, answer) -> verdict; None stands for a judge that failed.
    judged: what was judged, in order, as (prompt uid, index of the rollout).
    """

    def __init__(self, correct: Callable[[Prompt, str], bool | None] = literal_match) -> None:
        self._correct = correct
        self.judged: list[tuple[str, int]] = []

    async def judge(self, prompt: Prompt, rollout: Rollout) -> Verdict:
        """Judge one rollout.

        Raises:
            JudgeUnavailable: `correct` returned None.
        """
        self.judged.append((prompt.uid, rollout.index))
        answer = last_answer(rollout.response_text)
        correct = self._correct(prompt, answer)
        if correct is None:
            raise JudgeUnavailable("the fake judge was told to fail")
        return Verdict(correct=correct, format_ok=format_ok(rollout.response_text), answer=answer)

    async def check(self) -> None:
        """Never fails."""

    def close(self) -> None:
        """Nothing to close."""


def text_rollout(
    prompt_uid: str,
    texts: Sequence[str],
    *,
    index: int = 0,
    observation: str = "",
    outcome: Outcome = Outcome.ANSWERED,
) -> Rollout:
    """A rollout whose turns say `texts`; every turn but the last calls a tool that returns `observation`.

    With outcome TURN_LIMIT the last turn calls one too. Its tokens stand for nothing: a prompt of one, then one a turn.
    """
    turns = []
    for position, text in enumerate(texts, start=1):
        calls = position < len(texts) or outcome is Outcome.TURN_LIMIT
        turns.append(
            Turn(
                text=text,
                start=position,
                stop=position + 1,
                observation_stop=position + 1,
                outcome=Outcome.TOOL_RESULT if calls else outcome,
                call=ToolCall("python", "{}") if calls else None,
                observation=observation if calls else "",
            )
        )
    sampled = np.arange(len(texts) + 1) > 0
    return Rollout(
        prompt_uid=prompt_uid,
        index=index,
        tokens=np.zeros(len(sampled), dtype=np.int32),
        prompt_len=1,
        sampled=sampled,
        logp=np.where(sampled, -1.0, 0.0).astype(np.float32),
        weight_version=np.where(sampled, 0, -1).astype(np.int32),
        images=(),
        image_spans=(),
        turns=tuple(turns),
        outcome=outcome,
    )
