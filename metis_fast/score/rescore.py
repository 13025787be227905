"""What `metis-fast judge rescore` does: stored rollouts of a run are judged again, and nothing is sampled.

The verdicts go to a file of JSON lines beside the store, which is never changed. Its first line says which judge they are of; a
line is appended for every verdict as it comes, so that whatever ends the job, the next one goes on behind it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from hashlib import sha256
from io import BufferedRandom
from pathlib import Path
from typing import Any

from metis_fast.config import ScoreConfig, deciding
from metis_fast.errors import ConfigError, DataError, JudgeError
from metis_fast.judge_styles import known_style
from metis_fast.recording.file import Recording
from metis_fast.recording.judge import RecordingJudge, ReplayingJudge, RunJudge, recorded_models
from metis_fast.rollout.store import StoredRollout, read_rollouts, stored_styles
from metis_fast.score.flow import in_turn
from metis_fast.score.judge import StyleJudge, open_judge
from metis_fast.score.llm import find_models
from metis_fast.score.llm_prompt import packaged_prompt
from metis_fast.score.llm_reply import READING
from metis_fast.score.protocol import Cost, Judge, JudgeUnavailable
from metis_fast.types import Outcome, Prompt, Verdict

_FORMAT = 1
_DECIDING = ("judge", "answer", "format", "number_tolerance", "llm")  # of `score`: what verdicts depend on
_FEWEST = 100  # judgements before a share of missing verdicts ends the job

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)  # some network file systems have none

Side = bool | None
"""Right, wrong, or None: no verdict."""


@dataclass(frozen=True, slots=True)
class Again:
    """A new verdict, as it stands in the file. part, prompt_uid, index: of which rollout. digest: of what was judged, in case
    the part is written again. correct, format_ok: None where the judge failed; then the reason says at what.
    """

    part: str
    prompt_uid: str
    index: int
    digest: str
    correct: bool | None
    format_ok: bool | None
    answer: str
    judge: str
    reason: str

    @property
    def key(self) -> tuple[str, str, int, str]:
        """What it is known by."""
        return self.part, self.prompt_uid, self.index, self.digest


@dataclass(frozen=True, slots=True)
class Changed:
    """A rollout of which the new verdict is another one. before, before_reason: who judged it in the run, and why."""

    style: str
    question: str
    answers: tuple[str, ...]
    was: Side
    before: str
    before_reason: str
    now: Again


@dataclass(frozen=True, slots=True)
class Rescoring:
    """counts: style -> (was, is) -> rollouts. formats: rollouts whose format is judged otherwise. broken: rollouts that were
    not judged, because the run's machinery broke them off. resumed: verdicts that were in the file already. failures: why
    there was no verdict -> how often. cost: of what was asked now.
    """

    path: Path
    counts: Mapping[str, Mapping[tuple[Side, Side], int]]
    changed: tuple[Changed, ...]
    formats: int
    broken: int
    resumed: int
    failures: Mapping[str, int]
    cost: Cost


def parts_of(run: Path) -> list[Path]:
    """The stored parts of a run.

    Raises:
        DataError: there is none.
    """
    parts = sorted((run / "rollouts").glob("*.parquet"))
    if not parts:
        raise DataError(f"{run}: expected stored rollouts in its folder `rollouts`, found none; give run.dir of a run")
    return parts


def default_out(run: Path, config: ScoreConfig) -> Path:
    """A file of its own for every judge."""
    return run / "verdicts" / f"{sha256(_header(config)).hexdigest()[:12]}.jsonl"


def _header(config: ScoreConfig) -> bytes:
    settings = {name: value for name, value in deciding(config).items() if name in _DECIDING}
    prompt = config.llm.prompt
    try:
        own = sha256(prompt.read_bytes() if prompt else packaged_prompt().encode()).hexdigest()
    except OSError:  # which opening the judge tells of
        own = str(prompt)
    tree = {"metis_fast.verdicts": _FORMAT, "reading": READING, "score": settings, "prompt": own}
    return json.dumps(tree, sort_keys=True).encode() + b"\n"


async def named(config: ScoreConfig, styles: Collection[str], recording: Recording | None = None) -> ScoreConfig:
    """`config` with the models that its endpoints serve where it names none: a verdict is a model's, not an address's.

    styles: of what is judged; without one for a model nothing is asked. recording: one that is replayed says whose verdicts it
    has.

    Raises:
        JudgeError: there is not one model and no other.
    """
    asked = {known_style(style) if config.judge == "by_row" else config.judge for style in styles}
    if "llm" not in asked or all(one.model for one in config.llm.each()):
        return config
    try:
        if recording is not None and not recording.writable:
            models = recorded_models(config, recording)
        else:
            models = await find_models(config.llm)
    except JudgeUnavailable as error:
        raise JudgeError(str(error)) from None
    if not models:  # a replay that will find nothing, unless nobody had to be asked
        return config
    peers = [peer.model_copy(update={"model": model}) for peer, model in zip(config.llm.judges, models, strict=False)]
    found = {"judges": tuple(peers)} if peers else {"model": models[0]}
    return config.model_copy(update={"llm": config.llm.model_copy(update=found)})


def count_rollouts(parts: Sequence[Path], config: ScoreConfig) -> Counter[str]:
    """Rollouts by the style of their prompt.

    Raises:
        ConfigError: an older version stored them without, and the settings name no judge for all.
        DataError: a part cannot be read.
    """
    styles = Counter[str]()
    for part in parts:
        found = stored_styles(part)
        if "" in found and config.judge == "by_row":
            raise ConfigError(
                f"{part} was stored by a version that kept no judge styles; name one for all rows, as score.judge=rule"
            )
        styles += found
    return styles


async def rescore(
    parts: Sequence[Path],
    styles: Counter[str],
    config: ScoreConfig,
    out: Path,
    on_done: Callable[[int], object] = lambda num: None,
    recording: Recording | None = None,
) -> Rescoring:
    """Judge every rollout of `parts` that `out` has no verdict of.

    styles: from `count_rollouts`. on_done: gets the number of rollouts that are done. recording: what it has is not asked, and
    what it does not have ends a replay.

    Raises:
        ConfigError: `out` holds verdicts of another judge, or another process writes to it.
        DataError: a part or `out` cannot be read.
        JudgeError: the judge does not work, or gives no verdict for more than `score.max_missing_share`.
        RecordingError: see `RecordingJudge` and `ReplayingJudge`.
    """
    found = await named(config, styles, recording)
    replays = recording is not None and not recording.writable
    asked = None if replays else open_judge(found, styles)
    judge: RunJudge = _recorded(asked, config, recording)
    config = found
    try:
        await judge.check()
        before = asked.cost if asked is not None else Cost()
        with _opened(out, config) as (file, known):
            tally = _Tally(config, out, known)

            async def ask(one: tuple[Path, StoredRollout]) -> tuple[StoredRollout, Again]:
                part, stored = one
                return stored, await _judged(judge, part, stored)

            async for stored, again in in_turn(tally.pending(parts, on_done), ask, 2 * config.llm.concurrency):
                file.write(json.dumps(asdict(again)).encode() + b"\n")
                file.flush()
                tally.add(stored, again)
                tally.stop_if_dead(again)
                on_done(1)
            os.fsync(file.fileno())
        return tally.result(asked.cost - before if asked is not None else Cost())
    finally:
        judge.close()


def _recorded(judge: StyleJudge | None, config: ScoreConfig, recording: Recording | None) -> RunJudge:
    """config: as in a run, without models that were found: so its verdicts have the keys of the run's."""
    if recording is not None:
        return ReplayingJudge(config, recording) if judge is None else RecordingJudge(judge, config, recording)
    assert judge is not None
    return judge


async def _judged(judge: Judge, part: Path, stored: StoredRollout) -> Again:
    rollout = stored.rollout
    prompt = Prompt(rollout.prompt_uid, "stored", (), (), stored.ability, stored.answers, stored.judge_style, stored.question)
    place = part.stem, rollout.prompt_uid, rollout.index, _digest(stored)
    try:
        verdict = await judge.judge(prompt, rollout)
    except JudgeUnavailable as error:
        return Again(*place, None, None, "", "", error.reason)
    return Again(*place, verdict.correct, verdict.format_ok, verdict.answer, verdict.judge, verdict.reason)


def _digest(stored: StoredRollout) -> str:
    judged = [stored.judge_style, stored.question, stored.answers, stored.text]
    return sha256(json.dumps(judged).encode()).hexdigest()[:16]


class _Tally:
    """Counts verdicts, old and new ones. Of several of one rollout in the file the last one counts."""

    def __init__(self, config: ScoreConfig, out: Path, known: Sequence[Again]) -> None:
        self._config, self._out = config, out
        self._known = {one.key: one for one in known}
        self._counts: dict[str, Counter[tuple[Side, Side]]] = {}
        self._changed: list[Changed] = []
        self._failures = Counter[str]()
        self._formats = self._broken = self._resumed = 0
        self._asked = 0  # now, of rollouts with an answer; what the file has says nothing of how the judge is

    def pending(self, parts: Sequence[Path], on_done: Callable[[int], object]) -> Iterator[tuple[Path, StoredRollout]]:
        """What is still to be judged. The rest is counted on the way. A judge that failed is asked again."""
        for part in parts:
            for stored in read_rollouts(part):
                rollout = stored.rollout
                known = self._known.get((part.stem, rollout.prompt_uid, rollout.index, _digest(stored)))
                if rollout.outcome is Outcome.INFRASTRUCTURE_ERROR:
                    self._broken += 1
                elif known is not None and known.correct is not None:
                    self._resumed += 1
                    self.add(stored, known)
                else:
                    yield part, stored
                    continue
                on_done(1)

    def add(self, stored: StoredRollout, again: Again) -> None:
        """A rollout that is done."""
        verdict = stored.score.verdict
        was = None if verdict is None else verdict.correct
        style = stored.judge_style if self._config.judge == "by_row" else self._config.judge
        self._counts.setdefault(style, Counter())[was, again.correct] += 1
        if again.correct is None:
            self._failures[again.reason] += 1
        if verdict is not None and again.format_ok is not None:
            self._formats += verdict.format_ok != again.format_ok
        if was != again.correct:
            who, why = _before(stored, verdict)
            self._changed.append(Changed(style, stored.question, stored.answers, was, who, why, again))

    def stop_if_dead(self, again: Again) -> None:
        """Raise JudgeError if too many verdicts are missing of those that were asked for now. again: the last of them."""
        self._asked += bool(again.answer) or again.correct is None
        failed, config = self._failures.total(), self._config
        if self._asked >= _FEWEST and failed > config.max_missing_share * self._asked:
            told = " | ".join(f"{count} x {reason}" for reason, count in self._failures.most_common(3))
            raise JudgeError(
                f"no verdict for {failed} of {self._asked} rollouts with an answer ({told}), more than "
                f"score.max_missing_share={config.max_missing_share:g}; mend the judge or raise that setting, then run it again"
            )

    def result(self, cost: Cost) -> Rescoring:
        """Of all that was added."""
        return Rescoring(
            path=self._out,
            counts={style: dict(self._counts[style]) for style in sorted(self._counts)},
            changed=tuple(self._changed),
            formats=self._formats,
            broken=self._broken,
            resumed=self._resumed,
            failures=dict(self._failures.most_common()),
            cost=cost,
        )


def _before(stored: StoredRollout, verdict: Verdict | None) -> tuple[str, str]:
    return ("", stored.score.no_verdict) if verdict is None else (verdict.judge, verdict.reason)


@contextmanager
def _opened(path: Path, config: ScoreConfig) -> Iterator[tuple[BufferedRandom, list[Again]]]:
    """A file to append to, and what it holds. A last line that was cut short is dropped.

    Raises:
        ConfigError: it holds verdicts of another judge, or another process writes to it.
        DataError: it is no such file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another process writes to {path}; wait until it has ended, or set another --out") from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        file.seek(0)
        lines = file.read().splitlines(keepends=True)
        if lines and not lines[-1].endswith(b"\n"):
            file.truncate(sum(map(len, lines[:-1])))
            lines = lines[:-1]
        header = _header(config)
        if not lines:
            file.write(header)
        elif lines[0] != header:
            raise ConfigError(f"{path} holds {_difference(lines[0], header)}; set another --out, or leave it out")
        yield file, [_again(path, number, line) for number, line in enumerate(lines[1:], start=2)]


def _difference(found: bytes, expected: bytes) -> str:
    try:
        then, now = json.loads(found), json.loads(expected)
        then, now = (then["score"] | {"prompt": then["prompt"]}, now["score"] | {"prompt": now["prompt"]})
        names = [name for name in now if then.get(name) != now[name]]
    except (ValueError, KeyError, TypeError):
        return "something else than verdicts"
    return f"verdicts of another judge (score.{', score.'.join(names)})" if names else "verdicts of another version"


def _again(path: Path, number: int, line: bytes) -> Again:
    try:
        tree: Any = json.loads(line)
        return Again(**tree)
    except (ValueError, TypeError) as error:
        raise DataError(
            f"{path}:{number}: expected a verdict, got {error!r}; move the file away, or set another --out"
        ) from None
