"""Web search: what each provider is sent, and what is made of its replies."""

from __future__ import annotations

import json
from urllib.parse import parse_qs, urlsplit

import pytest
from searching import KEY, PROVIDERS, TEMPLATE, VARIABLES, found, keys, refused, source_over

from metis_fast.config import TextSearchConfig, load
from metis_fast.errors import ConfigError, InfrastructureError, ToolSetupError
from metis_fast.testing.search import Reply, SearchServer, some_pages
from metis_fast.tools.results import Page
from metis_fast.tools.search import open_text_source
from metis_fast.tools.search.providers import language
from metis_fast.tools.search.web import WebText

pytestmark = pytest.mark.usefixtures("keys")
__all__ = ["keys"]


@pytest.mark.parametrize("provider", PROVIDERS)
def test_pages_come_with_rank_title_link_and_snippet_as_the_provider_has_them(provider: str) -> None:
    with source_over(SearchServer(), provider) as source:
        result = found(source, "blue heron")
    assert result.query == "blue heron" and result.pages == tuple(some_pages("blue heron")[:10])
    assert result.pages[3] == Page(4, "blue heron: page 4", "https://example.org/4", "")


@pytest.mark.parametrize("provider", PROVIDERS)
def test_nothing_found_is_a_result(provider: str) -> None:
    with source_over(SearchServer(find=lambda query: []), provider) as source:
        assert found(source, "xylophonist of Ruritania").pages == ()


def test_serper_gets_the_query_and_the_number_and_the_key_in_its_header() -> None:
    server = SearchServer()
    with source_over(server, "serper") as source:
        found(source, "blue heron")
    (asked,) = server.received
    assert (asked.method, asked.headers["x-api-key"]) == ("POST", KEY)
    assert asked.json == {"q": "blue heron", "num": 10} and asked.headers["content-type"] == "application/json"


@pytest.mark.parametrize(
    ("query", "hl", "gl"),
    [("blue heron & co", "en", "us"), ("苍鹭 heron", "zh-cn", "cn"), ("さぎ", "en", "us"), ("𠀋", "zh-cn", "cn")],
)
def test_brightdata_and_serpapi_search_google_in_the_language_of_the_query(query: str, hl: str, gl: str) -> None:
    assert language(query) == (hl, gl)
    server = SearchServer()
    with source_over(server, "brightdata") as source:
        found(source, query)
    (asked,) = server.received
    body = asked.json
    assert (asked.method, asked.headers["authorization"]) == ("POST", f"Bearer {KEY}")
    assert body.keys() == {"zone", "url", "format"} and (body["zone"], body["format"]) == ("serp_zone1", "raw")
    address = urlsplit(str(body["url"]))
    assert (address.scheme, address.netloc, address.path) == ("https", "www.google.com", "/search")
    assert parse_qs(address.query) == {"q": [query], "hl": [hl], "gl": [gl], "num": ["10"], "brd_json": ["1"]}
    server = SearchServer()
    with source_over(server, "serpapi") as source:
        found(source, query)
    (asked,) = server.received
    google = {"engine": "google", "google_domain": "google.com"}
    assert asked.method == "GET" and asked.body == b""
    assert asked.params == {"q": query, "num": "10", "api_key": KEY, "hl": hl, "gl": gl, **google}


def test_a_template_fills_address_parameters_headers_and_body() -> None:
    server = SearchServer()
    with source_over(server, "http") as source:
        found(source, "blue heron")
    (asked,) = server.received
    assert (asked.method, asked.headers["authorization"]) == ("GET", f"Token {KEY}")
    assert asked.params == {"q": "blue heron", "n": "10", "lang": "en"}
    body = {"q": "{query}", "options": [{"n": "{count}", "text": "at most {count}", "braces": "{other}"}]}
    template = {"method": "POST", "headers": {"Authorization": "Token {key}"}, "body": body, "results": "data.items"}
    names = {"title": "name", "link": "url", "snippet": "about.text"}
    server = SearchServer()
    with source_over(server, "http", http={**template, **names}) as source:
        assert found(source, 'say "a" & {count}').pages[0].title == "say a & {count}: page 1"
    (asked,) = server.received
    assert asked.json == {"q": "say a & {count}", "options": [{"n": 10, "text": "at most 10", "braces": "{other}"}]}


def test_a_template_may_have_the_query_in_its_address_and_the_list_at_the_top(monkeypatch: pytest.MonkeyPatch) -> None:
    server = SearchServer()
    server.replies.append(Reply(200, b'[["A page", "https://example.org", "Text"]]'))
    names = {"results": "", "title": "0", "link": "1", "snippet": "2"}
    with source_over(server, "http", api_key_env="", http=names) as source:
        source._provider.url += "/{query}?n={count}"
        assert found(source, "a/b c").pages == (Page(1, "A page", "https://example.org", "Text"),)
    assert (server.received[0].path, server.received[0].params) == ("/http/a%2Fb%20c", {"n": "10"})


def test_double_quotes_are_removed_and_a_query_that_is_long_or_empty_is_the_agents_mistake() -> None:
    server = SearchServer()
    with source_over(server, "serper") as source:
        assert found(source, '"blue" "heron').query == "blue heron"
        assert found(source, '"' * 500 + "q" * 1000).query == "q" * 1000
        assert refused(source, "q" * 1001) == "The query has 1001 characters, more than 1000; search for less."
        assert refused(source, ' "" ') == "text_search needs words to search for; the query has none."
        assert found(source, "half \ud83d of a pair").query == "half ? of a pair"
    assert len(server.received) == 3


@pytest.mark.parametrize("provider", ["serper", "brightdata", "serpapi"])
def test_at_most_the_pages_that_were_asked_for_come(provider: str) -> None:
    entries = [{"title": f"t{i}", "link": f"l{i}", "snippet": f"s{i}"} for i in range(9)]
    server = SearchServer()
    server.replies.append(Reply(200, json.dumps({"organic": entries, "organic_results": entries}).encode()))
    with source_over(server, provider, max_results=2) as source:
        assert found(source, "x").pages == (Page(1, "t0", "l0", "s0"), Page(2, "t1", "l1", "s1"))


def test_texts_are_one_line_in_which_nothing_stands_for_an_image_or_is_half_a_sign() -> None:
    entry = b'{"title": "A <image>\\nof\\u2028 it", "link": "https://x.org/<image>", "snippet": "\\ud83d and 1984"}'
    other = b'{"title": 1984, "link": "l", "snippet": null}'
    server = SearchServer()
    server.replies.append(Reply(200, b'{"organic": [%s, %s]}' % (entry, other)))
    with source_over(server, "serper") as source:
        first, second = found(source, "x").pages
    assert (first.title, first.link, first.snippet) == ("A < image > of it", "https://x.org/< image >", "? and 1984")
    assert second == Page(2, "1984", "l", "")


def test_a_search_that_serpapi_could_not_make_is_a_failure_and_no_empty_result() -> None:
    server = SearchServer()
    failed = {"search_metadata": {"status": "Error"}, "error": "We couldn't get valid results for this search."}
    server.replies += [Reply(200, json.dumps(failed).encode())] * 3
    with source_over(server, "serpapi") as source, pytest.raises(InfrastructureError, match="couldn't get valid results"):
        found(source, "x")


@pytest.mark.parametrize(
    ("provider", "value"),
    [
        ("serpapi", {"organic_results": [], "search_metadata": {"status": "Error"}}),
        ("serpapi", {"organic_results": [], "error": "Your account has run out of searches."}),
        ("serper", {"organic": [], "statusCode": 500}),
        ("brightdata", {"general": {"results_cnt": 0}, "error": {"message": "blocked"}}),
        ("http", {"data": {"items": []}, "success": False}),
        ("http", {"data": {"items": []}, "errors": ["quota"]}),
        ("http", {"data": {"items": []}, "status": "failed"}),
        ("serper", {"message": "Not enough credits", "organic": []}),
        ("serper", {"message": "Unauthorized.", "organic": []}),
        ("http", {"data": {"items": []}, "ok": False}),
        ("http", {"data": {"items": []}, "status": "fail"}),
        ("http", {"data": {"items": []}, "code": -1}),
        ("http", {"data": {"items": []}, "code": 10023}),
        ("http", {"data": {"items": []}, "status": "Quota exceeded"}),
    ],
)
def test_an_empty_list_beside_an_error_is_a_failure_and_is_not_kept(provider: str, value: object) -> None:
    server = SearchServer()
    server.replies.append(Reply(200, json.dumps(value).encode()))
    with source_over(server, provider, retries=0) as source:
        with pytest.raises(InfrastructureError, match="it says that the search failed"):
            found(source, "x")
        assert len(found(source, "x").pages) == 10


@pytest.mark.parametrize(
    ("provider", "value"),
    [
        ("serpapi", {"organic_results": [], "error": "Google hasn't returned any results for this query."}),
        ("serper", {"organic": [], "credits": 1}),
        ("http", {"data": {"items": []}, "status": "ok", "error": None, "errors": [], "code": 200, "success": True}),
        ("http", {"data": {"items": []}, "error": "No results found."}),
    ],
)
def test_an_empty_list_of_a_search_that_succeeded_is_a_result(provider: str, value: object) -> None:
    server = SearchServer()
    server.replies.append(Reply(200, json.dumps(value).encode()))
    with source_over(server, provider, retries=0) as source:
        assert found(source, "x").pages == ()


def test_a_query_in_a_header_is_percent_encoded() -> None:
    server = SearchServer()
    template = {**TEMPLATE, "headers": {"Authorization": "Token {key}", "X-Query": "q={query}"}}
    with source_over(server, "http", http=template) as source:
        assert found(source, "苍\n鹭").pages
    assert server.received[0].headers["x-query"] == "q=%E8%8B%8D%0A%E9%B9%AD"


@pytest.mark.parametrize("provider", PROVIDERS)
def test_a_key_that_is_not_set_or_is_none_is_told_at_the_start(provider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"api_key_env": "MY_KEY", "url": "http://127.0.0.1/"} if provider == "http" else {}
    config = TextSearchConfig.model_validate({"provider": provider, **changes})
    monkeypatch.setenv(VARIABLES[provider], "short")
    with pytest.raises(ToolSetupError, match=rf"variable {VARIABLES[provider]} holds no key .*; set it anew$") as caught:
        WebText(config)
    assert "short" not in str(caught.value)
    monkeypatch.delenv(VARIABLES[provider])
    with pytest.raises(ToolSetupError, match=rf"needs the key in .* {VARIABLES[provider]}, which is not set; .*api_key_env$"):
        open_text_source(config)


def test_bright_data_needs_a_zone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("BRIGHTDATA_ZONE")
    with pytest.raises(ToolSetupError, match=r"needs the zone in .* BRIGHTDATA_ZONE, which is not set; .*zone_env$"):
        WebText(TextSearchConfig.model_validate({"provider": "brightdata"}))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["provider=http"], "provider=http needs an address; set tools.text_search.url"),
        (["provider=serper", f"api_key_env={KEY}"], "expected the name of an environment variable, in capitals"),
        (["provider=serper", "api_key_env=9f31c0de4a7b"], "a key itself does not belong into a config"),
        (["offline=true"], r"offline is for a provider on the web, got provider=local"),
        (["cache=x.sqlite"], r"cache is for a provider on the web"),
        (["provider=serper", "offline=true"], r"offline=true has nothing to answer from; set tools\.text_search\.cache"),
        (
            ["provider=http", "url=http://h", "http.headers={K: '{key}'}"],
            r"asks for \{key\}, and no variable holds one; set tools\.text_search\.api_key_env",
        ),
        (["http.title=a", "http.snippet=a.b"], r"http\.snippet='a\.b' lies inside of title='a', which has to be a text; set"),
        (["http.link=''"], r"http\.title='title' lies inside of link=''"),
        (["http.headers={K: 'é'}"], r"http\.headers: expected printable ASCII"),
    ],
)
def test_settings_that_cannot_work_are_refused_in_one_line(changes: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        load(None, [f"tools.text_search.{change}" for change in changes])
    assert "\n" not in str(caught.value) and KEY not in str(caught.value) and "9f31" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["google.serper.dev/search", "ftp://host/x", "http://host:99999/", "http://", "http://u:pass@host/"]
)
def test_an_address_that_is_none_is_refused_at_the_start(url: str) -> None:
    with pytest.raises(ToolSetupError, match=r"^tools\.text_search\.url is no address: .*; write it like https://") as caught:
        WebText(TextSearchConfig.model_validate({"provider": "serper", "url": url}))
    assert "pass@" not in str(caught.value)
