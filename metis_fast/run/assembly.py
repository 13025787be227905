"""The parts of a run, opened from its config and closed together: one choice for each."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from metis_fast import host
from metis_fast.checkpoint.export import check_export
from metis_fast.config import Config
from metis_fast.data.parquet import PromptFiles
from metis_fast.errors import ConfigError, ToolSetupError
from metis_fast.judge_styles import known_style
from metis_fast.machine import memory_bytes
from metis_fast.model import Policy, first_device, load_policy
from metis_fast.model_folder import read_config
from metis_fast.rollout.engine import RunEngine
from metis_fast.rollout.native import NativeEngine, check_room
from metis_fast.rollout.vllm.engine import VllmEngine
from metis_fast.run.interrupt import Interrupts
from metis_fast.run.parts import Parts
from metis_fast.run.record import open_record
from metis_fast.score.judge import StyleJudge, open_judge
from metis_fast.score.remote import RemoteJudge, start_judge_workers
from metis_fast.tools import open_toolbox
from metis_fast.tools.protocol import Toolbox
from metis_fast.tools.remote import RemoteToolbox, start_tool_workers
from metis_fast.train.megatron.backend import MegatronTrainer, check_settings
from metis_fast.train.protocol import Trainer
from metis_fast.train.torch_backend import TorchTrainer
from metis_fast.workers.hub import Hub
from metis_fast.workers.launch import Launcher, LocalLauncher, engine_gpus
from metis_fast.workers.worker import WorkerError, wait_ready


def _open_trainer(config: Config, policy: Policy, total_steps: int, interrupts: Interrupts, hub: Hub | None) -> Trainer:
    if config.train.backend == "torch":
        return TorchTrainer(policy, config, config.train.optim, total_steps)
    launcher = hub.launcher if hub is not None and _ranks_by_ray(config) else None
    folder, model = policy.folder, policy.model.config
    return MegatronTrainer(config, config.train.optim, total_steps, folder, model, interrupts.check, launcher)


def needs_hub(config: Config, training: bool = True) -> bool:
    """Whether a run of these settings has workers, or ranks that Ray starts."""
    workers = config.rollout.engine == "vllm" or config.workers.tools > 0 or config.workers.judges > 0
    return workers or (training and _ranks_by_ray(config))


def _ranks_by_ray(config: Config) -> bool:
    train = config.train
    return config.workers.launcher == "ray" and train.backend == "megatron" and train.megatron.launch == "local"


def open_hub(config: Config, stack: ExitStack, check: Callable[[], None], training: bool = True) -> Hub:
    """What starts the run's workers and watches them; they end with `stack`.

    check: called while a cluster makes room; what it raises goes on. training: with the trainer's ranks, if Ray places them.

    Raises:
        ConfigError: `workers` cannot work, or there is no such cluster or no room in it.
    """
    launcher: Launcher
    if config.workers.launcher == "ray":
        try:
            from metis_fast.cluster import RayLauncher  # at first use: nothing else needs Ray
        except ModuleNotFoundError as error:
            if error.name != "ray":
                raise
            raise ConfigError(
                "workers.launcher=ray needs Ray; pip install 'metis-fast[ray]', or set workers.launcher=local"
            ) from None
        launcher = RayLauncher(config, training and _ranks_by_ray(config), check)
    else:
        here = training and config.train.backend == "megatron" and config.train.megatron.launch == "local"
        wanted = config.rollout.vllm.replicas * config.rollout.vllm.tensor_parallel
        own = _has_gpu(config, training) and not config.rollout.vllm.sleep
        ranks = config.train.megatron.num_ranks if here else int(own)
        gpus = engine_gpus(torch.cuda.device_count(), ranks, wanted, share=config.rollout.vllm.sleep)
        launcher = LocalLauncher(config.run.dir.resolve() / "workers", gpus)
    stack.callback(launcher.close)
    return stack.enter_context(Hub(config.workers, launcher))


def _open_judge(config: Config, styles: Collection[str], hub: Hub | None) -> StyleJudge | RemoteJudge:
    if config.workers.judges == 0:
        return open_judge(config.score, styles)
    assert hub is not None
    return RemoteJudge(config.score, start_judge_workers(hub, config.score, styles, config.workers.judges))


def _open_toolbox(config: Config, scratch: Path, hub: Hub | None, check: Callable[[], None]) -> Toolbox:
    if config.workers.tools == 0:
        return open_toolbox(config.tools, scratch)
    assert hub is not None
    here = scratch if config.workers.launcher == "local" else None
    workers = start_tool_workers(hub, config.tools, config.workers.tools, here)
    try:
        wait_ready(workers, check)
    except WorkerError as error:
        raise ToolSetupError(str(error)) from None
    return RemoteToolbox(config.tools, workers)


def _device(config: Config, training: bool) -> torch.device:
    """Of the policy in this process: a GPU where it samples, or trains, here. Megatron's ranks and vLLM's engines have the
    GPUs to themselves, but for the first one where the torch back end has that (`_has_gpu`)."""
    if training and config.train.backend == "megatron":
        return torch.device("cpu")
    return first_device() if config.rollout.engine == "native" or _has_gpu(config, training) else torch.device("cpu")


def _has_gpu(config: Config, training: bool) -> bool:
    """Whether the torch back end has this machine's first GPU beside vLLM engines: by turns, or because they leave one."""
    vllm = config.rollout.vllm
    taken = 0 if vllm.sleep else vllm.replicas * vllm.tensor_parallel
    return (
        training
        and config.train.backend == "torch"
        and config.workers.launcher == "local"
        and (torch.cuda.device_count() > taken)
    )


@contextmanager
def open_parts(config: Config, interrupts: Interrupts, training: bool = True) -> Iterator[Parts]:
    """Open everything that a run needs, cheapest checks first, and close it in reverse order.

    Raises:
        ConfigError, DataError, ModelError, ToolSetupError, JudgeError: whatever cannot work is found here, before a rollout.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "this release runs rollouts in one process, but WORLD_SIZE="
            f"{os.environ['WORLD_SIZE']} (torchrun?); start `metis-fast` directly"
        )
    if training and not config.data.train:
        raise ConfigError("no training prompts; set data.train to Parquet files")
    host.prepare(config.run.threads)
    # nothing draws from the global generators today; seeded, they make checkpoints of equal runs equal byte for byte
    random.seed(config.run.seed)
    np.random.seed(config.run.seed % 2**32)
    torch.manual_seed(config.run.seed)
    files = PromptFiles(config.data.train) if training else None
    heldout = PromptFiles(config.data.heldout) if config.data.heldout else None
    record = None
    if training:
        data = {"data.train": files, "data.heldout": heldout}
        record = open_record(config, data, ("model", "tools"), interrupts.check)
    source = check_export(config.model.path, config.run.dir / "trained", config.model.dtype) if training else None
    styles = {style for part in (files, heldout) if part is not None for style in part.styles()}
    if config.data.on_bad_row == "skip":
        styles = {style for style in styles if known_style(style)}  # rows of others are bad ones
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(TemporaryDirectory(prefix="metis-tools-")))
        hub = open_hub(config, stack, interrupts.check, training) if needs_hub(config, training) else None
        judge = _open_judge(config, styles, hub)
        stack.callback(judge.close)
        toolbox = _open_toolbox(config, scratch, hub, interrupts.check)
        stack.callback(toolbox.close)
        interrupts.run(judge.check())
        device = _device(config, training)
        if config.rollout.engine == "native":
            memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else memory_bytes()
            element = 4 if config.model.dtype == "float32" else 2
            check_room(config.rollout, read_config(config.model.path), element, memory)
        policy = load_policy(config.model, device=device)
        # whether nothing is being sampled while the trainer steps
        sampler, waits = policy, config.rollout.mode == "sync" and not config.rollout.over_provision
        if config.rollout.engine == "vllm":
            assert hub is not None
            engine: RunEngine = VllmEngine(config, policy, hub)
        else:
            if training and not waits and config.train.backend == "torch":
                sampler = load_policy(config.model, device=device)
                sampler.images = policy.images  # decoded once for both
            engine = NativeEngine(sampler, config.rollout.deterministic and waits)
        stack.callback(engine.close)
        if config.rollout.vllm.sleep:
            engine.wait(interrupts.check)  # they measure what their GPUs have left, which ranks that load would change
        trainer = None
        if training:
            if config.train.backend == "megatron":
                check_settings(config, policy.model.config)
            updates = config.train.steps * config.rollout.prompts_per_step // config.train.prompts_per_mini_batch
            trainer = _open_trainer(config, policy, updates, interrupts, hub)
            stack.callback(trainer.close)
        engine.wait(interrupts.check)  # they load while the trainer does
        parts = Parts(config, interrupts, policy, sampler, engine, toolbox, judge, trainer, files, heldout, record, source)
        if training:
            stack.callback(parts.log.close)
            schedule = parts.schedule
            if schedule is not None:
                stack.callback(lambda: interrupts.finish(schedule.close()))
        yield parts
