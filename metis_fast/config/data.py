"""Prompts."""

from __future__ import annotations

from typing import Annotated, Literal

from metis_fast.config.section import BY_CONTENT, MAY_CHANGE, FilePath, Section, Several


class DataConfig(Section):
    """Prompts, in the Metis-RL Parquet schema."""

    train: Annotated[Several[FilePath], BY_CONTENT] = ()
    """Parquet files (or folders of them) to train on."""
    heldout: Annotated[Several[FilePath], BY_CONTENT] = ()
    """Parquet files (or folders of them) to evaluate on."""
    shuffle: bool = True
    """Shuffle every epoch, by `run.seed` and the epoch's number."""
    on_bad_row: Annotated[Literal["stop", "skip"], MAY_CHANGE] = "stop"
    """What a row that does not fit the schema does: stop the run, or be skipped and counted."""
