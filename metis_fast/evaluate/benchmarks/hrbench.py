"""HR-Bench at 4K and 8K: 200 questions each, asked with four cyclic orders of their options."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from metis_fast.evaluate.aggregates import by_tag, grouped_units, mean, units_of
from metis_fast.evaluate.asking import SELECT, checked_letter, choice_prompt, full_choice_prompt, letter_options
from metis_fast.evaluate.benchmark import Benchmark, PublishedFile
from metis_fast.evaluate.files.table import Row
from metis_fast.evaluate.question import Figure, Mark, Question
from metis_fast.evaluate.scorers import judges, options, vlmeval

_ORDERS = 4


def _questions(row: Row) -> list[Question]:
    offered = letter_options(row)
    letter = checked_letter(row, offered, "answer")
    tags = {"category": row.text("category"), "cycle": row.text("cycle_category")}
    # the same in all orders; questions that share their texts are told apart by `_with_clusters`
    cluster = "\n".join([tags["category"], row.text("question"), *sorted(offered.values())])
    return [Question(row.text("index"), row.text("question"), offered, letter, cluster, tags, {}, row.load_images)]


def _clusters(questions: Sequence[Question]) -> dict[str, str]:
    """The question that a row is one order of: the k-th row of a cycle with certain texts belongs to the k-th of the others."""
    seen: Counter[tuple[str, str]] = Counter()
    found = {}
    for question in questions:
        place = (question.tags["cycle"], question.cluster)
        found[question.index] = f"{question.cluster}\n{seen[place]}"
        seen[place] += 1
    return found


def _aggregate(questions: Sequence[Question], marks: Sequence[Mark]) -> tuple[Figure, ...]:
    cluster = _clusters(questions)
    questions = [
        Question(q.index, q.question, q.options, q.answer, cluster[q.index], q.tags, q.extra, q.load_images) for q in questions
    ]
    units = units_of(questions, marks)
    figures = [mean("overall", units, "mean of the cycles", strata="cycle")]
    for category in sorted({unit.tags["category"] for unit in units}):
        figures.append(mean(f"category/{category}", [u for u in units if u.tags["category"] == category], strata="cycle"))
    for cycle in sorted({unit.tags["cycle"] for unit in units}):
        members = [unit for unit in units if unit.tags["cycle"] == cycle]
        figures += [mean(f"cycle/{cycle}", members), *by_tag(members, "category", prefix=f"cycle/{cycle}/")]
    whole = Counter(cluster.values())
    complete = [question for question in questions if whole[question.cluster] == _ORDERS]
    all_right = grouped_units(complete, marks, lambda question: question.cluster, lambda values: min(values.values()))
    return (*figures, mean("all four orders right", all_right, "stricter than what papers report"))


def _benchmark(name: str, title: str, file: str, md5: str, hub: str) -> Benchmark:
    return Benchmark(
        name=name,
        aliases=(name.replace("hrbench", "hr"), name.replace("hrbench", "hr-bench-")),
        title=title,
        files=(
            PublishedFile(file, 800, f"DreamMr/HR-Bench ({hub}.tsv)", (md5,)),
            PublishedFile(hub, 800, "DreamMr/HR-Bench", (md5,)),
        ),
        columns=("index", "question", "A", "B", "answer", "category", "cycle_category", "image"),
        questions=_questions,
        prompts={"vlmeval": choice_prompt(SELECT), "full": full_choice_prompt(SELECT)},
        scorers={"rule": options.option_rule, "vlmeval": vlmeval.option_rule},
        judges={"vlmeval": judges.option_judge},
        aggregate=_aggregate,
        footnote="800 rows are 200 questions: errors are clustered by question. Reported is the mean of the four cycles.",
    )


HRBENCH_4K = _benchmark("hrbench4k", "HR-Bench 4K", "HRBench4K", "f6b041b03d49543494b8a56d2e35be65", "hr_bench_4k")
HRBENCH_8K = _benchmark("hrbench8k", "HR-Bench 8K", "HRBench8K", "274c9c7f89329b804a4723178a00219c", "hr_bench_8k")
