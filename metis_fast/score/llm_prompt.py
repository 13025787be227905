"""What an LLM judge is told: the packaged prompt (prompts/judge.txt) or a user's own file. docs/llm-judge.md has its form."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from metis_fast.errors import JudgeError

Message = Mapping[str, str]

PLACES = ("question", "truth", "answer")
"""What a prompt names in braces, and has to name."""
_PLACE = re.compile(rf"\{{({'|'.join(PLACES)})\}}")
_IN_BRACES = re.compile(r"\{\w{1,40}\}")
_PARTS = re.compile(r"\A\s*\[system\][ \t]*\n(?:(.*?)\n)?\[user\][ \t]*\n(.*)\Z", re.DOTALL)


@dataclass(frozen=True, slots=True)
class JudgePrompt:
    """A system message ("": none) and a user message in which `PLACES` are filled in."""

    system: str
    user: str

    def messages(self, question: str, truth: str, answer: str) -> list[Message]:
        """The messages that ask for one verdict.

        Each place gets a JSON string, quotes included, so that an answer cannot end where it stands and go on as the prompt.
        """
        values = {"question": question, "truth": truth, "answer": answer}
        filled = _PLACE.sub(lambda place: _quoted(values[place[1]]), self.user)
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": filled}]


def _quoted(text: str) -> str:
    """A JSON string of one line; JSON itself leaves three ends of lines of Unicode as they are."""
    return re.sub("[\x85\u2028\u2029]", lambda end: f"\\u{ord(end[0]):04x}", json.dumps(text, ensure_ascii=False))


def packaged_prompt() -> str:
    """The text of the packaged prompt, which verdicts are kept under."""
    return files("metis_fast.score").joinpath("prompts/judge.txt").read_text("utf-8")


def read_prompt(path: Path | None) -> JudgePrompt:
    """The prompt in a file, or the packaged one.

    Raises:
        JudgeError: it cannot be read, or its user message lacks a place.
    """
    if path is None:
        return _parsed(packaged_prompt(), "the packaged prompt")
    name = f"score.llm.prompt={path}"
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no UTF-8"
        raise JudgeError(f"{name} cannot be read: {why}; give a text file, or leave it out for the packaged prompt") from None
    return _parsed(text, name)


def _parsed(text: str, name: str) -> JudgePrompt:
    parts = _PARTS.match(text)
    if parts is None and re.match(r"\s*\[system\]", text):
        raise JudgeError(
            f"{name} begins with [system], so a line [user] was expected behind that part, and none came; write one before the "
            "text with the places {question}, {truth} and {answer}"
        )
    system, user = (parts[1] or "", parts[2]) if parts else ("", text)
    found = set(_PLACE.findall(user))
    lacking = [f"{{{place}}}" for place in PLACES if place not in found]
    if lacking:
        others = sorted(set(_IN_BRACES.findall(user)) - {f"{{{place}}}" for place in PLACES})[:5]
        got = f"it has {', '.join(others)}" if others else "it names nothing else in braces"
        raise JudgeError(
            f"{name} lacks {' and '.join(lacking)} in its user message ({got}); name {{question}}, {{truth}} and {{answer}} "
            "where they are to stand"
        )
    return JudgePrompt(system.strip(), user.strip())
