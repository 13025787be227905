"""The native engine: what a session samples is a function of its own tokens and seed, whatever shares its batch."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig

from metis_fast.attention import CausalSdpa
from metis_fast.config import RolloutConfig
from metis_fast.errors import ConfigError, EngineError
from metis_fast.model import rope_positions
from metis_fast.rollout.engine import Sampling
from metis_fast.rollout.native import NativeEngine, check_room
from metis_fast.types import Observation


@dataclass(frozen=True)
class Plan:
    """What one session does: its prompt, the length of each of its messages, and how often it lets others run before each."""

    prompt: int
    lengths: tuple[int, ...]
    pauses: tuple[int, ...] = (0, 0, 0, 0)
    seed: int = 0


@pytest.fixture(scope="module")
def pieces(chat, make_prompt, picture):
    """Encoded prompts: short, long, with images."""
    prompts = [
        make_prompt("Hi"),
        make_prompt("Which city lies in France? " * 3),
        make_prompt("<image>What is it?", [picture(0)]),
        make_prompt("<image> or <image> or <image>", [picture(1), picture(0), picture(2, 96, 32)]),
    ]
    return [chat.encode_prompt(prompt) for prompt in prompts]


@pytest.fixture(scope="module")
def act(chat, pieces, picture):
    """Runs one plan in an engine; every second observation holds an image. Returns the completions."""

    async def run(engine, plan, order, session=None):
        piece = pieces[plan.prompt]
        tokens, images, spans = list(piece.tokens), list(piece.images), list(piece.spans)
        done = []
        for turn, length in enumerate(plan.lengths):
            for _ in range(plan.pauses[turn]):
                await asyncio.sleep(0)
            session = session if session is not None else engine.session(order)
            sampling = Sampling(length, chat.stop_ids, seed=plan.seed * 100 + turn)
            out = await session.generate(tokens, images, spans, sampling)
            done.append(out)
            tokens += out.tokens.tolist()
            shown = (picture(turn),) if turn % 2 else ()
            more = chat.encode_observation(Observation(f"found {turn}", shown), tokens[-1], 100)
            spans += [replace(s, start=s.start + len(tokens), stop=s.stop + len(tokens)) for s in more.spans]
            images += more.images
            tokens += more.tokens
        if session is not None:
            session.close()
        return done

    return run


@pytest.fixture(scope="module")
def alone(policy, act):
    """What a plan samples in an engine of its own."""
    known = {}

    def run(plan):
        key = plan.prompt, plan.lengths, plan.seed
        if key not in known:
            engine = NativeEngine(policy)
            known[key] = asyncio.run(act(engine, plan, 0))
            engine.close()
        return known[key]

    return run


def assert_same(got, expected):
    """Same tokens; log-probs up to the rounding of products of another batch size."""
    assert [c.tokens.tolist() for c in got] == [c.tokens.tolist() for c in expected]
    assert [c.stopped for c in got] == [c.stopped for c in expected]
    for one, other in zip(got, expected, strict=True):
        np.testing.assert_allclose(one.logp, other.logp, atol=2e-5)


MANY = [Plan(i % 4, ((5, 8, 3), (12,), (1, 2, 9, 4), (7, 7))[i % 3], seed=i) for i in range(9)]


async def together(act, engine, plans, deterministic):
    sessions = [engine.session(i) if deterministic else None for i in range(len(plans))]
    return await asyncio.gather(*(act(engine, plan, i, s) for i, (plan, s) in enumerate(zip(plans, sessions, strict=True))))


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("prefill_tokens", [1, 150, 16384])
def test_a_rollout_does_not_depend_on_what_else_is_in_the_batch(policy, act, alone, deterministic, prefill_tokens):
    engine = NativeEngine(policy, deterministic, prefill_tokens)
    results = asyncio.run(together(act, engine, MANY, deterministic))
    for plan, got in zip(MANY, results, strict=True):
        assert_same(got, alone(plan))
    engine.close()


def test_a_run_in_waves_repeats_bit_for_bit_however_long_the_tools_take(policy, act):
    runs = []
    for pauses in ((0, 0, 0, 0), (0, 3, 1, 7), (0, 9, 0, 2)):
        engine = NativeEngine(policy)
        plans = [replace(plan, pauses=pauses if i % 2 else pauses[::-1]) for i, plan in enumerate(MANY)]
        results = asyncio.run(together(act, engine, plans, deterministic=True))
        runs.append([(c.tokens.tobytes(), c.logp.tobytes()) for session in results for c in session])
        engine.close()
    assert runs[0] == runs[1] == runs[2]


def test_messages_differ_between_seeds_and_end_at_a_stop_token_or_the_limit(chat, alone):
    messages = [completion for plan in MANY for completion in alone(plan)]
    for message, length in zip(messages, [n for plan in MANY for n in plan.lengths], strict=True):
        ends = np.isin(message.tokens, chat.stop_ids)
        assert not ends[:-1].any()
        assert message.stopped == ends[-1]
        assert message.stopped or len(message.tokens) == length
    assert len({tuple(m.tokens.tolist()) for m in messages if len(m.tokens) > 2}) == sum(len(m.tokens) > 2 for m in messages)


plans = st.builds(
    Plan,
    prompt=st.integers(0, 3),
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple),
    pauses=st.tuples(*[st.integers(0, 7)] * 4),
    seed=st.integers(0, 3),
)


@given(st.lists(plans, min_size=2, max_size=5))
@settings(max_examples=30, deadline=None)
def test_sessions_that_come_and_go_at_any_time_leave_the_others_rows_intact(policy, act, alone, several):
    engine = NativeEngine(policy, deterministic=False)
    results = asyncio.run(together(act, engine, several, deterministic=False))
    for plan, got in zip(several, results, strict=True):
        assert_same(got, alone(plan))
    engine.close()


@given(order=st.permutations(range(5)), ran=st.booleans())
@settings(max_examples=20, deadline=None)
def test_closing_sessions_in_any_order_before_or_after_they_ran_frees_only_them(policy, act, alone, pieces, chat, order, ran):
    async def run():
        engine = NativeEngine(policy, deterministic=False)
        sessions = [engine.session(i) for i in range(5)]
        if ran:
            piece = pieces[1]
            first = (s.generate(piece.tokens, [], [], Sampling(3, chat.stop_ids, seed=i)) for i, s in enumerate(sessions))
            await asyncio.gather(*first)
        survivor = engine.session(9)
        got = []
        for i in order:
            sessions[i].close()
            sessions[i].close()  # twice is allowed
            if i == 2:
                got = await act(engine, MANY[2], 9, survivor)
        engine.close()
        return got

    assert_same(asyncio.run(run()), alone(MANY[2]))


def test_cancelling_a_message_half_way_leaves_the_others_intact(policy, act, alone, pieces, chat):
    async def run():
        engine = NativeEngine(policy, deterministic=False)
        doomed = engine.session(0)
        long = asyncio.create_task(doomed.generate(pieces[1].tokens, [], [], Sampling(500, ())))
        other = asyncio.create_task(act(engine, MANY[2], 1))
        for _ in range(6):
            await asyncio.sleep(0)
        long.cancel()
        with pytest.raises(asyncio.CancelledError):
            await long
        doomed.close()
        got = await other
        engine.close()
        return got

    assert_same(asyncio.run(run()), alone(MANY[2]))


def test_a_wave_waits_for_every_open_session(policy, pieces, chat):
    async def run():
        engine = NativeEngine(policy)
        first, second = engine.session(0), engine.session(1)
        waiting = asyncio.create_task(first.generate(pieces[0].tokens, [], [], Sampling(2, chat.stop_ids)))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not waiting.done()
        second.close()
        await asyncio.wait_for(waiting, 10)
        engine.close()

    asyncio.run(run())


def test_equal_prompts_are_run_once_and_their_images_too(policy, pieces, chat):
    widths, towers = [], []
    hooks = [
        policy.decoder.embed_tokens.register_forward_hook(lambda _m, args, _o: widths.append(args[0].shape)),
        policy.model.model.visual.register_forward_hook(lambda _m, args, _o: towers.append(args[0].shape[0])),
    ]

    async def run(seeds):
        engine = NativeEngine(policy)
        piece = pieces[3]
        sessions = [engine.session(i) for i in range(len(seeds))]
        asks = [
            s.generate(piece.tokens, piece.images, piece.spans, Sampling(4, (), seed=seed))
            for s, seed in zip(sessions, seeds, strict=True)
        ]
        out = await asyncio.gather(*asks)
        engine.close()
        return out

    try:
        shared = asyncio.run(run(range(5)))
        assert widths[0] == (1, len(pieces[3].tokens)) and all(shape[1] == 1 for shape in widths[1:])
        assert towers == [sum(policy.images(image).pixels.shape[0] for image in pieces[3].images)]
    finally:
        for hook in hooks:
            hook.remove()
    for seed, got in enumerate(shared):
        assert_same([got], asyncio.run(run([seed])))


# -- failures -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_failure_inside_a_step_reaches_every_waiting_session(policy, act, alone, pieces, chat, deterministic):
    async def run():
        engine = NativeEngine(policy, deterministic)
        good, bad = engine.session(0), engine.session(1)
        first = asyncio.create_task(good.generate(pieces[1].tokens, [], [], Sampling(300, ())))
        for _ in range(4):
            await asyncio.sleep(0)  # in the continuous mode the good one is being decoded by now
        # a request whose image is not among those given fails where its features are looked up
        second = asyncio.create_task(bad.generate(pieces[2].tokens, [], pieces[2].spans, Sampling(4, ())))
        results = await asyncio.wait_for(asyncio.gather(first, second, return_exceptions=True), 20)
        assert [type(result) for result in results] == [KeyError, KeyError]
        good.close()
        bad.close()
        got = await asyncio.wait_for(act(engine, MANY[0], 5), 20)  # the engine itself goes on
        engine.close()
        return got

    assert_same(asyncio.run(run()), alone(MANY[0]))


def test_weights_that_overflow_end_in_one_line(load_tiny, pieces):
    policy = load_tiny()
    with torch.no_grad():
        policy.decoder.norm.weight *= 1e38
    engine = NativeEngine(policy)
    with pytest.raises(EngineError, match=r"log-probabilities are (nan|-inf).*overflow; .*model\.dtype=float32"):
        asyncio.run(engine.session(0).generate(pieces[1].tokens, [], [], Sampling(4, ())))


@pytest.mark.parametrize("deterministic", [True, False])
def test_closing_the_engine_cancels_requests_and_leaves_it_usable(policy, act, alone, pieces, deterministic):
    async def run():
        engine = NativeEngine(policy, deterministic)
        sessions = [engine.session(0), engine.session(1)]  # of the second no request comes: a wave would not begin
        waiting = asyncio.create_task(sessions[0].generate(pieces[1].tokens, [], [], Sampling(300, ())))
        for _ in range(4):
            await asyncio.sleep(0)
        engine.close()
        done, _ = await asyncio.wait([waiting], timeout=10)
        assert done and waiting.cancelled()
        return await asyncio.wait_for(act(engine, MANY[0], 5), 20)

    assert_same(asyncio.run(run()), alone(MANY[0]))


def test_a_session_refuses_what_it_cannot_do(policy, pieces):
    async def run():
        engine = NativeEngine(policy)
        session = engine.session(0)
        tokens = list(pieces[0].tokens)
        with pytest.raises(ValueError, match="one to sample"):
            await session.generate(tokens, [], [], Sampling(0, ()))
        out = await session.generate(tokens, [], [], Sampling(3, ()))
        with pytest.raises(ValueError, match="seen before"):
            await session.generate(tokens, [], [], Sampling(3, ()))
        tokens += out.tokens.tolist()
        running = asyncio.create_task(session.generate(tokens, [], [], Sampling(3, ())))
        await asyncio.sleep(0)
        with pytest.raises(ValueError, match="one request at a time"):
            await session.generate(tokens, [], [], Sampling(3, ()))
        await running
        session.close()
        with pytest.raises(ValueError, match="until it is closed"):
            await session.generate([*tokens, 1, 2, 3, 4], [], [], Sampling(3, ()))
        engine.close()

    asyncio.run(run())


def test_tokens_carry_the_version_of_the_weights_that_sampled_them(policy, pieces):
    async def run():
        engine = NativeEngine(policy)
        engine.weight_version = 7
        return await engine.session(0).generate(pieces[0].tokens, [], [], Sampling(3, ()))

    assert asyncio.run(run()).weight_version.tolist() == [7, 7, 7]


# -- new weights ----------------------------------------------------------------------------------------------------------


def scaled(policy, factor):
    """All weights of a policy by name, the matrices times a factor."""
    with torch.no_grad():
        return {name: p * factor if p.ndim == 2 else p.clone() for name, p in policy.model.named_parameters()}


@pytest.mark.parametrize("deterministic", [True, False])
def test_after_an_update_requests_in_flight_go_on_with_the_new_weights_and_tell_each_tokens_version(
    load_tiny, pieces, chat, deterministic
):
    """The second half of a message is what an engine that never had the old weights gives after the first half."""
    old, new = load_tiny(), load_tiny()
    weights = scaled(old, 1.3)
    long = Sampling(24, (), seed=5)

    async def run():
        engine = NativeEngine(old, deterministic)
        live, idle = engine.session(0), engine.session(1)
        first = await asyncio.gather(
            live.generate(pieces[3].tokens, pieces[3].images, pieces[3].spans, Sampling(2, (), seed=9)),
            idle.generate(pieces[0].tokens, [], [], Sampling(2, (), seed=9)),
        )
        tokens = [*pieces[3].tokens, *first[0].tokens.tolist()]
        rest = [*pieces[0].tokens, *first[1].tokens.tolist()]
        if deterministic:
            idle.close()
        running = asyncio.create_task(live.generate(tokens, pieces[3].images, pieces[3].spans, long))
        for _ in range(8):
            await asyncio.sleep(0)
        report = await engine.update(iter(weights.items()), 4)
        assert (report.version, report.mode) == (4, "full")
        assert report.num_bytes == sum(w.numel() * w.element_size() for w in weights.values())
        out = await asyncio.wait_for(running, 20)
        after = None if deterministic else await idle.generate(rest, [], [], Sampling(6, (), seed=2))
        engine.close()
        return tokens, rest, out, after

    async def alone(tokens, images, spans, sampling, policy):
        engine = NativeEngine(policy)
        out = await engine.session(0).generate(tokens, images, spans, sampling)
        engine.close()
        return out

    tokens, rest, out, after = asyncio.run(run())
    switch = int((out.weight_version == 0).sum())
    assert 0 < switch < 24 and out.weight_version.tolist() == [0] * switch + [4] * (24 - switch)
    asyncio.run(NativeEngine(new).update(iter(weights.items()), 0))
    # the log-probabilities of what was sampled, under one set of weights throughout
    before, behind = (logprobs(chat, policy, tokens, pieces[3], out.tokens) for policy in (load_tiny(), new))
    np.testing.assert_allclose(out.logp[:switch], before[:switch], atol=2e-5)
    np.testing.assert_allclose(out.logp[switch:], behind[switch:], atol=2e-5)
    assert np.abs(before - behind).max() > 1e-2
    if after is not None:  # of the idle session's cache nothing is left either
        assert_same([after], [asyncio.run(alone(rest, [], [], Sampling(6, (), seed=2), new))])


@torch.no_grad()
def logprobs(chat, policy, tokens, piece, sampled):
    """Log-probabilities of sampled tokens in one pass without a cache."""
    row = [*tokens, *sampled.tolist()]
    positions = torch.from_numpy(rope_positions(len(row), piece.spans, policy.merge))[:, None]
    by_hash = {image.sha256: image for image in piece.images}
    images = [by_hash[span.sha256] for span in piece.spans]
    features = policy.encode_images(images) if images else None
    hidden = policy.hidden(torch.tensor([row]), positions, features, CausalSdpa())[0]
    logp = torch.log_softmax(hidden[len(tokens) - 1 : -1] @ policy.head.T, -1)
    return logp.gather(1, torch.from_numpy(sampled).long()[:, None])[:, 0].numpy()


def test_an_update_without_weights_says_that_the_module_is_the_trainers_own(load_tiny, pieces):
    """The trainer has stepped: what was cached before is of no use, though nothing is sent."""
    policy = load_tiny()
    weights = scaled(policy, 1.3)

    async def run(sync):
        engine = NativeEngine(policy, deterministic=False)
        session = engine.session(0)
        first = await session.generate(pieces[1].tokens, [], [], Sampling(3, (), seed=1))
        if sync:
            with torch.no_grad():
                for name, parameter in policy.model.named_parameters():
                    parameter.copy_(weights[name])
            report = await engine.update(iter(()), 7)
            assert (report.version, report.mode, report.num_bytes) == (7, "shared", 0)
            assert session.cached == 0
        out = await session.generate([*pieces[1].tokens, *first.tokens.tolist()], [], [], Sampling(5, (), seed=3))
        engine.close()
        return first, out

    first, out = asyncio.run(run(sync=True))
    assert first.weight_version.tolist() == [0] * 3 and out.weight_version.tolist() == [7] * 5

    async def fresh():
        engine = NativeEngine(policy)
        return await engine.session(0).generate([*pieces[1].tokens, *first.tokens.tolist()], [], [], Sampling(5, (), seed=3))

    assert_same([replace(out, weight_version=first.weight_version)], [asyncio.run(fresh())])


def test_weights_that_are_not_whole_are_a_defect_and_leave_no_new_version(load_tiny):
    policy = load_tiny()
    some = dict(list(scaled(policy, 1.0).items())[:3])
    engine = NativeEngine(policy)
    with pytest.raises(AssertionError, match="the trainer sent no"):
        asyncio.run(engine.update(iter(some.items()), 3))
    assert engine.weight_version == 0


def test_placeholders_are_never_sampled_even_with_all_the_mass(load_tiny, pieces):
    policy = load_tiny()
    with torch.no_grad():
        # The final norm lets one dimension through; half the placeholders want it positive, half negative, hugely.
        policy.decoder.norm.weight.zero_()[0] = 1.0
        head = torch.zeros_like(policy.head)
        head[list(policy.placeholder_ids[:2]), 0] = 1e6
        head[list(policy.placeholder_ids[2:]), 0] = -1e6
        policy.model.lm_head.weight = torch.nn.Parameter(head)

    async def run():
        engine = NativeEngine(policy)
        out = await engine.session(0).generate(pieces[0].tokens, [], [], Sampling(80, ()))
        engine.close()
        return out

    out = asyncio.run(run())
    assert not np.isin(out.tokens, policy.placeholder_ids).any()
    assert out.logp.max() < -1000  # of the full distribution: the placeholders do hold all mass
    assert len(set(out.tokens.tolist())) > 40  # the rest is uniform, and is drawn as such


def test_a_cache_that_no_memory_holds_is_refused_by_arithmetic():
    text = Qwen3VLTextConfig(
        hidden_size=4096, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8, head_dim=128
    )
    paper = RolloutConfig()
    with pytest.raises(
        ConfigError, match=r"of 512 rollouts, 75\.5 GB for every 1,000 tokens .*141 GB in all; set rollout\.engine=vllm"
    ):
        check_room(paper, text, 2, 141 * 10**9)
    with pytest.raises(ConfigError, match=r"lower rollout\.max_concurrent to 39 or less"):
        check_room(paper, text, 2, 24 * 10**9)
    check_room(paper.model_copy(update={"max_concurrent": 39}), text, 2, 24 * 10**9)
    check_room(paper.model_copy(update={"prompts_per_step": 2}), text, 2, 24 * 10**9)
