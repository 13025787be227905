"""A torch optimizer as flat tensors and JSON, and back, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from metis_fast.errors import CheckpointError


@dataclass(frozen=True, slots=True, eq=False)
class FlatOptimizer:
    """The state of one optimizer.

    tensors: "state.<parameter>.<key>" (moments, step counters) and "group.<group>.<key>" (a learning rate kept as a tensor);
    parameters are counted through all groups. They share memory with the optimizer.
    scalars: the class, and whatever is not a tensor: hyperparameters of each group, JSON-able.
    """

    tensors: Mapping[str, torch.Tensor]
    scalars: Mapping[str, Any]


def flatten_optimizer(optimizer: torch.optim.Optimizer) -> FlatOptimizer:
    """Take an optimizer's state apart; nothing is copied."""
    tree = optimizer.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    sections = {f"state.{index}": entries for index, entries in tree["state"].items()}
    sections |= {f"group.{index}": group for index, group in enumerate(tree["param_groups"])}
    for section, entries in sections.items():
        scalars[section] = {}
        for key, value in entries.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{section}.{key}"] = value
            else:
                scalars[section][key] = value
    return FlatOptimizer(tensors=tensors, scalars={"class": type(optimizer).__name__, "sections": scalars})


def unflatten_optimizer(optimizer: torch.optim.Optimizer, flat: FlatOptimizer) -> None:
    """Put a saved state into a new optimizer over the same parameters. Copies: later steps leave `flat` as it is.

    Hyperparameters, the learning rate among them, become those of the saved optimizer.

    Raises:
        CheckpointError: the saved optimizer is of another class, or its groups or parameters do not fit this one.
    """
    name = type(optimizer).__name__
    if flat.scalars["class"] != name:
        raise _mismatch(f"the checkpoint's optimizer is {flat.scalars['class']}, this run's is {name}")
    sections: dict[str, dict[str, Any]] = {section: dict(entries) for section, entries in flat.scalars["sections"].items()}
    for path, tensor in flat.tensors.items():
        section, key = path.rsplit(".", 1)
        sections[section][key] = tensor.clone()
    groups = [entries for section, entries in sections.items() if section.startswith("group.")]
    state = {
        int(section.removeprefix("state.")): entries for section, entries in sections.items() if section.startswith("state.")
    }
    _check_groups(optimizer, groups)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    _check_shapes(parameters, state)
    for group, live in zip(groups, optimizer.param_groups, strict=True):
        for key, value in group.items():  # JSON has no tuples; betas and Newton-Schulz coefficients are some
            if isinstance(value, list) and isinstance(live.get(key), tuple):
                group[key] = tuple(value)
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    for index, entries in state.items():
        _undo_cast(optimizer.state[parameters[index]], entries)


def _check_groups(optimizer: torch.optim.Optimizer, groups: list[dict[str, Any]]) -> None:
    saved = [len(group["params"]) for group in groups]
    live = [len(group["params"]) for group in optimizer.param_groups]
    if saved != live:
        raise _mismatch(f"the checkpoint's optimizer has groups of {saved} parameters, this run's has {live}")


def _check_shapes(parameters: list[torch.nn.Parameter], state: Mapping[int, Mapping[str, Any]]) -> None:
    for index, entries in state.items():
        for key, value in entries.items():
            # 0-d state (step counters) fits every parameter
            if isinstance(value, torch.Tensor) and value.ndim and value.shape != parameters[index].shape:
                shape = tuple(parameters[index].shape)
                raise _mismatch(
                    f"{key} of parameter {index} has shape {tuple(value.shape)} in the checkpoint, expected {shape}"
                )


def _undo_cast(live: dict[str, Any], saved: Mapping[str, Any]) -> None:
    """`load_state_dict` casts moments to the parameter's dtype; float32 moments of bfloat16 parameters must stay exact."""
    for key, value in saved.items():
        if isinstance(value, torch.Tensor) and live[key].dtype != value.dtype:
            live[key] = value.to(live[key].device)


def _mismatch(what: str) -> CheckpointError:
    return CheckpointError(f"{what}; resume with the model, `model.freeze` and `optim` settings of the run that wrote it")
