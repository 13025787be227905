"""One small run for all end-to-end tests, with what it was made of.

Its agent comes with the tests (`agent`, made as agent.yaml says): it calls tools and is right about as often as it is wrong.
So no test hangs on what a model that is trained on the machine happens to learn. Beside it, engines with faults.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from faulty_engines import Engines, Open, PretendedTransfer
from filelock import FileLock
from harness import AGENT, HERE, SMALL, phases, succeed

from metis_fast.model import Policy
from metis_fast.rollout.chat import Chat
from metis_fast.rollout.vllm import direct
from metis_fast.types import Prompt

# All tests again in another number format or with more threads: METIS_TEST_SETTINGS="model.dtype=bfloat16 run.threads=2"
_SETTINGS = os.environ.get("METIS_TEST_SETTINGS", "").split()


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that nothing happened to, beside the data, the trajectories and the models that the demo made for it.
    Tests do not write to it.

    `config.yaml` in it has absolute paths, so that `metis-fast train <it> run.dir=<new>` repeats the run elsewhere.
    """
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "demo"
    folder.mkdir(exist_ok=True)
    run = folder / "run"
    with FileLock(folder / "lock"):  # of the processes that run tests side by side, the first one makes it
        if not (run / "whole").exists():
            made = folder / "made"
            few = [phases((Path("base"), 3), (Path("cold_start"), 2)), "train.steps=1", "eval.every=0", "log.progress=false"]
            shape = f"demo.model_shape={HERE / 'small_model.json'}"
            succeed(["demo", SMALL, f"run.dir={made}", shape, *few, *_SETTINGS], folder / "making")
            again = ["train.steps=5", "eval.every=2", f"model.path={AGENT}", f"run.dir={run}"]
            succeed(["train", made / "config.yaml", *again], folder / "running")
            for name in ("data", "trajectories", "model"):
                (run / name).symlink_to(made / name)
            (run / "cold_start").symlink_to(AGENT)
            (run / "whole").touch()
    return run


@pytest.fixture(scope="session")
def job(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of that run for ranks: in float32, and no evaluation or TensorBoard to wait for."""
    path = tmp_path_factory.mktemp("job") / "job.yaml"
    path.write_text(f"base: {demo / 'config.yaml'}\nmodel: {{dtype: float32}}\nlog: {{progress: false, tensorboard: false}}\n")
    return path


@pytest.fixture
def engines(tmp_path: Path, policy: Policy, chat: Chat) -> Iterator[Open]:
    """Opens some; closed when the test ends."""
    with ExitStack() as stack:
        yield lambda silence_s=2.0, **more: Engines(tmp_path, policy, chat, stack, silence_s, **more)


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
