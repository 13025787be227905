"""Reads a response: the answer in it, and whether its tags are well formed. Linear in the length of the text."""

from __future__ import annotations

import re

_TAG = re.compile(r"<(/?)(reason|tool_call|answer)>")


def last_answer(text: str) -> str:
    """The text in the last complete `<answer>...</answer>`, stripped; "" where there is none.

    Of nested tags the innermost opening one counts, up to the first closing one after it.
    """
    last_close = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(last_close, 0))
    if start < 0:
        return ""
    start += len("<answer>")
    return text[start : text.find("</answer>", start)].strip()


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
