"""Run all tests, whatever fails, and end with one line that counts them: what `make test` and `make test-slow` call.

Usage: python tests/run.py [-m MARKS] [pytest's own options]

There are two parts, since one process cannot do both: kernel tests run in Triton's interpreter, which is chosen for a process
before Triton is imported, and end-to-end tests start programs that must not inherit that.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from xml.etree import ElementTree

TESTS = Path(__file__).parent
NO_TESTS = 5  # pytest's exit code where no test has the marks
PARTS = {
    "unit, kernel and parity tests": ("unit", "kernels", "parity"),
    "end-to-end tests": ("e2e",),
}
Counts = Counter[str]  # passed, failed, skipped


def counts(report: Path) -> Counts:
    """Tests by how they ended, as a JUnit XML file has them."""
    found: Counts = Counter()
    for case in ElementTree.parse(report).getroot().iter("testcase"):
        kinds = {child.tag for child in case}
        bad = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        found[bad] += 1
    return found


def main() -> int:
    """Exit code: 0 if all passed, 1 if not, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(description="Run all tests, whatever fails.")
    parser.add_argument("-m", default="not slow and not gpu", metavar="MARKS", help="which tests, as pytest's -m")
    parser.add_argument("-n", type=int, default=2, metavar="N", help="processes side by side (default: 2)")
    options, more = parser.parse_known_args()
    environment = {"OMP_NUM_THREADS": "1"} | os.environ  # a process a core, and a thread a process
    total: Counts = Counter()
    broken, began = [], time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        for number, (name, folders) in enumerate(PARTS.items(), start=1):
            print(f"-- {number} of {len(PARTS)}: {name}", flush=True)
            report = Path(scratch, f"{number}.xml")
            command = [sys.executable, "-m", "pytest", f"--junitxml={report}", "-o", "junit_family=xunit1", "-m", options.m]
            # a file after the other as they are collected (conftest.py), so that all processes end at about the same time
            command += ["-n", str(options.n), "--dist", "loadfile", "--no-loadscope-reorder"] if options.n > 1 else []
            command += [*more, *(str(TESTS / folder) for folder in folders)]
            child = subprocess.Popen(command, env=environment)
            code, stopped = None, False
            while code is None:
                try:
                    code = child.wait()
                except KeyboardInterrupt:  # pytest has it, too, and ends after its fixtures
                    stopped = True
            if stopped:
                return 130
            with suppress(FileNotFoundError, ElementTree.ParseError):  # pytest was killed; its exit code says so
                total += counts(report)
            if code not in (0, NO_TESTS):
                broken.append(f"{name} (exit code {code})")
    minutes = (time.monotonic() - began) / 60
    if broken:
        print(f"failed: {', '.join(broken)}", flush=True)
    print(f"all tests in {minutes:.1f} minutes:")
    print(f"{total['passed']} passed, {total['failed']} failed, {total['skipped']} skipped", flush=True)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
