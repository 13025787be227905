"""vLLM engines that fail where a test, or somebody who tries out a cluster, asks for it.

`FaultyVllm` is the real service; `ScriptedVllm` has a script in place of vLLM's engine, and everything around it is real: the
worker's process, its engine thread and watchdog, images, in-flight updates, and the verification of weights. Both find their
faults in a folder, `rollout.vllm.arguments={faults: FOLDER}`: a fault is a file there, and whichever engine comes to the point
where it can happen removes the file and fails, once.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from metis_fast.errors import SyncError
from metis_fast.rollout.vllm.service import VllmService
from metis_fast.rollout.vllm.settings import EngineSettings, EngineStats, GenerateReply, GenerateRequest

_ARGUMENT = "faults"
_FOREVER_S = 3600.0


class Fault(StrEnum):
    """What can happen, by where it does."""

    NO_START = "no-start"  # when the engine is made: the process ends

    KILL = "kill"  # in a step: SIGKILL
    STOP = "stop"  # SIGSTOP
    EXIT = "exit"
    RAISE = "raise"
    HANG = "hang"  # the engine's thread waits for ever
    BLOCK = "block"  # and keeps Python's lock, so that no ping is answered
    SLOW = "slow"  # from here on, every step of this engine takes a fifth of a second

    REFUSE = "refuse"  # a request raises what is no error of ours
    FORGET = "forget"  # all images

    NAN = "nan"  # of an answer, its first log-prob
    POSITIVE = "positive"
    OUTSIDE = "outside"  # its last token is none of the vocabulary
    PLACEHOLDER = "placeholder"  # it holds an image placeholder
    TOO_MANY = "too-many"  # tokens
    NOTHING = "nothing"  # it has no token
    SHORT = "short"  # it lacks a log-prob
    NO_ARRAY = "no-array"  # its tokens are a list
    NO_REPLY = "no-reply"  # it is no answer at all
    WRONG_END = "wrong-end"  # it says that it was cut off where it stopped
    ABORTED = "aborted"  # it ended for another reason
    FUTURE = "future"  # its weights are of a version that nobody has

    MISREAD = "misread"  # an engine reads another bit than was staged
    NO_SPACE = "no-space"  # it has no room for what was staged
    DAMAGE = "damage"  # a bit of the staged version changes, after it was staged
    KILL_LOADING = "kill-loading"  # SIGKILL while weights are loaded
    HANG_LOADING = "hang-loading"


class Faults:
    """The faults in a folder, which is made."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def arm(self, fault: Fault, times: int = 1) -> None:
        """Let it happen so many times."""
        for _ in range(times):
            (self._folder / f"{fault}.{uuid4().hex}").touch()

    def armed(self) -> list[str]:
        """Those that have not happened yet."""
        return sorted(path.stem for path in self._folder.glob("*.*"))

    def clear(self) -> None:
        """Let none happen any more."""
        for path in self._folder.glob("*.*"):
            path.unlink(missing_ok=True)

    def take(self, fault: Fault) -> bool:
        """Whether it happens here and now. Of several processes that ask, one is told so."""
        for path in self._folder.glob(f"{fault}.*"):
            with suppress(FileNotFoundError):
                path.unlink()
                return True
        return False


class FaultyVllm(VllmService):
    """The real engine, with faults."""

    def __init__(self, settings: EngineSettings) -> None:
        arguments = dict(settings.arguments)
        self._faults = Faults(Path(str(arguments.pop(_ARGUMENT))))
        self._slow = False
        if self._faults.take(Fault.NO_START):
            os._exit(3)
        super().__init__(replace(settings, arguments=arguments))

    def _step(self) -> list[Any]:
        take = self._faults.take
        if take(Fault.KILL):
            os.kill(os.getpid(), signal.SIGKILL)
        if take(Fault.STOP):
            os.kill(os.getpid(), signal.SIGSTOP)
        if take(Fault.EXIT):
            os._exit(9)
        if take(Fault.RAISE):
            raise RuntimeError("as asked")
        if take(Fault.HANG):
            time.sleep(_FOREVER_S)
        if take(Fault.BLOCK):
            sum(range(1 << 60))
        self._slow = self._slow or take(Fault.SLOW)
        if self._slow:
            time.sleep(0.2)
        return super()._step()

    def _resolve(self, future: asyncio.Future[Any], result: Any) -> None:
        super()._resolve(future, self._spoiled(result) if isinstance(result, GenerateReply) else result)

    def _spoiled(self, reply: GenerateReply) -> Any:
        take, tokens, logp = self._faults.take, reply.tokens, reply.logp
        if take(Fault.NAN):
            return replace(reply, logp=np.concatenate([[np.float32("nan")], logp[1:]]).astype(np.float32))
        if take(Fault.POSITIVE):
            return replace(reply, logp=-logp + 1)
        if take(Fault.OUTSIDE):
            return replace(reply, tokens=np.append(tokens[:-1], np.int32(1 << 30)))
        if take(Fault.PLACEHOLDER):
            return replace(reply, tokens=np.append(np.int32(self._settings.image_pad), tokens[1:]))
        if take(Fault.TOO_MANY):
            many = 1 + self._settings.max_tokens // len(tokens)
            return replace(reply, tokens=np.tile(tokens, many), logp=np.tile(logp, many), version=np.tile(reply.version, many))
        if take(Fault.NOTHING):
            return replace(reply, tokens=tokens[:0], logp=logp[:0], version=reply.version[:0])
        if take(Fault.SHORT):
            return replace(reply, logp=logp[1:])
        if take(Fault.NO_ARRAY):
            return replace(reply, tokens=tokens.tolist())
        if take(Fault.NO_REPLY):
            return {"text": "Paris"}
        if take(Fault.WRONG_END):
            return replace(reply, finish="length" if reply.finish == "stop" else "stop")
        if take(Fault.ABORTED):
            return replace(reply, finish="abort")
        if take(Fault.FUTURE):
            return replace(reply, version=reply.version + 1000)
        return reply

    async def generate(self, request: GenerateRequest) -> GenerateReply:
        """See `VllmService.generate`."""
        if self._faults.take(Fault.REFUSE):
            raise RuntimeError("as asked")
        if request.spans and self._faults.take(Fault.FORGET):
            self._images.clear()
        return await super().generate(request)

    async def load_staged(self, manifest: dict[str, Any]) -> float:
        """See `VllmService.load_staged`."""
        take = self._faults.take
        if take(Fault.NO_SPACE):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if take(Fault.DAMAGE):
            flip_staged(manifest)
        misread = take(Fault.MISREAD)
        if misread:
            flip_staged(manifest)
        try:
            return await super().load_staged(manifest)
        finally:
            if misread:
                flip_staged(manifest)

    def _load(self, update: dict[str, Any], version: int) -> float:
        if self._faults.take(Fault.HANG_LOADING):
            time.sleep(_FOREVER_S)
        return super()._load(update, version)


def flip_staged(manifest: Mapping[str, Any]) -> None:
    """Change a bit in the middle of a staged version; a second time, change it back."""
    from metis_fast.sync.segment import FOLDER, HEADER

    at = HEADER + sum(nbytes for _, nbytes, _ in manifest["buckets"]) // 2
    with (FOLDER / manifest["segment"]).open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 1]))


@dataclass(frozen=True, slots=True)
class Script:
    """What a `ScriptedVllm` says.

    turns: of each message of a rollout (the last entry, for all that follow), what may be sampled, as token ids; a request's
    seed picks one. turn_start: token that begins every message, the agent's and others'. step_s, step_tokens: of every step.
    """

    turns: Sequence[Sequence[Sequence[int]]]
    turn_start: int
    step_s: float = 0.01
    step_tokens: int = 4

    def write(self, folder: Path) -> None:
        """Where the engines look for it."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "script").write_text(json.dumps(asdict(self)))

    @staticmethod
    def read(folder: Path) -> Script:
        """What `write` has left."""
        return Script(**json.loads((folder / "script").read_text()))

    def message(self, tokens: Sequence[int], seed: int) -> Sequence[int]:
        """What follows; every message before it has an answer of somebody else."""
        number = (list(tokens).count(self.turn_start) - 2) // 2  # a system's, or none, then the user's and the agent's
        choices = self.turns[min(number, len(self.turns) - 1)]
        return choices[seed % len(choices)]


@dataclass(frozen=True, slots=True)
class EngineState:
    """Of a `ScriptedVllm`. digest: of the weights' manifest, "" before any came. asked: messages that it was asked for."""

    pid: int
    version: int
    digest: str
    asked: int
    stats: EngineStats


class ScriptedVllm(FaultyVllm):
    """Plays a `Script` from the faults' folder."""

    def __init__(self, settings: EngineSettings) -> None:
        folder = Path(str(settings.arguments[_ARGUMENT]))
        self._llm = _ScriptedLLM(Script.read(folder), Faults(folder))
        super().__init__(settings)

    def _open_engine(self) -> Any:
        return self._llm

    def _shut_down(self) -> None:
        pass

    def _prompt(self, request: GenerateRequest) -> Any:
        # images are decoded as for vLLM, which then repeats their placeholders
        return {**super()._prompt(request), "prompt_token_ids": request.tokens.tolist()}

    def _params(self, request: GenerateRequest) -> Any:
        return request

    async def state(self) -> EngineState:
        """What it has been through."""
        return EngineState(os.getpid(), int(self._llm.version), self._llm.digest, self._number, await self.stats())


@dataclass(slots=True)
class _Sampled:
    """As vLLM's `CompletionOutput`."""

    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, _LogProb]] = field(default_factory=list)
    weight_versions: list[_VersionSpan] = field(default_factory=list)
    finish_reason: str | None = None


@dataclass(frozen=True, slots=True)
class _LogProb:
    logprob: float


@dataclass(frozen=True, slots=True)
class _VersionSpan:
    start: int
    end: int
    version: str


@dataclass(slots=True)
class _Output:
    """As vLLM's `RequestOutput`."""

    request_id: str
    prompt_token_ids: list[int]
    outputs: list[_Sampled]
    finished: bool = False


class _ScriptedLLM:
    """What of vLLM's `LLMEngine` the service uses."""

    def __init__(self, script: Script, faults: Faults) -> None:
        self.version, self.digest = "0", ""
        self._script, self._faults = script, faults
        self._running: dict[str, tuple[GenerateRequest, _Output]] = {}
        self._newest: int | None = None

    def add_request(self, request_id: str, prompt: Mapping[str, Any], request: GenerateRequest) -> None:
        self._running[request_id] = (request, _Output(request_id, prompt["prompt_token_ids"], [_Sampled()]))

    def abort_request(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self._running.pop(request_id, None)

    def step(self) -> list[_Output]:
        time.sleep(self._script.step_s)
        outputs = [output for request, output in self._running.values() if self._advance(request, output) or True]
        self._running = {key: value for key, value in self._running.items() if not value[1].finished}
        return outputs

    def _advance(self, request: GenerateRequest, output: _Output) -> None:
        (sampled,) = output.outputs
        message = self._script.message(request.tokens.tolist(), request.seed)
        start = len(sampled.token_ids)
        new = list(message[start : min(start + self._script.step_tokens, request.max_tokens)])
        sampled.token_ids += new
        sampled.logprobs += [{token: _LogProb(-1.0)} for token in new]
        sampled.weight_versions.append(_VersionSpan(start, start + len(new), self.version))
        if sampled.token_ids[-1] in request.stop_ids:
            sampled.finish_reason, output.finished = "stop", True
        elif len(sampled.token_ids) in (request.max_tokens, len(message)):
            sampled.finish_reason, output.finished = "length", True

    def collective_rpc(self, method: str, args: tuple[Any, ...] = ()) -> list[str]:
        if method != "load_staged":
            return []
        try:
            self._load_staged(*args)
        except SyncError as error:
            return [str(error)]
        return [""]

    def _load_staged(self, update: Mapping[str, Any]) -> None:
        from metis_fast.sync.manifest import Manifest
        from metis_fast.sync.reader import Reader

        manifest = Manifest.from_dict(update)
        reader = Reader(manifest, self._newest)
        if self._faults.take(Fault.KILL_LOADING):
            os.kill(os.getpid(), signal.SIGKILL)
        for _ in reader:
            pass
        reader.check_unchanged()
        self._newest, self.digest = manifest.version, manifest.digest

    def set_weight_version(self, version: str) -> None:
        self.version = version

    def sleep(self, level: int, mode: str) -> None:
        pass

    def wake_up(self, tags: Sequence[str] = ()) -> None:
        pass

    def reset_prefix_cache(self, reset_running_requests: bool) -> None:
        pass

    def reset_encoder_cache(self) -> None:
        pass
