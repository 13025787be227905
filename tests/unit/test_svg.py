"""Pictures of results: legible where pages are dark, and the same file for the same picture."""

from __future__ import annotations

import re
from pathlib import Path

import matplotlib
import pytest

from metis_fast.svg import GREY, picture


def _draw(path: Path, *numbers: float) -> str:
    with picture(path, 4, 3, columns=2) as axes:
        axes[0].plot(numbers, "x", color=GREY, label="before")
        axes[1].set(title="right", xlabel="step", ylabel="%")
        axes[0].legend()
    return path.read_text()


def test_every_colour_that_has_no_contrast_on_a_dark_page_has_another_there(tmp_path: Path) -> None:
    head, dark, body = re.split(r"(@media \(prefers-color-scheme: dark\) .*)</style>", _draw(tmp_path / "one.svg", 1, 2))
    assert head.count("<svg") == 1
    for light in set(re.findall(r"(?:fill|stroke): #[0-9a-f]{6}", body)):
        assert f'[style*="{light}"]' in dark, light
    assert "fill: #0d1117 !important" in dark
    letters = re.findall(r'<g id="text_\d+">\s*(?:<!--.*?-->\s*)?<g ([^>]*)>', body)
    assert letters and all("fill: #1f2328" in one for one in letters)  # none has the black of nothing said


def test_settings_of_the_user_do_not_change_it_and_another_kind_of_file_is_refused(tmp_path: Path) -> None:
    first = _draw(tmp_path / "one.svg", 1, 2)
    with matplotlib.rc_context({"svg.fonttype": "none", "font.size": 20, "lines.linewidth": 9}):
        assert _draw(tmp_path / "one.svg", 1, 2) == first
        assert matplotlib.rcParams["font.size"] == 20
    with pytest.raises(ValueError, match=r"one\.png: expected a name that ends in \.svg"), picture(tmp_path / "one.png", 4, 3):
        pass


def test_the_same_picture_is_the_same_file_and_a_failure_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "one.svg"
    first = _draw(path, 1, 2)
    assert _draw(path, 1, 2) == first
    try:
        with picture(path, 4, 3):
            raise RuntimeError
    except RuntimeError:
        pass
    assert path.read_text() == first and [one.name for one in tmp_path.iterdir()] == ["one.svg"]
