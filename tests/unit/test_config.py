"""Configuration: what is written is what is run; what cannot work is refused in one line that says what to do."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from metis_fast.config import Config, build, known_keys, load, merge, to_yaml
from metis_fast.errors import ConfigError

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))


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


# -- unknown keys ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "nearest"),
    [
        ("loss.w_tol=0.1", "loss.w_tool"),
        ("loss.wtool=0.1", "loss.w_tool"),
        ("train.w_tool=0.1", "loss.w_tool"),  # right leaf, wrong section
        ("w_tool=0.1", "loss.w_tool"),
        ("rolout.top_p=1", "rollout"),
        ("train.optim.learning_rate=1", "train.optim"),
        ("tools.python.timeout=3", "tools.python.timeout_s"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(override, nearest):
    message = refusal(override)
    assert "unknown key" in message and f"did you mean '{nearest}" in message


def test_a_key_that_resembles_nothing_lists_the_sections():
    message = refusal("zzzzqqq=1")
    assert "unknown key 'zzzzqqq'; sections are run, data, model" in message


@given(st.sampled_from(known_keys()))
def test_every_known_key_exists(key):
    node = Config()
    for part in key.split("."):
        assert hasattr(node, part)
        node = getattr(node, part)


@given(st.sampled_from([key for key in known_keys() if "." in key and key.rsplit(".", 1)[1] != "phases"]))
def test_a_misspelt_leaf_is_refused_wherever_it_stands(key):
    assert "unknown key" in refusal(f"{key}x=1")


# -- overrides ------------------------------------------------------------------------------------------------------------


def test_overrides_win_over_the_file_and_the_last_one_counts(write):
    path = write("a.yaml", "loss: {w_tool: 0.3, eps_low: 0.1}\nrun: {seed: 5}\n")
    config = load(path, ["loss.w_tool=0.1", "loss.w_tool=0.2", "train.optim.lr=3e-5"])
    assert (config.loss.w_tool, config.loss.eps_low, config.run.seed, config.train.optim.lr) == (0.2, 0.1, 5, 3e-5)


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("loss.dual_clip=.inf", lambda c: c.loss.dual_clip == math.inf),
        ("log.rollouts=false", lambda c: c.log.rollouts is False),
        ("data.train=[a.parquet, b]", lambda c: c.data.train == (Path("a.parquet"), Path("b"))),
        ("tools.enabled=[python]", lambda c: c.tools.enabled == ("python",)),
        ("tools.text_search.corpus=x=y", lambda c: c.tools.text_search.corpus == Path("x=y")),
        ("run.dir=runs/a b", lambda c: c.run.dir == Path("runs/a b")),
        ("train.optim={lr: 0.5}", lambda c: c.train.optim.lr == 0.5 and c.train.optim.grad_clip == 1.0),
        ("model.freeze=[]", lambda c: c.model.freeze == ()),
    ],
)
def test_an_override_is_yaml(override, read):
    assert read(load(None, [override]))


@pytest.mark.parametrize("override", ["loss.w_tool", "=3", "", "loss"])
def test_an_override_without_key_and_value_shows_the_form(override):
    assert "expected section.key=value, for example loss.w_tool=0.2" in refusal(override)


# -- base -----------------------------------------------------------------------------------------------------------------


def test_a_base_is_found_beside_its_file_and_merged_by_section(write):
    write("shared/low.yaml", "loss: {w_tool: 0.3, eps_low: 0.1}\ndata: {train: [a, b]}\n")
    write("shared/mid.yaml", "base: low.yaml\nloss: {w_tool: 0.4}\n")
    path = write("top.yaml", "base: shared/mid.yaml\ndata: {train: [c]}\n")
    config = load(path)
    assert (config.loss.w_tool, config.loss.eps_low, config.data.train) == (0.4, 0.1, (Path("c"),))


def test_bases_in_a_circle_are_refused(write):
    write("a.yaml", "base: b.yaml\n")
    assert "leads back to this file" in refusal(path=write("b.yaml", "base: a.yaml\n"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("base: missing.yaml", "cannot read config"),
        ("base: [a]", "`base` must be the path of another config"),
        ("- a\n- b", "expected sections like `loss:`, got a list"),
        ("loss: {", "is not valid YAML"),
        ("loss: 3", "loss: "),
        ("1: 2", "top.yaml"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(write, text, message):
    path = write("top.yaml", text)
    got = refusal(path=path)
    assert message in got and ".yaml" in got


def test_an_empty_file_is_the_defaults(write):
    assert load(write("a.yaml", "")) == load(write("b.yaml", "# nothing\n")) == load(None) == Config()


def test_a_missing_file_is_named(tmp_path):
    assert f"cannot read config {tmp_path / 'no.yaml'}: No such file" in refusal(path=tmp_path / "no.yaml")


trees = st.recursive(st.integers(0, 3), lambda inner: st.dictionaries(st.sampled_from("abc"), inner, max_size=3), max_leaves=8)
sections = st.dictionaries(st.sampled_from("abc"), trees, max_size=3)


@given(sections, sections, sections)
def test_merging_is_associative_and_keeps_what_the_upper_layer_leaves_out(one, two, three):
    assert merge(one, {}) == merge({}, one) == one
    assert merge(one, one) == one
    merged = merge(one, two)
    assert merged.keys() == one.keys() | two.keys()
    assert all(merged[key] == one[key] for key in one.keys() - two.keys())
    if all(isinstance(v, dict) for t in (one, two, three) for v in t.values()):
        for key in merged:
            assert set(merged[key]) == set(one.get(key, {})) | set(two.get(key, {}))


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
        (["train.optim.betas=[0.9, 1.0]"], "must be below 1"),
        (["sft.optim.betas=[1.0, 0.9]"], "must be below 1"),
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


# -- round trip -----------------------------------------------------------------------------------------------------------

changes = st.fixed_dictionaries(
    {},
    optional={
        "loss": st.fixed_dictionaries(
            {"w_tool": st.floats(0, 10), "dual_clip": st.sampled_from([3.0, math.inf, 1.0000001]), "eps_low": st.floats(0, 1)}
        ),
        "run": st.fixed_dictionaries({"dir": st.text(st.characters(codec="utf-8", exclude_categories=["C"]), min_size=1)}),
        "train": st.fixed_dictionaries({"optim": st.fixed_dictionaries({"lr": st.floats(1e-12, 1.0)})}),
        "model": st.fixed_dictionaries({"freeze": st.lists(st.sampled_from(["vision", "embeddings"]), unique=True)}),
        "sft": st.fixed_dictionaries({"phases": st.lists(st.just({"trajectories": "a/b: c", "steps": 3}), max_size=2)}),
        "tools": st.fixed_dictionaries({"enabled": st.lists(st.sampled_from(["python", "text_search"]), unique=True)}),
    },
)


@given(changes, st.booleans())
def test_any_config_survives_its_yaml(tree, only_changes):
    config = build(tree)
    assert build(yaml.safe_load(to_yaml(config, only_changes)) or {}) == config


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
