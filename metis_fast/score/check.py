"""What `metis-fast judge check` finds: a judge against examples of which somebody knows whether they are right."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

from metis_fast.config import ScoreConfig
from metis_fast.errors import ConfigError, one_line
from metis_fast.judge_styles import STYLES, known_style
from metis_fast.recording.file import Recording
from metis_fast.recording.judge import RecordedAnswers
from metis_fast.score.examples import Example
from metis_fast.score.flow import in_turn
from metis_fast.score.judge import StyleJudge, open_judge
from metis_fast.score.protocol import Cost, JudgeUnavailable, Match

_MOST_SHOWN = 20  # disagreements, in the text for people


@dataclass(frozen=True, slots=True)
class Confusion:
    """Of one style. missed: right examples that the judge calls wrong. invented: wrong ones that it calls right, each a false
    reward. unjudged: it gave no verdict.
    """

    right_said_right: int = 0
    missed: int = 0
    invented: int = 0
    wrong_said_wrong: int = 0
    unjudged: int = 0

    @property
    def total(self) -> int:
        """All examples."""
        return self.right_said_right + self.missed + self.invented + self.wrong_said_wrong + self.unjudged


@dataclass(frozen=True, slots=True)
class Disagreement:
    """An example that the judge sees otherwise than its label. judge, reason: as in `Verdict`."""

    example: Example
    judge: str
    reason: str


@dataclass(frozen=True, slots=True)
class JudgeCheck:
    """What a judge says of examples.

    styles: known style -> its table. failures: why there was no verdict -> how often. first_failures: the same -> the first of
    them in full, with what to do. contradictions: lines of examples of which it said both, asked several times. cost: of all
    that was asked. wall_s: seconds that it took.
    """

    styles: Mapping[str, Confusion]
    disagreements: tuple[Disagreement, ...]
    failures: Mapping[str, int]
    first_failures: Mapping[str, str]
    contradictions: tuple[int, ...]
    cost: Cost
    wall_s: float

    @property
    def exit_code(self) -> int:
        """For the command line: 1 if the judge is not always right, else 0."""
        return 1 if self.disagreements or self.failures or self.contradictions else 0


async def check_examples(
    examples: Sequence[Example],
    config: ScoreConfig,
    repeats: int = 1,
    on_done: Callable[[int], object] = lambda num: None,
    recording: Recording | None = None,
) -> JudgeCheck:
    """Ask the judge of `config` about every example.

    repeats: how often each is asked, past all caches if more than once: of a judge that contradicts itself no single verdict
        is one. Tables are of the first time. on_done: gets the number of judgements that were finished. recording: what it
        has is not asked, and what it does not have ends a replay.

    Raises:
        ConfigError, JudgeError: the judge cannot be opened, or its cache not be used; or a recording, which has one answer for
            each question, is to be asked several times.
        RecordingError: see `RecordedAnswers.compare`.
    """
    if repeats > 1 and recording is not None:
        raise ConfigError(
            f"--repeats {repeats} asks anew each time, and {recording} has one answer for each question; leave one of them out"
        )
    if repeats > 1:
        config = config.model_copy(update={"llm": config.llm.model_copy(update={"cache": None})})
    began, cost = time.perf_counter(), Cost()
    said: list[dict[int, Match | JudgeUnavailable]] = []
    for _ in range(repeats):
        if recording is not None and not recording.writable:
            said.append(await _asked(RecordedAnswers(None, config, recording), examples, config.llm.concurrency, on_done))
            continue
        judge = open_judge(config, {example.style for example in examples})  # a new one: each remembers what it said
        try:
            asked = judge if recording is None else RecordedAnswers(judge, config, recording)
            said.append(await _asked(asked, examples, config.llm.concurrency, on_done))
            cost += judge.cost
        finally:
            judge.close()
    return _check(examples, config, said, cost, time.perf_counter() - began)


async def _asked(
    judge: StyleJudge | RecordedAnswers, examples: Sequence[Example], concurrency: int, on_done: Callable[[int], object]
) -> dict[int, Match | JudgeUnavailable]:
    """By the number of the example."""

    async def ask(number: int) -> tuple[int, Match | JudgeUnavailable]:
        example = examples[number]
        try:
            return number, await judge.compare(example.prompt(), example.answer)
        except JudgeUnavailable as error:
            return number, error

    found = {}
    async for number, one in in_turn(range(len(examples)), ask, 2 * concurrency):
        found[number] = one
        on_done(1)
    return found


def _check(
    examples: Sequence[Example],
    config: ScoreConfig,
    said: Sequence[Mapping[int, Match | JudgeUnavailable]],
    cost: Cost,
    wall_s: float,
) -> JudgeCheck:
    tables: dict[str, Counter[str]] = {}
    disagreements, failures, contradictions = [], Counter[str](), []
    first_failures: dict[str, str] = {}
    for number, example in enumerate(examples):
        style = (known_style(example.style) or example.style) if config.judge == "by_row" else config.judge
        one = said[0][number]
        tables.setdefault(style, Counter())[_cell(example.label, one)] += 1
        if isinstance(one, JudgeUnavailable):
            failures[one.reason] += 1
            first_failures.setdefault(one.reason, one_line(one))
        elif one.correct != example.label:
            disagreements.append(Disagreement(example, one.judge, one.reason))
        every = [again[number] for again in said]
        if len({own.correct for own in every if isinstance(own, Match)}) > 1:
            contradictions.append(example.line)
    return JudgeCheck(
        styles={style: Confusion(**tables[style]) for style in STYLES if style in tables},
        disagreements=tuple(disagreements),
        failures=dict(failures.most_common()),
        first_failures=first_failures,
        contradictions=tuple(contradictions),
        cost=cost,
        wall_s=wall_s,
    )


def _cell(label: bool, said: Match | JudgeUnavailable) -> str:
    if isinstance(said, JudgeUnavailable):
        return "unjudged"
    if label:
        return "right_said_right" if said.correct else "missed"
    return "invented" if said.correct else "wrong_said_wrong"


def render_text(check: JudgeCheck) -> str:
    """For people: a line for each disagreement, the table, failures, contradictions and cost."""
    lines = [_line(one) for one in check.disagreements[:_MOST_SHOWN]]
    if len(check.disagreements) > _MOST_SHOWN:
        lines.append(f"and {len(check.disagreements) - _MOST_SHOWN} more; --json has them all")
    lines.append(f"{'':8} {'examples':>8}  {'right, judged':>21}  {'wrong, judged':>21}  {'no verdict':>10}")
    lines.append(f"{'':17}  {'right':>10} {'wrong':>10}  {'right':>10} {'wrong':>10}")
    for style, table in check.styles.items():
        cells = f"{table.right_said_right:10} {table.missed:10}  {table.invented:10} {table.wrong_said_wrong:10}"
        lines.append(f"{style:8} {table.total:8}  {cells}  {table.unjudged:10}")
    for reason, count in check.failures.items():
        lines.append(f"no verdict: {count} x {reason}")
        if check.first_failures[reason] != reason:
            lines.append(f"  the first: {check.first_failures[reason]}")
    if check.contradictions:
        shown = ", ".join(map(str, check.contradictions[:_MOST_SHOWN]))
        lines.append(f"contradicted itself: {len(check.contradictions)} examples, of lines {shown}")
    cost = check.cost
    tokens = f"{cost.prompt_tokens} tokens in, {cost.completion_tokens} out, " if cost.requests else ""
    lines.append(f"cost: {cost.requests} requests, {tokens}{check.wall_s:.1f} s ({cost.seconds:.1f} s of requests)")
    return "\n".join(lines)


def _line(one: Disagreement) -> str:
    example = one.example
    label = "right" if example.label else "wrong"
    truths = ", ".join(map(_short, example.truths))
    return (
        f"line {example.line}: {example.style}: {_short(example.answer)} for {truths} is {label}, but "
        f"{one.judge or 'no judge was asked'}: {one.reason}"
    )


def _short(text: str) -> str:
    return repr(text) if len(text) <= 80 else f"{text[:80]!r}..."


def render_json(check: JudgeCheck) -> str:
    """For programs: the fields of `JudgeCheck`."""
    return json.dumps(asdict(check), indent=2)
