"""The benchmark of tools: its options, what it counts, and that wrong output shows no figures."""

from __future__ import annotations

import asyncio
import json

import pytest

from bench.__main__ import main
from bench.candidate import BenchError, Spread
from bench.tools import run as command
from bench.tools.candidates import CANDIDATES, processes
from bench.tools.measure import CODE, Latency, Row, Seen, Work, measure, wrong
from bench.tools.run import Report, Request, request, to_text, work_of
from metis_fast.cli import parse
from metis_fast.machine import num_cores


def asked(*options: str) -> Request:
    return request(parse(["bench", "tools", *options]))


def test_options():
    assert asked() == Request("full", 3, ("ours", "ours, served", "jupyter", "python -c"))
    assert asked("--shape", "light", "--runs", "1", "--peers", "python -c").names == ("ours", "ours, served", "python -c")
    for options in (["--shape", "wide"], ["--runs", "0"], ["--peers", "ruby"], ["--threads", "2"], ["--live-fraction", "0.5"]):
        with pytest.raises(BenchError):
            asked(*options)


def test_only_ours_are_opened_by_the_hundred():
    assert work_of("ours", "full").sessions == work_of("python -c", "full").sessions == (1, 16, 256)
    assert work_of("jupyter", "full").sessions == (1, 16) and work_of("jupyter", "light").sessions == (1, 4)


class Counted:
    """A candidate that knows what was asked of it. most: sessions that were open at once."""

    keeps_state = True

    def __init__(self, printed: str = "") -> None:
        self.printed = printed
        self.calls = self.open_now = self.most = self.opened = 0

    async def open(self) -> Counted:
        self.opened += 1
        self.open_now += 1
        self.most = max(self.most, self.open_now)
        return self

    async def call(self, code: str) -> str:
        self.calls += 1
        await asyncio.sleep(0)
        return self.printed or {CODE: "285\n", "print(kept + 1)": "43\n"}.get(code, "42\n")

    async def close(self) -> None:
        self.open_now -= 1


def test_a_round_opens_and_calls_what_it_says():
    counted, seen = Counted(), Seen()
    asyncio.run(measure(counted, Work((1, 20), calls=40, starts=3, churn=5), seen))
    assert counted.opened == 3 + 5 + 16 + 1 + 20 and counted.open_now == 0 and counted.most == 20
    assert counted.calls == counted.opened + 40 + 40
    row = seen.row("counted")
    assert [(one.sessions, one.calls) for one in row.latencies] == [(1, 40), (20, 40)]
    assert len(seen.start) == len(seen.close) == 3 and row.start.least <= row.start.median <= row.start.most


def test_percentiles_and_medians():
    seen = Seen([1.0, 2.0, 6.0], [0.0], [3.0, 5.0], [7, 9], {4: [float(i) for i in range(101)]})
    row = seen.row("a")
    assert (row.start, row.per_s, row.memory) == (Spread(2.0, 1.0, 6.0), 4.0, 8)
    assert row.latencies == (Latency(4, 50.0, 99.0, 101),)


def test_what_prints_something_else_is_told():
    assert asyncio.run(wrong(Counted())) == ""
    assert "printed '7\\n' instead of '285\\n'" in asyncio.run(wrong(Counted("7\n")))


def test_a_process_a_call_prints_the_same():
    async def go() -> str:
        return await wrong(await processes(unsafe=False))

    assert asyncio.run(go()) == ""


def test_wrong_output_shows_no_figures(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    async def broken(unsafe: bool) -> Counted:
        return Counted("7\n")

    for name in CANDIDATES:
        monkeypatch.setitem(CANDIDATES, name, broken)
    assert main(["tools", "--shape", "light"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and "no figures are shown" in err


def test_a_table_tells_what_is_missing_and_how_many_times_faster_ours_start():
    def row(name: str, seconds: float) -> Row:
        return Row(name, Spread(seconds, seconds, seconds), Spread(0.0, 0.0, 0.0), 1.0, 1 << 20, (Latency(1, 0.001, 0.002, 9),))

    report = Report((row("ours", 0.01), row("jupyter", 1.0)), {"python -c": "not here"}, {})
    text = to_text(report, asked(), command.describe(command.torch.device("cpu")))
    assert "a session of 'ours' starts 100 times faster than a Jupyter kernel" in text
    assert "python -c: missing: not here" in text and "1.00/2.00" in text and f"{num_cores()} cores" in text


@pytest.mark.slow
def test_the_whole_benchmark(capfd: pytest.CaptureFixture[str]):
    assert main(["tools", "--shape", "light", "--runs", "1", "--json"]) == 0
    report = json.loads(capfd.readouterr().out)
    rows = {row["impl"]: row for row in report["rows"]}
    assert {"ours", "ours, served", "python -c"} <= rows.keys() and rows.keys() | report["missing"].keys() == CANDIDATES.keys()
    for row in rows.values():
        assert row["per_s"] > 0 and [one["sessions"] for one in row["latencies"]] == [1, 4]
        assert all(0 < one["p50"] <= one["p99"] for one in row["latencies"])
