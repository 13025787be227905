"""The agent's text back to calls and answers (ALGORITHM section 6).

A call is a JSON object between `<tool_call>` and `</tool_call>`; tags inside its strings are text. The syntax `lenient` also
reads what can only mean one thing; nothing is ever guessed. Linear in the length of the message.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from metis_fast.config import CallSyntax
from metis_fast.types import ToolCall

_OPEN, _CLOSE = "<tool_call>", "</tool_call>"
_TAG = re.compile(r"</?tool_call>")
_BODY = re.compile(r"[ \t\r\n]*+(?P<fence>```(?:json)?[ \t\r\n]*+)?(?=\{)")  # what may stand before a call's object
_TOKEN = re.compile(
    r"""[ \t\r\n]*+(?:
    (?P<double>"(?:[^"\\]++|\\.)*+")
    | (?P<single>'(?:[^'\\]++|\\.)*+')
    | (?P<mark>[{}\[\]:,])
    | (?P<number>-?[0-9][0-9.eE+-]*+)
    | (?P<word>[A-Za-z_][A-Za-z_0-9]*+)
    )""",
    re.DOTALL | re.VERBOSE,
)
_ESCAPE = re.compile(r'\\(.)|"', re.DOTALL)
_WORDS = {"true": "true", "false": "false", "null": "null", "True": "true", "False": "false", "None": "null"}
_SYNONYMS = ("parameters", "args")
_EXAMPLE = '{"name": "python", "arguments": {"code": "..."}}'
_KEYS = frozenset({"name", "arguments", *_SYNONYMS, "id", "type"})  # of a call, as servers write them; the last two say nothing
_BLANKS = " \t\r\n"  # JSON's; Python's strip takes more
_MAX_FAILURES = 50  # unreadable calls of a message; behind them a closing tag ends a call wherever it stands


class _Twice(ValueError):
    """A name stands twice in an object: which value is meant?"""


@dataclass(frozen=True, slots=True)
class ParsedTurn:
    """One assistant message, parsed.

    call: what was asked for; None where the message calls no tool. arguments: parsed, None where the call is malformed, and
    then `error` says what is wrong with it. ends: the rollout ends with what the agent reads of that (some protocols).
    """

    call: ToolCall | None = None
    arguments: dict[str, object] | None = None
    error: str = ""
    ends: bool = False


def parse_turn(text: str, syntax: CallSyntax = "strict") -> ParsedTurn:
    """Find the tool call of an assistant message. One call a message; the last closed one counts, as sampling stops there.

    A tag that opens a call which is never closed is prose if the message has a finished answer, else a malformed call.
    """
    if _OPEN not in text:
        return ParsedTurn()
    found, unclosed = _last_call(text)
    if found is None:
        _, stop = _read_object(text, unclosed)
        if _has_answer(text[:unclosed]) or _has_answer(text[stop:]):
            return ParsedTurn()
        return _malformed("the tool call has no </tool_call>; write it behind the object")
    try:
        body = _read(found, syntax)
    except _Twice as error:
        return _malformed(str(error))
    except (ValueError, RecursionError):  # also a number of over 4300 digits, and half a surrogate pair ("\\ud800")
        return _malformed(f"the tool call is not valid JSON: {_fault(found.strip(_BLANKS))}")
    return _call(body, syntax)


def _malformed(error: str) -> ParsedTurn:
    return ParsedTurn(ToolCall("", ""), None, error)


def _has_answer(text: str) -> bool:
    return "</answer>" in text.partition("<answer>")[2]


def _last_call(text: str) -> tuple[str | None, int]:
    """What stands in the last closed call; and behind which tag a call begins that is not closed (-1: none does)."""
    found: str | None = None
    start, resume, failures = -1, 0, 0
    for tag in _TAG.finditer(text):
        if tag.start() < resume:
            continue  # in a string of a call
        if tag[0] == _CLOSE:
            if start >= 0:
                found, start = text[start : tag.start()], -1
            continue
        if start >= 0 and (_BODY.match(text, start) or not _BODY.match(text, tag.end())):
            continue  # within a call; but where the first tag is followed by prose, the one with an object begins it
        start = tag.end()
        if failures < _MAX_FAILURES:
            json_text, resume = _read_object(text, start)
            failures += json_text is None
    return found, start


def _read_object(text: str, start: int) -> tuple[str | None, int]:
    """The object behind a tag, as JSON, and where it ends: by JSON's rules, Python's for what looks like its literals, and
    those of people for commas. (None, start) if it cannot be read.

    What this returns need not be JSON yet: strings may hold control characters, and tokens stand as they came.
    """
    body = _BODY.match(text, start)
    if body is None:
        return None, start
    tokens: list[str] = []
    at, depth = body.end(), 0
    while token := _TOKEN.match(text, at):
        at = token.end()
        kind, found = token.lastgroup, token[token.lastgroup or 0]
        if kind == "word":
            found = _WORDS.get(found)
            if found is None:
                break
        elif kind == "single":
            found = '"' + _ESCAPE.sub(_requote, found[1:-1]) + '"'
        elif found in ("}", "]") and len(tokens) > 1 and tokens[-1] == "," and tokens[-2] not in ("{", "[", ","):
            tokens.pop()
        tokens.append(found)
        depth += (found in ("{", "[")) - (found in ("}", "]"))
        if not depth:
            return " ".join(tokens), at
    return None, start


def _requote(match: re.Match[str]) -> str:
    """Of a string in single quotes. `\\/` is two characters in Python and one in JSON: no longer an escape."""
    if match[1] is None:
        return '\\"'
    return {"'": "'", "/": "\\ /"}.get(match[1], match[0])


def _read(body: str, syntax: CallSyntax) -> object:
    """The call.

    Raises:
        ValueError, RecursionError: the syntax does not allow this.
    """
    pairs = _each_name_once if syntax == "lenient" else None
    try:
        tree: object = json.loads(body, object_pairs_hook=pairs)
    except _Twice:
        raise
    except (ValueError, RecursionError):
        json_text, stop = _read_object(body, 0)
        fence = _BODY.match(body)
        if syntax == "strict" or json_text is None or fence is None:
            raise
        if body[stop:].strip(_BLANKS) != ("```" if fence["fence"] else ""):
            raise
        tree = json.loads(json_text, strict=False, object_pairs_hook=pairs)
    json.dumps(tree, ensure_ascii=False).encode()
    return tree


def _each_name_once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    tree: dict[str, object] = {}
    for name, value in pairs:
        if name in tree:
            raise _Twice(f"{_shown(name)} stands twice in one object; write it once")
        tree[name] = value
    return tree


def _call(body: object, syntax: CallSyntax) -> ParsedTurn:
    if isinstance(body, list):
        return _malformed(f'the tool call is a list, but needs a "name": write one call a message, {_EXAMPLE}')
    name = body.get("name") if isinstance(body, dict) else None
    if not isinstance(body, dict) or not isinstance(name, str):
        return _malformed(f'the tool call needs a "name", a string: write {_EXAMPLE}')
    arguments: object = body.get("arguments", {})
    if "arguments" not in body and len(body) > 1:
        synonyms = [key for key in _SYNONYMS if key in body]
        if syntax == "strict" or len(synonyms) != 1:
            instead = f' instead of "{synonyms[0]}"' if synonyms else ""
            return ParsedTurn(ToolCall(name, ""), None, f'"arguments" is missing: write "arguments": {{...}}{instead}')
        arguments = body[synonyms[0]]
    if syntax == "lenient":
        places = [key for key in ("arguments", *_SYNONYMS) if key in body]
        others = [*places[1:], *(key for key in body if key not in _KEYS)]
        if others:
            error = f'{_shown(others[0])} beside "{places[0]}"; write all arguments in "arguments": {{...}}'
            return ParsedTurn(ToolCall(name, ""), None, error)
        if isinstance(arguments, str):
            arguments = _decoded(arguments)
    call = ToolCall(name, json.dumps(arguments, ensure_ascii=False))
    if isinstance(arguments, str):
        return ParsedTurn(call, None, '"arguments" must be an object, not a string: write "arguments": {...}')
    if not isinstance(arguments, dict):
        return ParsedTurn(call, None, '"arguments" must be an object: write "arguments": {...}')
    return ParsedTurn(call, arguments)


def _decoded(text: str) -> object:
    """Arguments that were written as a string of JSON; the string itself if it is none, or holds no object."""
    try:
        arguments = json.loads(text, strict=False, object_pairs_hook=_each_name_once)
        json.dumps(arguments, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return text
    return arguments if isinstance(arguments, dict) else text


# -- what is wrong with a call, and what to write instead -----------------------------------------------------------------


def _fault(body: str) -> str:
    """One short line. Its order matters: from what is sure to what is likely."""
    if not body:
        return f"it is empty; write {_EXAMPLE}"
    if body.startswith("<"):
        return f"it is XML; write {_EXAMPLE}"
    if body.startswith("```"):
        return "leave out the ``` around it"
    try:
        json.loads(body)
    except RecursionError:
        return "it is nested too deeply; write fewer brackets inside each other"
    except json.JSONDecodeError as error:
        return _fault_at(body, error.pos, error.msg)
    except ValueError:
        return "a number in it is too long; write it as a string"
    return "half of a surrogate pair in it; write the character itself"


def _shown(text: str) -> str:
    quoted = json.dumps(text[:20], ensure_ascii=False).replace("<image>", "< image >")
    return quoted.encode(errors="replace").decode()  # it may be half of a surrogate pair


def _fault_at(body: str, pos: int, message: str) -> str:
    rest = body[pos : pos + 20]
    char, before = rest[:1], body[:pos].rstrip()[-1:]
    word = re.match(r"\w*", rest)
    got = _shown(rest)
    if message.startswith("Unterminated string"):
        return f'the string {got[:-1]}... has no end; write \\" for a quote in a string, <\\/tool_call> for the tag'
    if message.startswith("Invalid control"):
        names = {"\n": ("line break", "\\n"), "\r": ("line break", "\\n"), "\t": ("tab", "\\t")}
        name, escape = names.get(char, ("control character", f"\\u{ord(char):04x}"))
        return f"a raw {name} in a string; write {escape}"
    if message.startswith("Invalid \\"):
        return f"a backslash in a string that escapes nothing ({got}); write \\\\ for a backslash"
    if char and char not in _BLANKS and (char.isspace() or not char.isprintable()):
        return f"U+{ord(char):04X} outside of a string; leave it out"
    if message.startswith("Extra data"):
        if rest.lstrip(", \t\r\n")[:1] in ("{", "["):
            return "several objects; write one call a message"
        return f"{got} after its end; leave it out"
    if not char:
        return "it ends too early; close every { with } and every [ with ]"
    if char in "“”„‟‘’‚‛«»":
        return f'{char} for a quote; write "'
    if char == "'":
        return 'single quotes; write " around names and strings'
    if (char in "}]" and before == ",") or "trailing comma" in message:
        return "a comma before } or ]; leave it out"
    if char == before == "{":
        return "{{ for a brace; write {"
    if char == "\\":
        return "a backslash outside of a string; leave it out"
    if char in "#/":
        return "a comment; leave it out"
    if word and word[0] in ("True", "False", "None"):
        return f"{word[0]}; write true, false, null"
    if before == '"' and char not in "}]":
        return f'{got} behind the end of a string; write \\" for a quote in a string, or the , or : that is missing'
    if message.startswith("Expecting property name"):
        return f'{got} for a name; write names in " quotes'
    if pos == 0:
        return f"it begins with {got}; write {_EXAMPLE}"
    return f"{got} where something else is expected; write {_EXAMPLE}"
