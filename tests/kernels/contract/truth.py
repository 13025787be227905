"""What both ops must return: float64 PyTorch autograd over whole logits, written from the formulas of the HDPO loss.

It shares no code with `metis_kernels`, so that a mistake there is not repeated here.

    z = hidden @ head.T / temperature,   logp = log_softmax(z)[target],   rho = exp(clamp(logp - old, -20, 20))
    s(A) = max(-A rho, -A clip(rho, 1 - eps_low, 1 + eps_high)),   S(A) = min(s(A), -c A) for A < 0, else s(A)
    L = sum_k w_k / N_k sum_t m_t w_t S(A_k,t)  +  kl_coef / N_acc sum_t m_t k3_t  -  entropy_coef / N_acc sum_t m_t H_t

Shape letters: T tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from contract.cases import Case, Options


@dataclass(frozen=True, slots=True, eq=False)
class HeadTruth:
    """[T] float64 each; peak: the largest |z|, which sets how exact a float32 logit can be."""

    logp_T: Tensor
    entropy_T: Tensor
    lse_T: Tensor
    peak: float


@dataclass(frozen=True, slots=True, eq=False)
class LossTruth:
    """float64. g_T is -dL/dlogp (without the entropy bonus), d_hidden_TH and d_head_VH are the gradients of the loss."""

    head: HeadTruth
    loss: Tensor
    g_T: Tensor
    d_hidden_TH: Tensor
    d_head_VH: Tensor
    ratio_T: Tensor
    loss_acc: Tensor
    loss_tool: Tensor
    loss_kl: Tensor
    loss_entropy: Tensor


def head_truth(hidden_TH: Tensor, head_VH: Tensor, targets_T: Tensor, temperature: float = 1.0) -> HeadTruth:
    """Log-probability, entropy and log-sum-exp of every token."""
    z_TV = hidden_TH.detach().double() @ head_VH.detach().double().T / temperature
    log_p_TV = torch.log_softmax(z_TV, -1)
    logp_T = log_p_TV.gather(1, targets_T[:, None])[:, 0]
    peak = float(z_TV.abs().max()) if z_TV.numel() else 0.0
    return HeadTruth(logp_T, -(log_p_TV.exp() * log_p_TV).sum(-1), torch.logsumexp(z_TV, -1), peak)


def surrogate(advantage_T: Tensor, ratio_T: Tensor, options: Options) -> Tensor:
    """S(A), with the gradient on the bounds that the formula asks for (they are inside)."""
    clipped = ratio_T.clamp(1 - options.eps_low, 1 + options.eps_high)
    loss = torch.maximum(-advantage_T * ratio_T, -advantage_T * clipped)
    if math.isinf(options.dual_clip):
        return loss
    # not torch.minimum, which on a tie hands half of the gradient to the constant
    limit = -advantage_T * options.dual_clip
    return torch.where((advantage_T < 0) & (loss > limit), limit, loss)


def loss_truth(case: Case, options: Options | None = None) -> LossTruth:
    """The loss of a case, its parts and its gradients."""
    options = options or Options()
    hidden = case.hidden_TH.detach().double().requires_grad_()
    head = case.head_VH.detach().double().requires_grad_()
    z_TV = hidden @ head.T / options.temperature
    log_p_TV = torch.log_softmax(z_TV, -1)
    logp_T = log_p_TV.gather(1, case.targets_T.clamp(0, len(head) - 1)[:, None])[:, 0]
    logp_T.retain_grad()
    entropy_T = -(log_p_TV.exp() * log_p_TV).sum(-1)

    old_T = logp_T.detach() if case.old_logp_T is None else case.old_logp_T.double()
    ratio_T = (logp_T - old_T).clamp(-20, 20).exp()
    weight_T = torch.ones_like(old_T)
    if options.tis_cap:
        assert case.engine_logp_T is not None
        weight_T = (old_T - case.engine_logp_T.double()).clamp(-20, 20).exp().clamp(max=options.tis_cap)

    def total(value_T: Tensor, num: float) -> Tensor:
        # torch.where, not a product: a token without loss must not matter, whatever it holds
        kept = torch.where(case.mask_T, value_T, 0.0).sum()
        return kept / num if num else kept * 0

    acc = options.w_acc * total(weight_T * surrogate(case.adv_acc_T.double(), ratio_T, options), case.num_acc)
    tool = options.w_tool * total(weight_T * surrogate(case.adv_tool_T.double(), ratio_T, options), case.num_tool)
    kl = total(torch.zeros_like(logp_T), 1)
    if options.kl_coef:
        assert case.ref_logp_T is not None
        to_ref_T = (case.ref_logp_T.double() - logp_T).clamp(-20, 20)
        kl = options.kl_coef * total(to_ref_T.exp() - to_ref_T - 1, case.num_acc)
    entropy = -options.entropy_coef * total(entropy_T, case.num_acc)
    parts = [options.loss_scale * part for part in (acc, tool, kl, entropy)]
    loss = torch.stack(parts).sum()
    loss.backward()
    assert hidden.grad is not None and head.grad is not None and logp_T.grad is not None
    peak = float(z_TV.detach().abs().max()) if z_TV.numel() else 0.0
    return LossTruth(
        head=HeadTruth(logp_T.detach(), entropy_T.detach(), torch.logsumexp(z_TV, -1).detach(), peak),
        loss=loss.detach(),
        g_T=-logp_T.grad,
        d_hidden_TH=hidden.grad,
        d_head_VH=head.grad,
        ratio_T=ratio_T.detach(),
        loss_acc=parts[0].detach(),
        loss_tool=parts[1].detach(),
        loss_kl=parts[2].detach(),
        loss_entropy=parts[3].detach(),
    )
