"""Calls of a toolbox's tools, for tests of whatever stands behind it."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence

from metis_fast.errors import InfrastructureError
from metis_fast.tools.protocol import NO_EXTRA, Toolbox
from metis_fast.tools.results import ToolResult
from metis_fast.types import ImageBlob, Observation

Call = tuple[str, Mapping[str, object]]
Answer = ToolResult | Observation | InfrastructureError


def ask(box: Toolbox, *calls: Call, images: Sequence[ImageBlob] = (), extra: Mapping[str, object] = NO_EXTRA) -> list[Answer]:
    """What a session answers to calls one after the other, failures of ours among it; it is closed, and may be twice."""

    async def story() -> list[Answer]:
        session, answers = box.session(images, extra), []
        for name, arguments in calls:
            try:
                answers.append(await session.call(name, arguments))
            except InfrastructureError as error:
                answers.append(error)
        await session.close()
        await session.close()
        return answers

    return asyncio.run(story())
