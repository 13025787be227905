"""What a run folder keeps of the settings and files that decide its result, and whether a run may go on with others.

config.yaml     settings, resolved, for people and for other runs
inputs.json     those that decide the result, and what the files were that settings name: digests of rows, models, corpora
changes.jsonl   what differs since the run began: mended rows, and what `run.accept_changes` let through
"""

from __future__ import annotations

import difflib
import json
import logging
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from tqdm import tqdm

from metis_fast import config as config_module
from metis_fast.checkpoint.digest import files_digest
from metis_fast.config import Config, LogConfig, by_content, deciding, known_keys
from metis_fast.data.content import DataRecord
from metis_fast.data.parquet import PromptFiles
from metis_fast.errors import ConfigError
from metis_fast.report.progress import progress
from metis_fast.scratch import replaced

_LOG = logging.getLogger(__name__)
_CONFIG, _INPUTS, _CHANGES = "config.yaml", "inputs.json", "changes.jsonl"

_WAIT_S = 0.2

_FIXED = frozenset(("run.seed", "data.shuffle", "model.dtype"))
"""What a checkpoint is made for; another value cannot read it."""

Inputs = dict[str, DataRecord | str]


@dataclass(frozen=True, slots=True)
class Change:
    """A setting, or the files that it names, that is not what the run had. None: it was, or is, not set.

    is_mended: rows of data that changed, while most did not. can_be_accepted: by `run.accept_changes`.
    """

    key: str
    before: object
    now: object
    is_mended: bool = False
    can_be_accepted: bool = True


class _Digests:
    """Of the rows of a new run, which nothing is compared with yet: they are made while engines and trainer load."""

    def __init__(self, files: PromptFiles) -> None:
        self._stopped, self._rows, self._num_rows = False, 0, len(files)
        self._made: Future[DataRecord] = Future()
        threading.Thread(target=self._make, args=[files], name="digests", daemon=True).start()

    def _make(self, files: PromptFiles) -> None:
        try:
            self._made.set_result(files.record(None, self._tick))
        except BaseException as error:  # whoever takes the digests hears of it
            self._made.set_exception(error)

    def _tick(self, rows: int) -> None:
        self._rows += rows
        if self._stopped:
            raise InterruptedError("nobody needs them any more")

    def take(self, key: str, log: LogConfig, check: Callable[[], None]) -> DataRecord:
        """Once they are made. key: of the data. check: called meanwhile. Raises what `PromptFiles.record` does."""
        with progress(self._num_rows, f"reading {key}", log, "row") as bar:
            while True:
                check()
                bar.update(self._rows - bar.n)
                with suppress(TimeoutError):
                    return self._made.result(_WAIT_S)

    def stop(self) -> None:
        """Soon, and wait for it."""
        self._stopped = True
        self._made.exception()


@dataclass(frozen=True, slots=True, eq=False)
class RunRecord:
    """Made by `open_record`; close it. inputs: by dotted key. changes: what differs from the record in the folder, all of it
    allowed. later: digests that are still being made. check: called while they are waited for."""

    config: Config
    inputs: Inputs
    changes: tuple[Change, ...] = ()
    later: Mapping[str, _Digests] = field(default_factory=dict)
    check: Callable[[], None] = lambda: None

    def close(self) -> None:
        """End what still reads."""
        for digests in self.later.values():
            digests.stop()

    def save(self, step: int) -> None:
        """Write settings and inputs into the folder, and what changed. step: the last one before that.

        Called when the run goes on and nothing can refuse it any more: what is written now is what it is held to.

        Raises:
            ConfigError: the folder cannot be made.
            DataError: a row group of a new run cannot be decoded.
        """
        folder = self.config.run.dir
        inputs = self.inputs | {key: digests.take(key, self.config.log, self.check) for key, digests in self.later.items()}
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"cannot make the run folder {folder}: {error.strerror}; set run.dir to one that you can write"
            ) from None
        if self.changes:
            when = datetime.now(UTC).isoformat(timespec="seconds")
            lines = [
                json.dumps({"after_step": step, "time": when, "key": one.key, "before": one.before, "now": one.now})
                for one in self.changes
            ]
            with (folder / _CHANGES).open("a", encoding="utf-8") as file:
                file.write("\n".join(lines) + "\n")
        tree = {
            "settings": dict(_leaves(deciding(self.config))),
            "inputs": {key: one.to_json() if isinstance(one, DataRecord) else one for key, one in inputs.items()},
        }
        texts = {_INPUTS: json.dumps({"sha256": _checksum(tree), **tree}) + "\n", _CONFIG: config_module.to_yaml(self.config)}
        for name, text in texts.items():
            with replaced(folder / name) as scratch:
                scratch.write_text(text, encoding="utf-8")


def open_record(
    config: Config, data: Mapping[str, PromptFiles | None], sections: Collection[str], check: Callable[[], None] = lambda: None
) -> RunRecord:
    """Compare settings and files with what `config.run.dir` began with; rows keep the names and the order that they had.

    data: opened files of prompts by dotted key, None where there are none. They are read whole in a new run, meanwhile, and
    where they changed. sections: of the config, whose other files are compared, too. check: called while something is read
    here; what it raises goes on.

    Raises:
        ConfigError: the folder holds a run with other settings or other files, or what it keeps of them is gone or damaged.
        DataError: a row group cannot be decoded.
    """
    _check_keys(config.run.accept_changes)
    folder = config.run.dir
    known = _load(folder)
    settings, old = ({}, {}) if known is None else known
    changes = [] if known is None else _setting_changes(settings, config)
    inputs: Inputs = {}
    opened = {key: files for key, files in data.items() if files is not None}
    for key, files in opened.items():
        if known is not None:
            before = old.get(key)
            before = before if isinstance(before, DataRecord) else None
            with progress(len(files), f"reading {key}", config.log, "row") as bar:
                now = files.record(before, lambda rows, bar=bar: _tick(bar, rows, check))
            inputs[key] = now if before is None else _go_on(key, files, before, now, changes)
    paths = {key: path for key, path in by_content(config) if key.partition(".")[0] in sections}
    for key, path in paths.items():
        if path is not None and path.exists():  # what is missing, and needed, is found where it is opened
            inputs[key] = files_digest(path)
            if old.get(key, inputs[key]) != inputs[key]:
                changes.append(Change(key, old[key], inputs[key]))
    if known is not None:
        unset = {key for key in old if (data.get(key) is None if key in data else paths.get(key, key) is None)}
        changes += [Change(key, "some", None) for key in sorted(unset)]
        changes += [Change(key, None, "some") for key in inputs if key not in old]
    accepted = set(config.run.accept_changes)
    refused = [one for one in changes if not (one.is_mended or (one.can_be_accepted and one.key in accepted))]
    if refused:
        raise ConfigError(_refusal(config, refused))
    for change in changes:
        _LOG.warning("%s is not what %s had: %s; the run goes on with it", change.key, folder, _words(change))
    # what is known of files that are elsewhere stays: a replay (`tools.replay`) does without them, and a later run may not
    kept = {key: one for key, one in old.items() if key not in data and paths.get(key, key) is not None}
    later = {key: _Digests(files) for key, files in opened.items()} if known is None else {}
    return RunRecord(config, kept | inputs, tuple(changes), later, check)


def _checksum(tree: object) -> str:
    return sha256(json.dumps(tree).encode()).hexdigest()


def _tick(bar: tqdm, rows: int, check: Callable[[], None]) -> None:
    bar.update(rows)
    check()


def _check_keys(keys: Sequence[str]) -> None:
    known = (*known_keys(), *(f"sft.phases.{number}.trajectories" for number in range(100)))
    for key in keys:
        inside = [one for one in known_keys() if one.startswith(f"{key}.")]
        if key in known and inside:
            raise ConfigError(f"run.accept_changes: {key!r} is a section; name the settings in it, as in {inside[0]}")
        if key not in known:
            close = [one for one in known if one.endswith(f".{key}")] or difflib.get_close_matches(key, known, n=1, cutoff=0.4)
            meant = f"; did you mean {close[0]!r}?" if close else "; see docs/settings.md"
            raise ConfigError(f"run.accept_changes: unknown key {key!r}{meant}")


def _load(folder: Path) -> tuple[dict[str, object], Inputs] | None:
    """Settings and inputs that the folder keeps; None for a new run."""
    path = folder / _INPUTS
    if not path.exists():
        if any((folder / "checkpoints").glob("step-*")):
            raise ConfigError(
                f"{folder} holds checkpoints, but its {_INPUTS} is gone, so that nobody can say whether the settings are still "
                "the same; restore it from a copy, or set run.dir to a new folder"
            )
        return None
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        tree: dict[str, Any] = {key: document[key] for key in ("settings", "inputs")}
        if document["sha256"] != _checksum(tree):
            raise ValueError("its checksum is another one")
        inputs = {key: one if isinstance(one, str) else DataRecord.from_json(one) for key, one in tree["inputs"].items()}
        return dict(tree["settings"]), inputs
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path} is damaged ({error!r}); restore it from a copy, or set run.dir to a new folder") from None


def _leaves(tree: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    if isinstance(tree, dict) and tree:
        for key, value in tree.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree


def _setting_changes(then: Mapping[str, object], config: Config) -> list[Change]:
    now = dict(_leaves(json.loads(json.dumps(deciding(config)))))
    defaults = dict(_leaves(json.loads(json.dumps(deciding(Config())))))  # of a setting that was not there yet
    keys = [*now, *(key for key in then if key not in now and key in defaults)]
    before = {key: then.get(key, defaults.get(key)) for key in keys}
    return [
        Change(key, before[key], now.get(key), can_be_accepted=key not in _FIXED) for key in keys if before[key] != now.get(key)
    ]


def _names_files(config: Config, key: str) -> bool:
    return key.startswith(("data.train", "data.heldout")) or key in dict(by_content(config))


def _go_on(key: str, files: PromptFiles, known: DataRecord, now: DataRecord, changes: list[Change]) -> DataRecord:
    if known.num_rows != now.num_rows:
        # training cannot go on in an order over another number of rows
        accept = key != "data.train"
        changes.append(Change(key, f"{known.num_rows} rows", f"{now.num_rows} rows", can_be_accepted=accept))
        return now
    files.go_on(known)
    differing = known.differing(now.rows)
    if differing:
        path, row = files.location(differing[0])
        places = f"{len(differing)} of {now.num_rows} rows differ, the first is row {row} of {path.name}"
        others = len(known.differing(now.rows, known.began))
        mended = 2 * others <= max(2, now.num_rows)
        changes.append(Change(key, None if mended else "other rows", places, is_mended=mended))
    return replace(known, stamps=now.stamps, rows=now.rows)


def _words(change: Change) -> str:
    return str(change.now) if change.is_mended else f"{change.before!r}, now {change.now!r}"


def _refusal(config: Config, refused: Sequence[Change]) -> str:
    what = ", ".join(f"{one.key} ({_words(one)})" for one in refused[:5])
    what += f" and {len(refused) - 5} more" if len(refused) > 5 else ""
    if all(one.can_be_accepted for one in refused):
        what_to = "what was there" if any(_names_files(config, one.key) for one in refused) else "the setting"
        keys = ",".join(dict.fromkeys([*config.run.accept_changes, *(one.key for one in refused)]))
        advice = f"restore {what_to} to resume, or accept it with run.accept_changes=[{keys}]"
    else:
        fixed = [one.key for one in refused if not one.can_be_accepted]
        what_to = f"the setting{'s' * (len(fixed) > 1)} {', '.join(fixed)}" if set(fixed) & _FIXED else "the file"
        advice = f"restore {what_to} to resume"
    return f"{config.run.dir} holds a run with another {what}; set run.dir to a new folder, or {advice}"
