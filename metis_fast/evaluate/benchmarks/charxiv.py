"""CharXiv: charts of papers. Four descriptive questions a chart, after 19 templates, and one that asks for reasoning.

The texts of the templates are the data set's own (princeton-nlp/CharXiv); files of VLMEvalKit have them filled in.
"""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files

from metis_fast.data.row import MisfitError
from metis_fast.evaluate.aggregates import micro
from metis_fast.evaluate.asking import plain_prompt
from metis_fast.evaluate.benchmark import Benchmark, PublishedFile
from metis_fast.evaluate.files.table import Row
from metis_fast.evaluate.question import Question, Verdict
from metis_fast.evaluate.scorers import judges, values

_GROUPS = {
    "Information Extraction": (1, 2, 3, 4, 5, 6, 7),
    "Enumeration": (8, 9, 13, 14, 15),
    "Pattern Recognition": (11, 16, 18),
    "Counting": (10, 12, 19),
    "Compositionality": (17,),
}
_GROUP_OF = {number: name for name, numbers in _GROUPS.items() for number in numbers}
_SOURCES = {1: "Text-in-Chart", 2: "Text-in-General", 3: "Number-in-Chart", 4: "Number-in-General"}
_PER_CHART = 4
_WHOLE_FIGURE = (18, 19)  # templates that ask about all subplots
_LINE = "\n    "


@cache
def _templates(kind: str) -> dict[int, str]:
    tree = json.loads(files("metis_fast.evaluate.benchmarks").joinpath("charxiv_questions.json").read_text("utf-8"))
    return {int(number): _LINE.join(lines) for number, lines in tree[kind].items()}


def _number(row: Row, known: dict[int, str], *names: str) -> int:
    text = row.text(*names)
    if not text.isdigit() or int(text) not in known:
        raise MisfitError(names[0], f"a number from 1 to {len(known)}", text)
    return int(text)


def _subplot(row: Row) -> str:
    """Where on the figure a descriptive question looks."""
    if row.value("subplot_loc") is not None:
        return f"For {row.text('subplot_loc')}, "
    place = row.text_or("0", "subplot_row"), row.text_or("0", "subplot_col")
    return "For the current plot, " if place[0] == "0" else f"For the subplot at row {place[0]} and column {place[1]}, "


def _chart(row: Row) -> str:
    return row.text_or(row.picture, "figure_path", "figure_id", "original_id")


def _filled(row: Row, group: str) -> Question:
    """A row of VLMEvalKit, whose text is ready; the truth stands in its grading query, and often in `answer`."""
    extra = {"grading_query": row.text("grading_query")} if row.value("grading_query") is not None else {}
    answer = row.text_or("", "answer", "ground_truth")
    return Question(row.text("index"), row.text("question"), {}, answer, _chart(row), {"group": group}, extra, row.load_images)


def _descriptive(row: Row) -> list[Question]:
    if row.value("descriptive_q1") is None:
        return [_filled(row, _GROUP_OF[_number(row, _templates("descriptive"), "qid")])]
    made = []
    for place in range(1, _PER_CHART + 1):
        number = _number(row, _templates("descriptive"), f"descriptive_q{place}")
        text = _templates("descriptive")[number]
        text = text if number in _WHOLE_FIGURE else text.replace("{}", _subplot(row), 1)
        made.append(
            Question(
                index=f"{_chart(row)}/{place}",
                question=text,
                options={},
                answer=row.text(f"descriptive_a{place}"),
                cluster=_chart(row),
                tags={"group": _GROUP_OF[number]},
                load_images=row.load_images,
            )
        )
    return made


def _reasoning(row: Row) -> list[Question]:
    if row.value("reasoning_q") is None:
        return [_filled(row, _SOURCES[_number(row, _SOURCES, "inst_category")])]
    number = _number(row, _SOURCES, "reasoning_q_source")
    asked, answer = row.text("reasoning_q"), row.text("reasoning_a")
    form = [asked]
    if number == 4:  # the one kind whose form depends on the truth
        decimals = len(answer.partition(".")[2])
        form.append(f"a number with {decimals} decimal places" if "." in answer else "an exact integer")
        form[1] = f"* Your final answer must be {form[1]}."
    text = _templates("reasoning")[number]
    for part in form:
        text = text.replace("{}", part, 1)
    tags, extra = {"group": _SOURCES[number]}, {"asked": asked}
    return [Question(_chart(row), text, {}, answer, _chart(row), tags, extra, row.load_images)]


def _rule(question: Question, reply: str) -> Verdict:
    if not question.answer:
        return Verdict(None, "the file has no answers; only a judge can tell, by the file's grading query")
    return values.text_rule(question, reply)


def _benchmark(name: str, title: str, file: str, rows: int, md5: tuple[str, str], descriptive: bool) -> Benchmark:
    return Benchmark(
        name=name,
        aliases=(name.replace("-", "_"), title.lower()),
        title=title,
        files=(PublishedFile(file, rows, "VLMEvalKit", md5), PublishedFile("CharXiv val", 1000, "princeton-nlp/CharXiv")),
        columns=(("question", "descriptive_q1"), ("qid", "descriptive_a1")) if descriptive
        else (("question", "reasoning_q"), ("inst_category", "reasoning_a")),
        questions=_descriptive if descriptive else _reasoning,
        prompts={"vlmeval": plain_prompt},
        scorers={"rule": _rule},
        judges={"vlmeval": judges.grading_judge},
        aggregate=micro("group"),
        footnote="VLMEvalKit has no rule and expects gpt-4o-mini as judge; what that cannot parse it counts as wrong.",
    )  # fmt: skip


# the second MD5 of each is that of the file in the package ms-vlmeval 0.0.20; the first is VLMEvalKit's at e8e78f0
CHARXIV_DQ = _benchmark(
    "charxiv-dq", "CharXiv descriptive", "CharXiv_descriptive_val", 4000,
    ("8507c3740f8ddaedcb6b5c1cfcb3fa06", "e165037032f169a59dd09ea5d7ad3073"), True,
)  # fmt: skip
CHARXIV_RQ = _benchmark(
    "charxiv-rq", "CharXiv reasoning", "CharXiv_reasoning_val", 1000,
    ("6fc1a522ad32c2e3d72a89857b8cf10b", "98eeff269b40726982627b19338ccd45"), False,
)  # fmt: skip
