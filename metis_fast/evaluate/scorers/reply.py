"""The final answer in a reply: in its tags, in a box, behind "the answer is", or the whole of a short reply."""

from __future__ import annotations

import re
from dataclasses import dataclass

from metis_fast.score.response import last_answer

_OPEN_THOUGHT = re.compile(r"<(think|reason|tool_call)>")
_CLOSE_THOUGHT = re.compile(r"</(?:think|reason)>")
_SAID = re.compile(
    r"(?:final|correct|best|right)\s+(?:answer|option|choice)\**\s*(?:is\b|:|=)|\banswer\**\s*(?:is\b|:|=)|答案(?:是|为|：|:)",
    re.IGNORECASE,
)
_BOX = re.compile(r"\\boxed\s*\{")
_OPTION = re.compile(r"[\s*-]*\(?([A-H])[).:](?:\s|$)")
_SHORT = 200  # characters of one line that are an answer as they stand
_MARKS = " \t\r\n*:："


@dataclass(frozen=True, slots=True)
class Answer:
    """What a reply gives as its answer. text: "" where it gives none. marked: it stands in tags or a box."""

    text: str
    marked: bool = False


def final_answer(reply: str) -> Answer:
    """The answer of a reply.

    Thoughts in <think> or <reason> do not count, nor does anything behind one that was never closed: such a reply was cut.
    """
    text = without_thoughts(reply)
    if closed := list(_CLOSE_THOUGHT.finditer(text)):  # the chat template may have opened it
        text = text[closed[-1].end() :]
    if opened := _OPEN_THOUGHT.search(text):
        text = text[: opened.start()]
    if tagged := last_answer(text):
        return _inside(tagged, marked=True)
    return _inside(text.replace("<answer>", "\n").replace("</answer>", "\n").strip(), marked=False)


def without_thoughts(text: str) -> str:
    """A text with a line end in place of each closed thought and call. Linear in its length, as a pattern would not be."""
    kept, at = list[str](), 0
    unclosed: set[str] = set()  # tags that are closed nowhere behind
    for opened in _OPEN_THOUGHT.finditer(text):
        tag = opened[1]
        if opened.start() < at or tag in unclosed:
            continue
        stop = text.find(f"</{tag}>", opened.end())
        if stop < 0:
            unclosed.add(tag)
            continue
        kept += [text[at : opened.start()], "\n"]
        at = stop + len(tag) + 3
    return "".join([*kept, text[at:]])


def _inside(text: str, marked: bool) -> Answer:
    """Of a text that may still be an explanation."""
    if (boxed := _last_box(text)) is not None:
        return Answer(boxed, marked=True)
    if marked and len(text) <= _SHORT and "\n" not in text and not _SAID.search(text):
        return Answer(text, marked=True)
    if said := list(_SAID.finditer(text)):
        return Answer(_first_line(text[said[-1].end() :]), marked)
    if len(text) <= _SHORT and "\n" not in text:
        return Answer(text, marked)
    last = text.rstrip().rpartition("\n")[2].strip()
    if _OPTION.match(last) and len({found[1] for found in map(_OPTION.match, text.splitlines()) if found}) > 1:
        return Answer(text)  # a list of options, whose last one is not chosen
    return Answer(last)


def _first_line(text: str) -> str:
    text = text.lstrip(_MARKS)
    return text.partition("\n")[0].rstrip(_MARKS)


def _last_box(text: str) -> str | None:
    """The inside of the last `\\boxed{...}` whose braces are closed; None where its line has others beside it that differ."""
    starts = [box.end() for box in _BOX.finditer(text)]
    if not starts:
        return None
    closing: dict[int, int] = {}  # behind an opening brace -> its closing one
    opened: list[int] = []
    lines: dict[int, int] = {}  # behind an opening brace -> number of its line
    line = 0
    for at in range(starts[0] - 1, len(text)):
        if text[at] == "{":
            opened.append(at + 1)
            lines[at + 1] = line
        elif text[at] == "}" and opened:
            closing[opened.pop()] = at
        elif text[at] == "\n":
            line += 1
    closed = [start for start in starts if start in closing]
    if not closed:
        return None
    last = closed[-1]
    inside = text[last : closing[last]].strip()
    beside = (start for start in closed if lines[start] == lines[last])
    return inside if all(text[start : closing[start]].strip() == inside for start in beside) else None
