"""MathVerse testmini: 788 problems, each in five versions that move text into the picture (and one without a picture)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from metis_fast.evaluate.aggregates import by_tag, mean, units_of
from metis_fast.evaluate.asking import plain_prompt
from metis_fast.evaluate.benchmark import Benchmark, PublishedFile
from metis_fast.evaluate.files.table import Row, as_text
from metis_fast.evaluate.question import Figure, Mark, Question, Verdict
from metis_fast.evaluate.scorers import judges, options, values
from metis_fast.score.choice import read_options

_TEXT_ONLY = "Text Only"
_VERSIONS = ("Text Dominant", "Text Lite", "Vision Intensive", "Vision Dominant", "Vision Only")


def _questions(row: Row) -> list[Question]:
    version, kind = re.sub(r"[_-]", " ", row.text("problem_version")).title(), row.text_or("", "question_type")
    metadata = row.struct("metadata")
    evaluated = row.text_or("", "question_for_eval", "question")
    offered = read_options(evaluated) if "free" not in kind else {}
    answer = row.text("answer").strip()
    tags = {"version": version, "question_type": kind}
    tags |= {name: as_text(metadata[name]) for name in ("subject", "subfield") if metadata.get(name)}
    extra = {"question_for_eval": evaluated}
    extra |= {name: row.text(name) for name in ("query_wo", "query_cot") if row.value(name) is not None}
    text = row.text("question", "query_wo")  # of Vision Only the hub's files have no question: it stands in the picture
    cluster = row.text("problem_index", "index")
    offered = offered if answer in offered else {}
    index = row.text("index", "sample_index")
    return [Question(index, text, offered, answer, cluster, tags, extra, row.load_images)]


def _rule(question: Question, reply: str) -> Verdict:
    return options.option_rule(question, reply) if question.options else values.formula_rule(question, reply)


def _with_thoughts(question: Question) -> str:
    return question.extra.get("query_cot", question.question)


def _without(question: Question) -> str:
    return question.extra.get("query_wo", question.question)


def _aggregate(questions: Sequence[Question], marks: Sequence[Mark]) -> tuple[Figure, ...]:
    every = units_of(questions, marks)
    units = [unit for unit in every if unit.tags["version"] != _TEXT_ONLY]
    versions = by_tag(units, "version", _VERSIONS, prefix="version/")
    text_only = [unit for unit in every if unit.tags["version"] == _TEXT_ONLY]
    return (
        mean("overall", units, f"over {len(versions)} of the five versions with a picture"),
        *versions,
        *([mean(f"version/{_TEXT_ONLY}", text_only, "not in the overall figure")] if text_only else []),
        *by_tag(units, "subject", prefix="subject/"),
        *by_tag(units, "subfield", prefix="subfield/"),
        *by_tag(units, "question_type", prefix="type/"),
    )


_MD5 = {
    "Vision_Only": "68a11d4680014ac881fa37adeadea3a4",
    "Vision_Dominant": "b8fb63852d261ab2aaefba29cc2414d3",
    "Vision_Intensive": "01cbd35be202bb0c4873a4186a63bc19",
    "Text_Lite": "19e4b13bdd30b89a03b2e358bcfefa04",
    "Text_Dominant": "4f5cd2fa6630ea00bb11d6fde1f6fe6a",
}

MATHVERSE = Benchmark(
    name="mathverse",
    aliases=("mathverse-mini", "mathverse-testmini"),
    title="MathVerse testmini",
    files=(
        PublishedFile("MathVerse_MINI", 3940, "VLMEvalKit", ("5017caca32b7fa110c350a1bea861b65",)),
        *(PublishedFile(f"MathVerse_MINI_{name}", 788, "VLMEvalKit", (md5,)) for name, md5 in _MD5.items()),
        PublishedFile("MathVerse testmini", 3940, "AI4Math/MathVerse"),
    ),
    columns=(("index", "sample_index"), "problem_version", "question", "answer"),
    questions=_questions,
    prompts={"vlmeval": plain_prompt, "cot": _with_thoughts, "direct": _without},
    scorers={"rule": _rule},
    judges={"vlmeval": judges.mathverse_judge},
    aggregate=_aggregate,
    needs_image=False,
    footnote="Papers differ: all five versions, or Vision Only. VLMEvalKit has no rule: a judge extracts, and compares.",
)
