"""Benchmarks: their files, how they are asked, and how replies are scored."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from metis_fast.config.section import FilePath, Named, NonNegative, NonNegativeFloat, Number, Positive, Section, Several, Text


class BenchmarkConfig(Section):
    """How `metis-fast benchmark run` and `eval.benchmarks` ask and score (docs/evaluation.md)."""

    files: Annotated[dict[str, Several[FilePath]], Named] = Field(default={})
    """Published files, or folders of them, of each benchmark, for example {vstar: data/VStarBench.tsv}."""
    any_md5: bool = False
    """Take files whose MD5 is not a published one; the result says so."""
    max_questions: NonNegative = 0
    """Only the first ones of each benchmark; 0: all. The result says that it is of a part."""
    prompt: Text = ""
    """Which text a question becomes, by its name in `metis-fast benchmark list`; empty: the benchmark's first."""
    system: Literal["agent", "none"] = "agent"
    """`agent`: the agent's system text, as `serve.system` has it. `none`: no system text, as VLMEvalKit asks."""
    tools: Literal["on", "off", "forced"] = "on"
    """`on`: the tools of `tools`. `off`: none is offered, and a call is refused. `forced`: on, and each question ends with a
    sentence that asks for at least one call."""
    rollouts: Positive = 1
    """Replies to each question; a question counts by their mean."""
    temperature: NonNegativeFloat = 0.0
    """0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1), Number] = 1.0
    """Nucleus; 1: off."""
    top_k: NonNegative = 0
    """0: off."""
    scorer: Literal["ours", "vlmeval", "both"] = "both"
    """Whose rules and judges score, where a benchmark has them: ours, VLMEvalKit's as they behave, or both side by side."""
    judge: bool = False
    """Also ask the model of `score.llm`, beside the rules; never instead of one."""
