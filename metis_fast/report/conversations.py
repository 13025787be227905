"""A sample of what the agent said and did, from the stored rollouts, ready to be shown."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from metis_fast import pixels
from metis_fast.errors import DataError, one_line
from metis_fast.pixels import ImageError
from metis_fast.rollout.store import StoredRollout, read_rollouts
from metis_fast.types import ImageBlob, ImageSpan, Score, Turn

_THUMBNAIL_PX = 320  # longest side; about 15 KB as JPEG, so a report of 40 conversations stays a few MB
_MAX_CHARS = 6000  # of one message or observation


@dataclass(frozen=True, slots=True)
class Thumbnail:
    """uri: a `data:` address, "" where the bytes are no image that can be decoded. width: CSS pixels."""

    uri: str
    width: int


@dataclass(frozen=True, slots=True)
class Step:
    """One turn. arguments: of the call, by name; call: None without one; observation: None where nothing came back."""

    text: str
    call: str | None
    arguments: tuple[tuple[str, str], ...]
    outcome: str
    tool_s: float
    observation: str | None
    images: tuple[Thumbnail, ...]


@dataclass(frozen=True, slots=True)
class Conversation:
    """One rollout as the report shows it. All text is the model's or the data's: to be escaped."""

    step: int
    label: str
    uid: str
    question: str
    answers: tuple[str, ...]
    images: tuple[Thumbnail, ...]
    steps: tuple[Step, ...]
    outcome: str
    error: str
    num_tool_calls: int
    num_sampled: int
    score: Score


def _cut(text: str) -> str:
    if len(text) <= _MAX_CHARS:
        return text
    half = _MAX_CHARS // 2
    return f"{text[:half]}\n[... {len(text) - 2 * half} characters left out ...]\n{text[-half:]}"


def _thumbnail(blob: ImageBlob) -> Thumbnail:
    """Encoded afresh, so that nothing but pixels gets into the page."""
    try:
        image = pixels.decode(blob.data)
    except ImageError:
        return Thumbnail("", 0)
    width = min(max(image.width, 160), _THUMBNAIL_PX)  # a tiny image is shown larger than it is
    image.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=82)
    return Thumbnail(f"data:image/jpeg;base64,{base64.b64encode(out.getvalue()).decode()}", width)


def _arguments(text: str) -> tuple[tuple[str, str], ...] | None:
    """The arguments by name, or None where the text is no JSON object."""
    try:
        tree = json.loads(text)
    except ValueError:
        return None
    if not isinstance(tree, dict):
        return None
    return tuple((name, value if isinstance(value, str) else json.dumps(value)) for name, value in tree.items())


def _step(turn: Turn, images: tuple[Thumbnail, ...]) -> Step:
    text, arguments = turn.text, None
    if turn.call is not None:
        arguments = _arguments(turn.call.arguments)
        if arguments is not None:  # shown below the text, with line breaks instead of JSON's \n
            text = text.rpartition("<tool_call>")[0]
    return Step(
        text=_cut(text.strip()),
        call=None if turn.call is None else turn.call.name or "(malformed)",
        arguments=tuple((name, _cut(value)) for name, value in arguments or ()),
        outcome=turn.outcome.value,
        tool_s=turn.tool_s,
        observation=_cut(turn.observation) if turn.observation or images else None,
        images=images,
    )


def _conversation(step: int, stored: StoredRollout) -> Conversation:
    rollout, score = stored.rollout, stored.score
    blobs = {image.sha256: image for image in rollout.images}

    def between(start: int, stop: int) -> tuple[Thumbnail, ...]:
        spans: Iterable[ImageSpan] = (span for span in rollout.image_spans if start <= span.start < stop)
        return tuple(_thumbnail(blobs[span.sha256]) for span in spans)

    verdict = "no verdict" if score.verdict is None else "correct" if score.verdict.correct else "wrong"
    return Conversation(
        step=step,
        label=" · ".join(part for part in (stored.ability, stored.kind, verdict) if part),
        uid=f"{rollout.prompt_uid} #{rollout.index}",
        question=_cut(stored.question),
        answers=stored.answers,
        images=between(0, rollout.prompt_len),
        steps=tuple(_step(turn, between(turn.stop, turn.observation_stop)) for turn in rollout.turns),
        outcome=rollout.outcome.value,
        error=rollout.error,
        num_tool_calls=rollout.num_tool_calls,
        num_sampled=rollout.num_sampled,
        score=score,
    )


def _parts_by_step(folder: Path) -> dict[int, list[Path]]:
    """A step has a part of every node: step-000012.parquet, or step-000012.node-0.parquet and so on."""
    found: dict[int, list[Path]] = {}
    for path in sorted(folder.glob("step-*.parquet")):
        number, _, node = path.stem.removeprefix("step-").partition(".")
        if number.isdecimal() and (not node or node.startswith("node-")):
            found.setdefault(int(number), []).append(path)
    return found


def _readable(part: Path, say: Callable[[str], None]) -> Iterator[StoredRollout]:
    """The rollouts of a part, up to what cannot be read."""
    try:
        yield from read_rollouts(part)
    except DataError as error:
        say(one_line(error))


def _in_turn(parts: Sequence[Path], say: Callable[[str], None]) -> Iterator[StoredRollout]:
    """Rollouts of all parts, one of each after the other, so that every node is seen."""
    for some in zip_longest(*(_readable(part, say) for part in parts)):
        yield from (stored for stored in some if stored is not None)


def sample_conversations(
    folder: Path, last_step: int | None, say: Callable[[str], None] = lambda note: None
) -> list[Conversation]:
    """Rollouts of the first, the middle and the last stored step.

    Of each step one rollout of every kind (of every ability, where the data has no kinds), right and wrong, with and without
    a tool call; and one without a verdict.

    last_step: parts of later steps are ignored (an interrupted run may have left them); None: all count. say: called with a
    line for each part that cannot be read.
    """
    parts = {step: own for step, own in _parts_by_step(folder).items() if last_step is None or step <= last_step}
    steps: Sequence[int] = sorted(parts)
    if not steps:
        return []
    conversations = []
    for step in sorted({steps[0], steps[len(steps) // 2], steps[-1]}):
        found: dict[tuple[str, bool, bool] | None, dict[str, StoredRollout]] = {}
        for stored in _in_turn(parts[step], say):
            verdict = stored.score.verdict
            kind = stored.kind or stored.ability
            key = None if verdict is None else (kind, not verdict.correct, stored.rollout.num_tool_calls > 0)
            found.setdefault(key, {}).setdefault(stored.ability, stored)
        order = sorted(key for key in found if key is not None) + ([None] if None in found else [])
        for position, key in enumerate(order):
            candidates = list(found[key].values())
            conversations.append(_conversation(step, candidates[position % len(candidates)]))  # abilities in turn
    return conversations
