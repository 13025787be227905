"""Serves the page until it is asked to stop."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Callable
from pathlib import Path

from metis_fast.errors import ConfigError
from metis_fast.http_serving import address, listen, read_token, serve_until_stopped
from metis_fast.view.app import make_app
from metis_fast.view.run import open_runs

TOKEN_VARIABLE = "METIS_VIEW_TOKEN"
_NICE = 5  # training goes first; at 10 half a CPU second took eight on a machine with a load of 7


def serve(folders: list[Path], host: str, port: int, tokenizer: Path | None, ready: Callable[[str], None]) -> None:
    """Serve the page of run folders until SIGTERM or Ctrl-C.

    ready: called with the address, token included, once requests are taken.

    Raises:
        DataError: a folder holds no run.
        ConfigError: a token that is none, or an address that cannot be used.
    """
    runs = open_runs(folders, tokenizer)
    given = os.environ.get(TOKEN_VARIABLE)
    token = read_token("view", host, TOKEN_VARIABLE, ConfigError) if given else secrets.token_urlsafe(24)
    if not 0 <= port < 1 << 16:
        raise ConfigError(f"--port: expected 0 to 65535, got {port}")
    advice = "name another --port, or 0 for any that is free; --host is an address of this machine"
    listening = listen("view", host, port, ConfigError, advice)
    os.nice(_NICE)
    with listening:
        url = f"{address(listening)}/?token={token}"

        async def drain() -> None:
            """Nothing runs on: an answer takes less than a second."""

        asyncio.run(serve_until_stopped(make_app(runs, token), listening, drain, lambda: ready(url)))
