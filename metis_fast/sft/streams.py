"""Where the trajectories of a phase come from: files of conversations, read and encoded as they are needed, or stored rollouts.

A stream is drawn batch by batch, in shuffled epochs that follow from the seed and the phase alone, and its place can be saved.
`Ahead` draws the next batch in a thread while a step runs; the place that goes into a checkpoint is the one behind the batch
that was trained.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from metis_fast.config import SftPhase
from metis_fast.config.sft import SftConfig
from metis_fast.data.coldstart import (
    BadConversationError,
    Conversation,
    ConversationFiles,
    LongConversationError,
    holds_conversations,
)
from metis_fast.data.cursor import CursorState, Layout, RowCursor
from metis_fast.data.row import BadRowError, MisfitError
from metis_fast.errors import ConfigError, DataError
from metis_fast.pictures import ImagePreparer
from metis_fast.rollout.store import read_rollouts
from metis_fast.types import ImageBlob, Rollout

_LOG = logging.getLogger(__name__)
_TOGETHER = 16  # rows that are read, and whose images are decoded, side by side

Place = Mapping[str, Any]
"""Where a stream stands, as JSON."""


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Trajectories of a step. epoch: that the stream is in behind it, with the part of it that was gone through. num_bad,
    num_long: rows skipped since the phase began. place: behind the batch."""

    rollouts: tuple[Rollout, ...]
    epoch: float
    num_bad: int = 0
    num_long: int = 0
    place: Place = field(default_factory=dict)


class Stream(Protocol):
    """Endless, epoch after epoch."""

    @property
    def num_rows(self) -> int:
        """Of the set."""
        ...

    def draw(self, n: int) -> Batch:
        """The next n trajectories.

        Raises:
            DataError: a row does not fit, and is not to be skipped; or none is usable.
        """
        ...

    def restore(self, place: Place) -> None:
        """Go to a saved place.

        Raises:
            CheckpointError: it belongs to other files.
        """
        ...

    def once(self, most: int) -> Iterator[list[Rollout]]:
        """The first `most` usable trajectories (0: all), in the order of the set, some at a time.

        Raises:
            DataError: as `draw`.
        """
        ...

    def forget(self) -> None:
        """Drop what is kept of the set in memory; a later draw reads it again."""
        ...


def open_stream(
    path: Path,
    phase: int,
    abilities: Sequence[str],
    config: SftConfig,
    seed: int,
    encode: Callable[[Conversation], Rollout],
    images: ImagePreparer,
) -> Stream:
    """Of files of conversations, or of stored rollouts. phase: its number, by which it is shuffled.

    Raises:
        DataError: files that cannot be read, or hold nothing. ConfigError: a setting that is for sets of the other kind.
    """
    if not path.exists():
        raise DataError(f"{path}: no such file or folder; give conversations (docs/sft.md) or a folder of stored rollouts")
    if not holds_conversations(path):
        if config.image_max_pixels:
            raise ConfigError(
                f"sft.image_max_pixels={config.image_max_pixels} is for conversations, but images of the stored rollouts in "
                f"{path} have their tokens already; set it to 0"
            )
        return Played(_stored(path, abilities), phase, config, seed)
    if abilities:
        raise ConfigError(f"sft.phases: abilities choose among stored rollouts, but {path} holds conversations; leave them out")
    return Conversations(ConversationFiles(path), encode, images.broken, phase, config, seed)


def num_steps(phase: SftPhase, rows: int, batch_size: int) -> int:
    """Optimizer steps of a phase over so many rows."""
    if phase.steps is not None:
        return phase.steps
    steps = (phase.epochs or 0) * rows / batch_size
    return max(1, math.ceil(round(steps, 6)))  # rounded: 1.1 * 100 / 10 is a little more than 11


# -- files of conversations -----------------------------------------------------------------------------------------------


class Conversations:
    """Rows of files. Memory: row groups as `ConversationFiles` keeps them, and one batch."""

    def __init__(
        self,
        files: ConversationFiles,
        encode: Callable[[Conversation], Rollout],
        broken: Callable[[Sequence[ImageBlob]], Mapping[str, str]],
        phase: int,
        config: SftConfig,
        seed: int,
    ) -> None:
        """broken: what is wrong with images, by SHA-256."""
        self._files, self._encode, self._broken, self._config = files, encode, broken, config
        self._seed = seed + (phase << 32)  # of every phase an order of its own
        self._follow(files.layout)
        self._new = self._num_long = 0
        self._told: set[int] = set()  # bad rows that `once` has told of
        self.num_rows = len(files)

    def _follow(self, layout: Layout) -> None:
        self._layout = layout
        self._cursor: RowCursor[Rollout] = RowCursor(
            layout, self._seed, self.look, on_bad_row="skip", advice="run `metis-fast sft CONFIG --check`, which names them"
        )

    def look(self, rows: Sequence[int]) -> list[Rollout | BadRowError]:
        """Rows, encoded, or what is wrong with them.

        Raises:
            BadRowError: of one that is not to be skipped.
        """
        found: list[Rollout | BadRowError] = []
        for start in range(0, len(rows), _TOGETHER):
            found += self._look(rows[start : start + _TOGETHER])
        for one in found:
            is_long = isinstance(one, LongConversationError)
            if isinstance(one, BadRowError) and (self._config.on_long_row if is_long else self._config.on_bad_row) == "stop":
                raise one
        self._new += sum(isinstance(one, LongConversationError) for one in found)
        return found

    def _look(self, rows: Sequence[int]) -> list[Rollout | BadRowError]:
        found = [self._encoded(row, self._conversation(row)) for row in rows]
        problems = self._broken([image for one in found if isinstance(one, Rollout) for image in one.images])
        return [self._without_broken(row, one, problems) for row, one in zip(rows, found, strict=True)]

    def read_all(self, rows: Sequence[int], threads: Executor) -> list[Rollout | BadRowError]:
        """Rows, encoded side by side; their images may be damaged behind their headers."""
        found = [self._conversation(row) for row in rows]
        return list(threads.map(self._encoded, rows, found))

    def _conversation(self, row: int) -> Conversation | BadRowError:
        try:
            return self._files.read(row)
        except BadConversationError as error:
            return error

    def _encoded(self, row: int, found: Conversation | BadRowError) -> Rollout | BadRowError:
        if isinstance(found, BadRowError):
            return found
        try:
            rollout = self._encode(found)
        except MisfitError as misfit:
            return self._files.bad(row, misfit)
        longest = self._config.longest
        if rollout.num_tokens <= longest:
            return rollout
        misfit = MisfitError("messages", f"at most {longest} tokens", rollout.num_tokens)
        return self._files.bad(row, misfit, LongConversationError)

    def _without_broken(self, row: int, one: Rollout | BadRowError, problems: Mapping[str, str]) -> Rollout | BadRowError:
        if isinstance(one, BadRowError) or not problems:
            return one
        for number, image in enumerate(one.images):
            if image.sha256 in problems:
                got = f"{len(image.data)} bytes: {problems[image.sha256]}"
                # distinct images are counted: one that is shown twice has one number
                return self._files.bad(row, MisfitError(f"images[{number}]", "an image that Pillow can decode", got))
        return one

    def draw(self, n: int) -> Batch:
        """See `Stream`."""
        self._new = 0
        rollouts = tuple(self._cursor.next(n))
        self._num_long += self._new
        state = self._cursor.state()
        return Batch(
            rollouts,
            epoch=state.epoch + state.position / self.num_rows,
            num_bad=state.skipped - self._num_long,
            num_long=self._num_long,
            place={"cursor": asdict(state), "num_long": self._num_long, "layout": asdict(self._layout)},
        )

    def restore(self, place: Place) -> None:
        """See `Stream`. The order is that of the files as they were, if there are as many rows: some may have been mended."""
        saved = place["layout"]
        layout = Layout(tuple((int(rows), int(size)) for rows, size in saved["groups"]), int(saved["cache_bytes"]))
        if sum(rows for rows, _ in layout.groups) == self.num_rows:
            self._follow(layout)
        self._cursor.restore(CursorState(**place["cursor"]))
        self._num_long = int(place["num_long"])

    def once(self, most: int) -> Iterator[list[Rollout]]:
        """See `Stream`. Rows that are skipped are told of, once: a held-out set is measured many times."""
        left = most or self.num_rows
        for start in range(0, self.num_rows, self._config.batch_size):
            rows = range(start, min(start + self._config.batch_size, self.num_rows))
            for row, one in zip(rows, found := self.look(rows), strict=True):
                if isinstance(one, BadRowError) and row not in self._told:
                    self._told.add(row)
                    _LOG.warning("skipped bad row: %s", one.bad_row)
            usable = [one for one in found if isinstance(one, Rollout)][:left]
            if usable:
                yield usable
            left -= len(usable)
            if not left:
                return

    def forget(self) -> None:
        """See `Stream`."""
        self._files.forget()


# -- stored rollouts --------------------------------------------------------------------------------------------------------


def _stored(path: Path, abilities: Sequence[str]) -> list[Rollout]:
    wanted = set(abilities)
    stored = (one for one in read_rollouts(path) if one.rollout.num_sampled and (not wanted or one.ability in wanted))
    rollouts = [one.rollout for one in stored]
    if not rollouts:
        of = f" of {', '.join(abilities)}" if abilities else ""
        raise DataError(f"{path} holds no trajectory{of} with a sampled token; play some first")
    return rollouts


class Played:
    """Stored rollouts, all in memory; the batch of a step is a pure function of seed, phase and step."""

    def __init__(self, rollouts: Sequence[Rollout], phase: int, config: SftConfig, seed: int) -> None:
        """
        Raises:
            DataError: one is too long; it is named.
        """
        self._rollouts, self._phase, self._seed, self._together = rollouts, phase, seed, config.batch_size
        self._position = 0
        self._order: tuple[int, np.ndarray] | None = None
        self.num_rows = len(rollouts)
        longest = max(rollouts, key=lambda rollout: len(rollout.tokens))
        if len(longest.tokens) > config.longest:
            name = "max_tokens" if config.max_tokens else "tokens_per_micro_batch"
            raise DataError(
                f"trajectory {longest.prompt_uid}#{longest.index} has {len(longest.tokens)} tokens, more than "
                f"sft.{name}={config.longest}; raise that"
            )

    def _at(self, place: int) -> Rollout:
        epoch, position = divmod(place, self.num_rows)
        if self._order is None or self._order[0] != epoch:
            bits = np.random.PCG64(np.random.SeedSequence(self._seed % 2**64, spawn_key=(self._phase, epoch)))
            self._order = epoch, np.argsort(bits.random_raw(self.num_rows), kind="stable")
        return self._rollouts[self._order[1][position]]

    def draw(self, n: int) -> Batch:
        """See `Stream`."""
        rollouts = tuple(self._at(place) for place in range(self._position, self._position + n))
        self._position += n
        return Batch(rollouts, self._position / self.num_rows, place={"position": self._position})

    def restore(self, place: Place) -> None:
        """See `Stream`."""
        self._position = int(place["position"])

    def once(self, most: int) -> Iterator[list[Rollout]]:
        """See `Stream`."""
        left = iter(self._rollouts[: most or None])
        while some := list(islice(left, self._together)):
            yield some

    def forget(self) -> None:
        """See `Stream`. Everything stays: it is read once."""


# -- ahead of training ------------------------------------------------------------------------------------------------------


class Ahead:
    """Batches of a schedule, one after the other, each drawn while the one before is trained.

    draws: one for each step that is left, in order. Close it, also when something fails.
    """

    def __init__(self, draws: Iterator[Callable[[], Batch]]) -> None:
        self._draws = draws
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sft-batches")
        self._coming: Future[Batch] | None = None
        self._begin()

    def _begin(self) -> None:
        draw = next(self._draws, None)
        self._coming = None if draw is None else self._thread.submit(draw)

    def take(self) -> Batch:
        """The next batch. Raises what drawing it raised."""
        assert self._coming is not None, "all batches were taken"
        batch = self._coming.result()
        self._begin()
        return batch

    def close(self) -> None:
        """Wait for what is being drawn, and drop it."""
        self._thread.shutdown(cancel_futures=True)
