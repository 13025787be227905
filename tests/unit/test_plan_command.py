"""`metis-fast plan` as a command: what it prints, what it refuses, and that its page shows what runs."""

from __future__ import annotations

import json
import re
import resource
import shlex
import sys
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import pytest
from planning import CONFIGS, EIGHT_B, big, tiny

from metis_fast import cli
from metis_fast.config import Config, MegatronConfig, build
from metis_fast.errors import ModelError
from metis_fast.plan.duration import StepSeconds
from metis_fast.plan.gpus import GIB
from metis_fast.plan.memory import RankMemory
from metis_fast.plan.shape import Shape, read_model_config

# -- the command ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def described(tmp_path: Path) -> Path:
    path = tmp_path / "eight.json"
    path.write_text(json.dumps(EIGHT_B))
    return path


@pytest.fixture
def plan(tmp_path: Path, described: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs `metis-fast plan` on an empty config; exit code, output, errors."""
    empty = tmp_path / "empty.yaml"
    empty.write_text("")

    def run(*words: object, config: Path = empty, model: bool = True) -> tuple[int, str, str]:
        code = cli.main(["plan", str(config), *(["--model", str(described)] if model else []), *map(str, words)])
        out, err = capsys.readouterr()
        return code, out, err

    return run


MEGATRON = ("train.backend=megatron", "train.megatron.tensor_parallel=8", "train.megatron.sequence_parallel=true")


def test_json_has_every_layout_with_what_is_predicted_of_it(plan):
    code, out, _ = plan("--json", *MEGATRON, "train.megatron.recompute=full")
    tree = json.loads(out)
    assert (code, tree["num_gpus"], tree["gpu"]) == (0, 8, "h100")
    assert sum(one["own"] for one in tree["layouts"]) == 1
    for one in tree["layouts"]:
        assert set(one) == {"layout", "own", "predicted"}
        predicted = one["predicted"]
        for name, made in (("memory_bytes", RankMemory), ("seconds", StepSeconds)):
            assert set(predicted[name]) == {part.name for part in fields(made)} | {"total"}
            assert predicted[name]["total"] == pytest.approx(sum(v for k, v in predicted[name].items() if k != "total"))
        MegatronConfig.model_validate(one["layout"])


def test_the_table_says_what_was_assumed_and_marks_the_configs_layout(plan):
    code, out, _ = plan(*MEGATRON, "train.megatron.recompute=full")
    lines = out.splitlines()
    assert code == 0 and lines[0].startswith("PREDICTED, nothing here was measured")
    assert sum(line.startswith("PREDICTED") for line in lines) == 5
    assert sum("* tp8+sp pp1" in line and "full" in line for line in lines) == 2


def test_a_layout_of_the_config_that_does_not_fit_ends_with_1_and_the_best_that_does(plan):
    code, out, _ = plan(*MEGATRON, "train.megatron.recompute=none")
    assert code == 1 and "does NOT fit; the best that does is tp" in out
    code, out, _ = plan("--gpus", 16, *MEGATRON, "train.megatron.recompute=none")
    assert code == 0 and "The config has no layout for this many GPUs" in out


def test_nothing_that_fits_says_what_to_change(plan):
    code, out, _ = plan("--gpus", 1)
    assert code == 1 and "Take more GPUs (--gpus), lower --engine-share, or lower train.tokens_per_micro_batch" in out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--gpus", 12], "expected at most 8, or a multiple of 8 (whole nodes), got 12"),
        (["--gpus", 0], "got 0; set --gpus"),
        (["--engine-share", 1], "expected a share from 0 to below 1, got 1.0"),
        (["--engine-share", 0.1], "cannot hold the weights and one rollout of 40960 tokens; set --engine-share to 0.28"),
        (["--prompt-tokens", 30000], "expected 1 to rollout.max_prompt_tokens=24576, got 30000"),
        (["--response-tokens", 0], "expected 1 to rollout.max_response_tokens=16384, got 0"),
        (["--uniform", 1], "--uniform: expected a share from 0.0 to 0.99"),
        (["--sampled", "nan"], "--sampled: expected a share"),
        (["--images", 4], "4 images of 1024 tokens are more than the 3072 tokens of a prompt"),
        (["--images", -1], "--images: expected 0 or more"),
        (["train.backend=megatron", "train.megatron.tensor_parallel=3"], "does not divide the model's 32 attention heads"),
    ],
)
def test_what_cannot_be_planned_is_refused_with_what_to_do(plan, words, says):
    code, out, err = plan(*words)
    assert (code, out) == (2, "") and says in err and err.count("\n") == 1


def test_the_model_is_found_in_its_folder_then_in_its_description(plan, tmp_path, described):
    code, _, err = plan(model=False)
    assert code == 2 and "set model.path to a model folder, or model.config" in err
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(tiny(True).to_dict(), default=str))
    for given, path, parameters in (
        (None, folder, Shape.of(tiny(True)).num_parameters),
        (described, folder, Shape.of(big()).num_parameters),
        (folder, tmp_path / "none", Shape.of(tiny(True)).num_parameters),
        (None, tmp_path / "none", Shape.of(big()).num_parameters),
    ):
        settings = build({"model": {"path": str(path), "config": str(described)}})
        assert Shape.of(read_model_config(settings, given)).num_parameters == parameters


@pytest.mark.parametrize(
    ("text", "says"), [("{", "is not valid JSON"), ("[]", "holds a JSON list"), ('{"model_type": "llama"}', "got 'llama'")]
)
def test_what_is_no_qwen_is_refused(tmp_path, text, says):
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(ModelError, match=says):
        read_model_config(Config(), path)
    with pytest.raises(ModelError, match="does not exist"):
        read_model_config(Config(), tmp_path / "none.json")


def test_an_engine_that_sleeps_needs_room_beside_what_the_trainer_keeps_once_it_is_awake(plan, monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)

    def own(share):
        setting = f"rollout.vllm.gpu_memory={share}"
        code, out, _ = plan("--json", setting, config=CONFIGS / "qwen3vl_8b_hdpo.yaml", model=False)
        (found,) = [one for one in json.loads(out)["layouts"] if one["own"]]
        return code, found

    (code, small), (too_much, large) = own(0.5), own(0.6)  # 29 GiB of weights, gradients and states, 4 of reserve, of 79
    assert (code, too_much) == (0, 1)
    assert small["predicted"]["fits"] and not large["predicted"]["fits"]
    memory = [one["predicted"]["memory_bytes"] for one in (small, large)]
    assert memory[0] == memory[1] and memory[0]["engine"] == 0  # of the update, during which it sleeps


@pytest.mark.parametrize("name", ["qwen3vl_8b_hdpo", "qwen3vl_8b_hdpo_64gpu", "qwen3vl_8b_hdpo_512gpu"])
def test_a_shipped_config_fits_and_is_near_the_best(plan, name, monkeypatch):
    started = time.monotonic()
    monkeypatch.chdir(CONFIGS.parent)
    code, out, _ = plan("--json", config=CONFIGS / f"{name}.yaml", model=False)
    tree = json.loads(out)
    (own,) = [one for one in tree["layouts"] if one["own"]]
    best = tree["layouts"][0]["predicted"]["seconds"]["total"]
    assert code == 0 and own["predicted"]["seconds"]["total"] < 1.05 * best
    assert own["predicted"]["memory_bytes"]["total"] < 0.95 * tree["gpu_memory_bytes"]
    assert time.monotonic() - started < 120
    unit = 1 if sys.platform == "darwin" else 1024
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit < 8 * GIB


# -- the page ---------------------------------------------------------------------------------------------------------------


def _commands() -> list[str]:
    return re.findall(r"^metis-fast .*$", (CONFIGS.parent / "docs" / "plan.md").read_text(encoding="utf-8"), re.MULTILINE)


def test_the_page_shows_commands():
    assert len(_commands()) >= 5


@pytest.mark.parametrize("line", _commands())
def test_a_command_of_the_page_runs(line, monkeypatch, capsys):
    monkeypatch.chdir(CONFIGS.parent)
    assert cli.main(shlex.split(line, comments=True)[1:]) == 0
    assert "redicted" in capsys.readouterr().out.lower()
