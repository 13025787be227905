"""A table of results, beside the published ones: Markdown, JSON, an HTML section, LaTeX."""

from __future__ import annotations

import dataclasses
import html
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from metis_fast.evaluate.benchmarks import BENCHMARKS
from metis_fast.evaluate.result import Stored, read_results

BASE, METIS = "Qwen3-VL-8B (published)", "Metis (published)"
PUBLISHED: dict[str, tuple[float, float]] = {
    "vstar": (86.4, 91.1),
    "hrbench4k": (78.9, 83.5),
    "hrbench8k": (74.6, 82.0),
    "treebench": (40.7, 45.2),
    "mme-realworld": (61.9, 70.3),
    "seedbench2plus": (71.0, 72.5),
    "charxiv-dq": (83.0, 83.4),
    "charxiv-rq": (46.3, 54.1),
    "mathvista": (76.3, 78.0),
    "mathverse": (61.3, 65.9),
    "wemath": (38.8, 65.2),
    "dynamath": (65.5, 69.2),
    "logicvista": (54.9, 56.2),
}
"""Per cent, of the base model and of Metis, as the README of Metis has them."""
_SAME = {"mme-realworld-lite": "mme-realworld", "mme-realworld-cn": "mme-realworld"}
UNSTATED = (
    "Published numbers: it is not stated which judge model, which temperature, and for which benchmarks tools were on; "
    "no error is given."
)
_UNSTATED = {
    "mme-realworld": "Published: not stated whether this is the full set, Lite, or English with Chinese.",
    "mathverse": "Published: not stated whether all versions or Vision Only.",
    "wemath": "Published: not stated whether strict, loose or accuracy; +26.4 is far from all other gains, and a mix of strict "
    "and loose would look like this.",
    "dynamath": "Published: not stated whether the average or the worst case.",
}
_MORE = {
    "wemath": ("score (loose)", "accuracy"),
    "dynamath": ("worst case",),
    "mathverse": ("version/Vision Only",),
    "hrbench4k": ("all four orders right",),
    "hrbench8k": ("all four orders right",),
}
"""Figures beside the headline that papers may mean."""


@dataclass(frozen=True, slots=True)
class Cell:
    """A number in per cent, with its standard error; None where there is none. notes: numbers of footnotes."""

    value: float | None
    error: float | None = None
    notes: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Line:
    """A figure of a benchmark. cells: column -> number."""

    benchmark: str
    title: str
    figure: str
    cells: dict[str, Cell]


@dataclass(slots=True)
class Table:
    """Lines, the columns in their order, and footnotes, counted from 1."""

    columns: list[str] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def note(self, text: str) -> int:
        """The number of a footnote, which is new or there already."""
        if text not in self.notes:
            self.notes.append(text)
        return self.notes.index(text) + 1


def make_table(paths: Sequence[Path], paper: bool) -> Table:
    """The results of runs. paper: beside the published numbers.

    Raises:
        DataError: a run has no result.
    """
    table = Table()
    by_benchmark: dict[str, list[Stored]] = {}
    names = _names([path.resolve() for path in paths])
    for path in paths:
        for one in read_results(path):
            by_benchmark.setdefault(one.benchmark, []).append(replace(one, name=names[path.resolve()]))
    for name in sorted(by_benchmark, key=list(BENCHMARKS).index):
        _add(table, by_benchmark[name], name, paper)
    table.columns = list(dict.fromkeys(column for line in table.lines for column in line.cells if not _published(column)))
    if paper:
        table.columns += [BASE, METIS]
        table.note(UNSTATED)
    return table


def _names(paths: Sequence[Path]) -> dict[Path, str]:
    """What each path is called: its last part, or as many as tell all of them apart."""
    different = list(dict.fromkeys(paths))
    for num in range(1, max(len(path.parts) for path in different) + 1):
        names = {path: "/".join(path.parts[-num:]) for path in different}
        if len(set(names.values())) == len(different):
            return names
    return {path: str(path) for path in different}


def _published(column: str) -> bool:
    return column in (BASE, METIS)


def _add(table: Table, stored: Sequence[Stored], name: str, paper: bool) -> None:
    for figure in (None, *_MORE.get(name, ())):
        cells: dict[str, Cell] = {}
        label = figure or ""
        for one in stored:
            for scorer, scored in one.result["scorers"].items():
                found = [own for own in scored["figures"] if figure is None or own["name"] == figure]
                if found and scorer != "iou":
                    label = label or found[0]["name"]
                    cells[f"{_run_name(one)}, {scorer}"] = _cell(table, one, found[0])
            if figure is None and (rate := one.result.get("tool_rate")):
                cells[f"{_run_name(one)}, tool rate"] = Cell(_percent(rate["value"]), _percent(rate["error"]))
        if figure is None and paper:
            cells |= _paper_cells(table, name)
        if figure is None or any(cell.value is not None for cell in cells.values()):
            table.lines.append(Line(name, BENCHMARKS[name].title, label, cells))


def _run_name(stored: Stored) -> str:
    tools = stored.result["settings"]["tools"]
    return stored.name + ("" if tools == "on" else f" (tools {tools})")


def _percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def _cell(table: Table, stored: Stored, figure: dict[str, Any]) -> Cell:
    """With footnotes of what makes a number less than it seems."""
    notes = []
    result = stored.result
    if figure["missing"]:
        low, high = _percent(figure["low"]), _percent(figure["high"])
        between = "" if low is None or high is None else f"; between {low:.1f} and {high:.1f} with all of them wrong, or right"
        notes.append(
            table.note(f"Over {figure['n']} of {figure['n'] + figure['missing']}: the others have no verdict{between}.")
        )
    notes += [table.note(f"{result['title']}: {_short(warning)}.") for warning in result["warnings"]]
    if figure["error"] is None and figure["value"] is not None:
        notes.append(table.note("A standard error cannot be had (one cluster, or a ratio)."))
    return Cell(_percent(figure["value"]), _percent(figure["error"]), tuple(notes))


def _short(warning: str) -> str:
    """Without the folder of a file, and without what is in brackets."""
    head, mark, rest = re.sub(r" \(.*\)", "", warning).partition(": ")
    return f"{Path(head).name}: {rest}" if mark and "/" in head else warning


def _paper_cells(table: Table, name: str) -> dict[str, Cell]:
    source = _SAME.get(name, name)
    notes = [table.note(_UNSTATED[source])] if source in _UNSTATED else []
    return {column: Cell(value, None, tuple(notes)) for column, value in zip((BASE, METIS), PUBLISHED[source], strict=True)}


def _number(cell: Cell | None, plus_minus: str) -> str:
    if cell is None or cell.value is None:
        return "-"
    return f"{cell.value:.1f}" + ("" if cell.error is None else f" {plus_minus} {cell.error:.1f}")


def as_markdown(table: Table) -> str:
    """A table with footnotes below."""
    rows = [["benchmark", "figure", *table.columns], ["---"] * (2 + len(table.columns))]
    for line in table.lines:
        cells = []
        for column in table.columns:
            cell = line.cells.get(column)
            marks = "".join(f"[{number}]" for number in cell.notes) if cell is not None else ""
            cells.append(_number(cell, "±") + (f" {marks}" if marks else ""))
        rows.append([line.title, line.figure, *cells])
    notes = [f"[{number}] {note}" for number, note in enumerate(table.notes, 1)]
    body = ["| " + " | ".join(part.replace("|", "\\|") for part in row) + " |" for row in rows]
    return "\n".join(body + (["", *notes] if notes else []))


def as_json(table: Table) -> str:
    """Numbers in per cent."""
    return json.dumps(dataclasses.asdict(table), ensure_ascii=False)


def as_html(table: Table) -> str:
    """A section that stands in any page, without style or script."""

    def row(tag: str, cells: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"

    head = row("th", [html.escape(text) for text in ("benchmark", "figure", *table.columns)])
    body = []
    for line in table.lines:
        cells = [html.escape(line.title), html.escape(line.figure)]
        for column in table.columns:
            cell = line.cells.get(column)
            marks = ",".join(map(str, cell.notes)) if cell is not None else ""
            cells.append(_number(cell, "&plusmn;") + (f"<sup>{marks}</sup>" if marks else ""))
        body.append(row("td", cells))
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in table.notes)
    return (
        '<section class="benchmarks">\n<h2>Benchmarks</h2>\n<table>\n<thead>'
        + head
        + "</thead>\n<tbody>\n"
        + "\n".join(body)
        + f"\n</tbody>\n</table>\n<ol>{notes}</ol>\n</section>"
    )


_TEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"} | {
    char: f"\\{char}" for char in "&%$#_{}"
}


def _tex(text: str) -> str:
    return "".join(_TEX.get(char, char) for char in text)


def as_latex(table: Table) -> str:
    """A tabular that needs no package, with footnotes below."""
    lines = [r"\begin{tabular}{ll" + "r" * len(table.columns) + "}", r"\hline"]
    lines += [" & ".join(map(_tex, ("benchmark", "figure", *table.columns))) + r" \\", r"\hline"]
    for line in table.lines:
        cells = [_tex(line.title), _tex(line.figure)]
        for column in table.columns:
            cell = line.cells.get(column)
            marks = ",".join(map(str, cell.notes)) if cell is not None else ""
            cells.append(_number(cell, r"$\pm$") + (f"$^{{{marks}}}$" if marks else ""))
        lines.append(" & ".join(cells) + r" \\")
    lines += [r"\hline", r"\end{tabular}"]
    lines += [f"\\par\\noindent$^{{{number}}}$ {_tex(note)}" for number, note in enumerate(table.notes, 1)]
    return "\n".join(lines)
