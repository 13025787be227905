"""Searches of a tool worker, from the run's session to a provider and back; and the documented settings."""

from __future__ import annotations

import asyncio
import re
from pathlib import Path

import pytest
from searching import KEY, keys, settings

from metis_fast.config import ToolsConfig, WorkersConfig, load
from metis_fast.errors import InfrastructureError, ToolSetupError
from metis_fast.testing.search import Reply, SearchServer, serving, some_pages
from metis_fast.tools.remote import RemoteToolbox, start_tool_workers
from metis_fast.tools.results import TextSearchResult
from metis_fast.tools.search import open_text_source
from metis_fast.workers.hub import Hub
from metis_fast.workers.launch import LocalLauncher
from metis_fast.workers.worker import wait_ready

pytestmark = pytest.mark.usefixtures("keys")
__all__ = ["keys"]


def tools(config: object) -> ToolsConfig:
    return ToolsConfig.model_validate({"enabled": ["text_search"], "text_search": config})


def test_a_tool_worker_searches_and_its_failures_and_logs_hold_no_key(tmp_path: Path) -> None:
    server = SearchServer(key=KEY)

    async def play(toolbox: RemoteToolbox) -> None:
        session = toolbox.session(())
        result = await session.call("search", {"query": "blue heron"})
        assert result == TextSearchResult("blue heron", tuple(some_pages("blue heron")[:10]))
        server.replies.append(Reply(403, f"no such key: {KEY}".encode()))
        with pytest.raises(InfrastructureError, match=r"through serpapi: HTTP status 403 \(no such key: \[key\]\)") as caught:
            await session.call("text_search", {"query": "another"})
        assert KEY not in repr(caught.value)
        assert await session.call("search", {"query": "blue heron"}) == result  # the session may be used again
        await session.close()

    with serving(server) as address, Hub(WorkersConfig(start_s=60.0), LocalLauncher(tmp_path / "logs")) as hub:
        config = tools(settings("serpapi", address, cache=tmp_path / "searches.sqlite"))
        workers = start_tool_workers(hub, config, 1, tmp_path)
        wait_ready(workers, lambda: None)
        asyncio.run(play(RemoteToolbox(config, workers)))
    assert len(server.received) == 2
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.parent.name for path in files} >= {"logs", tmp_path.name}
    assert not [path for path in files if b"9f31c0de" in path.read_bytes()]


def test_a_tool_worker_without_its_key_is_told_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SERPER_API_KEY")
    with Hub(WorkersConfig(), LocalLauncher(tmp_path)) as hub:
        workers = start_tool_workers(hub, tools({"provider": "serper"}), 1, tmp_path)
        with pytest.raises(ToolSetupError, match="needs the key in the environment variable SERPER_API_KEY, which is not set"):
            wait_ready(workers, lambda: None)


def test_the_documented_settings_are_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_SEARCH_KEY", KEY)
    page = (Path(__file__).parents[2] / "docs" / "web-search.md").read_text()
    blocks = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        (tmp_path / "search.yaml").write_text(block.replace("/local/metis", str(tmp_path)))
        config = load(tmp_path / "search.yaml").tools
        if config.text_search.provider != "local":
            open_text_source(config.text_search).close()
