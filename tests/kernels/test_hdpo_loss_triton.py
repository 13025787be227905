"""`hdpo_loss` in Triton, interpreted: what is particular to the anchored softmax and its kernels.

Shape letters: T tokens, L live tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import triton
from contract.cases import Case, Options, call_loss, make_case, run_loss
from contract.compare import GRADIENT_TOLERANCE, check_loss, logp_tolerance, relative
from contract.truth import loss_truth
from torch import Tensor

from metis_kernels import _gemm
from metis_kernels.hdpo_loss import triton as hdpo
from metis_kernels.hdpo_loss._terms import Clip, Tokens
from metis_kernels.inspect.sanitizer import sanitize
from metis_kernels.inspect.tally import Counts, tally

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ALL_TERMS = Options(entropy_coef=0.1, kl_coef=0.2, tis_cap=1.1, temperature=1.3, loss_scale=3.0, dual_clip=1.3)
OPTIONS = {
    "paper": Options(),
    "temperature": Options(temperature=0.6),
    "kl_and_weight": Options(kl_coef=0.2, tis_cap=1.1),
    "all_terms": ALL_TERMS,
}


@pytest.fixture(autouse=True)
def _checked() -> Iterator[None]:
    """Bounds, double stores and honest bfloat16; and like a GPU, which does not warn of log 0 or of an overflow."""
    with np.errstate(all="ignore"), sanitize():
        yield


@pytest.fixture
def many_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a few hundred logits in as many blocks, and split over as many programs, as real ones."""
    monkeypatch.setattr(hdpo, "_BLOCK", 64)


@pytest.fixture
def product_flops(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """FLOPs of every matrix product that the op asks for, as they come. (A FlopCounterMode does not see into custom ops.)"""
    flops: list[int] = []
    multiply, accumulate = _gemm.multiply, _gemm.accumulate

    def counted_multiply(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
        flops.append(2 * a.shape[0] * a.shape[1] * b.shape[1])
        return multiply(a, b, out)

    def counted_accumulate(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
        flops.append(2 * a.shape[0] * a.shape[1] * b.shape[1])
        return accumulate(total, a, b)

    monkeypatch.setattr(_gemm, "multiply", counted_multiply)
    monkeypatch.setattr(_gemm, "accumulate", counted_accumulate)
    return flops


def exact_anchor(case: Case, temperature: float = 1.0) -> Tensor:
    return torch.logsumexp(case.hidden_TH.double() @ case.head_VH.double().T / temperature, -1).float()


# what a dtype rounds, and where, depends on no option but the entropy bonus, which is one of all terms
@pytest.mark.usefixtures("many_parts")
@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        pytest.param(options, dtype, id=f"{name} {dtype}")
        for name, options in OPTIONS.items()
        for dtype in (DTYPES if name in ("paper", "all_terms") else DTYPES[:1])
    ],
)
def test_split_rows_in_several_chunks_equal_float64(options: Options, dtype: torch.dtype):
    case = make_case(32, 24, 300, dtype, drift=0.5)
    main_grad = torch.zeros(case.head_VH.shape)  # float32: what the op computes, without a last rounding
    got = run_loss(case, "triton", options, chunk=13, main_grad=main_grad)
    check_loss(got, loss_truth(case, options), case, options)


@pytest.mark.usefixtures("many_parts")
@pytest.mark.parametrize("rows", [1, 63, 64, 65, 129])
def test_a_head_of_any_number_of_rows_equals_float64(rows: int):
    case = make_case(9, 24, rows, torch.float32)
    check_loss(run_loss(case, "triton", ALL_TERMS), loss_truth(case, ALL_TERMS), case, ALL_TERMS)


@pytest.mark.usefixtures("many_parts")
@pytest.mark.parametrize("loss_scale", [1e-6, 1e4])
def test_float16_gradients_of_the_head_neither_vanish_nor_overflow(loss_scale: float):
    # 1e-6 of a hidden state is below the smallest float16; dHidden, which is float16 itself, cannot help it
    options = Options(loss_scale=loss_scale)
    case = make_case(50, 24, 300, torch.float16)
    main_grad = torch.zeros(300, 24)
    run_loss(case, "triton", options, main_grad=main_grad)
    assert relative(main_grad, loss_truth(case, options).d_head_VH) <= 3e-3


# offsets, in nats, of the anchor from the log-sum-exp, row by row in turn
ANCHORS = {
    "exact": (0.0,),
    "drifted": (0.3, -0.3, 2.0, -2.0),
    "too_high": (90.0,),
    "too_low": (-70.0,),
    "overflow": (1e4, -1e4, 3e38, -3e38),
    "not_finite": (math.nan, math.inf, -math.inf),
    "some_bad": (0.0, 0.1, 100.0, 0.0, -100.0, math.nan, 0.2),
}


ENTROPY = Options(entropy_coef=0.1, kl_coef=0.2, temperature=0.7)


@pytest.mark.usefixtures("many_parts")
@pytest.mark.parametrize(
    ("options", "dtype"),
    [*((Options(), dtype) for dtype in DTYPES), (ENTROPY, torch.float32)],
    ids=[*map(str, DTYPES), "entropy"],
)
@pytest.mark.parametrize("offsets", ANCHORS.values(), ids=ANCHORS)
def test_no_anchor_changes_a_result(offsets: tuple[float, ...], options: Options, dtype: torch.dtype):
    case = make_case(14, 24, 100, dtype)
    offset_T = torch.tensor([offsets[i % len(offsets)] for i in range(14)])
    anchor = exact_anchor(case, options.temperature) + offset_T
    main_grad = torch.zeros(case.head_VH.shape)
    got = run_loss(case, "triton", options, anchor_T=anchor, chunk=8, main_grad=main_grad)
    want = loss_truth(case, options)
    # eight rows do not average bfloat16's rounding of E and of v X: up to 3.2e-3 was seen, so its unit roundoff is the limit
    limit = 2.0**-8 if dtype == torch.bfloat16 else GRADIENT_TOLERANCE[dtype]
    assert float((got.output.logp_L - want.head.logp_T[got.output.live_L]).abs().max()) <= logp_tolerance(want.head.peak, dtype)
    assert relative(got.d_hidden_TH, want.d_hidden_TH) <= limit
    assert relative(main_grad, want.d_head_VH) <= limit


@pytest.mark.parametrize("kept", ["old_logp_T", "engine_logp_T", None])
def test_without_an_anchor_any_log_probabilities_or_none_will_do(kept: str | None):
    case = make_case(21, 24, 150, torch.float32)
    case = replace(case, **{name: None for name in ("old_logp_T", "engine_logp_T") if name != kept})
    with tally() as counts:
        got = run_loss(case, "triton")
    check_loss(got, loss_truth(case), case)
    # a second read of the logits only where there is nothing to guess from
    assert ("row_logsumexp" in counts.kernels) == (kept is None)


def test_only_rows_with_a_bad_anchor_run_again(product_flops: list[int]):
    case = make_case(40, 24, 150, torch.float32, masked=0.0, quiet=0.0)
    anchor = exact_anchor(case)
    anchor[[3, 17, 18]] += 60
    run_loss(case, "triton", anchor_T=anchor)
    assert product_flops == 3 * [2 * 40 * 24 * 150] + 3 * [2 * 3 * 24 * 150]


@pytest.mark.parametrize(("of_hidden", "of_head"), [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("options", [Options(), ALL_TERMS], ids=["paper", "all_terms"])
def test_a_gradient_that_nobody_needs_costs_no_product(
    of_hidden: bool, of_head: bool, options: Options, product_flops: list[int]
):
    case = make_case(20, 24, 150, torch.float32)
    hidden = case.hidden_TH.clone().requires_grad_(of_hidden)
    head = case.head_VH.clone().requires_grad_(of_head)
    output = call_loss(case, hidden, head, "triton", options)
    assert product_flops == (1 + of_hidden + of_head) * [2 * len(output.live_L) * 24 * 150]
    truth = loss_truth(case, options)
    torch.testing.assert_close(output.loss.detach().double(), truth.loss, rtol=1e-5, atol=1e-6)
    if of_hidden or of_head:
        output.loss.backward()
    for leaf, want in ((hidden, truth.d_hidden_TH), (head, truth.d_head_VH)):
        if leaf.requires_grad:
            assert leaf.grad is not None and relative(leaf.grad, want) <= 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("anchored", [True, False])
def test_a_row_without_a_coefficient_gives_bitwise_zero(dtype: torch.dtype, anchored: bool):
    case = make_case(24, 24, 150, dtype, masked=0.0, quiet=0.0)
    # in turn: above the upper bound with A > 0; below the lower one with A < 0; A = -0.0; a ratio of 1
    sign = torch.tensor([1.0, -1.0, -0.0, 1.0]).repeat(6)
    log_ratio = torch.tensor([1.0, -1.0, 0.0, 0.0]).repeat(6)
    old_logp = loss_truth(case).head.logp_T.float() - log_ratio
    case = replace(case, adv_acc_T=sign, adv_tool_T=sign, old_logp_T=old_logp)
    got = run_loss(case, "triton", live_L=torch.arange(24), anchor_T=exact_anchor(case) if anchored else None)
    bits = got.d_hidden_TH.view(torch.int32 if dtype == torch.float32 else torch.int16).reshape(6, 4, 24)
    assert (bits[:, :3] == 0).all()
    assert (bits[:, 3] != 0).all(1).all()


def test_rows_without_a_coefficient_leave_main_grad_as_it_was():
    case = make_case(30, 24, 150, torch.float16, masked=0.0)
    case.adv_acc_T.zero_()
    case.adv_tool_T.zero_()
    before = torch.randn(150, 24)
    main_grad = before.clone()
    run_loss(case, "triton", live_L=torch.arange(30), main_grad=main_grad)
    assert torch.equal(main_grad, before)


@pytest.mark.parametrize("options", [Options(), Options(entropy_coef=0.1)], ids=["paper", "entropy"])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_hidden_state_that_is_not_finite_is_seen_in_its_row_and_in_the_head(
    dtype: torch.dtype, poison: float, options: Options
):
    case = make_case(12, 24, 150, dtype, masked=0.0, quiet=0.0)
    case.hidden_TH[5, 7] = poison
    got = run_loss(case, "triton", options, anchor_T=torch.full((12,), 5.0))
    others = torch.arange(12) != 5
    assert not got.output.logp_L[5].isfinite() and not got.output.loss.isfinite()
    assert got.output.logp_L[others].isfinite().all()
    assert got.d_hidden_TH[5].isnan().all() and got.d_hidden_TH[others].isfinite().all()
    assert got.d_head_VH.isnan().all()


def on_meta(dtype: torch.dtype, num: int, size: int, vocab: int, options: Options, chunk: int) -> None:
    """The host code on tensors without data."""

    def vector(kind: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(num, dtype=kind, device="meta")

    hidden, head = (torch.empty(rows, size, dtype=dtype, device="meta") for rows in (num, vocab))
    tokens = Tokens(vector(), vector(), vector(), vector(), vector(), vector())
    clip = Clip(options.eps_low, options.eps_high, options.dual_clip, options.tis_cap)
    hdpo.hdpo_loss(
        hidden, head, vector(torch.int64), vector(torch.int64), None, tokens, clip, options.kl_coef, options.entropy_coef,
        False, options.temperature, 0, "", chunk, torch.empty_like(hidden), torch.empty_like(head, dtype=torch.float32),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES)
def test_host_code_asks_nothing_of_the_device_and_keeps_to_the_limits_of_a_grid(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    launches: list[tuple[str, tuple[int, ...]]] = []

    def record(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        launches.append((kernel.fn.__name__, grid))

    monkeypatch.setattr(hdpo, "launch", record)
    on_meta(dtype, 100_000, 4096, 151_936, ALL_TERMS, chunk=70_000)
    names = [name for name, _ in launches]
    chunk = ["anchored_rows", "row_gradients", "entropy_rows", "scale_rows", "scale_rows"]
    assert names == ["target_logits", *chunk, *chunk]
    for name, grid in launches:
        assert all(programs <= 65535 for programs in grid[1:]), name  # of x there are 2^31 - 1
    assert dict(launches[1:6])["anchored_rows"] == (70_000, 1)


@pytest.mark.usefixtures("many_parts")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [Options(), ALL_TERMS], ids=["paper", "all_terms"])
def test_bytes_and_exponentials_are_those_of_the_docstrings(options: Options, dtype: torch.dtype):
    size, vocab, num = 20, 150, 8
    case = make_case(num, size, vocab, dtype, masked=0.0, quiet=0.0, drift=0.01)
    main_grad = torch.zeros(vocab, size)
    with tally() as counted:
        run_loss(case, "triton", options, main_grad=main_grad)
    width, parts, blocks = dtype.itemsize, 3, 3
    terms = options is ALL_TERMS
    statistics = 3 if terms else 2
    stored, fixed = (0, 0) if terms else (width, 1)  # with an entropy bonus the row pass stores no E
    unit = 4 if dtype == torch.float16 else 0
    want = {
        "target_logits": Counts(1, num * (2 * width * size + 16), num * 4),
        "anchored_rows": Counts(
            1, num * (4 * vocab + 12 * parts + 4), num * (stored * vocab + 4 * statistics * parts), exps=num * 64 * blocks
        ),
        "row_gradients": Counts(
            1,
            num * (4 * statistics * parts + 12 + 4 + 8 * fixed + 12 * terms),
            num * (12 + 16 * terms + 1 + width * fixed),
        ),
        "scale_rows": Counts(2, num * (size * (width + 4) + 4 + 4 + 8 + unit), num * 2 * width * size),
    }
    if terms:
        want["entropy_rows"] = Counts(1, num * (4 * vocab + 28 * blocks), num * width * vocab, exps=num * 64 * blocks)
    assert set(counted.kernels) == set(want)
    for name, counts in want.items():
        got = counted.kernels[name]
        assert (got.launches, got.load_bytes, got.store_bytes) == (counts.launches, counts.load_bytes, counts.store_bytes), name
        if counts.exps:
            assert got.exps == counts.exps, name


@pytest.mark.usefixtures("many_parts")
def test_an_exact_anchor_costs_one_more_read_of_the_logits():
    size, vocab, num, parts = 20, 150, 8, 3
    case = replace(make_case(num, size, vocab, masked=0.0, quiet=0.0), old_logp_T=None, engine_logp_T=None)
    with tally() as counted:
        run_loss(case, "triton")
    got = counted.kernels["row_logsumexp"]
    assert (got.load_bytes, got.store_bytes) == (num * 4 * vocab, num * 4 * parts)
    assert got.exps == num * (64 + 1) * triton.cdiv(vocab, 64)
