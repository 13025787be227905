"""What was asked, as a key, and what was answered, as JSON.

A key is a hash of all that the answer may depend on, so that nothing has to be running to find it: the tool's name and
settings, the arguments, what the session was opened with, and, of tools that keep a state, the calls before and their answers.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import get_args

from metis_fast.config import ToolsConfig, by_content, deciding
from metis_fast.errors import RecordingError, one_line
from metis_fast.tools.result_tree import from_tree, images_of, to_tree
from metis_fast.tools.results import ToolResult
from metis_fast.types import ImageBlob, Observation, ToolName, Verdict

_SEARCHES = (ToolName.TEXT_SEARCH, "search")
"""Names of the one tool that keeps no state."""
_THERE = ("enabled", "own", "mcp")
"""Settings that say what tools there are, which any call may hear of."""


@dataclass(frozen=True, slots=True)
class Asked:
    """One question to a tool or a judge.

    key: what its answer is found by. what: the tool's name, or the judge's. request: its arguments, JSON, for people. scope: of
    the state that it meets and changes; None: it has none, and one answer is as good as another.
    """

    key: str
    what: str
    request: str
    scope: str | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """body: JSON, images in it by hash. images: their bytes by hash; empty where they are read later."""

    body: str
    images: Mapping[str, bytes]

    @property
    def sha256(self) -> str:
        """What it is known by."""
        return sha256(self.body.encode()).hexdigest()


def canonical(value: object) -> str:
    """JSON that is equal for equal values; ASCII, so that halves of surrogates survive."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=repr)


def digest(*parts: object) -> str:
    """Of what `canonical` makes of it."""
    return sha256(canonical(parts).encode()).hexdigest()


class History:
    """The calls of one session, whose keys it makes."""

    def __init__(
        self,
        config: ToolsConfig,
        images: Sequence[ImageBlob],
        extra: Mapping[str, object],
        seen: Sequence[tuple[int, int]],
    ) -> None:
        """images, extra, seen: see `Toolbox.session`."""
        self._settings = deciding(config)
        for tool, section in ((ToolName.TEXT_SEARCH, config.text_search), (ToolName.IMAGE_SEARCH, config.image_search)):
            # which files there are; their content is compared where the recording is opened
            self._settings[tool] |= {name: path is not None for name, path in by_content(section)}
        # a run may go on at another address; another run that finds its answers there has its own
        self._settings[ToolName.TEXT_SEARCH] |= {"url": config.text_search.url}
        pictures = [image.sha256 for image in images]
        sizes = list(seen) if config.python.images == "seen" else []
        self._there = [self._settings[name] for name in _THERE]
        self._opened: dict[str, object] = {
            ToolName.PYTHON: [pictures, sizes],
            ToolName.IMAGE_SEARCH: [pictures, dict(extra)],
        }
        self._opened_otherwise = [pictures, dict(extra), list(seen)]
        self._chains: dict[str, str] = {}

    def ask(self, name: str, arguments: Mapping[str, object]) -> Asked:
        """A call that is about to be made."""
        request = canonical(dict(arguments))
        if name in _SEARCHES:
            return Asked(digest(name, self._settings[ToolName.TEXT_SEARCH], self._there, request), name, request)
        # a built-in tool has a state of its own; what others share nobody knows
        scope = name if name in self._opened else ""
        settings = self._settings[scope] if scope else self._settings["max_output_chars"]
        opened, before = self._opened.get(scope, self._opened_otherwise), self._chains.get(scope, "")
        return Asked(digest(name, settings, self._there, opened, before, request), name, request, scope)

    def answered(self, asked: Asked, answer: str) -> None:
        """A call was made. answer: its hash."""
        if asked.scope is not None:
            self._chains[asked.scope] = digest(asked.key, answer)

    def lost(self, asked: Asked) -> None:
        """A call failed by our fault: whatever the tool kept is gone."""
        if asked.scope is not None:
            self._chains[asked.scope] = digest(asked.key, None)


# -- answers --------------------------------------------------------------------------------------------------------------

_KINDS: dict[str, type] = {kind.__name__: kind for kind in (*get_args(ToolResult), Observation, Verdict)}


def write_answer(value: object) -> Answer:
    """A result, an observation or a verdict."""
    kind = type(value).__name__
    if kind not in _KINDS:
        raise TypeError(f"expected a result of tools.results, an Observation or a Verdict, got {kind}")
    return Answer(canonical({"kind": kind, "has": to_tree(value)}), {one.sha256: one.data for one in images_of(value)})


def read_answer(body: str, image: Callable[[str], bytes]) -> object:
    """What `write_answer` was given. image: bytes by hash.

    Raises:
        RecordingError: another release wrote it.
    """
    try:
        tree = json.loads(body)
        return from_tree(_KINDS[tree["kind"]], tree["has"], lambda sha256: ImageBlob(image(sha256), sha256))
    except RecordingError:  # of an image
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RecordingError(
            f"an answer in the recording cannot be read ({type(error).__name__}: {one_line(error)}); replay it with the "
            "release that recorded it, or record again"
        ) from None
