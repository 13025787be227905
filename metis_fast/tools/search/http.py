"""One request to a provider, and what becomes of it. No address, header or body of ours is in any message or log."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import socket
import ssl
import zlib
from collections.abc import Sequence
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import httpx2

from metis_fast.errors import ToolSetupError, one_line
from metis_fast.score.llm_endpoint import proxy_of
from metis_fast.tools.search.failure import Failed
from metis_fast.tools.search.keys import Key
from metis_fast.tools.search.providers import Request
from metis_fast.tools.search.reply import at

MAX_BODY_BYTES = 8 << 20
"""Far more than a page of results has; else one reply could take all memory."""
MAX_WAIT_S = 60.0
"""Longest pause that a provider can ask for with Retry-After."""
_MAX_PORT = 65535
_SAID_CHARS = 1 << 16
_AGAIN = frozenset({408, 409, 425, 429})  # and every 5xx


class Sender:
    """Sends requests to one address, each over a connection of its own, through the proxy that the environment names.

    It uses httpx's transport and not its client, which logs addresses (SerpApi's has the key) and would follow redirects.

    url: any request's, or a template of it. key: is in no message. connect_s, timeout_s: seconds for a connection, a request.

    Raises:
        ToolSetupError: the address is none, or the proxy cannot be used.
    """

    def __init__(self, url: str, key: Key, connect_s: float, timeout_s: float) -> None:
        self._key, self._connect_s, self._timeout_s = key, connect_s, timeout_s
        # what it tells when it is debugged has the headers of replies: a redirect may repeat the key
        logging.getLogger("httpcore2").setLevel(logging.INFO)
        try:
            address = httpx2.URL(url)
            if address.userinfo:
                raise httpx2.InvalidURL("a user or password in it would be kept in the run folder; use headers and {key}")
            if address.scheme not in ("http", "https") or not address.host or (address.port or 0) > _MAX_PORT:
                raise httpx2.InvalidURL("it needs http:// or https:// and a host")
            address.host.encode("idna")
        except (httpx2.InvalidURL, UnicodeError) as error:
            said = key.hide(one_line(error))
            raise ToolSetupError(
                f"tools.text_search.url is no address: {said}; write it like https://host.example/search"
            ) from None
        self.host = address.host
        self._proxy = proxy_of(address)
        self._way = f" through the proxy in ${self._proxy[0]}" if self._proxy else ""
        # one for all event loops: reading the authorities takes longer than a request; one without any for plain HTTP
        is_plain = address.scheme == "http" and self._proxy is None
        self._tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT) if is_plain else httpx2.create_ssl_context()
        self.transport()  # a proxy that cannot be used is told at the start

    def transport(self) -> httpx2.AsyncHTTPTransport:
        """Connections of one event loop; none outlives its request.

        Raises:
            ToolSetupError: the proxy cannot be used.
        """
        proxy = self._proxy[1] if self._proxy else None
        try:
            # No limit here: requests wait for their turn before they are sent.
            return httpx2.AsyncHTTPTransport(verify=self._tls, proxy=proxy, limits=httpx2.Limits(max_connections=None))
        except (ValueError, ImportError, httpx2.InvalidURL) as error:
            name, address = self._proxy or ("", "")
            said = one_line(error).replace(address, "[proxy]")
            raise ToolSetupError(
                f"the proxy in ${name}, on the way to {self.host}, cannot be used: {said}; mend {name}, or add {self.host} "
                "to NO_PROXY if it is reached without"
            ) from None

    async def send(self, transport: httpx2.AsyncHTTPTransport, request: Request) -> bytes:
        """The body of a reply with status 200 to 299.

        Raises:
            Failed: there is none.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                return await self._send(transport, request)
        except TimeoutError:
            advice = "raise tools.text_search.timeout_s, or see the provider's status page"
            raise Failed(f"no answer within {self._timeout_s:g} s{self._way}", advice=advice, again=True) from None
        except httpx2.RequestError as error:
            failure = self._no_connection(error)
        except httpx2.InvalidURL as error:
            failure = Failed("the address is none", self._key.hide(one_line(error)), "see tools.text_search.url")
        raise failure  # outside of the handler: the library's error, which it would carry, may hold the address

    async def _send(self, transport: httpx2.AsyncHTTPTransport, request: Request) -> bytes:
        headers = {"Accept": "application/json", "Accept-Encoding": "identity", "Connection": "close", **request.headers}
        limits = {"connect": self._connect_s, "read": self._timeout_s, "write": self._timeout_s, "pool": None}
        message = httpx2.Request(
            request.method, request.url, headers=headers, content=request.body, extensions={"timeout": limits}
        )
        response = await transport.handle_async_request(message)
        try:
            body = await self._read(response)
        finally:
            await response.aclose()
        if not 200 <= response.status_code < 300:
            raise self._refusal(response, body)
        return body

    async def _read(self, response: httpx2.Response) -> bytes:
        """A body of at most `MAX_BODY_BYTES`, unpacked within that limit."""
        packing = response.headers.get("content-encoding", "identity").strip().lower()
        if packing not in ("", "identity", "gzip", "x-gzip"):
            raise Failed(f"a reply with Content-Encoding {packing!r}, which was not asked for", advice=_SEE_URL)
        gzip = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16) if "gzip" in packing else None
        body = bytearray()
        try:
            async for part in response.aiter_raw():
                body += gzip.decompress(part, MAX_BODY_BYTES + 1 - len(body)) if gzip else part
                if len(body) > MAX_BODY_BYTES:
                    raise Failed(f"a reply of more than {MAX_BODY_BYTES >> 20} MiB", advice=_SEE_URL)
                if gzip and gzip.eof:
                    break
        except zlib.error:
            raise Failed("a damaged reply", advice=_SEE_URL, again=True) from None
        if gzip and not gzip.eof and body:
            raise Failed("a reply that is cut off", advice=_SEE_URL, again=True)
        return bytes(body)

    def _refusal(self, response: httpx2.Response, body: bytes) -> Failed:
        """Of a status that is no success."""
        # hidden before each cut, here and in `Failed`: half a key would not be found
        text = self._key.hide(body.decode(errors="replace"))[:_SAID_CHARS]
        status, said = response.status_code, self._key.hide(_said(text))
        reason = f"HTTP status {status}{self._way}"
        if response.has_redirect_location:
            return Failed(f"{reason}, a redirect to {self._target(response)}", "", f"it would take the key along; {_SEE_URL}")
        if status >= 500 or status in _AGAIN:
            advice = "see the provider's status page"
            if status == 429:
                advice = "lower tools.text_search.requests_per_s and concurrency, or see the quota of the account"
            return Failed(reason, said, advice, again=True, wait_s=retry_after(response.headers))
        name = f"${self._key.variable}" if self._key.variable else "none is set: see tools.text_search.api_key_env"
        if status in (401, 403):
            return Failed(reason, said, f"the key is refused ({name}); set another")
        if status == 402:
            return Failed(reason, said, f"the account of the key ({name}) has to be paid for")
        return Failed(reason, said, _SEE_URL)

    def _target(self, response: httpx2.Response) -> str:
        """Host of a redirect; its path and query could hold the key."""
        try:
            target = httpx2.URL(response.headers["location"])
        except httpx2.InvalidURL:
            return "what is no address"
        return self._key.hide(f"{target.scheme}://{target.host}") if target.host else "another path"

    def _no_connection(self, error: httpx2.RequestError) -> Failed:
        causes: list[BaseException] = [error]
        while cause := causes[-1].__cause__ or causes[-1].__context__:
            causes.append(cause)
        if isinstance(error, httpx2.ConnectTimeout):
            advice = "raise tools.text_search.connect_s, or see the network of this machine"
            return Failed(f"no connection to {self.host} within {self._connect_s:g} s{self._way}", advice=advice, again=True)
        if isinstance(error, httpx2.TimeoutException):
            return Failed(f"no answer within {self._timeout_s:g} s{self._way}", advice=_SEE_URL, again=True)
        for kinds, reason, advice in _CAUSES:
            if any(isinstance(cause, kinds) for cause in causes):
                return Failed(reason, self._key.hide(str(causes[-1])), advice, again=kinds is socket.gaierror)
        if isinstance(error, (httpx2.ConnectError, httpx2.ProxyError)):
            said = "" if self._proxy else str(causes[-1])  # a proxy's address may hold a password
            return Failed(f"no connection to {self.host}{self._way}", self._key.hide(said), _SEE_URL, again=True)
        return Failed(f"the connection was lost{self._way}", self._key.hide(str(causes[-1])), _SEE_URL, again=True)


_SEE_URL = "see tools.text_search.url and the provider's status page"
_CAUSES: Sequence[tuple[type[BaseException], str, str]] = (
    (
        ssl.SSLCertVerificationError,
        "the server's certificate is not trusted",
        "set the environment variable SSL_CERT_FILE to the certificate of its authority",
    ),
    (ssl.SSLError, "no TLS connection", "write http:// in tools.text_search.url if the server speaks plain HTTP"),
    (socket.gaierror, "no such host", "see the name server of this machine and tools.text_search.url"),
)


def _said(text: str) -> str:
    """What the body of an error says."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    for path in ("error.message", "error", "message", "detail"):
        if isinstance(said := at(value, path), str):
            return said
    return text


def retry_after(headers: httpx2.Headers) -> float:
    """Seconds for which a provider asks to be left alone, at most `MAX_WAIT_S`; 0: it does not say, or nothing that can be
    read."""
    text = headers.get("retry-after", "").strip()
    try:
        asked_s = float(text)
    except ValueError:
        until = _time(text)
        asked_s = (until - (_time(headers.get("date", "")) or datetime.now(UTC))).total_seconds() if until else 0.0
    return min(max(asked_s, 0.0), MAX_WAIT_S) if not math.isnan(asked_s) else 0.0


def _time(text: str) -> datetime | None:
    """Of a header; a zone of -0000 says that none is known: UTC, as everything in HTTP."""
    try:
        time = parsedate_to_datetime(text)
    except (ValueError, OverflowError):  # the latter: a zone of more digits than a number has
        return None
    return time if time.tzinfo else time.replace(tzinfo=UTC)
