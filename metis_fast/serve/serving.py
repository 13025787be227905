"""Opens the agent as a node does and serves it until it is asked to stop: SIGTERM and Ctrl-C let running episodes end first."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable

from fastapi import FastAPI

from metis_fast import host
from metis_fast.config import Config
from metis_fast.errors import ConfigError
from metis_fast.http_serving import address, listen, read_token, serve_until_stopped
from metis_fast.model import load_policy
from metis_fast.node.opening import open_agent
from metis_fast.open_files import allow_files
from metis_fast.run.assembly import host_here
from metis_fast.run.interrupt import Interrupts
from metis_fast.serve.app import make_app
from metis_fast.serve.episodes import Episodes
from metis_fast.serve.system import SystemText

_SECTION = "serve"


def agent_config(config: Config) -> Config:
    """The settings of the server's agent: no judges, as much at once as is served, and the tools that a request leaves it.

    Raises:
        ConfigError: failures of ours would pass for answers.
    """
    serve = config.serve
    if config.rollout.strict:
        raise ConfigError(
            "rollout.strict lets an episode end with a sentence where tools fail, which clients would take for an answer; "
            "serve with rollout.strict=false"
        )
    tools = config.tools.model_copy(update={"offer": "row"})
    workers = config.workers.model_copy(update={"nodes": 1, "judges": 0})
    if not serve.tools:
        none = {"enabled": (), "own": (), "mcp": (), "server": config.tools.server.model_copy(update={"url": ""})}
        tools = tools.model_copy(update=none)
        workers = workers.model_copy(update={"tools": 0})
    rollout = config.rollout.model_copy(update={"max_concurrent": serve.max_concurrent})
    return config.model_copy(update={"tools": tools, "workers": workers, "rollout": rollout})


def serve(config: Config, ready: Callable[[str], None]) -> None:
    """Serve the agent of `config` until SIGTERM or Ctrl-C.

    ready: called with the address once requests are taken.

    Raises:
        ConfigError: see `agent_config`; there is no token, no such system text, or the address cannot be used.
        ModelError, ToolSetupError, EngineError, RecordingError: the agent cannot be opened.
        Interrupted: a stop was asked for before requests were taken.
    """
    config = agent_config(config)
    settings = config.serve
    token = read_token(_SECTION, settings.host, settings.token_env, ConfigError)
    system = SystemText(settings.system)  # before a model is loaded for nothing
    allow_files(1 << 14)  # a connection for each request, and three files of its tools
    host.prepare(config.run.threads)
    with contextlib.ExitStack() as stack:
        listening = stack.enter_context(listen(_SECTION, settings.host, settings.port, ConfigError))
        interrupts = stack.enter_context(Interrupts())
        here = host_here(config, interrupts, training=False, alone=False)
        logs = config.run.dir.resolve() / "workers"
        agent = stack.enter_context(open_agent(config, here, lambda: load_policy(config.model, device=here.device), logs))
        agent.engine.wait(interrupts.check)
        app = make_app(agent, config, system, token)
        interrupts.run(_serve(app, app.state.episodes, listening, ready))


async def _serve(app: FastAPI, episodes: Episodes, listening: socket.socket, ready: Callable[[str], None]) -> None:
    try:
        await serve_until_stopped(app, listening, episodes.drain, lambda: ready(address(listening)))
    finally:
        await episodes.close()  # after a second signal some are left
