"""Messages and observations to token ids, and tokens back to text (ALGORITHM section 6).

Token in, token out: what the engine sampled is never re-encoded; only prompts and observations are encoded, once, here. Text
from outside can never spell a control token or an image placeholder, and in an observation no tag either (`<tool_call>` and its
like). In a prompt a tag is the token that it is to the published checkpoints, whose system message shows calls. That runs
nothing: only what was sampled ends a message, and is read as a call.
"""

from __future__ import annotations

import asyncio
import copy
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from PIL import Image
from transformers import PreTrainedTokenizerBase

from metis_fast import pixels
from metis_fast.config import ToolsConfig
from metis_fast.errors import DataError
from metis_fast.model_folder import IMAGE_PAD, VISION_END, VISION_START
from metis_fast.pictures import ImagePreparer
from metis_fast.pixels import ImageError
from metis_fast.rollout.offer import Offer
from metis_fast.rollout.outside import encode_outside
from metis_fast.rollout.protocols import Block, Compact, Dialect
from metis_fast.types import ImageBlob, ImageSpan, Observation, Prompt

IMAGE_MARK = "<image>"
_LONGEST_SHAPE = 200  # times as long as wide, at most, may be what the model's processor takes


@dataclass(slots=True)
class TokenPiece:
    """Some token ids, and where images stand in them (spans count from the start of `tokens`).

    text: of an observation what the agent reads of it, without the template around it; `<image>` marks images.
    """

    tokens: list[int] = field(default_factory=list)
    images: list[ImageBlob] = field(default_factory=list)
    spans: list[ImageSpan] = field(default_factory=list)
    text: str = ""


class Chat:
    """The Qwen chat format over one tokenizer and image processor.

    dialect: how tools are spoken with in it (`rollout.protocol`). offer: which tools a prompt tells of and a rollout has.
    stop_ids, stop: what ends a message, see `Sampling`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        images: ImagePreparer,
        dialect: Dialect | None = None,
        offer: Offer | None = None,
    ) -> None:
        """dialect: None is `compact`. offer: None is all, and prompts as they are."""
        self.offer = offer if offer is not None else Offer(ToolsConfig(), ())
        self._tokenizer = tokenizer
        self._images = images
        self.dialect: Dialect = dialect if dialect is not None else Compact()
        vocab = tokenizer.get_vocab()
        ids = {token: vocab[token] for token in _CONTROL if token in vocab}  # a text-only model may have none for images
        self._ids = ids
        fixed = ("\n", self.dialect.opening, self.dialect.closing, "assistant\n", self.dialect.cut_mark)
        self._fixed = {text: self._ask_tokenizer(text) for text in fixed if text}
        self.im_end = ids["<|im_end|>"]
        self._ends = tuple(ids[token] for token in self.dialect.end_tokens if token in ids)
        self.stop_ids = (ids["</tool_call>"], *self._ends)
        self.stop = self.dialect.stop

    def by_row(self) -> Chat:
        """See `Offer.by_row`."""
        chat = copy.copy(self)
        chat.offer = self.offer.by_row()
        return chat

    async def unusable(self, images: Sequence[ImageBlob]) -> dict[str, str]:
        """What is wrong with images that are damaged behind their header, by SHA-256; the others are prepared, in threads."""
        return await self._images.ready(images)

    async def fit(self, observation: Observation, max_tokens: int) -> Observation:
        """An observation whose images have a shape and a size that can be shown, as far as the protocol asks for that.

        Where they share the room: images that would not fit into `max_tokens` beside the text are scaled down until they do.
        """
        images = observation.images
        if not images:
            return observation
        if self.dialect.squeezes:
            images = await asyncio.gather(*(_squeezed(image) for image in images))
        if self.dialect.shares_room:
            text = sum(len(self._outside(part)) for part in observation.text.split(IMAGE_MARK))
            images = await self._images.scaled(images, max_tokens - text - 2 * len(images))
        else:
            alone = await asyncio.gather(*(self._images.scaled([image], max_tokens - 2) for image in images))
            images = tuple(image for (image,) in alone)
        return replace(observation, images=tuple(images))

    def seen(self, images: Sequence[ImageBlob]) -> tuple[tuple[int, int], ...]:
        """(width, height) in which the model sees images of a prompt that was encoded."""
        return tuple(self._images.seen(image) for image in images)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of sampled tokens, control tokens left in."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def message_text(self, tokens: Sequence[int]) -> str:
        """Text of a sampled message, without the control token that ends it."""
        return self.decode(tokens[:-1] if tokens and tokens[-1] in self._ends else tokens)

    def _ask_tokenizer(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def _encode(self, text: str) -> list[int]:
        if not text:
            return []
        fixed = self._fixed.get(text)  # transformers takes 0.1 ms for any text, and an observation has six of these
        return self._ask_tokenizer(text) if fixed is None else list(fixed)

    def _outside(self, text: str) -> list[int]:
        return encode_outside(self._tokenizer, text)

    def _image_piece(self, image: ImageBlob, at: int) -> tuple[list[int], ImageSpan]:
        grid = self._images.grid(image)
        num = grid[0] * grid[1] * grid[2] // self._images.merge**2
        tokens = [self._ids[VISION_START], *[self._ids[IMAGE_PAD]] * num, self._ids[VISION_END]]
        return tokens, ImageSpan(image.sha256, at + 1, at + 1 + num, grid)

    def encode_prompt(self, prompt: Prompt) -> TokenPiece:
        """The whole prompt with the tools that it has to tell of (`Offer`), up to where the assistant begins. Images take the
        place that their headers ask for.

        Raises:
            DataError: something is no image, or of a shape that cannot be used.
        """
        prompt = self.offer.described(prompt)
        out, images, text = TokenPiece(), iter(prompt.images), ""
        for message in prompt.messages:
            out.tokens += [*self._encode(text), self._ids["<|im_start|>"]]
            first, *rest = message.around_images
            out.tokens += self._encode(f"{message.role}\n{first}")
            for part in rest:
                image = next(images)
                try:
                    tokens, span = self._image_piece(image, len(out.tokens))
                except ImageError as error:
                    raise DataError(f"prompt {prompt.uid}: {error}; mend or remove this row") from None
                out.tokens += tokens + self._encode(part)
                out.images.append(image)
                out.spans.append(span)
            out.tokens.append(self.im_end)
            text = "\n"
        out.tokens += [*self._encode(text), self._ids["<|im_start|>"], *self._encode("assistant\n")]
        return out

    def encode_observation(
        self, observation: Observation, after: int, max_tokens: int, unusable: Mapping[str, str] | None = None
    ) -> TokenPiece:
        """An observation with the template around it, to be appended behind a message.

        after: last token of the message; its `<|im_end|>` is added unless it is there. max_tokens limits the observation
        itself: how it is cut is up to the protocol, but images are kept or dropped whole. An image that cannot be shown is
        replaced by a line that says so; unusable: what is known of them (see `unusable`).
        """
        out = TokenPiece()
        if after != self.im_end:
            out.tokens.append(self.im_end)
        out.tokens += [*self._encode("\n"), self._ids["<|im_start|>"], *self._encode(self.dialect.opening)]
        blocks = self._blocks(observation, unusable or {})
        cut = sum(len(block.tokens) for block in blocks) > max_tokens
        if cut:
            blocks = self.dialect.cut(blocks, max_tokens, self._encode(self.dialect.cut_mark))
        for block in blocks:
            if block.image is not None:
                start = len(out.tokens) + 1
                out.images.append(block.image)
                out.spans.append(ImageSpan(block.image.sha256, start, start + len(block.tokens) - 2, block.grid))
            out.tokens += block.tokens
        out.tokens += [*self._encode(self.dialect.closing), self.im_end, *self._encode("\n"), self._ids["<|im_start|>"]]
        out.tokens += self._encode("assistant\n")
        # what was cut away was never read: it must not count as a part of the response
        as_it_is = not cut and len(out.images) == len(observation.images)
        out.text = observation.text if as_it_is else "".join(map(self._block_text, blocks))
        return out

    def _block_text(self, block: Block) -> str:
        return IMAGE_MARK if block.image is not None else self.decode(block.tokens)

    def _blocks(self, observation: Observation, unusable: Mapping[str, str]) -> list[Block]:
        texts = observation.text.split(IMAGE_MARK)
        # marks without an image are plain text; images without a mark stand at the end
        num_marked = min(len(texts) - 1, len(observation.images))
        texts = [*texts[:num_marked], IMAGE_MARK.join(texts[num_marked:])]
        texts += [""] * (len(observation.images) - num_marked)
        blocks: list[Block] = []
        for text, image in zip(texts, [*observation.images, None], strict=True):
            blocks.append(Block(self._outside(text)))
            if image is None:
                continue
            try:
                if image.sha256 in unusable:
                    raise ImageError(unusable[image.sha256])
                tokens, span = self._image_piece(image, 0)
                blocks.append(Block(tokens, image, span.grid, whole=True))
            except ImageError as error:
                blocks.append(Block(self._outside(f"[{error}]"), whole=True))
        return blocks


_CONTROL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", VISION_START, VISION_END, IMAGE_PAD, "</tool_call>")


async def _squeezed(image: ImageBlob) -> ImageBlob:
    """The image, its longer side cut down to what can be shown, where it is much longer than the other; as it is where it is
    damaged."""
    try:
        width, height = pixels.size(image.data)
    except ImageError:
        return image
    if max(width, height) <= _LONGEST_SHAPE * min(width, height):
        return image
    size = (min(width, _LONGEST_SHAPE * height), min(height, _LONGEST_SHAPE * width))
    return await asyncio.to_thread(_resized, image, size)


def _resized(image: ImageBlob, size: tuple[int, int]) -> ImageBlob:
    try:
        picture = pixels.decode(image.data)
    except ImageError:
        return image
    out = io.BytesIO()
    picture.resize(size, Image.Resampling.LANCZOS).save(out, "PNG", compress_level=1)
    return ImageBlob.of(out.getvalue())
