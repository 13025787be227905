"""TreeBench: 405 questions on dense scenes, in ten subtasks, each with the boxes of what it is about."""

from __future__ import annotations

import re
from collections.abc import Sequence

from metis_fast.data.row import MisfitError
from metis_fast.evaluate.aggregates import by_tag, mean, units_of
from metis_fast.evaluate.asking import LETTER, checked_letter, choice_prompt, full_choice_prompt, letter_options
from metis_fast.evaluate.benchmark import Benchmark, PublishedFile
from metis_fast.evaluate.files.table import Row, as_text, spelt
from metis_fast.evaluate.question import Figure, Mark, Question, Verdict
from metis_fast.evaluate.scorers import options, vlmeval

_SUBTASKS = (
    *("Perception/Attributes", "Perception/Material", "Perception/Physical State", "Perception/Object Retrieval"),
    *("Perception/OCR", "Reasoning/Perspective Transform", "Reasoning/Ordering", "Reasoning/Contact and Occlusion"),
    *("Reasoning/Spatial Containment", "Reasoning/Comparison"),
)
_THOUGHT = re.compile(r"<think>(.*?)</think>", re.DOTALL)
_BOX = re.compile(r"<box>\s*\[(\d+),(\d+),(\d+),(\d+)\].*?</box>", re.DOTALL)
Box = tuple[float, float, float, float]


def _questions(row: Row) -> list[Question]:
    offered = letter_options(row)
    letter = checked_letter(row, offered, "answer")
    category = row.text("category")
    if "/" not in category:
        raise MisfitError("category", "a task and a subtask, like Perception/OCR", category)
    tags = {"category": category, "task": category.partition("/")[0]}
    boxes = row.value("target_instances")
    extra = {} if boxes is None else {"boxes": as_text(boxes)}
    hint = {"hint": row.text("hint")} if row.value("hint") is not None else {}
    return [
        Question(row.text("index"), row.text("question"), offered, letter, row.picture, tags, extra | hint, row.load_images)
    ]


def box_overlap(question: Question, reply: str) -> Verdict:
    """Mean over the true boxes of the best overlap (intersection over union) with a `<box>[x1,y1,x2,y2]</box>` in `<think>`.

    As VLMEvalKit has it: of a reply without <think> all counts; without a box it is 0; boxes where none are true make 1.
    """
    if "boxes" not in question.extra:
        return Verdict(None, "the file has no boxes")
    thought = _THOUGHT.search(reply)
    found = [box for numbers in _BOX.findall(thought[1] if thought else reply) if (box := _box(numbers)) is not None]
    if not found:
        return Verdict(0.0, "no box in the reply")
    truth = _true_boxes(question.extra["boxes"])
    if truth is None:
        return Verdict(None, "the true boxes cannot be read")
    return Verdict(sum(max(_overlap(one, box) for box in found) for one in truth) / len(truth) if truth else 1.0)


def _box(numbers: Sequence[str]) -> Box | None:
    left, upper, right, lower = map(float, numbers)
    return (left, upper, right, lower) if left < right and upper < lower else None


def _true_boxes(text: str) -> list[Box] | None:
    tree = spelt(text)
    if not isinstance(tree, list) or not all(isinstance(box, list | tuple) and len(box) == 4 for box in tree):
        return None
    return [(float(left), float(upper), float(right), float(lower)) for left, upper, right, lower in tree]


def _overlap(one: Box, other: Box) -> float:
    width = max(0.0, min(one[2], other[2]) - max(one[0], other[0]))
    height = max(0.0, min(one[3], other[3]) - max(one[1], other[1]))
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (one, other))
    union = areas - width * height
    return width * height / union if union > 0 else 0.0


def _aggregate(questions: Sequence[Question], marks: Sequence[Mark]) -> tuple[Figure, ...]:
    units = units_of(questions, marks)
    if marks and marks[0].scorer == "iou":
        return (mean("mIoU", units),)
    return (mean("overall", units), *by_tag(units, "task"), *by_tag(units, "category", _SUBTASKS))


TREEBENCH = Benchmark(
    name="treebench",
    title="TreeBench",
    files=(PublishedFile("TreeBench", 405, "HaochenWang/TreeBench"),),
    columns=("index", "question", "A", "B", "answer", "category", "image"),
    questions=_questions,
    prompts={"vlmeval": choice_prompt(LETTER), "full": full_choice_prompt(LETTER)},
    scorers={"rule": options.option_rule, "vlmeval": vlmeval.first_letter_rule, "iou": box_overlap},
    aggregate=_aggregate,
    footnote="No MD5 is published. VLMEvalKit takes the first letter A to E of any word, and asks no judge.",
)
