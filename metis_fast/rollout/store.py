"""Every rollout of a run, on disk: one Parquet part a step, and each distinct image once.

    rollouts/step-000012.parquet          one row a rollout; images by content hash
    rollouts/images/<hash of hashes>.arrow   the images that no earlier part had brought, uncompressed, memory-mapped

Image files are named by what they hold and are never changed or removed, so that writing a part again (after a crash, or with
other rollouts after a resume) cannot take an image away from another part. They are written before the part that needs them,
and both appear by a rename: a reader never sees half a file. Several processes may write to a folder at once, each to parts of
its own names.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from metis_fast import seal
from metis_fast.errors import DataError, one_line
from metis_fast.types import (
    ImageBlob,
    ImageSpan,
    Outcome,
    Rollout,
    Score,
    ScoredGroup,
    ToolCall,
    Turn,
    Verdict,
)

_ROWS_PER_GROUP = 256  # at the paper's 16K-token limit a row group holds up to 70 MB of token columns

_SPAN = pa.struct([("sha256", pa.string()), *((name, pa.int32()) for name in ("start", "stop", "t", "h", "w"))])
_TURN = pa.struct(
    [
        ("text", pa.string()),
        ("start", pa.int32()),
        ("stop", pa.int32()),
        ("observation_stop", pa.int32()),
        ("outcome", pa.string()),
        ("call", pa.struct([("name", pa.string()), ("arguments", pa.string())])),
        ("observation", pa.string()),
        ("tool_s", pa.float64()),
    ]
)
_VERDICT_1 = pa.struct([("correct", pa.bool_()), ("format_ok", pa.bool_()), ("answer", pa.string())])
_VERDICT = pa.struct([*_VERDICT_1, ("judge", pa.string()), ("reason", pa.string())])
_TOKEN_COLUMNS = (
    ("tokens", np.int32, pa.int32()),
    ("sampled", np.bool_, pa.bool_()),
    ("logp", np.float32, pa.float32()),
    ("weight_version", np.int32, pa.int32()),
)
_SCHEMA = pa.schema(
    [
        ("prompt_uid", pa.string()),
        ("index", pa.int32()),
        ("ability", pa.string()),
        ("kind", pa.string()),
        ("question", pa.string()),
        ("answers", pa.list_(pa.string())),
        ("judge_style", pa.string()),
        ("text", pa.string()),
        ("outcome", pa.string()),
        ("error", pa.string()),
        ("verdict", _VERDICT),
        ("score_outcome", pa.string()),
        ("r_acc", pa.float64()),
        ("r_tool", pa.float64()),
        ("adv_acc", pa.float64()),
        ("adv_tool", pa.float64()),
        ("qualifies", pa.bool_()),
        ("in_tool_denominator", pa.bool_()),
        ("needs_gradient", pa.bool_()),
        ("no_verdict", pa.string()),
        ("turns", pa.list_(_TURN)),
        ("images", pa.list_(pa.string())),
        ("image_spans", pa.list_(_SPAN)),
        ("prompt_len", pa.int32()),
        *((name, pa.list_(arrow)) for name, _, arrow in _TOKEN_COLUMNS),
    ],
    metadata={b"metis_fast.rollouts": b"2", seal.KEY: seal.OPEN},
)
_SCHEMA_1 = pa.schema(  # of runs before verdicts had reasons
    [
        pa.field("verdict", _VERDICT_1) if field.name == "verdict" else field
        for field in _SCHEMA
        if field.name not in ("judge_style", "no_verdict")
    ]
)
_IMAGE_SCHEMA = pa.schema([("sha256", pa.string()), ("data", pa.large_binary())], metadata={seal.KEY: seal.OPEN})


@dataclass(frozen=True, slots=True, eq=False)
class StoredRollout:
    """One row of a store.

    kind: `prompt.extra["kind"]`, None where the data has none. judge_style: of the prompt, "" where an older version stored it
    without. text: what the policy wrote and what the tools answered, in
    order, for people; training reads `rollout.tokens`.
    """

    rollout: Rollout
    score: Score
    ability: str
    kind: str | None
    question: str
    answers: tuple[str, ...]
    judge_style: str
    text: str


def _write_atomically(path: Path, name: str, fill: Callable[[Path], None]) -> None:
    """Let `fill` write a neighbour of `path`, flush it to disk, and rename it. name: of the part that it is for, which nobody
    else writes; the path itself may be somebody else's, too."""
    scratch = path.with_name(f".{name}{path.suffix}.tmp")
    fill(scratch)
    with scratch.open("rb") as handle:
        os.fsync(handle.fileno())
    scratch.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class _Images:
    """The images of a folder by content hash; only those asked for are read from disk."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._where: dict[str, tuple[pa.ChunkedArray, int]] = {}
        for path in sorted(folder.glob("*.arrow")):
            self._open(path)

    def _open(self, path: Path) -> None:
        seal.check_seal(path)  # Arrow ends the process at some damage in its metadata
        try:
            table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
            hashes, data = table["sha256"].to_pylist(), table["data"]
        except (OSError, pa.ArrowException, KeyError, ValueError) as error:
            raise DataError(f"{path}: expected an Arrow file of images, got {error}; restore it from a copy") from None
        self._where.update((sha256, (data, row)) for row, sha256 in enumerate(hashes))

    def add(self, images: Mapping[str, ImageBlob], name: str) -> None:
        """Store those of `images` that are not stored yet, in one new file. name: of the part that has them."""
        new = sorted(images.keys() - self._where.keys())
        if not new:
            return

        def fill(scratch: Path) -> None:
            with pa.OSFile(str(scratch), "wb") as sink, pa.ipc.new_file(sink, _IMAGE_SCHEMA) as writer:
                for sha256 in new:  # a batch each: only one image is copied at a time
                    writer.write_batch(pa.record_batch([[sha256], [images[sha256].data]], schema=_IMAGE_SCHEMA))
            seal.seal(scratch)

        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"{hashlib.sha256(''.join(new).encode()).hexdigest()[:32]}.arrow"
        _write_atomically(path, name, fill)
        self._open(path)

    def get(self, sha256: str) -> ImageBlob:
        """The image of that hash.

        Raises:
            DataError: it is not there, or its bytes have another hash.
        """
        if sha256 not in self._where:
            raise DataError(f"{self._folder}: image {sha256} is missing; copy a part together with its `images` folder")
        column, row = self._where[sha256]
        image = ImageBlob.of(column[row].as_py())
        if image.sha256 != sha256:
            raise DataError(f"{self._folder}: image {sha256} is damaged on disk; restore the folder from a copy")
        return image


def _readable(rollout: Rollout) -> str:
    parts = []
    for turn in rollout.turns:
        parts.append(turn.text)
        if turn.call is not None:
            parts.append(f"\n<observation>{turn.observation}</observation>\n")
    return "".join(parts)


def _row(group: ScoredGroup, rollout: Rollout, score: Score) -> dict[str, object]:
    """The columns that are not per token."""
    kind = group.prompt.extra.get("kind")
    return {
        "prompt_uid": rollout.prompt_uid,
        "index": rollout.index,
        "ability": group.prompt.ability,
        "kind": None if kind is None else str(kind),
        "question": group.prompt.question,
        "answers": group.prompt.answers,
        "judge_style": group.prompt.judge_style,
        "text": _readable(rollout),
        "outcome": rollout.outcome,
        "error": rollout.error,
        "verdict": None if score.verdict is None else asdict(score.verdict),
        "score_outcome": score.outcome,
        "r_acc": score.r_acc,
        "r_tool": score.r_tool,
        "adv_acc": score.adv_acc,
        "adv_tool": score.adv_tool,
        "qualifies": score.qualifies,
        "in_tool_denominator": score.in_tool_denominator,
        "needs_gradient": score.needs_gradient,
        "no_verdict": score.no_verdict,
        "turns": [asdict(turn) for turn in rollout.turns],
        "images": [image.sha256 for image in rollout.images],
        "image_spans": [
            dict(zip(("sha256", "start", "stop", "t", "h", "w"), (span.sha256, span.start, span.stop, *span.grid), strict=True))
            for span in rollout.image_spans
        ],
        "prompt_len": rollout.prompt_len,
    }


def _batch(members: Sequence[tuple[ScoredGroup, Rollout, Score]]) -> pa.RecordBatch:
    rows = [_row(*member) for member in members]
    columns = {name: pa.array([row[name] for row in rows], _SCHEMA.field(name).type) for name in rows[0]}
    rollouts = [rollout for _, rollout, _ in members]
    offsets = pa.array(np.concatenate([[0], np.cumsum([len(rollout.tokens) for rollout in rollouts])]).astype(np.int32))
    for name, dtype, arrow in _TOKEN_COLUMNS:
        flat = np.concatenate([getattr(rollout, name) for rollout in rollouts]).astype(dtype, copy=False)
        columns[name] = pa.ListArray.from_arrays(offsets, pa.array(flat, arrow))
    return pa.record_batch([columns[name] for name in _SCHEMA.names], schema=_SCHEMA)


class RolloutStore:
    """Writes the rollouts of a run, a part at a time."""

    def __init__(self, folder: Path) -> None:
        """Open `folder`, which is made by the first write.

        Raises:
            DataError: an image file of an earlier write is damaged.
        """
        self._folder = folder
        self._images = _Images(folder / "images")

    def write(self, name: str, groups: Sequence[ScoredGroup]) -> Path:
        """Write `<name>.parquet`, replacing an earlier one; return its path.

        When this returns the part is on disk; if the process dies before, the earlier part of that name, or none, is there.
        The same groups give the same bytes, whatever was written before.
        """
        if not name or name.startswith(".") or "/" in name:
            raise ValueError(f"a part needs a plain file name, got {name!r}")
        members = [
            (group, rollout, score) for group in groups for rollout, score in zip(group.rollouts, group.scores, strict=True)
        ]
        self._folder.mkdir(parents=True, exist_ok=True)
        self._images.add({image.sha256: image for _, rollout, _ in members for image in rollout.images}, name)

        def fill(scratch: Path) -> None:
            with pq.ParquetWriter(
                scratch, _SCHEMA, compression="zstd", use_dictionary=False, write_page_checksum=True
            ) as writer:
                for start in range(0, len(members), _ROWS_PER_GROUP):
                    writer.write_batch(_batch(members[start : start + _ROWS_PER_GROUP]))
            seal.seal(scratch)

        path = self._folder / f"{name}.parquet"
        _write_atomically(path, name, fill)
        return path


def _turn(row: dict[str, Any]) -> Turn:
    call = None if row["call"] is None else ToolCall(**row["call"])
    return Turn(**{**row, "outcome": Outcome(row["outcome"]), "call": call})


def _token_views(column: pa.ListArray, dtype: type) -> list[np.ndarray]:
    """One array a row; all are views of one writable copy, so that torch takes them without a warning."""
    offsets = column.offsets.to_numpy()
    flat = np.array(column.values.to_numpy(zero_copy_only=False), dtype=dtype)
    return [flat[start:stop] for start, stop in pairwise(offsets)]


def _restore(row: dict[str, Any], tokens: Mapping[str, np.ndarray], image: Callable[[str], ImageBlob]) -> StoredRollout:
    rollout = Rollout(
        prompt_uid=row["prompt_uid"],
        index=row["index"],
        prompt_len=row["prompt_len"],
        images=tuple(image(sha256) for sha256 in row["images"]),
        image_spans=tuple(
            ImageSpan(span["sha256"], span["start"], span["stop"], (span["t"], span["h"], span["w"]))
            for span in row["image_spans"]
        ),
        turns=tuple(_turn(turn) for turn in row["turns"]),
        outcome=Outcome(row["outcome"]),
        error=row["error"],
        **tokens,
    )
    score = Score(
        verdict=None if row["verdict"] is None else Verdict(**row["verdict"]),
        outcome=Outcome(row["score_outcome"]),
        r_acc=row["r_acc"],
        r_tool=row["r_tool"],
        adv_acc=row["adv_acc"],
        adv_tool=row["adv_tool"],
        qualifies=row["qualifies"],
        in_tool_denominator=row["in_tool_denominator"],
        needs_gradient=row["needs_gradient"],
        no_verdict=row.get("no_verdict", ""),
    )
    return StoredRollout(
        rollout=rollout,
        score=score,
        ability=row["ability"],
        kind=row["kind"],
        question=row["question"],
        answers=tuple(row["answers"]),
        judge_style=row.get("judge_style", ""),
        text=row["text"],
    )


@contextmanager
def _opened(path: Path) -> Iterator[pq.ParquetFile]:
    try:
        seal.check_seal(path)
        part = pq.ParquetFile(path, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"cannot read rollouts {path}: {error}; expected a Parquet file that a rollout store wrote") from None
    with part:
        if not any(part.schema_arrow.equals(schema) for schema in (_SCHEMA, _SCHEMA_1)):
            raise DataError(f"{path}: its columns are not those of a rollout store; give a file of a run's `rollouts` folder")
        yield part


def _read_part(path: Path) -> Iterator[StoredRollout]:
    with _opened(path) as part:
        stored, seen = _Images(path.parent / "images"), dict[str, ImageBlob]()

        def image(sha256: str) -> ImageBlob:
            if sha256 not in seen:
                seen[sha256] = stored.get(sha256)
            return seen[sha256]

        token_names = [name for name, _, _ in _TOKEN_COLUMNS]
        try:
            for batch in part.iter_batches(_ROWS_PER_GROUP):
                rows = batch.drop_columns(token_names).to_pylist()
                views = [_token_views(batch.column(name), dtype) for name, dtype, _ in _TOKEN_COLUMNS]
                for row, *arrays in zip(rows, *views, strict=True):
                    yield _restore(row, dict(zip(token_names, arrays, strict=True)), image)
        except (OSError, pa.ArrowException, ValueError, TypeError) as error:  # the last one: another program left nulls in it
            raise DataError(f"{path} is damaged: {one_line(error)}; restore it from a copy") from None


def stored_styles(path: Path) -> Counter[str]:
    """Judge styles of the rollouts of a part, with their numbers; "" where an older version stored them without.

    Raises:
        DataError: not a part of a store.
    """
    with _opened(path) as part:
        if "judge_style" not in part.schema_arrow.names:
            return Counter({"": part.metadata.num_rows})
        try:
            return Counter(str(style) for style in part.read(["judge_style"])["judge_style"].to_pylist())
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path} is damaged: {one_line(error)}; restore it from a copy") from None


def read_rollouts(path: Path) -> Iterator[StoredRollout]:
    """Rollouts as they were written, equal in every field, from one part or from a folder of parts (in name order).

    Memory: one row group, and the distinct images of the part; rollouts of a part share their `ImageBlob` objects.

    Raises:
        DataError: nothing there, not a part of a store, or an image missing or damaged.
    """
    parts = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not parts:
        raise DataError(f"{path}: expected Parquet files of rollouts, found none; give a run's `rollouts` folder or a file")
    for part in parts:
        yield from _read_part(part)
