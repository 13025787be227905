"""Episodes: every way in which a rollout can end, what is counted, and that sampled ids stay what they were."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metis_fast.config import RolloutConfig
from metis_fast.errors import DataError, EngineFailure, InfrastructureError
from metis_fast.rollout.episode import SampleKey, collect, run_episode
from metis_fast.testing.fakes import FakeEngine, FakeToolbox
from metis_fast.types import ImageBlob, Observation, Outcome, Rollout

CALL = '<tool_call>{"name": "python", "arguments": {"code": "1"}}</tool_call>'
ANSWER = "<answer>Paris</answer><|im_end|>"


@pytest.fixture
def episode(chat, policy, make_prompt):
    """Runs one episode of given messages and observations and checks that nothing stays open."""

    def run(messages, observations=None, prompt=None, **limits):
        engine = FakeEngine(policy.tokenizer, [messages], weight_version=3)
        toolbox = FakeToolbox(observations or [Observation("ok")])
        config = RolloutConfig.model_validate(limits)
        prompt = prompt if prompt is not None else make_prompt()
        rollout = asyncio.run(run_episode(prompt, 2, chat, engine, toolbox, config, SampleKey(0, "train/0", 0)))
        assert (engine.num_open, toolbox.num_open) == (0, 0)
        assert (rollout.prompt_uid, rollout.index) == (prompt.uid, 2)
        return rollout, engine, toolbox

    return run


def sampled_text(chat, rollout):
    return [chat.decode(rollout.tokens[turn.start : turn.stop].tolist()) for turn in rollout.turns]


def test_a_message_without_a_call_is_the_answer(episode, chat):
    rollout, _, toolbox = episode([ANSWER])
    assert rollout.outcome is Outcome.ANSWERED
    assert [turn.outcome for turn in rollout.turns] == [Outcome.ANSWERED]
    assert rollout.turns[0].text == "<answer>Paris</answer>"
    assert rollout.num_tool_calls == 0 and toolbox.calls == []
    assert chat.decode(rollout.tokens.tolist()).endswith("<|im_start|>assistant\n" + ANSWER)


def test_a_tool_runs_between_messages_and_its_observation_is_not_sampled(episode, chat, picture):
    rollout, engine, toolbox = episode(["I look " + CALL, ANSWER], [Observation("a <image> b", (picture(0),))])
    assert rollout.outcome is Outcome.ANSWERED and rollout.num_tool_calls == 1
    assert toolbox.calls == [("python", {"code": "1"})]
    first, last = rollout.turns
    assert first.outcome is Outcome.TOOL_RESULT and first.observation == "a <image> b" and first.tool_s >= 0
    assert first.observation_stop == last.start
    assert sampled_text(chat, rollout) == ["I look " + CALL, ANSWER]
    between = chat.decode(rollout.tokens[first.stop : first.observation_stop].tolist())
    assert between.startswith("<|im_end|>\n<|im_start|>user\n<tool_response>a <|vision_start|>")
    assert between.endswith(" b</tool_response><|im_end|>\n<|im_start|>assistant\n")
    assert engine.asked[1] == tuple(rollout.tokens[: last.start].tolist())
    (span,) = rollout.image_spans
    assert first.stop < span.start < span.stop < first.observation_stop and span.sha256 == picture(0).sha256


def test_the_turn_limit_ends_a_rollout_whose_last_message_calls_a_tool_which_is_not_run(episode):
    rollout, _, toolbox = episode([CALL, CALL, ANSWER], max_turns=2)
    assert rollout.outcome is Outcome.TURN_LIMIT
    assert [turn.outcome for turn in rollout.turns] == [Outcome.TOOL_RESULT, Outcome.TURN_LIMIT]
    assert len(toolbox.calls) == 1 and rollout.num_tool_calls == 2


def test_an_answer_in_the_last_allowed_turn_counts(episode):
    assert episode([CALL, ANSWER], max_turns=2)[0].outcome is Outcome.ANSWERED


def test_a_message_that_reaches_its_own_limit_ends_the_rollout(episode):
    rollout, engine, _ = episode([CALL, "x" * 200 + ANSWER], max_turn_tokens=60)
    assert rollout.outcome is Outcome.LENGTH
    assert [turn.outcome for turn in rollout.turns] == [Outcome.TOOL_RESULT, Outcome.LENGTH]
    assert [s.max_tokens for s in engine.sampling] == [60, 60]
    assert rollout.turns[-1].stop == len(rollout.tokens) == rollout.turns[-1].observation_stop


def test_the_response_limit_counts_observations_and_is_never_exceeded(episode):
    rollout, engine, _ = episode([CALL, "x" * 500], max_response_tokens=120)
    assert rollout.outcome is Outcome.LENGTH
    assert len(rollout.tokens) - rollout.prompt_len == 120
    assert engine.sampling[1].max_tokens == 120 - (rollout.turns[1].start - rollout.prompt_len)


def test_a_message_never_outgrows_the_response(episode):
    rollout, engine, _ = episode([CALL, "x" * 500], max_response_tokens=120, max_turn_tokens=100)
    left = 120 - (rollout.turns[1].start - rollout.prompt_len)
    assert left < 100 and [s.max_tokens for s in engine.sampling] == [100, left]
    assert len(rollout.tokens) - rollout.prompt_len == 120


def test_an_observation_that_leaves_no_room_is_left_out_of_the_tokens_but_its_call_counts(episode):
    rollout, _, _ = episode([CALL, ANSWER], [Observation("y" * 500)], max_response_tokens=120)
    assert rollout.outcome is Outcome.LENGTH and rollout.num_tool_calls == 1
    (turn,) = rollout.turns
    assert turn.outcome is Outcome.TOOL_RESULT and turn.observation == "y" * 500
    assert len(rollout.tokens) == turn.stop == turn.observation_stop


def test_a_call_that_was_cut_off_counts_but_is_not_run(episode):
    rollout, _, toolbox = episode([CALL], max_response_tokens=3)
    assert rollout.outcome is Outcome.LENGTH
    assert rollout.num_tool_calls == 1 and toolbox.calls == []


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (
            "<tool_call>{oops}</tool_call>",
            'Error: the tool call is not valid JSON: "oops}" for a name; write names in " quotes',
        ),
        ("<tool_call>{<|im_end|>", "Error: the tool call has no </tool_call>; write it behind the object"),
        (
            '<tool_call>{"name": "python", "arguments": 3}</tool_call>',
            'Error: "arguments" must be an object: write "arguments": {...}',
        ),
    ],
)
def test_a_malformed_call_is_a_tool_error_that_counts_and_tells_the_agent(episode, chat, message, error):
    rollout, _, toolbox = episode([message, ANSWER])
    assert rollout.outcome is Outcome.ANSWERED
    assert rollout.turns[0].outcome is Outcome.TOOL_ERROR and rollout.turns[0].observation == error
    assert rollout.num_tool_calls == 1 and toolbox.calls == []
    assert f"<tool_response>{error}</tool_response>" in chat.decode(rollout.tokens.tolist())
    assert sampled_text(chat, rollout) == [message, ANSWER]


def test_an_unknown_tool_and_a_failing_tool_are_tool_errors_that_count(episode):
    unknown = CALL.replace("python", "shell")
    failed = Observation("Traceback", outcome=Outcome.TOOL_ERROR)
    rollout, _, toolbox = episode([unknown, CALL, CALL, ANSWER], [failed, Observation("ok")])
    assert [t.outcome for t in rollout.turns] == [
        Outcome.TOOL_ERROR,
        Outcome.TOOL_ERROR,
        Outcome.TOOL_RESULT,
        Outcome.ANSWERED,
    ]
    assert rollout.num_tool_calls == 3 and [name for name, _ in toolbox.calls] == ["shell", "python", "python"]
    assert rollout.turns[0].call is not None and rollout.turns[0].call.name == "shell"


# -- failures of our own --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["engine", "tool"])
def test_an_infrastructure_failure_starts_the_rollout_again_and_leaves_no_trace(episode, where):
    broken = InfrastructureError("gone")
    messages = [CALL, broken, ANSWER] if where == "engine" else [CALL, ANSWER]
    observations = [broken, Observation("ok")] if where == "tool" else [Observation("ok")]
    rollout, engine, _ = episode(messages, observations, retries=1)
    clean, _, _ = episode([CALL, ANSWER])
    assert rollout.outcome is Outcome.ANSWERED and rollout.error == "" and rollout.num_tool_calls == 1
    np.testing.assert_array_equal(rollout.tokens, clean.tokens)
    np.testing.assert_array_equal(rollout.sampled, clean.sampled)
    assert engine.sampling[0].seed == engine.sampling[-2].seed  # the same noise as in the first try


def test_an_engine_that_fails_is_asked_again_from_where_the_rollout_stands_and_no_tool_runs_twice(episode):
    broken = EngineFailure("replica 1 is gone")
    rollout, engine, toolbox = episode([broken, CALL, broken, broken, CALL, ANSWER], retries=2)
    clean, untroubled, _ = episode([CALL, CALL, ANSWER])
    assert rollout.outcome is Outcome.ANSWERED and rollout.error == "" and rollout.num_tool_calls == 2
    assert len(toolbox.calls) == 2
    np.testing.assert_array_equal(rollout.tokens, clean.tokens)
    np.testing.assert_array_equal(rollout.sampled, clean.sampled)
    first, second, third = untroubled.asked
    assert engine.asked == [first, first, second, second, second, third]  # the same call, with all there was so far
    assert [s.seed for s in engine.sampling] == [untroubled.sampling[i].seed for i in (0, 0, 1, 1, 1, 2)]


def test_an_engine_that_goes_on_failing_ends_the_rollout_which_is_not_begun_again(episode):
    rollout, engine, toolbox = episode([CALL, *[EngineFailure("no replica is alive")] * 9], retries=2)
    assert rollout.outcome is Outcome.INFRASTRUCTURE_ERROR and rollout.error == "no replica is alive"
    assert len(engine.asked) == 1 + 3 and len(toolbox.calls) == 1
    assert len(rollout.turns) == 1  # what there was is kept, for the store


def test_a_tool_that_fails_after_the_engine_did_starts_again_from_the_prompt(episode):
    broken = [EngineFailure("gone"), InfrastructureError("no sandbox")]
    rollout, engine, toolbox = episode([broken[0], CALL, ANSWER], [broken[1], Observation("ok")], retries=1)
    assert rollout.outcome is Outcome.ANSWERED and rollout.num_tool_calls == 1
    assert len(toolbox.calls) == 2 and len(engine.asked) == 4


@pytest.mark.parametrize("retries", [0, 2])
def test_a_lasting_infrastructure_failure_is_recorded_and_never_raised(episode, retries):
    rollout, engine, _ = episode([CALL, *[InfrastructureError("engine 4 is dead")] * 9], retries=retries)
    assert rollout.outcome is Outcome.INFRASTRUCTURE_ERROR
    assert rollout.error == "engine 4 is dead"
    assert len(engine.asked) == 2 * (retries + 1)
    assert rollout.num_sampled == rollout.turns[0].stop - rollout.turns[0].start  # what there was is kept, for the store


def test_a_failing_tool_leaves_the_message_that_called_it(episode):
    rollout, _, _ = episode([CALL], [InfrastructureError("no sandbox")] * 3, retries=2)
    assert rollout.outcome is Outcome.INFRASTRUCTURE_ERROR and rollout.turns == ()
    assert rollout.num_sampled > 0


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("problem", ["long", "image"])
def test_a_prompt_that_cannot_be_used_stops_the_batch_before_anything_is_sampled(
    chat, policy, make_prompt, deterministic, problem
):
    bad = make_prompt("x" * 300) if problem == "long" else make_prompt("<image>", [ImageBlob.of(b"no")])
    prompts = [make_prompt(), make_prompt(), bad]
    engine, toolbox = FakeEngine(policy.tokenizer, [[CALL, ANSWER]] * 6), FakeToolbox()
    config = RolloutConfig(max_prompt_tokens=100, deterministic=deterministic, max_concurrent=2)
    with pytest.raises(DataError, match=r"remove (the|this) row"):
        asyncio.run(collect(prompts, 2, chat, engine, toolbox, config, 0, "train/0"))
    assert (engine.num_open, toolbox.num_open) == (0, 0)
    assert engine.asked == [] and toolbox.calls == []


def test_one_error_names_every_prompt_of_the_batch_that_cannot_be_used(chat, policy, make_prompt):
    prompts = [
        make_prompt("x" * 300, uid="a.parquet:4"),
        make_prompt(uid="a.parquet:5"),
        make_prompt("<image>", [ImageBlob.of(b"no")], uid="a.parquet:6"),
        make_prompt("x" * 400, uid="b.parquet:0"),
    ]
    sizes = [len(chat.encode_prompt(prompts[i]).tokens) for i in (0, 3)]
    engine = FakeEngine(policy.tokenizer, [])
    with pytest.raises(DataError) as caught:
        asyncio.run(collect(prompts, 2, chat, engine, FakeToolbox(), RolloutConfig(max_prompt_tokens=100), 0, "train/0"))
    says = str(caught.value)
    assert says.startswith("prompt a.parquet:6: image cannot be decoded") and "a.parquet:5" not in says
    assert (
        f"prompt a.parquet:4 has {sizes[0]} tokens, prompt b.parquet:0 has {sizes[1]} tokens, "
        "rollout.max_prompt_tokens is 100; raise the limit or remove the rows"
    ) in says


def test_a_prompt_as_long_as_the_limit_is_sampled_and_encoded_once(chat, policy, make_prompt, monkeypatch):
    prompts = [make_prompt(uid="p0"), make_prompt(uid="p1")]
    limit = len(chat.encode_prompt(prompts[0]).tokens)
    encode, seen = chat.encode_prompt, []
    monkeypatch.setattr(chat, "encode_prompt", lambda prompt: seen.append(prompt.uid) or encode(prompt))
    engine = FakeEngine(policy.tokenizer, [[CALL, ANSWER]] * 6)
    config = RolloutConfig(max_prompt_tokens=limit)
    groups = asyncio.run(collect(prompts, 3, chat, engine, FakeToolbox(), config, 0, "train/0"))
    assert seen == ["p0", "p1"]
    assert {r.prompt_len for g in groups for r in g.rollouts} == {limit}
    assert {len(r.turns) for g in groups for r in g.rollouts} == {2}  # no rollout grew another's prompt


def test_a_defect_is_raised_as_it_is_and_closes_every_session(chat, policy, make_prompt):
    engine, toolbox = FakeEngine(policy.tokenizer, [[CALL, ANSWER], [CALL], [CALL, ANSWER]]), FakeToolbox()
    with pytest.raises(IndexError):  # the second script ends too soon: a defect of the test, not an infrastructure failure
        asyncio.run(collect([make_prompt()], 3, chat, engine, toolbox, RolloutConfig(), 0, "train/0"))
    assert (engine.num_open, toolbox.num_open) == (0, 0)


# -- whole batches --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("max_concurrent", [1, 3, 512])
def test_a_batch_returns_groups_in_the_order_of_its_prompts(chat, policy, make_prompt, deterministic, max_concurrent):
    prompts = [make_prompt(uid=f"p{i}") for i in range(3)]
    scripts = [[CALL] * (i % 3) + [f"<answer>{i}</answer><|im_end|>"] for i in range(6)]
    done = []
    groups = asyncio.run(
        collect(
            prompts,
            2,
            chat,
            FakeEngine(policy.tokenizer, scripts),
            FakeToolbox(),
            RolloutConfig(deterministic=deterministic, max_concurrent=max_concurrent),
            0,
            "train/0",
            lambda: done.append(1),
        )
    )
    assert [group.prompt.uid for group in groups] == ["p0", "p1", "p2"]
    assert [(r.prompt_uid, r.index) for g in groups for r in g.rollouts] == [(f"p{i}", j) for i in range(3) for j in range(2)]
    assert [r.turns[-1].text for g in groups for r in g.rollouts] == [f"<answer>{i}</answer>" for i in range(6)]
    assert len(done) == 6


@pytest.mark.parametrize(("name", "waits"), [("native", True), ("vllm", False)])
def test_only_the_native_engine_is_given_blocks_whose_slowest_rollout_the_next_one_waits_for(
    chat, policy, make_prompt, name, waits
):
    engine = FakeEngine(policy.tokenizer, [["<answer>1</answer><|im_end|>"]] * 6)
    opened, at_end = engine.session, []

    def session(order, prompt=""):
        made = opened(order, prompt)
        generate = made.generate

        async def slow(tokens, images, spans, sampling):
            if order == 0:
                for _ in range(50):
                    await asyncio.sleep(0)
                at_end.append(len(engine.asked))  # how many others were sampled meanwhile
            return await generate(tokens, images, spans, sampling)

        made.generate = slow
        return made

    engine.session = session
    config = RolloutConfig(engine=name, max_concurrent=2)
    asyncio.run(collect([make_prompt()], 6, chat, engine, FakeToolbox(), config, 0, "train/0"))
    assert at_end == [1 if waits else 5]


def test_every_message_of_a_run_has_a_seed_of_its_own():
    keys = [SampleKey(s, stream, o) for s in (0, 1) for stream in ("train/0", "train/1", "eval") for o in range(200)]
    seeds = {key.turn_seed(turn) for key in keys for turn in range(10)}
    assert len(seeds) == 2 * 3 * 200 * 10 and max(seeds) < 2**64


word = st.sampled_from(["hm ", "é😀", "17 ", "<reason>", "</reason>", "<|im_start|>", "  ", "<tool_call>", "\n"])


@given(
    messages=st.lists(st.tuples(st.lists(word, max_size=5).map("".join), st.booleans()), min_size=1, max_size=4),
    shown=st.integers(0, 2),
    limit=st.integers(1, 300),
    observation_limit=st.integers(0, 40),
)
@settings(max_examples=80)
def test_whatever_is_sampled_stands_verbatim_in_the_rollout(
    chat, policy, make_prompt, picture, messages, shown, limit, observation_limit
):
    script = [text + (CALL if calls else "<|im_end|>") for text, calls in messages] + [ANSWER]
    engine = FakeEngine(policy.tokenizer, [script], logp=-2.0, weight_version=3)
    toolbox = FakeToolbox([Observation("see <image> and <image>", tuple(picture(i) for i in range(shown)))])
    config = RolloutConfig(
        max_response_tokens=limit, max_turn_tokens=0, max_observation_tokens=max(1, observation_limit), max_turns=3
    )
    prompt = make_prompt("<image>?", [picture(0)])
    rollout: Rollout = asyncio.run(run_episode(prompt, 0, chat, engine, toolbox, config, SampleKey(0, "t", 0)))
    assert len(rollout.tokens) - rollout.prompt_len <= limit
    covered = np.zeros(len(rollout.tokens), bool)
    for i, turn in enumerate(rollout.turns):
        ids = policy.tokenizer.encode(script[i], add_special_tokens=False)
        stop = next((k + 1 for k, t in enumerate(ids) if t in chat.stop_ids), len(ids))
        assert rollout.tokens[turn.start : turn.stop].tolist() == ids[: min(stop, engine.sampling[i].max_tokens)]
        assert turn.text == chat.message_text(rollout.tokens[turn.start : turn.stop].tolist())
        covered[turn.start : turn.stop] = True
    np.testing.assert_array_equal(rollout.sampled, covered)
    np.testing.assert_array_equal(rollout.logp, np.where(covered, -2.0, 0.0))
    np.testing.assert_array_equal(rollout.weight_version, np.where(covered, 3, -1))
    pads = sum(span.stop - span.start for span in rollout.image_spans)
    assert pads == (rollout.tokens == policy.image_token_id).sum()
    assert len({image.sha256 for image in rollout.images}) == len(rollout.images)
