"""The agent as a server."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from metis_fast.config.section import (
    FilePath,
    NonNegative,
    NonNegativeFloat,
    Number,
    OrNone,
    Positive,
    PositiveFloat,
    Section,
    Text,
    Whole,
)
from metis_fast.config.tool_server import check_variable


class ServeConfig(Section):
    """What `metis-fast serve` offers: the whole agent, its tools included, as OpenAI's chat completions (docs/serve.md)."""

    host: Text = "127.0.0.1"
    """Address that it listens on. One that other machines reach needs a token."""
    port: Annotated[int, Field(ge=0, le=65535), Whole] = 8300
    """0: one that is free; it is printed."""
    token_env: Text = "METIS_SERVE_TOKEN"
    """Environment variable that holds the token which every request has to bring. Not set: none is asked for."""
    model: Text = ""
    """Name that requests call the model by; empty: that of the folder `model.path`."""
    system: OrNone[FilePath] = None
    """File with the agent's system text, used as it is; `{tools}` in it stands for the sections of the tools. An empty file: no
    system text. A Parquet file, such as those of Metis-RL: the system message of its first row, to the letter. Not set: a text
    in the form of the published rows, in words of ours."""
    client_system: Literal["before", "refuse"] = "before"
    """A system message of the client: `before` puts it in front of the agent's own text, `refuse` answers with an error."""
    tools: bool = True
    """Whether the agent has the tools of `tools`. A request can do without them, with `tool_choice: none`."""
    raw: bool = False
    """Content is all that the agent wrote, instead of its final answer. A request can choose, with `raw`."""
    temperature: NonNegativeFloat = 1.0
    """Where a request names none; 0 is greedy."""
    top_p: Annotated[float, Field(gt=0, le=1), Number] = 1.0
    """Where a request names none."""
    top_k: NonNegative = 0
    """Where a request names none; 0: off."""
    max_concurrent: Positive = 32
    """Episodes at once."""
    queue: NonNegative = 128
    """Episodes that wait for their turn; a client with one more is told to come again (429)."""
    max_request_mb: Positive = 64
    """Largest request, in MiB; images in it are a third longer than their files."""
    max_image_mb: Positive = 32
    """Largest image of a request, in MiB, as a file."""
    max_images: Positive = 16
    """Most images of a request."""
    keep_alive_s: PositiveFloat = 10.0
    """A stream that has nothing to say yet sends a comment every so many seconds."""
    drain_s: PositiveFloat = 120.0
    """Seconds that running episodes have to end after SIGTERM."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_variable("serve.token_env", self.token_env, "METIS_SERVE_TOKEN")
        return self
