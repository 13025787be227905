"""A node: what it tells of groups, what it keeps, and what it reads ahead."""

from __future__ import annotations

import asyncio
import json
import pickle
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from metis_fast.config import Config
from metis_fast.data.parquet import PromptFiles
from metis_fast.data.row import BadRowError
from metis_fast.model import Policy
from metis_fast.node import node as node_module
from metis_fast.node.node import InMemory, Node
from metis_fast.node.protocol import Head
from metis_fast.rollout.chat import Chat
from metis_fast.rollout.native import NativeEngine
from metis_fast.rollout.store import read_rollouts
from metis_fast.score.protocol import JudgeUnavailable
from metis_fast.score.scoring import score
from metis_fast.summary import Data, GroupSummary, Job, NoVerdict, RolloutSummary, Scores
from metis_fast.testing.fakes import FakeToolbox
from metis_fast.types import ImageBlob, ImageSpan, Outcome, Prompt, Rollout, Verdict

G = 3


class LongJudge:
    """Says that a rollout with an even number is right, at length; of the third one it says nothing."""

    async def judge(self, prompt: Prompt, rollout: Rollout) -> Verdict:
        """See `Judge`."""
        if rollout.index == 2:
            raise JudgeUnavailable("away", "for lunch")
        return Verdict(rollout.index % 2 == 0, True, "x" * 1000)


@pytest.fixture
def files(tmp_path: Path, picture: Callable[..., ImageBlob]) -> Mapping[Data, PromptFiles]:
    """Six rows, each with a picture; that of the third one is none."""
    rows = [
        {
            "data_source": "unit",
            "prompt": [{"role": "user", "content": f"<image> row {row}"}],
            "images": [{"bytes": b"none" if row == 2 else picture(row).data}],
            "ability": "math",
            "reward_model": {"ground_truth": str(row), "style": "rule"},
            "extra_info": {"kind": "direct"},
        }
        for row in range(6)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    opened = PromptFiles([tmp_path / "rows.parquet"])
    return {"train": opened, "heldout": opened}


@pytest.fixture
def open_node(policy: Policy, chat: Chat, files: Mapping[Data, PromptFiles], tmp_path: Path) -> Callable[..., Node]:
    def make(number: int = 0, **rollout: object) -> Node:
        short = {"rollouts_per_prompt": G, "max_response_tokens": 12, "max_turns": 1, **rollout}
        tree = {"run": {"dir": tmp_path / "run"}, "rollout": short, "eval": {"rollouts_per_prompt": 1, "temperature": 0.0}}
        config, engine, tools = Config.model_validate(tree), NativeEngine(policy), FakeToolbox([])
        return Node(number, config, chat, engine, tools, LongJudge(), files, policy.images.broken, InMemory())

    return make


def jobs(rows: Sequence[int], first: int = 0, data: Data = "train") -> list[Job]:
    return [Job(data, row, "train/0", (first + i) * (G if data == "train" else 1)) for i, row in enumerate(rows)]


def test_what_is_told_of_a_group_is_what_it_is(open_node: Callable[..., Node]) -> None:
    node, done = open_node(), list[int]()
    told = asyncio.run(node.play(jobs([0, 3]), done.append))
    assert [one.job.row for one in told] == [0, 3] and sum(done) == 2 * G
    for one, group in zip(told, node.fetch(told), strict=True):
        assert (one.node, one.ability, one.kind, one.judge_style) == (0, "math", "direct", "rule")
        assert one.rollouts == tuple(map(RolloutSummary.of, group.rollouts))
        for summary, rollout in zip(one.rollouts, group.rollouts, strict=True):
            assert (summary.num_tokens, summary.num_sampled) == (len(rollout.tokens), int(rollout.sampled.sum()))
            assert summary.versions == ((0, rollout.num_sampled),) and summary.image_spans == rollout.image_spans
        assert len({summary.prompt_key for summary in one.rollouts}) == 1
        right, wrong, missing = one.verdicts
        assert isinstance(right, Verdict) and right.correct and len(right.answer) == 200
        assert isinstance(wrong, Verdict) and not wrong.correct
        assert missing == NoVerdict("away", "away (for lunch)")
    node.drop(told[:1])
    assert [group.prompt.uid for group in node.fetch(told[1:])] == ["rows:3"]
    with pytest.raises(KeyError):
        node.fetch(told[:1])


def test_shares_of_a_batch_hold_what_the_batch_holds_whoever_plays_them(open_node: Callable[..., Node]) -> None:
    whole, rows = open_node(), [0, 1, 3, 4]
    together = whole.fetch(asyncio.run(whole.play(jobs(rows))))
    for first, part in ((0, rows[:1]), (1, rows[1:])):
        node = open_node(1)
        groups = node.fetch(asyncio.run(node.play(jobs(part, first))))
        for group, expected in zip(groups, together[first:], strict=False):
            for one, other in zip(group.rollouts, expected.rollouts, strict=True):
                np.testing.assert_array_equal(one.tokens, other.tokens)  # the noise is the place's
                np.testing.assert_allclose(one.logp, other.logp, atol=1e-4)


def test_a_group_alone_has_the_noise_of_its_place(open_node: Callable[..., Node]) -> None:
    begun, one, other = list[int](), open_node(), open_node(deterministic=False)
    alone = asyncio.run(one.play_one(jobs([3], 1)[0], lambda: begun.append(1)))
    assert len(begun) == G
    expected = other.fetch(asyncio.run(other.play(jobs([0, 3]))))[1]
    (group,) = one.fetch([alone])
    assert [r.tokens.tolist() for r in group.rollouts] == [r.tokens.tolist() for r in expected.rollouts]


def test_of_an_evaluation_nothing_is_kept(open_node: Callable[..., Node]) -> None:
    node = open_node()
    told = asyncio.run(node.play(jobs([0, 1], data="heldout")))
    assert [len(one.rollouts) for one in told] == [1, 1] and all(one.key is None for one in told)


def test_rows_are_looked_at_before_they_are_played_and_bad_ones_named(
    open_node: Callable[..., Node], monkeypatch: pytest.MonkeyPatch
) -> None:
    node = open_node()
    found = node.look("train", [0, 2, 4])
    assert found[0] == Head("rows:0", 0, 1) and found[2] == Head("rows:4", 4, 1)
    assert isinstance(found[1], BadRowError) and "row 2" in str(found[1])
    assert pickle.loads(pickle.dumps(found[1])).bad_row == found[1].bad_row  # it goes to the run
    assert len(node._ahead) == 2
    asyncio.run(node.play(jobs([0])))
    assert len(node._ahead) == 1
    monkeypatch.setattr(node_module, "_AHEAD_BYTES", 1)
    node.look("train", [1])
    assert not node._ahead  # read again when they are played
    assert asyncio.run(node.play(jobs([4])))[0].job.row == 4


def test_rows_are_looked_at_while_others_begin(open_node: Callable[..., Node], monkeypatch: pytest.MonkeyPatch) -> None:
    node, size = open_node(), node_module._size
    node.look("train", [0, 1])
    playing: list[threading.Thread] = []

    def amid(prompt: Prompt) -> int:
        if not playing:
            playing.append(threading.Thread(target=node._prompts, args=(jobs([0]),)))
            playing[0].start()
            playing[0].join(0.3)  # it may have to wait
        return size(prompt)

    monkeypatch.setattr(node_module, "_size", amid)
    node.look("train", [3, 4])
    playing[0].join()
    assert sorted(row for _, row in node._ahead) == [1, 3, 4]


def test_stored_groups_have_the_scores_of_the_run_and_the_answers_of_the_node(
    open_node: Callable[..., Node], tmp_path: Path
) -> None:
    node = open_node()
    told = asyncio.run(node.play(jobs([0, 1])))
    scores = score(told, Config.model_validate({"score": {"max_missing_share": 1.0}}))
    scored = [Scores(group.key, own) for group, own in zip(told, scores, strict=True)]
    asyncio.run(node.write("rollouts", "step-000000", scored))
    stored = list(read_rollouts(tmp_path / "run" / "rollouts"))
    assert [one.score.adv_acc for one in stored] == [own.adv_acc for group in scores for own in group]
    answers = [one.score.verdict and len(one.score.verdict.answer) for one in stored]
    assert answers == [1000, 1000, None] * 2


def test_a_rollout_costs_the_run_a_few_kilobytes_whatever_its_size() -> None:
    spans = tuple(ImageSpan(f"{i:064x}", 10 + 4000 * i, 3082 + 4000 * i, (1, 96, 128)) for i in range(4))
    one = RolloutSummary(
        "metis_rl:123456", 0, 24_000, 3100, bytes(32), 16_000, 9, 1, spans, ((7, 9000), (8, 7000)), Outcome.ANSWERED
    )
    rollouts = tuple(replace(one, index=i, prompt_key=bytes([i] * 32)) for i in range(16))
    verdicts = tuple(Verdict(True, True, "y" * 200) for _ in range(16))
    group = GroupSummary(jobs([1])[0], "search", None, "llm", rollouts, verdicts, 0, 1)
    assert len(pickle.dumps(group)) < 16 * 1024
    assert json.dumps(group.job.stream)
