"""What our HTTP servers have in common: a token at the door, bodies within bounds, and an end that lets running work finish.

Imported where one of them is started only: fastapi, starlette and uvicorn come with the `server` extra.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator

import uvicorn
from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from metis_fast.errors import MetisError

HEALTH = "/health"
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""The format of Prometheus."""
BODY_S = 60.0
"""Seconds that a request's body may take."""
_SHORTEST = 16  # characters of a token
_KEEP_ALIVE_S = 75  # an idle connection; a rollout's is used again after each message of the model
_BACKLOG = 2048
_END_S = 5  # for replies that are still being sent, after the work has ended


def read_token(section: str, host: str, variable: str, error: type[MetisError]) -> str:
    """The token; empty where there is none, which only this machine may reach.

    section: of the settings, for messages. variable: environment variable that holds it, or empty.

    Raises:
        error: it is no token, or needed and not there.
    """
    token = os.environ.get(variable, "").strip() if variable else ""
    if token and (len(token) < _SHORTEST or not token.isascii() or not token.isprintable() or " " in token):
        raise error(
            f"the environment variable {variable} holds no token: expected at least {_SHORTEST} printable ASCII "
            "characters without blanks; set it anew, for example with openssl rand -hex 16"
        )
    if not token and not _is_loopback(host):
        raise error(
            f"{section}.host={host} can be reached by others, and no token is set "
            f"({variable or f'no variable, see {section}.token_env'}); set one, for example with openssl rand -hex 16, or "
            "serve on 127.0.0.1"
        )
    return token


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class TokenGate:
    """Lets requests in that bring the token; `HEALTH` needs none.

    token: empty where none is asked for; then requests of web pages are refused, which a browser on this machine would send.
    refuse: the response to others, with status 401, given what is wrong.
    """

    def __init__(self, app: ASGIApp, token: str, refuse: Callable[[str], Response]) -> None:
        self._app, self._refuse = app, refuse
        self._expected = f"Bearer {token}".encode() if token else b""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Of ASGI."""
        if scope["type"] == "http" and scope["path"] != HEALTH:
            headers = Headers(scope=scope)
            given = headers.get("authorization", "").encode("latin-1")
            text = ""
            if self._expected and not hmac.compare_digest(given, self._expected):
                text = "the token is wrong" if given else "a token is needed: Authorization: Bearer TOKEN"
            elif not self._expected and "origin" in headers:
                text = "web pages may not use this server"
            if text:
                response = self._refuse(text)
                response.headers["WWW-Authenticate"] = "Bearer"
                await response(scope, receive, send)
                return
        await self._app(scope, receive, send)


class BodyError(Exception):
    """The body of a request that is not read. too_large: it is longer than it may be; otherwise it did not come in time."""

    def __init__(self, text: str, too_large: bool) -> None:
        super().__init__(text)
        self.too_large = too_large


async def read_body(request: Request, limit: int) -> bytes:
    """The whole body.

    Raises:
        BodyError: it is longer than `limit` bytes, or does not come within `BODY_S`.
    """
    too_large = BodyError(f"the body of this request has more than {limit} bytes", True)
    if (stated := request.headers.get("content-length", "")).isdecimal() and int(stated) > limit:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_S):
            async for part in request.stream():
                body += part
                if len(body) > limit:
                    raise too_large
    except TimeoutError:
        raise BodyError(f"the body of this request did not come within {BODY_S:g} s", False) from None
    return bytes(body)


def listen(section: str, host: str, port: int, error: type[MetisError], advice: str = "choose another") -> socket.socket:
    """A socket at which requests will be taken. section: of the settings; advice: what to do; both for messages.

    Raises:
        error: the address cannot be used.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listening = socket.create_server((host, port), family=family, backlog=_BACKLOG)
    except OSError as failure:
        why = (failure.strerror or str(failure)).partition(" (while")[0]  # Python adds the address once more
        raise error(f"cannot listen on {section}.host={host}, port={port}: {why}; {advice}") from None
    # Connections inherit it. asyncio, which sets it for others, does not for a socket without the number of its protocol: head
    # and body of a reply are sent one after the other, and the body would wait 40 ms for the other side.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


def address(listening: socket.socket) -> str:
    """Like http://127.0.0.1:8400."""
    host, port = listening.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Server(uvicorn.Server):
    """One that is stopped by us: uvicorn itself would break running work off and end by the signal."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves signals alone."""
        yield


async def serve_until_stopped(
    app: ASGIApp, listening: socket.socket, drain: Callable[[], Awaitable[None]], ready: Callable[[], None]
) -> None:
    """Serve until SIGTERM or Ctrl-C, which let running work end first; a second one does not.

    drain: refuses new work and returns once the running work has ended, within a time of its own. ready: called once requests
    are taken.
    """
    server = _Server(
        uvicorn.Config(
            app,
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            ws="none",
            loop="asyncio",
            timeout_keep_alive=_KEEP_ALIVE_S,
            timeout_graceful_shutdown=_END_S,
        )
    )
    loop = asyncio.get_running_loop()
    draining: list[asyncio.Task[None]] = []

    async def end() -> None:
        await drain()
        server.should_exit = True

    def stop() -> None:
        if draining:
            server.should_exit = server.force_exit = True
        else:
            draining.append(asyncio.create_task(end()))

    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    serving = asyncio.create_task(server.serve([listening]))
    while not server.started and not serving.done():
        await asyncio.sleep(0.01)
    if server.started:
        ready()
    await serving
    for task in draining:
        task.cancel()
