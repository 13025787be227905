"""Scorers, prompts and aggregates beside VLMEvalKit's and lmms-eval's, on thousands of replies of ours.

What the kits said was recorded once (tests/parity/record_benchmarks.py); they are not needed here.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from benchmark_replies import (
    BOX_REPLIES,
    MME_CATEGORIES,
    MME_DETAILS,
    PROMPT_ROWS,
    TREE_CATEGORIES,
    TRUE_BOXES,
    Asked,
    Case,
    Hit,
    cases,
    domain_hits,
    dynamath_hits,
    hrbench_hits,
    wemath_hits,
)

from metis_fast.evaluate.asking import kept_options
from metis_fast.evaluate.benchmarks import BENCHMARKS
from metis_fast.evaluate.benchmarks.treebench import box_overlap
from metis_fast.evaluate.question import Figure, Mark, Question, Verdict
from metis_fast.evaluate.scorers import vlmeval

FOLDER = Path(__file__).parent
PAGE = FOLDER.parents[1] / "docs" / "other-kits.md"
FIGURES = json.loads((FOLDER / "benchmark_figures.json").read_text("utf-8"))
LETTER_BENCHMARKS = ("treebench", "mme-realworld")
VALUE_BENCHMARKS = ("mathvista", "dynamath")
FENCED = "```json"  # around a judge's JSON: VLMEvalKit does not read it, we do


def question_of(asked: Asked) -> Question:
    extra = {"answer_type": asked.kind, "question_for_eval": asked.question}
    if asked.kind == "float":
        extra |= {"precision": asked.precision} if asked.precision else {"within": "0.001"}
    return Question(asked.name, asked.question, asked.choices, asked.answer, asked.name, {}, extra)


def recorded() -> list[tuple[Case, dict[str, str]]]:
    _, head, *lines = (FOLDER / "benchmark_verdicts.tsv").read_text("utf-8").splitlines()
    rows = [dict(zip(head.split("\t"), line.split("\t"), strict=True)) for line in lines]
    pairs = list(zip(cases(), rows, strict=True))
    assert all(
        (case.benchmark, case.asked.name, case.reply) == (row["benchmark"], row["question"], json.loads(row["reply"]))
        for case, row in pairs
    )
    return pairs


RECORDED = recorded()


def mark(verdict: Verdict) -> str:
    if verdict.reason == vlmeval.BREAKS.reason:
        return "!"
    return "-" if verdict.value is None else str(int(verdict.value))


_OURS: dict[tuple[object, str, str], Verdict] = {}  # many replies are there with several judges, and in several benchmarks


def our_rule(case: Case) -> Verdict:
    rule = BENCHMARKS[case.benchmark].scorers["rule"]
    key = (rule, case.asked.name, case.reply)
    if key not in _OURS:
        _OURS[key] = rule(question_of(case.asked), case.reply)
    return _OURS[key]


def read_by_rule(case: Case, question: Question) -> str:
    """What the file's column `rule` has, by our own account of that rule."""
    if case.benchmark in LETTER_BENCHMARKS:
        return vlmeval.first_letter(case.reply) or "-"
    if case.benchmark in VALUE_BENCHMARKS:
        return mark(BENCHMARKS[case.benchmark].scorers["vlmeval"](question, case.reply))
    return vlmeval.infer_option(case.reply, kept_options(question)) or "-"


def test_there_are_three_hundred_replies_of_each_benchmark():
    counts = Counter(case.benchmark for case, _ in RECORDED)
    assert min(counts.values()) >= 300
    assert set(counts) == set(BENCHMARKS) - {"mme-realworld-lite", "mme-realworld-cn"}  # which have the rule of the whole set


def never_given(case: Case) -> bool:
    """Whether VLMEvalKit's function gets no such reply when it is run: its files make nan of an empty one, no true text."""
    return (case.benchmark, case.asked.kind, case.reply) == ("dynamath", "text", "")


def test_the_vlmeval_scorer_reads_what_vlmevalkit_reads():
    for case, row in RECORDED:
        question = question_of(case.asked)
        if never_given(case):
            continue
        if row["rule"]:
            assert read_by_rule(case, question) == row["rule"], case
        if row["exact"]:
            assert mark(BENCHMARKS[case.benchmark].scorers["vlmeval-exact"](question, case.reply)) == row["exact"], case


def test_the_vlmeval_judge_form_ends_where_vlmevalkit_ends():
    fenced = unread = 0
    for case, row in RECORDED:
        if not row["judged"] or never_given(case):
            continue
        question, form, answers = question_of(case.asked), BENCHMARKS[case.benchmark].judges["vlmeval"], []
        for place, call in enumerate(form.calls):
            asked = call(question, case.reply, answers)
            answers.append("" if asked is None else case.judge[place])
        got = mark(form.read(question, case.reply, answers))
        if row["judged"] == "-" and case.judge[0].startswith(FENCED):
            fenced += 1
            continue
        if got == "-" and case.benchmark == "mathvista":  # no option and no number: a wrong answer there, no verdict here
            assert row["judged"] == "0", case
            unread += 1
            continue
        assert got == row["judged"], case
    assert (fenced, unread) == (128, 16)


def test_a_rule_verdict_never_contradicts_what_the_reply_means():
    unclear = 0
    for case, _ in RECORDED:
        if case.meant is None or not case.asked.choices:
            continue
        verdict = our_rule(case)
        unclear += verdict.value is None
        if verdict.value == 1:
            assert case.meant == case.asked.answer, case
        elif verdict.value == 0 and verdict.reason == "":
            assert case.meant not in ("", case.asked.answer), case
    assert unclear < len(RECORDED) / 3


def agreement(column: str) -> dict[str, str]:
    """Benchmark -> the row of the page's table: replies, same verdict, ours right and theirs wrong, the other way round, no
    verdict of ours, no verdict of theirs alone."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for case, row in RECORDED:
        theirs = row[column]
        if not theirs:
            continue
        if theirs not in "01-!":
            theirs = str(int(theirs == case.asked.answer))
        ours = mark(our_rule(case))
        kind = "none" if ours == "-" else "they none" if theirs in "-!" else "same" if ours == theirs else ours + theirs
        counts[case.benchmark][kind] += 1
    return {
        name: " | ".join(
            str(part) for part in (found.total(), *(found[kind] for kind in ("same", "10", "01", "none", "they none")))
        )
        for name, found in counts.items()
    }


@pytest.mark.parametrize(("kit", "column"), [("VLMEvalKit", "rule"), ("lmms-eval", "lmms")])
def test_the_page_counts_every_disagreement(kit: str, column: str):
    text = PAGE.read_text(encoding="utf-8")
    for name, row in agreement(column).items():
        assert f"| {kit} | {name} | {row} |" in text


def test_prompts_are_vlmevalkits_to_the_letter():
    for name, text in FIGURES["prompts"].items():
        benchmark, _, form = name.partition("/")
        row = PROMPT_ROWS.get(name) or PROMPT_ROWS[name.rpartition("/")[0]]
        prompts = BENCHMARKS[benchmark].prompts
        prompt = prompts.get(form.rpartition("/")[2]) or prompts["vlmeval"]
        assert prompt(prompt_question(row)) == text, name


def prompt_question(row: dict[str, object]) -> Question:
    texts = {name: value for name, value in row.items() if isinstance(value, str)}
    listed = row.get("multi-choice options")
    extra = texts | ({"choices": "\n".join(listed)} if isinstance(listed, list) else {})
    options = {letter: texts[letter] for letter in "ABCDE" if letter in texts}
    return Question("0", texts["question"], options, texts["answer"], "0", {}, extra)


def marked(hits: list[Hit], tags: dict[str, str]) -> tuple[list[Question], list[Mark]]:
    """Questions with tags from columns (tag -> column), and their marks."""
    questions = [
        Question(
            str(hit["index"]), str(hit.get("question", "")), {}, "A", "", {tag: str(hit[name]) for tag, name in tags.items()}
        )
        for hit in hits
    ]
    return questions, [Mark(str(hit["index"]), 0, "rule", float(str(hit["hit"]))) for hit in hits]


def by_name(figures: tuple[Figure, ...]) -> dict[str, float]:
    return {figure.name: figure.value for figure in figures if figure.value is not None}


def with_cluster(question: Question, cluster: str, **tags: str) -> Question:
    return Question(question.index, question.question, {}, "A", cluster, {**question.tags, **tags})


def test_wemath_scores_are_vlmevalkits():
    questions, marks = marked(wemath_hits(), {"key": "key", "id": "ID", "concept": "knowledge concept"})
    made = [
        with_cluster(q, f"{q.tags['key'][0]}/{q.tags['id']}", steps=q.tags["key"][0], role=q.tags["key"].partition("_")[2])
        for q in questions
    ]
    figures = by_name(BENCHMARKS["wemath"].aggregate(made, marks))
    truth = FIGURES["aggregates"]["wemath"]
    counts = truth["counts"]
    for name in ("strict", "loose"):
        ig, ik = counts["InadequateGeneralization"], counts["InsufficientKnowledge"]
        rm, cm = counts[f"RoteMemorization_{name}"], counts[f"CompleteMastery_{name}"]
        assert figures[f"score ({name})"] == pytest.approx((525 - 0.5 * ig - rm - ik) / 525)
        assert [figures[f"{name}/{one}"] * 525 for one in ("IK", "IG", "CM", "RM")] == pytest.approx([ik, ig, cm, rm])
        assert f"{figures[f'{name}/RM rate']:.2%}" == truth["rates"][f"RoteMemorization_{name}_rate"]
    assert [figures[name] for name in ("S1", "S2", "S3")] == pytest.approx([truth[name] for name in ("S1", "S2", "S3")])


def test_dynamath_average_and_worst_case_are_vlmevalkits():
    questions, marks = marked(
        dynamath_hits(), {"problem": "qid", "variant": "varid", "subject": "subject", "level": "knowledge_level"}
    )
    made = [with_cluster(q, q.tags["problem"]) for q in questions]
    figures = by_name(BENCHMARKS["dynamath"].aggregate(made, marks))
    for row in FIGURES["aggregates"]["dynamath"]:
        name = str(row["Setting"]).lower()
        for column, value in row.items():
            if column != "Setting":
                part = column.replace("Subject-", "subject/").replace("Level-", "level/")
                assert figures[name if column == "Overall" else f"{name}/{part}"] == pytest.approx(value), (name, column)


def test_hrbench_cycles_and_their_mean_are_vlmevalkits():
    questions, marks = marked(hrbench_hits(), {"category": "category", "cycle": "cycle_category"})
    made = [with_cluster(q, q.question) for q in questions]
    figures = by_name(BENCHMARKS["hrbench4k"].aggregate(made, marks))
    for row in FIGURES["aggregates"]["hrbench4k"]:
        cycle, kind = str(row["cycle"]), row["type"]
        name = ("overall" if kind == "all" else f"category/{kind}") if cycle == "Average" else f"cycle/{cycle}"
        name += "" if kind == "all" or cycle == "Average" else f"/{kind}"
        assert figures[name] == pytest.approx(row["accuracy"]), row


def leaves(tree: dict[str, object], place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], float]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from leaves(value, (*place, name))
        else:
            yield (*place, name), float(str(value))


def test_mme_realworld_domains_are_vlmevalkits():
    hits = domain_hits(MME_CATEGORIES, MME_DETAILS)
    questions, marks = marked(hits, {"category": "category", "l2": "l2-category"})
    made = []
    for q in questions:
        task, domain = q.tags["category"].split("/")
        detail = re.sub(r"/attribute/.*", "/attribute", q.tags["l2"].lower())
        tags = {"task": task, "domain": domain, "task/domain": f"{task}/{domain}", "detail": f"{task}/{domain}/{detail}"}
        made.append(with_cluster(q, q.index, **tags))
    figures = by_name(BENCHMARKS["mme-realworld"].aggregate(made, marks))
    compared = 0
    for place, value in leaves(FIGURES["aggregates"]["mme-realworld"]):
        name = "/".join(place[:-1] if place[-1] == "Avg" else place)
        if name.lower() == "overall":
            name = "overall"
        if name in figures:
            assert figures[name] == pytest.approx(value), name
            compared += 1
    assert compared == 1 + 2 + 3 + 9


def test_treebench_subtasks_and_boxes_are_vlmevalkits():
    questions, marks = marked(domain_hits(TREE_CATEGORIES, MME_DETAILS), {"category": "category"})
    made = [with_cluster(q, q.index, task=q.tags["category"].partition("/")[0]) for q in questions]
    figures = by_name(BENCHMARKS["treebench"].aggregate(made, marks))
    truth = dict(leaves(FIGURES["aggregates"]["treebench"]))
    for category in TREE_CATEGORIES:
        task, subtask = category.split("/")
        assert figures[category] == pytest.approx(truth[task, subtask])
    assert figures["overall"] == pytest.approx(truth["Overall",])
    got = [
        box_overlap(Question("0", "?", {}, "A", "0", {}, {"boxes": boxes}), reply).value
        for boxes in TRUE_BOXES
        for reply in BOX_REPLIES
    ]
    assert got == pytest.approx(FIGURES["aggregates"]["boxes"])
