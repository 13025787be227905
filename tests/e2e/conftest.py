"""One small demo for all end-to-end tests: its data, its cold-started model, and its uninterrupted run. Engines with faults."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from faulty_engines import Engines, Open, PretendedTransfer
from harness import HERE, SMALL, succeed

from metis_fast.model import Policy
from metis_fast.rollout.chat import Chat
from metis_fast.rollout.vllm import direct
from metis_fast.types import Prompt


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of `metis-fast demo small.yaml`, run once without interruption. Tests do not write to it.

    `config.yaml` in it has absolute paths, so that `metis-fast train <it> run.dir=<new>` repeats its last stage elsewhere.
    """
    folder = tmp_path_factory.mktemp("demo")
    shape = f"demo.model_shape={HERE / 'small_model.json'}"
    succeed(["demo", SMALL, f"run.dir={folder / 'run'}", shape, "log.progress=false"], folder / "process")
    return folder / "run"


@pytest.fixture
def engines(tmp_path: Path, policy: Policy, chat: Chat) -> Iterator[Open]:
    """Opens some; closed when the test ends."""
    with ExitStack() as stack:
        yield lambda copy="", silence_s=2.0, **more: Engines(tmp_path, policy, chat, stack, copy, silence_s, **more)


@pytest.fixture
def transfers(monkeypatch: pytest.MonkeyPatch) -> list[PretendedTransfer]:
    """Direct transfers are pretended: all that are opened in a test."""
    monkeypatch.setattr(PretendedTransfer, "opened", [])
    monkeypatch.setattr(direct, "check", lambda transport: None)
    monkeypatch.setattr(direct, "DirectTransfer", PretendedTransfer)
    return PretendedTransfer.opened


@pytest.fixture
def prompts(make_prompt: Callable[..., Prompt]) -> list[Prompt]:
    """Three, of text."""
    return [make_prompt(uid=f"p{i}") for i in range(3)]
