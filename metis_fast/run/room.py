"""Room in a Ray cluster for what a run starts, where Ray is to place that."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING

from metis_fast.config import Config
from metis_fast.errors import ConfigError

if TYPE_CHECKING:
    from metis_fast.cluster.room import Room


def ranks_by_ray(config: Config) -> bool:
    """Whether Ray places the trainer's ranks. config: of a cold start, as `training_config` gives it."""
    train = config.train
    return config.workers.launcher == "ray" and train.backend == "megatron" and train.megatron.launch == "local"


def open_room(
    config: Config, stack: ExitStack, check: Callable[[], None], ranks: bool = True, plays: bool = True
) -> Room | None:
    """Room in a cluster, given back with `stack`; None where there is nothing that Ray is to place.

    check: called while waiting; what it raises goes on. ranks: whether the job trains. plays: whether it plays rollouts.

    Raises:
        ConfigError: there is no such cluster or no room in it.
    """
    ranks = ranks and ranks_by_ray(config)
    if config.workers.launcher != "ray" or not (ranks or plays):
        return None
    try:
        from metis_fast.cluster.room import Room  # at first use: nothing else needs Ray
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise ConfigError(
            "workers.launcher=ray needs Ray; in the project's folder: pip install -e '.[ray]', or set workers.launcher=local"
        ) from None
    room = Room(config, ranks, check, plays)
    stack.callback(room.close)
    return room
