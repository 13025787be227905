"""The main job on one machine: make the demo data and a tiny Qwen3-VL, cold-start it, train it with HDPO, evaluate it.

Every stage leaves its result under `run.dir` and is skipped when that is there, so an interrupted job goes on where it was.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from metis_fast import config as config_module
from metis_fast.config import Config, DemoConfig, ModelConfig
from metis_fast.data.parquet import PromptFiles
from metis_fast.demo.files import DemoSizes, SplitSize, write_demo
from metis_fast.demo.play import play
from metis_fast.demo.policy import BASE, COLD_START, COLD_START_BY_ODDS, script_texts
from metis_fast.errors import ConfigError, DataError, one_line
from metis_fast.report.summary import Summary
from metis_fast.run import pipeline
from metis_fast.run.cold_start import sft
from metis_fast.scratch import replaced
from metis_fast.testing.tiny import build_tiny, read_shape
from metis_fast.types import Prompt

# The two sets of trajectories that the script plays; sft.phases of a demo config name them.
_STYLES = {"base": BASE, "cold_start": COLD_START}


def shipped(name: str) -> Path:
    """A file of configs/: the wheel's copy (CMakeLists.txt), or that of the checkout."""
    package = Path(__file__).parents[1]
    inside = package / "configs" / name
    return inside if inside.exists() else package.parent / "configs" / name


def demo_sizes(config: Config) -> DemoSizes:
    """Sizes of the demo set's files, as configured."""
    demo = config.demo

    def split(prompts: int, direct_share: float) -> SplitSize:
        return SplitSize(prompts, direct_share, uncertain_share=demo.uncertain_share, odds=demo.odds)

    return DemoSizes(
        base=SplitSize(demo.base_prompts, 0.5, (0.40, 0.38, 0.22), demo.uncertain_share, demo.odds),
        cold_start=split(demo.cold_start_prompts, demo.direct_share),
        train=split(demo.train_prompts, demo.direct_share),
        heldout=split(demo.heldout_prompts, 0.5),
    )


def is_demo(config: Config) -> bool:
    """Whether the config is one for `metis-fast demo`: it names both of the script's trajectories, and leaves what the demo
    fills in as it is by default."""
    return (
        {str(phase.trajectories) for phase in config.sft.phases} == _STYLES.keys()
        and config.sft.heldout is None
        and config.model.path == ModelConfig().path
        and not (config.data.train or config.data.heldout)
        and config.tools.text_search.corpus is None
        and config.tools.image_search.corpus is None
    )


def missing_stages(config: Config) -> list[str]:
    """Stages before training that are not done, by name and in order. config: of `resolve`."""
    names = ("data", "model", *(f"play {name}" for name in _STYLES), "sft")
    return [name for name in names if name not in _Stages(config.run.dir).done]


def resolve(config: Config) -> Config:
    """Fill in the paths of the demo's stages, all of them under `run.dir`."""
    root = config.run.dir
    data = root / "data"
    for phase in config.sft.phases:
        if phase.trajectories.name not in _STYLES:
            raise ConfigError(f"sft.phases names {phase.trajectories}; the demo has the trajectories {', '.join(_STYLES)}")
    tree = config_module.merge(
        config.model_dump(mode="python"),
        {
            "data": {"train": (data / "train.parquet",), "heldout": (data / "heldout.parquet",)},
            "tools": {
                "text_search": {"corpus": data / "text_corpus.parquet"},
                "image_search": {"corpus": data / "image_corpus.parquet"},
            },
            "model": {"path": root / "cold_start"},
            "sft": {
                "phases": tuple(
                    phase.model_dump() | {"trajectories": root / "trajectories" / phase.trajectories.name}
                    for phase in config.sft.phases
                )
            },
        },
    )
    return config_module.build(tree)


def run(config: Config) -> Summary | None:
    """The whole job. Raises what its stages raise."""
    config = resolve(config)
    return pipeline.train(config, prepare(config))


def prepare(config: Config) -> float:
    """All stages before training, into `config.run.dir`: data, model, trajectories, cold start. config: of `resolve`.

    Returns the wall seconds that they took, earlier calls included. Raises what the stages raise.
    """
    root = config.run.dir
    untrained = config.model_copy(update={"model": config.model.model_copy(update={"path": root / "model"})})
    stages = _Stages(root)
    stages("data", lambda: _make_data(config, root / "data"))
    stages("model", lambda: _make_model(config, root / "model"))
    styles = _STYLES | ({"cold_start": COLD_START_BY_ODDS} if config.demo.odds else {})
    for name, style in styles.items():
        stages(
            f"play {name}",
            lambda n=name, s=style: play(untrained, root / "data" / f"{n}.parquet", s, root / "trajectories" / n),
        )
    stages("sft", lambda: sft(untrained, root / "cold_start"))
    return stages.seconds


class _Stages:
    """Runs what is not done yet, and keeps the wall seconds of what is, in `stages.json`."""

    def __init__(self, root: Path) -> None:
        self._path = root / "stages.json"
        self.done = self._read() if self._path.exists() else {}

    def _read(self) -> dict[str, float]:
        try:
            return {str(name): float(seconds) for name, seconds in json.loads(self._path.read_bytes()).items()}
        except (ValueError, TypeError, AttributeError) as error:
            raise DataError(
                f"{self._path}: expected seconds by stage, got {one_line(error)}; remove it to make all stages again"
            ) from None

    @property
    def seconds(self) -> float:
        """Wall seconds of all stages done."""
        return sum(self.done.values())

    def __call__(self, name: str, job: Callable[[], object]) -> None:
        if name in self.done:
            return
        began = time.perf_counter()
        job()
        self.done[name] = time.perf_counter() - began
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with replaced(self._path) as scratch:
            scratch.write_text(json.dumps(self.done, indent=1) + "\n", encoding="utf-8")


def _make_data(config: Config, folder: Path) -> None:
    scratch = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    write_demo(scratch, config.run.seed, demo_sizes(config), lambda line: print(line, flush=True))
    shutil.rmtree(folder, ignore_errors=True)  # of a stage that was cut off before it was booked as done
    os.replace(scratch, folder)


def _make_model(config: Config, folder: Path) -> None:
    scratch = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    texts = script_texts(_prompts(folder.with_name("data") / "base.parquet"))
    shape = config.demo.model_shape
    if shape == DemoConfig().model_shape and not shape.exists():  # no checkout here
        shape = shipped(shape.name)
    build_tiny(scratch, read_shape(shape), texts, config.run.seed)
    shutil.rmtree(folder, ignore_errors=True)  # of a stage that was cut off before it was booked as done
    os.replace(scratch, folder)


def _prompts(path: Path) -> Iterator[Prompt]:
    files = PromptFiles([path])
    return (files.read(i) for i in range(len(files)))
