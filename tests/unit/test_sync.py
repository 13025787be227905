"""Staged weight versions: what was sent arrives bit for bit, or a `SyncError` says which bucket did not."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metis_fast.errors import EngineError, StagingError, SyncError
from metis_fast.rollout.engine import SyncReport, update
from metis_fast.sync import segment
from metis_fast.sync.delta import decode, encode
from metis_fast.sync.manifest import Manifest
from metis_fast.sync.reader import Reader
from metis_fast.sync.staging import Staging
from metis_fast.testing.fakes import FakeEngine

SHAPES = {"a": (7, 5), "b": (300,), "c": (), "d": (64, 3)}  # odd sizes; "b" lies in several buckets


def version(number: int, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in SHAPES.items()}


def bits(weights):
    return {name: tensor.contiguous().reshape(-1).view(torch.uint8).tolist() for name, tensor in dict(weights).items()}


@pytest.fixture
def staging():
    with Staging(SHAPES, torch.float32, 256) as made:
        yield made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_staged_is_read_in_any_order_of_sending(dtype):
    weights = version(1, dtype)
    with Staging(SHAPES, dtype, 256) as staging:
        manifest = staging.write(iter(reversed(weights.items())), 1)
        assert bits(Reader(Manifest.from_dict(manifest.to_dict()))) == bits(weights)


def test_the_last_whole_version_stays_while_the_next_is_written_or_fails(staging):
    first = staging.write(iter(version(1).items()), 1)

    def breaks():
        yield from list(version(2).items())[:2]
        raise RuntimeError("trainer died")

    with pytest.raises(RuntimeError, match="trainer died"):
        staging.write(breaks(), 2)
    assert staging.current is first and bits(Reader(first)) == bits(version(1))


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([("a", torch.zeros(7, 5))], "3 tensors did not come"),
        ([("x", torch.zeros(1))], "no such tensor"),
        ([("a", torch.zeros(5, 7))], "expected"),
        ([("a", torch.zeros(7, 5).bfloat16())], "expected"),
        ([("a", torch.zeros(7, 5))] * 2, "once"),
    ],
)
def test_a_stream_that_is_not_the_model_is_refused(staging, weights, message):
    with pytest.raises(ValueError, match=message):
        staging.write(iter(weights), 1)


def flip(manifest: Manifest, offset: int) -> None:
    with (segment.FOLDER / manifest.segment).open("r+b") as file:
        file.seek(segment.HEADER + offset)
        byte = file.read(1)[0]
        file.seek(segment.HEADER + offset)
        file.write(bytes([byte ^ 4]))


def test_every_fault_of_a_segment_is_told(staging):
    manifest = staging.write(iter(version(1).items()), 1)
    flip(manifest, 300)
    with pytest.raises(SyncError, match=r"version 1, bucket 1 of .*\(b\).*expected"):
        Reader(manifest)
    flip(manifest, 300)
    assert bits(Reader(manifest)) == bits(version(1))
    with pytest.raises(SyncError, match="version 1 came after version 2"):
        Reader(manifest, newest=2)
    with pytest.raises(SyncError, match="digest"):
        Reader(replace(manifest, places=manifest.places[:-1]))
    with pytest.raises(SyncError, match="there is no"):
        Reader(replace(manifest, segment="metis-fast-weights-none"))
    for number in (2, 3):
        staging.write(iter(version(number).items()), number)
    with pytest.raises(SyncError, match="holds weight version 3"):
        Reader(manifest)
    newest = staging.current
    with (segment.FOLDER / newest.segment).open("r+b") as file:
        file.truncate(segment.HEADER + 100)
    with pytest.raises(SyncError, match="has 164 bytes, expected"):
        Reader(newest)


@given(
    itemsize=st.sampled_from([2, 4]),
    changes=st.lists(st.integers(0, 2047), max_size=1500),
    seed=st.integers(0, 9),
    far=st.booleans(),
)
@settings(max_examples=60)
def test_delta_is_lossless_and_never_longer_than_all(itemsize, changes, seed, far):
    """Random bytes: NaN payloads and signed zeros among them. far: gaps that uint8 and uint16 must bridge."""
    size = 2048 * (80 if far else 1)
    old = np.random.default_rng(seed).integers(0, 256, size * itemsize, np.uint8)
    new = old.copy()
    for at in changes:
        new[(at * (80 if far else 1)) * itemsize] ^= 0x80
    encoding, payload = encode(old, new, itemsize)
    target = old.copy()
    decode(encoding, payload, target, itemsize)
    assert (target == new).all() and payload.nbytes <= new.nbytes


def test_signed_zero_and_nan_payloads_count_as_changes():
    old = np.array([0x0000, 0x7FC0, 1, 2] * 16, np.uint16)
    new = old.copy()
    new[0], new[1] = 0x8000, 0x7FC1
    encoding, payload = encode(old.view(np.uint8), new.view(np.uint8), 2)
    target = old.view(np.uint8).copy()
    decode(encoding, payload, target, 2)
    assert encoding != "full" and (target.view(np.uint16) == new).all()


def test_a_damaged_version_may_be_written_again(staging):
    staging.write(iter(version(1).items()), 1)
    damaged = staging.write(iter(version(2).items()), 2)
    flip(damaged, 300)
    with pytest.raises(ValueError, match="version 2 came after version 2"):  # nobody has looked yet
        staging.write(iter(version(2).items()), 2)
    assert "version 2, bucket 1" in staging.examine() and staging.current is damaged
    again = staging.write(iter(version(2).items()), 2)
    assert not staging.damage and not staging.examine()
    assert again.segment != damaged.segment and again.digest == damaged.digest


def test_the_tensors_of_the_current_version_are_there_while_the_next_is_written(staging):
    assert staging.tensors() == {}
    staging.write(iter(version(1).items()), 1)
    held = staging.tensors()
    staging.write(((name, held[name] + 1) for name in SHAPES), 2)
    assert bits(staging.tensors()) == bits({name: tensor + 1 for name, tensor in version(1).items()})


class Refusing(FakeEngine):
    """An engine whose staged version is damaged so many times."""

    def __init__(self, times: int) -> None:
        self.times, self.got = times, []

    async def update(self, weights, version):
        self.got.append((dict(weights), version))
        if len(self.got) <= self.times:
            raise StagingError("damaged")
        return SyncReport(version, "full", retries=1)


def test_an_update_is_made_again_with_fresh_weights_and_counted():
    engine = Refusing(2)
    report = asyncio.run(update(engine, lambda: iter([("a", torch.tensor(len(engine.got)))]), 7, retries=2))
    assert (report.version, report.retries) == (7, 3)
    assert engine.got == [({"a": torch.tensor(number)}, 7) for number in range(3)]
    engine = Refusing(3)
    with pytest.raises(EngineError, match="damaged in shared memory in each of 3 tries"):
        asyncio.run(update(engine, lambda: iter(()), 7, retries=2))
    assert len(engine.got) == 3


def test_too_little_shared_memory_is_told_before_anything_is_written(monkeypatch):
    monkeypatch.setattr(segment, "free_bytes", lambda: 1000)
    with pytest.raises(EngineError, match="enlarge it"):
        Staging(SHAPES, torch.float32, 256)


def test_closing_removes_the_segments(staging):
    path = segment.FOLDER / staging.write(iter(version(1).items()), 1).segment
    staging.close()
    assert not path.exists()


def test_segments_of_killed_processes_are_removed_and_those_of_living_ones_stay(staging):
    code = (
        "import time, torch; from metis_fast.sync.staging import Staging\n"
        "s = Staging({'a': (4,)}, torch.float32, 64); print(s.write(iter([('a', torch.ones(4))]), 1).segment, flush=True)\n"
        "time.sleep(60)"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        path = segment.FOLDER / child.stdout.readline().strip()
        segment.remove_stale()
        assert path.exists()
    finally:
        child.send_signal(signal.SIGKILL)
        child.communicate()
    mine = staging.write(iter(version(1).items()), 1)
    segment.remove_stale()
    assert not path.exists() and (segment.FOLDER / mine.segment).exists()


def test_the_torch_trainers_weights_are_those_of_the_folder_by_name(load_tiny):
    from metis_fast.config import Config
    from metis_fast.model_folder import hf_shapes
    from metis_fast.train.torch_backend import TorchTrainer

    policy, config = load_tiny(), Config.model_validate({"model": {"dtype": "float32"}})
    trainer = TorchTrainer(policy, config, config.train.optim, 1)
    found = dict(trainer.weights())
    assert {name: tuple(t.shape) for name, t in found.items()} == dict(hf_shapes(policy.model.config))
    assert trainer.shares_policy and found["model.language_model.embed_tokens.weight"].data_ptr() == policy.head.data_ptr()
