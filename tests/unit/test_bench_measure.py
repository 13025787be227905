"""What the benchmark measures: allocations to the byte, rounds in which all take their turn first, products as they run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from bench import hdpo_loss, head_case
from bench.candidate import Outcome, Request
from bench.measure import flops, interleaved, peak_bytes
from metis_kernels.hdpo_loss import api

CPU = torch.device("cpu")
KIB = 1024


def test_peak_is_the_most_that_lived_at_once_without_the_gradients_handed_back():
    before = torch.ones(64 * KIB, dtype=torch.uint8)

    def step() -> Outcome:
        gradient = torch.ones(32 * KIB, dtype=torch.uint8)
        first = before.clone()  # 64 KiB
        second = first.clone()  # 128 KiB, the peak
        del first
        third = second[: 8 * KIB].clone()  # 72 KiB
        del third
        return Outcome(gradients=(gradient,), handed_back=gradient.nbytes)

    assert peak_bytes(step, CPU) == 128 * KIB


def test_peak_counts_scratch_inside_an_op():
    logits = torch.randn(64, 1000)

    def step() -> Outcome:
        return Outcome(torch.logsumexp(logits, -1))

    assert peak_bytes(step, CPU) >= logits.nbytes  # it makes the exponentials of all


def test_every_implementation_runs_once_a_round_and_goes_first_in_turn():
    order: list[str] = []
    finished: list[None] = []

    def step(name: str) -> Outcome:
        order.append(name)
        return Outcome()

    times = interleaved({name: lambda name=name: step(name) for name in "abc"}, 4, CPU, lambda: finished.append(None))
    assert "".join(order) == "abc" + "bca" + "cab" + "abc"
    assert len(finished) == 12
    for cpu, wall in times.values():
        assert 0 <= cpu.least <= cpu.median <= cpu.most
        assert 0 < wall.least <= wall.median <= wall.most


class _LookInside(TorchDispatchMode):
    """Runs the Python body of our op under a counter: the products that an implementation really calls."""

    def __init__(self, counter: FlopCounterMode) -> None:
        super().__init__()
        self._counter = counter

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.metis_kernels.hdpo_loss.default:
            with self._counter:
                return api._hdpo_loss._init_fn(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("into_main_grad", [True, False])
def test_formula_of_products_is_what_the_reference_runs(into_main_grad):
    request = Request({"T": 96, "H": 16, "V": 250}, "fp32", 0.75, (), 5, 1, CPU, seed=0)
    step = hdpo_loss._ours(head_case.make(request), "reference", into_main_grad)
    counter = FlopCounterMode(display=False)
    with _LookInside(counter):
        step()
    counted = counter.get_total_flops()
    assert counted == 3 * 2 * 72 * 16 * 250
    assert flops(step, {torch.ops.metis_kernels.hdpo_loss: hdpo_loss.flop_formula}) == counted


def test_case_has_the_live_rollouts_and_clipped_tokens_it_promises():
    case = head_case.make(Request({"T": 4096, "H": 8, "V": 50}, "fp32", 0.5, (), 5, 1, CPU, seed=1))
    logp = head_case.eager_logp(case.hidden_TH.double(), case.head_VH.double(), case.targets_T)
    drift = (logp - case.old_logp_T).abs()
    assert case.live_fraction == 0.5
    assert 0.17 < float((drift > 0.29).double().mean()) < 0.23
    assert not ((drift > 0.11) & (drift < 0.29)).any()  # nothing near the bounds of the clip
    # sampled from the model: the mean of -logp is the entropy
    log_p = torch.log_softmax(case.hidden_TH.double() @ case.head_VH.double().T, -1)
    entropy = float(-(log_p.exp() * log_p).sum(-1).mean())
    assert float(-logp.mean()) == pytest.approx(entropy, abs=0.1)
