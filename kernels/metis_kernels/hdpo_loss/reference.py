"""The gradient of the HDPO loss, written like the formulas.

    z = hidden @ head.T / temperature,   p = softmax z,   g = -dL/dlogp,   h = entropy_coef / N_acc
    dL/dz_j = g (p_j - 1[j = target]) + h p_j (ln p_j + H)
    dHidden = dL/dz @ head / temperature,   dHead = (dL/dz).T @ hidden / temperature

Shape letters: T tokens, L live tokens, C live tokens of a chunk, H hidden size, V rows of the head (of this rank's shard).
"""

from __future__ import annotations

import torch
from torch import Tensor

from metis_kernels import _shard
from metis_kernels.hdpo_loss import _terms


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
    """(logp, lse, entropy), [L] each. Fills the live rows of d_hidden_TH and adds to head_grad_VH. See api.hdpo_loss.

    Neither the anchor nor with_entropy is needed here.
    """
    group = _shard.resolve(group_name)
    wide = torch.float64 if hidden_TH.dtype == torch.float64 else torch.float32
    head = head_VH.to(wide)
    local_L = _shard.local_targets(targets_L, vocab_start, len(head))
    chunk = chunk or 1024
    out = hidden_TH.new_empty((3, len(live_L)), dtype=wide)
    for start in range(0, len(live_L), chunk):
        rows = slice(start, start + chunk)
        hidden = hidden_TH[live_L[rows]].to(wide)
        z_CV = hidden @ head.T / temperature
        mine = local_L[rows] >= 0
        index = local_L[rows].clamp(min=0)[:, None]
        target_C = torch.where(mine, z_CV.gather(1, index)[:, 0], 0.0)
        mean_C = (torch.softmax(z_CV, -1) * z_CV).sum(-1)
        lse_RC, target_RC, mean_RC = _shard.gather_ranks(
            torch.stack([torch.logsumexp(z_CV, -1), target_C, mean_C]), group
        ).unbind(1)
        lse_C = torch.logsumexp(lse_RC, 0)
        logp_C = target_RC.sum(0) - lse_C
        entropy_C = lse_C - ((lse_RC - lse_C).exp() * mean_RC).sum(0)
        out[:, rows] = torch.stack([logp_C, lse_C, entropy_C])
        if d_hidden_TH is None and head_grad_VH is None:
            continue
        chunk_tokens = tokens.rows(rows)
        g_C = _terms.coefficient(logp_C, chunk_tokens, clip, kl_coef).to(wide)
        log_p_CV = z_CV - lse_C[:, None]
        p_CV = log_p_CV.exp()
        d_z_CV = g_C[:, None] * p_CV
        d_z_CV.scatter_add_(1, index, torch.where(mine, -g_C, 0.0)[:, None])
        if entropy_coef:
            h_C = (entropy_coef * chunk_tokens.scaled_one_L).to(wide)
            d_z_CV += h_C[:, None] * p_CV * (log_p_CV + entropy_C[:, None])
        d_z_CV /= temperature
        if d_hidden_TH is not None:
            d_hidden_TH[live_L[rows]] = (d_z_CV @ head).to(d_hidden_TH.dtype)
        if head_grad_VH is not None:
            head_grad_VH += d_z_CV.T @ hidden
    logp_L, lse_L, entropy_L = out.unbind()
    return logp_L.clone(), lse_L.clone(), entropy_L.clone()
