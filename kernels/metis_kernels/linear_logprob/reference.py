"""Log-probability, entropy and log-sum-exp, as defined.

    z = hidden @ head.T / temperature
    lse = log sum_j exp z_j,   logp = z_target - lse,   H = lse - sum_j p_j z_j

Shape letters: T tokens, H hidden size, V rows of the head (of this rank's shard), C tokens of a chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metis_kernels import _shard


def linear_logprob(
    hidden_TH: Tensor, head_VH: Tensor, targets_T: Tensor, temperature: float, vocab_start: int, group_name: str, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(logp, entropy, lse), [T] each: float64 for float64 inputs, else float32. See api.linear_logprob."""
    group = _shard.resolve(group_name)
    wide = torch.float64 if hidden_TH.dtype == torch.float64 else torch.float32
    head = head_VH.to(wide)
    local = _shard.local_targets(targets_T, vocab_start, len(head))
    out = hidden_TH.new_empty((3, len(hidden_TH)), dtype=wide)
    for start in range(0, len(hidden_TH), chunk):
        rows = slice(start, start + chunk)
        z_CV = hidden_TH[rows].to(wide) @ head.T / temperature
        lse_C = torch.logsumexp(z_CV, -1)
        mine = local[rows] >= 0
        target_C = torch.where(mine, z_CV.gather(1, local[rows].clamp(min=0)[:, None])[:, 0], 0.0)
        # sum of p_j z_j over the shard, p relative to the shard
        mean_C = (torch.softmax(z_CV, -1) * z_CV).sum(-1)
        lse_RC, target_RC, mean_RC = _shard.gather_ranks(torch.stack([lse_C, target_C, mean_C]), group).unbind(1)
        lse_C = torch.logsumexp(lse_RC, 0)
        share_RC = (lse_RC - lse_C).exp()
        out[:, rows] = torch.stack([target_RC.sum(0) - lse_C, lse_C - (share_RC * mean_RC).sum(0), lse_C])
    logp_T, entropy_T, lse_T = out.unbind()
    return logp_T.clone(), entropy_T.clone(), lse_T.clone()
