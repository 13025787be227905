"""Which vLLM engine a rollout goes to: where its prompt is cached, unless others idle meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

from metis_fast.config import Config
from metis_fast.model import Policy
from metis_fast.rollout.vllm.engine import VllmEngine


class _Hub:
    """Its workers are up, and nothing else."""

    def worker(self, *what: object, **more: object) -> SimpleNamespace:
        """See `Hub.worker`."""
        return SimpleNamespace(alive=True, broken=None, restarts=0)


def engine(policy: Policy, replicas: int) -> VllmEngine:
    hub: Any = _Hub()
    vllm = {"replicas": replicas}
    return VllmEngine(Config.model_validate({"rollout": {"engine": "vllm", "deterministic": False, "vllm": vllm}}), policy, hub)


def begin(engine: VllmEngine, prompts: Sequence[int], rollouts: int) -> dict[str, set[int]]:
    """Open sessions, prompt after prompt; the numbers of the replicas that each prompt came to."""
    places: dict[str, set[int]] = {}
    for number in prompts:
        for _ in range(rollouts):
            before = [replica.sessions for replica in engine.replicas]
            engine.session(0, f"p{number}")
            after = [replica.sessions for replica in engine.replicas]
            places.setdefault(f"p{number}", set()).add([a - b for a, b in zip(after, before, strict=True)].index(1))
    return places


@pytest.mark.parametrize(("prompts", "rollouts", "replicas"), [(1, 16, 8), (2, 16, 8), (3, 16, 8), (4, 8, 16), (1, 64, 64)])
def test_fewer_prompts_than_engines_are_spread(policy: Policy, prompts: int, rollouts: int, replicas: int) -> None:
    several = engine(policy, replicas)
    begin(several, range(prompts), rollouts)
    loads = [replica.sessions for replica in several.replicas]
    assert max(loads) <= max(2, 2 * sum(loads) / replicas)
    assert sum(load > 0 for load in loads) >= 0.7 * min(replicas, sum(loads) / 2)


@pytest.mark.parametrize(("prompts", "replicas"), [(64, 8), (6, 2), (128, 16)])
def test_prompts_enough_for_all_engines_stay_where_they_are_cached(policy: Policy, prompts: int, replicas: int) -> None:
    """Only the first ones, begun while all else is idle, are spread."""
    several = engine(policy, replicas)
    places = begin(several, range(prompts), 16)
    elsewhere = sum(len(where) - 1 for where in places.values())
    assert elsewhere <= 1.5 * replicas * (replicas > 2)
    loads = [replica.sessions for replica in several.replicas]
    assert max(loads) <= 1.2 * sum(loads) / replicas
    again = begin(several, range(prompts, prompts + 8), 16)  # beside those that run
    assert all(len(where) == 1 for where in again.values())


def test_a_prompt_whose_sessions_are_closed_is_forgotten(policy: Policy) -> None:
    several = engine(policy, 3)
    sessions = [several.session(0, "p") for _ in range(9)]
    for session in sessions:
        session.close()
    assert not several.homes and [replica.sessions for replica in several.replicas] == [0, 0, 0]
