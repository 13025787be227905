"""Judges that record, and that replay. A verdict is found by all that a judge reads: question, ground truths, the response."""

from __future__ import annotations

import asyncio
import json
from typing import Protocol, cast

from metis_fast.config import ScoreConfig, deciding
from metis_fast.errors import JudgeError, RecordingError
from metis_fast.judge_styles import known_style
from metis_fast.recording.asking import Asked, canonical, digest, read_answer, write_answer
from metis_fast.recording.file import Recording
from metis_fast.recording.tools import missing
from metis_fast.score.judge import StyleJudge
from metis_fast.score.llm import find_models
from metis_fast.score.llm_prompt import packaged_prompt
from metis_fast.score.llm_reply import READING
from metis_fast.score.protocol import JudgeUnavailable, Match
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
        # the content of one's own is compared where the file is opened: a replay need not have it
        prompt = digest(packaged_prompt()) if config.llm.prompt is None else "own"
        self._of_models = [self._settings["llm"], prompt]
        self.about_models = f"models of {digest(*self._of_models)[:16]}"

    def style(self, prompt: Prompt) -> str:
        """Which judge is asked."""
        return self._style or known_style(prompt.judge_style) or prompt.judge_style

    def ask(self, prompt: Prompt, rollout: Rollout) -> Asked:
        style = self.style(prompt)
        settings = self._settings | {"llm": self._of_models if style == "llm" else None}
        read = [prompt.question, prompt.answers, rollout.response_text, whole_response(rollout.turns)]
        key = digest("judge", READING if style == "llm" else 0, style, settings, read)
        shown = {"question": prompt.question[:_SHOWN], "response": rollout.response_text[-_SHOWN:]}
        return Asked(key, f"judge {style}", canonical(shown))

    def ask_answer(self, prompt: Prompt, answer: str) -> Asked:
        """Of an answer that nobody had to find."""
        style = self.style(prompt)
        settings = self._settings | {"llm": self._of_models if style == "llm" else None}
        key = digest("answer", READING if style == "llm" else 0, style, settings, prompt.question, prompt.answers, answer)
        shown = {"question": prompt.question[:_SHOWN], "answer": answer[-_SHOWN:]}
        return Asked(key, f"judge {style}", canonical(shown))


class _Models:
    """Where the settings name no model, keys do not say whose verdicts they are of; so a recording is of one."""

    def __init__(self, config: ScoreConfig, about: str, recording: Recording) -> None:
        self._config, self._about, self._recording = config, about, recording
        self._known = all(one.model for one in config.llm.each())
        self._naming: asyncio.Task[None] | None = None

    async def know(self) -> None:
        """Raises RecordingError where another one than before is served, JudgeUnavailable where none can be found."""
        if self._known:
            return
        loop = asyncio.get_running_loop()
        if self._naming is None or self._naming.done() or self._naming.get_loop() is not loop:
            self._naming = loop.create_task(self._compare())
        await asyncio.shield(self._naming)

    async def _compare(self) -> None:
        names = canonical(await find_models(self._config.llm))
        known = await asyncio.to_thread(self._recording.about, self._about)
        if known not in (None, names):
            raise RecordingError(
                f"{self._recording} holds verdicts of the model {known}, and {names} is served now, while the settings name "
                "none; name it in score.llm.model (or judges), or record into a new file"
            )
        await asyncio.to_thread(self._recording.describe, {self._about: names})
        self._known = True


def recorded_models(config: ScoreConfig, recording: Recording) -> list[str]:
    """The models whose verdicts a recording holds, where the settings name none; none: it does not say."""
    known = recording.about(_Questions(config).about_models)
    return [] if known is None else json.loads(known)


class RecordingJudge:
    """Writes down what another judge says; what is there already is not asked again."""

    def __init__(self, judge: RunJudge, config: ScoreConfig, recording: Recording) -> None:
        self._judge, self._questions, self._recording = judge, _Questions(config), recording
        self._config = config
        self._models = _Models(config, self._questions.about_models, recording)

    async def judge(self, prompt: Prompt, rollout: Rollout) -> Verdict:
        """See `Judge.judge`. That there is no verdict is never recorded.

        Raises:
            RecordingError: the file cannot be read or written, or a model that is not named is another one than before.
            JudgeUnavailable: see there.
        """
        if self._questions.style(prompt) == "llm":
            await self._models.know()
        asked = self._questions.ask(prompt, rollout)
        answer = await asyncio.to_thread(self._recording.find, asked)
        if answer is None:
            verdict = await self._judge.judge(prompt, rollout)
            answer = await asyncio.to_thread(self._recording.keep, asked, write_answer(verdict))
        return cast(Verdict, read_answer(answer.body, self._recording.image))

    async def check(self) -> None:
        """See `StyleJudge.check`."""
        await self._judge.check()
        if self._config.judge == "llm":
            try:
                await self._models.know()
            except JudgeUnavailable as error:
                raise JudgeError(str(error)) from None

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


class RecordedAnswers:
    """Answers that were already found, each judged and written down, or found in a recording."""

    def __init__(self, judge: StyleJudge | None, config: ScoreConfig, recording: Recording) -> None:
        """judge: who is asked about what is not known; None in a replay."""
        self._judge, self._questions, self._recording = judge, _Questions(config), recording
        self._models = _Models(config, self._questions.about_models, recording)

    async def compare(self, prompt: Prompt, answer: str) -> Match:
        """See `StyleJudge.compare`. That there is no verdict is never recorded.

        Raises:
            RecordingError: as of `RecordingJudge.judge` and `ReplayingJudge.judge`.
        """
        if self._judge is not None and self._questions.style(prompt) == "llm":
            await self._models.know()
        asked = self._questions.ask_answer(prompt, answer)
        known = await asyncio.to_thread(self._recording.find, asked)
        if known is None:
            if self._judge is None:
                raise missing(self._recording, asked, f"example {prompt.uid}")
            match = await self._judge.compare(prompt, answer)
            verdict = Verdict(match.correct, True, answer, match.judge, match.reason)
            known = await asyncio.to_thread(self._recording.keep, asked, write_answer(verdict))
        said = cast(Verdict, read_answer(known.body, self._recording.image))
        return Match(said.correct, said.judge, said.reason)
