"""Triton kernels between the matrix products of the HDPO loss.

Exponents are kept to base 2, so that a logit costs one FFMA and one EX2: with scale = log2(e) / temperature and
c2 = anchor log2(e),

    t_ij = z_ij scale - c2_i,   E_ij = 2^t_ij,   S_i = sum_j E_ij,   logp_i = ln(2) t_iy - ln S_i

The rounding of c2 cancels in logp, since the target's exponent has the same one. `z * scale - c2` is written as an fma
everywhere: the target's E is computed twice and has to come out equal.

Shape letters: C rows of a chunk, H hidden size, V rows of the head (of this rank's shard), P parts of a row, one program
each, K = 2 statistics of a part: S and the target's z, or 3: with M = sum_j E_ij t_ij. T tokens.

Counts that change from chunk to chunk are not specialised: a last chunk of any length runs the kernel that the others ran.

Scalars are annotated as tensors, which they are inside: Triton would read `int` and `float` as the types i32 and fp32.
"""

from __future__ import annotations

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
LOG_RATIO_LIMIT = tl.constexpr(20.0)
NO_ANCHOR = tl.constexpr(1e30)  # an estimate beyond it is no estimate; below it z scale - c2 cannot overflow
LOWEST = tl.constexpr(-3e38)  # a running maximum that still can be subtracted from -inf


@triton.jit
def _base2(anchor: tl.tensor, GUARD: tl.constexpr) -> tl.tensor:
    c2 = anchor * LOG2E
    if GUARD:
        c2 = tl.where(tl.abs(c2) < NO_ANCHOR, c2, 0.0)  # also where it is NaN
    return c2


@triton.jit
def _span(vocab: tl.tensor, num_parts: tl.tensor, BLOCK: tl.constexpr) -> tuple[tl.tensor, tl.tensor]:
    """First and last + 1 column of this program's part of the row: whole blocks, except at the end of the row."""
    size = tl.cdiv(tl.cdiv(vocab, BLOCK), num_parts) * BLOCK
    first = tl.program_id(1) * size
    return first, tl.minimum(first + size, vocab)


@triton.jit(do_not_specialize=["num_parts"])
def anchored_rows(
    z_CV: tl.tensor,
    e_CV: tl.tensor,
    targets_C: tl.tensor,
    anchor_C: tl.tensor,
    parts_CPK: tl.tensor,
    vocab: tl.tensor,
    num_parts: tl.tensor,
    scale: tl.tensor,
    STORE: tl.constexpr,
    MOMENT: tl.constexpr,
    GUARD: tl.constexpr,
    EXPONENT_LIMIT: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """E from logits, and the statistics of each part of a row. Grid (C, P).

    Per logit: 4 bytes read, with STORE the size of E's dtype written, 1 exponential. Per part: 12 bytes read (target, anchor),
    4 K written. Per owned target: 4 bytes read.

    e_CV may be z_CV: an element is read and written by the same thread. targets_C: local rows of the head, -1 where another
    rank has it; the part that owns the target stores its z, the others 0. GUARD: the anchor is an estimate. A wild one
    then gives a finite E (2^EXPONENT_LIMIT at most) and an S that shows it. NaN logits give NaN all the same.
    """
    row = tl.program_id(0).to(tl.int64)
    z_V = z_CV + row * vocab
    e_V = e_CV + row * vocab
    first, last = _span(vocab, num_parts, BLOCK)
    target = tl.load(targets_C + row).to(tl.int32)
    c2 = _base2(tl.load(anchor_C + row), GUARD)
    z_target = tl.load(z_V + target, mask=(target >= first) & (target < last), other=0.0)
    if STORE:
        tl.debug_barrier()  # in place, another warp would overwrite the target's z before this one has read it
    sum_B = tl.zeros((BLOCK,), tl.float32)
    moment_B = tl.zeros((BLOCK,), tl.float32)
    for start in range(first, last, BLOCK):  # pyright: ignore[reportArgumentType]
        column = start + tl.arange(0, BLOCK)
        inside = column < vocab
        # read once and never again, unlike E, which the next two products find in L2 if it stays there
        z = tl.load(z_V + column, mask=inside, other=float("-inf"), eviction_policy="evict_first")
        t = tl.fma(z, scale, -c2)
        if GUARD:
            t = tl.minimum(t, EXPONENT_LIMIT, propagate_nan=tl.PropagateNan.ALL)
        e = tl.exp2(t)
        sum_B += e
        if MOMENT:
            moment_B += tl.where(inside, e * t, 0.0)
        if STORE:
            tl.store(e_V + column, e, mask=inside)
    width = 3 if MOMENT else 2
    part = parts_CPK + (row * num_parts + tl.program_id(1)) * width
    tl.store(part, tl.sum(sum_B))
    tl.store(part + 1, z_target)
    if MOMENT:
        tl.store(part + 2, tl.sum(moment_B))


@triton.jit(do_not_specialize=["num_parts"])
def row_logsumexp(
    z_CV: tl.tensor,
    lse_CP: tl.tensor,
    vocab: tl.tensor,
    num_parts: tl.tensor,
    scale: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Log-sum-exp of each part of a row, in nats, with a running maximum: exact for any logits. Grid (C, P).

    Per logit: 4 bytes read, 1 exponential. Per part: 4 bytes written; per block of it 1 exponential more. A part without
    columns gives -inf.
    """
    row = tl.program_id(0).to(tl.int64)
    first, last = _span(vocab, num_parts, BLOCK)
    highest = tl.full((), LOWEST, tl.float32)
    total = tl.full((), 0.0, tl.float32)
    for start in range(first, last, BLOCK):  # pyright: ignore[reportArgumentType]
        column = start + tl.arange(0, BLOCK)
        t = tl.load(z_CV + row * vocab + column, mask=column < vocab, other=float("-inf")) * scale
        higher = tl.maximum(highest, tl.max(t))
        total = total * tl.exp2(highest - higher) + tl.sum(tl.exp2(t - higher))
        highest = higher
    tl.store(lse_CP + row * num_parts + tl.program_id(1), (highest + tl.log2(total)) * LN2)


@triton.jit
def target_logits(
    hidden_TH: tl.tensor,
    head_VH: tl.tensor,
    live_C: tl.tensor,
    targets_C: tl.tensor,
    z_C: tl.tensor,
    size: tl.tensor,
    hidden_stride: tl.tensor,
    head_stride: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """Logit of each row's target, 0 where another rank has it. Grid (C,).

    Per element of an owned row: the bytes of hidden and head read. Per row: 16 bytes read, 4 written.
    """
    row = tl.program_id(0)
    target = tl.load(targets_C + row)
    hidden_row = hidden_TH + tl.load(live_C + row) * hidden_stride
    head_row = head_VH + target * head_stride
    sum_B = tl.zeros((BLOCK,), tl.float32)
    num_read = tl.where(target >= 0, size, 0)
    for start in range(0, num_read, BLOCK):  # pyright: ignore[reportArgumentType]
        h = start + tl.arange(0, BLOCK)
        mine = h < size
        x = tl.load(hidden_row + h, mask=mine, other=0.0).to(tl.float32)
        w = tl.load(head_row + h, mask=mine, other=0.0).to(tl.float32)
        sum_B += x * w
    tl.store(z_C + row, tl.sum(sum_B))


@triton.jit
def _limited_exp(value: tl.tensor) -> tl.tensor:
    # the clamp keeps NaN: a NaN log-probability must not end as a finite gradient
    limited = tl.minimum(value, LOG_RATIO_LIMIT, propagate_nan=tl.PropagateNan.ALL)
    return tl.exp(tl.maximum(limited, -LOG_RATIO_LIMIT, propagate_nan=tl.PropagateNan.ALL))


@triton.jit
def _gated(scaled: tl.tensor, ratio: tl.tensor, low: tl.tensor, high: tl.tensor, dual_clip: tl.tensor) -> tl.tensor:
    """-dS/dlogp of one surrogate: nothing where the ratio is clipped; on the bound it is not."""
    inside = tl.where(scaled < 0, (ratio >= low) & (ratio <= dual_clip), (ratio >= 0) & (ratio <= high))
    # a product, not a choice: NaN stays
    return scaled * ratio * inside.to(tl.float32)


@triton.jit(do_not_specialize=["num_rows", "num_parts"])
def row_gradients(
    parts_CPK: tl.tensor,
    targets_C: tl.tensor,
    anchor_C: tl.tensor,
    scaled_acc_C: tl.tensor,
    scaled_tool_C: tl.tensor,
    scaled_one_C: tl.tensor | None,
    old_logp_C: tl.tensor | None,
    engine_logp_C: tl.tensor | None,
    ref_logp_C: tl.tensor | None,
    e_CV: tl.tensor,
    logp_C: tl.tensor,
    lse_C: tl.tensor,
    entropy_C: tl.tensor,
    sum_C: tl.tensor,
    row_scale_C: tl.tensor,
    logp_share_C: tl.tensor,
    entropy_share_C: tl.tensor,
    flagged_C: tl.tensor,
    num_rows: tl.tensor,
    vocab: tl.tensor,
    num_parts: tl.tensor,
    scale: tl.tensor,
    inverse_temperature: tl.tensor,
    low: tl.tensor,
    high: tl.tensor,
    dual_clip: tl.tensor,
    tis_cap: tl.tensor,
    kl_coef: tl.tensor,
    entropy_coef: tl.tensor,
    TIS: tl.constexpr,
    KL: tl.constexpr,
    MOMENT: tl.constexpr,
    ENTROPY: tl.constexpr,
    FIX: tl.constexpr,
    GUARD: tl.constexpr,
    DRIFT_LIMIT: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """What follows from the statistics of a row: results, the gradient's row scale, the target's element. O(C).

    g = -dL/dlogp with both surrogates, importance weight and k3, as in `_terms.coefficient`. Without ENTROPY

        dL/dz_ij = v_i (E_ij - S_i 1[j = y]) with v_i = g_i / (temperature S_i)

    in units of the raw logits; with FIX the target's element of E becomes E_iy - S_i, from float32 values. With ENTROPY
    v_i = (|g_i| + |h_i|) / temperature, and the shares of g and h = entropy_coef / N_acc in |g| + |h| go to
    `entropy_rows`; ENTROPY needs MOMENT. GUARD: a row with |ln S| > DRIFT_LIMIT, or an S that is 0, Inf or NaN, is flagged;
    its v is 0.

    old_logp_C None: the ratio is 1. Grid (ceil(C / ROWS),). Per row, in bytes: read 4 P K + 12 (anchor, scaled_acc,
    scaled_tool), 4 each for old_logp, TIS, KL and scaled_one (None without KL and ENTROPY), 8 with FIX (target); written 12
    (logp, lse, v), 4 with MOMENT (entropy), 12 with ENTROPY, 1 with GUARD, an owned element of E with FIX.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    inside = row < num_rows
    width = 3 if MOMENT else 2
    total = tl.zeros((ROWS,), tl.float32)
    z_target = tl.zeros((ROWS,), tl.float32)
    moment = tl.zeros((ROWS,), tl.float32)
    # one order, always: the same rows give the same bits
    for part in range(num_parts):  # pyright: ignore[reportArgumentType]
        statistics = parts_CPK + (row * num_parts + part) * width
        total += tl.load(statistics, mask=inside, other=1.0)
        z_target += tl.load(statistics + 1, mask=inside, other=0.0)
        if MOMENT:
            moment += tl.load(statistics + 2, mask=inside, other=0.0)
    c2 = _base2(tl.load(anchor_C + row, mask=inside, other=0.0), GUARD)
    t_target = tl.fma(z_target, scale, -c2)
    log_total = tl.log(total)
    logp = t_target * LN2 - log_total
    tl.store(logp_C + row, logp, mask=inside)
    tl.store(lse_C + row, c2 * LN2 + log_total, mask=inside)

    old = logp if old_logp_C is None else tl.load(old_logp_C + row, mask=inside, other=0.0)
    difference = logp - old
    ratio = _limited_exp(difference)
    g = _gated(tl.load(scaled_acc_C + row, mask=inside, other=0.0), ratio, low, high, dual_clip)
    g += _gated(tl.load(scaled_tool_C + row, mask=inside, other=0.0), ratio, low, high, dual_clip)
    if TIS:
        engine = tl.load(engine_logp_C + row, mask=inside, other=0.0)
        g *= tl.minimum(_limited_exp(old - engine), tis_cap, propagate_nan=tl.PropagateNan.ALL)
    g *= (tl.abs(difference) <= LOG_RATIO_LIMIT).to(tl.float32)
    one = 0.0 if scaled_one_C is None else tl.load(scaled_one_C + row, mask=inside, other=0.0)
    if KL:
        to_ref = tl.load(ref_logp_C + row, mask=inside, other=0.0) - logp
        g += kl_coef * one * (_limited_exp(to_ref) - 1) * (tl.abs(to_ref) <= LOG_RATIO_LIMIT).to(tl.float32)

    flagged = (tl.abs(log_total) <= DRIFT_LIMIT) == 0 if GUARD else row < 0  # NaN is flagged; without GUARD no row is
    if GUARD:
        tl.store(flagged_C + row, flagged.to(tl.int8), mask=inside)
    g = tl.where(flagged, 0.0, g)
    if MOMENT:
        tl.store(entropy_C + row, log_total - moment * LN2 / total, mask=inside)
    if ENTROPY:
        h = tl.where(flagged, 0.0, entropy_coef * one)
        magnitude = tl.abs(g) + tl.abs(h)
        unit = tl.where(magnitude == 0, 1.0, magnitude)
        tl.store(sum_C + row, total, mask=inside)
        tl.store(logp_share_C + row, g / unit, mask=inside)
        tl.store(entropy_share_C + row, h / unit, mask=inside)
        v = magnitude * inverse_temperature
    else:
        v = tl.where(flagged, 0.0, g * inverse_temperature / total)  # again: 0 / 0 is not 0
    tl.store(row_scale_C + row, v, mask=inside)
    if FIX:
        target = tl.load(targets_C + row, mask=inside, other=-1)
        owned = inside & (target >= 0) & (flagged == 0)
        tl.store(e_CV + row * vocab + target, tl.exp2(t_target) - total, mask=owned)


@triton.jit
def entropy_rows(
    z_CV: tl.tensor,
    d_CV: tl.tensor,
    targets_C: tl.tensor,
    anchor_C: tl.tensor,
    sum_C: tl.tensor,
    entropy_C: tl.tensor,
    logp_share_C: tl.tensor,
    entropy_share_C: tl.tensor,
    vocab: tl.tensor,
    scale: tl.tensor,
    GUARD: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """D = a (p - 1[j = target]) + b p (ln p + H), the gradient in the logits over its row scale. Grid (C, V blocks).

    Per logit: 4 bytes read, the size of D's dtype written, 1 exponential. Per program: 28 bytes read.
    a, b: the shares of `row_gradients`; a row where both are 0 becomes 0. d_CV may be z_CV.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < vocab
    a = tl.load(logp_share_C + row)
    b = tl.load(entropy_share_C + row)
    c2 = _base2(tl.load(anchor_C + row), GUARD)
    total = tl.load(sum_C + row)
    t = tl.fma(tl.load(z_CV + row * vocab + column, mask=inside, other=0.0), scale, -c2)
    e = tl.exp2(t)
    # E - S before the division: where p = 1 the target's element is then exactly 0, as its E was added to S
    d = a * (e - tl.where(column == tl.load(targets_C + row).to(tl.int32), total, 0.0))
    d += b * e * ((t * LN2 - tl.log(total)) + tl.load(entropy_C + row))
    d = tl.where((a == 0) & (b == 0), 0.0, d * (1 / total))  # a flagged row's S may be anything
    tl.store(d_CV + row * vocab + column, d, mask=inside)


@triton.jit
def scale_rows(
    in_CH: tl.tensor,
    scale_C: tl.tensor,
    unit: tl.tensor | None,
    rows_C: tl.tensor | None,
    out_TH: tl.tensor,
    size: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:
    """out[rows] = in * scale / unit, in float32, rounded once. Grid (C, H blocks).

    Per element: the sizes of both dtypes in bytes (nothing is read where the scale is 0). Per program: 4 bytes read,
    8 more with rows_C, 4 more with unit. unit None: 1. rows_C None: row after row. out_TH may be in_CH. A scale of 0 gives +0,
    whatever the input.
    """
    row = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(scale_C + row)
    if unit is not None:
        factor /= tl.load(unit)
    num_read = tl.where(factor == 0, 0, size)
    value = tl.load(in_CH + row * size + h, mask=h < num_read, other=0.0).to(tl.float32) * factor
    value = tl.where(factor == 0, 0.0, value)
    out_row = row if rows_C is None else tl.load(rows_C + row)
    tl.store(out_TH + out_row * size + h, value, mask=h < size)
