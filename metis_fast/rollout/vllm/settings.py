"""What the run tells its vLLM engines; imports neither vllm nor torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

SERVICE = "metis_fast.rollout.vllm.service:VllmService"

STOPPED, LENGTH = "stop", "length"


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """One engine.

    model: folder with config, tokenizer and processor; the weights in it are version 0. dtype: torch's, by name. images: most
    images of a rollout. banned: token ids that are never sampled, banned_text: the same as text. image_pad: placeholder of an
    image (-1: none). processed_logprobs: log-probs at the sampling temperature, for runs whose temperature is not 1.
    seeded: sampling noise by request seeds. image_cache_gb: of processed images, and of encoded ones, in GiB each. stall_s: an
    engine that has requests and makes no step for so long ends itself.
    """

    model: str
    dtype: str
    max_tokens: int
    images: int
    banned: tuple[int, ...]
    banned_text: tuple[str, ...]
    image_pad: int
    processed_logprobs: bool
    seeded: bool
    seed: int
    tensor_parallel: int
    max_num_seqs: int
    gpu_memory: float
    cpu_cache_gb: int
    cpu_threads: int
    image_cache_gb: float
    sleep: bool
    stall_s: float
    transport: str
    speculative: Mapping[str, str | int | float | bool] | None
    arguments: Mapping[str, str | int | float | bool | None]


@dataclass(frozen=True, slots=True, eq=False)
class GenerateRequest:
    """One message to sample.

    tokens [S] int32, images as placeholders in full. spans: (start, stop, sha256) of every image in it, in order. images: the
    encoded images that this engine may not have yet. stop_ids, stop: see `Sampling`.
    """

    tokens: npt.NDArray[np.int32]
    spans: tuple[tuple[int, int, str], ...]
    images: Mapping[str, bytes]
    max_tokens: int
    stop_ids: tuple[int, ...]
    temperature: float
    top_p: float
    top_k: int
    seed: int
    stop: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, eq=False)
class GenerateReply:
    """What was sampled: tokens [n] int32, logp [n] float32, version [n] int32; finish: STOPPED, LENGTH, or vLLM's."""

    tokens: npt.NDArray[np.int32]
    logp: npt.NDArray[np.float32]
    version: npt.NDArray[np.int32]
    finish: str


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Of an engine's process since it started. busy_s: seconds in steps; tokens: sampled.

    drafted: tokens that speculation proposed, accepted: those of them that the model took (some behind the end of a message);
    both 0 without it. images_prepared: images that were decoded for vLLM; one that its cache holds is not decoded again.
    """

    alive_s: float
    busy_s: float
    steps: int
    tokens: int
    unfinished: int
    drafted: int
    accepted: int
    images_prepared: int
