"""Labelled examples for `metis-fast judge check`: answers of which somebody knows whether they are right."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from metis_fast.errors import DataError, one_line
from metis_fast.judge_styles import STYLES, SYNONYMS, known_style
from metis_fast.types import Prompt

_LABELS = ("label", "equal", "correct")  # the same column in the words of others; the first one counts
_TRUTHS = ("ground_truth", "answers")
_COLUMNS = "style, answer, ground_truth and label, and question if you like"
_MEANS = {
    **dict.fromkeys(("true", "1", "yes", "right", "correct"), True),
    **dict.fromkeys(("false", "0", "no", "wrong", "incorrect"), False),
}


@dataclass(frozen=True, slots=True)
class Example:
    """An answer, and whether it is right. line: of its file, from 1; in Parquet the row, from 0."""

    line: int
    style: str
    question: str
    answer: str
    truths: tuple[str, ...]
    label: bool

    def prompt(self) -> Prompt:
        """What judges read of a prompt."""
        return Prompt(f"line {self.line}", "examples", (), (), "", self.truths, self.style, self.question)


def read_examples(path: Path) -> list[Example]:
    """Those of a file; its columns are in docs/llm-judge.md.

    Raises:
        DataError: it cannot be read, or a line does not fit; the message names the line.
    """
    readers = {".tsv": _tsv, ".jsonl": _jsonl, ".parquet": _parquet}
    read = readers.get(path.suffix.lower())
    if read is None:
        raise DataError(
            f"{path}: expected a file of examples that ends in {', '.join(readers)}, got {path.suffix or path.name}"
        )
    try:
        found = [_example(path, line, row) for line, row in read(path)]
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or one_line(error)}; give a file of examples") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no UTF-8 (byte {error.start}); save it as UTF-8") from None
    if not found:
        raise DataError(f"{path} has no examples; expected rows with {_COLUMNS}")
    return found


def _tsv(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Without quotes: a quotation mark is part of an answer."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        lines = enumerate(file.read().replace("\r\n", "\n").split("\n"), start=1)
        rows = ((number, line.split("\t")) for number, line in lines if line)
        _, names = next(rows, (1, list[str]()))
        for number, cells in rows:
            if len(cells) != len(names):
                raise DataError(
                    f"{path}:{number}: expected {len(names)} cells ({', '.join(names)}), got {len(cells)}; part them by tabs, "
                    "and write JSONL where a text has line breaks or tabs"
                )
            yield number, dict(zip(names, cells, strict=True))


def _jsonl(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path}:{number}: expected a JSON object, got {one_line(error)[:200]}") from None
            if not isinstance(row, dict):
                raise DataError(f"{path}:{number}: expected a JSON object, got {type(row).__name__}")
            yield number, row


def _parquet(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    try:
        with pq.ParquetFile(path) as file:
            known = ("style", "question", "answer", *_TRUTHS, *_LABELS)
            names = [name for name in file.schema_arrow.names if name in known]
            number = 0
            for batch in file.iter_batches(columns=names):
                for row in batch.to_pylist():
                    yield number, row
                    number += 1
    except pa.ArrowException as error:
        raise DataError(f"{path}: cannot be read as Parquet: {one_line(error)[:200]}; write the file anew") from None


def _example(path: Path, line: int, row: Mapping[str, Any]) -> Example:
    def cell(name: str, what: str, *names: str) -> Any:
        found = next((one for one in (name, *names) if row.get(one) is not None), None)
        if found is None:
            had = ", ".join(row) or "nothing"
            raise DataError(f"{path}:{line}: column {name}: expected {what}, got none (it has {had}); examples have {_COLUMNS}")
        return row[found]

    def text(name: str, value: Any) -> str:
        if not isinstance(value, str):
            raise DataError(f"{path}:{line}: column {name}: expected text, got {one_line(repr(value))[:80]}")
        return value

    style = text("style", cell("style", "a judge style"))
    if known_style(style) is None:
        raise DataError(
            f"{path}:{line}: column style: expected one of {', '.join(STYLES)} (or {', '.join(SYNONYMS)}), got {style[:80]!r}"
        )
    truths = cell(_TRUTHS[0], "a ground truth, or a list of them", *_TRUTHS[1:])
    label = cell(_LABELS[0], "true or false", *_LABELS[1:])
    means = _MEANS.get(str(label).strip().lower())
    if means is None:
        raise DataError(f"{path}:{line}: column label: expected true or false, got {one_line(repr(label))[:80]}")
    question = row.get("question")
    return Example(
        line,
        style,
        "" if question is None else text("question", question),
        text("answer", cell("answer", "an answer")),
        tuple(text("ground_truth", one) for one in (truths if isinstance(truths, list) else [truths])),
        means,
    )
