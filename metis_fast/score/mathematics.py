"""The mathematical judge: `math-verify` in worker processes, the rule judge where it cannot parse."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, cast

from metis_fast.score import numbers, rule
from metis_fast.score.protocol import Cost, JudgeUnavailable, Match, by_truth
from metis_fast.types import Prompt

Comparison = Literal["equal", "different", "unparsed"]

_PACKAGES = Path(__file__).parents[2]
_MAX_WORKERS = 4  # a comparison takes 1 to 50 ms; more processes would only take cores from the engine
_MAX_CHARS = 1000  # what is longer is no formula
_ROUNDING = 1e-9  # of our own arithmetic; a mathematical answer has no tolerance
_FORMULA = re.compile(r"\$([^$]+)\$")
_PI = re.compile(r"π|pi\b")  # to the number reader, a unit
_MAX_KNOWN = 50_000  # the rollouts of a group often give the same answer; some 10 MB at most


class _Worker:
    """One `math_worker` process."""

    def __init__(self) -> None:
        # It finds this package wherever it was imported from; with -P, no module of the working directory hides another.
        command = [sys.executable, "-P", "-W", "ignore", "-m", "metis_fast.score.math_worker"]
        path = os.pathsep.join(filter(None, (str(_PACKAGES), os.environ.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
        )
        if self._read() != "ready":
            self.close()
            raise JudgeUnavailable("the worker of the math judge does not start; see its message on stderr")

    def _read(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def compare(self, answer: str, gold: str) -> Comparison | None:
        """None: the process died; see `timed_out`."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps([answer, gold]) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return None
        return cast(Comparison, self._read()) or None

    def timed_out(self) -> bool:
        """Whether the process ended at its limit of CPU seconds. Waits for its end."""
        return self._process.wait() == -signal.SIGPROF

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()


class MathMatcher:
    """Judge style "math"."""

    cost: Cost = Cost()

    def __init__(self, tolerance: float) -> None:
        self._tolerance = tolerance
        self._threads = ThreadPoolExecutor(min(_MAX_WORKERS, os.cpu_count() or 1), thread_name_prefix="math-judge")
        self._idle: deque[_Worker] = deque()
        self._known: dict[tuple[str, str], Comparison] = {}

    async def compare(self, prompt: Prompt, answer: str) -> Match:
        """Whether the answer is mathematically equal to one of the ground truths.

        What is too long for a formula, cannot be parsed, or takes more than the CPU time that a comparison may take, is
        compared by the rule judge.

        Raises:
            JudgeUnavailable: the worker does not start, or died twice of something else than its time limit.
        """
        for gold in prompt.answers:
            # Plain numbers need no algebra; and as LaTeX, 1e3 would be 1 * e * 3.
            if answer.split() == gold.split():
                return by_truth("math", gold)
            plain, gold_plain = (_FORMULA.sub(r" \1 ", text).strip() for text in (answer, gold))
            same_number = numbers.equal(plain, gold_plain, _ROUNDING, rounding=False)
            if same_number:
                return by_truth("math", gold)
            if same_number is False and not _PI.search(answer + gold):
                continue
            comparison: Comparison = "unparsed"
            if len(answer) <= _MAX_CHARS and len(gold) <= _MAX_CHARS:
                loop = asyncio.get_running_loop()
                comparison = await loop.run_in_executor(self._threads, self._compare, answer, gold)
            if comparison == "equal" or (comparison == "unparsed" and rule.equal(answer, gold, self._tolerance)):
                return by_truth("math", gold)
        return by_truth("math", None)

    def _compare(self, answer: str, gold: str) -> Comparison:
        """Runs in several threads at once: each step on the shared containers is a single atomic one."""
        known = self._known.get((answer, gold))
        if known is not None:
            return known
        result = self._ask(answer, gold)
        if len(self._known) >= _MAX_KNOWN:
            self._known.clear()
        self._known[answer, gold] = result
        return result

    def _ask(self, answer: str, gold: str) -> Comparison:
        for _ in range(2):
            try:
                worker = self._idle.pop()
            except IndexError:
                worker = _Worker()
            result = worker.compare(answer, gold)
            if result is not None:
                self._idle.append(worker)
                return result
            timed_out = worker.timed_out()
            worker.close()
            if timed_out:
                return "unparsed"
        raise JudgeUnavailable("the worker of the math judge died twice on one answer")

    async def check(self) -> None:
        """Nothing can be missing: math-verify is a dependency."""

    def close(self) -> None:
        """End the workers."""
        self._threads.shutdown()
        while self._idle:
            self._idle.pop().close()
