"""A sample of what a cold start would read, encoded as it would be."""

from __future__ import annotations

from collections.abc import Iterator

from metis_fast.config import Config
from metis_fast.data.coldstart import LongConversationError
from metis_fast.data.row import BadRowError
from metis_fast.doctor.finding import Finding
from metis_fast.run.cold_start import open_streams
from metis_fast.sft.streams import Conversations, Stream, num_steps
from metis_fast.sft.trainers import open_images
from metis_fast.train.optimizer import Schedule

_ROWS = 48  # of a set


def sft(config: Config) -> Iterator[Finding]:
    """Every phase, and the held-out set."""
    streams, heldout = open_streams(config, open_images(config))
    total = 0
    for i, (phase, stream) in enumerate(zip(config.sft.phases, streams, strict=True)):
        steps = num_steps(phase, stream.num_rows, config.sft.batch_size)
        total += steps
        yield Finding(f"phase {i}", "ok", f"{stream.num_rows} rows at {phase.trajectories}, {steps} steps")
        yield from _rows(f"phase {i}", stream, config)
    if doubt := Schedule(config.sft.optim, total).doubt("sft.optim"):
        found, _, advice = doubt.partition("; ")
        yield Finding("learning rate", "warning", found, advice)
    if heldout is not None:
        yield from _rows("held out", heldout, config)


def _rows(what: str, stream: Stream, config: Config) -> Iterator[Finding]:
    if not isinstance(stream, Conversations):  # stored rollouts: all of them were read when they were opened
        return
    step = max(1, stream.num_rows // _ROWS)
    found = stream.look(range(0, stream.num_rows, step))
    stream.forget()
    wrong = [one for one in found if isinstance(one, BadRowError)]
    of = f"{len(found)} of {stream.num_rows} rows read"
    if len(wrong) == len(found):
        yield Finding(what, "error", f"{of}, none can be used", "see below")
    for kind, skip, setting in (
        ([one for one in wrong if not isinstance(one, LongConversationError)], config.sft.on_bad_row, "sft.on_bad_row"),
        ([one for one in wrong if isinstance(one, LongConversationError)], config.sft.on_long_row, "sft.on_long_row"),
    ):
        if kind:
            state = "warning" if skip == "skip" else "error"
            advice = "metis-fast sft --check names all of them; "
            advice += f"{setting}=skip leaves them out" if skip == "skip" else f"mend them, or set {setting}=skip"
            yield Finding(what, state, f"{of}, {len(kind)} do not fit, the first: {kind[0].bad_row}", advice)
    if not wrong:
        yield Finding(what, "ok", of)
