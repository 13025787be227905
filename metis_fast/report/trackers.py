"""Where a run's curves and some of its rollouts go besides its own files: TensorBoard, W&B, trackio.

Each has a thread of its own. One that fails, or hangs, is said once, and costs training nothing: what it does not take in time
is dropped.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import queue
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import yaml
from PIL import Image

from metis_fast.config import LogConfig
from metis_fast.errors import ConfigError, one_line
from metis_fast.report.samples import Sample, samples

_LOG = logging.getLogger(__name__)
_WAITING = 256  # calls; a step has one or two
_CLOSE_S = 60.0  # for what is still on its way when a run ends
_ID = "tracker-id"  # file of the run folder: a run that goes on is the same run for a tracker, one in a new folder is not


class Tracker(Protocol):
    """Takes curves and rollouts. It may raise whatever it likes."""

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Points of curves."""
        ...

    def rollouts(self, shown: Sequence[Sample], step: int) -> None:
        """Some rollouts of a step."""
        ...

    def close(self) -> None:
        """Write out what is still held."""
        ...


@dataclass(frozen=True, slots=True)
class Opening:
    """What a tracker is opened with. first_step: of a run that goes on, the first one that comes (again)."""

    folder: Path
    project: str
    first_step: int | None


def side_by_side(images: Sequence[Image.Image]) -> Image.Image:
    """One picture of several."""
    whole = Image.new("RGB", (sum(image.width for image in images), max(image.height for image in images)))
    left = 0
    for image in images:
        whole.paste(image, (left, 0))
        left += image.width
    return whole


class TensorBoardTracker:
    """Event files in the run folder."""

    def __init__(self, opening: Opening) -> None:
        # here, because the import takes a second that a run without TensorBoard need not wait
        from tensorboard.compat.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]  # is generated
        from torch.utils.tensorboard import SummaryWriter

        self._summary = Summary
        self._writer = SummaryWriter(str(opening.folder / "tensorboard"), purge_step=opening.first_step)

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        # in one event: one for each of a hundred curves takes ten times as long
        one = self._summary(value=[self._summary.Value(tag=tag, simple_value=value) for tag, value in values.items()])
        files = self._writer.file_writer
        assert files is not None
        files.add_summary(one, step)
        self._writer.flush()

    def rollouts(self, shown: Sequence[Sample], step: int) -> None:
        """See `Tracker`. Text is a code block: nothing in it is markup."""
        for i, one in enumerate(shown):
            text = "\n".join(f"    {line}" for line in f"{_caption(one)}\n\n{one.text}".splitlines())
            self._writer.add_text(f"rollouts/{i}", text, step)
            if one.images:
                self._writer.add_image(f"rollouts/{i}", np.asarray(side_by_side(one.images)), step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        """See `Tracker`."""
        self._writer.close()


def _caption(one: Sample) -> str:
    return f"{one.name}, {one.uid}, accuracy reward {one.reward:g}"


class WandbTracker:
    """Weights & Biases. WANDB_MODE, WANDB_API_KEY, WANDB_BASE_URL and WANDB_ENTITY say where and whether it sends."""

    def __init__(self, opening: Opening) -> None:
        import wandb

        self._library = wandb
        self._run = wandb.init(
            project=opening.project,
            name=opening.folder.resolve().name,
            id=_run_id(opening.folder),
            dir=str(opening.folder),
            config=_settings(opening.folder),
            resume="allow",
            reinit="create_new",
            settings=wandb.Settings(console="off", silent=True),
        )
        self._run.define_metric("*", step_metric="step")  # its own counter cannot go back to a checkpoint

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        self._run.log({**values, "step": step})

    def rollouts(self, shown: Sequence[Sample], step: int) -> None:
        """See `Tracker`."""
        table = self._library.Table(columns=["prompt", "reward", "text"])
        images: dict[str, Any] = {}
        for i, one in enumerate(shown):
            table.add_data(f"{one.name} {one.uid}", one.reward, one.text)
            if one.images:
                images[f"rollouts/{i}"] = self._library.Image(side_by_side(one.images), caption=_caption(one))
        self._run.log({"rollouts/text": table, **images, "step": step})

    def close(self) -> None:
        """See `Tracker`."""
        self._run.finish()


class TrackioTracker:
    """trackio: a SQLite file of this machine (TRACKIO_DIR), or a space on the hub (TRACKIO_SPACE_ID)."""

    def __init__(self, opening: Opening) -> None:
        trackio = importlib.import_module("trackio")
        self._library = trackio
        self._run = trackio.init(
            project=opening.project,
            name=f"{opening.folder.resolve().name}-{_run_id(opening.folder)}",
            config=_settings(opening.folder),
            resume="allow",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker`."""
        self._run.log(dict(values), step=step)

    def rollouts(self, shown: Sequence[Sample], step: int) -> None:
        """See `Tracker`."""
        images = {
            f"rollouts/{i}": self._library.Image(np.asarray(side_by_side(one.images)), caption=f"{_caption(one)}\n\n{one.text}")
            for i, one in enumerate(shown)
            if one.images
        }
        if images:
            self._run.log(images, step=step)

    def close(self) -> None:
        """See `Tracker`."""
        self._run.finish()


def _run_id(folder: Path) -> str:
    path = folder / _ID
    known = path.read_text(encoding="utf-8").strip() if path.exists() else ""
    if not known:  # or the disk was full as it was written
        known = secrets.token_hex(4)
        path.write_text(known, encoding="utf-8")
    return known


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "config.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8")) or {} if path.exists() else {}


_TRACKERS: dict[str, Callable[[Opening], Tracker]] = {
    "tensorboard": TensorBoardTracker,
    "wandb": WandbTracker,
    "trackio": TrackioTracker,
}


class Guarded:
    """A tracker in a thread of its own, opened when there is something for it. Nothing that it does reaches the caller."""

    def __init__(self, name: str, open_: Callable[[], Tracker]) -> None:
        self._name, self._open = name, open_
        self._calls: queue.Queue[Callable[[Tracker], None] | None] = queue.Queue(_WAITING)
        self._thread: threading.Thread | None = None
        self._said = False

    def tell(self, call: Callable[[Tracker], None]) -> None:
        """Do that with the tracker, in its turn."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=f"tracker {self._name}", daemon=True)
            self._thread.start()
        try:
            self._calls.put_nowait(call)
        except queue.Full:
            self._say("it does not keep up; what it cannot take is dropped")

    def close(self, seconds: float = _CLOSE_S) -> None:
        """End it; what it has not done after so many seconds is left. May be called twice."""
        thread, self._thread = self._thread, None
        if thread is None:
            return
        try:
            self._calls.put(None, timeout=seconds)
        except queue.Full:
            return
        thread.join(seconds)
        if thread.is_alive():
            self._say(f"it did not end within {seconds:g} s")

    def _work(self) -> None:
        tracker: Tracker | None = None
        try:
            tracker = self._open()
        except Exception as error:  # of another library, its service or the network; training goes on
            self._say(f"cannot be opened: {type(error).__name__}: {one_line(error)}")
        while (call := self._calls.get()) is not None:
            if tracker is not None:
                self._try(partial(call, tracker))
        if tracker is not None:
            self._try(tracker.close)

    def _try(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # as above
            self._say(f"{type(error).__name__}: {one_line(error)}")

    def _say(self, what: str) -> None:
        if not self._said:
            self._said = True
            _LOG.warning("tracker %s: %s. The run goes on; this is not said again", self._name, what)


class Trackers:
    """All of a run.

    Raises:
        ConfigError: one of `log.trackers` is not installed.
    """

    def __init__(self, folder: Path, config: LogConfig) -> None:
        self._folder, self._config = folder, config
        self._first: int | None = None
        names = dict.fromkeys((*("tensorboard",) * config.tensorboard, *config.trackers))
        for name in names:
            if name != "tensorboard" and importlib.util.find_spec(name) is None:
                raise ConfigError(
                    f"log.trackers names {name}, which is not installed; in the project's folder: pip install -e '.[{name}]'"
                )
        self._all = [Guarded(name, partial(self._opened, name)) for name in names]

    def _opened(self, name: str) -> Tracker:
        return _TRACKERS[name](Opening(self._folder, self._config.project, self._first))

    def forget(self, step: int) -> None:
        """What was told of this step and later ones comes again; before the first call of the others."""
        self._first = step

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Points of curves, for all of them."""
        for tracker in self._all:
            tracker.tell(lambda one: one.scalars(values, step))

    def step(self, values: Mapping[str, float], step: int) -> None:
        """Those of a training step, and now and then some of its rollouts."""
        self.scalars(values, step)
        every = self._config.rollouts_every
        if self._config.rollouts and every and step % every == 0:
            for tracker in self._all:
                tracker.tell(lambda one: one.rollouts(samples(self._folder, step), step))

    def close(self) -> None:
        """End all. May be called twice."""
        for tracker in self._all:
            tracker.close()
