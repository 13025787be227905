"""Imports what sessions are to have at once, in the server, before any session is forked from it."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterable

# What a library loads late by itself, in every session anew, is imported here too.
MODULES = {
    "matplotlib": ("matplotlib.pyplot", "matplotlib.backends.backend_agg"),
    "scipy": ("scipy.linalg", "scipy.ndimage", "scipy.optimize", "scipy.signal", "scipy.stats", "scipy.spatial"),
    "sympy": ("sympy",),
    "pandas": ("pandas",),
    "skimage": ("skimage.color", "skimage.feature", "skimage.filters", "skimage.measure", "skimage.transform"),
    "cv2": ("cv2",),
}
PACKAGES = {"skimage": "scikit-image", "cv2": "opencv-python-headless"}
"""What pip calls a library, where that is not its name."""


def missing(libraries: Iterable[str]) -> list[str]:
    """Those that are not installed, by the names that pip knows."""
    return [PACKAGES.get(name, name) for name in libraries if importlib.util.find_spec(name) is None]


def load(libraries: Iterable[str], folder: str) -> None:
    """Import them. folder: where they may keep what they note at their import."""
    os.environ["MPLCONFIGDIR"] = folder
    for library in libraries:
        if library == "matplotlib":
            importlib.import_module("metis_fast.tools.sandbox.figures")  # before pyplot: `plt.show()` is an output of the call
        for name in MODULES[library]:
            importlib.import_module(name)
