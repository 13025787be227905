"""`full_attention`, forward and backward, beside its matrix products and torch's own attention.

Shape letters: S images, L patches of each, N = S L, H heads, D head size.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor

from metis_kernels import FullAttentionImpl, Segments, full_attention
from metis_kernels.prefix_attention.api import choose_full

from .candidate import DTYPES, Candidate, Errors, Op, Outcome, Plan, Request, Step, largest_error, relative_error
from .prefix_attention import FLOPS, LIMITS, AttentionCase, by_autograd, num_pairs

_CHECKED = {"S": 3, "L": 300}
"""Most images and patches for float64."""

_TILE = 512
"""Rows and columns of the floor's scores at a time on a CPU: they stay in its cache, as ours do."""


def _make(request: Request, most: dict[str, int] | None = None) -> AttentionCase:
    """most: sizes that are cut to it."""
    shape = {letter: min(size, (most or {}).get(letter, size)) for letter, size in request.shape.items()}
    num_tokens = shape["S"] * shape["L"]
    random = torch.Generator(request.device).manual_seed(request.seed)

    def normal() -> Tensor:
        values = torch.randn(num_tokens, shape["H"], shape["D"], generator=random, device=request.device)
        return values.to(DTYPES[request.dtype])

    offsets = tuple(range(0, num_tokens + 1, shape["L"]))
    return AttentionCase(normal(), normal(), normal(), normal(), Segments(offsets, (-1,) * shape["S"], causal=False))


def _full(impl: FullAttentionImpl) -> Callable[[AttentionCase], Step]:
    def prepare(case: AttentionCase) -> Step:
        offsets = case.segments.offsets
        return by_autograd(case, lambda query, key, value: full_attention(query, key, value, offsets, impl=impl))

    return prepare


def _exact(case: AttentionCase) -> Step:
    """As written in a textbook, by autograd."""
    num_images = len(case.segments.prefix)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (x.unflatten(0, (num_images, -1)) for x in (query, key, value))
        p = (query.shape[3] ** -0.5 * torch.einsum("snhd,smhd->shnm", query, key)).softmax(-1)
        return torch.einsum("shnm,smhd->snhd", p, value).flatten(0, 1)

    return by_autograd(case, attend)


PEERS: dict[str, Callable[[AttentionCase], Step]] = {"sdpa": _full("sdpa")}

OURS: dict[str, Callable[[AttentionCase], Step]] = {"ours": _full("auto")}
"""Without the reference, which holds all scores."""


def _floor(case: AttentionCase) -> Step:
    """Seven products of all pairs: on a CPU tile by tile, a head after the other; on a GPU all at once."""
    num_images, (_, num_heads, size) = len(case.segments.prefix), case.query_NHD.shape
    length = case.segments.offsets[1]
    on_cpu = case.query_NHD.device.type == "cpu"
    tile = min(_TILE, length) if on_cpu else length
    batch = num_images if on_cpu else num_images * num_heads
    query, key = (case.query_NHD.new_empty(batch, tile, size).normal_() for _ in range(2))
    scores = case.query_NHD.new_empty(batch * tile * tile)
    like_query, like_key = torch.empty_like(query), torch.empty_like(key)
    sides = [min(tile, length - start) for start in range(0, length, tile)]

    def products(rows: int, columns: int) -> None:
        q, k = query[:, :rows], key[:, :columns]
        part = scores[: batch * rows * columns].view(batch, rows, columns)
        for _ in range(3):  # scores, again in the backward pass, and the gradient of the probabilities
            torch.bmm(q, k.transpose(1, 2), out=part)
        for _ in range(2):  # output and dQuery
            torch.bmm(part, k, out=like_query[:, :rows])
        for _ in range(2):  # dKey and dValue
            torch.bmm(part.transpose(1, 2), q, out=like_key[:, :columns])

    def step() -> Outcome:
        for _ in range(num_heads if on_cpu else 1):
            for rows, columns in itertools.product(sides, sides):
                products(rows, columns)
        return Outcome()

    return step


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

        # the counter does not know torch's attention for CPUs, which auto may be
        return Candidate(name, lambda: prepare(case), check, limits, 1.0, gemms_visible=name == "ours" and chosen == "cpu")

    query = case.query_NHD
    chosen = choose_full("auto", query.device, query.dtype, query.shape[2], case.segments)
    candidates = [candidate(name, prepare, LIMITS[request.dtype]) for name, prepare in OURS.items()]
    candidates.append(Candidate("floor", lambda: _floor(case), None, None, 1.0))
    candidates += [candidate(name, PEERS[name], None) for name in request.peers]
    num_heads, size = query.shape[1:]
    return Plan(
        candidates,
        shape=request.shape,
        gemm_flops=2 * num_heads * size * num_pairs(case.segments),
        least_bytes=8 * query.nbytes,
        flop_formulas=FLOPS,
        notes=[
            f"Forward and backward. Errors: against float64, {len(part.segments.prefix)} images of "
            f"{part.segments.offsets[1]} patches. GEMMs: products of the pairs that see each other, one head after another.",
            f"ours: impl auto is {chosen}; floor: seven products by torch.bmm, on a CPU {_TILE} x {_TILE} scores at a time; "
            "sdpa: torch's attention, images as a batch.",
        ],
    )


OP = Op(
    summary="attention of images that see themselves whole, forward and backward",
    shape={"S": 1, "L": 3072, "H": 16, "D": 72},
    dtypes=("bf16", "fp32"),
    peers=tuple(PEERS),
    all_live=True,
    errors=("out", "dQuery", "dKey", "dValue"),
    plan=_plan,
)
