"""A conversation to the trajectory that would have been played: tokens, images in place, the loss on what the assistant says.

The plain template of Qwen, `<|im_start|>role\\n…<|im_end|>\\n`, without the last line break; `tool` is a user turn. Token for
token what inference has: an assistant's message begins behind `assistant\\n`, and from the first one on the text of other
messages behind `user\\n`, so that no token reaches over the border. No text can spell a control token or an image placeholder,
and that of an observation no tag but the `<tool_response>` around it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from transformers import PreTrainedTokenizerBase

from metis_fast.data.coldstart import Conversation
from metis_fast.data.row import MisfitError
from metis_fast.errors import ModelError
from metis_fast.model_folder import IMAGE_PAD, VISION_END, VISION_START
from metis_fast.pictures import ImagePreparer
from metis_fast.pixels import ImageError
from metis_fast.rollout.outside import encode_outside
from metis_fast.types import ImageBlob, ImageSpan, Outcome, Rollout

_START, _END = "<|im_start|>", "<|im_end|>"
_OPENED, _CLOSED = "<tool_response>", "</tool_response>"


class Encoder:
    """Of one tokenizer and image processor. Safe for threads.

    Raises:
        ModelError: the tokenizer has no control tokens of the chat.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, images: ImagePreparer) -> None:
        self._tokenizer, self._images = tokenizer, images
        vocab = tokenizer.get_vocab()
        if not {_START, _END} <= vocab.keys():
            raise ModelError(f"the tokenizer has no {_START} and {_END}; use the folder of a Qwen chat model")
        self._ids = {token: vocab[token] for token in (_START, _END, VISION_START, VISION_END, IMAGE_PAD) if token in vocab}
        self._newline = self._encode("\n")

    def _encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True) if text else []

    def __call__(self, conversation: Conversation) -> Rollout:
        """Its prompt is all that comes before the assistant's first message.

        Raises:
            MisfitError: an image is of a shape that the model cannot take.
        """
        tokens: list[int] = []
        said: list[tuple[int, int]] = []
        spans: list[ImageSpan] = []
        images = iter(enumerate(conversation.images))
        for number, message in enumerate(conversation.messages):
            tokens += [*(self._newline if number else ()), self._ids[_START]]
            first, *rest = message.around_images
            if message.role == "assistant":
                tokens += self._encode("assistant\n")
                begin = len(tokens)
                tokens += [*self._encode(first), self._ids[_END]]
                said.append((begin, len(tokens)))
                continue
            role = "user\n" if message.role == "tool" else f"{message.role}\n"
            parts = self._observed([first, *rest]) if said else [self._encode(role + first), *map(self._encode, rest)]
            tokens += [*(self._encode(role) if said else ()), *parts[0]]
            for text, (place, image) in zip(parts[1:], images, strict=False):
                self._show(image, place, tokens, spans)
                tokens += text
            tokens.append(self._ids[_END])
        sampled = np.zeros(len(tokens), np.bool_)
        for begin, end in said:
            sampled[begin:end] = True
        return Rollout(
            prompt_uid=conversation.uid,
            index=0,
            tokens=np.array(tokens, np.int32),
            prompt_len=said[0][0],
            sampled=sampled,
            logp=np.zeros(len(tokens), np.float32),
            weight_version=np.where(sampled, 0, -1).astype(np.int32),
            images=tuple({image.sha256: image for image in conversation.images}.values()),
            image_spans=tuple(spans),
            turns=(),
            outcome=Outcome.ANSWERED,
        )

    def _observed(self, texts: Sequence[str]) -> list[list[int]]:
        """Of the texts around the images of an observation, as `Chat.encode_observation` has them."""
        *before, last = texts
        wrapped = texts[0].startswith(_OPENED) and last.endswith(_CLOSED)
        if wrapped:
            *before, last = [texts[0].removeprefix(_OPENED), *texts[1:]]
            last = last.removesuffix(_CLOSED)
        parts = [encode_outside(self._tokenizer, text) for text in (*before, last)]
        if wrapped:
            parts[0] = [*self._encode(_OPENED), *parts[0]]
            parts[-1] = [*parts[-1], *self._encode(_CLOSED)]
        return parts

    def _show(self, image: ImageBlob, place: int, tokens: list[int], spans: list[ImageSpan]) -> None:
        try:
            grid = self._images.grid(image)
        except ImageError as error:
            raise MisfitError(f"images[{place}]", "an image that the model can take", str(error)) from None
        num = grid[0] * grid[1] * grid[2] // self._images.merge**2
        tokens.append(self._ids[VISION_START])
        spans.append(ImageSpan(image.sha256, len(tokens), len(tokens) + num, grid))
        tokens += [*[self._ids[IMAGE_PAD]] * num, self._ids[VISION_END]]
