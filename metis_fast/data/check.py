"""What `metis-fast data check` finds in Parquet files before a run depends on them."""

from __future__ import annotations

import dataclasses
import io
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from metis_fast.data.parquet import PromptFiles
from metis_fast.data.row import BadRow, BadRowError
from metis_fast.errors import DataError
from metis_fast.types import Ability, ImageBlob, Prompt


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What is in the files.

    rows: all rows, bad ones included; everything below `bad_rows` is over the usable ones only.
    abilities: usable rows by ability, all three present.
    images: images in usable rows; image_bytes: their encoded size; smallest, largest: (width, height) in pixels by area, None
        where there is no image. longest_prompt: its tokens; None where they were not counted.
    """

    rows: int
    bad_rows: tuple[BadRow, ...]
    abilities: Mapping[str, int]
    images: int
    image_bytes: int
    smallest: tuple[int, int] | None
    largest: tuple[int, int] | None
    longest_prompt: int | None

    @property
    def exit_code(self) -> int:
        """For the command line: 1 if any row is bad, else 0."""
        return 1 if self.bad_rows else 0


def check_files(
    paths: Sequence[Path], progress: bool, num_tokens: Callable[[Prompt], int] | None = None, max_prompt_tokens: int = 0
) -> CheckReport:
    """Read every row of the files (or folders of them), as training would.

    progress: show a bar over row groups on stderr, where that is a terminal. Where a row group cannot be decoded, all its
    rows are bad. num_tokens: of a prompt, with the model to be trained; a row with more than max_prompt_tokens is bad, and so
    is one for which it raises a DataError.

    Raises:
        DataError: a file is missing, is no Parquet file, or lacks a column (see `PromptFiles`).
    """
    files = PromptFiles(paths)
    bad_rows: list[BadRow] = []
    abilities: Counter[str] = Counter({ability.value: 0 for ability in Ability})
    sizes: set[tuple[int, int]] = set()
    lengths: set[int] = set()
    images = image_bytes = 0
    for group in tqdm(files.row_groups, desc="checking", unit="row group", disable=None if progress else True):
        for index in range(group.start, group.start + group.num_rows):
            try:
                prompt = files.read(index)
                if num_tokens is not None:
                    lengths.add(_checked_length(prompt, files.location(index), num_tokens, max_prompt_tokens))
            except BadRowError as error:
                bad_rows.append(error.bad_row)
            except DataError as error:
                column = f"all, row group {group.group}"
                places = map(files.location, range(index, group.start + group.num_rows))
                bad_rows.extend(BadRow(str(path), row, column, "data that decodes", str(error)) for path, row in places)
                break  # its other rows would fail alike, each after another try to decode them all
            else:
                abilities[prompt.ability.value] += 1
                images += len(prompt.images)
                image_bytes += sum(len(image.data) for image in prompt.images)
                sizes.update(_size(image) for image in prompt.images)
    return CheckReport(
        rows=len(files),
        bad_rows=tuple(bad_rows),
        abilities=dict(abilities),
        images=images,
        image_bytes=image_bytes,
        smallest=min(sizes, key=_area, default=None),
        largest=max(sizes, key=_area, default=None),
        longest_prompt=max(lengths, default=None),
    )


def _checked_length(
    prompt: Prompt, place: tuple[Path, int], num_tokens: Callable[[Prompt], int], max_prompt_tokens: int
) -> int:
    path, row = place
    try:
        length = num_tokens(prompt)
    except DataError as error:
        raise BadRowError(BadRow(str(path), row, "images", "images that the model can use", str(error))) from None
    if length > max_prompt_tokens:
        limit = f"at most rollout.max_prompt_tokens={max_prompt_tokens} tokens"
        raise BadRowError(BadRow(str(path), row, "prompt", limit, f"{length} tokens"))
    return length


def render_text(report: CheckReport) -> str:
    """For people: one line for each bad row, then a summary."""
    usable = sum(report.abilities.values())
    lines = [f"bad row: {bad_row}" for bad_row in report.bad_rows]
    lines.append(f"rows       {report.rows} ({usable} usable, {len(report.bad_rows)} bad)")
    shares = (f"{name} {count} ({count / max(usable, 1):.0%})" for name, count in report.abilities.items())
    lines.append(f"abilities  {', '.join(shares)}")
    if report.smallest is None or report.largest is None:
        lines.append("images     none")
    else:
        small, large = ("x".join(map(str, size)) for size in (report.smallest, report.largest))
        lines.append(f"images     {report.images} ({report.image_bytes / 2**20:.1f} MiB), {small} to {large} pixels")
    if report.longest_prompt is not None:
        lines.append(f"prompts    up to {report.longest_prompt} tokens")
    return "\n".join(lines)


def render_json(report: CheckReport) -> str:
    """For programs: the fields of `CheckReport`, every bad row as {file, row, column, expected, got}."""
    return json.dumps(dataclasses.asdict(report), indent=2, ensure_ascii=False)


def _size(image: ImageBlob) -> tuple[int, int]:
    with Image.open(io.BytesIO(image.data)) as opened:
        return opened.size


def _area(size: tuple[int, int]) -> tuple[int, int]:
    return size[0] * size[1], size[0]  # the width settles ties, so that the report does not depend on set order
