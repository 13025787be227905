"""Plain `asyncio.gather` over OpenAI's Python client, in a process of its own. Reads jobs from stdin, answers in lines of JSON.

Every trajectory is a coroutine that asks for a message, runs its tool, and asks again with all tokens so far; one gather waits
for the whole batch. Counted are the client's requests and its parsing of the replies (httpx, JSON, pydantic), decoding on the
server, encoding of observations here; not counted: starting of the process.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
import time
from pathlib import Path

from openai import AsyncOpenAI

from metis_fast.config import RolloutConfig
from metis_fast.model_folder import load_tokenizer
from metis_fast.pictures import ImagePreparer
from metis_fast.rollout.chat import Chat
from metis_fast.rollout.episode import SampleKey
from metis_fast.testing.latency import Latency, SlowToolbox

from .jobs import ROOM, Played, Trajectory
from .plan import SHAPES, Plan


class Client:
    """Plays batches of a plan over an endpoint."""

    def __init__(self, folder: Path, shape: str, seed: int) -> None:
        tokenizer = load_tokenizer(folder)
        self._chat = Chat(tokenizer, ImagePreparer(None))
        self._plan = Plan(SHAPES[shape], seed, self._chat, tokenizer)

    async def play(self, port: int, num: int, latency: Latency) -> dict[str, object]:
        """The answer to a job."""
        toolbox = SlowToolbox(latency, self._plan.seed, self._plan.observation)
        async with AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="-", max_retries=0) as client:
            cpu = time.process_time()  # a run makes its client once
            played = await asyncio.gather(*(self._one(client, order, toolbox) for order in range(num)))
            cpu = time.process_time() - cpu
        return {
            "played": [dataclasses.asdict(one) for one in played],
            "num_calls": toolbox.num_calls,
            "num_failed": toolbox.num_failed,
            "cpu_s": cpu,
        }

    async def _one(self, client: AsyncOpenAI, order: int, toolbox: SlowToolbox) -> Played:
        plan, chat = self._plan, self._chat
        tools = toolbox.session(())
        one = Trajectory(order, chat.encode_prompt(plan.prompt_of(order)).tokens)
        while one.outcome is None:
            reply = await client.completions.create(
                model="policy",
                prompt=one.tokens,
                max_tokens=ROOM,
                temperature=1.0,
                logprobs=0,
                user=str(order),
                seed=SampleKey(plan.seed, "bench", order).turn_seed(len(one.messages)),
                extra_body={"stop_token_ids": chat.stop_ids, "return_token_ids": True},
            )
            choice = reply.choices[0]
            assert choice.model_extra is not None and choice.logprobs is not None
            one.say(choice.model_extra["token_ids"])
            await one.hear(chat, tools, choice.text, RolloutConfig().retries)
        await tools.close()
        return one.played()


def main(argv: list[str]) -> None:
    """Arguments: folder of the policy, name of the shape, seed. Jobs: {"port", "num", "latency": its fields}."""
    folder, shape, seed = argv
    client = Client(Path(folder), shape, int(seed))
    print("{}", flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        answer = asyncio.run(client.play(job["port"], job["num"], Latency(**job["latency"])))
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
