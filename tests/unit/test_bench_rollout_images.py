"""The benchmark of images: what it prints, and what it refuses to time."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from bench.candidate import BenchError
from bench.rollout import images
from bench.rollout.image_step import ImagePlan, Pictures, Step, Work, build, play
from bench.rollout.images import Bench, Request, held_by
from metis_fast.cli import main, parse
from metis_fast.model_folder import load_tokenizer
from metis_fast.pictures import ImagePreparer
from metis_fast.types import ImageBlob

WORK = Work((64, 64), (32, 32), 2, 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy and its rows."""
    path = tmp_path_factory.mktemp("images")
    build(path, WORK)
    return path


def test_json_has_all_rows(capsys):
    threads = torch.get_num_threads()
    try:
        words = ["bench", "rollout", "--image", "64x64", "--crop", "32x32", "--prompts", "2", "--runs", "5", "--json"]
        assert main([*words, "--threads", "1"]) == 0
    finally:
        torch.set_num_threads(threads)
    found = json.loads(capsys.readouterr().out)
    assert found["work"] == {"image": [64, 64], "crop": [32, 32], "prompts": 2, "seed": 0}
    assert [(row["what"], row["impl"]) for row in found["loop"]] == [
        ("prompt", "ours"),
        ("pixels", "ours"),
        ("prompt", "transformers"),
        ("observation", "ours"),
        ("observation", "transformers"),
    ]
    assert all(0 < row["median_ms"] <= row["most_ms"] for row in found["loop"])
    assert [(row["what"], row["pixels"], row["tokens"]) for row in found["threads"]] == [
        ("image", [256, 256], 64),  # the least that the model takes
        ("crop", [256, 256], 64),
    ]
    for row in found["memory"]:  # uint8, and float32 of two frames
        assert row["kept_mib"] == 256 * 256 * 3 / 2**20 and row["patches_mib"] == 8 * row["kept_mib"]
    step = found["step"]
    assert [stage["name"] for stage in step["stages"]] == ["start", "draw, decode", "rollouts", "score", "update"]
    assert (step["rollouts"], step["crops"]) == (32, 16)
    assert (step["prompt_image_tokens"], step["crop_image_tokens"]) == (2 * 64, 16 * 64)
    peaks = [stage["peak_bytes"] for stage in step["stages"]]
    assert peaks == sorted(peaks) and step["peak_bytes"] == peaks[-1] > 1 << 27


def test_half_of_the_rollouts_crop_and_both_rewards_differ_in_every_group(folder):
    plan = ImagePlan(WORK, load_tokenizer(folder / "policy"))
    assert [len(messages) for messages in plan.messages] == [2, 1] * 16
    assert len({crop.sha256 for crop in plan.crops.values()}) == 16
    right = [messages[-1].tail == plan.messages[0][-1].tail for messages in plan.messages]
    assert right == [True, True, False, False] * 8


def test_each_picture_is_another_one_of_the_size_asked_for():
    pictures = Pictures((96, 64), 0)
    assert len({pictures(number, form).sha256 for number in range(8) for form in ("JPEG", "PNG")}) == 16
    assert pictures(3, "PNG") == Pictures((96, 64), 0)(3, "PNG")


def test_what_holds_the_loop_is_seen_and_what_lets_go_is_not():
    image = ImageBlob.of(b"")

    async def holds(_: ImageBlob) -> None:
        time.sleep(0.05)

    async def waits(_: ImageBlob) -> None:
        await asyncio.sleep(0.3)

    assert asyncio.run(held_by(holds, image)).wall_s >= 0.05
    assert asyncio.run(held_by(waits, image)).wall_s < 0.3


def test_patches_that_are_not_those_of_transformers_are_not_timed(folder, monkeypatch):
    bench = Bench(folder / "policy", Request(WORK, 5, 1))
    bench.check()
    call = ImagePreparer.__call__

    def off(self: ImagePreparer, image: ImageBlob) -> object:
        patches = call(self, image)
        return replace(patches, pixels=patches.pixels + 1e-7)

    monkeypatch.setattr(ImagePreparer, "__call__", off)
    with pytest.raises(BenchError, match=r"--image: the patches .* are not those of transformers .*; nothing was timed"):
        bench.check()


def test_a_wrong_number_of_image_tokens_is_found(folder, monkeypatch):
    grid = ImagePreparer.grid

    def smaller(self: ImagePreparer, image: ImageBlob) -> tuple[int, int, int]:
        t, h, w = grid(self, image)
        return t, h - 2, w

    monkeypatch.setattr(ImagePreparer, "grid", smaller)
    found = asyncio.run(play(WORK, folder))
    assert found.wrong[0] == "rollout rows:0#0 has 1 images with 56 tokens in its prompt, expected 1 with 64"


def test_a_wrong_step_is_one_line_without_figures(folder, monkeypatch):
    monkeypatch.setattr(images, "_ask", lambda *_: Step(wrong=["rollout rows:0#0 has 56 tokens", "another"]))
    with pytest.raises(
        BenchError, match="no figures are shown, 2 rollouts or prompts are wrong: rollout rows:0#0 has 56 tokens"
    ):
        images.step(folder, Request(WORK, 5, 1))


@pytest.mark.slow  # test_bench_update_step.py has a quick one
def test_a_process_that_dies_is_named(tmp_path):
    with pytest.raises(BenchError, match=r"the process of the step ended with code 1: .*policy"):
        images.step(tmp_path, Request(WORK, 5, 1))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rollout", "--image", "64"], "--image: expected width and height in pixels, as 2048x1536, got '64'"),
        (["rollout", "--image", "64x0"], "--image: expected width and height in pixels, as 2048x1536, got '64x0'"),
        (["rollout", "--image", "8x8", "--crop", "a"], "--crop: expected width and height in pixels, as 2048x1536, got 'a'"),
        (["rollout", "--image", "8x8", "--prompts", "0"], "--prompts: expected 1 or more, got 0"),
        (["rollout", "--image", "8x8", "--runs", "4"], "--runs: expected 5 or more, got 4"),
        (
            ["rollout", "--image", "8x8", "--engine", "vllm"],
            "--engine: rollout --image takes none but its default, got 'vllm'; leave it out",
        ),
        (["rollout", "--crop", "8x8"], "--crop, --prompts: what they are of is told by --image; give that too"),
        (["patchify", "--image", "8x8"], "--image, --crop, --prompts: patchify has no images; they are for rollout"),
        (["rollout", "--image", "1x300"], "--image: image cannot be resized"),
    ],
)
def test_options_that_do_not_fit_are_refused(words, message, capsys):
    threads = torch.get_num_threads()
    try:
        assert main(["bench", *words]) == 2
    finally:
        torch.set_num_threads(threads)
    out, err = capsys.readouterr()
    assert out == "" and message in err and len(err.strip().splitlines()) == 1
    assert parse(["bench", "rollout"]).image is None
