"""Judges, rewards and advantages."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import model_validator

from metis_fast.config.section import (
    MAY_CHANGE,
    FilePath,
    NonNegative,
    NonNegativeFloat,
    OrNone,
    Positive,
    PositiveFloat,
    Section,
    Text,
)


class LlmJudgeConfig(Section):
    """LLM judge: any endpoint that speaks the OpenAI chat-completions protocol."""

    base_url: Annotated[Text, MAY_CHANGE] = ""
    """For example http://127.0.0.1:8000/v1. Empty: rows of style `llm` are an error at start."""
    model: Text = ""
    """Model name to ask for."""
    api_key_env: Annotated[Text, MAY_CHANGE] = "METIS_JUDGE_API_KEY"
    """Environment variable that holds the key, if the endpoint wants one."""
    timeout_s: Annotated[PositiveFloat, MAY_CHANGE] = 60.0
    """Seconds for one request."""
    concurrency: Annotated[Positive, MAY_CHANGE] = 32
    """Requests in flight."""
    retries: Annotated[NonNegative, MAY_CHANGE] = 3
    """Tries after the first, with exponential back-off; then there is no verdict."""
    cache: Annotated[OrNone[FilePath], MAY_CHANGE] = None
    """SQLite file of past verdicts; none: kept in memory."""


class ScoreConfig(Section):
    """Rewards and advantages (ALGORITHM sections 2 to 4)."""

    w_ans: NonNegativeFloat = 0.9
    """Weight of the answer in r_acc."""
    w_fmt: NonNegativeFloat = 0.1
    """Weight of the format in r_acc."""
    estimator: Literal["hdpo", "grpo", "coupled", "gdpo"] = "hdpo"
    """`hdpo`: two channels. Baselines: `grpo` (accuracy only), `coupled` (r_acc + alpha r_tool, one channel), `gdpo` (each
    reward normalised over the group, summed, normalised over the batch)."""
    alpha: NonNegativeFloat = 0.15
    """Weight of r_tool in `coupled` and `gdpo`."""
    norm_by_std: bool = True
    """False leaves out the division by the standard deviation (Dr. GRPO)."""
    number_tolerance: NonNegativeFloat = 0.0
    """Relative tolerance of the rule judge for numbers, beyond rounding: 3.1416 equals 3.14159 without any."""
    llm: LlmJudgeConfig = LlmJudgeConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.w_ans + self.w_fmt == 0:
            raise ValueError("score.w_ans and score.w_fmt are both 0, so every reward is; set one of them")
        return self
