"""A benchmark's questions as prompts in a Parquet file, which nodes play like any other data.

It is written once into the run folder, image by image; published files are not needed again to play or to score. A large image
is a file of its own beside the Parquet file, whatever the number of rows that show it: neither the disk nor the row groups
that a node keeps in memory hold it several times.

    benchmarks/prompts/<name>-<digest>/{prompts.parquet, images/<SHA-256>, questions.jsonl, note.json}
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

import pyarrow as pa
import pyarrow.parquet as pq
from tqdm import tqdm

from metis_fast.checkpoint.atomic import clean_leftovers, new_folder
from metis_fast.config import Config
from metis_fast.errors import ConfigError, DataError, one_line
from metis_fast.evaluate.benchmark import Benchmark
from metis_fast.evaluate.benchmarks import find
from metis_fast.evaluate.files.images import decoded
from metis_fast.evaluate.files.reading import FileFacts, expand, read
from metis_fast.evaluate.question import Question, as_prompt
from metis_fast.serve.system import SystemText
from metis_fast.types import ImageBlob, Message, Prompt

FORCED = "Call at least one of your tools before you give the final answer."
_GROUP_BYTES, _GROUP_ROWS = 64 << 20, 64
_LARGE = 128 << 10  # bytes; a smaller image stands in its row, as a file for each of thousands would be slow to open
_NO_ANSWER = "-"  # the schema asks for a ground truth, which nobody reads there
_SCHEMA = pa.schema(
    [
        ("data_source", pa.string()),
        ("prompt", pa.string()),
        ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
        ("ability", pa.string()),
        ("reward_model", pa.struct([("ground_truth", pa.list_(pa.string())), ("style", pa.string())])),
        ("extra_info", pa.string()),
    ]
)
_REPEATED = ["images.list.element.bytes"]  # the questions of a chart follow each other: a small one is stored once a row group


@dataclass(frozen=True, slots=True)
class PromptSet:
    """Questions that were written as prompts: row i of the file asks `questions[i]`, whose images are there alone.

    key: what the config calls the benchmark. asked: what decides the prompts (`how_asked`), as JSON.
    """

    key: str
    benchmark: Benchmark
    folder: Path
    questions: tuple[Question, ...]
    files: tuple[FileFacts, ...]
    warnings: tuple[str, ...]
    asked: Mapping[str, Any]

    @property
    def parquet(self) -> Path:
        """The prompts."""
        return self.folder / "prompts.parquet"


def how_asked(config: Config, benchmark: Benchmark) -> dict[str, Any]:
    """What decides the prompts of a benchmark, beside its files.

    Raises:
        ConfigError: there is no prompt of this name, or no such system text.
    """
    own = config.benchmark
    prompt = own.prompt or next(iter(benchmark.prompts))
    if prompt not in benchmark.prompts:
        raise ConfigError(
            f"benchmark.prompt={prompt!r}: {benchmark.name} has {', '.join(benchmark.prompts)}; choose one of them"
        )
    system = ""
    if own.system == "agent":
        tools = () if own.tools == "off" else tuple(map(str, config.tools.enabled))
        system = SystemText(config.serve.system).of(tools)
    return {"prompt": prompt, "system": system, "tools": own.tools, "max_questions": own.max_questions}


def prepare(config: Config, key: str, progress: bool, before: Callable[[], object] = lambda: None) -> PromptSet:
    """The prompt set of a benchmark, written now where it is not there. before: done before files are read for it.

    key: of `benchmark.files`.

    Raises:
        ConfigError: no such benchmark, or no file of it is named; see `how_asked`.
        DataError: its files cannot be used; one line each.
    """
    benchmark = find(key)
    paths = config.benchmark.files.get(key, ())
    if not paths:
        raise ConfigError(f"benchmark.files has no file of {key!r}; set benchmark.files.{key}=PATH (metis-fast benchmark list)")
    asked = how_asked(config, benchmark)
    note = {"asked": asked, "any_md5": config.benchmark.any_md5, "sources": _stamps(paths)}
    name = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:8]
    parent = config.run.dir / "benchmarks" / "prompts"
    folder = parent / f"{benchmark.name}-{name}"
    parent.mkdir(parents=True, exist_ok=True)
    clean_leftovers(parent, folder.name)
    if (whole := _read(folder, key, benchmark, note)) is not None:
        return whole
    before()
    found = read(benchmark, paths, config.benchmark.any_md5, progress)
    questions = found.questions[: asked["max_questions"] or None]
    facts = {"files": [asdict(file) for file in found.files], "warnings": list(found.warnings)}
    if len(questions) < len(found.questions):
        facts["warnings"].append(f"only the first {len(questions)} of {len(found.questions)} questions are asked")
    with new_folder(folder) as tmp:
        lines = [json.dumps(_told(question)) + "\n" for question in questions]
        (tmp / "questions.jsonl").write_text("".join(lines), encoding="utf-8")
        bar = tqdm(questions, f"prompts of {key}", unit="row", disable=None if progress else True, leave=False)
        known = all(file.known for file in found.files)
        _write(tmp, (_prompt(benchmark, question, asked) for question in _with_images(bar, known)))
        whole = json.dumps(note | facts | {"rows": len(questions)} | _sizes(tmp), indent=1)
        (tmp / "note.json").write_text(whole + "\n", encoding="utf-8")
    made = _read(folder, key, benchmark, note)
    if made is None:
        raise DataError(f"{folder}: changed since it was written just now; leave the run folder alone and run again")
    return made


def _stamps(paths: Sequence[Path]) -> list[list[Any]]:
    """Path, size and time of every file: where these are equal, so is what was read.

    Raises:
        DataError: one is missing.
    """
    stamps = []
    for path in expand(paths):
        try:
            status = path.stat()
        except OSError as error:
            raise DataError(f"{path}: {error.strerror}; give the path of a published file in benchmark.files") from None
        stamps.append([str(path.resolve()), status.st_size, status.st_mtime_ns])
    return stamps


def _read(folder: Path, key: str, benchmark: Benchmark, note: Mapping[str, Any]) -> PromptSet | None:
    """A set that is whole and was made so; else None."""
    try:
        told = json.loads((folder / "note.json").read_text(encoding="utf-8"))
        lines = (folder / "questions.jsonl").read_bytes().splitlines()
        found = {**note, "rows": len(lines), **_sizes(folder)}
    except (OSError, ValueError):
        return None
    if any(told.get(name) != value for name, value in found.items()):
        return None
    questions = tuple(Question(**json.loads(line)) for line in lines)
    files = tuple(FileFacts(**file) for file in told["files"])
    return PromptSet(key, benchmark, folder, questions, files, tuple(told["warnings"]), told["asked"])


def _with_images(questions: Iterable[Question], known: bool) -> Iterator[Question]:
    """Questions that have their images at hand. known: of published files, whose images can be decoded.

    Raises:
        DataError: a cell holds no image, or one that is damaged.
    """
    loaded = ((question, question.images()) for question in questions)
    for question, images, damage in ((*one, None) for one in loaded) if known else decoded(loaded):
        if damage is not None:
            raise damage
        yield replace(question, load_images=lambda images=images: images)


def _sizes(folder: Path) -> dict[str, int]:
    """Of what a set has on disk: a file that lacks, or was cut, shows."""
    images = [one.stat().st_size for one in os.scandir(folder / "images")]
    size = (folder / "prompts.parquet").stat().st_size
    return {"bytes": size, "large_images": len(images), "large_image_bytes": sum(images)}


def _told(question: Question) -> dict[str, Any]:
    return {
        "index": question.index,
        "question": question.question,
        "options": dict(question.options),
        "answer": question.answer,
        "cluster": question.cluster,
        "tags": dict(question.tags),
        "extra": dict(question.extra),
    }


def asked_text(benchmark: Benchmark, question: Question, asked: Mapping[str, Any]) -> str:
    """What the user says, behind the images. asked: see `how_asked`."""
    text = benchmark.prompts[asked["prompt"]](question)
    return f"{text.rstrip()}\n{FORCED}" if asked["tools"] == "forced" else text


def _prompt(benchmark: Benchmark, question: Question, asked: Mapping[str, Any]) -> Prompt:
    prompt = as_prompt(question, benchmark.name, asked_text(benchmark, question, asked), asked["system"])
    return replace(prompt, tools=()) if asked["tools"] == "off" else prompt


def _write(folder: Path, prompts: Iterator[Prompt]) -> None:
    """Row group by row group, as large as its images make it. (pyarrow's stub knows no list of columns.)"""
    (folder / "images").mkdir()
    with pq.ParquetWriter(
        folder / "prompts.parquet", _SCHEMA, compression="none", use_dictionary=cast(bool, _REPEATED),
        dictionary_pagesize_limit=2 * _GROUP_BYTES, write_statistics=False,
    ) as writer:  # fmt: skip
        rows: list[dict[str, Any]] = []
        size = 0
        for prompt in prompts:
            images = [_stored(image, folder) for image in prompt.images]
            rows.append(_row(prompt, images))
            size += sum(len(image["bytes"] or b"") for image in images)
            if size >= _GROUP_BYTES or len(rows) == _GROUP_ROWS:
                writer.write_table(_table(rows))
                rows, size = [], 0
        if rows:
            writer.write_table(_table(rows))


def _stored(image: ImageBlob, folder: Path) -> dict[str, Any]:
    """The cell of an image. A large one is written, if no row before had it."""
    if len(image.data) < _LARGE:
        return {"bytes": image.data, "path": None}
    name = f"images/{image.sha256}"
    if not (folder / name).exists():
        (folder / name).write_bytes(image.data)
    return {"bytes": None, "path": name}


def _table(rows: Sequence[Mapping[str, Any]]) -> pa.Table:
    try:
        return pa.Table.from_pylist(list(rows), _SCHEMA)
    except (pa.ArrowException, UnicodeEncodeError) as error:
        raise DataError(f"questions that cannot be stored: {one_line(error)}; see metis-fast benchmark check") from None


def _row(prompt: Prompt, images: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    tools = {"tools": []} if prompt.tools == () else {}
    return {
        "data_source": prompt.data_source,
        "prompt": json.dumps([_message(message) for message in prompt.messages]),
        "images": images,
        "ability": prompt.ability,
        "reward_model": {"ground_truth": [prompt.answers[0].strip() or _NO_ANSWER], "style": "rule"},
        "extra_info": json.dumps({"question": prompt.question, **prompt.extra, **tools}),
    }


def _message(message: Message) -> dict[str, Any]:
    """With its content in parts, so that `<image>` in a text stays text."""
    parts: list[dict[str, str]] = []
    for number, text in enumerate(message.around_images):
        parts += [{"type": "image"}] if number else []
        parts += [{"type": "text", "text": text}] if text else []
    return {"role": message.role, "content": parts}
