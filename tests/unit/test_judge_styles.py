"""The places that name the judge styles agree, so that a new one is whole or refused here."""

from __future__ import annotations

import asyncio

import pytest

from metis_fast.config import ScoreConfig
from metis_fast.config.score import LlmJudgeConfig
from metis_fast.judge_styles import STYLES, SYNONYMS, known_style
from metis_fast.score.judge import open_judge
from metis_fast.types import Message, Prompt


@pytest.mark.parametrize("style", STYLES)
def test_a_style_can_be_asked_for_by_a_row_and_by_a_setting(style: str) -> None:
    llm = LlmJudgeConfig(base_url="http://127.0.0.1:9/v1", model="never-asked")
    for config in (ScoreConfig(llm=llm), ScoreConfig.model_validate({"judge": style, "llm": llm})):
        judge = open_judge(config, [style])
        prompt = Prompt("a", "set", (Message("user", "two and two?"),), (), "math", ("4",), style, "two and two?")
        assert not asyncio.run(judge.compare(prompt, "")).correct  # without asking anybody
        judge.close()


def test_nothing_else_can_be_asked_for() -> None:
    asked = ScoreConfig.model_json_schema()["properties"]["judge"]["enum"]
    assert set(asked) == {"by_row", *STYLES}
    assert set(SYNONYMS.values()) <= set(STYLES)
    assert known_style("exact-match") == "rule"
    assert known_style("nobody") is None
