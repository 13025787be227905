"""Reads a response: the answer in it, and whether its tags are well formed. Linear in the length of the text.

Two ways to read: ours, of what the policy itself wrote, and the reference recipe's, of everything behind the prompt.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from metis_fast.types import Turn

_TAG = re.compile(r"<(/?)(reason|tool_call|answer)>")
_OPEN, _CLOSE = "<answer>", "</answer>"


def last_answer(text: str) -> str:
    """The text in the last complete `<answer>...</answer>`, stripped; "" where there is none.

    Of nested tags the innermost opening one counts, up to the first closing one after it.
    """
    last_close = text.rfind(_CLOSE)
    start = text.rfind(_OPEN, 0, max(last_close, 0))
    if start < 0:
        return ""
    start += len(_OPEN)
    return text[start : text.find(_CLOSE, start)].strip()


def first_answer(text: str) -> str:
    """The text from the first `<answer>` to the first `</answer>` behind it, stripped; "" where there is none.

    This is the reference recipe's reading: of nested tags the outermost opening one counts.
    """
    start = text.find(_OPEN)
    stop = text.find(_CLOSE, start + len(_OPEN)) if start >= 0 else -1
    return text[start + len(_OPEN) : stop].strip() if stop >= 0 else ""


def format_ok(text: str) -> bool:
    """r_fmt: every `<reason>`, `<tool_call>` and `<answer>` is closed, nothing is closed that was not open, and a complete
    answer follows the last `</reason>` (so there has to be one)."""
    depth = {"reason": 0, "tool_call": 0, "answer": 0}
    answered = False  # a complete answer since the last </reason>, and at least one </reason>
    reasoned = answer_opened = False
    for tag in _TAG.finditer(text):
        closing, name = bool(tag[1]), tag[2]
        depth[name] += -1 if closing else 1
        if depth[name] < 0:
            return False
        if name == "reason" and closing:
            reasoned, answer_opened, answered = True, False, False
        elif name == "answer" and not closing:
            answer_opened = reasoned
        elif name == "answer":
            answered = answered or answer_opened
    return answered and not any(depth.values())


def reference_format_ok(text: str) -> bool:
    """r_fmt of the reference recipe: tags are counted, their order is not checked, and `<reason>` is not required.

    As many `<reason>` as `</reason>`, as many `<tool_call>` as `</tool_call>`, and behind the last `</reason>` (in the whole
    text if there is none) as many `<answer>` as `</answer>`, at least one.
    """
    if any(text.count(f"<{tag}>") != text.count(f"</{tag}>") for tag in ("reason", "tool_call")):
        return False
    rest = text.rpartition("</reason>")[2]
    return rest.count(_OPEN) == rest.count(_CLOSE) > 0


def whole_response(turns: Sequence[Turn]) -> str:
    """All that stands behind the prompt, as the reference recipe decodes it: special tokens are gone, while observations and
    the role words of the chat stay. An observation for which there was no room is not part of it."""
    parts: list[str] = []
    for turn in turns:
        parts.append(turn.text)
        if turn.observation_stop > turn.stop:
            parts.append(f"\nuser\n{turn.observation}\nassistant\n")
    return "".join(parts)
