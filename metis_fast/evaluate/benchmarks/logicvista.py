"""LogicVista: 448 puzzles of five kinds of reasoning; the options stand in the picture, and several may be right."""

from __future__ import annotations

from collections.abc import Sequence

from metis_fast.data.row import MisfitError
from metis_fast.evaluate.aggregates import Unit, by_tag, mean, values_of
from metis_fast.evaluate.asking import plain_prompt
from metis_fast.evaluate.benchmark import Benchmark, PublishedFile
from metis_fast.evaluate.files.table import Row
from metis_fast.evaluate.question import Figure, Mark, Question
from metis_fast.evaluate.scorers import judges, options

_SKILLS = ("inductive", "deductive", "numerical", "spatial", "mechanical")


def _questions(row: Row) -> list[Question]:
    answer = row.text("answer").strip()
    if not all(len(part) == 1 and part.isalpha() for part in answer.split(", ")):
        raise MisfitError("answer", "a letter, or several like A, C", answer)
    tags = {"skill": ", ".join(row.texts("skill")) if isinstance(row.value("skill"), list) else row.text("skill")}
    index = row.text_or(str(row.number), "index", "uid", "id")
    return [Question(index, row.text("question"), {}, answer, row.picture or index, tags, {}, row.load_images)]


def _aggregate(questions: Sequence[Question], marks: Sequence[Mark]) -> tuple[Figure, ...]:
    value = values_of(questions, marks)
    asked = [question for question in questions if question.index in value]
    by_skill = [
        Unit(value[q.index], q.cluster, {"skill": skill}) for q in asked for skill in _SKILLS if skill in q.tags["skill"]
    ]
    return (
        mean("overall", [Unit(value[q.index], q.cluster, q.tags) for q in asked]),
        *by_tag(by_skill, "skill", _SKILLS, prefix="skill/"),
    )


LOGICVISTA = Benchmark(
    name="logicvista",
    title="LogicVista",
    files=(
        PublishedFile("LogicVista", 448, "VLMEvalKit", ("41c5d33adf33765c399e0e6ae588c061",)),
        PublishedFile("LogicVista test", 448, "lscpku/LogicVista"),
    ),
    columns=("question", "answer", "skill"),
    questions=_questions,
    prompts={"vlmeval": plain_prompt},
    scorers={"rule": options.letters_rule},
    judges={"vlmeval": judges.letters_judge},
    aggregate=_aggregate,
    footnote="VLMEvalKit has no rule: without a judge it gives no score at all.",
)
