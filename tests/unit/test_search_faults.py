"""Web search when things go wrong: each fault has the outcome that docs/web-search.md names, and the key is nowhere."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import pickle
import re
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest
from searching import KEY, PROVIDERS, found, keys, settings, source_over

from metis_fast.errors import InfrastructureError, ToolSetupError
from metis_fast.testing.search import Reply, SearchServer, some_pages
from metis_fast.tools.search.http import MAX_BODY_BYTES, retry_after
from metis_fast.tools.search.keys import Key, environment
from metis_fast.tools.search.pace import Pace
from metis_fast.tools.search.web import WebText

pytestmark = pytest.mark.usefixtures("keys")
__all__ = ["keys"]
_TRIES = 3


def organic(**names: str) -> Reply:
    """Three results in every provider's list, with some of their names changed."""
    entries = [
        {names.get(name, name): f"{name} {i}" for name in ("title", "name", "link", "url", "snippet", "description", "about")}
        for i in range(3)
    ]
    return Reply(200, json.dumps({"organic": entries, "organic_results": entries, "data": {"items": entries}}).encode())


PAGES = Reply(200, organic().body)
REDIRECT = Reply(302, b"", {"Location": f"https://elsewhere.example/take?api_key={KEY}"})
# Row of the table in docs/web-search.md -> what comes, how often it is tried, and what the failure says.
FAULTS: dict[str, tuple[Reply, int, str]] = {
    "429": (
        Reply(429, b'{"message": "slow down"}'),
        _TRIES,
        r"HTTP status 429 \(slow down\); lower tools\.text_search\.requests",
    ),
    "5xx": (Reply(503, b"upstream"), _TRIES, r"HTTP status 503 \(upstream\); see the provider's status page"),
    "time-out": (Reply(200, PAGES.body, after_s=1.0), _TRIES, r"no answer within 0\.3 s; raise tools\.text_search\.timeout_s"),
    "half a body": (
        Reply(200, PAGES.body, cut=True),
        _TRIES,
        r"the connection was lost \(peer closed connection without sending complete",
    ),
    "no JSON": (Reply(200, b"<html>captcha</html>"), _TRIES, r"expected JSON, got HTML \(<html>captcha</html>\)"),
    "half of JSON": (Reply(200, PAGES.body[:40]), _TRIES, r"expected JSON, got something else"),
    "no list": (
        Reply(200, b'{"results2": [], "credits": 1}'),
        1,
        r"the reply has no list '.*' \(it has results2, credits\); .*changed",
    ),
    "no results, but an error, a message, or a status that is no success": (
        Reply(200, b'{"organic": [], "organic_results": [], "data": {"items": []}, "statusCode": 500, "message": "Internal"}'),
        _TRIES,
        r"it says that the search failed \(Internal\); see its status page",
    ),
    "no title": (
        organic(title="heading", name="heading"),
        1,
        r"no result has '(title|name)' \(the first has heading, .*changed its reply",
    ),
    "no link": (organic(link="href", url="href"), 1, r"no result has '(link|url)' \(the first has title, .*changed its reply"),
    "no snippet": (
        organic(snippet="text", description="text", about="text"),
        1,
        r"none of 3 results has '(snippet|snippet' or 'description|about\.text)'",
    ),
    "large body": (Reply(200, b" " * (MAX_BODY_BYTES + 1)), 1, r"a reply of more than 8 MiB; see tools\.text_search\.url"),
    "redirect": (REDIRECT, 1, r"HTTP status 302, a redirect to https://elsewhere\.example; it would take the key along"),
    "401, 403": (
        Reply(403, f"bad key {KEY}".encode()),
        1,
        r"HTTP status 403 \(bad key \[key\]\); the key is refused \(\$\w+_?\w+\); set",
    ),
    "402": (Reply(402, b"{}"), 1, r"HTTP status 402 .*has to be paid for"),
    "other 4xx": (Reply(400, b'{"error": {"message": "no q"}}'), 1, r"HTTP status 400 \(no q\); see tools\.text_search\.url"),
}


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_is_a_failure_of_ours_that_names_the_provider(fault: str, provider: str) -> None:
    reply, tries, said = FAULTS[fault]
    server = SearchServer()
    server.replies += [reply] * (_TRIES + 1)
    short = {"timeout_s": 0.3} if fault == "time-out" else {}
    with source_over(server, provider, **short) as source:
        with pytest.raises(InfrastructureError) as caught:
            asyncio.run(source.search("blue heron"))
        message = str(caught.value)
        assert re.search(said, message) and message.startswith(f"text_search through {provider}: ") and "\n" not in message
        assert len(server.received) == tries and (f"{tries} tries; the last one: " in message) == (tries > 1)
        hidden(caught.value)
        server.replies.clear()
        assert len(found(source, "blue heron").pages) == 10


@pytest.mark.parametrize("fault", [name for name, (_, tries, _) in FAULTS.items() if tries > 1])
def test_what_may_pass_is_tried_again_and_leaves_no_trace(fault: str) -> None:
    server = SearchServer()
    server.replies += [FAULTS[fault][0]] * 2
    with source_over(server, "serper", **({"timeout_s": 0.3} if fault == "time-out" else {})) as source:
        assert found(source, "blue heron").pages == tuple(some_pages("blue heron")[:10])
    assert len(server.received) == 3


def test_the_documented_faults_are_those_tested() -> None:
    text = (Path(__file__).parents[2] / "docs" / "web-search.md").read_text()
    table = text.partition("| what comes |")[2].partition("\n\n")[0].splitlines()[2:]
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in table]
    assert [name for name, *_ in rows] == [*FAULTS, "no connection", "no such host"]
    for name, tried, *_ in rows[: len(FAULTS)]:
        assert (tried == "yes") == (FAULTS[name][1] > 1), name


def hidden(error: BaseException) -> None:
    """The key is in nothing that a failure carries: its words, its traceback, what stands behind it, its bytes."""
    shown = "".join(traceback.format_exception(error)) + repr(error)
    behind: list[BaseException] = [error]
    while cause := behind[-1].__cause__ or behind[-1].__context__:
        behind.append(cause)
    texts = [shown, *map(repr, behind), *map(str, behind), pickle.dumps(error).decode("latin-1")]
    assert not any(spelling in text for spelling in spellings() for text in texts)


def spellings() -> list[str]:
    return [KEY, KEY[3:], KEY.replace("/", "%2F"), KEY.replace("+", "%2B"), "9f31c0de", json.dumps(KEY)[1:-1]]


@pytest.mark.parametrize("provider", PROVIDERS)
def test_the_key_is_in_no_log_cache_setting_page_or_repr(
    provider: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With every logger at its most talkative, and a provider that repeats the key in whatever it says."""
    caplog.set_level(logging.DEBUG)
    loud = {"title": f"key {KEY}", "link": f"https://x.org/?k={KEY}", "snippet": KEY.replace("/", "%2F"), "name": KEY}
    loud |= {"url": KEY, "about": {"text": f"a {KEY.lower()}"}}
    body = json.dumps({"organic": [loud], "organic_results": [loud], "data": {"items": [loud]}}).encode()
    server = SearchServer()
    server.replies += [Reply(500, f"your key {KEY}".encode()), REDIRECT, Reply(200, f"<p>{KEY}".encode()), Reply(200, body)]
    cache = tmp_path / "searches.sqlite"
    with source_over(server, provider, cache=cache) as source:
        with pytest.raises(InfrastructureError) as caught:
            found(source, "blue heron")
        hidden(caught.value)
        result = found(source, "blue heron")
        kept = [file.read_bytes().decode("latin-1") for file in tmp_path.iterdir()]
        config = settings(provider, "http://127.0.0.1")
        texts = [caplog.text, repr(result), repr(vars(source)), config.model_dump_json(), *kept]
        texts += [repr(vars(part)) for part in (source._provider, source._sender)] + [repr(source._provider.request("x"))]
    assert len(server.received) == 4 and "[key]" in repr(result) and "blue heron" in "".join(kept)
    assert not any(spelling in text or spelling.lower() in text for spelling in spellings() for text in texts)


def test_only_a_process_that_searches_gets_the_variables() -> None:
    config = settings("brightdata", "http://127.0.0.1")
    assert config.variables() == ("BRIGHTDATA_API_TOKEN", "BRIGHTDATA_ZONE")
    assert environment(config) == {"BRIGHTDATA_API_TOKEN": KEY, "BRIGHTDATA_ZONE": "serp_zone1"}
    assert settings("serper", "http://h", api_key_env="OTHER").variables() == ("OTHER",)
    assert environment(settings("serper", "http://h", api_key_env="OTHER")) == {}


def test_a_key_is_hidden_in_every_spelling() -> None:
    key = Key("K", "ab/cd+ef==")
    spelt = ["ab/cd+ef==", "AB/CD+EF==", "ab%2Fcd%2bef%3D=", r"ab\/cd+ef==", r"ab\u002fcd+ef\u003D=", "ab&#47;cd&#x2B;ef=="]
    assert key.hide(", ".join([*spelt, "abcdef"])) == ", ".join(["[key]"] * len(spelt) + ["abcdef"])
    spelt = [
        *("ab%252Fcd%252bef%25253D=", r"ab\\/cd+ef==", r"ab\\u002fcd+ef\\\u003D=", "ab&sol;cd&plus;ef&equals;="),
        *("ab&#0047;cd&#x02B;ef==", "ab&amp;sol;cd&amp;#43;ef==", r"ab\u0026sol;cd+ef=="),
    ]
    assert key.hide(", ".join(spelt)) == ", ".join(["[key]"] * len(spelt))
    spelt = ["abc&amp;&lt;cd&gt;", "abc&amp;amp;&amp;lt;cd&amp;gt;", "abc&<cd&GT;"]
    assert Key("K", "abc&<cd>").hide(", ".join(spelt)) == ", ".join(["[key]"] * len(spelt))
    start = time.monotonic()
    Key("K", "\\/ab%&cd").hide("\\" * 100_000 + "%25" * 100_000 + "&amp;" * 100_000)
    assert time.monotonic() - start < 10
    assert Key().hide("anything") == "anything"


_HALVES = {  # the key where a text is cut
    "names": Reply(200, json.dumps({"x" * 280 + KEY: 1}).encode()),
    "names of an entry": Reply(200, json.dumps({"organic": [{"x" * 272 + KEY: 1}]}).encode()),
    "no JSON": Reply(200, b" " * (2000 - 12) + KEY.encode()),
    "UTF-16": Reply(200, f"[{KEY}".encode("utf-16")),
    "error": Reply(400, b" " * ((1 << 16) - 12) + KEY.encode()),
    "error in JSON": Reply(400, json.dumps({"message": "x" * 290 + KEY}).encode()),
}


@pytest.mark.parametrize("case", _HALVES)
def test_no_part_of_a_key_stays_where_a_text_is_cut(case: str) -> None:
    server = SearchServer()
    server.replies.append(_HALVES[case])
    with source_over(server, "serper", retries=0) as source, pytest.raises(InfrastructureError) as caught:
        found(source, "x")
    assert "sk/T" not in str(caught.value) and "s k" not in str(caught.value), caught.value


# -- waiting --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [429, 503])
def test_retry_after_is_waited_for_by_all_searches(status: int) -> None:
    server = SearchServer()
    server.replies.append(Reply(status, b"", {"Retry-After": "1"}))

    async def both(source: WebText) -> None:
        one = asyncio.create_task(source.search("one"))
        await asyncio.sleep(0.3)
        await asyncio.gather(one, source.search("two"))

    with source_over(server, "serper") as source:
        asyncio.run(both(source))
    first, *rest = [request.time for request in server.received]
    assert len(rest) == 2 and all(1.0 <= at - first < 3.0 for at in rest)


def test_a_retry_after_that_cannot_be_read_is_none() -> None:
    for text in ("Mon, 01 Jan 2024 00:00:00 +99999999999999999999", "Mon, 01 Jan 2024 00:00:00 +9999", "soon", "nan", "-1"):
        assert retry_after(httpx2.Headers({"Retry-After": text})) == 0.0


def test_a_retry_after_beyond_the_deadline_is_not_waited_for() -> None:
    server = SearchServer()
    server.replies.append(Reply(429, b"", {"Retry-After": "30"}))
    start = time.monotonic()
    with source_over(server, "serper", deadline_s=5) as source:
        with pytest.raises(InfrastructureError, match="HTTP status 429"):
            found(source, "one")
        with pytest.raises(InfrastructureError, match=r"its turn is more than 5 s away; raise"):
            found(source, "two")
    assert time.monotonic() - start < 4 and len(server.received) == 1


def test_a_search_ends_at_its_deadline() -> None:
    server = SearchServer()
    server.replies += [Reply(503, b""), Reply(200, PAGES.body, after_s=3)]
    start = time.monotonic()
    with source_over(server, "serper", deadline_s=0.6) as source:
        with pytest.raises(InfrastructureError, match=r"no result within 0\.6 s, .* before that, HTTP status 503; raise"):
            found(source, "one")
        assert time.monotonic() - start < 2


@pytest.mark.parametrize("failures", [0, 2])
def test_no_more_requests_a_second_or_at_once_than_set(failures: int) -> None:
    server = SearchServer()
    server.replies += [Reply(200, PAGES.body, after_s=0.3)] * 12

    async def many(source: WebText) -> None:
        await asyncio.gather(*(source.search(f"q{i}") for i in range(12)))

    with source_over(server, "serper", requests_per_s=20, concurrency=4) as source:
        asyncio.run(many(source))
    times = [request.time for request in server.received]
    assert server.most_at_once <= 4 and len(times) == 12 and times[-1] - times[0] >= 11 / 20 - 0.1


def test_pace_is_even_and_a_turn_that_is_too_far_is_not_taken() -> None:
    now = [100.0]
    pace = Pace(10.0, lambda: now[0])
    assert [pace.wait_s(1.0) for _ in range(3)] == pytest.approx([0.0, 0.1, 0.2])
    assert pace.wait_s(0.2) is None and pace.wait_s(1.0) == pytest.approx(0.3)
    now[0] += 10.0
    assert pace.wait_s(0.0) == 0.0
    pace.rest(5.0)
    assert pace.wait_s(4.9) is None and pace.wait_s(5.0) == pytest.approx(5.0)


def test_equal_searches_at_the_same_time_cost_one_and_outlive_the_one_that_gave_up() -> None:
    server = SearchServer()
    server.replies.append(Reply(200, PAGES.body, after_s=0.4))

    async def group(source: WebText) -> None:
        first, *others = [asyncio.create_task(source.search("same")) for _ in range(8)]
        await asyncio.sleep(0.2)
        first.cancel()
        results = await asyncio.gather(*others)
        assert len({repr(result) for result in results}) == 1
        with pytest.raises(asyncio.CancelledError):
            await first

    with source_over(server, "serper") as source:
        asyncio.run(group(source))
        found(source, "same")  # in another event loop, from memory
    assert len(server.received) == 1


# -- the way there --------------------------------------------------------------------------------------------------------


def test_no_connection_and_no_such_host_say_so() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        source = WebText(settings("serper", address, retries=1), backoff_s=0.01)
        with pytest.raises(
            InfrastructureError, match=r"2 tries; the last one: no connection to 127\.0\.0\.1 \(.*Connect call failed"
        ):
            found(source, "x")
        source.close()
    source = WebText(settings("serper", "http://nowhere.invalid", retries=1), backoff_s=0.01)
    with pytest.raises(InfrastructureError, match=r"no such host .*; see the name server"):
        found(source, "x")
    source.close()


def test_a_proxy_of_the_environment_is_used_but_not_for_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://user:hidden-word@127.0.0.1:9")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with source_over(SearchServer(), "serper") as source:
        found(source, "x")
    source = WebText(settings("serper", "http://search.example", retries=0), backoff_s=0.01)
    with pytest.raises(
        InfrastructureError, match=r"no connection to search\.example through the proxy in \$http_proxy"
    ) as caught:
        found(source, "x")
    source.close()
    assert "hidden-word" not in "".join(traceback.format_exception(caught.value))
    monkeypatch.setenv("http_proxy", "gopher://user:hidden-word@proxy")
    with pytest.raises(ToolSetupError, match=r"the proxy in \$http_proxy, .* cannot be used: .*; mend http_proxy") as caught:
        WebText(settings("serper", "http://search.example"))
    assert "hidden-word" not in str(caught.value)


@pytest.mark.parametrize(
    ("pack", "said"),
    [
        (lambda body: (gzip.compress(body), "gzip"), None),
        (lambda body: (gzip.compress(body)[:-20], "gzip"), "cut off"),
        (lambda body: (b"nothing of the kind", "gzip"), "a damaged reply"),
        (lambda body: (gzip.compress(b" " * (64 << 20)), "gzip"), "more than 8 MiB"),
        (lambda body: (body, "br"), "Content-Encoding 'br', which was not asked for"),
    ],
    ids=["gzip", "cut", "damaged", "bomb", "br"],
)
def test_packed_replies_are_unpacked_within_the_limit(pack: Callable[[bytes], tuple[bytes, str]], said: str | None) -> None:
    body, name = pack(PAGES.body)
    server = SearchServer()
    server.replies += [Reply(200, body, {"Content-Encoding": name})] * 3
    with source_over(server, "serper") as source:
        if said is None:
            assert found(source, "x").pages[0].title == "title 0"
        else:
            with pytest.raises(InfrastructureError, match=said):
                found(source, "x")


def test_check_makes_one_search_and_says_what_to_do() -> None:
    server = SearchServer()
    with source_over(server, "serper") as source:
        asyncio.run(source.check())
        server.key = "another"
        with pytest.raises(ToolSetupError, match=r"HTTP status 403 .*the key is refused \(\$SERPER_API_KEY\)"):
            asyncio.run(source.check())
        server.key, server.find = KEY, lambda query: []
        with pytest.raises(ToolSetupError, match="serper finds nothing for 'weather'"):
            asyncio.run(source.check())
