"""What a tool call gives, before anybody puts it into words: `rollout.protocols` says how the agent reads it.

They travel between processes; `metis_fast.types` apart, nothing is needed to read them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from metis_fast.types import ImageBlob


@dataclass(frozen=True, slots=True)
class Page:
    """One result of a search, as its source has it. rank: its place there, from 1. link, snippet: may be empty."""

    rank: int
    title: str
    link: str
    snippet: str


@dataclass(frozen=True, slots=True)
class TextSearchResult:
    """Of `text_search`, best first. query: as it was searched for."""

    query: str
    pages: tuple[Page, ...]


@dataclass(frozen=True, slots=True)
class SeenPage:
    """One result of an image search. image: what is shown of it; None where its source has none."""

    title: str
    link: str
    image: ImageBlob | None


@dataclass(frozen=True, slots=True)
class ImageSearchResult:
    """Of `image_search`, best first."""

    pages: tuple[SeenPage, ...]


@dataclass(frozen=True, slots=True)
class PythonResult:
    """Of one `python` call.

    parts: what was printed, to stdout and stderr in the order of printing, numbers of images (from 0) where they were shown,
    and what `note` says where it belongs. stdout, stderr: each by itself, without the note; tracebacks stand in stderr. images:
    PNG. ok: the code ended without an error of its own. note: what the agent has to know of the session ("timed out", "earlier
    variables are gone"), lines in brackets; or empty.
    """

    parts: tuple[str | int, ...]
    stdout: str
    stderr: str
    images: tuple[ImageBlob, ...]
    ok: bool
    note: str = ""


@dataclass(frozen=True, slots=True)
class ContentResult:
    """Of a tool of one's own, or of an MCP server.

    parts: texts, and numbers of images (from 0), in the order in which the tool gave them. ok: False where the tool says that
    the call was wrong.
    """

    parts: tuple[str | int, ...]
    images: tuple[ImageBlob, ...] = ()
    ok: bool = True


class Refusal(StrEnum):
    """Why a call was not made; a protocol may have words of its own for each."""

    NO_TOOL = "no tool"  # of that name
    ARGUMENTS = "arguments"  # none that the tool takes
    REPEATED = "repeated"  # it would give what it gave before
    OTHER = "other"


@dataclass(frozen=True, slots=True)
class Refused:
    """A call that could not be made as the agent wrote it. text: what is wrong. tool: the name that the agent wrote."""

    text: str
    why: Refusal = Refusal.OTHER
    tool: str = ""


ToolResult = TextSearchResult | ImageSearchResult | PythonResult | ContentResult | Refused
