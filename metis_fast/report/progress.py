"""Progress bars on stderr, where somebody can see them."""

from __future__ import annotations

from tqdm import tqdm

from metis_fast.config import LogConfig


def progress(total: int, description: str, config: LogConfig, unit: str = "it") -> tqdm:
    """A bar to `update()` and `close()`, or to use in a `with`.

    It is silent with `log.progress=false` and where stderr is not a terminal, and it is gone when closed: what stays on the
    screen are the lines of `RunLog`.
    """
    # None is tqdm's "only on a terminal".
    return tqdm(
        total=total, desc=description, unit=unit, disable=None if config.progress else True, leave=False, dynamic_ncols=True
    )
