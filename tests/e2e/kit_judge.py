"""A model that judges, for VLMEvalKit and for us alike: what it says follows from the reply in question, whoever asks.

It reads the response out of either prompt and finds the answer in it as a good judge would. To some replies it answers in a
form that has to be read with care: JSON in a fence or under another name, a sentence for a letter.
"""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Mapping
from typing import Any

from metis_fast.testing.judge import JudgeServer, Reply, by_equality, completion, packaged_task

MODEL = "kit-judge"
NOTHING = "null"
_PROMPTS: Mapping[str, tuple[str, ...]] = {  # role -> our prompt and VLMEvalKit's; the example that counts is the last one
    "option": (
        r"Somebody answered a question with several options.*\nOptions:\n(?P<options>.*)\nAnswer: (?P<reply>.*)\nLetter:",
        r".*Example 3: \nQuestion: .*\nOptions: (?P<options>.*?)\n(?:<end>\n)?Answer: (?:<start>\n)?(?P<reply>.*?)"
        r"(?:\n<end>)?\nYour output:",
    ),
    "value": (
        r"Extract the final answer from the response below, .*?\nQuestion: (?P<asked>.*)\nResponse: (?P<reply>.*)"
        r"\nExtracted answer:",
        r"Please read the following example\..*Extracted answer: B\n\n(?P<asked>.*)\nModel respone: (?P<reply>.*)"
        r"Extracted answer:",
    ),
    "extract": (
        r"Extract the final answer from the response to a problem.*?Response: (?P<reply>.*)\nExtracted answer:",
        r"I am providing you a response.*7\.\nModel response: '(?P<reply>.*)'\nExtracted Answer:",
    ),
    "compare": (
        r"Do these two answers.*\nRight answer: (?P<truth>.*)\nGiven answer: (?P<given>.*)\nSame:",
        r"Below are two answers.*\[Standard Answer\]: (?P<truth>.*)\n\s*\[Model_answer\] : (?P<given>.*)\n\s*Judgement:",
    ),
    "short": (
        r"Give the final answer of the text below, (?P<form>[^\n]*), alone in one line; .*?\n\n(?P<reply>.*)",
        r"Free-form answer: (?P<reply>.*)\nInstruction: (?P<form>[^\n]*)",
    ),
    "letters": (
        r"Which options does the answer below choose\?.*?\nAnswer: (?P<reply>.*)\nLetters:",
        r"You are a information extractor.*\nAnswer: <start>\n(?P<reply>.*)\n<end>\nYour output:",
    ),
    "grade": (r"Truth: (?P<truth>.*?)\nResponse: (?P<reply>.*)\nJSON with extract_answer and score:",),
}
_FORMS = [(role, re.compile(r"\s*" + form + r"\s*", re.DOTALL)) for role, forms in _PROMPTS.items() for form in forms]
_LISTED = re.compile(r"^\(?([A-H])[).] (.*)$", re.MULTILINE)
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def odd_one(text: str, every: int) -> int:
    """0 to `every` - 1, by a text."""
    return zlib.crc32(" ".join(text.split()).encode()) % every


def answer_in(reply: str) -> str:
    """What a reply says in the end, "null" where it says nothing."""
    text = " ".join(reply.split())
    if not text or "cannot" in text or text == "None":
        return NOTHING
    return text.rpartition(" is ")[2].removesuffix(" cm").strip(' ."=')


def _letter(said: str, options: str) -> str:
    offered = {found[1]: found[2].strip() for found in _LISTED.finditer(options)}
    if said in offered:
        return said
    return next((letter for letter, text in offered.items() if text.lower() == said.lower()), "Z")


def _value(part: Mapping[str, str]) -> str:
    said = answer_in(part["reply"])
    if "Choices:\n" not in part["asked"]:
        return said
    return _letter(said, part["asked"].rpartition("Choices:\n")[2])


def _short(part: Mapping[str, str]) -> str:
    said = answer_in(part["reply"])
    if "option" in part["form"]:
        return said if len(said) == 1 else NOTHING
    number = _NUMBER.search(said)
    return f"{float(number[0]):.3f}" if number else NOTHING


def _letters(part: Mapping[str, str]) -> str:
    found = "".join(dict.fromkeys(re.findall(r"\b[A-E]\b", answer_in(part["reply"])))) or "Z"
    return f"It chooses {found}." if odd_one(part["reply"], 8) == 0 else found


def _compare(part: Mapping[str, str]) -> str:
    if odd_one(part["given"], 8) == 0:
        return "They differ in form."
    return str(int(part["given"].strip().lower() == part["truth"].strip().lower()))


def _grade(part: Mapping[str, str]) -> str:
    said, odd = answer_in(part["reply"]), odd_one(part["reply"], 8)
    name = "extracted_answer" if odd == 1 else "extract_answer"
    text = json.dumps({name: said, "score": int(said.lower() == part["truth"].lower())})
    if odd == 2:
        return "The response is not clear."
    return f"```json\n{text}\n```" if odd == 0 else text


_SAYS: Mapping[str, Callable[[Mapping[str, str]], str]] = {
    "option": lambda part: _letter(answer_in(part["reply"]), part["options"]),
    "value": _value,
    "extract": lambda part: answer_in(part["reply"]),
    "compare": _compare,
    "short": _short,
    "letters": _letters,
    "grade": _grade,
}


def say(body: dict[str, Any]) -> Reply:
    """To a whole request."""
    content = body["messages"][-1]["content"]
    for role, form in _FORMS:
        if found := form.fullmatch(content):
            return completion(_SAYS[role](found.groupdict()))
    if content == "hello":  # VLMEvalKit's question whether anybody is there
        return completion("Hello.")
    return by_equality(packaged_task(body))


def kit_judge() -> JudgeServer:
    """The endpoint; `bodies` are what it was asked."""
    return JudgeServer(say, models=(MODEL,), read=lambda body: body)
