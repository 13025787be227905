"""MathVista testmini: 1,000 questions, some with options; free answers are integers, decimals, lists or texts."""

from __future__ import annotations

from collections.abc import Sequence

from metis_fast.data.row import MisfitError
from metis_fast.evaluate.aggregates import Unit, by_tag, mean, values_of
from metis_fast.evaluate.asking import checked_letter, plain_prompt
from metis_fast.evaluate.benchmark import Benchmark, PublishedFile
from metis_fast.evaluate.files.table import Row, as_text
from metis_fast.evaluate.question import Figure, Mark, Question, Verdict
from metis_fast.evaluate.scorers import judges, options, values, vlmeval

_SEPARATOR = "\n"
_RULES = {"integer": values.number_rule, "float": values.number_rule, "list": values.list_rule, "text": values.text_rule}


def _questions(row: Row) -> list[Question]:
    kind, answer_type = row.text("question_type"), row.text("answer_type")
    metadata = row.struct("metadata")
    choices = row.texts("choices")
    offered = {chr(ord("A") + place): text for place, text in enumerate(choices)} if kind == "multi_choice" else {}
    answer = row.text("answer")
    if offered:
        answer = checked_letter(row, offered, "answer_option") if row.value("answer_option") else _letter_of(answer, offered)
    elif answer_type not in _RULES:
        raise MisfitError("answer_type", f"one of {', '.join(_RULES)}", answer_type)
    skills = row.texts("skills") or [as_text(skill) for skill in _listed(metadata.get("skills"))]
    tags = {
        "task": row.text_or(as_text(metadata.get("task", "")), "task"),
        "skills": _SEPARATOR.join(skills),
        "answer_type": "option" if offered else answer_type,
    }
    extra = {"answer_type": answer_type}
    extra |= {name: row.text(name) for name in ("precision", "unit") if row.value(name) is not None}
    index = row.text("index", "pid")
    # `query` is the ready prompt; in VLMEvalKit's file it stands in `question`
    return [Question(index, row.text("query", "question"), offered, answer, row.picture, tags, extra, row.load_images)]


def _listed(value: object) -> list[object]:
    return value if isinstance(value, list) else []


def _letter_of(answer: str, offered: dict[str, str]) -> str:
    found = [letter for letter, text in offered.items() if text == answer]
    if not found:
        raise MisfitError("answer", "the text of one of the choices", answer)
    return found[0]


def _rule(question: Question, reply: str) -> Verdict:
    if question.options:
        return options.option_rule(question, reply)
    return _RULES[question.extra["answer_type"]](question, reply)


def _aggregate(questions: Sequence[Question], marks: Sequence[Mark]) -> tuple[Figure, ...]:
    value = values_of(questions, marks)
    asked = [question for question in questions if question.index in value]
    units = [Unit(value[q.index], q.cluster, q.tags) for q in asked]
    by_skill = [
        Unit(value[q.index], q.cluster, {"skill": skill})
        for q in asked
        for skill in q.tags["skills"].split(_SEPARATOR)
        if skill
    ]
    return (
        mean("overall", units),
        *by_tag(units, "task", prefix="task/"),
        *by_tag(by_skill, "skill", prefix="skill/"),
        *by_tag(units, "answer_type", prefix="answer/"),
    )


MATHVISTA = Benchmark(
    name="mathvista",
    aliases=("mathvista-mini", "mathvista-testmini"),
    title="MathVista mini",
    files=(
        PublishedFile("MathVista_MINI", 1000, "VLMEvalKit", ("f199b98e178e5a2a20e7048f5dcb0464",)),
        PublishedFile("MathVista testmini", 1000, "AI4Math/MathVista"),
    ),
    columns=(("index", "pid"), "question", "answer", "question_type", "answer_type", "choices"),
    questions=_questions,
    prompts={"vlmeval": plain_prompt},
    scorers={"rule": _rule, "vlmeval": vlmeval.mathvista_rule},
    judges={"vlmeval": judges.mathvista_judge},
    aggregate=_aggregate,
    footnote="In VLMEvalKit, free answers that are texts or lists can never be right; in our rule they can.",
)
