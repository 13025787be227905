"""Records what VLMEvalKit and lmms-eval say of the replies in tests/unit/benchmark_replies.py.

Run it in an environment of its own, in which the kits' sources can be imported (what they import beyond pandas and math-verify
is replaced by empty modules, as none of it takes part in scoring):

    pip download --no-deps ms-vlmeval==0.0.20 lmms-eval==0.7.3     # unpack both wheels into one folder
    pip install pandas math-verify Levenshtein
    python tests/parity/record_benchmarks.py FOLDER tests/unit

It writes benchmark_figures.json, with prompts and aggregates, and benchmark_verdicts.tsv. Columns of that: benchmark, question,
reply and judge (JSON); rule: what VLMEvalKit's rule reads (a letter, 1, 0, - where it asks its judge or finds no match, ! where
it stops with an error); exact: WeMath without a judge; judged: with the given judge's replies; lmms: lmms-eval's rule.
"""

# pyright: reportMissingImports=false

from __future__ import annotations

import contextlib
import importlib.abc
import importlib.machinery
import io
import json
import re
import sys
import tempfile
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import math_verify
import pandas as pd

sys.path.insert(0, str(Path(__file__).parents[1] / "unit"))
from benchmark_replies import (
    BOX_REPLIES,
    MME_CATEGORIES,
    MME_DETAILS,
    PROMPT_ROWS,
    TREE_CATEGORIES,
    TRUE_BOXES,
    Asked,
    Case,
    cases,
    domain_hits,
    dynamath_hits,
    hrbench_hits,
    wemath_hits,
)  # fmt: skip

KITS = ("vlmeval", "lmms_eval")
BROKEN = ("vlmeval.dataset.sparbench",)  # uses a missing module while it is imported
FIXED_SEED_LOG = "Failed to predict"


def _is_there(name: str, path: Sequence[str] | None) -> bool:
    return name in sys.builtin_module_names or importlib.machinery.PathFinder.find_spec(name, path) is not None


class Missing(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Empty modules for what is not installed."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        used = name.split(".")[0] in KITS or _is_there(name, path)
        return None if used and name not in BROKEN else importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> Any:
        if spec.name in BROKEN:
            broken = types.ModuleType(spec.name)
            broken.__dict__["__getattr__"] = lambda name: type(name, (), {"supported_datasets": staticmethod(list)})
            return broken
        module = MagicMock(name=spec.name)
        module.__path__, module.__spec__, module.__name__, module.__version__, module.__file__ = (
            [],
            spec,
            spec.name,
            "99.0",
            "none",
        )
        return module

    def exec_module(self, module: types.ModuleType) -> None:
        """Nothing in it."""


class Judge:
    """Replies with given texts, the last one again and again."""

    def __init__(self, replies: tuple[str, ...]) -> None:
        self.replies, self.calls = list(replies), 0

    def generate(self, *prompt: object, **options: object) -> str:
        self.calls += 1
        return self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]


def bit(value: object) -> str:
    return "1" if value else "0"


def option_verdicts(case: Case) -> dict[str, str]:
    from vlmeval.dataset.utils.multiple_choice import extract_answer_from_item
    from vlmeval.utils import can_infer

    name = "WeMath" if case.benchmark == "wemath" else "VStarBench"
    shown = shown_options(case.asked)
    item = pd.Series({**shown, "question": case.asked.question, "answer": case.asked.answer, "prediction": case.reply})
    with contextlib.redirect_stdout(io.StringIO()):
        found = extract_answer_from_item(Judge(case.judge), item, name)
    judged = "-" if FIXED_SEED_LOG in found["log"] else bit(found["opt"] == case.asked.answer)
    return {"rule": can_infer(case.reply, dict(shown)) or "-", "judged": judged}


def shown_options(asked: Asked) -> dict[str, str]:
    """As pandas reads them from a TSV."""
    text = "\t".join(asked.choices) + "\n" + "\t".join(asked.choices.values()) + "\n"
    row = pd.read_csv(io.StringIO(text), sep="\t").iloc[0]
    return {letter: asked.choices[letter] for letter in asked.choices if not pd.isna(row[letter])}


def letter_verdicts(case: Case) -> dict[str, str]:
    from vlmeval.dataset.utils.multiple_choice import extract_characters_regex

    tagged = re.search(r"<answer>(.*?)</answer>", case.reply, re.DOTALL)  # as its `evaluate` does before
    return {"rule": extract_characters_regex(tagged.group(1).strip().upper() if tagged else case.reply) or "-"}


def wemath_verdicts(case: Case) -> dict[str, str]:
    from vlmeval.dataset.utils import wemath

    table = pd.DataFrame({"prediction": [case.reply], "answer": [case.asked.answer]})
    original, wemath.load = wemath.load, lambda path: table
    try:
        exact = bit(wemath.load_and_process_data("")["joker"].iloc[0])
    finally:
        wemath.load = original
    return {**option_verdicts(case), "exact": exact}


def mathvista_verdicts(case: Case) -> dict[str, str]:
    from vlmeval.dataset.utils.mathvista import MathVista_auxeval, post_check

    asked = case.asked
    line = {
        "question": asked.question, "prediction": case.reply, "answer_option": asked.answer, "answer_type": asked.kind,
        "question_type": "multi_choice" if asked.choices else "free_form", "choices": str(list(asked.choices.values())),
        "answer": asked.choices.get(asked.answer, asked.answer),
    }  # fmt: skip
    judge = Judge(case.judge)
    line["res"] = MathVista_auxeval(judge, line)["res"]
    right = bit(post_check(line, prefetch=False))
    return {"rule": "-" if judge.calls else right, "judged": right}


def mathverse_verdicts(case: Case) -> dict[str, str]:
    from vlmeval.dataset.utils.mathverse import MathVerse_auxeval_extract, MathVerse_auxeval_score

    asked = case.asked
    line = {"prediction": case.reply, "answer": asked.answer, "question_for_eval": asked.question}
    line["extract"] = MathVerse_auxeval_extract(Judge(case.judge[:1]), line)["extract"]
    found = MathVerse_auxeval_score(Judge(case.judge[1:]), line)
    return {"judged": "-" if "All 5 retries failed" in found["log_score"] else bit(found["score"])}


def dynamath_verdicts(case: Case) -> dict[str, str]:
    from vlmeval.dataset.dynamath import DynaMath_auxeval

    judge = Judge(case.judge)
    line = {"prediction": case.reply, "answer": case.asked.answer, "answer_type": case.asked.kind}
    try:
        found = DynaMath_auxeval(judge, line)
    except (AttributeError, TypeError, ValueError):
        return {"rule": "!", "judged": "!"}
    judged = bit(found["correct"]) if found["parse"] or found["correct"] else "-"
    return {"rule": "-" if judge.calls else judged, "judged": judged}


def logicvista_verdicts(case: Case) -> dict[str, str]:
    from vlmeval.dataset.utils.logicvista import LogicVista_auxeval

    line = {"question": case.asked.question, "prediction": case.reply, "answer": case.asked.answer}
    with contextlib.redirect_stdout(io.StringIO()):
        found = LogicVista_auxeval(Judge(case.judge), line)
    return {"judged": "-" if "All 5 retries failed" in found["log"] else bit(found["hit"])}


def charxiv_verdicts(case: Case) -> dict[str, str]:
    from vlmeval.dataset.charxiv import auxeval

    line = {"grading_query": "{PREDICTION}", "prediction": case.reply}
    found = auxeval(Judge(case.judge), line)
    return {"judged": "-" if found["extract_answer"] == "Failed to parse response" else bit(found["score"])}


VLMEVAL = {
    "treebench": letter_verdicts,
    "mme-realworld": letter_verdicts,
    "wemath": wemath_verdicts,
    "mathvista": mathvista_verdicts,
    "mathverse": mathverse_verdicts,
    "dynamath": dynamath_verdicts,
    "logicvista": logicvista_verdicts,
    "charxiv-dq": charxiv_verdicts,
    "charxiv-rq": charxiv_verdicts,
}


def lmms_verdict(case: Case) -> str:
    """Right or wrong; "" where it has no rule, or none of its own."""
    from lmms_eval.tasks._task_utils import reasoning_utils
    from lmms_eval.tasks.hrbench.hrbench_evals import HRBenchEval
    from lmms_eval.tasks.mme_realworld.utils import extract_characters_regex
    from lmms_eval.tasks.seedbench_2_plus.utils import seed_aggregation_result, seed_process_result
    from lmms_eval.tasks.vstar_bench.utils import extract_answer_letter

    asked, reply = case.asked, case.reply
    match case.benchmark:
        case "vstar":
            return bit(extract_answer_letter(reply) == asked.answer)
        case "hrbench4k" | "hrbench8k":
            found = HRBenchEval("none").can_infer(reply, dict(asked.choices))
            return bit(found == asked.answer) if found else "-"
        case "mme-realworld":
            found = extract_characters_regex(reply)
            return bit(found.lower() == asked.answer.lower() or asked.answer.lower() in found.lower())
        case "seedbench2plus":
            doc = {"answer": asked.answer, "question_image_type": "chart", "question_id": 0}
            return bit(seed_aggregation_result([seed_process_result(doc, [reply])["seedbench_2_plus_all"]]))
        case "wemath" | "dynamath" | "logicvista":
            reasoning_utils.parse, reasoning_utils.verify = math_verify.parse, math_verify.verify
            return bit(reasoning_utils.compute_score(case.benchmark, reply.strip(), asked.answer)["acc_score"])
    return ""


def prompt_texts() -> dict[str, str]:
    """The text of VLMEvalKit's prompt of each of PROMPT_ROWS."""
    from vlmeval.dataset import dynamath, image_mcq, image_vqa

    kinds = {
        "vstar": (image_mcq.ImageMCQDataset, "VStarBench"), "treebench": (image_mcq.TreeBench, "TreeBench"),
        "wemath": (image_mcq.WeMath, "WeMath"), "wemath/cot": (image_mcq.WeMath, "WeMath_COT"),
        "mme-realworld": (image_mcq.MMERealWorld, "MME-RealWorld"),
        "mme-realworld-cn": (image_mcq.MMERealWorld, "MME-RealWorld-CN"),
        "dynamath/float": (dynamath.Dynamath, "DynaMath"), "dynamath/multiple choice": (dynamath.Dynamath, "DynaMath"),
        "dynamath/text": (dynamath.Dynamath, "DynaMath"), "dynamath/float/noprompt": (dynamath.Dynamath, "DynaMath_noprompt"),
        "mathverse": (image_vqa.MathVerse, "MathVerse_MINI"),
        "mathverse/cot": (image_vqa.MathVerse, "MathVerse_MINI_Vision_Only_cot"),
    }  # fmt: skip
    found = {}
    for name, (kind, dataset) in kinds.items():
        row = PROMPT_ROWS.get(name) or PROMPT_ROWS[name.rpartition("/")[0]]
        text = pd.DataFrame([row]).to_csv(sep="\t", index=False)
        line = pd.read_csv(io.StringIO(text), sep="\t").iloc[0].to_dict() | {"image_path": "x"}
        if "multi-choice options" in row:  # as its reader joins them
            head = "选项如下所示:\n" if dataset.endswith("CN") else "The choices are listed below:\n"
            line["multi-choice options"] = head + "\n".join(row["multi-choice options"])
        made = object.__new__(kind)
        made.meta_only, made.dataset_name = True, dataset
        found[name] = made.build_prompt(pd.Series(line))[-1]["value"]
    return found


def aggregates() -> dict[str, Any]:
    """VLMEvalKit's figures of the marked rows."""
    from vlmeval.dataset import dynamath, image_mcq
    from vlmeval.dataset.utils import hrbench, multiple_choice, treebench, wemath

    found: dict[str, Any] = {}
    table = pd.DataFrame(wemath_hits())
    with contextlib.redirect_stdout(io.StringIO()):
        metrics = {}
        for steps in (2, 3):
            data = table[table["key"].str.contains(f"{steps}steps")].assign(joker=table["hit"].astype(bool))
            metrics[steps] = wemath.evaluate_process_steps_data(data, steps)
    counts, rates = wemath.evaluate_compute_final_scores(
        wemath.evaluate_calculate_metrics(metrics[2], metrics[3]), total_count=525
    )
    found["wemath"] = {
        "counts": counts,
        "rates": rates,
        "S2": metrics[2]["joker_multi"].mean(),
        "S3": metrics[3]["joker_multi"].mean(),
    }
    steps = pd.concat([metrics[2]["joker_1"], metrics[2]["joker_2"], *(metrics[3][f"joker_{i}"] for i in (1, 2, 3))])
    found["wemath"]["S1"] = steps.mean()
    found["hrbench4k"] = hrbench.report_acc_hrbench(pd.DataFrame(hrbench_hits())).to_dict("records")
    for name, module, categories in (
        ("mme-realworld", multiple_choice, MME_CATEGORIES), ("treebench", treebench, TREE_CATEGORIES),
    ):  # fmt: skip
        data = pd.DataFrame(domain_hits(categories, MME_DETAILS)).rename(columns={"hit": "score"}).assign(iou=0.5)
        original, module.load = module.load, lambda path, data=data: data
        try:
            found[name] = module.get_dimension_rating("")
        finally:
            module.load = original
    found["boxes"] = [
        float(image_mcq.TreeBench.evaluate_box_iou(reply_thought(reply), json.loads(boxes)))
        for boxes in TRUE_BOXES
        for reply in BOX_REPLIES
    ]
    found["dynamath"] = dynamath_figures(dynamath)
    return found


def reply_thought(reply: str) -> str:
    """As TreeBench's `evaluate` does before it looks for boxes."""
    thought = re.search(r"<think>(.*?)</think>", reply, re.DOTALL)
    return thought.group(1).strip() if thought else reply


def dynamath_figures(module: Any) -> list[dict[str, Any]]:
    """Its `evaluate`, with a stored result in place of a judge's."""
    data = pd.DataFrame(dynamath_hits()).rename(columns={"hit": "correct"}).astype({"correct": bool})
    kept = {name: getattr(module, name) for name in ("load", "dump", "build_judge")}
    module.load, module.dump, module.build_judge = (
        lambda path: data.copy(),
        lambda table, path: None,
        lambda **options: Judge(("",)),
    )
    try:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model_DynaMath.xlsx"
            module.get_intermediate_file_path = lambda *names: str(path)
            path.touch()
            return object.__new__(module.Dynamath).evaluate(str(path)).to_dict("records")
    finally:
        for name, value in kept.items():
            setattr(module, name, value)


def main(folder: str, out: str) -> None:
    sys.path[:0] = [folder]
    with contextlib.suppress(ImportError):  # where it is there, it has to find out what is not before that seems to be there
        __import__("scipy.stats")
    sys.meta_path.insert(0, Missing())
    figures = {"kit": "ms-vlmeval 0.0.20", "prompts": prompt_texts(), "aggregates": aggregates()}
    text = json.dumps(figures, indent=1, ensure_ascii=False, default=float)
    (Path(out) / "benchmark_figures.json").write_text(text + "\n", encoding="utf-8")
    lines = ["# ms-vlmeval 0.0.20 and lmms-eval 0.7.3, by tests/parity/record_benchmarks.py"]
    lines.append("\t".join(("benchmark", "question", "reply", "judge", "rule", "exact", "judged", "lmms")))
    for case in cases():
        found = VLMEVAL.get(case.benchmark, option_verdicts)(case)
        columns = [found.get(name, "") for name in ("rule", "exact", "judged")]
        texts = [json.dumps(text, ensure_ascii=False) for text in (case.reply, list(case.judge))]
        lines.append("\t".join((case.benchmark, case.asked.name, *texts, *columns, lmms_verdict(case))))
    (Path(out) / "benchmark_verdicts.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:3])
