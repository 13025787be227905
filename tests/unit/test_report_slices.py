"""Rates by kind and the before/after table, against numbers worked out by hand."""

from __future__ import annotations

import json
from html import escape
from pathlib import Path

import numpy as np
import pytest

from metis_fast.errors import DataError
from metis_fast.report.curves import _svg
from metis_fast.report.slices import abilities_in, main_abilities, slices
from metis_fast.report.summary import print_summary_table, read_summary, write_summary
from metis_fast.types import (
    Message,
    Outcome,
    Prompt,
    Rollout,
    Score,
    ScoredGroup,
    Slice,
    ToolCall,
    Turn,
    Verdict,
)


def group(ability: str, kind: str | None, members: list[tuple[int, int, Verdict | None]]) -> ScoredGroup:
    """members: (tool calls, sampled tokens, verdict) of each rollout."""
    extra = {} if kind is None else {"kind": kind}
    prompt = Prompt("p", "unit", (Message("user", "?"),), (), ability, ("7",), "rule", "?", extra)
    rollouts = []
    for index, (num_calls, num_sampled, _) in enumerate(members):
        sampled = np.arange(num_sampled + 2) >= 2
        turn = Turn("", 2, 3, 3, Outcome.TOOL_RESULT, ToolCall("python", "{}"))
        rollouts.append(
            Rollout(
                prompt_uid="p",
                index=index,
                tokens=np.zeros(len(sampled), np.int32),
                prompt_len=2,
                sampled=sampled,
                logp=np.zeros(len(sampled), np.float32),
                weight_version=np.where(sampled, 0, -1).astype(np.int32),
                images=(),
                image_spans=(),
                turns=(turn,) * num_calls,
                outcome=Outcome.ANSWERED,
            )
        )
    scores = tuple(Score(verdict, Outcome.ANSWERED) for _, _, verdict in members)
    return ScoredGroup(prompt, tuple(rollouts), scores)


RIGHT, WRONG, UNTIDY = Verdict(True, True, "7"), Verdict(False, True, "8"), Verdict(True, False, "7")
GROUPS = [
    group("math", "direct", [(0, 10, RIGHT), (3, 30, WRONG), (1, 99, None)]),
    group("search", "direct", [(1, 20, UNTIDY), (0, 40, WRONG)]),
    group("search", None, [(2, 50, RIGHT)]),
    group("perception", "uncertain", [(1, 5, None)]),
]


def test_rates_by_hand():
    made = slices(GROUPS)
    assert made["all"] == Slice(7, 2, 3 / 5, 3 / 5, 6 / 5, 4 / 5, 30.0)
    assert made["math"] == made["math/direct"] == Slice(3, 1, 0.5, 0.5, 1.5, 1.0, 20.0)
    assert made["search"] == Slice(3, 0, 2 / 3, 2 / 3, 1.0, 2 / 3, 110 / 3)
    assert made["direct"] == Slice(5, 1, 0.5, 0.5, 1.0, 0.75, 25.0)
    assert made["search/direct"] == Slice(2, 0, 0.5, 0.5, 0.5, 0.5, 30.0)


def test_rates_over_nothing_are_zero_and_say_so():
    assert slices(GROUPS)["uncertain"] == Slice(1, 1, 0.0, 0.0, 0.0, 0.0, 0.0)


def test_only_known_kinds_make_slices_and_all_comes_first():
    made = slices([*GROUPS, group("math", "a free text of some data set", [(0, 1, RIGHT)])])
    assert list(made) == [
        "all",
        "math",
        "perception",
        "search",
        "direct",
        "uncertain",
        "math/direct",
        "perception/uncertain",
        "search/direct",
    ]
    assert slices([]) == {}


def test_any_text_is_an_ability_and_none_takes_the_name_of_another_slice():
    odd = ["all", "direct", "math/direct", "two\nlines", "", "x" * 500, "图表", "a/b"]
    made = slices([group(ability, "direct", [(0, 1, RIGHT)]) for ability in odd])
    taken = ["(ability)", "a/b", "all (ability)", "direct (ability)", "math/direct (ability)"]
    names = [*taken, "two lines", "x" * 100, "图表"]
    assert abilities_in(made) == names
    assert made["all"].num == made["direct"].num == len(odd)
    assert all(made[f"{name}/direct"].num == 1 for name in names)


def test_the_abilities_with_most_rollouts_are_shown():
    many = slices([group(f"kind {n:02}", None, [(0, 1, RIGHT)] * (1 + n % 20)) for n in range(20)])
    assert main_abilities([many, many]) == [f"kind {n:02}" for n in range(12, 20)]


def test_names_of_the_data_are_text_in_a_picture():
    """Neither a formula nor markup nor, for an underscore at their beginning, left out of the legend."""
    series = {name: ((1, 2), (0.1, 0.2)) for name in ("$x^2", "_hidden", "<b>&", "a$b$c")}
    svg = _svg("x", series, "rate")
    assert all(escape(name) in svg for name in series)


def rates(tool_rate: float, accuracy: float) -> Slice:
    return Slice(100, 0, accuracy, tool_rate, 1.0, 1.0, 10.0)


BEFORE = {"all": rates(0.9, 0.5), "math": rates(0.8, 0.6), "direct": rates(1.0, 0.7), "math/direct": rates(0.75, 0.25)}
AFTER = {"all": rates(0.1, 0.9), "math": rates(0.2, 0.8), "direct": rates(0.02, 0.905), "math/direct": rates(0.0, 1.0)}


def test_summary_file_has_exactly_the_promised_tree(tmp_path: Path):
    written = write_summary(tmp_path / "summary.json", seed=3, wall_s=12.5, before=BEFORE, after=AFTER)
    assert json.loads((tmp_path / "summary.json").read_text()) == {
        "seed": 3,
        "wall_s": 12.5,
        "before": {
            "direct": {"tool_rate": 1.0, "accuracy": 0.7},
            "by_ability": {
                "math": {"direct": {"tool_rate": 0.75, "accuracy": 0.25}, "all": {"tool_rate": 0.8, "accuracy": 0.6}}
            },
        },
        "after": {
            "direct": {"tool_rate": 0.02, "accuracy": 0.905},
            "by_ability": {"math": {"direct": {"tool_rate": 0.0, "accuracy": 1.0}, "all": {"tool_rate": 0.2, "accuracy": 0.8}}},
        },
    }
    assert read_summary(tmp_path / "summary.json") == written


def test_summary_table_reads_before_to_after(tmp_path: Path, capsys):
    print_summary_table(write_summary(tmp_path / "summary.json", seed=3, wall_s=12.5, before=BEFORE, after=AFTER))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines] == [
        ["tool-call", "rate", "accuracy"],
        ["direct", "100.0%", "->", "2.0%", "70.0%", "->", "90.5%"],
        ["math", "80.0%", "->", "20.0%", "60.0%", "->", "80.0%"],
        ["direct", "75.0%", "->", "0.0%", "25.0%", "->", "100.0%"],
    ]
    assert lines[3].startswith("  direct"), "a kind within an ability is indented"
    assert len({line.index("->") for line in lines[1:]}) == 1


def test_summary_table_leaves_a_dash_where_one_side_has_no_such_prompts(tmp_path: Path, capsys):
    after = {"math": rates(0.2, 0.8)}
    print_summary_table(write_summary(tmp_path / "summary.json", seed=3, wall_s=12.5, before=BEFORE, after=after))
    assert capsys.readouterr().out.splitlines()[1].split() == ["direct", "100.0%", "->", "-", "70.0%", "->", "-"]


@pytest.mark.parametrize("text", ["", "[]", '{"seed": 1}', '{"seed": 1, "wall_s": 2, "before": {}, "after": {}}'])
def test_a_file_that_is_no_summary_is_refused(tmp_path: Path, text: str):
    path = tmp_path / "summary.json"
    path.write_text(text)
    with pytest.raises(DataError, match="expected the summary of a run"):
        read_summary(path)
