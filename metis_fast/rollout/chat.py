"""Messages and observations to token ids, and tokens back to text (ALGORITHM section 6).

Token in, token out: what the engine sampled is never re-encoded; only prompts and observations are encoded, once, here. Text
from outside can never spell a control token or an image placeholder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from transformers import PreTrainedTokenizerBase

from metis_fast.config import CallSyntax
from metis_fast.errors import DataError
from metis_fast.model_folder import IMAGE_PAD, VISION_END, VISION_START
from metis_fast.pictures import ImagePreparer
from metis_fast.pixels import ImageError
from metis_fast.rollout.calls import ParsedTurn, parse_turn
from metis_fast.types import ImageBlob, ImageSpan, Observation, Outcome, Prompt

IMAGE_MARK = "<image>"
CUT_MARK = "\n[cut]"


@dataclass(slots=True)
class TokenPiece:
    """Some token ids, and where images stand in them (spans count from the start of `tokens`)."""

    tokens: list[int] = field(default_factory=list)
    images: list[ImageBlob] = field(default_factory=list)
    spans: list[ImageSpan] = field(default_factory=list)


class Chat:
    """The Qwen chat format over one tokenizer and image processor."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, images: ImagePreparer, call_syntax: CallSyntax = "strict") -> None:
        self._tokenizer = tokenizer
        self._call_syntax: CallSyntax = call_syntax
        self._images = images
        vocab = tokenizer.get_vocab()
        ids = {token: vocab[token] for token in _CONTROL if token in vocab}  # a text-only model may have none for images
        self._ids = ids
        self._fixed = {text: self._ask_tokenizer(text) for text in _TEMPLATE}
        self.im_end = ids["<|im_end|>"]
        self.stop_ids = (ids["</tool_call>"], self.im_end)

    async def unusable(self, images: Sequence[ImageBlob]) -> dict[str, str]:
        """What is wrong with images that are damaged behind their header, by SHA-256; the others are prepared, in threads."""
        return await self._images.ready(images)

    async def fit(self, observation: Observation, max_tokens: int) -> Observation:
        """An observation whose images, which would not fit into `max_tokens` beside its text, are scaled down until they do."""
        if not observation.images:
            return observation
        text = sum(len(self._encode(part)) for part in observation.text.split(IMAGE_MARK))
        images = await self._images.scaled(observation.images, max_tokens - text - 2 * len(observation.images))
        return replace(observation, images=images)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of sampled tokens, control tokens left in."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def message_text(self, tokens: Sequence[int]) -> str:
        """Text of a sampled message, without the control token that ends it."""
        return self.decode(tokens[:-1] if tokens and tokens[-1] == self.im_end else tokens)

    def parse(self, text: str) -> ParsedTurn:
        """Find the tool call of an assistant message, in this chat's syntax."""
        return parse_turn(text, self._call_syntax)

    def _ask_tokenizer(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)

    def _encode(self, text: str) -> list[int]:
        if not text:
            return []
        fixed = self._fixed.get(text)  # transformers takes 0.1 ms for any text, and an observation has six of these
        return self._ask_tokenizer(text) if fixed is None else list(fixed)

    def _image_piece(self, image: ImageBlob, at: int) -> tuple[list[int], ImageSpan]:
        grid = self._images.grid(image)
        num = grid[0] * grid[1] * grid[2] // self._images.merge**2
        tokens = [self._ids[VISION_START], *[self._ids[IMAGE_PAD]] * num, self._ids[VISION_END]]
        return tokens, ImageSpan(image.sha256, at + 1, at + 1 + num, grid)

    def encode_prompt(self, prompt: Prompt) -> TokenPiece:
        """The whole prompt, up to where the assistant begins. Images take the place that their headers ask for.

        Raises:
            DataError: something is no image, or of a shape that cannot be used.
        """
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
        itself: text is cut at a token with a mark, images are kept or dropped whole, and nothing follows a cut. An image that
        cannot be shown is replaced by a line that says so; unusable: what is known of them (see `unusable`).
        """
        out = TokenPiece()
        if after != self.im_end:
            out.tokens.append(self.im_end)
        out.tokens += [*self._encode("\n"), self._ids["<|im_start|>"], *self._encode("user\n<tool_response>")]
        end = len(out.tokens) + max_tokens
        texts = observation.text.split(IMAGE_MARK)
        # marks without an image are plain text; images without a mark stand at the end
        num_marked = min(len(texts) - 1, len(observation.images))
        texts = [*texts[:num_marked], IMAGE_MARK.join(texts[num_marked:])]
        texts += [""] * (len(observation.images) - num_marked)
        cut = self._encode(CUT_MARK)
        for text, image in zip(texts, [*observation.images, None], strict=True):
            tokens = self._encode(text)
            if len(out.tokens) + len(tokens) > end:
                out.tokens += tokens[: max(0, end - len(out.tokens) - len(cut))]
                out.tokens += cut[: end - len(out.tokens)]
                break
            out.tokens += tokens
            if image is None:
                continue
            problem = (unusable or {}).get(image.sha256)
            try:
                if problem is not None:
                    raise ImageError(problem)
                tokens, span = self._image_piece(image, len(out.tokens))
            except ImageError as error:
                tokens, span = self._encode(f"[{error}]"), None
            if len(out.tokens) + len(tokens) > end:
                out.tokens += cut[: end - len(out.tokens)]
                break
            out.tokens += tokens
            if span is not None:
                out.images.append(image)
                out.spans.append(span)
        out.tokens += [*self._encode("</tool_response>"), self.im_end, *self._encode("\n"), self._ids["<|im_start|>"]]
        out.tokens += self._encode("assistant\n")
        return out


_CONTROL = ("<|im_start|>", "<|im_end|>", VISION_START, VISION_END, IMAGE_PAD, "</tool_call>")
_TEMPLATE = ("\n", "user\n<tool_response>", "</tool_response>", "assistant\n", CUT_MARK)


def error_observation(text: str) -> Observation:
    """What the agent reads of its own mistake."""
    return Observation(text=f"Error: {text}", outcome=Outcome.TOOL_ERROR)
