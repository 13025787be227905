"""What a judge's endpoint says on demand, beside what `metis_fast.testing.judge` has, and who asks it."""

from __future__ import annotations

import gzip
import json

from metis_fast.config import LlmJudgeConfig
from metis_fast.score.llm import LlmMatcher
from metis_fast.testing.judge import Reply
from metis_fast.types import Prompt

BOMB = Reply(200, gzip.compress(b" " * (64 << 20), 6), {"Content-Encoding": "gzip"})
"""64 MiB in 64 KiB."""


def error(status: int, message: str, **headers: str) -> Reply:
    return Reply(
        status, json.dumps({"error": {"message": message}}), {name.replace("_", "-"): headers[name] for name in headers}
    )


def a_prompt(*answers: str, uid: str = "p", question: str = "Which city?") -> Prompt:
    return Prompt(uid, "test", (), (), "search", answers, "model", question)


def a_matcher(url: str, **changes: object) -> LlmMatcher:
    settings = {"base_url": url, "model": "grader", "timeout_s": 20.0, **changes}
    return LlmMatcher(LlmJudgeConfig.model_validate(settings), backoff_s=0.01)
