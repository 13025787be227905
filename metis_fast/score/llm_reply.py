"""Reads the reply of an LLM judge: a chat completion in, a verdict out. docs/scoring.md has the grammar."""

from __future__ import annotations

import json
import re

from pydantic import BaseModel, ValidationError

from metis_fast.score.protocol import TryAgain

_ENDS = frozenset({"", "stop", "eos", "eos_token", "end_turn", "stop_sequence", "complete"})
"""What servers call the end of a whole reply."""
_CUT = frozenset({"length", "max_tokens"})
_REFUSED = frozenset({"content_filter", "refusal", "safety", "recitation", "prohibited_content"})

_NAMES = r"(?:seed:)?(?:think|thinking|thought|thoughts|reasoning|reason|reflection|analysis|scratchpad)"
_THOUGHT = re.compile(
    rf"(?P<opens><{_NAMES}>|\[THINK\]|◁think▷|<\|begin_of_thought\|>|<\|START_THINKING\|>|<\|channel>thought"
    r"|<\|channel\|>(?:analysis|commentary)[^<]*<\|message\|>)"
    rf"|</{_NAMES}>|\[/THINK\]|◁/think▷|<\|end_of_thought\|>|<\|END_THINKING\|>|<channel\|>"
    r"|<\|channel\|>final[^<]*<\|message\|>",
    re.IGNORECASE,
)
"""Marks around thinking: tags; Magistral, Kimi, Sky-T1, Command, Gemma, gpt-oss."""
_WRAPPERS = re.compile(
    r"</?(?:answer|verdict|final|final_answer|output|response|result)>|<\|(?:begin|end)_of_box\|>"
    r"|\\(?:boxed|text|textbf|mathrm|mathbf)\s*(?=\{)|<[|｜][^<>\s]{1,30}[|｜]>|</s>|<eos>|<end_of_turn>",
    re.IGNORECASE,
)
_MARKS = " \t\r\n\u00a0\u200b\ufeff\"'`´“”‘’„«»‹›「」『』()[]{}*_#>$"
_LABEL = (
    r"(?:(?:the|my|final|overall)\s+)*"
    r"(?:verdict|answer|judge?ment|decision|result|grade|grading|conclusion|evaluation|assessment)"
)
_ANY_MARKS = f"[{re.escape(_MARKS)}]*"
_LINE = re.compile(rf"(?:{_LABEL}{_ANY_MARKS}[:：=]{_ANY_MARKS})?(IN)?CORRECT!?", re.IGNORECASE)
_HEADING = re.compile(_LABEL, re.IGNORECASE)


class _Part(BaseModel):
    type: str = "text"
    text: object = None
    refusal: object = None


class _Message(BaseModel):
    content: str | list[str | _Part] | None = None
    refusal: object = None
    reasoning_content: object = None
    reasoning: object = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Reply(BaseModel):
    """The part of a chat completion that is needed."""

    choices: list[_Choice]


def read_reply(body: bytes) -> bool:
    """The verdict in a chat completion.

    Raises:
        TryAgain: there is none, or it is in doubt.
    """
    try:
        choices = _Reply.model_validate_json(body).choices
    except ValidationError:
        said = one_line(body.decode(errors="replace"))
        advice = "see what score.llm.base_url leads to"
        raise TryAgain(f"{described(body)} came instead of a chat completion", said, advice) from None
    if not choices:
        raise TryAgain("a reply without choices came")
    choice = choices[0]
    message, end = choice.message, (choice.finish_reason or "").lower()
    parts = message.content if isinstance(message.content, list) else [message.content or ""]
    refusals = [message.refusal, *(part.refusal for part in parts if isinstance(part, _Part))]
    said = next((str(refusal) for refusal in refusals if refusal), "")
    if said or end in _REFUSED:
        raise TryAgain("the model refused or its reply was filtered", one_line(said or end))
    text = "".join(map(_text, parts))
    if end in _CUT:
        advice = "raise score.llm.max_tokens, or turn the model's thinking off with score.llm.extra_body (docs/scoring.md)"
        raise TryAgain("the reply was cut off before its end", one_line(text), advice)
    if end not in _ENDS:
        raise TryAgain(f"the reply ended with finish_reason {one_line(end)!r}", one_line(text))
    verdict = verdict_in(text)
    if verdict is not None:
        return verdict
    if not text.strip() and (message.reasoning_content or message.reasoning):
        advice = "turn thinking off (docs/scoring.md), or start the server without its reasoning parser"
        raise TryAgain("the reply has thinking and nothing after it", advice=advice)
    got = f"got {one_line(text, from_end=True)!r}"
    raise TryAgain("expected CORRECT or INCORRECT", got, "see docs/scoring.md for what counts as a verdict")


def _text(part: str | _Part | None) -> str:
    if isinstance(part, _Part):
        return part.text if part.type in ("text", "output_text") and isinstance(part.text, str) else ""
    return part or ""


def verdict_in(text: str) -> bool | None:
    """The verdict that a reply says, None where it says none, or more than one thing."""
    thoughtless = without_thoughts(text)
    if thoughtless is None:
        return None
    reply = _WRAPPERS.sub(" ", thoughtless).strip()
    if reply.lower().count("correct") != 1:  # INCORRECT has it, too
        return None
    lines = [line for line in reply.splitlines() if line.strip()]
    if len(lines) > 2 and lines[0].startswith("```") and lines[-1].strip() == "```":
        lines = lines[1:-1]
        reply = "\n".join(lines)
    verdict = _word_of(_json_verdict(reply))
    if verdict is None and len(lines) > 1 and _is_closed(lines[-2]):
        verdict = _word_of(lines[-1])
    return verdict


def _word_of(text: str) -> bool | None:
    word = _LINE.fullmatch(text.lstrip(_MARKS).rstrip(_MARKS + ".。"))
    return None if word is None else word[1] is None


def without_thoughts(text: str) -> str | None:
    """A reply without what the model thought before it, None where the thinking has no end.

    An opening mark may be missing: then it stood in the prompt.
    """
    if text.startswith("analysis"):  # gpt-oss, its special tokens dropped
        text = text.rpartition("assistantfinal")[2]
    kept, inside, last = [], False, 0
    for mark in _THOUGHT.finditer(text):
        if mark["opens"] is None:
            inside = False
        elif not inside:
            kept.append(text[last : mark.start()])
            inside = True
        last = mark.end()
    return None if inside else "\n".join([*kept, text[last:]])


def _json_verdict(reply: str) -> str:
    """The word of {"verdict": "CORRECT"}, "" where an object says none; what is no object, as it is."""
    try:
        value = json.loads(reply)
    except (ValueError, RecursionError):
        return reply
    if not isinstance(value, dict):
        return reply
    said = [entry for name, entry in value.items() if _HEADING.fullmatch(name.replace("_", " ").strip())]
    return said[0] if len(said) == 1 and isinstance(said[0], str) else ""


def _is_closed(line: str) -> bool:
    """Whether a line ends a sentence, so that the next one does not go on with it ("It is not / CORRECT")."""
    bare = line.strip(_MARKS)
    return bare.endswith((".", "!", ":", "。", "！", "：")) or _HEADING.fullmatch(bare) is not None


def described(body: bytes) -> str:
    """What a body that is no chat completion is, in words."""
    start = body[:4000].lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html")):
        title = re.search(rb"<title>(.{1,100}?)</title>", start, re.DOTALL)
        return f"a web page ({one_line(title[1].decode(errors='replace'))})" if title else "a web page"
    return "something else" if start else "nothing"


def one_line(text: str, from_end: bool = False) -> str:
    """As part of a message: without line breaks, at most 200 characters."""
    flat = " ".join(text.split())
    return flat if len(flat) <= 200 else f"...{flat[-200:]}" if from_end else f"{flat[:200]}..."
