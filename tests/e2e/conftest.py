"""One small demo for all end-to-end tests: its data, its cold-started model, and its uninterrupted run."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness import HERE, SMALL, succeed


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of `metis-fast demo small.yaml`, run once without interruption. Tests do not write to it.

    `config.yaml` in it has absolute paths, so that `metis-fast train <it> run.dir=<new>` repeats its last stage elsewhere.
    """
    folder = tmp_path_factory.mktemp("demo")
    shape = f"demo.model_shape={HERE / 'small_model.json'}"
    succeed(["demo", SMALL, f"run.dir={folder / 'run'}", shape, "log.progress=false"], folder / "process")
    return folder / "run"
