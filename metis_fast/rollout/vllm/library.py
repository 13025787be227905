"""The door to vLLM: every process of ours that uses it comes through `load`, tests and scripts of users included.

    from metis_fast.rollout.vllm.library import load

    vllm = load()
    llm = vllm.LLM("models/Metis-8B-ColdStart")

What vLLM needs is set here and nowhere else, so that a process works the same whatever an earlier one left in its caches.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType

from metis_fast.errors import EngineError

# Ranks of a tensor-parallel engine, and a Python in which vLLM looks at a model's class (once: it keeps what it finds in its
# cache), must be able to import torchvision (metis_fast.compat), and vLLM imports it before its plugins.
_INSPECT = "import metis_fast, runpy; runpy.run_module('vllm.model_executor.models.registry', run_name='__main__')"


def _separate_instructions(name: str) -> None:
    """A folder of torch's compile cache for each instruction set, below that of the caller. torch takes what it finds there
    whatever it was made for: an engine on another processor, or with AVX2 forbidden, died of it."""
    folder = Path(os.environ.get("TORCHINDUCTOR_CACHE_DIR") or f"{tempfile.gettempdir()}/torchinductor_{os.getuid()}")
    if folder.name != name:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / name)


def load(cpu_cache_gb: int = 1, exact_float32: bool = False) -> ModuleType:
    """Import vLLM and make it ready: `metis_fast.compat`, our weight transfer, and settings in the environment, where those
    that the caller made go first. Call it before anything else imports vllm; calls after the first cost nothing.

    cpu_cache_gb: KV cache of engines without a GPU, in GiB. exact_float32: keep TF32 out of float32 models.

    Raises:
        EngineError: vllm is not installed, or does not load.
    """
    import torch

    gpu = torch.cuda.is_available()
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1" if gpu else "0",  # on a GPU, scheduling beside the model's passes
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # CUDA is asked for before; a fork could not use it then
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": str(cpu_cache_gb),
        "HF_HUB_OFFLINE": "1",  # the model is a folder; nothing may wait for a hub
        "VLLM_LOGGING_LEVEL": "WARNING",
    }
    if not gpu:
        _separate_instructions(torch.backends.cpu.get_cpu_capability().lower())
    if exact_float32:  # vLLM's Triton attention and convolutions would take TF32 for it
        environment |= {"TRITON_F32_DEFAULT": "ieee", "NVIDIA_TF32_OVERRIDE": "0"}
    for name, value in environment.items():
        os.environ.setdefault(name, value)
    try:
        import vllm
        from vllm.model_executor.models import registry
    except ImportError as error:
        raise EngineError(
            f"rollout.engine=vllm needs vllm 0.32, which cannot be imported ({error}); in the project's folder: "
            "pip install -e '.[vllm]' (docs/cluster.md, Install), or see docs/rollouts.md for machines without a GPU"
        ) from None
    from metis_fast.rollout.vllm import plugin

    registry._SUBPROCESS_COMMAND = [sys.executable, "-c", _INSPECT]
    plugin.register()
    return vllm
