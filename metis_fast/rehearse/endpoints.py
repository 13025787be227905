"""Stand-ins of what a job talks to, over real HTTP on loopback (`metis_fast.testing`), fitted to the job's own settings."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from typing import Any

from metis_fast.config import HttpSearchConfig
from metis_fast.score.llm_prompt import PLACES, JudgePrompt
from metis_fast.testing.judge import JudgeServer, completion
from metis_fast.testing.search import Received, Reply, SearchServer, some_pages

MODEL = "stand-in"
FIND = "/find"
"""Where `TemplateServer` searches as `tools.text_search.http` says."""


def judge(prompt: JudgePrompt) -> JudgeServer:
    """A judge for whom an answer is right if it is a ground truth but for case. prompt: that it will be asked with."""
    return JudgeServer(_verdict, models=(MODEL,), read=_reader(prompt))


def _verdict(task: dict[str, Any]) -> Any:
    return completion("CORRECT" if task["truth"].strip().casefold() == task["answer"].strip().casefold() else "INCORRECT")


def _reader(prompt: JudgePrompt) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """Finds in a user message what was filled into the prompt."""
    text, value = re.escape(prompt.user), r'"(?:[^"\\]|\\.)*"'
    for place in PLACES:
        first, *others = text.split(re.escape(f"{{{place}}}"))
        text = value.join([f"{first}(?P<{place}>{value}){others[0]}", *others[1:]])
    pattern = re.compile(text, re.DOTALL)

    def read(body: dict[str, Any]) -> dict[str, Any]:
        found = pattern.search(body["messages"][-1]["content"])
        assert found is not None, "the judge was asked something else than the prompt"
        return {place: json.loads(found[place]) for place in PLACES}

    return read


class TemplateServer(SearchServer):
    """The providers, and an endpoint that answers as a template expects it."""

    def __init__(self, template: HttpSearchConfig, key: str) -> None:
        super().__init__(key=key)
        self._template = template

    def answer(self, request: Received) -> Reply:
        """See `SearchServer`."""
        if request.path != FIND:
            return super().answer(request)
        named = {"title": self._template.title, "link": self._template.link, "snippet": self._template.snippet}
        pages = [_merged({"title": page.title, "link": page.link, "snippet": page.snippet}, named) for page in some_pages("it")]
        return Reply(200, json.dumps(_placed(self._template.results, pages)).encode())


def _placed(path: str, value: object) -> object:
    """A value where a path of names and positions finds it."""
    for name in reversed(path.split(".") if path else []):
        value = [*({} for _ in range(int(name))), value] if name.isdecimal() else {name: value}
    return value


def _merged(page: Mapping[str, str], named: Mapping[str, str]) -> dict[str, object] | str:
    """A page whose parts stand at these paths, of which none is inside another; all empty: it is a text."""
    if not any(named.values()):
        return page["title"]
    out: dict[str, object] = {}
    for part, path in named.items():
        place = out
        *outer, last = path.split(".")
        for name in outer:
            inner = place.setdefault(name, {})
            assert isinstance(inner, dict)
            place = inner
        place[last] = page[part]
    return out
