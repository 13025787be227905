"""Verdicts recorded and replayed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from metis_fast.config import Config
from metis_fast.errors import RecordingError
from metis_fast.recording.file import Recording
from metis_fast.recording.judge import RunJudge
from metis_fast.recording.opening import open_recording, recorded_judge
from metis_fast.score.judge import open_judge
from metis_fast.score.protocol import JudgeUnavailable
from metis_fast.testing.judge import FakeJudge, JudgeServer, serving, text_rollout
from metis_fast.types import Prompt, Rollout, Verdict

RIGHT = "<reason>Seen.</reason><answer>Paris</answer>"
WRONG = "<answer>Rome</answer>"


@pytest.fixture
def judges(tmp_path: Path) -> Iterator[Callable[..., RunJudge]]:
    """Opens a judge that records what another one says; or, without one, a judge that replays."""
    opened: list[Recording] = []

    def make(other: Callable[[Config], RunJudge] | None = None, **score: Any) -> RunJudge:
        for recording in opened:
            recording.close()
        how = "replay" if other is None else "record"
        config = Config.model_validate({"tools": {how: tmp_path / "run.sqlite"}, "score": score})
        recording = open_recording(config)
        assert recording is not None
        opened.append(recording)

        def inner() -> RunJudge:
            assert other is not None, "a replay opened the judge"
            return other(config)

        return recorded_judge(config, recording, inner)

    yield make
    for recording in opened:
        recording.close()


def judged(judge: RunJudge, prompt: Prompt, *texts: str) -> list[Verdict]:
    """Verdicts of rollouts that say these."""
    return asyncio.run(_judged(judge, prompt, [text_rollout(prompt.uid, [text], index=i) for i, text in enumerate(texts)]))


async def _judged(judge: RunJudge, prompt: Prompt, rollouts: list[Rollout]) -> list[Verdict]:
    await judge.check()
    try:
        return [await judge.judge(prompt, rollout) for rollout in rollouts]
    finally:
        judge.close()


def test_verdicts_of_a_model_come_back_without_it(judges: Callable[..., RunJudge], make_prompt: Callable[..., Prompt]) -> None:
    server = JudgeServer(models=("judge",))
    with serving(server) as url:
        settings = {"judge": "llm", "llm": {"base_url": url}}
        told = judged(judges(lambda config: open_judge(config.score, ["rule"]), **settings), make_prompt(), RIGHT, WRONG, "")
    assert [(one.correct, one.format_ok, one.answer) for one in told] == [
        (True, True, "Paris"),
        (False, False, "Rome"),
        (False, False, ""),
    ]
    assert told[0].judge and told[0].reason  # who said it, and why, are kept, too
    asked = len(server.tasks)
    for where in (url, ""):  # nobody is there; nor need anyone be named
        again = {"judge": "llm", "llm": {"base_url": where}}
        assert judged(judges(**again), make_prompt(), RIGHT, WRONG, "") == told
    assert len(server.tasks) == asked


def test_what_is_known_is_not_asked_again(judges: Callable[..., RunJudge], make_prompt: Callable[..., Prompt]) -> None:
    fakes = [FakeJudge(), FakeJudge(lambda prompt, answer: None)]
    told = judged(judges(lambda config: fakes[0]), make_prompt(), RIGHT, RIGHT, WRONG)
    assert fakes[0].judged == [("p", 0), ("p", 2)]
    assert judged(judges(lambda config: fakes[1]), make_prompt(uid="elsewhere"), WRONG, RIGHT) == [told[2], told[0]]
    assert not fakes[1].judged


def test_that_there_is_no_verdict_is_not_recorded(judges: Callable[..., RunJudge], make_prompt: Callable[..., Prompt]) -> None:
    broken = FakeJudge(lambda prompt, answer: None if answer == "Rome" else True)
    recording = judges(lambda config: broken)
    with pytest.raises(JudgeUnavailable, match="told to fail"):
        judged(recording, make_prompt(), RIGHT, WRONG)
    assert judged(judges(), make_prompt(), RIGHT)[0].correct
    with pytest.raises(RecordingError) as caught:
        judged(judges(), make_prompt(), WRONG)
    message = str(caught.value)
    assert "has no answer for judge rule(" in message and "Rome" in message and "of p, rollout 0; replay with" in message


def _missing(judge: RunJudge, prompt: Prompt, text: str = RIGHT) -> bool:
    try:
        judged(judge, prompt, text)
    except RecordingError:
        return True
    return False


def test_a_verdict_is_found_by_all_that_a_judge_reads_and_by_nothing_else(
    judges: Callable[..., RunJudge], make_prompt: Callable[..., Prompt]
) -> None:
    prompt = make_prompt()
    judged(judges(lambda config: FakeJudge()), prompt, RIGHT)
    assert not _missing(judges(), prompt)
    assert not _missing(judges(w_ans=0.5, w_fmt=0.5, estimator="grpo", max_missing_share=0.1), prompt)
    assert not _missing(judges(llm={"model": "of other styles"}), prompt)
    assert not _missing(judges(), replace(prompt, judge_style="exact-match", extra={"index": 3}))  # `rule` by another name
    assert _missing(judges(), prompt, WRONG)
    assert _missing(judges(), replace(prompt, answers=("Rome",)))
    assert _missing(judges(), replace(prompt, question="Which other city?"))
    assert _missing(judges(), replace(prompt, judge_style="math"))
    assert _missing(judges(number_tolerance=0.1), prompt)
    assert _missing(judges(format="reference"), prompt)


def test_a_model_of_another_name_is_another_judge(judges: Callable[..., RunJudge], make_prompt: Callable[..., Prompt]) -> None:
    prompt = make_prompt()
    judged(judges(lambda config: FakeJudge(), judge="llm", llm={"model": "large"}), prompt, RIGHT)
    assert not _missing(judges(judge="llm", llm={"model": "large", "timeout_s": 1}), prompt)
    assert _missing(judges(judge="llm", llm={"model": "small"}), prompt)
    assert _missing(judges(judge="llm", llm={"model": "large", "extra_body": {"seed": 1}}), prompt)


def test_a_model_that_is_not_named_is_the_same_one_in_all_of_a_recording(
    judges: Callable[..., RunJudge], make_prompt: Callable[..., Prompt]
) -> None:
    def opened(url: str, **llm: Any) -> RunJudge:
        return judges(lambda config: open_judge(config.score, ["rule"]), judge="llm", llm={"base_url": url, **llm})

    with serving(JudgeServer(models=("a",))) as first, serving(JudgeServer(models=("b",))) as second:
        for url in (first, first):
            assert judged(opened(url), make_prompt(), RIGHT)[0].judge == "llm a"
        with pytest.raises(RecordingError, match=r'holds verdicts of the model \["a"\], and \["b"\] is served now'):
            judged(opened(second), make_prompt(), RIGHT)
        assert judged(opened(second, model="b"), make_prompt(), RIGHT)[0].judge == "llm b"
        by_row = judges(lambda config: open_judge(config.score, ["rule"]), llm={"base_url": second})
        assert judged(by_row, make_prompt(), RIGHT)[0].judge != "llm a"  # `rule` asks nobody


def test_verdicts_under_the_packaged_prompt_are_not_those_of_ones_own(
    judges: Callable[..., RunJudge], make_prompt: Callable[..., Prompt], tmp_path: Path
) -> None:
    own = tmp_path / "own.txt"
    own.write_text("{question} {truth} {answer}")
    for prompt, other in ((None, own), (own, None)):
        (tmp_path / "run.sqlite").unlink(missing_ok=True)
        judged(judges(lambda config: FakeJudge(), judge="llm", llm={"model": "m", "prompt": prompt}), make_prompt(), RIGHT)
        assert not _missing(judges(judge="llm", llm={"model": "m", "prompt": prompt}), make_prompt())
        assert _missing(judges(judge="llm", llm={"model": "m", "prompt": other}), make_prompt())
