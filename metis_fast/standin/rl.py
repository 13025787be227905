"""Metis-RL: Parquet files of prompts with truths, with bytes as lists of integers (as published, most likely) or as binary."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from metis_fast.standin.files import write_shards
from metis_fast.standin.questions import Asked
from metis_fast.standin.words import system_message

_SOURCES = {"math": "vthinker-sft", "perception": "standin-charts", "search": "standin-fvqa", "general": "standin-general"}
_MESSAGE = pa.struct([("content", pa.string()), ("role", pa.string())])


def write_rl(folder: Path, asked: Sequence[Asked], integers: bool) -> None:
    """As the hub has it: `data/train-00000-of-0000N.parquet`. integers: bytes as lists of 64-bit integers."""
    write_shards(folder, asked, lambda rows: _table(rows, integers))


def _table(rows: Sequence[Asked], integers: bool) -> pa.Table:
    questions = [f"<image>\n{one.question.text}" for one in rows]
    prompts = [
        [{"content": system_message(one.tools), "role": "system"}, {"content": question, "role": "user"}]
        for one, question in zip(rows, questions, strict=True)
    ]
    data = _integers([one.image for one in rows]) if integers else pa.array([one.image for one in rows], pa.binary())
    images = pa.ListArray.from_arrays(
        pa.array(np.arange(len(rows) + 1), pa.int32()), pa.StructArray.from_arrays([data], ["bytes"])
    )
    answers = [one.question.answer for one in rows]
    return pa.table(
        {
            "data_source": pa.array([_SOURCES[one.question.ability] for one in rows]),
            "prompt": pa.array(prompts, pa.list_(_MESSAGE)),
            "images": images,
            "ability": pa.array([one.question.ability for one in rows]),
            "reward_model": pa.array([{"ground_truth": answer, "style": "rule"} for answer in answers]),
            "extra_info": pa.array(
                [
                    {"answer": answer, "index": one.index, "pass8": one.number % 3, "question": question}
                    for one, answer, question in zip(rows, answers, questions, strict=True)
                ]
            ),
        }
    )


def _integers(images: Sequence[bytes]) -> pa.ListArray:
    offsets = np.cumsum([0, *map(len, images)])
    values = np.frombuffer(b"".join(images), np.uint8).astype(np.int64)
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(values))
