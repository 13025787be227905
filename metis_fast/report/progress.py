"""Progress bars on stderr, where somebody can see them, or on the panel of a run."""

from __future__ import annotations

from tqdm import tqdm

from metis_fast.config import LogConfig
from metis_fast.report.panel import PanelBar, active


def progress(total: int, description: str, config: LogConfig, unit: str = "it") -> tqdm:
    """A bar to `update()` and `close()`, or to use in a `with`.

    It is silent with `log.progress=false` and where stderr is not a terminal, and it is gone when closed: what stays on the
    screen are the lines of `RunLog`. While a run shows its panel, it is a line of that.
    """
    panel = active()
    if panel is not None:
        return PanelBar(panel, total, description, unit)
    # None is tqdm's "only on a terminal".
    return tqdm(
        total=total, desc=description, unit=unit, disable=None if config.progress else True, leave=False, dynamic_ncols=True
    )
