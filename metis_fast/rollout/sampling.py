"""Drawing tokens from logits: the noise depends on (seed, position) alone.

Shape letters: A rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from metis_fast.rollout.engine import Sampling


def _uniform(seeds: npt.NDArray[np.uint64], positions: npt.NDArray[np.uint64]) -> npt.NDArray[np.float64]:
    """A uniform number in (0, 1) for every (seed, position): splitmix64, a counter-based generator (Steele et al., 2014)."""
    with np.errstate(over="ignore"):
        x = seeds + (positions + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return ((x >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def sample(logits_AV: Tensor, sampling: Sequence[Sampling], positions: Sequence[int], banned: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token a row by inverting the cumulative distribution; the noise depends on (seed, position) alone.

    logits_AV: float32. banned: token ids that are never drawn.

    Returns tokens [A] int64 and their log-probability [A] float32 under the full distribution at the row's temperature.
    """
    temperature = torch.tensor([s.temperature or 1.0 for s in sampling], device=logits_AV.device)
    logp = torch.log_softmax(logits_AV / temperature[:, None], -1)
    allowed = logp.index_fill(1, banned, float("-inf"))
    if any(s.top_k or s.top_p < 1 for s in sampling):
        allowed = _truncate(allowed, sampling)
    # shifted, so that something is left to draw where nearly all mass lies on banned tokens
    allowed = allowed.double()
    cumulative = (allowed - allowed.amax(-1, keepdim=True)).exp().cumsum(-1)
    seeds = np.array([s.seed & 0xFFFFFFFFFFFFFFFF for s in sampling], np.uint64)
    uniform = torch.from_numpy(_uniform(seeds, np.asarray(positions, np.uint64))).to(logits_AV.device)
    # strictly below the total, so that a token of probability 0 at the end is never drawn
    target = uniform * cumulative[:, -1]
    chosen = torch.searchsorted(cumulative, target[:, None], right=True)[:, 0].clamp(max=logits_AV.shape[1] - 1)
    greedy = torch.tensor([s.temperature == 0 for s in sampling], device=logits_AV.device)
    chosen = torch.where(greedy, allowed.argmax(-1), chosen)
    return chosen, logp.gather(1, chosen[:, None])[:, 0]


def _truncate(logp_AV: Tensor, sampling: Sequence[Sampling]) -> Tensor:
    """Top-k, then top-p (the smallest set whose probability reaches p); the rest becomes -inf."""
    value, index = logp_AV.sort(-1, descending=True)
    rank = torch.arange(logp_AV.shape[1], device=logp_AV.device)
    top_k = torch.tensor([s.top_k or logp_AV.shape[1] for s in sampling], device=logp_AV.device)
    kept = value.masked_fill(rank >= top_k[:, None], float("-inf"))
    probability = kept.softmax(-1)
    before = probability.cumsum(-1) - probability
    top_p = torch.tensor([s.top_p for s in sampling], device=logp_AV.device)
    kept = kept.masked_fill(before >= top_p[:, None], float("-inf"))
    return torch.full_like(logp_AV, float("-inf")).scatter(1, index, kept)
