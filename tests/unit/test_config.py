"""Configuration: what is written is what is run; what cannot work is refused in one line that says what to do."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from metis_fast.config import Config, build, deciding, load, to_yaml
from metis_fast.errors import ConfigError

ABLATIONS = ("demo_ablation.yaml", "demo_boundary.yaml")  # of `metis-fast ablate`; test_ablate_spec.py reads them
CONFIGS = sorted(path for path in (Path(__file__).parents[2] / "configs").glob("*.yaml") if path.name not in ABLATIONS)


@pytest.fixture
def write(tmp_path):
    """Writes a YAML file of that name and returns its path."""

    def run(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return run


def refusal(*overrides, path=None):
    with pytest.raises(ConfigError) as caught:
        load(path, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- the files that ship --------------------------------------------------------------------------------------------------


def test_there_are_configs_to_check():
    assert "demo.yaml" in {path.name for path in CONFIGS}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_a_shipped_config_parses_and_its_resolved_form_loads_as_the_same(path, write):
    config = load(path)
    assert load(write("all.yaml", to_yaml(config))) == config
    assert load(write("changes.yaml", to_yaml(config, only_changes=True))) == config
    assert load(write("former.yaml", yaml.safe_dump(config.model_dump(mode="json"), default_flow_style=None))) == config


def test_the_defaults_are_the_papers_recipe():
    config = Config()
    rollout, loss, optim = config.rollout, config.loss, config.train.optim
    assert (rollout.prompts_per_step, rollout.rollouts_per_prompt, config.train.prompts_per_mini_batch) == (128, 16, 64)
    assert (loss.w_acc, loss.w_tool, loss.eps_low, loss.eps_high, loss.dual_clip) == (1.0, 0.15, 0.2, 0.2, 3.0)
    assert (loss.kl_coef, loss.entropy_coef, loss.tis_cap, loss.normalization) == (0, 0, 0, "global")
    assert (optim.lr, optim.warmup_steps, optim.final_lr, optim.weight_decay, optim.grad_clip) == (1e-6, 0, 1.0, 0.01, 1.0)
    assert (rollout.max_prompt_tokens, rollout.max_response_tokens, rollout.max_observation_tokens) == (24576, 16384, 8192)
    assert (rollout.max_turns, rollout.temperature, rollout.top_p, rollout.top_k) == (10, 1.0, 1.0, 0)
    assert (config.score.w_ans, config.score.w_fmt, config.train.steps, config.tools.python.timeout_s) == (0.9, 0.1, 200, 20.0)


# -- values and combinations ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "override",
    [
        "loss.w_tool=-0.1",
        "loss.w_tool=.nan",
        "loss.w_acc=.inf",
        "loss.dual_clip=1",
        "loss.dual_clip=.nan",
        "loss.eps_low=1.5",
        "rollout.top_p=0",
        "rollout.top_p=.nan",
        "rollout.temperature=0",
        "rollout.max_turns=0",
        "train.steps=1.5",
        "train.optim.betas=[0.9]",
        "model.dtype=float16",
        "tools.enabled=[browser]",
        "score.estimator=ppo",
        "data.on_bad_row=",
    ],
)
def test_a_value_out_of_range_is_refused_and_named(override):
    key = override.partition("=")[0]
    message = refusal(override)
    assert key in message and "got" in message


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["rollout.prompts_per_step=100"], "no multiple of train.prompts_per_mini_batch=64"),
        (["rollout.rollouts_per_prompt=1"], "gives every advantage 0"),
        (["score.w_ans=0", "score.w_fmt=0"], "both 0, so every reward is"),
        (["loss.w_acc=0", "loss.w_tool=0"], "both 0, so nothing is learnt"),
        (["loss.normalization=reference", "score.estimator=grpo"], "set score.estimator=hdpo"),
        (["rollout.max_turn_tokens=20000"], "larger than rollout.max_response_tokens"),
        (["rollout.top_k=5"], "samples from another distribution"),
        (["rollout.top_p=0.9", "loss.tis_cap=2"], "which no importance weight corrects"),
        (["train.optim.betas=[0.9, 1.0]"], "less than 1"),
        (["sft.optim.betas=[1.0, 0.9]"], "less than 1"),
    ],
)
def test_a_combination_that_cannot_work_says_what_to_set(overrides, message):
    assert message in refusal(*overrides)


@pytest.mark.parametrize("overrides", [["loss.tis_cap=2"], ["loss.w_acc=0"], ["score.w_fmt=0"]])
def test_combinations_that_only_look_odd_are_allowed(overrides):
    assert load(None, overrides) != Config()


@pytest.mark.parametrize(
    ("cuda", "instructions", "chosen"),
    [
        (False, {}, "float32"),
        (False, {"avx512_bf16": False, "amx_bf16": False}, "float32"),
        (False, {"avx512_bf16": True}, "bfloat16"),
        (False, {"amx_bf16": True}, "bfloat16"),
        (True, {}, "bfloat16"),
    ],
)
def test_the_type_of_weights_may_be_what_this_machine_multiplies_fast(monkeypatch, cuda, instructions, chosen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions)
    auto = load(None, ["model.dtype=auto"])
    assert auto.model.dtype == chosen
    monkeypatch.setattr(torch.cuda, "is_available", lambda: not cuda)
    assert build(yaml.safe_load(to_yaml(auto))) == auto  # on whatever machine it goes on


def test_every_problem_is_reported_at_once():
    with pytest.raises(ConfigError) as caught:
        build({"loss": {"w_tol": 1, "eps_low": 2}, "train": {"steps": "many"}}, "my.yaml")
    message = str(caught.value)
    assert message.startswith("my.yaml: ") and all(part in message for part in ("w_tol", "eps_low", "train.steps"))


def test_a_config_cannot_be_changed_in_place():
    with pytest.raises(ValueError, match="frozen"):
        Config().loss.w_tool = 0.3


def test_checks_of_several_sections_are_told_together():
    message = refusal("loss.w_acc=0", "loss.w_tool=0", "score.w_ans=0", "score.w_fmt=0")
    assert "loss.w_acc and loss.w_tool are both 0" in message and "score.w_ans and score.w_fmt are both 0" in message


def test_direct_transfers_are_refused_where_the_engine_is_on_the_wrong_gpu():
    vllm = ["rollout.engine=vllm", "rollout.deterministic=false"]
    assert "set rollout.vllm.sleep=true" in refusal(*vllm, "sync.transport=ipc")
    asleep = [*vllm, "rollout.vllm.sleep=true"]
    load(None, [*asleep, "sync.transport=ipc"])
    for key in ("replicas", "tensor_parallel"):
        message = refusal(*asleep, "sync.transport=ipc", f"rollout.vllm.{key}=2")
        assert f"{key}=2" in message and "set both to 1, or sync.transport=staged" in message
    load(None, [*vllm, "sync.transport=nccl", "rollout.vllm.replicas=2"])
    assert "NCCL does not send within one" in refusal(*asleep, "sync.transport=nccl")


# -- round trip -----------------------------------------------------------------------------------------------------------

paths = st.text(st.characters(codec="utf-8", exclude_categories=["C"]), min_size=1) | st.sampled_from(
    ["~", "~/a", "a$b", "$HOME/a", "$$", "null", "on", "007", "1e3", "2026-11-29", "a,b", "-1", "."]
)
texts = st.text(st.characters(codec="utf-8", exclude_categories=["C"])) | st.sampled_from(
    ["null", "~", "1e3", "08", "off", "nULL", "yEs"]
)
frees = texts | st.integers() | st.floats(allow_nan=False) | st.booleans()


def optional(**keys):
    return st.fixed_dictionaries({}, optional=keys)


changes = optional(
    loss=optional(w_tool=st.floats(0.1, 10), dual_clip=st.sampled_from([3.0, math.inf, 1.0000001]), eps_low=st.floats(0, 1)),
    run=optional(dir=paths.map(Path), seed=st.integers(0)),
    data=optional(train=st.lists(paths.map(Path), max_size=3)),
    train=optional(optim=optional(lr=st.floats(1e-12, 1.0))),
    model=optional(freeze=st.lists(st.sampled_from(["vision", "embeddings"]), unique=True)),
    score=optional(llm=optional(model=texts, cache=st.none() | paths.map(Path))),
    sft=optional(phases=st.lists(st.just({"trajectories": "a/b: c", "steps": 3}), max_size=2)),
    tools=optional(enabled=st.lists(st.sampled_from(["python", "text_search"]), unique=True)),
    rollout=optional(vllm=optional(arguments=st.dictionaries(texts.filter(bool), st.none() | frees, max_size=3))),
)


def test_what_decides_no_result_is_marked_where_it_is_declared():
    free = {
        "run": {"dir": "elsewhere"},
        "score": {"llm": {"base_url": "http://h:1/v1", "timeout_s": 1}},
        "sync": {"mode": "delta"},
    }
    free |= {
        "data": {"train": ["moved.parquet"], "on_bad_row": "skip"},
        "train": {"steps": 9, "megatron": {"tensor_parallel": 2}},
    }
    assert deciding(build(free)) == deciding(Config())
    for fixed in (
        {"loss": {"w_tool": 1}},
        {"score": {"llm": {"model": "m"}}},
        {"run": {"seed": 1}},
        {"data": {"shuffle": False}},
    ):
        assert deciding(build(fixed)) != deciding(Config())


@given(changes, st.booleans())
def test_any_config_survives_its_yaml(tmp_path_factory, tree, only_changes):
    config = build(tree)
    path = tmp_path_factory.getbasetemp() / "config.yaml"
    path.write_text(to_yaml(config, only_changes), encoding="utf-8")
    assert load(path) == config


@pytest.mark.parametrize("name", ["a$b", "~", "~/runs", "$HOME"])
def test_programs_get_a_path_as_it_is_and_files_so_that_it_is_read_as_it_is(name):
    config = build({"run": {"dir": Path(name)}})
    assert config.model_dump(mode="json")["run"]["dir"] == name
    assert Path(yaml.safe_load(to_yaml(config))["run"]["dir"].replace("$$", "$")) == Path(name)


# a run folder of version 0.1, whose writer quoted less
FORMER = """
run: {dir: runs/demo, seed: 0, threads: 2}
data:
  train: [runs/demo/data/train.parquet]
  heldout: []
model: {path: runs/demo/cold_start, config: null, dtype: float32, freeze: [vision, embeddings]}
rollout:
  vllm:
    speculative: {method: ngram, num_speculative_tokens: 2}
    arguments: {max_model_len: 4096, seed: null, enable_prefix_caching: false, revision: '1.0', load_format: dummy}
loss: {dual_clip: .inf, eps_low: 0.2}
train:
  optim:
    lr: 1.0e-06
    betas: [0.9, 0.999]
  megatron: {overlap_reduction: auto, listen: '127.0.0.1:0'}
sft:
  phases:
  - trajectories: runs/demo/trajectories/base
    steps: 160
    abilities: [perception]
log: {rollouts: true, tensorboard: false}
"""


def test_a_run_folder_written_before_is_read_as_yaml_reads_it(write):
    assert load(write("config.yaml", FORMER)) == build(yaml.safe_load(FORMER))


def test_the_variables_that_hold_keys_and_no_others_are_named():
    servers = [
        {"command": ["maps"], "env": {"PATH": "$PATH", "MAPS": "$MAPS_API_KEY", "LEVEL": "2"}},
        {"url": "http://news.example/mcp", "token_env": "NEWS_BEARER"},
    ]
    config = build({"tools": {"mcp": servers, "text_search": {"provider": "brightdata"}}})
    asked = {"BRIGHTDATA_API_TOKEN", "BRIGHTDATA_ZONE", "MAPS_API_KEY", "NEWS_BEARER"}
    assert config.key_names() == asked | {"METIS_JUDGE_API_KEY", "METIS_TOOLS_TOKEN", "METIS_SERVE_TOKEN"}
    assert not Config().key_names() & {"", "SERPER_API_KEY"}
