"""The policy: transformers' own Qwen3-VL or Qwen3, its tokenizer and image processor, and the one way that engine and trainer
run it.

Shape letters: B rows, S tokens of a row (right-padded), H hidden size, N patches of all images, 3 rotary axes (t, h, w).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase, Qwen3ForCausalLM, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3.modeling_qwen3 import Qwen3Model
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures, Qwen3VLTextModel

from metis_fast import attention, pixels
from metis_fast.checkpoint.safetensors_folder import FolderReader
from metis_fast.config import ModelConfig
from metis_fast.model_folder import (
    ARCHITECTURES,
    VISION_TOKENS,
    check_model_folder,
    hf_shapes,
    load_processor,
    load_tokenizer,
    may_have,
    read_config,
)
from metis_fast.pixels import ImageError
from metis_fast.types import ImageBlob, ImageSpan


@dataclass(frozen=True, slots=True, eq=False)
class Patches:
    """One image as the vision tower takes it: pixels [n, channels * 2 * patch * patch] float32 and its (t, h, w) grid."""

    pixels: Tensor
    grid: tuple[int, int, int]


class ImagePreparer:
    """Encoded image -> patches, by transformers' Qwen2-VL image processor.

    processor: None for a model that reads text only, where every image is an ImageError. cache_bytes: the images used last are
    kept in so much memory (the very last one always): 20,000 of the demo's, 80 of 1024 x 1024 pixels.
    """

    def __init__(self, processor: Qwen2VLImageProcessorPil | None, cache_bytes: int = 2 << 30) -> None:
        self._processor = processor
        self._cache: OrderedDict[str, Patches] = OrderedDict()
        self._room = cache_bytes
        self.merge = 1 if processor is None else int(processor.merge_size)

    def __call__(self, image: ImageBlob) -> Patches:
        """Raises ImageError where the image cannot be used; the message says why."""
        if self._processor is None:
            raise ImageError("the model reads text only; use a Qwen3-VL")
        patches = self._cache.get(image.sha256)
        if patches is not None:
            self._cache.move_to_end(image.sha256)
            return patches
        try:
            picture = pixels.decode(image.data)
        except ImageError as error:
            raise ImageError(f"image cannot be decoded: {error}") from None
        try:
            out = self._processor([picture], return_tensors="pt")
        except ValueError as error:  # smart_resize: aspect ratio above 200
            raise ImageError(f"image cannot be resized: {error}") from None
        t, h, w = (int(n) for n in out["image_grid_thw"][0])
        patches = Patches(pixels=out["pixel_values"], grid=(t, h, w))
        self._cache[image.sha256] = patches
        self._room -= patches.pixels.nbytes
        while self._room < 0 and len(self._cache) > 1:
            self._room += self._cache.popitem(last=False)[1].pixels.nbytes
        return patches

    def num_tokens(self, image: ImageBlob) -> int:
        """Placeholder tokens of an image."""
        t, h, w = self(image).grid
        return t * h * w // self.merge**2


@dataclass(frozen=True, slots=True, eq=False)
class ImageFeatures:
    """Vision tower output for several images: `embeds[i]` [n_i, H], and one such list per deepstack layer."""

    embeds: tuple[Tensor, ...]
    deepstack: tuple[tuple[Tensor, ...], ...]

    def take(self, order: Sequence[int]) -> ImageFeatures:
        """The features of images `order` (repeats allowed)."""
        return ImageFeatures(
            tuple(self.embeds[i] for i in order), tuple(tuple(layer[i] for i in order) for layer in self.deepstack)
        )


def rope_positions(num_tokens: int, spans: Sequence[ImageSpan], merge: int) -> npt.NDArray[np.int64]:
    """Multimodal rotary positions [3, num_tokens] of one row, as Qwen3-VL defines them.

    Text advances all three axes by one a token; an image of grid (t, h, w) takes its merged (t, h, w) coordinates from the
    position where it starts, and the text behind it goes on at start + max(h, w) / merge.
    """
    position = np.empty((3, num_tokens), np.int64)
    at, current = 0, 0
    for span in spans:
        text = span.start - at
        position[:, at : span.start] = current + np.arange(text)
        current += text
        t, h, w = span.grid[0], span.grid[1] // merge, span.grid[2] // merge
        position[:, span.start : span.stop] = current + np.indices((t, h, w)).reshape(3, -1)
        current += max(h, w)
        at = span.stop
    position[:, at:] = current + np.arange(num_tokens - at)
    return position


class Policy:
    """A Qwen3-VL with what belongs to it. Weights are shared by the native engine and the torch trainer."""

    def __init__(
        self,
        model: Qwen3VLForConditionalGeneration | Qwen3ForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        image_processor: Qwen2VLImageProcessorPil | None,
        folder: Path,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.images = ImagePreparer(image_processor)
        self.folder = folder
        self.merge = self.images.merge
        if isinstance(model, Qwen3ForCausalLM):
            self.text = model.config
            self.decoder: Qwen3VLTextModel | Qwen3Model = model.model
            self.image_token_id, self.placeholder_ids = -1, ()
            return
        self.text = cast(Qwen3VLTextConfig, model.config.text_config)
        self.decoder = model.model.language_model
        self.image_token_id = model.config.image_token_id
        self.placeholder_ids = tuple(int(model.config.to_dict()[name]) for name in VISION_TOKENS)

    @property
    def reads_images(self) -> bool:
        """False for a text-only Qwen3."""
        return not isinstance(self.model, Qwen3ForCausalLM)

    @property
    def vision_blocks(self) -> Iterable[nn.Module]:
        """Of the vision tower; none in a model that reads text only."""
        return () if isinstance(self.model, Qwen3ForCausalLM) else self.model.model.visual.blocks

    @property
    def vocab_size(self) -> int:
        """Rows of the LM head."""
        return self.model.lm_head.weight.shape[0]

    @property
    def head(self) -> Tensor:
        """LM head [V, H]."""
        return self.model.lm_head.weight

    def encode_images(self, images: Sequence[ImageBlob]) -> ImageFeatures:
        """Run the vision tower over images (each of them once)."""
        assert not isinstance(self.model, Qwen3ForCausalLM)
        patches = [self.images(image) for image in images]
        # images of one size side by side: they are one batch for attention
        order = sorted(range(len(patches)), key=lambda i: patches[i].grid)
        grids = [patches[i].grid for i in order]
        pixels = torch.cat([patches[i].pixels for i in order]).to(self.head.device)
        # transformers annotates its tensors as FloatTensor and LongTensor, which no torch function returns
        encode = cast(Callable[..., BaseModelOutputWithDeepstackFeatures], self.model.model.get_image_features)
        out = encode(
            pixels,
            torch.tensor(grids, device=self.head.device),
            cu_seqlens=torch.tensor([0, len(pixels)], dtype=torch.int32),  # see `attention`
            frames=tuple(h * w for t, h, w in grids for _ in range(t)),
        )
        assert out.pooler_output is not None and out.deepstack_features is not None
        sizes = [t * h * w // self.merge**2 for t, h, w in grids]
        place = np.argsort(order)

        def by_image(features: Tensor | Sequence[Tensor]) -> tuple[Tensor, ...]:
            # transformers up to 5.17 leave the deepstack features of all images in one tensor
            parts = features.split(sizes) if isinstance(features, Tensor) else features
            return tuple(parts[i] for i in place)

        return ImageFeatures(by_image(out.pooler_output), tuple(map(by_image, out.deepstack_features)))

    def hidden(
        self,
        tokens_BS: Tensor,
        positions_3BS: Tensor,
        features: ImageFeatures | None,
        plan: attention.AttentionPlan,
    ) -> Tensor:
        """Final hidden states [B, S, H].

        features: of every image in `tokens_BS`, in reading order of the rows; None where there is none.
        """
        embeds = self.decoder.embed_tokens(tokens_BS)
        if isinstance(self.decoder, Qwen3Model):  # one rotary axis: where text is, the three are equal
            out = self.decoder(inputs_embeds=embeds, position_ids=positions_3BS[0], use_cache=False, plan=plan)
            return out.last_hidden_state
        mask, deepstack = None, None
        if features is not None:
            mask = tokens_BS == self.image_token_id
            image_embeds = torch.cat(features.embeds).to(embeds.dtype)
            embeds = embeds.masked_scatter(mask[..., None], image_embeds)
            deepstack = [torch.cat(layer) for layer in features.deepstack]
        out = self.decoder(
            inputs_embeds=embeds,
            position_ids=positions_3BS,
            visual_pos_masks=mask,
            deepstack_visual_embeds=deepstack,
            use_cache=False,
            plan=plan,
        )
        return out.last_hidden_state


def first_device() -> torch.device:
    """Where one process computes: the first GPU, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def build_model(
    config: PretrainedConfig, weights: dict[str, Tensor], dtype: torch.dtype, attention_of: str | dict[str, str]
) -> Qwen3VLForConditionalGeneration | Qwen3ForCausalLM:
    """transformers' model on the CPU, of weights in `dtype`, which it takes over as they are.

    It is not asked to read a folder: it would hold all of it, take what is not there for fresh weights, and cast integers.
    attention_of: name of the attention, of the whole model or by part.
    """
    return ARCHITECTURES[config.model_type][1].from_pretrained(
        None, config=config, state_dict=weights, dtype=dtype, attn_implementation=attention_of
    )


def load_policy(config: ModelConfig, folder: Path | None = None, device: torch.device | None = None) -> Policy:
    """Load `folder` (default: config.path) for training and sampling. device: None is the CPU.

    Every weight is read, checked and cast by itself: in memory are the model and a few tensors of the folder.

    Raises:
        ModelError: see `check_model_folder`, `load_tokenizer` and `load_processor`; also weights that do not fit the config,
            are damaged, quantised, NaN or Inf.
    """
    folder = folder if folder is not None else config.path
    vision = check_model_folder(folder) == "qwen3_vl"
    described = read_config(folder)
    tokenizer = load_tokenizer(folder)
    processor = load_processor(folder)
    reader = FolderReader(folder)
    shapes = hf_shapes(described)
    reader.check(shapes, may_have(described))
    if described.tie_word_embeddings:
        reader.check_same("lm_head.weight", next(name for name in shapes if name.endswith("embed_tokens.weight")))
    implementations = {"text_config": attention.NAME, "vision_config": attention.IMAGES}
    dtype = getattr(torch, config.dtype)
    model = build_model(described, reader.read_all(shapes, dtype), dtype, implementations if vision else attention.NAME)
    torch.backends.cudnn.allow_tf32 = False  # float32 is float32 in the vision tower's convolution, too
    if device is not None:
        model.to(device)  # pyright: ignore[reportArgumentType]
    return Policy(model, tokenizer, processor, folder)
