"""`metis-fast serve` with two real vLLM engines and a real tool, under many clients; one engine is killed amid it."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import statistics
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import httpx2
import pytest
from harness import AGENT
from openai import APIConnectionError, APIStatusError
from test_serve import Server, serving

pytestmark = [pytest.mark.slow, pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed")]
_CLIENTS = 32
_SECONDS = 120.0
_CODE = re.compile(r'\{"code": "print\((\d+) [*+] (\d+)\)"\}')


@dataclass
class Told:
    """What clients saw. seconds: of each answer, with the time at which it came. refused, unsent: as the server ended."""

    seconds: list[tuple[float, float]] = field(default_factory=list)
    refused: int = 0
    unsent: int = 0


def ask(server: Server, a: int, b: int) -> str | None:
    """The answer, where the agent had Python reckon with the two numbers of the question, and said what that printed."""
    messages = [{"role": "user", "content": f"What is {a} * {b}?"}]
    choice = server.client.chat.completions.create(model=AGENT.name, messages=messages).choices[0]
    told = choice.model_extra["metis"]
    calls = [turn for turn in told["transcript"] if turn["call"] is not None]
    if told["outcome"] != "answered" or len(calls) != 1:
        return None
    code = _CODE.fullmatch(calls[0]["call"]["arguments"])
    own = code is not None and (int(code[1]), int(code[2])) == (a, b)
    return choice.message.content if own and choice.message.content == calls[0]["observation"] else None


def well_read(server: Server, num: int) -> list[tuple[int, int, str]]:
    """Questions whose numbers the agent, which is small, does not mistake; with its answers, no two of them alike."""
    asked = [(10 + 2 * (place % 45), 11 + 3 * (place // 4 % 29)) for place in range(2 * num)]
    with ThreadPoolExecutor(8) as pool:
        answers = pool.map(lambda one: ask(server, *one), asked)
        found = {answer: (*one, answer) for one, answer in zip(asked, answers, strict=True) if answer is not None}
    assert len(found) >= num, found
    return list(found.values())[:num]


def ask_until_stopped(server: Server, questions: Sequence[tuple[int, int, str]], stopped: threading.Event, told: Told) -> None:
    """One client, whose questions nobody else asks."""
    for a, b, answer in itertools.cycle(questions):
        late, began = stopped.is_set(), time.monotonic()
        try:
            got = ask(server, a, b)
        except APIStatusError as error:
            assert stopped.is_set() and error.status_code == 503 and "about to end" in error.message, error
            told.refused += 1
            return
        except APIConnectionError:  # what was sent before has its answer
            assert late
            told.unsent += 1
            return
        assert got == answer, (a, b)
        told.seconds.append((time.monotonic(), time.monotonic() - began))


def all_ask(clients: Sequence[Future[None]], until: float) -> None:
    """Wait, as long as none of them has ended."""
    while time.monotonic() < until:
        assert not any(client.done() for client in clients), [one.exception() for one in clients if one.done()]
        time.sleep(0.1)


def test_answers_of_two_engines_go_on_when_one_is_killed_amid_two_minutes(tmp_path: Path) -> None:
    vllm = {"cpu_threads": 1, "replicas": 2}
    rollout = {"engine": "vllm", "vllm": vllm, "max_prompt_tokens": 256, "max_response_tokens": 256}
    (tmp_path / "system").touch()  # none: the agent has learnt to call without
    settings = {"port": 0, "temperature": 0.0, "system": str(tmp_path / "system"), "max_concurrent": 32, "queue": 64}
    told, stopped = Told(), threading.Event()
    with serving(tmp_path, None, rollout=rollout, serve=settings | {"drain_s": 120.0}) as server:
        engines = {name: one for name in ("engine-0", "engine-1") for one in server.command.named(name)}
        assert len(engines) == 2
        questions = well_read(server, 3 * _CLIENTS)
        began = time.monotonic()
        with ThreadPoolExecutor(_CLIENTS) as pool:
            clients = [
                pool.submit(ask_until_stopped, server, questions[number::_CLIENTS], stopped, told) for number in range(_CLIENTS)
            ]
            try:
                all_ask(clients, began + _SECONDS / 2)
                os.kill(engines["engine-1"].pid, signal.SIGKILL)
                killed = time.monotonic()
                all_ask(clients, began + _SECONDS)
                metrics = httpx2.get(f"{server.url.removesuffix('/v1')}/metrics", trust_env=False).text
            finally:
                stopped.set()
                os.kill(server.command.pid, signal.SIGTERM)
            ending = time.monotonic()
            for client in clients:
                client.result()
        drained = time.monotonic() - ending
        ended = server.command.wait()
    assert ended.code == 0 and not ended.orphans and not ended.scratch, ended
    assert ended.err.count("; starting it again (") == 1 and "Traceback" not in ended.err, ended.err
    assert 'status="200"' in metrics and 'status="5' not in metrics and 'status="4' not in metrics
    after = [took for at, took in told.seconds if at > killed]
    assert len(after) >= _CLIENTS, told
    every = sorted(took for _, took in told.seconds)
    figures = {
        "answers": len(every), "behind the kill": len(after),
        "median_s": round(statistics.median(every), 2), "p95_s": round(every[len(every) * 95 // 100], 2),
        "longest_s": round(every[-1], 2), "drained_s": round(drained, 2), "refused": told.refused, "unsent": told.unsent,
    }  # fmt: skip
    print(json.dumps(figures))
