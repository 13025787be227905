"""`hdpo_loss`: the LM head and the clipped dual-surrogate loss, forward and backward in one pass over the vocabulary.

Shape letters: T tokens, L live tokens (those that take part), H hidden size, V rows of the head (of this rank's shard).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from metis_kernels import _check, _shard
from metis_kernels._impl import Impl, choose
from metis_kernels._shard import VocabShard
from metis_kernels.hdpo_loss import _terms
from metis_kernels.hdpo_loss._terms import HdpoMetrics
from metis_kernels.linear_logprob.api import check_head

_SCALARS = (torch.float32, torch.float64)
_COUNTS = (torch.int64, torch.int32, torch.float32, torch.float64)
"""Dtypes of a denominator: a number of tokens must not be rounded, as bfloat16 would."""


@dataclass(frozen=True, slots=True, eq=False)
class HdpoLoss:
    """What `hdpo_loss` returns.

    loss: 0-d, float32 (float64 for float64 inputs); its backward hands on the gradients that were taken with it.
    logp_L, lse_L, entropy_L: of the live tokens, in the order of live_L, without gradient.
    live_L: [L] int64, which tokens took part.
    """

    loss: Tensor
    metrics: HdpoMetrics
    logp_L: Tensor
    lse_L: Tensor
    entropy_L: Tensor | None
    live_L: Tensor


def hdpo_loss(
    hidden_TH: Tensor,
    head_VH: Tensor,
    targets_T: Tensor,
    old_logp_T: Tensor | None,
    adv_acc_T: Tensor,
    adv_tool_T: Tensor,
    mask_T: Tensor | None,
    num_acc: float | Tensor,
    num_tool: float | Tensor,
    *,
    w_acc: float = 1.0,
    w_tool: float = 0.15,
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    dual_clip: float = 3.0,
    temperature: float = 1.0,
    entropy_coef: float = 0.0,
    with_entropy: bool = False,
    kl_coef: float = 0.0,
    ref_logp_T: Tensor | None = None,
    tis_cap: float = 0.0,
    engine_logp_T: Tensor | None = None,
    anchor_T: Tensor | None = None,
    live_L: Tensor | None = None,
    loss_scale: float = 1.0,
    main_grad: Tensor | None = None,
    shard: VocabShard | None = None,
    reduce_hidden: bool = True,
    chunk: int | None = None,
    impl: Impl = "auto",
) -> HdpoLoss:
    """L = w_acc L_acc + w_tool L_tool (+ kl_coef k3 - entropy_coef H), its gradients taken in the same pass.

        L_k = sum_t m_t S(A_k,t) / N_k     S: clipped surrogate with dual clip, see `_terms`;  N_k = 0: L_k = 0

    Only live tokens reach the LM head: sampled ones whose weighted advantages are not both 0, or all sampled ones where an
    entropy or KL term is on. That is exact. A live token costs three matrix products with the head: logits, dHidden, dHead.
    Without gradients (torch.no_grad, nothing that requires them) it costs one.

    Args:
        hidden_TH: bfloat16, float16, float32 or float64.
        head_VH: LM head, same dtype; the local rows if `shard` is given.
        targets_T: int64, the sampled tokens.
        old_logp_T: log-probabilities under the proximal policy; None where that is the current policy (the ratio is
            then exactly 1).
        adv_acc_T, adv_tool_T: advantages, repeated for every token; 0 outside the channel's set.
        mask_T: bool, the tokens that carry loss; None for all.
        num_acc, num_tool: N_acc, N_tool of the whole mini-batch, over all its micro-batches and ranks.
        w_acc, w_tool: >= 0.
        eps_low, eps_high, dual_clip: bounds of the ratio; dual_clip = inf is off.
        temperature: the one that the tokens were sampled with, > 0.
        with_entropy: return the entropies of the live tokens, for a metric; without a product more.
        entropy_coef, kl_coef: per sampled token, divided by N_acc; 0 is off. kl_coef needs ref_logp_T (k3 estimator).
        tis_cap: C of the truncated importance weight min(exp(old - engine), C); 0 is off. Needs engine_logp_T.
        anchor_T: an estimate of the log-sum-exp of z / temperature, for example `linear_logprob(...).lse_T` under the old
            weights. It changes no result; a bad one costs a second pass over its chunk, none costs a guess.
        live_L: int64 indices of the tokens to run, ascending, where the caller knows them; saves a device-to-host
            synchronisation. Tokens outside of it are taken to have no gradient.
        loss_scale: factor of the loss and of every gradient, for gradients that go into main_grad.
        main_grad: float32 [V, H]; dHead is added to it during this call, and head_VH gets no gradient from backward, whose
            upstream gradient must then be 1: put loss scales into `loss_scale`. Nothing is added if gradients are off.
        shard: where the local rows of the head stand, and the tensor-parallel group: one all-reduce of [L, 2] float32
            ([L, 3] with entropy); without anchor_T, one more of [L] for a common anchor.
        reduce_hidden: sum dHidden over the ranks of the shard (once, in the dtype of hidden_TH); False leaves the partial
            sum to the caller.
        chunk: live tokens per chunk; changes memory and speed only. Default: chosen by the implementation.
        impl: see `metis_kernels`.

    Raises:
        ValueError: a shape, dtype, device or option is not as stated, or `impl` cannot run here.

    Source: Metis (arXiv 2604.08545); dual clip: Ye et al. 2020; truncated importance sampling: Yao et al. 2025;
    k3: Schulman 2020.
    """
    check_head(hidden_TH, head_VH, targets_T, temperature, chunk)
    num_tokens, device = len(hidden_TH), hidden_TH.device
    for name, value in (("adv_acc_T", adv_acc_T), ("adv_tool_T", adv_tool_T)):
        _check.tensor(name, value, (num_tokens,), _SCALARS, device, axes="[T]")
    for name, value in (
        ("old_logp_T", old_logp_T),
        ("ref_logp_T", ref_logp_T),
        ("engine_logp_T", engine_logp_T),
        ("anchor_T", anchor_T),
    ):
        if value is not None:
            _check.tensor(name, value, (num_tokens,), _SCALARS, device, axes="[T]")
    if mask_T is not None:
        _check.tensor("mask_T", mask_T, (num_tokens,), (torch.bool,), device, axes="[T]")
    if live_L is not None:
        _check.tensor("live_L", live_L, (None,), (torch.int64,), device, axes="[L]")
        if not torch.compiler.is_compiling():  # where values are not there to be looked at
            _check.indices("live_L", live_L, num_tokens, ascending=True)
    if main_grad is not None:
        wanted = torch.float64 if hidden_TH.dtype == torch.float64 else torch.float32
        _check.tensor("main_grad", main_grad, head_VH.shape, (wanted,), device, axes="[V, H]")
        if not main_grad.is_contiguous():
            raise ValueError(f"main_grad: expected a contiguous tensor, got strides {main_grad.stride()}")
    for name, number in (
        ("w_acc", w_acc), ("w_tool", w_tool), ("eps_low", eps_low), ("eps_high", eps_high), ("entropy_coef", entropy_coef),
        ("kl_coef", kl_coef), ("tis_cap", tis_cap),
    ):  # fmt: skip
        _check.at_least(name, number, 0)
    _check.at_least("dual_clip", dual_clip, 1, strictly=True, finite=False)
    if kl_coef and ref_logp_T is None:
        raise ValueError("ref_logp_T: kl_coef is not 0, so the reference policy's log-probabilities are needed; got None")
    if tis_cap and engine_logp_T is None:
        raise ValueError("engine_logp_T: tis_cap is not 0, so the engine's log-probabilities are needed; got None")
    chosen = choose(impl, device, hidden_TH.dtype)

    per_acc, per_tool = (_inverse(name, n, device) for name, n in (("num_acc", num_acc), ("num_tool", num_tool)))
    mask = torch.ones_like(targets_T, dtype=torch.bool) if mask_T is None else mask_T
    if live_L is None:
        live = mask if (entropy_coef or kl_coef) else mask & ((w_acc * adv_acc_T != 0) | (w_tool * adv_tool_T != 0))
        live_L = live.nonzero()[:, 0]
    wide = torch.float64 if hidden_TH.dtype == torch.float64 else torch.float32

    def take(value: Tensor | None) -> Tensor | None:
        return None if value is None else value.detach()[live_L].to(wide)

    # scales are formed in float64 and rounded once. A token outside the mask has no share, whatever live_L says.
    share = mask[live_L].double() * loss_scale
    scaled_acc = (share * adv_acc_T.detach()[live_L] * (w_acc * per_acc)).to(wide)
    scaled_tool = (share * adv_tool_T.detach()[live_L] * (w_tool * per_tool)).to(wide)
    scaled_one = (share * per_acc).to(wide)
    tokens = _terms.Tokens(scaled_acc, scaled_tool, scaled_one, take(old_logp_T), take(engine_logp_T), take(ref_logp_T))

    need = torch.is_grad_enabled()
    need_hidden = need and hidden_TH.requires_grad
    need_head = need and (main_grad is not None or head_VH.requires_grad)
    head_grad = None
    if need_head:
        # contiguous, whatever the strides of the head: implementations rely on it
        head_grad = main_grad if main_grad is not None else torch.zeros(head_VH.shape, dtype=wide, device=device)
    start, group = _shard.unpack(shard)
    anchor_L = take(anchor_T)
    if anchor_L is not None:  # any number may be off; what is none would go through the products with the head
        anchor_L = torch.nan_to_num(anchor_L, nan=0.0, posinf=0.0, neginf=0.0)
    logp_L, lse_L, entropy_L, d_hidden = torch.ops.metis_kernels.hdpo_loss(
        hidden_TH.detach(), head_VH.detach(), live_L, targets_T[live_L], anchor_L,
        tokens.scaled_acc_L, tokens.scaled_tool_L, tokens.scaled_one_L,
        tokens.old_logp_L, tokens.engine_logp_L, tokens.ref_logp_L,
        eps_low, eps_high, dual_clip, tis_cap, kl_coef, entropy_coef, with_entropy, temperature,
        start, group, reduce_hidden, chunk or 0, chosen, need_hidden, head_grad,
    )  # fmt: skip
    clip = _terms.Clip(eps_low, eps_high, dual_clip, tis_cap)
    entropies = entropy_L if entropy_coef or with_entropy else None
    loss, metrics = _terms.loss_and_metrics(logp_L, entropies, tokens, clip, kl_coef, entropy_coef)
    loss = loss.to(wide)
    own_head_grad = head_grad if main_grad is None else None
    if need_hidden or own_head_grad is not None:
        loss = torch.ops.metis_kernels.attach_gradients(
            loss, hidden_TH, head_VH, d_hidden if need_hidden else None, own_head_grad
        )
    return HdpoLoss(loss, metrics, logp_L, lse_L, entropies, live_L)


def _inverse(name: str, num: float | Tensor, device: torch.device) -> Tensor:
    """1 / num as a 0-d float64 tensor, 0 where num is 0."""
    if isinstance(num, Tensor):
        if num.numel() != 1:
            raise ValueError(f"{name}: expected one number, got a tensor of shape {list(num.shape)}")
        if num.dtype not in _COUNTS:
            got = str(num.dtype).removeprefix("torch.")
            raise ValueError(f"{name}: expected dtype int64, int32, float32 or float64, got {got}")
        if num.is_meta and device.type != "meta":
            raise ValueError(f"{name}: expected a tensor on {device} or another with data, got one on {num.device}")
        # looking costs nothing on the host; a graph under compilation has no values to look at
        if num.device.type == "cpu" and not torch.compiler.is_compiling() and bool(num < 0):
            raise ValueError(f"{name}: expected a number of tokens >= 0, got {num.item()}")
        value = num.detach().to(device, torch.float64).reshape(())
        return torch.where(value == 0, 0.0, 1 / value)
    if not (isinstance(num, Real) and num >= 0 and math.isfinite(num)):
        raise ValueError(f"{name}: expected a number of tokens >= 0, got {num!r}")
    return torch.full((), 1 / num if num else 0.0, dtype=torch.float64, device=device)


@torch.library.custom_op("metis_kernels::hdpo_loss", mutates_args=("head_grad",))
def _hdpo_loss(
    hidden: Tensor,
    head: Tensor,
    live: Tensor,
    targets: Tensor,
    anchor: Tensor | None,
    scaled_acc: Tensor,
    scaled_tool: Tensor,
    scaled_one: Tensor,
    old_logp: Tensor | None,
    engine_logp: Tensor | None,
    ref_logp: Tensor | None,
    eps_low: float,
    eps_high: float,
    dual_clip: float,
    tis_cap: float,
    kl_coef: float,
    entropy_coef: float,
    with_entropy: bool,
    temperature: float,
    vocab_start: int,
    group: str,
    reduce_hidden: bool,
    chunk: int,
    impl: str,
    need_hidden: bool,
    head_grad: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logp [L], lse [L], entropy [L], dHidden [T, H], or empty); adds dHead to head_grad."""
    # the local imports keep triton and the C++ library out of processes that do not use them
    if impl == "triton":
        from metis_kernels.hdpo_loss import triton as implementation
    elif impl == "cpu":
        from metis_kernels.hdpo_loss import cpu as implementation
    else:
        from metis_kernels.hdpo_loss import reference as implementation

    _check.indices("targets_T", targets, None if group else len(head))
    tokens = _terms.Tokens(scaled_acc, scaled_tool, scaled_one, old_logp, engine_logp, ref_logp)
    clip = _terms.Clip(eps_low, eps_high, dual_clip, tis_cap)
    # the rows that are not live stay 0; contiguous, whatever the strides of the hidden states
    d_hidden = hidden.new_zeros(hidden.shape) if need_hidden else hidden.new_empty(0)
    logp, lse, entropy = implementation.hdpo_loss(
        hidden,
        head,
        live,
        targets,
        anchor,
        tokens,
        clip,
        kl_coef,
        entropy_coef,
        with_entropy,
        temperature,
        vocab_start,
        group,
        chunk,
        d_hidden if need_hidden else None,
        head_grad,
    )
    if need_hidden and reduce_hidden:
        _shard.sum_over_ranks(d_hidden, _shard.resolve(group))
    return logp, lse, entropy, d_hidden


@_hdpo_loss.register_fake
def _(
    hidden: Tensor,
    head: Tensor,
    live: Tensor,
    targets: Tensor,
    anchor: Tensor | None,
    scaled_acc: Tensor,
    *arguments: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    need_hidden = arguments[-2]
    logp = torch.empty_like(scaled_acc)
    d_hidden = hidden.new_empty(hidden.shape) if need_hidden else hidden.new_empty(0)
    return logp, torch.empty_like(logp), torch.empty_like(logp), d_hidden


@torch.library.custom_op("metis_kernels::attach_gradients", mutates_args=())
def _attach_gradients(loss: Tensor, hidden: Tensor, head: Tensor, d_hidden: Tensor | None, d_head: Tensor | None) -> Tensor:
    """The loss, with gradients that were taken with it."""
    return loss.clone()


@_attach_gradients.register_fake
def _(loss: Tensor, hidden: Tensor, head: Tensor, d_hidden: Tensor | None, d_head: Tensor | None) -> Tensor:
    return torch.empty_like(loss)


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    _, _, head, d_hidden, d_head = inputs
    ctx.save_for_backward(d_hidden, d_head)
    ctx.head_dtype = head.dtype


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    d_hidden, d_head = ctx.saved_tensors

    def scaled(value: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        if value is None:
            return None
        # in place, then rounded: with a product of its own there would be a second float32 [V, H]
        return value.mul_(grad).to(dtype)

    return None, scaled(d_hidden, ctx.head_dtype), None if d_head is None else scaled(d_head, ctx.head_dtype), None, None


_attach_gradients.register_autograd(_backward, setup_context=_save)
