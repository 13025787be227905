"""The command `metis-fast plan`: settings read, layouts compared, a table or JSON printed."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, fields

from transformers import PretrainedConfig

from metis_fast import config as config_module
from metis_fast.config import Config, MegatronConfig
from metis_fast.errors import ConfigError
from metis_fast.plan.candidates import Candidate, candidates, evaluate
from metis_fast.plan.cold_start import as_planned, is_cold_start
from metis_fast.plan.duration import Setting, engine_tokens
from metis_fast.plan.gpus import GIB, GPUS, NODE, Gpu
from metis_fast.plan.host import Host, host
from metis_fast.plan.host import to_json as host_json
from metis_fast.plan.host import to_lines as host_lines
from metis_fast.plan.host_load import HostOptions
from metis_fast.plan.shape import Shape, read_model_config
from metis_fast.plan.workload import Workload
from metis_fast.train.flops import FlopModel
from metis_fast.train.megatron.layout import check

_ROWS = 12
"""Layouts in the table; --json has all."""
_ENGINE_SHARE = 0.3


def run(args: argparse.Namespace) -> int:
    """The command. Exit code 1: the config's own layout does not fit, or no layout does.

    Raises:
        ConfigError: what cannot be planned, and what to change.
    """
    config = config_module.load(args.config, args.overrides)
    plays = not is_cold_start(config)
    config = config if plays else as_planned(config)
    model_config = read_model_config(config, args.model)
    own = config.train.megatron if config.train.backend == "megatron" else None
    gpus = args.gpus if args.gpus is not None else own.num_ranks if own is not None else NODE
    if gpus < 1 or (gpus > NODE and gpus % NODE):
        raise ConfigError(
            f"--gpus: expected at most {NODE}, or a multiple of {NODE} (whole nodes), got {gpus}; "
            "set --gpus, or the sizes in train.megatron"
        )
    engine_share = args.engine_share if args.engine_share is not None else _engine_share(config, plays)
    if not 0 <= engine_share < 1:
        raise ConfigError(f"--engine-share: expected a share from 0 to below 1, got {engine_share}")
    if own is not None and own.num_ranks != gpus:
        own = None
    if own is not None:
        check(own, model_config)
    load = Workload.of(
        config,
        args.prompt_tokens,
        args.response_tokens,
        sampled=args.sampled,
        images=args.images if getattr(model_config, "vision_config", None) is not None else 0,
        image_tokens=args.image_tokens,
        uniform=args.uniform if plays else 0.0,
    )
    # an option that the command line has not keeps its default
    given = {field.name: getattr(args, field.name) for field in fields(HostOptions) if hasattr(args, field.name)}
    options = HostOptions(**given)
    shape, gpu = Shape.of(model_config), GPUS[args.gpu]
    setting = Setting(config, shape, FlopModel.of(model_config), load, gpu, gpus, engine_share, plays=plays)
    longest = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
    if plays and engine_tokens(setting) < longest:
        needed = (2 * shape.num_parameters + longest * shape.kv_bytes) / gpu.memory
        raise ConfigError(
            f"an engine with {engine_share:.2f} of a GPU's memory cannot hold the weights and one rollout of {longest} "
            f"tokens; set --engine-share to {needed:.2f} or more, or to 0 where it has GPUs of its own"
        )
    options.check(config.rollout)
    found = candidates(setting, model_config, own)
    around = host(setting, recommended(found), options) if plays else None
    said = json.dumps(to_json(setting, args.gpu, found, around)) if args.json else to_text(setting, args.gpu, found, around)
    print(said)
    return exit_code(found)


def own_layout(config: Config, model_config: PretrainedConfig, gpu: Gpu) -> Candidate:
    """The config's own layout on such GPUs, with the command's assumptions.

    Raises:
        ConfigError: the model cannot be cut so.
    """
    plays = not is_cold_start(config)
    config = config if plays else as_planned(config)
    check(config.train.megatron, model_config)
    images = int(getattr(model_config, "vision_config", None) is not None)
    tokens = min(1024, config.rollout.max_prompt_tokens // 16)  # of a prompt of mean length, half
    uniform = 0.2 if plays else 0.0
    load = Workload.of(config, None, None, sampled=0.5, images=images, image_tokens=max(1, tokens), uniform=uniform)
    num, share = config.train.megatron.num_ranks, _engine_share(config, plays)
    setting = Setting(config, Shape.of(model_config), FlopModel.of(model_config), load, gpu, num, share, plays=plays)
    return evaluate(setting, config.train.megatron, own=True)


def _engine_share(config: Config, plays: bool) -> float:
    return _ENGINE_SHARE if plays and not config.rollout.vllm.sleep else 0.0


def recommended(found: Sequence[Candidate]) -> Candidate:
    """The config's own layout where it fits, else the first one."""
    return next((one for one in found if one.own and one.fits), found[0])


def exit_code(found: Sequence[Candidate]) -> int:
    """0 if the config's own layout fits, or, where it is not among them, any does; else 1."""
    own = [one for one in found if one.own]
    return 0 if any(one.fits for one in own or found) else 1


def _layout(layout: MegatronConfig) -> dict[str, object]:
    names = (
        "tensor_parallel", "pipeline_parallel", "virtual_pipeline", "data_parallel", "sequence_parallel",
        "first_stage_layers", "last_stage_layers", "distributed_optimizer", "recompute",
    )  # fmt: skip
    return {name: getattr(layout, name) for name in names}


def to_json(setting: Setting, gpu: str, found: Sequence[Candidate], around: Host | None) -> dict[str, object]:
    """For machines. What is predicted stands under `predicted`."""
    return {
        "gpu": gpu,
        "num_gpus": setting.num_gpus,
        "engine_share": setting.engine_share,
        "workload": asdict(setting.load),
        "efficiency": asdict(setting.reached),
        "gpu_memory_bytes": setting.gpu.memory,
        "num_parameters": setting.shape.num_parameters,
        "layouts": [
            {
                "layout": _layout(one.layout),
                "own": one.own,
                "predicted": {
                    "fits": one.fits,
                    "worst_stage": one.stage,
                    "memory_bytes": {**asdict(one.memory), "total": one.memory.total},
                    "awake_bytes": one.awake,
                    "seconds": {**asdict(one.seconds), "total": one.seconds.total},
                },
            }
            for one in found
        ],
        "host": None if around is None else {"layout": _layout(around.layout.layout), **host_json(around)},
    }


def to_text(setting: Setting, gpu: str, found: Sequence[Candidate], around: Host | None) -> str:
    """For people. around: None for a cold start, which asks little of its machines."""
    shown = list(found[:_ROWS])
    shown += [one for one in found[_ROWS:] if one.own]
    rank = {id(one): i + 1 for i, one in enumerate(found)}
    labels = [f"{rank[id(one)]:>3}{'*' if one.own else ' '} {_name(one.layout)}" for one in shown]
    width = max(map(len, labels))
    memory = [
        f"{label:{width}} {'yes' if one.fits else 'NO':>4} {one.memory.total / GIB:6.1f} "
        + " ".join(f"{getattr(one.memory, name) / GIB:>{size}.1f}" for name, size in _MEMORY)
        for label, one in zip(labels, shown, strict=True)
    ]
    seconds = [
        f"{label:{width}} {one.seconds.total:7.1f} " + " ".join(f"{getattr(one.seconds, n):>{size}.1f}" for n, size in _SECONDS)
        for label, one in zip(labels, shown, strict=True)
    ]
    head = f"{'':{width}} {'fits':>4} {'GiB':>6} " + " ".join(f"{_SHORT.get(n, n):>{size}}" for n, size in _MEMORY)
    split = f"{'':{width}} {'s':>7} " + " ".join(f"{_SHORT.get(n, n):>{size}}" for n, size in _SECONDS)
    fitting = sum(one.fits for one in found)
    return "\n".join(
        [
            _assumed(setting, gpu),
            "",
            " ".join(filter(None, (f"{fitting} of {len(found)} layouts fit.", _advice(setting, found)))),
            "",
            f"PREDICTED memory of the worst rank, GiB of {setting.gpu.memory / GIB:.1f} (* the config's layout)",
            head,
            *memory,
            "",
            "PREDICTED seconds of a step",
            split,
            *seconds,
            *([] if around is None else ["", *host_lines(around, " ".join(_name(around.layout.layout).split()))]),
        ]
    )


_SHORT = {
    "gradients": "grads", "optimizer": "optim", "activations": "activ", "communication": "comm", "rollout": "roll",
    "old_logprobs": "old", "attention": "attn", "tensor_parallel": "tp comm", "data_parallel": "dp comm", "weight_sync": "sync",
}  # fmt: skip
_MEMORY = [
    ("weights", 7), ("gradients", 6), ("optimizer", 6), ("activations", 6), ("head", 5), ("vision", 6), ("communication", 5),
    ("reserve", 7), ("engine", 6),
]  # fmt: skip
_SECONDS = [
    ("rollout", 6), ("old_logprobs", 6), ("dense", 6), ("attention", 6), ("head", 5), ("vision", 6), ("tensor_parallel", 7),
    ("bubble", 6), ("data_parallel", 7), ("optimizer", 5), ("weight_sync", 5),
]  # fmt: skip


def _name(layout: MegatronConfig) -> str:
    stages = f"pp{layout.pipeline_parallel}"
    if layout.virtual_pipeline > 1:
        stages += f" x{layout.virtual_pipeline}"
    if layout.first_stage_layers or layout.last_stage_layers:
        stages += f" ({layout.first_stage_layers or '='}..{layout.last_stage_layers or '='})"
    sequence = "+sp" if layout.sequence_parallel else ""
    return f"tp{layout.tensor_parallel}{sequence:3} {stages:14} dp{layout.data_parallel:<4} {layout.recompute:9}"


def _assumed(setting: Setting, gpu: str) -> str:
    config, load = setting.config, setting.load
    images = f"{load.images} x {load.image_tokens} of images"
    head = (
        f"PREDICTED, nothing here was measured: {setting.num_gpus} x {gpu}, a model of "
        f"{setting.shape.num_parameters / 1e9:.2f} B parameters in {config.model.dtype}; "
    )
    full = f"Memory is that of a full pass of {config.train.tokens_per_micro_batch} tokens, "
    tail = "Formulas and shares of peak: docs/plan.md."
    if not setting.plays:
        return (
            f"{head}a cold start on {config.sft.batch_size} conversations a step, on average {load.prompt + load.response} "
            f"tokens ({images}), with loss on {round(load.response * load.sampled)} of them. {full}"
            f"{config.rollout.max_prompt_tokens} of them images where there is a tower. {tail}"
        )
    engine = "the rollout engine keeps nothing of these GPUs while the update runs (--engine-share 0)"
    if setting.engine_share:
        engine = f"a rollout engine keeps {setting.engine_share:.0%} of every GPU"
    elif setting.asleep:
        engine = f"a rollout engine sleeps during the update and then has {setting.engine_awake:.0%} of every GPU"
    return (
        f"{head}{config.rollout.prompts_per_step} prompts x {config.rollout.rollouts_per_prompt} "
        f"rollouts a step, on average {load.prompt} prompt tokens ({images}), "
        f"{load.response} response tokens, {load.sampled:.0%} of them sampled; {load.uniform:.0%} of the groups have no "
        f"advantage. {full}"
        f"{config.rollout.max_prompt_tokens} of them images where there is a tower; {engine}. Tools and judge are assumed "
        f"not to hold up the rollouts. {tail}"
    )


def awake(gpu_memory: int, one: Candidate, config: Config) -> str:
    """What is to do where a layout fits during the update, and not while the engine is awake; "" elsewhere.

    gpu_memory: bytes of a GPU.
    """
    if one.memory.total > gpu_memory or one.awake <= gpu_memory:
        return ""
    share = config.rollout.vllm.gpu_memory - (one.awake - gpu_memory) / gpu_memory
    return (
        f"while the engine is awake, it and what the trainer keeps take {one.awake / GIB:.0f} GiB: lower "
        f"rollout.vllm.gpu_memory from {config.rollout.vllm.gpu_memory} to {int(share * 100) / 100} or less"
    )


def _advice(setting: Setting, found: Sequence[Candidate]) -> str:
    config = setting.config
    own = next((one for one in found if one.own), None)
    if not any(one.fits for one in found):
        if said := awake(setting.gpu.memory, own or found[0], config):
            return f"{said[0].upper()}{said[1:]}, or take more GPUs (--gpus)."
        part = max(("activations", "vision", "engine", "optimizer", "gradients"), key=lambda n: getattr(found[0].memory, n))
        least = config.rollout.max_prompt_tokens + config.rollout.max_response_tokens
        if not setting.plays:
            return (
                f"The nearest needs most for {part}. Take more GPUs (--gpus), or lower sft.tokens_per_micro_batch (here at "
                f"least {least}: the longest conversation), or sft.freeze=[vision]."
            )
        return (
            f"The nearest needs most for {part}. Take more GPUs (--gpus), lower --engine-share, or lower "
            f"train.tokens_per_micro_batch (here at least {least}: the longest rollout), or model.freeze=[vision]."
        )
    if own is None:
        return "The config has no layout for this many GPUs; set train.backend=megatron and train.megatron to one of these."
    if own.fits:
        return ""
    best = f"The config's own layout (*) does NOT fit; the best that does is {' '.join(_name(found[0].layout).split())}."
    said = awake(setting.gpu.memory, own, config)
    return f"{best} {said[0].upper()}{said[1:]}." if said else best
