"""A panel below the lines of training: curves, the last rollout, what is waited for, time left.

It is there where stdout is a terminal and `log.panel` does not turn it off. Whatever is printed meanwhile scrolls by above it.
"""

from __future__ import annotations

import io
import logging
import sys
import textwrap
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.panel import Panel as Frame
from rich.segment import Segment
from rich.text import Text
from tqdm import tqdm

from metis_fast.config import Config
from metis_fast.report.samples import parts_of
from metis_fast.report.slices import KINDS, has_rates, main_abilities
from metis_fast.spans import Lane, listening
from metis_fast.types import Slice, StepStats

_A_SECOND = 0.5  # times that it is drawn, besides below every line that is printed: each costs about 2 ms
_BARS = "▁▂▃▄▅▆▇█"
_WIDTH = 40  # steps that a curve shows
_NAME = 28  # columns before it
_CURVE = _NAME + _WIDTH + 1
_BORDER = 4
_LAST = 10  # steps whose length says how long the others take
_CHARS = 240  # of the last rollout
_STAYS_S = 0.25  # that it stays as it is: every line that is printed has it drawn anew below
_READ_S = 5.0  # between two of them, where steps are shorter: nobody reads faster
_ORDER = ("tools", "accuracy", "loss")
_LOSSES = {"loss acc": "loss_acc", "loss tool": "loss_tool"}

Curves = dict[str, deque[float]]


def sparkline(values: Sequence[float]) -> str:
    """A block of text for each value, the lowest and the highest of them its ends."""
    finite = [value for value in values if value - value == 0]
    if not finite:
        return " " * len(values)
    low, high = min(finite), max(finite)
    half = high / 2 - low / 2  # the whole may be too much for a float

    def bar(value: float) -> str:
        place = (value / 2 - low / 2) / half if half else 0.0
        return _BARS[round(place * (len(_BARS) - 1))]

    return "".join(bar(value) if value - value == 0 else " " for value in values)


def plain(text: str) -> str:
    """One line of what a model or a data set has written, without what a terminal would obey."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


def duration(seconds: float) -> str:
    """As `3 h 05 min`, `12 min`, `40 s`."""
    minutes = round(seconds / 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60:02} min"
    return f"{minutes} min" if seconds >= 90 else f"{round(seconds)} s"


class TrainingPanel:
    """What the panel shows; also the `Listener` that knows which stage runs.

    steps: of the whole run. folder: the run's.
    """

    lanes = frozenset((Lane.RUN,))

    def __init__(self, steps: int, folder: Path) -> None:
        self._steps, self._folder = steps, folder
        self._curves: Curves = {}
        self._stages: list[str] = ["starting"]
        self._waited = ""
        self._ends: deque[float] = deque(maxlen=_LAST + 1)
        self._step: int | None = None
        self._shown: tuple[int, str] | None = None
        self._heldout = ""
        self._read = 0.0
        self._drawn: list[Segment] = []
        self._drawn_at, self._drawn_width = 0.0, 0

    # -- told by the run ----------------------------------------------------------------------------------------------

    def began(self, lane: Lane, name: str) -> str:
        """See `Listener`."""
        self._stages.append(name)
        return name

    def ended(self, handle: object) -> None:
        """See `Listener`."""
        self._stages.pop()
        self._waited = ""

    def waits(self, text: str) -> None:
        """How far what is waited for has come."""
        self._waited = text

    def history(self, stats: Sequence[StepStats]) -> None:
        """Curves of a run that goes on."""
        for one in stats:
            self._add(one)

    def step(self, stats: StepStats) -> None:
        """A step is done."""
        self._stages[0] = "training"
        self._ends.append(time.perf_counter())
        self._step = stats.step
        self._add(stats)

    def evaluation(self, step: int, slices: Mapping[str, Slice]) -> None:
        """Held-out rates."""
        rates = slices.get("all")
        known = rates is not None and has_rates(rates)
        self._heldout = f"held out after {step}: " + (
            f"accuracy {rates.accuracy:.3f}, tool rate {rates.tool_rate:.3f}" if rates is not None and known else "no verdict"
        )

    def _add(self, stats: StepStats) -> None:
        kinds = [kind for kind in KINDS if kind in stats.slices] or main_abilities([stats.slices])
        for rate, word in (("tool_rate", "tools"), ("accuracy", "accuracy")):
            for name in kinds if rate == "tool_rate" else ("all", *kinds):
                rates = stats.slices.get(name)
                if rates is not None and has_rates(rates):
                    self._point(f"{word} {name}", getattr(rates, rate))
        applied = [update for update in stats.updates if not update.skipped_step]
        for word, name in _LOSSES.items():
            if applied:
                self._point(word, sum(getattr(update, name) for update in applied) / len(applied))

    def _point(self, curve: str, value: float) -> None:
        self._curves.setdefault(curve, deque(maxlen=_WIDTH)).append(value)

    # -- what is drawn ------------------------------------------------------------------------------------------------

    def _left(self) -> str:
        if self._step is None or len(self._ends) < 2:
            return ""
        seconds = median(after - before for before, after in pairwise(self._ends))
        left = self._steps - self._step - 1
        return f"about {duration(left * seconds)} left" if left else "last step done"

    def _last_rollout(self) -> str:
        step = self._step
        now = time.perf_counter()
        if step is not None and (self._shown is None or (self._shown[0] != step and now - self._read > _READ_S)):
            self._shown, self._read = (step, _text_of(self._folder, step)), now
        return "" if self._shown is None else self._shown[1]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        now = time.perf_counter()
        if options.max_width != self._drawn_width or now - self._drawn_at > _STAYS_S:
            self._drawn = list(console.render(self._frame(options.max_width), options))
            self._drawn_width, self._drawn_at = options.max_width, now
        yield from self._drawn

    def _frame(self, width: int) -> Frame:
        body, room = Text(no_wrap=True, overflow="ellipsis"), max(1, width - _BORDER)
        across = max(1, min(2, room // _CURVE))
        for i, name in enumerate(sorted(self._curves, key=lambda name: _ORDER.index(name.partition(" ")[0]))):
            values = self._curves[name]
            body.append("\n" if i and i % across == 0 else "")
            body.append(f"{name} {values[-1]:.3g}"[: _NAME - 1].ljust(_NAME))
            body.append(sparkline(values).ljust(_WIDTH + 1), style="cyan")
        done = 0 if self._step is None else self._step + 1
        waits = " ".join(part for part in (self._stages[-1], self._waited) if part)
        last = " · ".join(part for part in (f"step {done} of {self._steps}", waits, self._left()) if part)
        rollout = textwrap.wrap(self._last_rollout(), room)
        for line in (self._heldout, *rollout, last):
            body.append(f"\n{line}" if body and line else line)
        return Frame(body, title=plain(str(self._folder)), title_align="left", border_style="dim")


def _text_of(folder: Path, step: int) -> str:
    """One of the rollouts of a step, short; another place in each step."""
    for path in parts_of(folder, step):
        try:
            with pq.ParquetFile(path) as file:
                rows = file.read_row_group(0, columns=["question", "text", "verdict"])
        except (OSError, pa.ArrowException):  # it is being replaced, or damaged; whoever needs it says so
            continue
        row = rows.slice(step % max(1, len(rows)), 1).to_pylist()
        if row:
            verdict = row[0]["verdict"]
            word = "no verdict" if verdict is None else "right" if verdict["correct"] else "wrong"
            return f"{word}: {_end(row[0]['question'], _CHARS // 2)} → {_end(row[0]['text'], _CHARS)}"
    return ""


def _end(text: str, most: int) -> str:
    whole = plain(text)
    return whole if len(whole) <= most else f"…{whole[-most:]}"


_active: TrainingPanel | None = None


def active() -> TrainingPanel | None:
    """The panel of this process, while it is open."""
    return _active


@contextmanager
def panel(config: Config) -> Iterator[TrainingPanel | None]:
    """Show the panel of a run, where somebody sees it. The terminal is as it was when this ends, however it ends."""
    global _active
    if config.log.panel == "off" or not sys.stdout.isatty():
        yield None
        return
    console = Console()
    if not console.is_terminal or console.is_dumb_terminal:
        yield None
        return
    with ExitStack() as stack:
        _active = TrainingPanel(config.train.steps, config.run.dir)
        stack.callback(_close)
        stack.enter_context(listening(_active))
        seen = sys.stderr.isatty()  # what goes to a file goes there
        live = Live(_active, console=console, refresh_per_second=_A_SECOND, transient=True, redirect_stderr=seen)
        stack.enter_context(live)
        console.show_cursor(True)  # nobody could bring it back after a SIGKILL
        for handler in logging.getLogger().handlers:
            if seen and isinstance(handler, logging.StreamHandler) and handler.stream is sys.__stderr__:
                handler.setStream(sys.stderr)  # which scrolls by above the panel now
                stack.callback(handler.setStream, sys.__stderr__)
        yield _active


def _close() -> None:
    global _active
    _active = None


class PanelBar(tqdm):
    """A progress bar that is a line of the panel."""

    def __init__(self, panel: TrainingPanel, total: int, description: str, unit: str) -> None:
        self._panel = panel
        super().__init__(total=total, desc=description, unit=unit, file=io.StringIO(), leave=False, mininterval=0.2)

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Tell the panel, in tqdm's own pace."""
        self._panel.waits(f"{self.desc.removesuffix(': ')}: {self.n:g} of {self.total:g} {self.unit}s")

    def close(self) -> None:
        """Nothing is waited for any more."""
        if not self.disable:
            self._panel.waits("")
        super().close()

    def clear(self, nolock: bool = False) -> None:
        """There is nothing on the screen."""

    def set_postfix(self, *args: Any, **kwargs: Any) -> None:
        """The panel has curves instead."""
