"""Runs a tool server until it is asked to stop: SIGTERM and Ctrl-C let running calls end first, a second one does not."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import Callable
from pathlib import Path

from metis_fast import http_serving
from metis_fast.config import ToolsConfig, ToolServeConfig
from metis_fast.errors import ToolSetupError
from metis_fast.open_files import allow_files
from metis_fast.own_folder import OwnFolder
from metis_fast.tools import open_toolbox
from metis_fast.tools.server.app import make_app

_SECTION = "tools.serve"


def read_token(config: ToolServeConfig) -> str:
    """The token; empty where there is none, which only this machine may reach.

    Raises:
        ToolSetupError: it is no token, or needed and not there.
    """
    return http_serving.read_token(_SECTION, config.host, config.token_env, ToolSetupError)


def serve(config: ToolsConfig, ready: Callable[[str], None]) -> None:
    """Serve the tools of `config` until SIGTERM or Ctrl-C.

    ready: called with the address once requests are taken.

    Raises:
        ToolSetupError: a tool cannot be opened (see `open_toolbox`), there is no token, or the address cannot be used.
    """
    token = read_token(config.serve)
    allow_files(1 << 15)  # a session has a connection here, and three files of its own
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(http_serving.listen(_SECTION, config.serve.host, config.serve.port, ToolSetupError))
        folder = OwnFolder(Path(tempfile.gettempdir()), "metis-tools-")
        stack.callback(folder.close)
        toolbox = open_toolbox(config, folder.path)
        stack.callback(toolbox.close)
        app = make_app(toolbox, config, token)
        asyncio.run(
            http_serving.serve_until_stopped(
                app, listening, app.state.table.drain, lambda: ready(http_serving.address(listening))
            )
        )
