"""Small stand-ins for the published files of every benchmark, in VLMEvalKit's form and in the hub's.

The same arguments give the same files under the same Pillow and pyarrow. Questions can be answered from their pictures.
"""

from __future__ import annotations

import base64
import csv
import json
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from metis_fast.errors import DataError, one_line
from metis_fast.standin.pictures import KINDS, as_jpeg, as_png, draw

LETTERS = "ABCD"
REFUSAL = "The image does not feature the object."
VARIANTS = 10
VERSIONS = ("Text Dominant", "Text Lite", "Vision Intensive", "Vision Dominant", "Vision Only")
COLOURS = ("red", "green", "blue", "orange", "purple", "black")
Cells = dict[str, object]
Row = dict[str, object]


@dataclass(frozen=True, slots=True)
class Item:
    """A picture and a question about it. answer: as text; letter: of the option that it is, of four."""

    number: int
    image: bytes
    text: str
    answer: str
    options: tuple[str, ...]
    letter: str

    @property
    def base64(self) -> str:
        """The picture as TSV files have it."""
        return base64.b64encode(self.image).decode()

    @property
    def lettered(self) -> Cells:
        """Columns A to D."""
        return dict(zip(LETTERS, self.options, strict=True))

    def turned(self, by: int) -> Item:
        """With its options moved on in a cycle."""
        options = self.options[-by:] + self.options[:-by] if by else self.options
        return Item(self.number, self.image, self.text, self.answer, options, LETTERS[options.index(self.answer)])


@dataclass(frozen=True, slots=True)
class Files:
    """What was written for one benchmark. tsv: VLMEvalKit's form, one file each; hub: the hub's, files to read together."""

    tsv: tuple[Path, ...]
    hub: tuple[Path, ...]


def make_items(count: int, pixels: tuple[int, int], seed: str) -> list[Item]:
    """Questions about pictures. pixels: (width, height)."""
    rng = random.Random(seed)
    items: list[Item] = []
    while len(items) < count:
        number = len(items)
        picture = draw(list(KINDS)[number % len(KINDS)], pixels, rng)
        asked = rng.choice(picture.questions)
        wrong = rng.sample([one for one in _others(asked.answer, rng) if one != asked.answer], len(LETTERS) - 1)
        place = rng.randrange(len(LETTERS))
        options = (*wrong[:place], asked.answer, *wrong[place:])
        data = as_jpeg(picture.image) if number % 2 else as_png(picture.image)
        items.append(Item(number, data, asked.text, asked.answer, options, LETTERS[place]))
    return items


def _others(answer: str, rng: random.Random) -> list[str]:
    if answer.lstrip("-").isdigit():
        return [str(int(answer) + step) for step in (-2, -1, 1, 2, 10)]
    if answer in COLOURS:
        return list(COLOURS)
    return ["Norwin Bakery", "a grey hexagon", "7/13", "Halvern", "cannot be seen", f"number {rng.randrange(100)}"]


def write_tsv(path: Path, rows: Sequence[Row]) -> Path:
    """As pandas writes it: quotes only where they are needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return path


def write_parquet(path: Path, rows: Sequence[Row]) -> Path:
    """One file, two row groups."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path, row_group_size=max(1, (len(rows) + 1) // 2))
    return path


def write_json(path: Path, tree: object) -> Path:
    """In UTF-8, with what is not ASCII as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree, ensure_ascii=False), encoding="utf-8")
    return path


def _write_image(folder: Path, name: str, item: Item) -> str:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(item.image)
    return name


def _on_hub(item: Item, name: str) -> Cells:
    return {"bytes": item.image, "path": name}


def _vstar(folder: Path, items: Sequence[Item]) -> Files:
    def category(item: Item) -> str:
        return "relative_position" if item.number % 3 == 2 else "direct_attributes"

    tsv: list[Row] = [
        {"index": i.number, "image": i.base64, "question": i.text, **i.lettered, "answer": i.letter, "category": category(i)}
        for i in items
    ]
    lines = []
    for i in items:
        listed = "".join(f"\n({letter}) {text}" for letter, text in i.lettered.items())
        line = {
            "image": _write_image(folder / "hub", f"{category(i)}/sa_{i.number}.jpg", i),
            "text": f"{i.text}{listed}\nAnswer with the option's letter from the given choices directly.",
            "category": category(i),
            "label": i.letter,
            "question_id": i.number,
        }
        lines.append(json.dumps(line))
    path = folder / "hub" / "test_questions.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return Files((write_tsv(folder / "VStarBench.tsv", tsv),), (path,))


def _hrbench(folder: Path, items: Sequence[Item], size: str) -> Files:
    rows: list[Row] = []
    for cycle in range(len(LETTERS)):
        for i in (item.turned(cycle) for item in items):
            rows.append(
                {
                    **{"index": len(rows), "question": i.text, "answer": i.letter},
                    **{"category": ("single", "cross")[i.number % 2], **i.lettered},
                    **{"cycle_category": cycle, "image": i.base64},
                }
            )
    # an image stands once in a TSV; other rows name the row that has it
    tsv = [{**row, "image": row["image"] if at < len(items) else str(at % len(items))} for at, row in enumerate(rows)]
    hub = write_parquet(folder / "hub" / f"hr_bench_{size.lower()}.parquet", rows)
    return Files((write_tsv(folder / f"HRBench{size}.tsv", tsv),), (hub,))


def _treebench(folder: Path, items: Sequence[Item]) -> Files:
    tasks = ("Perception/Attributes", "Perception/OCR", "Reasoning/Ordering", "Reasoning/Comparison")
    tsv: list[Row] = [
        {
            **{"index": i.number, "image": i.base64, "question": i.text, **i.lettered, "E": "None of the above"},
            **{"answer": i.letter, "category": tasks[i.number % len(tasks)]},
            "target_instances": str([[10 * i.number, 20, 10 * i.number + 40, 60]]),
        }
        for i in items
    ]
    path = write_tsv(folder / "TreeBench.tsv", tsv)
    return Files((path,), (path,))


_DOMAINS = ("OCR with Complex Context", "Remote Sensing", "Diagram and Table", "Autonomous_Driving", "Monitoring")


def _mme(folder: Path, items: Sequence[Item], name: str, head: str) -> Files:
    rows: list[Row] = []
    for i in items:
        domain = _DOMAINS[i.number % len(_DOMAINS)]
        listed = [f"({letter}) {text}" for letter, text in {**i.lettered, "E": REFUSAL}.items()]
        task = ("Perception", "Reasoning")[i.number // len(_DOMAINS) % 2]
        rows.append(
            {
                **{"index": i.number, "image": i.base64, "question": i.text, "multi-choice options": listed},
                **{
                    "answer": i.letter,
                    "category": f"{task}/{domain}",
                    "l2-category": ("person/attribute/color", "ocr")[i.number % 2],
                },
            }
        )
    hub = [
        write_json(folder / "hub" / f"{domain}.json", [row for row in rows if str(row["category"]).endswith(domain)])
        for domain in _DOMAINS
    ]
    if name.endswith("Lite"):  # as published: the list in Python's spelling
        tsv: list[Row] = [{**row, "multi-choice options": str(row["multi-choice options"])} for row in rows]
    else:  # as VLMEvalKit builds it
        tsv = [
            {
                **row,
                "multi-choice options": head + "\n".join(_texts(row["multi-choice options"])),
                **{entry[1]: entry[4:] for entry in _texts(row["multi-choice options"])},
            }
            for row in rows
        ]
    return Files((write_tsv(folder / f"{name}.tsv", tsv),), tuple(path for path in hub if path.read_text() != "[]"))


def _texts(value: object) -> list[str]:
    assert isinstance(value, list)
    return [str(part) for part in value]


def _seedbench(folder: Path, items: Sequence[Item]) -> Files:
    kinds = ("chart", "map", "web")
    tsv: list[Row] = [
        {
            **{"index": i.number, "image": i.base64, "question": i.text, **i.lettered, "answer": i.letter},
            "category": kinds[i.number % len(kinds)],
        }
        for i in items
    ]
    rows = [
        {
            **{f"choice_{letter.lower()}": text for letter, text in i.lettered.items()},
            **{"question": i.text, "answer": i.letter, "question_id": str(i.number)},
            "data_id": _write_image(folder / "hub", f"{kinds[i.number % len(kinds)]}/{i.number}.png", i),
            "question_image_type": kinds[i.number % len(kinds)].capitalize(),
        }
        for i in items
    ]
    hub = write_json(folder / "hub" / "SEED-Bench-2-plus.json", {"questions": rows})
    return Files((write_tsv(folder / "SEEDBench2_Plus.tsv", tsv),), (hub,))


def _charxiv(folder: Path, items: Sequence[Item], descriptive: bool) -> Files:
    hub: list[Row] = []
    tsv: list[Row] = []
    for i in items:
        numbers, answers = (10, 18, 19, 1), ("Not Applicable", "1 by 1", "1", i.answer)
        source = i.number % 4 + 1 if not i.answer.isdigit() else 4
        row: Row = {"image": _on_hub(i, f"{i.number}.jpg"), "figure_path": f"images/{i.number}.jpg", "subplot_row": 0}
        row |= {"subplot_col": 0, "subplot_loc": None, "num_subplots": 1}
        row |= {f"descriptive_q{at}": number for at, number in enumerate(numbers, 1)}
        row |= {f"descriptive_a{at}": answer for at, answer in enumerate(answers, 1)}
        row |= {
            "reasoning_q": i.text,
            "reasoning_a": i.answer,
            "reasoning_q_source": min(source, 3 if not i.answer.isdigit() else 4),
        }
        hub.append(row)
        asked = zip(numbers, answers, strict=True) if descriptive else [(row["reasoning_q_source"], i.answer)]
        for number, answer in asked:
            first = len(tsv)
            image = i.base64 if not descriptive or number == numbers[0] else str(i.number * len(numbers))
            line: Row = {"index": first, "image": image, "question": i.text if not descriptive else f"Template {number}?"}
            line |= {"answer": answer, "qid" if descriptive else "inst_category": number, "figure_id": i.number}
            line["grading_query"] = f"Truth: {answer}\nResponse: {{PREDICTION}}\nJSON with extract_answer and score:"
            tsv.append(line)
    name = "CharXiv_descriptive_val" if descriptive else "CharXiv_reasoning_val"
    return Files((write_tsv(folder / f"{name}.tsv", tsv),), (write_parquet(folder / "hub" / "val.parquet", hub),))


def _mathvista(folder: Path, items: Sequence[Item]) -> Files:
    tsv: list[Row] = []
    hub: list[Row] = []
    for i in items:
        whole = i.answer.lstrip("-").isdigit()
        kind = "multi_choice" if i.number % 2 else "free_form"
        form = "integer" if whole else "text"
        answer = i.answer
        if kind == "free_form" and i.number % 4 == 0:
            form, answer = ("float", "1.5") if i.number % 8 else ("list", "[2007, 2008]")
        choices = list(i.options) if kind == "multi_choice" else None
        skills, task = ["numeric commonsense", "statistical reasoning"][: 1 + i.number % 2], "figure question answering"
        hint = f"Hint: Please answer the question.\nQuestion: {i.text}"
        if choices:
            hint += "\nChoices:\n" + "\n".join(f"({letter}) {text}" for letter, text in i.lettered.items())
        shared: Row = {
            "answer": answer,
            "question_type": kind,
            "answer_type": form,
            "precision": 1.0 if form == "float" else None,
        }
        hub.append(
            {
                **{"pid": str(i.number + 1), "question": i.text, "image": f"images/{i.number}.jpg"},
                **{"decoded_image": _on_hub(i, f"{i.number}.jpg"), "choices": choices, "unit": None, **shared},
                **{"metadata": {"task": task, "skills": skills}, "query": hint},
            }
        )
        tsv.append(
            {
                **{"index": i.number + 1, "image": i.base64, "question": hint, **shared, "choices": str(choices or [])},
                **{"answer_option": i.letter if choices else "", "task": task, "skills": str(skills)},
            }
        )
    hub_file = write_parquet(folder / "hub" / "data" / "testmini-00000-of-00001.parquet", hub)
    return Files((write_tsv(folder / "MathVista_MINI.tsv", tsv),), (hub_file,))


def _mathverse(folder: Path, items: Sequence[Item]) -> Files:
    hub: list[Row] = []
    for i in items:
        free = i.number % 2 == 0
        listed = "\nChoices:\n" + "\n".join(f"{letter}:{text}" for letter, text in i.lettered.items())
        asked = i.text if free else i.text + listed
        for version in VERSIONS:
            hub.append(
                {
                    **{"sample_index": str(len(hub) + 1), "problem_index": str(i.number + 1), "problem_version": version},
                    **{"question": "" if version == "Vision Only" else asked, "image": _on_hub(i, f"image_{i.number}.png")},
                    **{"answer": i.answer if free else i.letter, "question_type": "free-form" if free else "multi-choice"},
                    "metadata": {"split": "testmini", "source": "stand-in", "subject": "Plane Geometry", "subfield": "Length"},
                    **{
                        "query_wo": f"Answer directly.\n{asked}",
                        "query_cot": f"Reason first.\n{asked}",
                        "question_for_eval": asked,
                    },
                }
            )
    tsv: list[Row] = []
    for at, row in enumerate(hub):
        image = items[at // len(VERSIONS)].base64 if at % len(VERSIONS) == 0 else str(at - at % len(VERSIONS) + 1)
        text = row["question"] or row["query_wo"]
        tsv.append({"index": at + 1, **row, "image": image, "question": text, "metadata": str(row["metadata"])})
    hub_file = write_parquet(folder / "hub" / "testmini.parquet", hub)
    return Files((write_tsv(folder / "MathVerse_MINI.tsv", tsv),), (hub_file,))


def _wemath(folder: Path, items: Sequence[Item]) -> Files:
    tsv: list[Row] = []
    hub: list[Row] = []
    for i in items:
        steps = 2 + i.number % 2
        for role in [*map(str, range(1, steps + 1)), "multi"]:
            turned = i.turned(len(tsv) % len(LETTERS))
            shared: Row = {"question": i.text, "answer": turned.letter, "key": f"{steps}steps_{role}", "ID": i.number // 2}
            shared["knowledge concept"] = ("Area of Circles", "Direction")[len(tsv) % 2]
            image = (
                i.base64 if role == "1" else next(str(row["index"]) for row in reversed(tsv) if row["key"] == f"{steps}steps_1")
            )
            tsv.append(
                {"index": len(tsv), "image": image, **turned.lettered, **shared, "requirement": "Answer: <<your option>>"}
            )
            listed = "; ".join(f"{letter}. {text}" for letter, text in turned.lettered.items())
            hub.append({**shared, "option": listed, "image_path": _on_hub(i, f"{i.number}.png"), "split": "testmini"})
    hub_file = write_parquet(folder / "hub" / "data" / "testmini-00000-of-00001.parquet", hub)
    return Files((write_tsv(folder / "WeMath.tsv", tsv),), (hub_file,))


def _dynamath(folder: Path, items: Sequence[Item]) -> Files:
    tsv: list[Row] = []
    hub: list[Path] = []
    for variant in range(1, VARIANTS + 1):
        rows: list[Row] = []
        for i in items:
            kind = ("float", "multiple choice", "text")[i.number % 3]
            answer = {"float": f"{variant + i.number / 8:.3f}", "multiple choice": i.letter, "text": i.answer}[kind]
            shared: Row = {"question": f"Variant {variant}: {i.text}", "answer_type": kind}
            shared |= {"subject": ("algebra", "statistics")[i.number % 2], "knowledge_level": "high school"}
            rows.append({"id": str(i.number), **shared, "ground_truth": answer, "decoded_image": _on_hub(i, f"{i.number}.png")})
            own: Row = {"index": len(tsv), "image": i.base64 if variant == 1 else str(i.number)}
            tsv.append({**own, **shared, "answer": answer, "qid": i.number, "varid": variant})
        hub.append(write_parquet(folder / "hub" / "data" / f"sample_variant{variant}-00000-of-00001.parquet", rows))
    return Files((write_tsv(folder / "DynaMath.tsv", tsv),), tuple(hub))


def _logicvista(folder: Path, items: Sequence[Item]) -> Files:
    skills = ("inductive", "deductive", "numerical", "spatial", "mechanical")
    rows: list[Row] = []
    for i in items:
        answer = i.letter if i.number % 4 else "A, C"
        text = f"{i.text} Select from A, B, C and D."
        rows.append({"index": i.number, "question": text, "answer": answer, "skill": skills[i.number % len(skills)]})
    tsv = [{**row, "image": i.base64} for row, i in zip(rows, items, strict=True)]
    hub = [{**row, "image": _on_hub(i, f"{i.number}.png")} for row, i in zip(rows, items, strict=True)]
    hub_file = write_parquet(folder / "hub" / "test-00000-of-00001.parquet", hub)
    return Files((write_tsv(folder / "LogicVista.tsv", tsv),), (hub_file,))


_ENGLISH, _CHINESE = "The choices are listed below:\n", "选项如下所示:\n"
_WRITERS: dict[str, Callable[[Path, Sequence[Item]], Files]] = {
    "vstar": _vstar,
    "hrbench4k": lambda folder, items: _hrbench(folder, items, "4K"),
    "hrbench8k": lambda folder, items: _hrbench(folder, items, "8K"),
    "treebench": _treebench,
    "mme-realworld": lambda folder, items: _mme(folder, items, "MME-RealWorld", _ENGLISH),
    "mme-realworld-lite": lambda folder, items: _mme(folder, items, "MME-RealWorld-Lite", _ENGLISH),
    "mme-realworld-cn": lambda folder, items: _mme(folder, items, "MME-RealWorld-CN", _CHINESE),
    "seedbench2plus": _seedbench,
    "charxiv-dq": lambda folder, items: _charxiv(folder, items, descriptive=True),
    "charxiv-rq": lambda folder, items: _charxiv(folder, items, descriptive=False),
    "mathvista": _mathvista,
    "mathverse": _mathverse,
    "wemath": _wemath,
    "dynamath": _dynamath,
    "logicvista": _logicvista,
}


def write_standins(
    folder: Path, names: Iterable[str] = (), count: int = 6, pixels: tuple[int, int] = (160, 120), seed: int = 0
) -> dict[str, Files]:
    """Write stand-ins of benchmarks into folders of their names; files that are there are replaced.

    names: of `BENCHMARKS`; none: all of them. count: problems of each, of which some benchmarks ask several questions. pixels:
    (width, height) of the pictures.

    Raises:
        DataError: the folder cannot be written.
    """
    try:
        return {name: _WRITERS[name](folder / name, make_items(count, pixels, f"{seed}/{name}")) for name in names or _WRITERS}
    except OSError as error:
        raise DataError(f"cannot write {folder}: {one_line(error)}; choose a folder that can be written") from None
