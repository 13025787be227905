"""A full disk costs the checkpoint that does not fit, and nothing else.

The disk is a small tmpfs. Mounting one takes root: without it, the tests run again inside a user namespace.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from metis_fast.checkpoint.resume import CheckpointStore, ResumeState
from metis_fast.checkpoint.rng import capture_rng
from metis_fast.errors import CheckpointError

DISK = 1 << 20
NUMBERS = 20_000  # 80 KB of float32
PAGE = 4096


def state_of(step: int) -> ResumeState:
    tensors = {f"t{index}": torch.full((NUMBERS // 4,), float(step)) for index in range(4)}
    return ResumeState(step=step, tensors=tensors, scalars={"step": step}, rng=capture_rng())


def assert_intact(store: CheckpointStore, step: int) -> None:
    state = store.load(step).state
    assert state.scalars == {"step": step}
    assert all(torch.equal(tensor, torch.full_like(tensor, step)) for tensor in state.tensors.values())


def claims_to_have_space(folder: Path) -> int:
    """What a disk with a quota says: the check before a save passes, a write fails later."""
    return 1 << 60


@contextmanager
def tmpfs(folder: Path) -> Iterator[Path]:
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {mounted.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    if os.geteuid() != 0:
        pytest.skip("not root; the test in a user namespace covers this")
    with tmpfs(tmp_path / "disk") as folder:
        yield folder


def leave_free(disk: Path, size: int) -> None:
    filler = disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(disk).free))
    os.truncate(filler, filler.stat().st_size - size)


def test_a_disk_that_fills_up_at_any_point_of_a_save_leaves_all_older_checkpoints(small_disk):
    store = CheckpointStore(small_disk / "run", keep_last=2, free_bytes=claims_to_have_space)
    store.save(1, state_of(1), (1.0,))
    store.save(2, state_of(2), (0.0,))
    store.save(3, state_of(3), (0.0,))
    failed_after = set()
    for free in range(0, 140_000, PAGE):
        leave_free(small_disk, free)
        before = shutil.disk_usage(small_disk).free
        try:
            store.save(4, state_of(4), (0.0,))
        except CheckpointError as error:
            failed_after.add(free)
            text = str(error)
            assert "\n" not in text and "step-000004" in text and "No space left on device" in text
            assert "training state up to step 3 is safe" in text
            assert {path.name for path in (small_disk / "run").iterdir()} == {"step-000001", "step-000002", "step-000003"}
            assert shutil.disk_usage(small_disk).free == before
            for step in (1, 2, 3):
                assert_intact(store, step)
        else:
            break
        (small_disk / "filler").unlink()
    assert len(failed_after) > 20, "every page of the checkpoint was the first that did not fit"
    assert store.steps() == (1, 3, 4)
    assert_intact(store, 4)


def test_a_disk_that_fills_up_while_a_step_is_saved_again_leaves_the_old_one(small_disk):
    store = CheckpointStore(small_disk, keep_last=1, free_bytes=claims_to_have_space)
    store.save(1, state_of(1), None)
    for free in range(0, 80_000, 4 * PAGE):
        leave_free(small_disk, free)
        with pytest.raises(CheckpointError, match="up to step 1 is safe"):
            store.save(1, state_of(1), None)
        assert_intact(store, 1)
        (small_disk / "filler").unlink()


def test_a_save_that_cannot_fit_is_refused_before_a_byte_is_written(small_disk):
    store = CheckpointStore(small_disk / "run", keep_last=1)
    store.save(1, state_of(1), None)
    leave_free(small_disk, 60_000)
    before = (small_disk / "run").stat().st_mtime_ns
    with pytest.raises(
        CheckpointError, match=r"not enough space \(needs 0\.1\d MiB, free 0\.05 MiB\); .* up to step 1 is safe"
    ):
        store.save(2, state_of(2), None)
    assert (small_disk / "run").stat().st_mtime_ns == before
    assert_intact(store, 1)


def test_the_first_checkpoint_on_a_full_disk_says_that_nothing_is_safe_yet(small_disk):
    store = CheckpointStore(small_disk / "run", keep_last=1)
    leave_free(small_disk, PAGE)
    with pytest.raises(CheckpointError, match="no earlier checkpoint exists"):
        store.save(1, state_of(1), None)
    assert store.latest() is None


@pytest.mark.skipif(os.geteuid() == 0, reason="root runs the tests above as they are")
def test_the_tests_above_pass_in_a_user_namespace(tmp_path):
    probe = subprocess.run(["unshare", "-rm", "true"], capture_output=True, text=True, check=False)
    if probe.returncode:
        pytest.skip(f"no user namespaces here: {probe.stderr.strip()}")
    pytest_command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", f"--basetemp={tmp_path / 'inner'}"]
    inner = subprocess.run(["unshare", "-rm", *pytest_command, __file__], capture_output=True, text=True, check=False)
    assert inner.returncode == 0 and "passed" in inner.stdout, inner.stdout


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_write_that_fails_in_the_middle_of_any_file_leaves_the_older_checkpoint(tmp_path):
    store = CheckpointStore(tmp_path, keep_last=1)
    path = store.save(1, state_of(1), None)
    sizes = sorted(file.stat().st_size for file in path.iterdir())
    for limit in (0, *(size - 1 for size in sizes)):  # cut the manifest, the state, the tensors short, in turn
        with file_size_limit(limit), pytest.raises(CheckpointError, match=r"File too large .* up to step 1 is safe"):
            store.save(2, state_of(2), None)
        assert {entry.name for entry in tmp_path.iterdir()} == {"step-000001"}
        assert_intact(store, 1)
    with file_size_limit(sizes[-1] + PAGE):
        store.save(2, state_of(2), None)
    assert_intact(store, 2)


def test_a_file_in_place_of_the_folder_is_one_readable_error(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.write_text("")
    with pytest.raises(CheckpointError, match=r"cannot open checkpoint folder .* choose a writable run\.dir"):
        CheckpointStore(folder, keep_last=1)
