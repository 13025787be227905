"""What a protocol is: everything in which one published form of a conversation with tools differs from another."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from metis_fast.errors import InfrastructureError
from metis_fast.rollout.calls import ParsedTurn
from metis_fast.tools.results import ToolResult
from metis_fast.types import ImageBlob, Observation, Outcome

# The recipe's example call writes the code of `python` in one string; this is the most that is quoted back of a name.
LONGEST_NAME = 100


@dataclass(frozen=True, slots=True)
class Block:
    """A part of an observation as tokens. image, grid: of an image; (t, h, w) in patches. whole: it may not be cut."""

    tokens: Sequence[int]
    image: ImageBlob | None = None
    grid: tuple[int, int, int] = (0, 0, 0)
    whole: bool = False


class Dialect(Protocol):
    """A protocol of conversation. Its texts are fixed: they are encoded once.

    end_tokens: control tokens that end a message, beside `</tool_call>`. stop: strings that end it, however they are tokenised.
    opening, closing: what stands around an observation in the user's turn. cut_mark: what says that it was cut.
    shares_room: images that do not fit into an observation beside its text are scaled down until they do; otherwise only one
    that would not fit alone is. squeezes: images more than 200 times as long as wide are squeezed; otherwise the agent reads
    that they cannot be shown. counts_unrun: calls that got no observation count as calls.
    """

    end_tokens: tuple[str, ...]
    stop: tuple[str, ...]
    opening: str
    closing: str
    cut_mark: str
    shares_room: bool
    squeezes: bool
    counts_unrun: bool

    def num_messages(self, max_turns: int) -> int:
        """Most messages of a rollout (`rollout.max_turns`)."""
        ...

    def parse(self, text: str) -> ParsedTurn:
        """Find the tool call of a message that ended by itself, or was cut off by a limit."""
        ...

    def malformed(self, turn: ParsedTurn) -> Observation:
        """What the agent reads where its call could not be parsed."""
        ...

    def arguments(self, name: str, arguments: Mapping[str, object]) -> Mapping[str, object]:
        """What the tools are given: they take one form, a protocol may take several."""
        ...

    def word(self, result: ToolResult | Observation) -> Observation:
        """A result as the agent reads it; what is in words already stays."""
        ...

    def unreachable(self, error: InfrastructureError) -> Observation | None:
        """What the agent reads, and then ends, where our tools fail for good; None: such a rollout has no verdict."""
        ...

    def cut(self, blocks: Sequence[Block], limit: int, mark: Sequence[int]) -> list[Block]:
        """An observation that is longer than `limit` tokens, cut. mark: `cut_mark` as tokens."""
        ...


def error_observation(text: str) -> Observation:
    """What the agent reads of its own mistake."""
    return Observation(text=f"Error: {text}", outcome=Outcome.TOOL_ERROR)


def first_blocks(blocks: Sequence[Block], limit: int) -> tuple[list[Block], int]:
    """The blocks that fit whole, and how many tokens are left."""
    kept: list[Block] = []
    for block in blocks:
        if len(block.tokens) > limit:
            break
        kept.append(block)
        limit -= len(block.tokens)
    return kept, limit
