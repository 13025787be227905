"""Reads the reply of an LLM judge: a chat completion in, a verdict out. docs/llm-judge.md has the grammar."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Literal

from pydantic import BaseModel, ValidationError

from metis_fast.score.protocol import TryAgain

READING = 5
"""Goes up when a reply is read otherwise than before: verdicts in caches are of one way to read."""
_ENDS = frozenset({"", "stop", "eos", "eos_token", "end_turn", "stop_sequence", "complete"})
"""What servers call the end of a whole reply."""
_CUT = frozenset({"length", "max_tokens"})
_THOUGHT_PARTS = frozenset({"thinking", "redacted_thinking", "reasoning"})
_REFUSED = frozenset({"content_filter", "refusal", "safety", "recitation", "prohibited_content"})

_TAGS = (
    "think", "seed:think", "thinking", "thought", "thoughts", "reasoning", "reason", "reflection", "analysis", "scratchpad",
)  # fmt: skip
_THOUGHTS = {f"<{tag}>": f"</{tag}>" for tag in _TAGS} | {
    "[think]": "[/think]",  # Magistral
    "◁think▷": "◁/think▷",  # Kimi
    "<|begin_of_thought|>": "<|end_of_thought|>",  # Sky-T1
    "<|start_thinking|>": "<|end_thinking|>",  # Command
    "<|channel>thought": "<channel|>",  # Gemma
    "<|channel|>analysis": "<|channel|>final<|message|>",  # gpt-oss
    "<|channel|>commentary": "<|channel|>final<|message|>",
}
"""Marks around thinking: what opens it, in lower case, and the only thing that closes it."""
_OPENED_IN_PROMPT = frozenset({"</think>", "</seed:think>", "◁/think▷", "<|end_thinking|>"})
_THOUGHT = re.compile("|".join(map(re.escape, {*_THOUGHTS, *_THOUGHTS.values()})), re.IGNORECASE)

_ENDS_OF_TURN = r"im_end|endoftext|end_of_text|eot_id|eom_id|end|return|eot|end_response|end_of_turn_token|user|observation"
_WRAPPERS = re.compile(
    r"</?(?:answer|verdict|final|final_answer|output|response|result)>|<\|(?:begin|end)_of_box\|>|<\|start_response\|>"
    rf"|\\(?:boxed|text|textbf|mathrm|mathbf)\s*(?=\{{)|<\|(?:{_ENDS_OF_TURN})\|>|<｜end▁of▁sentence｜>|</s>|<eos>|<end_of_turn>",
    re.IGNORECASE,
)
_MAX_VERDICT_CHARS = 300  # what is longer says more than the word; peeling it would take the square of its length
_BLANKS = " \t\r\n\u00a0\u200b\ufeff"
_PAIRS = frozenset({
    '""', "''", "``", "´´", "“”", "„“", "„”", "””", "‘’", "’’", "«»", "»«", "‹›", "「」", "『』", "()", "[]", "{}", "**", "__",
    "$$",
})  # fmt: skip
_LABEL = (
    r"(?:(?:the|my|final|overall)\s+)*"
    r"(?:verdict|answer|judge?ment|decision|result|grade|grading|conclusion|evaluation|assessment)"
)
_LEAD = re.compile(rf"\A(?:#{{1,6}}\s)?\s*(?:(\*\*|\*|__|_|){_LABEL}(?:\1\s*[:：=]|\s*[:：=]\s*\1|\1[ \t]*\n))?", re.IGNORECASE)
_FENCE = re.compile(r"```(?:(?:json|text|txt|plaintext|markdown|md)[ \t]*)?\n(.*)```", re.DOTALL | re.IGNORECASE)
_NAME = re.compile(_LABEL, re.IGNORECASE)


class _Part(BaseModel):
    type: str = "text"
    text: object = None
    refusal: str | None = None


class _Message(BaseModel):
    role: Literal["assistant", "model"] | None = None
    content: str | list[str | _Part] | None = None
    refusal: str | None = None
    tool_calls: object = None
    function_call: object = None  # the older form
    reasoning_content: object = None
    reasoning: object = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None
    error: object = None


class _Reply(BaseModel):
    """The part of a chat completion that is needed."""

    choices: list[_Choice]
    error: object = None


class _Usage(BaseModel):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None


class _Counted(BaseModel):
    usage: _Usage | None = None


@dataclass(frozen=True, slots=True)
class Said:
    """A verdict. thought: the end of what the model thought before it, in one short line, as far as the reply has it."""

    correct: bool
    thought: str


def tokens_in(body: bytes) -> tuple[int, int]:
    """Tokens of the prompt and of the reply, as the server counts them; 0 where it does not."""
    try:
        usage = _Counted.model_validate_json(body).usage or _Usage()
    except ValidationError:  # whatever it is, the verdict does not depend on it
        return 0, 0
    return max(0, usage.prompt_tokens or 0), max(0, usage.completion_tokens or 0)


def read_reply(body: bytes) -> Said:
    """The verdict in a chat completion.

    Raises:
        TryAgain: there is none, or it is in doubt.
    """
    text, message = _whole_reply(body)
    verdict = verdict_in(text)
    if verdict is not None:
        return Said(verdict, _thought_before(text, message))
    if not text.strip() and (message.reasoning_content or message.reasoning):
        raise _only_thought()
    got = f"got {one_line(text, from_end=True)!r}"
    advice = "make the model say the word alone with score.llm.extra_body (docs/llm-judge.md)"
    raise TryAgain("expected CORRECT or INCORRECT and nothing else", got, advice)


def read_text(body: bytes) -> str:
    """What a chat completion says behind its thoughts, stripped, whatever it is.

    Raises:
        TryAgain: it is none, or cut off, refused, or thinking alone.
    """
    text, message = _whole_reply(body)
    said = without_thoughts(text)
    if said is None or (not said.strip() and (message.reasoning_content or message.reasoning)):
        raise _only_thought()
    return said.strip()


def _only_thought() -> TryAgain:
    advice = "turn thinking off (docs/llm-judge.md), or start the server without its reasoning parser"
    return TryAgain("the reply has thinking and nothing after it", advice=advice)


def _whole_reply(body: bytes) -> tuple[str, _Message]:
    """The text of a chat completion that came to its end, with its message. Raises TryAgain: there is none."""
    try:
        tree = json.loads(body.decode("utf-8-sig"), object_pairs_hook=_each_name_once)
        if isinstance(tree, dict) and tree.get("error") and not tree.get("choices"):
            raise TryAgain(
                "an error came instead of a chat completion", one_line(json.dumps(tree["error"], ensure_ascii=False))
            )
        reply = _Reply.model_validate(tree)
    except (ValueError, RecursionError):  # pydantic's ValidationError is a ValueError, too
        said = one_line(body.decode(errors="replace"))
        advice = "see what score.llm.base_url leads to"
        raise TryAgain(f"{described(body)} came instead of a chat completion", said, advice) from None
    if not reply.choices:
        raise TryAgain("a reply without choices came")
    if len(reply.choices) > 1:
        raise TryAgain("a reply with several choices came", advice="see what score.llm.base_url leads to")
    choice = reply.choices[0]
    if reply.error or choice.error:
        raise TryAgain("an error came beside the reply", one_line(body.decode(errors="replace")))
    message, end = choice.message, (choice.finish_reason or "").lower()
    if message.tool_calls or message.function_call:
        end = "tool_calls"
    parts = message.content if isinstance(message.content, list) else [message.content or ""]
    refusals = [message.refusal, *(part.refusal for part in parts if isinstance(part, _Part))]
    said = next(filter(None, refusals), "")
    if said or end in _REFUSED:
        raise TryAgain("the model refused or its reply was filtered", one_line(said or end))
    text = ""
    for part in parts:
        again = isinstance(part, _Part) and part.type in _THOUGHT_PARTS and text.strip()
        text += "?" if again else _text(part)  # as in `without_thoughts`: a word before a thought is no last word
    if end in _CUT:
        advice = "raise score.llm.max_tokens, or turn the model's thinking off with score.llm.extra_body (docs/llm-judge.md)"
        raise TryAgain("the reply was cut off before its end", one_line(text), advice)
    if end not in _ENDS:
        raise TryAgain(f"the reply ended with finish_reason {one_line(end)!r}", one_line(text))
    return text, message


def _thought_before(text: str, message: _Message) -> str:
    beside = next((part for part in (message.reasoning_content, message.reasoning) if isinstance(part, str) and part), "")
    rest = without_thoughts(text) or ""
    return one_line(beside or text.removesuffix(rest), from_end=True)


def _each_name_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a name twice in an object")
    return dict(pairs)


def _text(part: str | _Part) -> str:
    if isinstance(part, str):
        return part
    if part.type in ("text", "output_text") and isinstance(part.text, str | None):
        return part.text or ""
    return "" if part.type in _THOUGHT_PARTS else "?"  # nobody knows what it says: no verdict


def verdict_in(text: str) -> bool | None:
    """The verdict that a reply says, None where it says none, or anything beside it: nobody can read what prose means by it."""
    thoughtless = without_thoughts(text)
    if thoughtless is None:
        return None
    reply = _WRAPPERS.sub(" ", thoughtless).strip(_BLANKS)
    fenced = _FENCE.fullmatch(reply)
    reply = _json_verdict(fenced[1].strip(_BLANKS) if fenced else reply)
    if len(reply) > _MAX_VERDICT_CHARS:
        return None
    for line in (reply, _undressed(reply)):  # **Verdict:** **CORRECT**, and **Verdict: CORRECT**
        word = _undressed(_LEAD.sub("", line)).lower()
        if word in ("correct", "incorrect"):
            return word == "correct"
    return None


def _undressed(text: str) -> str:
    """Without what stands around the whole: blanks, pairs of quotes, brackets and Markdown marks, a stop at the end."""
    while True:
        bare = text.strip(_BLANKS).removesuffix(".").removesuffix("!").removesuffix("。")
        if len(bare) > 1 and bare[0] + bare[-1] in _PAIRS:
            bare = bare[1:-1]
        if bare == text:
            return bare
        text = bare


def without_thoughts(text: str) -> str | None:
    """A reply without what the model thought before it, None where the thinking has no end, or nothing but ends behind it, or
    text before it: the model may have thought better of that.

    Some opening marks may be missing: then they stood in the prompt. A mark inside a thought of another kind is its text.
    """
    if text.startswith("analysis"):  # gpt-oss, its special tokens dropped
        text = text.rpartition("assistantfinal")[2]
    awaited, last = "", 0
    closing = set(_OPENED_IN_PROMPT)
    for match in _THOUGHT.finditer(text):
        mark = match[0].lower()
        if awaited:
            if mark == awaited:
                closing.add(mark)  # one that comes again was quoted before
                awaited, last = "", match.end()
        elif mark in _THOUGHTS:
            if _says_something(text[last : match.start()]):
                return None
            awaited, last = _THOUGHTS[mark], match.end()
        elif mark in closing:
            last = match.end()
    thought_again = last > 0 and not _says_something(text[last:])  # a word before that is no last word
    return None if awaited or thought_again else text[last:]


def _says_something(text: str) -> bool:
    return bool(_WRAPPERS.sub(" ", text).strip(_BLANKS))


def _json_verdict(reply: str) -> str:
    """The word of {"verdict": "CORRECT"}, which may stand behind {"reasoning": "...", as behind any other thinking; "" where an
    object says more or less; what is no object, as it is."""
    if not reply.startswith("{"):
        return reply
    try:
        value = json.loads(reply, object_pairs_hook=list)
    except (ValueError, RecursionError):
        return reply
    match value:
        case [*before, (str(name), str(said))] if _NAME.fullmatch(name.replace("_", " ").strip()):
            return said if all(_is_thought(*pair) for pair in before) else ""
    return ""


def _is_thought(name: str, value: object) -> bool:
    return name.strip().lower() in _TAGS and isinstance(value, str)


def described(body: bytes) -> str:
    """What a body that is no chat completion is, in words."""
    start = body[:4000].lstrip().lower()
    if start.startswith((b"<!doctype html", b"<html")):
        title = re.search(rb"<title>(.{1,100}?)</title>", start, re.DOTALL)
        return f"a web page ({one_line(title[1].decode(errors='replace'))})" if title else "a web page"
    return "something else" if start else "nothing"


def one_line(text: str, from_end: bool = False) -> str:
    """As part of a message: without line breaks and what a terminal or a log cannot show, at most 200 characters."""
    near = text[-2000:] if from_end else text[:2000]
    flat = " ".join("".join(char if char.isprintable() else " " for char in near).split())
    if len(flat) <= 200 and len(near) == len(text):
        return flat
    return f"...{flat[-200:]}" if from_end else f"{flat[:200]}..."
