"""What `metis-fast data check` says of files, for people and for programs."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from metis_fast.data.row import BadRow

_MOST_SHOWN = 12  # of values of a column, in the text for people


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What is in the files.

    rows: all rows, bad ones included; everything below `bad_rows` is over the usable ones only, but for over_limit.
    abilities, styles, sources: usable rows by `ability`, `reward_model.style` and `data_source`, as they stand there.
    images: images in usable rows; image_bytes: their encoded size; smallest, largest: (width, height) in pixels by area, None
        where there is no image. image_sizes: images by megapixels ("to 1 MP").
    longest_prompt: its tokens; tokens: rows by tokens of the prompt ("to 1024"); over_limit: rows that are bad because they
        have too many. None where tokens were not counted.
    tools: rows by the tools that their system message offers. unknown_tools: those among them that nobody answers.
    unknown_listed: rows by the tools that `extra_info.tools` names and nobody answers.
    never_asking: rows whose prompt never asks for `<answer>`.
    warnings: what lets rows be used and yet deserves a look, a line each.
    """

    rows: int
    bad_rows: tuple[BadRow, ...]
    abilities: Mapping[str, int]
    images: int
    image_bytes: int
    smallest: tuple[int, int] | None
    largest: tuple[int, int] | None
    longest_prompt: int | None
    styles: Mapping[str, int]
    sources: Mapping[str, int]
    image_sizes: Mapping[str, int]
    tokens: Mapping[str, int] | None
    over_limit: int | None
    tools: Mapping[str, int]
    unknown_tools: Mapping[str, int]
    unknown_listed: Mapping[str, int]
    never_asking: int
    warnings: tuple[str, ...]

    @property
    def exit_code(self) -> int:
        """For the command line: 1 if any row is bad, else 0."""
        return 1 if self.bad_rows else 0


def render_text(report: CheckReport) -> str:
    """For people: one line for each bad row (for neighbours with one fault, together) and each warning, then a summary."""
    usable = report.rows - len(report.bad_rows)
    lines = [f"bad row: {_together(rows)}" for rows in _neighbours(report.bad_rows)]
    lines += [f"warning: {warning}" for warning in report.warnings]
    lines.append(f"rows       {report.rows} ({usable} usable, {len(report.bad_rows)} bad)")
    lines.append(f"abilities  {_shares(report.abilities, usable)}")
    lines.append(f"styles     {_shares(report.styles, usable)}")
    lines.append(f"sources    {_shares(report.sources, usable)}")
    if report.tools:
        lines.append(f"tools      {_shares(report.tools, usable)}")
    if report.smallest is None or report.largest is None:
        lines.append("images     none")
    else:
        small, large = ("x".join(map(str, size)) for size in (report.smallest, report.largest))
        lines.append(f"images     {report.images} ({report.image_bytes / 2**20:.1f} MiB), {small} to {large} pixels")
        lines.append(f"           {_shares(report.image_sizes, report.images)}")
    if report.tokens is not None:
        longest = f"up to {report.longest_prompt} tokens" if report.longest_prompt else "none that fits"
        lines.append(f"prompts    {longest}; {report.over_limit} over the limit")
        if report.tokens:
            lines.append(f"           {_shares(report.tokens, usable)}")
    return "\n".join(lines)


def _shares(counts: Mapping[str, int], of: int) -> str:
    """In the order given, or the most frequent ones where there are many."""
    shown = counts
    if len(counts) > _MOST_SHOWN:
        shown = dict(sorted(counts.items(), key=lambda entry: -entry[1])[:_MOST_SHOWN])
    parts = [f"{' '.join(name.split())[:60] or '(blank)'} {count} ({count / max(of, 1):.0%})" for name, count in shown.items()]
    if len(counts) > len(shown):
        parts.append(f"and {len(counts) - len(shown)} more")
    return ", ".join(parts) or "none"


def _neighbours(bad_rows: Sequence[BadRow]) -> Iterator[list[BadRow]]:
    """Runs of rows that follow each other and have the same fault: of a damaged row group, or of a column that is missing."""
    run: list[BadRow] = []
    for bad_row in bad_rows:
        if run and bad_row != dataclasses.replace(run[-1], row=run[-1].row + 1):
            yield run
            run = []
        run.append(bad_row)
    if run:
        yield run


def _together(rows: Sequence[BadRow]) -> str:
    first, last = rows[0], rows[-1]
    if first == last:
        return str(first)
    where = f"{first.file}, rows {first.row} to {last.row}, column {first.column}"
    return f"{where}: expected {first.expected}, got {first.got}"


def render_json(report: CheckReport) -> str:
    """For programs: the fields of `CheckReport`, every bad row as {file, row, column, expected, got}."""
    return json.dumps(dataclasses.asdict(report), indent=2, ensure_ascii=False)
