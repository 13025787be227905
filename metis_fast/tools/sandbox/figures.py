"""A matplotlib back end that makes `plt.show()` an output of the call. Loaded by matplotlib, through MPLBACKEND."""

from __future__ import annotations

import io

from matplotlib._pylab_helpers import Gcf
from matplotlib.backend_bases import FigureManagerBase
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from metis_fast.tools.sandbox.interpreter import current


class FigureManager(FigureManagerBase):
    """Draws a figure into the transcript of the running call."""

    def show(self) -> None:
        buffer = io.BytesIO()
        self.canvas.figure.savefig(buffer, format="png")
        current().show(Image.open(buffer))

    @classmethod
    def pyplot_show(cls, *, block: bool | None = None) -> None:
        """`plt.show()`: every open figure, oldest first; they are closed, as after an interactive show."""
        for manager in Gcf.get_all_fig_managers():
            manager.show()
            Gcf.destroy(manager)


class FigureCanvas(FigureCanvasAgg):
    """The Agg canvas with the manager above."""

    manager_class = FigureManager  # pyright: ignore[reportAssignmentType]  # declared as a property of the class
