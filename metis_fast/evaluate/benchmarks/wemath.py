"""We-Math testmini: 525 composites of two or three steps, whose steps are asked alone, too (1,740 questions).

A composite is mastered (CM) where all steps and the whole are right; IG: the steps are right, the whole is not; IK: neither;
RM: the whole is right without its steps. "Loose" lets one right step be enough for CM. The score counts CM 1 and IG 1/2.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence

from metis_fast.data.row import MisfitError
from metis_fast.evaluate.aggregates import Unit, by_tag, grouped_units, mean, units_of
from metis_fast.evaluate.asking import checked_letter, choice_prompt, full_choice_prompt, letter_options, marked_options
from metis_fast.evaluate.benchmark import Benchmark, PublishedFile
from metis_fast.evaluate.files.table import Row
from metis_fast.evaluate.question import Figure, Mark, Question
from metis_fast.evaluate.scorers import judges, options, vlmeval

_KEY = re.compile(r"([23])steps_(multi|[123])")
_COMPOSITES = 525
_OPTION = re.compile(r"(?:^|;)\s*(?=[A-H]\.)")
_WHOLE = "multi"


def _questions(row: Row) -> list[Question]:
    if row.value("option") is not None:
        offered = marked_options([part.rstrip("; ") for part in _OPTION.split(row.text("option")) if part.strip()])
    else:
        offered = letter_options(row, "ABCDEFGH")
    letter = checked_letter(row, offered, "answer")
    key, composite = row.text("key"), row.text("ID", "id")
    found = _KEY.fullmatch(key)
    if found is None or (found[2] != _WHOLE and int(found[2]) > int(found[1])):
        raise MisfitError("key", "2steps_1, 2steps_2, 2steps_multi, or 3steps_1 to 3steps_multi", key)
    cluster = f"{found[1]}steps/{composite}"
    tags = {"key": key, "steps": found[1], "role": found[2]}
    if row.value("knowledge concept") is not None:
        tags["concept"] = row.text("knowledge concept")
    extra = {name: row.text(name) for name in ("requirement", "hint") if row.value(name) is not None}
    index = row.text_or(f"{cluster}/{found[2]}", "index")
    return [Question(index, row.text("question"), offered, letter, cluster, tags, extra, row.load_images)]


def _with_requirement(question: Question) -> str:
    """VLMEvalKit's WeMath_COT: the file's own demand on the form stands behind the options."""
    required = question.extra.get("requirement")
    return choice_prompt("")(question) + (f"\n{required}" if required else "")


def _kind(strict: bool) -> Callable[[Mapping[str, float]], str]:
    def kind(right: Mapping[str, float]) -> str:
        steps = [value == 1 for role, value in right.items() if role != _WHOLE]
        if right[_WHOLE] == 1:
            return "CM" if (all if strict else any)(steps) else "RM"
        return "IG" if all(steps) else "IK"

    return kind


def _aggregate(questions: Sequence[Question], marks: Sequence[Mark]) -> tuple[Figure, ...]:
    roles: dict[str, set[str]] = {}
    for question in questions:
        roles.setdefault(question.cluster, set()).add(question.tags["role"])
    complete = [q for q in questions if len(roles[q.cluster]) == int(q.tags["steps"]) + 1]

    def composites(value: Callable[[Mapping[str, float]], float]) -> list[Unit]:
        return grouped_units(complete, marks, lambda q: q.cluster, value, lambda q: q.tags["role"])

    figures: list[Figure] = []
    for name, strict in (("strict", True), ("loose", False)):
        kind = _kind(strict)
        units = composites(lambda right, kind=kind: {"CM": 1.0, "IG": 0.5}.get(kind(right), 0.0))
        note = "" if len(units) == _COMPOSITES else f"over {len(units)} composites, and the whole has {_COMPOSITES}"
        figures.append(mean(f"score ({name})", units, note))
        shares = {
            one: mean(f"{name}/{one}", composites(lambda right, kind=kind, one=one: float(kind(right) == one)))
            for one in ("IK", "IG", "CM", "RM")
        }
        figures += shares.values()
        figures.append(_rote(name, shares))
    rows = units_of(questions, marks)
    steps = [unit for unit in rows if unit.tags["role"] != _WHOLE]
    wholes = [unit for unit in rows if unit.tags["role"] == _WHOLE]
    accuracies = [mean("accuracy", rows, "over all rows, which is not the score"), mean("S1", steps)]
    accuracies += [mean(f"S{n}", [u for u in wholes if u.tags["steps"] == n]) for n in "23" if wholes]
    return (*figures, *accuracies, *by_tag(steps, "concept", prefix="concept/"))


def _rote(name: str, shares: Mapping[str, Figure]) -> Figure:
    """RM / (CM + RM), as We-Math reports it: among composites whose whole is right."""
    rote, mastered = shares["RM"].value, shares["CM"].value
    whole = None if rote is None or mastered is None else rote + mastered
    value = rote / whole if rote is not None and whole else None
    return Figure(f"{name}/RM rate", value, None, shares["RM"].n, shares["RM"].clusters, shares["RM"].missing,
                  note="RM / (CM + RM): a ratio, without an error")  # fmt: skip


WEMATH = Benchmark(
    name="wemath",
    aliases=("we-math", "wemath-testmini"),
    title="We-Math testmini",
    files=(
        PublishedFile("WeMath", 1740, "VLMEvalKit", ("b5e969a075f01290a542411fb7766388",)),
        PublishedFile("We-Math testmini", 1740, "We-Math/We-Math"),
    ),
    columns=("question", ("A", "option"), "answer", "key", ("ID", "id")),
    questions=_questions,
    prompts={"vlmeval": choice_prompt(""), "full": full_choice_prompt(""), "cot": _with_requirement},
    scorers={
        "rule": options.option_rule,
        "vlmeval": vlmeval.judged_option_rule,
        "vlmeval-exact": vlmeval.behind_answer_rule,
    },
    judges={"vlmeval": judges.option_judge},
    aggregate=_aggregate,
    footnote="Papers rarely say which: strict score, loose score and accuracy differ by tens of points.",
)
