"""Attention of packed groups against dense masked attention in float64, by autograd."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from metis_kernels import Segments, _impl, prefix_attention
from metis_kernels.prefix_attention import flash
from metis_kernels.prefix_attention.api import _choose

PACKS = {
    "one group": Segments((0, 5, 8, 12, 13), (-1, 0, 0, 0)),
    "two groups, an empty rollout, a prompt alone": Segments((0, 4, 6, 9, 12, 14, 14, 17), (-1, 0, 0, -1, 3, 3, -1)),
    "rollouts away from their prompts": Segments((0, 3, 7, 9, 14, 15), (-1, -1, 0, 1, 0)),
    "blocks and tails": Segments((0, 130, 200, 500, 501, 660), (-1, 0, 0, 0, -1)),
    "blocks and tails of triton": Segments((0, 70, 100, 240, 241, 320), (-1, 0, 0, 0, -1)),  # blocks of up to 64
    "no sharing": Segments((0, 31, 64, 65), (-1, -1, -1)),
    "one token": Segments((0, 1), (-1,)),
}
HEADS = [(4, 4, 8), (4, 2, 34), (6, 1, 64), (2, 1, 128), (2, 2, 5)]
CASES = [
    *itertools.product(("cpu", "reference"), HEADS, PACKS),
    # the interpreter takes its time: the other packs go through the same blocks, and a size of heads needs no second pack
    *itertools.product(("triton",), HEADS[1:], list(PACKS)[1:2]),
    ("triton", (2, 2, 5), list(PACKS)[2]),
    *itertools.product(("triton",), [(2, 1, 34), (1, 1, 128)], ("blocks and tails of triton", "no sharing", "one token")),
]
LIMITS = {torch.float32: 2e-6, torch.bfloat16: 2**-7}
"""bfloat16: probabilities, their gradients and what is handed back are rounded to 2^-9 each, and the sum of
d_out * out that the gradient of the scores takes away is of the rounded output."""


def visible(segments: Segments) -> Tensor:
    """[N, N] bool, which keys a query sees, written out token by token."""
    mask = torch.zeros(segments.num_tokens, segments.num_tokens, dtype=torch.bool)
    for one in segments:
        for query in range(one.start, one.stop):
            mask[query, one.prefix_start : one.prefix_stop] = True
            mask[query, one.start : query + 1] = True
    return mask


def dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    group = query.shape[1] // key.shape[1]
    scores = scale * torch.einsum("nhd,mhd->hnm", query, key.repeat_interleave(group, 1))
    p = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return torch.einsum("hnm,mhd->nhd", p, value.repeat_interleave(group, 1))


def inputs(num_tokens: int, heads: tuple[int, int, int], dtype: torch.dtype) -> list[Tensor]:
    """query, key, value and the gradient of the output."""
    draw = torch.Generator().manual_seed(num_tokens)
    num, num_kv, size = heads
    return [torch.randn(num_tokens, count, size, generator=draw).to(dtype) for count in (num, num_kv, num_kv, num)]


def results(attention: Sequence[Tensor], d_out: Tensor, out: Tensor) -> list[Tensor]:
    return [out.detach(), *torch.autograd.grad(out, attention, d_out)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("impl", "heads", "pack"), CASES, ids=str)
def test_values_and_gradients_are_those_of_dense_attention(impl, heads, pack, dtype):
    segments = PACKS[pack]
    *tensors, d_out = inputs(segments.num_tokens, heads, dtype)
    query, key, value = exact = [x.double().requires_grad_() for x in tensors]
    want = results(exact, d_out.double(), dense(query, key, value, visible(segments), 0.3))
    query, key, value = leaves = [x.clone().requires_grad_() for x in tensors]
    got = results(leaves, d_out, prefix_attention(query, key, value, segments, scale=0.3, impl=impl))
    for name, one, truth in zip(("out", "query", "key", "value"), got, want, strict=True):
        assert one.dtype == dtype
        # a token alone has p = 1 and no gradient in query and key: only rounding, relative to the gradient of the output
        least = d_out.double().norm() * (1.0 if pack == "one token" else 1e-6)
        error = float((one.double() - truth).norm() / truth.norm().clamp(min=least))
        assert error < LIMITS[dtype], name


def test_the_reference_is_exact_in_float64():
    segments = PACKS["blocks and tails"]
    *tensors, d_out = inputs(segments.num_tokens, (4, 2, 16), torch.float64)
    query, key, value = leaves = [x.requires_grad_() for x in tensors]
    want = results(leaves, d_out, dense(query, key, value, visible(segments), 16**-0.5))
    for one, truth in zip(results(leaves, d_out, prefix_attention(query, key, value, segments)), want, strict=True):
        torch.testing.assert_close(one, truth, rtol=0, atol=1e-12)


@pytest.mark.parametrize("impl", ["cpu", "triton", "reference"])
def test_heads_of_a_fused_projection_are_read_where_they_are(impl):
    segments = PACKS["one group"]
    fused = torch.randn(segments.num_tokens, 8, 16, generator=torch.Generator().manual_seed(0))
    parts = fused[:, :4], fused[:, 4:6], fused[:, 6:]
    copies = [x.contiguous() for x in parts]
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in parts]  # the head size is not the fastest axis
    found = [prefix_attention(query, key, value, segments, impl=impl) for query, key, value in (parts, copies, turned)]
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_the_number_of_threads_changes_no_bit():
    segments = PACKS["blocks and tails"]
    *tensors, d_out = inputs(segments.num_tokens, (4, 2, 32), torch.bfloat16)
    found, threads = [], torch.get_num_threads()
    try:
        for num in (1, 2, 3):
            torch.set_num_threads(num)
            query, key, value = leaves = [x.clone().requires_grad_() for x in tensors]
            found.append(results(leaves, d_out, prefix_attention(query, key, value, segments, impl="cpu")))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("impl", ["cpu", "triton", "reference"])
def test_a_rollout_with_nan_leaves_the_other_rollouts_outputs_alone(impl):
    segments = PACKS["blocks and tails of triton" if impl == "triton" else "blocks and tails"]
    query, key, value, _ = inputs(segments.num_tokens, (2, 1, 16), torch.float32)
    clean = prefix_attention(query, key, value, segments, impl=impl)
    stop = list(segments)[1].stop  # of the first rollout
    bad = stop - 20
    key[bad] = torch.nan
    dirty = prefix_attention(query, key, value, segments, impl=impl)
    assert dirty[bad:stop].isnan().all()
    others = torch.cat([dirty[:bad], dirty[stop:]])
    torch.testing.assert_close(others, torch.cat([clean[:bad], clean[stop:]]), rtol=0, atol=0)


@pytest.mark.parametrize("impl", ["cpu", "triton", "reference"])
def test_it_traces_and_its_gradients_too(impl):
    segments = PACKS["one group"]
    *tensors, d_out = inputs(segments.num_tokens, (4, 2, 8), torch.float32)

    def run(function):
        leaves = [x.clone().requires_grad_() for x in tensors]
        return results(leaves, d_out, function(*leaves))

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return prefix_attention(query, key, value, segments, impl=impl)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for got, want in zip(run(compiled), run(call), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


BAD = [
    ({"key_NKD": torch.zeros(13, 3, 8)}, "key_NKD: expected a number of heads that divides the 4 of query_NHD, got 3"),
    ({"key_NKD": torch.zeros(12, 2, 8)}, r"key_NKD: expected shape \[N, K, D\] = \[13, any, 8\], got \[12, 2, 8\]"),
    ({"value_NKD": torch.zeros(13, 1, 8)}, r"value_NKD: expected shape \[N, K, D\] = \[13, 2, 8\], got \[13, 1, 8\]"),
    ({"value_NKD": torch.zeros(13, 2, 8).bfloat16()}, "value_NKD: expected dtype float32, got bfloat16"),
    ({"query_NHD": torch.zeros(13, 4, 8, dtype=torch.int64)}, "query_NHD: expected dtype bfloat16 or .*, got int64"),
    ({"segments": Segments((0, 12), (-1,))}, "segments: expected 13 tokens, as query_NHD has, got 12"),
    ({"scale": 0.0}, "scale: expected a number > 0, got 0.0"),
    ({"impl": "fast"}, "impl: expected one of auto, flash, triton, cpu, reference, got 'fast'"),
    ({"impl": "flash"}, "impl='flash' cannot run here: it takes CUDA tensors of bfloat16 or float16, got float32 on cpu"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[next(iter(change)) + str(i) for i, (change, _) in enumerate(BAD)])
def test_a_wrong_argument_is_named(change, message):
    query, key, value, _ = inputs(13, (4, 2, 8), torch.float32)
    good = {"query_NHD": query, "key_NKD": key, "value_NKD": value, "segments": PACKS["one group"]}
    prefix_attention(**good)
    with pytest.raises(ValueError, match=f"^{message}$"):
        prefix_attention(**(good | change))


@pytest.mark.parametrize(
    ("offsets", "prefix", "message"),
    [
        ((1, 3), (-1,), r"offsets: expected numbers from 0 on, got \(1, 3\)"),
        ((), (), r"offsets: expected numbers from 0 on, got \(\)"),
        ((0, 4, 2), (-1, 0), "offsets: expected ascending numbers, but segment 1 is 4 to 2"),
        ((0, 4), (-1, 0), "prefix: expected one number a segment, 1 in all, got 2"),
        ((0, 4, 5), (-1, 1), "prefix: expected for segment 1 an earlier segment that has no prefix itself, or -1, got 1"),
        ((0, 4, 5, 6), (-1, 0, 1), "prefix: expected for segment 2 an earlier segment that has no prefix itself, or -1, got 1"),
    ],
)
def test_segments_that_are_none_are_refused(offsets, prefix, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        Segments(offsets, prefix)


def test_every_token_of_a_pack_is_in_one_segment():
    for segments in PACKS.values():
        covered = list(itertools.chain.from_iterable(range(one.start, one.stop) for one in segments))
        assert covered == list(range(segments.num_tokens))


@pytest.mark.parametrize(("size", "dtype", "impl"), [(128, torch.bfloat16, "triton"), (160, torch.bfloat16, "reference")])
def test_auto_on_a_gpu_takes_what_can_run(size: int, dtype: torch.dtype, impl: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(flash, "_library", lambda: "not installed")
    assert _choose("auto", torch.device("cuda"), dtype, size) == impl
    monkeypatch.setattr(flash, "_library", lambda: flash)
    assert _choose("auto", torch.device("cuda"), dtype, size) == "flash"
    assert _choose("auto", torch.device("cuda"), torch.float64, size) == "reference"


def test_a_library_of_older_sources_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(_impl, "_NEWEST_OP", "an_op_of_tomorrow")
    status = _impl.cpu_library_status.__wrapped__()
    assert "libmetis_cpu.so is older than these sources; build it again with pip install" in status
