"""One rollout as a person reads it: pieces of text, calls, observations with images where they stand, boxes of crops."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from metis_fast.errors import DataError
from metis_fast.view.crops import Crop, find_crop
from metis_fast.view.images import Images

Json = dict[str, Any]

_TAGS = re.compile(r"<(reason|tool_call|answer)>(.*?)(?:</\1>|\Z)", re.DOTALL)
_MARK = "<image>"
_MAX_CHARS = 40_000  # of one message or observation
_MAX_SOURCES = 8  # images that a crop is looked for in
_MAX_CHECKED = 24  # images of a rollout whose source is looked for


def segments(text: str) -> list[Json]:
    """A message in pieces: kind is reason, tool_call, answer or text."""
    found: list[Json] = []

    def add(kind: str, piece: str) -> None:
        if piece.strip():
            found.append({"kind": kind, "text": _cut(piece.strip("\n"))})

    end = 0
    for match in _TAGS.finditer(text):
        add("text", text[end : match.start()])
        add(match.group(1), match.group(2))
        end = match.end()
    add("text", text[end:])
    return found


def _cut(text: str) -> str:
    if len(text) <= _MAX_CHARS:
        return text
    half = _MAX_CHARS // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters left out ...]\n{text[-half:]}"


def _call(call: Mapping[str, str] | None) -> Json | None:
    """The call with its arguments by name, or as the text that could not be parsed."""
    if call is None:
        return None
    try:
        tree = json.loads(call["arguments"] or "null")
    except (ValueError, RecursionError):
        tree = None
    named = [
        {"name": str(name), "text": _cut(value if isinstance(value, str) else json.dumps(value))}
        for name, value in (tree.items() if isinstance(tree, dict) else ())
    ]
    return {"name": call["name"] or "(malformed)", "arguments": named, "raw": "" if named else _cut(call["arguments"] or "")}


def _observation(text: str, images: Sequence[str]) -> list[Json]:
    """Pieces in order: {text} or {image}. As many marks as images: they say where; else the images stand behind the text."""
    around = text.split(_MARK)
    if len(around) - 1 != len(images):
        around = [text, *[""] * len(images)]
    pieces: list[Json] = []
    for index, piece in enumerate(around):
        if piece.strip():
            pieces.append({"text": _cut(piece.strip("\n"))})
        if index < len(images):
            pieces.append({"image": images[index]})
    return pieces


def conversation(row: Mapping[str, Any], images: Images) -> Json:
    """A row of a part, tokens left out. Boxes of crops are checked here, which decodes images."""
    spans = row["image_spans"] or ()
    prompt_images = [span["sha256"] for span in spans if span["start"] < row["prompt_len"]]
    turns, before, problems = [], list(dict.fromkeys(prompt_images)), list[str]()
    decoded: dict[str, Image.Image | None] = {}
    found: dict[tuple[str, str, tuple[str, ...]], Crop | None] = {}
    checked = 0

    def picture(sha256: str) -> Image.Image | None:
        if sha256 not in decoded:
            try:
                decoded[sha256] = images.picture(sha256)
            except DataError as error:
                decoded[sha256] = None
                problems.append(str(error))
        return decoded[sha256]

    for number, turn in enumerate(row["turns"] or ()):
        start, stop = turn["stop"], turn["observation_stop"]
        own = [span["sha256"] for span in spans if start <= span["start"] < stop]
        call = _call(turn["call"])
        code = next((one["text"] for one in call["arguments"] if one["name"] == "code"), "") if call else ""
        crops = []
        for place, sha256 in enumerate(own):
            if "crop" not in code or checked >= _MAX_CHECKED:
                break
            checked += 1
            names = before[:_MAX_SOURCES]
            shown, sources = picture(sha256), [(name, picture(name)) for name in names]
            there = [(name, source) for name, source in sources if source is not None]
            key = (code, sha256, tuple(name for name, _ in there))
            if key not in found:  # agents cut out the same box again and again
                found[key] = find_crop(code, shown, [source for _, source in there]) if shown is not None else None
            crop = found[key]
            if crop is not None:
                crops.append({"image": place, "source": there[crop.source][0], "box": crop.box, "size": crop.size})
        before += [sha256 for sha256 in own if sha256 not in before]
        pieces = segments(turn["text"] or "")
        if call and call["arguments"] and pieces and pieces[-1]["kind"] == "tool_call":
            pieces.pop()  # shown below it, with line breaks instead of JSON's \n
        turns.append(
            {
                "number": number,
                "pieces": pieces,
                "call": call,
                "outcome": turn["outcome"],
                "tool_s": turn["tool_s"],
                "start": turn["start"],
                "stop": turn["stop"],
                "observation": _observation(turn["observation"] or "", own),
                "images": own,
                "crops": crops,
            }
        )
    verdict = row["verdict"]
    return {
        "uid": row["prompt_uid"],
        "sample": row["index"],
        "question": _cut(row["question"] or ""),
        "answers": [_cut(answer) for answer in row["answers"] or ()],
        "ability": row["ability"],
        "kind": row["kind"] or "",
        "judge_style": row.get("judge_style") or "",
        "outcome": row["outcome"],
        "error": row["error"] or "",
        "score_outcome": row["score_outcome"],
        "no_verdict": row.get("no_verdict") or "",
        "verdict": None if verdict is None else {**verdict, "answer": _cut(verdict["answer"] or "")},
        "images": prompt_images,
        "turns": turns,
        "prompt_len": row["prompt_len"],
        "problems": problems,
    }
