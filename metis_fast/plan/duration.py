"""Seconds of a training step under a layout, by what they are spent on. All of it is predicted: docs/plan.md has the formulas.

Letters: t tensor-parallel ranks, b bytes of an element, H hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields

from metis_fast.config import Config, MegatronConfig
from metis_fast.plan.gpus import NODE, Efficiency, Gpu
from metis_fast.plan.memory import ELEMENT
from metis_fast.plan.shape import Shape
from metis_fast.plan.workload import MiniBatch, Workload, mini_batch
from metis_fast.train.flops import FlopModel
from metis_fast.train.megatron.layout import chunks

_TAIL = 1.3
"""Longest rollouts against the mean once the engine's batch runs empty. An assumption."""

_ENGINE_ALONE = 0.85
"""Share of the memory that an engine takes which has GPUs of its own, or while the trainer's are free."""


# Bytes a second of weights on their way to engines, through the hosts' memory:
_OBJECTS = 1.0e9  # Ray's objects into another machine: 0.8 to 1.0 between two Ray nodes over loopback; over a network, assumed
_GATHER = 0.7e9  # ranks to a run of their machine: 0.56 to 0.85 ("Megatron-core 0.16.1 without Transformer Engine")
_STAGE = 2.0e9  # copied into shared memory and checked: 2.2 to 2.7 for the copy on a busy machine once warm, 3.5 for CRC-32
_LOAD = 4.6e9  # an engine: 17.5 GB in 3.8 s on an H100 (docs/rollouts.md)

# Of changes (sync.mode=delta) where a tenth of the elements changed, which is assumed (docs/rollouts.md):
DELTA_SHARE = 0.15
"""Of the bytes: 40 of 268 MB."""
ENCODE, DECODE = 0.3e9, 0.7e9
"""Bytes of the weights a second that one thread finds changes in, or makes of them again; there 0.3 and 0.7 on busy cores."""
_ENCODERS, _DECODERS = 8, 4  # threads at each end, at most


@dataclass(frozen=True, slots=True)
class StepSeconds:
    """Of one training step: rollouts, then passes for old log-probabilities, then the update's parts, then the weights' way to
    the engine. bubble: ranks that wait for others (stages that fill and drain, uneven stages, uneven shares of passes) and
    what stages send each other."""

    rollout: float
    old_logprobs: float
    dense: float
    attention: float
    head: float
    vision: float
    tensor_parallel: float
    bubble: float
    data_parallel: float
    optimizer: float
    weight_sync: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(getattr(self, part.name) for part in fields(self))


@dataclass(frozen=True, slots=True)
class _PassSeconds:
    """Of one pass, summed over the stages; bottleneck: of the slowest stage."""

    dense: float
    attention: float
    head: float
    vision: float
    tensor_parallel: float
    bottleneck: float


@dataclass(frozen=True, slots=True)
class Setting:
    """What predictions start from. engine_share: of a GPU's memory that the engine keeps; 0: it is elsewhere or asleep.

    plays: whether there are rollouts; a cold start has none.
    """

    config: Config
    shape: Shape
    flops: FlopModel
    load: Workload
    gpu: Gpu
    num_gpus: int
    engine_share: float
    reached: Efficiency = field(default_factory=Efficiency)
    plays: bool = True

    @property
    def asleep(self) -> bool:
        """Whether engine and trainer take turns on the same GPUs."""
        return self.engine_share == 0 and self.config.rollout.vllm.sleep

    @property
    def engine_awake(self) -> float:
        """Share of a GPU's memory that an engine has while it samples."""
        return self.engine_share or (self.config.rollout.vllm.gpu_memory if self.asleep else _ENGINE_ALONE)


def step_seconds(setting: Setting, layout: MegatronConfig) -> StepSeconds:
    """One step: rollouts and update one after the other."""
    config, data, stages = setting.config, layout.data_parallel, layout.pipeline_parallel
    steps = config.rollout.prompts_per_step // config.train.prompts_per_mini_batch
    batch = mini_batch(config, setting.load, setting.flops)
    train = _pass(setting, layout, batch, backward=True)
    forward = _pass(setting, layout, batch, backward=False)
    owed = 0 if config.loss.proximal == "engine" else steps - 1 if config.train.skip_old_logprobs else steps
    owed += steps if config.loss.kl_coef else 0  # under the reference policy
    per_rank = batch.passes / data
    busy, whole = per_rank / stages, _waves(layout, batch) * train.bottleneck
    used = (train.dense + train.attention + train.head + train.vision + train.tensor_parallel) * busy
    return StepSeconds(
        rollout=_rollout(setting) if setting.plays else 0.0,
        old_logprobs=owed * _waves(layout, batch) * forward.bottleneck,
        dense=steps * busy * train.dense,
        attention=steps * busy * train.attention,
        head=steps * busy * train.head,
        vision=steps * busy * train.vision,
        tensor_parallel=steps * busy * train.tensor_parallel,
        bubble=steps * (whole - used + _transfers(setting, layout, batch)),
        data_parallel=steps * _reduction(setting, layout, train.bottleneck * 2 / 3),
        optimizer=steps * _optimizer(setting, layout),
        weight_sync=_weight_sync(setting) if setting.plays else 0.0,
    )


def _waves(layout: MegatronConfig, batch: MiniBatch) -> float:
    """Passes through the slowest stage, one after the other, filling and draining included."""
    passes = -(-batch.passes // layout.data_parallel)
    if layout.virtual_pipeline > 1:
        passes = -(-passes // layout.pipeline_parallel) * layout.pipeline_parallel
    return passes + (layout.pipeline_parallel - 1) / layout.virtual_pipeline


def _pass(setting: Setting, layout: MegatronConfig, batch: MiniBatch, backward: bool) -> _PassSeconds:
    shape, gpu, reached, flops = setting.shape, setting.gpu, setting.reached, setting.flops
    t, freeze = layout.tensor_parallel, setting.config.model.freeze
    again = layout.recompute if backward else "none"
    # shares of a forward pass that are run again
    share = 3 * shape.hidden * shape.intermediate / sum(size for size in shape.layer_parameters(1) if size > shape.hidden)
    more = {"none": 0.0, "selective": share, "full": 1.0}[again]
    layers = shape.layers
    peak = gpu.flops * (1.0 if setting.config.model.dtype == "bfloat16" else 1 / 15)  # float32 has no tensor cores
    dense = flops.token * batch.tokens / layers * ((3 if backward else 1) + more) / t / (peak * reached.dense)
    times = 1 + (2.5 if backward else 0) + (1 if again == "full" else 0)
    attention = flops.pair * batch.pairs / layers * times / t / (peak * reached.attention)
    products = 1 if not backward else 2 if "embeddings" in freeze else 3
    head = flops.row * batch.rows * products / t / (peak * reached.head)
    trained = backward and "vision" not in freeze
    runs = 1 + (2 if trained else 0) + (1 if trained and again != "none" else 0)
    vision = batch.image_flops * runs / (peak * reached.vision)  # whole on every tensor-parallel rank
    link = (gpu.nvlink if t <= NODE else gpu.network) * reached.link
    element = ELEMENT[setting.config.model.dtype]
    # in all-reduces of [tokens, H]: two a direction; the sequence's parts are gathered again for the weights' gradients
    reduces = 2.0 + (2.0 + layout.sequence_parallel if backward else 0)
    reduces += {"none": 0.0, "selective": 1.0, "full": 2.0}[again]
    between = reduces * 2 * (t - 1) / t * batch.tokens * shape.hidden * element / link
    stages = [
        sum(chunk.stop - chunk.start for chunk in stage) * (dense + attention + between)
        + (vision if stage[0].first else 0)
        + (head if stage[-1].last else 0)
        for stage in chunks(layout, layers)
    ]
    return _PassSeconds(layers * dense, layers * attention, head, vision, layers * between, max(stages))


def _transfers(setting: Setting, layout: MegatronConfig, batch: MiniBatch) -> float:
    if layout.pipeline_parallel == 1:
        return 0.0
    gpu = setting.gpu
    split = layout.tensor_parallel if layout.sequence_parallel else 1
    moved = batch.tokens * setting.shape.hidden * ELEMENT[setting.config.model.dtype] / split
    link = gpu.nvlink if setting.num_gpus <= NODE else gpu.network
    # there and back, once a chunk; only what fills and drains the pipeline is waited for
    return 2 * (layout.pipeline_parallel - 1) * layout.virtual_pipeline * moved / (link * setting.reached.link)


def _rank_parameters(setting: Setting, layout: MegatronConfig) -> float:
    """Of the first stage, which has the tower."""
    shape = setting.shape
    first = chunks(layout, shape.layers)[0]
    layers = sum(chunk.stop - chunk.start for chunk in first)
    tower = sum(shape.tower.parameters()) if shape.tower is not None else 0
    embedding = shape.vocab * shape.hidden / layout.tensor_parallel
    return layers * sum(shape.layer_parameters(layout.tensor_parallel)) + embedding + tower


def _reduction(setting: Setting, layout: MegatronConfig, backward: float) -> float:
    """float32 gradients scattered, hidden behind the last backward pass as far as that reaches; weights gathered."""
    data = layout.data_parallel
    if data == 1:
        return 0.0
    within = layout.tensor_parallel * data <= NODE
    link = (setting.gpu.nvlink if within else setting.gpu.network) * setting.reached.link
    moved = _rank_parameters(setting, layout) * (data - 1) / data
    gathers = ELEMENT[setting.config.model.dtype] if layout.distributed_optimizer else 4
    return max(0.0, 4 * moved / link - backward) + gathers * moved / link


def _optimizer(setting: Setting, layout: MegatronConfig) -> float:
    """Masters and both moments read and written, gradients read, weights written: 30 bytes a parameter."""
    split = layout.data_parallel if layout.distributed_optimizer else 1
    return 30 * _rank_parameters(setting, layout) / split / (setting.gpu.bandwidth * setting.reached.memory)


def _weight_sync(setting: Setting) -> float:
    """Every engine is given the whole model in bfloat16: between GPUs, or staged in its machine's memory, which each machine
    gets once, whatever their number: Ray passes objects on from those that have them. With `sync.mode=delta` machines pull
    changes, found where weights are published and made into weights where they arrive."""
    size, spread, sync = 2 * setting.shape.num_parameters, setting.num_gpus > NODE, setting.config.sync
    if sync.transport != "staged":
        return size / ((setting.gpu.network if spread else setting.gpu.nvlink) * setting.reached.link)
    away = spread or (setting.engine_share == 0 and not setting.asleep)  # engines with machines of their own
    with_ray = setting.config.workers.launcher == "ray"
    arrives = size / (_OBJECTS if away else _STAGE if with_ray else _GATHER)
    if sync.mode == "delta" and (away or with_ray):
        arrives = (arrives * DELTA_SHARE if away else arrives) + size / (_ENCODERS * ENCODE) + size / (_DECODERS * DECODE)
    return arrives + size / _STAGE + size / _LOAD


def engine_tokens(setting: Setting) -> float:
    """Tokens whose keys and values an engine on one GPU can hold."""
    return (setting.engine_awake * setting.gpu.memory - 2 * setting.shape.num_parameters) / setting.shape.kv_bytes


def _rollout(setting: Setting) -> float:
    """One engine a GPU, whole. Prompts and observations are prefilled; a decoded token of the batch reads the weights once and
    each rollout's keys and values."""
    config, load, shape, gpu, reached = setting.config.rollout, setting.load, setting.shape, setting.gpu, setting.reached
    rollouts = config.prompts_per_step * config.rollouts_per_prompt / setting.num_gpus
    prompts = config.prompts_per_step / setting.num_gpus
    held = load.prompt / config.rollouts_per_prompt + load.response  # a prompt is cached once for its group
    batch = max(1.0, min(rollouts, config.max_concurrent / setting.num_gpus, engine_tokens(setting) / held))
    written = load.response * load.sampled
    read = 2 * shape.num_parameters + batch * (load.prompt + load.response / 2) * shape.kv_bytes
    compute = batch * (setting.flops.token + setting.flops.row) / (gpu.flops * reached.prefill)
    token = max(read / (gpu.bandwidth * reached.memory), compute)
    prefilled = prompts * load.prompt + rollouts * load.response * (1 - load.sampled)
    prefill = setting.flops.token * prefilled / (gpu.flops * reached.prefill)
    return written * token * (max(rollouts / batch, 1.0) - 1 + _TAIL) + prefill
