"""One process an instruction set: the C++ ops against float64, as JSON. Run by test_cpu_isa.py with METIS_CPU_ISA set.

Truth: the reference implementation in float64, which tests/kernels/test_hdpo_loss.py holds to autograd.
"""

from __future__ import annotations

import itertools
import json
import sys
from typing import Any

import torch
from torch import Tensor

import metis_kernels as mk

# T, H, V, chunk. No size is a multiple of a tile (14, 16 or 32 rows, 16 or 32 columns, 256 rows of the head) unless said.
SIZES = {
    "tiny": (3, 16, 5, None),
    "tails": (37, 50, 301, None),
    "whole tiles": (64, 64, 512, 32),
    "odd hidden": (63, 33, 252, None),  # the C++ side multiplies pairs
    "several chunks": (150, 96, 1031, 64),
    "one row of the head": (5, 32, 1, None),
}
# prompts and rollouts; heads and their sizes: neither blocks nor vectors are whole unless said
PACKS = {
    "tails": (mk.Segments((0, 130, 200, 335, 336), (-1, 0, 0, 0)), (4, 2, 34)),
    "odd": (mk.Segments((0, 5, 8, 41), (-1, 0, -1)), (3, 1, 5)),
    "whole blocks": (mk.Segments((0, 128, 256), (-1, 0)), (2, 1, 64)),
}
# images, heads and their size: those of Qwen3-VL's towers, and small ones
IMAGES = {
    "tower": ((0, 130, 258), (2, 72)),
    "small tower": ((0, 40, 41), (1, 64)),
    "tiny towers": ((0, 16, 32, 61), (2, 8)),
    "tiny tower": ((0, 48), (3, 16)),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "entropy": {"entropy_coef": 0.02},
    "all terms": {"entropy_coef": 0.02, "kl_coef": 0.05, "tis_cap": 1.5},
    "bad anchor": {"anchor": 200.0},
}


def relative(found: Tensor, truth: Tensor) -> float:
    """Frobenius error, relative to the truth or to 1e-4: the gradient of a head of one row is 0."""
    return float((found.double() - truth).norm() / truth.norm().clamp(min=1e-4))


def compare(size: str, dtype: torch.dtype, option: str) -> dict[str, float]:
    """Largest error of log-probabilities, relative error of gradients and of what linear_logprob returns."""
    num_tokens, hidden_size, vocab, chunk = SIZES[size]
    draw = torch.Generator().manual_seed(num_tokens)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    hidden = normal(num_tokens, hidden_size).to(dtype)
    head = (2 * normal(vocab, hidden_size) / hidden_size**0.5).to(dtype)
    targets = torch.randint(vocab, (num_tokens,), generator=draw)
    targets[0], targets[-1] = 0, vocab - 1
    exact = mk.linear_logprob(hidden.double(), head.double(), targets, temperature=0.8, impl="reference")
    old, engine, ref = (exact.logp_T + 0.2 * normal(num_tokens) for _ in range(3))
    adv_acc, adv_tool = normal(num_tokens), normal(num_tokens)
    adv_acc[1], adv_tool[1] = 0.0, 0.0
    options = dict(OPTIONS[option])
    anchor = exact.lse_T + options.pop("anchor") if "anchor" in options else None

    def run(dtype: torch.dtype, impl: mk.Impl) -> tuple[Tensor, Tensor, Tensor]:
        x = hidden.to(dtype).requires_grad_()
        total = torch.zeros(vocab, hidden_size, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        out = mk.hdpo_loss(
            x, head.to(dtype).requires_grad_(), targets, old, adv_acc, adv_tool, None, 40, 20, temperature=0.8, ref_logp_T=ref,
            engine_logp_T=engine, anchor_T=anchor, main_grad=total, chunk=chunk, impl=impl, **options,
        )  # fmt: skip
        (grad,) = torch.autograd.grad(out.loss, x)
        return out.logp_L, grad, total

    truth, found = run(torch.float64, "reference"), run(dtype, "cpu")
    alone = mk.linear_logprob(hidden, head, targets, temperature=0.8, impl="cpu")
    return {
        "logp": float((found[0] - truth[0]).abs().max()),
        "d_hidden": relative(found[1], truth[1]),
        "d_head": relative(found[2], truth[2]),
        "alone": max(float((getattr(alone, n) - getattr(exact, n)).abs().max()) for n in ("logp_T", "entropy_T", "lse_T")),
        # the second token has no advantage: without another term it has no gradient either
        "no_gradient": 0.0 if "entropy_coef" in options else float(found[1][1].abs().max()),
    }


def compare_attention(pack: str, dtype: torch.dtype) -> dict[str, float]:
    """Relative error of the output and of the gradients of `prefix_attention`."""
    segments, (num_heads, num_kv, size) = PACKS[pack]
    draw = torch.Generator().manual_seed(segments.num_tokens)
    heads = num_heads, num_kv, num_kv, num_heads
    *tensors, d_out = (torch.randn(segments.num_tokens, num, size, generator=draw).to(dtype) for num in heads)

    def run(dtype: torch.dtype, impl: mk.AttentionImpl) -> list[Tensor]:
        query, key, value = leaves = [x.to(dtype).requires_grad_() for x in tensors]
        out = mk.prefix_attention(query, key, value, segments, impl=impl)
        return [out.detach(), *torch.autograd.grad(out, leaves, d_out.to(dtype))]

    return relative_errors(run(dtype, "cpu"), run(torch.float64, "reference"))


def compare_full_attention(images: str, dtype: torch.dtype) -> dict[str, float]:
    """Relative error of the output and of the gradients of `full_attention`."""
    offsets, heads = IMAGES[images]
    draw = torch.Generator().manual_seed(offsets[-1])
    *tensors, d_out = (torch.randn(offsets[-1], *heads, generator=draw).to(dtype) for _ in range(4))

    def run(dtype: torch.dtype, impl: mk.FullAttentionImpl) -> list[Tensor]:
        query, key, value = leaves = [x.to(dtype).requires_grad_() for x in tensors]
        out = mk.full_attention(query, key, value, offsets, impl=impl)
        return [out.detach(), *torch.autograd.grad(out, leaves, d_out.to(dtype))]

    return relative_errors(run(dtype, "cpu"), run(torch.float64, "reference"))


def relative_errors(found: list[Tensor], truth: list[Tensor]) -> dict[str, float]:
    """Of an attention's output and gradients."""
    errors = [relative(one, exact) for one, exact in zip(found, truth, strict=True)]
    return dict(zip(("out", "d_query", "d_key", "d_value"), errors, strict=True))


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[1]))
    status = mk.cpu_library_status()
    rows, attention = [], []
    if not status:
        for pack, dtype in itertools.product(PACKS, (torch.float32, torch.bfloat16)):
            attention.append({"case": f"{pack}, {dtype}", "bf16": dtype == torch.bfloat16, **compare_attention(pack, dtype)})
        for images, dtype in itertools.product(IMAGES, (torch.float32, torch.bfloat16)):
            errors = compare_full_attention(images, dtype)
            attention.append({"case": f"{images}, {dtype}", "bf16": dtype == torch.bfloat16, **errors})
        for size, dtype, option in itertools.product(SIZES, (torch.float32, torch.bfloat16), OPTIONS):
            rows.append({"case": f"{size}, {dtype}, {option}", "bf16": dtype == torch.bfloat16, **compare(size, dtype, option)})
    name = "" if status else torch.ops.metis_kernels_cpu.isa()
    print(json.dumps({"status": status, "isa": name, "rows": rows, "attention": attention}))
