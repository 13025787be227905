"""The benchmark on a tiny shape: what its rows say, and what it does with a wrong implementation or a missing peer."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from bench import group_advantage, hdpo_loss
from bench.__main__ import main
from bench.candidate import Outcome, Step
from bench.head_case import HeadCase

SHAPE = ["--shape", "T=64,H=32,V=500", "--threads", "1"]
REFERENCE = hdpo_loss.OURS["ours_reference"]
MACHINE = {"cpu", "cores", "isa", "torch", "gpu", "threads"}
ROW = {
    "impl", "dtype", "T", "H", "V", "live_fraction", "cpu_s", "wall_s", "cpu_s_spread", "wall_s_spread", "gemms", "peak_bytes",
    "logp_err", "dhidden_err", "dweight_err",
}  # fmt: skip


@pytest.fixture
def bench(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Runs the command with --json: (exit code, the object)."""

    def run(*words: str) -> tuple[int, dict[str, Any]]:
        code = main([*words, "--device", "cpu", "--json"])
        return code, json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def reference_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours is the reference alone: what the benchmark does must not hang on which fast implementation is built."""
    monkeypatch.setattr(hdpo_loss, "OURS", {"ours": REFERENCE})


def _rows(found: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["impl"]: row for row in found["rows"]}


def test_json_has_exactly_the_documented_keys(bench):
    _, found = bench("hdpo_loss", *SHAPE, "--peers", "eager", "--live-fraction", "0.5")
    assert set(found) == {"machine", "rows", "missing"}
    assert set(found["machine"]) == MACHINE
    assert all(set(row) == ROW for row in found["rows"])
    assert list(_rows(found)) == ["ours", "ours_param_grad", "ours_reference", "floor", "floor_live", "eager"]


def test_attention_has_its_own_sizes_and_errors_and_costs_seven_products(bench):
    code, found = bench("prefix_attention", "--shape", "P=96,R=3,L=64,H=4,K=2,D=16", "--threads", "1", "--dtype", "fp32")
    rows = _rows(found)
    assert code == 0 and list(rows) == ["ours", "ours_reference", "floor", "sdpa", "masked"]
    assert set(rows["ours"]) == ROW | {"P", "R", "L", "K", "D", "out_err", "dquery_err", "dkey_err", "dvalue_err"}
    assert (rows["ours"]["P"], rows["ours"]["H"], rows["ours"]["T"]) == (96, 4, None)
    assert rows["ours"]["gemms"] == rows["ours_reference"]["gemms"] == 7
    assert rows["floor"]["gemms"] == pytest.approx(7, rel=0.05)  # of odd rows there is no half
    assert all(rows["sdpa"][f"{name}_err"] < 1e-5 for name in ("out", "dquery", "dkey", "dvalue"))


def test_a_token_costs_eager_three_products_and_ours_three_only_if_live(bench):
    code, found = bench("hdpo_loss", *SHAPE, "--peers", "eager", "--live-fraction", "0.5")
    rows = _rows(found)
    gemms = {name: row["gemms"] for name, row in rows.items()}
    assert code == 0
    assert gemms == {"ours": 1.5, "ours_param_grad": 1.5, "ours_reference": 1.5, "floor": 3.0, "floor_live": 1.5, "eager": 3.0}
    assert rows["ours"]["live_fraction"] == 0.5 and rows["floor"]["live_fraction"] == 1.0


def test_main_grad_saves_the_float32_gradient_of_the_head(bench):
    _, found = bench("hdpo_loss", *SHAPE, "--peers", "", "--dtype", "bf16")
    rows = _rows(found)
    # bf16 [V, H] goes back to the caller and is not counted; its float32 accumulator is
    assert rows["ours_param_grad"]["peak_bytes"] - rows["ours"]["peak_bytes"] >= 500 * 32 * 2


def test_rounded_logits_show_in_the_errors_of_eager(bench, reference_only):
    errors = {}
    for dtype in ("bf16", "fp32"):
        _, found = bench("hdpo_loss", *SHAPE, "--peers", "eager", "--dtype", dtype)
        errors[dtype] = _rows(found)["eager"]
    assert errors["bf16"]["logp_err"] > 1e-3
    assert errors["fp32"]["logp_err"] < 1e-5
    assert errors["fp32"]["dhidden_err"] < 1e-5 and errors["fp32"]["dweight_err"] < 1e-5


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.jit, when torch.compile is first used
@pytest.mark.parametrize("peer", ["compile", "liger", "verl", "cce"])
def test_a_peer_is_given_the_problem_that_it_is_checked_on(bench, reference_only, peer):
    with torch.compiler.set_stance("force_eager"):  # compiling changes no result and takes half a minute
        _, found = bench("hdpo_loss", *SHAPE, "--peers", peer, "--dtype", "fp32", "--live-fraction", "0.5")
    if found["missing"]:
        pytest.skip(found["missing"][0]["why"])
    row = _rows(found)[peer]
    assert row["dhidden_err"] < 1e-5 and row["dweight_err"] < 1e-5
    assert row["gemms"] == {"compile": 3.0, "liger": 4.0, "verl": 4.0, "cce": 3.0}[peer]


def test_peers_that_are_not_installed_are_named_with_the_reason(bench, reference_only, monkeypatch):
    for package in ("liger_kernel", "liger_kernel.chunked_loss", "verl", "cut_cross_entropy"):
        monkeypatch.setitem(sys.modules, package, None)
    code, found = bench("hdpo_loss", *SHAPE, "--peers", "liger,eager,verl,cce")
    assert code == 0
    assert list(_rows(found)) == ["ours", "floor", "eager"]
    assert [entry["impl"] for entry in found["missing"]] == ["liger", "verl", "cce"]
    assert all(entry["why"].startswith("not installed (pip install ") for entry in found["missing"])


def _out_of_memory(case: HeadCase) -> Step:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 34.00 GiB.")


def test_what_does_not_fit_into_memory_is_missing_and_the_others_run(bench, monkeypatch):
    monkeypatch.setattr(hdpo_loss, "OURS", {"ours": REFERENCE, "ours_reference": _out_of_memory})
    code, found = bench("hdpo_loss", *SHAPE, "--peers", "")
    assert code == 0
    assert list(_rows(found)) == ["ours", "floor"]
    assert found["missing"][0]["why"].startswith("OutOfMemoryError: CUDA out of memory")


def _scaled(factor: float) -> Callable[[HeadCase], Step]:
    """The reference with dHidden off by a factor."""

    def prepare(case: HeadCase) -> Step:
        step = REFERENCE(case)

        def wrong() -> Outcome:
            outcome = step()
            d_hidden, d_head = outcome.gradients
            return replace(outcome, gradients=(d_hidden * factor, d_head))

        return wrong

    return prepare


@pytest.mark.parametrize("factor", [1.01, float("nan")])
def test_a_wrong_implementation_of_ours_has_no_speed_and_fails_the_command(bench, monkeypatch, factor):
    monkeypatch.setattr(hdpo_loss, "OURS", {**hdpo_loss.OURS, "ours": _scaled(factor)})
    code, found = bench("hdpo_loss", *SHAPE, "--peers", "")
    rows = _rows(found)
    assert code == 1
    for column in ("cpu_s", "wall_s", "cpu_s_spread", "wall_s_spread"):
        assert rows["ours"][column] is None
        assert rows["ours_reference"][column] is not None


def test_a_wrong_implementation_is_called_wrong_in_the_table(monkeypatch, capsys):
    monkeypatch.setattr(hdpo_loss, "OURS", {"ours": _scaled(1.01)})
    assert main(["hdpo_loss", *SHAPE, "--peers", "", "--device", "cpu"]) == 1
    out, err = capsys.readouterr()
    assert "wrong" in next(line for line in out.splitlines() if line.startswith("ours "))
    assert "bench: ours is outside its limits, no speed shown: error of dHidden 0.01 > 0.003" in err


def test_an_inaccurate_peer_is_shown_with_its_errors_and_its_speed(bench, reference_only, monkeypatch):
    monkeypatch.setitem(hdpo_loss.PEERS, "eager", _scaled(1.01))
    code, found = bench("hdpo_loss", *SHAPE, "--peers", "eager")
    row = _rows(found)["eager"]
    assert code == 0
    assert row["dhidden_err"] == pytest.approx(0.01, rel=0.3) and row["wall_s"] > 0


def test_group_advantage_has_errors_of_advantages_and_no_products(bench, monkeypatch):
    monkeypatch.setattr(group_advantage, "OURS", {"ours": group_advantage.OURS["ours_reference"]})
    code, found = bench("group_advantage", "--shape", "P=24,G=5", "--threads", "1")
    assert code == 0
    assert {name: (row["gemms"], row["P"], row["G"]) for name, row in _rows(found).items()} == {
        "ours": (None, 24, 5), "floor": (None, 24, 5), "loop": (None, 24, 5)
    }  # fmt: skip
    assert all(row["adv_err"] < 1e-5 for row in found["rows"] if row["impl"] != "floor")
    assert set(found["rows"][0]) == ROW | {"P", "G", "adv_err"}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["hdpo_los"], "unknown op 'hdpo_los'; expected one of group_advantage, linear_logprob, hdpo_loss"),
        (["hdpo_loss", "--shape", "T=0"], "--shape: expected T=<size>,H=<size>,V=<size>, got 'T=0'"),
        (["hdpo_loss", "--shape", "P=3"], "--shape: expected T=<size>,H=<size>,V=<size>, got 'P=3'"),
        (["hdpo_loss", "--dtype", "fp8"], "--dtype: expected bf16 or fp32 for hdpo_loss, got 'fp8'"),
        (["hdpo_loss", "--live-fraction", "0"], "--live-fraction: expected a number in (0, 1], got 0.0"),
        (["hdpo_loss", "--live-fraction", "0.01", *SHAPE], "--live-fraction 0.01: 64 tokens are 4 rollouts, none is live"),
        (["linear_logprob", "--live-fraction", "0.5"], "linear_logprob has work for every token, so it can only be 1; got 0.5"),
        (["hdpo_loss", "--peers", "eager,lige"], "--peers: expected names out of eager, compile, liger, verl, cce"),
        (["hdpo_loss", "--runs", "4"], "--runs: expected 5 or more, got 4"),
        (["hdpo_loss", "--threads", "0"], "--threads: expected 1 or more, got 0"),
    ],
)
def test_a_bad_option_is_one_line_and_exit_code_2(capsys, words, says):
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("bench: ") and says in err


def test_without_an_op_every_op_is_listed_with_a_line_on_what_it_does(capsys):
    assert main([]) == 0
    out = capsys.readouterr().out
    for name, summary in (
        ("hdpo_loss", "forward and backward"),
        ("linear_logprob", "no gradient"),
        ("group_advantage", "HDPO"),
    ):
        assert summary in next(line for line in out.splitlines() if line.startswith(name))
