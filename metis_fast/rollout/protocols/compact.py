"""`rollout.protocol: compact`, the demo's: an observation stands in <tool_response> and is as short as it can be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from metis_fast.config import CallSyntax, ToolsConfig
from metis_fast.errors import InfrastructureError
from metis_fast.rollout.calls import ParsedTurn, parse_turn
from metis_fast.rollout.protocols.base import Block, error_observation, first_blocks
from metis_fast.tools.results import (
    ContentResult,
    ImageSearchResult,
    PythonResult,
    Refused,
    TextSearchResult,
    ToolResult,
)
from metis_fast.tools.search.wording import compact_images, compact_text
from metis_fast.types import Observation, Outcome


class Compact:
    """See `Dialect`."""

    end_tokens: tuple[str, ...] = ("<|im_end|>",)
    stop: tuple[str, ...] = ()
    opening = "user\n<tool_response>"
    closing = "</tool_response>"
    cut_mark = "\n[cut]"
    shares_room = True
    squeezes = False
    counts_unrun = True

    def __init__(self, tools: ToolsConfig | None = None) -> None:
        """tools: says how calls are written, and whether results are numbered."""
        tools = tools if tools is not None else ToolsConfig()
        self._syntax: CallSyntax = tools.call_syntax
        self._numbered = {
            TextSearchResult: tools.text_search.max_results > 1,
            ImageSearchResult: tools.image_search.max_results > 1,
        }

    def num_messages(self, max_turns: int) -> int:
        """Messages are turns."""
        return max_turns

    def parse(self, text: str) -> ParsedTurn:
        """See `parse_turn`."""
        return parse_turn(text, self._syntax)

    def malformed(self, turn: ParsedTurn) -> Observation:
        """What is wrong, and what to write."""
        return error_observation(turn.error)

    def arguments(self, name: str, arguments: Mapping[str, object]) -> Mapping[str, object]:
        """As they are."""
        return arguments

    def word(self, result: ToolResult | Observation) -> Observation:
        """See `Dialect.word`."""
        match result:
            case Observation():
                return result
            case TextSearchResult():
                return Observation(compact_text(result, self._numbered[TextSearchResult]))
            case ImageSearchResult():
                return Observation(*compact_images(result, self._numbered[ImageSearchResult]))
            case PythonResult() | ContentResult():
                return _in_order(result)
            case Refused():
                return Observation(result.text.replace("<image>", "< image >"), outcome=Outcome.TOOL_ERROR)

    def unreachable(self, error: InfrastructureError) -> None:
        """It is never the agent's fault."""

    def cut(self, blocks: Sequence[Block], limit: int, mark: Sequence[int]) -> list[Block]:
        """The beginning, then the mark, within the limit; nothing follows a cut."""
        kept, left = first_blocks(blocks, limit)
        rest = blocks[len(kept)]
        head = [] if rest.whole else rest.tokens[: max(0, left - len(mark))]
        return [*kept, Block([*head, *mark[: left - len(head)]])]


def _in_order(result: PythonResult | ContentResult) -> Observation:
    """What was written and shown, in that order."""
    texts = [""]  # texts[k] stands before image k
    for part in result.parts:
        if isinstance(part, str):
            texts[-1] += part
        else:
            texts.append("")
    # Whole texts, so that no mark hides in two parts; an image stands on a line of its own.
    lines = [text.replace("<image>", "< image >").removesuffix("\n") for text in texts]
    text = "\n<image>\n".join(lines).replace("\n\n<image>", "\n<image>").strip("\n")
    outcome = Outcome.TOOL_RESULT if result.ok else Outcome.TOOL_ERROR
    return Observation(text or "(no output)", result.images, outcome)
