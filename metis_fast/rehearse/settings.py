"""The config of a job made small: the same path through the system, sizes that a laptop has."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from metis_fast import config as config_module
from metis_fast.config import Config, MegatronConfig
from metis_fast.rehearse.endpoints import FIND, MODEL

STEPS = 2
PROMPTS, ROLLOUTS = 2, 4
"""Of a step."""
KEY, KEY_VALUE = "METIS_REHEARSAL_KEY", "stand-in-key-5e1f3a9c"
"""Environment variable with the key for the stand-ins, and what it is."""
_TEXT_TOKENS = 4096  # of a prompt, beside its images: the system messages are long, and the tokenizer is small
_RESPONSE, _TURN, _OBSERVATION = 2048, 48, 1024
_IMAGES = 2  # of a prompt, most
_PYTHON_S = 120.0  # on a machine that has other work
_ENTROPY = 0.01  # a model that nobody has trained earns nothing: without this the update would have no gradient


@dataclass(frozen=True, slots=True)
class Places:
    """Where a rehearsal has what: model folder, stand-in files, and the addresses of the judge and of search."""

    model: Path
    prompts: Path
    conversations: Path
    corpus: Path
    image_cache: Path
    judge: str
    search: str


def small(config: Config, folder: Path, places: Places, image_tokens: int) -> tuple[Config, list[str]]:
    """The settings of the rehearsal, and in words what of the config it leaves out.

    folder: for the run. image_tokens: of the largest stand-in image.
    """
    left: list[str] = []
    gpus = torch.cuda.device_count()
    layout, cut = small_layout(config.train.megatron)
    if config.train.backend == "megatron" and cut:
        left.append(cut)
    vllm = config.rollout.vllm
    sleep = vllm.sleep and gpus > 0
    if vllm.sleep and not sleep:
        left.append("rollout.vllm.sleep and GPU memory: there is no GPU here")
    transport = config.sync.transport
    if transport != "staged" and not gpus:
        left.append(f"sync.transport={transport}: there is no GPU here, weights are staged")
        transport = "staged"
    nodes = min(config.workers.nodes, 2)
    longest_prompt = _TEXT_TOKENS + _IMAGES * image_tokens
    changes: dict[str, Any] = {
        "run": {"dir": folder},
        "model": {"path": places.model, "config": None, "dtype": config.model.dtype if gpus else "float32"},
        "data": {"train": (places.prompts,), "heldout": (places.prompts,)},
        "rollout": {
            "prompts_per_step": PROMPTS,
            "rollouts_per_prompt": ROLLOUTS,
            "max_prompt_tokens": longest_prompt,
            "max_response_tokens": _RESPONSE,
            "max_turn_tokens": _TURN,
            "max_observation_tokens": _OBSERVATION,
            "max_turns": min(config.rollout.max_turns, 4),
            "max_concurrent": PROMPTS * ROLLOUTS,
            "vllm": _vllm(config, nodes, sleep),
        },
        "train": {
            "steps": STEPS,
            "prompts_per_mini_batch": 1,
            "tokens_per_micro_batch": longest_prompt + _RESPONSE,
            "megatron": layout.model_dump(),
            "attention": config.train.attention if gpus else "auto",
        },
        "loss": {"entropy_coef": config.loss.entropy_coef or _ENTROPY},
        "score": {"llm": {"base_url": places.judge, "model": MODEL if config.score.llm.model else "", "cache": None,
                          "api_key_env": KEY, "retries": 1, "judges": ()}},
        "tools": {
            "record": None,  # stand-ins are not what the job would ask
            "replay": None,
            "offer": "all",  # nor are the rows
            "python": {"timeout_s": max(_PYTHON_S, config.tools.python.timeout_s)},
            "text_search": _text_search(config, places),
            "image_search": _image_search(config, places),
        },
        "workers": {
            "nodes": nodes,
            "tools": min(config.workers.tools, nodes),
            "judges": min(config.workers.judges, nodes),
            "ray_address": "local",
        },
        "sync": {"transport": transport},
        "sft": {
            "phases": tuple(
                phase.model_dump() | {"trajectories": places.conversations, "steps": STEPS, "epochs": None, "abilities": ()}
                for phase in config.sft.phases[:1]
            ),
            "batch_size": 4,
            "tokens_per_micro_batch": 16 * image_tokens + 2 * _TEXT_TOKENS,
            "max_tokens": 0,
            "on_bad_row": "skip",
            "on_long_row": "skip",
            "heldout": places.conversations if config.sft.heldout else None,
            "heldout_rows": 2 if config.sft.heldout else 0,
            "eval_every": 0,
        },
        "eval": {"max_prompts": 2, "rollouts_per_prompt": 1, "every": 0},
        "gate": {"prompts": min(config.gate.prompts, 1), "tokens": 16},
        "checkpoint": {"every": 1},
    }  # fmt: skip
    return config_module.build(config_module.merge(config.model_dump(mode="python"), changes)), left


def small_layout(asked: MegatronConfig) -> tuple[MegatronConfig, str]:
    """Two of everything that the layout has more than one of, but one replica: enough to cut, send and gather."""
    made = {
        "tensor_parallel": min(asked.tensor_parallel, 2),
        "pipeline_parallel": min(asked.pipeline_parallel, 2),
        "virtual_pipeline": min(asked.virtual_pipeline, 2),
        "data_parallel": 1,
        "first_stage_layers": 0,
        "last_stage_layers": 0,
        "listen": "127.0.0.1:0",
        "launch": "local",
    }
    layout = asked.model_copy(update=made)
    cut = asked.num_ranks - layout.num_ranks
    return layout, f"{cut} of the {asked.num_ranks} ranks of train.megatron" if cut else ""


def _vllm(config: Config, nodes: int, sleep: bool) -> dict[str, Any]:
    vllm = config.rollout.vllm
    return {
        "replicas": min(vllm.replicas, nodes),
        "tensor_parallel": 1,
        "sleep": sleep,
        "cpu_cache_gb": 1,
        "image_cache_gb": 0.5,
        "cpu_threads": 1,
        "speculative": vllm.speculative if torch.cuda.is_available() else None,
        "arguments": {},
    }


def _text_search(config: Config, places: Places) -> dict[str, Any]:
    asked = config.tools.text_search
    if asked.provider == "local":
        return {"corpus": places.corpus}
    own = f"{places.search}{FIND}" if asked.provider == "http" else f"{places.search}/{asked.provider}"
    return {
        "url": own, "api_key_env": KEY, "zone_env": KEY, "cache": None, "reference_cache": None,
        "offline": False, "retries": 1,
    }  # fmt: skip


def _image_search(config: Config, places: Places) -> dict[str, Any]:
    asked = config.tools.image_search
    return {"cache": places.image_cache} if asked.corpus is None else {"corpus": places.corpus}
