"""The main job on real vLLM engines, with images and tools: what they sample is what the trainer takes it for."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from io import BytesIO
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from harness import PROGRAM, Command
from jobs import Job
from pictures import MODES, TRANSPARENT, WIDE, encoded, turned
from PIL import Image

from metis_fast.config import load
from metis_fast.data.cursor import prompt_cursor
from metis_fast.data.parquet import PromptFiles
from metis_fast.errors import EngineError, EngineFailure, SyncError
from metis_fast.node.node import Node
from metis_fast.rollout.engine import Completion, Sampling
from metis_fast.rollout.episode import Trace
from metis_fast.rollout.gate import choose
from metis_fast.rollout.store import StoredRollout, read_rollouts
from metis_fast.rollout.vllm.engine import VllmEngine
from metis_fast.rollout.vllm.staged import StagedWeights
from metis_fast.run import pipeline
from metis_fast.run.assembly import open_parts
from metis_fast.run.interrupt import Interrupts
from metis_fast.run.parts import Parts
from metis_fast.testing.faults import flip_staged
from metis_fast.types import ImageBlob, Outcome, Prompt, Rollout

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed")

_VLLM = ["rollout.engine=vllm", "rollout.vllm.cpu_threads=1", "rollout.deterministic=false"]
_SHORT = ["data.heldout=[]", "eval.every=0", "log.progress=false", "log.tensorboard=false"]
_GAP = {"bfloat16": 2e-2, "float32": 1e-4}
_PER_STEP = 4 * 4  # rollouts, of small.yaml


def _metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def _stored(folder: Path) -> list[list[StoredRollout]]:
    """Of every step."""
    return [list(read_rollouts(part)) for part in sorted((folder / "rollouts").glob("step-*.parquet"))]


def check(folder: Path, steps: int, staleness: int = 0, tools: bool = True) -> None:
    """A finished run: each step with all its rollouts, of weights that are recent enough, and engine and trainer agree."""
    records, stored, dtype = _metrics(folder), _stored(folder), load(folder / "config.yaml").model.dtype
    assert not tools or any(
        update["engine_gap"] > 0 for record in records for update in record["updates"]
    )  # 0 where nothing is to learn
    assert [record["step"] for record in records] == list(range(steps))
    for step, (record, members) in enumerate(zip(records, stored, strict=True)):
        gaps = [update["engine_gap"] for update in record["updates"]]
        # the trainer's weights are those of the step; what older ones sampled differs by the updates between
        assert len(record["staleness"]) > 1 or all(gap < _GAP[dtype] for gap in gaps), gaps
        assert record["sync_bytes"] > 0 and len(record["staleness"]) <= staleness + 1
        assert len(members) == _PER_STEP
        for one in members:
            versions = one.rollout.weight_version[one.rollout.sampled]
            assert step - staleness <= versions.min() and versions.max() <= step
            assert one.score.verdict is not None
    rollouts = [one.rollout for members in stored for one in members]
    assert any(rollout.images for rollout in rollouts)
    assert not tools or any(turn.outcome is Outcome.TOOL_RESULT for rollout in rollouts for turn in rollout.turns)


@pytest.fixture(scope="module")
def opened(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parts]:
    """The parts of a run with a vLLM engine, which takes its time to start, so that the tests of this module share them, in
    order."""
    folder = tmp_path_factory.mktemp("vllm") / "run"
    config = load(demo / "config.yaml", [*_VLLM, *_SHORT, f"run.dir={folder}", "train.steps=2"])
    with Interrupts() as interrupts, open_parts(config, interrupts) as parts:
        yield parts


@pytest.fixture
def prompts(opened: Parts) -> list[Prompt]:
    """One with an image, one without."""
    files = PromptFiles(opened.config.data.train)
    both = choose(prompt_cursor(files, 0, shuffle=False).next(len(files)), 2)
    assert both[0].images and not both[1].images
    return both


class Sampler:
    """Messages of the engine, and what the trainer says of them."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        (node,) = parts.fleet.nodes
        assert isinstance(node, Node) and isinstance(node.engine, VllmEngine)
        self.chat, self.engine = node.chat, node.engine

    async def _one(self, prompt: Prompt, order: int, sampling: Sampling) -> tuple[Rollout, Completion]:
        piece = self.chat.encode_prompt(prompt)
        trace = Trace(len(piece.tokens), list(piece.tokens), list(piece.images), list(piece.spans))
        session = self.engine.session(order, prompt.uid)
        try:
            message = await session.generate(trace.tokens, trace.images, trace.spans, replace(sampling, seed=order))
        finally:
            session.close()
        trace.sampled.append((len(trace.tokens), message))
        trace.tokens += message.tokens.tolist()
        return trace.finish(prompt, 0, Outcome.LENGTH), message

    async def ask(
        self, prompts: Sequence[Prompt], num: int, max_tokens: int, stop_ids: Sequence[int] = (), stop: Sequence[str] = ()
    ) -> list[Any]:
        """`num` messages of every prompt, all at once."""
        sampling = Sampling(max_tokens, tuple(stop_ids), stop=tuple(stop))
        orders = [(prompt, i) for prompt in prompts for i in range(num)]
        return await asyncio.gather(*(self._one(prompt, i, sampling) for prompt, i in orders))

    def __call__(
        self, prompts: Sequence[Prompt], num: int, max_tokens: int, stop_ids: Sequence[int] = (), stop: Sequence[str] = ()
    ) -> list[Any]:
        return self.parts.interrupts.run(self.ask(prompts, num, max_tokens, stop_ids, stop))

    @property
    def limit(self) -> float:
        """Of the gap."""
        return _GAP[self.parts.config.model.dtype]

    def gap(self, sampled: Sequence[tuple[Rollout, Completion]], version: int | None = None) -> float:
        """Mean difference to the trainer, of tokens that weights of a version have sampled."""
        rollouts = [rollout for rollout, _ in sampled]
        ours = self.parts.trainer.logprobs(rollouts)
        which = [r.sampled & (True if version is None else r.weight_version == version) for r in rollouts]
        gaps = [np.abs(own[at] - r.logp[at]) for own, r, at in zip(ours, rollouts, which, strict=True)]
        return float(np.concatenate(gaps).mean())

    def shake(self) -> None:
        """Change all weights of the trainer."""
        with torch.no_grad():
            for parameter in self.parts.policy.model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.05)

    def update(self, version: int) -> None:
        """Give them to the engine."""
        report = self.parts.sync(version)
        assert report.version == version and report.retries == 0


@pytest.fixture
def sampler(opened: Parts) -> Sampler:
    return Sampler(opened)


def test_the_main_job_trains_on_what_vllm_samples(opened: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def already_open(*_: object) -> Iterator[Parts]:
        yield opened

    monkeypatch.setattr(pipeline, "open_parts", already_open)
    pipeline.train(opened.config)
    check(opened.config.run.dir, steps=2)
    assert (opened.config.run.dir / "trained" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("weights", "layer"),
    [
        ("language_model.layers.1.self_attn.q_norm.weight", "layers.1.self_attn:"),
        ("visual.merger.linear_fc2", "visual.merger:"),
    ],
)
def test_the_gate_names_the_layer_that_the_engine_computes_with_other_weights(
    sampler: Sampler, opened: Parts, weights: str, layer: str
) -> None:
    opened.gate()
    changed = [p for name, p in opened.policy.model.named_parameters() if weights in name]
    kept = [parameter.detach().clone() for parameter in changed]
    with torch.no_grad():
        for parameter in changed:
            parameter.add_(torch.randn_like(parameter) * 0.5)
    with pytest.raises(EngineError, match=f"the likely layer is {layer}"):
        opened.gate()
    with torch.no_grad():
        for parameter, value in zip(changed, kept, strict=True):
            parameter.copy_(value)
    opened.gate()  # the engine samples on


def test_an_update_shows_in_the_log_probs_which_then_match_again(sampler: Sampler, prompts: list[Prompt]) -> None:
    before = sampler(prompts, 8, 24)  # those of a prompt share its cache
    assert sampler.gap(before) < sampler.limit
    sampler.shake()
    assert sampler.gap(before) > 0.1
    sampler.update(10)
    after = sampler(prompts, 8, 24)
    assert all((message.weight_version == 10).all() for _, message in after)
    assert sampler.gap(after) < sampler.limit


def test_engine_and_trainer_see_the_same_pixels_in_every_mode_and_orientation(sampler: Sampler, prompts: list[Prompt]) -> None:
    pictures = {**TRANSPARENT, **WIDE, **MODES, **{f"turned {number}": turned(number, "JPEG") for number in range(2, 9)}}
    asked = [replace(prompts[0], uid=name, images=(ImageBlob.of(data),)) for name, data in pictures.items()]
    sampled = sampler(asked, 1, 8)
    gaps = {rollout.prompt_uid: sampler.gap([(rollout, message)]) for rollout, message in sampled}
    assert max(gaps.values()) < sampler.limit, gaps
    for rollout, message in sampled:  # and would not agree about what careless code makes of it: black under alpha
        if rollout.prompt_uid in TRANSPARENT:
            with Image.open(BytesIO(rollout.images[0].data)) as image:
                careless = ImageBlob.of(encoded(image.convert("RGBA").convert("RGB")))
            spans = tuple(replace(span, sha256=careless.sha256) for span in rollout.image_spans)
            assert sampler.gap([(replace(rollout, images=(careless,), image_spans=spans), message)]) > 2 * sampler.limit


def test_requests_go_on_with_new_weights_and_tell_which_token_is_whose(sampler: Sampler, prompts: list[Prompt]) -> None:
    async def go(version: int) -> list[Any]:
        before = (await sampler.engine.stats())[0].tokens
        running = asyncio.ensure_future(sampler.ask(prompts, 8, 120))
        while (await sampler.engine.stats())[0].tokens == before:
            pass
        await sampler.engine.update(sampler.parts.trainer.weights(), version)
        return await running

    for version in range(11, 50):  # a fast machine may be done before the weights are there
        sampler.shake()
        sampled = sampler.parts.interrupts.run(go(version))
        found = [message.weight_version for _, message in sampled]
        assert all(set(one.tolist()) <= {version - 1, version} and (np.diff(one) >= 0).all() for one in found), found
        if any(one[0] < one[-1] for one in found):
            break
    else:
        raise AssertionError("no message went on with new weights")
    assert sampler.gap(sampled, version) < sampler.limit < sampler.gap(sampled, version - 1)


def test_a_message_ends_at_its_limit_or_its_stop_token_and_holds_no_placeholder(
    sampler: Sampler, prompts: list[Prompt]
) -> None:
    parts = sampler.parts
    ids = parts.policy.tokenizer.get_vocab()
    with torch.no_grad():  # every token is as likely as any other, but for placeholders, of which there are plenty
        embedding: Any = parts.policy.model.get_input_embeddings().weight
        embedding[ids["<|image_pad|>"]] = 0
        embedding.mul_(0.05)
    sampler.update(52)
    stop = ids["</tool_call>"]
    sampled = sampler(prompts, 16, 100, [stop])
    lengths = [len(message.tokens) for _, message in sampled]
    assert max(lengths) == 100 or any(message.stopped for _, message in sampled)
    for _, message in sampled:
        ended = message.tokens[-1] == stop
        assert message.stopped == ended and (ended or len(message.tokens) == 100)
        assert stop not in message.tokens[:-1]
        assert not np.isin(message.tokens, parts.policy.placeholder_ids).any()
    assert sampler.gap(sampled) < sampler.limit
    expected = sum(lengths) * len(parts.policy.placeholder_ids) / len(ids)
    assert expected > 10  # that many would have come if they were allowed
    assert any(message.stopped for _, message in sampled)


def _crosses(pieces: Sequence[str], pair: str) -> bool:
    """Whether the pair stands in two tokens where it stands first."""
    end = "".join(pieces).find(pair) + 1
    stops = list(accumulate(map(len, pieces)))
    return end > 0 and end in stops[:-1]


def test_a_message_ends_with_the_token_that_completes_a_stop_string(sampler: Sampler, prompts: list[Prompt]) -> None:
    """With the weights of the test before: tokens that come as they like."""
    tokenizer = sampler.parts.policy.tokenizer

    def texts(message: Completion) -> list[str]:
        return [str(tokenizer.decode([token])) for token in message.tokens.tolist()]

    free = [texts(message) for _, message in sampler(prompts, 16, 100)]
    pairs = {left[-1:] + right[:1] for one in free for left, right in pairwise(one)}
    pairs = {pair for pair in pairs if len(pair) == 2 and pair.isascii() and pair.isalpha()}
    # the noise is the same again: messages in which a pair of two tokens comes before any that lies in one
    stop = max(sorted(pairs), key=lambda pair: sum(_crosses(one, pair) for one in free))
    crossing = 0
    for _, message in sampler(prompts, 16, 100, stop=[stop]):
        pieces = texts(message)
        assert message.stopped == (stop in "".join(pieces)) and (message.stopped or len(pieces) == 100)
        assert stop not in "".join(pieces[:-1])
        assert len(message.logp) == len(message.weight_version) == len(pieces)
        crossing += message.stopped and stop not in pieces[-1]
    assert crossing  # cut into two tokens


def test_an_engine_that_is_asked_for_its_layers_fails_what_is_under_way_and_goes_on(
    sampler: Sampler, prompts: list[Prompt]
) -> None:
    engine = sampler.engine
    rollout = sampler(prompts[:1], 1, 8)[0][0]

    async def go() -> None:
        running = asyncio.ensure_future(sampler.ask(prompts, 4, 150))
        while (await engine.stats())[0].unfinished == 0:
            await asyncio.sleep(0.02)
        layers = await engine.layer_outputs(0, rollout)
        assert len(layers["norm"]) == len(rollout.tokens) - 1  # nobody else's rows
        with pytest.raises(EngineFailure, match="asked for what its layers make"):
            await running

    sampler.parts.interrupts.run(go())
    assert sampler.gap(sampler(prompts, 4, 24)) < sampler.limit


def test_damaged_weights_are_refused_and_the_old_ones_go_on(sampler: Sampler, prompts: list[Prompt]) -> None:
    engine = sampler.engine
    assert isinstance(engine.weights, StagedWeights)
    staging = engine.weights.staging
    assert staging is not None
    (worker,) = engine.workers()
    old = [parameter.detach().clone() for parameter in sampler.parts.policy.model.parameters()]
    sampler.shake()
    manifest = staging.write(sampler.parts.trainer.weights(), 53).to_dict()
    flip_staged(manifest)
    with pytest.raises(SyncError, match="CRC-32"):
        sampler.parts.interrupts.run(worker.call("load_staged", manifest))
    flip_staged(manifest)
    with torch.no_grad():
        new = [parameter.detach().clone() for parameter in sampler.parts.policy.model.parameters()]
        for parameter, value in zip(sampler.parts.policy.model.parameters(), old, strict=True):
            parameter.copy_(value)
        kept = sampler(prompts, 4, 24)
        assert {int(message.weight_version[0]) for _, message in kept} == {52}
        assert sampler.gap(kept) < sampler.limit
        for parameter, value in zip(sampler.parts.policy.model.parameters(), new, strict=True):
            parameter.copy_(value)
    sampler.update(54)
    after = sampler(prompts, 4, 24)
    assert {int(message.weight_version[0]) for _, message in after} == {54}
    assert sampler.gap(after) < sampler.limit


def _command(demo: Path, folder: Path, *more: str) -> list[object]:
    return ["train", demo / "config.yaml", f"run.dir={folder}", *_VLLM, *_SHORT, "train.steps=3", *more]


@pytest.mark.slow
def test_an_engine_that_is_killed_or_stopped_amid_a_run_comes_back_with_the_current_weights(demo: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    settings = ["model.dtype=float32", "train.steps=5", "workers.silence_s=5"]
    running = Command(_command(demo, folder, *settings), tmp_path / "process")
    for number, steps in ((signal.SIGKILL, 1), (signal.SIGSTOP, 3)):
        while not (folder / "metrics.jsonl").exists() or len(_metrics(folder)) < steps:
            assert running.alive, running.read("err")
            time.sleep(0.01)
        time.sleep(0.2)  # the next step's messages are being sampled
        (engine,) = running.named("engine-0")
        os.kill(engine.pid, number)
    ended = running.wait()
    assert ended.code == 0 and not ended.orphans, ended
    assert ended.err.count("; starting it again (") == 2 and "it has not answered for" in ended.err
    check(folder, steps=5)


@pytest.mark.slow
def test_a_tensor_parallel_engine_gets_every_version_and_outlives_a_rank_that_is_killed_or_stopped(
    demo: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    settings = ["rollout.vllm.tensor_parallel=2", "rollout.vllm.stall_s=15", "model.dtype=float32", "train.steps=5"]
    settings.append("gate.every=1")  # what both ranks say with the newest weights against the trainer, at every step
    running = Command(_command(demo, folder, *settings), tmp_path / "process")
    for rank, number, steps in ((1, signal.SIGKILL, 1), (0, signal.SIGSTOP, 3)):
        while not (folder / "metrics.jsonl").exists() or len(_metrics(folder)) < steps:
            assert running.alive, running.read("err")
            time.sleep(0.01)
        time.sleep(0.2)  # the next step's messages are being sampled
        ranks = sorted(one.pid for one in running.named("spawn_main"))
        assert len(ranks) == 2
        os.kill(ranks[rank], number)
    ended = running.wait()
    assert ended.code == 0 and not ended.orphans, ended
    assert ended.err.count("; starting it again (") == 2, ended.err
    check(folder, steps=5)


_AHEAD = ["rollout.mode=async", "rollout.max_staleness=2", "loss.tis_cap=2"]


@pytest.mark.slow
def test_two_replicas_ahead_of_training_get_what_changed_through_ray(demo: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    folder = tmp_path / "run"
    settings = [*_AHEAD, "sync.mode=delta", "rollout.vllm.replicas=2", "workers.launcher=ray"]
    settings.append("gate.every=1")  # the engines' newest version against the trainer, at every step
    running = Job([PROGRAM, *_command(demo, folder, *settings)], tmp_path / "job", HOME=str(tmp_path), RAY_ADDRESS="local")
    try:
        assert running.wait(limit_s=500, left_s=30) == 0, running.err.read_text()
    finally:
        running.end()
    check(folder, steps=3, staleness=2)
    assert "fetching all of it" not in running.err.read_text()
    sent = [record["sync_bytes"] for record in _metrics(folder)]
    assert max(sent[1:]) < sent[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "settings"),
    [("float32", ["workers.launcher=ray"]), ("bfloat16", ["workers.launcher=ray"]), ("float32", _AHEAD)],
    ids=["ray", "ray-bfloat16", "ahead"],
)
def test_tensor_parallel_ranks_train_what_an_engine_samples(
    job: Path,
    tmp_path: Path,
    dtype: str,
    settings: list[str],
) -> None:
    folder = tmp_path / "run"
    command = ["train", job, f"run.dir={folder}", *_VLLM, *_SHORT, "train.steps=3", f"model.dtype={dtype}", "gate.every=1"]
    ranks = ["train.backend=megatron", "train.megatron.tensor_parallel=2"]
    running = Job([PROGRAM, *command, *ranks, *settings], tmp_path / "job", HOME=str(tmp_path), RAY_ADDRESS="local")
    try:
        assert running.wait(limit_s=500, left_s=30) == 0, running.err.read_text()  # the gate let every step pass
    finally:
        running.end()
    check(folder, steps=3, staleness=2 if settings == _AHEAD else 0)
    # a mini-batch whose groups agree with themselves teaches nothing, which is skipped
    assert all(update["grad_norm"] > 0 or update["skipped_step"] for r in _metrics(folder) for update in r["updates"])
    assert all(any(update["grad_norm"] > 0 for update in record["updates"]) for record in _metrics(folder)), "nothing is learnt"
