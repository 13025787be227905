"""`make test` (tests/run.py): a failing part keeps none of the others from running, and one line counts all of them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location("run_all", Path(__file__).parents[1] / "run.py")
assert SPEC is not None and SPEC.loader is not None
run_all = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(run_all)

PASSING = "def test_one(): pass\ndef test_two(): pass\n"
FAILING = "import pytest\ndef test_no(): assert False\ndef test_left(): pytest.skip('why')\n"
TWICE = """
import pytest
@pytest.fixture
def ends_badly():
    yield
    assert False
def test_fails_and_ends_badly(ends_badly): assert False
"""
NO_IMPORT = "import a_module_that_is_not_there\n"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    """Runs two parts with these files; returns the exit code and the last line."""

    def go(first: str, second: str, *options: str) -> tuple[int, str]:
        for name, text in (("first", first), ("second", second)):
            (tmp_path / name).mkdir()
            (tmp_path / name / f"test_{name}.py").write_text(text)
        (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = slow: slow\n gpu: gpu\n")
        monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # a start takes a third of a second instead of three
        monkeypatch.setattr(run_all, "TESTS", tmp_path)
        monkeypatch.setattr(run_all, "PARTS", {"first": ("first",), "second": ("second",)})
        monkeypatch.setattr(sys, "argv", ["run.py", "-n", "1", *options])
        code = run_all.main()
        return code, capfd.readouterr().out.splitlines()[-1]

    return go


@pytest.mark.parametrize(
    ("first", "second", "code", "line"),
    [
        (PASSING, PASSING, 0, "4 passed, 0 failed, 0 skipped"),
        (FAILING, PASSING, 1, "2 passed, 1 failed, 1 skipped"),
        (PASSING, FAILING, 1, "2 passed, 1 failed, 1 skipped"),
        (TWICE, PASSING, 1, "2 passed, 2 failed, 0 skipped"),  # as pytest says: 1 failed, 1 error
        (NO_IMPORT, PASSING, 1, "2 passed, 1 failed, 0 skipped"),
        ("import os\ndef test_dies(): os._exit(9)\n", PASSING, 1, "2 passed, 0 failed, 0 skipped"),  # no report of a dead part
    ],
)
def test_all_parts_run_and_one_line_counts_them(run, first: str, second: str, code: int, line: str) -> None:
    assert run(first, second) == (code, line)


def test_a_part_without_a_test_of_that_mark_is_no_failure(run) -> None:
    slow = "import pytest\n@pytest.mark.slow\ndef test_slow(): pass\n"
    assert run(slow, PASSING, "-m", "slow") == (0, "1 passed, 0 failed, 0 skipped")
