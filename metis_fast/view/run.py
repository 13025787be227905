"""A run folder as the page reads it: whatever is there, and a note about whatever is not."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import TYPE_CHECKING, Any

import yaml

from metis_fast.config import Config
from metis_fast.errors import ConfigError, DataError, one_line
from metis_fast.report.benchmarks import benchmark_table
from metis_fast.report.lines import JsonLines
from metis_fast.report.log import Evaluation, evaluation_of, step_of, step_scalars, unknown_in_evaluation, unknown_in_step
from metis_fast.report.settings import leaves
from metis_fast.report.summary import Summary, read_summary
from metis_fast.types import StepStats
from metis_fast.view.images import Images
from metis_fast.view.index import Index
from metis_fast.view.tokens import Pieces, tokenizer_files

if TYPE_CHECKING:
    from metis_fast.evaluate.table import Table
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # in C where PyYAML was built with it


@dataclass(frozen=True, slots=True)
class Step:
    """A training step. scalars: see `report.log.step_scalars`."""

    stats: StepStats
    scalars: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Record:
    """What of a run is no rollout. steps, evaluations: by step, each once. config: dotted key -> value, empty without a
    config.yaml. benchmarks: results beside the published ones. notes: what is missing or cut, a line each. gone: the whole
    folder is no longer there."""

    steps: tuple[Step, ...]
    evaluations: tuple[Evaluation, ...]
    summary: Summary | None
    config: Mapping[str, Any]
    benchmarks: Table | None
    notes: tuple[str, ...]
    gone: bool = False


def _step(record: dict[str, Any]) -> Step:
    stats = step_of(record)
    scalars = {name: float(value) for name, value in step_scalars(stats).items()}
    return Step(stats, {"step": float(stats.step), **scalars})


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
        self._steps = JsonLines(folder / "metrics.jsonl", _step, unknown_in_step)
        self._evaluations = JsonLines(folder / "eval.jsonl", evaluation_of, unknown_in_evaluation)
        self._lock = threading.Lock()
        self._tokenizer = tokenizer
        self._pieces = Pieces(None)
        self._pieces_key: tuple[object, ...] | None = None
        self._settings: dict[str, Any] = {}
        self._config_key: tuple[int, int, int] | None = None

    @property
    def gone(self) -> str:
        """That the folder is no longer there, or closed; empty where it can be read."""
        try:
            os.stat(os.path.join(self.folder, "."))  # which also says whether one may look into it
            return ""
        except (FileNotFoundError, NotADirectoryError):
            return f"{self.folder} has gone: it was removed or renamed, so there is nothing to show of this run"
        except OSError as error:  # no permission, or a network file system that does not answer
            return f"{self.folder} cannot be read: {error.strerror}"

    def read(self) -> Record:
        """As of now."""
        if gone := self.gone:
            return Record((), (), None, {}, None, (gone,), gone=True)
        with self._lock:
            steps, evaluations = self._steps.read(), self._evaluations.read()
            config, config_note = self._config()
        summary, summary_note = self._summary()
        notes = [*steps.notes, *evaluations.notes, *summary_note, *config_note]
        benchmarks = benchmark_table(self.folder, notes.append)
        notes += self._rollouts()
        by_step = {step.stats.step: step for step in steps.records}
        evaluated = {one.step: one for one in evaluations.records}
        return Record(
            steps=tuple(by_step[step] for step in sorted(by_step)),
            evaluations=tuple(evaluated[step] for step in sorted(evaluated)),
            summary=summary,
            config=config,
            benchmarks=benchmarks,
            notes=tuple(notes),
        )

    def _summary(self) -> tuple[Summary | None, list[str]]:
        path = self.folder / "summary.json"
        try:
            path.stat()
        except FileNotFoundError:
            return None, ["summary.json is missing: the run has not ended"]
        except OSError as error:
            return None, [f"summary.json cannot be read: {error.strerror}"]
        notes: list[str] = []
        try:
            return read_summary(path, notes.append), notes
        except DataError as error:
            return None, [one_line(error)]

    def _rollouts(self) -> list[str]:
        """Why there are none to show."""
        try:
            os.scandir(self.folder / "rollouts").close()
        except (FileNotFoundError, NotADirectoryError):
            return ["rollouts is missing: there are no rollouts to show (log.rollouts)"]
        except OSError as error:
            return [f"rollouts cannot be read: {error.strerror}"]
        return []

    def _config(self) -> tuple[dict[str, Any], list[str]]:
        """As plain YAML: a config of another version is shown, too. Parsed once: it takes longer than all the rest."""
        path = self.folder / "config.yaml"
        try:
            status = path.stat()
            if not S_ISREG(status.st_mode):
                return {}, ["config.yaml is no file"]
            key = (status.st_ino, status.st_size, status.st_mtime_ns)
            if key != self._config_key:
                tree = yaml.load(path.read_text(encoding="utf-8"), _LOADER)
                self._settings, self._config_key = (leaves(tree) if isinstance(tree, dict) else {}), key
        except FileNotFoundError:
            return {}, ["config.yaml is missing: settings and weights of the channels are taken from the defaults"]
        except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:  # ValueError: no UTF-8, or a date that is none
            return {}, [f"config.yaml cannot be read: {one_line(error)[:160]}"]
        return self._settings, [] if self._settings else ["config.yaml holds no settings"]

    def setting(self, config: Mapping[str, Any], name: str, otherwise: float) -> float:
        """A number of the settings."""
        value = config.get(name, otherwise)
        return float(value) if isinstance(value, int | float) else otherwise

    def pieces(self) -> Pieces:
        """The text of token ids, by the run's tokenizer, where it is found."""
        with self._lock:
            files = tokenizer_files(self._tokenizer, self.folder, self._config()[0].get("model.path"))
            key = tuple((path, status.st_ino, status.st_mtime_ns) for path, status in files.items())
            if key != self._pieces_key:  # or the folder holds another run now
                self._pieces, self._pieces_key = Pieces.of(files), key
            return self._pieces


def open_runs(folders: list[Path], tokenizer: Path | None) -> list[Run]:
    """A run for each folder, or for each run right below a folder that is none itself, or for each run of an ablation there.

    Raises:
        DataError: a folder is not there, or holds no run.
        ConfigError: `tokenizer` is none.
    """
    if tokenizer is not None and not Pieces.of(tokenizer_files(tokenizer, Path(), None)).found:
        raise ConfigError(f"--tokenizer {tokenizer}: expected a model folder with tokenizer.json, or that file; leave it out")
    found: list[Path] = []
    for folder in folders:
        if not folder.is_dir():
            raise DataError(f"{folder}: expected the folder of a run, found none; give what `run.dir` names")
        below = [folder] if _is_run(folder) else _runs_in(folder, "*") or _runs_in(folder, "*/seed-*")
        if not below:
            raise DataError(
                f"{folder}: expected a run's metrics.jsonl, eval.jsonl, summary.json, config.yaml or rollouts, there, in the "
                "folders right below, or in */seed-* as an ablation has them, found none; give what `run.dir` names"
            )
        found += below
    return [Run(name, folder, tokenizer) for name, folder in _named([*dict.fromkeys(path.resolve() for path in found)]).items()]


def _runs_in(folder: Path, pattern: str) -> list[Path]:
    return sorted(path for path in folder.glob(pattern) if path.is_dir() and _is_run(path))


def _named(folders: Sequence[Path]) -> dict[str, Path]:
    """Name -> folder. As many parts of the paths as tell all of them apart: seed-0, or variant/seed-0 of an ablation."""
    most = max((len(folder.parts) for folder in folders), default=1)
    for depth in range(1, most + 1):
        named = {_label("/".join(folder.parts[-depth:])): folder for folder in folders}
        if len(named) == len(folders):
            return named
    return {f"{_label(folder.name)}-{number}": folder for number, folder in enumerate(folders, 1)}


def _label(name: str) -> str:
    """Without what an address or a list of names cannot have: commas, control characters, bytes that are no text."""
    text = name.encode("utf-8", "replace").decode()
    return "".join("_" if char == "," or not char.isprintable() else char for char in text)


def _is_run(folder: Path) -> bool:
    files = ("metrics.jsonl", "eval.jsonl", "summary.json", "config.yaml", "rollouts")
    return any(os.path.exists(folder / name) for name in files)  # pathlib's raises where it may not look
