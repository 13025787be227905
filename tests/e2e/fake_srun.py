"""Stands in for Slurm's srun on one machine, as far as configs/launch/*.sbatch use it: starts the tasks, gives each its
number and its output file, ends all when one fails, and passes SIGTERM on."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

_KILL_WAIT_S = 2.0  # Slurm's KillWait, 30 s where nobody changed it


def main() -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--ntasks", type=int, required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--cpus-per-task", type=int, required=True)
    for name, value in (("--export", "ALL"), ("--mpi", "none"), ("--kill-on-bad-exit", "1")):
        parser.add_argument(name, choices=[value], required=True)
    parser.add_argument("--ntasks-per-node", choices=["1"])
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args()
    tasks: list[subprocess.Popen[bytes]] = []
    for number in range(args.ntasks):
        with Path(args.output.replace("%t", str(number))).open("wb") as output:
            environment = {**os.environ, "SLURM_PROCID": str(number), "SLURM_LOCALID": str(number)}
            tasks.append(subprocess.Popen(args.command, stdout=output, stderr=output, env=environment, start_new_session=True))
    ending = 0.0

    def end(*_: object) -> None:
        nonlocal ending
        ending = ending or time.monotonic()
        for task in tasks:
            task.terminate()

    signal.signal(signal.SIGTERM, end)
    while None in (codes := [task.poll() for task in tasks]):
        if any(codes) and not ending:
            end()
        if ending and time.monotonic() > ending + _KILL_WAIT_S:
            for task in tasks:
                task.kill()
        time.sleep(0.05)
    return max(128 - code if code < 0 else code for code in codes if code is not None)


if __name__ == "__main__":
    sys.exit(main())
