"""The dual reward (ALGORITHM section 2)."""

from __future__ import annotations

from metis_fast.config import ScoreConfig
from metis_fast.types import Verdict


def accuracy_reward(verdict: Verdict, config: ScoreConfig) -> float:
    """r_acc = w_ans * r_ans + w_fmt * r_fmt."""
    return config.w_ans * verdict.correct + config.w_fmt * verdict.format_ok


def tool_reward(verdict: Verdict, num_tool_calls: int) -> float:
    """r_tool = 1 / (T + 1) if the answer is correct, else 0. T counts failed and malformed calls too."""
    return 1.0 / (num_tool_calls + 1) if verdict.correct else 0.0
