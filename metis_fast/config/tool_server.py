"""The tool server: how a run reaches one, and how one is served."""

from __future__ import annotations

import re
from typing import Annotated, Self

from pydantic import Field, model_validator

from metis_fast.config.section import NonNegative, Positive, PositiveFloat, Section, Text, Whole

_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def check_variable(key: str, name: str, example: str = "METIS_TOOLS_TOKEN") -> None:
    """Raises ValueError where a setting that names an environment variable holds something else."""
    if name and not _VARIABLE.fullmatch(name):  # a token that was put here is not shown
        raise ValueError(
            f"{key}: expected the name of an environment variable, like {example}, got something else; a token itself does not "
            "belong into a config"
        )


class ToolServerConfig(Section):
    """A tool server that runs the tools of this run, here or on another machine (docs/tool-server.md). Its settings of
    `tools.python`, `tools.text_search` and `tools.image_search` have to be the run's."""

    url: Text = ""
    """Address, like http://tools.example:8400. Empty: the run opens its tools itself."""
    token_env: Text = "METIS_TOOLS_TOKEN"
    """Environment variable that holds the server's token. Not set: none is sent."""
    connect_s: PositiveFloat = 10.0
    """Seconds for a connection."""
    timeout_s: PositiveFloat = 420.0
    """Seconds for one call: its turn in the server's queue, and all tries. Then the rollout is repeated."""
    retries: NonNegative = 5
    """Tries after the first where the server cannot be reached, with exponential back-off. None of them runs a call twice."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_variable("tools.server.token_env", self.token_env)
        return self


class ToolServeConfig(Section):
    """What `metis-fast tools serve` offers to runs on other machines, and to other trainers (docs/tool-server.md)."""

    host: Text = "127.0.0.1"
    """Address that it listens on. One that other machines reach needs a token."""
    port: Annotated[int, Field(ge=0, le=65535), Whole] = 8400
    """0: one that is free; it is printed."""
    token_env: Text = "METIS_TOOLS_TOKEN"
    """Environment variable that holds the token which every request has to bring. Not set: none is asked for."""
    max_sessions: Positive = 1024
    """Most sessions at once; a client that asks for one more is told to wait (429)."""
    queue: Positive = 1024
    """Most calls at once, running and waiting; a client with one more is told to wait (429)."""
    idle_s: PositiveFloat = 1800.0
    """Seconds without a call after which a session ends."""
    call_s: PositiveFloat = 420.0
    """Most seconds for a call, whatever its client allows. Beyond a tool's own limits, which are the agent's: of ours."""
    drain_s: PositiveFloat = 60.0
    """Seconds that running calls have to end after SIGTERM."""
    blob_mb: Positive = 64
    """Largest image that a client may send."""
    blobs_mb: Positive = 1024
    """Memory for images of prompts, so that each is sent once; those that were not used for the longest time go first."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_variable("tools.serve.token_env", self.token_env)
        return self
