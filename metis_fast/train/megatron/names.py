"""Hugging Face names and shapes of Qwen3-VL and Qwen3 <-> the parameters of a `MegatronPolicy`, both ways. Needs no megatron.

Split over T tensor-parallel ranks:

rows       of embedding, LM head, q, k, v, gate and up: rank r has the r-th T-th
columns    of o and down: likewise
whole      norms and the vision tower: the same on every rank

Megatron-core fuses what it multiplies by at once. Of q, k and v, every key/value head has the rows of its query heads, its key
rows, its value rows; gate stands above up within every rank's part. `fuse` and `split` do that for any number of groups.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

import torch
from torch import Tensor
from transformers import PretrainedConfig

from metis_fast.config import MegatronConfig
from metis_fast.errors import ModelError
from metis_fast.model_folder import GATE_UP, QKV, hf_shapes
from metis_fast.train.megatron.layout import Chunk, chunks, parts

Kind = Literal["whole", "rows", "columns", "qkv", "gate_up", "tied"]
"""tied: rows of an embedding that the first chunk has as well; it is read twice and leaves from there."""

Read = Callable[[str, int, int, int], Tensor]
"""(Hugging Face name, dim, start, stop) -> that slice."""

_Row = tuple[str, Kind, tuple[str, ...]]

# Of a decoder layer: our name, how it is cut, the names that it is made of; all without ".weight".
LAYER: tuple[_Row, ...] = (
    ("input_layernorm", "whole", ("input_layernorm",)),
    ("self_attention.linear_proj", "columns", ("self_attn.o_proj",)),
    ("self_attention.linear_qkv", "qkv", tuple(f"self_attn.{name}" for name in QKV)),
    ("self_attention.q_layernorm", "whole", ("self_attn.q_norm",)),
    ("self_attention.k_layernorm", "whole", ("self_attn.k_norm",)),
    ("pre_mlp_layernorm", "whole", ("post_attention_layernorm",)),
    ("mlp.linear_fc1", "gate_up", tuple(f"mlp.{name}" for name in GATE_UP)),
    ("mlp.linear_fc2", "columns", ("mlp.down_proj",)),
)

_HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True)
class Param:
    """A parameter of a chunk. sources: Hugging Face names. shape: on one tensor-parallel rank."""

    name: str
    sources: tuple[str, ...]
    kind: Kind
    shape: tuple[int, ...]


def fuse(parts: Sequence[Tensor], groups: int) -> Tensor:
    """Rows of several matrices as one: for each of `groups` equal parts, those of the first matrix, of the second, ...

    groups: 1 stacks the matrices.
    """
    return torch.cat([part.unflatten(0, (groups, -1)) for part in parts], dim=1).flatten(0, 1)


def split(fused: Tensor, shares: Sequence[int], groups: int) -> tuple[Tensor, ...]:
    """What `fuse` put together. shares: ratio of the matrices' rows."""
    grouped = fused.unflatten(0, (groups, -1))
    unit = grouped.shape[1] // sum(shares)
    return tuple(part.flatten(0, 1) for part in grouped.split([unit * share for share in shares], dim=1))


def params(layout: MegatronConfig, config: PretrainedConfig, chunk: Chunk) -> tuple[Param, ...]:
    """The parameters of a chunk.

    Raises:
        ModelError: a layer has weights that the policy has no place for.
    """
    shapes = hf_shapes(config)
    _, vision = parts(config)
    decoder = "model." if vision is None else "model.language_model."
    rows: list[_Row] = []
    if chunk.first:
        rows.append(("embedding.word_embeddings.weight", "rows", (f"{decoder}embed_tokens.weight",)))
        rows.extend((name.removeprefix("model."), "whole", (name,)) for name in shapes if name.startswith("model.visual."))
    for index, layer in enumerate(range(chunk.start, chunk.stop)):
        prefix = f"{decoder}layers.{layer}."
        rows.extend(
            (f"decoder.layers.{index}.{name}.weight", kind, tuple(f"{prefix}{source}.weight" for source in sources))
            for name, kind, sources in LAYER
        )
        placed = {f"{prefix}{source}.weight" for _, _, sources in LAYER for source in sources}
        unplaced = [name for name in shapes if name.startswith(prefix) and name not in placed]
        if unplaced:
            raise ModelError(f"train.backend=megatron has no place for {', '.join(unplaced)}; set train.backend=torch")
    if chunk.last:
        rows.append(("decoder.final_layernorm.weight", "whole", (f"{decoder}norm.weight",)))
        if not config.tie_word_embeddings:
            rows.append(("output_layer.weight", "rows", (_HEAD,)))
        elif not chunk.first:
            rows.append(("output_layer.weight", "tied", (f"{decoder}embed_tokens.weight",)))
    return tuple(
        Param(name, sources, kind, _local_shape([shapes[source] for source in sources], kind, layout.tensor_parallel))
        for name, kind, sources in rows
    )


def _axis(kind: Kind) -> int:
    return 1 if kind == "columns" else 0


def _local_shape(sources: Sequence[tuple[int, ...]], kind: Kind, ranks: int) -> tuple[int, ...]:
    if kind == "whole":
        return sources[0]
    shape, axis = list(sources[0]), _axis(kind)
    shape[axis] = sum(source[axis] for source in sources) // ranks
    return tuple(shape)


def _fusion(param: Param, config: PretrainedConfig, ranks: int) -> tuple[tuple[int, ...], int]:
    """`shares` and `groups` of a parameter on one of so many ranks."""
    text, _ = parts(config)
    if param.kind == "qkv":
        keys = text.num_key_value_heads or text.num_attention_heads
        return (text.num_attention_heads // keys, 1, 1), keys // ranks
    return (1,) * len(param.sources), 1


def local(param: Param, tensor_rank: int, layout: MegatronConfig, config: PretrainedConfig, read: Read) -> Tensor:
    """A parameter as a tensor-parallel rank holds it; only that much is read."""
    shares, groups = _fusion(param, config, layout.tensor_parallel)
    axis = _axis(param.kind)
    place = 0 if param.kind == "whole" else tensor_rank
    unit = param.shape[axis] // sum(shares)
    pieces = [
        read(source, axis, place * unit * share, (place + 1) * unit * share)
        for source, share in zip(param.sources, shares, strict=True)
    ]
    return pieces[0] if len(pieces) == 1 else fuse(pieces, groups)


def whole(param: Param, shards: Sequence[Tensor], config: PretrainedConfig) -> dict[str, Tensor]:
    """Hugging Face tensors from those of all tensor-parallel ranks, in their order; also of gradients.

    Nothing comes of a tied copy, so that all parameters of all chunks together give every tensor once.
    """
    if param.kind == "tied":
        return {}
    if param.kind == "whole":
        return {param.sources[0]: shards[0]}
    if param.kind == "columns":
        return {param.sources[0]: torch.cat(list(shards), dim=1)}
    shares, groups = _fusion(param, config, len(shards))
    pieces = zip(*(split(shard, shares, groups) for shard in shards), strict=True)
    return {source: torch.cat(piece) for source, piece in zip(param.sources, pieces, strict=True)}


def verify(layout: MegatronConfig, config: PretrainedConfig) -> int:
    """Go through the names and shapes of all ranks and back, without data; returns the number of Hugging Face tensors.

    layout: one that `layout.check` takes.

    Raises:
        ModelError: a tensor is read in part, twice or never, or comes back in another shape, or not once.
    """
    text, _ = parts(config)
    shapes, ranks = hf_shapes(config), range(layout.tensor_parallel)
    taken_from: Counter[str] = Counter()
    back: Counter[str] = Counter()
    for chunk in (chunk for stage in chunks(layout, text.num_hidden_layers) for chunk in stage):
        for param in params(layout, config, chunk):
            slices: dict[str, list[tuple[int, int, int]]] = {source: [] for source in param.sources}

            def read(name: str, dim: int, start: int, stop: int, into: dict[str, list] = slices) -> Tensor:
                into[name].append((dim, start, stop))
                shape = list(shapes[name])
                shape[dim] = min(stop, shape[dim]) - start
                return torch.empty(shape, device="meta")

            shards = [local(param, rank, layout, config, read) for rank in ranks]
            wrong = [shard.shape for shard in shards if shard.shape != param.shape]
            for source, taken in slices.items():
                if not _covers(taken, shapes[source], everything=param.kind == "whole"):
                    raise ModelError(f"{param.name}: the ranks read {taken} of {source} {shapes[source]}, not all of it once")
                taken_from[source] += param.kind != "tied"
            found = whole(param, shards, config)
            wrong += [tensor.shape for name, tensor in found.items() if tensor.shape != shapes[name]]
            if wrong:
                raise ModelError(f"{param.name}: shapes {[list(shape) for shape in wrong]} do not fit {param}")
            back.update(found.keys())
    expected = Counter(shapes.keys())
    for what, seen in (("read", taken_from), ("written", back)):
        if seen != expected:
            odd = sorted(name for name in seen.keys() | expected.keys() if seen[name] != expected[name])
            raise ModelError(f"{len(odd)} tensors would not be {what} once, such as {', '.join(odd[:3])}")
    return len(shapes)


def _covers(taken: Sequence[tuple[int, int, int]], shape: tuple[int, ...], *, everything: bool) -> bool:
    """Whether slices of the ranks tile a tensor, or each is all of it."""
    if everything:
        return all(one == (0, 0, shape[0]) for one in taken)
    dim = taken[0][0]
    bounds = [0, *(stop for _, _, stop in taken)]
    return bounds[-1] == shape[dim] and all(one == (dim, bounds[i], bounds[i + 1]) for i, one in enumerate(taken))


def num_bytes(found: Sequence[Param], dtype: torch.dtype) -> int:
    """Of parameters on one rank."""
    return sum(prod(param.shape) for param in found) * dtype.itemsize
