"""Sessions over the local tools: checks names and arguments, sends each call to its tool."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path

from metis_fast.config import ToolsConfig
from metis_fast.machine import num_cores
from metis_fast.tools.image_search import ImageSearch
from metis_fast.tools.python_tool import PythonServer, PythonTool
from metis_fast.tools.text_search import TextSearch
from metis_fast.types import ImageBlob, Observation, Outcome, ToolName

_ALIASES = {"search": ToolName.TEXT_SEARCH}
# The one argument of each tool, a string; None: no arguments.
_ARGUMENT = {ToolName.PYTHON: "code", ToolName.TEXT_SEARCH: "query", ToolName.IMAGE_SEARCH: None}


def _agent_error(text: str) -> Observation:
    return Observation(text.replace("<image>", "< image >"), outcome=Outcome.TOOL_ERROR)


class LocalToolbox:
    """The tools of one run on this machine. See `Toolbox` in `protocol` for the contract."""

    def __init__(
        self, config: ToolsConfig, python: PythonServer | None, text: TextSearch | None, image: ImageSearch | None
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
        text = TextSearch(config.text_search) if ToolName.TEXT_SEARCH in on else None
        image = ImageSearch(config.image_search) if ToolName.IMAGE_SEARCH in on else None
        python = PythonServer(config.python, scratch) if ToolName.PYTHON in on else None  # last: nothing to undo above
        return LocalToolbox(config, python, text, image)

    @property
    def names(self) -> Sequence[ToolName]:
        """The enabled tools, in the order of the configuration."""
        return self._names

    @property
    def num_slots(self) -> int:
        """Calls that run at the same time."""
        return 2 * num_cores()

    def gate(self) -> asyncio.Semaphore:
        """Limits the calls that run at the same time; one a loop, because a semaphore belongs to its loop."""
        loop = asyncio.get_running_loop()
        if self._gate is None or self._gate[0] is not loop:
            self._gate = (loop, asyncio.Semaphore(self.num_slots))
        return self._gate[1]

    def session(self, images: Sequence[ImageBlob]) -> LocalSession:
        """Tools for one rollout; starts nothing."""
        return LocalSession(self, tuple(images))

    def close(self) -> None:
        """Stop the Python server. Sessions still open die."""
        if self.python is not None:
            self.python.close()


class LocalSession:
    """The tools of one rollout. See `ToolSession` in `protocol` for the contract."""

    def __init__(self, toolbox: LocalToolbox, images: tuple[ImageBlob, ...]) -> None:
        self._toolbox = toolbox
        self._images = images
        self._image_searches = 0
        self._python: PythonTool | None = None
        if toolbox.python is not None:
            limits = toolbox.config.python
            self._python = PythonTool(toolbox.python, images, limits.timeout_s, limits.max_output_chars)

    async def call(self, name: str, arguments: Mapping[str, object]) -> Observation:
        """Run one tool; see `ToolSession.call`."""
        known = _ALIASES.get(name, name)
        if known not in self._toolbox.names:
            names = ", ".join(self._toolbox.names) or "none"
            return _agent_error(f"There is no tool {name[:100]!r}. Tools: {names}.")
        tool = ToolName(known)
        key = _ARGUMENT[tool]
        if key is None:
            if arguments:
                return _agent_error(f"{tool} takes no arguments: {{}}.")
            return await self._search_image()
        value = arguments.get(key)
        if not isinstance(value, str) or len(arguments) != 1:
            return _agent_error(f'{tool} expects one argument, a string: {{"{key}": "..."}}.')
        async with self._toolbox.gate():
            if tool is ToolName.PYTHON:
                assert self._python is not None
                return await self._python.call(value)
            assert self._toolbox.text is not None
            return await asyncio.to_thread(self._toolbox.text.search, value)

    async def _search_image(self) -> Observation:
        if not self._images:
            return _agent_error("image_search needs an image in the prompt; there is none.")
        if self._image_searches:
            return _agent_error("image_search can be called only once; its result is above.")
        assert self._toolbox.image is not None
        async with self._toolbox.gate():
            observation = await asyncio.to_thread(self._toolbox.image.search, self._images[0])
        self._image_searches += 1  # after it ran: an infrastructure error does not use up the one call
        return observation

    async def close(self) -> None:
        """Kill the Python session, if one runs, and wait until it is gone."""
        if self._python is not None:
            await self._python.close()
