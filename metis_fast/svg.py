"""Pictures of results, as SVG files that suit light and dark pages."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from metis_fast.scratch import replaced

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.typing import RcKeyType

COLOURS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#be185d", "#4b5563")
GREY = COLOURS[-1]
_INK, _PAGE = "#1f2328", "#ffffff"
_INKED: tuple[RcKeyType, ...] = (
    "text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color",
)  # fmt: skip
_DARK = {_INK: "#e6edf3", _PAGE: "#0d1117", GREY: "#9198a1"}


@contextmanager
def picture(path: Path, width: float, height: float, columns: int = 1) -> Iterator[list[Axes]]:
    """Yield the axes of a new figure to draw on, side by side, and write it when the block ends. The same picture is the same
    file, whatever matplotlib's own settings are. width, height: inches.

    Raises:
        ValueError: the name does not end in `.svg`.
        OSError: it cannot be written; a picture of an earlier call stays.
    """
    if path.suffix != ".svg":
        raise ValueError(f"{path}: expected a name that ends in .svg")
    import matplotlib
    from matplotlib.figure import Figure

    settings: dict[RcKeyType, str | bool] = {"svg.hashsalt": "metis_fast", "legend.frameon": False}
    settings |= {"figure.facecolor": _PAGE, "axes.facecolor": _PAGE}
    settings |= dict.fromkeys(_INKED, _INK)
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(settings)
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = list(figure.subplots(1, columns, squeeze=False)[0])
        for one in axes:
            one.spines[["top", "right"]].set_visible(False)
            one.grid(alpha=0.2)
        yield axes
        text = io.StringIO()
        figure.savefig(text, format="svg", metadata={"Date": None})
    with replaced(path) as scratch:
        scratch.write_text(text.getvalue().replace("</style>", f"{_dark()}</style>", 1), encoding="utf-8")


def _dark() -> str:
    """Rules that replace colours where the reader's pages are dark. What knows no such rule shows the light picture."""
    rules = (
        f'[style*="{what}: {light}"] {{ {what}: {dark} !important }}'
        for light, dark in _DARK.items()
        for what in ("fill", "stroke")
    )
    return f"@media (prefers-color-scheme: dark) {{ {' '.join(rules)} }}"
