"""The HDPO loss in three matrix products a live token, with row kernels of one read and one write between them.

For each chunk of live rows, with an anchor c_i close to the log-sum-exp that is known before the logits are:

    Z = X W^T                                        GEMM, float32 result
    E_ij = exp(z_ij / temperature - c_i), S_i = sum_j E_ij     one pass, no running maximum, E in the head's dtype
    [ranks: one all-reduce of S and the target's z]
    logp_i, g_i = -dL/dlogp_i, v_i = g_i / (temperature S_i);  E_iy becomes E_iy - S_i      O(C)
    dW += E^T (v X)                                  GEMM, float32, into the gradient itself
    dX = v (E W)                                     GEMM, float32, rounded once

E needs no correction other than a row scale, so both products take it as it lies. An anchor that is off by more than
`_DRIFT_LIMIT` flags its row, which gets v = 0; flagged rows run again with the exact log-sum-exp of their logits. That takes
one look from the host, at flags that are known before the last chunk's gradients, while those are computed. With an entropy
bonus dL/dz is no row scale times E; there a second row kernel turns Z into it.

Memory, extra to inputs and results: C V (4 + size of the dtype) bytes for Z and E (4 for float32, in place), C H (4 + size of
the dtype) for X and dX; traffic of the row pass the same C V bytes, or 8 for float32.

Shape letters: T tokens, L live tokens, C live tokens of a chunk, H hidden size, V rows of the head (of this rank's shard),
P parts of a row of logits, K statistics of a part.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from triton import cdiv, next_power_of_2

from metis_kernels import _gemm, _shard
from metis_kernels._launch import launch
from metis_kernels.hdpo_loss import _kernels
from metis_kernels.hdpo_loss._terms import Clip, Tokens

_CHUNK = 2048
"""Rows of a chunk: dHead is read and written once a chunk, 8 V H bytes, which at 2048 rows costs 1 ms on an H100 beside 3.4
of its product. 1024 rows are 4 % slower than 2048, 4096 are 3 % faster for twice the buffers (8B model, T = 4096, an H200)."""

_BLOCK = 8192
"""Logits of one loop step: 32 registers a thread, eight 128-bit loads in flight."""

_ROW_WARPS = 8
_NUM_PROGRAMS = 640
"""Programs that fill a GPU of 132 to 148 multiprocessors with 4 each; fewer rows than that are split."""

_HIDDEN_BLOCK = 2048
_GRADIENT_ROWS = 32

_DRIFT_LIMIT = {torch.float32: 40.0, torch.bfloat16: 40.0, torch.float16: 4.0}
"""Largest |ln S| of an anchored row, nats. float16 ends at 65504 = e^11.1 and loses bits below e^-9.7."""

_EXPONENT_LIMIT = {torch.float32: 86.0, torch.bfloat16: 86.0, torch.float16: 15.0}
"""Largest exponent of E to base 2 (86 is 60 nats): finite in the dtype, its sum over any vocabulary finite in float32, and
above the drift limit by so much that the row is flagged."""


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """Live rows. targets_L: local rows of the head, -1 where another rank has it. anchor_L: None asks for exact ones."""

    live_L: Tensor
    targets_L: Tensor
    anchor_L: Tensor | None
    tokens: Tokens

    def at(self, which: slice | Tensor) -> _Rows:
        def cut(value: Tensor | None) -> Tensor | None:
            return None if value is None else value[which]

        tokens = Tokens(
            self.tokens.scaled_acc_L[which],
            self.tokens.scaled_tool_L[which],
            self.tokens.scaled_one_L[which],
            cut(self.tokens.old_logp_L),
            cut(self.tokens.engine_logp_L),
            cut(self.tokens.ref_logp_L),
        )
        return _Rows(self.live_L[which], self.targets_L[which], cut(self.anchor_L), tokens)


@dataclass(frozen=True, slots=True, eq=False)
class _Results:
    """[L] each, float32; flagged_L int8: the anchor of that row was too far off, its results are void."""

    logp_L: Tensor
    lse_L: Tensor
    entropy_L: Tensor
    flagged_L: Tensor

    @staticmethod
    def empty(num: int, device: torch.device) -> _Results:
        logp, lse, entropy = (torch.empty(num, dtype=torch.float32, device=device) for _ in range(3))
        return _Results(logp, lse, entropy, torch.zeros(num, dtype=torch.int8, device=device))

    def at(self, which: slice) -> _Results:
        return _Results(self.logp_L[which], self.lse_L[which], self.entropy_L[which], self.flagged_L[which])


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    """What is the same for all rows of a call.

    grad_unit: a power of two near the largest g, in units of which dHead is accumulated; None is 1.
    """

    hidden_TH: Tensor
    head_VH: Tensor
    clip: Clip
    kl_coef: float
    entropy_coef: float
    with_entropy: bool
    temperature: float
    group: dist.ProcessGroup | None
    chunk: int
    d_hidden_TH: Tensor | None
    head_grad_VH: Tensor | None
    grad_unit: Tensor | None

    @property
    def with_gradient(self) -> bool:
        return self.d_hidden_TH is not None or self.head_grad_VH is not None

    @property
    def scale(self) -> float:
        """From a logit to an exponent to base 2."""
        return math.log2(math.e) / self.temperature


class _Look:
    """Whether any row is flagged: asked for before the last products, so that the host waits while they run, not after them."""

    def __init__(self) -> None:
        self._found: Tensor | None = None
        self._copied: torch.cuda.Event | None = None

    def ask(self, flagged_L: Tensor) -> None:
        found = flagged_L.any()
        if found.is_cuda:
            self._found = torch.empty((), dtype=torch.bool, pin_memory=True).copy_(found, non_blocking=True)
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(found.device))
        elif not found.is_meta:
            self._found = found

    def answer(self) -> bool:
        if self._copied is not None:
            self._copied.synchronize()
        return self._found is not None and bool(self._found)


@dataclass(frozen=True, slots=True, eq=False)
class _Buffers:
    """Of one chunk, used again by the next. e_CV is z_CV for float32 heads; d_CH: dHidden before its row scale."""

    z_CV: Tensor
    e_CV: Tensor
    d_CH: Tensor | None

    @staticmethod
    def of(call: _Call, num_rows: int) -> _Buffers:
        (vocab, size), head = call.head_VH.shape, call.head_VH
        z_CV = head.new_empty((num_rows, vocab), dtype=torch.float32)
        separate = call.with_gradient and head.dtype != torch.float32
        e_CV = head.new_empty((num_rows, vocab)) if separate else z_CV
        d_CH = head.new_empty((num_rows, size), dtype=torch.float32) if call.d_hidden_TH is not None else None
        return _Buffers(z_CV, e_CV, d_CH)

    def first(self, num_rows: int) -> _Buffers:
        return _Buffers(self.z_CV[:num_rows], self.e_CV[:num_rows], None if self.d_CH is None else self.d_CH[:num_rows])


def hdpo_loss(
    hidden_TH: Tensor,
    head_VH: Tensor,
    live_L: Tensor,
    targets_L: Tensor,
    anchor_L: Tensor | None,
    tokens: Tokens,
    clip: Clip,
    kl_coef: float,
    entropy_coef: float,
    with_entropy: bool,
    temperature: float,
    vocab_start: int,
    group_name: str,
    chunk: int,
    d_hidden_TH: Tensor | None,
    head_grad_VH: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(logp, lse, entropy), [L] float32 each. Fills the live rows of d_hidden_TH and adds to head_grad_VH (float32).

    chunk: 0 chooses. d_hidden_TH, head_grad_VH: contiguous; what is None costs nothing. The entropy is 0 where
    neither an entropy bonus nor `with_entropy` asks for it. See api.hdpo_loss.
    """
    results = _Results.empty(len(live_L), hidden_TH.device)
    with_entropy = with_entropy or entropy_coef != 0
    if not with_entropy:
        results.entropy_L.zero_()
    if not len(live_L):
        return results.logp_L, results.lse_L, results.entropy_L
    hidden_TH, head_VH = _unit_stride(hidden_TH), _unit_stride(head_VH)
    group = _shard.resolve(group_name)
    unit = None
    if head_grad_VH is not None and head_VH.dtype == torch.float16:
        unit = _grad_unit(tokens, kl_coef, entropy_coef)
    call = _Call(
        hidden_TH, head_VH, clip, kl_coef, entropy_coef, with_entropy, temperature, group, chunk or _CHUNK, d_hidden_TH,
        head_grad_VH, unit,
    )  # fmt: skip
    rows = _Rows(live_L, _shard.local_targets(targets_L, vocab_start, len(head_VH)), anchor_L, tokens)
    if anchor_L is None:
        rows = replace(rows, anchor_L=_anchor_of_targets(call, rows))

    if unit is not None and head_grad_VH is not None:
        head_grad_VH /= unit
    look = None if rows.anchor_L is None else _Look()
    _run(call, rows, results, look)
    if look is not None and look.answer():
        again = results.flagged_L.nonzero()[:, 0]
        exact = _Results.empty(len(again), hidden_TH.device)
        _run(call, replace(rows, anchor_L=None).at(again), exact, None)
        results.logp_L[again] = exact.logp_L
        results.lse_L[again] = exact.lse_L
        if with_entropy:
            results.entropy_L[again] = exact.entropy_L
    if unit is not None and head_grad_VH is not None:
        head_grad_VH *= unit
    return results.logp_L, results.lse_L, results.entropy_L


def _unit_stride(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 else matrix.contiguous()


def _grad_unit(tokens: Tokens, kl_coef: float, entropy_coef: float) -> Tensor:
    """The power of two just above the largest |g|, but for ratio and weights.

    A gradient of 1e-6 (one token of a million) times a hidden state is below float16's normal range, so dHead takes its row
    scale in this unit. A power of two: dividing main_grad by it and multiplying it again afterwards changes no bit.
    """
    largest = tokens.scaled_acc_L.abs() + tokens.scaled_tool_L.abs()
    largest = largest + (kl_coef + entropy_coef) * tokens.scaled_one_L.abs()
    _, exponent = torch.frexp(largest.max().clamp(min=2.0**-64))
    return torch.ldexp(largest.new_ones(()), exponent)


def _anchor_of_targets(call: _Call, rows: _Rows) -> Tensor | None:
    """z_target / temperature - old_logp: the old log-sum-exp, but for what the update changed in the target's logit.

    Without log-probabilities of the proximal policy the engine's do; None where there are none of either.
    """
    logp_L = rows.tokens.old_logp_L if rows.tokens.old_logp_L is not None else rows.tokens.engine_logp_L
    if logp_L is None:
        return None
    size = call.head_VH.shape[1]
    z_L = torch.empty_like(logp_L)
    launch(
        _kernels.target_logits,
        (len(z_L),),
        call.hidden_TH, call.head_VH, rows.live_L, rows.targets_L, z_L, size, call.hidden_TH.stride(0), call.head_VH.stride(0),
        num_warps=4,
        BLOCK=min(_HIDDEN_BLOCK, next_power_of_2(size)),
    )  # fmt: skip
    return _shard.sum_over_ranks(z_L, call.group) / call.temperature - logp_L


def _run(call: _Call, rows: _Rows, results: _Results, look: _Look | None) -> None:
    """All chunks of these rows. look: asked for flagged ones, as soon as all are known."""
    num = len(rows.live_L)
    buffers = _Buffers.of(call, min(call.chunk, num))
    for start in range(0, num, call.chunk):
        which = slice(start, min(start + call.chunk, num))
        chunk = rows.at(which), buffers.first(which.stop - start), results.at(which)
        x_CH, row_scale_C = _forward_chunk(call, *chunk)
        if look is not None and which.stop == num:
            look.ask(results.flagged_L)
        _backward_chunk(call, *chunk[:2], x_CH, row_scale_C)


def _forward_chunk(call: _Call, rows: _Rows, buffers: _Buffers, results: _Results) -> tuple[Tensor, Tensor]:
    """(x [C, H], row scales v [C]). Fills E and the results."""
    x_CH = call.hidden_TH.index_select(0, rows.live_L)
    _gemm.multiply(x_CH, call.head_VH.T, buffers.z_CV)
    guard = rows.anchor_L is not None
    anchor_C = rows.anchor_L if rows.anchor_L is not None else _exact_anchor(call, buffers.z_CV)
    return x_CH, _anchored_softmax(call, rows, anchor_C, guard, buffers, results)


def _backward_chunk(call: _Call, rows: _Rows, buffers: _Buffers, x_CH: Tensor, row_scale_C: Tensor) -> None:
    """Both gradients. x_CH is scaled in place."""
    if call.head_grad_VH is not None:
        _scale_rows(x_CH, row_scale_C, call.grad_unit, None, x_CH)
        _gemm.accumulate(call.head_grad_VH, buffers.e_CV.T, x_CH)
    if call.d_hidden_TH is not None:
        assert buffers.d_CH is not None
        _gemm.multiply(buffers.e_CV, call.head_VH, buffers.d_CH)
        _scale_rows(buffers.d_CH, row_scale_C, None, rows.live_L, call.d_hidden_TH)


def _parts(num_rows: int, vocab: int) -> tuple[int, int]:
    """(block, parts of a row): enough programs to fill the GPU, each with a block at least."""
    block = min(_BLOCK, next_power_of_2(vocab))
    return block, min(cdiv(_NUM_PROGRAMS, num_rows), cdiv(vocab, block))


def _exact_anchor(call: _Call, z_CV: Tensor) -> Tensor:
    """The log-sum-exp of each row; with ranks the largest of theirs, which is at most ln(ranks) below it."""
    num, vocab = z_CV.shape
    block, parts = _parts(num, vocab)
    lse_CP = z_CV.new_empty((num, parts))
    launch(
        _kernels.row_logsumexp, (num, parts), z_CV, lse_CP, vocab, parts, call.scale, num_warps=_ROW_WARPS, BLOCK=block
    )  # fmt: skip
    return _shard.max_over_ranks(torch.logsumexp(lse_CP, 1), call.group)


def _anchored_softmax(call: _Call, rows: _Rows, anchor_C: Tensor, guard: bool, buffers: _Buffers, results: _Results) -> Tensor:
    """From logits to E (with an entropy bonus, D) and the row scales v. Fills `results`."""
    num, vocab = buffers.z_CV.shape
    block, parts = _parts(num, vocab)
    bonus = call.entropy_coef != 0
    store = call.with_gradient and not bonus
    dtype = call.head_VH.dtype
    parts_CPK = anchor_C.new_empty((num, parts, 3 if call.with_entropy else 2))
    launch(
        _kernels.anchored_rows,
        (num, parts),
        buffers.z_CV, buffers.e_CV, rows.targets_L, anchor_C, parts_CPK, vocab, parts, call.scale,
        num_warps=_ROW_WARPS,
        STORE=store, MOMENT=call.with_entropy, GUARD=guard, EXPONENT_LIMIT=_EXPONENT_LIMIT[dtype], BLOCK=block,
    )  # fmt: skip
    if call.group is not None:
        parts_CPK, parts = _shard.sum_over_ranks(parts_CPK.sum(1), call.group), 1

    sum_C, row_scale_C, logp_share_C, entropy_share_C = (torch.empty_like(anchor_C) for _ in range(4))
    tokens, clip = rows.tokens, call.clip
    launch(
        _kernels.row_gradients,
        (cdiv(num, _GRADIENT_ROWS),),
        parts_CPK, rows.targets_L, anchor_C,
        tokens.scaled_acc_L, tokens.scaled_tool_L, tokens.scaled_one_L if call.kl_coef or bonus else None,
        tokens.old_logp_L, tokens.engine_logp_L if clip.tis_cap else None, tokens.ref_logp_L if call.kl_coef else None,
        buffers.e_CV, results.logp_L, results.lse_L, results.entropy_L,
        sum_C, row_scale_C, logp_share_C, entropy_share_C, results.flagged_L,
        num, vocab, parts, call.scale, 1 / call.temperature,
        1 - clip.eps_low, 1 + clip.eps_high, clip.dual_clip, clip.tis_cap, call.kl_coef, call.entropy_coef,
        num_warps=1,
        TIS=clip.tis_cap != 0, KL=call.kl_coef != 0, MOMENT=call.with_entropy, ENTROPY=bonus, FIX=store, GUARD=guard,
        DRIFT_LIMIT=_DRIFT_LIMIT[dtype], ROWS=_GRADIENT_ROWS,
    )  # fmt: skip
    if bonus and call.with_gradient:
        launch(
            _kernels.entropy_rows,
            (num, cdiv(vocab, block)),
            buffers.z_CV, buffers.e_CV, rows.targets_L, anchor_C, sum_C, results.entropy_L, logp_share_C, entropy_share_C,
            vocab, call.scale,
            num_warps=_ROW_WARPS,
            GUARD=guard, BLOCK=block,
        )  # fmt: skip
    return row_scale_C


def _scale_rows(in_CH: Tensor, scale_C: Tensor, unit: Tensor | None, rows_C: Tensor | None, out_TH: Tensor) -> None:
    num, size = in_CH.shape
    block = min(_HIDDEN_BLOCK, next_power_of_2(size))
    launch(
        _kernels.scale_rows,
        (num, cdiv(size, block)),
        in_CH, scale_C, unit, rows_C, out_TH, size,
        num_warps=4,
        BLOCK=block,
    )  # fmt: skip
