"""Wrong arguments of both ops: each is a ValueError that names the argument, what was expected and what came."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from metis_kernels import VocabShard, hdpo_loss, linear_logprob

T, H, V = 4, 8, 16
HEAD = ("hidden_TH", "head_VH", "targets_T")
"""The tensors of `linear_logprob`."""


def good() -> dict[str, Any]:
    """Arguments that both ops accept."""
    return {
        "hidden_TH": torch.randn(T, H),
        "head_VH": torch.randn(V, H),
        "targets_T": torch.arange(T),
        "old_logp_T": torch.zeros(T),
        "adv_acc_T": torch.ones(T),
        "adv_tool_T": torch.ones(T),
        "mask_T": torch.ones(T, dtype=torch.bool),
        "num_acc": 4.0,
        "num_tool": 4.0,
        "ref_logp_T": torch.zeros(T),
        "engine_logp_T": torch.zeros(T),
        "anchor_T": torch.zeros(T),
        "live_L": torch.arange(T),
        "main_grad": torch.zeros(V, H),
    }


def changed(changes: Mapping[str, object], names: Collection[str] | None = None) -> dict[str, Any]:
    """The good arguments (of these names) with some of them changed."""
    return {name: value for name, value in good().items() if names is None or name in names} | dict(changes)


def vectors(name: str) -> list[tuple[str, object, str]]:
    """What every float vector [T] refuses."""
    return [
        (name, torch.zeros(T + 1), rf"{name}: expected shape \[T\] = \[4\], got \[5\]"),
        (name, torch.zeros(T, 1), rf"{name}: expected shape \[T\] = \[4\], got \[4, 1\]"),
        (name, torch.zeros(T, dtype=torch.bfloat16), rf"{name}: expected dtype float32 or float64, got bfloat16"),
        (name, torch.zeros(T, dtype=torch.int64), rf"{name}: expected dtype float32 or float64, got int64"),
        (name, torch.zeros(T, device="meta"), rf"{name}: expected a tensor on cpu like the others, got one on meta"),
        (name, [0.0] * T, rf"{name}: expected a tensor, got list"),
    ]


SHARED: list[tuple[str, object, str]] = [
    ("hidden_TH", torch.randn(T), r"hidden_TH: expected shape \[T, H\] = \[any, any\], got \[4\]"),
    ("hidden_TH", torch.randn(1, T, H), r"hidden_TH: expected shape \[T, H\] = \[any, any\], got \[1, 4, 8\]"),
    ("hidden_TH", torch.zeros(T, H, dtype=torch.int64), r"hidden_TH: expected dtype bfloat16 or .* got int64"),
    ("hidden_TH", None, "hidden_TH: expected a tensor, got NoneType"),
    ("hidden_TH", torch.randn(T, 0), r"hidden_TH: expected at least one column, got shape \[4, 0\]"),
    ("head_VH", torch.randn(V, H + 1), r"head_VH: expected shape \[V, H\] = \[any, 8\], got \[16, 9\]"),
    ("head_VH", torch.randn(H, V), r"head_VH: expected shape \[V, H\] = \[any, 8\], got \[8, 16\]"),
    ("head_VH", torch.randn(V), r"head_VH: expected shape \[V, H\] = \[any, 8\], got \[16\]"),
    ("head_VH", torch.empty(0, H), r"head_VH: expected at least one row, got shape \[0, 8\]"),
    ("head_VH", torch.randn(V, H).bfloat16(), "head_VH: expected dtype float32, got bfloat16"),
    ("head_VH", torch.randn(V, H, device="meta"), "head_VH: expected a tensor on cpu like the others, got one on meta"),
    ("targets_T", torch.arange(T + 1), r"targets_T: expected shape \[T\] = \[4\], got \[5\]"),
    ("targets_T", torch.arange(T)[:, None], r"targets_T: expected shape \[T\] = \[4\], got \[4, 1\]"),
    ("targets_T", torch.arange(T).int(), "targets_T: expected dtype int64, got int32"),
    ("targets_T", torch.arange(T, device="meta"), "targets_T: expected a tensor on cpu like the others, got one on meta"),
    ("targets_T", torch.tensor([0, 1, 2, V]), r"targets_T: expected indices in \[0, 16\), got 16"),
    ("targets_T", torch.tensor([0, -1, 2, 3]), r"targets_T: expected indices in \[0, 16\), got -1"),
    ("temperature", 0.0, "temperature: expected a number > 0, got 0.0"),
    ("temperature", -1.0, "temperature: expected a number > 0, got -1.0"),
    ("temperature", math.nan, "temperature: expected a number > 0, got nan"),
    ("chunk", 0, "chunk: expected a number >= 1, got 0"),
    ("chunk", -8, "chunk: expected a number >= 1, got -8"),
    ("chunk", 2.5, "chunk: expected an int >= 1, got 2.5"),
    ("temperature", None, "temperature: expected a number > 0, got None"),
    ("temperature", "1", "temperature: expected a number > 0, got '1'"),
    ("shard", 3, "shard: expected a VocabShard or None, got int"),
    ("impl", "cuda", "impl: expected one of auto, triton, cpu, reference, got 'cuda'"),
]

LOSS: list[tuple[str, object, str]] = [
    *[
        row
        for name in ("old_logp_T", "adv_acc_T", "adv_tool_T", "ref_logp_T", "engine_logp_T", "anchor_T")
        for row in vectors(name)
    ],
    ("adv_acc_T", None, "adv_acc_T: expected a tensor, got NoneType"),
    ("adv_tool_T", None, "adv_tool_T: expected a tensor, got NoneType"),
    ("mask_T", torch.ones(T), "mask_T: expected dtype bool, got float32"),
    ("mask_T", torch.ones(T + 1, dtype=torch.bool), r"mask_T: expected shape \[T\] = \[4\], got \[5\]"),
    (
        "mask_T",
        torch.ones(T, dtype=torch.bool, device="meta"),
        "mask_T: expected a tensor on cpu like the others, got one on meta",
    ),
    ("live_L", torch.arange(T).int(), "live_L: expected dtype int64, got int32"),
    ("live_L", torch.ones(T, dtype=torch.bool), "live_L: expected dtype int64, got bool"),
    ("live_L", torch.zeros(T, 1, dtype=torch.int64), r"live_L: expected shape \[L\] = \[any\], got \[4, 1\]"),
    ("live_L", torch.arange(T, device="meta"), "live_L: expected a tensor on cpu like the others, got one on meta"),
    ("live_L", torch.tensor([0, T]), r"live_L: expected indices in \[0, 4\), got 4"),
    ("live_L", torch.tensor([-1, 0]), r"live_L: expected indices in \[0, 4\), got -1"),
    ("live_L", torch.tensor([0, 2, 2]), "live_L: expected ascending indices, got 2 then 2"),
    ("live_L", torch.tensor([0, 3, 1]), "live_L: expected ascending indices, got 3 then 1"),
    ("main_grad", torch.zeros(V, H + 1), r"main_grad: expected shape \[V, H\] = \[16, 8\], got \[16, 9\]"),
    ("main_grad", torch.zeros(V, H).bfloat16(), "main_grad: expected dtype float32, got bfloat16"),
    ("main_grad", torch.zeros(V, H).double(), "main_grad: expected dtype float32, got float64"),
    ("main_grad", torch.zeros(V, H, device="meta"), "main_grad: expected a tensor on cpu like the others, got one on meta"),
    ("main_grad", torch.zeros(H, V).T, r"main_grad: expected a contiguous tensor, got strides \(1, 16\)"),
    ("num_acc", -1.0, "num_acc: expected a number of tokens >= 0, got -1.0"),
    ("num_acc", math.nan, "num_acc: expected a number of tokens >= 0, got nan"),
    ("num_tool", math.inf, "num_tool: expected a number of tokens >= 0, got inf"),
    ("num_acc", torch.ones(2), r"num_acc: expected one number, got a tensor of shape \[2\]"),
    ("num_tool", torch.ones(0), r"num_tool: expected one number, got a tensor of shape \[0\]"),
    ("num_acc", torch.tensor(-1), "num_acc: expected a number of tokens >= 0, got -1"),
    ("num_acc", torch.tensor(9.0).bfloat16(), "num_acc: expected dtype int64, int32, float32 or float64, got bfloat16"),
    ("num_acc", torch.tensor(4, device="meta"), "num_acc: expected a tensor on cpu or another with data, got one on meta"),
    ("num_acc", None, "num_acc: expected a number of tokens >= 0, got None"),
    ("w_acc", None, "w_acc: expected a number >= 0, got None"),
    *[
        (name, bad, rf"{name}: expected a number >= 0, got {bad}")
        for name in ("w_acc", "w_tool", "eps_low", "eps_high", "entropy_coef", "kl_coef", "tis_cap")
        for bad in (-0.1, math.nan)
    ],
    ("w_tool", math.inf, "w_tool: expected a finite number >= 0, got inf"),
    ("dual_clip", 1.0, "dual_clip: expected a number > 1, got 1.0"),
    ("dual_clip", math.nan, "dual_clip: expected a number > 1, got nan"),
]


def ids(rows: list[tuple[str, object, str]]) -> list[str]:
    """Names of parameters: the argument, and how what came looks."""
    return [
        f"{name}-{tuple(bad.shape)}-{bad.dtype}-{bad.device}" if isinstance(bad, Tensor) else f"{name}-{bad}"
        for name, bad, _ in rows
    ]


def test_a_denominator_that_is_nan_on_the_device_gives_a_loss_that_is_nan():
    assert math.isnan(float(hdpo_loss(**changed({"num_acc": torch.tensor(math.nan)})).loss.detach()))


@pytest.mark.parametrize(("name", "bad", "message"), SHARED, ids=ids(SHARED))
def test_linear_logprob_names_the_wrong_argument(name: str, bad: object, message: str):
    linear_logprob(**changed({}, HEAD))
    with pytest.raises(ValueError, match=f"^{message}$"):
        linear_logprob(**changed({name: bad}, HEAD))


@pytest.mark.parametrize(("name", "bad", "message"), SHARED + LOSS, ids=ids(SHARED + LOSS))
def test_hdpo_loss_names_the_wrong_argument(name: str, bad: object, message: str):
    hdpo_loss(**good())
    with pytest.raises(ValueError, match=f"^{message}$"):
        hdpo_loss(**changed({name: bad}))


@pytest.mark.parametrize(
    ("dtype", "wide", "narrow"),
    [(torch.float64, torch.float64, torch.float32), (torch.float16, torch.float32, torch.float16)],
)
def test_main_grad_must_be_as_wide_as_the_sums(dtype: torch.dtype, wide: torch.dtype, narrow: torch.dtype):
    inputs = {"hidden_TH": torch.randn(T, H, dtype=dtype), "head_VH": torch.randn(V, H, dtype=dtype), "impl": "reference"}
    hdpo_loss(**changed(inputs | {"main_grad": torch.zeros(V, H, dtype=wide)}))
    with pytest.raises(ValueError, match=r"^main_grad: expected dtype "):
        hdpo_loss(**changed(inputs | {"main_grad": torch.zeros(V, H, dtype=narrow)}))


@pytest.mark.parametrize(("option", "vector"), [("kl_coef", "ref_logp_T"), ("tis_cap", "engine_logp_T")])
def test_a_term_without_the_log_probabilities_that_it_needs_is_refused(option: str, vector: str):
    with pytest.raises(ValueError, match=rf"^{vector}: {option} is not 0, .* got None$"):
        hdpo_loss(**changed({option: 0.5, vector: None}))


def test_a_target_is_checked_only_where_it_is_used():
    padded = {"targets_T": torch.tensor([0, -100, 2, 3]), "live_L": None}
    hdpo_loss(**changed(padded | {"mask_T": torch.tensor([True, False, True, True])}))
    with pytest.raises(ValueError, match=r"^targets_T: expected indices in \[0, 16\), got -100$"):
        hdpo_loss(**changed(padded))


def test_a_negative_target_is_refused_under_a_shard_too(tmp_path: Path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1)
    try:
        group = torch.distributed.group.WORLD
        assert group is not None
        with pytest.raises(ValueError, match=r"^targets_T: expected indices in >= 0, got -1$"):
            hdpo_loss(**changed({"targets_T": torch.tensor([0, -1, 2, 3]), "shard": VocabShard(0, group)}))
        with pytest.raises(ValueError, match=r"^VocabShard\.start: expected a number >= 0, got -1$"):
            VocabShard(-1, group)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("group", [None, "tp"])
def test_a_shard_without_a_process_group_is_refused(group: Any):
    with pytest.raises(ValueError, match=rf"^VocabShard\.group: expected a process group, got {group!r}$"):
        VocabShard(0, group)


@pytest.mark.parametrize(
    ("impl", "dtype", "why"),
    [
        ("cpu", torch.float64, "it takes bfloat16 and float32, not torch.float64"),
        ("cpu", torch.float16, "it takes bfloat16 and float32, not torch.float16"),
        ("triton", torch.float64, "it takes bfloat16, float16 and float32, not torch.float64"),
    ],
)
def test_an_implementation_that_cannot_run_says_why(impl: str, dtype: torch.dtype, why: str):
    inputs = {"hidden_TH": torch.randn(T, H).to(dtype), "head_VH": torch.randn(V, H).to(dtype), "impl": impl}
    with pytest.raises(ValueError, match=f"^impl='{impl}' cannot run here: {re.escape(why)}$"):
        linear_logprob(**changed(inputs, HEAD))


def test_a_failed_call_leaves_main_grad_alone():
    main_grad = torch.zeros(V, H)
    with pytest.raises(ValueError, match="targets_T"):
        hdpo_loss(**changed({"targets_T": torch.tensor([0, 1, 2, V]), "main_grad": main_grad}))
    assert (main_grad == 0).all()
