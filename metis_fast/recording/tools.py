"""Toolboxes that record, and that replay. See `Toolbox` and `ToolSession` in `tools.protocol` for the contracts."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from typing import cast

from metis_fast.config import ToolsConfig
from metis_fast.errors import InfrastructureError, RecordingError
from metis_fast.recording.asking import Answer, Asked, History, read_answer, write_answer
from metis_fast.recording.file import Recording
from metis_fast.recording.rollout import PLAYED
from metis_fast.tools.arguments import too_deep
from metis_fast.tools.protocol import NO_EXTRA, Toolbox, ToolSession, ToolSpec
from metis_fast.tools.results import ToolResult
from metis_fast.types import ImageBlob, Observation

_TOOLS = "tools"
_SHOWN = 160  # characters of the arguments of a call that is missing


class RecordingToolbox:
    """Writes down what another one answers.

    A search is not made if its answer is there already: the first one is everyone's. A tool that keeps a state runs always,
    since another rollout's answers would not fit what its own session holds, and each rollout keeps what it was told.
    """

    def __init__(self, toolbox: Toolbox, config: ToolsConfig, recording: Recording) -> None:
        self._toolbox, self._config, self._recording = toolbox, config, recording
        tools = [{"name": tool.name, "description": tool.description, "schema": dict(tool.schema)} for tool in toolbox.tools]
        # a prompt shows a schema as it is written, so a replay has to find its keys in the same order
        recording.describe({_TOOLS: json.dumps(tools)})

    @property
    def names(self) -> Sequence[str]:
        """Those of the other one."""
        return self._toolbox.names

    @property
    def tools(self) -> Sequence[ToolSpec]:
        """Those of the other one."""
        return self._toolbox.tools

    def session(
        self, images: Sequence[ImageBlob], extra: Mapping[str, object] = NO_EXTRA, seen: Sequence[tuple[int, int]] = ()
    ) -> _RecordingSession:
        """Tools for one rollout."""
        opened = self._toolbox.session(images, extra, seen)
        return _RecordingSession(opened, History(self._config, images, extra, seen), self._recording)

    def close(self) -> None:
        """Close the other one."""
        self._toolbox.close()


class _RecordingSession:
    def __init__(self, session: ToolSession, history: History, recording: Recording) -> None:
        self._session, self._history, self._recording = session, history, recording

    async def call(self, name: str, arguments: Mapping[str, object]) -> ToolResult | Observation:
        """See `ToolSession.call`. A failure of ours is never recorded.

        Raises:
            RecordingError: the file cannot be read or written.
            InfrastructureError: see there.
        """
        if refused := too_deep(name, arguments):  # a key could not be made of them
            return refused
        asked = self._history.ask(name, arguments)
        answer = await asyncio.to_thread(self._recording.find, asked) if asked.scope is None else None
        if answer is None:
            try:
                result = await self._session.call(name, arguments)
            except InfrastructureError:
                self._history.lost(asked)
                raise
            answer = await asyncio.to_thread(self._keep, asked, PLAYED.get().name, result)
        self._history.answered(asked, answer.sha256)
        return await asyncio.to_thread(_result, answer, self._recording)

    def _keep(self, asked: Asked, rollout: str, result: ToolResult | Observation) -> Answer:
        answer = write_answer(result)
        if asked.scope is None:
            return self._recording.keep(asked, answer)
        self._recording.keep_own(asked, rollout, answer)
        return answer

    async def close(self) -> None:
        """See `ToolSession.close`."""
        await self._session.close()


class ReplayingToolbox:
    """Answers from a recording; nothing runs, and nobody is asked."""

    def __init__(self, config: ToolsConfig, recording: Recording) -> None:
        """Raises:
        RecordingError: the file has no recording of tools.
        """
        self._config, self._recording = config, recording
        known = recording.about(_TOOLS)
        if known is None:
            raise RecordingError(f"{recording}: expected recorded tools, found none; record a run with tools.record first")
        self._tools = tuple(ToolSpec(**tool) for tool in json.loads(known))

    @property
    def names(self) -> Sequence[str]:
        """The tools of the recorded run."""
        return [tool.name for tool in self._tools]

    @property
    def tools(self) -> Sequence[ToolSpec]:
        """The tools of the recorded run."""
        return self._tools

    def session(
        self, images: Sequence[ImageBlob], extra: Mapping[str, object] = NO_EXTRA, seen: Sequence[tuple[int, int]] = ()
    ) -> _ReplayingSession:
        """Tools for one rollout."""
        return _ReplayingSession(History(self._config, images, extra, seen), self._recording)

    def close(self) -> None:
        """Nothing runs."""


class _ReplayingSession:
    def __init__(self, history: History, recording: Recording) -> None:
        self._history, self._recording = history, recording

    async def call(self, name: str, arguments: Mapping[str, object]) -> ToolResult | Observation:
        """What was answered when it was recorded.

        Raises:
            RecordingError: nothing is known of this call. It ends the run: it is neither an observation nor a failure to retry.
        """
        if refused := too_deep(name, arguments):
            return refused
        played = PLAYED.get()
        asked = self._history.ask(name, arguments)
        answer = await asyncio.to_thread(self._recording.find, asked, played.name)
        if answer is None:
            raise missing(self._recording, asked, played.row)
        self._history.answered(asked, answer.sha256)
        return await asyncio.to_thread(_result, answer, self._recording)

    async def close(self) -> None:
        """Nothing runs."""


def _result(answer: Answer, recording: Recording) -> ToolResult | Observation:
    known = answer.images  # of an answer that was just given

    def image(sha256: str) -> bytes:
        return known[sha256] if sha256 in known else recording.image(sha256)

    return cast("ToolResult | Observation", read_answer(answer.body, image))


def missing(recording: Recording, asked: Asked, row: str) -> RecordingError:
    """The error of a replay that comes to what was never recorded. row: for whom it was asked."""
    request = asked.request if len(asked.request) <= _SHOWN else f"{asked.request[:_SHOWN]}..."
    return RecordingError(
        f"{recording} has no answer for {asked.what}({request}) of {row}; replay with the settings, data, "
        "weights and release that were recorded, or record this run with tools.record"
    )
