"""What collecting costs a run in CPU seconds: pairs of the same run with panel, TensorBoard and rollouts in it, and without.

    python -m bench.collecting runs/small/config.yaml --steps 31 --pairs 4 train.steps=40 eval.every=0 data.heldout=[]

Both runs of a pair compute the same, step by step. Where other work on the machine makes pairs differ by more than what is
looked for, the seconds of the threads that only collect say it: they are exact. What the main thread does for it is not in
them; it is some tenths of a millisecond a step.
"""

from __future__ import annotations

import argparse
import json
import os
import pty
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

_ON = ("log.panel=auto", "log.progress=true", "log.tensorboard=true")
_OFF = ("log.panel=off", "log.progress=false", "log.tensorboard=false", "log.rollouts_every=0")
_WARM = 2  # steps that import and compile


@dataclass(frozen=True, slots=True)
class Mark:
    """CPU seconds as a step begins: of the process, and of each of its threads by name and number."""

    process: float
    threads: dict[str, float]


def _mark() -> Mark:
    seconds = {}
    for thread in threading.enumerate():
        path = Path(f"/proc/self/task/{thread.native_id}/schedstat")
        seconds[f"{type(thread).__name__} {thread.name}"] = int(path.read_text().split()[0]) / 1e9
    return Mark(time.process_time(), seconds)


def _child(config: Path, steps: int, out: Path, settings: list[str]) -> None:
    from metis_fast import config as config_module
    from metis_fast.run import pipeline

    marks: list[Mark] = []

    def goes_on(step: int) -> bool:
        marks.append(_mark())
        return len(marks) <= steps

    pipeline.train(config_module.load(config, settings), goes_on=goes_on)
    out.write_text(json.dumps([asdict(one) for one in marks]))


def _run(args: argparse.Namespace, folder: Path, settings: tuple[str, ...]) -> list[Mark]:
    """On a terminal of its own, which somebody reads."""
    out = folder.with_suffix(".json")
    command = [sys.executable, "-m", "bench.collecting", str(args.config), "--steps", str(args.steps), "--child", str(out)]
    master, slave = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "120", "LINES": "50"}
    child = subprocess.Popen(
        [*command, f"run.dir={folder}", *settings, *args.settings], stdout=slave, stderr=slave, env=environment
    )
    os.close(slave)
    said = b""
    try:
        while read := os.read(master, 1 << 16):
            said = (said + read)[-4000:]
    except OSError:  # it has ended
        pass
    os.close(master)
    if child.wait():
        raise SystemExit(said.decode(errors="replace"))
    return [Mark(**one) for one in json.loads(out.read_text())]


def _is_collecting(name: str) -> bool:
    """Trackers, the writer of event files, and what draws the panel."""
    return "tracker" in name or name.startswith(("_RefreshThread", "_AsyncWriterThread"))


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description="What collecting costs a run in CPU seconds.")
    parser.add_argument("config", type=Path)
    parser.add_argument("settings", nargs="*")
    parser.add_argument("--steps", type=int, default=31)
    parser.add_argument("--pairs", type=int, default=4)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_intermixed_args()
    if args.child is not None:
        _child(args.config, args.steps, args.child, args.settings)
        return
    shares, own, all_ = [], [], []
    with tempfile.TemporaryDirectory() as scratch:
        for pair in range(args.pairs):
            kinds = {"off": _OFF, "on": _ON}
            order = list(kinds) if pair % 2 == 0 else list(reversed(kinds))
            marks = {kind: _run(args, Path(scratch, f"{pair}-{kind}"), kinds[kind]) for kind in order}
            steps = args.steps - _WARM
            seconds = {kind: (of[-1].process - of[_WARM].process) / steps for kind, of in marks.items()}
            first, last = marks["on"][_WARM].threads, marks["on"][-1].threads
            collecting = sum(last[name] - first.get(name, 0.0) for name in last if _is_collecting(name)) / steps
            shares.append(100 * (seconds["on"] / seconds["off"] - 1))
            own.append(1e3 * collecting)
            all_.append(1e3 * seconds["off"])
            print(f"pair {pair}: off {all_[-1]:.1f} ms a step, on {shares[-1]:+.1f} %, collecting threads {own[-1]:.2f} ms")
    print(f"median: off {median(all_):.1f} ms, on {median(shares):+.1f} %, threads {median(own):.2f} ms")


if __name__ == "__main__":
    main()
