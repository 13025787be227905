"""`hdpo_loss` on the CPU: logits in tiles that stay in the cache, exponentials of a chunk kept (kernels/csrc/head_impl.h).

Anchored softmax: with c close to the log-sum-exp, E = exp(z - c) is written while the logits are made and S = sum_j E_j is
all that is missing then. With v = g / (tau S) and the target's element replaced by E_y - S,

    dHidden = v (E' @ head),   dHead = E'.T @ (v hidden)

Shape letters: T tokens, L live tokens, C live tokens of a chunk, Cp the same rounded up to whole panels, H hidden size, V rows
of the head (of this rank's shard).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from metis_kernels import _shard
from metis_kernels._cpu_head import Chunk, even_rows, open_chunk
from metis_kernels.hdpo_loss import _terms

_STORE_BYTES = 32 << 20  # what a chunk keeps of its logits: [V, C]
_STORE_SHARE = 8  # and at most this part of the tokens, so that a small batch does not keep them all
_ANCHOR_LIMIT = 40.0  # |lse - c| in nats up to which E keeps its accuracy, far from overflow
_LAYER = 32  # tokens are padded to it


@dataclass(frozen=True, slots=True, eq=False)
class _Call:
    """One call of the op: what does not change from chunk to chunk. See api.hdpo_loss."""

    hidden_TH: Tensor
    head_VH: Tensor
    live_L: Tensor
    local_L: Tensor
    anchor_L: Tensor | None
    tokens: _terms.Tokens
    clip: _terms.Clip
    kl_coef: float
    entropy_coef: float
    with_entropy: bool
    temperature: float
    group: torch.distributed.ProcessGroup | None
    d_hidden_TH: Tensor | None
    head_grad_VH: Tensor | None

    @property
    def need_gradient(self) -> bool:
        return self.d_hidden_TH is not None or self.head_grad_VH is not None


def hdpo_loss(
    hidden_TH: Tensor,
    head_VH: Tensor,
    live_L: Tensor,
    targets_L: Tensor,
    anchor_L: Tensor | None,
    tokens: _terms.Tokens,
    clip: _terms.Clip,
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
    """(logp, lse, entropy), [L] float32 each. Fills the live rows of d_hidden_TH and adds to head_grad_VH."""
    head = even_rows(head_VH)
    odd = head.shape[1] != head_VH.shape[1]
    call = _Call(
        even_rows(hidden_TH),
        head,
        live_L,
        _shard.local_targets(targets_L, vocab_start, len(head)),
        anchor_L,
        tokens,
        clip,
        kl_coef,
        entropy_coef,
        with_entropy or entropy_coef != 0,
        temperature,
        _shard.resolve(group_name),
        d_hidden_TH,
        torch.zeros_like(head, dtype=torch.float32) if odd and head_grad_VH is not None else head_grad_VH,
    )
    out = torch.zeros((3, len(live_L)), dtype=torch.float32)
    store = _Store(call, chunk or _chunk_size(len(live_L), head, entropy_coef != 0))
    redo = [rows[_run(call, store, rows, out, exact=False)] for rows in store.chunks(torch.arange(len(live_L)))]
    if redo:
        for rows in store.chunks(torch.cat(redo)):
            _run(call, store, rows, out, exact=True)
    if odd and head_grad_VH is not None and call.head_grad_VH is not None:
        head_grad_VH += call.head_grad_VH[:, :-1]
    logp_L, lse_L, entropy_L = out.unbind()
    return logp_L.clone(), lse_L.clone(), entropy_L.clone()


def _chunk_size(num_live: int, head_VH: Tensor, with_entropy: bool) -> int:
    # fewer tokens mean more passes over the head and its gradient, more a larger store
    per_token = len(head_VH) * (4 if with_entropy else head_VH.element_size())
    fits = min(_STORE_BYTES // per_token, -(-num_live // _STORE_SHARE))
    return max(64, fits // _LAYER * _LAYER)


class _Store:
    """What is kept from chunk to chunk to be used again: exponentials (or logits, for the entropy bonus) and the workspace."""

    def __init__(self, call: _Call, chunk: int) -> None:
        self._chunk = chunk
        self.workspace: Tensor | None = None
        self.kept: Tensor | None = None
        if call.need_gradient and len(call.live_L):
            columns = -(-min(chunk, len(call.live_L)) // _LAYER) * _LAYER
            dtype = torch.float32 if call.entropy_coef else call.head_VH.dtype
            self.kept = torch.empty(len(call.head_VH) * columns, dtype=dtype)

    def chunks(self, rows_L: Tensor) -> Iterator[Tensor]:
        """These live tokens, a chunk at a time."""
        return iter(rows_L.split(self._chunk)) if len(rows_L) else iter(())

    def of(self, call: _Call, part: Chunk) -> Tensor | None:
        """[V, Cp]."""
        if self.kept is None:
            return None
        size = len(call.head_VH), part.token_stride
        return self.kept[: size[0] * size[1]].view(size)


def _run(call: _Call, store: _Store, rows: Tensor, out: Tensor, exact: bool) -> Tensor:
    """One chunk. Returns which of its tokens had an anchor too far off to be used; nothing was done for those.

    exact: take the anchors from the logits themselves, in a pass of their own, and accept whatever comes, NaN included.
    """
    live_C, local_C = call.live_L[rows], call.local_L[rows]
    tokens = call.tokens.rows(rows)
    from_logits = call.entropy_coef != 0
    part = open_chunk(
        call.hidden_TH,
        live_C,
        call.head_VH,
        local_C,
        call.temperature,
        store.workspace,
        with_d_hidden=call.d_hidden_TH is not None,
        from_logits=from_logits and call.need_gradient,
    )
    store.workspace = part.workspace
    anchor_C = _exact_anchor(part, call) if exact else _anchor(part, call, rows)

    kept = store.of(call, part)
    logits, exponentials = (kept, None) if from_logits else (None, kept)
    _, sum_C, moment_C, target_C, target_exp_C = part.forward(anchor_C, exponentials, logits, moment=call.with_entropy)
    statistics = torch.stack([sum_C, target_C, moment_C] if call.with_entropy else [sum_C, target_C])
    _shard.sum_over_ranks(statistics, call.group)
    sum_C, target_C = statistics[0], statistics[1]
    log_sum_C = sum_C.log()
    lse_C = anchor_C + log_sum_C
    logp_C = target_C - lse_C
    # the moment is relative to the anchor: no cancellation between large logits
    entropy_C = log_sum_C - statistics[2] / sum_C if call.with_entropy else torch.zeros_like(lse_C)
    good = torch.ones_like(sum_C, dtype=torch.bool) if exact else log_sum_C.abs() <= _ANCHOR_LIMIT  # False for NaN and Inf
    out[:, rows[good]] = torch.stack([logp_C, lse_C, entropy_C]).float()[:, good]
    if call.need_gradient:
        g_C = _terms.coefficient(logp_C.float(), tokens, call.clip, call.kl_coef).double() / call.temperature
        g_C = torch.where(good, g_C, 0.0)
        # 0 times a number, in case theirs is none: these tokens are run again
        log_sum_C, entropy_C = torch.where(good, log_sum_C, 1e30), torch.where(good, entropy_C, 0.0)
        bonus_C = call.entropy_coef * tokens.scaled_one_L.double() / call.temperature * good
        _gradient(call, part, kept, (log_sum_C, sum_C, target_exp_C, g_C, bonus_C, entropy_C))
    return ~good


def _anchor(part: Chunk, call: _Call, rows: Tensor) -> Tensor:
    """A guess of the log-sum-exp, the same on all ranks, [C] float32."""
    if call.anchor_L is not None:
        return call.anchor_L[rows]
    known = call.tokens.old_logp_L if call.tokens.old_logp_L is not None else call.tokens.engine_logp_L
    if known is None:
        return _exact_anchor(part, call)
    # z_target - logp of a policy that is close to this one
    return _shard.sum_over_ranks(part.target_logits(), call.group) - known[rows]


def _exact_anchor(part: Chunk, call: _Call) -> Tensor:
    peak_C, sum_C, _, _, _ = part.forward()
    return _shard.max_over_ranks((peak_C + sum_C.log()).float(), call.group)


def _gradient(call: _Call, part: Chunk, kept: Tensor | None, row: tuple[Tensor, ...]) -> None:
    """Both products with dL/dz. row: (ln S, S, E of the target, g / tau, h / tau, H), [C] float64 each."""
    assert kept is not None
    log_sum_C, sum_C, target_exp_C, g_C, bonus_C, entropy_C = row
    if call.entropy_coef:
        # p ln p is not E times a number of its row: the rows are scaled one by one, from the logits
        scale_C = torch.ones_like(g_C)
        vectors = torch.stack([part.padded(value) for value in (log_sum_C, g_C, bonus_C, entropy_C)])
        logits, exponentials = kept, None
    else:
        scale_C = torch.where(g_C == 0, 0.0, g_C / sum_C)
        mine = (part.local_C >= 0).nonzero()[:, 0]
        kept[part.local_C[mine], mine] = (target_exp_C - sum_C)[mine].to(kept.dtype)
        vectors, logits, exponentials = None, None, kept
    part.backward(scale_C, exponentials, logits, vectors, call.d_hidden_TH, call.head_grad_VH)
