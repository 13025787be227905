"""`rollout.protocol: metis`, in which the published checkpoints were trained: an observation is a user turn in fixed forms.

The forms are those of the reference to the letter; docs/protocols.md has a table of them, and of what `rollout.strict` changes.
"""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Mapping, Sequence

from metis_fast.config import CallSyntax, ToolsConfig
from metis_fast.errors import InfrastructureError
from metis_fast.rollout.calls import ParsedTurn, parse_turn
from metis_fast.rollout.protocols.base import LONGEST_NAME, Block, error_observation, first_blocks
from metis_fast.tools.results import (
    ContentResult,
    ImageSearchResult,
    PythonResult,
    Refusal,
    Refused,
    TextSearchResult,
    ToolResult,
)
from metis_fast.types import Observation, Outcome, ToolCall

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_TEXT_SEARCH, _PYTHON, _IMAGE_SEARCH = ("text_search", "search"), "python", "image_search"
_MARK = "<image>"
_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)
_SILENT = "Script executed successfully (no output)."
_SILENT_TOOL = "(no output)"
_AGAIN = (
    "image_search was called before, and its results would be the same. Do not call it again: use the results above and give "
    "your answer."
)
_UNREACHABLE = "Tool call error: the tool server cannot be reached."


class Metis:
    """See `Dialect`. Where the reference is broken, this does what serves training; `StrictMetis` does as the reference."""

    end_tokens: tuple[str, ...] = ("<|im_end|>", "<|endoftext|>")
    stop: tuple[str, ...] = (_CLOSE,)
    opening = "user\n"
    closing = ""
    cut_mark = "...(truncated)"
    shares_room = False
    squeezes = True
    counts_unrun = False

    def __init__(self, tools: ToolsConfig | None = None) -> None:
        """tools: says how calls are written."""
        self._syntax: CallSyntax = tools.call_syntax if tools is not None else "strict"

    def num_messages(self, max_turns: int) -> int:
        """Turns are calls; one more message follows the last of them."""
        return max_turns + 1

    def parse(self, text: str) -> ParsedTurn:
        """The call that a message ends with; one that is never closed is none."""
        if _CLOSE not in text:
            return ParsedTurn()
        if _OPEN not in text:
            return ParsedTurn(ToolCall("", ""), None, "the tool call has no <tool_call>; write it before the object")
        return parse_turn(text, self._syntax)

    def malformed(self, turn: ParsedTurn) -> Observation:
        """What is wrong, and what to write."""
        return error_observation(turn.error)

    def arguments(self, name: str, arguments: Mapping[str, object]) -> Mapping[str, object]:
        """The one argument that counts; of a list of queries the first, of code what is left of it without its margin."""
        if name == _IMAGE_SEARCH:
            return {}
        if name in _TEXT_SEARCH:
            query = arguments.get("query")
            if isinstance(query, list):
                query = query[0] if query else None
            text = "" if query is None else str(query).strip()
            return {"query": text} if text else {}
        if name == _PYTHON:
            code = arguments.get("code")
            text = textwrap.dedent(code).strip() if isinstance(code, str) else ""
            return {"code": text} if text else {}
        return arguments

    def word(self, result: ToolResult | Observation) -> Observation:
        """See `Dialect.word`."""
        match result:
            case Observation():
                return result
            case TextSearchResult():
                return Observation(_pages(result))
            case ImageSearchResult():
                return _seen_pages(result)
            case PythonResult():
                return _python(result)
            case ContentResult():
                return _content(result)
            case Refused():
                return Observation(_refusal(result), outcome=Outcome.TOOL_ERROR)

    def unreachable(self, error: InfrastructureError) -> Observation | None:
        """It is never the agent's fault."""
        return None

    def cut(self, blocks: Sequence[Block], limit: int, mark: Sequence[int]) -> list[Block]:
        """The last tokens of a text, the first ones where there are images, which stay whole; the mark stands behind either,
        and beyond the limit."""
        if not any(block.image is not None for block in blocks):
            tokens = [token for block in blocks for token in block.tokens]
            return [Block(tokens[len(tokens) - limit :]), Block(mark)]
        kept, left = first_blocks(blocks, limit)
        rest = blocks[len(kept)]
        return [*kept, Block([] if rest.whole else rest.tokens[:left]), Block(mark)]


class StrictMetis(Metis):
    """As the reference does, where it is broken, too."""

    def parse(self, text: str) -> ParsedTurn:
        """What stands between the last pair of tags, as JSON; nothing is said of what is wrong with it."""
        if _CLOSE not in text:
            return ParsedTurn()
        found = _CALL.findall(text)
        unreadable = ParsedTurn(ToolCall("", ""), None, "the tool call cannot be read")
        if not found:
            return unreadable
        try:
            body: object = json.loads(found[-1].strip())
            json.dumps(body, ensure_ascii=False).encode()
        except (ValueError, RecursionError):  # also half a surrogate pair
            return unreadable
        if not isinstance(body, dict):
            return ParsedTurn(ToolCall("", ""), None, "the tool call is no object", ends=True)
        name, arguments = str(body.get("name")), body.get("arguments", {})
        call = ToolCall(name, json.dumps(arguments, ensure_ascii=False))
        if isinstance(arguments, dict):
            return ParsedTurn(call, arguments)
        if name not in (*_TEXT_SEARCH, _PYTHON, _IMAGE_SEARCH):
            return ParsedTurn(call, {})
        return ParsedTurn(call, None, '"arguments" is no object', ends=True)

    def malformed(self, turn: ParsedTurn) -> Observation:
        """Nothing."""
        return Observation("", outcome=Outcome.TOOL_ERROR)

    def unreachable(self, error: InfrastructureError) -> Observation | None:
        """A sentence, with which the rollout ends, to be judged as it stands."""
        return Observation(_UNREACHABLE, outcome=Outcome.TOOL_ERROR)


def _refusal(refused: Refused) -> str:
    match refused.why:
        case Refusal.NO_TOOL:
            return f"Error: No handler found for tool '{refused.tool[:LONGEST_NAME]}'."
        case Refusal.REPEATED:
            return _AGAIN
        case Refusal.ARGUMENTS if refused.tool == _PYTHON:
            return "Error: No code provided in the tool call arguments."
        case Refusal.ARGUMENTS if refused.tool in _TEXT_SEARCH:
            return "Error: Search query is empty."
        case _:
            return _without_marks(refused.text)


def _pages(result: TextSearchResult) -> str:
    if not result.pages:
        return f"No results found for '{result.query}'."
    pages: list[str] = []
    snippets: set[str] = set()
    for page in result.pages:
        if page.snippet and page.snippet not in snippets:
            snippets.add(page.snippet)
            pages.append(f"Page {page.rank}. [Title: {page.title}](Link: {page.link})\nSnippet: {page.snippet}\n")
    if not pages:
        return f"No search results found for {result.query}."
    return f"A Google search for '{result.query}' found {len(pages)} results:\n\n## Web Results\n" + "\n".join(pages)


def _seen_pages(result: ImageSearchResult) -> Observation:
    if not result.pages:
        return Observation("No result found for image search.")
    texts, images = [], []
    for rank, page in enumerate(result.pages, start=1):
        if page.image is not None:
            texts.append(f"{rank}. <image>\n[{_without_marks(page.title)}]\n")
            images.append(page.image)
    head = f"A Google image search for the image found {len(texts)} results:\n\n## Web Results\n"
    return Observation(head + "\n\n".join(texts), tuple(images))


def _without_marks(text: str) -> str:
    """Without `<image>`, also where taking one out puts another one together. Linear in the length of the text."""
    if _MARK not in text:
        return text
    kept: list[str] = []
    for char in text:
        kept.append(char)
        if char == _MARK[-1] and "".join(kept[-len(_MARK) :]) == _MARK:
            del kept[-len(_MARK) :]
    return "".join(kept)


def _python(result: PythonResult) -> Observation:
    """Both streams, always; images behind them, and none of code that failed."""
    images = result.images if result.ok else ()
    stdout, stderr = result.stdout, result.stderr
    if result.ok and not stdout and not images:
        stdout = _SILENT
    if result.note:
        stderr += ("\n" if stderr and not stderr.endswith("\n") else "") + result.note
    text = f"Code execution result:\nstdout:\n```\n{stdout}\n```\n\nstderr:\n```\n{stderr}\n```\n\n"
    text = _without_marks(text)
    if images:
        text += "Images:\n" + _MARK * len(images)
    return Observation(text.strip(), images, Outcome.TOOL_RESULT if result.ok else Outcome.TOOL_ERROR)


def _content(result: ContentResult) -> Observation:
    """Texts and images in their order; the published protocol has no such tool, so these are the tool's own words."""
    outcome = Outcome.TOOL_RESULT if result.ok else Outcome.TOOL_ERROR
    parts = [_without_marks(part) if isinstance(part, str) else _MARK for part in result.parts]
    return Observation("\n".join(parts).strip() or _SILENT_TOOL, result.images, outcome)
