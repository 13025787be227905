"""The policy: transformers' own Qwen3-VL or Qwen3, its tokenizer and image processor, and the one way that engine and trainer
run it.

Shape letters: B rows, S tokens of a row (right-padded), H hidden size, N patches of all images, 3 rotary axes (t, h, w).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextModel

from metis_fast import attention
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
from metis_fast.pictures import DEFAULT_CACHE_BYTES, ImagePreparer
from metis_fast.tower import ImageFeatures, default_room, encode
from metis_fast.types import ImageBlob, ImageSpan


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
        image_cache_bytes: int = DEFAULT_CACHE_BYTES,
        tower_bytes: int = 0,
    ) -> None:
        """image_cache_bytes: see `ImagePreparer`. tower_bytes: for the vision tower's activations; 0: see `default_room`."""
        self.model = model
        self.tokenizer = tokenizer
        self.images = ImagePreparer(image_processor, image_cache_bytes)
        self._tower_bytes = tower_bytes
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

    def encode_images(self, images: Sequence[ImageBlob], whole: bool = False) -> ImageFeatures:
        """Run the vision tower over images (each of them once). whole: in one pass, whatever memory it takes.

        Raises:
            ImageError: one of them cannot be used.
        """
        assert not isinstance(self.model, Qwen3ForCausalLM)
        visual = self.model.model.visual
        room = None if whole else self._tower_bytes or default_room(self.head.device)
        return encode(visual, self.images, self.images.pictures(images), room)

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
    cache, tower = (round(size * (1 << 30)) for size in (config.image_cache_gb, config.tower_memory_gb))
    return Policy(model, tokenizer, processor, folder, cache, tower)
