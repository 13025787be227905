"""Sources over the fake providers, as tests of search want them."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from metis_fast.config import TextSearchConfig
from metis_fast.testing.search import SearchServer, serving
from metis_fast.tools.results import Refused, TextSearchResult
from metis_fast.tools.search.web import WebText

KEY = "sk/Test+9f31c0de-4a7b=="  # signs that addresses and JSON spell otherwise
VARIABLES = {"serper": "SERPER_API_KEY", "brightdata": "BRIGHTDATA_API_TOKEN", "serpapi": "SERPAPI_API_KEY", "http": "MY_KEY"}
PROVIDERS = tuple(VARIABLES)
TEMPLATE = {
    "headers": {"Authorization": "Token {key}"},
    "params": {"q": "{query}", "n": "{count}", "lang": "{hl}"},
    "results": "data.items",
    "title": "name",
    "link": "url",
    "snippet": "about.text",
}


def settings(provider: str, address: str, **changes: object) -> TextSearchConfig:
    """Of a provider at the address of a server; waits are short."""
    own = {"http": TEMPLATE, "api_key_env": "MY_KEY"} if provider == "http" else {}
    quick = {"url": f"{address}/{provider}", "requests_per_s": 1000, "timeout_s": 5, "retries": 2, "max_results": 10}
    return TextSearchConfig.model_validate({"provider": provider, **own, **quick, **changes})


@pytest.fixture
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every provider's variables."""
    for name in VARIABLES.values():
        monkeypatch.setenv(name, KEY)
    monkeypatch.setenv("BRIGHTDATA_ZONE", "serp_zone1")


@contextmanager
def source_over(server: SearchServer, provider: str, **changes: object) -> Iterator[WebText]:
    """A source that asks `server`."""
    server.key = server.key or KEY
    with serving(server) as address:
        source = WebText(settings(provider, address, **changes), backoff_s=0.01)
        try:
            yield source
        finally:
            source.close()


def found(source: WebText, query: str) -> TextSearchResult:
    """A search that has to succeed."""
    result = asyncio.run(source.search(query))
    assert isinstance(result, TextSearchResult), result
    return result


def refused(source: WebText, query: str) -> str:
    """What a search says that is the agent's mistake."""
    result = asyncio.run(source.search(query))
    assert isinstance(result, Refused), result
    return result.text
