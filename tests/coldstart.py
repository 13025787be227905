"""Conversations in the Metis-ColdStart schema for tests: written to Parquet in each of its forms."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

SYSTEM = "Be brief."
CALL = '<reason>Too small.</reason>\n<tool_call>{"name": "python", "arguments": {"code": "c = image_1"}}</tool_call>'
SHOWN = "Code execution result:\nstdout:\n```\n\n```\n\nstderr:\n```\n\n```\n\nImages:\n<image>"
FOUND = "<tool_response>\n## Web Results\nPage 1.\n</tool_response>"


def say(role: str, content: object) -> dict[str, object]:
    """A message."""
    return {"content": content, "role": role}


def png(seed: int, width: int = 32, height: int = 32, mode: str = "RGB") -> bytes:
    """Noise, encoded."""
    pixels = np.random.default_rng([seed, width, height]).integers(0, 256, (height, width, len(mode)), np.uint8)
    data = BytesIO()
    Image.fromarray(pixels, mode).save(data, "PNG")
    return data.getvalue()


def conversations(num: int) -> list[tuple[Any, list[bytes]]]:
    """Of odd lengths: text alone, two images in a prompt, an observation with one, a `tool` role, parts as content."""
    made: list[tuple[Any, list[bytes]]] = []
    for i in range(num):
        answer = say("assistant", f"<reason>known{' so' * (i % 7)}</reason>\n<answer>{i}</answer>")
        match i % 4:
            case 0:
                made.append(([say("system", SYSTEM), say("user", f"Which city is {i}?"), answer], []))
            case 1:
                asked = say("user", "<image>\nWhich bar is highest?")
                shown = [asked, say("assistant", CALL), say("user", SHOWN), answer]
                made.append(([say("system", SYSTEM), *shown], [png(i, 64, 48), png(i + 1000, 40, 32, "RGBA")]))
            case 2:
                asked = say("user", "Who said it?")
                made.append(([asked, say("assistant", CALL), say("tool", FOUND), answer], []))
            case _:
                parts = [{"type": "image"}, {"type": "text", "text": " or "}, {"type": "image"}, {"type": "text", "text": "?"}]
                made.append(([say("user", parts), answer], [png(i), png(i + 2000, 96, 32)]))
    return made


def table(rows: Sequence[tuple[object, Sequence[bytes]]], form: str = "base64") -> pa.Table:
    """form: of the images."""
    messages = [one if isinstance(one, str) else json.dumps(one) for one, _ in rows]
    images = [list(some) for _, some in rows]
    match form:
        case "base64":
            column = pa.array([[base64.b64encode(one).decode() for one in some] for some in images], pa.list_(pa.string()))
        case "data":
            prefix = "data:image/png;base64,"
            texts = [[prefix + base64.b64encode(one).decode() for one in some] for some in images]
            column = pa.array(texts, pa.list_(pa.string()))
        case "binary":
            column = pa.array(images, pa.list_(pa.binary()))
        case "integers":
            column = pa.array([[list(one) for one in some] for some in images], pa.list_(pa.list_(pa.int64())))
        case "signed integers":
            bytes_ = [[np.frombuffer(one, np.int8).tolist() for one in some] for some in images]
            column = pa.array(bytes_, pa.list_(pa.list_(pa.int8())))
        case "small integers":
            column = pa.array([[list(one) for one in some] for some in images], pa.large_list(pa.list_(pa.uint8())))
        case "struct":
            kind = pa.list_(pa.struct([("bytes", pa.list_(pa.int32())), ("path", pa.string())]))
            column = pa.array([[{"bytes": list(one), "path": None} for one in some] for some in images], kind)
        case _:
            raise ValueError(form)
    return pa.table({"messages": pa.array(messages), "images": column})


def write(path: Path, rows: Sequence[tuple[object, Sequence[bytes]]], form: str = "base64", group: int = 4) -> Path:
    """A file with row groups of `group` rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table(rows, form), path, row_group_size=group)
    return path
