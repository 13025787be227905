"""How a conversation with tools is written: as the demo's agent reads it, or as the published checkpoints were trained.

A tool returns a result (`tools.results`); a protocol puts it into words, and `rollout.chat` into tokens. `open_dialect` is the
door.
"""

from __future__ import annotations

from metis_fast.config import Config
from metis_fast.rollout.protocols.base import Block, Dialect, error_observation
from metis_fast.rollout.protocols.compact import Compact
from metis_fast.rollout.protocols.metis import Metis, StrictMetis

__all__ = ["Block", "Compact", "Dialect", "Metis", "StrictMetis", "error_observation", "open_dialect"]

_DIALECTS: dict[tuple[str, bool], type[Compact] | type[Metis]] = {
    ("compact", False): Compact,
    ("metis", False): Metis,
    ("metis", True): StrictMetis,
}


def open_dialect(config: Config) -> Dialect:
    """The one that `rollout.protocol` and `rollout.strict` name."""
    return _DIALECTS[config.rollout.protocol, config.rollout.strict](config.tools)
