"""What a model folder has to hold, whoever wrote it, and the one way in which its config, tokenizer and processor are read.

Training, ranks, plans and exports all go through here, so that a config means the same to each of them.
"""

from __future__ import annotations

import copy
import json
import os
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding
from transformers.utils.chat_template_utils import render_jinja_template

from metis_fast.errors import ModelError

IMAGE_PAD = "<|image_pad|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
MESSAGE_END = "<|im_end|>"
NEEDED_TOKENS = ("<|im_start|>", MESSAGE_END, "<tool_call>", "</tool_call>")
VISION_TOKENS = {
    "image_token_id": IMAGE_PAD,
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
"""By the name of their id in config.json."""

GENERATION, PROCESSOR_TEMPLATE = "generation_config.json", "chat_template.json"
PREPROCESSOR, PROCESSOR = "preprocessor_config.json", "processor_config.json"
ARCHITECTURES: Mapping[str, tuple[type[PretrainedConfig], type[Qwen3VLForConditionalGeneration] | type[Qwen3ForCausalLM]]] = {
    "qwen3_vl": (Qwen3VLConfig, Qwen3VLForConditionalGeneration),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
"""By model_type. qwen3 reads text only."""

_LFS = b"version https://git-lfs"
_ROPE = ("rope_scaling", "rope_parameters")
_TEXT = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "hidden_act", "max_position_embeddings", "rms_norm_eps", "attention_bias", "rope_theta", *_ROPE,
)  # fmt: skip
QKV = ("q_proj", "k_proj", "v_proj")
GATE_UP = ("gate_proj", "up_proj")
"""Matrices of a layer that others hold as one: Megatron-core, vLLM."""

_ATTENTION = ("_attn_implementation", "attn_implementation")
"""Kernels that another trainer ran it with: transformers would ask for their package before it builds the model."""
_HEAD = "lm_head.weight"
_MOST_LAYERS = 1000
"""Of a model whose weights are not there to count them: each takes memory before anything is loaded."""
_LAYERS = (("num_hidden_layers", re.compile(r"\blayers\.(\d+)\.")), ("depth", re.compile(r"\bblocks\.(\d+)\.")))
"""Their number in text and vision settings, and where a weight's name has its own."""
_MAY_LACK = ("bos_token_id", "pad_token_id")
"""Tokens without which a model works; an end of the text it needs."""
_BAD_SETTINGS = (
    OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, ArithmeticError, RuntimeError, MemoryError,
    StrictDataclassError,
)  # fmt: skip
"""What transformers, torch, numpy and Pillow raise for settings that cannot be."""


def trouble(path: Path) -> str:
    """Why a file cannot be what its name says, as far as its first bytes tell; empty where nothing shows."""
    try:
        with path.open("rb") as file:
            start = file.read(len(_LFS))
    except FileNotFoundError:
        if path.is_symlink():
            return f"is a link to {os.readlink(path)}, which does not exist; copy or download the folder again"
        return "does not exist; name another, or copy it from its source"
    except OSError as error:
        return f"cannot be read ({error.strerror}); change its permissions, or copy it from its source again"
    if not start:
        return "is empty; copy it from its source again"
    if start == _LFS:
        return "is a git-lfs pointer and not the file itself; run `git lfs pull` in the repository that it is of"
    return ""


def read_json(path: Path) -> dict[str, Any]:
    """
    Raises:
        ModelError: it cannot be read, or is no JSON object.
    """
    if problem := trouble(path):
        raise ModelError(f"{path} {problem}")
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # the second: brackets in brackets, a thousand deep
        raise ModelError(f"{path} is not valid JSON ({error}); restore the file from its source") from None
    if not isinstance(tree, dict):
        raise ModelError(f"{path} holds a JSON {type(tree).__name__}, expected an object; restore the file from its source")
    return tree


def check_is_folder(folder: Path) -> None:
    """
    Raises:
        ModelError: `model.path` is no folder, or one of another program's weights.
    """
    if folder.suffix == ".gguf" or (any(folder.glob("*.gguf")) and not any(folder.glob("*.safetensors"))):
        raise ModelError(
            f"model.path {folder} is a GGUF file, quantised for another program; download the repository that it was made from"
        )
    if not folder.is_dir():
        raise ModelError(
            f"model.path {folder} is not a folder; give one that holds a Qwen3-VL (config.json, *.safetensors), and download "
            "one of the Hugging Face hub first (hf download NAME --local-dir FOLDER)"
        )


def check_model_folder(folder: Path) -> str:
    """Find out, before anything is loaded, that a folder holds a Qwen3-VL or a Qwen3; returns its model_type.

    Raises:
        ModelError: not a folder, another architecture, a part is missing or unreadable, or the weights are quantised.
    """
    check_is_folder(folder)
    if (folder / "adapter_config.json").exists():
        raise ModelError(f"{folder} holds a LoRA adapter; merge it into its model (merge_and_unload), save that and give it")
    for path in sorted(folder.glob("*")):  # whichever it is, the folder was copied without what it points to
        if path.is_symlink() and not os.path.exists(path):
            raise ModelError(f"{path} {trouble(path)}")
    config = read_config(folder)
    if not any(folder.glob("*.safetensors")):
        raise ModelError(f"{folder} has no *.safetensors; convert the weights to safetensors first")
    if not os.path.lexists(folder / "tokenizer.json"):
        raise ModelError(f"{folder} lacks tokenizer.json; copy it from the model that this one was made from")
    read_json(folder / "tokenizer.json")
    found = {name: read_json(folder / name) for name in (PREPROCESSOR, PROCESSOR) if os.path.lexists(folder / name)}
    # transformers 5 saves the image processor inside of the processor
    if config.model_type == "qwen3_vl" and PREPROCESSOR not in found and "image_processor" not in found.get(PROCESSOR, {}):
        raise ModelError(
            f"{folder} lacks {PREPROCESSOR}, or a {PROCESSOR} with an image_processor; "
            "copy it from the model that this one was made from"
        )
    rows = config.get_text_config().vocab_size
    for place, ids in _token_ids(folder, config):
        if wrong := [token for token in ids if not 0 <= token < rows]:
            raise ModelError(
                f"{folder}: {place} is {wrong[0]}, but the embedding has rows 0 to {rows - 1}; correct the one that is wrong"
            )
    return config.model_type


def _token_ids(folder: Path, config: PretrainedConfig) -> Iterator[tuple[str, list[int]]]:
    """Every token id that a config of the folder names, and where."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    trees = {"config.json": config.to_dict(), "text_config of config.json": config.get_text_config().to_dict()}
    if os.path.lexists(folder / GENERATION):
        trees[GENERATION] = _none_for_minus_one(read_json(folder / GENERATION))
        try:
            GenerationConfig.from_dict(dict(trees[GENERATION]))
        except _BAD_SETTINGS as error:
            raise ModelError(f"{folder / GENERATION} cannot be used ({_line(error)}); correct it, or remove it") from None
    for file, tree in trees.items():
        for name in (*names, *(VISION_TOKENS if file == "config.json" else ())):
            value = tree.get(name)
            if value is not None:
                ids = value if isinstance(value, list) else [value]
                if not all(type(token) is int for token in ids):  # nor true, which Python counts as 1
                    raise ModelError(f"{folder}: {name} in {file} is {value!r}, expected token ids; correct it")
                yield f"{name} in {file}", ids


def _none_for_minus_one(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Of token ids: some write -1 for a token that the model has not."""
    return {**tree, **{name: None for name in _MAY_LACK if tree.get(name) == -1}}


def standard(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json with every setting where transformers looks for it; one that it wrote itself is as it was.

    Taken from other places: a text model's settings and `rope_theta` beside `text_config`, `tie_word_embeddings` inside of it,
    and `rope_scaling` where `rope_parameters` is there as well, of which transformers would drop one. A padding token -1 is
    none, where transformers would take the last row of the embedding. The name of an attention kernel is left out.
    """
    parts = {name: _without(part, _ATTENTION) for name, part in tree.items() if isinstance(part, Mapping)}
    changed = _none_for_minus_one(_without({**tree, **parts}, _ATTENTION))
    nested = tree.get("model_type") == "qwen3_vl"
    text = _none_for_minus_one(changed.get("text_config") or {}) if nested else changed
    if nested:
        has_rope = any(text.get(name) for name in _ROPE)
        text |= {name: tree[name] for name in _TEXT if name in tree and name not in text and not (has_rope and name in _ROPE)}
        if "tie_word_embeddings" in text:
            changed.setdefault("tie_word_embeddings", text["tie_word_embeddings"])
    if all(text.get(name) for name in _ROPE):
        text["rope_parameters"] = {**text.pop("rope_scaling"), **text["rope_parameters"]}
    if nested:
        changed["text_config"] = text
    return changed


def _without(tree: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in tree.items() if name not in names}


def config_of(tree: Mapping[str, Any], file: Path) -> PretrainedConfig:
    """transformers' config of a config.json. file: what errors call it.

    Raises:
        ModelError: another architecture, a value that cannot be, or a quantised model.
    """
    kind = tree.get("model_type")
    if not isinstance(kind, str) or kind not in ARCHITECTURES:
        raise ModelError(
            f"{file}: expected model_type qwen3_vl (or qwen3 for text only), got {kind!r}; give a Qwen3-VL as model.path"
        )
    for part in (tree, tree.get("text_config"), tree.get("vision_config")):
        if part is not None and not isinstance(part, Mapping):
            raise ModelError(f"{file}: text_config and vision_config must be objects; restore the file from its source")
        for key in ("quantization_config", "compression_config"):
            if part and part.get(key):
                method = part[key].get("quant_method") if isinstance(part[key], Mapping) else None
                raise ModelError(
                    f"{file} has a {key} ({method or 'no method named'}): quantised weights cannot be trained; "
                    "give the bfloat16, float16 or float32 model that it was made from"
                )
    try:
        settings = standard(tree)
        _check_depth(settings, file)
        # not `from_dict`, which writes all of it out for a log that is off
        return ARCHITECTURES[kind][0](**copy.deepcopy(settings))
    except _BAD_SETTINGS as error:
        raise ModelError(f"{file} cannot be used ({_line(error)}); restore the file from its source") from None


def _check_depth(settings: Mapping[str, Any], file: Path) -> None:
    """
    Raises:
        ModelError: there are more layers than any model has, and than the weights beside the file hold.
    """
    parts = (settings.get("text_config") or settings, settings.get("vision_config") or {})
    for part, (name, in_a_name) in zip(parts, _LAYERS, strict=True):
        number = part.get(name)
        if not isinstance(number, int | float) or number <= _MOST_LAYERS:
            continue
        held = 0
        for path in file.parent.glob("*.safetensors"):
            with suppress(OSError, SafetensorError), safe_open(path, framework="pt") as weights:
                found = (in_a_name.search(tensor) for tensor in weights.offset_keys())
                held = max([held, *(1 + int(one[1]) for one in found if one)])
        if number > max(held, _MOST_LAYERS):
            expected = f"the weights beside it have {held}" if held else f"expected at most {_MOST_LAYERS}"
            raise ModelError(f"{file}: {name} is {number}, {expected}; correct it, or restore the file from its source")


def read_config(folder: Path) -> PretrainedConfig:
    """The config of a model folder.

    Raises:
        ModelError: see `config_of`; also a file that cannot be read.
    """
    path = folder / "config.json"
    if not os.path.lexists(path):
        check_is_folder(folder)
        raise ModelError(f"{folder} lacks config.json; give a Qwen3-VL model folder")
    return config_of(read_json(path), path)


def hf_shapes(config: PretrainedConfig) -> Mapping[str, tuple[int, ...]]:
    """Names and shapes of a model's weights as Hugging Face folders have them; a tied LM head is left out.

    Raises:
        ModelError: there is no model of that config (no attention heads, an unknown activation).
    """
    return _shapes(config.model_type, config.to_json_string(use_diff=False))


def may_have(config: PretrainedConfig) -> frozenset[str]:
    """Weights that a folder may have and nobody reads: some models are published with a copy of their tied LM head."""
    return frozenset({_HEAD} if config.tie_word_embeddings else ())


@lru_cache(maxsize=4)
def _shapes(kind: str, text: str) -> Mapping[str, tuple[int, ...]]:
    of_config, of_model = ARCHITECTURES[kind]
    try:
        with torch.device("meta"):
            model = of_model(of_config(**json.loads(text)))  # pyright: ignore[reportArgumentType]
        _check_positions(model.config.get_text_config())
    except _BAD_SETTINGS as error:
        reason = f"{type(error).__name__}: {_line(error)}"
        raise ModelError(f"config.json is of no model that can be built ({reason}); restore the file from its source") from None
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


def _check_positions(text: PretrainedConfig) -> None:
    """Find rotary settings that cannot be; no weight shows them, and each token would be NaN or each pass an error.

    Raises:
        ValueError: they cannot be; so can whatever transformers raises (`_BAD_SETTINGS`).
    """
    plain = isinstance(text, Qwen3Config)
    rotary = Qwen3RotaryEmbedding if plain else Qwen3VLTextRotaryEmbedding
    angles = rotary(text)(torch.zeros(1), torch.arange(3)[None])  # pyright: ignore[reportArgumentType]
    if not all(one.isfinite().all() for one in angles):
        raise ValueError(f"positions become NaN or Inf; see rope_parameters, now {text.rope_parameters}")
    if plain and "sliding_attention" in (text.layer_types or ()):  # of a Qwen3-VL transformers does not read it
        raise ValueError("its layers have a sliding window, only such as see the whole text can be trained; see layer_types")


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The folder's tokenizer, checked for the tokens of the Qwen chat and tool format, and against config.json.

    Raises:
        ModelError: it cannot be loaded, lacks a token, has more tokens than the embedding has rows, or other ids than
            config.json.
    """
    config = read_config(folder)
    vision = VISION_TOKENS if config.model_type == "qwen3_vl" else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # the tokenizers library has no narrower class for a file that it cannot use
        raise ModelError(f"tokenizer of {folder} cannot be loaded ({_line(error)}); copy its files from their source") from None
    vocab = tokenizer.get_vocab()
    missing = [token for token in (*NEEDED_TOKENS, *vision.values()) if token not in vocab]
    if missing:
        family = "Qwen3-VL" if vision else "Qwen3"
        raise ModelError(f"tokenizer of {folder} lacks the tokens {', '.join(missing)}; use the tokenizer of {family}")
    rows, last = config.get_text_config().vocab_size, max(vocab, key=vocab.__getitem__)
    if vocab[last] >= rows:
        raise ModelError(
            f"{folder}: the embedding has {rows} rows, but the tokenizer has ids up to {vocab[last]} ({last!r}); "
            "resize the embedding (resize_token_embeddings), or use the tokenizer that the model was trained with"
        )
    for name, token in vision.items():
        if config.to_dict()[name] != vocab[token]:
            raise ModelError(
                f"{folder}: config.json has {name} {config.to_dict()[name]}, but {token} is {vocab[token]} in the tokenizer; "
                "copy both from the same model"
            )
    return tokenizer


def doubts(folder: Path) -> Iterator[str]:
    """Lines of what training does not need, but whoever uses an export of the folder, which takes it over as it is.

    Raises:
        ModelError: see `load_tokenizer`.
    """
    tokenizer, config = load_tokenizer(folder), read_config(folder)
    templates = tokenizer.chat_template or {}
    named = dict(templates) if isinstance(templates, dict) else {"": templates}
    if os.path.lexists(folder / PROCESSOR_TEMPLATE):
        named[PROCESSOR_TEMPLATE] = read_json(folder / PROCESSOR_TEMPLATE).get("chat_template", "")
    for name, template in named.items():
        try:
            render_jinja_template([], chat_template=template)  # of no conversation: it is read and compiled alone
        except (jinja2.TemplateError, SyntaxError, *_BAD_SETTINGS) as error:
            which = f"chat template {name}".rstrip()
            yield (
                f"{folder}: expected a {which} that Jinja reads, got an error ({_line(error)}); training does without, but "
                "exports have it as it is: copy it from the model's source"
            )
    ends = {place: ids for place, ids in _token_ids(folder, config) if place.startswith("eos_token_id")}
    decisive = f"eos_token_id in {GENERATION}"  # what `generate` and vLLM go by where it is there
    end = tokenizer.convert_tokens_to_ids(MESSAGE_END)
    for place, ids in ends.items():
        if end not in ids and (place == decisive or decisive not in ends):
            got = ids[0] if len(ids) == 1 else ids
            yield (
                f"{folder}: {place} is {got}, expected {end} ({MESSAGE_END}), which ends messages here, or a list with it; who "
                "samples from an export would not stop there: correct it"
            )


def load_processor(folder: Path) -> Qwen2VLImageProcessorPil | None:
    """The folder's image processor: that of `processor_config.json` where one is inside, else of `preprocessor_config.json`.

    None for a model that reads text only.

    Raises:
        ModelError: it cannot be loaded, cuts images up in another way than the model expects, or cannot process any.
    """
    config = read_config(folder)
    if config.model_type != "qwen3_vl":
        return None
    try:
        processor = Qwen2VLImageProcessorPil.from_pretrained(folder, local_files_only=True)
    except _BAD_SETTINGS as error:
        raise ModelError(f"image processor of {folder} cannot be loaded ({_line(error)}); copy it from its source") from None
    vision = config.vision_config  # pyright: ignore[reportAttributeAccessIssue]
    names = {"patch_size": "patch_size", "temporal_patch_size": "temporal_patch_size", "merge_size": "spatial_merge_size"}
    for ours, theirs in names.items():
        if getattr(processor, ours) != getattr(vision, theirs):
            raise ModelError(
                f"{folder}: the image processor has {ours} {getattr(processor, ours)!r}, the vision_config of config.json "
                f"{theirs} {getattr(vision, theirs)!r}; copy both from the same model"
            )
    if problem := _processor_trouble(processor, config.get_text_config().max_position_embeddings):
        raise ModelError(f"image processor of {folder} cannot be used ({problem}); copy it from its source")
    return processor


def _processor_trouble(processor: Qwen2VLImageProcessorPil, longest: int) -> str:
    """What is wrong with the patches of one image; empty if nothing is. Otherwise it would look like each image's own fault.

    longest: most tokens of a sequence.
    """
    shades = np.arange(61 * 83 * 3).reshape(61, 83, 3) % 251  # of a size that has to be changed
    try:
        if not (processor.size["shortest_edge"] and processor.size["longest_edge"]):
            return "its size has no shortest_edge and longest_edge, in pixels of the whole image"
        # asked first: a smallest size that is far too large would take all of the memory
        if (tokens := processor.get_number_of_image_patches(61, 83) // processor.merge_size**2) > longest:
            return f"an image of 83 x 61 becomes {tokens} tokens, where the model reads {longest}; see size"
        with np.errstate(all="ignore"):
            out = processor([Image.fromarray(shades.astype(np.uint8))], return_tensors="pt")
        (t, h, w), pixels = out["image_grid_thw"][0].tolist(), out["pixel_values"]
        channels, rest = divmod(pixels.shape[1], processor.temporal_patch_size * processor.patch_size**2)
        if (len(pixels), channels, rest) != (t * h * w, 3, 0) or h % processor.merge_size or w % processor.merge_size:
            return f"an image of 83 x 61 becomes patches {list(pixels.shape)} for a grid {[t, h, w]}"
    except _BAD_SETTINGS as error:
        return f"of an image of 83 x 61: {_line(error)}"
    return "" if pixels.isfinite().all() else "pixels become NaN or Inf; see image_std, image_mean and rescale_factor"


def _line(error: Exception) -> str:
    """What transformers says, in a line."""
    return " ".join(str(error).split())[:300]
