"""`linear_logprob` on the CPU: logits in tiles that stay in the cache (kernels/csrc/head_impl.h).

Shape letters: T tokens, C tokens of a chunk, H hidden size, V rows of the head (of this rank's shard), R ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from metis_kernels import _shard
from metis_kernels._cpu_head import even_rows, open_chunk

_CHUNK = 512  # rows of the head are read once a chunk; beyond this the packed hidden states leave the L2 cache


def linear_logprob(
    hidden_TH: Tensor, head_VH: Tensor, targets_T: Tensor, temperature: float, vocab_start: int, group_name: str, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(logp, entropy, lse), [T] float32 each. See api.linear_logprob."""
    group = _shard.resolve(group_name)
    local_T = _shard.local_targets(targets_T, vocab_start, len(head_VH))
    hidden, head = even_rows(hidden_TH), even_rows(head_VH)
    out = torch.empty((3, len(hidden)), dtype=torch.float32)
    workspace = None
    for rows in torch.arange(len(hidden)).split(chunk or _CHUNK) if len(hidden) else ():
        part = open_chunk(hidden, rows, head, local_T[rows], temperature, workspace)
        workspace = part.workspace
        peak_C, sum_C, moment_C, target_C, _ = part.forward()
        lse_C = peak_C + sum_C.log()
        mean_C = peak_C + moment_C / sum_C  # of z under the shard's own distribution
        lse_RC, target_RC, mean_RC = _shard.gather_ranks(torch.stack([lse_C, target_C, mean_C]), group).unbind(1)
        lse_C = torch.logsumexp(lse_RC, 0)
        mean_C = ((lse_RC - lse_C).exp() * mean_RC).sum(0)
        out[:, rows] = torch.stack([target_RC.sum(0) - lse_C, lse_C - mean_C, lse_C]).float()
    logp_T, entropy_T, lse_T = out.unbind()
    return logp_T.clone(), entropy_T.clone(), lse_T.clone()
