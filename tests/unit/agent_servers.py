"""Agent servers in a thread of the test's process, over an engine that does sums and a tool that can be held."""

from __future__ import annotations

import asyncio
import base64
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn
from answering import AnsweringEngine, sum_by_tool
from openai import OpenAI
from tool_servers import HeldToolbox, printed

from metis_fast.config import Config
from metis_fast.model import Policy
from metis_fast.node.opening import Agent
from metis_fast.rollout.chat import Chat
from metis_fast.rollout.offer import Offer
from metis_fast.rollout.protocols import open_dialect
from metis_fast.serve.app import make_app
from metis_fast.serve.episodes import Episodes
from metis_fast.serve.serving import agent_config
from metis_fast.serve.system import SystemText
from metis_fast.types import ImageBlob

MODEL = "sums"


@dataclass(frozen=True, slots=True)
class Served:
    """A server that runs. url: with /v1. loop: in which it does."""

    url: str
    engine: AnsweringEngine
    toolbox: HeldToolbox
    episodes: Episodes
    loop: asyncio.AbstractEventLoop

    @property
    def root(self) -> str:
        """Address without /v1."""
        return self.url.removesuffix("/v1")

    def begin_drain(self) -> threading.Thread:
        """As a signal would; the thread ends with it."""
        drain = asyncio.run_coroutine_threadsafe(self.episodes.drain(), self.loop)
        thread = threading.Thread(target=drain.result)
        thread.start()
        wait_for(lambda: self.episodes.draining)
        return thread

    def client(self, token: str = "unused") -> Any:
        """OpenAI's own, which tries nothing again; not typed, since its messages are many TypedDicts."""
        return OpenAI(base_url=self.url, api_key=token, max_retries=0, timeout=60)


def add(code: str) -> Any:
    """What python prints of `print(a + b)`."""
    a, b = code.removeprefix("print(").removesuffix(")").split("+")
    return printed(str(int(a) + int(b)))


@contextmanager
def serving(
    policy: Policy, answer: Callable[[str], Any] = sum_by_tool, token: str = "", rollout: Any = None, **serve: Any
) -> Iterator[Served]:
    """Over loopback, until the context ends."""
    tree = {"serve": {"model": MODEL, "token_env": "", **serve}, "rollout": {"retries": 1, **(rollout or {})}}
    config = agent_config(Config.model_validate(tree))
    engine, toolbox = AnsweringEngine(policy, answer=answer), HeldToolbox(add)
    chat = Chat(policy.tokenizer, policy.images, open_dialect(config), Offer(config.tools, toolbox.tools))
    app = make_app(Agent(policy, chat, engine, toolbox), config, SystemText(None), token)  # pyright: ignore[reportArgumentType]
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(
            uvicorn.Config(app, log_config=None, access_log=False, ws="none", timeout_graceful_shutdown=5, loop="asyncio")
        )
        loop = asyncio.new_event_loop()
        thread = threading.Thread(target=loop.run_until_complete, args=[server.serve([listening])])
        thread.start()
        try:
            while not server.started and thread.is_alive():
                threading.Event().wait(0.005)
            assert server.started
            url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
            yield Served(url, engine, toolbox, app.state.episodes, loop)
        finally:
            toolbox.held.clear()
            server.should_exit = True
            thread.join()
            loop.close()
    assert engine.num_open == toolbox.num_open == 0


def data_url(image: ImageBlob) -> str:
    """As clients send images."""
    return f"data:image/png;base64,{base64.b64encode(image.data).decode()}"


def user(text: str, *images: ImageBlob) -> list[dict[str, Any]]:
    """One message, images first."""
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": data_url(image)}} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def wait_for(condition: Callable[[], bool]) -> None:
    """Until it holds; not for ever."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)
