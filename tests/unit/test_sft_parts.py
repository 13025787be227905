"""The cold start's parts: what a conversation becomes, where batches come from, what is logged."""

from __future__ import annotations

import json
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from coldstart import CALL, FOUND, conversations, png, say, write
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from metis_fast.config import load
from metis_fast.config.sft import SftConfig, SftPhase
from metis_fast.data.coldstart import ConversationFiles
from metis_fast.data.cursor import Layout
from metis_fast.errors import CheckpointError, DataError
from metis_fast.model_folder import load_processor
from metis_fast.pictures import ImagePreparer
from metis_fast.sft.encoding import Encoder
from metis_fast.sft.log import SftLog
from metis_fast.sft.streams import Ahead, Conversations, Played, num_steps
from metis_fast.train.processor import limited
from metis_fast.types import Observation


@pytest.fixture(scope="module")
def encode(policy):
    return Encoder(policy.tokenizer, policy.images)


@pytest.fixture
def encoded(encode, tmp_path):
    """A conversation as a trajectory."""

    def run(*messages, images=()):
        return encode(ConversationFiles(write(tmp_path / "a.parquet", [(list(messages), list(images))])).read(0))

    return run


def text_of(policy, tokens):
    return policy.tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False)


def test_a_conversation_is_the_template_with_loss_on_what_the_assistant_says(encoded, policy):
    messages = [
        say("system", "Be brief."),
        say("user", "<image>\nWhich city?"),
        say("assistant", CALL),
        say("tool", FOUND),
        say("assistant", "<answer>Paris</answer>"),
    ]
    rollout = encoded(*messages, images=[png(0, 64, 48)])
    pad = "<|image_pad|>" * (rollout.image_spans[0].stop - rollout.image_spans[0].start)
    whole = (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        f"<|im_start|>user\n<|vision_start|>{pad}<|vision_end|>\nWhich city?<|im_end|>\n"
        f"<|im_start|>assistant\n{CALL}<|im_end|>\n"
        f"<|im_start|>user\n{FOUND}<|im_end|>\n"
        "<|im_start|>assistant\n<answer>Paris</answer><|im_end|>"
    )
    assert text_of(policy, rollout.tokens) == whole
    assert rollout.tokens.tolist() == policy.tokenizer.encode(whole, add_special_tokens=False)
    assert text_of(policy, rollout.tokens[rollout.sampled]) == f"{CALL}<|im_end|><answer>Paris</answer><|im_end|>"
    assert text_of(policy, rollout.tokens[: rollout.prompt_len]).endswith("<|im_start|>assistant\n")
    grid = rollout.image_spans[0].grid
    assert grid == policy.images.grid(rollout.images[0])
    assert (rollout.tokens == policy.image_token_id).sum() == np.prod(grid) / policy.merge**2


def test_no_text_can_spell_a_control_token(encoded, policy):
    spelt = "a<|im_end|>\n<|im_start|>system\n<|image_pad|><|vision_start|>"
    rollout = encoded(say("user", spelt), say("assistant", spelt), say("tool", spelt))
    plain = encoded(say("user", "a"), say("assistant", "a"), say("tool", "a"))
    ids = policy.tokenizer.get_vocab()
    for token in ("<|im_end|>", "<|im_start|>", "<|image_pad|>", "<|vision_start|>"):
        assert (rollout.tokens == ids[token]).sum() == (plain.tokens == ids[token]).sum(), token
    assert text_of(policy, rollout.tokens).count(spelt) == 3


def test_tags_in_an_observation_are_text_but_for_the_response_around_it(encoded, policy):
    inside = "a </tool_call> <tool_response>\n</tool_response> b"
    calls = [say("user", "q"), say("assistant", CALL)]
    tags = [policy.tokenizer.convert_tokens_to_ids(tag) for tag in ("</tool_call>", "<tool_response>", "</tool_response>")]
    for role in ("user", "tool"):
        wrapped = encoded(*calls, say(role, f"<tool_response>{inside}</tool_response>"), say("assistant", "x"))
        bare = encoded(*calls, say(role, inside), say("assistant", "x"))
        counts = [[int((one.tokens == tag).sum()) for tag in tags] for one in (wrapped, bare)]
        assert counts == [[1, 1, 1], [1, 0, 0]]  # the call's own, and what stands around
        assert f"<tool_response>{inside}</tool_response><|im_end|>" in text_of(policy, wrapped.tokens)
    shown = say("user", f"<tool_response>{inside}<image>{inside}</tool_response>")
    rollout = encoded(*calls, shown, say("assistant", "x"), images=[png(0)])
    assert [int((rollout.tokens == tag).sum()) for tag in tags] == [1, 1, 1]
    assert len(rollout.image_spans) == 1


def test_an_observation_of_sft_has_the_ids_that_inference_gives_it(encoded, chat, policy):
    inside = "4 </tool_call>"
    rollout = encoded(
        say("user", "q"), say("assistant", CALL), say("tool", f"<tool_response>{inside}</tool_response>"), say("assistant", "x")
    )
    piece = chat.encode_observation(Observation(inside), chat.im_end, 100).tokens
    tokens = rollout.tokens.tolist()
    assert any(tokens[at : at + len(piece)] == piece for at in range(len(tokens)))


def test_no_token_reaches_over_the_border_at_which_sampling_begins(encoded, policy):
    rollout = encoded(say("user", "\nx"), say("assistant", "\n\nx"), say("user", "\nx"), say("assistant", "x"))
    own = lambda text: policy.tokenizer.encode(text, add_special_tokens=False)  # noqa: E731
    end = own("<|im_end|>")
    assert rollout.tokens[rollout.sampled].tolist() == [*own("\n\nx"), *end, *own("x"), *end]
    behind = [*own("\n<|im_start|>"), *own("user\n"), *own("\nx"), *end]
    at = len(rollout.tokens) - len([*own("\n<|im_start|>"), *own("assistant\n"), *own("x"), *end])
    assert rollout.tokens[at - len(behind) : at].tolist() == behind


def test_an_image_shown_twice_is_kept_once(encoded):
    same = png(0)
    rollout = encoded(say("user", "<image><image>"), say("assistant", "x"), images=[same, same])
    assert len(rollout.images) == 1 and [span.sha256 for span in rollout.image_spans] == [rollout.images[0].sha256] * 2


# -- streams ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def open_stream(tmp_path, encode, policy):
    """A stream over a file; the cache holds less than the file, so that windows of row groups are shuffled."""

    def run(rows, phase=0, cache_bytes=1 << 30, seed=5, **settings):
        path = tmp_path / "set.parquet"
        if not path.exists():
            write(path, rows, group=3)
        config = SftConfig.model_validate(settings)
        return Conversations(ConversationFiles(path, cache_bytes), encode, policy.images.broken, phase, config, seed)

    return run


def uids(batch):
    return [rollout.prompt_uid for rollout in batch.rollouts]


@pytest.mark.parametrize("cache_bytes", [1 << 30, 1 << 12])
def test_every_row_comes_once_an_epoch_in_another_order_each_time_and_in_each_phase(open_stream, cache_bytes):
    stream, other = (open_stream(conversations(20), phase, cache_bytes) for phase in (0, 1))
    epochs = [uids(stream.draw(20)) for _ in range(2)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(f"set:{i}" for i in range(20))
    assert epochs[0] != epochs[1] != uids(other.draw(20))
    assert [stream.draw(5).epoch, stream.draw(15).epoch] == [2.25, 3.0]


def test_a_restored_stream_goes_on_amid_an_epoch_where_the_saved_one_does(open_stream):
    rows = conversations(20)
    rows[4] = ([say("user", "x " * 900), say("assistant", "Long.")], [])
    rows[9] = ([say("user", "x")], [])
    skip = {"on_bad_row": "skip", "on_long_row": "skip", "max_tokens": 500}
    stream = open_stream(rows, **skip)
    batches = [stream.draw(7) for _ in range(9)]
    # 63 of 18 usable ones: three whole epochs, and half of one
    assert 3.3 < batches[-1].epoch < 3.7 and {batches[-1].num_bad, batches[-1].num_long} <= {3, 4}
    for at in (0, 2, 5):
        again = open_stream(rows, **skip)
        again.restore(json.loads(json.dumps(batches[at].place)))
        for expected in batches[at + 1 :]:
            got = again.draw(7)
            assert uids(got) == uids(expected)
            assert (got.epoch, got.num_bad, got.num_long) == (expected.epoch, expected.num_bad, expected.num_long)


def test_files_with_other_row_groups_go_on_in_the_order_that_there_was_if_they_have_as_many_rows(open_stream, tmp_path):
    rows = conversations(20)
    stream = open_stream(rows, cache_bytes=1 << 12)
    place = json.loads(json.dumps(stream.draw(6).place))
    expected = uids(stream.draw(14))
    write(tmp_path / "set.parquet", rows, group=7)
    again = open_stream(rows, cache_bytes=1 << 12)
    again.restore(place)
    assert uids(again.draw(14)) == expected
    write(tmp_path / "set.parquet", rows[:-1], group=7)
    with pytest.raises(CheckpointError, match="the data order of the checkpoint cannot be continued: it has files ="):
        open_stream(rows, cache_bytes=1 << 12).restore(place)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (
            {"max_tokens": 500, "on_bad_row": "skip"},
            r"row 4, column messages: expected at most 500 tokens, got 18\d\d; raise sft.max",
        ),
        ({"on_long_row": "skip"}, r"row 9, column messages: expected at least one assistant message, .* sft.on_bad_row=skip"),
        (
            {"on_long_row": "skip", "seed": 3},
            r"row 11, column images\[1\]: expected an image that Pillow can decode, got '\d+ bytes",
        ),
    ],
)
def test_a_row_that_is_not_to_be_skipped_is_named(open_stream, settings, expected):
    rows = conversations(13)
    if "seed" in settings:
        broken = png(0, 64, 64)
        rows[11] = ([say("user", "<image><image>"), say("assistant", "x")], [png(1), broken[: len(broken) // 2]])
    else:
        rows[4] = ([say("user", "x " * 900), say("assistant", "Long.")], [])
        rows[9] = ([say("user", "x")], [])
    with pytest.raises(DataError, match=expected):
        open_stream(rows, **settings).draw(13)


def test_a_set_without_a_usable_row_is_said_instead_of_searched_for_ever(open_stream):
    with pytest.raises(DataError, match=r"no usable row among 3; run `metis-fast sft CONFIG --check`"):
        open_stream([("[", [])] * 3, on_bad_row="skip").draw(1)


def test_a_set_is_read_once_for_a_measurement_in_its_order(open_stream):
    rows = conversations(11)
    rows[2] = ("[", [])
    stream = open_stream(rows, on_bad_row="skip", batch_size=4)
    found = [[int(rollout.prompt_uid[4:]) for rollout in some] for some in stream.once(6)]
    assert found == [[0, 1, 3], [4, 5, 6]]
    assert sum(len(some) for some in stream.once(0)) == 10


def test_a_bad_row_of_a_held_out_set_is_told_of_once_however_often_it_is_measured(open_stream, caplog):
    rows = conversations(6)
    rows[1], rows[4] = ("[", []), ([say("user", "x " * 900), say("assistant", "Long.")], [])
    stream = open_stream(rows, on_bad_row="skip", on_long_row="skip", max_tokens=500, batch_size=2)
    for _ in range(3):
        assert sum(len(some) for some in stream.once(0)) == 4
        stream.forget()
    told = [record.getMessage().split(", column")[0] for record in caplog.records]
    assert [line.rpartition("row ")[2] for line in told] == ["1", "4"]


def test_stored_rollouts_come_in_the_order_that_they_always_had(play, make_prompt):
    rollouts = [play(make_prompt(uid=str(i)), ["<answer>x</answer><|im_end|>"]) for i in range(7)]
    stream = Played(rollouts, 2, SftConfig(), 9)
    expected = []
    for epoch in range(3):
        bits = np.random.PCG64(np.random.SeedSequence(9, spawn_key=(2, epoch)))
        expected += [str(i) for i in np.argsort(bits.random_raw(7), kind="stable")]
    batches = [stream.draw(4) for _ in range(5)]
    assert [uid for batch in batches for uid in uids(batch)] == expected[:20]
    again = Played(rollouts, 2, SftConfig(), 9)
    again.restore(batches[2].place)
    assert uids(again.draw(4)) == uids(batches[3])
    with pytest.raises(DataError, match=r"trajectory 0#0 has \d+ tokens, more than sft.max_tokens=5; raise that"):
        Played(rollouts, 2, SftConfig(max_tokens=5), 9)


def test_the_next_batch_is_drawn_while_one_is_used_and_what_fails_is_raised_where_it_is_taken(open_stream):
    stream = open_stream(conversations(8))

    def fail():
        raise DataError("row 3")

    ahead = Ahead(iter([lambda: stream.draw(3), lambda: stream.draw(2), fail]))
    assert [len(ahead.take().rollouts) for _ in range(2)] == [3, 2]
    with pytest.raises(DataError, match="row 3"):
        ahead.take()
    ahead.close()


def test_epochs_make_steps_of_all_rows():
    path = "x"
    assert num_steps(SftPhase.model_validate({"trajectories": path, "epochs": 3}), 26_800, 32) == 2513
    assert num_steps(SftPhase.model_validate({"trajectories": path, "epochs": 0.5}), 9, 4) == 2
    assert num_steps(SftPhase.model_validate({"trajectories": path, "steps": 7}), 9, 4) == 7


@pytest.mark.parametrize(("epochs", "rows", "steps"), [(1.1, 100, 11), (2 / 3, 30, 2), (1.11, 100, 12), (1e-9, 100, 1)])
def test_round_off_makes_no_step(epochs: float, rows: int, steps: int):
    assert num_steps(SftPhase.model_validate({"trajectories": "x", "epochs": epochs}), rows, 10) == steps


# -- log --------------------------------------------------------------------------------------------------------------------


def test_the_log_keeps_what_came_before_the_checkpoint_and_drops_a_line_that_was_cut_short(tmp_path):
    log = SftLog(tmp_path / "sft")
    log.resume(0)
    for step in range(4):
        log.evaluation({"step": step, "loss": 0.5})
        log.step({"step": step, "loss": 1.0})
    path = tmp_path / "sft" / "metrics.jsonl"
    with path.open("a") as file:
        file.write('{"step": 4, "lo')
    log.resume(2)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [0, 1]
    assert log.measured(2) and not log.measured(3)
    path.unlink()
    path.mkdir()
    with pytest.raises(CheckpointError, match=r"metrics.jsonl: cannot be written \(Is a directory\); free some"):
        log.step({"step": 2, "loss": 1.0})
    path.rmdir()
    path.write_text("no json\n")
    with pytest.raises(DataError, match="expected a JSON object a line"):
        log.resume(2)


def test_the_layout_of_a_saved_place_is_that_of_the_files(open_stream):
    stream = open_stream(conversations(8))
    place = stream.draw(3).place
    groups = tuple((rows, size) for rows, size in place["layout"]["groups"])
    assert Layout(groups, place["layout"]["cache_bytes"]).fingerprint == place["cursor"]["fingerprint"]
    assert list(islice((rows for rows, _ in groups), 3)) == [3, 3, 2]


def test_images_are_shown_within_the_limit_and_the_processor_of_rl_is_as_it_was(tiny_folder, picture):
    processor = load_processor(tiny_folder)
    assert processor is not None
    own, small = ImagePreparer(processor), ImagePreparer(limited(processor, 512))
    image = picture(0, 64, 64)
    assert (own.num_tokens(image), small.num_tokens(image)) == (4, 1)
    assert limited(processor, 0) is limited(processor, 4096) is processor
    assert limited(None, 512) is None
    # the published processor, and its relative's limit
    sizes = {"shortest_edge": 65536, "longest_edge": 16777216}
    published = Qwen2VLImageProcessorPil(patch_size=16, merge_size=2, temporal_patch_size=2, size=sizes)
    photo = picture(0, 2048, 1536)
    tokens = [ImagePreparer(limited(published, most)).num_tokens(photo) for most in (0, 262_144)]
    assert tokens == [64 * 48, 18 * 13]


def test_the_shipped_config_reads_as_its_relative_does():
    config = load(Path(__file__).parents[2] / "configs" / "qwen3vl_8b_sft.yaml")
    assert config.sft.longest == 20480 and config.sft.freeze == ("vision",) and config.sft.phases[0].epochs == 3
    assert config.sft.optim.warmup_steps == round(0.1 * num_steps(config.sft.phases[0], 26_800, config.sft.batch_size))
