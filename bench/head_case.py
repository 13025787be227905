"""A batch for the two ops on the LM head: hidden states, head, sampled tokens, old log-probabilities, advantages.

Shape letters: T tokens, H hidden size, V vocabulary, B rollouts, R = T / B tokens of a rollout.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .candidate import DTYPES, BenchError, Request

LOGIT_STD = 2.5
"""Peaked like a trained model's, and with 1e10 logits still below 16 in magnitude."""

EPS_LOW, EPS_HIGH, DUAL_CLIP = 0.2, 0.2, 3.0
W_ACC, W_TOOL = 1.0, 0.15
_NEAR, _FAR = 0.1, (0.3, 0.5)
"""|logp - old| of tokens inside the clip range and of clipped ones. The bounds are at 0.18 and 0.22: nothing is so close to
them that an error of a peer's log-probability (bf16 logits: up to 0.05) decides which side it is on."""
_CLIPPED = 0.2
LOGP_LIMIT, TENSOR_CORE_LOGP_LIMIT = 1e-5, 1e-4
"""Largest error of a log-probability that one of ours may have. Tensor cores truncate their float32 sums: docs/kernels.md."""
_CHECKED = 128
_CHUNK = 256


@dataclass(frozen=True, slots=True, eq=False)
class HeadCase:
    """hidden_TH, head_VH of the dtype under test, the rest float32; num_rollouts B: rollout b is tokens b R to (b + 1) R."""

    hidden_TH: Tensor
    head_VH: Tensor
    targets_T: Tensor
    old_logp_T: Tensor
    adv_acc_T: Tensor
    adv_tool_T: Tensor
    num_acc: int
    num_tool: int
    num_rollouts: int

    @property
    def live_T(self) -> Tensor:
        """Bool: the tokens with an advantage."""
        return (self.adv_acc_T != 0) | (self.adv_tool_T != 0)

    @property
    def live_fraction(self) -> float:
        """Share of the tokens with an advantage."""
        return int(self.live_T.sum()) / len(self.targets_T)

    def part(self) -> HeadCase:
        """The first tokens of every rollout, 128 or so in all: what float64 can check in seconds."""
        each = -(-_CHECKED // self.num_rollouts)
        tokens = torch.arange(len(self.targets_T), device=self.targets_T.device).view(self.num_rollouts, -1)[:, :each].flatten()
        return self._take(tokens)

    def accuracy_only(self) -> HeadCase:
        """The same with one advantage, for peers that know only one."""
        zero = torch.zeros_like(self.adv_tool_T)
        return HeadCase(
            self.hidden_TH,
            self.head_VH,
            self.targets_T,
            self.old_logp_T,
            self.adv_acc_T,
            zero,
            self.num_acc,
            0,
            self.num_rollouts,
        )

    def double(self) -> HeadCase:
        """The same numbers in float64."""
        return HeadCase(
            self.hidden_TH.double(),
            self.head_VH.double(),
            self.targets_T,
            self.old_logp_T.double(),
            self.adv_acc_T.double(),
            self.adv_tool_T.double(),
            self.num_acc,
            self.num_tool,
            self.num_rollouts,
        )

    def _take(self, tokens: Tensor) -> HeadCase:
        adv_tool = self.adv_tool_T[tokens]
        return HeadCase(
            self.hidden_TH[tokens],
            self.head_VH,
            self.targets_T[tokens],
            self.old_logp_T[tokens],
            self.adv_acc_T[tokens],
            adv_tool,
            len(tokens),
            int((adv_tool != 0).sum()),
            self.num_rollouts,
        )


def logp_limit(request: Request) -> float:
    """What holds for this device and dtype."""
    return TENSOR_CORE_LOGP_LIMIT if request.device.type == "cuda" and request.dtype == "bf16" else LOGP_LIMIT


def make(request: Request) -> HeadCase:
    """Random states and weights; tokens sampled from the model they make; whole rollouts without advantages.

    Half of the live rollouts have an efficiency advantage too, of either sign.

    Raises:
        BenchError: the live fraction comes to less than one rollout.
    """
    num_tokens, size, vocab = (request.shape[letter] for letter in "THV")
    device, dtype = request.device, DTYPES[request.dtype]
    rng = torch.Generator(device).manual_seed(request.seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, device=device)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=rng, device=device)

    num_rollouts = _num_rollouts(num_tokens)
    num_live = round(request.live_fraction * num_rollouts)
    if num_live == 0:
        raise BenchError(
            f"--live-fraction {request.live_fraction}: {num_tokens} tokens are {num_rollouts} rollouts, none is live"
        )
    hidden_TH = normal(num_tokens, size).to(dtype)
    head_VH = normal(vocab, size).mul_(LOGIT_STD / size**0.5).to(dtype)
    targets_T, logp_T = _sample(hidden_TH, head_VH, uniform(num_tokens, 1))
    far = _FAR[0] + (_FAR[1] - _FAR[0]) * uniform(num_tokens)
    drift = torch.where(uniform(num_tokens) < _CLIPPED, far, _NEAR * uniform(num_tokens))
    old_logp_T = logp_T + torch.where(uniform(num_tokens) < 0.5, drift, -drift)
    live = torch.randperm(num_rollouts, generator=rng, device=device)[:num_live]
    adv_acc_B, adv_tool_B = torch.zeros(2, num_rollouts, device=device)
    adv_acc_B[live] = normal(num_live)
    both = live[: -(-num_live // 2)]
    adv_tool_B[both] = normal(len(both))
    each = num_tokens // num_rollouts
    adv_tool_T = adv_tool_B.repeat_interleave(each)
    num_tool = int((adv_tool_T != 0).sum())
    adv_acc_T = adv_acc_B.repeat_interleave(each)
    return HeadCase(hidden_TH, head_VH, targets_T, old_logp_T, adv_acc_T, adv_tool_T, num_tokens, num_tool, num_rollouts)


def _num_rollouts(num_tokens: int) -> int:
    """At least 4 rollouts, each of up to 1024 tokens, all of one length; fewer where the tokens do not divide."""
    wanted = max(4, num_tokens // 1024)
    return max(count for count in range(1, wanted + 1) if num_tokens % count == 0)


def _sample(hidden_TH: Tensor, head_VH: Tensor, uniform_T1: Tensor) -> tuple[Tensor, Tensor]:
    """(token, its log-probability), [T] each: one draw of the model, by inverting the cumulative distribution."""
    head = head_VH.float()
    targets, logps = [], []
    for rows in torch.arange(len(hidden_TH), device=hidden_TH.device).split(_CHUNK):
        logp_CV = torch.log_softmax(hidden_TH[rows].float() @ head.T, -1)
        cumulative_CV = logp_CV.exp().cumsum(-1)
        target_C1 = torch.searchsorted(cumulative_CV, uniform_T1[rows] * cumulative_CV[:, -1:]).clamp(max=len(head) - 1)
        targets.append(target_C1[:, 0])
        logps.append(logp_CV.gather(1, target_C1)[:, 0])
    return torch.cat(targets), torch.cat(logps)


def dual_loss(logp_T: Tensor, case: HeadCase) -> Tensor:
    """The loss of HDPO on given log-probabilities, written out in plain torch: what every eager peer runs."""
    ratio = (logp_T - case.old_logp_T).clamp(-20, 20).exp()
    clipped = ratio.clamp(1 - EPS_LOW, 1 + EPS_HIGH)
    loss = logp_T.new_zeros(())
    for weight, adv_T, num in ((W_ACC, case.adv_acc_T, case.num_acc), (W_TOOL, case.adv_tool_T, case.num_tool)):
        if num == 0:
            continue
        surrogate = torch.maximum(-adv_T * ratio, -adv_T * clipped)
        surrogate = torch.where(adv_T < 0, torch.minimum(surrogate, -adv_T * DUAL_CLIP), surrogate)
        loss = loss + weight / num * surrogate.sum()
    return loss


def eager_logp(hidden_TH: Tensor, head_VH: Tensor, targets_T: Tensor) -> Tensor:
    """Log-probabilities from materialised logits, in float32 (float64 for float64)."""
    logits = hidden_TH @ head_VH.T
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return torch.log_softmax(wide, -1).gather(1, targets_T[:, None])[:, 0]
