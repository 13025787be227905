"""The processes of the Megatron back end, with workers that need no megatron: calls, streams, and every way to end badly."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from metis_fast import cli
from metis_fast.config import MegatronConfig
from metis_fast.errors import CheckpointError, ConfigError, Interrupted, NonFiniteError, TrainerError
from metis_fast.run.interrupt import Interrupts
from metis_fast.train.megatron import launch
from metis_fast.train.megatron.launch import Ranks

HERE = Path(__file__).parent
PROGRAM = Path(sys.executable).with_name("metis-fast")
WORKER = "rank_workers:Worker"
TWO = MegatronConfig(tensor_parallel=2)


@pytest.fixture(scope="module", autouse=True)
def importable():
    """Ranks find `rank_workers`."""
    patch = pytest.MonkeyPatch()
    patch.setenv("PYTHONPATH", str(HERE))
    patch.setenv("OMP_NUM_THREADS", "1")
    yield
    patch.undo()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Two ranks that no test ends."""
    with Ranks(TWO, WORKER, "shared", tmp_path_factory.mktemp("ranks")) as ranks:
        pids = [place[2] for place in ranks.call("where")]
        yield ranks
    assert not alive(pids)


@pytest.fixture
def own(tmp_path):
    """Two ranks for a test that ends them; whatever they leave running fails it."""
    ranks = Ranks(TWO, WORKER, "own", tmp_path / "ranks")
    pids = [place[2] for place in ranks.call("where")] + ranks.call("fork")
    assert len(pids) == 4 and all(map(runs, pids))
    yield ranks, pids
    ranks.close()
    assert not alive(pids)


def alive(pids, limit_s=60.0):
    """Those that still run after the limit; waits no longer than for the last one to end."""
    deadline = time.monotonic() + limit_s
    while True:
        left = [pid for pid in pids if runs(pid)]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.02)


def runs(pid):
    """Zombies do not."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def when(path, action):
    """Run an action in a thread once a file is there, and a little later."""

    def wait():
        while not path.exists():
            time.sleep(0.01)
        time.sleep(0.2)
        action()

    threading.Thread(target=wait, daemon=True).start()


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


# -- what works --------------------------------------------------------------------------------------------------------


def test_a_call_runs_on_all_ranks_and_returns_by_rank(ranks):
    assert ranks.call("sum", 10) == [21, 21]
    places = ranks.call("where")
    assert [(name, rank, size) for name, rank, _, _, size, _ in places] == [("shared", 0, 2), ("shared", 1, 2)]
    assert all(pid == session for _, _, pid, session, _, _ in places)  # sessions of their own: no Ctrl-C
    expected = {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    assert all(variables == expected | {"METIS_RANK_KEY": None} for *_, variables in places)


def test_arguments_reach_every_rank_whole_and_writable(ranks):
    array = np.arange(3_000_000, dtype=np.float32) / 7
    tensor = torch.full((300, 7), 0.125, dtype=torch.bfloat16)
    got = ranks.call("digest", array, tensor, "ein Wort")
    assert got == [(float((array + 1).sum()), torch.bfloat16, 262.5, "ein Wort")] * 2


def test_a_stream_yields_every_ranks_items_in_their_order(ranks):
    got = list(ranks.stream("items", 20))
    for rank in range(2):
        names, tensors = zip(*[item for number, item in got if number == rank], strict=True)
        assert names == tuple(f"w{i}" for i in range(20))
        for i, tensor in enumerate(tensors):
            assert torch.equal(tensor, torch.full((3, 2), i + 0.5 * rank, dtype=torch.bfloat16))
    for _, (scalar, empty, strided) in ranks.stream("odd_tensors"):
        assert scalar.item() == 3.5 and scalar.shape == ()
        assert empty.shape == (0, 4) and empty.dtype == torch.int64
        assert strided.tolist() == [[0, 2], [3, 5]]
    assert ranks.call("sum", 0) == [1, 1]


def test_ranks_are_only_a_few_items_ahead_of_who_takes_them(ranks, tmp_path):
    stream = ranks.stream("items", 30, tmp_path)
    first, _ = next(stream)
    time.sleep(0.5)
    assert int((tmp_path / str(first)).read_text()) <= 4  # one taken, two on the way, one made
    with pytest.raises(AssertionError, match="take all items"):
        ranks.call("sum", 0)
    assert len(list(stream)) == 59


def test_an_interrupt_leaves_the_call_on_all_ranks_and_they_go_on(ranks, tmp_path):
    def check():
        if (tmp_path / "pass-1").exists():
            raise Interrupted

    with pytest.raises(Interrupted):
        ranks.call("wait", tmp_path, check=check)
    assert ranks.call("sum", 1) == [3, 3]  # an abort that came is not kept for the next call


def test_an_interrupt_past_the_point_of_no_return_gives_the_results(ranks, tmp_path):
    def check():
        if (tmp_path / "pass-1").exists():
            raise Interrupted

    assert ranks.call("deaf", tmp_path, check=check) == [0, 1]
    (tmp_path / "second").mkdir()
    when(tmp_path / "second" / "pass-1", lambda: (tmp_path / "second" / "asked").touch())

    def later():
        if (tmp_path / "second" / "asked").exists():
            raise Interrupted

    with pytest.raises(Interrupted):  # the abort of the call before is not taken for this one's
        ranks.call("wait", tmp_path / "second", check=later)
    assert int((tmp_path / "second" / "pass-1").read_text()) > 0


def test_an_error_of_all_ranks_comes_back_as_it_was_and_they_go_on(ranks):
    with pytest.raises(NonFiniteError, match=r"^loss of rank 0 is NaN$"):
        ranks.call("fail", [0, 1])
    assert ranks.call("sum", 2) == [5, 5]


# -- ends --------------------------------------------------------------------------------------------------------------


def test_an_error_of_one_rank_comes_back_as_it_was_and_ends_the_others(own, monkeypatch):
    ranks, pids = own
    monkeypatch.setattr(launch, "_AGREE_S", 0.5)
    with pytest.raises(NonFiniteError, match=r"^loss of rank 1 is NaN$"):
        ranks.call("fail", [1])
    assert not alive(pids)
    with pytest.raises(TrainerError, match=r"the ranks have ended; run the same command again"):
        ranks.call("sum", 0)


def test_a_defect_on_one_rank_is_named_although_the_others_break_too(own, tmp_path):
    ranks, pids = own
    with pytest.raises(TrainerError, match=r"^rank 1 ended with exit code 1: KeyError: 'no such layer' \(log: .*rank-1\.log\)"):
        ranks.call("crash", 1)
    assert not alive(pids)
    assert 'raise KeyError("no such layer")' in (tmp_path / "ranks" / "rank-1.log").read_text()  # with its traceback


@pytest.mark.slow  # test_megatron_run.py has a quick one, amid a run's update
@pytest.mark.parametrize("victim", [0, 1])
def test_kill_9_of_a_rank_in_a_collective_operation_is_said_and_leaves_nothing(own, tmp_path, victim):
    ranks, pids = own
    when(tmp_path / "hangs", lambda: os.kill(pids[victim], signal.SIGKILL))
    with pytest.raises(
        TrainerError, match=rf"^rank {victim} was killed by SIGKILL .*rank-{victim}\.log\); run the same command"
    ):
        ranks.call("hang", 1, tmp_path / "hangs")
    assert not alive(pids)  # what the killed one had forked too


@pytest.mark.slow
def test_kill_9_of_a_rank_between_calls_is_said_by_the_next_one(own):
    ranks, pids = own
    os.kill(pids[1], signal.SIGKILL)
    with pytest.raises(TrainerError, match=r"^rank 1 was killed by SIGKILL"):
        ranks.call("sum", 0)
    assert not alive(pids)


def test_a_stopped_rank_is_silent_and_the_job_ends(own, tmp_path, monkeypatch):
    ranks, pids = own
    monkeypatch.setattr(launch, "_SILENCE_S", 10.0)
    when(tmp_path / "hangs", lambda: os.kill(pids[0], signal.SIGSTOP))
    with pytest.raises(TrainerError, match=r"^rank 0 has not answered for 10 s, so it hangs"):
        ranks.call("hang", 1, tmp_path / "hangs")
    assert not alive(pids)


@pytest.fixture
def default_handler():
    """Python's own for Ctrl-C, which whatever ran in this process before may have replaced."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("default_handler")
def test_a_second_interrupt_kills_the_ranks(own, tmp_path):
    ranks, pids = own
    with Interrupts() as interrupts, pytest.raises(KeyboardInterrupt):

        def twice() -> None:
            os.kill(os.getpid(), signal.SIGINT)
            while not interrupts.requested:  # two that come before Python sees the first are one
                time.sleep(0.01)
            os.kill(os.getpid(), signal.SIGINT)

        when(tmp_path / "hangs", twice)
        ranks.call("hang", 1, tmp_path / "hangs", check=interrupts.check)
    assert not alive(pids)


def test_an_error_amid_a_stream_ends_the_ranks_at_once(own):
    ranks, pids = own
    with pytest.raises(OSError, match="disk full"), ranks:
        for _ in ranks.stream("items", 30):
            raise OSError("disk full")
    assert not alive(pids)


@pytest.mark.parametrize("stopped", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_run_killed_with_9_takes_its_ranks_and_what_they_forked_along(tmp_path, stopped):
    run = subprocess.Popen([sys.executable, HERE / "rank_workers.py", tmp_path])
    try:
        while not (tmp_path / "hangs").exists():
            assert run.poll() is None
            time.sleep(0.05)
        pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
        assert len(pids) == 4 and all(map(runs, pids))
        if stopped:
            os.kill(pids[1], signal.SIGSTOP)
    finally:
        run.kill()
        run.wait()
    assert not alive(pids)


# -- starts ------------------------------------------------------------------------------------------------------------


def test_a_worker_that_refuses_says_why(tmp_path):
    with pytest.raises(CheckpointError, match=r"^/model holds no weights$"):
        Ranks(TWO, "rank_workers:Refusing", "/model", tmp_path)


def test_a_rank_that_cannot_start_is_named_with_its_last_words(tmp_path, monkeypatch):
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho no interpreter here\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(TrainerError, match=r"^rank 0 ended with exit code 3: no interpreter here \(log: .*rank-0\.log\)"):
        Ranks(MegatronConfig(), WORKER, "", tmp_path)


def test_addresses_that_cannot_work_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"train\.megatron\.listen must be HOST:PORT"):
        Ranks(MegatronConfig(listen="node-1"), WORKER, "", tmp_path)
    for other in ("0.0.0.0:0", "192.0.2.1:29400", "no-such-host:29400"):
        with pytest.raises(ConfigError, match=rf"listen={other}: ranks join on their own machine only.* workers\.launcher=ray"):
            Ranks(MegatronConfig(listen=other), WORKER, "", tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as server:
        taken = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(ConfigError, match=rf"cannot listen at train\.megatron\.listen={taken} .*free port"):
            Ranks(MegatronConfig(listen=taken), WORKER, "", tmp_path)
    with pytest.raises(ConfigError, match=r"METIS_RANK_KEY is not set"):
        Ranks(MegatronConfig(launch="join"), WORKER, "", tmp_path)


@pytest.fixture
def joining(monkeypatch):
    """A layout to join, and a function that starts the verb for it."""
    monkeypatch.setenv("METIS_RANK_KEY", "the secret")
    address = f"127.0.0.1:{free_port()}"
    started = []

    def join(*arguments, **environment):
        command = [PROGRAM, "rank", "--join", address, *arguments]
        pipe = subprocess.PIPE
        started.append(subprocess.Popen(command, env=os.environ | environment, stdout=pipe, stderr=pipe, text=True))
        return started[-1]

    yield MegatronConfig(data_parallel=2, launch="join", listen=address, timeout_s=300), join
    for process in started:
        process.kill()
        process.communicate()


def test_ranks_started_elsewhere_join_by_number_in_any_order(joining, tmp_path, capfd):
    layout, join = joining
    processes = [join("--rank", "1"), join(SLURM_PROCID="0", RANK="7")]

    def stranger():
        for _ in range(100):
            try:
                with socket.create_connection(("127.0.0.1", int(layout.listen.split(":")[1]))) as sock:
                    sock.sendall(b"GET / HTTP/1.0\r\n\r\n")
                    return
            except ConnectionRefusedError:
                time.sleep(0.02)

    threading.Thread(target=stranger, daemon=True).start()
    with Ranks(layout, WORKER, "joined", tmp_path) as ranks:
        assert ranks.call("sum", 10) == [21, 21]
        assert [place[1] for place in ranks.call("where")] == [0, 1]
    assert f"waiting for ranks 0-1 of 2 to join at {layout.listen}" in capfd.readouterr().err
    assert [process.wait(60) for process in processes] == [0, 0]


@pytest.mark.slow
def test_a_joined_rank_killed_with_9_ends_the_job_and_the_others(joining, tmp_path):
    layout, join = joining
    processes = [join("--rank", "0"), join("--rank", "1")]
    with Ranks(layout, WORKER, "joined", tmp_path) as ranks:
        when(tmp_path / "hangs", processes[1].kill)
        with pytest.raises(TrainerError, match=rf"^rank 1 on {socket.gethostname()} ended without a word \(killed\?\)"):
            ranks.call("hang", 1, tmp_path / "hangs")
    assert processes[0].wait(60) != 0


def test_a_wrong_key_is_turned_away_and_a_missing_rank_named(joining, tmp_path):
    layout, join = joining
    processes = [join("--rank", "1", METIS_RANK_KEY="another"), join("--rank", "0")]
    message = (
        rf"^rank 1 did not join at {layout.listen} within 20 s \(a process with another METIS_RANK_KEY was turned away\); "
        rf"start each with: metis-fast rank --join {layout.listen}"
    )
    with pytest.raises(TrainerError, match=message):
        Ranks(layout.model_copy(update={"timeout_s": 20.0}), WORKER, "", tmp_path)
    out, err = processes[0].communicate(timeout=60)
    assert (processes[0].returncode, out) == (2, "")
    assert err == (
        f"metis-fast: the run at {layout.listen} has another METIS_RANK_KEY; give the run and all its ranks the same one\n"
    )
    assert processes[1].wait(60) == -signal.SIGKILL


@pytest.mark.parametrize(
    ("numbers", "problem"),
    [
        (("0", "0"), "two ranks with number 0, on .* give each its own"),
        pytest.param(("2",), "rank 2 of .* is not one of the layout's 2", marks=pytest.mark.slow),
    ],
)
def test_a_number_twice_or_out_of_range_is_refused_on_both_sides(joining, tmp_path, numbers, problem):
    layout, join = joining
    processes = [join("--rank", number) for number in numbers]
    with pytest.raises(ConfigError, match=problem):
        Ranks(layout, WORKER, "", tmp_path)
    ended = [(process.communicate(timeout=60)[1], process.returncode) for process in processes]
    assert sum(code == 2 and problem[:8] in err for err, code in ended) == 1
    assert all(code != 0 for _, code in ended)


def test_the_verb_says_what_it_misses(joining, monkeypatch, capsys):
    layout, join = joining
    for name in ("SLURM_PROCID", "RANK", "METIS_RANK_KEY"):
        monkeypatch.delenv(name, raising=False)
    assert cli.main(["rank", "--join", layout.listen, "--wait", "0"]) == 2
    assert capsys.readouterr().err.startswith("metis-fast: which rank is this? Give --rank N, or set RANK")
    assert cli.main(["rank", "--join", layout.listen, "--rank", "0"]) == 2
    assert capsys.readouterr().err.startswith("metis-fast: METIS_RANK_KEY is not set; give the run and all its ranks")
    process = join("--rank", "0", "--wait", "0", METIS_RANK_KEY="the secret")
    _, err = process.communicate(timeout=100)
    assert process.returncode == 2 and err.startswith("metis-fast: no run at 127.0.0.1:"), err
