"""What a tool is to the rest of the system: an async call from arguments to an `Observation`, in a session of one rollout.

A tool answers the agent's own mistakes (bad code, an unknown argument, a time-out of the agent's program) with an
`Observation` whose outcome is TOOL_ERROR. A failure of our machinery raises `InfrastructureError`, which the episode
retries; it never becomes an observation.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from metis_fast.tools.sandbox.wire import MAX_IMAGES
from metis_fast.types import ImageBlob, Observation, ToolName

MAX_CALL_IMAGES = MAX_IMAGES
"""Most images of an observation."""


class ToolSession(Protocol):
    """The tools of one rollout; whatever state they keep (a Python session, a count of calls) lives and dies with it."""

    async def call(self, name: str, arguments: Mapping[str, object]) -> Observation:
        """Run one tool.

        name: as the agent wrote it; an unknown or disabled name is a TOOL_ERROR that lists the tools there are.

        Raises:
            InfrastructureError: our machinery failed. The session may be used again; state of the failed tool is lost.
        """
        ...

    async def close(self) -> None:
        """End the session: its processes are gone and its files removed when this returns. May be called twice."""
        ...


class Toolbox(Protocol):
    """Opens sessions. One per run; made by `tools.open_toolbox`."""

    @property
    def names(self) -> Sequence[ToolName]:
        """The enabled tools."""
        ...

    def session(self, images: Sequence[ImageBlob]) -> ToolSession:
        """Tools for one rollout whose prompt holds `images` (`image_1`, `image_2`, ... in Python). Cheap: costly parts
        start with the first call that needs them."""
        ...

    def close(self) -> None:
        """Stop servers and remove scratch files. Sessions still open die."""
        ...
