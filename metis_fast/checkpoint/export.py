"""Models in the Hugging Face layout, for plain transformers, vLLM or another run.

Training changes neither tokenizer nor image processor nor generation config, so those files are those of the model that the
run started from, byte for byte. They are read when the run starts: what cannot be exported is said then, and what happens to
that folder meanwhile does not matter. It is also the one way that always works: transformers refuses to save some generation
configs that it loads, and without torchvision it cannot construct a `Qwen3VLProcessor`, so that it could not be saved.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, PretrainedConfig

from metis_fast.attention import CausalSdpa
from metis_fast.checkpoint.atomic import clean_leftovers, new_folder
from metis_fast.checkpoint.safetensors_folder import INDEX, ONE_FILE, FolderReader
from metis_fast.errors import CheckpointError, ModelError
from metis_fast.model import Policy, rope_positions
from metis_fast.model_folder import (
    GENERATION,
    PREPROCESSOR,
    PROCESSOR,
    PROCESSOR_TEMPLATE,
    VISION_END,
    VISION_START,
    check_model_folder,
    doubts,
    hf_shapes,
    load_processor,
    load_tokenizer,
    read_config,
    read_json,
    standard,
    trouble,
)
from metis_fast.types import ImageBlob, ImageSpan, Outcome, Rollout

log = logging.getLogger(__name__)

COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    PROCESSOR_TEMPLATE,  # older folders; read by the processor only
    PREPROCESSOR,
    "video_preprocessor_config.json",
    PROCESSOR,
    GENERATION,
)
"""All that an export takes over as it is. Subfolders and other files (optimizer states, *.bin, README.md) are not."""

MAX_SHARD_BYTES = 5_000_000_000
"""Of a weight file, as `save_pretrained` has it by default."""

MARK = "model.export.json"
"""Tells an export from other model folders, which are never replaced. No metadata of the weight files: safetensors writes two
entries in any order, and equal models would not be equal files."""
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")

LOGITS_DIFFER = {torch.float32: 1e-3, torch.bfloat16: 5e-2}
"""Most that logits of an export may differ from the trainer's, as a share of their size (norms over all tokens), by dtype: of
equal weights, rounding alone makes 1e-6 and 1e-2."""


@dataclass(frozen=True, slots=True)
class Source:
    """What an export has of the model that the run started from. config: its config.json, see `standard`."""

    folder: Path
    config: Mapping[str, Any] = field(repr=False)
    files: Mapping[str, bytes] = field(repr=False)


def read_source(folder: Path) -> Source:
    """Read all that an export takes over; links are followed.

    Raises:
        ModelError: see `check_model_folder`; also a file that cannot be read, or is not JSON where it should be.
    """
    check_model_folder(folder)
    files: dict[str, bytes] = {}
    for name in COPIED:
        path = folder / name
        if not os.path.lexists(path):
            continue
        if name.endswith(".json"):
            read_json(path)
        elif problem := trouble(path):
            raise ModelError(f"{path} {problem}")
        files[name] = path.read_bytes()
    return Source(folder, standard(read_json(folder / "config.json")), files)


def check_export(folder: Path, out: Path, dtype: str) -> Source:
    """Try, when a run starts, what would fail when its model is exported. Too little space now is a warning, and so is what
    would make an export of little use (`doubts`).

    folder: of the model that is trained. dtype: what its weights will be in.

    Raises:
        ModelError: see `read_source` and `doubts`. CheckpointError: `out` cannot be written, or holds what would be lost.
    """
    source = read_source(folder)
    _check_target(out, folder)
    # a folder is replaced, not filled, so that it is the one above that is written to
    writable = next(parent for parent in out.resolve().parents if parent.exists())
    if not writable.is_dir() or not os.access(writable, os.W_OK | os.X_OK):
        raise CheckpointError(f"cannot export to {out}: {writable} is no folder that can be written; name another one")
    for doubt in doubts(folder):
        log.warning("%s", doubt)
    size = sum(map(math.prod, hf_shapes(read_config(folder)).values())) * getattr(torch, dtype).itemsize
    free = shutil.disk_usage(writable).free
    if free < size:
        log.warning(
            "the trained model will take %.3g GB at %s, where %.3g GB are free; free some before the run ends",
            size / 1e9, out, free / 1e9,
        )  # fmt: skip
    return source


def export_model(
    tensors: Iterable[tuple[str, Tensor]],
    expected: Mapping[str, tuple[int, ...]],
    source: Source,
    out: Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    check: Callable[[Path], object] | None = None,
) -> None:
    """Write the folder of a trained model, which plain transformers and vLLM load, from a stream of its tensors.

    The folder appears whole or not at all; an older export at `out` is kept until the new one is complete. At most one weight
    file is held in memory. Before the folder gets its name, every tensor has been read back, plain transformers has read config
    and tokenizer, and all weights of that config are there.

    tensors: Hugging Face names and whole tensors of one dtype, on any device, in any order. expected: all of them, with shapes.
    check: one more, given the finished folder before it gets its name.

    Raises:
        CheckpointError: `out` is something else than an export, the disk failed, or the export is not the model.
        ValueError: the stream is not what was expected.
    """
    with _new_export(out, source.folder) as tmp:
        for name, content in source.files.items():
            (tmp / name).write_bytes(content)
        dtype = write_weights(tensors, expected, tmp, max_shard_bytes)
        (tmp / "config.json").write_text(json.dumps(_with_dtype(source.config, dtype), indent=2) + "\n", encoding="utf-8")
        (tmp / MARK).write_text('{"exported_by": "metis_fast"}\n', encoding="utf-8")
        try:
            _check_written(tmp, dtype)
            if check is not None:
                check(tmp)
        except ModelError as error:
            raise CheckpointError(f"the model exported to {out} is not usable, and was removed: {error}") from None


def export_policy(policy: Policy, source: Source, out: Path) -> None:
    """`export_model` of a model in this process; its logits, too, are compared with the trainer's (`check_logits`)."""
    expected = hf_shapes(policy.model.config)
    export_model(policy.model.named_parameters(), expected, source, out, check=lambda tmp: check_logits(policy, tmp))


@torch.no_grad()
def check_logits(policy: Policy, folder: Path) -> float:
    """Load a folder with plain transformers and its own attention, on the CPU, and compare logits of a text with an image.

    The weights are mapped, not copied: a large model takes time to read, and no memory that others need.

    Returns how far they differ; see `LOGITS_DIFFER`.

    Raises:
        ModelError: they differ by more, are all 0, or are not finite.
    """
    ids, spans, blob = _probe(policy)
    tokens = torch.tensor([ids])
    positions = torch.from_numpy(rope_positions(len(ids), spans, policy.merge))[:, None]
    device = policy.head.device
    features = policy.encode_images([blob]) if spans else None
    hidden = policy.hidden(tokens.to(device), positions.to(device), features, CausalSdpa())
    ours = (hidden @ policy.head.mT).cpu().float()  # in this order: a GPU may have little room beside the training
    size = float(ours.norm())
    if not 0 < size < math.inf:  # nor is NaN
        raise ModelError(
            f"the trainer's logits are all 0, or not finite (their norm is {size:g}): nothing can be compared with them; "
            "see the weights of the LM head and of the norm before it, which the last checkpoint has"
        )
    theirs = _plain_logits(policy, folder, tokens, spans, blob)
    gap = float((theirs - ours).norm()) / size
    if not gap <= LOGITS_DIFFER[policy.head.dtype]:  # nor is NaN
        raise ModelError(
            f"the logits of plain transformers differ by {gap:.1e} of their size from the trainer's, expected at most "
            f"{LOGITS_DIFFER[policy.head.dtype]:.0e}; the last checkpoint has the weights"
        )
    return gap


def probe_rollout(policy: Policy) -> Rollout:
    """The text with an image, for a trainer in other processes: its end counts as sampled, so that they say its log-probs."""
    ids, spans, blob = _probe(policy)
    sampled = np.arange(len(ids)) > (spans[-1].stop if spans else 0)  # not the mark behind the image
    return Rollout(
        prompt_uid="export",
        index=0,
        tokens=np.array(ids, np.int32),
        prompt_len=int(sampled.argmax()),
        sampled=sampled,
        logp=np.zeros(len(ids), np.float32),
        weight_version=np.where(sampled, 0, -1).astype(np.int32),
        images=(blob,) if spans else (),
        image_spans=spans,
        turns=(),
        outcome=Outcome.LENGTH,
    )


@torch.no_grad()
def check_logprobs(policy: Policy, rollout: Rollout, logp: np.ndarray, temperature: float, folder: Path) -> float:
    """As `check_logits`, for a trainer that is asked for log-probs alone.

    policy: of the same shape, whatever its weights. rollout: of `probe_rollout`. logp: the trainer's, [S], at `temperature`.

    Returns the mean difference over sampled tokens, as a share of their mean; see `LOGITS_DIFFER`.

    Raises:
        ModelError: it is larger, or not finite.
    """
    tokens = torch.from_numpy(rollout.tokens)[None].long()
    blob = next(iter(rollout.images), None)
    logits = _plain_logits(policy, folder, tokens, rollout.image_spans, blob)[0, :-1] / temperature
    theirs = logits.log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0].numpy()
    at = rollout.sampled[1:]
    gap = float(np.abs(theirs - logp[1:])[at].mean() / np.abs(logp[1:])[at].mean())
    if not gap <= LOGITS_DIFFER[policy.head.dtype]:  # nor is NaN
        raise ModelError(
            f"log-probs of plain transformers differ by {gap:.1e} of their size from the trainer's, expected at most "
            f"{LOGITS_DIFFER[policy.head.dtype]:.0e}; the last checkpoint has the weights"
        )
    return gap


def _plain_logits(policy: Policy, folder: Path, tokens: Tensor, spans: Sequence[ImageSpan], blob: ImageBlob | None) -> Tensor:
    """[1, S, V] float32, of transformers' own model with the weights of a folder. tokens: [1, S], with one image or none."""
    extra: dict[str, Tensor] = {}
    if spans and blob is not None:
        extra = {
            "pixel_values": policy.images(blob).pixels.to(policy.head.dtype),
            "image_grid_thw": torch.tensor([span.grid for span in spans]),
            "mm_token_type_ids": (tokens == policy.image_token_id).int(),
        }
    _plain_config(folder, policy.head.dtype)
    plain: Any = type(policy.model).from_pretrained(folder, attn_implementation="sdpa", local_files_only=True)
    return plain(input_ids=tokens, use_cache=False, **extra).logits.float()


def _probe(policy: Policy) -> tuple[list[int], tuple[ImageSpan, ...], ImageBlob]:
    """A text, with an image in its middle where the model reads images."""
    tilted = np.add.outer(np.arange(48), 2 * np.arange(64)).astype(np.uint8)
    buffer = BytesIO()
    Image.fromarray(np.stack([tilted, tilted.T.reshape(48, 64), 255 - tilted], -1)).save(buffer, "PNG")
    blob = ImageBlob.of(buffer.getvalue())
    tokenizer = policy.tokenizer
    before, after = (
        tokenizer.encode(text, add_special_tokens=False) for text in ("What is 17 + 4 here?", " It is 21, I think.")
    )
    if not policy.reads_images:
        return [*before, *after], (), blob
    start, end = (tokenizer.convert_tokens_to_ids(token) for token in (VISION_START, VISION_END))
    at, size = len(before) + 1, policy.images.num_tokens(blob)
    ids = [*before, start, *[policy.image_token_id] * size, end, *after]
    return ids, (ImageSpan(blob.sha256, at, at + size, policy.images.grid(blob)),), blob


def _check_written(folder: Path, dtype: torch.dtype) -> None:
    """
    Raises:
        ModelError: plain transformers would not load it, or loads another model.
    """
    FolderReader(folder).check(hf_shapes(_plain_config(folder, dtype)))
    load_tokenizer(folder)
    load_processor(folder)


def _plain_config(folder: Path, dtype: torch.dtype) -> PretrainedConfig:
    """
    Raises:
        ModelError: plain transformers cannot read it, or would load the weights in another dtype.
    """
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ModelError(f"transformers cannot read its config ({' '.join(str(error).split())[:300]})") from None
    if config.dtype != dtype:
        raise ModelError(f"its weights are loaded as {config.dtype}, expected {dtype}")
    return config


def _check_target(out: Path, source: Path) -> None:
    """
    Raises:
        CheckpointError: replacing `out` would take away the model that is trained, or what no export has written.
    """
    try:
        out = out.resolve()
        # also what is linked to: without it the source would be links to nowhere
        if any(path.resolve().is_relative_to(out) for path in (source, *source.glob("*"))):
            raise CheckpointError(
                f"cannot export to {out}: it is or holds the folder of the model that was trained; choose another one"
            )
        if out.exists() and (other := _not_exported(out)):
            raise CheckpointError(
                f"cannot export to {out}: it exists and holds no exported model, or more than that ({other}); "
                "choose another folder, or move it away"
            )
    except (OSError, RuntimeError) as error:  # RuntimeError: a link that leads to itself
        raise CheckpointError(f"cannot export to {out}: {' '.join(str(error).split())}; choose another folder") from None


def _not_exported(out: Path) -> str | None:
    """What shows that not all at `out` was written by an export; None where it was, and in an empty folder."""
    if not out.is_dir():
        return out.name
    paths = sorted(out.iterdir())
    known = {*COPIED, "config.json", INDEX, MARK}
    for path in paths:
        is_known = path.name in known or _WEIGHTS.fullmatch(path.name)
        if path.is_symlink() or not path.is_file() or not is_known:
            return path.name
    return f"no {MARK}" if paths and out / MARK not in paths else None


@contextmanager
def _new_export(out: Path, source: Path) -> Iterator[Path]:
    """Yield an empty folder to fill; when the block ends it becomes `out`, in place of an older export."""
    _check_target(out, source)
    out = out.resolve()  # a link is followed, not replaced
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        clean_leftovers(out.parent, out.name)
        with new_folder(out) as tmp:
            yield tmp
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot export the model to {out}: {' '.join(str(error).split())}; an earlier export there is unchanged; "
            "free some space or choose another folder"
        ) from error


def _with_dtype(config: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The config as it was, with another dtype at the top and wherever a part names one."""
    name = str(dtype).removeprefix("torch.")

    def named(tree: Mapping[str, Any]) -> dict[str, Any]:
        return {key: name for key in ("dtype", "torch_dtype") if key in tree}  # older versions read the second

    parts = {part: tree | named(tree) for part, tree in config.items() if isinstance(tree, dict)}
    return {**config, **parts, **(named(config) or {"dtype": name})}


def write_weights(
    tensors: Iterable[tuple[str, Tensor]], expected: Mapping[str, tuple[int, ...]], folder: Path, max_bytes: int
) -> torch.dtype:
    """Weight files, of at most so many bytes each, and their index if there are several; returns the dtype of all tensors.

    Raises:
        ValueError: the stream is not what was expected. CheckpointError: a tensor reads back as another one.
        OSError, SafetensorError: the disk failed.
    """
    dtypes: set[torch.dtype] = set()
    files: list[list[str]] = []
    held: dict[str, Tensor] = {}
    seen: set[str] = set()
    size = total = 0

    def flush() -> None:
        path = folder / _part(len(files))
        save_file(held, path, metadata={"format": "pt"})
        with safe_open(path, framework="pt") as file:
            for name, tensor in held.items():
                found = file.get_tensor(name)
                if found.dtype != tensor.dtype or not torch.equal(_bits(found), _bits(tensor)):
                    raise CheckpointError(f"{name} reads back from {path} as other than it was written; check disk and memory")
        files.append(list(held))
        held.clear()

    for name, tensor in tensors:
        if name in seen or expected.get(name) != tuple(tensor.shape):
            raise ValueError(f"{name} {tuple(tensor.shape)} came, expected {expected.get(name)}, once")
        if held and size + tensor.nbytes > max_bytes:
            flush()
            size = 0
        # a copy: what came may be a view of something larger, or be overwritten before the file is full
        held[name] = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
        seen.add(name)
        dtypes.add(tensor.dtype)
        size += tensor.nbytes
        total += tensor.nbytes
    if seen != expected.keys() or len(dtypes) != 1:
        lost = sorted(expected.keys() - seen)
        raise ValueError(
            f"{len(lost)} tensors did not come ({', '.join(lost[:3])}); dtypes {sorted(map(str, dtypes))}, expected one"
        )
    flush()
    if len(files) == 1:
        (folder / _part(0)).rename(folder / ONE_FILE)
        return dtypes.pop()
    where = {}
    for at, names in enumerate(files):
        final = f"model-{at + 1:05d}-of-{len(files):05d}.safetensors"
        (folder / _part(at)).rename(folder / final)
        where |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return dtypes.pop()


def _bits(tensor: Tensor) -> Tensor:
    """So that NaN equals itself."""
    return tensor.flatten().view(torch.uint8)


def _part(number: int) -> str:
    """Name of a weight file while it is not known how many there will be."""
    return f"part-{number}.safetensors"
