"""Random state of a process: Python, numpy, torch on the CPU and on every CUDA device, and generators that a caller names."""

from __future__ import annotations

import base64
import logging
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from metis_fast.errors import CheckpointError

Generators = Mapping[str, np.random.Generator | torch.Generator]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class RngState:
    """Made by `capture_rng`, applied by `restore_rng`.

    python: `random.getstate()`. numpy: the legacy global state, as a dict.
    torch_cpu [5056] uint8; torch_cuda: one [16] uint8 tensor a device, empty without CUDA.
    generators: name -> state of a numpy Generator (dict) or torch Generator (uint8 tensor).
    """

    python: tuple[Any, ...]
    numpy: Mapping[str, Any]
    torch_cpu: torch.Tensor
    torch_cuda: tuple[torch.Tensor, ...]
    generators: Mapping[str, Mapping[str, Any] | torch.Tensor]

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values; exact."""
        return {
            "python": self.python,
            "numpy": _encode(self.numpy),
            "torch_cpu": _encode(self.torch_cpu),
            "torch_cuda": [_encode(state) for state in self.torch_cuda],
            "generators": {name: _encode(state) for name, state in self.generators.items()},
        }

    @staticmethod
    def from_json(tree: Mapping[str, Any]) -> RngState:
        """Inverse of `to_json`."""
        version, words, gauss = tree["python"]
        return RngState(
            python=(version, tuple(words), gauss),
            numpy=_decode(tree["numpy"]),
            torch_cpu=_decode(tree["torch_cpu"]),
            torch_cuda=tuple(_decode(state) for state in tree["torch_cuda"]),
            generators={name: _decode(state) for name, state in tree["generators"].items()},
        )


def capture_rng(generators: Generators | None = None) -> RngState:
    """The random state now.

    generators: those that no global state covers, by names that `restore_rng` gets again.
    """
    return RngState(
        python=random.getstate(),
        numpy=np.random.get_state(legacy=False),
        torch_cpu=torch.get_rng_state(),
        torch_cuda=tuple(torch.cuda.get_rng_state_all()) if torch.cuda.is_available() else (),
        generators={name: _generator_state(generator) for name, generator in (generators or {}).items()},
    )


def restore_rng(state: RngState, generators: Generators | None = None) -> None:
    """Go on drawing exactly where `capture_rng` was called.

    A different number of CUDA devices is logged as a warning: devices that both runs have are restored.

    Raises:
        CheckpointError: the generators differ from those that were captured.
    """
    generators = generators or {}
    if generators.keys() != state.generators.keys():
        raise CheckpointError(
            f"the checkpoint holds random generators {sorted(state.generators)}, this run has {sorted(generators)}; "
            "resume with the configuration that wrote it"
        )
    random.setstate(state.python)
    np.random.set_state(dict(state.numpy))
    torch.set_rng_state(state.torch_cpu)
    devices = torch.cuda.device_count()
    if devices != len(state.torch_cuda):
        _log.warning("random state of %d CUDA devices resumed on %d; draws will differ", len(state.torch_cuda), devices)
    for device, cuda_state in enumerate(state.torch_cuda[:devices]):
        torch.cuda.set_rng_state(cuda_state, device)
    for name, generator in generators.items():
        _restore_generator(name, generator, state.generators[name])


def _generator_state(generator: np.random.Generator | torch.Generator) -> Mapping[str, Any] | torch.Tensor:
    return generator.get_state() if isinstance(generator, torch.Generator) else generator.bit_generator.state


def _restore_generator(
    name: str, generator: np.random.Generator | torch.Generator, state: Mapping[str, Any] | torch.Tensor
) -> None:
    if isinstance(generator, torch.Generator) and isinstance(state, torch.Tensor):
        generator.set_state(state)
    elif isinstance(generator, np.random.Generator) and not isinstance(state, torch.Tensor):
        if state["bit_generator"] != type(generator.bit_generator).__name__:
            raise CheckpointError(
                f"random generator {name!r} was a {state['bit_generator']}, is a {type(generator.bit_generator).__name__}; "
                "resume with the version that wrote the checkpoint"
            )
        generator.bit_generator.state = state
    else:
        raise CheckpointError(f"random generator {name!r} belonged to another library; resume with the version that wrote it")


def _encode(value: Any) -> Any:
    """Arrays and tensors become {"kind", "dtype", "base64"}; they are one-dimensional."""
    match value:
        case Mapping():
            return {key: _encode(item) for key, item in value.items()}
        case torch.Tensor():
            return {"kind": "torch", "dtype": "uint8", "base64": base64.b64encode(value.numpy().tobytes()).decode()}
        case np.ndarray():
            return {"kind": "numpy", "dtype": value.dtype.str, "base64": base64.b64encode(value.tobytes()).decode()}
        case _:
            return value


def _decode(value: Any) -> Any:
    match value:
        case {"kind": kind, "dtype": dtype, "base64": text}:
            array = np.frombuffer(base64.b64decode(text), dtype=dtype).copy()
            return torch.from_numpy(array) if kind == "torch" else array
        case Mapping():
            return {key: _decode(item) for key, item in value.items()}
        case _:
            return value
