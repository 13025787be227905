"""The cold start: trajectories played through the real tool loop by a script, and SFT on them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from metis_fast import host
from metis_fast.checkpoint.export import check_export, export_policy
from metis_fast.checkpoint.resume import CheckpointStore, ResumeState
from metis_fast.checkpoint.rng import capture_rng
from metis_fast.config import Config, SftPhase
from metis_fast.errors import ConfigError, DataError, Interrupted
from metis_fast.model import first_device, load_policy
from metis_fast.report.progress import progress
from metis_fast.rollout.store import read_rollouts
from metis_fast.run.interrupt import Interrupts
from metis_fast.run.record import open_record
from metis_fast.train.protocol import TrainerState
from metis_fast.train.torch_backend import TorchTrainer
from metis_fast.types import Ability, Rollout


def _trajectories(phase: SftPhase) -> list[Rollout]:
    wanted = set(phase.abilities or Ability)
    stored = (one for one in read_rollouts(phase.trajectories) if one.ability in wanted and one.rollout.num_sampled)
    rollouts = [one.rollout for one in stored]
    if not rollouts:
        of = f" of {', '.join(phase.abilities)}" if phase.abilities else ""
        raise DataError(f"{phase.trajectories} holds no trajectory{of} with a sampled token; play some first")
    return rollouts


def _check_lengths(config: Config, data: Sequence[Sequence[Rollout]]) -> None:
    longest = max((rollout for part in data for rollout in part), key=lambda rollout: len(rollout.tokens))
    if len(longest.tokens) > config.sft.tokens_per_micro_batch:
        raise DataError(
            f"trajectory {longest.prompt_uid}#{longest.index} has {len(longest.tokens)} tokens, more than "
            f"sft.tokens_per_micro_batch={config.sft.tokens_per_micro_batch}; raise that"
        )


@lru_cache(maxsize=2)
def _order(seed: int, phase: int, epoch: int, size: int) -> np.ndarray:
    bits = np.random.PCG64(np.random.SeedSequence(seed % 2**64, spawn_key=(phase, epoch)))
    return np.argsort(bits.random_raw(size), kind="stable")


def _batch(seed: int, phase: int, step: int, batch_size: int, data: Sequence[Rollout]) -> list[Rollout]:
    """The batch of a step of a phase: shuffled epochs, a pure function of the arguments."""
    places = range(step * batch_size, (step + 1) * batch_size)
    return [data[_order(seed, phase, place // len(data), len(data))[place % len(data)]] for place in places]


def sft(config: Config, out: Path) -> None:
    """SFT of `config.model.path` on `config.sft.phases`, exported to `out` as a Hugging Face folder.

    Resumes from `<run.dir>/sft/checkpoints`. The loss of every step is in `<run.dir>/sft/metrics.jsonl`.

    Raises:
        Interrupted: a signal came; the last step is checkpointed.
        MetisError: anything that a user can mend.
    """
    if not config.sft.phases:
        raise ConfigError("sft.phases is empty; name at least one folder of trajectories and its steps")
    data = [_trajectories(phase) for phase in config.sft.phases]
    _check_lengths(config, data)
    schedule = [(i, step) for i, phase in enumerate(config.sft.phases) for step in range(phase.steps)]
    host.prepare(config.run.threads)
    torch.manual_seed(config.run.seed)
    folder = config.run.dir / "sft"
    record = open_record(config.model_copy(update={"run": config.run.model_copy(update={"dir": folder})}), {}, ("model", "sft"))
    source = check_export(config.model.path, out, config.model.dtype)
    policy = load_policy(config.model, device=first_device())
    # everything is trained in the cold start: what HDPO freezes has to be learnt first
    unfrozen = config.model_copy(update={"model": config.model.model_copy(update={"freeze": ()})})
    trainer = TorchTrainer(policy, unfrozen, config.sft.optim, len(schedule))
    checkpoints = CheckpointStore(folder / "checkpoints", keep_last=1)
    loaded, losses = checkpoints.latest(), []
    if loaded is not None:
        trainer.load(TrainerState(loaded.state.tensors, loaded.state.scalars["trainer"]))
        losses = list(loaded.state.scalars["losses"])
    record.save(len(losses))

    def save(step: int) -> None:
        state = trainer.state()
        scalars = {"losses": losses, "trainer": state.scalars}
        checkpoints.save(step, ResumeState(step, state.tensors, scalars, capture_rng()), None)

    with Interrupts() as interrupts, progress(len(schedule), "SFT", config.log, "step") as bar:
        bar.update(len(losses))
        try:
            for step in range(len(losses), len(schedule)):
                interrupts.check()
                phase, phase_step = schedule[step]
                loss, norm = trainer.imitate(_batch(config.run.seed, phase, phase_step, config.sft.batch_size, data[phase]))
                losses.append((loss, norm))
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                bar.update()
                if config.checkpoint.every and (step + 1) % (10 * config.checkpoint.every) == 0:
                    save(step + 1)
        except Interrupted:
            save(len(losses))
            raise
    save(len(schedule))
    lines = [json.dumps({"step": i, "loss": loss, "grad_norm": norm}) for i, (loss, norm) in enumerate(losses)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    export_policy(policy, source, out)
