"""Makes matplotlib's back end "agg" one whose `plt.show()` is an output of the call. Imported before pyplot."""

from __future__ import annotations

import io
from collections.abc import Collection
from contextlib import suppress

from matplotlib._pylab_helpers import Gcf
from matplotlib.backend_bases import FigureManagerBase
from matplotlib.backends import backend_agg
from matplotlib.figure import Figure
from PIL import Image

from metis_fast.tools.sandbox.interpreter import current


def picture(figure: Figure) -> Image.Image:
    """A figure as a notebook shows it: cut to what is drawn. One without axes, or with text far outside, as it is."""
    if figure.axes:
        buffer = io.BytesIO()
        with suppress(ValueError, MemoryError):  # too large a picture
            figure.savefig(buffer, format="png", bbox_inches="tight")
            return Image.open(buffer)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return Image.open(buffer)


class FigureManager(FigureManagerBase):
    """Draws a figure into the transcript of the running call."""

    def show(self) -> None:
        current().show(picture(self.canvas.figure))

    @classmethod
    def pyplot_show(cls, *, block: bool | None = None) -> None:
        """`plt.show()`: every open figure, oldest first; they are closed, as after an interactive show."""
        for manager in Gcf.get_all_fig_managers():
            manager.show()
            Gcf.destroy(manager)


def show_left_open(displayed: Collection[object]) -> None:
    """At the end of a call, as notebooks do: show the figures that are still open, but for those of `displayed`; close all."""
    for manager in Gcf.get_all_fig_managers():
        if manager.canvas.figure not in displayed:
            manager.show()
    close_all()


def close_all() -> None:
    Gcf.destroy_all()


class FigureCanvas(backend_agg.FigureCanvasAgg):
    """The Agg canvas with the manager above."""

    manager_class = FigureManager  # pyright: ignore[reportAssignmentType]  # declared as a property of the class


# what pyplot asks a back end for; without the second it makes managers of the canvas's own class
backend_agg.__dict__.update(FigureCanvas=FigureCanvas, new_figure_manager=None)
