"""A message ends with the token that completes a stop string, however it is cut into tokens, and that token is whole."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metis_fast.config import RolloutConfig
from metis_fast.rollout.chat import Chat
from metis_fast.rollout.engine import Sampling
from metis_fast.rollout.episode import SampleKey, run_episode
from metis_fast.rollout.native import NativeEngine
from metis_fast.rollout.protocols import Metis
from metis_fast.rollout.stops import StopStrings
from metis_fast.rollout.vllm.service import VllmService, _Running
from metis_fast.testing.fakes import FakeEngine, FakeToolbox
from metis_fast.types import Observation, Outcome

STOP = "</tool_call>"


@given(
    before=st.lists(st.sampled_from(["a", "é", "</tool", "_call", "<", "</tool_call", "😀"]), max_size=6).map("".join),
    behind=st.sampled_from(["", "\n", ">", " and more", "</tool_call>"]),
    cuts=st.sets(st.integers(1, 60)),
)
@settings(max_examples=200)
def test_the_token_that_completes_it_is_found_for_every_cut(before, behind, cuts):
    text = before + STOP + behind
    places = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    tokens = [text[a:b] for a, b in pairwise(places)]
    stops = StopStrings(lambda token: tokens[token])
    watch = stops.watch([STOP, "never"])
    ends = [watch.ends(number) for number in range(len(tokens))]
    expected = next(number for number, stop in enumerate(places[1:]) if STOP in text[:stop])
    assert ends.index(True) == expected
    assert stops.completes(range(expected + 1), [STOP])
    assert not stops.completes(range(expected), [STOP])


@pytest.mark.parametrize("string", ["", "é"])
def test_a_string_that_cannot_be_found_exactly_is_refused(string):
    with pytest.raises(ValueError, match="must be of ASCII characters"):
        StopStrings(str).watch([string])


def spelt(policy, *pieces: str) -> list[int]:
    """Tokens of pieces, each by itself and without the tags' own tokens."""
    encode = policy.tokenizer.encode
    return [token for piece in pieces for token in encode(piece, add_special_tokens=False, split_special_tokens=True)]


@pytest.mark.parametrize("pieces", [("</", "tool", "_call", ">"), ("</tool_call",), ("</tool_", "call", ">\n")])
def test_a_call_whose_closing_tag_is_spelt_in_several_tokens_is_run(policy, make_prompt, pieces):
    body = '<tool_call>{"name": "python", "arguments": {"code": "1"}}'
    tag = "".join(pieces) + ("" if ">" in "".join(pieces) else ">")
    message = spelt(policy, body, *pieces) + ([] if ">" in "".join(pieces) else spelt(policy, ">"))
    assert policy.tokenizer.convert_tokens_to_ids(STOP) not in message
    chat = Chat(policy.tokenizer, policy.images, Metis())
    engine = FakeEngine(policy.tokenizer, [[[*message, *spelt(policy, "never sampled")], "<answer>B</answer><|im_end|>"]])
    toolbox = FakeToolbox([Observation("ok")])
    config = RolloutConfig(protocol="metis")
    rollout = asyncio.run(run_episode(make_prompt(), 0, chat, engine, toolbox, config, SampleKey(0, "t", 0)))
    assert engine.sampling[0].stop == (STOP,)
    assert toolbox.calls == [("python", {"code": "1"})] and rollout.outcome is Outcome.ANSWERED
    first = rollout.turns[0]
    sampled = rollout.tokens[first.start : first.stop].tolist()
    assert sampled == message[: len(sampled)] and first.text.startswith(body + tag.rstrip("\n"))
    between = chat.decode(rollout.tokens[first.stop : first.observation_stop].tolist())
    assert between == "<|im_end|>\n<|im_start|>user\nok<|im_end|>\n<|im_start|>assistant\n"


def test_the_native_engine_stops_where_a_string_of_its_own_text_is_complete(chat, policy, make_prompt):
    prompts = [chat.encode_prompt(make_prompt(f"Which city, {i}?")) for i in range(3)]

    async def sample(stop: tuple[str, ...], strings: list[tuple[str, ...]] | None = None):
        engine = NativeEngine(policy, deterministic=False)
        sessions = [engine.session(i) for i in range(len(prompts))]
        try:
            return await asyncio.gather(*(
                session.generate(
                    piece.tokens, [], [], Sampling(40, (), seed=i, stop=stop if strings is None else strings[i])
                )
                for i, (session, piece) in enumerate(zip(sessions, prompts, strict=True))
            ))  # fmt: skip
        finally:
            engine.close()

    free = asyncio.run(sample(()))
    texts = [[policy.tokenizer.decode([token]) for token in one.tokens.tolist()] for one in free]
    strings, expected = [], []
    for pieces in texts:  # the end of one token and the beginning of the next, of ASCII
        pairs = [left[-1:] + right[:1] for left, right in pairwise(pieces)]
        at = next(i for i in range(8, len(pairs)) if pairs[i].isascii() and len(pairs[i]) == 2)
        string = pairs[at]
        strings.append((string,))
        expected.append(next(i + 1 for i in range(len(pieces)) if string in "".join(pieces[: i + 1])))
    stopped = asyncio.run(sample((), strings))
    for one, whole, length in zip(stopped, free, expected, strict=True):
        assert one.stopped and not whole.stopped
        np.testing.assert_array_equal(one.tokens, whole.tokens[:length])
        np.testing.assert_allclose(one.logp, whole.logp[:length], atol=1e-5)


def test_the_vllm_engine_drops_what_one_step_sampled_behind_the_string():
    tokens = ["a", "</tool", "_call", ">\n", "b", "c"]
    watch = StopStrings(lambda token: tokens[token]).watch([STOP])
    running = _Running(SimpleNamespace(), np.zeros(0), watch)  # pyright: ignore[reportArgumentType]
    find: Any = VllmService._stop_string
    assert find(running, [0, 1]) is None  # steps of several tokens, as speculation has them
    assert find(running, [0, 1, 2, 3, 4, 5]) == 4
    assert find(_Running(SimpleNamespace(), np.zeros(0)), [3]) is None  # pyright: ignore[reportArgumentType]
