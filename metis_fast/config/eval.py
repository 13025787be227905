"""Evaluation."""

from __future__ import annotations

from typing import Annotated

from metis_fast.config.section import MAY_CHANGE, NonNegative, NonNegativeFloat, Positive, Section, Several, Text


class EvalConfig(Section):
    """Evaluation on the held-out prompts."""

    every: Annotated[NonNegative, MAY_CHANGE] = 0
    """Steps between evaluations while training; 0: only before and after."""
    rollouts_per_prompt: Positive = 1
    """Samples of each held-out prompt."""
    temperature: NonNegativeFloat = 1.0
    """Sampling temperature; 0 is greedy."""
    max_prompts: NonNegative = 0
    """Only the first ones; 0: all."""
    benchmarks: Annotated[Several[Text], MAY_CHANGE] = ()
    """Benchmarks that are played with the run's own engines before and after training and every `eval.every` steps, by their
    keys in `benchmark.files`."""
