"""Whatever an endpoint sends: no verdict, one line that says why, and nothing breaks; against real HTTP servers."""

from __future__ import annotations

import asyncio
import gzip
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from judge_endpoint import BOMB, a_matcher, a_prompt

from metis_fast.score.llm import LlmMatcher
from metis_fast.score.protocol import JudgeUnavailable
from metis_fast.testing.judge import JudgeServer, Reply, completion, is_right, serving


def ask(matcher: LlmMatcher) -> bool:
    try:
        return asyncio.run(is_right(matcher, a_prompt("Paris"), "Paris"))
    finally:
        matcher.close()


def unavailable(reply: Reply, **changes: object) -> str:
    """What a judge that always replies so says, in one line that every terminal and log can show."""
    with (
        serving(JudgeServer(refuse=lambda body: reply)) as url,
        pytest.raises(JudgeUnavailable) as caught,
    ):
        ask(a_matcher(url, retries=0, **changes))
    line = str(caught.value)
    assert line.isprintable() and len(line) < 500
    return line


def test_a_key_goes_to_no_other_host(monkeypatch):
    monkeypatch.setenv("METIS_JUDGE_API_KEY", "secret")
    judge = JudgeServer()
    with serving(judge) as url:
        moved = JudgeServer(refuse=lambda body: Reply(308, "", {"Location": f"{url}/chat/completions"}))
        with serving(moved) as old:
            assert ask(a_matcher(f"{old}?api-version=1"))
    assert {"Authorization", "api-key"} <= {*moved.headers[0]}
    assert not {"Authorization", "api-key"} & {*judge.headers[0]}


REDIRECTS = [
    "http://127.0.0.1:99999/", "https://127.0.0.1:65536", "http://a..b/", f"http://{'a' * 64}/", "http://[bad", "http://[::1",
    "ftp://127.0.0.1/", "file:///etc/hosts", "//", "http://", "http:", ":", "http://127.0.0.1:1/", "http://127.0.0.1:port/",
    "/" + "a" * 70_000, "http://\xff\xfe.invalid/", "http://a b/", "javascript:0", "?" * 9, "",
]  # fmt: skip


@pytest.mark.parametrize("location", REDIRECTS, ids=range(len(REDIRECTS)))
@pytest.mark.parametrize("status", [302, 307])
def test_a_redirect_to_nowhere_is_no_verdict(location, status):
    line = unavailable(Reply(status, "", {"Location": location}))
    assert "redirected to" in line and "set score.llm.base_url to the API itself" in line


@given(st.text("/?#[]%\\.:9\x80\xff\t\"'{", max_size=8))
@settings(max_examples=15, deadline=None)
def test_no_redirect_breaks_the_judge(rest):
    for location in (f"http://127.0.0.1:1{rest}", f"http://[::1]{rest}"):
        unavailable(Reply(307, "", {"Location": location}))


@pytest.mark.parametrize(
    "charset",
    ["hex", "zip", "rot13", "idna", "undefined", "punycode", "unicode_escape", "utf-16", "utf-7", "base64", "none", "\xff"],
)
@pytest.mark.parametrize("status", [400, 404, 500])
def test_an_error_may_claim_any_charset_and_nothing_in_it_reaches_a_terminal(charset, status):
    said = unavailable(Reply(status, "a..b \x1b[31m\0\x9b\u202ec", {"Content-Type": f"text/plain; charset={charset}"}))
    assert f"HTTP status {status} (a..b [31m c)" in said


@pytest.mark.parametrize("status", [200, 400, 404, 429, 500])
@pytest.mark.parametrize(
    "text",
    [
        "[" * 200_000,
        '{"error": ' + "[" * 950 + "]" * 950 + "}",
        "9" * 10_000,
        '{"error": "\\ud800\\u001b"}',
        "<html><title>\x1b",
        b"\xff\x00",
    ],
    ids=range(6),
)
def test_no_body_breaks_the_judge(text, status):
    unavailable(Reply(status, text))


@given(st.binary(max_size=40), st.sampled_from([200, 400, 404, 503]), st.sampled_from(["", "gzip", "x-gzip", "identity"]))
@example(gzip.compress(b"[]") * 2, 200, "gzip")
@settings(max_examples=25, deadline=None)
def test_no_bytes_break_the_judge(text, status, encoding):
    unavailable(Reply(status, text, {"Content-Encoding": encoding}))


@pytest.mark.parametrize("status", [200, 404, 500])
def test_a_body_without_end_is_given_up_at_once(status):
    for reply in (replace(BOMB, status=status), Reply(status, b" " * (9 << 20))):
        assert "with more than 8 MiB" in unavailable(reply, timeout_s=5.0)


def test_a_packed_reply_is_read_though_none_was_asked_for():
    packed = gzip.compress(completion("CORRECT").payload)
    for text in (packed, packed + b"\0" * 9):
        judge = JudgeServer(lambda task, text=text: Reply(200, text, {"Content-Encoding": "GZIP"}))
        with serving(judge) as url:
            assert ask(a_matcher(url))
        assert judge.headers[0]["Accept-Encoding"] == "identity"
