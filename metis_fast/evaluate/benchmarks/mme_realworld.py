"""MME-RealWorld, in full, as Lite (1,919 of them), and in Chinese: five options, of which E is a refusal."""

from __future__ import annotations

from collections.abc import Sequence

from metis_fast.data.row import MisfitError
from metis_fast.evaluate.aggregates import by_tag, mean, units_of
from metis_fast.evaluate.asking import checked_letter, marked_options
from metis_fast.evaluate.benchmark import Benchmark, PublishedFile
from metis_fast.evaluate.files.table import Row
from metis_fast.evaluate.question import Figure, Mark, Question
from metis_fast.evaluate.scorers import options, vlmeval

_OPTIONS = "multi-choice options"
_ENGLISH = (
    "The choices are listed below:\n",
    "Select the best answer to the above multiple-choice question based on the image. "
    "Respond with only the letter (A, B, C, D, or E) of the correct option. \nThe best answer is:",
)
_CHINESE = (
    "选项如下所示:\n",
    "根据图像选择上述多项选择题的最佳答案。只需回答正确选项的字母（A, B, C, D 或 E）。\n最佳答案为：",
)


def _questions(row: Row) -> list[Question]:
    text = row.value(_OPTIONS)
    if isinstance(text, str) and not text.lstrip().startswith("["):  # a TSV that VLMEvalKit has built
        for head, _ in (_ENGLISH, _CHINESE):
            text = text.removeprefix(head)
        entries = text.splitlines()
    else:
        entries = row.texts(_OPTIONS)
    offered = marked_options([entry.replace("（", "(").replace("）", ")") for entry in entries])
    letter = checked_letter(row, offered, "answer")
    category = row.text("category")
    if "/" not in category:
        raise MisfitError("category", "a task and a domain, like Perception/Remote Sensing", category)
    task = "Perception" if "perception" in category.lower() else "Reasoning"
    domain, detail = category.rpartition("/")[2], row.text("l2-category").lower()
    if "attribute" in detail:
        detail = detail.partition("/")[0] + "/attribute"
    tags = {"task": task, "domain": domain, "task/domain": f"{task}/{domain}", "detail": f"{task}/{domain}/{detail}"}
    extra = {"choices": "\n".join(entries)}
    return [Question(row.text("index"), row.text("question"), offered, letter, row.picture, tags, extra, row.load_images)]


def _aggregate(questions: Sequence[Question], marks: Sequence[Mark]) -> tuple[Figure, ...]:
    units = units_of(questions, marks)
    tags = ("task", "domain", "task/domain", "detail")
    return (mean("overall", units), *(figure for tag in tags for figure in by_tag(units, tag)))


def _benchmark(name: str, title: str, files: tuple[PublishedFile, ...], words: tuple[str, str]) -> Benchmark:
    def prompt(question: Question) -> str:
        return f"{question.question} {words[0]}{question.extra['choices']}\n{words[1]}"

    return Benchmark(
        name=name,
        aliases=(name.replace("mme-realworld", "mmerw"),),
        title=title,
        files=files,
        columns=("index", "question", _OPTIONS, "answer", "category", "l2-category", ("image", "bytes", "image_path")),
        questions=_questions,
        prompts={"vlmeval": prompt},
        scorers={"rule": options.option_rule, "vlmeval": vlmeval.first_letter_rule},
        aggregate=_aggregate,
        footnote="Papers that say MME-RealWorld do not say whether they mean the full set, Lite, or English with Chinese.",
    )


_HUB = "yifanzhang114/MME-RealWorld-Base64"
MME_REALWORLD = _benchmark(
    "mme-realworld",
    "MME-RealWorld",
    (PublishedFile("MME-RealWorld", 23609, _HUB, ("fd341132362fc41e707cb37ee6e4dcda",), built=True),),
    _ENGLISH,
)
MME_REALWORLD_LITE = _benchmark(
    "mme-realworld-lite",
    "MME-RealWorld-Lite",
    (
        PublishedFile("MME-RealWorld-Lite", 1919, _HUB, ("4c17057d7d3b6c4a0d4397c3dae0881c",)),
        PublishedFile("mme_realworld_lite", 1919, _HUB, ("4c17057d7d3b6c4a0d4397c3dae0881c",)),
    ),
    _ENGLISH,
)
MME_REALWORLD_CN = _benchmark(
    "mme-realworld-cn",
    "MME-RealWorld-CN",
    (PublishedFile("MME-RealWorld-CN", None, _HUB, ("daaa763d52a760a38606d5dedb3fe444",), built=True),),
    _CHINESE,
)
