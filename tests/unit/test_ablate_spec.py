"""An ablation's file: what it says is what its runs get, and what cannot be is one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from metis_fast import config as config_module
from metis_fast.ablate.job import make
from metis_fast.ablate.spec import Budget, planned_runs, read_ablation, shared_config
from metis_fast.errors import ConfigError

_CONFIGS = Path(__file__).parents[2] / "configs"
_LEAST = "variants: {a: {}}\n"


def _file(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("name", ["demo_ablation.yaml", "demo_boundary.yaml"])
def test_a_shipped_ablation_has_settings_that_fit_and_runs_that_differ(name: str) -> None:
    ablation = read_ablation(_CONFIGS / name)
    shared = shared_config(ablation)
    runs = planned_runs(ablation, shared, ablation.budget.steps)
    assert len(runs) == len(ablation.variants) * len(ablation.seeds) and len(ablation.seeds) == 3
    configs = [run.config.model_dump(exclude={"run"}) for run in runs if run.seed == 0]
    assert all(configs[i] != configs[j] for i in range(len(configs)) for j in range(i))
    assert {run.config.model.path for run in runs} == {shared.run.dir / "cold_start"}
    assert {run.config.data.heldout for run in runs} == {(shared.run.dir / "data" / "heldout.parquet",)}


def test_variants_seeds_and_budget_reach_their_runs_and_nothing_else_differs(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("loss: {w_tool: 0.3}\ntrain: {steps: 7}\n")
    text = """
out: made
base: {base: base.yaml, rollout: {temperature: 0.5}}
cold_start: models/start
seeds: [3, 1]
budget: {steps: 5}
jobs: 2
variants:
  plain:
  dotted: {loss.w_tool: 1e-1}
  nested: {loss: {w_tool: .2, dual_clip: .inf}, score: {estimator: coupled}}
"""
    ablation = read_ablation(_file(tmp_path, text))
    runs = planned_runs(ablation, shared_config(ablation), ablation.budget.steps)
    assert [run.name for run in runs] == [f"{v}/seed-{s}" for s in (3, 1) for v in ("plain", "dotted", "nested")]
    assert [run.config.loss.w_tool for run in runs[:3]] == [0.3, 0.1, 0.2]
    assert runs[2].config.loss.dual_clip == float("inf") and runs[2].config.score.estimator == "coupled"
    assert {(run.config.train.steps, run.config.rollout.temperature, str(run.config.model.path)) for run in runs} == {
        (5, 0.5, str(Path("models/start").absolute()))
    }
    assert runs[0].folder == Path("made/plain/seed-3").absolute() and runs[0].config.run.seed == 3
    assert runs[0].config == runs[0].config and ablation.jobs == 2


def test_a_run_of_a_file_is_what_its_config_says_when_it_is_read_again(tmp_path: Path) -> None:
    ablation = read_ablation(_file(tmp_path, "variants: {a: {loss: {w_tool: 0.05, dual_clip: .inf}}}\nbudget: {steps: 3}\n"))
    (run,) = planned_runs(ablation, shared_config(ablation), 3)
    written = tmp_path / "run.yaml"
    written.write_text(config_module.to_yaml(run.config, only_changes=True))
    assert config_module.load(written) == run.config


def test_cpu_minutes_are_a_budget_too(tmp_path: Path) -> None:
    assert read_ablation(_file(tmp_path, f"{_LEAST}budget: {{cpu_minutes: 4}}\n")).budget == Budget(None, 4.0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seeds: [0]\n", "variants: expected names"),
        (f"{_LEAST}seed: [0]\n", "unknown key 'seed'; did you mean 'seeds'"),
        ("variants: {a: {}, a: {}}\n", "'a' stands here twice"),
        ("variants: {../a: {}}\n", "a name is letters, digits"),
        ("variants: {demo: {}}\n", "demo is a name of the ablation's own files"),
        ("variants: {pilot: {}}\n", "pilot is a name of the ablation's own files"),
        ("variants: {results.md: {}}\n", "results.md is a name of the ablation's own files"),
        ("variants: {a: {run: {seed: 3}}}\n", "variants.a: run.seed is set by `seeds`"),
        ("variants: {a: {run.dir: elsewhere}}\n", "variants.a: run.dir is set by `out`"),
        ("variants: {a: {train: {steps: 1}}}\nbudget: {steps: 2}\n", "variants.a: train.steps is set by `budget`"),
        (f"{_LEAST}ray: [1]\n", "ray: expected auto, local or host:port"),
        (f"{_LEAST}demo: here\ncold_start: there\n", "`demo` makes the cold start itself"),
        ("variants: {a: 3}\n", "variants.a: expected settings"),
        (f"{_LEAST}seeds: [0, 0]\n", "different whole numbers"),
        (f"{_LEAST}seeds: [x]\n", "seeds: expected a whole number"),
        (f"{_LEAST}jobs: 0\n", "jobs: expected a whole number of at least 1"),
        (f"{_LEAST}budget: 60\n", "expected {steps: N} or {cpu_minutes: N}"),
        (f"{_LEAST}budget: {{cpu_minutes: -1}}\n", "expected a number above 0"),
        (f"{_LEAST}base: [a]\n", "base: expected the path of a config"),
        ("[1, 2]", "expected keys like"),
        ("variants: {a: [", "is not YAML"),
    ],
)
def test_what_cannot_be_is_one_line_that_names_the_file(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_ablation(_file(tmp_path, text))
    assert said in str(caught.value) and "mine.yaml" in str(caught.value) and "\n" not in str(caught.value)


def test_a_setting_that_is_none_names_its_variant(tmp_path: Path) -> None:
    ablation = read_ablation(_file(tmp_path, "variants: {good: {}, bad: {loss: {w_tols: 1}}}\n"))
    with pytest.raises(ConfigError, match=r"variant bad: .*loss\.w_tols"):
        planned_runs(ablation, shared_config(ablation), 1)


def test_runs_without_a_model_to_begin_from_are_not_started(tmp_path: Path) -> None:
    text = f"variants: {{a: {{}}}}\nbase: {{data: {{heldout: [x.parquet]}}}}\nout: {tmp_path / 'out'}\ncold_start: {tmp_path}\n"
    with pytest.raises(ConfigError, match="cold_start: expected the folder of a model"):
        make(read_ablation(_file(tmp_path, text)))
    assert not (tmp_path / "out").exists()
