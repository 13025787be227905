"""What the run knows of groups that lie elsewhere: the control plane. No token array, no image, at most a few KiB a rollout.

A node plays a `Job` and answers with a `GroupSummary`; the run adds scores (`ScoredSummary`) and hands that to the trainer, who
fetches the group from where it lies. The node stores it, and is told its `Scores` alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from metis_fast.compact import Compact
from metis_fast.types import Group, ImageSpan, Outcome, Rollout, Score, Verdict

_ERROR = 200  # characters of what broke a rollout off
_ANSWER = 200  # characters of a judged answer that the run gets to know; the node stores all of it

Data = Literal["train", "heldout", "benchmark"]
"""Which files a row is of."""


@dataclass(frozen=True, slots=True)
class Job(Compact):
    """A group to play: all that its rollouts follow from, but for the weights, whoever plays them.

    row: of the data files. stream, order: name the sampling noise (`SampleKey`); order is that of its first rollout.
    """

    data: Data
    row: int
    stream: str
    order: int


class Outline(Protocol):
    """What a rollout's place in a pack follows from; a `Rollout` is one, and so is its summary."""

    @property
    def prompt_uid(self) -> str: ...
    @property
    def index(self) -> int: ...
    @property
    def num_tokens(self) -> int: ...
    @property
    def prompt_len(self) -> int: ...
    @property
    def prompt_key(self) -> bytes: ...
    @property
    def num_sampled(self) -> int: ...
    @property
    def num_tool_calls(self) -> int: ...
    @property
    def image_spans(self) -> tuple[ImageSpan, ...]: ...


@dataclass(frozen=True, slots=True)
class RolloutSummary(Compact):
    """A rollout without its tokens and images.

    num_tokens: S. num_tool_errors: turns that ended in TOOL_ERROR. versions: (weight version, tokens that it sampled).
    prompt_key: see `Rollout`. error: its beginning.
    """

    prompt_uid: str
    index: int
    num_tokens: int
    prompt_len: int
    prompt_key: bytes = field(repr=False)
    num_sampled: int
    num_tool_calls: int
    num_tool_errors: int
    image_spans: tuple[ImageSpan, ...]
    versions: tuple[tuple[int, int], ...]
    outcome: Outcome
    error: str = ""

    @staticmethod
    def of(rollout: Rollout) -> RolloutSummary:
        """What of a rollout its node tells."""
        return RolloutSummary(
            prompt_uid=rollout.prompt_uid,
            index=rollout.index,
            num_tokens=rollout.num_tokens,
            prompt_len=rollout.prompt_len,
            prompt_key=rollout.prompt_key,
            num_sampled=rollout.num_sampled,
            num_tool_calls=rollout.num_tool_calls,
            num_tool_errors=sum(turn.outcome is Outcome.TOOL_ERROR for turn in rollout.turns),
            image_spans=rollout.image_spans,
            versions=tuple(sorted(Counter(rollout.weight_version[rollout.sampled].tolist()).items())),
            outcome=rollout.outcome,
            error=rollout.error[:_ERROR],
        )


@dataclass(frozen=True, slots=True)
class NoVerdict(Compact):
    """Why a judge gave none. reason: the same words for the same kind of failure. text: all that is known."""

    reason: str
    text: str


Judged = Verdict | NoVerdict | None
"""None: there was nothing to judge, our machinery broke the rollout off."""


@dataclass(frozen=True, slots=True)
class GroupSummary(Compact):
    """A finished group. verdicts: one a rollout, long answers cut. node: the number of who holds it. key: what it is found by:
    on this machine a number of the node's, in a cluster an object of Ray's, which lives as long as somebody holds this."""

    job: Job
    ability: str
    kind: str | None
    judge_style: str
    rollouts: tuple[RolloutSummary, ...]
    verdicts: tuple[Judged, ...]
    node: int
    key: object = field(repr=False)

    @staticmethod
    def of(group: Group, verdicts: Sequence[Judged], job: Job, node: int, key: object) -> GroupSummary:
        """What a node tells of a group that it keeps."""
        return GroupSummary(
            job=job,
            ability=group.prompt.ability,
            kind=group.prompt.kind,
            judge_style=group.prompt.judge_style,
            rollouts=tuple(map(RolloutSummary.of, group.rollouts)),
            verdicts=tuple(replace(v, answer=v.answer[:_ANSWER]) if isinstance(v, Verdict) else v for v in verdicts),
            node=node,
            key=key,
        )


@dataclass(frozen=True, slots=True)
class Scores(Compact):
    """Of a group, on their way to the node that keeps it. key: see `GroupSummary`."""

    key: object
    scores: tuple[Score, ...]


@dataclass(frozen=True, slots=True)
class ScoredSummary(Compact):
    """A group as the run hands it to its trainer."""

    group: GroupSummary
    scores: tuple[Score, ...]

    @property
    def rollouts(self) -> tuple[RolloutSummary, ...]:
        """Of the group."""
        return self.group.rollouts

    @property
    def ability(self) -> str:
        """Of the prompt."""
        return self.group.ability

    @property
    def kind(self) -> str | None:
        """Of the prompt, see `Prompt.kind`."""
        return self.group.kind
