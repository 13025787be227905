"""A step of training on images: what is played, and the step itself in a process of its own, so that its memory is its own.

The model is tiny, what its images go through is not: patches of 16 pixels, blocks of 2 x 2, Qwen3-VL's limits of an image. The
tools are one that returns a crop at once; which rollouts call it, what they answer and so what they are rewarded is prescribed.
"""

from __future__ import annotations

import asyncio
import json
import resource
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from transformers import PreTrainedTokenizerBase, logging

from metis_fast.config import Config
from metis_fast.data.cursor import prompt_cursor
from metis_fast.data.parquet import PromptFiles
from metis_fast.data.writing import write_prompts
from metis_fast.model import Policy, load_policy
from metis_fast.model_folder import load_processor
from metis_fast.rollout.chat import IMAGE_MARK, Chat
from metis_fast.rollout.episode import collect
from metis_fast.rollout.native import NativeEngine
from metis_fast.score.scoring import score_groups
from metis_fast.testing.judge import FakeJudge
from metis_fast.testing.latency import Latency, SlowToolbox
from metis_fast.testing.tiny import build_tiny
from metis_fast.train.torch_backend import TorchTrainer
from metis_fast.types import Group, ImageBlob, Message, Observation, Outcome, Prompt, Rollout, ToolName

from .plan import MODEL, PlannedMessage, Shape
from .scripted import ScriptedEngine

PIXELS = 65536, 16777216
"""Least and most of an image, as Qwen3-VL's processor has them."""

_MODEL = replace(
    MODEL,
    image_px=PIXELS[0],
    text_config=MODEL.text_config | {"max_position_embeddings": 65536},
    vision_config=MODEL.vision_config | {"patch_size": 16, "num_position_embeddings": 2304},
)
_SHAPE = Shape(rollouts=16, message_tokens=(32, 64))
_RIGHT, _WRONG = "x", "y"
_QUESTION = "what is this"
_AT_ONCE = Latency(0.0, 0.0, 0.0)

Size = tuple[int, int]
"""Width and height."""


@dataclass(frozen=True, slots=True)
class Work:
    """What a step has. image: of a prompt's; crop: of what half of the rollouts look at, None: they all answer at once."""

    image: Size
    crop: Size | None
    prompts: int
    seed: int


@dataclass(frozen=True, slots=True)
class Stage:
    """Of a step. peak_bytes: most resident memory of the process up to its end."""

    name: str
    wall_s: float
    cpu_s: float
    peak_bytes: int


@dataclass(frozen=True, slots=True)
class Step:
    """wrong: what is not as planned; nothing else counts then. image_tokens: of prompts and of crops, each prompt once.
    trained_tokens: that the decoder ran in the update."""

    stages: list[Stage] = field(default_factory=list)
    rollouts: int = 0
    crops: int = 0
    prompt_tokens: int = 0
    prompt_image_tokens: int = 0
    sampled_tokens: int = 0
    crop_image_tokens: int = 0
    trained_tokens: int = 0
    wrong: list[str] = field(default_factory=list)

    @property
    def peak_bytes(self) -> int:
        """Of the whole process."""
        return self.stages[-1].peak_bytes


# -- what is played ---------------------------------------------------------------------------------------------------


class Pictures:
    """Images of one size that compress like photos: smooth colours under some noise. Each number is another one."""

    def __init__(self, size: Size, seed: int) -> None:
        random, (width, height) = np.random.default_rng(seed), size
        coarse = random.integers(0, 256, (max(2, height // 64), max(2, width // 64), 3), np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC), np.float32)
        self._photo = np.clip(smooth + random.normal(0.0, 4.0, smooth.shape), 0, 255).astype(np.uint8)

    def __call__(self, number: int, form: Literal["JPEG", "PNG"]) -> ImageBlob:
        """Encoded: the photo shifted, and the number beside it."""
        shifted, data = Image.fromarray(np.roll(self._photo, (37 * number, 53 * number), (0, 1))), BytesIO()
        if form == "JPEG":
            shifted.save(data, form, quality=90, comment=str(number))
        else:
            info = PngInfo()
            info.add_text("number", str(number))
            shifted.save(data, form, compress_level=1, pnginfo=info)
        return ImageBlob.of(data.getvalue())


def prompt_of(number: int, image: ImageBlob) -> Prompt:
    """A question about an image."""
    message = Message("user", IMAGE_MARK + _QUESTION)
    return Prompt(f"bench:{number}", "bench", (message,), (image,), "perception", (_RIGHT,), "rule", _QUESTION)


def observation_of(crop: ImageBlob) -> Observation:
    """What the tool returns."""
    return Observation(IMAGE_MARK, images=(crop,))


def _body(order: int) -> str:
    return f'{{"name": "{ToolName.PYTHON}", "arguments": {{"code": "crop {order}"}}}}'


class ImagePlan:
    """Messages of every rollout, see `scripted.Script`: every second one looks at a crop, two of four answer right, so that
    both rewards differ in every group."""

    def __init__(self, work: Work, tokenizer: PreTrainedTokenizerBase) -> None:
        self.shape = _SHAPE
        self.crops: dict[int, ImageBlob] = {}
        total = work.prompts * _SHAPE.rollouts
        if work.crop is not None:
            pictures = Pictures(work.crop, work.seed + 1)
            self.crops = {order: pictures(order, "PNG") for order in range(0, total, 2)}
        random = np.random.default_rng([work.seed, 2])

        def planned(text: str) -> PlannedMessage:
            tail = tuple(tokenizer.encode(text, add_special_tokens=False))
            least, most = _SHAPE.message_tokens
            return PlannedMessage(max(int(random.integers(least, most + 1)), len(tail) + 1), tail)

        self.messages = [
            [
                *([planned(f"<tool_call>{_body(order)}</tool_call>")] if order in self.crops else []),
                planned(f"<answer>{_RIGHT if order % 4 < 2 else _WRONG}</answer><|im_end|>"),
            ]
            for order in range(total)
        ]

    def order(self, uid: str, index: int) -> int:
        """Which of all rollouts rollout `index` of a prompt is."""
        return int(uid.rpartition(":")[2]) * _SHAPE.rollouts + index

    def observation(self, name: str, arguments: Mapping[str, object]) -> Observation:
        """What a call returns."""
        return observation_of(self.crops[int(str(arguments["code"]).rpartition(" ")[2])])


def build(folder: Path, work: Work) -> None:
    """Write the policy into folder/policy, and the rows into folder/rows.parquet."""
    logging.disable_progress_bar()  # the benchmark has one of its own
    texts = [_QUESTION, *(_body(order) for order in range(200))]
    build_tiny(folder / "policy", _MODEL, texts, work.seed)
    processor = load_processor(folder / "policy")
    assert processor is not None
    processor.size = {"shortest_edge": PIXELS[0], "longest_edge": PIXELS[1]}
    processor.save_pretrained(folder / "policy")
    pictures = Pictures(work.image, work.seed)
    write_prompts(folder / "rows.parquet", (prompt_of(i, pictures(i, "JPEG")) for i in range(work.prompts)))


# -- checks -----------------------------------------------------------------------------------------------------------


class _Counts:
    """Tokens of images as transformers' processor says."""

    def __init__(self, policy: Policy) -> None:
        processor = load_processor(policy.folder)
        assert processor is not None
        self._processor, self._pad = processor, policy.image_token_id

    def _expected(self, image: ImageBlob) -> int:
        with Image.open(BytesIO(image.data)) as opened:
            width, height = opened.size
        return self._processor.get_number_of_image_patches(height, width) // self._processor.merge_size**2

    def wrong(self, rollout: Rollout, crops: int) -> Iterator[str]:
        """What differs from a prompt with one image and `crops` crops behind it."""
        name = f"rollout {rollout.prompt_uid}#{rollout.index}"
        if rollout.outcome is not Outcome.ANSWERED:
            yield f"{name} ended in {rollout.outcome} ({rollout.error}), expected an answer"
            return
        by_hash = {image.sha256: image for image in rollout.images}
        placed = rollout.tokens == self._pad
        start = rollout.prompt_len
        before = [span for span in rollout.image_spans if span.start < start]
        behind = [span for span in rollout.image_spans if span.start >= start]
        for what, part, spans, images in (
            ("prompt", placed[:start], before, 1),
            ("response", placed[start:], behind, crops),
        ):
            expected = sum(self._expected(by_hash[span.sha256]) for span in spans)
            if len(spans) != images or part.sum() != expected:
                yield (
                    f"{name} has {len(spans)} images with {part.sum()} tokens in its {what}, expected {images} with {expected}"
                )
            for span in spans:
                if int(np.prod(span.grid)) // self._processor.merge_size**2 != self._expected(by_hash[span.sha256]):
                    yield f"{name} has a grid of {span.grid}, expected {self._expected(by_hash[span.sha256])} tokens"


def _count(step: Step, groups: Sequence[Group], policy: Policy, plan: ImagePlan) -> Step:
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    counts, pad = _Counts(policy), policy.image_token_id
    crops = [int(plan.order(one.prompt_uid, one.index) in plan.crops) for one in rollouts]
    wrong = [line for one, num in zip(rollouts, crops, strict=True) for line in counts.wrong(one, num)]
    prompts = [group.rollouts[0].tokens[: group.rollouts[0].prompt_len] for group in groups]
    return replace(
        step,
        rollouts=len(rollouts),
        crops=sum(rollout.num_tool_calls for rollout in rollouts),
        prompt_tokens=sum(map(len, prompts)),
        prompt_image_tokens=sum(int((tokens == pad).sum()) for tokens in prompts),
        sampled_tokens=sum(rollout.num_sampled for rollout in rollouts),
        crop_image_tokens=sum(int((one.tokens[one.prompt_len :] == pad).sum()) for one in rollouts),
        wrong=wrong,
    )


# -- the step ---------------------------------------------------------------------------------------------------------


def _peak_bytes() -> int:
    """Most resident memory so far. Not by getrusage where it can be helped: Linux counts the memory of the process that started
    this one as its own."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class _Clock:
    """Closes stages."""

    def __init__(self) -> None:
        self.stages: list[Stage] = []
        self.start()

    def start(self) -> None:
        """What ran before belongs to no stage."""
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def __call__(self, name: str) -> None:
        wall, cpu = time.perf_counter() - self._wall, time.process_time() - self._cpu
        self.stages.append(Stage(name, wall, cpu, _peak_bytes()))
        self.start()


def make_config(work: Work, folder: Path) -> Config:
    """A run's, but for its model, its rollouts and one update a step."""
    return Config.model_validate(
        {
            "run": {"seed": work.seed},
            "model": {"path": folder / "policy", "dtype": "float32"},
            "rollout": {"prompts_per_step": work.prompts, "rollouts_per_prompt": _SHAPE.rollouts},
            "train": {"prompts_per_mini_batch": work.prompts},
        }
    )


async def play(work: Work, folder: Path) -> Step:
    """A step of the policy and the rows in `folder` (see `build`), stage by stage as `pipeline.train` has them."""
    clock = _Clock()
    config = make_config(work, folder)
    policy = load_policy(config.model)
    chat, plan = Chat(policy.tokenizer, policy.images), ImagePlan(work, policy.tokenizer)
    files = PromptFiles([folder / "rows.parquet"])
    cursor = prompt_cursor(files, work.seed, shuffle=False, check=policy.images.broken)
    engine = ScriptedEngine(NativeEngine(policy), plan, policy.tokenizer)
    toolbox = SlowToolbox(_AT_ONCE, work.seed, plan.observation, (ToolName.PYTHON,))
    trainer = TorchTrainer(policy, config, config.train.optim, 1)
    clock("start")
    prompts = [prompt for _, prompt in await cursor.begin(work.prompts)]
    clock("draw, decode")
    groups = await collect(prompts, _SHAPE.rollouts, chat, engine, toolbox, config.rollout, work.seed, "bench")
    clock("rollouts")
    found = _count(Step(clock.stages), groups, policy, plan)
    if found.wrong:
        return found
    clock.start()
    scored = await score_groups(groups, FakeJudge(), config)
    clock("score")
    still = [group.prompt.uid for group in scored if not all(score.needs_gradient for score in group.scores)]
    if still:
        return replace(found, wrong=[f"prompts without a signal though their rewards differ: {', '.join(still)}"])
    clock.start()
    stats = trainer.update(scored)
    clock("update")
    engine.close()
    return replace(found, trained_tokens=sum(one.num_tokens for one in stats))


def main(argv: list[str]) -> None:
    """Arguments: folder, `Work` as JSON, threads."""
    folder, work, threads = argv
    torch.set_num_threads(int(threads))
    fields = json.loads(work)
    crop = fields["crop"] and tuple(fields["crop"])
    step = asyncio.run(play(Work(tuple(fields["image"]), crop, fields["prompts"], fields["seed"]), Path(folder)))
    print(json.dumps(asdict(step)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
