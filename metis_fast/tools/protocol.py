"""What a tool is to the rest of the system: an async call from arguments to a result, in a session of one rollout.

A tool answers the agent's own mistakes (bad code, an unknown argument, a time-out of the agent's program) with a result that
says so. A failure of our machinery raises `InfrastructureError`, which the episode retries. How the agent reads a result is up
to the protocol of the run (`rollout.protocols`); a tool of your own may return an `Observation`, which is read as it stands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Protocol

from metis_fast.tools.results import ToolResult
from metis_fast.tools.sandbox.wire import MAX_IMAGES
from metis_fast.types import ImageBlob, Observation

NO_EXTRA: Mapping[str, object] = MappingProxyType({})

MAX_CALL_IMAGES = MAX_IMAGES
"""Most images of an observation."""


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """A tool as a model is told of it, and as its calls are checked.

    name: what a call names. description: what it does, for the model. schema: JSON schema of its arguments, an object.
    """

    name: str
    description: str
    schema: Mapping[str, object]


class ToolSession(Protocol):
    """The tools of one rollout; whatever state they keep (a Python session, a count of calls) lives and dies with it."""

    async def call(self, name: str, arguments: Mapping[str, object]) -> ToolResult | Observation:
        """Run one tool.

        name: as the agent wrote it; an unknown or disabled one is `Refused`.

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
    def names(self) -> Sequence[str]:
        """The tools that answer: those of `tools`, in that order."""
        ...

    @property
    def tools(self) -> Sequence[ToolSpec]:
        """What a model may be told of them: the built-in ones that are enabled, then others."""
        ...

    def session(
        self, images: Sequence[ImageBlob], extra: Mapping[str, object] = NO_EXTRA, seen: Sequence[tuple[int, int]] = ()
    ) -> ToolSession:
        """Tools for one rollout. Cheap: costly parts start with the first call that needs them.

        images, extra: those of its prompt; the images are `image_1`, `image_2`, ... in Python. seen: (width, height) in which
        the model sees each of them; empty where that is not known.
        """
        ...

    def close(self) -> None:
        """Stop servers and remove scratch files. Sessions still open die."""
        ...
