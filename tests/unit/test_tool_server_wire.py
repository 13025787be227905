"""What crosses between a tool server and its clients arrives as it was sent, and nothing else is taken for it."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from metis_fast.tools.result_tree import images_of
from metis_fast.tools.results import (
    ContentResult,
    ImageSearchResult,
    Page,
    PythonResult,
    Refusal,
    Refused,
    SeenPage,
    TextSearchResult,
)
from metis_fast.tools.server.wire import (
    Answer,
    Calling,
    Failure,
    Fault,
    Opening,
    Result,
    WireError,
    decode_answer,
    decode_calling,
    decode_failure,
    decode_opening,
    encode_answer,
    encode_calling,
    encode_failure,
    encode_opening,
)
from metis_fast.types import ImageBlob, Observation, Outcome

TEXT = st.text(st.characters(exclude_categories=()))  # half pairs of surrogates, too
IMAGE = st.builds(ImageBlob.of, st.binary(max_size=40))
IMAGES = st.lists(IMAGE, max_size=3).map(tuple)
PARTS = st.lists(TEXT | st.integers(0, 7), max_size=4).map(tuple)
PAGE = st.builds(Page, st.integers(1, 20), TEXT, TEXT, TEXT)


def _fitting(result: PythonResult | ContentResult) -> PythonResult | ContentResult:
    """With parts that show images which are there."""
    num = len(result.images)
    return replace(
        result,
        parts=tuple(part if isinstance(part, str) else part % num for part in result.parts if num or isinstance(part, str)),
    )


RESULT: st.SearchStrategy[Result] = st.one_of(
    st.builds(TextSearchResult, TEXT, st.lists(PAGE, max_size=3).map(tuple)),
    st.builds(ImageSearchResult, st.lists(st.builds(SeenPage, TEXT, TEXT, st.none() | IMAGE), max_size=3).map(tuple)),
    st.builds(PythonResult, PARTS, TEXT, TEXT, IMAGES, st.booleans(), TEXT).map(_fitting),
    st.builds(ContentResult, PARTS, IMAGES, st.booleans()).map(_fitting),
    st.builds(Refused, TEXT, st.sampled_from(Refusal), TEXT),
    st.builds(Observation, TEXT, IMAGES, st.sampled_from([Outcome.TOOL_RESULT, Outcome.TOOL_ERROR])),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)


@given(result=RESULT, known=IMAGES)
def test_every_result_arrives_as_it_was_and_images_that_are_known_are_not_sent(result: Result, known: tuple[ImageBlob, ...]):
    have = {image.sha256: image for image in known}
    fresh = tuple({image.sha256: image for image in images_of(result) if image.sha256 not in have}.values())
    body = encode_answer(Answer(result, fresh))
    assert decode_answer(body, have) == Answer(result, fresh)
    assert set(json.loads(body)["images"]) == {image.sha256 for image in images_of(result)} - have.keys()


@given(number=st.integers(1, 9), name=TEXT, arguments=st.dictionaries(TEXT, JSON, max_size=3))
def test_every_call_arrives_as_it_was(number: int, name: str, arguments: dict[str, object]):
    calling = Calling(number, name, arguments, 20.0, 1.5)
    assert decode_calling(encode_calling(calling)) == calling


def test_arguments_may_hold_what_is_no_number():
    calling = decode_calling(encode_calling(Calling(1, "python", {"x": math.nan, "y": -math.inf}, 1.0)))
    assert math.isnan(calling.arguments["x"]) and calling.arguments["y"] == -math.inf  # pyright: ignore[reportArgumentType]


@given(
    extra=st.dictionaries(TEXT, JSON, max_size=3), key=TEXT, sizes=st.lists(st.tuples(st.integers(), st.integers()), max_size=2)
)
def test_every_opening_arrives_as_it_was(extra: dict[str, object], key: str, sizes: list[tuple[int, int]]):
    opening = Opening(tuple("ab" for _ in sizes), extra, tuple(sizes), key)
    assert decode_opening(encode_opening(opening)) == opening


@given(failure=st.builds(Failure, st.sampled_from(Fault), TEXT, st.lists(TEXT, max_size=2).map(tuple)))
def test_every_failure_arrives_as_it_was(failure: Failure):
    assert decode_failure(encode_failure(failure)) == failure


PYTHON = {"parts": ["a"], "stdout": "a", "stderr": "", "images": [], "ok": True, "note": ""}


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"[]",
        b"nonsense",
        b"[" * 5000,
        json.dumps({"kind": "PythonResult", "result": PYTHON}).encode(),
        json.dumps({"kind": "Exception", "result": PYTHON, "images": {}}).encode(),
        json.dumps({"kind": "PythonResult", "result": PYTHON | {"ok": 1}, "images": {}}).encode(),
        json.dumps({"kind": "PythonResult", "result": PYTHON | {"parts": [True]}, "images": {}}).encode(),
        json.dumps({"kind": "PythonResult", "result": PYTHON | {"parts": "a"}, "images": {}}).encode(),
        json.dumps({"kind": "PythonResult", "result": PYTHON | {"more": 1}, "images": {}}).encode(),
        json.dumps({"kind": "PythonResult", "result": {"stdout": "a"}, "images": {}}).encode(),
        json.dumps({"kind": "PythonResult", "result": PYTHON | {"images": ["0" * 64]}, "images": {}}).encode(),
        json.dumps({"kind": "PythonResult", "result": PYTHON, "images": {"0" * 64: "AAAA"}}).encode(),
        json.dumps({"kind": "PythonResult", "result": PYTHON, "images": {"0" * 64: "?"}}).encode(),
        json.dumps({"kind": "Refused", "result": {"text": "a", "why": "no reason"}, "images": {}}).encode(),
        json.dumps({"kind": "PythonResult", "result": PYTHON | {"parts": [0]}, "images": {}}).encode(),
        json.dumps({"kind": "PythonResult", "result": PYTHON | {"parts": [-1]}, "images": {}}).encode(),
        json.dumps(
            {"kind": "Observation", "result": {"text": "a", "images": [], "outcome": "answered"}, "images": {}}
        ).encode(),
    ],
)
def test_what_is_no_answer_is_not_taken_for_one(body: bytes):
    with pytest.raises(WireError):
        decode_answer(body, {})


@pytest.mark.parametrize(
    "body",
    [
        b"{}",
        b'{"number": 1, "name": "python", "arguments": []}',
        b'{"number": 1, "name": "python", "arguments": {}}',
        b'{"number": true, "name": "python", "arguments": {}, "deadline_s": 1}',
        b'{"number": 1, "name": "python", "arguments": {}, "deadline_s": 0}',
        b'{"number": 1, "name": "python", "arguments": {}, "deadline_s": NaN}',
        b'{"number": 1, "name": "python", "arguments": {}, "deadline_s": 1, "wait_s": Infinity}',
        b'{"number": 1, "name": "python", "arguments": {}, "deadline_s": 1, "other": 1}',
    ],
)
def test_what_is_no_call_is_refused(body: bytes):
    with pytest.raises(WireError):
        decode_calling(body)


@pytest.mark.parametrize("body", [b"[]", b'{"extra": []}', b'{"images": [1]}', b'{"seen": [[1, 2]]}', b'{"seen": [[1]]}'])
def test_what_is_no_opening_is_refused(body: bytes):
    with pytest.raises(WireError):
        decode_opening(body)


@pytest.mark.parametrize("body", [b"", b"<html>", b'{"detail": "Not Found"}', b'{"fault": "none of ours", "text": ""}'])
def test_other_servers_failures_are_none_of_a_tool_server(body: bytes):
    assert decode_failure(body) is None
