"""Processes that work for a run."""

from __future__ import annotations

from typing import Literal

from metis_fast.config.section import NonNegative, Positive, PositiveFloat, Section, Text


class WorkersConfig(Section):
    """Processes that work for a run: where they run, and when they count as dead (docs/rollouts.md)."""

    launcher: Literal["local", "ray"] = "local"
    """`local`: processes of this machine. `ray`: Ray places them, on a running cluster or one that is started here."""
    ray_address: Text = "auto"
    """`auto`: the cluster that RAY_ADDRESS or `ray start` on this machine names; else this machine becomes one."""
    nodes: Positive = 1
    """Nodes that play rollouts; each has its share of engines, tools and judges. With Ray one a machine; without, they are all
    in the run's process, which is for rehearsals."""
    tools: NonNegative = 0
    """Processes that run the tools; 0: the nodes themselves do."""
    judges: NonNegative = 0
    """Processes that judge; 0: the nodes themselves do."""
    silence_s: PositiveFloat = 20.0
    """A worker that does not answer for so long is killed and started again."""
    start_s: PositiveFloat = 600.0
    """Time that a worker may take to be ready."""
    wait_s: PositiveFloat = 600.0
    """How long to wait for room in a Ray cluster."""
