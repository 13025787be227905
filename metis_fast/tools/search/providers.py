"""Providers of web search: the request that each wants, and where its reply has the results.

Requests and fields are those of the published recipe, but for SerpApi's list, which is `organic_results` in its replies.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Protocol
from urllib.parse import quote, urlencode

from metis_fast.config import TextSearchConfig
from metis_fast.tools.results import Page
from metis_fast.tools.search.failure import Failed
from metis_fast.tools.search.keys import Key
from metis_fast.tools.search.reply import Fields, at, pages

_NOTHING = re.compile(
    r".*hasn't returned any results.*|no (?:\w+ )?results?(?: (?:were )?found)?(?: for .*)?\.?|ok\.?|success(?:ful(?:ly)?)?\.?",
    re.IGNORECASE | re.DOTALL,
)
_BAD_STATE = re.compile(
    r"err(?:or)?\b|fail|denied|unauthori[sz]ed|forbidden|invalid|exceeded|limit|quota|block|throttl|expired|suspend|time-?\s?out",
    re.IGNORECASE,
)
_MESSAGES = ("message", "msg", "error_message", "error_msg", "detail", "reason")
_HAN = re.compile("[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")


@dataclass(frozen=True, slots=True)
class Request:
    """One request of HTTP. Everything in it may hold the key, so it is never shown."""

    method: str
    url: str = field(repr=False)
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    body: bytes | None = field(default=None, repr=False)


class Provider(Protocol):
    """How one provider is asked, and read.

    name: in messages. key: its own. version: what its results depend on beside the query, for caches; it holds no key. url:
    where it is asked, or a template of that.
    """

    name: str
    key: Key
    version: str
    url: str

    def request(self, query: str) -> Request:
        """What is sent for a query. The key is in it."""
        ...

    def read(self, value: object) -> tuple[Page, ...]:
        """Pages of a reply's JSON, best first.

        Raises:
            Failed: it is not what this provider's replies are.
        """
        ...


def language(query: str) -> tuple[str, str]:
    """Interface language and country, `hl` and `gl`: Chinese where a Chinese character stands in the query, else English."""
    return ("zh-cn", "cn") if _HAN.search(query) else ("en", "us")


def _version(config: TextSearchConfig) -> str:
    template = config.http.model_dump(mode="json") if config.provider == "http" else {}
    return json.dumps([config.provider, config.url, config.max_results, template], sort_keys=True)


def _json_request(url: str, headers: Mapping[str, str], value: object) -> Request:
    # ASCII, so that every proxy leaves it as it is
    return Request("POST", url, {"Content-Type": "application/json", **headers}, json.dumps(value).encode())


class Serper:
    """google.serper.dev."""

    name = "serper"

    def __init__(self, config: TextSearchConfig, key: Key) -> None:
        self.key = key
        self.version = _version(config)
        self.url, self._count = config.url or "https://google.serper.dev/search", config.max_results

    def request(self, query: str) -> Request:
        """See `Provider`."""
        return _json_request(self.url, {"X-API-KEY": self.key.value}, {"q": query, "num": self._count})

    def read(self, value: object) -> tuple[Page, ...]:
        """See `Provider`."""
        _check_empty(value, at(value, "organic"), self.key)
        return pages(value, Fields("organic"), self._count, self.key)


class BrightData:
    """The SERP API of Bright Data: a Google search of ours, fetched and taken apart by them."""

    name = "brightdata"

    def __init__(self, config: TextSearchConfig, key: Key) -> None:
        self.key = key
        self.version = _version(config)
        self.url, self._count = config.url or "https://api.brightdata.com/request", config.max_results

    def request(self, query: str) -> Request:
        """See `Provider`."""
        hl, gl = language(query)
        asked = urlencode({"q": query, "hl": hl, "gl": gl, "num": self._count, "brd_json": 1})
        body = {"zone": self.key.zone, "url": f"https://www.google.com/search?{asked}", "format": "raw"}
        return _json_request(self.url, {"Authorization": f"Bearer {self.key.value}"}, body)

    def read(self, value: object) -> tuple[Page, ...]:
        """See `Provider`. A page of Google without results has no list, and says that it counted 0."""
        _check_empty(value, at(value, "organic"), self.key)
        if at(value, "organic") is None and at(value, "general.results_cnt") == 0:
            return ()
        return pages(value, Fields("organic", snippets=("snippet", "description")), self._count, self.key)


class SerpApi:
    """serpapi.com. The key is part of the address, so that nobody but `http.py` may see that."""

    name = "serpapi"

    def __init__(self, config: TextSearchConfig, key: Key) -> None:
        self.key = key
        self.version = _version(config)
        self.url, self._count = config.url or "https://serpapi.com/search", config.max_results

    def request(self, query: str) -> Request:
        """See `Provider`."""
        hl, gl = language(query)
        asked = {
            **{"engine": "google", "q": query, "num": self._count, "api_key": self.key.value},
            **{"google_domain": "google.com", "hl": hl, "gl": gl},
        }
        return Request("GET", _with_params(self.url, asked))

    def read(self, value: object) -> tuple[Page, ...]:
        """See `Provider`. A search that found nothing succeeds, with an `error` and without a list."""
        state = str(at(value, "search_information.organic_results_state")).lower()
        if not at(value, "organic_results") and not ("empty" in state and at(value, "search_metadata.status") != "Error"):
            _check_empty(value, at(value, "organic_results"), self.key)
        if at(value, "organic_results") is None and at(value, "error"):
            return ()
        return pages(value, Fields("organic_results"), self._count, self.key)


class Template:
    """Any endpoint, as `tools.text_search.http` describes it."""

    name = "http"

    def __init__(self, config: TextSearchConfig, key: Key) -> None:
        self.key = key
        self.url, self._http, self._count = config.url, config.http, config.max_results
        self._fields = Fields(self._http.results, self._http.title, self._http.link, (self._http.snippet,))
        self.version = _version(config)

    def request(self, query: str) -> Request:
        """See `Provider`."""
        hl, gl = language(query)
        values = {"query": query, "count": str(self._count), "key": self.key.value, "hl": hl, "gl": gl}
        url = _filled(self.url, {name: quote(value, safe="") for name, value in values.items()})
        # a header holds no line breaks, and no other signs than ASCII's
        in_headers = {**values, "query": quote(query, safe="")}
        headers = {name: _filled(text, in_headers) for name, text in self._http.headers.items()}
        url = _with_params(url, {name: _filled(text, values) for name, text in self._http.params.items()})
        if self._http.method == "GET":
            return Request("GET", url, headers)
        return replace(_json_request(url, headers, _filled_json(self._http.body, values)), method=self._http.method)

    def read(self, value: object) -> tuple[Page, ...]:
        """See `Provider`."""
        _check_empty(value, at(value, self._http.results), self.key)
        return pages(value, self._fields, self._count, self.key)


def _check_empty(value: object, found: object, key: Key) -> None:
    """A reply of status 200 without results has to be one of a search that succeeded.

    found: its list, or None.

    Raises:
        Failed: it says that the search failed.
    """
    if found or not isinstance(value, Mapping):
        return
    error = value.get("error") or value.get("errors")
    message = next((text for name in _MESSAGES if isinstance(text := value.get(name), str) and text.strip()), "")
    states = [value.get(name) for name in ("statusCode", "status_code", "code", "status")]
    states.append(at(value, "search_metadata.status"))
    refused = any(value.get(name) is False for name in ("success", "ok"))
    told = [str(text) for text in (error, message) if text]
    if not refused and not any(map(_is_failure, states)) and all(_NOTHING.fullmatch(text.strip()) for text in told):
        return
    said = next((text for text in (error, at(error, "message"), message) if isinstance(text, str) and text), "")
    raise Failed("it says that the search failed", key.hide(said or json.dumps(value)), "see its status page", again=True)


def _is_failure(state: object) -> bool:
    """Whether a state that stands beside no results says why there are none."""
    if isinstance(state, str):
        return _BAD_STATE.search(state) is not None or (state.strip().isdecimal() and _is_failure(int(state)))
    return isinstance(state, int) and not isinstance(state, bool) and not (state in (0, 1) or 200 <= state < 300)


def _with_params(url: str, params: Mapping[str, object]) -> str:
    if not params:
        return url
    return f"{url}{'&' if '?' in url else '?'}{urlencode(params)}"


def _filled(text: str, values: Mapping[str, str]) -> str:
    """`text` with {query} and its like filled in; other braces stay."""
    return re.sub(r"\{(query|count|key|hl|gl)\}", lambda match: values[match[1]], text)


def _filled_json(value: object, values: Mapping[str, str]) -> object:
    if isinstance(value, dict):
        return {name: _filled_json(entry, values) for name, entry in value.items()}
    if isinstance(value, list):
        return [_filled_json(entry, values) for entry in value]
    if value == "{count}":
        return int(values["count"])
    return _filled(value, values) if isinstance(value, str) else value


PROVIDERS: Mapping[str, Callable[[TextSearchConfig, Key], Provider]] = {
    "serper": Serper,
    "brightdata": BrightData,
    "serpapi": SerpApi,
    "http": Template,
}
