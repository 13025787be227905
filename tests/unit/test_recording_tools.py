"""Tools recorded and replayed: who gets which answer, what a key depends on, and what a replay does without."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from metis_fast.config import Config, RolloutConfig, WorkersConfig
from metis_fast.doctor import services
from metis_fast.errors import InfrastructureError, RecordingError
from metis_fast.model import Policy
from metis_fast.node.opening import needs_hub
from metis_fast.recording.file import Recording
from metis_fast.recording.opening import open_recording, recorded_toolbox
from metis_fast.recording.rollout import NOBODY, PLAYED, Played
from metis_fast.rehearse.settings import Places, small
from metis_fast.rollout.chat import Chat
from metis_fast.rollout.episode import collect
from metis_fast.testing.fakes import FakeEngine, FakeToolbox
from metis_fast.tools.protocol import NO_EXTRA, Toolbox, ToolSession, ToolSpec
from metis_fast.tools.results import ImageSearchResult, Page, PythonResult, Refused, SeenPage, TextSearchResult, ToolResult
from metis_fast.types import Group, ImageBlob, Observation, Outcome, Prompt, ToolName

Call = tuple[str, Mapping[str, object]]
CODE: Call = ("python", {"code": "import os; os.urandom(4)"})
LOOK: Call = ("python", {"code": "x"})
QUERY: Call = ("text_search", {"query": "herons"})


class NeverTheSame:
    """Tools that answer each call otherwise, as code that prints addresses or the time. `python` remembers what it said.

    odd: stands in every answer. calls: names, in order. failing: so many of the next calls fail by our fault. fails: numbers of
    calls that do.
    """

    def __init__(self, odd: str = "") -> None:
        self.odd = odd
        self.calls: list[str] = []
        self.failing = 0
        self.fails: set[int] = set()
        self.numbers = itertools.count()

    names: Sequence[str] = ("python", "text_search", "image_search", "dice")

    @property
    def tools(self) -> Sequence[ToolSpec]:
        """See `Toolbox`."""
        return [ToolSpec(name, f"what {name} does", {"type": "object"}) for name in self.names]

    def session(
        self, images: Sequence[ImageBlob], extra: Mapping[str, object] = NO_EXTRA, seen: Sequence[tuple[int, int]] = ()
    ) -> _Session:
        """See `Toolbox`."""
        return _Session(self)

    def close(self) -> None:
        """See `Toolbox`."""


class _Session:
    def __init__(self, box: NeverTheSame) -> None:
        self._box, self._x = box, ""

    async def call(self, name: str, arguments: Mapping[str, object]) -> ToolResult | Observation:
        """See `ToolSession`."""
        self._box.calls.append(name)
        if self._box.failing or len(self._box.calls) in self._box.fails:
            self._box.failing = max(0, self._box.failing - 1)
            raise InfrastructureError("the server is gone")
        number = f"{next(self._box.numbers)}{self._box.odd}"
        match name:
            case "python":
                self._x = self._x if arguments["code"] == "x" else number
                return PythonResult((self._x,), self._x, "", (), True)
            case "text_search":
                return TextSearchResult("herons", (Page(1, number, "", ""),))
            case "image_search":
                return ImageSearchResult((SeenPage(number, "", ImageBlob.of(number.encode("utf-8", "replace"))),))
            case "dice":
                return Observation(number)
        return Refused(f"There is no tool {name}: {number}", tool=name)

    async def close(self) -> None:
        """See `ToolSession`."""


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., Config]:
    """With a file to record into, or to replay, and more settings of tools."""

    def make(how: str, **tools: Any) -> Config:
        return Config.model_validate({"tools": {how: tmp_path / "run.sqlite", **tools}})

    return make


@pytest.fixture
def boxes(settings: Callable[..., Config]) -> Iterator[Callable[..., Toolbox]]:
    """Opens a toolbox that records what another one answers; or, without one, a toolbox that replays."""
    opened: list[Recording] = []

    def make(toolbox: Toolbox | None = None, **tools: Any) -> Toolbox:
        for recording in opened:
            recording.close()
        config = settings("replay" if toolbox is None else "record", **tools)
        recording = open_recording(config)
        assert recording is not None
        opened.append(recording)

        def inner() -> Toolbox:
            assert toolbox is not None, "a replay opened the tools"
            return toolbox

        return recorded_toolbox(config, recording, inner)

    yield make
    for recording in opened:
        recording.close()


async def _calls(session: ToolSession, rollout: str, calls: Sequence[Call]) -> list[ToolResult | Observation]:
    PLAYED.set(Played(rollout, f"data.parquet:{rollout}"))
    results = [await session.call(name, arguments) for name, arguments in calls]
    await session.close()
    return results


def call(
    box: Toolbox,
    rollout: str,
    *calls: Call,
    images: Sequence[ImageBlob] = (),
    extra: Mapping[str, object] = NO_EXTRA,
    seen: Sequence[tuple[int, int]] = (),
) -> list[ToolResult | Observation]:
    """What a rollout is told in one session."""
    return asyncio.run(_calls(box.session(images, extra, seen), rollout, calls))


def stdout(results: Sequence[ToolResult | Observation]) -> list[str]:
    return [result.stdout for result in results if isinstance(result, PythonResult)]


def test_each_rollout_is_told_again_what_it_was_told(boxes: Callable[..., Toolbox]) -> None:
    every = [CODE, QUERY, LOOK, ("image_search", {}), ("dice", {"sides": 6}), CODE, LOOK, QUERY, ("browser", {})]
    box = boxes(NeverTheSame(" \ud800"))
    told = {rollout: call(box, rollout, *every) for rollout in ("a", "b", "c")}
    first, second = stdout(told["a"]), stdout(told["b"])
    assert first[0] == first[1] and first[2] == first[3] and not set(first) & set(second)  # what a rollout reads fits together
    replay = boxes()
    assert {rollout: call(replay, rollout, *every) for rollout in ("c", "a", "b")} == told
    assert call(replay, "another", *every) == told["a"]  # the first answers fit together, too
    assert replay.names == list(NeverTheSame.names) and replay.tools == tuple(NeverTheSame().tools)


def test_a_replay_describes_tools_to_the_model_letter_for_letter(boxes: Callable[..., Toolbox]) -> None:
    schema = {"type": "object", "properties": {"b": {"type": "string"}, "a": {"title": "A"}}, "required": ["b", "a"]}

    class Telling(NeverTheSame):
        @property
        def tools(self) -> Sequence[ToolSpec]:
            return [ToolSpec("dice", "throws", schema)]

    boxes(Telling())
    (tool,) = boxes().tools
    assert json.dumps(dict(tool.schema)) == json.dumps(schema)  # the order of the keys is what the model reads, too


def test_a_search_is_made_once_and_code_runs_each_time(boxes: Callable[..., Toolbox]) -> None:
    inner = NeverTheSame()
    box = boxes(inner)
    told = [call(box, rollout, QUERY, CODE, QUERY) for rollout in ("a", "b")]
    assert inner.calls == ["text_search", "python", "python"]
    assert told[0][0] == told[0][2] == told[1][0] == told[1][2] and told[0][1] != told[1][1]
    later = NeverTheSame()
    assert call(boxes(later), "a", QUERY)[0] == told[0][0] and not later.calls  # nor by a run that goes on with the file


def test_a_failure_of_ours_is_not_recorded_and_the_next_try_is(boxes: Callable[..., Toolbox]) -> None:
    inner = NeverTheSame()
    box = boxes(inner)
    told_first = call(box, "a", CODE, QUERY)
    for broken in (CODE, QUERY, LOOK):
        inner.failing = 1
        with pytest.raises(InfrastructureError, match="the server is gone"):
            call(box, "b", CODE, *([broken] if broken is LOOK else []), broken)
    told = call(box, "b", CODE, LOOK, QUERY)
    replay = boxes()
    assert call(replay, "b", CODE, LOOK, QUERY) == told and told[2] == told_first[1]
    assert call(replay, "a", CODE) == told_first[:1]


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (("python", {"code": "print('never recorded')" * 20}), '{"code":"print(\'never recorded\')'),
        (("text_search", {"query": "storks"}), 'text_search({"query":"storks"})'),
        (("dice", {"sides": 8}), 'dice({"sides":8})'),
    ],
)
def test_what_is_missing_is_named(boxes: Callable[..., Toolbox], tmp_path: Path, made: Call, words: str) -> None:
    call(boxes(NeverTheSame()), "a", CODE)
    with pytest.raises(RecordingError) as caught:
        call(boxes(), "a", CODE, made)
    message = str(caught.value)
    assert message.startswith(f"tools.replay={tmp_path / 'run.sqlite'} has no answer for {made[0]}(") and words in message
    assert "of data.parquet:a; replay with the settings" in message and len(message.splitlines()) == 1 and len(message) < 500


def test_a_file_without_tools_is_no_recording_of_a_run(boxes: Callable[..., Toolbox], tmp_path: Path) -> None:
    Recording(tmp_path / "run.sqlite", writable=True).close()
    with pytest.raises(RecordingError, match=r"expected recorded tools, found none; record a run with tools\.record first"):
        boxes()


def _missing(box: Toolbox, *calls: Call, **opened: Any) -> list[str]:
    """The tools whose call has no answer."""
    found = []
    for one in calls:
        try:
            call(box, "a", one, **opened)
        except RecordingError:
            found.append(one[0])
    return found


def test_a_key_depends_on_what_the_answer_may_depend_on_and_on_nothing_else(
    boxes: Callable[..., Toolbox], picture: Callable[..., ImageBlob]
) -> None:
    every = [CODE, QUERY, ("image_search", {}), ("dice", {})]
    opened: dict[str, Any] = {"images": [picture(1)], "extra": {"index": 3}, "seen": [(32, 32)]}
    for one in every:
        call(boxes(NeverTheSame()), "a", one, **opened)
    assert _missing(boxes(), *every, **opened) == []
    may_change = {"text_search": {"timeout_s": 1, "concurrency": 2}, "own_timeout_s": 5}
    assert _missing(boxes(**may_change), *every, **opened) == []
    assert _missing(boxes(), *every, **opened | {"images": [picture(2)]}) == ["python", "image_search", "dice"]
    assert _missing(boxes(), *every, **opened | {"extra": {"index": 4}}) == ["image_search", "dice"]
    assert _missing(boxes(), *every, **opened | {"seen": [(64, 64)]}) == ["dice"]
    assert _missing(boxes(python={"timeout_s": 5}), *every, **opened) == ["python"]
    assert _missing(boxes(text_search={"max_results": 1}), *every, **opened) == ["text_search"]
    assert _missing(boxes(image_search={"max_results": 1}), *every, **opened) == ["image_search"]
    # what there is to call is in what is said of a call that cannot be made
    assert _missing(boxes(enabled=["python"]), *every, **opened) == [name for name, _ in every]


def test_code_that_sees_images_as_the_model_does_depends_on_their_sizes(
    boxes: Callable[..., Toolbox], picture: Callable[..., ImageBlob]
) -> None:
    seen = {"python": {"images": "seen"}}
    call(boxes(NeverTheSame(), **seen), "a", CODE, images=[picture(1)], seen=[(32, 32)])
    assert _missing(boxes(**seen), CODE, images=[picture(1)], seen=[(32, 32)]) == []
    assert _missing(boxes(**seen), CODE, images=[picture(1)], seen=[(64, 64)]) == ["python"]


def test_earlier_calls_of_other_tools_do_not_matter(boxes: Callable[..., Toolbox]) -> None:
    call(boxes(NeverTheSame()), "a", CODE, QUERY, ("image_search", {}), LOOK)
    assert len(call(boxes(), "a", ("image_search", {}), CODE, LOOK)) == 3
    with pytest.raises(RecordingError, match="no answer for python"):
        call(boxes(), "a", LOOK)  # alone it was never called


# -- what looks after a run -----------------------------------------------------------------------------------------------


def test_a_doctor_asks_the_file_and_nothing_else(
    boxes: Callable[..., Toolbox], settings: Callable[..., Config], tmp_path: Path
) -> None:
    box = boxes(NeverTheSame())
    gone = {"text_search": {"provider": "serper"}, "image_search": {"corpus": tmp_path / "gone.parquet"}}  # nor is there a key
    config = settings("replay", **gone)
    found = [finding for name in box.names[:3] for finding in services.tool(config, ToolName(name), offline=False)]
    found += services.judges(config, {"llm"}, offline=False)  # nobody says where that is
    assert [finding.state for finding in found] == ["ok"] * 4, found
    (tmp_path / "run.sqlite").write_bytes(b"none")
    with pytest.raises(RecordingError, match=r"set it to one that tools\.record made"):
        list(services.tool(config, ToolName.PYTHON, offline=False))


def test_a_replay_starts_no_workers_and_a_rehearsal_asks_stand_ins(settings: Callable[..., Config], tmp_path: Path) -> None:
    workers = WorkersConfig(tools=2, judges=2)
    assert needs_hub(settings("record").model_copy(update={"workers": workers}))
    assert not needs_hub(settings("replay").model_copy(update={"workers": workers}))
    places = Places(tmp_path, tmp_path, tmp_path, tmp_path, tmp_path, "http://127.0.0.1:1", "http://127.0.0.1:1")
    for how in ("record", "replay"):
        tools = small(settings(how), tmp_path / "rehearsal", places, image_tokens=64)[0].tools
        assert tools.record is None and tools.replay is None


# -- in episodes ----------------------------------------------------------------------------------------------------------

_ASK = '<tool_call>{"name": "python", "arguments": {"code": "import time; time.time()"}}</tool_call>'
_ANSWER = "<answer>Paris</answer><|im_end|>"


@pytest.fixture
def played(policy: Policy, chat: Chat, make_prompt: Callable[..., Prompt]) -> Callable[..., list[Group]]:
    """Two rollouts of each of two prompts, which call twice and answer."""

    def run(box: Toolbox, ask: str = _ASK, stream: str = "train/0", at_once: int = 4) -> list[Group]:
        engine = FakeEngine(policy.tokenizer, [[ask, ask, _ANSWER]] * 4)
        config = RolloutConfig(retries=2, max_concurrent=at_once)
        prompts = [make_prompt(uid=f"rows.parquet:{i}") for i in range(2)]
        return asyncio.run(collect(prompts, 2, chat, engine, box, config, 0, stream))

    return run


def _told(groups: Sequence[Group]) -> list[str]:
    return [turn.observation for group in groups for rollout in group.rollouts for turn in rollout.turns]


def test_rollouts_with_equal_calls_are_told_apart(boxes: Callable[..., Toolbox], played: Callable[..., list[Group]]) -> None:
    inner = NeverTheSame()
    told = [_told(played(boxes(inner), stream=stream)) for stream in ("train/0", "train/1")]
    assert len({*told[0], *told[1]}) == 2 * 4 * 2 + 1  # a rollout's last turn has none
    assert [_told(played(boxes(), stream=stream)) for stream in ("train/0", "train/1")] == told


def test_the_answer_of_the_try_that_counted_is_replayed(
    boxes: Callable[..., Toolbox], played: Callable[..., list[Group]], caplog: pytest.LogCaptureFixture
) -> None:
    inner = NeverTheSame()
    inner.fails = {4, 8}  # the second call of two rollouts, whose first one was recorded
    with caplog.at_level(logging.WARNING):
        told = _told(played(boxes(inner), at_once=1))
    assert [record.getMessage().endswith("try 1: the server is gone") for record in caplog.records] == [True, True]
    assert len(inner.calls) == 2 * 4 + 2 * 2
    assert _told(played(boxes())) == told


def test_a_missing_answer_ends_the_run_and_is_no_outcome(
    boxes: Callable[..., Toolbox], played: Callable[..., list[Group]]
) -> None:
    played(boxes(NeverTheSame()))
    with pytest.raises(RecordingError, match=r"no answer for python\(.*of rows\.parquet:\d, rollout \d; replay"):
        played(boxes(), ask=_ASK.replace("time", "math"))


def test_a_rollout_that_our_failure_ended_cannot_be_replayed_as_another(
    boxes: Callable[..., Toolbox], played: Callable[..., list[Group]]
) -> None:
    inner = NeverTheSame()
    inner.failing = 100
    groups = played(boxes(inner))
    assert {rollout.outcome for group in groups for rollout in group.rollouts} == {Outcome.INFRASTRUCTURE_ERROR}
    with pytest.raises(RecordingError, match="no answer for python"):
        played(boxes())


def test_fakes_and_sessions_of_no_rollout_can_be_recorded(boxes: Callable[..., Toolbox]) -> None:
    assert PLAYED.get() == NOBODY
    image = ImageBlob.of(b"png")
    box = boxes(FakeToolbox([Observation("one <image>", (image,)), Observation("two", outcome=Outcome.TOOL_ERROR)]))

    async def run(box: Toolbox) -> list[ToolResult | Observation]:
        session = box.session(())
        return [await session.call("python", {"code": "1"}) for _ in range(2)]

    told = asyncio.run(run(box))
    assert told == [Observation("one <image>", (image,)), Observation("two", outcome=Outcome.TOOL_ERROR)]
    assert asyncio.run(run(boxes())) == told
