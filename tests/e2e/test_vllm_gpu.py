"""The main job with a vLLM engine on a GPU: what it samples is what the trainer takes it for, however the weights get there."""

from __future__ import annotations

import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from harness import Command
from test_vllm_run import check

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed"),
]

_ENGINE = ["rollout.engine=vllm", "rollout.deterministic=false", "rollout.vllm.gpu_memory=0.2"]
_EAGER = 'rollout.vllm.arguments={"enforce_eager": true, "kv_cache_memory_bytes": 536870912}'
_COMPILED = 'rollout.vllm.arguments={"kv_cache_memory_bytes": 536870912}'
_SHORT = ["data.heldout=[]", "eval.every=0", "log.progress=false", "log.tensorboard=false", "model.freeze=[]"]
_SLEEP = ["rollout.vllm.sleep=true"]
_NGRAM = "rollout.vllm.speculative={method: ngram, num_speculative_tokens: 2, prompt_lookup_min: 2, prompt_lookup_max: 3}"
_AHEAD = ["rollout.mode=async", "rollout.max_staleness=2", "loss.tis_cap=2"]


@pytest.mark.parametrize(
    ("dtype", "settings"),
    [
        ("float32", [_EAGER]),
        ("bfloat16", [_EAGER]),
        ("bfloat16", [_COMPILED]),
        ("float32", [_EAGER, *_SLEEP]),
        ("float32", [_EAGER, *_SLEEP, "sync.transport=ipc"]),
        ("bfloat16", [_COMPILED, *_SLEEP, "sync.transport=ipc"]),
        ("float32", [_EAGER, _NGRAM]),
        ("float32", [_EAGER, *_AHEAD]),
    ],
    ids=["staged", "bfloat16", "compiled", "sleep", "ipc", "ipc-compiled", "speculative", "ahead"],
)
def test_an_engine_on_a_gpu_samples_with_every_steps_weights(
    demo: Path, tmp_path: Path, dtype: str, settings: list[str]
) -> None:
    """The gate lets every step pass."""
    folder = tmp_path / "run"
    command = ["train", demo / "config.yaml", f"run.dir={folder}", *_ENGINE, *_SHORT, f"model.dtype={dtype}", "train.steps=3"]
    ended = Command([*command, "gate.every=1", *settings], tmp_path / "process").wait()
    assert ended.code == 0 and not ended.orphans, ended
    check(folder, steps=3, staleness=2 if "rollout.mode=async" in settings else 0)


def _use_tf32() -> None:
    os.environ |= {"TRITON_F32_DEFAULT": "tf32", "NVIDIA_TF32_OVERRIDE": "1"}


def test_the_gate_refuses_what_is_not_float32_and_says_where_it_begins(demo: Path, tmp_path: Path) -> None:
    command = ["train", demo / "config.yaml", f"run.dir={tmp_path / 'run'}", *_ENGINE, *_SHORT, _EAGER, "model.dtype=float32"]
    ended = Command([*command, "train.steps=1"], tmp_path / "process", before=_use_tf32).wait()
    assert ended.code == 2 and "truth gate: log-probs of engine and trainer differ" in ended.err, ended
    assert "the likely layer is" in ended.err.splitlines()[-1], ended.err
