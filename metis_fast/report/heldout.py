"""What came of each held-out prompt: `heldout/step-000160.jsonl` of a run folder, a line a prompt in the order of the data.

Two runs with the same held-out prompts can be compared prompt by prompt with it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

from pydantic import TypeAdapter

from metis_fast.errors import DataError
from metis_fast.report.lines import why
from metis_fast.scratch import replaced
from metis_fast.summary import ScoredSummary


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A prompt and its rollouts that have a verdict: which are right, and how many tools they called. uid: the data's own."""

    uid: str
    ability: str
    kind: str | None
    correct: tuple[bool, ...]
    calls: tuple[int, ...]


def _path(folder: Path, step: int) -> Path:
    return folder / "heldout" / f"step-{step:06d}.jsonl"


def _record(group: ScoredSummary) -> HeldOut:
    judged = [
        (score.verdict.correct, rollout.num_tool_calls)
        for rollout, score in zip(group.rollouts, group.scores, strict=True)
        if score.verdict is not None
    ]
    return HeldOut(
        uid=group.rollouts[0].prompt_uid,
        ability=group.ability,
        kind=group.kind,
        correct=tuple(correct for correct, _ in judged),
        calls=tuple(calls for _, calls in judged),
    )


def write_heldout(folder: Path, step: int, groups: Sequence[ScoredSummary]) -> None:
    """Write an evaluation after `step` training steps, atomically; one that is there is replaced."""
    path = _path(folder, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as scratch:
        scratch.write_text("".join(json.dumps(asdict(_record(group))) + "\n" for group in groups), encoding="utf-8")


@cache
def _prompt() -> TypeAdapter[HeldOut]:
    return TypeAdapter(HeldOut)


def read_heldout(folder: Path, step: int) -> list[HeldOut]:
    """The evaluation of a run folder after `step` training steps.

    Raises:
        DataError: it is not there, or is not one.
    """
    path = _path(folder, step)
    try:
        prompts = [_prompt().validate_json(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        if any(len(prompt.correct) != len(prompt.calls) for prompt in prompts):
            raise ValueError("a prompt with more or fewer verdicts than rollouts")
        return prompts
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}; give a run that has evaluated its held-out prompts") from None
    except ValueError as error:
        raise DataError(f"{path}: expected a line for each held-out prompt, got {why(error)}; evaluate again") from None
