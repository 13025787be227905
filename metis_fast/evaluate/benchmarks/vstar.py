"""V*Bench: small things in large photos, 115 questions on attributes and 76 on positions."""

from __future__ import annotations

from metis_fast.data.row import MisfitError
from metis_fast.evaluate.aggregates import micro
from metis_fast.evaluate.asking import SELECT, checked_letter, choice_prompt, full_choice_prompt, letter_options
from metis_fast.evaluate.benchmark import Benchmark, PublishedFile
from metis_fast.evaluate.files.table import Row
from metis_fast.evaluate.question import Question
from metis_fast.evaluate.scorers import judges, options, vlmeval
from metis_fast.score.choice import read_options


def _questions(row: Row) -> list[Question]:
    category = row.text("category")
    index = row.text("index") if row.value("index") is not None else f"{category}/{row.text_or(str(row.number), 'question_id')}"
    if row.value("text") is not None:  # the hub's jsonl has the options in the text, and an instruction behind them
        text = row.text("text")
        offered = read_options(text)
        question = text.partition("(A)")[0].strip()
        if not offered or not question:
            raise MisfitError("text", "a question and options (A), (B), ...", text)
    else:
        question, offered = row.text("question"), letter_options(row)
    letter = checked_letter(row, offered, "answer", "label")
    return [Question(index, question, offered, letter, row.picture, {"category": category}, {}, row.load_images)]


VSTAR = Benchmark(
    name="vstar",
    aliases=("vstarbench", "v*", "v*bench"),
    title="V*Bench",
    files=(
        PublishedFile("VStarBench", 191, "xjtupanda/VStar_Bench", ("b18854d7075574be06b631cd5f7d2d6a",)),
        PublishedFile("V*Bench test_questions", 191, "craigwu/vstar_bench"),
    ),
    columns=(("question", "text"), ("answer", "label"), "category", "image"),
    questions=_questions,
    prompts={"vlmeval": choice_prompt(SELECT), "full": full_choice_prompt(SELECT)},
    scorers={"rule": options.option_rule, "vlmeval": vlmeval.option_rule},
    judges={"vlmeval": judges.option_judge},
    aggregate=micro("category"),
    footnote="One question is 0.52 points. The judge, and whether tools are on, are not stated in the paper.",
)
