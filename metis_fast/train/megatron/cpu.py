"""What stands in for CUDA where Megatron-core runs on a machine without it. Does nothing where CUDA is there.

Megatron-core 0.16 puts tensors on `torch.cuda.current_device()`, keeps CUDA random states, and compares `param.type()` with
the names of CUDA tensor types. None of that needs a GPU to be right, and without it every parallel layout runs over gloo, in
tests and on laptops, by the code that runs on GPUs. torch itself is left alone: only the modules of megatron see the stand-in.

`test_megatron_parts.py` fails when one of these is no longer needed.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import types
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch


class _Stream:
    """Streams order work on a device; on the CPU work is done when a call returns."""

    def wait_stream(self, *_: object) -> None: ...

    def synchronize(self) -> None: ...

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None: ...


class _Cuda(ModuleType):
    """torch.cuda, as far as megatron uses it."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.cuda, name)

    current_device = staticmethod(lambda: torch.device("cpu"))
    synchronize = staticmethod(lambda *_, **__: None)
    empty_cache = staticmethod(lambda: None)
    manual_seed = staticmethod(torch.manual_seed)
    get_rng_state = staticmethod(lambda *_, **__: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, *_, **__: torch.set_rng_state(state))
    current_stream = default_stream = Stream = staticmethod(lambda *_, **__: _Stream())
    stream = staticmethod(lambda *_, **__: contextlib.nullcontext())


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(factory)
    def make(*arguments: Any, **options: Any) -> Any:
        if str(options.get("device", "")).startswith("cuda"):
            options["device"] = "cpu"
        return factory(*arguments, **options)

    return make


class _Torch(ModuleType):
    """torch, with the `cuda` above and factories that understand device="cuda"."""

    def __init__(self) -> None:
        super().__init__("torch")
        self.cuda = _Cuda("torch.cuda")
        for name in ("empty", "zeros", "ones", "full", "tensor", "empty_like", "zeros_like"):
            setattr(self, name, _on_cpu(getattr(torch, name)))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


_STAND_IN = _Torch()


def _without_cuda(constant: Any) -> Any:
    """A code constant with 'torch.cuda.FloatTensor' and its like renamed to what a CPU tensor's `type()` says."""
    if isinstance(constant, str) and constant.startswith("torch.cuda.") and constant.endswith("Tensor"):
        return constant.replace("torch.cuda.", "torch.")
    if isinstance(constant, tuple | frozenset):
        return type(constant)(_without_cuda(part) for part in constant)
    return constant


def _accept_cpu_types(function: Callable[..., Any]) -> None:
    inner = getattr(function, "__func__", function)
    inner = getattr(inner, "__wrapped__", inner)
    assert isinstance(inner, types.FunctionType)
    code = inner.__code__
    inner.__code__ = code.replace(co_consts=tuple(_without_cuda(constant) for constant in code.co_consts))


def install() -> None:
    """Put the stand-in into every megatron module that is loaded; again after more of them were. No-op where CUDA is there."""
    if torch.cuda.is_available():
        return
    # what the back end uses and megatron imports at first use
    from megatron.core.dist_checkpointing.strategies import filesystem_async, fully_parallel, state_dict_saver
    from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
    from megatron.core.optimizer import clip_grads
    from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
    from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
    from megatron.core.tensor_parallel import random

    assert all((filesystem_async, fully_parallel, state_dict_saver, torch_strategy))
    for name, module in list(sys.modules.items()):
        if (name == "megatron.core" or name.startswith("megatron.core.")) and vars(module).get("torch") is torch:
            vars(module)["torch"] = _STAND_IN
    random._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    for function in (
        clip_grads.clip_grad_by_total_norm_fp32,
        DistributedOptimizer._build_model_and_main_param_groups,
        DistributedOptimizer.__init__,
        Float16OptimizerWithFloat16Params.__init__,
    ):
        _accept_cpu_types(function)
