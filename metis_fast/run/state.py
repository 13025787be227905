"""The state of a run between steps: where it stands, and what of it a checkpoint holds."""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from typing import Any

from metis_fast.checkpoint.resume import CheckpointStore, ResumeState
from metis_fast.checkpoint.rng import RngState, capture_rng, restore_rng
from metis_fast.data.cursor import CursorState, RowCursor
from metis_fast.report.log import RunLog
from metis_fast.rollout.schedule import Pending, Schedule
from metis_fast.run.record import RunRecord
from metis_fast.train.protocol import Trainer, TrainerState


@dataclass(frozen=True, slots=True, eq=False)
class _Boundary:
    """What a checkpoint of the last whole step holds besides weights and moments, which nothing moves until the next update."""

    cursor: CursorState
    num_updates: int
    rng: RngState
    pending: tuple[Pending, ...]


class RunState:
    """Place in the data, trainer, random generators and groups in flight, of the last whole step; resumed and saved together.

    wall_s: seconds that this run has taken, over all its resumptions.
    """

    def __init__(
        self,
        trainer: Trainer,
        cursor: RowCursor[Any],
        schedule: Schedule[Any, Any] | None,
        checkpoints: CheckpointStore,
        log: RunLog,
        record: RunRecord,
    ) -> None:
        self._trainer, self._cursor, self._schedule = trainer, cursor, schedule
        self._checkpoints, self._log, self._record = checkpoints, log, record
        self._boundary = self._here()
        self._saved: int | None = None
        self._wall_before, self._opened = 0.0, time.perf_counter()

    @property
    def wall_s(self) -> float:
        """Seconds so far, interruptions left out."""
        return self._wall_before + time.perf_counter() - self._opened

    def resume(self) -> int:
        """Continue from the newest intact checkpoint; returns the number of steps done (0: a new run)."""
        loaded = self._checkpoints.latest()
        if loaded is None:
            self._log.truncate(0)
            self._record.save(0)
            return 0
        state = loaded.state
        self._trainer.load(TrainerState(state.tensors, state.scalars["trainer"]), loaded.path)
        self._cursor.restore(CursorState(**state.scalars["cursor"]))
        self._wall_before = float(state.scalars["wall_s"])
        if self._schedule is not None:
            self._schedule.restore(state.step, (Pending(**entry) for entry in state.scalars["pending"]))
        self._saved = state.step
        self._log.truncate(state.step)
        restore_rng(state.rng)
        self._record.save(state.step)
        self._boundary = self._here()
        return state.step

    def _here(self) -> _Boundary:
        pending = () if self._schedule is None else self._schedule.pending()
        return _Boundary(self._cursor.state(), self._trainer.num_updates, capture_rng(), pending)

    def finished(self, step: int) -> None:
        """A step is whole: from here on, `step + 1` is what a checkpoint holds."""
        self._boundary = self._here()

    def save(self, step: int, score: tuple[float, ...] | None) -> None:
        """Checkpoint the state after `step` whole steps."""
        at = self._boundary
        assert at.num_updates == self._trainer.num_updates
        trainer = self._trainer.state()
        scalars = {"cursor": asdict(at.cursor), "wall_s": self.wall_s, "trainer": trainer.scalars}
        if self._schedule is not None:
            scalars["pending"] = [asdict(place) for place in at.pending]
        self._checkpoints.save(step, ResumeState(step, trainer.tensors, scalars, at.rng, trainer.shards), score)
        self._saved = step

    def save_boundary(self, step: int) -> None:
        """Checkpoint the last whole step, unless that is done or an optimizer step of the next one was already taken."""
        self._checkpoints.finish()
        if self._saved != step and step > 0 and self._boundary.num_updates == self._trainer.num_updates:
            self.save(step, None)
            self._checkpoints.finish()
