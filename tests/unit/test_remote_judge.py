"""Judges in workers: the same verdicts, and none where the worker fails."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from metis_fast.config import Config, ScoreConfig, WorkersConfig
from metis_fast.errors import ConfigError, JudgeError
from metis_fast.score.judge import open_judge
from metis_fast.score.protocol import JudgeUnavailable
from metis_fast.score.remote import RemoteJudge, start_judge_workers
from metis_fast.score.scoring import score_groups
from metis_fast.testing.judge import text_rollout
from metis_fast.types import Group, ImageBlob, ImageSpan, Message, Outcome, Prompt, Rollout
from metis_fast.workers.hub import Hub
from metis_fast.workers.launch import LocalLauncher
from metis_fast.workers.worker import Worker, wait_ready

FRAGILE = "metis_fast.testing.fragile:FragileJudge"
STYLES = ("rule", "choice")


def a_prompt(number: int, question: str = "1 + 1?", style: str = "rule", images: int = 0) -> Prompt:
    pictures = tuple(ImageBlob.of(bytes([i])) for i in range(images))
    messages = (Message("user", "<image>" * images + question),)
    return Prompt(f"p{number}", "test", messages, pictures, "math", ("2",), style, question)


def an_answer(prompt: Prompt, text: str = "2") -> Rollout:
    rollout = text_rollout(prompt.uid, [f"<reason>r</reason><answer>{text}</answer>"])
    if not prompt.images:
        return rollout
    span = ImageSpan(prompt.images[0].sha256, 0, 1, (1, 2, 2))
    return replace(rollout, images=prompt.images[:1], image_spans=(span,))


@pytest.fixture(scope="module")
def workers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Worker]]:
    with Hub(WorkersConfig(silence_s=2.0, start_s=60.0), LocalLauncher(tmp_path_factory.mktemp("judges"))) as hub:
        workers = start_judge_workers(hub, ScoreConfig(), STYLES, 2, FRAGILE)
        wait_ready(workers, lambda: None)
        yield workers


@pytest.fixture
def judge(workers: list[Worker]) -> RemoteJudge:
    wait_ready(workers, lambda: None)
    return RemoteJudge(ScoreConfig(), workers)


def test_verdicts_are_those_of_the_judge_in_process(judge: RemoteJudge) -> None:
    local = open_judge(ScoreConfig(), STYLES)
    cases = [(a_prompt(i, style=STYLES[i % 2], images=i % 3), ("2", "3", "2.0", "")[i % 4]) for i in range(24)]
    groups = [Group(prompt, tuple(an_answer(prompt, text) for text in (text, "7"))) for prompt, text in cases]

    async def go() -> None:
        await judge.check()
        assert await score_groups(groups, judge, Config()) == await score_groups(groups, local, Config())

    try:
        asyncio.run(go())
    finally:
        local.close()


@pytest.mark.parametrize("fault", ["die", "bug", "garbage", pytest.param("stop", marks=pytest.mark.slow)])
def test_a_judge_that_is_lost_again_and_again_gives_no_verdict(judge: RemoteJudge, fault: str) -> None:
    wrong, right = a_prompt(0, fault), a_prompt(1)
    groups = [Group(prompt, (an_answer(prompt), an_answer(prompt, "3"))) for prompt in (wrong, right)]

    async def go() -> None:
        lost, kept = await score_groups(groups, judge, Config())
        for score in lost.scores:
            assert score.verdict is None and score.outcome is Outcome.JUDGE_ERROR
            assert (score.r_acc, score.r_tool, score.adv_acc, score.adv_tool) == (0.0, 0.0, 0.0, 0.0)
        assert [score.verdict.correct for score in kept.scores if score.verdict] == [True, False]

    asyncio.run(go())


def test_a_judge_without_a_verdict_is_not_asked_again(judge: RemoteJudge, workers: list[Worker]) -> None:
    before = [worker.restarts for worker in workers]
    prompt = a_prompt(0, "unavailable")
    with pytest.raises(JudgeUnavailable, match="as asked"):
        asyncio.run(judge.judge(prompt, an_answer(prompt)))
    assert [worker.restarts for worker in workers] == before


def test_a_verdict_is_asked_for_again_where_the_first_worker_was_lost(judge: RemoteJudge, workers: list[Worker]) -> None:
    async def go() -> None:
        prompts = [a_prompt(i) for i in range(8)]
        pid = await workers[0].call("pid")
        os.kill(pid, signal.SIGKILL)
        verdicts = await asyncio.gather(*(judge.judge(prompt, an_answer(prompt)) for prompt in prompts))
        assert all(verdict.correct and verdict.format_ok for verdict in verdicts)

    asyncio.run(go())


def test_a_style_that_nobody_knows_is_told_at_start(tmp_path: Path) -> None:
    with Hub(WorkersConfig(), LocalLauncher(tmp_path)) as hub:
        workers = start_judge_workers(hub, ScoreConfig(), ("telepathy",), 1)
        with pytest.raises(ConfigError, match="judge style 'telepathy'"):
            wait_ready(workers, lambda: None)
        with pytest.raises(JudgeError, match="judge style 'telepathy'"):
            asyncio.run(RemoteJudge(ScoreConfig(), workers).check())


def test_judges_that_were_all_given_up_stop_the_run(tmp_path: Path) -> None:
    prompts = [a_prompt(i, "die") for i in range(2)]
    groups = [Group(prompt, (an_answer(prompt), an_answer(prompt))) for prompt in prompts]
    with Hub(WorkersConfig(start_s=60.0), LocalLauncher(tmp_path)) as hub:
        judge = RemoteJudge(ScoreConfig(), start_judge_workers(hub, ScoreConfig(), STYLES, 1, FRAGILE, max_restarts=0))
        with pytest.raises(JudgeError, match="gave no verdict for any of 4 rollouts"):
            asyncio.run(score_groups(groups, judge, Config()))


def test_what_is_sent_holds_no_picture(judge: RemoteJudge, monkeypatch: pytest.MonkeyPatch, workers: list[Worker]) -> None:
    sent: list[object] = []

    async def call(method: str, *arguments: object, deadline_s: float | None = None) -> object:
        sent.extend(arguments)
        return None

    async def lose(why: str) -> None:
        assert "no verdict" in why

    for worker in workers:
        monkeypatch.setattr(worker, "call", call)
        monkeypatch.setattr(worker, "lose", lose)
    prompt = a_prompt(0, images=2)
    with pytest.raises(JudgeUnavailable, match="no verdict"):
        asyncio.run(judge.judge(prompt, an_answer(prompt)))
    rollout = sent[1]
    assert isinstance(rollout, Rollout) and not rollout.images and rollout.response_text == an_answer(prompt).response_text
    assert isinstance(sent[0], Prompt) and not sent[0].images and sent[0].answers == ("2",)
    assert np.array_equal(rollout.tokens, an_answer(prompt).tokens)
