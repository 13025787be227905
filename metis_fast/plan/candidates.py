"""Every layout that can run on so many GPUs, what it needs and how long its step takes, best first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from transformers import PretrainedConfig

from metis_fast.config import MegatronConfig
from metis_fast.errors import ConfigError
from metis_fast.plan.duration import Setting, StepSeconds, step_seconds
from metis_fast.plan.gpus import NODE
from metis_fast.plan.memory import Pass, RankMemory, stage_memory
from metis_fast.train.megatron.layout import check, place

_MOST_CHUNKS = 4
"""Chunks a stage that are tried; more send more often than they hide."""

_UNEVEN = 8
"""Layers by which the first and last stage may differ from an even share."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """memory: of the worst rank, at `stage`. own: it is the config's layout.

    awake: bytes of a GPU while an engine that sleeps during the update samples; 0 where none does.
    """

    layout: MegatronConfig
    memory: RankMemory
    stage: int
    seconds: StepSeconds
    fits: bool
    own: bool = False
    awake: int = 0


def evaluate(setting: Setting, layout: MegatronConfig, own: bool = False) -> Candidate:
    """A layout that `layout.check` takes."""
    engine = int(setting.engine_share * setting.gpu.memory)
    size = Pass.largest(setting.config, setting.shape)
    step = layout.tensor_parallel * layout.data_parallel
    ranks = [
        stage_memory(
            setting.config, setting.shape, layout, place(stage * step, layout), size, engine, gpu_memory=setting.gpu.memory
        )
        for stage in range(layout.pipeline_parallel)
    ]
    worst = max(range(len(ranks)), key=lambda stage: ranks[stage].total)
    awake = 0
    if setting.asleep:  # while it is awake, what the trainer keeps between updates is there, too
        awake = int(max(rank.persistent + rank.reserve for rank in ranks) + setting.engine_awake * setting.gpu.memory)
    fits = max(ranks[worst].total, awake) <= setting.gpu.memory
    return Candidate(layout, ranks[worst], worst, step_seconds(setting, layout), fits, own, awake)


def candidates(setting: Setting, model_config: PretrainedConfig, own: MegatronConfig | None) -> list[Candidate]:
    """One for each tensor x pipeline x virtual x data parallel size and recompute, with the best cut into stages; first those
    that fit, by time, then the others, by memory. own: the config's layout, kept as it stands.

    Raises:
        ConfigError: none is valid.
    """
    found: dict[tuple[object, ...], Candidate] = {}
    if own is not None:
        found[_key(own)] = evaluate(setting, own, own=True)
    for layout in _layouts(setting, model_config, own or setting.config.train.megatron):
        if own is not None and _key(layout) == _key(own):
            continue
        one = evaluate(setting, layout)
        best = found.get(_key(layout))
        if best is None or _order(one) < _order(best):
            found[_key(layout)] = one
    if not found:
        raise ConfigError(
            f"no layout of {setting.num_gpus} GPUs divides this model's heads, layers and vocabulary; "
            "set --gpus to a power of two"
        )
    return sorted(found.values(), key=_order)


def _order(one: Candidate) -> tuple[bool, float, int]:
    # among those that do not fit, the nearest
    return (not one.fits, one.seconds.total if one.fits else one.memory.total, one.memory.total)


def _key(layout: MegatronConfig) -> tuple[object, ...]:
    return (
        layout.tensor_parallel, layout.pipeline_parallel, layout.virtual_pipeline, layout.data_parallel, layout.recompute,
        layout.sequence_parallel, layout.distributed_optimizer,
    )  # fmt: skip


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def _layouts(setting: Setting, model_config: PretrainedConfig, like: MegatronConfig) -> Iterator[MegatronConfig]:
    gpus, layers = setting.num_gpus, setting.shape.layers
    for tensor in _divisors(gpus):
        if tensor > NODE:  # over the network every layer would wait
            break
        for stages in _divisors(gpus // tensor):
            if stages > layers:
                break
            for chunks, first, last in _cuts(layers, stages):
                for recompute in ("none", "selective", "full"):
                    layout = like.model_copy(
                        update={
                            "tensor_parallel": tensor,
                            "pipeline_parallel": stages,
                            "virtual_pipeline": chunks,
                            "data_parallel": gpus // tensor // stages,
                            "sequence_parallel": tensor > 1,
                            "first_stage_layers": first,
                            "last_stage_layers": last,
                            "distributed_optimizer": True,
                            "recompute": recompute,
                        }
                    )
                    try:
                        check(layout, model_config)
                    except ConfigError:
                        continue
                    yield layout


def _cuts(layers: int, stages: int) -> Iterator[tuple[int, int, int]]:
    """(chunks a stage, layers of the first, of the last stage; 0: even)."""
    if layers % stages == 0:
        yield 1, 0, 0
        if stages > 1:
            yield from ((chunks, 0, 0) for chunks in range(2, _MOST_CHUNKS + 1) if layers % (stages * chunks) == 0)
    if stages == 1:
        return
    even = layers // stages
    near = range(max(1, even - _UNEVEN), even + _UNEVEN + 1)
    for first in near:
        for last in near:
            rest = layers - first - last
            if (stages == 2 and rest == 0) or (stages > 2 and rest > 0 and rest % (stages - 2) == 0):
                yield 1, first, last
