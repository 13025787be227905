"""Limits of whole sessions: where a control group can be made and what is written to it; what the watchdog counts."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from metis_fast.tools.sandbox import watchdog
from metis_fast.tools.sandbox.board import Board, Usage, make_board
from metis_fast.tools.sandbox.cgroups import Cgroups, make_group, remove_group
from metis_fast.tools.sandbox.watchdog import Watch
from metis_fast.tools.sandbox.wire import Limits

LIMITS = Limits(
    memory_mb=100,
    session_memory_mb=200,
    scratch_mb=10,
    cpu_s=10,
    max_output_chars=100,
    max_image_pixels=100,
    max_shown_mb=1,
    max_tasks=64,
    unsafe=False,
)


def hierarchy(root: Path, own: str, controllers: str = "cpu memory pids", delegated: str = "memory pids") -> Path:
    """Files as the kernel has them, with one group of our own; gives the file that says which it is."""
    (root / own).mkdir(parents=True)
    (root / "cgroup.controllers").write_text(controllers)
    ((root / own).parent if own else root).joinpath("cgroup.subtree_control").write_text(delegated)
    if own:
        (root / own / "memory.max").write_text("max\n")
    membership = root.parent / "membership"
    membership.write_text(f"0::/{own}\n")
    return membership


@pytest.mark.parametrize(
    ("delegated", "given"), [("memory pids", "+memory +pids"), ("cpu io memory pids", "+memory +pids +cpu")]
)
def test_a_group_stands_beside_our_own(tmp_path: Path, delegated: str, given: str) -> None:
    membership = hierarchy(tmp_path / "cgroup", "user/app", delegated=delegated)
    group = make_group("metis", tmp_path / "cgroup", membership)
    assert group is not None and group == tmp_path / "cgroup" / "user" / "metis"
    assert (group / "cgroup.subtree_control").read_text() == given


@pytest.mark.parametrize("why", ["version 1", "not delegated", "no memory", "limited", "elsewhere", "read-only"])
def test_where_no_group_can_be_made_there_is_none(tmp_path: Path, why: str) -> None:
    root = tmp_path / "cgroup"
    membership = hierarchy(
        root,
        "user/app",
        controllers="cpu pids" if why == "no memory" else "cpu memory pids",
        delegated="" if why == "not delegated" else "memory pids",
    )
    if why == "version 1":
        membership.write_text("4:memory:/user/app\n")
    elif why == "limited":  # a group beside ours would not be under our limit
        (root / "user" / "app" / "memory.max").write_text("1000000\n")
    elif why == "elsewhere":
        membership.write_text("0::/../other\n")
    elif why == "read-only":
        (root / "user" / "metis").write_text("stands for a folder that cannot be made")
    assert make_group("metis", root, membership) is None


def test_what_this_machine_has_is_found_out_without_an_error() -> None:
    group = make_group(f"metis-test-{os.getpid()}")
    if group is not None:
        remove_group(group)
        assert not group.exists()


def test_a_session_group_has_the_limits(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_PATH)
    written = ("memory.max", "memory.oom.group", "pids.max", "cgroup.procs", "memory.events")  # swap is not in this kernel
    groups = Cgroups(fd, LIMITS)
    groups.make(7)
    (group,) = tmp_path.iterdir()
    for name in written:  # which in the kernel's file system are there at once
        (group / name).touch()
    groups.limit(group.name)
    groups.enter(7)
    assert [(group / name).read_text() for name in written] == [str(200 << 20), "1", "64", "0", ""]
    assert not groups.was_full(7)
    (group / "memory.events").write_text("low 0\noom 3\noom_kill 2\n")
    groups.make(8)
    (tmp_path / groups._names[8] / "memory.events").write_text("low 0\noom 0\noom_kill 2\n")  # the machine was short of it
    assert groups.was_full(7) and not groups.was_full(8)
    groups.remove(7)  # not empty: as if the kernel were late
    groups.make(7)
    assert not groups.was_full(7)
    for name in written:
        (group / name).unlink()
    (tmp_path / groups._names[8] / "memory.events").unlink()
    groups.remove(8)
    groups.remove(7)
    assert list(tmp_path.iterdir()) == []
    os.close(fd)


def test_the_board_holds_what_each_side_wrote() -> None:
    board = Board(make_board())
    usage = Usage(1, 2, 3, 4, 5)
    board.set_running(3, True)
    board.report(3, usage)
    assert (board.is_running(3), board.usage(3), board.is_running(2), board.usage(4)) == (True, usage, False, Usage())
    board.set_running(3, False)
    assert board.usage(3) == usage and not board.is_running(3)
    board.clear(3)
    assert board.usage(3) == Usage()
    os.close(board.fd)


FAMILY = """
import os, sys, threading, time
if not os.fork():
    held = bytearray(os.urandom(1 << 20)) * 40
    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
    print("ready", flush=True)
    time.sleep(60)
    os._exit(0)
end = time.monotonic() + 60
while time.monotonic() < end: pass
"""


@pytest.mark.parametrize("tells", [True, False], ids=["children are told", "children are looked for"])
def test_the_watchdog_counts_a_whole_family(tells: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "_TELLS_CHILDREN", tells and watchdog._TELLS_CHILDREN)
    with subprocess.Popen([sys.executable, "-c", FAMILY], stdout=subprocess.PIPE, start_new_session=True) as family:
        try:
            assert family.stdout is not None and family.stdout.readline() == b"ready\n"
            rough, exact = Watch(family.pid, "", 1 << 40), Watch(family.pid, "", 0)
            first = exact.measure()
            time.sleep(0.5)
            second, roughly = exact.measure(), rough.measure()
        finally:
            os.killpg(family.pid, 9)
    assert first.tasks == second.tasks == 3 and first.cpu_ns == 0
    assert 40 << 20 < second.memory < 80 << 20 and roughly.memory >= second.memory
    passed = second.at_ns - first.at_ns
    assert 0 < second.cpu_ns <= 1.1 * passed and second.cpu_ns + second.delay_ns > 0.5 * passed
    gone = exact.measure()
    assert gone.tasks in (0, 1, 2, 3) and gone.cpu_ns >= second.cpu_ns


def test_much_memory_is_measured_in_several_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "_EXACT_S", 0.0)
    with subprocess.Popen([sys.executable, "-c", FAMILY], stdout=subprocess.PIPE, start_new_session=True) as family:
        try:
            assert family.stdout is not None and family.stdout.readline() == b"ready\n"
            roughly = Watch(family.pid, "", 1 << 40).measure().memory
            watch = Watch(family.pid, "", roughly - (1 << 20))
            part, whole, *later = [watch.measure().memory for _ in range(4)]
        finally:
            os.killpg(family.pid, 9)
    assert 40 << 20 < part < whole < roughly and later == pytest.approx([whole, whole], abs=4 << 20)


CHURN = """
import ctypes, os, signal, time
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # orphans are its own children, as those of the first process of a namespace
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
def hop():
    while True:
        if os.fork(): os._exit(0)
        end = time.monotonic() + 0.001
        while time.monotonic() < end: pass
for _ in range(8):
    if not os.fork(): hop()
print("ready", flush=True)
while True: pass
"""


def _shares_of_churn() -> tuple[float, float]:
    """Delay and CPU time that are booked for it, as shares of the time that passed."""
    with subprocess.Popen([sys.executable, "-c", CHURN], stdout=subprocess.PIPE, start_new_session=True) as family:
        try:
            assert family.stdout is not None and family.stdout.readline() == b"ready\n"
            watch = Watch(family.pid, "/tmp", 1 << 40)
            seen = [watch.measure()]
            for _ in range(20):
                time.sleep(0.05)
                seen.append(watch.measure())
        finally:
            os.killpg(family.pid, 9)
    passed = seen[-1].at_ns - seen[0].at_ns
    return seen[-1].delay_ns / passed, seen[-1].cpu_ns / passed


def test_who_keeps_himself_from_running_with_short_lived_children_is_not_kept_from_it_by_others() -> None:
    # Believed, it would be a delay of about 0.9 and CPU time of about 0.1. A busy machine delays it in truth: several tries.
    tries: list[tuple[float, float]] = []
    while not tries or (len(tries) < 5 and not (tries[-1][0] < 0.5 and tries[-1][1] > 0.3)):
        tries.append(_shares_of_churn())
    delay, used = tries[-1]
    assert delay < 0.5 and used > 0.3, tries


RESTRICTED = """
import os, sys
from metis_fast.tools.sandbox import landlock
from metis_fast.tools.sandbox.libc import prctl
found = landlock.version()
if not found:
    print("none")
    sys.exit()
open("outside", "w").close()
os.makedirs("scratch/one")
os.makedirs("scratch/two")
prctl(38, 1)
landlock.restrict(found, "scratch")
def tries(what):
    try: what()
    except PermissionError: return "refused"
    return "done"
print(*map(tries, (
    lambda: open("outside", "w"), lambda: os.unlink("outside"), lambda: os.mkdir("new"), lambda: os.truncate("outside", 0),
    lambda: os.rename("scratch/one", "moved"), lambda: open("outside").read(), lambda: open("/dev/null", "w"),
    lambda: open("scratch/one/file", "w"), lambda: os.rename("scratch/one/file", "scratch/two/file"),
)))
"""


def test_landlock_alone_keeps_writes_in_scratch(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", RESTRICTED], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    if done.stdout == "none\n":
        pytest.skip("this kernel has no landlock")
    assert done.stdout.split() == [*["refused"] * 3, "refused", "refused", *["done"] * 4], done
