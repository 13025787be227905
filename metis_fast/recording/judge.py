"""Judges that record, and that replay. A verdict is found by all that a judge reads: question, ground truths, the response."""

from __future__ import annotations

import asyncio
from typing import Protocol, cast

from metis_fast.config import ScoreConfig, deciding
from metis_fast.judge_styles import known_style
from metis_fast.recording.asking import Asked, canonical, digest, read_answer, write_answer
from metis_fast.recording.file import Recording
from metis_fast.recording.tools import missing
from metis_fast.score.llm_reply import READING
from metis_fast.score.response import whole_response
from metis_fast.types import Prompt, Rollout, Verdict

_SHOWN = 200  # characters of question and answer in the file, for people
_NO_MATTER = frozenset({"w_ans", "w_fmt", "estimator", "alpha", "norm_by_std"})
"""Settings that make rewards of verdicts."""


class RunJudge(Protocol):
    """What a node asks: a `Judge` that is tried first, and closed."""

    async def judge(self, prompt: Prompt, rollout: Rollout) -> Verdict:
        """See `Judge.judge`."""
        ...

    async def check(self) -> None:
        """See `StyleJudge.check`."""
        ...

    def close(self) -> None:
        """End helpers. May be called twice."""
        ...


class _Questions:
    """Keys of what is judged."""

    def __init__(self, config: ScoreConfig) -> None:
        self._style = None if config.judge == "by_row" else config.judge
        self._settings = {name: value for name, value in deciding(config).items() if name not in _NO_MATTER}

    def ask(self, prompt: Prompt, rollout: Rollout) -> Asked:
        style = self._style or known_style(prompt.judge_style) or prompt.judge_style
        settings = self._settings if style == "llm" else self._settings | {"llm": None}
        read = [prompt.question, prompt.answers, rollout.response_text, whole_response(rollout.turns)]
        key = digest("judge", READING if style == "llm" else 0, style, settings, read)
        shown = {"question": prompt.question[:_SHOWN], "response": rollout.response_text[-_SHOWN:]}
        return Asked(key, f"judge {style}", canonical(shown))


class RecordingJudge:
    """Writes down what another judge says; what is there already is not asked again."""

    def __init__(self, judge: RunJudge, config: ScoreConfig, recording: Recording) -> None:
        self._judge, self._questions, self._recording = judge, _Questions(config), recording

    async def judge(self, prompt: Prompt, rollout: Rollout) -> Verdict:
        """See `Judge.judge`. That there is no verdict is never recorded.

        Raises:
            RecordingError: the file cannot be read or written.
            JudgeUnavailable: see there.
        """
        asked = self._questions.ask(prompt, rollout)
        answer = await asyncio.to_thread(self._recording.find, asked)
        if answer is None:
            verdict = await self._judge.judge(prompt, rollout)
            answer = await asyncio.to_thread(self._recording.keep, asked, write_answer(verdict))
        return cast(Verdict, read_answer(answer.body, self._recording.image))

    async def check(self) -> None:
        """See `StyleJudge.check`."""
        await self._judge.check()

    def close(self) -> None:
        """Close the other judge."""
        self._judge.close()


class ReplayingJudge:
    """Answers from a recording; nobody is asked."""

    def __init__(self, config: ScoreConfig, recording: Recording) -> None:
        self._questions, self._recording = _Questions(config), recording

    async def judge(self, prompt: Prompt, rollout: Rollout) -> Verdict:
        """What was said when it was recorded.

        Raises:
            RecordingError: nothing is known of it. It ends the run.
        """
        asked = self._questions.ask(prompt, rollout)
        answer = await asyncio.to_thread(self._recording.find, asked)
        if answer is None:
            raise missing(self._recording, asked, f"{prompt.uid}, rollout {rollout.index}")
        return cast(Verdict, read_answer(answer.body, self._recording.image))

    async def check(self) -> None:
        """There is nothing that could be missing."""

    def close(self) -> None:
        """Nothing runs."""
