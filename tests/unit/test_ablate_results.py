"""Tables of an ablation, from run folders whose numbers are known."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from metis_fast.ablate.boundary import curves, write_boundary
from metis_fast.ablate.picture import write_picture
from metis_fast.ablate.process import Ended
from metis_fast.ablate.results import collect
from metis_fast.ablate.running import Cost, digest, read_cost, run_all
from metis_fast.ablate.spec import Planned
from metis_fast.ablate.table import write_tables
from metis_fast.config import build, to_yaml
from metis_fast.report.heldout import HeldOut
from metis_fast.report.slices import abilities_in, plain_kind, slices
from metis_fast.run.interrupt import Interrupts
from metis_fast.summary import RolloutSummary
from metis_fast.types import Avoided, Outcome, Savings, Score, Slice, StepStats, UpdateStats

_UPDATE = UpdateStats(
    loss=0.0, loss_acc=0.0, loss_tool=0.0, grad_norm=1.0, lr=1.0, clip_acc=0.0, clip_tool=0.0, kl=0.0, ratio_max=1.0,
    ratio_min=1.0, entropy=0.0, engine_gap=0.0, num_tokens=100, flops=3e9, avoided=Savings(rollouts=Avoided(50, 1e9)),
    n_acc=400, n_tool=100,
)  # fmt: skip
_ALL = Slice(num=10, num_no_verdict=2, accuracy=0.5, tool_rate=0.5, tool_calls=0.5, format_rate=1.0, response_tokens=20.0)
_STEP = StepStats(
    step=0, epoch=0, reward_acc=0.0, reward_tool=0.0, slices={"all": _ALL}, outcomes={"answered": 10}, tool_errors=0,
    qualifying_share=0.0, signal_share=0.0, bad_rows_skipped=0, updates=(_UPDATE,), seconds={"rollout": 3.0, "update": 1.0},
    cpu_seconds={"rollout": 2.0, "update": 2.0},
)  # fmt: skip

Make = Callable[..., Planned]


@pytest.fixture
def made(tmp_path: Path) -> Make:
    """Makes the folder of a run of one step that has ended, with these held-out prompts before and after it."""

    def make(variant: str, seed: int, before: list[HeldOut], after: list[HeldOut], **settings: object) -> Planned:
        folder = tmp_path / variant / f"seed-{seed}"
        config = build({"run": {"dir": folder, "seed": seed}, "train": {"steps": 1}, **settings})
        (folder / "heldout").mkdir(parents=True)
        for step, prompts in enumerate((before, after)):
            lines = "".join(json.dumps(asdict(one)) + "\n" for one in prompts)
            (folder / "heldout" / f"step-{step:06d}.jsonl").write_text(lines)
        (folder / "metrics.jsonl").write_text(json.dumps(asdict(_STEP)) + "\n")
        cost = Cost(digest(config), True, cpu_s=120.0, wall_s=60.0, peak_mib=500.0)
        (folder / "ablate.json").write_text(json.dumps(asdict(cost)))
        return Planned(variant, seed, config)

    return make


def _prompts(kind: str, calls: list[int], correct: list[bool]) -> list[HeldOut]:
    return [HeldOut(f"{kind}:{i}", "math", kind, (c,), (n,)) for i, (n, c) in enumerate(zip(calls, correct, strict=True))]


_BEFORE = [*_prompts("direct", [1, 1, 1, 1], [True] * 4), *_prompts("tool_needed", [1, 1], [True, False])]


def _after(calls: list[int]) -> list[HeldOut]:
    return [*_prompts("direct", calls, [True] * 4), *_prompts("tool_needed", [1, 1], [True, True])]


def test_means_spread_and_paired_tests_are_those_of_the_prompts(made: Make) -> None:
    runs = [
        made("hdpo", 0, _BEFORE, _after([0, 0, 0, 0])),
        made("grpo", 0, _BEFORE, _after([1, 1, 1, 1])),
        made("hdpo", 1, _BEFORE, _after([0, 0, 0, 2])),
        made("grpo", 1, _BEFORE, _after([1, 1, 0, 2])),
    ]
    results = collect(runs)
    hdpo, grpo = results.variants
    assert results.kinds == ("all", "direct", "tool_needed") and not results.missing
    assert hdpo.seeds == grpo.seeds == (0, 1)
    assert hdpo.before["tool_rate"]["direct"].mean == 1.0 and hdpo.before["accuracy"]["tool_needed"].mean == 0.5
    direct = hdpo.after["tool_rate"]["direct"]
    assert direct.seeds == (0.0, 0.25) and direct.mean == 0.125 and direct.std == pytest.approx(0.25 / 2**0.5)
    assert hdpo.after["tool_rate"]["all"].seeds == (2 / 6, 3 / 6)
    (test,) = [one for one in results.tests if (one.rate, one.kind) == ("tool_rate", "direct")]
    assert (test.first, test.second) == ("hdpo", "grpo")
    assert test.by_seed.difference == test.by_prompt.difference == 0.75
    assert (test.by_seed.n, test.by_prompt.n, test.by_prompt.clusters) == (2, 8, 4)
    assert test.by_prompt.better == 6 and test.by_prompt.worse == 0


def test_the_profile_of_a_variant_is_that_of_its_steps(made: Make) -> None:
    (only,) = collect([made("a", seed, _BEFORE, _BEFORE) for seed in (0, 1)]).variants
    profile = only.profile
    assert profile.steps == 2 and profile.cpu_s == {"rollout": 2.0, "update": 2.0} and profile.wall_s["rollout"] == 3.0
    assert profile.sampled == 8 * 20.0 and profile.tokens == 100 and profile.flops == 3e9
    assert profile.avoided["rollouts"] == 0.25 and profile.avoided["head"] == 0.0
    assert (profile.run_cpu_s, profile.run_wall_s, profile.peak_mib) == (120.0, 60.0, 500.0)


def test_runs_without_a_result_are_named_and_the_others_are_in_the_tables(made: Make, tmp_path: Path) -> None:
    runs = [made("a", 0, _BEFORE, _BEFORE), made("b", 0, _BEFORE, _BEFORE), made("b", 1, _BEFORE, _BEFORE)]
    (runs[0].folder / "ablate.json").unlink()
    cost = json.loads((runs[2].folder / "ablate.json").read_text())
    (runs[2].folder / "ablate.json").write_text(json.dumps(cost | {"ended": False, "why": "exit code 2: no memory"}))
    results = collect(runs)
    assert results.missing == {"a/seed-0": "has not ended", "b/seed-1": "exit code 2: no memory"}
    paths = {path.name: path.read_text() for path in write_tables(tmp_path, results)}
    assert "b/seed-1 (exit code 2: no memory)" in paths["results.md"] and "| b | 100.0% |" in paths["results.md"]
    assert json.loads(paths["results.json"])["variants"]["b"]["after"]["tool_rate"]["direct"]["seeds"] == [1.0]
    assert "b,0,tool_rate,direct,1.000000,1.000000" in paths["results.csv"].splitlines()
    assert paths["profile.md"].count("| b |") == 4
    picture = write_picture(tmp_path, results).read_text()
    # a cross, and of the one variant with a result a dot for its seed and one for the mean; so once more, to the byte
    assert "<!-- b -->" in picture and "<!-- a -->" not in picture and "<!-- before training -->" in picture
    assert write_picture(tmp_path, results).read_text() == picture


def test_the_boundary_is_where_the_mean_tool_rate_falls_through_one_half(made: Make, tmp_path: Path) -> None:
    def graded(*rates: tuple[float, int]) -> list[HeldOut]:
        return [
            one for p, calling in rates for one in _prompts(f"uncertain-{p:g}", [1] * calling + [0] * (4 - calling), [True] * 4)
        ]

    after = graded((0.5, 4), (0.7, 3), (0.9, 1), (0.95, 0))
    runs = [
        made("hdpo", 0, after, after, loss={"w_tool": 0.25}),
        made("coupled", 0, after, after, score={"estimator": "coupled"}),
        made("grpo", 0, after, after, score={"estimator": "grpo"}),
    ]
    hdpo, coupled, grpo = curves(runs)
    assert hdpo.crossing == pytest.approx(0.8) and hdpo.tool_right == 1.0
    assert hdpo.predicted == pytest.approx(0.8)  # 1 / 1.25
    assert hdpo.by_tokens == pytest.approx(0.5)  # N_acc / N_tool = 4
    assert (coupled.predicted, grpo.predicted, grpo.by_tokens) == (0.5, None, None)
    markdown, table, picture = (path.read_text() for path in write_boundary(tmp_path, [hdpo, coupled]))
    assert "| hdpo | 0.800 | 0.500 | 0.800 | 1.000 |" in markdown
    assert "hdpo,0.7,0.750000,,1.000000," in table.splitlines()
    assert picture.startswith("<?xml") and "hdpo" in picture
    first = picture
    write_boundary(tmp_path, [hdpo, coupled])
    assert (tmp_path / "boundary.svg").read_text() == first


def test_kinds_of_the_demo_without_odds_make_no_boundary(made: Make) -> None:
    assert curves([made("a", 0, _BEFORE, _BEFORE)]) == []


_PLAYED = RolloutSummary(
    prompt_uid="p", index=0, num_tokens=9, prompt_len=4, prompt_key=b"", num_sampled=5, num_tool_calls=1, num_tool_errors=0,
    image_spans=(), versions=((0, 5),), outcome=Outcome.ANSWERED,
)  # fmt: skip


@dataclass(frozen=True)
class _Group:
    kind: str | None
    ability: str = "math"
    rollouts: tuple[RolloutSummary, ...] = (_PLAYED,)
    scores: tuple[Score, ...] = (Score(None, Outcome.ANSWERED),)


def test_a_graded_kind_counts_as_its_plain_one_and_by_itself() -> None:
    names = list(slices([_Group("uncertain-0.7"), _Group("uncertain-0.95"), _Group("direct"), _Group("odd-0.5"), _Group(None)]))
    graded = ["uncertain-0.7", "uncertain-0.95"]
    assert names == ["all", "math", "direct", "uncertain", "math/direct", "math/uncertain", *graded]
    rates = slices([_Group("uncertain-0.7"), _Group("direct")])
    assert abilities_in(rates) == ["math"] and [rates[name].num for name in ("all", "uncertain", "uncertain-0.7")] == [2, 1, 1]
    assert [plain_kind(kind) for kind in ("uncertain-0.7", "direct", "uncertain-7", "tool_needed-0.777")] == [
        "uncertain",
        "direct",
        "uncertain-7",
        "tool_needed-0.777",
    ]


def test_a_run_that_was_made_with_other_settings_is_no_result(made: Make, tmp_path: Path) -> None:
    run = made("a", 0, _BEFORE, _BEFORE)
    changed = Planned("a", 0, build({"run": {"dir": run.folder}, "train": {"steps": 1}, "loss": {"w_tool": 0.3}}))
    assert collect([changed]).missing == {"a/seed-0": "was made with other settings"} and not collect([changed]).variants
    assert curves([changed]) == []
    longer = Planned("a", 0, build({"run": {"dir": run.folder}, "train": {"steps": 2}}))
    assert collect([longer]).missing == {"a/seed-0": "was made with other settings"}  # a budget decides what comes out
    cost = json.loads((run.folder / "ablate.json").read_text())
    (run.folder / "ablate.json").write_text(json.dumps(cost | {"settings": "of an earlier release"}))
    (run.folder / "config.yaml").write_text(to_yaml(run.config))  # which has none of the new settings, or their defaults
    assert not collect([run]).missing and collect([changed]).missing


def test_tables_without_any_result_say_so_and_pictures_of_an_earlier_call_go(made: Make, tmp_path: Path) -> None:
    run = made("a", 0, _BEFORE, _BEFORE)
    write_picture(tmp_path, collect([run]))
    (tmp_path / "boundary.svg").write_text("of an earlier call")
    (run.folder / "ablate.json").unlink()
    results = collect([run])
    write_tables(tmp_path, results)
    write_picture(tmp_path, results)
    assert write_boundary(tmp_path, curves([run])) == []
    assert (tmp_path / "results.md").read_text() == "# Results\n\nWithout a result: a/seed-0 (has not ended).\n"
    assert not (tmp_path / "results.svg").exists() and not (tmp_path / "boundary.svg").exists()


def test_a_run_whose_folder_was_removed_meanwhile_has_failed(made: Make, tmp_path: Path) -> None:
    run = made("a", 0, _BEFORE, _BEFORE)

    class Removed:
        """A process whose folder goes away under it."""

        def __init__(self, config: Path, log: Path) -> None:
            shutil.rmtree(log.parent)

        def poll(self) -> Ended:
            return Ended(2, 1.0, 1.0, 1.0, "exit code 2")

        def stop(self) -> None: ...
        def kill(self) -> None: ...

    (run.folder / "ablate.json").unlink()
    with Interrupts() as interrupts:
        assert run_all([run], 1, interrupts, Removed, quiet=True) == 1
    cost = read_cost(run.folder)
    assert cost is not None and not cost.ended and cost.why == "exit code 2"
