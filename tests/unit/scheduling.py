"""What tests of the schedule share: a cursor over made-up prompts, and settings."""

from __future__ import annotations

from metis_fast.config import RolloutConfig

STEPS, P = 7, 3


class Rows:
    """A cursor over rows 0, 1, ...; every one is a prompt."""

    def __init__(self, make_prompt):
        self.make, self.next = make_prompt, 0

    async def begin(self, n):
        rows = range(self.next, self.next + n)
        self.next += n
        return [(row, self.read(row)) for row in rows]

    def read(self, row):
        return self.make(uid=f"p{row}")


def config(mode, over=0.0, slow="carry", staleness=2, **more):
    return RolloutConfig.model_validate(
        {"mode": mode, "over_provision": over, "slow": slow, "max_staleness": staleness, "prompts_per_step": P} | more
    )
