"""DynaMath: 501 problems in ten variants each, which differ in numbers, functions or geometry."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from metis_fast.data.row import MisfitError
from metis_fast.evaluate.aggregates import by_tag, grouped_units, mean, units_of
from metis_fast.evaluate.benchmark import Benchmark, PublishedFile
from metis_fast.evaluate.files.table import Row
from metis_fast.evaluate.question import Figure, Mark, Question, Verdict
from metis_fast.evaluate.scorers import judges, options, values, vlmeval
from metis_fast.evaluate.scorers.reply import final_answer

_VARIANTS = 10
_TYPES = ("float", "multiple choice", "text")
_VARIANT_FILE = re.compile(r"sample_variant(\d+)")
_WITHIN = "0.001"
_FORMS = {
    "multiple choice": "Provide the corresponing choice option in the 'short answer' key, such as 'A', 'B', 'C', or 'D'.",
    "float": "Format the answer as a three-digit floating-point number and provide it in the 'short answer' key.",
    "text": "Float numbers in the answer should be formatted as three-digit floating-point numbers.",
}
_GUIDE = (
    "\n## Answer Instruction Please provide an answer to the question outlined above. Your response should adhere to the "
    "following JSON format, which includes two keys: 'solution' and 'short answer'. The 'solution' key can contain detailed "
    "steps needed to solve the question, and the 'short answer' key should provide a concise response. {form}\n\n"
    "Example of expected JSON response format:\n\n"
)
_EXAMPLE = json.dumps({"solution": "[Detailed step-by-step explanation]", "short answer": "[Concise Answer]"}, indent=4)


def _questions(row: Row) -> list[Question]:
    kind = row.text("answer_type")
    if kind not in _TYPES:
        raise MisfitError("answer_type", f"one of {', '.join(_TYPES)}", kind)
    from_name = _VARIANT_FILE.search(row.file.name)
    problem = row.text("qid", "id", "question_id")
    variant = row.text_or(from_name[1] if from_name else "", "varid", "variant")
    if not variant:
        raise MisfitError("varid", "the number of the variant, here or as sample_variant3 in the name of the file", None)
    tags = {"subject": row.text("subject"), "level": row.text("knowledge_level"), "variant": variant}
    index = row.text_or(f"{problem}/{variant}", "index")
    extra = {"answer_type": kind} | ({"within": _WITHIN} if kind == "float" else {})
    return [
        Question(
            index, row.text("question"), {}, row.text("answer", "ground_truth").strip(), problem, tags, extra, row.load_images
        )
    ]


def _prompt(question: Question) -> str:
    return _plain(question) + _GUIDE.format(form=_FORMS[question.extra["answer_type"]]) + _EXAMPLE


def _plain(question: Question) -> str:
    return f"## Question\n {question.question}"


def _rule(question: Question, reply: str) -> Verdict:
    """The short answer of the JSON that was asked for, wherever it stands, else the reply's answer as others give it."""
    short = _short_answer(final_answer(reply).text) or _short_answer(reply)
    text = f"<answer>{short}</answer>" if short else reply
    match question.extra["answer_type"]:
        case "float":
            return values.number_rule(question, text)
        case "multiple choice":
            return options.letters_rule(question, text)
        case _:
            return values.text_rule(question, text)


def _short_answer(text: str) -> str:
    start, stop = text.find("{"), text.rfind("}")
    try:
        tree = json.loads(text[start : stop + 1], strict=False) if 0 <= start < stop else None
    except (ValueError, RecursionError):  # of thousands of braces
        return ""
    short = tree.get("short answer") if isinstance(tree, dict) else None
    return "" if short is None or isinstance(short, dict | list) else str(short).strip()


def _aggregate(questions: Sequence[Question], marks: Sequence[Mark]) -> tuple[Figure, ...]:
    units = units_of(questions, marks)
    problems = grouped_units(
        questions, marks, lambda q: q.cluster, lambda right: min(right.values()), lambda q: q.tags["variant"]
    )
    num = {variant: sum(q.tags["variant"] == variant for q in questions) for variant in {q.tags["variant"] for q in questions}}
    note = "" if len(num) == _VARIANTS else f"over {len(num)} variants, and the whole has {_VARIANTS}"
    return (
        mean("average", units, note),
        mean("worst case", problems, "; ".join(filter(None, ("all variants of a problem right", note)))),
        *by_tag(units, "subject", prefix="average/subject/"),
        *by_tag(units, "level", prefix="average/level/"),
        *by_tag(problems, "subject", prefix="worst case/subject/"),
        *by_tag(problems, "level", prefix="worst case/level/"),
    )


DYNAMATH = Benchmark(
    name="dynamath",
    title="DynaMath",
    files=(
        PublishedFile("DynaMath", 5010, "VLMEvalKit", ("b8425ad9a7114571fc9366e013699494",)),
        PublishedFile("DynaMath sample_variant", 5010, "DynaMath/DynaMath_Sample"),
    ),
    columns=("question", ("answer", "ground_truth"), "answer_type", "subject", "knowledge_level", ("qid", "id", "question_id")),
    questions=_questions,
    prompts={"vlmeval": _prompt, "noprompt": _plain},
    scorers={"rule": _rule, "vlmeval": vlmeval.dynamath_rule},
    judges={"vlmeval": judges.dynamath_judge},
    aggregate=_aggregate,
    footnote="Papers rarely say which: the average over all variants, or the worst case (all ten right).",
)
