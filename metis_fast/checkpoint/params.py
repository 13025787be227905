"""Names of weights, float32 masters and optimizer states in a resume state, and their way back into a run.

weight.<parameter>       what the model computes with (bfloat16 or float32)
master.<parameter>       float32 copy that the optimizer steps, where weights are bfloat16
optimizer.<name>.<...>   state of the optimizer of that name, see `optimizer.py`
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from metis_fast.errors import CheckpointError

WEIGHT = "weight."
MASTER = "master."
OPTIMIZER = "optimizer."


def add_prefix(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The same tensors under prefixed names."""
    return {prefix + name: tensor for name, tensor in tensors.items()}


def take_prefix(prefix: str, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors whose name starts with `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


@torch.no_grad()
def copy_exactly(saved: Mapping[str, torch.Tensor], live: Mapping[str, torch.Tensor]) -> None:
    """Copy saved tensors into a run's own, in place (tied weights stay tied). Nothing is copied unless everything fits.

    live: `model.state_dict()`, or masters by parameter name.

    Raises:
        CheckpointError: names, shapes or dtypes differ.
    """
    if saved.keys() != live.keys():
        missing, extra = sorted(live.keys() - saved.keys()), sorted(saved.keys() - live.keys())
        raise CheckpointError(
            f"the checkpoint lacks {len(missing)} tensors of this run ({', '.join(missing[:3])}) and has {len(extra)} others "
            f"({', '.join(extra[:3])}); resume with the model and `model.freeze` of the run that wrote it"
        )
    for name, tensor in live.items():
        found, expected = (tuple(saved[name].shape), saved[name].dtype), (tuple(tensor.shape), tensor.dtype)
        if found != expected:
            raise CheckpointError(
                f"{name} is {found[0]} {found[1]} in the checkpoint, expected {expected[0]} {expected[1]}; "
                "resume with the model and `model.dtype` of the run that wrote it"
            )
    for name, tensor in live.items():
        tensor.copy_(saved[name])
