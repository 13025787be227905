"""A minimal HTTP server with OpenAI's completions endpoint in front of an engine: token ids in, text and token ids out.

Only what the benchmark's client needs, so that it costs little: one route, whole bodies, connections kept alive. The reply has
the fields that vLLM's server sends with `return_token_ids` and `logprobs`. `user` names the trajectory; its session is kept
until its last message, so that nothing is prefilled twice, as a prefix cache would have it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from typing import Any

from metis_fast.rollout.engine import EngineSession, Sampling

from .jobs import Stage

_HEAD_END = b"\r\n\r\n"


class CompletionsServer:
    """While open, listens on a free port of this machine. Its handlers run in the engine's event loop."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._sessions: dict[int, EngineSession] = {}
        self._turns: dict[int, int] = {}
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> int:
        """Returns the port."""
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return int(self._server.sockets[0].getsockname()[1])

    async def __aexit__(self, *error: object) -> None:
        assert self._server is not None
        self._server.close()
        for writer in list(self._open):
            writer.close()
        await self._server.wait_closed()
        for session in self._sessions.values():
            session.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open.add(writer)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):  # the client has gone
            while True:
                head = await reader.readuntil(_HEAD_END)
                fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if b": " in line)
                asked = json.loads(await reader.readexactly(int(fields[b"content-length"])))
                body = json.dumps(await self._complete(asked)).encode()
                writer.write(
                    b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
                )
                await writer.drain()
        self._open.discard(writer)
        writer.close()

    async def _complete(self, asked: dict[str, Any]) -> dict[str, Any]:
        order = int(asked["user"])
        turn = self._turns.get(order, 0)
        if order not in self._sessions:
            self._sessions[order] = self._stage.engine.session(order, self._stage.plan.prompt_of(order).uid)
        sampling = Sampling(
            max_tokens=asked["max_tokens"],
            stop_ids=tuple(asked["stop_token_ids"]),
            temperature=asked["temperature"],
            seed=asked["seed"],
        )
        found = await self._sessions[order].generate(asked["prompt"], (), (), sampling)
        self._turns[order] = turn + 1
        if turn + 1 == len(self._stage.plan.messages[order]):
            self._sessions.pop(order).close()
        tokens = found.tokens.tolist()
        chat = self._stage.chat
        choice = {
            "index": 0,
            "text": chat.message_text(tokens),
            "finish_reason": "stop",
            "token_ids": tokens,
            "logprobs": {
                "tokens": [f"token_id:{token}" for token in tokens],
                "token_logprobs": found.logp.tolist(),
                "top_logprobs": None,
                "text_offset": [],
            },
        }
        usage = {"prompt_tokens": len(asked["prompt"]), "completion_tokens": len(tokens)}
        usage["total_tokens"] = sum(usage.values())
        return {
            "id": f"cmpl-{order}-{turn}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": asked["model"],
            "choices": [choice],
            "usage": usage,
        }
