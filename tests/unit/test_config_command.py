"""Settings on a command line, and what `metis-fast config` prints."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import yaml

from metis_fast import cli
from metis_fast.config import known_keys, load
from metis_fast.config.reference import reference
from metis_fast.config.schema import schema
from metis_fast.errors import ConfigError

ROOT = Path(__file__).parents[2]
ABLATIONS = ("demo_ablation.yaml", "demo_boundary.yaml")  # of `metis-fast ablate`; test_ablate_spec.py reads them
FILES = sorted(path for path in (*ROOT.glob("configs/**/*.yaml"), *ROOT.glob("tests/**/*.yaml")) if path.name not in ABLATIONS)


VERBS = [
    ["demo", "my.yaml"], ["train", "my.yaml"], ["sft", "my.yaml", "--out", "model"], ["eval", "my.yaml"], ["config", "my.yaml"],
    ["plan", "my.yaml"], ["data", "demo", "set"],
]  # fmt: skip


@pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb[0])
def test_settings_may_have_the_dashes_of_options(verb):
    words = [*verb, "--loss.w_tool=0.2", "--json", "--run.dir", "a b", "train.steps=3", "--train.optim.lr", "-1"]
    args = cli.parse(words)
    assert args.overrides == ["loss.w_tool=0.2", "run.dir=a b", "train.steps=3", "train.optim.lr=-1"]
    assert args.json


def test_a_setting_with_dashes_takes_no_option_for_its_value(capsys):
    assert cli.main(["config", "run.seed=1", "--log.rollouts", "--json"]) == 2
    assert "override 'log.rollouts': expected section.key=value" in capsys.readouterr().err


def test_a_verb_without_settings_refuses_them(capsys):
    with pytest.raises(SystemExit):
        cli.parse(["bench", "patchify", "--loss.w_tool=0.2"])
    assert "unrecognized arguments: loss.w_tool=0.2" in capsys.readouterr().err


def test_a_setting_is_no_file_however_long_it_is(capsys):
    assert cli.main(["config", "data.train=" + ",".join(f"shard-{i:05d}.parquet" for i in range(400)), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["data"]["train"]) == 400


@pytest.mark.parametrize("words", [["--loss.w_tool"], ["loss.w_tool"], ["loss.w_tool:1"]])
def test_a_setting_without_a_value_is_told(words, capsys):
    assert cli.main(["config", *words]) == 2
    assert "expected section.key=value" in capsys.readouterr().err


def test_changes_as_json_are_the_changes(capsys):
    assert cli.main(["config", "loss.w_tool=0.2", "--changes", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"loss": {"w_tool": 0.2}}


def test_json_has_no_infinity(tmp_path, capsys):
    assert cli.main(["config", "loss.dual_clip=inf", "--json"]) == 0
    (tmp_path / "a.json").write_text(json.dumps(json.loads(capsys.readouterr().out, parse_constant=pytest.fail)))
    assert load(tmp_path / "a.json").loss.dual_clip == math.inf


def test_closed_streams_are_no_failure():
    ended = subprocess.run(
        ["sh", "-c", f"{sys.executable} -m metis_fast config >&- <&-"], capture_output=True, text=True, check=False
    )
    assert (ended.returncode, ended.stderr) == (0, "")


def test_config_takes_settings_without_a_file(capsys):
    assert cli.main(["config", "loss.w_tool=0.2", "run.seed=3", "--changes"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == {"run": {"seed": 3}, "loss": {"w_tool": 0.2}}


@pytest.mark.parametrize("words", [["loss.w_tool", "=", "0.2"], ["loss.w_tool=", "0.2"], ["loss.w_tool", "=0.2"]])
def test_blanks_around_the_equals_sign_are_told(words, capsys):
    assert cli.main(["config", "--changes", "run.seed=1", *words]) == 2
    message = capsys.readouterr().err
    assert "without blanks around the `=`" in message and len(message.splitlines()) == 1


# -- schema ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def validator():
    jsonschema.Draft202012Validator.check_schema(schema())
    return jsonschema.Draft202012Validator(schema())


def test_the_command_prints_the_schema(capsys):
    assert cli.main(["config", "--schema"]) == 0
    assert json.loads(capsys.readouterr().out) == schema()
    assert schema()["$schema"] == "https://json-schema.org/draft/2020-12/schema"


def test_there_are_files_to_validate():
    assert {"demo.yaml", "qwen3vl_8b_hdpo_64gpu.yaml", "small.yaml"} <= {path.name for path in FILES}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_file_of_the_repository_is_valid(path, validator):
    assert list(validator.iter_errors(yaml.safe_load(path.read_text(encoding="utf-8")))) == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_config_prints_is_valid(path, validator, capsys):
    assert cli.main(["config", str(path)]) == 0
    assert list(validator.iter_errors(yaml.safe_load(capsys.readouterr().out))) == []


VALID = [
    "{}", "base: other.yaml", "loss: {}", "model: {dtype: auto}", "model: {dtype: bfloat16, config: null}",
    "loss: {dual_clip: .inf}", "data: {train: [a, b]}", "tools: {enabled: []}",
    "sft: {phases: [{trajectories: a, steps: 1}]}", "train: {steps: 10.0}",
    "rollout: {vllm: {arguments: {a: 1, b: null, c: x, d: true, e: 1.5}, speculative: {method: ngram}}}",
    "score: {llm: {cache: null}}", "train: {optim: {betas: [0.9, 0.95]}}", "loss: {eps_low: 0}", "loss: {eps_low: 1}",
]  # fmt: skip
INVALID = [
    "losses: {}", "loss: {w_tol: 1}", "rollout: {vllm: {replica: 1}}",
    "sft: {phases: [{trajectories: a, steps: 1, step: 1}]}", "loss: {base: x}", "base: [a]", "loss: 3",
    "loss: [w_tool]", "loss: {w_tool: much}", "loss: {w_tool: -0.1}", "loss: {w_tool: .inf}", "loss: {w_tool: null}",
    "loss: {dual_clip: 1}", "loss: {dual_clip: -.inf}", "loss: {eps_low: 1.1}", "train: {steps: 0}",
    "train: {steps: 1.5}", "train: {steps: true}", "train: {steps: {}}", "rollout: {top_p: 0}",
    "rollout: {vllm: {gpu_memory: 1.5}}", "rollout: {vllm: {arguments: {a: [1]}}}", "rollout: {vllm: {arguments: 3}}",
    "model: {dtype: float16}", "model: {freeze: [head]}", "run: {dir: [a]}", "run: {dir: {a: b}}",
    "tools: {enabled: [browser]}", "train: {optim: {betas: [0.9]}}", "train: {optim: {betas: [0.9, 1]}}",
    "train: {optim: {betas: [0.9, 0.9, 0.9]}}", "sft: {phases: [{steps: 1}]}", "sft: {phases: [a]}",
    "sft: {phases: [{trajectories: a, steps: 0}]}", "log: {rollouts: maybe}", "log: {rollouts: {}}",
    "score: {estimator: ppo}", "[a]", "hello",
]  # fmt: skip


@pytest.mark.parametrize("text", VALID)
def test_schema_and_load_take_the_same(text, validator, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    (tmp_path / "other.yaml").write_text("")
    load(path)  # raises nothing
    assert list(validator.iter_errors(yaml.safe_load(text))) == []


@pytest.mark.parametrize("text", INVALID)
def test_schema_and_load_refuse_the_same(text, validator, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError):
        load(path)
    assert not validator.is_valid(yaml.safe_load(text))


def test_the_schema_has_every_setting_with_its_meaning_and_its_default(validator):
    tree, config = schema(), load(None)
    for key in known_keys():
        node, value = tree, config
        for part in key.split("."):
            node, value = node["properties"][part], getattr(value, part)
        assert node["description"].strip()
        if "properties" in node:
            assert node["additionalProperties"] is False and "required" not in node
        else:
            assert node["default"] == json.loads(
                json.dumps(value, default=lambda v: str(v) if isinstance(v, Path) else list(v))
            )
    assert tree["properties"]["sft"]["properties"]["optim"]["properties"]["lr"]["default"] == 1e-5


def test_only_the_dual_clip_may_be_infinite(validator):
    infinite = [
        key
        for key in known_keys()
        if "." in key and validator.is_valid(_at(key, math.inf)) and not validator.is_valid(_at(key, "x"))
    ]
    assert infinite == ["loss.dual_clip"]


def _at(key, value):
    for part in reversed(key.split(".")):
        value = {part: value}
    return value


# -- reference ------------------------------------------------------------------------------------------------------------


def test_the_page_of_all_settings_is_what_the_command_prints(capsys):
    assert cli.main(["config", "--reference"]) == 0
    printed = capsys.readouterr().out
    assert printed == reference()
    page = (ROOT / "docs" / "settings.md").read_text(encoding="utf-8")
    assert page == printed, "write it anew: metis-fast config --reference > docs/settings.md"


def test_the_page_has_a_row_for_every_setting():
    sections = {part.split("\n", 1)[0]: part for part in reference().split("\n## ")[1:]}
    for key in known_keys():
        section, _, name = key.rpartition(".")
        assert key in sections or f"| `{name}` |" in sections[section]
    assert "| `eps_low` | number from 0, at most 1 | `0.2` | Lower clip range. |" in sections["loss"]


@pytest.mark.parametrize("option", ["--schema", "--reference"])
def test_what_is_about_all_files_takes_none(option, capsys):
    for words in (["configs/demo.yaml"], ["loss.w_tool=0.2"]):
        assert cli.main(["config", option, *words]) == 2
        assert "give them no file and no settings" in capsys.readouterr().err
