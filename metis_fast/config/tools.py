"""Tools of the agent."""

from __future__ import annotations

from typing import Annotated, Literal

from metis_fast.config.section import BY_CONTENT, FilePath, OrNone, Positive, PositiveFloat, Section, Several
from metis_fast.types import ToolName

CallSyntax = Literal["strict", "lenient"]


class PythonToolConfig(Section):
    """The `python` tool: one sandboxed session a rollout."""

    timeout_s: PositiveFloat = 20.0
    """Wall seconds a call may take."""
    memory_mb: Positive = 1024
    """Address-space limit of a session, beyond what the warm interpreter holds."""
    scratch_mb: Positive = 64
    """Size of the session's private scratch folder."""
    max_output_chars: Positive = 20000
    """Longer output is cut in the middle."""
    unsafe: bool = False
    """Run model-written code without a sandbox. Only for machines that you can throw away."""


class TextSearchConfig(Section):
    """The `text_search` tool over a local corpus."""

    corpus: Annotated[OrNone[FilePath], BY_CONTENT] = None
    """Parquet file, or folder of them, with columns `title`, `link`, `text`; indexed when a run starts."""
    max_results: Positive = 3
    """Results in an observation."""
    snippet_chars: Positive = 300
    """Length of a snippet."""


class ImageSearchConfig(Section):
    """The `image_search` tool over a local set of images."""

    corpus: Annotated[OrNone[FilePath], BY_CONTENT] = None
    """Parquet file, or folder of them, with columns `title`, `link`, `image` (bytes or paths); indexed when a run
    starts."""
    max_results: Positive = 2
    """Results in an observation, each with a thumbnail."""
    thumbnail_px: Positive = 256
    """Longest side of a thumbnail."""


class ToolsConfig(Section):
    """Which tools the agent has."""

    enabled: Several[ToolName] = (ToolName.PYTHON, ToolName.TEXT_SEARCH, ToolName.IMAGE_SEARCH)
    """Calling another one is the agent's error."""
    call_syntax: CallSyntax = "strict"
    """`strict`: a call is JSON. `lenient`: also what can only mean one thing, such as raw line breaks or single quotes."""
    python: PythonToolConfig = PythonToolConfig()
    text_search: TextSearchConfig = TextSearchConfig()
    image_search: ImageSearchConfig = ImageSearchConfig()
