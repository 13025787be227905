"""The benchmark of scale: groups that it makes, what it counts as a group in the run's process, options and rows; and how many
bytes of a rollout cross."""

from __future__ import annotations

import gc
import pickle
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench.__main__ import main
from bench.candidate import BenchError
from bench.scale.groups import LIGHT, REAL, Script, Work
from bench.scale.process import Meter
from bench.scale.run import request
from metis_fast.cli import parse
from metis_fast.config import Config
from metis_fast.score.scoring import score
from metis_fast.summary import GroupSummary, Job, ScoredSummary
from metis_fast.train.megatron.task import Outlined
from metis_fast.train.megatron.wire import pack
from metis_fast.types import ImageBlob, Outcome

ROOT = Path(__file__).parents[2]
JOB = Job("train", 3, "train/0", 48)


def scored_summary(work: Work, job: Job = JOB) -> ScoredSummary:
    group, verdicts = Script(work).group(job, 2)
    summary = GroupSummary.of(group, verdicts, job, 0, None)
    return ScoredSummary(summary, score([summary], Config())[0])


def test_groups_have_the_size_that_is_stated():
    group, _ = Script(REAL).group(JOB, 2)
    lengths = [rollout.num_tokens for rollout in group.rollouts]
    assert len(lengths) == 16 and abs(sum(lengths) / 16 - 8000) < 10 and max(lengths) < 1.25 * 8000
    assert 1_000_000 <= len(group.prompt.images[0].data) < 1_100_000
    for rollout in group.rollouts:
        assert [turn.outcome for turn in rollout.turns] == [Outcome.TOOL_RESULT] * 4 + [Outcome.ANSWERED]
        assert [span.stop - span.start for span in rollout.image_spans] == [64 * 48, 25 * 19]
    assert len({rollout.images[1].sha256 for rollout in group.rollouts}) == 16
    assert len({rollout.prompt_key for rollout in group.rollouts}) == 1


def test_a_group_is_the_same_wherever_it_is_made_and_others_are_others():
    one, again, other = (Script(LIGHT).group(job, 2)[0] for job in (JOB, JOB, replace(JOB, row=4, order=64)))
    assert pickle.dumps(one) == pickle.dumps(again)
    assert one.prompt.images != other.prompt.images and one.rollouts[0].images[1] != other.rollouts[0].images[1]


def test_every_rollout_has_a_signal():
    assert all(own.needs_gradient for own in scored_summary(LIGHT).scores)


def test_of_a_rollout_of_any_size_some_hundred_bytes_cross():
    scored = [scored_summary(work) for work in (REAL, LIGHT)]
    for one in scored:
        into = len(pickle.dumps(one.group, 5)) / 16
        out = len(pickle.dumps(one, 5)) / 16 + len(pack([Outlined(one.rollouts, one.scores)]).raw()) / 16
        assert 150 < into < 300 and into + out < 1024


def test_summaries_hold_no_array_and_no_image():
    summary = scored_summary(LIGHT)
    held, seen = [summary], {id(summary)}
    for one in held:  # grows
        for inner in gc.get_referents(one):
            if id(inner) not in seen and not isinstance(inner, type):
                seen.add(id(inner))
                held.append(inner)
    assert not [one for one in held if isinstance(one, np.ndarray | ImageBlob) or (isinstance(one, bytes) and len(one) > 32)]


SEEN = """
from bench.scale.groups import LIGHT, Script
from bench.scale.process import arrays, found
from metis_fast.summary import Job

known = arrays()
assert found(known) == []
group, _ = Script(LIGHT).group(Job("train", 0, "train/0", 0), 0)
assert {"Group", "ImageBlob", "Rollout"} < set(found(known))
kept = [group.rollouts[0].tokens.repeat(2)]
del group
assert found(known) == [f"an array of {kept[0].nbytes} bytes"]
"""


def test_what_of_a_group_is_in_a_process_is_seen():
    ended = subprocess.run([sys.executable, "-c", SEEN], cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def test_bytes_of_connections_are_counted_closed_ones_too():
    meter = Meter()
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as near:
        far, _ = server.accept()
        with far:
            before = meter.mark()
            near.sendall(b"x" * 1000)
            assert far.recv(1000, socket.MSG_WAITALL) == b"x" * 1000
            after = meter.mark()
    closed = meter.mark()
    assert after.bytes_in - before.bytes_in == 1000 and after.bytes_out - before.bytes_out == 1000
    assert closed.bytes_in >= after.bytes_in


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--nodes", "0"], "--nodes: expected numbers from 1 to 64"),
        (["--nodes", "1,x"], "got '1,x'"),
        (["--steps", "2"], "--steps: expected 3 or more"),
        (["--prompts", "1"], "--prompts: expected 2 or more"),
        (["--shape", "big"], "--shape: expected one of paper, light"),
        (["--image", "64x64"], "--image: scale has none"),
        (["--threads", "2"], "--threads: scale has none"),
    ],
)
def test_options_that_make_no_sense_are_named(words: list[str], said: str):
    with pytest.raises(BenchError, match=said):
        request(parse(["bench", "scale", *words]))


def test_others_take_no_nodes(capsys):
    assert main(["rollout", "--nodes", "2"]) == 2
    assert "--nodes, --steps: rollout has none" in capsys.readouterr().err
