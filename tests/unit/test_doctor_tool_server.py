"""What `metis-fast doctor` finds of a tool server: it is asked in place of tools on this machine, as the run would ask it."""

from __future__ import annotations

from pathlib import Path

import pytest
from tool_servers import TOKEN, HeldToolbox, config, serving

from metis_fast.config import Config
from metis_fast.doctor.command import checks
from metis_fast.doctor.finding import Finding
from metis_fast.doctor.services import described


def _job(url: str, **changes: object) -> Config:
    """A job whose tools are those of a server."""
    tools = config(url, token_env="SERVED_TOKEN", connect_s=2.0).model_copy(update=changes)
    return Config.model_validate({"data": {"train": [Path("rows.parquet")]}}).model_copy(update={"tools": tools})


def _found(job: Config, offline: bool = False) -> list[Finding]:
    return [finding for check in checks(job, offline) if check.area == "tools" for finding in check.findings()]


def test_a_tool_server_is_asked_in_place_of_tools_on_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVED_TOKEN", TOKEN)
    toolbox = HeldToolbox()
    with serving(toolbox, config(), TOKEN) as (url, _):
        (one,) = _found(_job(url))
        assert (one.what, one.state) == ("tools.server", "ok") and "python" in one.found
        assert [tool.description for tool in described(_job(url), offline=False)] == ["Runs code."]  # for lengths of prompts
        (one,) = _found(_job(url, max_output_chars=77))
        assert one.state == "error" and "tools.max_output_chars is" in one.found and one.advice == "give both the same tools"
        monkeypatch.setenv("SERVED_TOKEN", TOKEN[::-1])
        (one,) = _found(_job(url))
        assert one.state == "error" and "refuses the token (SERVED_TOKEN)" in one.found and "set the variable" in one.advice
    assert not toolbox.ran and not toolbox.prompts
    (one,) = _found(_job(url))
    assert one.state == "error" and "no tool server at" in one.found and "start one there" in one.advice
    (one,) = _found(_job(url), offline=True)
    assert one.state == "ok" and "was not asked" in one.found and described(_job(url), offline=True) == ()
