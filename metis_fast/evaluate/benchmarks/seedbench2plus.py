"""SEED-Bench-2-Plus: 2,277 questions on charts, maps and web pages."""

from __future__ import annotations

from metis_fast.evaluate.aggregates import micro
from metis_fast.evaluate.asking import SELECT, checked_letter, choice_prompt, full_choice_prompt
from metis_fast.evaluate.benchmark import Benchmark, PublishedFile
from metis_fast.evaluate.files.table import Row
from metis_fast.evaluate.question import Question
from metis_fast.evaluate.scorers import judges, options, vlmeval


def _questions(row: Row) -> list[Question]:
    spellings = {letter: (letter, f"choice_{letter.lower()}", f"choice_{letter}") for letter in "ABCD"}
    offered = {letter: row.text(*names) for letter, names in spellings.items() if row.value(*names) is not None}
    letter = checked_letter(row, offered, "answer")
    tags = {"category": row.text("question_image_type", "category").lower()}
    index = row.text_or(str(row.number), "index", "question_id")
    cluster = row.text_or(row.picture, "data_id")
    return [Question(index, row.text("question"), offered, letter, cluster, tags, {}, row.load_images)]


SEEDBENCH_2_PLUS = Benchmark(
    name="seedbench2plus",
    aliases=("seed-bench-2-plus", "seed2plus", "seed2+"),
    title="SEED-Bench-2-Plus",
    files=(
        PublishedFile("SEEDBench2_Plus", 2277, "VLMEvalKit", ("e32d3216dc4f452b0fe497a52015d1fd",)),
        PublishedFile("SEED-Bench-2-Plus", 2277, "AILab-CVC/SEED-Bench-2-plus, doolayer/SEED-Bench-2-Plus"),
    ),
    columns=("question", ("A", "choice_a", "choice_A"), "answer", ("category", "question_image_type"), ("image", "data_id")),
    questions=_questions,
    prompts={"vlmeval": choice_prompt(SELECT), "full": full_choice_prompt(SELECT)},
    scorers={"rule": options.option_rule, "vlmeval": vlmeval.option_rule},
    judges={"vlmeval": judges.option_judge},
    aggregate=micro("category"),
    footnote="lmms-eval scores the first character of the reply, which no agent survives.",
)
