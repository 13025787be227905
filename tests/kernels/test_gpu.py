"""The contract on a GPU: Triton, compiled just in time and ahead of time, against float64. `make test-gpu` runs it.

Shape letters: T tokens, L live tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from contract.cases import SHAPES, Case, Options, make_case, run_loss
from contract.compare import SAME, check_head, check_loss, relative, truncation
from contract.truth import head_truth, loss_truth

from metis_kernels import (
    AttentionImpl,
    FullAttentionImpl,
    Impl,
    Segments,
    _impl,
    _launch,
    full_attention,
    linear_logprob,
    patchify,
    prefix_attention,
)
from metis_kernels.prefix_attention import flash

pytestmark = pytest.mark.gpu

QWEN3_VL_8B = (256, 4096, 151936)
"""(T, H, V) of the model that the recipe trains; float64 logits of 256 tokens are 300 MiB, the head in float64 5 GiB."""
VOCAB_SLICES = (18992, 37984, 75968)
"""Shards of that vocabulary over 8, 4 and 2 ranks."""

OPTIONS = {
    "paper": Options(),
    "all_terms": Options(entropy_coef=0.1, kl_coef=0.2, tis_cap=1.1, temperature=1.3, dual_clip=1.3),
}


@pytest.fixture(autouse=True)
def device() -> None:
    """Skips without a GPU. What must not happen here is that kernels run in the interpreter, which would prove nothing."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    assert not _impl.triton_interpreted(), "TRITON_INTERPRET is set: run these tests alone, with -m gpu"


@pytest.fixture(params=["just_in_time", "ahead_of_time"])
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Which way kernels are compiled. Ahead of time means: where the library has a variant that fits."""
    monkeypatch.setenv("METIS_AOT", "1" if request.param == "ahead_of_time" else "0")
    _launch._ahead_of_time.cache_clear()
    if request.param == "ahead_of_time" and _launch._ahead_of_time()[0] is None:
        pytest.skip(_launch.aot_status())
    yield request.param
    monkeypatch.undo()
    _launch._ahead_of_time.cache_clear()


def on_gpu(num_tokens: int, size: int, vocab: int, dtype: torch.dtype, scale: float = 2.0, seed: int = 0) -> Case:
    """A case made on the GPU: the shapes of a real model take minutes on a CPU."""
    random = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=random, device="cuda")

    hidden = normal(num_tokens, size).to(dtype)
    head = (normal(vocab, size) * scale / size**0.5).to(dtype)
    targets = torch.randint(vocab, (num_tokens,), generator=random, device="cuda")
    targets[0], targets[-1] = 0, vocab - 1
    logp = head_truth(hidden, head, targets).logp_T
    old = (logp - 0.3 * normal(num_tokens)).float()
    mask = torch.rand(num_tokens, generator=random, device="cuda") < 0.8
    advantages = normal(2, num_tokens) * (torch.rand(2, num_tokens, generator=random, device="cuda") < 0.7)
    return Case(
        hidden, head, targets, old, advantages[0], advantages[1], mask, float(mask.sum()) + 17, float(num_tokens) / 3,
        ref_logp_T=(logp + 0.5 * normal(num_tokens)).float(), engine_logp_T=old + 0.2 * normal(num_tokens),
    )  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_log_probabilities_equal_float64_at_every_shape(compiled: str, shape: tuple[int, int, int], dtype: torch.dtype):
    case = make_case(*shape, dtype, masked=0.0).to("cuda")
    got = linear_logprob(case.hidden_TH, case.head_VH, case.targets_T, impl="triton")
    want = head_truth(case.hidden_TH, case.head_VH, case.targets_T)
    check_head(got.logp_T, got.entropy_T, got.lse_T, want, dtype, truncation(want.peak, case.hidden_TH))


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_the_loss_equals_float64_at_every_shape(
    compiled: str, shape: tuple[int, int, int], dtype: torch.dtype, options: Options
):
    case = make_case(*shape, dtype).to("cuda")
    check_loss(run_loss(case, "triton", options), loss_truth(case, options), case, options)


@pytest.mark.parametrize("vocab", [*VOCAB_SLICES, QWEN3_VL_8B[2]])
def test_the_shipped_shapes_equal_float64(compiled: str, vocab: int):
    num_tokens, size, _ = QWEN3_VL_8B
    case = on_gpu(num_tokens, size, vocab, torch.bfloat16)
    want = head_truth(case.hidden_TH, case.head_VH, case.targets_T)
    got = linear_logprob(case.hidden_TH, case.head_VH, case.targets_T, impl="triton")
    check_head(got.logp_T, got.entropy_T, got.lse_T, want, torch.bfloat16, truncation(want.peak, case.hidden_TH))
    del want
    truth = loss_truth(case)
    check_loss(run_loss(case, "triton", anchor_T=got.lse_T), truth, case)
    main_grad = torch.zeros(vocab, size, device="cuda")
    result = run_loss(case, "triton", main_grad=main_grad)
    check_loss(result, truth, case)


@pytest.mark.parametrize("off_by", [0.0, 5.0, -5.0, 100.0, -100.0, math.nan, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_anchor_however_bad_changes_no_result(off_by: float | None, dtype: torch.dtype):
    case = make_case(130, 100, 1000, dtype).to("cuda")
    want = loss_truth(case)
    anchor = None if off_by is None else (want.head.lse_T + off_by).float()
    # into main_grad, which is not rounded again: one offset for all tokens rounds all targets' elements the same way, e^5 to
    # 148, which alone makes 2e-3
    main_grad = torch.zeros(case.head_VH.shape, device="cuda")
    check_loss(run_loss(case, "triton", anchor_T=anchor, chunk=64, main_grad=main_grad), want, case)


ATTENTION_HEADS = {"shipped": (32, 8, 128), "tensor parallel": (4, 1, 128), "small": (4, 2, 24)}


@pytest.mark.parametrize("impl", ["triton", "flash"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", ATTENTION_HEADS.values(), ids=ATTENTION_HEADS)
def test_attention_of_packs_equals_float64(compiled: str, heads: tuple[int, int, int], dtype: torch.dtype, impl: AttentionImpl):
    if impl == "flash" and (why_not := flash.why_not(torch.device("cuda"), dtype, heads[2])):
        pytest.skip(why_not)
    # rollouts that are read in several parts, a prompt alone, tails everywhere
    segments = Segments((0, 700, 1300, 1301, 2500, 2630), (-1, 0, 0, 0, -1))
    random = torch.Generator("cuda").manual_seed(0)
    counts = heads[0], heads[1], heads[1], heads[0]
    *tensors, d_out = (torch.randn(2630, num, heads[2], generator=random, device="cuda").to(dtype) for num in counts)

    def run(dtype: torch.dtype, impl: AttentionImpl) -> list[torch.Tensor]:
        query, key, value = leaves = [x.to(dtype).requires_grad_() for x in tensors]
        out = prefix_attention(query, key, value, segments, impl=impl)
        return [out.detach(), *torch.autograd.grad(out, leaves, d_out.to(dtype))]

    first = run(dtype, impl)
    for got, want in zip(first, run(torch.float64, "reference"), strict=True):
        assert relative(got.double(), want) <= (2e-6 if dtype == torch.float32 else 2**-7)
    if impl == "triton":
        assert all(torch.equal(a, b) for a, b in zip(first, run(dtype, impl), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [(16, 72), (16, 64), (2, 8)], ids=str)
def test_attention_of_images_equals_float64_and_holds_no_scores(heads: tuple[int, int], dtype: torch.dtype):
    offsets = (0, 700, 1400, 1401, 4096)
    random = torch.Generator("cuda").manual_seed(0)
    *tensors, d_out = (torch.randn(4096, *heads, generator=random, device="cuda").to(dtype) for _ in range(4))

    def run(dtype: torch.dtype, impl: FullAttentionImpl) -> list[torch.Tensor]:
        query, key, value = leaves = [x.to(dtype).requires_grad_() for x in tensors]
        out = full_attention(query, key, value, offsets, impl=impl)
        return [out.detach(), *torch.autograd.grad(out, leaves, d_out.to(dtype))]

    wanted = run(torch.float64, "reference")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    found = run(dtype, "auto")
    held = torch.cuda.max_memory_allocated() - before
    for got, want in zip(found, wanted, strict=True):
        # a GPU's float32 attention multiplies in TF32 where that is allowed, which it is not by default
        assert relative(got.double(), want) <= (1e-5 if dtype == torch.float32 else 2**-7)
    assert held < 40 * d_out.nbytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("patch", [14, 16])
def test_patches_of_an_image_are_the_same_bits(compiled: str, patch: int, dtype: torch.dtype):
    image = torch.randint(256, (patch * 26, patch * 48, 3), dtype=torch.uint8)

    def run(image: torch.Tensor, impl: Impl) -> torch.Tensor:
        mean, std = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
        return patchify(image, patch=patch, temporal=2, merge=2, mean=mean, std=std, rescale=1 / 255, dtype=dtype, impl=impl)

    for part in (image, image[patch * 2 :, patch * 4 :]):
        assert torch.equal(run(part.cuda(), "triton").cpu(), run(part, "reference"))


def test_chunks_and_micro_batches_do_not_matter():
    # races and forgotten barriers, which the interpreter cannot show, would make two runs differ
    case = on_gpu(1000, 256, 5003, torch.float32)
    whole = run_loss(case, "triton", main_grad=torch.zeros(5003, 256, device="cuda"))
    for chunk in (64, 333):
        got = run_loss(case, "triton", chunk=chunk, main_grad=torch.zeros(5003, 256, device="cuda"))
        assert relative(got.d_hidden_TH, whole.d_hidden_TH) <= SAME
        assert relative(got.d_head_VH, whole.d_head_VH) <= SAME
    main_grad = torch.zeros(5003, 256, device="cuda")
    for part in torch.arange(1000, device="cuda").split(300):
        run_loss(case.take(part), "triton", main_grad=main_grad)
    assert relative(main_grad, whole.d_head_VH) <= SAME


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_runs_give_the_same_bits(dtype: torch.dtype):
    case = on_gpu(512, 256, 5003, dtype)
    first, second = (run_loss(case, "triton") for _ in range(2))
    assert torch.equal(first.output.loss, second.output.loss)
    assert torch.equal(first.output.logp_L, second.output.logp_L)
    assert torch.equal(first.d_hidden_TH, second.d_hidden_TH)
    assert torch.equal(first.d_head_VH, second.d_head_VH)


def test_tokens_without_a_coefficient_get_exactly_no_gradient():
    case = on_gpu(512, 256, 5003, torch.bfloat16)
    got, still = run_loss(case, "triton"), loss_truth(case).g_T == 0
    assert 50 < int(still.sum()) < 500
    assert (got.d_hidden_TH[still] == 0).all()


def test_on_policy_the_ratio_is_exactly_one():
    case = replace(on_gpu(512, 256, 5003, torch.bfloat16), old_logp_T=None)
    got = run_loss(case, "triton")
    assert float(got.output.metrics.ratio_min) == float(got.output.metrics.ratio_max) == 1
    check_loss(got, loss_truth(case), case)


def test_a_non_finite_token_is_not_silently_dropped():
    case = on_gpu(64, 256, 5003, torch.bfloat16)
    position = int(case.live_T.nonzero()[4])
    case.hidden_TH[position, 3] = math.nan
    got = run_loss(case, "triton")
    assert got.output.loss.isnan()
    assert not got.d_hidden_TH[position].isfinite().all()
    assert got.d_hidden_TH[torch.arange(64, device="cuda") != position].isfinite().all()
