"""Triton kernels of `prefix_attention`: flash-attention over segment tables.

A block of queries lies in one segment. It walks the keys that its segment sees in whole blocks (prefix, then its own segment
up to the block), the rest of the prefix with a mask, and its own diagonal with the causal mask. Nothing is computed for pairs
that do not see each other, other than within those masked blocks. Exponents are to base 2:

    t = scale log2(e) q . k,   p = 2^(t - m) / l,   lse = ln(2) (m + log2 l)

The gradient of keys and values goes by blocks of keys. A prompt's keys collect from all its rollouts: their queries are cut
into parts, each with a float32 slot of its own, which are summed in a fixed order. No atomics: results repeat bit for bit.

Shape letters: N tokens, H query heads, K key heads (GROUP = H / K query heads share one), D head size (BLOCK_D padded), J
jobs. Q and M: queries and keys of a block.

Scalars are annotated as tensors, which they are inside: Triton would read `int` and `float` as the types i32 and fp32.
"""

# Constants are passed as plain values and pointers have an element_ty, which Triton's annotations do not say:
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-3e38)  # a running maximum that still can be subtracted from -inf


@triton.jit
def _tile(
    base: tl.tensor,
    start: tl.tensor,
    stop: tl.tensor,
    stride: tl.tensor,
    size: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WHOLE: tl.constexpr,
) -> tl.tensor:
    """Rows [start, start + ROWS) of one head, 0 from `stop` on and beyond its size. WHOLE: all of the rows are there."""
    row = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    # the 64-bit product is of scalars; offsets within a tile are small
    at = base + tl.cast(start, tl.int64) * stride + (row[:, None] * stride + column[None, :])
    if WHOLE and size == BLOCK_D:
        return tl.load(at)
    inside = column[None, :] < size
    if not WHOLE:
        inside = inside & (start + row < stop)[:, None]
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def _store(
    base: tl.tensor,
    start: tl.tensor,
    stop: tl.tensor,
    stride: tl.tensor,
    value: tl.tensor,
    size: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    row = tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    at = base + tl.cast(start, tl.int64) * stride + (row[:, None] * stride + column[None, :])
    tl.store(at, value, mask=(start + row < stop)[:, None] & (column[None, :] < size))


@triton.jit
def _dot(a: tl.tensor, b: tl.tensor) -> tl.tensor:
    return tl.dot(a, b, input_precision="ieee")


@triton.jit
def _attend(
    acc_QD: tl.tensor,
    highest_Q: tl.tensor,
    total_Q: tl.tensor,
    query_QD: tl.tensor,
    row_Q: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    prefix: tl.tensor,
    num_prefix: tl.tensor,
    prefix_stop: tl.tensor,
    own: tl.tensor,
    num_own: tl.tensor,
    own_stop: tl.tensor,
    key_stride: tl.tensor,
    value_stride: tl.tensor,
    scale2: tl.tensor,
    size: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WHOLE: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:
    """num_prefix blocks of keys from `prefix` on, then num_own from `own` on, into the running softmax.

    WHOLE: all keys of all blocks are there and seen by all queries. One loop over both, for half the code and registers.
    """
    for i in range(num_prefix + num_own):
        at = tl.where(i < num_prefix, prefix + i * BLOCK_M, own + (i - num_prefix) * BLOCK_M)
        stop = tl.where(i < num_prefix, prefix_stop, own_stop)
        key_MD = _tile(key, at, stop, key_stride, size, BLOCK_M, BLOCK_D, WHOLE)
        t = _dot(query_QD, tl.trans(key_MD)) * scale2
        if not WHOLE:
            last_Q = tl.where(i < num_prefix, stop - 1, row_Q)
            t = tl.where((at + tl.arange(0, BLOCK_M))[None, :] <= last_Q[:, None], t, float("-inf"))
        higher_Q = tl.maximum(highest_Q, tl.max(t, 1))
        p = tl.exp2(t - higher_Q[:, None])
        shrink_Q = tl.exp2(highest_Q - higher_Q)
        total_Q = total_Q * shrink_Q + tl.sum(p, 1)
        value_MD = _tile(value, at, stop, value_stride, size, BLOCK_M, BLOCK_D, WHOLE)
        acc_QD = acc_QD * shrink_Q[:, None] + _dot(p.to(value_MD.dtype), value_MD)
        highest_Q = higher_Q
    return acc_QD, highest_Q, total_Q


@triton.jit(do_not_specialize=["num_heads"])
def attention_forward(
    query_NHD: tl.tensor,
    key_NKD: tl.tensor,
    value_NKD: tl.tensor,
    out_NHD: tl.tensor,
    lse_NH: tl.tensor,
    jobs_J5: tl.tensor,
    num_heads: tl.tensor,
    query_stride: tl.tensor,
    query_head: tl.tensor,
    key_stride: tl.tensor,
    key_head: tl.tensor,
    value_stride: tl.tensor,
    value_head: tl.tensor,
    scale2: tl.tensor,
    SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
) -> None:
    """Output and log-sum-exp of a block of queries. Grid (J, H).

    jobs: (first query, end of its segment, start of its segment, start and stop of the prefix).

    Per job: its queries read, its output and 4 bytes a query written; keys and values of all visible blocks read; 4 BLOCK_D dot
    FLOPs and an exponential for each pair of the blocks.
    """
    job = jobs_J5 + tl.program_id(0) * 5
    first, stop, own = tl.load(job), tl.load(job + 1), tl.load(job + 2)
    prefix, prefix_stop = tl.load(job + 3), tl.load(job + 4)
    head = tl.program_id(1)
    query = query_NHD + head.to(tl.int64) * query_head
    key = key_NKD + (head // GROUP).to(tl.int64) * key_head
    value = value_NKD + (head // GROUP).to(tl.int64) * value_head
    query_QD = _tile(query, first, stop, query_stride, SIZE, BLOCK_Q, BLOCK_D, False)
    acc = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    highest = tl.full((BLOCK_Q,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_Q,), tl.float32)
    tl.static_assert(BLOCK_Q % BLOCK_M == 0)
    row = first + tl.arange(0, BLOCK_Q)
    num_prefix = (prefix_stop - prefix) // BLOCK_M
    acc, highest, total = _attend(
        acc, highest, total, query_QD, row, key, value, prefix, num_prefix, prefix_stop, own, (first - own) // BLOCK_M, stop,
        key_stride, value_stride, scale2, SIZE, BLOCK_D, BLOCK_M, True,
    )  # fmt: skip
    rest = prefix + num_prefix * BLOCK_M
    acc, highest, total = _attend(
        acc, highest, total, query_QD, row, key, value, rest, tl.cdiv(prefix_stop - rest, BLOCK_M), prefix_stop,
        first, tl.cdiv(tl.minimum(first + BLOCK_Q, stop) - first, BLOCK_M), stop,
        key_stride, value_stride, scale2, SIZE, BLOCK_D, BLOCK_M, False,
    )  # fmt: skip
    out = out_NHD + head.to(tl.int64) * SIZE
    _store(out, first, stop, num_heads * SIZE, (acc / total[:, None]).to(out_NHD.dtype.element_ty), SIZE, BLOCK_Q, BLOCK_D)
    tl.store(lse_NH + row.to(tl.int64) * num_heads + head, (highest + tl.log2(total)) * LN2, mask=row < stop)


@triton.jit(do_not_specialize=["num_tokens", "num_heads"])
def attention_delta(
    out_NHD: tl.tensor,
    d_out_NHD: tl.tensor,
    delta_NH: tl.tensor,
    num_tokens: tl.tensor,
    num_heads: tl.tensor,
    SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
) -> None:
    """out . d_out of every token and head. Grid (cdiv(N, BLOCK_Q), H). Both are read once; 4 bytes a row written."""
    first = tl.program_id(0) * BLOCK_Q
    head = tl.program_id(1)
    base = head.to(tl.int64) * SIZE
    out = _tile(out_NHD + base, first, num_tokens, num_heads * SIZE, SIZE, BLOCK_Q, BLOCK_D, False)
    d_out = _tile(d_out_NHD + base, first, num_tokens, num_heads * SIZE, SIZE, BLOCK_Q, BLOCK_D, False)
    row = first + tl.arange(0, BLOCK_Q)
    delta = tl.sum(out.to(tl.float32) * d_out.to(tl.float32), 1)
    tl.store(delta_NH + row.to(tl.int64) * num_heads + head, delta, mask=row < num_tokens)


@triton.jit
def _query_gradient(
    acc_QD: tl.tensor,
    query_QD: tl.tensor,
    d_out_QD: tl.tensor,
    lse2_Q: tl.tensor,
    delta_Q: tl.tensor,
    row_Q: tl.tensor,
    key: tl.tensor,
    value: tl.tensor,
    prefix: tl.tensor,
    num_prefix: tl.tensor,
    prefix_stop: tl.tensor,
    own: tl.tensor,
    num_own: tl.tensor,
    own_stop: tl.tensor,
    key_stride: tl.tensor,
    value_stride: tl.tensor,
    scale2: tl.tensor,
    size: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    WHOLE: tl.constexpr,
) -> tl.tensor:
    """Adds what the keys of these blocks give to the gradient of a block of queries, without the scale; see `_attend`."""
    for i in range(num_prefix + num_own):
        at = tl.where(i < num_prefix, prefix + i * BLOCK_M, own + (i - num_prefix) * BLOCK_M)
        stop = tl.where(i < num_prefix, prefix_stop, own_stop)
        key_MD = _tile(key, at, stop, key_stride, size, BLOCK_M, BLOCK_D, WHOLE)
        p = tl.exp2(_dot(query_QD, tl.trans(key_MD)) * scale2 - lse2_Q[:, None])
        if not WHOLE:
            last_Q = tl.where(i < num_prefix, stop - 1, row_Q)
            p = tl.where((at + tl.arange(0, BLOCK_M))[None, :] <= last_Q[:, None], p, 0.0)
        value_MD = _tile(value, at, stop, value_stride, size, BLOCK_M, BLOCK_D, WHOLE)
        d_scores = p * (_dot(d_out_QD, tl.trans(value_MD)) - delta_Q[:, None])
        acc_QD += _dot(d_scores.to(key_MD.dtype), key_MD)
    return acc_QD


@triton.jit(do_not_specialize=["num_heads"])
def attention_query_gradient(
    query_NHD: tl.tensor,
    key_NKD: tl.tensor,
    value_NKD: tl.tensor,
    d_out_NHD: tl.tensor,
    lse_NH: tl.tensor,
    delta_NH: tl.tensor,
    d_query_NHD: tl.tensor,
    jobs_J5: tl.tensor,
    num_heads: tl.tensor,
    query_stride: tl.tensor,
    query_head: tl.tensor,
    key_stride: tl.tensor,
    key_head: tl.tensor,
    value_stride: tl.tensor,
    value_head: tl.tensor,
    scale: tl.tensor,
    SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
) -> None:
    """dQuery of a block of queries, which walks the keys as `attention_forward` does. Grid (J, H).

    Per job: queries, d_out and 8 bytes a query read, dQuery written; keys and values of all visible blocks read; 6 BLOCK_D dot
    FLOPs and an exponential for each pair of the blocks.
    """
    job = jobs_J5 + tl.program_id(0) * 5
    first, stop, own = tl.load(job), tl.load(job + 1), tl.load(job + 2)
    prefix, prefix_stop = tl.load(job + 3), tl.load(job + 4)
    head = tl.program_id(1)
    query = query_NHD + head.to(tl.int64) * query_head
    key = key_NKD + (head // GROUP).to(tl.int64) * key_head
    value = value_NKD + (head // GROUP).to(tl.int64) * value_head
    own_head = head.to(tl.int64) * SIZE
    query_QD = _tile(query, first, stop, query_stride, SIZE, BLOCK_Q, BLOCK_D, False)
    d_out_QD = _tile(d_out_NHD + own_head, first, stop, num_heads * SIZE, SIZE, BLOCK_Q, BLOCK_D, False)
    row = first + tl.arange(0, BLOCK_Q)
    at = row.to(tl.int64) * num_heads + head
    # a row that is not there has p = 2^-inf
    lse2 = tl.load(lse_NH + at, mask=row < stop, other=float("inf")) * LOG2E
    delta = tl.load(delta_NH + at, mask=row < stop, other=0.0)
    acc = tl.zeros((BLOCK_Q, BLOCK_D), tl.float32)
    scale2 = scale * LOG2E
    tl.static_assert(BLOCK_Q % BLOCK_M == 0)
    num_prefix = (prefix_stop - prefix) // BLOCK_M
    acc = _query_gradient(
        acc, query_QD, d_out_QD, lse2, delta, row, key, value, prefix, num_prefix, prefix_stop, own, (first - own) // BLOCK_M,
        stop, key_stride, value_stride, scale2, SIZE, BLOCK_D, BLOCK_M, True,
    )  # fmt: skip
    rest = prefix + num_prefix * BLOCK_M
    acc = _query_gradient(
        acc, query_QD, d_out_QD, lse2, delta, row, key, value, rest, tl.cdiv(prefix_stop - rest, BLOCK_M), prefix_stop,
        first, tl.cdiv(tl.minimum(first + BLOCK_Q, stop) - first, BLOCK_M), stop,
        key_stride, value_stride, scale2, SIZE, BLOCK_D, BLOCK_M, False,
    )  # fmt: skip
    d_query = (acc * scale).to(d_query_NHD.dtype.element_ty)
    _store(d_query_NHD + own_head, first, stop, num_heads * SIZE, d_query, SIZE, BLOCK_Q, BLOCK_D)


@triton.jit(do_not_specialize=["num_heads"])
def attention_key_gradient(
    query_NHD: tl.tensor,
    key_NKD: tl.tensor,
    value_NKD: tl.tensor,
    d_out_NHD: tl.tensor,
    lse_NH: tl.tensor,
    delta_NH: tl.tensor,
    d_key_NKD: tl.tensor,
    d_value_NKD: tl.tensor,
    d_key_slots: tl.tensor,
    d_value_slots: tl.tensor,
    jobs_J5: tl.tensor,
    num_heads: tl.tensor,
    query_stride: tl.tensor,
    query_head: tl.tensor,
    key_stride: tl.tensor,
    key_head: tl.tensor,
    value_stride: tl.tensor,
    value_head: tl.tensor,
    scale: tl.tensor,
    SIZE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    CAUSAL: tl.constexpr,
) -> None:
    """dKey and dValue of a block of keys, from a range of queries of the GROUP heads that share it. Grid (J, K).

    jobs: (first key, end of the keys, first query, end of the queries, first row of its slot or -1). CAUSAL: keys and queries
    are of one segment, and the first query is the first key; else every query sees every key.

    Per job: keys and values read, their gradients written (float32 into a slot); queries, d_out and 8 bytes a query of GROUP
    heads read; 8 BLOCK_D dot FLOPs and an exponential for each pair of the blocks.
    """
    job = jobs_J5 + tl.program_id(0) * 5
    first, stop = tl.load(job), tl.load(job + 1)
    start, end, slot = tl.load(job + 2), tl.load(job + 3), tl.load(job + 4)
    head = tl.program_id(1)
    num_keys = tl.num_programs(1)
    key_MD = _tile(key_NKD + head.to(tl.int64) * key_head, first, stop, key_stride, SIZE, BLOCK_M, BLOCK_D, False)
    value_MD = _tile(value_NKD + head.to(tl.int64) * value_head, first, stop, value_stride, SIZE, BLOCK_M, BLOCK_D, False)
    d_key = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    d_value = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    scale2 = scale * LOG2E
    key_M = first + tl.arange(0, BLOCK_M)
    # the heads of a token lie side by side; one loop over both keeps the sums where the dots leave them
    for i in range(tl.cdiv(end - start, BLOCK_Q) * GROUP):
        at = start + i // GROUP * BLOCK_Q
        which = head * GROUP + i % GROUP
        query_QD = _tile(query_NHD + which.to(tl.int64) * query_head, at, end, query_stride, SIZE, BLOCK_Q, BLOCK_D, False)
        d_out_QD = _tile(d_out_NHD + which.to(tl.int64) * SIZE, at, end, num_heads * SIZE, SIZE, BLOCK_Q, BLOCK_D, False)
        row = at + tl.arange(0, BLOCK_Q)
        where = row.to(tl.int64) * num_heads + which
        # a row that is not there has p = 2^-inf
        lse2 = tl.load(lse_NH + where, mask=row < end, other=float("inf")) * LOG2E
        delta = tl.load(delta_NH + where, mask=row < end, other=0.0)
        p_MQ = tl.exp2(_dot(key_MD, tl.trans(query_QD)) * scale2 - lse2[None, :])
        if CAUSAL:
            p_MQ = tl.where(row[None, :] >= key_M[:, None], p_MQ, 0.0)
        d_value += _dot(p_MQ.to(d_out_QD.dtype), d_out_QD)
        d_scores_MQ = p_MQ * (_dot(value_MD, tl.trans(d_out_QD)) - delta[None, :])
        d_key += _dot(d_scores_MQ.to(query_QD.dtype), query_QD)
    d_key = d_key * scale
    at = head.to(tl.int64) * SIZE
    stride = num_keys * SIZE
    if slot < 0:
        dtype: tl.constexpr = d_key_NKD.dtype.element_ty
        _store(d_key_NKD + at, first, stop, stride, d_key.to(dtype), SIZE, BLOCK_M, BLOCK_D)
        _store(d_value_NKD + at, first, stop, stride, d_value.to(dtype), SIZE, BLOCK_M, BLOCK_D)
    else:
        _store(d_key_slots + at, slot, slot + stop - first, stride, d_key, SIZE, BLOCK_M, BLOCK_D)
        _store(d_value_slots + at, slot, slot + stop - first, stride, d_value, SIZE, BLOCK_M, BLOCK_D)


@triton.jit
def sum_slots(
    d_key_slots: tl.tensor,
    d_value_slots: tl.tensor,
    d_key_NKD: tl.tensor,
    d_value_NKD: tl.tensor,
    blocks_B4: tl.tensor,
    SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """ROWS keys of a block of a prompt: the sum of their slots, one after the other. Grid (B, K, BLOCK_M / ROWS).

    blocks: (first key, end of the keys, first row of the first slot, number of slots); slots are BLOCK_M rows apart. Each slot
    is read once, 8 bytes an element of dKey and dValue; the sum is written once in its own dtype.
    """
    block = blocks_B4 + tl.program_id(0) * 4
    part = tl.program_id(2) * ROWS
    first, stop, slot, num = tl.load(block) + part, tl.load(block + 1), tl.load(block + 2) + part, tl.load(block + 3)
    at = tl.program_id(1).to(tl.int64) * SIZE
    stride = tl.num_programs(1) * SIZE
    d_key = tl.zeros((ROWS, BLOCK_D), tl.float32)
    d_value = tl.zeros((ROWS, BLOCK_D), tl.float32)
    for one in range(num):
        row = slot + one * BLOCK_M
        d_key += _tile(d_key_slots + at, row, row + stop - first, stride, SIZE, ROWS, BLOCK_D, False)
        d_value += _tile(d_value_slots + at, row, row + stop - first, stride, SIZE, ROWS, BLOCK_D, False)
    dtype: tl.constexpr = d_key_NKD.dtype.element_ty
    _store(d_key_NKD + at, first, stop, stride, d_key.to(dtype), SIZE, ROWS, BLOCK_D)
    _store(d_value_NKD + at, first, stop, stride, d_value.to(dtype), SIZE, ROWS, BLOCK_D)
