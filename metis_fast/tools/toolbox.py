"""Sessions over the local tools: checks names and arguments, sends each call to its tool."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

from metis_fast.config import ToolsConfig
from metis_fast.machine import num_cores
from metis_fast.tools.protocol import NO_EXTRA
from metis_fast.tools.python_tool import PythonServer, PythonTool
from metis_fast.tools.results import Refusal, Refused, ToolResult
from metis_fast.tools.search import ImageSource, TextSource, open_image_source, open_text_source
from metis_fast.types import ImageBlob, ToolName

_ALIASES = {"search": ToolName.TEXT_SEARCH}
# The one argument of each tool, a string; None: no arguments.
_ARGUMENT = {ToolName.PYTHON: "code", ToolName.TEXT_SEARCH: "query", ToolName.IMAGE_SEARCH: None}


class LocalToolbox:
    """The tools of one run on this machine. See `Toolbox` in `protocol` for the contract."""

    def __init__(
        self, config: ToolsConfig, python: PythonServer | None, text: TextSource | None, image: ImageSource | None
    ) -> None:
        """python, text, image: None where the tool is not enabled."""
        self.config = config
        self.python = python
        self.text = text
        self.image = image
        self._names = tuple(dict.fromkeys(config.enabled))
        self._gate: tuple[asyncio.AbstractEventLoop, asyncio.Semaphore] | None = None

    @staticmethod
    def open(config: ToolsConfig, scratch: Path) -> LocalToolbox:
        """See `tools.open_toolbox`."""
        on = set(config.enabled)
        with ExitStack() as undo:
            text = open_text_source(config.text_search) if ToolName.TEXT_SEARCH in on else None
            if text is not None:
                undo.callback(text.close)
            image = open_image_source(config.image_search) if ToolName.IMAGE_SEARCH in on else None
            if image is not None:
                undo.callback(image.close)
            python = PythonServer(config.python, scratch) if ToolName.PYTHON in on else None
            undo.pop_all()
        return LocalToolbox(config, python, text, image)

    @property
    def names(self) -> Sequence[ToolName]:
        """The enabled tools, in the order of the configuration."""
        return self._names

    @property
    def num_slots(self) -> int:
        """Calls of `python` that run at the same time."""
        return 2 * num_cores()

    def gate(self) -> asyncio.Semaphore:
        """Limits the calls of `python` that run at the same time; one a loop, because a semaphore belongs to its loop.

        Searches limit themselves: one that waits for the web must not keep code from running.
        """
        loop = asyncio.get_running_loop()
        if self._gate is None or self._gate[0] is not loop:
            self._gate = (loop, asyncio.Semaphore(self.num_slots))
        return self._gate[1]

    def session(
        self, images: Sequence[ImageBlob], extra: Mapping[str, object] = NO_EXTRA, seen: Sequence[tuple[int, int]] = ()
    ) -> LocalSession:
        """Tools for one rollout; starts nothing."""
        return LocalSession(self, tuple(images), extra, tuple(seen))

    def close(self) -> None:
        """Stop the Python server, close what searches opened. Sessions still open die."""
        for part in (self.python, self.text, self.image):
            if part is not None:
                part.close()


class LocalSession:
    """The tools of one rollout. See `ToolSession` in `protocol` for the contract."""

    def __init__(
        self,
        toolbox: LocalToolbox,
        images: tuple[ImageBlob, ...],
        extra: Mapping[str, object],
        seen: tuple[tuple[int, int], ...],
    ) -> None:
        assert not seen or len(seen) == len(images)
        self._toolbox = toolbox
        self._images = images
        self._extra = extra
        self._searched_image = False
        self._python: PythonTool | None = None
        if toolbox.python is not None:
            limits = toolbox.config.python
            sizes = seen if limits.images == "seen" else ()
            self._python = PythonTool(toolbox.python, images, limits.timeout_s, limits.max_output_chars, sizes)

    async def call(self, name: str, arguments: Mapping[str, object]) -> ToolResult:
        """Run one tool; see `ToolSession.call`."""
        known = _ALIASES.get(name, name)
        if known not in self._toolbox.names:
            names = ", ".join(self._toolbox.names) or "none"
            return Refused(f"There is no tool {name[:100]!r}. Tools: {names}.", Refusal.NO_TOOL, name)
        tool = ToolName(known)
        key = _ARGUMENT[tool]
        if key is None:
            if arguments:
                return Refused(f"{tool} takes no arguments: {{}}.", Refusal.ARGUMENTS, name)
            return await self._search_image()
        value = arguments.get(key)
        if not isinstance(value, str) or len(arguments) != 1:
            return Refused(f'{tool} expects one argument, a string: {{"{key}": "..."}}.', Refusal.ARGUMENTS, name)
        if tool is ToolName.PYTHON:
            assert self._python is not None
            async with self._toolbox.gate():
                return await self._python.call(value)
        assert self._toolbox.text is not None
        return await self._toolbox.text.search(value)

    async def _search_image(self) -> ToolResult:
        if self._searched_image:
            return Refused(
                "image_search can be called only once; its result is above.", Refusal.REPEATED, ToolName.IMAGE_SEARCH
            )
        assert self._toolbox.image is not None
        result = await self._toolbox.image.search(self._images, self._extra)
        self._searched_image = not isinstance(result, Refused)  # nor does an infrastructure error use up the one call
        return result

    async def close(self) -> None:
        """Kill the Python session, if one runs, and wait until it is gone."""
        if self._python is not None:
            await self._python.close()
