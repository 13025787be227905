"""The judge of a run: finds the answer in a rollout and hands it to the matcher of its prompt's style."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from metis_fast.config import ScoreConfig
from metis_fast.errors import ConfigError, JudgeError
from metis_fast.judge_styles import STYLES, SYNONYMS, known_style
from metis_fast.score.choice import ChoiceMatcher
from metis_fast.score.mathematics import MathMatcher
from metis_fast.score.protocol import Cost, Judge, JudgeUnavailable, Match, Matcher
from metis_fast.score.response import first_answer, format_ok, last_answer, reference_format_ok, whole_response
from metis_fast.score.rule import RuleMatcher
from metis_fast.types import Prompt, Rollout, Verdict

__all__ = ["Judge", "JudgeUnavailable", "StyleJudge", "open_judge"]


def _open_llm(config: ScoreConfig) -> Matcher:
    # their client takes a second to import, which only runs that need it pay
    from metis_fast.score.llm import LlmMatcher
    from metis_fast.score.quorum import QuorumMatcher

    if not config.llm.judges:
        return LlmMatcher(config.llm)
    matchers: list[LlmMatcher] = []
    try:
        for own in config.llm.each():
            matchers.append(LlmMatcher(own))
    except JudgeError as error:
        for matcher in matchers:
            matcher.close()
        raise JudgeError(f"judge {len(matchers) + 1} of score.llm.judges: {error}") from None
    return QuorumMatcher(config.llm, matchers)


_MATCHERS: dict[str, Callable[[ScoreConfig], Matcher]] = {
    "rule": lambda config: RuleMatcher(config.number_tolerance),
    "choice": lambda config: ChoiceMatcher(config.number_tolerance),
    "math": lambda config: MathMatcher(config.number_tolerance),
    "llm": _open_llm,
}


def _known_style(style: str) -> str:
    name = known_style(style)
    if name is None:
        raise ConfigError(
            f"the data has judge style {style!r}; known styles are {', '.join(STYLES)} (or {', '.join(SYNONYMS)}); change "
            "reward_model.style of those rows, which `metis-fast data check` names, or set score.judge to one judge for all"
        )
    return name


class StyleJudge:
    """Judges by `prompt.judge_style`. Made by `open_judge`."""

    def __init__(self, matchers: Mapping[str, Matcher], config: ScoreConfig | None = None) -> None:
        """matchers: style, as prompts spell it -> what compares; styles may share one. config: says how a response is read."""
        config = config or ScoreConfig()
        self._matchers = dict(matchers)
        self._first, self._reference_format = config.answer == "first", config.format == "reference"
        self._distinct = list({id(matcher): matcher for matcher in matchers.values()}.values())

    async def judge(self, prompt: Prompt, rollout: Rollout) -> Verdict:
        """Judge what the policy itself wrote; observations do not count, unless `score.answer` or `score.format` asks for what
        the reference does. However the rollout ended, the same rules hold.

        Raises:
            JudgeUnavailable: there is no verdict.
            ConfigError: `open_judge` was not told of this prompt's style.
        """
        matcher = self._matcher(prompt)
        own, whole = rollout.response_text, whole_response(rollout.turns)
        answer = first_answer(whole) if self._first else last_answer(own)
        well_formed = reference_format_ok(whole) if self._reference_format else format_ok(own)
        asked = bool(answer) and not (self._first and _lacks_what_is_asked(prompt))
        match = await matcher.compare(prompt, answer) if asked else _wrong_unasked(answer)
        return Verdict(match.correct, well_formed, answer, match.judge, match.reason)

    async def compare(self, prompt: Prompt, answer: str) -> Match:
        """Judge an answer that was already found.

        Raises:
            As `judge`.
        """
        answer, matcher = answer.strip(), self._matcher(prompt)
        return await matcher.compare(prompt, answer) if answer else _wrong_unasked(answer)

    def _matcher(self, prompt: Prompt) -> Matcher:
        matcher = self._matchers.get(prompt.judge_style)
        if matcher is None:
            raise ConfigError(
                f"prompt {prompt.uid} has judge style {prompt.judge_style!r}, but this judge was opened for "
                f"{', '.join(sorted(self._matchers)) or 'none'}; give open_judge every style of the data"
            )
        return matcher

    @property
    def cost(self) -> Cost:
        """Of all that was asked so far."""
        return sum((matcher.cost for matcher in self._distinct), Cost())

    async def check(self) -> None:
        """Probe what can be missing (an LLM endpoint), before any rollout depends on it.

        Raises:
            JudgeError: one line that says what to set.
        """
        for matcher in self._distinct:
            await matcher.check()

    def close(self) -> None:
        """End helper processes and caches. May be called twice."""
        for matcher in self._distinct:
            matcher.close()


def _wrong_unasked(answer: str) -> Match:
    return Match(False, "", "no question or no ground truth" if answer else "no answer")


def _lacks_what_is_asked(prompt: Prompt) -> bool:
    """Whether the reference would give 0 without asking its judge, whatever the answer."""
    return not prompt.question.strip() or not any(truth.strip() for truth in prompt.answers)


def open_judge(config: ScoreConfig, styles: Collection[str]) -> StyleJudge:
    """The judge for prompts of the given styles (`Prompt.judge_style`, as in the data; synonyms are understood). Where
    `score.judge` names one, it judges them all.

    Raises:
        ConfigError: a style that is not known, unless `score.judge` overrides it.
        JudgeError: a style that needs configuration which is not there.
    """
    names = {style: _known_style(style) if config.judge == "by_row" else config.judge for style in styles}
    opened = {name: _MATCHERS[name](config) for name in sorted(set(names.values()))}
    return StyleJudge({style: opened[name] for style, name in names.items()}, config)
