"""Has nodes play a benchmark's prompts, and stores the replies as they come."""

from __future__ import annotations

import asyncio
import hashlib
import json
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metis_fast.config import Config, deciding
from metis_fast.errors import ConfigError
from metis_fast.evaluate.promptset import PromptSet
from metis_fast.evaluate.replies import Reply, ReplyFile, line, write_whole
from metis_fast.evaluate.result import folder_name
from metis_fast.run.fleet import Fleet
from metis_fast.summary import Job
from metis_fast.tools.server.settings import contents_of
from metis_fast.train.protocol import GroupsLost
from metis_fast.types import Group, Outcome

_READING = ("*.json", "*.jinja", "*.txt")


def place_of(config: Config, prompt_set: PromptSet, step: int | None) -> Path:
    """The folder of a benchmark's replies and result. step: of training, None: of `benchmark run`."""
    folder = config.run.dir / "benchmarks"
    folder = folder if step is None else folder / f"step-{step:06d}"
    return folder / folder_name(prompt_set.benchmark.name, config.benchmark.tools)


def weights_of(config: Config, step: int | None) -> dict[str, Any]:
    """Whose replies these are. Weights of a folder are known by names, sizes and times of their files; what reads texts and
    images with them (configs, tokenizer, chat template), by what is in it."""
    path = config.model.path
    if step is not None:
        return {"model": str(path), "step": step}
    files = sorted(path.glob("*.safetensors"))
    stamps = [[file.name, (status := file.stat()).st_size, status.st_mtime_ns] for file in files]
    others = sorted(file for ending in _READING for file in path.glob(ending))
    digests = {file.name: hashlib.sha256(file.read_bytes()).hexdigest()[:16] for file in others}
    return {"model": str(path), "files": stamps, "reading": digests}


def tool_files(config: Config, step: int | None) -> dict[str, str]:
    """What the tools read, by content: one second for 1.5 GB. Empty while a run trains: its own record says it."""
    return {} if config.benchmark.tools == "off" or step is not None else contents_of(config.tools)


def how_played(config: Config, prompt_set: PromptSet, step: int | None, files: Mapping[str, str]) -> dict[str, Any]:
    """All that replies follow from, as JSON. files: of the tools."""
    own, rollout = config.benchmark, config.rollout
    decoding = {name: getattr(own, name) for name in ("temperature", "top_p", "top_k", "rollouts")}
    limits = ("max_prompt_tokens", "max_response_tokens", "max_turn_tokens", "max_observation_tokens", "max_turns")
    decoding |= {name: getattr(rollout, name) for name in ("protocol", "engine", *limits)}
    return {
        "benchmark": prompt_set.benchmark.name,
        "weights": weights_of(config, step),
        "md5": [file.md5 for file in prompt_set.files],
        **prompt_set.asked,
        "decoding": decoding | {"seed": config.run.seed},
        "model": deciding(config.model),
        "tool_settings": {} if own.tools == "off" else deciding(config.tools),
        "tool_files": dict(files),
    }


@dataclass(frozen=True, slots=True)
class Table:
    """A benchmark that is being played: its questions, where its rows begin among those of the nodes, and what is there."""

    prompt_set: PromptSet
    first: int
    folder: Path
    replies: ReplyFile


def open_table(config: Config, prompt_set: PromptSet, first: int, step: int | None, files: Mapping[str, str]) -> Table:
    """The folder of a benchmark, new or begun before. files: `tool_files`, which are the same for all benchmarks.

    Raises:
        ConfigError: it holds replies that were made otherwise.
        DataError: it cannot be read.
    """
    folder = place_of(config, prompt_set, step)
    folder.mkdir(parents=True, exist_ok=True)
    settings = json.loads(json.dumps(how_played(config, prompt_set, step, files)))
    path = folder / "settings.json"
    if (folder / "replies.jsonl").exists() and path.exists():
        before = json.loads(path.read_text(encoding="utf-8"))
        if differing := sorted(_differences(before, settings)):
            raise ConfigError(
                f"{folder} holds replies that were made with another {', '.join(differing)}; move the folder away to begin "
                "anew, or set another run.dir"
            )
    write_whole(path, json.dumps(settings, indent=1) + "\n")
    indices = [question.index for question in prompt_set.questions]
    return Table(prompt_set, first, folder, ReplyFile(folder, indices, config.benchmark.rollouts))


def _differences(one: object, other: object, name: str = "") -> Iterator[str]:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in {*one, *other}:
            yield from _differences(one.get(key), other.get(key), f"{name}.{key}" if name else key)
    elif one != other:
        yield name


class Play:
    """Plays what a table lacks. tick: told of rollouts that have ended.

    Where a batch decides bits (the native engine, `rollout.deterministic`), rows are played in blocks that are always the same,
    so that an interrupted run and one that was not leave the same bytes. Elsewhere a row begins as soon as there is room.
    """

    def __init__(self, fleet: Fleet, config: Config, table: Table, tick: Callable[[int], object]) -> None:
        self._fleet, self._config, self._table, self._tick = fleet, config, table, tick
        self._rollouts = config.benchmark.rollouts
        self._session, self._began = secrets.token_hex(4), time.monotonic()
        benchmark = table.prompt_set.benchmark.name
        self._stream = f"benchmark/{benchmark}"

    async def run(self) -> None:
        """Until each question has its replies, or our machinery failed at it."""
        (self._table.folder / "failures.jsonl").unlink(missing_ok=True)  # they are tried again now
        missing = self._table.replies.missing()
        if not missing:
            return
        rollout, nodes = self._config.rollout, len(self._fleet.nodes)
        room = max(1, rollout.max_concurrent // self._rollouts)
        if rollout.engine == "native" and rollout.deterministic and rollout.mode == "sync":
            await self._in_blocks(missing, room * nodes)
        else:
            await self._side_by_side(missing, room + nodes)

    def _job(self, number: int) -> Job:
        return Job("benchmark", self._table.first + number, self._stream, number * self._rollouts)

    async def _in_blocks(self, missing: Sequence[int], size: int) -> None:
        total = len(self._table.prompt_set.questions)
        for block in sorted({number // size for number in missing}):
            numbers = range(block * size, min((block + 1) * size, total))
            done = False
            while not done:
                groups = await self._fleet.play_all([self._job(number) for number in numbers], self._tick)
                try:
                    fetched = await asyncio.to_thread(self._fleet.fetch, groups)
                    self._store(numbers, fetched)
                    done = True
                except GroupsLost:  # with their node; all are played again
                    self._tick(-len(numbers) * self._rollouts)
                finally:
                    self._fleet.drop(groups)

    async def _side_by_side(self, missing: Sequence[int], at_once: int) -> None:
        numbers = iter(missing)

        async def play() -> None:
            for number in numbers:
                await self._one(number)
                self._tick(self._rollouts)

        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(min(at_once, len(missing))):
                    tasks.create_task(play())
        except BaseExceptionGroup as group:
            raise group.exceptions[0] from None  # the others were cancelled because of the first

    async def _one(self, number: int) -> None:
        while True:
            group = await self._fleet.play(self._job(number), lambda: None)
            try:
                self._store([number], await asyncio.to_thread(self._fleet.fetch, [group]))
                return
            except GroupsLost:  # with its node
                continue
            finally:
                self._fleet.drop([group])

    def _store(self, numbers: Sequence[int], groups: Sequence[Group]) -> None:
        """What was answered; a rollout that our machinery broke off is no reply."""
        folder, questions = self._table.folder, self._table.prompt_set.questions
        replies: list[Reply] = []
        failures: list[str] = []
        tool_s = 0.0
        for number, group in zip(numbers, groups, strict=True):
            index = questions[number].index
            for rollout in group.rollouts:
                tool_s += sum(turn.tool_s for turn in rollout.turns)
                if rollout.outcome is Outcome.INFRASTRUCTURE_ERROR:
                    failures.append(line({"index": index, "rollout": rollout.index, "error": rollout.error}))
                else:
                    replies.append(Reply.of(index, rollout))
        self._table.replies.add(replies)
        _append(folder / "failures.jsonl", "".join(failures))
        at_s = round(time.monotonic() - self._began, 3)
        time_line = {"session": self._session, "at_s": at_s, "questions": len(numbers), "tool_s": round(tool_s, 3)}
        _append(folder / "times.jsonl", line(time_line))


def _append(path: Path, text: str) -> None:
    if text:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
