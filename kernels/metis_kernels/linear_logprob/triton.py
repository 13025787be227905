"""Log-probability, entropy and log-sum-exp: one GEMM whose epilogue keeps the softmax statistics of each tile of logits.

Logits exist only as the accumulator of a tile, in float32. A tile leaves three numbers a row, relative to its own maximum
m = max_j a_j of the raw logits a = hidden @ head.T (all in float32):

    m,   s = sum_j exp((a_j - m) / temperature),   w = sum_j exp((a_j - m) / temperature) (a_j - m)

and a second kernel joins the tiles of a row in a fixed order. With M = max m, S = sum s exp((m - M) / temperature) and
W = sum exp((m - M) / temperature) (w + (m - M) s):

    lse = M / temperature + ln S,   logp = (a_target - M) / temperature - ln S,   H = ln S - W / (S temperature)

Nothing large is subtracted from something large, so all three are as good for logits near 1e4 as for logits near 0.

Shape letters: T tokens, H hidden size, V rows of the head (of this rank's shard), P vocabulary tiles, R ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from metis_kernels import _shard
from metis_kernels._impl import triton_interpreted
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


# By compute capability. Two bytes an element: (128 + 256) * 64 * 2 = 48 KiB a stage. 128 x 256 with 8 warps leaves each
# thread 128 accumulators, and needs three quarters of the operand bytes of two 128 x 128 tiles.
HALF_TILES = {
    8: Tile(tokens=128, vocab=256, hidden=64, num_warps=8, num_stages=3),
    9: Tile(tokens=128, vocab=256, hidden=64, num_warps=8, num_stages=4),
    10: Tile(tokens=128, vocab=256, hidden=64, num_warps=8, num_stages=4),
}
# float32 has no exact tensor-core path: it runs on the FMA units, whose operands pass through registers.
FLOAT32_TILE = Tile(tokens=64, vocab=128, hidden=32, num_warps=8, num_stages=3)

# Rows of tiles that are walked together: 8 x 128 rows of hidden states (8 MiB at H = 4096) share every tile of the head
# that is in the L2 cache.
GROUP_TOKENS = 8

COMBINE_TOKENS = 32
COMBINE_TILES = 32


def linear_logprob(
    hidden_TH: Tensor, head_VH: Tensor, targets_T: Tensor, temperature: float, vocab_start: int, group_name: str, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(logp, entropy, lse), [T] float32 each. chunk: rows per launch, 0 to choose. See api.linear_logprob."""
    num_tokens = len(hidden_TH)
    logp_T, entropy_T, lse_T, target_T = (hidden_TH.new_empty(num_tokens, dtype=torch.float32) for _ in range(4))
    if not num_tokens:
        return logp_T, entropy_T, lse_T
    rows = min(chunk or ROWS_PER_LAUNCH, num_tokens)
    tile = choose_tile(hidden_TH.device, hidden_TH.dtype)
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
            hidden_TH, head_VH, targets_T, partial_3PT, target_T,
            first, stop, len(head_VH), hidden_TH.shape[1], vocab_start,
            hidden_TH.stride(0), head_VH.stride(0), rows, LOG2_E / temperature,
            num_warps=tile.num_warps, num_stages=tile.num_stages,
            BLOCK_T=tile.tokens, BLOCK_V=tile.vocab, BLOCK_H=tile.hidden, GROUP=GROUP_TOKENS,
            WHOLE_H=hidden_TH.shape[1] % tile.hidden == 0, WHOLE_V=len(head_VH) % tile.vocab == 0,
        )  # fmt: skip
        launch(
            _combine_tiles,
            (triton.cdiv(stop - first, COMBINE_TOKENS),),
            partial_3PT, target_T, targets_T, logp_T, entropy_T, lse_T,
            first, stop, len(head_VH), vocab_start, num_tiles, rows, temperature, LOG2_E / temperature,
            num_warps=4, num_stages=2,
            BLOCK_T=COMBINE_TOKENS, BLOCK_P=COMBINE_TILES,
        )  # fmt: skip
    group = _shard.resolve(group_name)
    if group is None:
        return logp_T, entropy_T, lse_T
    return _combine_ranks(_shard.gather_ranks(torch.stack([logp_T, entropy_T, lse_T]), group))


def choose_tile(device: torch.device, dtype: torch.dtype) -> Tile:
    """The tile for tensors of this device and dtype. Without a device (meta tensors) the active Triton target counts.

    Raises:
        ValueError: there is no tile for this architecture.
    """
    if device.type == "cuda":
        major = torch.cuda.get_device_capability(device)[0]
    elif triton_interpreted():
        major = 9
    else:
        major = int(triton.runtime.driver.active.get_current_target().arch) // 10
    if major not in HALF_TILES:
        raise ValueError(f"hidden_TH: expected a device of compute capability 8, 9 or 10, got {major} ({device})")
    return FLOAT32_TILE if dtype == torch.float32 else HALF_TILES[major]


def _unit_stride(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _combine_ranks(local_R3T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(logp, entropy, lse) of the whole vocabulary from those of each shard, ranks in order.

    A rank that has not the target says logp = -inf. The entropy follows the chain rule: that of the choice of a shard, plus
    the mean of those within the shards. Unlike mean logits, these do not cancel against the log-sum-exp.
    """
    logp_RT, entropy_RT, lse_RT = local_R3T.unbind(1)
    lse_T = torch.logsumexp(lse_RT, 0)
    log_share_RT = lse_RT - lse_T
    logp_T = (logp_RT + log_share_RT).amax(0)
    entropy_T = (log_share_RT.exp() * (entropy_RT - log_share_RT)).sum(0)
    return logp_T, entropy_T, lse_T


# Lengths are not specialised: whether one is 1 or a multiple of 16 changes nothing here, and each case would be a compilation.
@triton.jit(do_not_specialize=["first", "stop", "num_vocab", "vocab_start", "partial_rows"])
def _tile_statistics(
    hidden_ptr,
    head_ptr,
    targets_ptr,
    partial_ptr,
    target_logit_ptr,
    first,
    stop,
    num_vocab,
    hidden_size,
    vocab_start,
    hidden_stride,
    head_stride,
    partial_rows,
    log2_scale,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    GROUP: tl.constexpr,
    WHOLE_H: tl.constexpr,
    WHOLE_V: tl.constexpr,
):
    """(m, s, w) of one tile of logits, and the target logits that fall into it.

    For C = stop - first rows and N = ceil(C / BLOCK_T) * ceil(V / BLOCK_V) programs, B bytes an element:

        loads    N ((BLOCK_T + BLOCK_V) H B + 8 BLOCK_T)   bytes asked for: most are hits in the L2 cache
        stores   12 C ceil(V / BLOCK_V) + 4 (targets in this shard)   bytes
        products 2 N BLOCK_T BLOCK_V BLOCK_H ceil(H / BLOCK_H)   FLOP, of which 2 C V H are not padding

    Rows past the end repeat the last one. So no load has a mask along T or V, and the maximum of a tile needs none either:
    it may count a logit twice, but never sees one that is not there (a 0 would win over a row of negative logits).
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
    for h in range(0, hidden_size, BLOCK_H):
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

    row_in_chunk_T = row_T < stop - first
    local_T = tl.load(targets_ptr + token_T) - vocab_start - vocab_tile * BLOCK_V
    in_tile_T = (local_T >= 0) & (local_T < tl.minimum(BLOCK_V, num_vocab - vocab_tile * BLOCK_V))
    is_target_TV = tl.arange(0, BLOCK_V)[None, :] == local_T[:, None]
    target_logit_T = tl.sum(tl.where(is_target_TV, logits_TV, 0.0), 1)
    tl.store(target_logit_ptr + token_T, target_logit_T, mask=in_tile_T & row_in_chunk_T)

    max_T = tl.max(logits_TV, 1)
    below_TV = logits_TV - max_T[:, None]
    exp_TV = tl.exp2(below_TV * log2_scale)
    if not WHOLE_V:
        exp_TV = tl.where(column_V[None, :] < num_vocab, exp_TV, 0.0)
    sum_T = tl.sum(exp_TV, 1)
    moment_T = tl.sum(exp_TV * below_TV, 1)

    tile_stride = partial_rows.to(tl.int64)
    partial_ptr_T = partial_ptr + vocab_tile * tile_stride + row_T
    statistic_stride = num_vocab_tiles * tile_stride
    tl.store(partial_ptr_T, max_T, mask=row_in_chunk_T)
    tl.store(partial_ptr_T + statistic_stride, sum_T, mask=row_in_chunk_T)
    tl.store(partial_ptr_T + 2 * statistic_stride, moment_T, mask=row_in_chunk_T)


@triton.jit(do_not_specialize=["first", "stop", "num_vocab", "vocab_start", "num_tiles", "partial_rows"])
def _combine_tiles(
    partial_ptr,
    target_logit_ptr,
    targets_ptr,
    logp_ptr,
    entropy_ptr,
    lse_ptr,
    first,
    stop,
    num_vocab,
    vocab_start,
    num_tiles,
    partial_rows,
    temperature,
    log2_scale,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Join the tiles of each row, in ascending order. logp is -inf where the target is not in this shard.

    For C = stop - first rows, P tiles and N = ceil(C / BLOCK_T) programs: loads N BLOCK_T (8 P + 8 BLOCK_P ceil(P / BLOCK_P)
    + 8) + 4 (targets in this shard) bytes, stores 12 C. The maxima are loaded twice, the second time from the cache.
    """
    row_T = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_chunk_T = row_T < stop - first
    row_T = tl.minimum(row_T, stop - first - 1)
    token_T = (first + row_T).to(tl.int64)
    tile_stride = partial_rows.to(tl.int64)
    sum_ptr = partial_ptr + num_tiles * tile_stride
    moment_ptr = sum_ptr + num_tiles * tile_stride

    # tiles past the end repeat the last one: a maximum may, and a finite m - M times s = w = 0 stays 0
    max_T = tl.full((BLOCK_T,), -float("inf"), tl.float32)
    for p in range(0, num_tiles, BLOCK_P):
        tile_P = tl.minimum(p + tl.arange(0, BLOCK_P), num_tiles - 1)
        max_PT = tl.load(partial_ptr + tile_P[:, None] * tile_stride + row_T[None, :])
        max_T = tl.maximum(max_T, tl.max(max_PT, 0))
    sum_T = tl.zeros((BLOCK_T,), tl.float32)
    moment_T = tl.zeros((BLOCK_T,), tl.float32)
    for p in range(0, num_tiles, BLOCK_P):
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
    local_T = tl.load(targets_ptr + token_T) - vocab_start
    in_shard_T = (local_T >= 0) & (local_T < num_vocab)
    target_logit_T = tl.load(target_logit_ptr + token_T, mask=in_shard_T & in_chunk_T, other=-float("inf"))
    tl.store(logp_ptr + token_T, (target_logit_T - max_T) / temperature - log_sum_T, mask=in_chunk_T)
    tl.store(entropy_ptr + token_T, log_sum_T - moment_T / (sum_T * temperature), mask=in_chunk_T)
    tl.store(lse_ptr + token_T, max_T / temperature + log_sum_T, mask=in_chunk_T)
