"""The demo set."""

from __future__ import annotations

from pathlib import Path

from metis_fast.config.section import FilePath, Fraction, Positive, Section, Several


class DemoConfig(Section):
    """The demo set and its tiny model (`metis-fast demo`). Everything is made under `run.dir`."""

    model_shape: FilePath = Path("configs/demo_model.json")
    """Shape of the tiny Qwen3-VL."""
    base_prompts: Positive = 11000
    """Trajectories that teach the skills, direct answers and tools alike."""
    cold_start_prompts: Positive = 3000
    """Trajectories that teach the habit of calling tools for everything, often badly."""
    train_prompts: Positive = 3000
    """Prompts for HDPO."""
    heldout_prompts: Positive = 600
    """Prompts for the evaluation before and after."""
    direct_share: Fraction = 0.5
    """Share of prompts in every ability that can be answered directly, in the cold start, training and held-out sets."""
    uncertain_share: Fraction = 0.3
    """Of the other perception and search prompts, the share to which a direct answer is right only sometimes."""
    odds: Several[Fraction] = ()
    """How often a direct answer to these is right: as many prompts of each, `kind` is `uncertain-0.7`, and the question says
    it. Empty: 0.7, unsaid, and the kind is `uncertain`."""
