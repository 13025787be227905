"""The panel of a run: what it shows, and what a terminal is left with."""

from __future__ import annotations

import io
import math
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from rich.console import Console
from test_report_log import stats

from metis_fast.config import Config
from metis_fast.report.panel import TrainingPanel, duration, panel, plain, sparkline
from metis_fast.spans import Lane, listening, span
from metis_fast.types import Slice

# A run's lines, bars and warnings, with the panel below; the last line is an error's, as `metis-fast` prints it.
_RUN = """
import logging, sys, time
from pathlib import Path
from metis_fast import config as config_module
from metis_fast.report.panel import panel
from metis_fast.report.progress import progress
from metis_fast.report.log import RunLog
from metis_fast.run.interrupt import Interrupts
from metis_fast.errors import Interrupted
sys.path.insert(0, sys.argv[2])
from test_report_log import stats

logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s", stream=sys.stderr)
log_config = config_module.LogConfig(tensorboard=False, panel=sys.argv[3])
config = config_module.build({"run": {"dir": Path(sys.argv[1])}, "log": log_config.model_dump()})
try:
    with Interrupts() as interrupts, panel(config), RunLog(config.run.dir, log_config) as log:
        for step in range(3):
            with progress(4, "groups", log_config, "group") as bar:
                bar.update(4)
            log.step(stats(step))
        logging.getLogger("judge").warning("one is slow")
        print("waiting", flush=True)
        while sys.argv[4] == "wait":
            interrupts.check()
            time.sleep(0.02)
        time.sleep(1.2)
        raise ValueError("a defect")
except (Interrupted, ValueError) as error:
    print(f"ended: {type(error).__name__}", file=sys.stderr)
"""


def _on_a_terminal(folder: Path, setting: str, how: str, stop: signal.Signals | None = None, errors: Path | None = None) -> str:
    """What a run writes to a terminal of 100 columns. stop: the signal that it gets once it waits. errors: where its stderr
    goes instead."""
    master, slave = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40"}
    command = [sys.executable, "-c", _RUN, str(folder), str(Path(__file__).parent), setting, how]
    with open(os.devnull if errors is None else errors, "w") as elsewhere:
        error = slave if errors is None else elsewhere
        child = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=error, env=environment)
    os.close(slave)
    text, ends = b"", time.monotonic() + 180
    while time.monotonic() < ends:
        ready, _, _ = select.select([master], [], [], 0.2)
        try:
            text += os.read(master, 65536) if ready else b""
        except OSError:  # the other end is closed
            break
        if stop is not None and b"waiting" in text and "╭".encode() in text.partition(b"waiting")[2]:
            child.send_signal(stop)
            stop = None
    os.close(master)
    assert child.wait(60) == 0, text.decode()
    return text.decode()


def _is_sane(text: str) -> bool:
    """Whether the cursor is there, and no other screen."""
    return text.rfind("\x1b[?25l") < max(text.rfind("\x1b[?25h"), 0) and "\x1b[?1049h" not in text


def test_lines_scroll_by_above_the_panel_and_an_error_leaves_the_terminal_as_it_was(tmp_path: Path):
    text = _on_a_terminal(tmp_path, "auto", "fail")
    assert "╭" in text and "tools direct" in text and "step 3 of" in text
    assert text.count("WARNING one is slow") == 1
    assert re.findall(r"\x1b\[2K +(\d) +0\.750[^│]*\r\n", text) == ["0", "1", "2"]
    assert _is_sane(text)
    assert text.splitlines()[-1].endswith("ended: ValueError")


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_the_terminal_as_it_was(tmp_path: Path, stop: signal.Signals):
    text = _on_a_terminal(tmp_path, "auto", "wait", stop)
    assert _is_sane(text)
    assert text.splitlines()[-1].endswith("ended: Interrupted")


@pytest.mark.slow
def test_warnings_stay_in_the_file_that_they_go_to(tmp_path: Path):
    text = _on_a_terminal(tmp_path / "run", "auto", "fail", errors=tmp_path / "errors")
    assert "╭" in text and "one is slow" not in text
    assert (tmp_path / "errors").read_text() == "WARNING one is slow\nended: ValueError\n"


@pytest.mark.slow
def test_there_is_no_panel_where_it_is_turned_off(tmp_path: Path):
    text = _on_a_terminal(tmp_path, "off", "fail")
    assert "╭" not in text and "waiting" in text


def test_there_is_no_panel_where_nobody_sees_it(capsys: pytest.CaptureFixture[str]):
    with panel(Config()) as shown:
        print("a line")
    assert shown is None
    assert capsys.readouterr().out == "a line\n"


def _shown(one: TrainingPanel) -> str:
    time.sleep(0.3)  # as long as it stays as it was
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(one)
    return console.export_text()


def test_it_says_what_is_waited_for_and_what_is_left(tmp_path: Path):
    one = TrainingPanel(10, tmp_path)
    with listening(one):
        assert "step 0 of 10 · starting" in _shown(one)
        one.step(stats(3))
        one.step(stats(4))
        with span(Lane.RUN, "rollout"), span(Lane.TOOLS, "python"):
            one.waits("train/5: 3 of 16 rollouts")
            text = _shown(one)
        assert "step 5 of 10 · rollout train/5: 3 of 16 rollouts · about" in text
        assert "step 5 of 10 · training · about" in _shown(one)
    assert "accuracy direct 0.75" in text and "tools direct 0.5" in text and "loss tool 0.1" in text


def test_a_rollout_cannot_speak_to_the_terminal(tmp_path: Path):
    (tmp_path / "rollouts").mkdir()
    text = "an\x07swer\nin two lines\x9b31m"
    row = {"question": "what\x1b[2J is [bold]it[/bold]", "text": text, "verdict": {"correct": True}}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "rollouts" / "step-000003.parquet")
    one = TrainingPanel(10, tmp_path)
    one.step(stats(3))
    text = _shown(one)
    assert "right: what [2J is [bold]it[/bold] → an swer in two lines 31m" in text
    assert not {"\x1b", "\x07", "\x9b"} & set(text)


@pytest.mark.parametrize(
    ("verdict", "word"), [({"correct": True}, "right"), ({"correct": False}, "wrong"), (None, "no verdict")]
)
def test_the_judge_says_whether_a_rollout_is_right_not_its_reward(tmp_path: Path, verdict: dict[str, bool] | None, word: str):
    (tmp_path / "rollouts").mkdir()
    row = {"question": "which?", "text": f"{'so ' * 200}much", "verdict": verdict, "r_acc": 0.1}  # for its form alone
    judged = pa.struct([("correct", pa.bool_())])
    schema = pa.schema([("question", pa.string()), ("text", pa.string()), ("verdict", judged), ("r_acc", pa.float64())])
    pq.write_table(pa.Table.from_pylist([row], schema), tmp_path / "rollouts" / "step-000003.parquet")
    one = TrainingPanel(10, tmp_path)
    one.step(stats(3))
    assert f"{word}: which? → …o so so" in _shown(one)


def test_a_curve_is_drawn_between_its_ends():
    assert sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert sparkline([3.0, 3.0]) == "▁▁"
    assert sparkline([1.0, float("nan"), 2.0]) == "▁ █"
    assert plain("a\tb\n c\u202e") == "a b c"
    assert [duration(s) for s in (40, 89.9, 600, 11100)] == ["40 s", "90 s", "10 min", "3 h 05 min"]


def test_curves_of_any_numbers_are_drawn_and_a_terminal_may_be_as_narrow_as_it_likes(tmp_path: Path):
    assert sparkline([-1e308, 0.0, 1e308]) == "▁▅█" and sparkline([1.0, math.nan, math.inf]) == "▁  "
    one = TrainingPanel(10, tmp_path)
    one.step(stats(3))
    for width in (1, 4, 5, 9):
        time.sleep(0.3)  # as long as it stays as it was
        console = Console(width=width, file=io.StringIO())
        console.print(one)


def test_an_evaluation_without_a_verdict_has_no_rates(tmp_path: Path):
    one = TrainingPanel(10, tmp_path)
    one.evaluation(3, {"all": Slice(4, 4, 0.0, 0.0, 0.0, 0.0, 0.0)})
    assert "held out after 3: no verdict" in _shown(one)
    one.evaluation(4, {"all": Slice(4, 1, 0.5, 0.25, 0.0, 0.0, 0.0)})
    assert "held out after 4: accuracy 0.500, tool rate 0.250" in _shown(one)
