"""A tiny real Qwen3-VL: same classes, same files, trainable in minutes on a laptop. For the demo and for users' own tests."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from metis_fast.errors import ConfigError

# The Qwen format. Control tokens are "special" (text can never spell them); the tags are ordinary added tokens.
CONTROL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TAGS = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<answer>", "</answer>", "<reason>", "</reason>")
CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def build_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE in the Qwen format on `texts`. Digits are single tokens, so that numbers can be copied."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # Capitalised words stand alone, so that a name has one spelling in every context and can be copied; what
            # stands between names and digits may become one token, so that fixed phrases cost little.
            pre_tokenizers.Split(Regex(r"\d|[A-Z][a-z]*|[^A-Z\d]+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(TAGS),
        special_tokens=list(CONTROL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_tokens(list(TAGS))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


@dataclass(frozen=True, slots=True)
class TinyShape:
    """Shape of a tiny Qwen3-VL.

    image_px: pixel count of every image's view, or the least and the most of them. text_config, vision_config: what
    `Qwen3VLConfig` takes, without token ids.
    """

    vocab_size: int
    image_px: int | list[int]
    text_config: dict[str, Any]
    vision_config: dict[str, Any]


def build_tiny(folder: Path, shape: TinyShape, texts: Iterable[str], seed: int) -> None:
    """Write a fresh tiny Qwen3-VL folder; its tokenizer is trained on `texts`."""
    tokenizer = build_tokenizer(texts, shape.vocab_size)
    ids = tokenizer.get_vocab()
    text, vision = shape.text_config, shape.vision_config
    config = Qwen3VLConfig(
        text_config=text | {"vocab_size": len(tokenizer), "pad_token_id": None},
        vision_config=vision | {"out_hidden_size": text["hidden_size"]},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=bool(text.get("tie_word_embeddings", True)),
    )
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(config)
    with torch.no_grad():
        # transformers' std of 0.02 is far too small for a tower this narrow: it never learns fine texture. Fan-in instead.
        for name, weight in model.model.visual.named_parameters():
            if weight.ndim >= 2 and "pos_embed" not in name:
                weight.normal_(0.0, weight[0].numel() ** -0.5)
    model.generation_config = GenerationConfig(eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"])
    pixels = shape.image_px if isinstance(shape.image_px, list) else [shape.image_px]
    processor = Qwen2VLImageProcessorPil(
        patch_size=vision["patch_size"],
        merge_size=vision["spatial_merge_size"],
        temporal_patch_size=vision.get("temporal_patch_size", 2),
        size={"shortest_edge": pixels[0], "longest_edge": pixels[-1]},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    processor.save_pretrained(folder)


def read_shape(path: Path) -> TinyShape:
    """Read a model shape file (JSON with the fields of `TinyShape`).

    Raises:
        ConfigError: no such file, or it does not hold those fields.
    """
    try:
        shape = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read model shape {path}: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path} is not valid JSON: {error}") from None
    names = {field.name for field in fields(TinyShape)}
    if not isinstance(shape, dict) or shape.keys() != names:
        got = ", ".join(shape) if isinstance(shape, dict) else type(shape).__name__
        raise ConfigError(f"{path}: expected an object with {', '.join(sorted(names))}, got {got}; see configs/demo_model.json")
    return TinyShape(**shape)
