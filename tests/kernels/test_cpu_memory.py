"""What the C++ ops hold beside the gradients, from torch's allocator: deterministic, so the limits are tests."""

from __future__ import annotations

import pytest
import torch

from bench.candidate import Outcome
from bench.measure import peak_bytes
from metis_kernels import hdpo_loss, linear_logprob

# The hidden size is small to be quick: what grows with it is threads x chunk x hidden, 2 MiB more at 1024 on two threads.


def head(num_tokens: int, hidden_size: int, vocab: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, hidden_size, generator=draw).bfloat16()
    return (
        hidden,
        torch.randn(vocab, hidden_size, generator=draw).bfloat16(),
        torch.randint(vocab, (num_tokens,), generator=draw),
    )


@pytest.mark.parametrize(("num_tokens", "vocab", "share"), [(2048, 32768, 0.14), (4096, 151936, 0.03)])
def test_the_loss_holds_a_small_share_of_the_logits(num_tokens: int, vocab: int, share: float):
    hidden, head_VH, targets = head(num_tokens, 16, vocab)
    hidden.requires_grad_()
    head_VH.requires_grad_()
    advantages, main_grad = torch.ones(num_tokens), torch.zeros(vocab, 16)
    old = torch.full((num_tokens,), -11.0)

    def step() -> Outcome:
        hidden.grad = None
        out = hdpo_loss(
            hidden, head_VH, targets, old, advantages, advantages, None, 1, 1, anchor_T=torch.full((num_tokens,), 20.0),
            main_grad=main_grad, impl="cpu",
        )  # fmt: skip
        out.loss.backward()
        assert hidden.grad is not None
        return Outcome(handed_back=hidden.grad.nbytes)

    assert 0 < peak_bytes(step, torch.device("cpu")) < share * num_tokens * vocab * 2


def test_log_probabilities_hold_no_logits_at_all():
    hidden, head_VH, targets = head(2048, 16, 32768)

    def step() -> Outcome:
        linear_logprob(hidden, head_VH, targets, impl="cpu")
        return Outcome()

    # a tile of them a thread, and the head's rows for it, which AVX2 takes widened to float32; all logits are 128 MiB
    assert peak_bytes(step, torch.device("cpu")) < torch.get_num_threads() * 5 * 2**18
