"""`hdpo_loss`, every implementation: values and gradients against float64 autograd, and what must not change them.

Shape letters: T tokens, L live tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from contract.cases import CPU, IMPLS, SHAPES, Case, Chosen, Options, Result, call_loss, make_case, run_loss
from contract.compare import SAME, check_gradient, check_loss, relative
from contract.truth import loss_truth

OPTIONS: dict[str, Options] = {
    "paper": Options(),
    "grpo": Options(w_tool=0.0),
    "efficiency_only": Options(w_acc=0.0, w_tool=1.0),
    "wide_upper_clip": Options(eps_low=0.1, eps_high=0.5),
    "dual_clip_low": Options(dual_clip=1.3),
    "dual_clip_off": Options(dual_clip=math.inf),
    "temperature": Options(temperature=0.7),
    "loss_scale": Options(loss_scale=1024.0),
    "entropy": Options(entropy_coef=0.1),
    "kl": Options(kl_coef=0.2),
    "importance_weight": Options(tis_cap=1.1),
    "entropy_alone": Options(w_acc=0.0, w_tool=0.0, entropy_coef=0.1),
    "all_terms": Options(entropy_coef=0.1, kl_coef=0.2, tis_cap=1.1, temperature=1.3, loss_scale=3.0, dual_clip=1.3),
}


@pytest.fixture(params=IMPLS)
def impl(request: pytest.FixtureRequest) -> Chosen:
    return request.param


def check_same(got: Result, want: Result) -> None:
    """Two ways to the same result, float32: equal but for the order of sums."""
    assert relative(got.output.loss, want.output.loss) <= SAME
    assert relative(got.d_hidden_TH, want.d_hidden_TH) <= SAME
    assert relative(got.d_head_VH, want.d_head_VH) <= SAME


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_value_and_gradients_equal_float64_at_every_shape(impl: Chosen, shape: tuple[int, int, int], dtype: torch.dtype):
    case = make_case(*shape, dtype)
    got = run_loss(case, impl)
    assert got.d_hidden_TH.dtype == got.d_head_VH.dtype == dtype
    check_loss(got, loss_truth(case), case)


@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        *(pytest.param(one, torch.float32, id=f"{name} float32") for name, one in OPTIONS.items()),
        *(
            pytest.param(OPTIONS[name], torch.bfloat16, id=f"{name} bfloat16")
            for name in ("paper", "entropy_alone", "all_terms")
        ),
    ],
)
def test_every_option_equals_float64(impl: Chosen, options: Options, dtype: torch.dtype):
    case = make_case(31, 32, 252, dtype, drift=0.5)
    # float32: a bfloat16 dHead would add a third rounding to those of p and of the scaled hidden states
    check_loss(run_loss(case, impl, options, main_grad=torch.zeros(252, 32)), loss_truth(case, options), case, options)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_reference_computes_float64_in_float64(options: Options):
    case = make_case(63, 32, 252, torch.float64, drift=0.5)
    check_loss(run_loss(case, "reference", options), loss_truth(case, options), case, options)


def test_the_gradient_of_a_token_sums_to_zero_over_the_vocabulary(impl: Chosen):
    # a head column of ones makes that column of dHidden the sum over the vocabulary of dL/dz
    case = make_case(63, 32, 1000, torch.bfloat16)
    case.head_VH[:, 7] = 1.0
    got = run_loss(case, impl)
    assert (got.d_hidden_TH[:, 7].double().abs() <= 2**-8 * loss_truth(case).g_T.abs() + 1e-12).all()


@pytest.mark.parametrize("edge", [0, 15, 16, 63, 64, 127, 128, 255, 256, 511, 512, 999])
def test_a_target_at_an_edge_of_a_tile_gets_its_gradient(impl: Chosen, edge: int):
    case = replace(make_case(3, 32, 1000, masked=0.0, quiet=0.0), targets_T=torch.full((3,), edge), old_logp_T=None)
    check_loss(run_loss(case, impl), loss_truth(case), case)


@pytest.mark.parametrize("shift", [-80.0, 80.0])
def test_a_shift_of_all_logits_changes_nothing(impl: Chosen, shift: float):
    case = make_case(63, 31, 252)
    want = loss_truth(case)
    column = torch.full((len(case.head_VH), 1), shift)
    wider = replace(
        case,
        hidden_TH=torch.cat([case.hidden_TH, torch.ones(63, 1)], 1),
        head_VH=torch.cat([case.head_VH, column], 1),
    )
    got = run_loss(wider, impl)
    assert relative(got.output.loss, want.loss) <= 1e-4
    # a float32 logit of 80 is exact to 4e-6, which is the relative error of p
    check_gradient("dHidden", got.d_hidden_TH[:, :31], want.d_hidden_TH, torch.float32)
    check_gradient("dHead", got.d_head_VH[:, :31], want.d_head_VH, torch.float32)


@pytest.mark.parametrize("scale", [30.0, 1000.0])
@pytest.mark.parametrize("on_policy", [False, True])
def test_huge_logits_stay_finite_and_exact(impl: Chosen, scale: float, on_policy: bool):
    case = make_case(63, 32, 252, torch.float64, scale=scale, drift=0.1)
    # numbers of few bits: float32 sums of their products are exact, so the truth's logits are the same
    case = replace(
        case,
        hidden_TH=(case.hidden_TH * 8).round().float() / 8,
        head_VH=(case.head_VH * 8).round().float() / 8,
        adv_acc_T=case.adv_acc_T.float(),
        adv_tool_T=case.adv_tool_T.float(),
        engine_logp_T=None,
        ref_logp_T=None,
    )
    z = case.hidden_TH.double() @ case.head_VH.double().T
    logp = torch.log_softmax(z, -1).gather(1, case.targets_T.clamp(min=0)[:, None])[:, 0]
    old = None if on_policy else (logp - 0.1 * torch.sin(torch.arange(63.0))).float()
    case = replace(case, old_logp_T=old)
    want = loss_truth(case)
    assert want.head.peak > 3 * scale
    got = run_loss(case, impl)
    live = got.output.live_L
    # the old log-probability is a float32 number of this size too, so the ratio is only this exact
    exact = 1e-6 * want.head.peak
    torch.testing.assert_close(got.output.logp_L.double(), want.head.logp_T[live], rtol=0, atol=exact)
    error = (got.d_hidden_TH.double() - want.d_hidden_TH).norm() / want.d_hidden_TH.norm()
    assert error <= exact


def test_tokens_without_a_coefficient_get_exactly_no_gradient(impl: Chosen):
    case = make_case(130, 32, 252, torch.bfloat16)
    want = loss_truth(case)
    got = run_loss(case, impl)
    still = want.g_T == 0
    clipped = still & case.live_T
    assert clipped.sum() > 5  # live, but both surrogates are clipped
    assert (still & ~case.live_T).sum() > 5  # masked, or no advantage
    assert (got.d_hidden_TH[still].view(torch.int16) == 0).all()  # every bit: not even -0
    assert (got.d_hidden_TH[~still] != 0).any(1).all()


def test_only_live_tokens_run(impl: Chosen):
    case = make_case(63, 32, 252)
    got = run_loss(case, impl).output
    assert got.live_L.tolist() == case.live_T.nonzero()[:, 0].tolist()
    # an entropy or KL term concerns every sampled token
    got = run_loss(case, impl, Options(entropy_coef=0.1)).output
    assert got.live_L.tolist() == case.mask_T.nonzero()[:, 0].tolist()


def test_what_stands_in_dead_tokens_is_never_read(impl: Chosen):
    case = make_case(63, 32, 252)
    clean = run_loss(case, impl)
    dead = ~case.live_T
    assert case.old_logp_T is not None
    hidden, old = case.hidden_TH.clone(), case.old_logp_T.clone()
    hidden[dead], old[dead] = math.nan, math.nan
    got = run_loss(replace(case, hidden_TH=hidden, old_logp_T=old), impl)
    assert torch.equal(got.output.loss, clean.output.loss)
    assert torch.equal(got.d_hidden_TH, clean.d_hidden_TH)
    assert torch.equal(got.d_head_VH, clean.d_head_VH)


def test_given_live_tokens_equal_those_that_the_op_finds(impl: Chosen):
    case = make_case(63, 32, 252)
    found, given = run_loss(case, impl), run_loss(case, impl, live_L=case.live_T.nonzero()[:, 0])
    assert torch.equal(given.output.loss, found.output.loss)
    assert torch.equal(given.d_hidden_TH, found.d_hidden_TH)
    assert torch.equal(given.d_head_VH, found.d_head_VH)


def test_live_tokens_given_beyond_the_mask_change_nothing(impl: Chosen):
    case = make_case(63, 32, 252)
    case = replace(case, targets_T=case.targets_T.clamp(min=0))
    check_same(run_loss(case, impl, live_L=torch.arange(63)), run_loss(case, impl))


def test_no_mask_means_every_token(impl: Chosen):
    case = make_case(63, 32, 252, masked=0.0)
    args = (case.hidden_TH, case.head_VH, impl)
    assert torch.equal(call_loss(replace(case, mask_T=None), *args).loss, call_loss(case, *args).loss)  # pyright: ignore[reportArgumentType]


# A Qwen3-VL vocabulary in the interpreter would take minutes; tests/kernels/test_gpu.py runs it on a GPU.
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vast_impl", ["reference", CPU])
def test_is_exact_at_the_real_vocabulary(vast_impl: Chosen, dtype: torch.dtype):
    case = make_case(48, 64, 151936, dtype, scale=2.0)
    want = loss_truth(case)
    got = run_loss(case, vast_impl, main_grad=torch.zeros(151936, 64))
    live = got.output.live_L
    assert (got.output.logp_L.double() - want.head.logp_T[live]).abs().max() <= 1e-5
    check_loss(got, want, case)


@pytest.mark.parametrize("num_tokens", [0, 63])
@pytest.mark.parametrize(
    "options", [Options(), Options(entropy_coef=0.1, kl_coef=0.1, tis_cap=1.0)], ids=["paper", "all_terms"]
)
def test_no_live_token_gives_exactly_zero_and_leaves_main_grad_alone(impl: Chosen, num_tokens: int, options: Options):
    case = make_case(num_tokens, 32, 252, masked=1.0)
    case = replace(case, mask_T=torch.zeros(num_tokens, dtype=torch.bool))
    main_grad = torch.randn(252, 32)
    before = main_grad.clone()
    got = run_loss(case, impl, options, main_grad=main_grad)
    assert got.output.loss.item() == 0
    assert (got.d_hidden_TH == 0).all()
    assert torch.equal(main_grad, before)
    assert (run_loss(case, impl, options).d_head_VH == 0).all()
    assert float(got.output.metrics.num_live) == 0
    assert float(got.output.metrics.ratio_min) == float(got.output.metrics.ratio_max) == 1


@pytest.mark.parametrize("position", [0, 40, 62])
def test_one_live_token_equals_float64(impl: Chosen, position: int):
    case = make_case(63, 32, 252, masked=0.0, quiet=0.0)
    alone = replace(case, mask_T=torch.arange(63) == position, old_logp_T=None)
    check_loss(run_loss(alone, impl), loss_truth(alone), alone)


@pytest.mark.parametrize("chunk", [1, 7, 16, 64, 1000])
def test_the_chunk_does_not_matter(impl: Chosen, chunk: int):
    case = make_case(63, 32, 252)
    check_same(run_loss(case, impl, chunk=chunk), run_loss(case, impl))


@pytest.mark.parametrize("impl", [CPU, "triton"])  # the reference leaves its sums to torch.mm
def test_chunks_of_whole_panels_give_dhidden_the_same_bits(impl: Chosen):
    case = make_case(96, 32, 252, masked=0.0, quiet=0.0)
    whole = run_loss(case, impl, chunk=96)
    for chunk in (32, 64):
        parts = run_loss(case, impl, chunk=chunk)
        assert torch.equal(parts.d_hidden_TH, whole.d_hidden_TH), chunk
        assert torch.equal(parts.output.logp_L, whole.output.logp_L), chunk


def test_the_order_of_tokens_does_not_matter(impl: Chosen):
    case = make_case(128, 32, 252, masked=0.0, quiet=0.0)
    order = torch.randperm(128, generator=torch.Generator().manual_seed(1))
    straight, shuffled = run_loss(case, impl, chunk=128), run_loss(case.take(order), impl, chunk=128)
    assert torch.equal(shuffled.d_hidden_TH, straight.d_hidden_TH[order])
    assert relative(shuffled.d_head_VH, straight.d_head_VH) <= SAME
    assert relative(shuffled.output.loss, straight.output.loss) <= SAME


@pytest.mark.parametrize("cuts", [(0, 31, 63), (0, 1, 2, 40, 63)])
def test_a_split_into_micro_batches_does_not_matter(impl: Chosen, cuts: tuple[int, ...]):
    case = make_case(63, 32, 252)
    whole = run_loss(case, impl, main_grad=torch.zeros(252, 32))
    main_grad = torch.zeros(252, 32)
    parts = [
        run_loss(case.take(torch.arange(start, end)), impl, main_grad=main_grad) for start, end in itertools.pairwise(cuts)
    ]
    assert relative(sum((part.output.loss for part in parts), torch.zeros(())), whole.output.loss) <= SAME
    assert relative(torch.cat([part.d_hidden_TH for part in parts]), whole.d_hidden_TH) <= SAME
    assert relative(main_grad, whole.d_head_VH) <= SAME


@pytest.mark.parametrize(
    ("off_by", "dtype"),
    [
        *((off_by, torch.float32) for off_by in (0.0, 5.0, -5.0, 100.0, -1e4)),
        *((off_by, torch.bfloat16) for off_by in (0.0, -100.0, 1e4)),
    ],
)
def test_an_anchor_however_bad_changes_no_result(impl: Chosen, off_by: float, dtype: torch.dtype):
    case = make_case(31, 32, 252, dtype)
    want = loss_truth(case)
    anchor = (want.head.lse_T + off_by).float()
    check_loss(run_loss(case, impl, anchor_T=anchor), want, case)


@pytest.mark.parametrize("off_by", [100.0, -1e4])
def test_bad_anchors_change_no_result_with_all_terms_on(impl: Chosen, off_by: float):
    options = OPTIONS["all_terms"]
    case = make_case(21, 32, 252)
    want = loss_truth(case, options)
    # good ones beside them, in the same products with the head
    anchor = (want.head.lse_T + off_by * (torch.arange(21) % 2)).float()
    check_loss(run_loss(case, impl, options, anchor_T=anchor), want, case, options)


def test_one_bad_anchor_among_good_ones_changes_no_result(impl: Chosen):
    case = make_case(130, 32, 252, torch.bfloat16)
    want = loss_truth(case)
    anchor = want.head.lse_T.float()
    anchor[case.live_T.nonzero()[3]] += 200
    anchor[case.live_T.nonzero()[50]] -= 200
    check_loss(run_loss(case, impl, anchor_T=anchor, chunk=32), want, case)


# numpy, in which Triton's interpreter computes, warns of what a GPU does in silence
@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_anchor_that_is_no_number_changes_no_result(impl: Chosen, bad: float):
    case = make_case(63, 32, 252)
    want = loss_truth(case)
    anchor = want.head.lse_T.float()
    anchor[case.live_T.nonzero()[3]] = bad
    check_loss(run_loss(case, impl, anchor_T=anchor), want, case)


def test_a_bad_anchor_adds_to_main_grad_once(impl: Chosen):
    case = make_case(63, 32, 252)
    want = loss_truth(case)
    main_grad = torch.zeros(252, 32)
    run_loss(case, impl, anchor_T=(want.head.lse_T + 100).float(), main_grad=main_grad)
    check_gradient("main_grad", main_grad, want.d_head_VH, torch.float32)


def test_without_an_anchor_old_log_probabilities_far_off_change_no_result(impl: Chosen):
    # the guess of an anchor is made from them
    case = make_case(63, 32, 252)
    assert case.old_logp_T is not None
    case = replace(case, old_logp_T=case.old_logp_T + 200 * torch.sin(torch.arange(63.0)))
    check_loss(run_loss(case, impl), loss_truth(case), case)


def test_on_policy_the_ratio_is_exactly_one(impl: Chosen):
    case = replace(make_case(63, 32, 252), old_logp_T=None)
    got = run_loss(case, impl)
    assert float(got.output.metrics.ratio_min) == float(got.output.metrics.ratio_max) == 1
    assert float(got.output.metrics.sum_kl) == 0
    assert float(got.output.metrics.num_clipped_acc) == float(got.output.metrics.num_clipped_tool) == 0
    check_loss(got, loss_truth(case), case)


def test_own_log_probabilities_as_old_ones_are_the_same_as_none(impl: Chosen):
    case = replace(make_case(63, 32, 252), old_logp_T=None)
    anchor = loss_truth(case).head.lse_T.float()
    without = run_loss(case, impl, anchor_T=anchor)
    own = torch.zeros(63).index_put((without.output.live_L,), without.output.logp_L)
    given = run_loss(replace(case, old_logp_T=own), impl, anchor_T=anchor)
    assert torch.equal(given.output.logp_L, without.output.logp_L)
    assert float(given.output.metrics.ratio_min) == float(given.output.metrics.ratio_max) == 1
    check_same(given, without)


def test_a_ratio_of_one_is_inside_bounds_of_one(impl: Chosen):
    # eps 0: both bounds are 1, which is exactly the ratio on policy
    options = Options(eps_low=0.0, eps_high=0.0)
    case = replace(make_case(63, 32, 252), old_logp_T=None)
    got = run_loss(case, impl, options)
    check_loss(got, loss_truth(case, options), case, options)
    assert (got.d_hidden_TH[case.live_T] != 0).any(1).all()


def at_ratio(case: Case, log_ratio: float) -> Case:
    """The case with every token's log-ratio at this value."""
    return replace(case, old_logp_T=(loss_truth(case).head.logp_T - log_ratio).to(case.adv_acc_T.dtype))


HAIR = 1e-4
"""Relative distance from a bound: far above a float32 log-probability's error, so that the side is certain."""


@pytest.mark.parametrize(
    ("bound", "sign", "inside"),
    [
        (0.8, -1, 1 + HAIR),
        (0.8, -1, 1 - HAIR),
        (1.2, 1, 1 - HAIR),
        (1.2, 1, 1 + HAIR),
        (3.0, -1, 1 - HAIR),
        (3.0, -1, 1 + HAIR),
    ],
    ids=["above_low", "below_low", "below_high", "above_high", "below_dual_clip", "above_dual_clip"],
)
def test_a_hair_beside_a_bound_the_gradient_is_on_or_off(impl: Chosen, bound: float, sign: int, inside: float):
    case = make_case(63, 32, 252, masked=0.0, quiet=0.0)
    case = replace(case, adv_acc_T=sign * case.adv_acc_T.abs(), adv_tool_T=sign * case.adv_tool_T.abs())
    case = at_ratio(case, math.log(bound * inside))
    got = run_loss(case, impl)
    on = {0.8: inside > 1, 1.2: inside < 1, 3.0: inside < 1}[bound]
    assert bool((got.d_hidden_TH != 0).any(1).all() if on else (got.d_hidden_TH == 0).all())
    check_loss(got, loss_truth(case), case)


@pytest.mark.parametrize(("sign", "bound"), [(1, "high"), (-1, "low"), (-1, "dual")])
def test_the_bounds_are_inside(sign: int, bound: str):
    # float64, where a log-ratio can be had whose exponential is the bound to the last bit
    case = make_case(21, 32, 252, torch.float64, masked=0.0, quiet=0.0)
    case = replace(case, adv_acc_T=sign * case.adv_acc_T.abs(), adv_tool_T=sign * case.adv_tool_T.abs())
    own = run_loss(replace(case, old_logp_T=None), "reference").output.logp_L
    case = replace(case, old_logp_T=own - {"high": 0.25, "low": -0.25, "dual": 1.0}[bound])
    assert case.old_logp_T is not None
    # ratios that should be equal differ in their last bits: the bound is that of each token in turn
    ratios = (own - case.old_logp_T).exp().tolist()
    hair = 1e-12
    checked = 0
    for i, ratio in enumerate(ratios):
        at_bound, outside = {
            "high": (Options(eps_high=ratio - 1), Options(eps_high=ratio - 1 - hair)),
            "low": (Options(eps_low=1 - ratio), Options(eps_low=1 - ratio - hair)),
            "dual": (Options(dual_clip=ratio), Options(dual_clip=ratio - hair)),
        }[bound]
        if ratio not in (1 + at_bound.eps_high, 1 - at_bound.eps_low, at_bound.dual_clip):
            continue  # 1 + eps is rounded: not every ratio can be a bound
        checked += 1
        assert (run_loss(case, "reference", at_bound).d_hidden_TH[i] != 0).any()
        assert (run_loss(case, "reference", outside).d_hidden_TH[i] == 0).all()
    assert checked > 10


@pytest.mark.parametrize("log_ratio", [-25.0, -19.0, 19.0, 25.0])
def test_beyond_20_nats_the_ratio_stands_still_and_gives_no_gradient(impl: Chosen, log_ratio: float):
    # no bounds: the limit of 20 nats acts alone
    options = Options(eps_low=1.0, eps_high=1e12, dual_clip=math.inf)
    case = at_ratio(make_case(63, 32, 252), log_ratio)
    want = loss_truth(case, options)
    got = run_loss(case, impl, options)
    assert bool((got.d_hidden_TH == 0).all()) == (abs(log_ratio) > 20)
    # exp(19) of a float32 difference of numbers of size 25: relative error 25 * 2^-23
    torch.testing.assert_close(got.output.loss.double(), want.loss, rtol=2e-5, atol=0)
    assert relative(got.d_hidden_TH, want.d_hidden_TH) <= 2e-5


def test_an_empty_efficiency_set_gives_exactly_the_accuracy_loss(impl: Chosen):
    case = make_case(63, 32, 252)
    empty = replace(case, adv_tool_T=torch.zeros(63), num_tool=0.0)
    got = run_loss(empty, impl)
    assert got.output.loss.isfinite()
    assert float(got.output.metrics.loss_tool) == 0
    check_same(got, run_loss(empty, impl, Options(w_tool=0.0)))


def test_denominators_may_be_tensors(impl: Chosen):
    case = make_case(63, 32, 252)
    as_tensors = replace(case, num_acc=torch.tensor(int(case.num_acc)), num_tool=torch.tensor([case.num_tool]))  # pyright: ignore[reportArgumentType]
    assert torch.equal(run_loss(as_tensors, impl).d_head_VH, run_loss(case, impl).d_head_VH)
    none = replace(case, num_acc=torch.tensor(0), num_tool=torch.tensor(0))  # pyright: ignore[reportArgumentType]
    assert run_loss(none, impl).output.loss.item() == 0


def test_metrics_equal_their_formulas(impl: Chosen):
    options = Options(entropy_coef=0.1, kl_coef=0.2, tis_cap=1.1, dual_clip=1.3, loss_scale=2.0)
    case = make_case(130, 32, 252, drift=0.5)
    want = loss_truth(case, options)
    got = run_loss(case, impl, options).output.metrics
    mask, ratio = case.mask_T, want.ratio_T
    assert case.old_logp_T is not None and case.engine_logp_T is not None

    def clipped(advantage: torch.Tensor) -> float:
        up, down = ratio > 1.2, (ratio < 0.8) | (ratio > 1.3)
        return float((mask & (((advantage > 0) & up) | ((advantage < 0) & down))).sum())

    exact = {
        "num_live": float(mask.sum()),
        "num_acc": float((mask & (case.adv_acc_T != 0)).sum()),
        "num_tool": float((mask & (case.adv_tool_T != 0)).sum()),
        "num_clipped_acc": clipped(case.adv_acc_T),
        "num_clipped_tool": clipped(case.adv_tool_T),
    }
    assert {name: float(getattr(got, name)) for name in exact} == exact
    assert exact["num_clipped_acc"] > 10
    assert exact["num_clipped_tool"] > 5
    close = {
        "loss_acc": want.loss_acc,
        "loss_tool": want.loss_tool,
        "loss_kl": want.loss_kl,
        "loss_entropy": want.loss_entropy,
        "sum_kl": (case.old_logp_T - want.head.logp_T)[mask].sum(),
        "sum_entropy": want.head.entropy_T[mask].sum(),
        "sum_engine_gap": (case.old_logp_T - case.engine_logp_T)[mask].abs().sum(),
        "ratio_min": ratio[mask].min(),
        "ratio_max": ratio[mask].max(),
    }
    for name, value in close.items():
        torch.testing.assert_close(
            getattr(got, name), value.double(), rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_metrics_carry_no_gradient(impl: Chosen):
    case = make_case(2, 32, 33)
    output = call_loss(case, case.hidden_TH.requires_grad_(), case.head_VH.requires_grad_(), impl)
    assert output.loss.requires_grad
    values = [getattr(output.metrics, name) for name in output.metrics.__dataclass_fields__]
    assert not any(value.requires_grad for value in [*values, output.logp_L, output.lse_L])
