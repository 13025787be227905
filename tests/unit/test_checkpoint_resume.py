"""Resume state survives kills, bit flips and time, bit for bit."""

from __future__ import annotations

import logging
import multiprocessing
import random
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np
import pytest
import torch

from metis_fast.checkpoint.atomic import new_folder
from metis_fast.checkpoint.params import WEIGHT, add_prefix, copy_exactly, take_prefix
from metis_fast.checkpoint.resume import CheckpointStore, ResumeState
from metis_fast.checkpoint.rng import capture_rng, restore_rng
from metis_fast.errors import CheckpointError


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def state_of(step: int) -> ResumeState:
    return ResumeState(step=step, tensors={"x": torch.full((1000,), float(step))}, scalars={"step": step}, rng=capture_rng())


def save_many(store: CheckpointStore, scores: dict[int, tuple[float, ...] | None]) -> None:
    for step, score in scores.items():
        store.save(step, state_of(step), score)


def folders(path: Path) -> set[str]:
    return {entry.name for entry in path.iterdir()}


ODD_FLOATS = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -float("inf"), 1e-45, 1 / 3])


@pytest.mark.parametrize(
    "tensor",
    [
        ODD_FLOATS,
        ODD_FLOATS.bfloat16(),
        torch.tensor(float("nan")).view(torch.int32).bitwise_or(0x1234).view(torch.float32),  # NaN with a payload, 0-d
        torch.tensor([2**63 - 1, -(2**63)]),
        torch.tensor(7),
        torch.tensor([True, False]),
        torch.arange(12.0).reshape(3, 4).t(),
        torch.arange(100.0)[10:20],
        torch.zeros(0, 3),
    ],
    ids=["float32", "bfloat16", "0d_nan_payload", "int64", "0d_int64", "bool", "transposed", "view", "empty"],
)
def test_a_tensor_comes_back_bit_for_bit(tensor, tmp_path):
    state = ResumeState(step=1, tensors={"a.b": tensor, "other": torch.ones(3)}, scalars={}, rng=capture_rng())
    store = CheckpointStore(tmp_path, keep_last=1)
    store.save(1, state, None)
    loaded = store.load(1).state.tensors["a.b"]
    assert (loaded.dtype, loaded.shape) == (tensor.dtype, tensor.shape)
    assert bits(loaded) == bits(tensor)


def test_tied_weights_are_written_once_and_come_back_tied(tmp_path):
    embeddings = torch.randn(1000, 100)
    tensors = {"embed.weight": embeddings, "lm_head.weight": embeddings.view(1000, 100), "copy": embeddings.clone()}
    path = CheckpointStore(tmp_path, 1).save(1, ResumeState(1, tensors, {}, capture_rng()), None)
    size = sum(file.stat().st_size for file in path.iterdir())
    assert 2 * embeddings.nbytes < size < 3 * embeddings.nbytes
    loaded = CheckpointStore(tmp_path, 1).load(1).state.tensors
    assert loaded["embed.weight"].data_ptr() == loaded["lm_head.weight"].data_ptr() != loaded["copy"].data_ptr()
    assert all(torch.equal(loaded[name], embeddings) for name in tensors)


def test_overlapping_views_of_one_buffer_come_back_with_their_own_values(tmp_path):
    buffer = torch.arange(10.0)
    tensors = {"low": buffer[:6], "high": buffer[4:], "empty": buffer[:0], "empty_too": torch.zeros(0)}
    CheckpointStore(tmp_path, 1).save(1, ResumeState(1, tensors, {}, capture_rng()), None)
    loaded = CheckpointStore(tmp_path, 1).load(1).state.tensors
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_large_states_are_split_into_several_files_without_loss(tmp_path, monkeypatch):
    monkeypatch.setattr("metis_fast.checkpoint.resume._SHARD_BYTES", 4000)
    tensors = {f"t{index}": torch.randn(300 * (index + 1)) for index in range(7)}
    path = CheckpointStore(tmp_path, 1).save(1, ResumeState(1, tensors, {}, capture_rng()), None)
    assert len(list(path.glob("tensors-*"))) > 4
    loaded = CheckpointStore(tmp_path, 1).load(1).state.tensors
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_scalars_come_back_equal(tmp_path):
    scalars = {"cursor": {"epoch": 3, "row": 2**60}, "metric": 0.1 + 0.2, "none": None, "text": "ä\n", "list": [1, [True]]}
    CheckpointStore(tmp_path, 1).save(5, ResumeState(5, {}, scalars, capture_rng()), (0.1 + 0.2, -1.0))
    loaded = CheckpointStore(tmp_path, 1).load(5)
    assert (loaded.state.step, loaded.state.scalars, loaded.score) == (5, scalars, (0.1 + 0.2, -1.0))


@pytest.mark.parametrize("scalars", [{"a": {1: 2}}, {"a": [torch.ones(1)]}, {"a": np.float64(1).astype(np.float32)}])
def test_scalars_that_json_would_change_are_refused(scalars, tmp_path):
    with pytest.raises(TypeError, match=r"scalars\.a"):
        CheckpointStore(tmp_path, 1).save(1, ResumeState(1, {}, scalars, capture_rng()), None)
    assert folders(tmp_path) == set()


def draw(generators: dict[str, np.random.Generator | torch.Generator]) -> list[object]:
    drawn: list[object] = [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.randn(3).tolist()]
    for generator in generators.values():
        if isinstance(generator, torch.Generator):
            drawn.append(torch.randn(3, generator=generator).tolist())
        else:
            drawn += [generator.random(), int(generator.integers(1 << 20, dtype=np.uint32))]
    return drawn


def test_random_draws_go_on_where_they_stopped(tmp_path):
    def generators() -> dict[str, np.random.Generator | torch.Generator]:
        kinds = (np.random.PCG64, np.random.MT19937, np.random.Philox, np.random.SFC64)
        return {kind.__name__: np.random.Generator(kind(1)) for kind in kinds} | {"torch": torch.Generator()}

    used = generators()
    draw(used)  # leaves half-used words and a spare gaussian in the states
    CheckpointStore(tmp_path, 1).save(1, ResumeState(1, {}, {}, capture_rng(used)), None)
    expected = [draw(used) for _ in range(3)]
    fresh = generators()
    restore_rng(CheckpointStore(tmp_path, 1).load(1).state.rng, fresh)
    assert [draw(fresh) for _ in range(3)] == expected


def test_generators_that_were_not_captured_are_refused():
    with pytest.raises(CheckpointError, match=r"\['data'\], this run has \['sampler'\]"):
        restore_rng(capture_rng({"data": np.random.default_rng(0)}), {"sampler": np.random.default_rng(0)})


def test_the_last_ones_and_the_best_one_are_kept_across_restarts(tmp_path):
    save_many(CheckpointStore(tmp_path, 2), {1: (0.5, -1.0), 2: (0.9, -2.0), 3: None})
    save_many(CheckpointStore(tmp_path, 2), {4: (0.9, -3.0), 5: (float("nan"), 0.0), 6: (0.8, 0.0)})
    store = CheckpointStore(tmp_path, 2)
    assert store.steps() == (2, 5, 6)
    assert store.best_step() == 2
    assert folders(tmp_path) == {"step-000002", "step-000005", "step-000006"}


def test_after_going_back_the_checkpoint_saved_last_is_the_newest(tmp_path):
    store = CheckpointStore(tmp_path, 1)
    save_many(store, {10: None, 20: None})
    store = CheckpointStore(tmp_path, 1)
    save_many(store, {11: None})
    latest = CheckpointStore(tmp_path, 1).latest()
    assert latest is not None and latest.state.step == 11


def test_saving_a_step_again_replaces_it(tmp_path):
    store = CheckpointStore(tmp_path, 2)
    save_many(store, {1: None, 2: None})
    store.save(2, ResumeState(2, {"x": torch.zeros(1)}, {"again": True}, capture_rng()), None)
    assert store.load(2).state.scalars == {"again": True}
    assert folders(tmp_path) == {"step-000001", "step-000002"}


def test_a_replacement_killed_between_its_two_renames_is_undone(tmp_path):
    save_many(CheckpointStore(tmp_path, 2), {1: None})
    (tmp_path / "step-000001").rename(tmp_path / ".aside-step-000001")
    latest = CheckpointStore(tmp_path, 2).latest()
    assert latest is not None and latest.state.step == 1
    assert folders(tmp_path) == {"step-000001"}


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    match how:
        case "bit_flip":
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
        case "truncated":
            path.write_bytes(data[:-1])
        case "missing":
            path.unlink()


@pytest.mark.parametrize("file", ["manifest.json", "state.json", "tensors-00000.safetensors"])
@pytest.mark.parametrize("how", ["bit_flip", "truncated", "missing"])
def test_damage_to_any_file_is_noticed_and_the_one_before_is_loaded(file, how, tmp_path, caplog):
    store = CheckpointStore(tmp_path, 3)
    save_many(store, {1: None, 2: None})
    damage(tmp_path / "step-000002" / file, how)
    with pytest.raises(CheckpointError, match="step-000002 is damaged"):
        store.load(2)
    with caplog.at_level(logging.WARNING):
        latest = CheckpointStore(tmp_path, 3).latest()
    assert latest is not None and latest.state.scalars == {"step": 1}
    assert "step-000002 is damaged" in caplog.text


def test_no_checkpoint_is_none_but_only_damaged_ones_are_an_error(tmp_path):
    store = CheckpointStore(tmp_path, 1)
    assert store.latest() is None
    save_many(store, {1: None})
    damage(tmp_path / "step-000001" / "state.json", "bit_flip")
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        store.latest()


def test_a_missing_step_is_an_error_that_lists_those_there_are(tmp_path):
    store = CheckpointStore(tmp_path, 3)
    save_many(store, {1: None, 4: None})
    with pytest.raises(CheckpointError, match=r"no checkpoint of step 2 .* there are \[1, 4\]"):
        store.load(2)


def test_loaded_tensors_outlive_the_deletion_of_their_checkpoint(tmp_path):
    store = CheckpointStore(tmp_path, 1)
    save_many(store, {1: None})
    loaded = store.load(1).state.tensors["x"]
    save_many(store, {2: None})
    assert "step-000001" not in folders(tmp_path) and "step-000001" not in Path("/proc/self/maps").read_text()
    assert torch.equal(loaded, torch.full((1000,), 1.0))


def test_leftovers_are_removed_on_open_but_never_those_of_a_live_writer(tmp_path):
    (tmp_path / ".tmp-step-000009-dead").mkdir()
    with new_folder(tmp_path / "step-000010") as live:
        CheckpointStore(tmp_path, 1)
        assert live.is_dir()
    CheckpointStore(tmp_path, 1)
    assert folders(tmp_path) == {"step-000010"}


def save_forever(folder: Path, started: Event) -> None:
    torch.set_num_threads(1)
    store = CheckpointStore(folder, keep_last=2)
    latest = store.latest()
    step = 0 if latest is None else latest.state.step
    while True:
        step += 1
        # a step saved twice goes through the replacement of an existing folder as well
        for _ in range(2):
            store.save(step, state_of(step), (float(step % 5),))
            (folder.parent / "acknowledged").write_text(str(step))
            started.set()


def test_kill_9_at_any_time_leaves_the_newest_complete_checkpoint_loadable(tmp_path):
    folder = tmp_path / "checkpoints"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["metis_fast.checkpoint.resume"])  # torch takes seconds to import, a fork does not
    delays = random.Random(0)
    half_written = kills = 0
    while half_written < 6:  # kills that fell into a save; the others show nothing
        kills += 1
        assert kills <= 500, "no save was ever under way"
        started = context.Event()
        process = context.Process(target=save_forever, args=(folder, started))
        process.start()
        assert started.wait(600)
        time.sleep(delays.uniform(0, 0.02))
        process.kill()
        process.join()
        half_written += any(name.startswith(".") for name in folders(folder))
        acknowledged = int((tmp_path / "acknowledged").read_text() or "0")  # "": killed while writing it
        latest = CheckpointStore(folder, keep_last=2).latest()
        assert latest is not None and latest.state.step >= acknowledged
        assert torch.equal(latest.state.tensors["x"], torch.full((1000,), float(latest.state.step)))
        assert all(name.startswith("step-") for name in folders(folder))


def test_weights_go_back_in_place_and_stay_tied(tmp_path):
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(5, 3)
            self.head = torch.nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed.weight

    saved, fresh = Tied(), Tied()
    CheckpointStore(tmp_path, 1).save(1, ResumeState(1, add_prefix(WEIGHT, saved.state_dict()), {}, capture_rng()), None)
    loaded = CheckpointStore(tmp_path, 1).load(1).state.tensors
    copy_exactly(take_prefix(WEIGHT, loaded), fresh.state_dict())
    assert torch.equal(fresh.head.weight, saved.embed.weight) and fresh.head.weight is fresh.embed.weight


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"a": torch.ones(2)}, "lacks 1 tensors of this run"),
        ({"a": torch.ones(2), "b": torch.ones(3)}, r"b is \(3,\) torch.float32 in the checkpoint, expected \(2,\)"),
        ({"a": torch.ones(2), "b": torch.ones(2).bfloat16()}, "b is .* torch.bfloat16 .* expected .* torch.float32"),
    ],
    ids=["missing", "shape", "dtype"],
)
def test_weights_of_another_model_are_refused_before_anything_is_copied(saved, message):
    live = {"a": torch.zeros(2), "b": torch.zeros(2)}
    with pytest.raises(CheckpointError, match=message):
        copy_exactly(saved, live)
    assert not live["a"].any()
