"""A checked `Config` from files, overrides or plain values, and back to YAML."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import ValidationError

from metis_fast.config.reading import Source, read_file, read_override, shown
from metis_fast.config.score import LlmPeer
from metis_fast.config.section import NUMERIC
from metis_fast.config.sft import SftPhase
from metis_fast.config.tools import McpServerConfig
from metis_fast.config.tree import Config, known_keys, settings
from metis_fast.errors import ConfigError

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

_WHOLE = {"", *(key for key, section in settings() if section is not None)}
"""Whose checks name the settings that they concern."""
_EXPECTED = {
    "tuple_type": "expected a list",
    "dict_type": "expected names and values, {name: value}",
    "model_type": "expected settings, {key: value}",
    "path_type": "expected a path",
}
"""Instead of what pydantic says, whose words are Python's."""
_KEYS = (
    *known_keys(),
    *(f"sft.phases.{key}" for key, _ in settings(SftPhase)),
    *(f"score.llm.judges.{key}" for key, _ in settings(LlmPeer)),
    *(f"tools.mcp.{key}" for key, _ in settings(McpServerConfig)),
)

ELSEWHERE = {
    "learning_rate": "train.optim.lr",
    "num_generations": "rollout.rollouts_per_prompt",
    "group_size": "rollout.rollouts_per_prompt",
    "train_batch_size": "rollout.prompts_per_step",
    "mini_batch_size": "train.prompts_per_mini_batch",
    "ppo_mini_batch_size": "train.prompts_per_mini_batch",
    "max_steps": "train.steps",
    "max_prompt_length": "rollout.max_prompt_tokens",
    "max_response_length": "rollout.max_response_tokens",
    "max_completion_length": "rollout.max_response_tokens",
    "clip_ratio": "loss.eps_high",
    "clip_ratio_low": "loss.eps_low",
    "clip_ratio_high": "loss.eps_high",
    "kl_loss_coef": "loss.kl_coef",
    "gradient_checkpointing": "train.activation_checkpointing",
    "max_grad_norm": "train.optim.grad_clip",
    "gpu_memory_utilization": "rollout.vllm.gpu_memory",
}
"""What other trainers call a setting (TRL, verl), and ours."""


def load(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a config file (None: the defaults), apply `section.key=value` overrides (the last one counts), check all of it once.

    Raises:
        ConfigError: see `build`; also an unreadable file or a malformed override.
    """
    source = read_file(path) if path is not None else Source({}, {})
    for override in overrides:
        source = read_override(override).over(source)
    return _checked(source.tree, str(path) if path is not None else "config", source.places)


def build(tree: dict[str, Any], source: str = "config") -> Config:
    """Check a tree of plain values.

    Raises:
        ConfigError: unknown key (the nearest known one is named), wrong type, or a combination that cannot work.
    """
    return _checked(tree, source, {})


def to_yaml(config: Config, only_changes: bool = False) -> str:
    """The config as YAML that `load` reads as the same; `only_changes` leaves out what equals the defaults."""
    tree = config.model_dump(mode="json", exclude_defaults=only_changes, context="file")
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, default_flow_style=None, allow_unicode=True, width=110)


class _Dumper(yaml.SafeDumper):
    """Quotes text that would be read as a number; PyYAML itself has other rules for 1e3 and 08."""


_Dumper.add_implicit_resolver("tag:yaml.org,2002:float", NUMERIC, list("+-.0123456789"))


def _checked(tree: dict[str, Any], source: str, places: Mapping[str, str]) -> Config:
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_explain(error.errors(), source, places)) from None


def _explain(errors: Sequence[ErrorDetails], source: str, places: Mapping[str, str]) -> str:
    """All problems in one line, each with its place where that is another than that of the one before."""
    told: dict[str, tuple[str, str]] = {}  # the members of a union fail one by one; the first says enough
    for item in errors:
        path = ".".join(map(str, item["loc"]))
        given = _given(path, places)
        place = source if path in _WHOLE else places.get(given, source)
        told.setdefault(path if item["type"] == "missing" else given, (place, _problem(path, item)))
    parts: list[str] = []
    last = ""
    for place, problem in told.values():
        parts.append(problem if place == last else f"{place}: {problem}")
        last = place
    return "; ".join(parts)


def _given(path: str, places: Mapping[str, str]) -> str:
    """What was written there: the path itself, what an override has in it, or what it lies in."""
    if path in places:
        return path
    outwards = path
    while outwards and outwards not in places:
        outwards = outwards.rpartition(".")[0]
    return next((key for key in places if key.startswith(f"{path}.")), outwards or path)


_RETIRED = {"workers.listen": "workers join on their own machine, and between machines there is Ray"}
"""Settings of earlier releases, and why they are not there."""


def _problem(path: str, item: ErrorDetails) -> str:
    if item["type"] == "extra_forbidden":
        name = str(item["loc"][-1])
        if path in _RETIRED:
            return f"{path} is gone: {_RETIRED[path]}; remove it"
        in_braces = ":" not in name and item["input"] in (None, "")  # {train: a, b}
        return f"unknown key {path!r}" + (
            "; between braces a comma ends the value: write [a, b] for a list, 1000 or 0.2 for a number"
            if in_braces
            else _nearest(path, name)
        )
    if item["type"] == "missing":
        return f"{path}: expected a value, got none"
    if item["type"] == "too_long":
        context = item.get("ctx", {})
        return f"{path}: expected {context.get('max_length')} values, got {context.get('actual_length')}"
    if item["type"] != "value_error":
        message = _EXPECTED.get(item["type"], item["msg"])
        return f"{path}: {message[0].lower()}{message[1:]}, got {shown(item['input'])}"
    problem = str(item.get("ctx", {}).get("error", item["msg"]))
    return problem if path in _WHOLE else f"{path}: {problem}, got {shown(item['input'])}"


def _nearest(path: str, name: str) -> str:
    """`name`: the last part of the path, as it was written."""
    if name == "base":
        return "; `base: other.yaml` stands at the top of a file"
    if "." in name and path in _KEYS:
        return f"; in a file write {name.replace('.', ': {')}: ...{'}' * name.count('.')}"
    if ":" in name:
        return "; in YAML a blank stands behind the colon"
    path = re.sub(r"\.\d+(?=\.)", "", path).lower().replace("-", "_").replace("/", ".")
    leaf = path.rpartition(".")[2]
    close = [key for key in _KEYS if "." in key and key.rpartition(".")[2] == leaf]  # a right leaf in a wrong section
    if not close and leaf in ELSEWHERE:
        section, _, rest = ELSEWHERE[leaf].partition(".")
        close = [key for key in (f"{path.partition('.')[0]}.{rest}", f"{section}.{rest}") if key in _KEYS]
    close = [path] if path in _KEYS else close or difflib.get_close_matches(path, _KEYS, n=1, cutoff=0.7)
    close = [key for key in close if not path.startswith(f"{key}.")]
    return f"; did you mean {close[0]!r}?" if close else f"; sections are {', '.join(Config.model_fields)}"
