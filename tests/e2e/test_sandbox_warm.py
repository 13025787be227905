"""Libraries in sessions: imported by the server, or by the call that needs them; what they do is allowed."""

from __future__ import annotations

import contextlib
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from python_calls import LIMIT, observations

from metis_fast.config import PythonToolConfig
from metis_fast.config.tools import WarmLibrary
from metis_fast.errors import ToolSetupError
from metis_fast.tools.python_server import PythonServer
from metis_fast.tools.sandbox.warm import MODULES

# A use of each that takes threads, files or memory of its own, and what it prints.
USES: dict[WarmLibrary, tuple[str, str]] = {
    "matplotlib": ("plt.figure(figsize=(1, 1), dpi=50); plt.plot([1, 2]); plt.show()", "<image>"),
    "scipy": ("import scipy.optimize\nround(scipy.optimize.brentq(lambda x: x * x - 2, 0, 2), 6)", "1.414214"),
    "sympy": ("import sympy\nx = sympy.symbols('x')\nsympy.integrate(2 * x, x)", "x**2"),
    "pandas": ("import pandas\nlen(pandas.DataFrame({'a': [1, 2]}).to_csv('a.csv') or pandas.read_csv('a.csv'))", "2"),
    "skimage": ("import skimage.filters\nskimage.filters.gaussian(np.zeros((9, 9))).shape", "(9, 9)"),
    "cv2": (
        "import cv2\ncv2.setNumThreads(4)\ncv2.GaussianBlur(np.zeros((999, 999), np.uint8), (9, 9), 0).shape",
        "(999, 999)",
    ),
}
INSTALLED: list[WarmLibrary] = [name for name in USES if importlib.util.find_spec(name) is not None]


def serve(tmp_path: Path, *warm: WarmLibrary) -> contextlib.closing[PythonServer]:
    return contextlib.closing(PythonServer(PythonToolConfig(max_output_chars=LIMIT, warm=warm), tmp_path))


def test_all_are_known() -> None:
    assert list(MODULES) == list(USES)


@pytest.fixture(scope="module")
def warm_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PythonServer]:
    """With all libraries that are here."""
    folder = tmp_path_factory.mktemp("warm")
    with serve(folder, *INSTALLED) as server:
        yield server
    assert list(folder.iterdir()) == []


@pytest.fixture(scope="module")
def cold_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PythonServer]:
    """With none."""
    with serve(tmp_path_factory.mktemp("cold")) as server:
        yield server


@pytest.mark.parametrize("name", INSTALLED)
def test_a_library_works_warm_and_cold(warm_server: PythonServer, cold_server: PythonServer, name: WarmLibrary) -> None:
    use, shows = USES[name]
    loaded = f"import sys\n[name for name in {MODULES[name]!r} if name in sys.modules]"
    there, warm = observations(warm_server, loaded, use)
    absent, cold = observations(cold_server, loaded, use)
    assert (there.text, absent.text) == (str(list(MODULES[name])), "[]")
    assert warm.text == cold.text == shows and "metis_fast" not in warm.text


def test_one_that_is_not_installed_is_named_as_pip_knows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("skimage", "cv2") else there(name))
    with pytest.raises(ToolSetupError, match=re.escape("pip install scikit-image opencv-python-headless, or remove")):
        PythonServer(PythonToolConfig(warm=("skimage", "cv2")), tmp_path)
    assert list(tmp_path.iterdir()) == []
