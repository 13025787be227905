"""The cold start: SFT on conversations, files of them (Metis-ColdStart) or trajectories that a script has played."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

import torch
from tqdm.contrib.logging import logging_redirect_tqdm

from metis_fast import host
from metis_fast.checkpoint.export import check_export
from metis_fast.checkpoint.resume import CheckpointStore, LoadedCheckpoint, ResumeState
from metis_fast.checkpoint.rng import capture_rng
from metis_fast.config import Config
from metis_fast.config.cold_start import training_config
from metis_fast.errors import CheckpointError, ConfigError, DataError, Interrupted
from metis_fast.model import load_policy
from metis_fast.model_folder import load_tokenizer
from metis_fast.pictures import ImagePreparer
from metis_fast.report.progress import progress
from metis_fast.run.interrupt import Interrupts
from metis_fast.run.record import open_record
from metis_fast.run.room import open_room
from metis_fast.sft import trainers
from metis_fast.sft.encoding import Encoder
from metis_fast.sft.log import SftLog
from metis_fast.sft.streams import Ahead, Batch, Stream, num_steps, open_stream
from metis_fast.train.optimizer import Schedule
from metis_fast.train.protocol import TrainerState

_LOG = logging.getLogger(__name__)
_LINE_S = 10.0


def sft(config: Config, out: Path) -> None:
    """SFT of `config.model.path` on `config.sft.phases`, exported to `out` as a Hugging Face folder.

    Resumes from `<run.dir>/sft/checkpoints`. The loss of every step is in `<run.dir>/sft/metrics.jsonl`, that of held-out
    conversations in `eval.jsonl` beside it.

    Raises:
        Interrupted: a signal came; the last step is checkpointed.
        MetisError: anything that a user can mend.
    """
    phases, folder = config.sft.phases, config.run.dir / "sft"
    if not phases:
        raise ConfigError("sft.phases is empty; name at least one folder of trajectories and its steps")
    trainers.check_backend(config)
    with Interrupts() as interrupts, ExitStack() as stack:
        images = trainers.open_images(config)
        streams, heldout = open_streams(config, images)
        steps = [num_steps(p, s.num_rows, config.sft.batch_size) for p, s in zip(phases, streams, strict=True)]
        if doubt := Schedule(config.sft.optim, sum(steps)).doubt("sft.optim"):
            _LOG.warning("%s", doubt)
        host.prepare(config.run.threads)
        torch.manual_seed(config.run.seed)
        own = config.model_copy(update={"run": config.run.model_copy(update={"dir": folder})})
        record = open_record(own, {}, ("model", "sft"))
        source = check_export(config.model.path, out, config.model.dtype)
        config = training_config(config, folder)
        room = open_room(config, stack, interrupts.check, plays=False)
        policy = load_policy(config.model, device=trainers.device(config))
        policy.images = images  # what was looked at when a row was read is decoded already
        opened = trainers.open_trainer(config, policy, sum(steps), interrupts.check, room)
        trainer = stack.enter_context(closing(opened))
        state = _State(config, trainer, streams, heldout, steps, folder)
        state.resume()
        record.save(state.step)
        bar = stack.enter_context(progress(sum(steps), "SFT", config.log, "step"))
        stack.enter_context(logging_redirect_tqdm())  # warnings above the bar, not in it
        bar.update(state.step)
        lines = _Lines(sum(steps), bool(bar.disable))
        if state.step:
            lines.say(f"goes on after step {state.step} of {sum(steps)}")
        ahead = stack.enter_context(closing(Ahead(state.draws())))
        try:
            state.measure(interrupts.check)
            while state.step < sum(steps):
                interrupts.check()
                loss = state.train(ahead.take())
                bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
                bar.update()
                lines.step(state.step, loss)
                state.measure(interrupts.check)
                if config.checkpoint.every and state.step % (10 * config.checkpoint.every) == 0:
                    state.save()
        except (Interrupted, DataError):
            state.save()
            state.checkpoints.finish()
            raise
        state.save()
        state.checkpoints.finish()
        state.tell()
        trainers.export(config, trainer, policy, source, out)


class _Lines:
    """On stderr in place of the bar where nobody sees that, as in the log of a batch job: one in ten seconds, and the last."""

    def __init__(self, total: int, shown: bool) -> None:
        self._total, self._shown, self._due = total, shown, 0.0

    def step(self, done: int, loss: float) -> None:
        """After a step. done: how many are."""
        now = time.monotonic()
        if now >= self._due or done == self._total:
            self._due = now + _LINE_S
            self.say(f"step {done} of {self._total}, loss {loss:.4f}")

    def say(self, text: str) -> None:
        """A line."""
        if self._shown:
            print(f"SFT: {text}", file=sys.stderr, flush=True)


def open_streams(config: Config, images: ImagePreparer) -> tuple[list[Stream], Stream | None]:
    """Those of all phases, and the held-out one.

    Raises:
        ConfigError, DataError, ModelError: see `open_stream` and `load_tokenizer`.
    """
    encode = Encoder(load_tokenizer(config.model.path), images)
    opened = partial(open_stream, config=config.sft, seed=config.run.seed, encode=encode, images=images)
    streams = [opened(one.trajectories, i, one.abilities) for i, one in enumerate(config.sft.phases)]
    return streams, None if config.sft.heldout is None else opened(config.sft.heldout, len(streams), ())


class _State:
    """What the cold start is between steps. step: how many are done."""

    def __init__(
        self,
        config: Config,
        trainer: trainers.Imitator,
        streams: Sequence[Stream],
        heldout: Stream | None,
        steps: Sequence[int],
        folder: Path,
    ) -> None:
        """steps: of each phase."""
        self._config, self._trainer, self._streams, self._heldout, self._steps = config, trainer, streams, heldout, steps
        self._schedule = Schedule(config.sft.optim, sum(steps))
        self._log = SftLog(folder)
        self.checkpoints = CheckpointStore(folder / "checkpoints", keep_last=1)
        self.step = self._saved = 0
        self._last: Batch | None = None
        self._skipped = [(0, 0)] * len(steps)  # bad and long rows of each phase

    def _phase(self, step: int) -> int:
        """Of a step, from 0."""
        return next(i for i in range(len(self._steps)) if step < sum(self._steps[: i + 1]))

    def draws(self) -> Iterator[Callable[[], Batch]]:
        """Of the steps that are left."""
        before = 0
        for stream, steps in zip(self._streams, self._steps, strict=True):
            for _ in range(max(self.step, before), before + steps):
                yield partial(stream.draw, self._config.sft.batch_size)
            stream.forget()
            before += steps

    def train(self, batch: Batch) -> float:
        """A step; returns its loss."""
        loss, norm = self._trainer.imitate(batch.rollouts)
        phase = self._phase(self.step)
        self._skipped[phase] = batch.num_bad, batch.num_long
        self._log.step({
            "step": self.step,
            "loss": loss,
            "grad_norm": norm,
            "lr": self._schedule.lr(self.step),
            "phase": phase,
            "epoch": batch.epoch,
            "tokens": sum(rollout.num_tokens for rollout in batch.rollouts),
            "loss_tokens": sum(rollout.num_sampled for rollout in batch.rollouts),
            "bad_rows": sum(bad for bad, _ in self._skipped),
            "long_rows": sum(long for _, long in self._skipped),
        })  # fmt: skip
        self.step += 1
        self._last = batch
        return loss

    def measure(self, check: Callable[[], None]) -> None:
        """The held-out loss, where it is due: a mean over tokens, as that of a step."""
        every = self._config.sft.eval_every
        due = self.step in (0, sum(self._steps)) or (every > 0 and self.step % every == 0)
        if self._heldout is None or not due or self._log.measured(self.step):
            return
        total, tokens, rows = 0.0, 0, 0
        for rollouts in self._heldout.once(self._config.sft.heldout_rows):
            check()
            for rollout, logp in zip(rollouts, self._trainer.logprobs(rollouts), strict=True):
                total -= float(logp[rollout.sampled].astype("float64").sum())
                tokens, rows = tokens + rollout.num_sampled, rows + 1
        if not tokens:
            raise DataError(f"no usable row in sft.heldout={self._config.sft.heldout}; see what `metis-fast sft --check` says")
        self._heldout.forget()
        self._log.evaluation({"step": self.step, "loss": total / tokens, "loss_tokens": tokens, "rows": rows})

    def resume(self) -> None:
        """From the newest checkpoint, if there is one."""
        loaded = self.checkpoints.latest()
        if loaded is not None:
            self._restore(loaded)
        self._log.resume(self.step)

    def _restore(self, loaded: LoadedCheckpoint) -> None:
        scalars = loaded.state.scalars
        if "place" not in scalars:
            raise CheckpointError(
                f"{loaded.path} was written by an older release; finish with that, or set run.dir to a new folder"
            )
        self.step = self._saved = loaded.state.step
        self._trainer.load(TrainerState(loaded.state.tensors, scalars["trainer"]), loaded.path)
        phase = scalars["phase"]
        self._streams[phase].restore(scalars["place"])
        self._skipped = [(int(bad), int(long)) for bad, long in scalars["skipped"]]
        _LOG.info("going on after step %d, from %s", self.step, loaded.path)

    def tell(self) -> None:
        """Of rows that were skipped."""
        bad, long = (sum(counts) for counts in zip(*self._skipped, strict=True))
        if bad or long:
            _LOG.warning("skipped over all epochs: %d bad rows, %d long ones (see metrics.jsonl)", bad, long)

    def save(self) -> None:
        """A checkpoint, unless there is one of this step."""
        if self.step == self._saved or self._last is None:
            return
        state = self._trainer.state()
        scalars = {
            "trainer": state.scalars,
            "phase": self._phase(self.step - 1),
            "place": dict(self._last.place),
            "skipped": self._skipped,
        }
        self.checkpoints.save(self.step, ResumeState(self.step, state.tensors, scalars, capture_rng(), state.shards), None)
        self._saved = self.step
