"""The command `metis-fast weights map`: which rank of a layout holds what of a model, checked without a single weight."""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import PretrainedConfig

from metis_fast import config as config_module
from metis_fast.checkpoint.safetensors_folder import FolderReader
from metis_fast.config import Config, MegatronConfig
from metis_fast.errors import ConfigError
from metis_fast.model_folder import hf_shapes, may_have
from metis_fast.plan.shape import read_model_config
from metis_fast.train.megatron.layout import Chunk, check, chunks, parts
from metis_fast.train.megatron.names import Param, num_bytes, params, verify

SIZES = (1, 2, 4, 8)
"""Tensor- and pipeline-parallel sizes that are tried where none is asked for."""

_CHUNKS = (1, 2, 3, 4)


def run(args: argparse.Namespace) -> int:
    """The command. Exit code 1: no layout can hold the model.

    Raises:
        MetisError: the model or the layout cannot be used, or its weights are not those of its config.
    """
    config = read_model_config(Config(), args.model)
    weights = _check_weights(args.model, config)
    asked = (args.tp, args.pp, args.vpp, args.first, args.last)
    if any(size is not None for size in asked):
        layout = _layout(*(default if size is None else size for size, default in zip(asked, (1, 1, 1, 0, 0), strict=True)))
        check(layout, config)
        number = verify(layout, config)
        print(_one_json(layout, config, number) if args.json else "\n".join([*weights, *_one_text(layout, config, number)]))
        return 0
    found = [(layout, *_tried(layout, config)) for layout in candidates(config)]
    taken = sum(1 for _, _, why in found if not why)
    if args.json:
        print(json.dumps([_named(layout) | ({"refused": why} if why else {"stage_bytes": b}) for layout, b, why in found]))
    else:
        sizes = [f"{min(b) / 1e9:.2f} to {max(b) / 1e9:.2f} GB a rank" if b else f"refused: {why}" for _, b, why in found]
        lines = [f"{_title(layout):26} {size}" for (layout, _, _), size in zip(found, sizes, strict=True)]
        lines.append(f"{taken} layouts: each of {len(hf_shapes(config))} tensors is held once, and comes back")
        print("\n".join([*weights, *lines]))
    return 0 if taken else 1


def _check_weights(model: Path, config: PretrainedConfig) -> list[str]:
    """Compare names and shapes of a folder's weights, if it has some, with its config; says so in a line."""
    if not model.is_dir() or not any(model.glob("*.safetensors")):
        return []
    reader = FolderReader(model)
    reader.check(hf_shapes(config), may_have(config))
    return [f"{model}: names and shapes of {len(reader.shapes)} tensors are those of config.json"]


def _layout(tensor: int, stages: int, interleaved: int, first: int = 0, last: int = 0) -> MegatronConfig:
    tree = {
        "tensor_parallel": tensor, "pipeline_parallel": stages, "virtual_pipeline": interleaved,
        "first_stage_layers": first, "last_stage_layers": last,
    }  # fmt: skip
    return config_module.build({"train": {"megatron": tree}}, "layout").train.megatron


def candidates(config: PretrainedConfig) -> Iterator[MegatronConfig]:
    """Layouts to try: every pair of `SIZES`, up to 4 chunks a stage; and where layers do not divide, the evenest cut."""
    layers = parts(config)[0].num_hidden_layers
    for tensor in SIZES:
        for stages in SIZES:
            yield from (_layout(tensor, stages, number) for number in (_CHUNKS if stages > 1 else (1,)))
            if layers % stages and (cut := _evenest(layers, stages)):
                yield _layout(tensor, stages, 1, *cut)


def _evenest(layers: int, stages: int) -> tuple[int, int] | None:
    """Layers of the first and the last stage that leave equal numbers to the others and differ least from them."""
    cuts: list[tuple[int, int, int]] = []
    for first in range(1, layers):
        for last in range(1, layers - first + 1):
            rest, middle = layers - first - last, stages - 2
            if (rest == 0) if middle == 0 else (rest > 0 and rest % middle == 0):
                sizes = (first, last, rest // middle if middle else first)
                cuts.append((max(sizes) - min(sizes), first, last))
    return min(cuts)[1:] if cuts else None


def _tried(layout: MegatronConfig, config: PretrainedConfig) -> tuple[list[int], str]:
    """Bytes of a rank of every stage, or why the layout is refused."""
    try:
        check(layout, config)
    except ConfigError as error:
        return [], str(error)
    verify(layout, config)
    return [sum(num_bytes(held, _dtype(config)) for _, held in stage) for stage in _stages(layout, config)], ""


def _stages(layout: MegatronConfig, config: PretrainedConfig) -> list[list[tuple[Chunk, tuple[Param, ...]]]]:
    layers = parts(config)[0].num_hidden_layers
    return [[(chunk, params(layout, config, chunk)) for chunk in stage] for stage in chunks(layout, layers)]


def _dtype(config: PretrainedConfig) -> torch.dtype:
    """Of the weights, as far as config.json says it."""
    for named in (config.dtype, parts(config)[0].dtype):
        if named is not None:
            return getattr(torch, named) if isinstance(named, str) else named
    return torch.bfloat16


def _named(layout: MegatronConfig) -> dict[str, object]:
    names = ("tensor_parallel", "pipeline_parallel", "virtual_pipeline", "first_stage_layers", "last_stage_layers")
    return {name: getattr(layout, name) for name in names}


def _title(layout: MegatronConfig) -> str:
    title = f"tp {layout.tensor_parallel} pp {layout.pipeline_parallel}"
    if layout.virtual_pipeline > 1:
        title += f" vpp {layout.virtual_pipeline}"
    if layout.first_stage_layers or layout.last_stage_layers:
        title += f" first {layout.first_stage_layers} last {layout.last_stage_layers}"
    return title


def _ranks(stage: int, layout: MegatronConfig) -> list[int]:
    """As numbered where there is one replica."""
    return [stage * layout.tensor_parallel + tensor for tensor in range(layout.tensor_parallel)]


def _one_json(layout: MegatronConfig, config: PretrainedConfig, number: int) -> str:
    dtype = _dtype(config)
    stages = [
        {
            "ranks": _ranks(at, layout),
            "bytes": sum(num_bytes(held, dtype) for _, held in stage),
            "chunks": [
                {
                    "layers": [chunk.start, chunk.stop],
                    "params": [asdict(param) | {"bytes": num_bytes([param], dtype)} for param in held],
                }
                for chunk, held in stage
            ],
        }
        for at, stage in enumerate(_stages(layout, config))
    ]
    return json.dumps(_named(layout) | {"dtype": str(dtype).removeprefix("torch."), "tensors": number, "stages": stages})


def _one_text(layout: MegatronConfig, config: PretrainedConfig, number: int) -> Iterator[str]:
    dtype = _dtype(config)
    yield f"{_title(layout)}, {str(dtype).removeprefix('torch.')}: each of {number} tensors is held once, and comes back"
    for at, stage in enumerate(_stages(layout, config)):
        ranks, total = _ranks(at, layout), sum(num_bytes(held, dtype) for _, held in stage)
        yield ""
        which = f"ranks {ranks[0]} to {ranks[-1]}, each" if len(ranks) > 1 else f"rank {ranks[0]},"
        yield f"stage {at}: {which} {total / 1e9:.3f} GB"
        for chunk, held in stage:
            yield f"  layers {chunk.start} to {chunk.stop - 1}"
            yield from _rows(held, dtype)


def _rows(held: Sequence[Param], dtype: torch.dtype) -> Iterator[str]:
    """A line for all parameters whose names differ in their numbers only."""
    alike: dict[tuple[str, str, tuple[int, ...]], list[Param]] = {}
    for param in held:
        first, *others = (re.sub(r"\.\d+\.", ".*.", source) for source in param.sources)
        sources = " + ".join([first, *(other.split(".")[-2] for other in others)])
        alike.setdefault((re.sub(r"\.\d+\.", ".*.", param.name), f"{param.kind}: {sources}", param.shape), []).append(param)
    for (name, source, shape), group in alike.items():
        size = num_bytes(group, dtype) / 1e6
        yield f"    {len(group):3} x {name:52} {'x'.join(map(str, shape)):16} {size:9.2f} MB  {source}"
