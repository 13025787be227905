"""What a run folder keeps of the settings and files that decide its result, and whether a run may go on with others.

config.yaml     settings, resolved
inputs.json     what the files were that settings name: digests of rows of data, of models and corpora
changes.jsonl   what differs since the run began: mended rows, and what `run.accept_changes` let through
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from tqdm import tqdm

from metis_fast import config as config_module
from metis_fast.config import Config, by_content, deciding
from metis_fast.data.content import DataRecord
from metis_fast.data.parquet import PromptFiles
from metis_fast.errors import ConfigError
from metis_fast.report.progress import progress

_LOG = logging.getLogger(__name__)
_CONFIG, _INPUTS, _CHANGES = "config.yaml", "inputs.json", "changes.jsonl"
_SUFFIXES = (".safetensors", ".json", ".jinja", ".txt", ".parquet", ".arrow")  # not a README, nor what tools keep beside
_ENDS = 1 << 20  # bytes at each end: a safetensors file begins with its shapes, a Parquet file ends with its statistics


@dataclass(frozen=True, slots=True)
class Change:
    """A setting, or the files that it names, that is not what the run began with."""

    key: str
    before: object
    now: object


@dataclass(frozen=True, slots=True, eq=False)
class RunRecord:
    """Made by `open_record`. inputs: by dotted key. changes: what differs from the record in the folder, all of it allowed."""

    config: Config
    inputs: Mapping[str, DataRecord | str]
    changes: list[Change] = field(default_factory=list)

    def save(self) -> None:
        """Write settings and inputs into the folder.

        Raises:
            ConfigError: it cannot be made.
        """
        folder = self.config.run.dir
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"cannot make the run folder {folder}: {error.strerror}; set run.dir to one that you can write"
            ) from None
        inputs = {key: one.to_json() if isinstance(one, DataRecord) else one for key, one in self.inputs.items()}
        _write(folder / _INPUTS, json.dumps({"sha256": _checksum(inputs), "inputs": inputs}) + "\n")
        _write(folder / _CONFIG, config_module.to_yaml(self.config))

    def log_changes(self, step: int) -> None:
        """Append what differs, with the step that is the last one before it."""
        lines = [
            json.dumps({"after_step": step, "time": time.time(), "key": one.key, "before": one.before, "now": one.now})
            for one in self.changes
        ]
        if lines:
            with (self.config.run.dir / _CHANGES).open("a", encoding="utf-8") as file:
                file.write("\n".join(lines) + "\n")
            self.changes.clear()


def open_record(config: Config, data: Mapping[str, PromptFiles], check: Callable[[], None] = lambda: None) -> RunRecord:
    """Compare settings and files with what `config.run.dir` began with; rows keep the names and the order that they had.

    data: opened files of prompts by dotted key. They are read whole in a new run, and where they changed. check: called
    meanwhile; what it raises goes on.

    Raises:
        ConfigError: the folder holds a run with other settings or other files, or what it keeps of them is gone or damaged.
        DataError: a row group cannot be decoded.
    """
    folder = config.run.dir
    old_config, old_inputs = _load(folder)
    changes = [] if old_config is None else _setting_changes(old_config, config)
    inputs: dict[str, DataRecord | str] = {}
    for key, files in data.items():
        known = old_inputs.get(key)
        known = known if isinstance(known, DataRecord) else None
        with progress(len(files), f"reading {key}", config.log, "row") as bar:
            now = files.record(known, lambda rows, bar=bar: _tick(bar, rows, check))
        inputs[key] = now if known is None else _go_on(key, files, known, now, changes)
    for key, path in by_content(config):
        if key not in data and path.exists():  # what is missing, and needed, is found where it is opened
            inputs[key] = files_digest(path)
            before = old_inputs.get(key, inputs[key])
            if before != inputs[key]:
                changes.append(Change(key, before, inputs[key]))
    refused = [one for one in changes if one.key not in config.run.accept_changes and not _is_mended(one)]
    if refused:
        raise ConfigError(_refusal(folder, refused[0]))
    for change in changes:
        _LOG.warning("%s is not what %s began with: %s; the run goes on with it", change.key, folder, _words(change))
    # what the folder knew and nobody asked for now stays
    return RunRecord(config, old_inputs | inputs, changes)


def files_digest(path: Path) -> str:
    """What a file, or the model, corpus or trajectories in a folder are known by: names, sizes, and the bytes at both ends of
    each, since weights of 17 GB are not read twice."""
    digest = sha256()
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.suffix in _SUFFIXES)
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.relative_to(path)}:{size}\n".encode(errors="surrogateescape"))
        with file.open("rb") as opened:
            digest.update(opened.read(_ENDS))
            opened.seek(max(0, size - _ENDS))
            digest.update(opened.read(_ENDS))
    return f"sha256 {digest.hexdigest()[:16]}"


def _checksum(tree: object) -> str:
    return sha256(json.dumps(tree).encode()).hexdigest()


def _write(path: Path, text: str) -> None:
    scratch = path.with_name(f".{path.name}.tmp")
    scratch.write_text(text, encoding="utf-8")
    scratch.replace(path)


def _tick(bar: tqdm, rows: int, check: Callable[[], None]) -> None:
    bar.update(rows)
    check()


def _load(folder: Path) -> tuple[Config | None, dict[str, DataRecord | str]]:
    """What the folder keeps; nothing in a new one."""
    missing = [name for name in (_CONFIG, _INPUTS) if not (folder / name).exists()]
    if missing:
        if any((folder / "checkpoints").glob("step-*")):
            raise ConfigError(
                f"{folder} holds checkpoints, but its {missing[0]} is gone, so that nobody can say whether the settings are "
                "still the same; restore it from a copy, or set run.dir to a new folder"
            )
        return None, {}
    path = folder / _INPUTS
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        tree: dict[str, Any] = document["inputs"]
        if document["sha256"] != _checksum(tree):
            raise ValueError("its checksum is another one")
        inputs = {key: one if isinstance(one, str) else DataRecord.from_json(one) for key, one in tree.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path} is damaged ({error!r}); restore it from a copy, or set run.dir to a new folder") from None
    return config_module.load(folder / _CONFIG), inputs


def _leaves(tree: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree


def _setting_changes(old: Config, new: Config) -> list[Change]:
    then, now = dict(_leaves(deciding(old))), dict(_leaves(deciding(new)))
    keys = [*now, *(key for key in then if key not in now)]  # of a setting with free names, some may be gone
    return [Change(key, then.get(key), now.get(key)) for key in keys if then.get(key) != now.get(key)]


def _go_on(key: str, files: PromptFiles, known: DataRecord, now: DataRecord, changes: list[Change]) -> DataRecord:
    if known.num_rows != now.num_rows:
        changes.append(Change(key, f"{known.num_rows} rows", f"{now.num_rows} rows"))
        return now
    differing = known.differing(now)
    files.go_on(known)
    if differing:
        path, row = files.location(differing[0])
        places = f"{len(differing)} of {now.num_rows} rows differ, the first is row {row} of {path.name}"
        changes.append(Change(key, None if 2 * len(differing) <= now.num_rows else "other rows", places))
    return replace(known, stamps=now.stamps, rows=now.rows)


def _is_mended(change: Change) -> bool:
    """Rows that changed, while most did not."""
    return change.before is None and change.key.startswith("data.")


def _words(change: Change) -> str:
    return str(change.now) if _is_mended(change) else f"{change.before!r}, now {change.now!r}"


def _refusal(folder: Path, change: Change) -> str:
    if change.key == "data.train" and change.before != "other rows":
        advice = "restore the file to resume"  # the order of rows cannot go on over another number of them
    else:
        advice = f"restore the setting to resume, or accept it with run.accept_changes=[{change.key}]"
    return f"{folder} holds a run with another {change.key} ({_words(change)}); set run.dir to a new folder, or {advice}"
