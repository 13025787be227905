"""Rollouts as chat completions: whole, or as the chunks of a stream."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from secrets import token_hex

from metis_fast.score.response import last_answer
from metis_fast.types import Outcome, Rollout, Turn

_TAGS = re.compile(r"</?(?:reason|answer|tool_call)>")
_CHUNK = 48  # characters of a chunk's content

Json = dict[str, object]


@dataclass(frozen=True, slots=True)
class Head:
    """What all chunks of a reply begin with."""

    model: str
    name: str = field(default_factory=lambda: f"chatcmpl-{token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def tree(self, kind: str) -> Json:
        """As JSON."""
        return {"id": self.name, "object": kind, "created": self.created, "model": self.model}


def answered_in_tags(rollout: Rollout) -> bool:
    """Whether there is a complete `<answer>...</answer>`, be it empty. In what a tool is called with, there is none."""
    return _with_answer(rollout) is not None


def _with_answer(rollout: Rollout) -> str | None:
    """What was written, as far as it holds the answer in its tags: outside of thoughts if it is there, else among them."""
    text = _without("tool_call", rollout.response_text)
    for part in (_without("reason", text), text):
        close = part.rfind("</answer>")
        if close >= 0 and part.rfind("<answer>", 0, close) >= 0:
            return part
    return None


def _without(tag: str, text: str) -> str:
    """A text without what is between a tag and its end. Linear in its length, as a pattern would not be."""
    kept, at = list[str](), 0
    while (start := text.find(f"<{tag}>", at)) >= 0 and (stop := text.find(f"</{tag}>", start)) >= 0:
        kept.append(text[at:start])
        at = stop + len(tag) + 3
    return "".join([*kept, text[at:]])


def content_of(rollout: Rollout, raw: bool, stop: Sequence[str]) -> str:
    """The final answer: the text in the last `<answer>...</answer>`, else the last message without its tags.

    raw: all that the agent wrote instead. stop: strings before the first of which it ends.
    """
    if raw:
        text = rollout.response_text
    elif (answer := _with_answer(rollout)) is not None:
        text = last_answer(answer)
    else:
        text = _TAGS.sub("", rollout.turns[-1].text).strip() if rollout.turns else ""
    ends = [at for one in stop if (at := text.find(one)) >= 0]
    return text[: min(ends)] if ends else text


def _finish(rollout: Rollout) -> str:
    return "stop" if rollout.outcome is Outcome.ANSWERED else "length"


def _turn(rollout: Rollout, turn: Turn) -> Json:
    call = None if turn.call is None else {"name": turn.call.name, "arguments": turn.call.arguments}
    shown = [span.sha256 for span in rollout.image_spans if turn.stop <= span.start < turn.observation_stop]
    return {
        "text": turn.text,
        "outcome": turn.outcome.value,
        "call": call,
        "observation": turn.observation if turn.call is not None else None,
        "images": shown,
        "tool_seconds": round(turn.tool_s, 4),
    }


def _told(rollout: Rollout) -> Json:
    """What is said of an episode beside its answer. Images are given by the SHA-256 of their files."""
    versions = rollout.weight_version[rollout.sampled]
    return {
        "outcome": rollout.outcome.value,
        "answer_tags": answered_in_tags(rollout),
        "num_tool_calls": rollout.num_tool_calls,
        "weight_version": int(versions.max()) if len(versions) else None,
        "observation_tokens": rollout.num_tokens - rollout.prompt_len - rollout.num_sampled,
        "transcript": [_turn(rollout, turn) for turn in rollout.turns],
    }


def _usage(rollouts: Sequence[Rollout]) -> Json:
    prompt, sampled = rollouts[0].prompt_len, sum(rollout.num_sampled for rollout in rollouts)
    return {"prompt_tokens": prompt, "completion_tokens": sampled, "total_tokens": prompt + sampled}


def completion(head: Head, rollouts: Sequence[Rollout], raw: bool, stop: Sequence[str]) -> Json:
    """The whole reply, a choice for each rollout."""
    choices = [
        {
            "index": index,
            "message": {"role": "assistant", "content": content_of(rollout, raw, stop), "refusal": None},
            "logprobs": None,
            "finish_reason": _finish(rollout),
            "metis": _told(rollout),
        }
        for index, rollout in enumerate(rollouts)
    ]
    return head.tree("chat.completion") | {"choices": choices, "usage": _usage(rollouts)}


def opening_chunks(head: Head, num: int) -> Iterator[Json]:
    """Who speaks, in each choice."""
    for index in range(num):
        yield _chunk(head, index, {"role": "assistant", "content": ""})


def closing_chunks(head: Head, rollouts: Sequence[Rollout], raw: bool, stop: Sequence[str], usage: bool) -> Iterator[Json]:
    """The answers in pieces, how each ended, and at last, if it was asked for, what it took."""
    for index, rollout in enumerate(rollouts):
        text = content_of(rollout, raw, stop)
        for at in range(0, len(text), _CHUNK):
            yield _chunk(head, index, {"content": text[at : at + _CHUNK]})
        yield _chunk(head, index, {}, _finish(rollout), _told(rollout))
    if usage:
        yield head.tree("chat.completion.chunk") | {"choices": [], "usage": _usage(rollouts)}


def _chunk(head: Head, index: int, delta: Json, finish: str | None = None, told: Json | None = None) -> Json:
    choice: Json = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}
    return head.tree("chat.completion.chunk") | {"choices": [choice if told is None else choice | {"metis": told}]}
