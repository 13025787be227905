"""How far a result may be from the truth."""

from __future__ import annotations

import torch
from torch import Tensor

from contract.cases import Case, Options, Result
from contract.truth import HeadTruth, LossTruth

GRADIENT_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 3e-3, torch.float16: 3e-3}
"""Relative Frobenius error of dHidden and dHead, by the dtype of the inputs."""
ROW_TOLERANCE = 1e-2
"""Of every row by itself, so that no small row hides behind large ones."""
ROUNDING_FLOOR = 0.02
"""Of |g| |head|: times the float32 tolerance, three roundings of a float32 p."""
SMALLEST_ROW = 1e-6
"""Rows whose norm is below this share of the largest one are not looked at one by one."""
SAME = 1e-6
"""Relative difference that float32 results may have where only the order of sums differs."""


def relative(got: Tensor, want: Tensor) -> float:
    """Frobenius norm of the difference over that of `want`; the norm itself where `want` is 0."""
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).norm()) / (float(want.norm()) or 1.0)


def logp_tolerance(peak: float, dtype: torch.dtype) -> float:
    """Absolute, in nats. A float32 logit of size `peak` is itself only that exact."""
    return 1e-12 * max(1, peak) if dtype == torch.float64 else 1e-5 * max(1, peak / 16) + 2e-6


def truncation(peak: float, hidden: Tensor) -> float:
    """Absolute, in nats, on top of `logp_tolerance`: what a GPU's tensor cores lose of a logit of size `peak`.

    They add 16 products at a time to a float32 sum and cut the rest off: half a unit of 2^-23 a time, of a sum that is half of
    the logit on the way.
    """
    return hidden.shape[1] / 16 * 2.0**-24 * peak / 2 if hidden.is_cuda and hidden.dtype != torch.float32 else 0.0


def check_head(
    logp: Tensor, entropy: Tensor | None, lse: Tensor, want: HeadTruth, dtype: torch.dtype, more: float = 0.0
) -> None:
    """Log-probability, entropy (if there is one) and log-sum-exp of the same tokens as the truth's. more: see `truncation`."""
    limit = logp_tolerance(want.peak, dtype) + more
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert logp.dtype == lse.dtype == wide
    torch.testing.assert_close(logp.double(), want.logp_T, rtol=0, atol=limit)
    torch.testing.assert_close(lse.double(), want.lse_T, rtol=0, atol=limit)
    if entropy is not None:
        torch.testing.assert_close(entropy.double(), want.entropy_T, rtol=1e-5, atol=limit)


def check_loss(
    got: Result, want: LossTruth, case: Case, options: Options | None = None, smallest_row: float = SMALLEST_ROW
) -> None:
    """Log-probabilities, loss and both gradients of a call against the truth."""
    options = options or Options()
    dtype = case.hidden_TH.dtype
    live = got.output.live_L
    head = HeadTruth(want.head.logp_T[live], want.head.entropy_T[live], want.head.lse_T[live], want.head.peak)
    more = truncation(want.head.peak, case.hidden_TH)
    check_head(got.output.logp_L, got.output.entropy_L, got.output.lse_L, head, dtype, more)
    # the loss is a sum of terms of both signs, and each is as exact as its log-probability
    size = float(want.g_T.abs().sum()) * (logp_tolerance(want.head.peak, dtype) + more)
    torch.testing.assert_close(got.output.loss.double(), want.loss, rtol=1e-6, atol=max(size, 1e-15))
    # below this a gradient is what is left where p = 1: nothing but the rounding of (p - 1) is to be seen
    g = want.g_T.double() / options.temperature
    floor_hidden = ROUNDING_FLOOR * float(g.norm()) * float(case.head_VH.double().norm(dim=1).max())
    floor_head = ROUNDING_FLOOR * float((g[:, None] * case.hidden_TH.double()).norm()) if len(g) else 0.0
    check_gradient("dHidden", got.d_hidden_TH, want.d_hidden_TH, dtype, floor_hidden, smallest_row)
    check_gradient("dHead", got.d_head_VH, want.d_head_VH, dtype, floor_head, smallest_row)


def check_gradient(
    name: str, got: Tensor, want: Tensor, dtype: torch.dtype, floor: float = 0.0, smallest_row: float = SMALLEST_ROW
) -> None:
    """A matrix as a whole and each of its rows.

    floor: a norm of the whole below which errors are not counted relative to it. smallest_row: as SMALLEST_ROW.
    """
    difference = got.detach().double() - want
    limit = GRADIENT_TOLERANCE[dtype]
    error, size = float(difference.norm()), max(float(want.norm()), floor)
    assert error <= limit * size, f"{name}: relative error {error / (size or 1):.2e}, allowed {limit:.0e}"
    row_error, row_size = difference.norm(dim=1), want.norm(dim=1)
    counted = row_size > smallest_row * row_size.amax(0, keepdim=True) if len(row_size) else row_size > 0
    worst = float((row_error[counted] / row_size[counted]).max()) if counted.any() else 0.0
    assert worst <= ROW_TOLERANCE, f"{name}: a row has relative error {worst:.2e}, allowed {ROW_TOLERANCE:.0e}"
