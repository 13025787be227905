"""What a benchmark is made of. `benchmarks/` has one small file for each."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from metis_fast.evaluate.files.table import Row
from metis_fast.evaluate.question import Figure, Mark, Question, Verdict

Prompt = Callable[[Question], str]
"""The text that the model is given, behind the images."""
Scorer = Callable[[Question, str], Verdict]
"""What a rule says of a reply. It takes milliseconds, or a second for mathematics: call it outside of an event loop."""


@dataclass(frozen=True, slots=True)
class JudgeForm:
    """What an LLM is asked about a reply, one call after the other, and what its answers mean.

    calls: each makes a user message of (question, reply, answers so far); None: no call is needed.
    read: the verdict of (question, reply, answers). An answer that it cannot read gives a verdict without a value: ask again,
        up to `tries` times, at temperatures `heat`, 2 `heat`, ...; then that is the verdict. Nothing is drawn at random.
    system: a system message, "" for none.
    """

    calls: tuple[Callable[[Question, str, Sequence[str]], str | None], ...]
    read: Callable[[Question, str, Sequence[str]], Verdict]
    tries: int = 3
    heat: float = 0.0
    system: str = ""


@dataclass(frozen=True, slots=True)
class PublishedFile:
    """A file that users have.

    name: as VLMEvalKit or the hub calls it, without its ending. rows: None where nobody says. md5: known ones (several where
    the file was published anew). source: where it comes from. built: VLMEvalKit makes it on the user's machine, so that
    another MD5 is no fault.
    """

    name: str
    rows: int | None
    source: str
    md5: tuple[str, ...] = ()
    built: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Benchmark:
    """One benchmark.

    name: as configs and commands have it; aliases: other names of it. title: as papers have it.
    columns: names of columns of which one each is needed; a tuple of several means any of them.
    questions: what one row becomes (mostly one). Raises MisfitError where a cell does not fit.
    prompts: by name; the first is the default. scorers: rules by name; "rule" is ours. judges: LLM forms by name.
    needs_image: whether a row without an image does not fit.
    aggregate: figures of questions and the marks of one scorer; the first figure is the headline.
    footnote: what the paper leaves open, and what a reader of a score has to know.
    """

    name: str
    title: str
    files: tuple[PublishedFile, ...]
    columns: tuple[str | tuple[str, ...], ...]
    questions: Callable[[Row], Sequence[Question]]
    prompts: Mapping[str, Prompt]
    scorers: Mapping[str, Scorer]
    aggregate: Callable[[Sequence[Question], Sequence[Mark]], tuple[Figure, ...]]
    judges: Mapping[str, JudgeForm] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    needs_image: bool = True
    footnote: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        """All names by which it is known, those of its files included."""
        return (self.name, *self.aliases, *(file.name for file in self.files))
