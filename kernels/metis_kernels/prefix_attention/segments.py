"""Which tokens of a pack see which: segments one after another, each a prompt or what follows one.

Example: two groups, the first with two rollouts, the second with one, prompts of 4 and 3 tokens:

    Segments(offsets=(0, 4, 6, 9, 12, 14), prefix=(-1, 0, 0, -1, 3))

Tokens 4 and 5 (the first rollout) see the prompt 0 to 3 and themselves causally, tokens 6 to 8 the same prompt, tokens 12 and
13 the prompt 9 to 11.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Segment:
    """Tokens [start, stop) see each other, causally or all, and all of [prefix_start, prefix_stop), empty for a prompt."""

    start: int
    stop: int
    prefix_start: int
    prefix_stop: int


@dataclass(frozen=True, slots=True)
class Segments:
    """The segments of a pack of N tokens, S of them, in order and without gaps. Made by packing, on the host.

    offsets: S + 1 ascending numbers from 0 to N. prefix: for every segment the index of the one that it sees whole, which is
    an earlier one that sees no other; -1 for none. causal: whether a token sees of its own segment only what stands up to
    it, or all of it.

    Raises:
        ValueError: they are something else; the message names the segment.
    """

    offsets: tuple[int, ...]
    prefix: tuple[int, ...]
    causal: bool = True

    def __post_init__(self) -> None:
        if not self.offsets or self.offsets[0] != 0:
            raise ValueError(f"offsets: expected numbers from 0 on, got {self.offsets[:4]}")
        if len(self.prefix) != len(self.offsets) - 1:
            raise ValueError(f"prefix: expected one number a segment, {len(self.offsets) - 1} in all, got {len(self.prefix)}")
        for segment, (start, stop) in enumerate(zip(self.offsets, self.offsets[1:], strict=False)):
            if stop < start:
                raise ValueError(f"offsets: expected ascending numbers, but segment {segment} is {start} to {stop}")
        for segment, seen in enumerate(self.prefix):
            if seen != -1 and not (0 <= seen < segment and self.prefix[seen] == -1):
                raise ValueError(
                    f"prefix: expected for segment {segment} an earlier segment that has no prefix itself, or -1, got {seen}"
                )

    @property
    def num_tokens(self) -> int:
        """N."""
        return self.offsets[-1]

    def __iter__(self) -> Iterator[Segment]:
        for i, seen in enumerate(self.prefix):
            prefix = (0, 0) if seen < 0 else (self.offsets[seen], self.offsets[seen + 1])
            yield Segment(self.offsets[i], self.offsets[i + 1], *prefix)


def readers(segments: Segments) -> dict[tuple[int, int], list[tuple[int, int]]]:
    """By (start, stop) of a prefix: the ranges of tokens that see it whole, in order, neighbours joined; nothing empty."""
    found: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for one in segments:
        if one.prefix_start == one.prefix_stop or one.start == one.stop:
            continue
        ranges = found.setdefault((one.prefix_start, one.prefix_stop), [])
        if ranges and ranges[-1][1] == one.start:
            ranges[-1] = ranges[-1][0], one.stop
        else:
            ranges.append((one.start, one.stop))
    return found
