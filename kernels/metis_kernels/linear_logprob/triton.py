"""Log-probability, entropy and log-sum-exp: one GEMM whose epilogue keeps the softmax statistics of each tile of logits.

Logits exist only as the accumulator of a tile, in float32. A tile leaves three numbers a row, relative to its own maximum
m = max_j a_j of the raw logits a = hidden @ head.T (all in float32):

    m,   s = sum_j exp((a_j - m) / temperature),   w = sum_j exp((a_j - m) / temperature) (a_j - m)

and a second kernel joins the tiles of a row in a fixed order. With M = max m, S = sum s exp((m - M) / temperature) and
W = sum exp((m - M) / temperature) (w + (m - M) s):

    lse = M / temperature + ln S,   logp = (a_target - M) / temperature - ln S,   H = ln S - W / (S temperature)

Nothing large is subtracted from something large, so all three are as good for logits near 1e4 as for logits near 0.

Shape letters: T tokens, H hidden size, V rows of the head (of this rank's shard), U columns of half a tile, P vocabulary tiles,
R ranks. In the kernels T, V and H are those of a tile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from metis_kernels import _shard
from metis_kernels._launch import launch

LOG2_E = math.log2(math.e)
LN_2 = tl.constexpr(math.log(2))

# Rows of the partial statistics of one launch: at V = 151936 these are 29 MB, which stay in the L2 cache of an H100, and
# 4096 rows are still 19008 tiles, so that the last, partly filled wave of 132 multiprocessors costs under 1 %.
ROWS_PER_LAUNCH = 4096


@dataclass(frozen=True, slots=True)
class Tile:
    """Tile of one program of the GEMM: tokens, vocabulary, the step along the hidden size; warps and pipeline stages."""

    tokens: int
    vocab: int
    hidden: int
    num_warps: int
    num_stages: int


# 128 x 256 accumulators are 128 registers of each of 256 threads, and need three quarters of the operand bytes of two
# 128 x 128 tiles. A stage takes (128 + 256) * 64 * 2 = 48 KiB: four are 192 KiB on sm_90 and sm_100 (of 227), 144 on sm_80
# (of 163), where Triton keeps one stage fewer in flight.
HALF_TILE = Tile(tokens=128, vocab=256, hidden=64, num_warps=8, num_stages=4)
# float32 has no exact tensor-core path: it runs on the FMA units, whose operands pass through registers.
FLOAT32_TILE = Tile(tokens=64, vocab=128, hidden=32, num_warps=8, num_stages=3)
# Hidden sizes that no step divides: rows are not aligned to 16 bytes, so elements are loaded one by one, under a mask, whose
# addresses take the registers that accumulators had.
RAGGED_HALF_TILE = Tile(tokens=128, vocab=128, hidden=32, num_warps=8, num_stages=3)
RAGGED_FLOAT32_TILE = Tile(tokens=64, vocab=64, hidden=32, num_warps=8, num_stages=3)

# Rows of tiles that are walked together. At H = 4096 a tile of hidden states is 1 MiB, one of the head 2 MiB: the 132 tiles
# that an H100 works on are 16 rows by about 8 columns, 33 MiB of operands, the fewest that a rectangle of that area has.
GROUP_TOKENS = 16

# 32 rows are one 128-byte line of a statistic; 4096 rows are then 128 programs.
COMBINE_TOKENS = 32
COMBINE_TILES = 32


def linear_logprob(
    hidden_TH: Tensor, head_VH: Tensor, targets_T: Tensor, temperature: float, vocab_start: int, group_name: str, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(logp, entropy, lse), [T] float32 each. chunk: rows per launch, 0 to choose. See api.linear_logprob."""
    num_tokens, hidden_size = hidden_TH.shape
    logp_T, entropy_T, lse_T = (hidden_TH.new_empty(num_tokens, dtype=torch.float32) for _ in range(3))
    if not num_tokens:
        return logp_T, entropy_T, lse_T
    # stays 0 where another rank has the target
    target_logit_T = hidden_TH.new_zeros(num_tokens, dtype=torch.float32)
    rows = min(chunk or ROWS_PER_LAUNCH, num_tokens)
    tile = choose_tile(hidden_TH.dtype, hidden_size)
    num_tiles = triton.cdiv(len(head_VH), tile.vocab)
    # the rows are the fast axis: a tile stores, and the second kernel loads, neighbouring rows at once
    partial_3PT = hidden_TH.new_empty((3, num_tiles, rows), dtype=torch.float32)
    hidden_TH, head_VH = _unit_stride(hidden_TH), _unit_stride(head_VH)
    targets_T = targets_T.contiguous()
    for first in range(0, num_tokens, rows):
        stop = min(first + rows, num_tokens)
        launch(
            _tile_statistics,
            (triton.cdiv(stop - first, tile.tokens) * num_tiles,),
            hidden_TH, head_VH, targets_T, partial_3PT, target_logit_T,
            first, stop, len(head_VH), hidden_size, vocab_start,
            hidden_TH.stride(0), head_VH.stride(0), rows, LOG2_E / temperature,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
            BLOCK_T=tile.tokens, BLOCK_V=tile.vocab, BLOCK_H=tile.hidden, GROUP=GROUP_TOKENS,
            WHOLE_H=hidden_size % tile.hidden == 0, WHOLE_V=len(head_VH) % tile.vocab == 0,
        )  # fmt: skip
        launch(
            _combine_tiles,
            (triton.cdiv(stop - first, COMBINE_TOKENS),),
            partial_3PT, target_logit_T, logp_T, entropy_T, lse_T,
            first, stop, num_tiles, rows, temperature, LOG2_E / temperature,
            num_warps=4, num_stages=2,
            BLOCK_T=COMBINE_TOKENS, BLOCK_P=COMBINE_TILES,
        )  # fmt: skip
    group = _shard.resolve(group_name)
    if group is None:
        return logp_T, entropy_T, lse_T
    return _combine_ranks(_shard.gather_ranks(torch.stack([target_logit_T / temperature, entropy_T, lse_T]), group))


def choose_tile(dtype: torch.dtype, hidden_size: int) -> Tile:
    """The tile for operands of this dtype. The same on sm_80, sm_90 and sm_100: none spills there (static figures)."""
    whole, ragged = (FLOAT32_TILE, RAGGED_FLOAT32_TILE) if dtype == torch.float32 else (HALF_TILE, RAGGED_HALF_TILE)
    return ragged if hidden_size % whole.hidden else whole


def _unit_stride(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _combine_ranks(local_R3T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(logp, entropy, lse) of the whole vocabulary from (target logit or 0, entropy, lse) of each shard, ranks in order.

    The entropy follows the chain rule: that of the choice of a shard, plus the mean of those within the shards. Unlike mean
    logits, they do not cancel against the log-sum-exp.
    """
    target_RT, entropy_RT, lse_RT = local_R3T.unbind(1)
    lse_T = torch.logsumexp(lse_RT, 0)
    log_share_RT = lse_RT - lse_T
    entropy_T = (log_share_RT.exp() * (entropy_RT - log_share_RT)).sum(0)
    return target_RT.sum(0) - lse_T, entropy_T, lse_T


@triton.jit
def _half_statistics(
    logits_TU: tl.tensor,
    target_logit_ptr_T: tl.tensor,
    target_column_T: tl.tensor,
    num_columns: tl.tensor,
    log2_scale: tl.tensor,
    BLOCK_U: tl.constexpr,
    WHOLE_V: tl.constexpr,
) -> tuple[Any, Any, Any]:
    """(m, s, w) of half a tile, whose first num_columns columns are rows of the head; stores the target logits in it."""
    column_U = tl.arange(0, BLOCK_U)
    max_T = tl.max(logits_TU, 1)
    below_TU = logits_TU - tl.expand_dims(max_T, 1)
    exp_TU = tl.exp2(below_TU * log2_scale)
    if not WHOLE_V:
        exp_TU = tl.where(column_U[None, :] < num_columns, exp_TU, 0.0)
    sum_T = tl.sum(exp_TU, 1)
    moment_T = tl.sum(exp_TU * below_TU, 1)
    target_logit_T = tl.sum(tl.where(column_U[None, :] == target_column_T[:, None], logits_TU, 0.0), 1)
    tl.store(target_logit_ptr_T, target_logit_T, mask=(target_column_T >= 0) & (target_column_T < BLOCK_U))
    return max_T, sum_T, moment_T


# Lengths are not specialised: whether one is 1 or a multiple of 16 changes nothing here, and each case would be a compilation.
@triton.jit(do_not_specialize=["first", "stop", "num_vocab", "vocab_start", "partial_rows"])
def _tile_statistics(
    hidden_ptr: tl.tensor,
    head_ptr: tl.tensor,
    targets_ptr: tl.tensor,
    partial_ptr: tl.tensor,
    target_logit_ptr: tl.tensor,
    first: tl.tensor,
    stop: tl.tensor,
    num_vocab: tl.tensor,
    hidden_size: tl.tensor,
    vocab_start: tl.tensor,
    hidden_stride: tl.tensor,
    head_stride: tl.tensor,
    partial_rows: tl.tensor,
    log2_scale: tl.tensor,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP: tl.constexpr,
    WHOLE_H: tl.constexpr,
    WHOLE_V: tl.constexpr,
) -> None:
    """(m, s, w) of one tile of logits, and the target logits that fall into it.

    For C = stop - first rows and N = ceil(C / BLOCK_T) * ceil(V / BLOCK_V) programs, B bytes an element:

        loads    N ((BLOCK_T + BLOCK_V) H B + 8 BLOCK_T)   bytes asked for: most are hits in the L2 cache
        stores   12 C ceil(V / BLOCK_V) + 4 (targets in this shard)   bytes
        products 2 N BLOCK_T BLOCK_V BLOCK_H ceil(H / BLOCK_H)   FLOP, of which 2 C V H are not padding
        exp2     N BLOCK_T (BLOCK_V + 2)

    Rows and columns past the end repeat the last one. So no load has a mask along T or V, and a maximum needs none either: it
    may count a logit twice, but never sees one that is not there (a 0 would win over a row of negative logits).
    """
    num_token_tiles = tl.cdiv(stop - first, BLOCK_T)
    num_vocab_tiles = tl.cdiv(num_vocab, BLOCK_V)
    # down GROUP rows of tiles, then on to the next column: the programs that run together form a near-square
    program = tl.program_id(0)
    group = program // (GROUP * num_vocab_tiles)
    group_rows = min(num_token_tiles - group * GROUP, GROUP)
    within = program % (GROUP * num_vocab_tiles)
    token_tile = group * GROUP + within % group_rows
    vocab_tile = within // group_rows

    row_T = token_tile * BLOCK_T + tl.arange(0, BLOCK_T)
    token_T = tl.minimum(first + row_T, stop - 1).to(tl.int64)
    column_V = vocab_tile * BLOCK_V + tl.arange(0, BLOCK_V)
    vocab_V = tl.minimum(column_V, num_vocab - 1).to(tl.int64)
    h_H = tl.arange(0, BLOCK_H)
    hidden_ptr_TH = hidden_ptr + token_T[:, None] * hidden_stride + h_H[None, :]
    head_ptr_HV = head_ptr + vocab_V[None, :] * head_stride + h_H[:, None]

    logits_TV = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
    for h in range(0, hidden_size, BLOCK_H):  # pyright: ignore[reportArgumentType]
        if WHOLE_H:
            hidden_TH = tl.load(hidden_ptr_TH)
            head_HV = tl.load(head_ptr_HV)
        else:
            hidden_TH = tl.load(hidden_ptr_TH, mask=h_H[None, :] < hidden_size - h, other=0.0)
            head_HV = tl.load(head_ptr_HV, mask=h_H[:, None] < hidden_size - h, other=0.0)
        # ieee: float32 operands are not rounded to TF32
        logits_TV = tl.dot(hidden_TH, head_HV, logits_TV, input_precision="ieee")
        hidden_ptr_TH += BLOCK_H
        head_ptr_HV += BLOCK_H

    # The epilogue takes one half of the columns after the other: the exponentials of a whole tile beside its logits would
    # be 256 registers a thread.
    BLOCK_U: tl.constexpr = BLOCK_V // 2
    left_TU, right_TU = tl.split(tl.permute(tl.reshape(logits_TV, (BLOCK_T, 2, BLOCK_U)), (0, 2, 1)))
    start = vocab_tile * BLOCK_V
    num_columns = tl.minimum(num_vocab - start, BLOCK_V)
    row_in_chunk_T = row_T < stop - first
    target_T = tl.load(targets_ptr + token_T) - vocab_start - start
    in_tile_T = row_in_chunk_T & (target_T >= 0) & (target_T < num_columns)
    target_column_T = tl.where(in_tile_T, target_T, -1).to(tl.int32)
    target_logit_ptr_T = target_logit_ptr + token_T
    max_left_T, sum_left_T, moment_left_T = _half_statistics(
        left_TU, target_logit_ptr_T, target_column_T, num_columns, log2_scale, BLOCK_U, WHOLE_V
    )
    max_right_T, sum_right_T, moment_right_T = _half_statistics(
        right_TU, target_logit_ptr_T, target_column_T - BLOCK_U, num_columns - BLOCK_U, log2_scale, BLOCK_U, WHOLE_V
    )
    max_T = tl.maximum(max_left_T, max_right_T)
    left_below_T = max_left_T - max_T
    right_below_T = max_right_T - max_T
    left_share_T = tl.exp2(left_below_T * log2_scale)
    right_share_T = tl.exp2(right_below_T * log2_scale)
    sum_T = left_share_T * sum_left_T + right_share_T * sum_right_T
    moment_left_T += left_below_T * sum_left_T
    moment_right_T += right_below_T * sum_right_T
    moment_T = left_share_T * moment_left_T + right_share_T * moment_right_T

    tile_stride = partial_rows.to(tl.int64)
    partial_ptr_T = partial_ptr + vocab_tile * tile_stride + row_T
    statistic_stride = num_vocab_tiles * tile_stride
    tl.store(partial_ptr_T, max_T, mask=row_in_chunk_T)
    tl.store(partial_ptr_T + statistic_stride, sum_T, mask=row_in_chunk_T)
    tl.store(partial_ptr_T + 2 * statistic_stride, moment_T, mask=row_in_chunk_T)


@triton.jit(do_not_specialize=["first", "stop", "num_tiles", "partial_rows"])
def _combine_tiles(
    partial_ptr: tl.tensor,
    target_logit_ptr: tl.tensor,
    logp_ptr: tl.tensor,
    entropy_ptr: tl.tensor,
    lse_ptr: tl.tensor,
    first: tl.tensor,
    stop: tl.tensor,
    num_tiles: tl.tensor,
    partial_rows: tl.tensor,
    temperature: tl.tensor,
    log2_scale: tl.tensor,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
) -> None:
    """Join the tiles of each row, in an order that depends on nothing but their number.

    For C = stop - first rows, P tiles and N = ceil(C / BLOCK_T) programs: loads N BLOCK_T (8 P + 8 BLOCK_P ceil(P / BLOCK_P)
    + 4) bytes, stores 12 C bytes, exp2 N BLOCK_T BLOCK_P ceil(P / BLOCK_P). The maxima are loaded twice, the second time
    from the cache.
    """
    row_T = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_chunk_T = row_T < stop - first
    row_T = tl.minimum(row_T, stop - first - 1)
    token_T = (first + row_T).to(tl.int64)
    tile_stride = partial_rows.to(tl.int64)
    sum_ptr = partial_ptr + num_tiles * tile_stride
    moment_ptr = sum_ptr + num_tiles * tile_stride

    # tiles past the end repeat the last one: the maximum may, and with s = w = 0 they add nothing
    max_T = tl.full((BLOCK_T,), -float("inf"), tl.float32)
    for p in range(0, num_tiles, BLOCK_P):  # pyright: ignore[reportArgumentType]
        tile_P = tl.minimum(p + tl.arange(0, BLOCK_P), num_tiles - 1)
        max_PT = tl.load(partial_ptr + tile_P[:, None] * tile_stride + row_T[None, :])
        max_T = tl.maximum(max_T, tl.max(max_PT, 0))
    sum_T = tl.zeros((BLOCK_T,), tl.float32)
    moment_T = tl.zeros((BLOCK_T,), tl.float32)
    for p in range(0, num_tiles, BLOCK_P):  # pyright: ignore[reportArgumentType]
        tile_P = p + tl.arange(0, BLOCK_P)
        offset_PT = tl.minimum(tile_P, num_tiles - 1)[:, None] * tile_stride + row_T[None, :]
        here = tile_P[:, None] < num_tiles
        below_PT = tl.load(partial_ptr + offset_PT) - max_T[None, :]
        share_PT = tl.exp2(below_PT * log2_scale)
        sum_PT = tl.load(sum_ptr + offset_PT, mask=here, other=0.0)
        moment_PT = tl.load(moment_ptr + offset_PT, mask=here, other=0.0)
        sum_T += tl.sum(share_PT * sum_PT, 0)
        moment_T += tl.sum(share_PT * (moment_PT + below_PT * sum_PT), 0)

    log_sum_T = tl.log2(sum_T) * LN_2
    target_logit_T = tl.load(target_logit_ptr + token_T)
    tl.store(logp_ptr + token_T, (target_logit_T - max_T) / temperature - log_sum_T, mask=in_chunk_T)
    tl.store(entropy_ptr + token_T, log_sum_T - moment_T / (sum_T * temperature), mask=in_chunk_T)
    tl.store(lse_ptr + token_T, max_T / temperature + log_sum_T, mask=in_chunk_T)
