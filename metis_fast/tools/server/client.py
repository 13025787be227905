"""A toolbox whose tools run in a tool server, on this machine or another.

A session begins on the server with its first call. When the server ends, or loses the session, so does what the session held (a
Python session's variables): its call raises InfrastructureError, and the episode is repeated from the prompt.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Mapping, Sequence

from metis_fast.config import ToolsConfig
from metis_fast.errors import InfrastructureError, ToolSetupError
from metis_fast.tools.arguments import too_deep
from metis_fast.tools.protocol import NO_EXTRA, ToolSpec
from metis_fast.tools.results import ToolResult
from metis_fast.tools.server.link import Link, Reply, ServerAddress, ask_once
from metis_fast.tools.server.settings import contents_of, different, settings_of
from metis_fast.tools.server.wire import (
    PROTOCOL,
    WAIT_S,
    Answer,
    Calling,
    Fault,
    Opening,
    WireError,
    decode_answer,
    encode_calling,
    encode_opening,
    from_json,
    offer_of,
)
from metis_fast.types import ImageBlob, Observation, ToolName

_LARGE = 1 << 16  # bytes; a larger answer is not read on the event loop
_PUTS = 3  # rounds of sending images: others may push them out of the server meanwhile
_END_S = 5.0  # for telling that a session ended; otherwise the server finds out by itself


class SessionLost(InfrastructureError):
    """The server does not know the session: it ended, was idle for too long, or the server was started again."""


class ServerToolbox:
    """Sessions in a tool server. See `Toolbox` for the contract.

    Raises:
        ToolSetupError: no server at `tools.server.url`, it refuses the token, or its tools or their settings are not the run's.
    """

    def __init__(self, config: ToolsConfig) -> None:
        self.config = config.server
        self.address = ServerAddress(config.server)
        told = ask_once(self.address, "/tools")
        self._tools, self.offer = _read_tools(told, self.address, config), offer_of(told.body)
        self.closed = False

    @property
    def names(self) -> Sequence[str]:
        """The built-in tools in the order of the configuration, then others of the server."""
        return tuple(tool.name for tool in self._tools)

    @property
    def tools(self) -> Sequence[ToolSpec]:
        """In the same order."""
        return self._tools

    def session(
        self, images: Sequence[ImageBlob], extra: Mapping[str, object] = NO_EXTRA, seen: Sequence[tuple[int, int]] = ()
    ) -> ServerToolSession:
        """Tools for one rollout; nothing is sent before the first call."""
        return ServerToolSession(self, tuple(images), extra, tuple(seen))

    def close(self) -> None:
        """No session opens any more; the server lives on."""
        self.closed = True


class ServerToolSession:
    """The tools of one rollout. See `ToolSession` for the contract."""

    def __init__(
        self,
        toolbox: ServerToolbox,
        images: tuple[ImageBlob, ...],
        extra: Mapping[str, object],
        seen: tuple[tuple[int, int], ...],
    ) -> None:
        self._toolbox, self._images, self._extra, self._seen = toolbox, images, extra, seen
        self._link = Link(toolbox.address)
        self._known: dict[str, ImageBlob] = {}
        self._path = ""  # of the session on the server; empty: there is none
        self._number = 0

    async def call(self, name: str, arguments: Mapping[str, object]) -> ToolResult | Observation:
        """Run one tool; see `ToolSession.call`. After a failure of ours the next call begins anew, in another session.

        Raises:
            ToolSetupError: the server was started again with other tools or settings. It ends the run.
        """
        if refused := too_deep(name, arguments):
            return refused
        if self._toolbox.closed:
            raise InfrastructureError("the toolbox is closed")
        end = time.monotonic() + self._toolbox.config.timeout_s
        answered = False
        try:
            if not self._path:
                self._path = await self._open(end)
            self._number += 1
            answer = await self._answer(name, arguments, end)
            answered = True
        finally:
            if not answered:  # also where it was cancelled: what it did to the session is not known
                await self._end()
        self._known |= {image.sha256: image for image in answer.fresh}
        return answer.result

    async def _ask(self, method: str, path: str, body: bytes | None, end: float) -> Reply:
        left_s = end - time.monotonic()
        if left_s <= 0:
            raise InfrastructureError(f"a tool call took more than tools.server.timeout_s={self._toolbox.config.timeout_s:g} s")
        return await self._link.ask(method, path, body, left_s, self._toolbox.config.retries)

    async def _open(self, end: float) -> str:
        """The path of a new session."""
        self._number, self._known = 0, {image.sha256: image for image in self._images}
        images, key = tuple(image.sha256 for image in self._images), secrets.token_hex(16)
        opening = Opening(images, self._extra, self._seen, key, self._toolbox.offer)
        body = encode_opening(opening)
        reply = await self._ask("POST", "/sessions", body, end)
        for _ in range(_PUTS):
            if reply.failure is None or reply.failure.fault is not Fault.IMAGES:
                break
            for sha256 in reply.failure.missing:
                if sha256 not in self._known:
                    raise InfrastructureError("the tool server asks for an image that no prompt has")
                sent = await self._ask("PUT", f"/blobs/{sha256}", self._known[sha256].data, end)
                if sent.status != 204:
                    raise self._failure(sent)
            reply = await self._ask("POST", "/sessions", body, end)
        match _json(reply) if reply.status == 201 else None:
            case {"session": str() as session} if session.isalnum() and session.isascii():
                return f"/sessions/{session}"
        if reply.failure is not None and reply.failure.fault is Fault.TOOLS:
            # another session would be opened, and read as if its tools were what the run has
            raise ToolSetupError(
                f"the tool server at {self._toolbox.address} has other tools or settings, or is of another release, than when "
                "this run began; start it as it was, then resume"
            )
        raise self._failure(reply)

    async def _answer(self, name: str, arguments: Mapping[str, object], end: float) -> Answer:
        while True:
            left_s = max(end - time.monotonic(), 0.001)
            calling = Calling(self._number, name, arguments, deadline_s=left_s, wait_s=min(WAIT_S, left_s))
            reply = await self._ask("POST", f"{self._path}/calls", encode_calling(calling), end)
            if reply.status == 200:
                break
            if reply.status != 202:
                raise self._failure(reply)
        try:
            if len(reply.body) > _LARGE:
                return await asyncio.to_thread(decode_answer, reply.body, self._known)
            return decode_answer(reply.body, self._known)
        except WireError as error:
            raise InfrastructureError(f"the tool server at {self._toolbox.address} answered with {error}") from None

    def _failure(self, reply: Reply) -> InfrastructureError:
        failure = reply.failure
        if failure is None:
            return InfrastructureError(
                f"no tool server answers at tools.server.url={self._toolbox.address}: HTTP status {reply.status}"
            )
        kind = SessionLost if failure.fault is Fault.NO_SESSION else InfrastructureError
        return kind(f"the tool server at {self._toolbox.address}: {failure.fault}: {failure.text}")

    async def _end(self) -> None:
        path, self._path = self._path, ""
        if path:
            with contextlib.suppress(InfrastructureError):  # it ends there by itself, after tools.serve.idle_s
                await self._link.ask("DELETE", path, None, _END_S, retries=0)
        await self._link.close()

    async def close(self) -> None:
        """End the session on the server, if it can be reached; otherwise it ends there after `tools.serve.idle_s`."""
        await self._end()


def _read_tools(reply: Reply, address: ServerAddress, config: ToolsConfig) -> Sequence[ToolSpec]:
    """The server's tools, if they are those of the run.

    Raises:
        ToolSetupError: they are not.
    """
    where = f"the tool server at tools.server.url={address}"
    if reply.status == 401:
        token = config.server.token_env or "no variable, see tools.server.token_env"
        said = reply.failure.text if reply.failure is not None else "HTTP status 401"
        raise ToolSetupError(f"{where} refuses the token ({token}): {said}; set the variable to the server's token")
    match _json(reply) if reply.status == 200 else None:
        case {"protocol": int() as protocol, "version": str() as version} if protocol != PROTOCOL:
            raise ToolSetupError(
                f"{where} speaks protocol {protocol} (release {version}), and this run protocol {PROTOCOL}; install the same "
                "release for both, and start the server again"
            )
    told = _decoded(reply)
    if told is None:
        raise ToolSetupError(
            f"what answers at tools.server.url={address} is no tool server of this version (HTTP status {reply.status}); set "
            "the address that metis-fast tools serve prints"
        )
    tools, settings, contents = told
    served = {tool.name: tool for tool in tools}
    ours, theirs = set(config.enabled), {name for name in ToolName if name in served}
    if ours != theirs:
        raise ToolSetupError(
            f"{where} has {', '.join(sorted(theirs)) or 'no built-in tool'}, tools.enabled names "
            f"{', '.join(sorted(ours)) or 'none'}; give both the same tools"
        )
    if wrong := different(settings_of(config), settings):
        raise ToolSetupError(f"{where} has other settings than this run: {wrong}; give both the same tools")
    others = [key for key, ours in contents_of(config).items() if contents.get(key, ours) != ours]
    if others:
        raise ToolSetupError(
            f"{where} has another content of {', '.join(others)} than the files that this run's settings name; give both the "
            "same files, or leave them out here"
        )
    built_in = [served[name] for name in dict.fromkeys(config.enabled)]
    return (*built_in, *(tool for tool in tools if tool.name not in ours))


def _decoded(reply: Reply) -> tuple[Sequence[ToolSpec], Mapping[str, object], Mapping[str, object]] | None:
    """Tools, settings, and contents of files by their key; None: it is no answer of a tool server."""
    match _json(reply) if reply.status == 200 else None:
        case {"protocol": int() as protocol, "tools": list() as tools, "settings": dict() as settings, **told} if (
            protocol == PROTOCOL
        ):
            specs: list[ToolSpec] = []
            for tool in tools:
                match tool:
                    case {"name": str() as name, "description": str() as description, "schema": dict() as schema}:
                        specs.append(ToolSpec(name, description, schema))
                    case _:
                        return None
            contents = told.get("contents", {})
            return (tuple(specs), settings, contents) if isinstance(contents, dict) else None
    return None


def _json(reply: Reply) -> object:
    """Of its body; None: it has none."""
    try:
        return from_json(reply.body)
    except WireError:
        return None
