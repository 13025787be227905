"""An ablation's file: what differs between its variants, and what they share.

Values stay the text that was written until `metis_fast.config` reads them, as settings of the command line are read.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from metis_fast import config as config_module
from metis_fast.config import Config
from metis_fast.config.reading import read_override
from metis_fast.config.section import expand
from metis_fast.errors import ConfigError, one_line

_KEYS = ("out", "base", "demo", "cold_start", "seeds", "budget", "jobs", "ray", "variants")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=-]{0,59}")  # becomes the name of a folder
_TABLES = {f"{name}.{kind}" for name in ("results", "profile", "boundary") for kind in ("md", "json", "csv", "svg")}
_TAKEN = {"demo", "pilot", "budget.json"} | _TABLES  # of folders and files beside those of the variants
_OURS = {"run.seed": "seeds", "run.dir": "out", "train.steps": "budget"}  # setting of a run -> key that sets it for all


@dataclass(frozen=True, slots=True)
class Budget:
    """Of every run, one of the two. cpu_minutes: of one core; steps are chosen by a pilot, and are the same for all runs."""

    steps: int | None = None
    cpu_minutes: float | None = None


@dataclass(frozen=True, slots=True)
class Ablation:
    """What a file says. out: folder of all runs. base: a config file, None for the defaults. settings: overrides of all runs.

    demo: folder in which the demo's data, model and cold start are made first, unless they are there. cold_start: a model
    folder; None: that of the demo, or the base's `model.path`. jobs: runs at a time. ray: address of a cluster that runs them.
    variants: name -> overrides, `section.key=value` each.
    """

    out: Path
    base: Path | None
    settings: tuple[str, ...]
    demo: Path | None
    cold_start: Path | None
    seeds: tuple[int, ...]
    budget: Budget
    jobs: int
    ray: str | None
    variants: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Planned:
    """One run to be made: `metis-fast train` of `config`, whose `run.dir` is OUT/<variant>/seed-<seed>."""

    variant: str
    seed: int
    config: Config

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.variant}/seed-{self.seed}"

    @property
    def folder(self) -> Path:
        """Of the run."""
        return self.config.run.dir


class _Loader(yaml.BaseLoader):
    """Scalars as they were typed; a key stands once in its mapping."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"{twice[0]!r} stands here twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_ablation(path: Path) -> Ablation:
    """Read an ablation's file. `base` is relative to it, all other paths to the working folder, as in a config.

    Raises:
        ConfigError: it cannot be read, or does not say what it must.
    """
    tree = _read(path)
    for key in tree:
        if key not in _KEYS:
            close = difflib.get_close_matches(key, _KEYS, n=1)
            meant = f"; did you mean {close[0]!r}?" if close else f"; keys are {', '.join(_KEYS)}"
            raise ConfigError(f"{path}: unknown key {key!r}{meant}")
    base, settings = _base(path, tree.get("base"))
    variants = tree.get("variants")
    if not isinstance(variants, dict) or not variants:
        raise ConfigError(f"{path}: variants: expected names with the settings of each, got {variants!r}")
    for name in variants:
        if not _NAME.fullmatch(name):
            raise ConfigError(f"{path}: variants: a name is letters, digits and . _ + = -, up to 60 of them; got {name!r}")
        if name in _TAKEN:
            raise ConfigError(f"{path}: variants: {name} is a name of the ablation's own files; choose another")
    overrides = {name: _variant(path, name, own, tree) for name, own in variants.items()}
    if tree.get("ray") and not isinstance(tree["ray"], str):
        raise ConfigError(f"{path}: ray: expected auto, local or host:port, got {tree['ray']!r}")
    demo, cold_start = (_path(path, tree, key) for key in ("demo", "cold_start"))
    if demo is not None and cold_start is not None:
        raise ConfigError(f"{path}: `demo` makes the cold start itself; leave `cold_start` out, or `demo`")
    return Ablation(
        out=_path(path, tree, "out") or Path("runs") / path.stem,
        base=base,
        settings=settings,
        demo=demo,
        cold_start=cold_start,
        seeds=_seeds(path, tree.get("seeds", ["0"])),
        budget=_budget(path, tree.get("budget")),
        jobs=_whole(path, "jobs", tree.get("jobs", "1"), least=1),
        ray=tree.get("ray") or None,
        variants=overrides,
    )


def shared_config(ablation: Ablation) -> Config:
    """The config that all runs have in common, before variant, seed and budget; of the demo, if there is one, resolved.

    Raises:
        ConfigError: see `config.load`; or there is no cold start.
    """
    config = config_module.load(ablation.base, ablation.settings)
    if ablation.demo is not None:
        from metis_fast.demo import command as demo  # with torch

        config = demo.resolve(_with(config, {"run": {"dir": ablation.demo.absolute()}}))
    if ablation.cold_start is not None:
        config = _with(config, {"model": {"path": ablation.cold_start.absolute()}})
    return config


def planned_runs(ablation: Ablation, shared: Config, steps: int | None) -> list[Planned]:
    """All runs, seed by seed, so that one that is stopped early has every variant of the first seeds. Settings are checked.

    steps: of every run; None: those of the settings.

    Raises:
        ConfigError: a variant's settings do not fit.
    """
    runs = []
    for seed in ablation.seeds:
        for variant, overrides in ablation.variants.items():
            config = _overridden(shared, overrides, variant)
            own = {"run": {"dir": (ablation.out / variant / f"seed-{seed}").absolute(), "seed": seed}}
            config = _with(config, own | ({} if steps is None else {"train": {"steps": steps}}))
            runs.append(Planned(variant, seed, config))
    return runs


def _with(config: Config, settings: dict[str, Any]) -> Config:
    return config_module.build(config_module.merge(config.model_dump(mode="python"), settings))


def _overridden(shared: Config, overrides: Sequence[str], variant: str) -> Config:
    tree: dict[str, Any] = {}
    for override in overrides:
        tree = config_module.merge(tree, read_override(override).tree)
    try:
        return _with(shared, tree)
    except ConfigError as error:
        raise ConfigError(f"variant {variant}: {one_line(error)}") from None


def _read(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text in UTF-8"
        raise ConfigError(f"cannot read {path}: {reason}; give the YAML file of an ablation") from None
    try:
        tree = yaml.load(text, _Loader)
    except (yaml.YAMLError, RecursionError) as error:
        raise ConfigError(f"{path} is not YAML: {one_line(error)}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected keys like `variants:` and `seeds:`, got {tree!r}")
    return tree


def _base(path: Path, value: Any) -> tuple[Path | None, tuple[str, ...]]:
    if not value:
        return None, ()
    if isinstance(value, str):
        return path.parent / _expanded(path, "base", value), ()
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: base: expected the path of a config, or settings; got {value!r}")
    settings = dict(value)
    file = settings.pop("base", None)
    below = None if file is None else path.parent / _expanded(path, "base.base", file)
    return below, _overrides(f"{path}: base", settings)


def _overrides(place: str, tree: Any, prefix: str = "") -> tuple[str, ...]:
    """Nested settings, or dotted ones, as `section.key=value`."""
    if not isinstance(tree, dict):
        raise ConfigError(f"{place}: expected settings, as in {{loss: {{w_tool: 0.1}}}}; got {tree!r}")
    out: list[str] = []
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            out += _overrides(place, value, f"{name}.")
        else:
            out.append(f"{name}={value if isinstance(value, str) else json.dumps(value)}")
    return tuple(out)


def _variant(path: Path, name: str, own: Any, tree: Mapping[str, Any]) -> tuple[str, ...]:
    """Its overrides; none of what the ablation sets itself, which would be without effect."""
    overrides = _overrides(f"{path}: variants.{name}", own or {})
    for override in overrides:
        setting = override.partition("=")[0]
        key = _OURS.get(setting)
        if key is not None and (key != "budget" or tree.get("budget")):
            raise ConfigError(f"{path}: variants.{name}: {setting} is set by `{key}`, for all variants; leave it out here")
    return overrides


def _expanded(path: Path, key: str, value: Any) -> Path:
    try:
        if not isinstance(value, str):
            raise ValueError("expected a path")
        return expand(value)
    except ValueError as error:
        raise ConfigError(f"{path}: {key}: {error}, got {value!r}") from None


def _path(path: Path, tree: Mapping[str, Any], key: str) -> Path | None:
    return _expanded(path, key, tree[key]) if tree.get(key) else None


def _whole(path: Path, key: str, value: Any, least: int) -> int:
    if not isinstance(value, str) or not re.fullmatch(r"\d{1,9}", value) or int(value) < least:
        raise ConfigError(f"{path}: {key}: expected a whole number of at least {least}, got {value!r}")
    return int(value)


def _seeds(path: Path, value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    seeds = tuple(_whole(path, "seeds", one, least=0) for one in values)
    if not seeds or len(set(seeds)) < len(seeds):
        raise ConfigError(f"{path}: seeds: expected different whole numbers, as in [0, 1, 2]; got {value!r}")
    return seeds


def _budget(path: Path, value: Any) -> Budget:
    if value in (None, ""):
        return Budget()
    if not isinstance(value, dict) or len(value) != 1 or next(iter(value)) not in ("steps", "cpu_minutes"):
        raise ConfigError(f"{path}: budget: expected {{steps: N}} or {{cpu_minutes: N}}, got {value!r}")
    ((key, text),) = value.items()
    if key == "steps":
        return Budget(steps=_whole(path, "budget.steps", text, least=1))
    try:
        minutes = float(text)
    except (TypeError, ValueError):
        minutes = 0.0
    if not 0 < minutes < 1e6:
        raise ConfigError(f"{path}: budget.cpu_minutes: expected a number above 0, got {text!r}")
    return Budget(cpu_minutes=minutes)
