"""`prefix_attention`, forward and backward, beside its matrix products and what PyTorch offers.

Shape letters: P tokens of the prompt, R rollouts, L tokens of each, N = P + R L tokens of the pack, H query heads, K key
heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from metis_kernels import AttentionImpl, Segments, prefix_attention
from metis_kernels.prefix_attention import flash

from . import ours
from .candidate import DTYPES, Candidate, Errors, Op, Outcome, Plan, Request, Step, largest_error, relative_error

LIMITS = {"bf16": Errors(2e-2, (8e-3, 8e-3, 8e-3)), "fp32": Errors(1e-5, (1e-5, 1e-5, 1e-5))}
"""Outputs are below 4 in magnitude, where bfloat16 rounds by up to 8e-3."""

_CHECKED = {"P": 192, "R": 3, "L": 96}
"""Largest pack for float64."""


@dataclass(frozen=True, slots=True, eq=False)
class AttentionCase:
    """One prompt with its rollouts. query_NHD and d_out_NHD, key_NKD and value_NKD: of the dtype under test."""

    query_NHD: Tensor
    key_NKD: Tensor
    value_NKD: Tensor
    d_out_NHD: Tensor
    segments: Segments

    @property
    def num_prompt(self) -> int:
        """P."""
        return self.segments.offsets[1]

    @property
    def num_rollouts(self) -> int:
        """R."""
        return len(self.segments.prefix) - 1

    def double(self) -> AttentionCase:
        """The same numbers in float64."""
        query, key, value, d_out = (x.double() for x in (self.query_NHD, self.key_NKD, self.value_NKD, self.d_out_NHD))
        return AttentionCase(query, key, value, d_out, self.segments)


def _make(request: Request, most: dict[str, int] | None = None) -> AttentionCase:
    """most: sizes that are cut to it."""
    shape = {letter: min(size, (most or {}).get(letter, size)) for letter, size in request.shape.items()}
    num_tokens = shape["P"] + shape["R"] * shape["L"]
    random = torch.Generator(request.device).manual_seed(request.seed)

    def normal(heads: int) -> Tensor:
        values = torch.randn(num_tokens, heads, shape["D"], generator=random, device=request.device)
        return values.to(DTYPES[request.dtype])

    offsets = (0, *range(shape["P"], num_tokens + 1, shape["L"]))
    segments = Segments(offsets, (-1, *(0 for _ in range(shape["R"]))))
    return AttentionCase(normal(shape["H"]), normal(shape["K"]), normal(shape["K"]), normal(shape["H"]), segments)


def num_pairs(segments: Segments) -> int:
    """Of a query and a key that it sees, for one head."""
    total = 0
    for one in segments:
        num = one.stop - one.start
        own = num * (num + 1) // 2 if segments.causal else num * num
        total += num * (one.prefix_stop - one.prefix_start) + own
    return total


Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def by_autograd(case: AttentionCase, attend: Attend) -> Step:
    def step() -> Outcome:
        query, key, value = leaves = [x.detach().requires_grad_() for x in (case.query_NHD, case.key_NKD, case.value_NKD)]
        out = attend(query, key, value)
        gradients = torch.autograd.grad(out, leaves, case.d_out_NHD)
        return Outcome(out.detach(), gradients, handed_back=sum(x.nbytes for x in gradients))

    return step


def _ours(impl: AttentionImpl) -> Callable[[AttentionCase], Step]:
    def prepare(case: AttentionCase) -> Step:
        return by_autograd(case, lambda query, key, value: prefix_attention(query, key, value, case.segments, impl=impl))

    return prepare


def _sdpa(case: AttentionCase) -> Step:
    """Each rollout with a copy of its prompt in a batch, causal: what a trainer without packs computes."""
    num_prompt, num_rollouts = case.num_prompt, case.num_rollouts

    def sequences(tensor: Tensor) -> Tensor:
        """[R, heads, P + L, D]."""
        prompt = tensor[:num_prompt].expand(num_rollouts, -1, -1, -1)
        return torch.cat([prompt, tensor[num_prompt:].unflatten(0, (num_rollouts, -1))], 1).transpose(1, 2)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (sequences(x) for x in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        out = out.transpose(1, 2)
        return torch.cat([out[0, :num_prompt], out[:, num_prompt:].flatten(0, 1)])

    return by_autograd(case, attend)


def _visible(segments: Segments, device: torch.device) -> Tensor:
    """[N, N] bool."""
    mask = torch.zeros(segments.num_tokens, segments.num_tokens, dtype=torch.bool, device=device)
    for one in segments:
        mask[one.start : one.stop, one.prefix_start : one.prefix_stop] = True
        mask[one.start : one.stop, one.start : one.stop] = True
    return mask.tril_()


def _masked(case: AttentionCase) -> Step:
    """The pack as one sequence with a mask."""
    mask = _visible(case.segments, case.query_NHD.device)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (x.transpose(0, 1)[None] for x in (query, key, value))
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
        return out[0].transpose(0, 1)

    return by_autograd(case, attend)


def _exact(case: AttentionCase) -> Step:
    """As written in a textbook, by autograd."""
    mask = _visible(case.segments, case.query_NHD.device)
    group = case.query_NHD.shape[1] // case.key_NKD.shape[1]

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        scores = query.shape[2] ** -0.5 * torch.einsum("nhd,mhd->hnm", query, key.repeat_interleave(group, 1))
        p = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        return torch.einsum("hnm,mhd->nhd", p, value.repeat_interleave(group, 1))

    return by_autograd(case, attend)


PEERS: dict[str, Callable[[AttentionCase], Step]] = {"sdpa": _sdpa, "masked": _masked}

OURS: dict[str, Callable[[AttentionCase], Step]] = {"ours": _ours("auto"), "ours_reference": _ours("reference")}


def _floor(case: AttentionCase) -> Step:
    """Seven products of the pairs that see each other; of a causal square as many rows as make half of it."""
    num_heads, num_kv = case.query_NHD.shape[1], case.key_NKD.shape[1]
    group, size = num_heads // num_kv, case.query_NHD.shape[2]
    num_prompt, num_rollouts = case.num_prompt, case.num_rollouts
    length = case.segments.offsets[2] - num_prompt
    blocks = []
    for batch, rows, keys in (
        (num_kv, group * num_prompt // 2, num_prompt),
        (num_kv, group * num_rollouts * length, num_prompt),
        (num_kv * num_rollouts, group * length // 2, length),
    ):
        query, key = (case.query_NHD.new_empty(batch, num, size).normal_() for num in (rows, keys))
        scores = case.query_NHD.new_empty(batch, rows, keys)
        blocks.append((query, key, scores, torch.empty_like(query), torch.empty_like(key)))

    def step() -> Outcome:
        for query, key, scores, like_query, like_key in blocks:
            for _ in range(3):  # scores, again in the backward pass, and the gradient of the probabilities
                torch.bmm(query, key.transpose(1, 2), out=scores)
            for _ in range(2):  # output and dQuery
                torch.bmm(scores, key, out=like_query)
            for _ in range(2):  # dKey and dValue
                torch.bmm(scores.transpose(1, 2), query, out=like_key)
        return Outcome()

    return step


def forward_flops(query: torch.Size, *rest: Any, **_: object) -> int:
    """Two products of the visible pairs. A formula, not a count: torch cannot look into a custom op."""
    return 4 * query[1] * query[2] * num_pairs(_segments_of(rest[2:]))


def backward_flops(d_out: torch.Size, *rest: Any, **_: object) -> int:
    """Five products of the visible pairs."""
    return 10 * d_out[1] * d_out[2] * num_pairs(_segments_of(rest[5:]))


def _segments_of(arguments: Sequence[Any]) -> Segments:
    """Of an op's arguments from the offsets on. torch leaves `causal`, the last one, out where it has its default."""
    offsets, prefix, _, _, *causal = arguments
    return Segments(tuple(offsets), tuple(prefix), *causal)


FLOPS: dict[Any, Callable[..., int]] = {
    torch.ops.metis_kernels.prefix_attention: forward_flops,
    torch.ops.metis_kernels.prefix_attention_backward: backward_flops,
}


def _plan(request: Request) -> Plan:
    case, part = _make(request), _make(request, _CHECKED)
    truth = _exact(part.double())()
    assert truth.values is not None
    values = truth.values

    def candidate(name: str, prepare: Callable[[AttentionCase], Step], limits: Errors | None) -> Candidate:
        def check() -> Errors:
            found = prepare(part)()
            assert found.values is not None
            pairs = zip(found.gradients, truth.gradients, strict=True)
            return Errors(largest_error(found.values, values), tuple(relative_error(x, exact) for x, exact in pairs))

        # the counter knows neither torch's attention for CPUs nor fewer key heads than query heads
        return Candidate(name, lambda: prepare(case), check, limits, 1.0, gemms_visible=name in mine)

    on_gpu = request.device.type == "cuda"
    mine = dict(OURS)
    if on_gpu:  # where auto takes flash, the other one is of interest too
        mine["ours_triton"] = _ours("triton")
    candidates = [candidate(name, prepare, LIMITS[request.dtype]) for name, prepare in mine.items()]
    candidates.append(Candidate("floor", lambda: _floor(case), None, None, 1.0))
    candidates += [candidate(name, PEERS[name], None) for name in request.peers]
    num_heads, size = case.query_NHD.shape[1:]
    auto = "flash" if on_gpu and not flash.why_not(request.device, DTYPES[request.dtype], size) else ours.chosen(request)
    lengths = [stop - start for start, stop in pairwise(part.segments.offsets)]
    return Plan(
        candidates,
        shape=request.shape,
        gemm_flops=2 * num_heads * size * num_pairs(case.segments),
        least_bytes=4 * case.query_NHD.nbytes + 4 * case.key_NKD.nbytes,
        flop_formulas=FLOPS,
        notes=[
            f"Forward and backward. Errors: against float64, a prompt of {lengths[0]} with {len(lengths) - 1} rollouts of "
            f"{lengths[1]} tokens. GEMMs: products of the pairs that see each other, one head after another.",
            f"ours: impl auto is {auto}; ours_reference: plain torch, segment by segment; floor: seven products by torch.bmm "
            "into buffers that are there before.",
            "sdpa: torch's attention of every rollout with a copy of the prompt; masked: of the pack, with a mask.",
        ],
    )


OP = Op(
    summary="attention of a prompt and its rollouts in one pack, forward and backward",
    shape={"P": 512, "R": 16, "L": 128, "H": 16, "K": 8, "D": 128},
    dtypes=("bf16", "fp32"),
    peers=tuple(PEERS),
    all_live=True,
    errors=("out", "dQuery", "dKey", "dValue"),
    plan=_plan,
)
