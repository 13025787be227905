"""The policy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator

from metis_fast.config.section import BY_CONTENT, MAY_CHANGE, FilePath, NonNegativeFloat, OrNone, Section, Several


def _dtype_here(value: str) -> str:
    """Without bfloat16 instructions torch multiplies bfloat16 matrices many times slower than float32 ones."""
    if value != "auto":
        return value
    import torch  # at first use: reading a config needs nothing else of it

    cpu = torch.cpu.get_capabilities()
    native = torch.cuda.is_available() or any(cpu.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
    return "bfloat16" if native else "float32"


class ModelConfig(Section):
    """The policy: any Qwen3-VL folder with safetensors."""

    path: Annotated[FilePath, BY_CONTENT] = Path("models/Metis-8B-ColdStart")
    """Folder with config.json, *.safetensors, tokenizer and processor."""
    config: Annotated[OrNone[FilePath], MAY_CHANGE] = None
    """A config.json that describes the model where `path` is not there yet, for what needs no weights: `metis-fast plan`,
    `rehearse` and `doctor`."""
    dtype: Annotated[Literal["auto", "bfloat16", "float32"], AfterValidator(_dtype_here)] = "bfloat16"
    """Type of weights and activations. With bfloat16 the optimizer keeps float32 masters. `auto`: bfloat16 on a machine with a
    GPU or instructions for it (AVX-512 bf16, AMX), else float32; a run folder keeps which."""
    image_cache_gb: Annotated[NonNegativeFloat, MAY_CHANGE] = 2.0
    """GiB of decoded images that a process keeps (the ones used last): 200 of 2048 x 1536 pixels in 2 GiB."""
    tower_memory_gb: Annotated[NonNegativeFloat, MAY_CHANGE] = 0.0
    """GiB that the vision tower's activations may take; 0: an eighth of the memory. What would take more is computed again in
    the backward pass, and in several passes (exact); a single image may take more still."""
    freeze: Several[Literal["vision", "embeddings"]] = ()
    """Parts that are not trained: the vision tower (with its mergers), the token embeddings (with a tied LM head)."""
