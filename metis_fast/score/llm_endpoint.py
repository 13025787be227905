"""The endpoint of an LLM judge: its address, the proxy on the way to it, what it takes, and what its failures mean."""

from __future__ import annotations

import ipaddress
import json
import logging
import math
import os
import re
import socket
import ssl
import urllib.request
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2
from pydantic import BaseModel, ValidationError

from metis_fast.config import LlmJudgeConfig
from metis_fast.errors import JudgeError
from metis_fast.redaction import redact, redact_body
from metis_fast.score.llm_prompt import Message
from metis_fast.score.llm_reply import described, one_line
from metis_fast.score.protocol import JudgeUnavailable, TryAgain

MAX_WAIT_S = 60.0
"""Longest pause that an endpoint can ask for with Retry-After."""
_RETRIED_STATUS = frozenset({408, 409, 425, 429})  # and every 5xx
_MAX_PORT = 65535
_MAX_REDIRECTS = 5
_MAX_NAMES = 10  # of models, in a message
_SET_URL = "set score.llm.base_url to the API itself"
_MAX_BODY_BYTES = 8 * 2**20
"""Far more than a chat completion has, thinking and log-probs included; else one reply could take all memory."""
_OPERATION = re.compile(rb"(/chat/completions|/chat|/completions|/models|/responses)?/*\Z")

_TOO_LONG = r"\bmax_new_tokens\b|\bmax_?output_?tokens\b|context (?:length|size|window)|completion tokens"
# What some endpoints refuse -> how their message says so. Each is left out once it was refused.
_MAY_GO = {
    "max_completion_tokens": rf"\bmax_completion_tokens\b|{_TOO_LONG}",
    "max_tokens": rf"\bmax_tokens\b|{_TOO_LONG}",
    "temperature": r"\btemperature\b|\bsampling param",
    "system": r"\bsystem\b.{0,40}\brole\b|\brole\b.{0,40}\bsystem\b|\bsystem (?:message|prompt|instruction)"
    r"|\bdeveloper instruction|roles must alternate|\buser\b.{1,6}\bassistant\b",
}


class _Model(BaseModel):
    id: str


class _Models(BaseModel):
    data: list[_Model]


@dataclass(frozen=True, slots=True)
class _Reply:
    """moved_to: where it redirects to, if that is not followed."""

    status: int
    headers: httpx2.Headers
    body: bytes
    moved_to: str = ""


def parse_address(base_url: str) -> httpx2.URL:
    """`score.llm.base_url` without blanks, trailing slashes and the name of an operation; a query stays.

    Raises:
        JudgeError: it is no address of HTTP, or names a user.
    """
    text = base_url.strip()
    if "@" in re.split(r"[/?#]", re.sub(r"^(?:[a-z]+:)?/*", "", text, flags=re.IGNORECASE), maxsplit=1)[0]:
        raise JudgeError(
            "score.llm.base_url names a user or a password, which would be kept in the run folder; leave them out, and put the "
            "key in the environment variable that score.llm.api_key_env names"
        )
    if text.startswith("$"):
        raise JudgeError(
            f"score.llm.base_url={text!r} names a variable, and none is read here; write the address itself, or give it on the "
            f'command line, where the shell fills it in: score.llm.base_url="{text}"'
        )
    shown = re.sub(r"[?#].*", "", base_url, flags=re.DOTALL)  # a query may hold a key
    if not re.match(r"https?://[^/]", text, re.IGNORECASE):
        rest = re.sub(r"^(?:[a-z]+:)?/+|^https?:", "", shown.strip(), flags=re.IGNORECASE) or "127.0.0.1:8000/v1"
        raise JudgeError(f"score.llm.base_url={shown!r} does not begin with http:// or https://; write http://{rest}")
    try:
        url = httpx2.URL(text).copy_with(fragment=None)
        _refuse_unusable(url)
    except httpx2.InvalidURL as error:
        raise JudgeError(
            f"score.llm.base_url={shown!r} is no address: {error}; write it like http://127.0.0.1:8000/v1"
        ) from None
    path, mark, query = url.raw_path.partition(b"?")
    return url.copy_with(raw_path=(_OPERATION.sub(b"", path) or b"/") + mark + query)


def _refuse_unusable(url: httpx2.URL) -> None:
    """Raise InvalidURL for what the client takes and then fails on with errors that are none of its own."""
    if (url.port or 0) > _MAX_PORT:
        raise httpx2.InvalidURL(f"a port is at most {_MAX_PORT}")
    try:
        url.host.encode("idna")
    except UnicodeError as error:
        raise httpx2.InvalidURL(f"{url.host!r} is no host ({error})") from None


def _is_usable(url: httpx2.URL) -> bool:
    try:
        _refuse_unusable(url)
    except httpx2.InvalidURL:
        return False
    return url.scheme in ("http", "https")


def _without_secrets(url: httpx2.URL) -> str:
    return str(url.copy_with(userinfo=b"", query=None))


def proxy_of(url: httpx2.URL) -> tuple[str, str] | None:
    """The environment variable that names a proxy for `url`, and the proxy. None for this machine itself, whatever is set."""
    if _is_here(url.host) or urllib.request.proxy_bypass(url.netloc.decode()):
        return None
    proxies = urllib.request.getproxies()
    for scheme in (url.scheme, "all"):
        if scheme in proxies:
            names = (f"{scheme}_proxy", f"{scheme.upper()}_PROXY")
            name = next((name for name in names if os.environ.get(name) == proxies[scheme]), names[0])
            return name, proxies[scheme] if "://" in proxies[scheme] else f"http://{proxies[scheme]}"
    return None


def _is_here(host: str) -> bool:
    name = host.lower().rstrip(".")
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    address = getattr(address, "ipv4_mapped", None) or address
    return address.is_loopback or address.is_unspecified


class Endpoint:
    """Asks for chat completions. What it learns about the endpoint holds for all later requests.

    model: what is asked; "" until `find_model` has found it, where `score.llm.model` is empty.

    Raises:
        JudgeError: the address or the key cannot be one.
    """

    def __init__(self, config: LlmJudgeConfig) -> None:
        self._config = config
        self.model = config.model
        self._url = parse_address(config.base_url)
        path, mark, query = self._url.raw_path.partition(b"?")
        path = path.rstrip(b"/")
        self._query = mark + query
        # the right one is known after the first reply
        self._paths = [path, path.removesuffix(b"/v1") if path.endswith(b"/v1") else path + b"/v1"]
        self._refused: frozenset[str] = frozenset()
        self._key = os.environ.get(config.api_key_env, "").strip()
        if not self._key.isascii() or not self._key.isprintable():
            raise JudgeError(f"the environment variable {config.api_key_env} has characters that no key has; set it anew")
        # what it tells when it is debugged has the headers of replies, which may repeat the key
        logging.getLogger("httpcore2").setLevel(logging.INFO)
        self._proxy = proxy_of(self._url)
        self.way = f" through the proxy in ${self._proxy[0]}" if self._proxy else ""
        """How requests get there, as part of a message."""
        self._see_log = "see the log of the server"
        if self._proxy:
            self._see_log = f"mend {self._proxy[0]}, or add {self._url.host} to NO_PROXY if it is reached without"

    def __str__(self) -> str:
        return one_line(_without_secrets(self._url)).rstrip("/")

    def client(self) -> httpx2.AsyncClient:
        """A client for one event loop.

        Raises:
            JudgeError: the proxy that the environment names cannot be used.
        """
        # no connection outlives its request, so none outlives its event loop
        headers = {"Connection": "close", "Accept-Encoding": "identity"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
            if b"api-version=" in self._query:  # Azure
                headers["api-key"] = self._key
        try:
            if self._proxy:
                _refuse_unusable(httpx2.URL(self._proxy[1]))
            # a transport of its own: else the client would read the proxies of the environment itself
            transport = httpx2.AsyncHTTPTransport(
                proxy=self._proxy[1] if self._proxy else None, limits=httpx2.Limits(max_connections=None)
            )
        except (ValueError, ImportError, httpx2.InvalidURL) as error:
            assert self._proxy is not None
            raise JudgeError(
                f"the proxy in ${self._proxy[0]}, for the LLM judge at {self}, cannot be used: {one_line(str(error))}; "
                f"{self._see_log}"
            ) from None
        return httpx2.AsyncClient(transport=transport, headers=headers, timeout=None)

    async def find_model(self, client: httpx2.AsyncClient) -> None:
        """Take the one model that is served.

        Raises:
            TryAgain, JudgeUnavailable: there is none, or several, or the endpoint does not tell.
        """
        reply = first = await self._send(client, "GET", self._paths[0] + b"/models")
        for path in self._paths[1:]:
            if reply.status not in (404, 405):
                break
            reply = await self._send(client, "GET", path + b"/models")
        if reply.status in (404, 405):
            reason = f"score.llm.model is empty and there is no list of models (HTTP status {first.status}{self.way})"
            raise JudgeUnavailable(reason, _said(first.body), "set score.llm.model, or mend score.llm.base_url")
        if not 200 <= reply.status < 300:
            raise await self._failure(client, reply)
        names = _names(reply.body)
        if names is None:
            reason = f"score.llm.model is empty and {described(reply.body)} came instead of a list of models"
            raise TryAgain(reason, _said(reply.body), "set score.llm.model, or mend score.llm.base_url")
        if len(names) != 1:
            told = ", ".join([*map(one_line, names[:_MAX_NAMES]), *(["..."] if len(names) > _MAX_NAMES else [])])
            reason = f"score.llm.model is empty and {len(names) or 'no'} models are served"
            advice = "set score.llm.model to one of them" if names else "serve one, or set score.llm.model"
            raise JudgeUnavailable(reason, told, advice)
        self.model = names[0]

    async def complete(self, client: httpx2.AsyncClient, messages: Sequence[Message], temperature: float = 0.0) -> bytes:
        """The body of a chat completion.

        Raises:
            TryAgain, JudgeUnavailable: none came.
        """
        refused = self._refused
        while True:
            body = self._body(messages, refused, temperature)
            reply = await self._post(client, body)
            more = self._refused_in(reply, body)
            if not more:
                break
            refused |= more
        if not 200 <= reply.status < 300:
            raise await self._failure(client, reply)
        self._refused |= refused
        return reply.body

    def _body(self, messages: Sequence[Message], refused: frozenset[str], temperature: float) -> dict[str, Any]:
        if "system" in refused:
            messages = [{"role": "user", "content": "\n\n".join(message["content"] for message in messages)}]
        optional = {"max_tokens": self._config.max_tokens, "temperature": temperature}
        if "max_tokens" in refused:
            optional["max_completion_tokens"] = optional.pop("max_tokens")
        kept = {name: value for name, value in optional.items() if name not in refused}
        return {"model": self.model, "messages": messages} | kept | self._config.extra_body

    def _refused_in(self, reply: _Reply, body: Mapping[str, Any]) -> frozenset[str]:
        """What of a request's optional parts a reply refuses, at most one of them; what the settings ask for stays."""
        if reply.status not in (400, 422, 500):  # 500: a chat template that raises, in llama.cpp
            return frozenset()
        ours = [name for name in _MAY_GO if name in body and name not in self._config.extra_body]
        if len(body["messages"]) > 1:
            ours.append("system")
        said = _said(reply.body)
        return frozenset([name for name in ours if re.search(_MAY_GO[name], said, re.IGNORECASE)][:1])

    async def _post(self, client: httpx2.AsyncClient, body: Mapping[str, Any]) -> _Reply:
        """The reply under the first path where there is something."""
        first: _Reply | None = None
        for path in self._paths:
            # ASCII: text of a lone surrogate has no UTF-8
            reply = await self._send(client, "POST", path + b"/chat/completions", json.dumps(body))
            if reply.status not in (404, 405) or "model" in _said(reply.body).lower():
                self._paths = [path]
                return reply
            first = first or reply
        assert first is not None
        return first

    async def _send(self, client: httpx2.AsyncClient, method: str, path: bytes, body: str | None = None) -> _Reply:
        """What comes, behind redirects that keep the request as it is."""
        url = self._url.copy_with(raw_path=path + self._query)
        request = client.build_request(method, url, content=body, headers={"Content-Type": "application/json"})
        redirects = 0
        while True:
            try:
                response = await client.send(request, stream=True)
                try:
                    content = redact_body(await self._read(response), self._key)
                finally:
                    await response.aclose()
            except httpx2.RequestError as error:
                failure = self._no_connection(error)
                if redirects:
                    failure = TryAgain(f"{failure.reason}, redirected to {self._target(request.url)}", failure.detail, _SET_URL)
                raise failure from None
            reply = _Reply(response.status_code, response.headers, content)
            if not response.has_redirect_location:
                return reply
            request = response.next_request
            if request is None:
                return replace(reply, moved_to="what is no address")
            redirects += 1
            if request.method != method or redirects > _MAX_REDIRECTS or not _is_usable(request.url):
                return replace(reply, moved_to=self._target(request.url))
            if "Authorization" not in request.headers:  # the client takes one key away where another host is asked
                request.headers.pop("api-key", None)

    async def _read(self, response: httpx2.Response) -> bytes:
        """A body of at most _MAX_BODY_BYTES. It is unpacked here: the client would do it without a limit.

        Raises:
            TryAgain: it is larger, or damaged.
        """
        status, packing = response.status_code, response.headers.get("content-encoding", "identity").strip().lower()
        if packing not in ("", "identity", "gzip", "x-gzip"):
            raise TryAgain(
                f"HTTP status {status} with Content-Encoding {one_line(redact(packing, self._key))!r}, which was not asked for"
            )
        gzip = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16) if "gzip" in packing else None
        body = bytearray()
        try:
            async for part in response.aiter_raw():
                body += gzip.decompress(part, _MAX_BODY_BYTES + 1 - len(body)) if gzip else part
                if len(body) > _MAX_BODY_BYTES:
                    advice = "see what score.llm.base_url leads to"
                    raise TryAgain(f"HTTP status {status} with more than {_MAX_BODY_BYTES >> 20} MiB", advice=advice)
                if gzip and gzip.eof:
                    break  # the rest would be kept
        except zlib.error as error:
            raise TryAgain(f"HTTP status {status} with a damaged gzip body", one_line(str(error))) from None
        if gzip and not gzip.eof and body:
            raise TryAgain(f"HTTP status {status} with a gzip body that is cut off")
        return bytes(body)

    def _target(self, url: httpx2.URL) -> str:
        """Of a redirect, which may repeat the key."""
        return one_line(redact(_without_secrets(url), self._key))

    async def _failure(self, client: httpx2.AsyncClient, reply: _Reply) -> JudgeUnavailable:
        status, said = reply.status, _said(reply.body)
        reason = f"HTTP status {status}{self.way}"
        key = self._config.api_key_env
        if reply.moved_to:
            return JudgeUnavailable(f"redirected to {reply.moved_to}", said, _SET_URL)
        if status >= 500 or status in _RETRIED_STATUS:
            advice = self._see_log
            if status == 429:
                advice = "lower score.llm.concurrency, raise score.llm.retries, or see the quota of the account"
            return TryAgain(reason, said, advice, _retry_after(reply.headers))
        if status in (401, 403):
            how = f"the key in ${key} is refused; set another" if self._key else f"set the key in ${key}, which is not set"
            return JudgeUnavailable(reason, said, f"{how}, or name its variable in score.llm.api_key_env")
        if status == 402:
            return JudgeUnavailable(reason, said, f"pay for the account of the key in ${key}, or set another key")
        if status == 407:
            return JudgeUnavailable(reason, said, self._see_log)
        if status == 404 and "model" in said.lower():
            served = await self._served(client)
            advice = f"set score.llm.model to one that is served: {', '.join(served)}" if served else "set score.llm.model"
            return JudgeUnavailable(reason, said, advice)
        if status in (404, 405):
            return JudgeUnavailable(reason, said, "set score.llm.base_url to what stands before /chat/completions")
        if "https" in said.lower():
            return JudgeUnavailable(reason, said, "write https:// in score.llm.base_url")
        return JudgeUnavailable(reason, said, "see score.llm.model, score.llm.max_tokens and score.llm.extra_body")

    async def _served(self, client: httpx2.AsyncClient) -> list[str]:
        """Names of models, at most _MAX_NAMES; none where the endpoint does not tell."""
        try:
            reply = await self._send(client, "GET", self._paths[0] + b"/models")
        except TryAgain:
            return []
        return [one_line(name) for name in (_names(reply.body) or ())[:_MAX_NAMES]]

    def _no_connection(self, error: httpx2.RequestError) -> TryAgain:
        causes: list[BaseException] = [error]
        while cause := causes[-1].__cause__ or causes[-1].__context__:
            causes.append(cause)
        said = one_line(redact(str(causes[-1]), self._key) or type(causes[-1]).__name__)
        if self._proxy:
            return TryAgain(f"no connection{self.way}", said, self._see_log)
        for kind, reason, advice in _TLS_AND_HOST:
            if any(isinstance(cause, kind) for cause in causes):
                return TryAgain(reason, said, advice)
        if isinstance(error, httpx2.ConnectError):
            return TryAgain("no connection", said, "start it, or set score.llm.base_url")
        https = ", and write https:// in score.llm.base_url if it speaks TLS" if self._url.scheme == "http" else ""
        return TryAgain("the connection was lost", said, f"{self._see_log}{https}")


_TLS_AND_HOST: tuple[tuple[type[BaseException], str, str], ...] = (
    (
        ssl.SSLCertVerificationError,
        "the server's certificate is not trusted",
        "set the environment variable SSL_CERT_FILE to the certificate of its authority",
    ),
    (ssl.SSLError, "no TLS connection", "write http:// in score.llm.base_url if the server speaks plain HTTP"),
    (socket.gaierror, "no such host", "mend the host in score.llm.base_url"),
)


def _names(body: bytes) -> list[str] | None:
    """The names in a list of models; None: the body is no such list."""
    try:
        return [model.id for model in _Models.model_validate_json(body).data if model.id]
    except ValidationError:
        return None


def _said(body: bytes) -> str:
    """What the body of an error says, in one line."""
    text = body.decode(errors="replace")  # whatever charset is named: some of those are no text
    try:
        value = json.loads(text)
        for name in ("error", "detail", "message"):
            if isinstance(value, dict) and value.get(name):
                value = value[name]
        return one_line(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
    except (ValueError, RecursionError):
        kind = described(body)
        return kind if kind != "something else" else one_line(text)


def _retry_after(headers: httpx2.Headers) -> float:
    """Seconds for which an endpoint asks to be left alone, from 0 to MAX_WAIT_S; 0: it does not say."""
    asked_s = _number(headers.get("retry-after-ms")) / 1000
    if math.isnan(asked_s):
        asked_s = _number(headers.get("retry-after"))
    until = _time(headers.get("retry-after"))
    if math.isnan(asked_s) and until:
        asked_s = (until - (_time(headers.get("date")) or datetime.now(UTC))).total_seconds()
    return 0.0 if math.isnan(asked_s) else min(max(asked_s, 0.0), MAX_WAIT_S)


def _number(text: str | None) -> float:
    """Of a header; NaN where it is none."""
    try:
        return float(text or "nan")
    except ValueError:
        return math.nan


def _time(text: str | None) -> datetime | None:
    """Of a header; None where it is none. A zone of -0000 says that none is known: UTC, as everything in HTTP."""
    try:
        time = parsedate_to_datetime(text or "")
    except (ValueError, OverflowError):  # the latter of a zone beyond all numbers
        return None
    return time if time.tzinfo else time.replace(tzinfo=UTC)
