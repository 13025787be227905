"""Opens vLLM's engine: what it is told, and what has to be right before it may sample."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

from metis_fast.errors import EngineError, MetisError, ModelError
from metis_fast.rollout.vllm import library, plugin
from metis_fast.rollout.vllm.settings import EngineSettings

if TYPE_CHECKING:
    from vllm import LLMEngine


def open_engine(settings: EngineSettings) -> LLMEngine:
    """An engine with the weights of the model's folder, as version 0.

    Raises:
        EngineError: vllm is not installed, or a setting is not its. ModelError: no attention for the model on this machine.
        Anything else: vLLM's own; see `explained`.
    """
    whole_prompts = settings.seeded and not _has_gpu()
    if whole_prompts:
        _check_whole(settings)
    if settings.image_pad >= 0:
        _check_image_cache(settings)
    library.load(settings.cpu_cache_gb, exact_float32=settings.dtype == "float32")
    from vllm import LLMEngine
    from vllm.config import WeightTransferConfig
    from vllm.engine.arg_utils import EngineArgs

    if settings.cpu_threads:
        import torch

        torch.set_num_threads(settings.cpu_threads)
    arguments: dict[str, Any] = {
        "model": settings.model,
        "dtype": settings.dtype,
        "seed": settings.seed % (1 << 31),
        "max_model_len": settings.max_tokens,
        "max_num_seqs": settings.max_num_seqs,
        "tensor_parallel_size": settings.tensor_parallel,
        "enable_prefix_caching": True,
        "logprobs_mode": "processed_logprobs" if settings.processed_logprobs else "raw_logprobs",
        "disable_log_stats": settings.speculative is None,  # what becomes of drafts is in vLLM's own counters only
        "weight_transfer_config": WeightTransferConfig(
            backend=plugin.TRANSFER if settings.transport == "staged" else settings.transport
        ),
        "worker_extension_cls": plugin.EXTENSION,
        "speculative_config": None if settings.speculative is None else dict(settings.speculative),
    }
    if _has_gpu():
        arguments |= {"gpu_memory_utilization": settings.gpu_memory, "enable_sleep_mode": settings.sleep}
    else:
        _check_head_size(settings.model)
        arguments["enforce_eager"] = True  # compiling takes minutes on a CPU
    if whole_prompts:
        arguments |= {"enable_chunked_prefill": False, "scheduler_cls": plugin.WHOLE_SCHEDULER}
    if settings.image_pad >= 0:
        arguments |= {
            "limit_mm_per_prompt": {"image": settings.images, "video": 0},
            "mm_processor_kwargs": {"use_fast": False},
            "mm_processor_cache_gb": settings.image_cache_gb,
        }
    unknown = [name for name in settings.arguments if name not in EngineArgs.__dataclass_fields__]
    if unknown:
        raise EngineError(f"rollout.vllm.arguments has {', '.join(unknown)}, which are no engine arguments of vLLM")
    arguments |= settings.arguments
    if settings.speculative is not None and settings.speculative.get("rejection_sample_method") == "synthetic":
        raise EngineError(
            "rollout.vllm.speculative.rejection_sample_method=synthetic takes drafts at random, so that what is sampled is not "
            "the model's; leave it out"
        )
    engine = LLMEngine.from_engine_args(EngineArgs(**arguments))
    # it says for every step that it keeps its number of threads
    logging.getLogger("vllm.v1.worker.cpu_worker").setLevel(logging.ERROR)
    engine.set_weight_version("0")
    if settings.speculative is not None:
        check_banned(engine, settings)
        _check_drafts(engine)
    if settings.transport == "staged":
        engine.collective_rpc("init_weight_transfer_engine", args=({},))
    return engine


def check_banned(engine: LLMEngine, settings: EngineSettings) -> None:
    """With speculation, vLLM excludes placeholders by their text, which it makes token ids of.

    Raises:
        EngineError: they are not those of the placeholders.
    """
    tokenizer = engine.get_tokenizer()
    found = {text: tokenizer.encode(text, add_special_tokens=False) for text in settings.banned_text}
    if sorted(found.values()) != sorted([token] for token in settings.banned):
        raise EngineError(
            "rollout.vllm.speculative excludes image placeholders by their text, and needs a tokenizer that makes exactly the "
            f"tokens {sorted(settings.banned)} of it, one of each; it makes {found}"
        )


def _check_whole(settings: EngineSettings) -> None:
    """Without a GPU vLLM cannot cut a prompt into several steps if it has a seed; see `whole`."""
    arguments = settings.arguments
    longest = int(arguments.get("max_model_len") or settings.max_tokens)
    budget = arguments.get("max_num_batched_tokens")
    cutting = [name for name in ("enable_chunked_prefill", "long_prefill_token_threshold") if arguments.get(name)]
    if budget is not None and int(budget) < longest:
        cutting.append("max_num_batched_tokens")
    if arguments.get("scheduler_cls") is not None:
        cutting.append("scheduler_cls")
    if cutting:
        named = ", ".join(f"{name}={arguments[name]}" for name in cutting)
        raise EngineError(
            f"rollout.vllm.arguments has {named}, which may cut a prompt (of up to {longest} tokens) into several steps; "
            "vLLM cannot do that with seeds and without a GPU: leave it out, or set rollout.deterministic=false"
        )


def _check_image_cache(settings: EngineSettings) -> None:
    """Whether vLLM's cache holds the images of one rollout: it takes for granted that they do not displace each other."""
    import torch
    from transformers import AutoConfig

    vision = AutoConfig.from_pretrained(settings.model).vision_config
    has = float(settings.arguments.get("mm_processor_cache_gb", settings.image_cache_gb) or 0)
    token = 3 * vision.temporal_patch_size * (vision.patch_size * vision.spatial_merge_size) ** 2
    num_bytes = settings.max_tokens * token * getattr(torch, settings.dtype).itemsize
    needed = math.ceil(num_bytes * 1.01 / (1 << 30) * 100) / 100  # an image also takes some bytes of its own
    if 0 < has < needed:
        raise EngineError(
            f"rollout.vllm.image_cache_gb={has:g} is less than the images of one rollout of {settings.max_tokens} tokens can "
            f"take; set {needed:g} or more"
        )


def _check_drafts(engine: LLMEngine) -> None:
    if not _has_gpu() and not all(engine.collective_rpc(_spreads)):
        raise EngineError(
            "rollout.vllm.speculative needs a GPU: without one, this vLLM judges drafts by temperatures that it has not set "
            "(its issue 55005), so that what it samples is not the model's; leave it out on this machine"
        )


def _spreads(worker: object) -> bool:
    """Asked of each of vLLM's workers: whether a request's temperature, top-k and top-p get to its drafts.

    Without a GPU and Triton, vLLM 0.32 writes them to a copy of the tensor that it goes on with; that one keeps whatever was in
    its memory. Drafts are then taken, and others put in their place, as no model would: placeholders, too.
    """
    import torch
    from vllm.v1.sample.rejection_sampler import expand_batch_to_tokens

    temperature = torch.tensor([0.375, 1.625])
    drafts = torch.tensor([1, 3], dtype=torch.int32)  # counted over the requests: one, then two
    return expand_batch_to_tokens(temperature, drafts, 3).tolist() == [0.375, 1.625, 1.625]


def _check_head_size(model: str) -> None:
    """vLLM itself finds out in the first step."""
    from transformers import AutoConfig
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    text = AutoConfig.from_pretrained(model).get_text_config()
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    known = CPUAttentionBackend.get_supported_head_sizes()
    if size not in known:
        raise ModelError(
            f"vLLM's CPU build has no attention for heads of {size} (only {', '.join(map(str, known))}); use such a model, or "
            "rollout.engine=native"
        )


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def explained(error: Exception, settings: EngineSettings) -> Exception:
    """What `open_engine` raised, as an error of ours."""
    if isinstance(error, MetisError):
        return error
    text = " ".join(str(error).split())[:500]
    return ModelError(f"vLLM cannot open {settings.model}: {type(error).__name__}: {text}")
