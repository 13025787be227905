"""Requests of a tool server's client: sent, and sent again where that cannot do anything twice.

Every request to a tool server may be repeated: images go by their hash, sessions have keys, calls have numbers.
"""

from __future__ import annotations

import asyncio
import os
import random
import ssl
from dataclasses import dataclass

import httpx2

from metis_fast.config import ToolServerConfig
from metis_fast.errors import InfrastructureError, ToolSetupError, one_line
from metis_fast.redaction import redact_body
from metis_fast.score.llm_endpoint import proxy_of
from metis_fast.tools.search.http import retry_after
from metis_fast.tools.server.wire import MAX_ANSWER_BYTES, WAIT_S, Failure, Fault, decode_failure

_MAX_PORT = 65535
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.25, 10.0
_KEEP_ALIVE_S = 60.0  # of an idle connection; the server's limit is longer
_SLACK_S = 10.0  # beyond `WAIT_S`, until a reply that does not come is given up
_AGAIN = frozenset({Fault.BUSY, Fault.DRAINING})


@dataclass(frozen=True, slots=True)
class Reply:
    """failure: what a tool server says of a status from 400 on, else None. wait_s: for which it asks to be left alone."""

    status: int
    body: bytes
    failure: Failure | None = None
    wait_s: float = 0.0


class ServerAddress:
    """Where a tool server is, and what a request to it needs. Belongs to no event loop.

    Raises:
        ToolSetupError: `tools.server.url` is no address, the token cannot be one, or the proxy cannot be used.
    """

    def __init__(self, config: ToolServerConfig) -> None:
        self.config = config
        try:
            url = httpx2.URL(config.url.strip())
            if url.userinfo:
                raise httpx2.InvalidURL("a user or password in it would be kept in the run folder; use token_env")
            if url.scheme not in ("http", "https") or not url.host or (url.port or 0) > _MAX_PORT:
                raise httpx2.InvalidURL("it needs http:// or https:// and a host")
            url.host.encode("idna")
        except (httpx2.InvalidURL, UnicodeError) as error:
            raise ToolSetupError(
                f"tools.server.url is no address: {one_line(error)}; write it like http://tools.example:8400"
            ) from None
        self._url = url.copy_with(query=None, fragment=None, raw_path=url.raw_path.partition(b"?")[0].rstrip(b"/") or b"/")
        self.headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
        self.token = token = os.environ.get(config.token_env, "").strip() if config.token_env else ""
        if not token.isascii() or not token.isprintable():
            raise ToolSetupError(
                f"the environment variable {config.token_env} has characters that no token has; set it anew, to the server's"
            )
        if token:
            self.headers["Authorization"] = f"Bearer {token}"
        self._proxy = proxy_of(self._url)
        self.way = f" through the proxy in ${self._proxy[0]}" if self._proxy else ""
        # one for all event loops: reading the authorities takes longer than a request; one without any for plain HTTP
        is_plain = self._url.scheme == "http" and self._proxy is None
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) if is_plain else httpx2.create_ssl_context()
        try:
            self.transport()
        except (ValueError, ImportError, httpx2.InvalidURL) as error:
            raise ToolSetupError(
                f"the proxy in ${self._proxy[0] if self._proxy else ''}, on the way to {self}, cannot be used: "
                f"{type(error).__name__}; mend it, or add {self._url.host} to NO_PROXY"
            ) from None

    def __str__(self) -> str:
        return str(self._url).rstrip("/")

    def transport(self) -> httpx2.AsyncHTTPTransport:
        """Connections of one event loop. One is kept open between requests."""
        proxy = self._proxy[1] if self._proxy else None
        limits = httpx2.Limits(max_keepalive_connections=1, keepalive_expiry=_KEEP_ALIVE_S)
        return httpx2.AsyncHTTPTransport(verify=self._tls, proxy=proxy, limits=limits)

    def blocking(self) -> httpx2.HTTPTransport:
        """One that needs no event loop."""
        return httpx2.HTTPTransport(verify=self._tls, proxy=self._proxy[1] if self._proxy else None)

    def request(self, method: str, path: str, body: bytes | None, read_s: float) -> httpx2.Request:
        """read_s: seconds that a reply may take."""
        url = self._url.copy_with(raw_path=self._url.raw_path.rstrip(b"/") + path.encode("ascii"))
        connect_s = self.config.connect_s
        limits = {"connect": connect_s, "read": read_s, "write": read_s, "pool": None}
        return httpx2.Request(method, url, headers=self.headers, content=body, extensions={"timeout": limits})


class Link:
    """The connection of one session. It is opened by the first request and again where it was lost, or the loop is another."""

    def __init__(self, address: ServerAddress) -> None:
        self.address = address
        self._open: tuple[asyncio.AbstractEventLoop, httpx2.AsyncHTTPTransport] | None = None

    def _transport(self) -> httpx2.AsyncHTTPTransport:
        loop = asyncio.get_running_loop()
        if self._open is None or self._open[0] is not loop:
            self._open = (loop, self.address.transport())
        return self._open[1]

    async def ask(self, method: str, path: str, body: bytes | None, limit_s: float, retries: int) -> Reply:
        """The reply to a request that may be repeated. A server that is busy is asked again as long as `limit_s` lasts, one
        that cannot be reached `retries` times.

        Raises:
            InfrastructureError: there is none.
        """
        loop = asyncio.get_running_loop()
        end, tries, waited = loop.time() + limit_s, 0, 0
        while True:
            wait_s = 0.0
            try:
                reply = await self._once(method, path, body, min(WAIT_S + _SLACK_S, max(end - loop.time(), 0.001)))
            except (httpx2.RequestError, TimeoutError) as error:
                reason = _reason(error)
                tries += 1
            else:
                fault = reply.failure.fault if reply.failure is not None else None
                if reply.failure is not None and fault not in _AGAIN:
                    return reply
                if reply.failure is None and reply.status < 500 and reply.status not in (408, 425, 429):
                    return reply
                reason = f"{fault}: {reply.failure.text}" if reply.failure is not None else f"HTTP status {reply.status}"
                tries += fault is not Fault.BUSY
                wait_s = reply.wait_s
            own_s = min(_FIRST_WAIT_S * 2 ** min(waited, 10), _LONGEST_WAIT_S) * random.uniform(0.5, 1.0)
            wait_s = wait_s * random.uniform(1.0, 1.1) + own_s
            waited += 1
            if tries > retries or loop.time() + wait_s >= end:
                raise InfrastructureError(f"the tool server at {self.address}{self.address.way} does not serve: {reason}")
            await asyncio.sleep(wait_s)

    async def _once(self, method: str, path: str, body: bytes | None, limit_s: float) -> Reply:
        async with asyncio.timeout(limit_s):
            response = await self._transport().handle_async_request(self.address.request(method, path, body, limit_s))
            content = bytearray()
            try:
                async for part in response.aiter_raw():
                    content += part
                    if len(content) > MAX_ANSWER_BYTES:
                        raise InfrastructureError(f"the tool server sent more than {MAX_ANSWER_BYTES >> 20} MiB for one call")
            finally:
                await response.aclose()
        return _reply(response, bytes(content), self.address.token)

    async def close(self) -> None:
        """Close the connection, if it is this loop's; otherwise it went with its own."""
        opened, self._open = self._open, None
        if opened is not None and opened[0] is asyncio.get_running_loop():
            await opened[1].aclose()


def _reason(error: Exception) -> str:
    if isinstance(error, httpx2.ConnectTimeout):
        return "no connection in time"
    if isinstance(error, TimeoutError | httpx2.TimeoutException):
        return "no reply in time"
    return f"no connection ({one_line(error)})" if isinstance(error, httpx2.ConnectError) else "the connection was lost"


def ask_once(address: ServerAddress, path: str) -> Reply:
    """A GET without an event loop, once.

    Raises:
        ToolSetupError: there is no reply.
    """
    limit_s = address.config.connect_s
    transport = address.blocking()
    try:
        response = transport.handle_request(address.request("GET", path, None, limit_s))
        try:
            content = response.read()
        finally:
            response.close()
    except httpx2.RequestError as error:
        raise ToolSetupError(
            f"no tool server at tools.server.url={address}{address.way}: {_reason(error)}; start one there (metis-fast tools "
            "serve), or set another address"
        ) from None
    finally:
        transport.close()
    return _reply(response, content, address.token)


def _reply(response: httpx2.Response, body: bytes, token: str) -> Reply:
    failure = decode_failure(redact_body(body, token)) if response.status_code >= 400 else None
    return Reply(response.status_code, body, failure, retry_after(response.headers))
