"""Many clients of the agent's server at once, clients that go, and its end."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2
import openai
import pytest
from agent_servers import MODEL, serving, user, wait_for

from metis_fast.model import Policy


def post(http: httpx2.Client, **fields: Any) -> httpx2.Response:
    return http.post("/chat/completions", json={"messages": user("What is 1 + 2?"), **fields})


def test_clients_at_once_each_get_their_own_answer(policy: Policy) -> None:
    with serving(policy, max_concurrent=8, queue=100) as served:
        served.engine.longest_s = 0.02
        client = served.client()

        def ask(number: int) -> str | None:
            stream = number % 2 == 0
            reply: Any = client.chat.completions.create(
                model=MODEL, messages=user(f"What is {number} + {1000 * number}?"), stream=stream
            )  # fmt: skip
            if stream:
                return "".join(chunk.choices[0].delta.content or "" for chunk in reply)
            return reply.choices[0].message.content

        with ThreadPoolExecutor(32) as pool:
            assert list(pool.map(ask, range(96))) == [str(1001 * number) for number in range(96)]
        text = httpx2.get(f"{served.root}/metrics", trust_env=False).text
    assert 'metis_serve_requests_total{status="200"} 96.0' in text and "metis_serve_running 0.0" in text
    assert 'metis_serve_tool_calls_total{tool="python"} 96.0' in text
    assert 'metis_serve_episodes_total{outcome="answered"} 96.0' in text


def test_a_full_server_says_when_to_come_again(policy: Policy) -> None:
    with (
        serving(policy, max_concurrent=1, queue=1) as served,
        httpx2.Client(base_url=served.url, trust_env=False, timeout=60) as http,
        ThreadPoolExecutor(2) as pool,
    ):
        served.toolbox.held.set()
        first = pool.submit(post, http)
        wait_for(lambda: len(served.toolbox.ran) == 1)
        second = pool.submit(post, http, messages=user("What is 2 + 2?"))
        wait_for(lambda: served.episodes._taken == 2)
        assert served.engine.num_open == 1
        full = post(http)
        assert full.status_code == 429 and int(full.headers["retry-after"]) >= 1
        assert full.json()["error"]["type"] == "rate_limit_error"
        served.toolbox.held.clear()
        contents = [one.result().json()["choices"][0]["message"]["content"] for one in (first, second)]
        assert contents == ["3", "4"]
        assert post(http, n=2).status_code == 200 and post(http, n=3).status_code == 429
        assert served.episodes._taken == 0


@pytest.mark.parametrize("stream", [False, True])
def test_the_episode_of_a_client_that_goes_ends(policy: Policy, stream: bool) -> None:
    with serving(policy, max_concurrent=1) as served:
        served.toolbox.held.set()
        with httpx2.Client(base_url=served.url, trust_env=False) as http:
            if stream:
                with http.stream("POST", "/chat/completions", json={"messages": user("What is 1 + 2?"), "stream": True}):
                    wait_for(lambda: len(served.toolbox.ran) == 1)
            else:
                with pytest.raises(httpx2.ReadTimeout):
                    http.post("/chat/completions", json={"messages": user("What is 1 + 2?")}, timeout=0.5)
        wait_for(lambda: served.episodes._taken == 0)
        assert served.engine.num_open == served.toolbox.num_open == 0  # while its tool is held
        served.toolbox.held.clear()
        assert (
            served.client().chat.completions.create(model=MODEL, messages=user("What is 4 + 5?")).choices[0].message.content
            == "9"
        )


def test_running_episodes_end_before_the_server_does(policy: Policy) -> None:
    with (
        serving(policy, max_concurrent=1) as served,
        httpx2.Client(base_url=served.url, trust_env=False, timeout=60) as http,
        ThreadPoolExecutor(2) as pool,
    ):
        served.toolbox.held.set()
        asked = [pool.submit(post, http, messages=user(f"What is {i} + {i}?")) for i in range(2)]
        wait_for(lambda: served.episodes._taken == 2)
        draining = served.begin_drain()
        late = post(http)
        assert late.status_code == 503 and late.json()["error"]["type"] == "draining" and "retry-after" in late.headers
        assert httpx2.get(f"{served.root}/health", trust_env=False).json() == {"status": "draining"}
        assert draining.is_alive()
        served.toolbox.held.clear()
        assert [one.result().json()["choices"][0]["message"]["content"] for one in asked] == ["0", "2"]
        draining.join()


def test_what_does_not_end_in_time_is_broken_off_and_told_so(policy: Policy) -> None:
    with serving(policy, max_concurrent=1, drain_s=0.2) as served, ThreadPoolExecutor(2) as pool:
        served.toolbox.held.set()
        client = served.client()

        def streamed() -> list[Any]:
            return list(client.chat.completions.create(model=MODEL, messages=user("What is 1 + 2?"), stream=True))

        first = pool.submit(streamed)
        wait_for(lambda: len(served.toolbox.ran) == 1)
        second = pool.submit(client.chat.completions.create, model=MODEL, messages=user("What is 2 + 2?"))
        wait_for(lambda: served.episodes._taken == 2)
        served.begin_drain().join()
        with pytest.raises(openai.APIError, match="about to end"):
            first.result()
        with pytest.raises(openai.InternalServerError) as caught:
            second.result()
        assert caught.value.type == "draining" and served.toolbox.num_open == 0
