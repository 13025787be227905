"""Tools and judges whose workers break where a test asks for it."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import cast

from metis_fast.score.protocol import JudgeUnavailable
from metis_fast.score.remote import JudgeService
from metis_fast.tools.remote import ToolService
from metis_fast.tools.results import Refused, ToolResult
from metis_fast.types import Observation, Prompt, Rollout, Verdict


class FragileTools(ToolService):
    """A tool worker that breaks where the code of a call asks for it: "# kill", "# bug", ...; other code is run."""

    async def call(self, session: int, name: str, arguments: Mapping[str, object]) -> ToolResult | Observation:
        """See `ToolService.call`."""
        match str(arguments.get("code")).split():
            case ["#", "pid"]:
                return Refused(str(os.getpid()))
            case ["#", "kill"]:
                os.kill(os.getpid(), signal.SIGKILL)
            case ["#", "kill", "once", mark] if not Path(mark).exists():
                Path(mark).touch()
                os.kill(os.getpid(), signal.SIGKILL)
            case ["#", "stop"]:
                os.kill(os.getpid(), signal.SIGSTOP)
            case ["#", "bug"]:
                raise RuntimeError("as asked")
            case ["#", "memory"]:
                resource.setrlimit(resource.RLIMIT_AS, (1 << 30, 1 << 30))
                return Refused("x" * (2 << 30))
            case ["#", "hang"]:
                await asyncio.sleep(3600)
            case ["#", "garbage"]:
                return cast(Refused, "no result")
        return await super().call(session, name, arguments)

    async def open_sessions(self) -> int:
        """How many there are."""
        return len(self._sessions)


class FragileJudge(JudgeService):
    """A judge's worker that breaks where the prompt's question asks for it."""

    async def judge(self, prompt: Prompt, rollout: Rollout) -> Verdict:
        """See `JudgeService.judge`."""
        match prompt.question:
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "stop":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "bug":
                raise RuntimeError("as asked")
            case "unavailable":
                raise JudgeUnavailable("as asked")
            case "garbage":
                return cast(Verdict, True)
        return await super().judge(prompt, rollout)

    async def pid(self) -> int:
        """Of this process."""
        return os.getpid()
