"""A benchmark's questions from its published files, checked: the file is the known one, no column lacks, every row fits."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from metis_fast.data.row import BadRow, MisfitError
from metis_fast.errors import DataError
from metis_fast.evaluate.benchmark import Benchmark, PublishedFile
from metis_fast.evaluate.files.jsonfile import JsonTable
from metis_fast.evaluate.files.parquet import ParquetTable
from metis_fast.evaluate.files.table import Row, Table, show
from metis_fast.evaluate.files.tsv import TsvTable
from metis_fast.evaluate.question import Question

_FORMS: dict[str, Callable[[Path, bool], Table]] = {
    ".tsv": TsvTable,
    ".parquet": ParquetTable,
    ".json": JsonTable,
    ".jsonl": JsonTable,
}


_LFS = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True, slots=True)
class FileFacts:
    """What a result says of a file that it was made with. known: the published file with this MD5, "" if it is none."""

    path: str
    md5: str
    rows: int
    known: str


@dataclass(frozen=True, slots=True)
class QuestionSet:
    """What files hold. warnings: a line each, of what lets them be used and yet deserves a look."""

    benchmark: Benchmark
    questions: tuple[Question, ...]
    files: tuple[FileFacts, ...]
    bad_rows: tuple[BadRow, ...]
    warnings: tuple[str, ...]


def read(benchmark: Benchmark, paths: Sequence[Path], any_md5: bool = False, progress: bool = False) -> QuestionSet:
    """The questions of files, which all have to fit. any_md5: take a file whose MD5 is not a known one.

    Raises:
        DataError: as `inspect`; or a row does not fit.
    """
    found = inspect(benchmark, paths, any_md5, progress)
    for bad in found.bad_rows:
        more = f" ({len(found.bad_rows) - 1} more rows do not fit)" if len(found.bad_rows) > 1 else ""
        raise DataError(f"{bad}{more}; see all with metis-fast benchmark check, get the file again or mend it")
    return found


def inspect(benchmark: Benchmark, paths: Sequence[Path], any_md5: bool = False, progress: bool = False) -> QuestionSet:
    """As `read`, with the rows that do not fit. Images are not opened.

    Raises:
        DataError: a file is missing, cut, of another form, not the published one (see any_md5), or lacks a column; an index
            stands in two files; or there is no row at all.
    """
    questions: list[Question] = []
    facts: list[FileFacts] = []
    bad: list[BadRow] = []
    warnings: list[str] = []
    places: dict[str, str] = {}
    for path in expand(paths):
        _check_file(path)
        table = _FORMS[path.suffix](path, progress)
        known = _known(benchmark, table, any_md5, warnings)
        _check_columns(benchmark, table)
        num = 0
        for row in table.rows():
            num += 1
            try:
                if benchmark.needs_image and not row.picture:
                    raise MisfitError("image", "an image", None)
                made = benchmark.questions(row)
                _check_text(made)
            except MisfitError as error:
                bad.append(BadRow(str(path), row.number, error.column, error.expected, error.got))
                continue
            for question in made:
                _check_own_index(question, row, places)
                questions.append(question)
        facts.append(FileFacts(str(path), table.md5, num, known.name if known else ""))
        if isinstance(table, TsvTable) and table.unfinished and known is None:
            warnings.append(
                f"{path}: its last line has no end, so it may be cut short; compare its size with the published one"
            )
    if not questions and not bad:
        raise DataError(f"{', '.join(map(str, paths))}: expected rows, got none; give a file of {benchmark.title}")
    warnings += _row_counts(benchmark, facts)
    return QuestionSet(benchmark, tuple(questions), tuple(facts), tuple(bad), tuple(warnings))


def expand(paths: Sequence[Path]) -> list[Path]:
    """Files, with folders replaced by the files in them (or in their folder `data`) of the first form of which there are any.

    Raises:
        DataError: a folder without any, a form that is not read, or a file that is given twice.
    """
    files: list[Path] = []
    for path in paths:
        files += _in_folder(path) if path.is_dir() else [path]
    for path in files:
        if path.suffix not in _FORMS:
            raise DataError(
                f"{path}: expected a file that ends in {', '.join(_FORMS)}; unpack archives, and give what is in them"
            )
        if files.count(path) > 1:
            raise DataError(f"{path}: given twice; name each file once")
    return files


def _in_folder(folder: Path) -> list[Path]:
    for suffix in _FORMS:
        if found := sorted(folder.glob(f"*{suffix}")) or sorted(folder.glob(f"data/*{suffix}")):
            return found
    raise DataError(f"{folder}: expected files that end in {', '.join(_FORMS)} in this folder, found none; name the files")


def _check_file(path: Path) -> None:
    """One that does not exist is found when it is read."""
    if path.exists() and not path.is_file():
        raise DataError(f"{path}: expected a file, got a device or a pipe; save what comes from it first")
    if path.is_file():
        with path.open("rb") as file:
            if file.read(len(_LFS)) == _LFS:
                raise DataError(f"{path} is a git-lfs pointer and not the file itself; run `git lfs pull` in its repository")


def _check_text(questions: Iterable[Question]) -> None:
    """JSON can spell half of a character, which no file can hold.

    Raises:
        MisfitError: a text has one.
    """
    for question in questions:
        for name, text in (("index", question.index), ("question", question.asked), ("answer", question.answer)):
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise MisfitError(name, "Unicode text", f"{show(text)}: {error.reason}") from None


def _check_own_index(question: Question, row: Row, places: dict[str, str]) -> None:
    place = f"{row.file}, row {row.number}"
    if (other := places.setdefault(question.index, place)) != place:
        raise DataError(
            f"{place}: expected an index of its own, got {show(question.index)} as in {other}; leave one of the files out, or "
            "number the rows"
        )


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _known(benchmark: Benchmark, table: Table, any_md5: bool, warnings: list[str]) -> PublishedFile | None:
    """The published file that a table is. Of files in other forms than TSV no MD5 is published."""
    for file in benchmark.files:
        if table.md5 in file.md5:
            return file
    stem = _plain(table.path.stem)
    candidates = [file for file in benchmark.files if _plain(file.name) == stem] or list(benchmark.files)
    candidates = [file for file in candidates if file.md5]
    if not isinstance(table, TsvTable) or not candidates:
        return None
    wanted = ", ".join(f"{md5} ({file.name})" for file in candidates for md5 in file.md5)
    if any_md5 or all(file.built for file in candidates):
        warnings.append(f"{table.path}: MD5 {table.md5} is not a published one ({wanted}); scores may not compare with others'")
        return None
    raise DataError(
        f"{table.path}: expected MD5 {wanted}, got {table.md5}; get it again from {candidates[0].source}, or take it as it is "
        "(benchmark check --any-md5, benchmark run any_md5=true)"
    )


def _check_columns(benchmark: Benchmark, table: Table) -> None:
    for column in benchmark.columns:
        names = (column,) if isinstance(column, str) else column
        if not set(names) & set(table.columns):
            raise DataError(
                f"{table.path}: expected a column {' or '.join(map(repr, names))}, as {benchmark.title} has, got "
                f"{', '.join(table.columns)[:200]}; give a file of this benchmark"
            )


def _row_counts(benchmark: Benchmark, facts: Iterable[FileFacts]) -> Iterator[str]:
    """Subsets that are reported as the whole are what makes scores incomparable."""
    got = sum(fact.rows for fact in facts)
    known = sorted({file.rows for file in benchmark.files if file.rows})
    if known and got not in known:
        yield f"{got} rows, and {benchmark.title} has {' or '.join(map(str, known))}: a part is no score of the whole"
