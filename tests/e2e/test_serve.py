"""`metis-fast serve` in a process of its own: many clients with real tools, engines that are killed, and its end."""

from __future__ import annotations

import base64
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import answering
import httpx2
import pytest
import scripted
import yaml
from harness import AGENT, Command, Ended
from openai import APIConnectionError, APIStatusError, OpenAI
from scripted import left_running
from transformers import AutoTokenizer

from metis_fast.testing.faults import Fault, Faults, Script
from metis_fast.types import ImageBlob

_START_S = 900.0  # of a server with vLLM, on a machine that does many other things too
_CLIENTS = 32


class Server:
    """A server that runs. client: OpenAI's, which tries nothing again; not typed, since its messages are many TypedDicts."""

    def __init__(self, command: Command, url: str) -> None:
        self.command, self.url = command, url
        self.client: Any = OpenAI(base_url=url, api_key="unused", max_retries=0, timeout=240)

    def ask(self, text: str, *images: ImageBlob, stream: bool = False, raw: bool = False, **more: Any) -> str:
        """The content of an answer, of a stream put together."""
        urls = [f"data:image/png;base64,{base64.b64encode(image.data).decode()}" for image in images]
        parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        messages = [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]
        more["extra_body"] = {"raw": raw}
        reply = self.client.chat.completions.create(model=AGENT.name, messages=messages, stream=stream, **more)
        if stream:
            return "".join(chunk.choices[0].delta.content or "" for chunk in reply)
        return reply.choices[0].message.content

    def end(self) -> Ended:
        """Ask it to stop, and wait."""
        os.kill(self.command.pid, signal.SIGTERM)
        return self.command.wait()


@contextmanager
def serving(tmp_path: Path, before: Callable[[], None] | None, **changes: Any) -> Iterator[Server]:
    """A server of the tests' agent with a Python tool, until the context ends."""
    tree: dict[str, Any] = {
        "run": {"dir": str(tmp_path / "run"), "threads": 1},
        "model": {"path": str(AGENT), "dtype": "float32"},
        "rollout": {"max_prompt_tokens": 3000, "max_response_tokens": 400, "max_turns": 4},
        "tools": {"enabled": ["python"]},
        "serve": {"port": 0, "queue": 100, "drain_s": 60.0},
    }
    for section, values in changes.items():
        tree[section] = tree.get(section, {}) | values
    path = tmp_path / "my.yaml"
    path.write_text(yaml.safe_dump(tree))
    command = Command(["serve", path, "--json"], tmp_path / "process", before=before)
    deadline = time.monotonic() + _START_S
    while not command.read("out").endswith("\n"):
        assert command.alive and time.monotonic() < deadline, command.read("err")
        time.sleep(0.02)
    try:
        yield Server(command, json.loads(command.read("out"))["url"])
    finally:
        if command.alive:
            os.kill(command.pid, signal.SIGKILL)
            command.wait()


def check_clients(server: Server, picture: Callable[..., ImageBlob], seconds: float) -> None:
    """So many clients ask one after the other, until the time is over and then the server is stopped amid their requests: every
    request that was taken has its own answer, and what comes later is refused."""
    image, until, asked = picture(1), time.monotonic() + seconds, [0] * _CLIENTS
    stopped = threading.Event()

    def one(number: int) -> None:
        while True:
            a, b = asked[number] * 100 + number, 7 * number
            images = [image] if asked[number] % 3 == 0 else []
            late = stopped.is_set()
            try:
                content = server.ask(f"What is {a} + {b}?", *images, stream=asked[number] % 2 == 0)
            except APIStatusError as error:
                assert stopped.is_set() and error.status_code == 503 and "about to end" in error.message, error
                return
            except APIConnectionError:  # what was sent before has its answer
                assert late
                return
            assert content == str(a + b)
            asked[number] += 1

    with ThreadPoolExecutor(_CLIENTS) as pool:
        clients = [pool.submit(one, number) for number in range(_CLIENTS)]
        while time.monotonic() < until or min(asked) < 2:
            assert not any(client.done() for client in clients), [client.exception() for client in clients if client.done()]
            time.sleep(0.05)
        metrics = httpx2.get(f"{server.url.removesuffix('/v1')}/metrics", trust_env=False).text
        stopped.set()
        os.kill(server.command.pid, signal.SIGTERM)
        for client in clients:
            client.result()
    ended = server.command.wait()
    assert ended.code == 0 and not ended.orphans and not ended.scratch, ended
    assert "Traceback" not in ended.err and "never retrieved" not in ended.err, ended.err
    taken = sum(float(line.split()[-1]) for line in metrics.splitlines() if line.startswith("metis_serve_requests_total{"))
    assert 'status="200"' in metrics and 'status="5' not in metrics and 'status="4' not in metrics
    assert taken <= sum(asked)


def test_clients_with_tools_get_their_own_answers_and_the_server_ends_cleanly(
    tmp_path: Path, picture: Callable[..., ImageBlob]
) -> None:
    with serving(tmp_path, answering.use, serve={"port": 0, "max_concurrent": 16, "queue": 100, "drain_s": 60.0}) as server:
        check_clients(server, picture, seconds=1.0)


@pytest.mark.slow
def test_clients_with_tools_for_two_minutes(tmp_path: Path, picture: Callable[..., ImageBlob]) -> None:
    with serving(tmp_path, answering.use, serve={"port": 0, "max_concurrent": 16, "queue": 100, "drain_s": 60.0}) as server:
        check_clients(server, picture, seconds=120.0)


def test_the_tests_agent_answers_alike_alone_and_beside_others(tmp_path: Path, picture: Callable[..., ImageBlob]) -> None:
    """The real native engine, greedy; whatever its answers are worth."""
    with serving(tmp_path, None, serve={"port": 0, "temperature": 0.0}) as server:
        questions = [(f"Which city is number {i}?", [picture(i)] if i % 2 else []) for i in range(6)]
        alone = [server.ask(text, *images, raw=True, max_tokens=24) for text, images in questions]
        with ThreadPoolExecutor(6) as pool:
            together = pool.map(lambda one: server.ask(one[0], *one[1], raw=True, max_tokens=24, stream=True), questions)
            assert list(together) == alone
        ended = server.end()
    assert ended.code == 0 and not ended.orphans and not ended.scratch, ended


def test_answers_go_on_when_engines_are_killed(tmp_path: Path) -> None:
    """Scripted engines in processes of their own; two of them, one of which is killed amid a message, thrice."""
    tokenizer = AutoTokenizer.from_pretrained(AGENT)
    call = '<tool_call>{"name": "python", "arguments": {"code": "print(6 * 7)"}}</tool_call>'
    turns = [[tokenizer.encode(call)], [tokenizer.encode("So. <answer>42</answer><|im_end|>")]]
    faults = Faults(tmp_path / "faults")
    Script(turns, turn_start=tokenizer.convert_tokens_to_ids("<|im_start|>")).write(tmp_path / "faults")
    vllm = {"replicas": 2, "stall_s": 5.0, "restarts": 20, "arguments": {"faults": str(tmp_path / "faults")}}
    with serving(tmp_path, scripted.use, rollout={"engine": "vllm", "vllm": vllm, "max_prompt_tokens": 3000}) as server:
        with ThreadPoolExecutor(8) as pool:
            for _ in range(3):
                asked = [pool.submit(server.ask, "What is six times seven?", stream=i % 2 == 0) for i in range(16)]
                faults.arm(Fault.KILL)
                assert [one.result() for one in asked] == ["42"] * 16
                assert [server.ask("And now?") for _ in range(8 * len(faults.armed()))] == ["42"] * 8 * len(faults.armed())
        ended = server.end()
    assert ended.code == 0 and not ended.scratch, ended
    assert ended.err.count("; starting it again (") == 3 and "Traceback" not in ended.err, ended.err
    assert left_running(tmp_path / "run" / "workers") == []


@pytest.mark.slow
@pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed")
def test_answers_go_on_when_vllms_engine_is_killed(tmp_path: Path, picture: Callable[..., ImageBlob]) -> None:
    """The real engine on the CPU, the only one: requests wait until it is there again, and say what they said before."""
    rollout = {"engine": "vllm", "vllm": {"cpu_threads": 1}, "max_prompt_tokens": 512, "max_response_tokens": 256}
    (tmp_path / "system").touch()  # none: the model has 1,024 positions
    settings = {"port": 0, "temperature": 0.0, "system": str(tmp_path / "system")}
    with serving(tmp_path, None, rollout=rollout, serve=settings) as server:
        questions = [(f"Which city is number {i}?", [picture(i)] if i % 2 else []) for i in range(4)]

        def ask(number: int) -> str:
            text, images = questions[number % 4]
            return server.ask(text, *images, raw=True, max_tokens=60, stream=number >= 4)

        before = [ask(number) for number in range(4)]
        assert all(before)
        (engine,) = server.command.named("engine-0")
        with ThreadPoolExecutor(8) as pool:
            asked = [pool.submit(ask, number) for number in range(8)]
            time.sleep(0.1)
            os.kill(engine.pid, signal.SIGKILL)
            assert [one.result() for one in asked] == before * 2
        assert [ask(number) for number in range(4)] == before
        ended = server.end()
    assert ended.code == 0 and not ended.orphans and not ended.scratch, ended
    assert ended.err.count("; starting it again (") == 1, ended.err


def test_a_server_that_cannot_start_says_why_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(f"model: {{path: {tmp_path / 'nothing'}}}\ntools: {{enabled: []}}\nserve: {{port: 0}}\n")
    ended = Command(["serve", path], tmp_path / "process").wait()
    assert ended.code == 2 and len(ended.err.splitlines()) == 1 and "nothing" in ended.err, ended
    ended = Command(["serve", path, "serve.host=0.0.0.0"], tmp_path / "process").wait()
    assert ended.code == 2 and "serve.host=0.0.0.0 can be reached by others" in ended.err, ended
