"""`prefix_attention` in Triton: what is particular to its tables and tiles. test_prefix_attention.py has the contract.

Shape letters: N tokens of a pack, H query heads, K key heads, D head size.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from metis_kernels import Segments, prefix_attention
from metis_kernels.inspect.sanitizer import sanitize
from metis_kernels.inspect.tally import Counts, tally
from metis_kernels.prefix_attention import triton as op
from metis_kernels.prefix_attention.triton import Tile

# prompts of whole blocks and of tails, rollouts shorter and longer than a block, a part that ends within a rollout
SHARED = Segments((0, 38, 58, 58, 99, 131, 148), (-1, 0, 0, 0, -1, 4))


@pytest.fixture
def empty_is_nan() -> Iterator[None]:
    """Memory that a kernel reads, or returns, without having written it shows as NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The smallest blocks that have as many keys as queries, half and twice as many, and parts of 32 queries: so a few tokens
    make whole blocks and tails, and several slots of a prompt. The interpreter's time is that of its blocks, so these tests
    take little; test_prefix_attention.py runs the blocks that are shipped."""
    square, tall, wide = Tile(16, 16, 4, 2), Tile(32, 16, 4, 2), Tile(16, 32, 4, 2)
    monkeypatch.setattr(op, "FORWARD", {2: square, 4: tall})
    monkeypatch.setattr(op, "QUERY_GRADIENT", {2: tall, 4: square})
    monkeypatch.setattr(op, "KEY_GRADIENT", {2: wide, 4: tall})
    monkeypatch.setattr(op, "LEAST_PART", 32)
    monkeypatch.setattr(op, "PART_STEP", 32)
    op._key_jobs.cache_clear()
    yield
    op._key_jobs.cache_clear()


def inputs(segments: Segments, heads: tuple[int, int, int], dtype: torch.dtype) -> list[Tensor]:
    """query, key, value and the gradient of the output."""
    draw = torch.Generator().manual_seed(0)
    num, num_kv, size = heads
    return [torch.randn(segments.num_tokens, count, size, generator=draw).to(dtype) for count in (num, num_kv, num_kv, num)]


def run(segments: Segments, tensors: list[Tensor], impl: str = "triton") -> list[Tensor]:
    """Output and gradients of query, key and value."""
    *attention, d_out = tensors
    query, key, value = leaves = [x.detach().requires_grad_() for x in attention]
    out = prefix_attention(query, key, value, segments, impl=impl)  # pyright: ignore[reportArgumentType]
    return [out.detach(), *torch.autograd.grad(out, leaves, d_out)]


# a head size that fills its block, one that leaves a tail; each size of an element meets the tail
@pytest.mark.parametrize(("size", "dtype"), [(24, torch.float32), (16, torch.float16), (24, torch.bfloat16)])
@pytest.mark.usefixtures("empty_is_nan", "small_blocks")
def test_everything_is_written_once_in_bounds_and_repeats_bit_for_bit(size: int, dtype: torch.dtype):
    tensors = inputs(SHARED, (4, 2, size), dtype)
    with sanitize():
        first = run(SHARED, tensors)
    want = run(SHARED, [x.double() for x in tensors], "reference")
    for got, again, truth in zip(first, run(SHARED, tensors), want, strict=True):
        assert torch.equal(got, again)
        assert float((got.double() - truth).norm() / truth.norm()) < (2e-6 if dtype == torch.float32 else 2**-7)


@pytest.mark.usefixtures("small_blocks")
def test_a_prompts_gradient_is_the_sum_over_its_rollouts():
    tensors = inputs(SHARED, (2, 1, 16), torch.float32)
    _, _, d_key, d_value = run(SHARED, tensors)
    # the rows of the first prompt and of one of its rollouts; the prompt's own rows count once
    prompt, rollouts = list(range(38)), [list(range(38, 58)), list(range(58, 99))]
    sums = [torch.zeros(38, 1, 16), torch.zeros(38, 1, 16)]
    for i, rollout in enumerate(rollouts):
        rows = prompt + rollout
        part = [x[rows] for x in tensors]
        if i:
            part[3][:38] = 0
        for total, one in zip(sums, run(Segments((0, len(rows)), (-1,)), part)[2:], strict=True):
            total += one[:38]
    for got, want in zip((d_key, d_value), sums, strict=True):
        torch.testing.assert_close(got[:38], want, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.usefixtures("small_blocks")
def test_bytes_flops_and_exponentials_equal_the_closed_form(dtype: torch.dtype):
    num, num_kv, size, padded = 4, 2, 24, 32
    group, e = num // num_kv, dtype.itemsize
    with tally() as counted:
        run(SHARED, inputs(SHARED, (num, num_kv, size), dtype))

    def expect(kernel: str, **counts: int) -> None:
        assert counted.kernels[kernel] == Counts(**counts), kernel

    for kernel, tile, dots, rows_read, more in (
        ("attention_forward", op.FORWARD[e], 2, 1, 0),
        ("attention_query_gradient", op.QUERY_GRADIENT[e], 3, 2, 8),
    ):
        load = store = blocks = 0
        for one in SHARED:
            num_prefix = one.prefix_stop - one.prefix_start
            for first in range(one.start, one.stop, tile.queries):
                queries = min(tile.queries, one.stop - first)
                load += 20 + queries * (rows_read * e * size + more) + 2 * e * size * (num_prefix + first + queries - one.start)
                store += queries * (e * size + (4 if kernel == "attention_forward" else 0))
                blocks += math.ceil(num_prefix / tile.keys) + (first - one.start) // tile.keys + math.ceil(queries / tile.keys)
        pairs = num * blocks * tile.queries * tile.keys
        rows = num * blocks * tile.queries if kernel == "attention_forward" else 0
        expect(
            kernel,
            launches=1,
            load_bytes=num * load,
            store_bytes=num * store,
            dot_flops=2 * dots * padded * pairs,
            exps=pairs + rows,
        )

    tile = op.KEY_GRADIENT[e]
    parts = {0: [(38, 70), (70, 99)], 99: [(131, 148)]}  # of the queries that see the prompts
    load = store = blocks = sum_load = sum_store = 0
    for one in SHARED:
        slots = len(parts.get(one.start, ())) if one.prefix_start == one.prefix_stop else 0
        for first in range(one.start, one.stop, tile.keys):
            keys = min(tile.keys, one.stop - first)
            readers = [(first, one.stop), *(parts[one.start] if slots else ())]
            for start, stop in readers:
                load += 20 + 2 * e * size * keys + group * (stop - start) * (2 * e * size + 8)
                store += 2 * size * keys * (4 if slots else e)
                blocks += group * math.ceil((stop - start) / tile.queries)
            if slots:
                sum_load += 16 * tile.keys // op.SLOT_ROWS + 8 * size * keys * (slots + 1)
                sum_store += 2 * e * size * keys
    pairs = num_kv * blocks * tile.queries * tile.keys
    expect(
        "attention_key_gradient",
        launches=2,
        load_bytes=num_kv * load,
        store_bytes=num_kv * store,
        dot_flops=8 * padded * pairs,
        exps=pairs,
    )
    expect("sum_slots", launches=1, load_bytes=num_kv * sum_load, store_bytes=num_kv * sum_store)
    rows = SHARED.num_tokens * num
    expect("attention_delta", launches=1, load_bytes=2 * e * size * rows, store_bytes=4 * rows)


def test_queries_are_cut_into_few_parts_of_about_equal_length():
    assert op._parts([(100, 1100)]) == [(100, 1100)]
    assert op._parts([(0, 3000)]) == [(0, 1024), (1024, 2048), (2048, 3000)]
    long = op._parts([(0, 100_000)])
    assert len(long) == op.MOST_PARTS and {stop - start for start, stop in long[:-1]} == {12_544}
    assert op._parts([(0, 1500), (2000, 2010)]) == [(0, 1024), (1024, 1500), (2000, 2010)]


def test_rows_beyond_2_to_the_31_elements_are_found():
    # 9 GB of which only the pages of few rows are ever touched; rows too far apart for offsets within a block are copied
    segments = Segments((0, 130), (-1,))
    tensors = inputs(segments, (1, 1, 16), torch.float16)
    want = run(segments, tensors)
    for stride in (2**24 - 8, 2**25):
        far = torch.empty(130 * stride, dtype=torch.float16).as_strided((130, 1, 16), (stride, 16, 1))
        far.copy_(tensors[1])
        out = prefix_attention(tensors[0], far, tensors[2], segments, impl="triton")
        assert torch.equal(out, want[0])


def test_a_large_head_is_refused():
    with pytest.raises(
        ValueError, match=r"^query_NHD: impl='triton' takes heads of up to 128, got 160; impl='reference' takes any$"
    ):
        run(SHARED, inputs(SHARED, (1, 1, 160), torch.float32))
