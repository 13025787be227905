"""A batch from rollouts to advantages, with judges and machinery that fail."""

import asyncio

import numpy as np
import pytest

from metis_fast.config import Config, LossConfig, ScoreConfig
from metis_fast.errors import JudgeError, RecordingError
from metis_fast.score.judge import open_judge
from metis_fast.score.reward import accuracy_reward, tool_reward
from metis_fast.score.scoring import score_groups
from metis_fast.testing.judge import FakeJudge, text_rollout
from metis_fast.types import Group, Outcome, Prompt, Rollout, Score, Verdict

CALL = "<reason>look</reason><tool_call>{}</tool_call>"


def answers(text: str, calls: int = 0) -> list[str]:
    return [CALL] * calls + [f"<reason>r</reason><answer>{text}</answer>"]


def a_group(uid: str, *trajectories: list[str], broken: frozenset[int] = frozenset()) -> Group:
    prompt = Prompt(uid, "test", (), (), "math", ("4",), "rule", "2 + 2?")
    rollouts = tuple(
        text_rollout(uid, texts, index=i, outcome=Outcome.INFRASTRUCTURE_ERROR if i in broken else Outcome.ANSWERED)
        for i, texts in enumerate(trajectories)
    )
    return Group(prompt, rollouts)


def score(*groups: Group, judge: FakeJudge | None = None, config: Config | None = None):
    return asyncio.run(score_groups(groups, judge or FakeJudge(), config or Config()))


@pytest.mark.parametrize(
    ("correct", "format_ok", "calls", "r_acc", "r_tool"),
    [(True, True, 0, 1.0, 1.0), (True, False, 1, 0.9, 0.5), (False, True, 0, 0.1, 0.0), (False, False, 3, 0.0, 0.0)],
)
def test_rewards_are_those_of_the_specification(correct, format_ok, calls, r_acc, r_tool):
    verdict = Verdict(correct, format_ok, "x")
    assert accuracy_reward(verdict, ScoreConfig()) == r_acc
    assert tool_reward(verdict, calls) == r_tool


def test_the_weights_of_the_accuracy_reward_are_configurable():
    assert accuracy_reward(Verdict(True, True, "x"), ScoreConfig(w_ans=0.5, w_fmt=0.25)) == 0.75


def test_every_rollout_gets_rewards_and_advantages_in_order():
    (scored,) = score(a_group("p", answers("4"), answers("4", calls=1), answers("5")))
    assert [s.r_acc for s in scored.scores] == [1.0, 1.0, 0.1]
    assert [s.r_tool for s in scored.scores] == [1.0, 0.5, 0.0]
    assert [s.qualifies for s in scored.scores] == [True, True, False]
    assert [s.in_tool_denominator for s in scored.scores] == [True, True, False]
    assert [s.adv_acc for s in scored.scores] == pytest.approx([3**-0.5, 3**-0.5, -2 * 3**-0.5], rel=1e-5)
    assert [s.adv_tool for s in scored.scores] == pytest.approx([2**-0.5, -(2**-0.5), 0.0], rel=1e-5)
    assert all(s.needs_gradient and s.outcome is Outcome.ANSWERED for s in scored.scores)


def test_the_order_of_groups_is_kept_whatever_the_judge_finishes_first():
    class SlowFirst(FakeJudge):
        async def judge(self, prompt, rollout):
            await asyncio.sleep(0.02 if prompt.uid == "slow" else 0)
            return await super().judge(prompt, rollout)

    judge = SlowFirst()
    scored = score(a_group("slow", answers("4")), a_group("fast", answers("5")), judge=judge)
    assert [(one.prompt.uid, one.scores[0].r_acc) for one in scored] == [("slow", 1.0), ("fast", 0.1)]
    assert judge.judged == [("fast", 0), ("slow", 0)]  # both were under way at once


def test_a_failed_judge_and_a_broken_rollout_leave_the_group():
    judge = FakeJudge(lambda prompt, answer: None if answer == "?" else answer in prompt.answers)
    full = a_group("p", answers("4"), answers("?"), answers("5"), answers("4"), broken=frozenset({3}))
    (scored,) = score(full, judge=judge)
    (without,) = score(a_group("p", answers("4"), answers("5")))
    assert scored.scores[1] == Score(None, Outcome.JUDGE_ERROR, no_verdict="the fake judge was told to fail")
    assert scored.scores[3] == Score(verdict=None, outcome=Outcome.INFRASTRUCTURE_ERROR)
    assert [scored.scores[0], scored.scores[2]] == list(without.scores)
    assert ("p", 3) not in judge.judged


@pytest.mark.parametrize("broken", [frozenset[int](), frozenset({1})])
def test_a_judge_that_fails_on_the_whole_batch_stops_the_run(broken):
    judge = FakeJudge(lambda prompt, answer: None)
    with pytest.raises(JudgeError, match="no verdict for any of") as caught:
        score(a_group("p", answers("4"), answers("5"), broken=broken), judge=judge)
    assert "\n" not in str(caught.value)


def failing(*answers: str) -> FakeJudge:
    return FakeJudge(lambda prompt, answer: None if answer in answers else answer in prompt.answers)


def test_missing_verdicts_are_a_line_for_each_style_with_the_reasons(caplog):
    groups = [a_group("p", answers("4"), answers("?")), a_group("q", answers("5"), answers("?"), answers(""))]
    scored = score(*groups, judge=failing("?"))
    assert [s.outcome for one in scored for s in one.scores].count(Outcome.JUDGE_ERROR) == 2
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == (
        "the judge of style 'rule' gave no verdict for 2 of 4 rollouts with an answer (2 x the fake judge was told to fail)"
    )


@pytest.mark.parametrize(("share", "stops"), [(0.5, True), (0.6, True), (0.67, False), (1.0, False)])
def test_above_the_stated_share_of_missing_verdicts_the_run_stops(share, stops, caplog):
    groups = [a_group("p", answers("4"), answers("?"), answers("?")), a_group("q", answers("5"), answers("?"), answers("?"))]
    config = Config(score=ScoreConfig(max_missing_share=share))
    if stops:
        says = rf"4 of 6 rollouts .*, more than score\.max_missing_share={share:g}; mend the judge or raise that setting"
        with pytest.raises(JudgeError, match=says):
            score(*groups, judge=failing("?"), config=config)
    else:
        score(*groups, judge=failing("?"), config=config)
        assert "4 of 6 rollouts" in caplog.text


def test_failures_on_one_prompt_among_others_are_that_prompts(caplog):
    groups = [a_group("p", answers("?"), answers("?"), answers("?")), a_group("q", answers("4"))]
    assert [s.verdict for s in score(*groups, judge=failing("?"))[0].scores] == [None] * 3
    assert "no verdict for 3 of 4" in caplog.text


def test_rollouts_without_an_answer_do_not_hide_a_broken_judge():
    groups = [a_group(uid, answers("4"), answers("?"), answers("?"), *[answers("")] * 9) for uid in "pq"]
    with pytest.raises(JudgeError, match="4 of 6 rollouts with an answer"):
        score(*groups, judge=failing("?"))


def test_a_batch_that_only_our_machinery_broke_is_not_blamed_on_the_judge():
    (scored,) = score(a_group("p", answers("4"), answers("5"), broken=frozenset({0, 1})))
    assert [s.outcome for s in scored.scores] == [Outcome.INFRASTRUCTURE_ERROR] * 2


def test_a_defect_of_a_judge_is_not_taken_for_a_failure():
    def broken(prompt: Prompt, answer: str) -> bool:
        raise KeyError(answer)

    with pytest.raises(KeyError):
        score(a_group("p", answers("4")), judge=FakeJudge(broken))


def test_reference_normalisation_switches_the_recipes_noise_on():
    group = a_group("p", *[[f"<answer>{4}</answer>"]] * 16)  # no reason: r_acc is 0.9 for all
    (exact,) = score(group)
    (noisy,) = score(group, config=Config(loss=LossConfig(normalization="reference")))
    assert {s.adv_acc for s in exact.scores} == {0.0} and not any(s.needs_gradient for s in exact.scores)
    assert [s.adv_acc for s in noisy.scores] == pytest.approx([-0.056] * 16, abs=5e-4)
    assert all(s.needs_gradient for s in noisy.scores)


class _Lacking:
    """A replay in which no verdict is found, and some are looked for longer than others."""

    async def judge(self, prompt: Prompt, rollout: Rollout) -> Verdict:
        await asyncio.sleep(0.01 * rollout.index)
        raise RecordingError(f"no verdict on rollout {rollout.index}; record it")


def test_an_error_that_ends_the_run_leaves_nobody_judging():
    with asyncio.Runner() as runner:  # its loop lives on, as a run's does while the run is wound up
        with pytest.raises(RecordingError, match="rollout 0"):
            runner.run(score_groups([a_group("p", *[answers("4")] * 3)], _Lacking(), Config()))
        assert not asyncio.all_tasks(runner.get_loop())


def test_advantages_are_float32_values():
    (scored,) = score(a_group("p", answers("4"), answers("4", calls=2), answers("5")))
    assert all(s.adv_acc == float(np.float32(s.adv_acc)) and s.adv_tool == float(np.float32(s.adv_tool)) for s in scored.scores)


def test_the_real_judge_scores_a_batch():
    judge = open_judge(ScoreConfig(), {"rule"})
    (scored,) = asyncio.run(score_groups([a_group("p", answers("four"), answers("5"))], judge, Config()))
    assert [s.qualifies for s in scored.scores] == [True, False]
