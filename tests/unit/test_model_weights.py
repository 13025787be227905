"""Weights of a model folder, whatever they are called and however they are cut: the model's own, or a line of what is wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from folders import EMBED, Weights, change, load, refusal, respell
from safetensors.torch import load_file, save_file

from metis_fast.checkpoint.export import check_logits
from metis_fast.checkpoint.safetensors_folder import FolderReader
from metis_fast.errors import ModelError
from metis_fast.model_folder import hf_shapes, may_have, read_config

NORM = "model.language_model.norm.weight"


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


def _begin(**new: str) -> Callable[[Weights], Weights]:
    """Other beginnings of names."""

    def edit(weights: Weights) -> Weights:
        names = {
            name: next(((new[k] + name.removeprefix(OLD[k])) for k in new if name.startswith(OLD[k])), name) for name in weights
        }
        return {names[name]: tensor for name, tensor in weights.items()}

    return edit


OLD = {"text": "model.language_model.", "vision": "model.visual.", "all": ""}


def _with_head(weights: Weights) -> Weights:
    return weights | {"lm_head.weight": weights[EMBED].clone(), "model.language_model.rotary_emb.inv_freq": torch.ones(4)}


@pytest.mark.parametrize(
    "edit",
    [
        pytest.param(_begin(text="model.", vision="visual."), id="as Qwen2-VL was"),
        pytest.param(_begin(text="language_model.model.", vision="visual."), id="as vLLM has it"),
        pytest.param(_begin(text="language_model.", vision="visual."), id="without its head"),
        pytest.param(_begin(all="module."), id="of DistributedDataParallel"),
        pytest.param(_begin(all="module._orig_mod."), id="compiled"),
        pytest.param(_with_head, id="with a copy of the head and frequencies"),
        pytest.param(lambda weights: {name: one.double() for name, one in weights.items()}, id="float64"),
    ],
)
def test_weights_are_the_same_whatever_they_are_called(edit, folder, tiny_folder):
    respell(folder, edit)
    policy = load(folder)
    assert check_logits(policy, tiny_folder) < 1e-6
    config, reader, plain = read_config(folder), FolderReader(folder), FolderReader(tiny_folder)
    reader.check(hf_shapes(config), may_have(config))  # as a rank does it
    for name in hf_shapes(config):
        assert torch.equal(reader.read(name, 0, 1, 3).float(), plain.read(name, 0, 1, 3))


def test_an_untied_model_has_its_own_head_whatever_it_is_called(folder):
    head = torch.randn(read_config(folder).get_text_config().vocab_size, 32)
    respell(folder, lambda weights: weights | {"language_model.lm_head.weight": head})
    assert "has 1 that the model has not (language_model.lm_head.weight)" in refusal(folder) or "ties" in refusal(folder)
    change(folder / "config.json", lambda tree: tree.update(tie_word_embeddings=False))
    policy = load(folder)
    assert torch.equal(policy.head, head) and not torch.equal(policy.decoder.embed_tokens.weight, head)


def _set(name: str, value: float) -> Callable[[Weights], Weights]:
    def edit(weights: Weights) -> Weights:
        weights[name].flatten()[3] = value
        return weights

    return edit


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (_set(NORM, float("nan")), f"model.safetensors: {NORM} has 1 numbers that are NaN or Inf; give a model whose weights"),
        (_set("model.visual.blocks.1.attn.qkv.bias", float("-inf")), "attn.qkv.bias has 1 numbers that are NaN or Inf"),
        (lambda weights: weights | {NORM: weights[NORM].to(torch.int8)}, f"{NORM} is I8, expected one of F64, F32, F16, BF16"),
        (lambda weights: weights | {NORM: weights[NORM].long()}, f"{NORM} is I64, expected one of"),
        (lambda weights: weights | {NORM: weights[NORM].to(torch.float8_e4m3fn)}, f"{NORM} is F8_E4M3, expected one of"),
        (lambda weights: weights | {NORM: weights[NORM][:-1].clone()}, "has 1 of another shape"),
        (
            lambda weights: weights | {"v_head.summary.weight": torch.zeros(1, 32)},
            "1 that the model has not (v_head.summary",
        ),
        (lambda weights: weights | {f"{EMBED[:-7]}.lora_A.weight": torch.zeros(2, 2)}, "has 1 that the model has not"),
        (lambda weights: weights | {"model.norm.weight": weights[NORM].clone()}, f"has {NORM} twice, as"),
        (lambda weights: weights | {"lm_head.weight": weights[EMBED] + 1}, "config.json ties lm_head.weight to"),
        (lambda weights: {name: one for name, one in weights.items() if name != NORM}, f"lacks 1 tensors ({NORM})"),
    ],
)
def test_weights_that_are_not_the_models_are_a_line(edit, says, folder):
    respell(folder, edit)
    assert says in refusal(folder)


@pytest.mark.parametrize(("value", "norm"), [(0.0, "0"), (float("nan"), "nan"), (float("inf"), "(nan|inf)")])
def test_logits_that_nothing_can_be_compared_with_are_a_line(value, norm, folder):
    policy = load(folder)
    with torch.no_grad():
        policy.decoder.norm.weight.fill_(value)
    with pytest.raises(ModelError, match=rf"logits are all 0, or not finite \(their norm is {norm}\): .*; see the weights of"):
        check_logits(policy, folder)


def test_shards_are_read_and_one_that_is_missing_is_named(folder, tiny_folder):
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {name: f"model-{1 + i % 2:05d}-of-00002.safetensors" for i, name in enumerate(weights)}
    for file in set(files.values()):
        save_file({name: weights[name] for name in weights if files[name] == file}, folder / file)
    assert "lacks model.safetensors, nor has it model.safetensors.index.json for model-00001" in refusal(folder)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": files}))
    assert check_logits(load(folder), tiny_folder) < 1e-6
    (folder / "model-00002-of-00002.safetensors").unlink()
    assert "lacks model-00002-of-00002.safetensors; the folder is incomplete" in refusal(folder)


_MEASURE = """
import resource, sys
from pathlib import Path
from metis_fast.config import ModelConfig
from metis_fast.model import load_policy
load_policy(ModelConfig(path=Path(sys.argv[1]), dtype="bfloat16"))  # imports and buffers are not what is measured
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
policy = load_policy(ModelConfig(path=Path(sys.argv[2]), dtype="bfloat16"))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(sum(weight.nbytes for weight in policy.model.parameters()) >> 10, peak - before)
"""


@pytest.mark.slow
def test_float32_weights_are_never_held_beside_those_of_the_run(folder, tiny_folder):
    """In one file, as the worst case: 1.5 times the model in float32 if both are there, a third if they are not."""
    change(folder / "config.json", lambda tree: tree["text_config"].update(num_hidden_layers=24, intermediate_size=40_000))

    def deepen(weights: Weights) -> Weights:
        layer = {name: one for name, one in weights.items() if ".layers.1." in name}
        for name in [name for name in layer if ".mlp." in name]:
            layer[name] = torch.randn((40_000, 32) if "down" not in name else (32, 40_000))
        layers = {name.replace(".1.", f".{i}.", 1): one.clone() for i in range(24) for name, one in layer.items()}
        return weights | layers

    respell(folder, deepen)
    done = subprocess.run([sys.executable, "-c", _MEASURE, tiny_folder, folder], capture_output=True, text=True, check=True)
    held, more = map(int, done.stdout.split())
    assert held > 150_000  # KiB; the folder has twice as much
    assert more < 1.35 * held
