"""The key of an LLM judge is in no message, log, cache or verdict, whatever the endpoint says; against a real HTTP server."""

from __future__ import annotations

import asyncio
import json
import logging
from pathlib import Path

import pytest
from judge_endpoint import a_matcher, a_prompt, error

from metis_fast.errors import JudgeError
from metis_fast.redaction import redact_body
from metis_fast.score.protocol import JudgeUnavailable
from metis_fast.testing.judge import JudgeServer, Reply, completion, serving

KEY = "sk/Test+0123-9f31c0de=="
_SAYS = f"Incorrect API key provided: {KEY}. You can find your key at https://platform.example/keys"
_CUT = "x" * 185 + KEY  # messages have at most 200 characters
_REPLIES = {
    **{f"status {status}": error(status, _SAYS) for status in (400, 401, 402, 403, 404, 407, 422, 429, 500, 503)},
    "no such model": error(404, f"model m of {KEY} not found"),
    "cut": error(500, _CUT),
    "plain text": Reply(500, _SAYS),
    "a web page": Reply(502, f"<!doctype html><title>{KEY}</title>{_SAYS}"),
    "UTF-16": Reply(500, _SAYS.encode("utf-16")),
    "an address": Reply(500, "see https://x.example/?key=sk%2FTest%2B0123-9f31c0de%3D%3D"),
    "an error with status 200": error(200, _SAYS),
    "no completion": Reply(200, f"[{json.dumps(_SAYS)}]"),
    "prose": completion(_SAYS),
    "cut prose": completion(_CUT + " " * 10),
    "refused": completion(None, refusal=_SAYS),
    "cut off": completion(_SAYS, finish_reason="length"),
    "an odd end": completion("", finish_reason=KEY),
    "packed": Reply(200, "", {"Content-Encoding": KEY}),
    "a redirect": Reply(302, _SAYS, {"Location": f"https://{KEY}@sso.example/{KEY}?k={KEY}"}),
    "a redirect to no address": Reply(307, "", {"Location": f"http://127.0.0.1:1/{KEY}"}),
}


def _clean(*texts: str) -> None:
    for text in texts:
        assert not any(part in text for part in ("sk/T", "s k / T", "sk%2FT", "9f31c0de")), text


@pytest.mark.parametrize("case", _REPLIES)
def test_no_failure_repeats_the_key(case: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Nor a part of it. The loggers are at their most talkative."""
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("METIS_JUDGE_API_KEY", KEY)
    judge = JudgeServer(default=lambda task: _REPLIES[case])
    with serving(judge) as url:
        matcher = a_matcher(url, retries=0)
        with pytest.raises(JudgeUnavailable) as caught:
            asyncio.run(matcher.compare(a_prompt("Paris"), "Rome"))
        failure = caught.value
        with pytest.raises(JudgeError) as at_the_start:
            asyncio.run(matcher.check())
        matcher.close()
    assert judge.headers[0]["Authorization"] == f"Bearer {KEY}"
    _clean(str(failure), repr(failure), str(at_the_start.value), caplog.text, repr(vars(matcher)))


@pytest.mark.parametrize(
    "models",
    [
        error(500, _SAYS),
        error(404, _SAYS),
        Reply(200, json.dumps({"data": [{"id": "a" + KEY}, {"id": "b"}]})),
        Reply(200, json.dumps({"models": _SAYS})),
    ],
)
def test_nor_does_a_list_of_models(models: Reply, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METIS_JUDGE_API_KEY", KEY)
    with serving(JudgeServer(models=models)) as url:
        matcher = a_matcher(url, retries=0, model="")
        with pytest.raises(JudgeError) as caught:
            asyncio.run(matcher.check())
        matcher.close()
    _clean(str(caught.value))


def test_a_verdict_behind_a_thought_that_has_the_key_holds_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METIS_JUDGE_API_KEY", KEY)
    judge = JudgeServer(default=lambda task: completion(f"<think>{KEY} says so: naïve</think>CORRECT"))
    with serving(judge) as url:
        matcher = a_matcher(url, cache=str(tmp_path / "verdicts.sqlite"))
        match = asyncio.run(matcher.compare(a_prompt("Paris"), "Paris"))
        matcher.close()
    assert match.correct and "[key] says so: naïve" in match.reason
    _clean(match.reason, *(path.read_bytes().decode("latin-1") for path in tmp_path.iterdir()))


@pytest.mark.parametrize("key", ["", "EMPTY", "correct"])
def test_a_key_that_is_a_word_spoils_no_reply(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers on one's own machine take any key."""
    monkeypatch.setenv("METIS_JUDGE_API_KEY", key)
    with serving(JudgeServer(default=lambda task: completion("correct"))) as url:
        matcher = a_matcher(url)
        assert asyncio.run(matcher.compare(a_prompt("Paris"), "Paris")).correct
        matcher.close()


@pytest.mark.parametrize(
    "given",
    [
        *("http://me:hidden-word@judge/v1", "http://hidden-word@judge/v1", "//me:hidden-word@judge", "me:hidden-word@judge/v1"),
        *("http://me:hidden-word@judge:port/v1", "judge?key=hidden-word", "http://judge:port/v1?key=hidden-word"),
    ],
)
def test_an_address_with_a_secret_is_refused_without_it(given: str) -> None:
    with pytest.raises(JudgeError, match=r"score\.llm\.base_url") as caught:
        a_matcher(given)
    assert "hidden-word" not in str(caught.value)


def test_an_address_may_have_the_sign_of_users_elsewhere() -> None:
    a_matcher("http://judge/a@b/v1?deployment=c@d").close()


def test_all_else_of_a_body_stays_as_it_is() -> None:
    body = bytes(range(256)) * 3
    assert redact_body(body, KEY) == body == redact_body(body, "")
    assert redact_body(body + KEY.encode() + body, KEY) == body + b"[key]" + body
