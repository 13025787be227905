"""One small run for all end-to-end tests, with what it was made of.

Its agent comes with the tests (`agent`, made as agent.yaml says): it calls tools and is right about as often as it is wrong.
So no test hangs on what a model that is trained on the machine happens to learn.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from filelock import FileLock
from harness import AGENT, HERE, SMALL, phases, succeed

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
