"""The tool server as other programs see it: tokens, sizes, statuses, health and metrics."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from tool_servers import TOKEN, HeldToolbox, config, serving

from metis_fast import cli
from metis_fast.config import ToolServeConfig
from metis_fast.errors import ToolSetupError
from metis_fast.http_serving import listen
from metis_fast.tools.server.serving import read_token
from metis_fast.tools.server.wire import MAX_REQUEST_BYTES
from metis_fast.types import ImageBlob

RIGHT = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture(scope="module")
def own() -> HeldToolbox:
    return HeldToolbox()


@pytest.fixture(scope="module")
def http(own: HeldToolbox) -> Iterator[httpx2.Client]:
    """A client of a server with a token, which brings it."""
    with (
        serving(own, config(serve={"blob_mb": 1, "max_sessions": 3}), TOKEN) as (url, _),
        httpx2.Client(base_url=url, headers=RIGHT, trust_env=False) as client,
    ):
        yield client


def open_session(http: httpx2.Client, **fields: object) -> str:
    reply = http.post("/sessions", json=fields)
    assert reply.status_code == 201
    return reply.json()["session"]


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/tools"), ("GET", "/metrics"), ("POST", "/sessions"), ("POST", "/sessions/a/calls"),
        ("DELETE", "/sessions/a"), ("PUT", "/blobs/a"), ("HEAD", "/blobs/a"), ("POST", "/mcp"), ("GET", "/openapi.json"),
        ("GET", "/nothing"), ("GET", "/health/"),
    ],
)  # fmt: skip
@pytest.mark.parametrize(
    "token", ["", "Bearer", f"Bearer {TOKEN}x", f"Bearer {TOKEN[:-1]}", f"Basic {TOKEN}", TOKEN, "Bearer ö"]
)
def test_nothing_but_health_answers_without_the_token(http: httpx2.Client, method: str, path: str, token: str):
    reply = http.request(method, path, headers=[(b"Authorization", token.encode("latin-1"))])
    assert reply.status_code == 401 and reply.headers["www-authenticate"] == "Bearer"
    if method != "HEAD":
        assert reply.json()["fault"] == "unauthorized" and TOKEN not in reply.text


def test_health_needs_no_token(http: httpx2.Client):
    assert httpx2.get(f"{http.base_url}/health", trust_env=False).json() == {"status": "ok"}


def test_without_a_token_web_pages_are_refused():
    with serving(HeldToolbox(), config()) as (url, _):
        assert httpx2.get(f"{url}/tools", trust_env=False).status_code == 200
        assert httpx2.get(f"{url}/tools", headers={"Origin": url}, trust_env=False).status_code == 401


def test_a_call_by_hand(http: httpx2.Client):
    session = open_session(http, key="by hand")
    assert open_session(http, key="by hand") == session
    body = {"number": 1, "name": "python", "arguments": {"code": "x"}, "deadline_s": 5}
    first, again = (http.post(f"/sessions/{session}/calls", json=body) for _ in range(2))
    assert first.status_code == 200 and first.content == again.content
    assert first.json()["kind"] == "PythonResult" and first.json()["result"]["stdout"] == "1 x"
    assert http.delete(f"/sessions/{session}").status_code == 204
    assert http.delete(f"/sessions/{session}").status_code == 204
    gone = http.post(f"/sessions/{session}/calls", json=body)
    assert gone.status_code == 404 and gone.json()["fault"] == "no session"


@pytest.mark.parametrize("body", [b"", b"no JSON", b"[]", b'{"number": 1}', b'{"arguments": ' + b"[" * 9000])
def test_what_is_no_call_is_a_bad_request(http: httpx2.Client, body: bytes):
    session = open_session(http)
    reply = http.post(f"/sessions/{session}/calls", content=body)
    assert reply.status_code == 400 and reply.json()["fault"] == "request"
    http.delete(f"/sessions/{session}")


def test_bodies_have_bounds_also_where_they_do_not_say_their_length(http: httpx2.Client):
    def parts() -> Iterator[bytes]:
        for _ in range(20):
            yield b" " * (1 << 20)

    for content in (b" " * (MAX_REQUEST_BYTES + 1), parts()):
        reply = http.post("/sessions", content=content)
        assert reply.status_code == 413 and reply.json()["fault"] == "too large"
    blob = ImageBlob.of(b"x" * ((1 << 20) + 1))
    assert http.put(f"/blobs/{blob.sha256}", content=blob.data).status_code == 413


def test_an_image_is_taken_under_its_own_hash_only(http: httpx2.Client):
    blob = ImageBlob.of(b"image")
    assert http.head(f"/blobs/{blob.sha256}").status_code == 404
    assert http.put(f"/blobs/{blob.sha256}", content=b"another").status_code == 400
    assert http.put("/blobs/name", content=b"image").status_code == 400
    refused = http.post("/sessions", json={"images": [blob.sha256]})
    assert refused.status_code == 409 and refused.json()["missing"] == [blob.sha256]
    assert http.put(f"/blobs/{blob.sha256}", content=blob.data).status_code == 204
    assert http.head(f"/blobs/{blob.sha256}").status_code == 200
    http.delete(f"/sessions/{open_session(http, images=[blob.sha256])}")


def test_a_full_server_says_when_to_come_again(http: httpx2.Client):
    sessions = [open_session(http) for _ in range(3)]
    full = http.post("/sessions", json={})
    assert full.status_code == 429 and full.json()["fault"] == "busy" and int(full.headers["retry-after"]) >= 1
    for session in sessions:
        http.delete(f"/sessions/{session}")
    http.delete(f"/sessions/{open_session(http)}")


def test_metrics_are_in_the_format_of_prometheus(http: httpx2.Client):
    from prometheus_client.parser import text_string_to_metric_families

    session = open_session(http)
    body = {"number": 1, "name": "python", "arguments": {"code": "x"}, "deadline_s": 5}
    http.post(f"/sessions/{session}/calls", content=json.dumps(body))
    families = {one.name: one for one in text_string_to_metric_families(http.get("/metrics").text)}
    calls = {(one.labels["tool"], one.labels["outcome"]): one.value for one in families["metis_tools_calls"].samples
             if one.name.endswith("_total")}  # fmt: skip
    assert calls["python", "tool_result"] >= 1
    assert [one.value for one in families["metis_tools_sessions"].samples] == [1]
    assert families["metis_tools_call_seconds"].type == "histogram"
    http.delete(f"/sessions/{session}")


def test_the_parts_of_a_reply_do_not_wait_for_each_other():
    with (
        listen("tools.serve", "127.0.0.1", 0, ToolSetupError) as listening,
        socket.create_connection(listening.getsockname()),
    ):
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY) == 1


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "tools.example"])
def test_an_address_that_others_reach_needs_a_token(host: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("METIS_TOOLS_TOKEN", raising=False)
    with pytest.raises(ToolSetupError, match="no token is set"):
        read_token(ToolServeConfig(host=host))
    monkeypatch.setenv("METIS_TOOLS_TOKEN", f"{TOKEN}\n")
    assert read_token(ToolServeConfig(host=host)) == TOKEN


@pytest.mark.parametrize("host", ["127.0.0.1", "127.5.5.5", "::1", "localhost"])
def test_this_machine_alone_needs_none(host: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("METIS_TOOLS_TOKEN", raising=False)
    assert read_token(ToolServeConfig(host=host)) == ""


@pytest.mark.parametrize("token", ["short", "with a blank in the middle", "ö" * 20])
def test_a_token_that_is_none_is_refused(token: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("METIS_TOOLS_TOKEN", token)
    with pytest.raises(ToolSetupError) as caught:
        read_token(ToolServeConfig())
    assert token not in str(caught.value)


@pytest.mark.parametrize("how", ["record", "replay"])
def test_a_server_keeps_no_recording(how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "my.yaml").write_text(f"tools: {{enabled: [], {how}: {tmp_path / 'run.sqlite'}}}\n")
    assert cli.main(["tools", "serve", str(tmp_path / "my.yaml")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"tools.{how}=" in said and f"tools.{how}=null" in said
    assert not (tmp_path / "run.sqlite").exists()
