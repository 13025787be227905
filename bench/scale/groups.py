"""Groups of a stated size, made without computing: valid rollouts, and images that nobody looks at."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from metis_fast.summary import Job
from metis_fast.types import (
    Group,
    ImageBlob,
    ImageSpan,
    Message,
    Outcome,
    Prompt,
    Rollout,
    ToolCall,
    ToolName,
    Turn,
    Verdict,
)

from ..rollout.image_step import Pictures, Size

_TEXT = 128  # tokens of a prompt beside its image
_OBSERVATION = 64  # tokens of one beside its crop
_BLOCK = 32  # pixels along a token: patches of 16, merged 2 x 2
_CALL = ToolCall(ToolName.PYTHON, '{"code": "crop"}')


@dataclass(frozen=True, slots=True)
class Work:
    """What a group has. image: of its prompt, a JPEG of at least so many bytes; crop: that the first call of each rollout
    returns, another one each. tokens: of a rollout, prompt and observations included, in the mean; they differ by up to a
    quarter."""

    image: Size
    image_bytes: int
    crop: Size
    rollouts: int
    messages: int
    tokens: int


REAL = Work((2048, 1536), 1_000_000, (800, 600), 16, 5, 8000)
LIGHT = Work((256, 256), 0, (64, 64), 16, 5, 1000)


def _grid(size: Size) -> tuple[int, int, int]:
    """(t, h, w) in patches."""
    width, height = (2 * -(-side // _BLOCK) for side in size)
    return 1, height, width


def _tokens(grid: tuple[int, int, int]) -> int:
    return grid[1] * grid[2] // 4


class Script:
    """Makes the group of a job: the same one wherever it is made, and another one for every row."""

    def __init__(self, work: Work) -> None:
        self.work = work
        self._photo = Pictures(work.image, 0)(0, "JPEG").data.ljust(work.image_bytes, b"\0")
        self._crop = Pictures(work.crop, 1)(0, "JPEG").data

    def group(self, job: Job, version: int) -> tuple[Group, tuple[Verdict, ...]]:
        """With what a judge says of it: every other rollout is right. version: of the weights; half of the rollouts began with
        those before."""
        uid = f"bench:{job.row}"
        image = _another(self._photo, job.row)
        prompt = Prompt(
            uid,
            "bench",
            (Message("user", "<image>what is this"),),
            (image,),
            "perception",
            ("x",),
            "rule",
            "what is this",
        )
        indices = range(self.work.rollouts)
        rollouts = tuple(self._rollout(uid, index, image, job.order + index, version) for index in indices)
        return Group(prompt, rollouts), tuple(
            Verdict(index % 2 == 0, True, "x" if index % 2 == 0 else "y") for index in indices
        )

    def _rollout(self, uid: str, index: int, image: ImageBlob, order: int, version: int) -> Rollout:
        work, grid = self.work, _grid(self.work.image)
        crop, crop_grid = _another(self._crop, order * 1_000_003 + int(uid.rpartition(":")[2])), _grid(self.work.crop)
        prompt_len = _TEXT + _tokens(grid)
        spread = (2 * index - work.rollouts + 1) / (4 * work.rollouts)  # of lengths, around none
        size = round(work.tokens * (1 + spread))
        seen = [_tokens(crop_grid) + _OBSERVATION, *[_OBSERVATION] * (work.messages - 2), 0]
        each = (size - prompt_len - sum(seen)) // work.messages
        assert each > 0, "the images leave no tokens"
        tokens = (np.arange(prompt_len + sum(seen) + each * work.messages, dtype=np.int32) * 31 + order) % 150_000
        tokens[:prompt_len] = np.arange(prompt_len)  # of all rollouts of a prompt
        sampled, end, turns = np.zeros(len(tokens), bool), prompt_len, list[Turn]()
        for message, observed in enumerate(seen):
            start, stop = end, end + each
            sampled[start:stop] = True
            end = stop + observed
            last = message == work.messages - 1
            outcome, call = (Outcome.ANSWERED, None) if last else (Outcome.TOOL_RESULT, _CALL)
            turns.append(Turn("a message", start, stop, end, outcome, call, "" if last else "a result"))
        versions = np.where(sampled, version, -1).astype(np.int32)
        versions[turns[0].start : turns[0].stop] = max(0, version - index % 2)
        first = turns[0].stop
        spans = (
            ImageSpan(image.sha256, 0, _tokens(grid), grid),
            ImageSpan(crop.sha256, first, first + _tokens(crop_grid), crop_grid),
        )
        logp = np.where(sampled, -0.5, 0.0).astype(np.float32)
        return Rollout(
            uid, index, tokens, prompt_len, sampled, logp, versions, (image, crop), spans, tuple(turns), Outcome.ANSWERED
        )  # fmt: skip


def _another(image: bytes, number: int) -> ImageBlob:
    """The image with a number behind its end, which no decoder reads."""
    return ImageBlob.of(image + number.to_bytes(8, "big"))
