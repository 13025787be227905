"""Which tools a rollout has: what its prompt says of them, and which calls are answered (`tools.describe`, `tools.offer`)."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

from metis_fast.config import ToolsConfig
from metis_fast.prompt_tools import offered_tools, with_tools
from metis_fast.tools.protocol import ToolSession, ToolSpec
from metis_fast.tools.results import Refusal, Refused, ToolResult
from metis_fast.types import Observation, Prompt, ToolName

_OTHER_NAMES = {"search": ToolName.TEXT_SEARCH.value}


class Offer:
    """For all rollouts of a run. tools: of its toolbox."""

    def __init__(self, config: ToolsConfig, tools: Sequence[ToolSpec]) -> None:
        self._by_row = config.offer == "row"
        self._names = [tool.name for tool in tools]
        built_in = {name.value for name in ToolName}
        self._described = [tool for tool in tools if tool.name not in built_in] if config.describe else []

    def by_row(self) -> Offer:
        """The same tools, of which a row may leave out some, whatever `tools.offer` says: for benchmarks without tools."""
        offer = copy.copy(self)
        offer._by_row = True
        return offer

    def allowed(self, prompt: Prompt) -> frozenset[str] | None:
        """Names of the tools that a row restricts its rollouts to; None: all."""
        if not self._by_row:
            return None
        names = prompt.tools if prompt.tools is not None else offered_tools(prompt) or None
        return None if names is None else frozenset(_OTHER_NAMES.get(name, name) for name in names)

    def described(self, prompt: Prompt) -> Prompt:
        """The prompt as the model reads it: it tells of every tool that is not built in and that the rollout has."""
        if not self._described:
            return prompt
        allowed = self.allowed(prompt)
        return with_tools(prompt, [tool for tool in self._described if allowed is None or tool.name in allowed])

    def limited(self, prompt: Prompt, session: ToolSession) -> ToolSession:
        """A session of the toolbox that answers for the tools of the rollout alone."""
        allowed = self.allowed(prompt)
        if allowed is None:
            return session
        return _Limited(session, allowed, [name for name in self._names if name in allowed])


class _Limited:
    def __init__(self, session: ToolSession, allowed: frozenset[str], names: Sequence[str]) -> None:
        """names: those that the toolbox has, for the agent."""
        self._session, self._allowed, self._names = session, allowed, names

    async def call(self, name: str, arguments: Mapping[str, object]) -> ToolResult | Observation:
        """See `ToolSession.call`."""
        if _OTHER_NAMES.get(name, name) not in self._allowed:
            there = ", ".join(self._names) or "none"
            return Refused(f"There is no tool {name[:100]!r} here. Tools: {there}.", Refusal.NO_TOOL, name)
        return await self._session.call(name, arguments)

    async def close(self) -> None:
        """See `ToolSession.close`."""
        await self._session.close()
