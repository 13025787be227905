"""Sessions over the tools of this machine: checks names and arguments, sends each call to its tool."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass
from pathlib import Path

from metis_fast.config import McpServerConfig, ToolsConfig
from metis_fast.errors import ToolSetupError
from metis_fast.machine import num_cores
from metis_fast.tools.arguments import Arguments, too_deep
from metis_fast.tools.builtin import ALIASES, ImageSearchSource, PythonSource, TextSearchSource
from metis_fast.tools.protocol import NO_EXTRA, ToolSession, ToolSpec
from metis_fast.tools.python_tool import PythonServer
from metis_fast.tools.results import Refusal, Refused, ToolResult
from metis_fast.tools.search import ImageSource, TextSource, open_image_source, open_text_source
from metis_fast.tools.tool import OwnTool, ToolPrompt, ToolSource
from metis_fast.types import ImageBlob, Observation, ToolName


@dataclass(frozen=True, slots=True)
class _Entry:
    """A tool of a toolbox. source: its place among the sources."""

    spec: ToolSpec
    source: int
    arguments: Arguments


_MOST_CALLS = 256  # of `python` under way, a core: those that sleep cost nothing


class LocalToolbox:
    """The tools of one run on this machine. See `Toolbox` in `protocol` for the contract."""

    def __init__(
        self,
        config: ToolsConfig,
        python: PythonServer | None,
        text: TextSource | None,
        image: ImageSource | None,
        others: Sequence[ToolSource] = (),
    ) -> None:
        """python, text, image: None where the tool is not enabled. others: behind the built-in tools.

        Raises:
            ToolSetupError: two tools have the same name.
        """
        self.config = config
        self.python = python
        self.text = text
        self.image = image
        built_in: dict[ToolName, ToolSource] = {}
        if python is not None:
            built_in[ToolName.PYTHON] = PythonSource(python, config.python, self.gate)
        if text is not None:
            built_in[ToolName.TEXT_SEARCH] = TextSearchSource(text)
        if image is not None:
            built_in[ToolName.IMAGE_SEARCH] = ImageSearchSource(image)
        on = [built_in[name] for name in dict.fromkeys(config.enabled) if name in built_in]
        self.sources: Sequence[ToolSource] = (*on, *others)
        self._entries = dict(_entries(self.sources, len(on)))
        self._gate: tuple[asyncio.AbstractEventLoop, asyncio.Semaphore] | None = None

    @staticmethod
    def open(config: ToolsConfig, scratch: Path, folder: Path | None = None) -> LocalToolbox:
        """See `tools.open_toolbox`. folder: where tools of one's own and commands of MCP servers are looked for; None: the
        working folder."""
        on = set(config.enabled)
        folder = folder if folder is not None else Path.cwd()
        with ExitStack() as undo:
            others: list[ToolSource] = []
            for place in config.own:
                others.append(OwnTool.load(place, folder, config.own_timeout_s, config.max_output_chars))
                undo.callback(others[-1].close)
            text = open_text_source(config.text_search) if ToolName.TEXT_SEARCH in on else None
            if text is not None:
                undo.callback(text.close)
            image = open_image_source(config.image_search) if ToolName.IMAGE_SEARCH in on else None
            if image is not None:
                undo.callback(image.close)
            for number, server in enumerate(config.mcp):
                others.append(_open_mcp(server, f"tools.mcp.{number}", folder, config.max_output_chars))
                undo.callback(others[-1].close)
            python = PythonServer(config.python, scratch) if ToolName.PYTHON in on else None
            if python is not None:
                undo.callback(python.close)
            toolbox = LocalToolbox(config, python, text, image, others)
            undo.pop_all()
        return toolbox

    @property
    def names(self) -> Sequence[str]:
        """The built-in tools in the order of the configuration, then others."""
        return tuple(self._entries)

    @property
    def tools(self) -> Sequence[ToolSpec]:
        """In the same order."""
        return tuple(entry.spec for entry in self._entries.values())

    def find(self, name: str) -> _Entry | None:
        """The tool that a call names."""
        return self._entries.get(ALIASES.get(name, name))

    @property
    def num_slots(self) -> int:
        """Calls of `python` that may be under way. How many of them compute at the same time is up to its server (`Slots`)."""
        return _MOST_CALLS * num_cores()

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
        return LocalSession(self, ToolPrompt(tuple(images), extra, tuple(seen)))

    def close(self) -> None:
        """Stop what the tools keep: servers, files. Sessions still open die."""
        with ExitStack() as stack:  # each of them, whatever happens to the others
            for source in self.sources:
                stack.callback(source.close)


class LocalSession:
    """The tools of one rollout. See `ToolSession` in `protocol` for the contract."""

    def __init__(self, toolbox: LocalToolbox, prompt: ToolPrompt) -> None:
        assert not prompt.seen or len(prompt.seen) == len(prompt.images)
        self._toolbox = toolbox
        self._prompt = prompt
        self._open: dict[int, ToolSession] = {}  # by source

    async def call(self, name: str, arguments: Mapping[str, object]) -> ToolResult | Observation:
        """Run one tool; see `ToolSession.call`."""
        if refused := too_deep(name, arguments):
            return refused
        entry = self._toolbox.find(name)
        if entry is None:
            names = ", ".join(self._toolbox.names) or "none"
            return Refused(f"There is no tool {name[:100]!r}. Tools: {names}.", Refusal.NO_TOOL, name)
        if problem := entry.arguments.problem(arguments):
            return Refused(problem, Refusal.ARGUMENTS, name)
        if entry.source not in self._open:
            self._open[entry.source] = self._toolbox.sources[entry.source].session(self._prompt)
        return await self._open[entry.source].call(entry.spec.name, arguments)

    async def close(self) -> None:
        """End what the tools keep for the rollout, and wait until it is gone."""
        async with AsyncExitStack() as stack:  # each of them, whatever happens to the others
            for session in self._open.values():
                stack.push_async_callback(session.close)


def _open_mcp(server: McpServerConfig, key: str, folder: Path, max_chars: int) -> ToolSource:
    try:
        from metis_fast.tools.mcp import McpSource  # at first use: the SDK takes a second to import
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "mcp":
            raise
        raise ToolSetupError("tools.mcp needs the MCP SDK; in the project's folder: pip install -e '.[mcp]'") from None
    return McpSource.open(server, key, folder, max_chars)


def _entries(sources: Sequence[ToolSource], built_in: int) -> Iterator[tuple[str, _Entry]]:
    """Tools by name. built_in: so many of the sources are.

    Raises:
        ToolSetupError: see `LocalToolbox`.
    """
    taken = {name: "a built-in tool" for name in (*ToolName, *ALIASES)}  # also of those that are off: protocols know them
    for number, source in enumerate(sources):
        for spec in source.tools:
            if number >= built_in and spec.name in taken:
                raise ToolSetupError(
                    f"two tools are called {spec.name!r}, one of them {taken[spec.name]}; rename the other, or give the tools "
                    "of an MCP server a prefix (tools.mcp: prefix)"
                )
            taken[spec.name] = "of tools.own or tools.mcp"
            yield spec.name, _Entry(spec, number, Arguments(spec))
