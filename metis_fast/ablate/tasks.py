"""Runs of an ablation as tasks of Ray, on any machine of a cluster that sees the same folders."""

from __future__ import annotations

import logging
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError, TaskCancelledError

from metis_fast.ablate.process import Ended, Process
from metis_fast.errors import ConfigError, one_line

_POLL_S = 0.2
_CONNECT_S = 10.0


def _run(config: str, log: str, folder: str) -> Ended:
    """In a worker of Ray. A cancelled task hears of it as Ctrl-C, and stops its run at a safe point."""
    os.chdir(folder)
    process = Process(Path(config), Path(log))
    try:
        return _wait(process)
    except KeyboardInterrupt:
        process.stop()
        return _wait(process)
    finally:
        process.kill()


def _wait(process: Process) -> Ended:
    while (ended := process.poll()) is None:
        time.sleep(_POLL_S)
    return ended


class _Task:
    """A run somewhere in the cluster."""

    def __init__(self, ref: Any) -> None:
        self._ref = ref

    def poll(self) -> Ended | None:
        """None while it runs, or waits for room."""
        done, _ = ray.wait([self._ref], timeout=0)
        if not done:
            return None
        try:
            return ray.get(self._ref)
        except TaskCancelledError:
            return Ended(130, 0.0, 0.0, 0.0, "stopped")
        except RayError as error:  # the machine has died
            return Ended(1, 0.0, 0.0, 0.0, one_line(error)[:400])

    def stop(self) -> None:
        """At its next safe point."""
        ray.cancel(self._ref)

    def kill(self) -> None:
        """At once."""
        ray.cancel(self._ref, force=True)


def _unreachable(address: str, error: Exception) -> ConfigError:
    return ConfigError(f"ray: cannot join the cluster {address!r} ({one_line(error)[:200]}); start one, or leave it out")


def _check_address(address: str) -> None:
    """Ray itself would try an address at which nobody listens for a quarter of an hour."""
    host, colon, port = address.rpartition(":")
    if not (colon and port.isdecimal()) or "//" in address:  # auto, local, or a client's address
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except (OSError, OverflowError) as error:  # a port that is none
        raise _unreachable(address, error) from None


class RayTasks:
    """Starts runs in a cluster, with `cpus` slots each; close it."""

    def __init__(self, address: str, cpus: int) -> None:
        """address: "auto", host:port, or "local" for a cluster of this machine alone.

        Raises:
            ConfigError: there is no such cluster.
        """
        _check_address(address)
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            ray.init(address, log_to_driver=False, logging_level=logging.WARNING)
        except (ConnectionError, ValueError, RuntimeError, RayError) as error:
            raise _unreachable(address, error) from None
        finally:
            for number, handler in handlers.items():  # Ray's own would end the ablation at once
                signal.signal(number, handler)
        self._run = ray.remote(num_cpus=cpus, max_retries=0)(_run)

    def start(self, config: Path, log: Path) -> _Task:
        """As `Process`, as soon as there is room."""
        return _Task(self._run.remote(str(config.absolute()), str(log.absolute()), os.getcwd()))

    def close(self) -> None:
        """Leave the cluster."""
        ray.shutdown()
