"""What a toolbox over a tool server refuses at the start: another server, another token, other tools or corpora."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import threading
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx2
import pytest
from tool_servers import TOKEN, HeldToolbox, config, run_code, serving

from metis_fast.config import ToolsConfig
from metis_fast.errors import ToolSetupError
from metis_fast.tools.protocol import ToolSpec
from metis_fast.tools.server.client import ServerToolbox


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


def refusal(settings: ToolsConfig) -> str:
    with pytest.raises(ToolSetupError) as caught:
        ServerToolbox(settings)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize("url", ["tools", "ftp://a", "http://", "http://me:secret@a", "http://a:99999", "http://\udfff"])
def test_an_address_that_is_none_is_told_at_the_start(url: str):
    said = refusal(config(url))
    assert "tools.server.url" in said and "secret" not in said


def test_no_server_is_told_at_the_start():
    assert "no tool server at tools.server.url" in refusal(config(f"http://127.0.0.1:{free_port()}"))


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b'{"protocol": 2, "tools": "all", "settings": {}}', "is no tool server of this version"),
        (b'{"protocol": 1, "version": "0.0.9", "tools": []}', r"protocol 1 \(release 0.0.9\), and this run protocol 2"),
    ],
)
def test_another_server_is_told_at_the_start(body: bytes, words: str):
    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Other) as server:
        threading.Thread(target=server.serve_forever).start()
        said = refusal(config(f"http://127.0.0.1:{server.server_port}"))
        server.shutdown()
    assert re.search(words, said)


def test_a_wrong_token_is_told_at_the_start(monkeypatch: pytest.MonkeyPatch):
    with serving(HeldToolbox(), config(), TOKEN) as (url, _):
        assert "refuses the token" in refusal(config(url))
        monkeypatch.setenv("MY_TOKEN", TOKEN + "x")
        said = refusal(config(url, token_env="MY_TOKEN"))
        assert "refuses the token (MY_TOKEN)" in said and TOKEN not in said
        monkeypatch.setenv("MY_TOKEN", f" {TOKEN}\n")
        toolbox = ServerToolbox(config(url, token_env="MY_TOKEN"))
        session = toolbox.session(())

        async def go() -> str:
            text = await run_code(session, "a")
            await session.close()
            return text

        assert asyncio.run(go()) == "1 a"
        monkeypatch.setenv("MY_TOKEN", "wört")
        assert "characters that no token has" in refusal(config(url, token_env="MY_TOKEN"))


class Searching(HeldToolbox):
    """Says that it has `text_search` too."""

    @property
    def tools(self) -> Sequence[ToolSpec]:
        return (*super().tools, ToolSpec("text_search", "Searches.", {"type": "object"}))


def test_another_content_of_a_corpus_than_the_runs_is_told_at_the_start(tmp_path: Path):
    def settings(name: str, url: str = "") -> ToolsConfig:
        tree = config(url).model_dump() | {"enabled": ["python", "text_search"], "text_search": {"corpus": tmp_path / name}}
        return ToolsConfig.model_validate(tree)

    for name, text in (("theirs", b"a page"), ("same", b"a page"), ("ours", b"A page")):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.parquet").write_bytes(text)
        os.utime(tmp_path / name / f"{name}.parquet", (0, 0))
    with serving(Searching(), settings("theirs")) as (url, _):
        for name in ("same", "nowhere"):  # what is not here is the server's alone
            assert len(ServerToolbox(settings(name, url)).tools) == 2
        said = refusal(settings("ours", url))
        assert "has another content of tools.text_search.corpus than" in said
        assert "\n" not in said and str(tmp_path) not in httpx2.get(f"{url}/tools").text


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"enabled": ["python", "text_search"]}, "has python, tools.enabled names python, text_search"),
        ({"python": {"timeout_s": 3}}, "tools.python.timeout_s is 20.0 there and 3.0 here"),
        ({"own": ["my_tools:WordCount"]}, "tools.own is [] there and ['my_tools:WordCount'] here"),
    ],
)
def test_other_tools_than_the_runs_are_told_at_the_start(changed: dict[str, object], said: str):
    with serving(HeldToolbox(), config()) as (url, _):
        assert said in refusal(ToolsConfig.model_validate({"enabled": ["python"], **changed, "server": config(url).server}))
