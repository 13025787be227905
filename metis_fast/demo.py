"""The main job on one machine: make the demo data and a tiny Qwen3-VL, cold-start it, train it with HDPO, evaluate it.

Every stage leaves its result under `run.dir` and is skipped when that is there, so an interrupted job goes on where it was.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from metis_fast import config as config_module
from metis_fast import pipeline
from metis_fast.cold_start import play, sft
from metis_fast.config import Config
from metis_fast.data.demo import DemoSizes, SplitSize, write_demo
from metis_fast.data.parquet import PromptFiles
from metis_fast.data.scripted import BASE, COLD_START, script_texts
from metis_fast.report.summary import Summary
from metis_fast.testing.tiny import build_tiny, read_shape
from metis_fast.types import Prompt


def demo_sizes(config: Config) -> DemoSizes:
    """Sizes of the demo set's files, as configured."""
    demo = config.demo
    return DemoSizes(
        base=SplitSize(demo.base_prompts, 0.6),
        cold_start=SplitSize(demo.cold_start_prompts, demo.direct_share),
        train=SplitSize(demo.train_prompts, demo.direct_share),
        heldout=SplitSize(demo.heldout_prompts, 0.5),
    )


def resolve(config: Config) -> Config:
    """Fill in the paths of the demo's stages, all of them under `run.dir`."""
    root = config.run.dir
    data = root / "data"
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
                    {"trajectories": root / "trajectories" / name, "steps": phase.steps}
                    for name, phase in zip(("base", "cold_start"), config.sft.phases, strict=True)
                )
            },
        },
    )
    return config_module.build(tree)


def run(config: Config) -> Summary | None:
    """The whole job. Raises what its stages raise."""
    config = resolve(config)
    root = config.run.dir
    _make_data(config, root / "data")
    _make_model(config, root / "model")
    untrained = config.model_copy(update={"model": config.model.model_copy(update={"path": root / "model"})})
    if not (root / "cold_start").exists():
        for phase, style in zip(config.sft.phases, (BASE, COLD_START), strict=True):
            play(untrained, root / "data" / f"{phase.trajectories.name}.parquet", style, phase.trajectories)
        sft(untrained, root / "cold_start")
    return pipeline.train(config)


def _make_data(config: Config, folder: Path) -> None:
    if folder.exists():
        return
    scratch = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    write_demo(scratch, config.run.seed, demo_sizes(config), lambda line: print(line, flush=True))
    os.replace(scratch, folder)


def _make_model(config: Config, folder: Path) -> None:
    if folder.exists():
        return
    scratch = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    texts = script_texts(_prompts(folder.with_name("data") / "base.parquet"))
    build_tiny(scratch, read_shape(config.demo.model_shape), texts, config.run.seed)
    os.replace(scratch, folder)


def _prompts(path: Path) -> Iterator[Prompt]:
    files = PromptFiles([path])
    return (files.read(i) for i in range(len(files)))
