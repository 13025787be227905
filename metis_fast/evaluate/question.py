"""What flows through an evaluation, in the order in which it flows: Question -> Mark -> Figure.

Worked example: row 17 of V*Bench becomes `Question(index="17", question="What is the colour of the scarf?", options={"A":
"red", ...}, answer="B", tags={"category": "direct_attributes"})`. The rule scorer reads B in a reply, which makes
`Mark(index="17", rollout=0, scorer="rule", value=1.0)`; the marks of all rows make `Figure(name="overall", value=0.864, ...)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from metis_fast.types import ImageBlob, Message, Prompt

Images = tuple[ImageBlob, ...]


def _no_images() -> Images:
    return ()


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """One row of a benchmark. Made by `files`, read by prompts, scorers and aggregates.

    index: the row's own name in its file, unique there.
    question: the text as the file has it. options: letter -> text, in order; empty where an answer is free.
    answer: the ground truth: a letter where there are options (several, "A, C", where a benchmark has such), else text.
    load_images: decodes the row's images from the file; nothing is kept. Use `images()`.
    tags: what figures are grouped by (category, version, cycle, ...).
    cluster: equal for rows whose results depend on each other, as they share an image, a problem or a composite.
    extra: what scorers and prompts need beyond that (answer_type, precision, unit, ...).
    """

    index: str
    question: str
    options: Mapping[str, str]
    answer: str
    cluster: str
    tags: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, str] = field(default_factory=dict)
    load_images: Callable[[], Images] = _no_images

    def images(self) -> Images:
        """The images, read from the file now.

        Raises:
            DataError: the file has changed, or a cell holds no image.
        """
        return self.load_images()

    @property
    def truth(self) -> str:
        """The answer for a reader: with the text of its option."""
        text = self.options.get(self.answer, "")
        return f"{self.answer}. {text}" if text else self.answer

    @property
    def asked(self) -> str:
        """The question for a reader, with its options; for judges that compare a reply with `truth`."""
        return "\n".join([self.question, *(f"{letter}. {text}" for letter, text in self.options.items())])


def as_prompt(question: Question, benchmark: str, text: str, system: str = "") -> Prompt:
    """What the agent is given: images first, then the text. `<image>` in a text is text.

    text: what the benchmark's prompt made of the question. system: "" for none, as in VLMEvalKit.

    Raises:
        DataError: as `Question.images`.
    """
    images = question.images()
    user = Message("user", "<image>" * len(images) + text, texts=(*("" for _ in images), text))
    first = [Message("system", system, texts=(system,))] if system else []
    return Prompt(
        uid=f"{benchmark}:{question.index}",
        data_source=benchmark,
        messages=(*first, user),
        images=images,
        ability=benchmark,
        answers=(question.answer,),
        judge_style="rule",
        question=question.asked,
        extra=dict(question.tags),
    )


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a scorer says of one reply.

    value: in [0, 1]; None where there is no verdict: the scorer cannot tell, or a judge failed. That is never a zero.
    reason: why there is none, or why the value is what it is ("" where that is plain). Reasons are counted: no numbers in them.
    """

    value: float | None
    reason: str = ""

    def __post_init__(self) -> None:
        if self.value is None and not self.reason:
            raise ValueError("a verdict without a value needs a reason")
        if self.value is not None and not (math.isfinite(self.value) and 0 <= self.value <= 1):
            raise ValueError(f"the value of a verdict: expected one from 0 to 1, got {self.value}")


RIGHT, WRONG = Verdict(1.0), Verdict(0.0)
JUDGE_FAILED = "the judge failed"
"""Begins the reason why there is no verdict where a judge did not answer."""


@dataclass(frozen=True, slots=True)
class Mark:
    """A verdict and whose it is. index: of the question; rollout: from 0; scorer: its name ("rule", "vlmeval", a judge's)."""

    index: str
    rollout: int
    scorer: str
    value: float | None
    reason: str = ""

    @staticmethod
    def of(question: Question, rollout: int, scorer: str, verdict: Verdict) -> Mark:
        """The mark that a verdict on a question makes."""
        return Mark(question.index, rollout, scorer, verdict.value, verdict.reason)

    @property
    def judge_failed(self) -> bool:
        """Whether a judge did not answer. One that answers what nobody can read did."""
        return self.value is None and self.reason.startswith(JUDGE_FAILED)


@dataclass(frozen=True, slots=True)
class Figure:
    """One number of a result. Made by `aggregates`.

    value: over the questions with a verdict, in [0, 1] (counts: any size); None where there is none.
    error: standard error, clustered; None where it cannot be had (one cluster, or a count).
    n: questions with a verdict; clusters: independent ones among them. missing: questions without any verdict.
    low, high: the value if every missing one were 0, or 1; None for counts.
    note: what a reader has to know, in one line.
    """

    name: str
    value: float | None
    error: float | None
    n: int
    clusters: int
    missing: int = 0
    low: float | None = None
    high: float | None = None
    note: str = ""
