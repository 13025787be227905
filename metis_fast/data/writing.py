"""Prompts to a Parquet file of the Metis-RL schema."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from metis_fast.errors import DataError, one_line
from metis_fast.scratch import stopped_by_signals
from metis_fast.types import JsonScalar, Message, Prompt

_FIXED_FIELDS = (
    pa.field("data_source", pa.string()),
    pa.field("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
    pa.field("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
    pa.field("ability", pa.string()),
    pa.field("reward_model", pa.struct([("ground_truth", pa.list_(pa.string())), ("style", pa.string())])),
)


def _content(prompt: Prompt, message: Message) -> str:
    if message.texts:
        raise DataError(f"prompt {prompt.uid}: its text holds `<image>`, which the schema reads as an image; reword it")
    return message.content


def _extra_info(prompt: Prompt) -> dict[str, JsonScalar]:
    if "question" in prompt.extra:
        raise DataError(f"prompt {prompt.uid}: `extra` holds `question`, which the schema keeps for Prompt.question; rename it")
    return {"question": prompt.question, **{key: value for key, value in prompt.extra.items() if value is not None}}


def _row_group(prompts: Sequence[Prompt]) -> pa.Table:
    try:
        extra_info = pa.array([_extra_info(prompt) for prompt in prompts])
    except (pa.ArrowException, OverflowError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"prompts {prompts[0].uid} to {prompts[-1].uid}: `extra` has a key of mixed types: {reason}") from None
    fixed = [
        [prompt.data_source for prompt in prompts],
        [[{"role": message.role, "content": _content(prompt, message)} for message in prompt.messages] for prompt in prompts],
        [[{"bytes": image.data, "path": None} for image in prompt.images] for prompt in prompts],
        [prompt.ability for prompt in prompts],
        [{"ground_truth": list(prompt.answers), "style": prompt.judge_style} for prompt in prompts],
    ]
    columns = [pa.array(values, field.type) for values, field in zip(fixed, _FIXED_FIELDS, strict=True)]
    return pa.table([*columns, extra_info], schema=pa.schema([*_FIXED_FIELDS, pa.field("extra_info", extra_info.type)]))


def _fit(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """The same rows under a schema whose extra_info has more or wider fields."""
    values = pa.array(table["extra_info"].to_pylist(), schema.field("extra_info").type)
    return table.set_column(len(_FIXED_FIELDS), schema.field("extra_info"), values)


def _open_writer(path: Path, schema: pa.Schema) -> pq.ParquetWriter:
    # Dictionaries and statistics of image bytes cost time and space, and the short columns are small under zstd alone.
    return pq.ParquetWriter(path, schema, compression="zstd", use_dictionary=False, write_statistics=False)


def _write_groups(path: Path, groups: Iterator[pa.Table]) -> int:
    """Write row groups; where one brings new `extra` keys, what is written so far is copied under the wider schema."""
    num_rows, table = 0, next(groups, None)
    if table is None:
        raise DataError("no prompts to write; give at least one")
    schema, writer = table.schema, _open_writer(path, table.schema)
    try:
        while table is not None:
            try:
                wider = pa.unify_schemas([schema, table.schema], promote_options="permissive")
            except pa.ArrowException as error:
                raise DataError(f"rows from {num_rows} on: `extra` has a key of mixed types: {error}") from None
            if not wider.equals(schema):
                writer.close()
                narrow = path.rename(path.with_name(path.name + ".narrow"))
                schema, writer = wider, _open_writer(path, wider)
                with pq.ParquetFile(narrow) as written:
                    for index in range(written.num_row_groups):
                        writer.write_table(_fit(written.read_row_group(index), schema))
                narrow.unlink()
            writer.write_table(_fit(table, schema))
            num_rows, table = num_rows + len(table), next(groups, None)
    finally:
        writer.close()
    return num_rows


def write_prompts(path: Path, prompts: Iterable[Prompt], row_group_size: int = 256) -> int:
    """Write prompts in the Metis-RL schema and return how many there were.

    Streams: `row_group_size` prompts are in memory at once. Atomic: `path` appears (or is replaced) only when it is complete.
    `extra` becomes `extra_info`, whose fields are the union over all prompts; None values are left out. `uid` is not stored:
    readers name rows by file and row.

    Raises:
        DataError: no prompts, an `extra` whose types differ between prompts or that holds `question`, or a path that
            cannot be written.
    """
    source = iter(prompts)
    groups = map(_row_group, iter(lambda: list(islice(source, row_group_size)), []))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with stopped_by_signals():
            try:
                num_rows = _write_groups(temporary, groups)
                temporary.replace(path)
            finally:
                for leftover in (temporary, temporary.with_name(temporary.name + ".narrow")):
                    leftover.unlink(missing_ok=True)
    except OSError as error:
        raise DataError(f"cannot write {path}: {one_line(error)}; choose a folder that can be written") from error
    return num_rows
