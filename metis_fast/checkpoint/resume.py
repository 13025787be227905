"""Exact resume state on disk.

    checkpoints/
      step-000010/               one folder a checkpoint; only whole ones have such a name
        trainer/                 what the Megatron back end's ranks wrote
        manifest.json            step, score, size and SHA-256 of every file
        state.json               scalars, random state, names of tensors that share memory
        tensors-00000.safetensors, ...
      .tmp-step-000020-1f2e3d4c  being written, or left by a killed process; removed when the folder is next opened

Nothing here is pickled: safetensors and JSON only; what Megatron-core writes into `trainer/` has pickles in it.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from metis_fast.checkpoint.atomic import clean_leftovers, new_folder, remove_folder
from metis_fast.checkpoint.manifest import THREADS, Entry, Manifest, damaged, entry_of, read_manifest, verify, write_manifest
from metis_fast.checkpoint.rng import RngState
from metis_fast.errors import CheckpointError

_STATE = "state.json"
_TENSORS = "tensors-"
_STEP = "step-"
_SHARD_BYTES = 1 << 30  # a file is copied to host memory at a time; small enough to hash several in parallel
_HEADER_BYTES = 512  # safetensors header and manifest entry of one tensor or file, generously

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Shards:
    """Files that a trainer writes into a checkpoint by itself, while the run goes on.

    begin: start writing into the checkpoint's folder, from a copy; finish: wait until all is there, OSError if it cannot be.
    num_bytes: about how much.
    """

    begin: Callable[[Path], None]
    finish: Callable[[], None]
    num_bytes: int


@dataclass(frozen=True, slots=True, eq=False)
class ResumeState:
    """Everything that a run's future depends on. Made and applied by `pipeline`.

    step: training steps done.
    tensors: flat dotted names -> weights, masters, optimizer moments (names: `params.py`), any device and layout; loaded ones
    are contiguous and on the CPU. Names that shared one tensor when saved share one when loaded.
    scalars: data cursor, counters, metrics; JSON values only (tuples come back as lists).
    rng: from `capture_rng`. shards: what is written beside the tensors; it is not read back here.
    """

    step: int
    tensors: Mapping[str, torch.Tensor] = field(repr=False)
    scalars: Mapping[str, Any]
    rng: RngState = field(repr=False)
    shards: Shards | None = None


@dataclass(frozen=True, slots=True, eq=False)
class LoadedCheckpoint:
    """An intact checkpoint. score: as given to `save`."""

    path: Path
    state: ResumeState
    score: tuple[float, ...] | None


def disk_free(folder: Path) -> int:
    """Bytes that this user may still write to the disk of `folder`."""
    return shutil.disk_usage(folder).free


class CheckpointStore:
    """The checkpoints of one run: the last few and the best one."""

    def __init__(self, folder: Path, keep_last: int, free_bytes: Callable[[Path], int] = disk_free) -> None:
        """Open (or create) a folder of checkpoints, and remove what a killed process left half-written.

        keep_last: how many of the newest stay, besides the best. free_bytes: asked before every save.

        Raises:
            CheckpointError: the folder cannot be created or read.
        """
        if keep_last < 1:
            raise ValueError(f"keep_last must be at least 1, got {keep_last}")
        self._folder = folder
        self._keep_last = keep_last
        self._free_bytes = free_bytes
        self._writing: Iterator[None] | None = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            clean_leftovers(folder)
        except OSError as error:
            raise CheckpointError(f"cannot open checkpoint folder {folder}: {error}; choose a writable run.dir") from error

    def save(self, step: int, state: ResumeState, score: tuple[float, ...] | None) -> Path:
        """Write a checkpoint, then delete those that are neither among the newest nor the best.

        A checkpoint of the same step is replaced. Until the new one is flushed to disk and in place, no other is touched. One
        with `state.shards` is there only after `finish`, which the next `save` calls too; a run may go on in between.

        score: compared as a tuple, larger is better (accuracy, then minus tool calls); None if the step was not evaluated.

        Raises:
            CheckpointError: the disk is full or failed; nothing of this checkpoint is left, and all others are as they were.
            TypeError: `state.scalars` holds what JSON cannot.
        """
        if state.step != step:
            raise ValueError(f"asked to save step {step}, got the state of step {state.step}")
        _require_json(state.scalars, "scalars")
        score = _usable(score, step)
        tensors, aliases = _split_aliases(state.tensors)
        document = json.dumps({"scalars": state.scalars, "rng": state.rng.to_json(), "aliases": aliases})
        shards = _shards(tensors)
        needed = sum(map(_num_bytes, tensors.values())) + len(document) + _HEADER_BYTES * (len(tensors) + len(shards) + 4)
        needed += state.shards.num_bytes if state.shards is not None else 0
        self.finish()
        target = self._folder / f"{_STEP}{step:06d}"
        self._writing = self._write(target, document, shards, state.shards, needed, step, score)
        next(self._writing, None)
        if state.shards is None:
            self.finish()
        return target

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if there is one, and put it in place.

        Raises:
            CheckpointError: as `save`.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            next(writing, None)

    def _write(
        self,
        target: Path,
        document: str,
        shards: list[dict[str, torch.Tensor]],
        others: Shards | None,
        needed: int,
        step: int,
        score: tuple[float, ...] | None,
    ) -> Iterator[None]:
        """Yields once where the run may go on."""
        known = self._manifests()
        sequence = 1 + max((manifest.sequence for manifest in known.values()), default=0)
        free: int | None = None
        try:
            free = self._free_bytes(self._folder)
            if free < needed:
                raise self._failure(target, "not enough space", needed, free)
            with new_folder(target) as tmp:
                (tmp / _STATE).write_text(document, encoding="utf-8")
                files = {_STATE: entry_of(tmp / _STATE)} | _write_shards(tmp, shards)
                if others is not None:
                    others.begin(tmp)
                    yield
                    others.finish()
                    files |= _entries(tmp, files)
                write_manifest(tmp, Manifest(step=step, sequence=sequence, score=score, files=files))
        except (OSError, SafetensorError) as error:
            raise self._failure(target, str(error), needed, free) from error
        self._prune()

    def latest(self) -> LoadedCheckpoint | None:
        """The checkpoint that was saved last; if it is damaged, the one before it, with a warning. None if there is none.

        Raises:
            CheckpointError: there are checkpoints, and all are damaged.
        """
        manifests = self._manifests()
        problem: CheckpointError | None = None
        # Those with an unreadable manifest come first, so that they are warned of.
        paths = sorted(
            self._paths(), key=lambda path: manifests[path].sequence if path in manifests else math.inf, reverse=True
        )
        for path in paths:
            try:
                return _read(path)
            except CheckpointError as error:
                _log.warning("%s; falling back to an earlier checkpoint", error)
                problem = error
        if problem is not None:
            raise CheckpointError(
                f"none of the {len(paths)} checkpoints in {self._folder} is intact (last tried: {problem}); "
                "restore one from a copy, or choose another run.dir to start anew"
            )
        return None

    def load(self, step: int) -> LoadedCheckpoint:
        """The checkpoint of that step.

        Raises:
            CheckpointError: there is none, or it is damaged.
        """
        path = self._folder / f"{_STEP}{step:06d}"
        if not path.is_dir():
            raise CheckpointError(
                f"no checkpoint of step {step} in {self._folder}, there are {list(self.steps())}; choose one of them"
            )
        return _read(path)

    def steps(self) -> tuple[int, ...]:
        """Steps of the checkpoints with a readable manifest, oldest save first."""
        return tuple(manifest.step for manifest in self._oldest_first().values())

    def best_step(self) -> int | None:
        """Step of the checkpoint with the best score (the newest of equals); None if none was scored."""
        best = _best(self._oldest_first())
        return None if best is None else best[1].step

    def _paths(self) -> list[Path]:
        try:
            return [path for path in self._folder.iterdir() if path.name.startswith(_STEP) and path.is_dir()]
        except OSError as error:
            raise CheckpointError(f"cannot read checkpoint folder {self._folder}: {error}; make it readable") from error

    def _manifests(self) -> dict[Path, Manifest]:
        found = {}
        for path in self._paths():
            try:
                found[path] = read_manifest(path)
            except CheckpointError as error:
                _log.debug("%s", error)  # `latest` and `load` say so aloud
        return found

    def _oldest_first(self) -> dict[Path, Manifest]:
        return dict(sorted(self._manifests().items(), key=lambda item: item[1].sequence))

    def _prune(self) -> None:
        """A folder without a readable manifest is left for the user to look at."""
        manifests = self._oldest_first()
        kept = set(list(manifests)[-self._keep_last :])
        best = _best(manifests)
        if best is not None:
            kept.add(best[0])
        for path in manifests.keys() - kept:
            try:
                remove_folder(path)
            except OSError as error:
                _log.warning("cannot delete old checkpoint %s: %s", path, error)

    def _failure(self, target: Path, reason: str, needed: int, free: int | None) -> CheckpointError:
        others = list(self._oldest_first())
        safe = f"training state up to step {_step_of(others[-1])} is safe" if others else "no earlier checkpoint exists"
        free_text = "unknown" if free is None else _gib(free)
        return CheckpointError(
            f"cannot write checkpoint {target.name} to {self._folder}: {' '.join(reason.split())} (needs {_gib(needed)}, free "
            f"{free_text}); {safe}; free some space or choose another disk, and resume"
        )


def _best(oldest_first: Mapping[Path, Manifest]) -> tuple[Path, Manifest] | None:
    best: tuple[Path, Manifest] | None = None
    best_score: tuple[float, ...] = ()
    for path, manifest in oldest_first.items():
        if manifest.score is not None and (best is None or manifest.score >= best_score):
            best, best_score = (path, manifest), manifest.score
    return best


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix(_STEP))


def _usable(score: tuple[float, ...] | None, step: int) -> tuple[float, ...] | None:
    if score is not None and any(math.isnan(part) for part in score):
        _log.warning("score %s of step %d is not a number; the checkpoint counts as not evaluated", score, step)
        return None
    return score


def _num_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"


def _require_json(value: object, where: str) -> None:
    """`json.dumps` alone would turn the keys 1 and True into strings without a word."""
    match value:
        case None | bool() | int() | float() | str():
            return
        case Mapping():
            for key, item in value.items():
                if not isinstance(key, str):
                    raise TypeError(f"{where} has the key {key!r}; JSON keys are strings")
                _require_json(item, f"{where}.{key}")
        case list() | tuple():
            for index, item in enumerate(value):
                _require_json(item, f"{where}[{index}]")
        case _:
            raise TypeError(f"{where} is a {type(value).__name__}, which JSON cannot hold")


def _split_aliases(tensors: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Tied weights (one memory, two names) are written once. Views that overlap otherwise are written in full, each."""
    unique: dict[str, torch.Tensor] = {}
    aliases: dict[str, str] = {}
    seen: dict[tuple[Any, ...], str] = {}
    for name, tensor in tensors.items():
        key = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and key in seen:  # empty tensors all have address 0
            aliases[name] = seen[key]
        else:
            seen[key] = name
            unique[name] = tensor
    return unique, aliases


def _shards(tensors: Mapping[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + _num_bytes(tensor) > _SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += _num_bytes(tensor)
    return shards


def _write_shards(folder: Path, shards: list[dict[str, torch.Tensor]]) -> dict[str, Entry]:
    def write(index: int) -> tuple[str, Entry]:
        path = folder / f"{_TENSORS}{index:05d}.safetensors"
        save_file({name: _own_memory(tensor) for name, tensor in shards[index].items()}, path)
        return path.name, entry_of(path)

    with ThreadPoolExecutor(THREADS) as pool:
        return dict(pool.map(write, range(len(shards))))


def _entries(folder: Path, known: Collection[str]) -> dict[str, Entry]:
    """Of all files below a folder that are not known yet."""
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    new = [name for name in names if name not in known]
    with ThreadPoolExecutor(THREADS) as pool:
        return dict(zip(new, pool.map(lambda name: entry_of(folder / name), new), strict=True))


def _own_memory(tensor: torch.Tensor) -> torch.Tensor:
    """safetensors takes contiguous tensors that share no memory."""
    tensor = tensor.detach().cpu().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == _num_bytes(tensor) else tensor.clone()


def _read(path: Path) -> LoadedCheckpoint:
    manifest = read_manifest(path)
    tensors: dict[str, torch.Tensor] = {}
    try:
        verify(path, manifest)
        document = json.loads((path / _STATE).read_text(encoding="utf-8"))
        for name in manifest.files:
            if name.startswith(_TENSORS):
                # Cloned out of the file mapping, which would keep the space of a deleted checkpoint in use.
                tensors |= {key: tensor.clone() for key, tensor in load_file(path / name).items()}
    except (OSError, SafetensorError) as error:
        raise damaged(path, str(error)) from error
    tensors |= {name: tensors[first] for name, first in document["aliases"].items()}
    state = ResumeState(
        step=manifest.step, tensors=tensors, scalars=document["scalars"], rng=RngState.from_json(document["rng"])
    )
    return LoadedCheckpoint(path=path, state=state, score=manifest.score)
