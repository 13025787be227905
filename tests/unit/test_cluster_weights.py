"""Weights between machines: what is published arrives bit for bit, in full or as what differs from the version before."""

from __future__ import annotations

import asyncio
import logging
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from metis_fast.cluster.weights import Arriving, Bucket, Changes, Publication, Published, Publisher, changes, pack, read
from metis_fast.errors import StagingError, SyncError
from metis_fast.model import Policy
from metis_fast.model_folder import hf_shapes
from metis_fast.rollout.engine import SyncReport, update
from metis_fast.rollout.native import NativeEngine
from metis_fast.sync.staging import Staging
from metis_fast.testing.fakes import FakeEngine

_BUCKET = 1 << 12
Weights = dict[str, Tensor]


class Store:
    """Ray's objects: pickled, so that they cannot be written to by whoever has put them, and read-only."""

    def __init__(self) -> None:
        self._numbers, self.objects = count(), dict[int, bytes]()
        self.read: list[int] = []

    def put(self, value: object) -> int:
        key = next(self._numbers)
        self.objects[key] = pickle.dumps(value)
        return key

    def get(self, key: int) -> Any:
        self.read.append(key)
        found = pickle.loads(self.objects[key])
        found.data.flags.writeable = False
        return found

    def damage(self, key: int) -> None:
        """Change what decoding the changes in it gives, unseen by their encoding."""
        found: Changes = pickle.loads(self.objects[key])
        data = found.data.copy()
        data[0] ^= 1  # of the first new value
        self.objects[key] = pickle.dumps(Changes(found.places, found.encoding, data, found.crc32))


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Store:
    made = Store()
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(put=made.put, get=made.get))
    return made


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype
        and torch.equal(a[name].contiguous().view(-1).view(torch.uint8), b[name].contiguous().view(-1).view(torch.uint8))
        for name in a
    )


def updated(weights: Weights, seed: int, share: float = 0.03) -> Weights:
    """Some elements of some tensors are others; NaNs and signed zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for number, (name, tensor) in enumerate(weights.items()):
        new = tensor.clone()
        if number % 3:
            where = torch.rand(tensor.shape, generator=generator) < share
            new[where] = torch.randn(tensor.shape, generator=generator).to(tensor.dtype)[where]
        found[name] = new
    last = found[next(reversed(found))].view(-1)
    last[:1], last[1:2] = -0.0, torch.nan
    return found


def weights_of(policy: Policy) -> Weights:
    return {name: parameter.detach().clone() for name, parameter in policy.model.named_parameters()}


@pytest.fixture(params=["float32", "bfloat16"])
def policy(request: pytest.FixtureRequest, load_tiny: Callable[..., Policy]) -> Policy:
    return load_tiny(dtype=request.param)


def arrive(engine: Any, published: Published, version: int, has: int | None) -> SyncReport:
    """As a node's actor does it."""
    coming = Arriving(published, version, has, engine.held)
    return coming.told(asyncio.run(update(engine, coming.tensors, version, 2)))


def test_a_native_engine_that_is_told_what_changed_has_what_one_has_that_is_told_all(store: Store, policy: Policy) -> None:
    engine, publisher = NativeEngine(policy), Publisher(_BUCKET, delta=True)
    weights, has = weights_of(policy), None
    size = sum(bucket.data.nbytes for bucket in pack(iter(weights.items()), _BUCKET))
    for version in range(4):
        published = publisher.publish(iter(weights.items()), version)
        assert published.base == has and len(published.changes) == (0 if has is None else len(published.full))
        report = arrive(engine, published, version, has)
        assert same(weights_of(policy), weights) and same(dict(read(published)), weights)
        assert (report.mode, report.retries) == ("full" if has is None else "delta", 0)
        assert report.num_bytes == size if has is None else 0 < report.num_bytes < size / 5
        weights, has = updated(weights, version), version


class Staged:
    """What of a vLLM engine takes weights: they are staged, and the current version is what it holds."""

    def __init__(self, policy: Policy) -> None:
        shapes = {name: tuple(shape) for name, shape in hf_shapes(policy.model.config).items()}
        self.staging = Staging(shapes, policy.head.dtype, 1 << 14)

    def held(self) -> Weights:
        return self.staging.tensors()

    async def update(self, weights: Iterator[tuple[str, Tensor]], version: int) -> SyncReport:
        manifest = self.staging.write(weights, version)
        if self.staging.examine():
            raise StagingError("damaged")
        return SyncReport(version, "full", manifest.num_bytes)


def test_what_is_staged_by_changes_is_what_is_staged_in_full(store: Store, policy: Policy) -> None:
    one, other, publisher = Staged(policy), Staged(policy), Publisher(_BUCKET, delta=True)
    weights, has = weights_of(policy), None
    for version in range(3):
        published = publisher.publish(iter(weights.items()), version)
        told, whole = arrive(one, published, version, has), arrive(other, published, version, None)
        assert (told.mode, whole.mode) == ("full" if has is None else "delta", "full")
        assert same(one.held(), weights)
        assert one.staging.current is not None and other.staging.current is not None
        assert one.staging.current.digest == other.staging.current.digest
        weights, has = updated(weights, version), version
    for each in (one, other):
        each.staging.close()


@pytest.mark.parametrize("has", [None, 0])
def test_a_node_that_has_another_version_pulls_all_of_it_and_no_changes(store: Store, policy: Policy, has: int | None) -> None:
    engine, publisher = NativeEngine(policy), Publisher(_BUCKET, delta=True)
    weights = weights_of(policy)
    for version in range(2):
        publisher.publish(iter(weights.items()), version)
        weights = updated(weights, version)
    published = publisher.publish(iter(weights.items()), 2)
    store.read.clear()
    report = arrive(engine, published, 2, has)
    assert (report.mode, report.retries) == ("full", 0) and store.read == list(published.full)
    assert same(weights_of(policy), dict(read(published)))


def test_a_node_that_has_the_version_before_pulls_changes_and_nothing_else(store: Store, policy: Policy) -> None:
    engine, publisher = NativeEngine(policy), Publisher(_BUCKET, delta=True)
    weights = weights_of(policy)
    arrive(engine, publisher.publish(iter(weights.items()), 5), 5, None)
    published = publisher.publish(iter(updated(weights, 0).items()), 6)
    store.read.clear()
    report = arrive(engine, published, 6, 5)
    assert store.read == list(published.changes)
    assert report.num_bytes == sum(store.get(key).data.nbytes for key in published.changes)


@pytest.mark.parametrize("fault", ["base", "changes"])
def test_what_does_not_come_out_as_it_should_is_fetched_in_full_and_counted(
    store: Store, policy: Policy, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    engine, publisher = NativeEngine(policy), Publisher(_BUCKET, delta=True)
    weights = weights_of(policy)
    arrive(engine, publisher.publish(iter(weights.items()), 0), 0, None)
    weights = updated(weights, 0)
    published = publisher.publish(iter(weights.items()), 1)
    if fault == "base":  # the last bucket's, which the others do not hear of
        held = policy.model.get_parameter(store.get(published.full[-1]).places[0].name)
        with torch.no_grad():
            held.view(-1)[-1] += 1
        number = len(published.full) - 1
    else:
        number = next(i for i, key in enumerate(published.changes) if store.get(key).data.nbytes > 0)
        store.damage(published.changes[number])
    store.read.clear()
    with caplog.at_level(logging.WARNING):
        report = arrive(engine, published, 1, 0)
    assert same(weights_of(policy), weights)
    assert (report.mode, report.retries) == ("delta", 1)
    assert set(store.read) == {*published.changes, published.full[number]}
    (line,) = (record.message for record in caplog.records)
    assert "weight version 1" in line and "CRC-32" in line and line.endswith("fetching all of it")


def test_a_version_that_is_damaged_where_it_was_staged_comes_in_full_the_second_time(store: Store, policy: Policy) -> None:
    """By then the engine holds the damaged one."""
    engine, publisher = Staged(policy), Publisher(_BUCKET, delta=True)
    weights = weights_of(policy)
    arrive(engine, publisher.publish(iter(weights.items()), 0), 0, None)
    weights = updated(weights, 0)
    published = publisher.publish(iter(weights.items()), 1)
    write, tries = engine.staging.write, count()

    def damaged(coming: Iterator[tuple[str, Tensor]], version: int) -> Any:
        manifest = write(coming, version)
        if next(tries) == 0:
            engine.staging.tensors()[next(iter(weights))].view(-1)[0] += 1
        return manifest

    engine.staging.write = damaged  # pyright: ignore[reportAttributeAccessIssue]
    report = arrive(engine, published, 1, 0)
    assert (report.mode, report.retries) == ("full", 1) and same(engine.held(), weights)
    assert set(published.full) <= set(store.read)
    engine.staging.close()


def test_in_full_mode_nothing_is_kept_and_nothing_else_is_put(store: Store, policy: Policy) -> None:
    publisher, weights = Publisher(_BUCKET, delta=False), weights_of(policy)
    for version in range(2):
        published = publisher.publish(iter(weights.items()), version)
        assert published == Published(published.full)
        assert len(store.objects) == (version + 1) * len(published.full) and not store.read
    assert publisher._last is None


def test_an_engine_that_has_nothing_at_hand_is_given_all(store: Store, policy: Policy) -> None:
    publisher, weights = Publisher(_BUCKET, delta=True), weights_of(policy)
    publisher.publish(iter(weights.items()), 0)
    published = publisher.publish(iter(updated(weights, 0).items()), 1)
    coming = Arriving(published, 1, 0, dict)
    assert same(dict(coming.tensors()), updated(weights, 0))
    assert coming.told(SyncReport(1, "full")).mode == "full"


def test_a_bucket_that_changed_nearly_everywhere_is_put_once(store: Store) -> None:
    publisher = Publisher(_BUCKET, delta=True)
    random = np.random.default_rng(0)
    old, new = ({f"t{i}": torch.from_numpy(random.standard_normal(900, np.float32)) for i in range(3)} for _ in range(2))
    publisher.publish(iter(old.items()), 0)
    published = publisher.publish(iter(new.items()), 1)
    assert published.changes == published.full and len(store.objects) == 6
    assert same(dict(Arriving(published, 1, 0, lambda: old).tensors()), new)


def test_buckets_of_several_processes_are_one_version_and_those_that_do_not_agree_tell_no_changes(store: Store) -> None:
    first = [[Bucket(np.zeros(64, np.uint8), bucket.places) for bucket in _some(name)] for name in "ab"]
    before = [Publication(3), Publication(3)]
    for publication, buckets in zip(before, first, strict=True):
        for bucket in buckets:
            publication.put(bucket)
        publication.finish()
    parts = []
    for publication, name in zip(before, "ab", strict=True):
        coming = Publication(4, publication)
        for bucket in _some(name):
            coming.put(bucket)
        parts.append(coming.finish())
    whole = Published.joined(parts)
    assert whole.base == 3 and len(whole.full) == len(whole.changes) == 2
    held = {name: torch.zeros(16) for name in "ab"}
    assert same(dict(Arriving(whole, 4, 3, lambda: held).tensors()), dict(read(whole)))
    assert Published.joined([parts[0], Published(parts[1].full)]) == Published(whole.full)
    assert Published.joined([parts[0], Published(parts[1].full, 2, parts[1].changes)]) == Published(whole.full)


def _some(name: str) -> list[Bucket]:
    return list(pack(iter([(name, torch.arange(16.0))]), 64))


def test_changes_are_not_applied_to_other_tensors() -> None:
    (old,), (new,) = _some("a"), list(pack(iter([("a", torch.ones(16))]), 64))
    told = changes(old, new)
    assert same(dict(told.applied(dict(old.tensors())).tensors()), {"a": torch.ones(16)})
    for held in ({}, {"a": torch.arange(15.0)}, {"a": torch.arange(16.0).bfloat16()}, {"a": torch.arange(16.0) + 1}):
        with pytest.raises(SyncError):
            told.applied(held)


def test_a_report_of_weights_that_nobody_read_is_left_alone() -> None:
    report = asyncio.run(FakeEngine.update(_fake(), iter(()), 1))
    assert Arriving(Published(()), 1).told(report) == report


def _fake() -> FakeEngine:
    return FakeEngine.__new__(FakeEngine)
