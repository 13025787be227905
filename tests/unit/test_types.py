"""What flows between the stages checks its invariants where it is made."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from metis_fast.types import (
    ImageBlob,
    ImageSpan,
    Message,
    Outcome,
    Prompt,
    Rollout,
    Score,
    ScoredGroup,
    ToolCall,
    Turn,
)

A, B = ImageBlob.of(b"a"), ImageBlob.of(b"b")
SAMPLED = np.array([0, 0, 0, 0, 1, 1, 0, 0, 0, 1], bool)


def rollout(**changes) -> Rollout:
    """Ten tokens: a prompt of four with an image of two, a call of two, an observation of three with an image, an answer."""
    fields = {
        "prompt_uid": "p",
        "index": 3,
        "tokens": np.arange(10, dtype=np.int32),
        "prompt_len": 4,
        "sampled": SAMPLED,
        "logp": np.where(SAMPLED, -0.5, 0).astype(np.float32),
        "weight_version": np.where(SAMPLED, 7, -1).astype(np.int32),
        "images": (A, B),
        "image_spans": (ImageSpan(A.sha256, 1, 3, (1, 2, 4)), ImageSpan(B.sha256, 6, 8, (1, 2, 4))),
        "turns": (
            Turn("<tool_call>x", 4, 6, 9, Outcome.TOOL_ERROR, ToolCall("", "")),
            Turn("<answer>1</answer>", 9, 10, 10, Outcome.ANSWERED),
        ),
        "outcome": Outcome.ANSWERED,
    }
    return Rollout(**(fields | changes))


def changed(array, at, value):
    out = array.copy()
    out[at] = value
    return out


def span(image, start, stop):
    return ImageSpan(image.sha256, start, stop, (1, 2, 2))


GOOD = rollout()


def test_what_is_counted_is_what_the_policy_did():
    assert (GOOD.num_sampled, GOOD.num_tool_calls) == (3, 1)  # a malformed call counts
    assert GOOD.response_text == "<tool_call>x<answer>1</answer>"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"logp": np.zeros(9, np.float32)}, "logp has shape"),
        ({"sampled": np.zeros((10, 1), bool)}, "sampled has shape"),
        ({"weight_version": np.full(11, -1, np.int32)}, "weight_version has shape"),
        ({"prompt_len": 5}, "a prompt token is marked as sampled"),
        ({"logp": changed(GOOD.logp, 4, np.nan)}, "must be finite"),
        ({"logp": changed(GOOD.logp, 4, -np.inf)}, "must be finite"),
        ({"logp": changed(GOOD.logp, 4, 0.1)}, "<= 0"),
        ({"logp": changed(GOOD.logp, 6, -0.1)}, "0 where nothing was sampled"),
        ({"weight_version": changed(GOOD.weight_version, 4, -1)}, "needs a weight version"),
        ({"weight_version": changed(GOOD.weight_version, 0, 0)}, "needs a weight version"),
        ({"images": (A, B, A)}, "stored twice"),
        ({"images": (A,)}, "does not match the images"),
        ({"image_spans": (span(A, 1, 3), span(B, 2, 4))}, "overlaps its neighbour"),
        ({"image_spans": (span(B, 6, 8), span(A, 1, 3))}, "overlaps its neighbour"),
        ({"image_spans": (span(A, 2, 2),)}, "image span"),
        ({"image_spans": (span(A, 6, 11),)}, "image span"),
        ({"image_spans": (span(A, 3, 5),)}, "placeholder sampled by the policy"),
    ],
)
def test_a_rollout_that_contradicts_itself_is_refused_by_name(changes, message):
    with pytest.raises(ValueError, match="rollout p#3") as caught:
        rollout(**changes)
    assert message in str(caught.value)


def test_an_image_may_be_shown_twice_but_is_stored_once():
    assert rollout(images=(A,), image_spans=(span(A, 1, 3), span(A, 6, 8))).images == (A,)


def test_touching_images_are_allowed():
    assert len(rollout(image_spans=(span(A, 0, 2), span(B, 2, 4))).image_spans) == 2


def test_rollouts_are_compared_by_identity_because_arrays_have_no_truth():
    assert rollout() != rollout() and GOOD == GOOD


@pytest.mark.parametrize(
    ("content", "num", "fits"), [("<image> <image>", 2, True), ("", 0, True), ("<image>", 0, False), ("", 1, False)]
)
def test_a_prompt_has_as_many_marks_as_images(content, num, fits):
    def make():
        messages = (Message("system", "<image>"), Message("user", content))
        return Prompt("row-1", "s", messages, (A,) * (num + 1), "math", ("1",), "rule", "q")

    if fits:
        assert len(make().images) == num + 1
    else:
        with pytest.raises(ValueError, match=r"prompt row-1: .* marks in the messages but"):
            make()


def test_a_group_has_a_score_for_every_rollout():
    prompt = Prompt("row-1", "s", (), (), "math", ("1",), "rule", "q")
    with pytest.raises(ValueError, match="group row-1: 1 rollouts but 2 scores"):
        ScoredGroup(prompt, (GOOD,), (Score(None, Outcome.JUDGE_ERROR),) * 2)


def test_an_image_is_known_by_the_hash_of_its_bytes():
    assert A.sha256 == hashlib.sha256(b"a").hexdigest()
    assert ImageBlob.of(b"a") == A != B
    assert "data" not in repr(A)
