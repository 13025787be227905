"""Triton kernels run in its interpreter, with honest bfloat16, unless the tests that need a GPU are asked for (-m gpu)."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator

import pytest


def on_gpu(config: pytest.Config) -> bool:
    return config.option.markexpr == "gpu"


def pytest_configure(config: pytest.Config) -> None:
    # Triton 3.10 turns the fusion of multiply and add off unless this asks for it; 3.9 warns if it is left open.
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    if on_gpu(config):
        return
    os.environ["TRITON_INTERPRET"] = "1"
    # A function is interpreted if this is set when it is decorated. transformers, which conftest.py above imports, has
    # decorated those of Triton's own language (tl.sum, tl.max) by now.
    if "triton" in sys.modules:
        for module in ("triton.language.standard", "triton.language.random", "triton.language"):
            importlib.reload(sys.modules[module])


@pytest.fixture(scope="session", autouse=True)
def honest_interpreter(pytestconfig: pytest.Config) -> Iterator[None]:
    if on_gpu(pytestconfig):
        yield
        return
    from metis_kernels.inspect.interpreter import honest_bf16

    with honest_bf16():
        yield


@pytest.fixture(scope="session")
def compiling_environment(pytestconfig: pytest.Config) -> dict[str, str]:
    """For processes in which Triton compiles. Its cache lies in the checkout's .pytest_cache, is keyed by sources, options and
    versions, and may be deleted at any time. Tests that compile the same kernels share a file, so that no two workers do."""
    assert pytestconfig.cache is not None
    environment = {**os.environ, "TRITON_CACHE_DIR": str(pytestconfig.cache.mkdir("triton"))}
    environment.pop("TRITON_INTERPRET", None)
    return environment
