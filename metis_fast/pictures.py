"""Encoded images to what the vision tower takes, each step where it is needed and not before.

    size in the header -> grid, tokens         no pixels: an event loop may do it
    decoded, resized   -> Picture, uint8       in threads, once; the ones used last are kept
    patches, float     -> `metis_kernels`      on the tower's device, in its dtype

Bit for bit what transformers' Qwen2-VL image processor makes of the RGB image (`pixels`), at an eighth of its bytes.
"""

from __future__ import annotations

import asyncio
import io
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from metis_fast import pixels
from metis_fast.machine import num_cores
from metis_fast.pixels import ImageError
from metis_fast.types import ImageBlob
from metis_kernels import patchify
from metis_kernels.patchify.api import FLOATS

DEFAULT_CACHE_BYTES = 2 << 30
"""Of a preparer: 200 images of 2048 x 1536."""
_STRIPES = 64
_ROWS = 64
_MOST_THREADS = 16  # each may hold a decoded photo


@dataclass(frozen=True, slots=True, eq=False)
class Picture:
    """One image at the size that the model sees. pixels: [height, width, 3] uint8; grid: (t, h, w) in patches."""

    pixels: Tensor
    grid: tuple[int, int, int]


@dataclass(frozen=True, slots=True, eq=False)
class Patches:
    """One image as the vision tower takes it: pixels [n, channels * 2 * patch * patch] and its (t, h, w) grid."""

    pixels: Tensor
    grid: tuple[int, int, int]


class ImagePreparer:
    """The model's image processor, step by step. Safe for threads.

    processor: None for a model that reads text only, where every image is an ImageError. cache_bytes: the pictures used last
    are kept in so much memory (the very last one always).
    """

    def __init__(self, processor: Qwen2VLImageProcessorPil | None, cache_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        self._processor = processor
        self._kept: OrderedDict[str, Picture] = OrderedDict()
        self._room = cache_bytes
        self._lock = threading.Lock()
        self._making = [threading.Lock() for _ in range(_STRIPES)]  # an image that two ask for is made once
        self._threads = ThreadPoolExecutor(min(num_cores(), _MOST_THREADS), thread_name_prefix="images")
        self.merge = 1 if processor is None else int(processor.merge_size)

    # -- from the header ----------------------------------------------------------------------------------------------

    def grid(self, image: ImageBlob) -> tuple[int, int, int]:
        """(t, h, w) in patches, from the header alone.

        Raises:
            ImageError: the image cannot be used; the message says why. Damage behind the header is found by `picture`.
        """
        processor = self._need()
        height, width = self._resized(image)
        return 1, height // processor.patch_size, width // processor.patch_size

    def num_tokens(self, image: ImageBlob) -> int:
        """Placeholder tokens of an image. Raises ImageError as `grid` does."""
        t, h, w = self.grid(image)
        return t * h * w // self.merge**2

    def seen(self, image: ImageBlob) -> tuple[int, int]:
        """Width and height in which the model sees an image. Raises ImageError as `grid` does."""
        height, width = self._resized(image)
        return width, height

    def _need(self) -> Qwen2VLImageProcessorPil:
        if self._processor is None:
            raise ImageError("the model reads text only; use a Qwen3-VL")
        return self._processor

    def _resized(self, image: ImageBlob) -> tuple[int, int]:
        """Height and width of an image as the model sees it."""
        processor = self._need()
        try:
            width, height = pixels.size(image.data)
        except ImageError as error:
            raise ImageError(f"image cannot be decoded: {error}") from None
        factor = processor.patch_size * processor.merge_size
        if not processor.do_resize:
            if height % factor or width % factor:
                raise ImageError(
                    f"image of {width} x {height} pixels: the processor does not resize, and takes multiples of {factor}"
                )
            return height, width
        try:
            return smart_resize(height, width, factor, processor.size["shortest_edge"], processor.size["longest_edge"])
        except ValueError as error:  # aspect ratio above 200
            raise ImageError(f"image cannot be resized: {error}") from None

    # -- pixels -------------------------------------------------------------------------------------------------------

    def picture(self, image: ImageBlob) -> Picture:
        """The image decoded and resized; it is kept for a while.

        Raises:
            ImageError: the image cannot be used; the message says why.
        """
        kept = self._find(image)
        if kept is not None:
            return kept
        with self._making[int(image.sha256[:8], 16) % _STRIPES]:
            kept = self._find(image)
            if kept is None:
                kept = self._make(image)
                self._keep(image, kept)
        return kept

    def pictures(self, images: Sequence[ImageBlob]) -> list[Picture]:
        """Of several images, made side by side. Raises ImageError as `picture` does."""
        new = {image.sha256: image for image in images if self._find(image) is None}
        made = dict(zip(new, self._threads.map(self.picture, new.values()), strict=True)) if len(new) > 1 else {}
        return [made.get(image.sha256) or self.picture(image) for image in images]

    def broken(self, images: Iterable[ImageBlob]) -> dict[str, str]:
        """What is wrong with those that cannot be used, by SHA-256. The others are prepared, side by side, and kept."""
        distinct = list({image.sha256: image for image in images}.values())
        problems = self._threads.map(self._problem, distinct) if len(distinct) > 1 else map(self._problem, distinct)
        return {image.sha256: problem for image, problem in zip(distinct, problems, strict=True) if problem}

    async def ready(self, images: Iterable[ImageBlob]) -> dict[str, str]:
        """As `broken`, without holding up the event loop."""
        distinct = [image for image in {image.sha256: image for image in images}.values() if self._find(image) is None]
        loop = asyncio.get_running_loop()
        problems = await asyncio.gather(*(loop.run_in_executor(self._threads, self._problem, image) for image in distinct))
        return {image.sha256: problem for image, problem in zip(distinct, problems, strict=True) if problem}

    async def scaled(self, images: Sequence[ImageBlob], most: int) -> tuple[ImageBlob, ...]:
        """Images that have at most so many tokens together. The largest are scaled down, to equal numbers, in threads.

        As they are come all of them where they fit, or where no size that the model takes would; and any that is damaged.
        """
        sizes = [self._tokens_or_none(image) for image in images]
        left, shares = most, dict[int, int]()
        for place, i in enumerate(sorted(range(len(images)), key=lambda i: sizes[i])):
            shares[i] = min(sizes[i], left // (len(images) - place))
            left -= shares[i]
        large = [i for i, size in enumerate(sizes) if size > shares[i] >= 2 * self._fewest_tokens]
        loop, out = asyncio.get_running_loop(), list(images)
        small = await asyncio.gather(*(loop.run_in_executor(self._threads, self._scaled, images[i], shares[i]) for i in large))
        for i, image in zip(large, small, strict=True):
            out[i] = image
        return tuple(out)

    @property
    def _fewest_tokens(self) -> int:
        if (processor := self._processor) is None:
            return 1
        return max(1, processor.size["shortest_edge"] // (processor.patch_size * processor.merge_size) ** 2)

    def _tokens_or_none(self, image: ImageBlob) -> int:
        try:
            return self.num_tokens(image)
        except ImageError:
            return 0

    def _scaled(self, image: ImageBlob, most: int) -> ImageBlob:
        """The image with at most so many tokens, as a PNG; itself where it is damaged."""
        height, width = self._resized(image)
        processor = self._need()
        factor = processor.patch_size * processor.merge_size
        shrink = math.sqrt(height * width / (most * factor**2)) * factor
        size = max(factor, int(width / shrink) * factor), max(factor, int(height / shrink) * factor)
        try:
            small = pixels.decode(image.data).resize(size, Image.Resampling(processor.resample))
        except ImageError:
            return image
        out = io.BytesIO()
        small.save(out, "PNG", compress_level=1)
        return ImageBlob.of(out.getvalue())

    def _problem(self, image: ImageBlob) -> str:
        try:
            self.picture(image)
        except ImageError as error:
            return str(error)
        return ""

    def _find(self, image: ImageBlob) -> Picture | None:
        with self._lock:
            kept = self._kept.get(image.sha256)
            if kept is not None:
                self._kept.move_to_end(image.sha256)
            return kept

    def _keep(self, image: ImageBlob, picture: Picture) -> None:
        with self._lock:
            self._kept[image.sha256] = picture
            self._room -= picture.pixels.nbytes
            while self._room < 0 and len(self._kept) > 1:
                self._room += self._kept.popitem(last=False)[1].pixels.nbytes

    def _make(self, image: ImageBlob) -> Picture:
        grid = self.grid(image)
        processor = self._need()
        try:
            rgb = pixels.decode(image.data)
        except ImageError as error:
            raise ImageError(f"image cannot be decoded: {error}") from None
        size = (grid[2] * processor.patch_size, grid[1] * processor.patch_size)
        if rgb.size != size:
            rgb = rgb.resize(size, Image.Resampling(processor.resample))
        return Picture(torch.from_numpy(_array(rgb)), grid)

    # -- patches ------------------------------------------------------------------------------------------------------

    def patches(self, pictures: Sequence[Picture], device: torch.device, dtype: torch.dtype) -> Tensor:
        """[n, channels * 2 * patch * patch] of pictures one after the other, on a device, as the tower takes them."""
        processor = self._need()
        wide = dtype if dtype in FLOATS else torch.float32
        return torch.cat([
            patchify(
                picture.pixels.to(device, non_blocking=True),
                patch=processor.patch_size,
                temporal=processor.temporal_patch_size,
                merge=processor.merge_size,
                mean=tuple(processor.image_mean) if processor.do_normalize else (0.0, 0.0, 0.0),
                std=tuple(processor.image_std) if processor.do_normalize else (1.0, 1.0, 1.0),
                rescale=processor.rescale_factor if processor.do_rescale else 1.0,
                dtype=wide,
            )
            for picture in pictures
        ]).to(dtype)  # fmt: skip

    def __call__(self, image: ImageBlob) -> Patches:
        """One image in float32 on the CPU, as transformers' processor gives it. Raises ImageError as `picture` does."""
        picture = self.picture(image)
        return Patches(self.patches([picture], torch.device("cpu"), torch.float32), picture.grid)


def _array(rgb: Image.Image) -> np.ndarray:
    """[height, width, 3] uint8, some rows at a time: Pillow copies under the interpreter's lock, for 9 ms where an image has
    3840 x 2160 pixels. In between other threads get it, and the event loop is among them."""
    out = np.empty((rgb.height, rgb.width, 3), np.uint8)
    for top in range(0, rgb.height, _ROWS):
        bottom = min(top + _ROWS, rgb.height)
        out[top:bottom] = np.asarray(rgb.crop((0, top, rgb.width, bottom)))
        time.sleep(0)
    return out
