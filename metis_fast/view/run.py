"""A run folder as the page reads it: whatever is there, and a note about whatever is not."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml

from metis_fast.config import Config
from metis_fast.errors import ConfigError, DataError, one_line
from metis_fast.report.log import Evaluation, failed_rates, step_scalars
from metis_fast.report.summary import Summary, read_summary
from metis_fast.types import Avoided, Savings, Slice, StepStats, UpdateStats
from metis_fast.view.images import Images
from metis_fast.view.index import Index
from metis_fast.view.lines import JsonLines
from metis_fast.view.tokens import Pieces

T = TypeVar("T")
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C where PyYAML was built with it


@dataclass(frozen=True, slots=True)
class Step:
    """A training step. scalars: see `report.log.step_scalars`."""

    stats: StepStats
    scalars: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Record:
    """What of a run is no rollout. steps, evaluations: by step, each once. config: dotted key -> value, empty without a
    config.yaml. notes: what is missing or cut, a line each."""

    steps: tuple[Step, ...]
    evaluations: tuple[Evaluation, ...]
    summary: Summary | None
    config: Mapping[str, Any]
    notes: tuple[str, ...]


def _known(kind: type[T], entry: Mapping[str, Any]) -> T:
    """Of a newer version's entry what this one knows."""
    names = [field.name for field in fields(kind)]  # pyright: ignore[reportArgumentType]
    return kind(**{name: entry[name] for name in names if name in entry})


def _slices(record: Mapping[str, Any]) -> dict[str, Slice]:
    return {name: _known(Slice, entry) for name, entry in record["slices"].items()}


def _update(entry: Mapping[str, Any]) -> UpdateStats:
    avoided = {name: _known(Avoided, one) for name, one in entry.get("avoided", {}).items()}
    return _known(UpdateStats, {**entry, "avoided": _known(Savings, avoided)})


def _step(record: dict[str, Any]) -> Step:
    infra, judge = failed_rates(record["outcomes"])  # of records that have none
    made = {
        "slices": _slices(record),
        "updates": tuple(map(_update, record["updates"])),
        "staleness": tuple(record.get("staleness", ())),
    }
    stats = _known(StepStats, {"infra_failed_rate": infra, "judge_failed_rate": judge, **record, **made})
    scalars = {name: float(value) for name, value in step_scalars(stats).items()}
    return Step(stats, {"step": float(int(stats.step)), **scalars})


def _evaluation(record: dict[str, Any]) -> Evaluation:
    return Evaluation(step=int(record["step"]), slices=_slices(record))


def leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted key -> value."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            found |= leaves(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def default_settings() -> dict[str, Any]:
    """Of this version."""
    return leaves(Config().model_dump(mode="json"))


class Run:
    """One run folder. It is opened to be read only; nothing is locked, and nothing is kept open between two readings but the
    images that were asked for."""

    def __init__(self, name: str, folder: Path, tokenizer: Path | None = None) -> None:
        """name: in addresses, unique on the page. tokenizer: a folder or a tokenizer.json; None: the run's own."""
        self.name, self.folder = name, folder
        self.images = Images(folder / "rollouts" / "images")
        self.index = Index(folder / "rollouts")
        self._steps = JsonLines(folder / "metrics.jsonl", _step)
        self._evaluations = JsonLines(folder / "eval.jsonl", _evaluation)
        self._lock = threading.Lock()
        self._tokenizer = tokenizer
        self._pieces: Pieces | None = None
        self._settings: dict[str, Any] = {}
        self._config_key: tuple[int, int, int] | None = None

    def read(self) -> Record:
        """As of now."""
        with self._lock:
            steps, evaluations = self._steps.read(), self._evaluations.read()
            config, config_note = self._config()
        summary, summary_note = self._summary()
        notes = [*steps.notes, *evaluations.notes, *summary_note, *config_note]
        if not (self.folder / "rollouts").is_dir():
            notes.append("rollouts is missing: there are no rollouts to show (log.rollouts)")
        by_step = {step.stats.step: step for step in steps.records}
        evaluated = {one.step: one for one in evaluations.records}
        return Record(
            steps=tuple(by_step[step] for step in sorted(by_step)),
            evaluations=tuple(evaluated[step] for step in sorted(evaluated)),
            summary=summary,
            config=config,
            notes=tuple(notes),
        )

    def _summary(self) -> tuple[Summary | None, list[str]]:
        path = self.folder / "summary.json"
        if not path.exists():
            return None, ["summary.json is missing: the run has not ended"]
        try:
            return read_summary(path), []
        except DataError as error:
            return None, [one_line(error)]

    def _config(self) -> tuple[dict[str, Any], list[str]]:
        """As plain YAML: a config of another version is shown, too. Parsed once: it takes longer than all the rest."""
        path = self.folder / "config.yaml"
        try:
            status = path.stat()
            key = (status.st_ino, status.st_size, status.st_mtime_ns)
            if key != self._config_key:
                tree = yaml.load(path.read_text(encoding="utf-8"), _LOADER)
                self._settings, self._config_key = (leaves(tree) if isinstance(tree, dict) else {}), key
        except FileNotFoundError:
            return {}, ["config.yaml is missing: settings and weights of the channels are taken from the defaults"]
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            return {}, [f"config.yaml cannot be read: {one_line(error)[:160]}"]
        return self._settings, [] if self._settings else ["config.yaml holds no settings"]

    def setting(self, config: Mapping[str, Any], name: str, otherwise: float) -> float:
        """A number of the settings."""
        value = config.get(name, otherwise)
        return float(value) if isinstance(value, int | float) else otherwise

    def pieces(self) -> Pieces:
        """The text of token ids, by the run's tokenizer, where it is found."""
        with self._lock:
            if self._pieces is None or not self._pieces.found:
                self._pieces = Pieces.of(self._tokenizer, self.folder, self._config()[0].get("model.path"))
            return self._pieces


def open_runs(folders: list[Path], tokenizer: Path | None) -> list[Run]:
    """A run for each folder, or for each run right below a folder that is none itself.

    Raises:
        DataError: a folder is not there, or holds no run.
        ConfigError: `tokenizer` is none.
    """
    if tokenizer is not None and not Pieces.of(tokenizer, Path(), None).found:
        raise ConfigError(f"--tokenizer {tokenizer}: expected a model folder with tokenizer.json, or that file; leave it out")
    found: list[Path] = []
    for folder in folders:
        if not folder.is_dir():
            raise DataError(f"{folder}: expected the folder of a run, found none; give what `run.dir` names")
        below = [folder] if _is_run(folder) else sorted(path for path in folder.iterdir() if path.is_dir() and _is_run(path))
        if not below:
            raise DataError(
                f"{folder}: expected a run's metrics.jsonl, eval.jsonl, summary.json, config.yaml or rollouts, there or in the "
                "folders right below, found none; give what `run.dir` names"
            )
        found += below
    names: dict[str, Path] = {}
    for folder in dict.fromkeys(path.resolve() for path in found):
        name, number = folder.name, 1
        while name in names:
            number += 1
            name = f"{folder.name}-{number}"
        names[name] = folder
    return [Run(name, folder, tokenizer) for name, folder in names.items()]


def _is_run(folder: Path) -> bool:
    files = ("metrics.jsonl", "eval.jsonl", "summary.json", "config.yaml", "rollouts")
    return any((folder / name).exists() for name in files)
