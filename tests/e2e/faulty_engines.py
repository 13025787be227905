"""Scripted engines with faults, opened as a run opens them, and a direct transfer that is pretended."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import ClassVar, TypeVar

from scripted import ForkLauncher, ScriptedEngines
from torch import Tensor

from metis_fast.config import Config
from metis_fast.model import Policy
from metis_fast.rollout.chat import Chat
from metis_fast.rollout.engine import update
from metis_fast.rollout.episode import collect
from metis_fast.rollout.vllm.direct import Ask, Client
from metis_fast.rollout.vllm.staged import StagedWeights
from metis_fast.score.judge import open_judge
from metis_fast.score.scoring import score_groups
from metis_fast.sync.manifest import Manifest
from metis_fast.sync.staging import Staging
from metis_fast.testing.fakes import FakeToolbox
from metis_fast.testing.faults import EngineState, Faults, Script, flip_staged
from metis_fast.types import Group, Observation, Outcome, Prompt
from metis_fast.workers.hub import Hub

T = TypeVar("T")
LIMIT_S = 60.0
_CALL = 'Let me look that up. <tool_call>{"name": "python", "arguments": {"code": "print(%d)"}}</tool_call>'
_ANSWER = "The tool says so. <answer>Paris</answer><|im_end|>"


class Engines:
    """Scripted engines with faults, opened as a run opens them. transport: of weights; those of vLLM's own are
    `PretendedTransfer`s."""

    def __init__(
        self,
        folder: Path,
        policy: Policy,
        chat: Chat,
        stack: ExitStack,
        silence_s: float,
        transport: str = "staged",
        **vllm: float,
    ) -> None:
        self.faults = Faults(folder / "faults")
        turns = [[policy.tokenizer.encode(_CALL % n) for n in range(2)], [policy.tokenizer.encode(_ANSWER)]]
        Script(turns, turn_start=policy.tokenizer.convert_tokens_to_ids("<|im_start|>")).write(folder / "faults")  # pyright: ignore[reportArgumentType]
        settings = {"replicas": 2, "request_s": 30.0, "stall_s": 1.0, "arguments": {"faults": str(folder / "faults")}}
        self.config = Config.model_validate(
            {
                "model": {"path": policy.folder, "dtype": "float32"},
                "rollout": {
                    "engine": "vllm",
                    "vllm": settings | vllm,
                    "max_response_tokens": 512,
                    "max_concurrent": 6,
                    "deterministic": False,
                },
                "sync": {"transport": transport},
                "workers": {"silence_s": silence_s, "start_s": 30.0},
            }
        )
        self.policy, self.chat = policy, chat
        self.toolbox = FakeToolbox([Observation("it is Paris")])
        self.hub = stack.enter_context(Hub(self.config.workers, ForkLauncher(folder / "logs")))
        self.engine = ScriptedEngines(self.config, policy, self.hub)
        stack.callback(self.engine.close)
        self.engine.wait(lambda: None)

    def weights(self, version: int) -> Iterator[tuple[str, Tensor]]:
        """Other ones for every version."""
        for name, parameter in self.policy.model.named_parameters():
            yield name, parameter.detach() + version

    async def update(self, version: int) -> int:
        """Push weights as a run does; returns how often one had to be sent again."""
        report = await update(self.engine, lambda: self.weights(version), version, self.config.sync.retries)
        assert report.version == version
        return report.retries

    @property
    def staging(self) -> Staging:
        """The engines' own."""
        assert isinstance(self.engine.weights, StagedWeights) and self.engine.weights.staging is not None
        return self.engine.weights.staging

    def flip(self) -> None:
        """Change a bit of the staged version."""
        assert self.staging.current is not None
        flip_staged(self.staging.current.to_dict())

    def flip_next(self, times: int) -> None:
        """Likewise, of versions that are staged from here on, before an engine sees them."""
        write = self.staging.write
        left = [times]

        def damaged(weights: Iterator[tuple[str, Tensor]], version: int) -> Manifest:
            manifest = write(weights, version)
            if left[0]:
                left[0] -= 1
                self.flip()
            return manifest

        self.staging.write = damaged  # pyright: ignore[reportAttributeAccessIssue]

    async def collect(self, prompts: Sequence[Prompt], repeats: int = 4) -> list[Group]:
        """Play the real episodes."""
        return await collect(prompts, repeats, self.chat, self.engine, self.toolbox, self.config.rollout, 0, "train/0")

    async def states(self) -> list[EngineState]:
        """Of the replicas, once they are all up."""
        return [await worker.call("state") for worker in self.engine.workers()]

    def check(self, groups: Sequence[Group], prompts: Sequence[Prompt], versions: set[int], repeats: int = 4) -> None:
        """Every prompt has all its rollouts, each whole, with its tool called once and a reward that it has earned."""
        assert [group.prompt.uid for group in groups] == [prompt.uid for prompt in prompts]
        assert len(self.toolbox.calls) == repeats * len(prompts) and self.toolbox.num_open == 0
        judge = open_judge(self.config.score, {"rule"})
        scored = asyncio.run(score_groups(groups, judge, self.config))
        for group in scored:
            assert [rollout.index for rollout in group.rollouts] == list(range(repeats))
            for rollout, score in zip(group.rollouts, group.scores, strict=True):
                assert rollout.outcome is Outcome.ANSWERED, rollout.error
                assert rollout.turns[0].text in (_CALL % 0, _CALL % 1)
                assert [turn.text for turn in rollout.turns][1:] == [_ANSWER.removesuffix("<|im_end|>")]
                assert set(rollout.weight_version[rollout.sampled].tolist()) <= versions
                assert (rollout.logp[rollout.sampled] == -1).all()
                assert score.verdict is not None and score.verdict.correct and score.r_tool == 0.5

    async def checked_replicas(self, version: int, restarts: int) -> None:
        """All are up, with the weights that were staged last."""
        states = await self.states()
        assert self.engine.restarts == restarts
        assert {state.version for state in states} == {version}
        assert len({state.digest for state in states}) == 1


Open = Callable[..., Engines]


class PretendedTransfer:
    """`DirectTransfer` that asks the engines as vLLM's does, and moves nothing: a scripted engine has no weights.

    opened: all of a test, in order.
    """

    opened: ClassVar[list[PretendedTransfer]] = []

    def __init__(self, transport: str, host: str, ask: Ask, engines: int, ranks: int, largest: int) -> None:
        assert largest > 0
        self.host, self.engines, self.closed = host, engines, False
        self._client = Client(ask, engines, ranks)
        self._client.init_weight_transfer_engine({"rank_offset": 1})
        self.opened.append(self)

    def send(self, pairs: Sequence[tuple[str, Tensor]], version: int) -> None:
        """See `DirectTransfer.send`."""
        assert pairs
        self._client.version = version
        self._client.start_weight_update()
        self.amid()
        self._client.finish_weight_update()

    def amid(self) -> None:
        """Called in the middle of every transfer."""

    def close(self) -> None:
        """See `DirectTransfer.close`."""
        self.closed = True


def run(awaitable: Awaitable[T]) -> T:
    """Nothing waits for ever."""

    async def limited() -> T:
        return await asyncio.wait_for(awaitable, LIMIT_S)

    return asyncio.run(limited())
