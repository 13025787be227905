"""What images cost: how long the event loop stands still for one, its CPU time in threads, its memory, and a step's.

The peer is transformers' own processor as a loop without threads would call it: decoding, then `pixel_values` in float32.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import gc
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from metis_fast import pixels
from metis_fast.model_folder import load_processor, load_tokenizer
from metis_fast.pictures import ImagePreparer
from metis_fast.pixels import ImageError
from metis_fast.rollout.chat import Chat
from metis_fast.types import ImageBlob

from ..candidate import BenchError
from ..machine import Machine, describe
from .columns import aligned
from .image_step import Pictures, Size, Stage, Step, Work, build, observation_of, prompt_of

MIN_RUNS = 5
_RUNS, _THREADS, _PROMPTS = 20, 2, 4
_MAX_OBSERVATION = 8192
_FAR = 1 << 20
"""Numbers of images that no step has."""
_MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Request:
    """Options, checked."""

    work: Work
    runs: int
    threads: int


@dataclass(frozen=True, slots=True)
class LoopRow:
    """How long the loop answers nobody. what: prompt: encoding it. pixels: a prompt's image on its way to the engine.
    observation: with a crop, from the tool's answer to tokens. impl: ours or transformers. cpu_ms: median of the CPU time that
    the loop's thread had in it; the rest was other threads', or other work's on the machine."""

    what: str
    impl: str
    median_ms: float
    most_ms: float
    cpu_ms: float


@dataclass(frozen=True, slots=True)
class ThreadRow:
    """CPU time of an image in one thread, medians, and images a second with all threads (decoded and resized). resize: to the
    model's size and into a tensor; where the size fits, into a tensor only."""

    what: str
    pixels: Size
    tokens: int
    encoded_mib: float
    decode_ms: float
    resize_ms: float
    patchify_ms: float
    images_per_s: float


@dataclass(frozen=True, slots=True)
class MemoryRow:
    """What is kept of an image, and what its patches in float32 would take."""

    what: str
    kept_mib: float
    patches_mib: float


@dataclass(frozen=True, slots=True)
class Result:
    """What the benchmark found."""

    loop: list[LoopRow]
    threads: list[ThreadRow]
    memory: list[MemoryRow]
    step: Step


# -- options ----------------------------------------------------------------------------------------------------------


def _size(option: str, text: str) -> Size:
    found = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", text)
    if found is None:
        raise BenchError(f"{option}: expected width and height in pixels, as 2048x1536, got {text!r}")
    return int(found[1]), int(found[2])


def request(args: argparse.Namespace) -> Request:
    """The options of the command line.

    Raises:
        BenchError: one of them is not as stated.
    """
    image = _size("--image", args.image)
    crop = None if args.crop is None else _size("--crop", args.crop)
    runs = _RUNS if args.runs is None else args.runs
    threads = _THREADS if args.threads is None else args.threads
    prompts = _PROMPTS if args.prompts is None else args.prompts
    for option, number, least in (("--runs", runs, MIN_RUNS), ("--threads", threads, 1), ("--prompts", prompts, 1)):
        if number < least:
            raise BenchError(f"{option}: expected {least} or more, got {number}")
    for option, value, allowed in (
        ("--shape", args.shape, ("",)),
        ("--peers", args.peers, (None,)),
        ("--live-fraction", args.live_fraction, (1.0,)),
        ("--engine", args.engine, (None, "native")),
        ("--dtype", args.dtype, (None, "fp32")),
        ("--device", args.device, ("auto", "cpu")),
    ):
        if value not in allowed:
            raise BenchError(f"{option}: rollout --image takes none but its default, got {value!r}; leave it out")
    return Request(Work(image, crop, prompts, args.seed), runs, threads)


# -- measures ---------------------------------------------------------------------------------------------------------


class Bench:
    """The image processor of a model folder, ours and transformers', over images of the sizes asked for."""

    def __init__(self, folder: Path, wanted: Request) -> None:
        processor = load_processor(folder)
        assert processor is not None
        self._processor = processor
        self._tokenizer = load_tokenizer(folder)
        self.wanted = wanted
        work, numbers = wanted.work, range(_FAR, _FAR + wanted.runs)
        photos = Pictures(work.image, work.seed)
        self.blobs: dict[str, list[ImageBlob]] = {"image": [photos(number, "JPEG") for number in numbers]}
        if work.crop is not None:
            photos = Pictures(work.crop, work.seed + 1)
            self.blobs["crop"] = [photos(number, "PNG") for number in numbers]

    def check(self) -> None:
        """Whether patches are, bit for bit, transformers'.

        Raises:
            BenchError: they are not, or there are none of such an image.
        """
        for what, blobs in self.blobs.items():
            try:
                ours = ImagePreparer(self._processor)(blobs[0])
            except ImageError as error:
                raise BenchError(f"--{what}: {error}") from None
            theirs = self._processor([pixels.decode(blobs[0].data)], return_tensors="pt")
            grid = tuple(theirs["image_grid_thw"][0].tolist())
            if ours.grid != grid or not torch.equal(ours.pixels, theirs["pixel_values"]):
                raise BenchError(
                    f"--{what}: the patches (grid {ours.grid}) are not those of transformers (grid {grid}); nothing was timed"
                )

    def _theirs(self, image: ImageBlob) -> torch.Tensor:
        with Image.open(BytesIO(image.data)) as picture:
            return self._processor([picture.convert("RGB")], return_tensors="pt")["pixel_values"]

    async def loop(self) -> list[LoopRow]:
        """Ours and the peer's by turns."""
        preparer = ImagePreparer(self._processor)
        chat = Chat(self._tokenizer, preparer)

        async def prompt(image: ImageBlob) -> object:
            return chat.encode_prompt(prompt_of(0, image))

        async def peer(image: ImageBlob) -> object:
            return self._theirs(image)

        async def observation(crop: ImageBlob) -> object:  # as an episode has it
            seen = await chat.fit(observation_of(crop), _MAX_OBSERVATION)
            unusable = await chat.unusable(seen.images)
            return chat.encode_observation(seen, chat.im_end, _MAX_OBSERVATION, unusable)

        async def picture(image: ImageBlob) -> object:
            return await preparer.ready([image])

        plays: list[tuple[str, str, str, Callable[[ImageBlob], Awaitable[object]]]] = [
            ("prompt", "ours", "image", prompt),
            ("pixels", "ours", "image", picture),
            ("prompt", "transformers", "image", peer),
            ("observation", "ours", "crop", observation),
            ("observation", "transformers", "crop", peer),
        ]
        plays = [play for play in plays if play[2] in self.blobs]
        held: list[list[Held]] = [[] for _ in plays]
        for number in range(self.wanted.runs):
            for found, (_, _, what, play) in zip(held, plays, strict=True):
                found.append(await held_by(play, self.blobs[what][number]))
        return [
            LoopRow(
                what,
                impl,
                1e3 * statistics.median(one.wall_s for one in found),
                1e3 * max(one.wall_s for one in found),
                1e3 * statistics.median(one.cpu_s for one in found),
            )
            for found, (what, impl, _, _) in zip(held, plays, strict=True)
        ]

    def in_threads(self) -> list[ThreadRow]:
        """One row for images, one for crops."""
        return [self._thread_row(what, blobs) for what, blobs in self.blobs.items()]

    def _thread_row(self, what: str, blobs: Sequence[ImageBlob]) -> ThreadRow:
        preparer, resample = ImagePreparer(self._processor), Image.Resampling(self._processor.resample)
        _, rows, columns = preparer.grid(blobs[0])
        size = columns * self._processor.patch_size, rows * self._processor.patch_size
        spent: dict[str, list[float]] = {"decode": [], "resize": [], "patchify": []}
        with _one_thread():
            for blob in blobs:
                since = time.thread_time()
                rgb = pixels.decode(blob.data)
                spent["decode"].append(time.thread_time() - since)
                since = time.thread_time()
                torch.from_numpy(np.array(rgb if rgb.size == size else rgb.resize(size, resample)))
                spent["resize"].append(time.thread_time() - since)
                picture = preparer.picture(blob)
                since = time.thread_time()
                preparer.patches([picture], torch.device("cpu"), torch.float32)
                spent["patchify"].append(time.thread_time() - since)
        fresh, since = ImagePreparer(self._processor), time.perf_counter()
        problems = fresh.broken(blobs)
        rate = len(blobs) / (time.perf_counter() - since)
        if problems:
            raise BenchError(f"--{what}: {next(iter(problems.values()))}")
        return ThreadRow(
            what,
            size,
            preparer.num_tokens(blobs[0]),
            statistics.median(len(blob.data) for blob in blobs) / _MIB,
            *(1e3 * statistics.median(seconds) for seconds in spent.values()),
            images_per_s=rate,
        )

    def memory(self) -> list[MemoryRow]:
        """One row for images, one for crops."""
        preparer = ImagePreparer(self._processor)
        return [
            MemoryRow(what, preparer.picture(blobs[0]).pixels.nbytes / _MIB, self._theirs(blobs[0]).nbytes / _MIB)
            for what, blobs in self.blobs.items()
        ]


@dataclass(frozen=True, slots=True, order=True)
class Held:
    """A time in which a loop ran one thing. cpu_s: that its thread had."""

    wall_s: float
    cpu_s: float


async def held_by(work: Callable[[ImageBlob], Awaitable[object]], image: ImageBlob) -> Held:
    """The longest time for which a task that never waits was not run while `work` was, with an image."""
    longest, last = Held(0.0, 0.0), Held(time.perf_counter(), time.thread_time())

    async def beat() -> None:
        nonlocal longest, last
        while True:
            await asyncio.sleep(0)
            now = Held(time.perf_counter(), time.thread_time())
            longest, last = max(longest, Held(now.wall_s - last.wall_s, now.cpu_s - last.cpu_s)), now

    heart = asyncio.create_task(beat())
    await asyncio.sleep(0)
    last = Held(time.perf_counter(), time.thread_time())
    await work(image)
    await asyncio.sleep(0)  # the beat that sees the end of it
    await asyncio.sleep(0)
    heart.cancel()
    return longest


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _ask(folder: Path, wanted: Request) -> Step:
    work = json.dumps(dataclasses.asdict(wanted.work))
    done = subprocess.run(
        [sys.executable, "-m", f"{__package__}.image_step", str(folder), work, str(wanted.threads)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": str(wanted.threads), "TQDM_DISABLE": "1"},
        check=False,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise BenchError(f"the process of the step ended with code {done.returncode}: {last}")
    fields = json.loads(done.stdout)
    return Step(**fields | {"stages": [Stage(**stage) for stage in fields["stages"]]})


def step(folder: Path, wanted: Request) -> Step:
    """A step in a process of its own.

    Raises:
        BenchError: it died, or did not play what it should.
    """
    found = _ask(folder, wanted)
    if found.wrong:
        raise BenchError(f"no figures are shown, {len(found.wrong)} rollouts or prompts are wrong: {found.wrong[0]}")
    return found


def measure(wanted: Request, progress: Callable[[str], object]) -> Result:
    """All of it. progress: called with what comes next, `NUM_JOBS` times.

    Raises:
        BenchError: patches or tokens are not what they should be, or the step's process died.
    """
    with tempfile.TemporaryDirectory(prefix="metis-bench-") as scratch:
        folder = Path(scratch)
        progress("model and images")
        build(folder, wanted.work)
        bench = Bench(folder / "policy", wanted)
        bench.check()
        gc.collect()
        progress("event loop")
        loop = asyncio.run(bench.loop())
        progress("threads")
        threads, memory = bench.in_threads(), bench.memory()
        progress("a step")
        return Result(loop, threads, memory, step(folder, wanted))


NUM_JOBS = 4

# -- output -----------------------------------------------------------------------------------------------------------

NOTES = (
    "holds the loop: the longest time for which another task was not run, median and most; CPU: that its thread had in it. "
    "prompt: encoding it; transformers: decoding and its image processor, on the loop. pixels: a prompt's image decoded for "
    "the engine. observation: with a crop, from the tool's answer to tokens.",
    "in threads: CPU of one, medians; resize: to the model's size (where the file has another) and into a tensor. images/s: "
    "decoded and resized by all threads. Every patch is, bit for bit, transformers'.",
    "peak: most resident memory of the step's process up to the end of the stage; start: imports, model, encoded crops.",
)


def to_json(result: Result, wanted: Request, machine: Machine) -> dict[str, Any]:
    """machine, work, runs, loop, threads, memory, step."""
    found = dataclasses.asdict(result)
    found["step"] = {name: value for name, value in found["step"].items() if name != "wrong"}
    found["step"]["peak_bytes"] = result.step.peak_bytes
    return {
        "machine": dataclasses.asdict(machine),
        "work": dataclasses.asdict(wanted.work),
        "runs": wanted.runs,
        **found,
    }


def to_text(result: Result, wanted: Request, machine: Machine) -> str:
    """Tables for a terminal."""
    work, step = wanted.work, result.step
    crop = "" if work.crop is None else f", crops of {work.crop[0]} x {work.crop[1]}"
    head = f"rollout: images of {work.image[0]} x {work.image[1]}{crop}; {wanted.runs} runs"
    place = f"{machine.cpu}, {machine.cores} cores, {' '.join(machine.isa)}, {wanted.threads} threads, torch {machine.torch}"
    loop = [("holds the loop", "impl", "ms", "most ms", "CPU ms")]
    loop += [(row.what, row.impl, *(f"{ms:.2f}" for ms in (row.median_ms, row.most_ms, row.cpu_ms))) for row in result.loop]
    kept = {row.what: row for row in result.memory}
    names = ("pixels", "tokens", "encoded MiB", "decode CPU ms", "resize", "patchify", "images/s", "kept MiB", "float32 MiB")
    threads = [("in threads", *names)]
    threads += [
        (
            row.what,
            f"{row.pixels[0]} x {row.pixels[1]}",
            str(row.tokens),
            f"{row.encoded_mib:.2f}",
            *(f"{ms:.1f}" for ms in (row.decode_ms, row.resize_ms, row.patchify_ms)),
            f"{row.images_per_s:.1f}",
            f"{kept[row.what].kept_mib:.1f}",
            f"{kept[row.what].patches_mib:.1f}",
        )
        for row in result.threads
    ]
    stages = [("a step", "wall s", "CPU s", "peak MiB")]
    stages += [(one.name, f"{one.wall_s:.2f}", f"{one.cpu_s:.2f}", f"{one.peak_bytes / _MIB:.0f}") for one in step.stages]
    tokens = (
        f"{work.prompts} prompts, {step.rollouts} rollouts, {step.crops} crops; tokens: prompts {step.prompt_tokens:,} "
        f"({step.prompt_image_tokens:,} of images), sampled {step.sampled_tokens:,}, of crops {step.crop_image_tokens:,}, "
        f"through the decoder in the update {step.trained_tokens:,}"
    )
    blocks = [[head, place], aligned(loop), aligned(threads), [*aligned(stages), tokens], NOTES]
    return "\n\n".join("\n".join(block) for block in blocks)


def run(args: argparse.Namespace) -> int:
    """Prints tables or the JSON object; returns the exit code.

    Raises:
        BenchError: an option is not as stated, or a result is wrong.
    """
    wanted = request(args)
    torch.set_num_threads(wanted.threads)
    with tqdm(total=NUM_JOBS, desc="bench rollout", unit="job", file=sys.stderr, disable=None, leave=False) as bar:

        def progress(what: str) -> None:
            bar.update()
            bar.set_postfix_str(what)

        result = measure(wanted, progress)
    machine = describe(torch.device("cpu"))
    print(json.dumps(to_json(result, wanted, machine)) if args.json else to_text(result, wanted, machine))
    return 0
