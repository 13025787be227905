"""Stored replies in the forms of other kits: predictions that VLMEvalKit scores again, and samples as lmms-eval logs them."""

from __future__ import annotations

import csv
import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from metis_fast.errors import ConfigError, DataError
from metis_fast.evaluate.asking import NA_WORDS
from metis_fast.evaluate.benchmarks import find
from metis_fast.evaluate.files.table import IMAGE_COLUMNS
from metis_fast.evaluate.files.tsv import TsvTable
from metis_fast.evaluate.promptset import asked_text
from metis_fast.evaluate.question import Question
from metis_fast.evaluate.replies import read_lines
from metis_fast.evaluate.result import Stored

FAILED = "Failed to obtain answer via API."
"""What VLMEvalKit has where no answer came."""
_XLSX = {"treebench"}  # VLMEvalKit asserts this form
_XLSX_CELL = 32_767  # characters
_EMPTY = {"dynamath": "∅"}  # in place of an empty reply
_EXTRA = ("prediction", "num_tool_calls", "tool_calls", "outcome")


def export_vlmeval(stored: Sequence[Stored], out: Path, model: str, rollout: int = 0) -> list[Path]:
    """Write `<out>/<model>/T<time>/<model>_<dataset>.tsv` of each: its file's columns but the image, and what was said.

    TreeBench becomes .xlsx, as VLMEvalKit asks. rollout: of several.

    Raises:
        DataError: the benchmark was not read from VLMEvalKit's TSV, or that is gone.
        ConfigError: openpyxl is not installed.
    """
    written = []
    if find_spec("openpyxl") is None and any(one.benchmark in _XLSX for one in stored):
        raise ConfigError(
            "VLMEvalKit takes xlsx for TreeBench, which needs openpyxl; in the project's folder: pip install -e "
            "'.[benchmark]', or export the folders of other benchmarks one by one"
        )
    for one in stored:
        source = _source(one)
        stamp = time.strftime("T%Y%m%d-%H%M%S", time.gmtime((one.folder / "result.json").stat().st_mtime))
        ending = ".xlsx" if one.benchmark in _XLSX else ".tsv"
        path = out / model / stamp / f"{model}_{source.stem}{ending}"
        columns, rows = _rows(one, source, rollout)
        path.parent.mkdir(parents=True, exist_ok=True)
        (_write_xlsx if ending == ".xlsx" else _write_tsv)(path, columns, rows)
        written.append(path)
    return written


def _source(stored: Stored) -> Path:
    files = [Path(file["path"]) for file in stored.result["files"]]
    if len(files) != 1 or files[0].suffix != ".tsv":
        raise DataError(
            f"{stored.folder}: expected replies to VLMEvalKit's TSV, got those to "
            f"{', '.join(file.name for file in files)}; run {stored.benchmark} from its TSV"
        )
    return files[0]


def _replies(stored: Stored, rollout: int) -> dict[str, dict[str, Any]]:
    return {record["index"]: record for record in read_lines(stored.folder / "replies.jsonl") if record["rollout"] == rollout}


def _rows(stored: Stored, source: Path, rollout: int) -> tuple[list[str], Iterator[list[object]]]:
    """Columns, and the rows that were asked, in the order of the file."""
    table = TsvTable(source)
    if table.md5 not in {file["md5"] for file in stored.result["files"]}:
        raise DataError(f"{source}: its MD5 is {table.md5}, another one than when the benchmark was run; put that file back")
    replies = _replies(stored, rollout)
    asked = {record["index"] for record in read_lines(stored.folder / "marks.jsonl")}
    columns = [column for column in table.columns if column not in IMAGE_COLUMNS]

    def rows() -> Iterator[list[object]]:
        for row in table.rows():
            index = row.text("index")
            if index not in asked:
                continue
            reply = replies.get(index)
            said: list[object] = [FAILED, 0, "{}", "infrastructure_error"]
            if reply is not None:
                said = [_kept(reply["prediction"], stored.benchmark), sum(reply["calls"].values())]
                said += [json.dumps(reply["calls"]), reply["outcome"]]
            yield [*(row.cells.get(column, "") for column in columns), *said]

    return [*columns, *_EXTRA], rows()


def _kept(prediction: str, benchmark: str) -> str:
    """As pandas keeps it: it reads "" and "None" as missing, where VLMEvalKit's rules stop. They strip the blank, but for
    DynaMath's, to which a blank is a part of any true text that has one."""
    if benchmark in _EMPTY and not prediction.strip():
        return _EMPTY[benchmark]
    return f"{prediction} " if prediction in NA_WORDS else prediction


def _write_tsv(path: Path, columns: Sequence[str], rows: Iterator[Sequence[object]]) -> None:
    with path.open("w", newline="", encoding="utf-8", errors="replace") as file:
        writer = csv.writer(file, delimiter="\t", lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([_cell(value) for value in row] for row in rows)


def _cell(value: object) -> object:
    """pandas ends a row at a carriage return that stands without quotes."""
    return value.replace("\r\n", "\n").replace("\r", "\n") if isinstance(value, str) else value


def _write_xlsx(path: Path, columns: Sequence[str], rows: Iterator[Sequence[object]]) -> None:
    from openpyxl import Workbook
    from openpyxl.cell import WriteOnlyCell
    from openpyxl.cell.cell import ILLEGAL_CHARACTERS_RE

    book = Workbook(write_only=True)
    sheet = book.create_sheet()
    sheet.append(list(columns))

    def cell(value: object) -> object:
        if not isinstance(value, str):
            return value
        made = WriteOnlyCell(sheet, ILLEGAL_CHARACTERS_RE.sub("", value)[:_XLSX_CELL])
        made.data_type = "s"  # a text that begins with "=" would become a formula
        return made

    for row in rows:
        sheet.append([cell(value) for value in row])
    book.save(path)


def export_lmms_eval(stored: Sequence[Stored], out: Path, model: str, rollout: int = 0) -> list[Path]:
    """Write `<out>/<model>/<time>_results.json` and `<time>_samples_<benchmark>.jsonl`, which lmms-eval's viewers read.

    A sample has each scorer's value under its name, null where there is no verdict, and under `score` the first one there is,
    which lmms-eval compares runs by.

    Raises:
        DataError: the prompts of a benchmark are gone.
    """
    folder = out / model
    folder.mkdir(parents=True, exist_ok=True)
    newest = max((one.folder / "result.json").stat().st_mtime for one in stored)
    stamp = time.strftime("%Y%m%d_%H%M%S", time.gmtime(newest))
    results: dict[str, Any] = {"results": {}, "n-samples": {}, "configs": {}, "model_source": "metis-fast", "model_name": model}
    written = []
    for one in stored:
        scores = {"alias": one.benchmark}
        for scorer, scored in one.result["scorers"].items():
            figure = scored["figures"][0]
            scores |= {f"{scorer},none": figure["value"], f"{scorer}_stderr,none": figure["error"]}
        results["results"][one.benchmark] = scores
        asked = one.result["questions"]
        results["n-samples"][one.benchmark] = {"original": asked, "effective": len(_replies(one, rollout))}
        results["configs"][one.benchmark] = {"task": one.benchmark, "metadata": one.result["settings"]}
        path = folder / f"{stamp}_samples_{one.benchmark}.jsonl"
        path.write_text("".join(json.dumps(sample) + "\n" for sample in _samples(one, rollout)), encoding="utf-8")
        written.append(path)
    path = folder / f"{stamp}_results.json"
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return [path, *written]


def _samples(stored: Stored, rollout: int) -> Iterator[Mapping[str, Any]]:
    marks: dict[str, dict[str, float | None]] = {}
    for record in read_lines(stored.folder / "marks.jsonl"):
        if record["rollout"] == rollout:
            marks.setdefault(record["index"], {})[record["scorer"]] = record["value"]
    replies, asked = _replies(stored, rollout), _asked(stored)
    for number, (index, scores) in enumerate(marks.items()):
        reply = replies.get(index)
        if reply is None:
            continue
        verdicts = [value for value in scores.values() if value is not None]
        text, answer = asked[index]
        yield {
            "doc_id": number,
            "index": index,
            "input": text,
            "target": answer,
            "resps": [reply["text"]],
            "filtered_resps": reply["prediction"],
            "doc_hash": hashlib.sha256(f"{stored.benchmark}/{index}".encode()).hexdigest(),
            "token_counts": [{"output_tokens": reply["sampled_tokens"], "input_tokens": reply["prompt_tokens"]}],
            "num_tool_calls": sum(reply["calls"].values()),
            **({"score": verdicts[0]} if verdicts else {}),
            **scores,
        }


def _asked(stored: Stored) -> dict[str, tuple[str, str]]:
    """Question -> its text as it was asked, and the true answer."""
    prompts = stored.folder.parent / "prompts"
    for path in sorted(prompts.glob(f"{stored.benchmark}-*/note.json")):
        asked = json.loads(path.read_text(encoding="utf-8"))["asked"]
        if asked.items() <= stored.result["settings"].items():
            benchmark = find(stored.benchmark)
            questions = [Question(**record) for record in read_lines(path.with_name("questions.jsonl"))]
            return {one.index: (asked_text(benchmark, one, asked), one.answer) for one in questions}
    raise DataError(f"{prompts}: expected the questions of {stored.benchmark} there, found none; run the benchmark again")
