"""vLLM's scheduler for engines that cannot take a prompt in parts: with seeds and without a GPU.

A part of a prompt samples a token, too, which vLLM 0.32 throws away and for which it turns the request's generator back;
that of a CPU cannot be (`RuntimeError: CPU Generator does not use offset`), and the engine ends.
`enable_chunked_prefill=False` keeps prompts whole but for one case, which is mended here.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.v1.core.sched.scheduler import Scheduler

if TYPE_CHECKING:
    from vllm.v1.request import Request


class WholeScheduler(Scheduler):
    """vLLM cuts a prompt before an image for which a step has no room left (for as many outputs of the vision tower as a
    step has tokens). Here it waits for the next step; alone it always has room, as no prompt is longer than a step."""

    def _try_schedule_encoder_inputs(
        self,
        request: Request,
        num_computed_tokens: int,
        num_new_tokens: int,
        encoder_compute_budget: int,
        shift_computed_tokens: int = 0,
    ) -> tuple[list[int], int, int, list[int], list[int]]:
        scheduled = super()._try_schedule_encoder_inputs(
            request, num_computed_tokens, num_new_tokens, encoder_compute_budget, shift_computed_tokens
        )
        if scheduled[1] == num_new_tokens:
            return scheduled
        # requests that wait may hold outputs of earlier tries: nobody would ever have room if they kept them
        for waiting in self.waiting:
            self.encoder_cache_manager.free(waiting)
        return [], 0, encoder_compute_budget, [], []
