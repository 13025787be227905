"""Replies to a benchmark's questions, stored as they come: JSON lines, one a rollout.

A process that is killed leaves whole lines and, at the most, one that is cut, which goes. Once all are there they are put into
the order of the questions, so that an interrupted run leaves the same bytes as one that was not.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from metis_fast.errors import DataError, one_line
from metis_fast.scratch import replaced
from metis_fast.serve.reply import content_of
from metis_fast.types import Outcome, Rollout

_NAME = 100  # characters of what an agent calls a tool


@dataclass(frozen=True, slots=True)
class Reply:
    """What an agent said to a question.

    index: of the question; rollout: from 0. text: all that the agent wrote. prediction: its final answer, as `metis-fast serve`
    gives it. calls: tool -> times ("" for calls that could not be read). weight_versions: of the tokens. Tokens are counted.
    """

    index: str
    rollout: int
    text: str
    prediction: str
    calls: Mapping[str, int]
    tool_errors: int
    outcome: str
    prompt_tokens: int
    sampled_tokens: int
    observation_tokens: int
    weight_versions: tuple[int, ...]

    @staticmethod
    def of(index: str, rollout: Rollout) -> Reply:
        """Of a rollout that was played to its end."""
        versions = sorted(set(rollout.weight_version[rollout.sampled].tolist()))
        return Reply(
            index=index,
            rollout=rollout.index,
            text=rollout.response_text,
            prediction=content_of(rollout, raw=False, stop=()),
            calls=dict(sorted(Counter(turn.call.name[:_NAME] for turn in rollout.turns if turn.call is not None).items())),
            tool_errors=sum(turn.outcome is Outcome.TOOL_ERROR for turn in rollout.turns),
            outcome=str(rollout.outcome),
            prompt_tokens=rollout.prompt_len,
            sampled_tokens=rollout.num_sampled,
            observation_tokens=rollout.num_tokens - rollout.prompt_len - rollout.num_sampled,
            weight_versions=tuple(versions),
        )

    @property
    def num_calls(self) -> int:
        """Tool calls, failed ones included."""
        return sum(self.calls.values())


def line(record: Mapping[str, Any]) -> str:
    """A record as one line of JSON, in ASCII: what an agent writes may hold half of a character, which no file does."""
    return json.dumps(record) + "\n"


def read_lines(path: Path, mend: bool = False) -> list[dict[str, Any]]:
    """The records of a file of JSON lines; none where there is no file. mend: cut off a last line that has no end.

    Raises:
        DataError: a whole line is no JSON object.
    """
    if not path.exists():
        return []
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if mend and end < len(data):
        with path.open("r+b") as file:
            file.truncate(end)
    records = []
    for number, raw in enumerate(data[:end].splitlines(), 1):
        try:
            record = json.loads(raw)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: {one_line(error)}; remove the line, and run again") from None
        if not isinstance(record, dict):
            raise DataError(f"{path}, line {number}: expected an object, got {type(record).__name__}; remove the line")
        records.append(record)
    return records


class ReplyFile:
    """The replies of one benchmark, in a folder.

    indices: of the questions, in their order. rollouts: replies to each.
    """

    def __init__(self, folder: Path, indices: Sequence[str], rollouts: int) -> None:
        """Raises DataError: the file holds something else."""
        self._path = folder / "replies.jsonl"
        self._place = {index: number for number, index in enumerate(indices)}
        self._rollouts = rollouts
        self._replies: dict[tuple[int, int], Reply] = {}
        for number, record in enumerate(read_lines(self._path, mend=True), 1):
            try:
                versions = tuple(record.pop("weight_versions"))
                reply = Reply(**record, weight_versions=versions)
                place = (self._place[reply.index], reply.rollout)
            except (TypeError, KeyError) as error:
                raise DataError(
                    f"{self._path}, line {number}: expected a reply to a question of this benchmark, got {one_line(error)}; "
                    "move the folder away, or set another run.dir"
                ) from None
            self._replies[place] = reply

    def missing(self) -> list[int]:
        """Numbers of the questions that lack a reply."""
        return [
            number
            for number in self._place.values()
            if any((number, rollout) not in self._replies for rollout in range(self._rollouts))
        ]

    def add(self, replies: Iterable[Reply]) -> None:
        """Store what is not there yet."""
        new = []
        for reply in replies:
            place = (self._place[reply.index], reply.rollout)
            if place not in self._replies:
                self._replies[place] = reply
                new.append(line(asdict(reply)))
        if new:
            with self._path.open("a", encoding="utf-8") as file:
                file.write("".join(new))

    def __iter__(self) -> Iterator[Reply]:
        """In the order of the questions."""
        return (self._replies[place] for place in sorted(self._replies))

    def __len__(self) -> int:
        return len(self._replies)

    def finish(self) -> None:
        """Put the file into the order of the questions."""
        write_whole(self._path, "".join(line(asdict(reply)) for reply in self))


def write_whole(path: Path, text: str) -> None:
    """Replace a file at once, where it is not that already."""
    data = text.encode()
    if path.exists() and path.read_bytes() == data:
        return
    with replaced(path) as scratch:
        scratch.write_bytes(data)


def seconds_of(folder: Path) -> dict[str, float]:
    """Seconds that playing took, over all its sessions, and seconds in tools, over all rollouts."""
    last: dict[str, float] = {}
    tool_s = 0.0
    for record in read_lines(folder / "times.jsonl", mend=True):
        last[record["session"]] = max(last.get(record["session"], 0.0), record["at_s"])
        tool_s += record["tool_s"]
    return {"playing": round(sum(last.values()), 3), "in_tools": round(tool_s, 3)}
