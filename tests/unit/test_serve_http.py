"""The agent's server as OpenAI's client, and others, see it: answers, streams, refusals, ends."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx2
import openai
import pytest
from agent_servers import MODEL, Served, data_url, serving, user

from metis_fast.errors import EngineError, EngineFailure
from metis_fast.model import Policy
from metis_fast.types import ImageBlob

TOKEN = "a-token-of-32-signs-0123456789ab"


@pytest.fixture(scope="module")
def served(policy: Policy) -> Iterator[Served]:
    with serving(policy, keep_alive_s=0.05, max_images=3, max_image_mb=1, max_request_mb=4) as one:
        yield one


@pytest.fixture(scope="module")
def http(served: Served) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=served.url, trust_env=False, timeout=60) as client:
        yield client


def post(http: httpx2.Client, **fields: Any) -> httpx2.Response:
    return http.post("/chat/completions", json={"model": MODEL, "messages": user("What is 1 + 2?"), **fields})


# -- answers --------------------------------------------------------------------------------------------------------------


def test_openais_client_gets_the_final_answer_and_beside_it_the_whole_episode(
    served: Served, picture: Callable[..., ImageBlob]
) -> None:
    image = picture(1)
    reply = served.client().chat.completions.create(model=MODEL, messages=user("What is 17 + 25?", image))
    (choice,) = reply.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", "42", "stop")
    assert reply.object == "chat.completion" and reply.model == MODEL and reply.id.startswith("chatcmpl-")
    assert choice.model_extra is not None
    told = choice.model_extra["metis"]
    assert told["outcome"] == "answered" and told["num_tool_calls"] == 1 and told["answer_tags"]
    assert told["weight_version"] == 0
    first, last = told["transcript"]
    assert first["call"] == {"name": "python", "arguments": '{"code": "print(17 + 25)"}'}
    assert first["observation"] == "42" and first["outcome"] == "tool_result"
    assert last["call"] is None and last["text"] == "<reason>The tool says so.</reason>\n<answer>42</answer>"
    assert reply.usage is not None
    assert reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    assert reply.usage.completion_tokens > 40 and told["observation_tokens"] > 2
    (seen, _, _) = served.toolbox.prompts[-1]
    assert [one.sha256 for one in seen] == [image.sha256]


def test_the_agents_own_text_is_added_and_the_clients_stands_before_it(served: Served) -> None:
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "developer", "content": [{"type": "text", "text": "Be brief."}]},
        {"role": "user", "content": "What is 1 + 1?"},
        {"role": "assistant", "content": "Two <answer>2</answer>"},
        {"role": "user", "content": "<image> What is 2 + 2?<|im_end|>"},
    ]
    reply = served.client().chat.completions.create(model=MODEL, messages=messages)
    assert reply.choices[0].message.content == "4"
    text = served.engine.asked[-1][0]
    assert text.startswith("<|im_start|>system\nBe kind.\n\nBe brief.\n\nYou are an assistant")
    assert "## python\nRuns Python code" in text and "<tool_call>{" in text
    middle = text.index("<|im_end|>\n<|im_start|>user\nWhat is 1 + 1?<|im_end|>\n<|im_start|>assistant\nTwo <answer>2</answer>")
    assert middle < text.index("<|im_start|>user\n<image> What is 2 + 2?<|im_end|><|im_end|>\n<|im_start|>assistant\n")


def test_a_stream_names_the_speaker_first_and_gives_the_answer_in_pieces(policy: Policy) -> None:
    answer = " ".join(f"word{i}" for i in range(40))
    with serving(policy, lambda text: f"<reason>So.</reason><answer>{answer}</answer><|im_end|>") as served:
        stream = served.client().chat.completions.create(
            model=MODEL, messages=user("Go on."), stream=True, stream_options={"include_usage": True}, n=2
        )  # fmt: skip
        chunks = list(stream)
    *chunks, usage = chunks
    assert usage.choices == [] and usage.usage is not None and usage.usage.completion_tokens > 0
    assert [chunk.choices[0].delta.role for chunk in chunks[:2]] == ["assistant"] * 2
    assert len({chunk.id for chunk in chunks}) == 1 and len(chunks) > 8
    for index in range(2):
        own = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        assert "".join(choice.delta.content or "" for choice in own) == answer
        assert [choice.finish_reason for choice in own][-2:] == [None, "stop"]
        assert own[-1].model_extra is not None and own[-1].model_extra["metis"]["outcome"] == "answered"


def test_a_stream_is_kept_alive_by_comments_while_a_tool_runs(served: Served, http: httpx2.Client) -> None:
    served.toolbox.held.set()
    body = {"messages": user("What is 3 + 4?"), "stream": True}
    with http.stream("POST", "/chat/completions", json=body) as reply:
        assert reply.headers["content-type"].startswith("text/event-stream")
        lines: list[str] = []
        for line in reply.iter_lines():
            lines.append(line)
            if sum(line.startswith(":") for line in lines) == 3:
                served.toolbox.held.clear()
    assert lines[0].startswith("data: ") and lines[-2:] == ["data: [DONE]", ""]
    contents = [json.loads(line[6:])["choices"][0]["delta"].get("content") for line in lines[:-2] if line.startswith("data: ")]
    assert contents == ["", "7", None]


def test_the_request_form_of_vlmevalkit_is_answered(served: Served, http: httpx2.Client, picture: Callable) -> None:
    """As its client for `--base-url` writes it: base64 first, then text; it reads the content and nothing else."""
    parts = [
        {"type": "image_url", "image_url": {"url": data_url(picture(i)), "detail": "low"}} for i in range(2)
    ] + [{"type": "text", "text": "What is 30 + 12?"}]  # fmt: skip
    payload = {
        "model": MODEL, "messages": [{"role": "user", "content": parts}], "max_tokens": 2**15, "n": 1, "temperature": 0,
    }  # fmt: skip
    headers = {"Content-Type": "application/json", "Authorization": "Bearer sk-123456"}
    reply = http.post("/chat/completions", headers=headers, content=json.dumps(payload))
    assert reply.status_code == 200
    assert json.loads(reply.text)["choices"][0]["message"]["content"].strip() == "42"
    sampling = served.engine.asked[-1][1]
    assert sampling.temperature == 0 and sampling.max_tokens <= 16384


def test_raw_is_all_that_the_agent_wrote(served: Served, http: httpx2.Client) -> None:
    content = post(http, raw=True).json()["choices"][0]["message"]["content"]
    assert content.startswith("<reason>Better") and content.endswith("<answer>3</answer>") and "</tool_call>" in content


def test_sampling_is_as_asked_for(served: Served, http: httpx2.Client) -> None:
    def asked(**fields: Any) -> list[Any]:
        served.engine.asked.clear()
        assert post(http, **fields).status_code == 200
        return [sampling for _, sampling in served.engine.asked]

    one = asked(temperature=0.25, top_p=0.5, top_k=7, seed=5)
    assert {(s.temperature, s.top_p, s.top_k) for s in one} == {(0.25, 0.5, 7)}
    assert [s.seed for s in one] == [s.seed for s in asked(seed=5)] != [s.seed for s in asked(seed=6)]
    assert len({s.seed for s in one}) == 2
    assert [s.seed for s in asked()] != [s.seed for s in asked()]  # nobody asked for the same
    assert {s.temperature for s in asked()} == {1.0}
    assert len({s.seed for s in asked(seed=5, n=3)}) == 6
    assert {s.top_k for s in asked(top_k=-1, temperature=None, stop=None, logprobs=False, user="me", store=True)} == {0}
    for extreme, got in (  # one of them must not break the batch of all others, or draw from nothing
        ({"temperature": 1e-40}, (0.0, 1.0, 0)),
        ({"temperature": 0.001, "top_p": 5e-324}, (0.001, 1e-6, 0)),
        ({"top_k": 10**30}, (1.0, 1.0, 0)),
        ({"top_k": 1 << 20, "max_tokens": 10**30}, (1.0, 1.0, 1 << 20)),
    ):
        assert {(s.temperature, s.top_p, s.top_k) for s in asked(**extreme)} == {got}, extreme


def test_max_tokens_counts_what_the_agent_writes(served: Served, http: httpx2.Client) -> None:
    whole = post(http).json()["usage"]["completion_tokens"]
    first = post(http, max_tokens=5).json()
    assert first["usage"]["completion_tokens"] == 5 and first["choices"][0]["finish_reason"] == "length"
    cut = post(http, max_completion_tokens=whole - 1, max_tokens=1000).json()
    assert cut["usage"]["completion_tokens"] == whole - 1 and cut["choices"][0]["metis"]["num_tool_calls"] == 1
    exact = post(http, max_tokens=whole).json()["choices"][0]
    assert (exact["finish_reason"], exact["message"]["content"]) == ("stop", "3")
    (message,) = {len(served.engine._tokenizer.encode(turn["text"])) for turn in exact["metis"]["transcript"][:1]}
    called = post(http, max_tokens=message).json()["choices"][0]  # the call runs, and then there is no room
    assert called["metis"]["num_tool_calls"] == 1 and called["metis"]["outcome"] == "length"


def test_a_stop_string_ends_the_content(policy: Policy) -> None:
    with serving(policy, lambda text: "<answer>one END two STOP</answer><|im_end|>") as served:
        client = served.client()
        for stop, content in (("END", "one "), (["STOP", "END"], "one "), ("no", "one END two STOP")):
            reply = client.chat.completions.create(model=MODEL, messages=user("Go on."), stop=stop)
            assert reply.choices[0].message.content == content and reply.choices[0].finish_reason == "stop"


def test_a_request_can_do_without_tools(served: Served, http: httpx2.Client) -> None:
    before = len(served.toolbox.ran)
    reply = post(http, tool_choice="none").json()["choices"][0]
    assert "# Tools" not in served.engine.asked[-1][0] and len(served.toolbox.ran) == before
    assert "There is no tool 'python' here" in reply["metis"]["transcript"][0]["observation"]


# -- refusals -------------------------------------------------------------------------------------------------------------


def image_part(url: object) -> list[dict[str, Any]]:
    return [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]


@pytest.mark.parametrize(
    ("fields", "param", "says"),
    [
        ({"n": 0}, "n", "greater than or equal to 1, got 0"),
        ({"n": 17}, "n", "less than or equal to 16"),
        ({"n": "many"}, "n", "got 'many'"),
        ({"temperature": -1}, "temperature", "got -1"),
        ({"temperature": 2.5}, "temperature", "got 2.5"),
        ({"top_p": 0}, "top_p", "greater than 0"),
        ({"top_p": 1.5}, "top_p", "got 1.5"),
        ({"max_tokens": 0}, "max_tokens", "got 0"),
        ({"max_completion_tokens": -3}, "max_completion_tokens", "got -3"),
        ({"seed": 1.5}, "seed", "got 1.5"),
        ({"stop": ["a"] * 5}, "stop", "at most 4"),
        ({"stop": [""]}, "stop", "none of them empty"),
        ({"stop": 5}, "stop", "got 5"),
        ({"raw": "yes"}, "raw", "got 'yes'"),
        ({"tool_choice": "required"}, "tool_choice", "got 'required'"),
        ({"tools": [{"type": "function"}]}, "tools", "tools of its own"),
        ({"logprobs": True}, "logprobs", "not supported"),
        ({"presence_penalty": 1.5}, "presence_penalty", "leave it out"),
        ({"response_format": {"type": "json_object"}}, "response_format", "leave it out"),
        ({"messages": []}, "messages", "expected a list of messages"),
        ({"messages": "hi"}, "messages", "got 'hi'"),
        ({"messages": ["hi"]}, "messages[0]", "expected an object"),
        ({"messages": [{"role": "king", "content": "hi"}]}, "messages[0].role", "got 'king'"),
        ({"messages": [{"role": "tool", "content": "hi"}]}, "messages[0]", "runs the agent's tools itself"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "got None"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "messages[0].content[0].type", "got 'audio'"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0]", "{type: text"),
        ({"messages": [*user("a"), {"role": "system", "content": "b"}]}, "messages[1].role", "system messages first"),
        ({"messages": [*user("a"), {"role": "assistant", "content": "b"}]}, "messages", "last message of the user's"),
        ({"messages": [{"role": "system", "content": "b"}]}, "messages", "last message of the user's"),
        ({"messages": image_part("https://example.org/a.png")}, "messages[0].content[0].image_url", "fetches nothing"),
        ({"messages": image_part("http://127.0.0.1/a.png")}, "messages[0].content[0].image_url", "data URL"),
        ({"messages": image_part("/etc/passwd")}, "messages[0].content[0].image_url", "data URL"),
        ({"messages": image_part("data:image/png;base64,###")}, "messages[0].content[0].image_url", "base64"),
        ({"messages": image_part("data:image/png;base64,aGVsbG8=")}, "messages[0].content[0].image_url", "decoded"),
        ({"messages": image_part(5)}, "messages[0].content[0]", "image_url: {url: data:...}"),
        ({"messages": image_part("data:,") * 1}, "messages[0].content[0].image_url", "decoded"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused_by_name(http: httpx2.Client, fields: Any, param: str, says: str) -> None:
    for stream in (False, True):  # also before a stream begins
        reply = post(http, **fields, stream=stream)
        assert reply.status_code == 400, reply.text
        error = reply.json()["error"]
        assert error["param"] == param and says in error["message"] and error["message"].startswith(f"{param}: "), error
        assert error["type"] == "invalid_request_error" and "\n" not in error["message"]


@pytest.mark.parametrize("body", [b"", b"no JSON", b"[]", b'{"messages": ' + b"[" * 9000, b'{"temperature": NaN}', b"\xff"])
def test_what_is_no_request_is_a_bad_one(http: httpx2.Client, body: bytes) -> None:
    reply = http.post("/chat/completions", content=body)
    assert reply.status_code == 400 and reply.json()["error"]["type"] == "invalid_request_error"


def test_images_have_bounds_in_number_bytes_and_damage(http: httpx2.Client, picture: Callable[..., ImageBlob]) -> None:
    image = picture(1)
    many = post(http, messages=user("?", *[image] * 4))
    assert many.status_code == 400 and "serve.max_images" in many.text and "content[3]" in many.json()["error"]["param"]
    large = post(http, messages=user("?", ImageBlob.of(image.data + b"0" * (1 << 20))))
    assert large.status_code == 413 and "serve.max_image_mb" in large.text
    huge = post(http, messages=user("?" * (5 << 20)))
    assert huge.status_code == 413 and "serve.max_request_mb" in huge.text
    behind = ImageBlob.of(image.data[: len(image.data) // 2])  # its header is right
    cut = post(http, messages=user("?", image, behind))
    assert cut.status_code == 400 and cut.json()["error"]["param"] == "messages[0].content[1].image_url"
    narrow = post(http, messages=user("?", picture(1, 401, 2)))
    assert narrow.status_code == 400 and narrow.json()["error"]["param"] == "messages[0].content[0].image_url"


def test_a_prompt_that_is_too_long_says_how_long_it_is(policy: Policy) -> None:
    with serving(policy, rollout={"max_prompt_tokens": 900}) as served:
        client = served.client()
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model=MODEL, messages=user("What is 1 + 2? " * 100))
        assert caught.value.code == "context_length_exceeded" and "at most 900 tokens" in caught.value.message


def test_the_model_is_known_by_its_name(served: Served, http: httpx2.Client) -> None:
    client = served.client()
    assert [model.id for model in client.models.list()] == [MODEL] == [client.models.retrieve(MODEL).id]
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-4o", messages=user("What is 1 + 2?"))
    assert caught.value.code == "model_not_found" and f"expected '{MODEL}'" in caught.value.message
    assert http.get("/models/other").status_code == 404
    assert http.get("/nothing").json()["error"]["type"] == "invalid_request_error"
    assert http.get("/chat/completions").status_code == 405


def test_a_system_message_of_the_clients_is_refused_where_it_may_not_be(policy: Policy) -> None:
    with serving(policy, client_system="refuse") as served, httpx2.Client(base_url=served.url, trust_env=False) as http:
        reply = post(http, messages=[{"role": "system", "content": "Be kind."}, *user("What is 1 + 2?")])
        assert reply.status_code == 400 and "serve.client_system" in reply.text
        assert post(http).status_code == 200


def test_nothing_but_health_answers_without_the_token(policy: Policy) -> None:
    with serving(policy, token=TOKEN) as served:
        with pytest.raises(openai.AuthenticationError):
            served.client("another-token").models.list()
        assert [model.id for model in served.client(TOKEN).models.list()] == [MODEL]
        root = served.root
        assert httpx2.get(f"{root}/metrics", trust_env=False).status_code == 401
        assert httpx2.get(f"{root}/health", trust_env=False).json() == {"status": "ok"}


def test_without_a_token_web_pages_are_refused(served: Served) -> None:
    assert httpx2.get(f"{served.url}/models", headers={"Origin": served.url}, trust_env=False).status_code == 401


# -- failures of ours -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "failure", [EngineFailure("engine-0 is gone, see /secret/log"), EngineError("no engine is left: /secret")]
)
def test_a_failure_of_ours_is_never_an_answer(policy: Policy, failure: Exception) -> None:
    def answer(text: str) -> Any:
        if isinstance(failure, EngineError):
            raise failure
        return failure

    with serving(policy, answer) as served:
        client, root = served.client(), served.root
        with pytest.raises(openai.InternalServerError) as caught:
            client.chat.completions.create(model=MODEL, messages=user("What is 1 + 2?"))
        assert caught.value.status_code == 503 and caught.value.type == "infrastructure_error"
        assert int(caught.value.response.headers["retry-after"]) >= 1 and "secret" not in caught.value.response.text
        stream = client.chat.completions.create(model=MODEL, messages=user("What is 1 + 2?"), stream=True)
        with pytest.raises(openai.APIError, match="tools or engine failed"):
            list(stream)
        assert httpx2.get(f"{root}/health", trust_env=False).json() == {"status": "failing"}
        served.engine.answer = lambda text: "<answer>3</answer><|im_end|>"
        assert client.chat.completions.create(model=MODEL, messages=user("?")).choices[0].message.content == "3"
        assert httpx2.get(f"{root}/health", trust_env=False).status_code == 200


def test_a_defect_of_ours_is_one_and_the_log_has_it(policy: Policy, caplog: pytest.LogCaptureFixture) -> None:
    def answer(text: str) -> Any:
        raise KeyError("secret")

    with serving(policy, answer) as served, httpx2.Client(base_url=served.url, trust_env=False) as http:
        reply = post(http)
        assert reply.status_code == 500 and reply.json()["error"]["type"] == "server_error" and "secret" not in reply.text
        with http.stream("POST", "/chat/completions", json={"messages": user("?"), "stream": True}) as streamed:
            lines = list(streamed.iter_lines())
        at = lines.index("event: error")
        assert json.loads(lines[at + 1][6:])["error"]["type"] == "server_error" and "data: [DONE]" not in lines
    assert sum(bool(record.exc_info and record.exc_info[0] is KeyError) for record in caplog.records) == 2
