"""The benchmark of the update step: its batches are what they say, a wrong gradient is not timed, costs add up."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bench.__main__ import main
from bench.candidate import BenchError
from bench.update_step import run as update_step
from bench.update_step.child import Child, Measured
from bench.update_step.shapes import SHAPES, Shape, build_batch, build_model
from bench.update_step.variants import NONE, OURS, REFERENCE, SAVINGS, VARIANTS, make_config
from metis_fast.config import ModelConfig
from metis_fast.model import Policy, load_policy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bench") / "policy"
    build_model(folder, seed=0)
    return folder


@pytest.fixture(scope="module")
def policy(folder: Path) -> Policy:
    return load_policy(ModelConfig(path=folder, dtype="float32"))


@pytest.mark.parametrize("name", SHAPES)
def test_a_batch_is_what_its_shape_says(policy: Policy, name: str):
    shape = SHAPES[name]
    groups = build_batch(policy, shape, seed=0)
    assert len(groups) == len(shape.kinds) * shape.mini_batches
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    assert {rollout.prompt_len for rollout in rollouts} == {shape.prompt_tokens}
    responses = np.array([len(rollout.tokens) - rollout.prompt_len for rollout in rollouts])
    sampled = np.array([rollout.num_sampled for rollout in rollouts])
    if name != "tiny":  # whose images are longer than its observations
        assert responses.mean() == pytest.approx(shape.response_tokens, rel=0.1)
        assert 1 - sampled.sum() / responses.sum() == pytest.approx(shape.observed, abs=0.06)
    assert max(len(rollout.tokens) for rollout in rollouts) <= shape.tokens_per_micro_batch
    for group, kind in zip(groups, shape.kinds * shape.mini_batches, strict=True):
        assert len(group.prompt.images) == shape.prompt_images
        assert {score.needs_gradient for score in group.scores} == {kind != "uniform"}
        assert (len({score.adv_acc for score in group.scores}) > 1) == (kind == "mixed")
        assert any(score.adv_tool for score in group.scores) == (kind != "uniform")


def test_the_paper_shape_is_the_one_of_the_paper():
    shape = SHAPES["paper"]
    assert shape.rollouts == 16 and shape.mini_batches == 2
    assert shape.prompt_tokens == 2 * shape.response_tokens and shape.observed == 0.5 and shape.prompt_images > 0
    assert len([kind for kind in shape.kinds if kind != "mixed"]) / len(shape.kinds) == 0.4  # uniform in accuracy
    assert shape.kinds.count("uniform") / len(shape.kinds) == 0.2  # half of these in their calls too
    long = SHAPES["long-response"]
    assert 8 * long.prompt_tokens == long.response_tokens and set(long.kinds) == {"mixed"}


def test_savings_are_switched_on_one_after_the_other():
    on = {}
    for variant in VARIANTS:
        train = make_config(variant, SHAPES["tiny"], "float32", {}).train
        on[variant] = [name for name in SAVINGS if getattr(train, name)]
    assert [len(on[variant]) for variant in VARIANTS] == [0, *range(len(SAVINGS) + 1)]
    assert on[OURS] == list(SAVINGS)


def test_the_recipe_and_ours_without_savings_cost_the_same_and_ours_less(folder: Path, monkeypatch: pytest.MonkeyPatch):
    small = replace(SHAPES["tiny"], rollouts=2)
    monkeypatch.setitem(SHAPES, "tiny", small)
    cost: dict[str, Measured] = {v: Child(v, folder, "tiny", "float32", 0).step() for v in (REFERENCE, NONE, OURS)}
    reference, none, ours = cost.values()
    assert reference.flops == pytest.approx(none.flops)
    assert (reference.decoder_tokens, reference.vision_images) == (none.decoder_tokens, none.vision_images)
    assert ours.flops < reference.flops / 2 and ours.decoder_tokens < reference.decoder_tokens / 2
    assert ours.vision_images < reference.vision_images / 2
    every = [
        r for group in build_batch(load_policy(ModelConfig(path=folder, dtype="float32")), small, 0) for r in group.rollouts
    ]
    assert reference.decoder_tokens == 2 * sum(len(r.tokens) for r in every)
    assert reference.vision_images == 2 * sum(len(r.image_spans) for r in every)
    assert all(one.cpu_s > 0 and (one.peak_bytes is None or one.peak_bytes > 0) for one in cost.values())


GRADIENTS = {"0.a": torch.ones(4), "0.b": torch.full((4,), 2.0), "1.a": torch.ones(4)}


def test_the_largest_error_is_found_with_its_parameter():
    assert update_step.largest_error(GRADIENTS, GRADIENTS) == (0.0, "")
    off = GRADIENTS | {"0.b": GRADIENTS["0.b"] * 1.001}
    error, name = update_step.largest_error(off, GRADIENTS)
    assert (error, name) == (pytest.approx(1e-3, rel=1e-3), "0.b")
    error, name = update_step.largest_error(GRADIENTS | {"1.a": torch.full((4,), torch.nan)}, GRADIENTS)
    assert np.isnan(error) and name == "1.a"
    with pytest.raises(BenchError, match=r"gradients of different parameters: \['1\.a'\]"):
        update_step.largest_error({k: v for k, v in GRADIENTS.items() if k != "1.a"}, GRADIENTS)


class FakeChild:
    """Answers at once; the gradients of `ours` are off by a factor."""

    factor = 1.0

    def __init__(self, variant: str, folder: Path, wanted: update_step.Request) -> None:
        self._factor = self.factor if variant == OURS else 1.0
        self._cpu_s = 8.0 if variant == REFERENCE else 2.0

    def ask(self, command: str) -> dict[str, Any]:
        if command.startswith("gradients"):
            torch.save({name: value * self._factor for name, value in GRADIENTS.items()}, command.split(" ", 1)[1])
            return {}
        self._cpu_s += 1.0
        return {
            "cpu_s": self._cpu_s, "wall_s": 1.0, "peak_bytes": 2**20, "decoder_tokens": 10, "vision_images": 1,
            "flops": 100.0 * self._cpu_s,
        }  # fmt: skip

    def close(self) -> None:
        pass


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> type[FakeChild]:
    monkeypatch.setattr(update_step, "_Child", FakeChild)
    monkeypatch.setattr(FakeChild, "factor", 1.0)
    return FakeChild


@pytest.mark.parametrize("factor", [1.0001, float("nan")])
def test_a_wrong_gradient_is_named_and_nothing_is_timed(fake, monkeypatch, capsys, factor):
    monkeypatch.setattr(fake, "factor", factor)
    assert main(["update_step", "--shape", "tiny"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    line = err.strip().splitlines()[-1]
    assert line.startswith("bench: ours: the gradient of 0.a is off by ")
    assert line.endswith("of its norm, more than 1e-05; nothing was timed")


def test_medians_spreads_and_ratios_are_those_of_the_runs(fake):
    wanted = update_step.Request("tiny", "float32", 3, 1, 0)
    rows = update_step.measure(wanted, (REFERENCE, OURS))
    assert [(row.measured.cpu_s, row.least, row.most) for row in rows] == [(10.0, 9.0, 11.0), (4.0, 3.0, 5.0)]
    found = update_step.to_json(rows, wanted, update_step.describe(torch.device("cpu")))
    assert [row["ratio"] for row in found["rows"]] == [1.0, 2.5]
    assert found["shape"]["name"] == "tiny" and found["shape"]["rollouts"] == SHAPES["tiny"].rollouts
    keys = {"variant", "shape", "decoder_tokens", "vision_images", "flops", "cpu_s", "peak_bytes", "grad_err", "ratio"}
    assert all(keys <= set(row) for row in found["rows"])
    text = update_step.to_text(rows, wanted, update_step.describe(torch.device("cpu")))
    assert "4.00 (3.00..5.00)" in text and "2.50" in text


def test_a_process_that_dies_is_reported_with_its_last_words(tmp_path: Path):
    child = update_step._Child(REFERENCE, tmp_path / "nowhere", update_step.Request("tiny", "float32", 3, 1, 0))
    try:
        with pytest.raises(BenchError, match=r"^the process of reference ended with code 1: .*nowhere"):
            child.ask("step")
    finally:
        child.close()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--shape", "T=3"],
            "--shape: expected one of paper, tool-heavy, long-response, text, tiny for update_step, got 'T=3'",
        ),
        (["--dtype", "fp16"], "--dtype: expected fp32 or bf16 for update_step, got 'fp16'"),
        (["--runs", "2"], "--runs: expected 3 or more, got 2"),
        (["--threads", "0"], "--threads: expected 1 or more, got 0"),
        (["--peers", "liger"], "--peers: update_step has none; its shapes are paper, tool-heavy, long-response, text, tiny"),
        (["--live-fraction", "0.5"], "--live-fraction: update_step has none; its shapes are paper, "),
        (["--device", "cuda"], "--device cuda: update_step counts CPU seconds and resident memory, so it runs on the CPU"),
    ],
)
def test_a_wrong_option_is_named(capsys, words, message):
    assert main(["update_step", *words]) == 2
    assert message in capsys.readouterr().err


def test_the_list_of_ops_names_its_shapes(capsys):
    assert main([]) == 0
    assert "shapes paper, tool-heavy, long-response, text, tiny" in capsys.readouterr().out


def test_every_shape_says_what_it_is():
    for name in SHAPES:
        assert isinstance(SHAPES[name], Shape) and f"update_step {name}: " in update_step.describe_shape(name)
