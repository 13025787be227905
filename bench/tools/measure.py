"""Times and memory of sessions and calls. All candidates are measured in turn in every round."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np

from ..candidate import Spread
from .candidates import Candidate, Session

CODE = "print(sum(i * i for i in range(10)))"
_PRINTED = "285\n"
_STATE = (("kept = 6 * 7\nprint(kept)", "42\n"), ("print(kept + 1)", "43\n"))
_AT_ONCE = 16  # sessions that are opened and closed at a time, for sessions a second and memory


@dataclass(frozen=True, slots=True)
class Work:
    """How much. sessions: numbers of them that call at the same time. calls: of a round, of all sessions together, at least one
    each. starts: sessions of a round that are opened one after the other. churn: that are opened and closed, 16 at a time."""

    sessions: tuple[int, ...]
    calls: int
    starts: int
    churn: int


@dataclass(frozen=True, slots=True)
class Latency:
    """Of calls while so many sessions call without a pause, in seconds."""

    sessions: int
    p50: float
    p99: float
    calls: int


@dataclass(frozen=True, slots=True)
class Row:
    """start: seconds until the first call of a session is answered. close: until it is gone. per_s: sessions opened, used once
    and closed in a second, 16 at a time. memory: bytes for each of 16 open sessions (their share of what processes share)."""

    impl: str
    start: Spread
    close: Spread
    per_s: float
    memory: int | None
    latencies: tuple[Latency, ...]


@dataclass
class Seen:
    """Of one candidate, all rounds together; in seconds, sessions a second and bytes."""

    start: list[float] = field(default_factory=list)
    close: list[float] = field(default_factory=list)
    per_s: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    calls: dict[int, list[float]] = field(default_factory=dict)

    def row(self, impl: str) -> Row:
        """What a table tells of it."""
        latencies = tuple(
            Latency(num, float(np.percentile(times, 50)), float(np.percentile(times, 99)), len(times))
            for num, times in self.calls.items()
        )
        memory = int(np.median(self.memory)) if self.memory else None
        return Row(impl, _spread(self.start), _spread(self.close), float(np.median(self.per_s)), memory, latencies)


def _spread(values: Sequence[float]) -> Spread:
    return Spread(float(np.median(values)), min(values), max(values))


async def wrong(candidate: Candidate) -> str:
    """What is not as it should be; empty: the right things are printed."""
    session = await candidate.open()
    try:
        calls = [(CODE, _PRINTED), *(_STATE if candidate.keeps_state else ())]
        for code, expected in calls:
            got = await session.call(code)
            if got != expected:
                return f"{code!r} printed {got[:200]!r} instead of {expected!r}"
    finally:
        await session.close()
    return ""


async def measure(candidate: Candidate, work: Work, seen: Seen) -> None:
    """One round."""
    for _ in range(work.starts):
        began = time.perf_counter()
        session = await candidate.open()
        await session.call(CODE)
        seen.start.append(time.perf_counter() - began)
        began = time.perf_counter()
        await session.close()
        seen.close.append(time.perf_counter() - began)
    seen.per_s.append(await _churn(candidate, work.churn))
    if candidate.keeps_state:
        seen.memory.append(await _memory(candidate))
    for num in work.sessions:
        seen.calls.setdefault(num, []).extend(await _calls(candidate, num, max(1, work.calls // num)))


async def _open(candidate: Candidate, num: int) -> list[Session]:
    """Sessions that have answered a call each."""
    gate = asyncio.Semaphore(_AT_ONCE)

    async def one() -> Session:
        async with gate:
            session = await candidate.open()
            await session.call(CODE)
            return session

    return await asyncio.gather(*(one() for _ in range(num)))


async def _close(sessions: Sequence[Session]) -> None:
    await asyncio.gather(*(session.close() for session in sessions))


async def _churn(candidate: Candidate, num: int) -> float:
    gate = asyncio.Semaphore(_AT_ONCE)

    async def one() -> None:
        async with gate:
            session = await candidate.open()
            await session.call(CODE)
            await session.close()

    began = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(num)))
    return num / (time.perf_counter() - began)


async def _memory(candidate: Candidate) -> int:
    before = _resident()
    sessions = await _open(candidate, _AT_ONCE)
    after = _resident()
    await _close(sessions)
    return (after - before) // _AT_ONCE


def _resident() -> int:
    """Bytes of the processes under this one, pages that several share counted once (PSS)."""
    import psutil  # only of the extra [bench]; other benchmarks need none of it

    total = 0
    for process in psutil.Process(os.getpid()).children(recursive=True):
        with suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            total += process.memory_full_info().pss
    return total


async def _calls(candidate: Candidate, num: int, calls: int) -> list[float]:
    """Seconds of each call, `calls` of every one of `num` sessions."""
    sessions = await _open(candidate, num)
    times: list[float] = []

    async def one(session: Session) -> None:
        for _ in range(calls):
            began = time.perf_counter()
            await session.call(CODE)
            times.append(time.perf_counter() - began)

    await asyncio.gather(*(one(session) for session in sessions))
    await _close(sessions)
    return times
