"""The verbs of `metis-fast benchmark`: list them, check their files, write stand-ins for those; run them (`running_verbs`)."""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from metis_fast.errors import ConfigError, DataError
from metis_fast.evaluate.running_verbs import add_running_verbs

if TYPE_CHECKING:
    from metis_fast.data.command import AddVerb
    from metis_fast.evaluate.benchmark import Benchmark
    from metis_fast.evaluate.files.reading import QuestionSet
    from metis_fast.evaluate.question import Images, Question

_MOST_SHOWN = 20  # bad rows, for people


def add_verbs(benchmark: argparse._SubParsersAction, verb: AddVerb) -> None:
    """Put the verbs under `benchmark`. verb: adds one, with what runs it and what it is for."""
    sub = verb(benchmark, "list", _list, "The benchmarks: their names, rows, published files, prompts and scorers.")
    sub.add_argument("--json", action="store_true", help="print the result as one JSON object")
    sub = verb(
        benchmark, "check", _check, "Are these the published files, whole, and does every row fit? Exit code 1 if one does not."
    )
    sub.add_argument("files", type=Path, nargs="+", metavar="FILE", help="files, or folders of them")
    sub.add_argument("--benchmark", metavar="NAME", help="that all files are of; default: by the names of the files")
    sub.add_argument("--any-md5", action="store_true", help="take files whose MD5 is not a published one")
    sub.add_argument(
        "--no-images", action="store_true", help="do not decode the images, which takes longer than reading the file"
    )
    sub.add_argument("--json", action="store_true", help="print the result as one JSON object")
    add_running_verbs(benchmark, verb)
    sub = verb(benchmark, "standin", _standin, "Write small files in the published forms, to rehearse before a download.")
    sub.add_argument("out", type=Path, metavar="FOLDER")
    sub.add_argument("names", nargs="*", metavar="NAME", help="of benchmarks; none: all of them")
    sub.add_argument("--count", type=int, default=6, metavar="N", help="problems of each (default 6)")
    sub.add_argument("--pixels", default="160x120", metavar="WxH", help="of their pictures (default 160x120)")
    sub.add_argument("--seed", type=int, default=0, metavar="S")
    sub.add_argument("--json", action="store_true", help="print the result as one JSON object")


def _list(args: argparse.Namespace) -> int:
    from metis_fast.evaluate.benchmarks import BENCHMARKS

    if args.json:
        print(json.dumps({name: _described(benchmark) for name, benchmark in BENCHMARKS.items()}, ensure_ascii=False))
        return 0
    for benchmark in BENCHMARKS.values():
        rows = sorted({file.rows for file in benchmark.files if file.rows})
        print(f"{benchmark.name:20} {benchmark.title}, {' or '.join(map(str, rows)) or 'unstated'} rows")
        print(f"{'':20} files    {', '.join(file.name for file in benchmark.files)}")
        judges = f"; judge: {', '.join(benchmark.judges)}" if benchmark.judges else ""
        print(f"{'':20} prompts  {', '.join(benchmark.prompts)}; scorers: {', '.join(benchmark.scorers)}{judges}")
        print(f"{'':20} note     {benchmark.footnote}")
    return 0


def _described(benchmark: Benchmark) -> dict[str, Any]:
    return {
        "title": benchmark.title,
        "aliases": benchmark.aliases,
        "files": [dataclasses.asdict(file) for file in benchmark.files],
        "columns": benchmark.columns,
        "prompts": list(benchmark.prompts),
        "scorers": list(benchmark.scorers),
        "judges": list(benchmark.judges),
        "footnote": benchmark.footnote,
    }


def _check(args: argparse.Namespace) -> int:
    from metis_fast.evaluate.files.reading import inspect

    results = []
    for benchmark, paths in _by_benchmark(args.files, args.benchmark):
        found = inspect(benchmark, paths, args.any_md5, not args.json)
        bad = [str(row) for row in found.bad_rows]
        if not args.no_images:
            bad += _bad_images(found, not args.json)
        results.append((found, bad))
    if args.json:
        print(json.dumps({found.benchmark.name: _as_json(found, bad) for found, bad in results}, ensure_ascii=False))
    else:
        print("\n\n".join(_as_text(found, bad) for found, bad in results))
    return int(any(bad for _, bad in results))


def _by_benchmark(paths: Sequence[Path], name: str | None) -> list[tuple[Benchmark, list[Path]]]:
    """Files of one benchmark together, in the order given."""
    from metis_fast.evaluate.benchmarks import BENCHMARKS, find

    if name is not None:
        return [(find(name), list(paths))]
    by_name: dict[str, list[Path]] = {}
    for path in paths:
        names = [one.name for one in BENCHMARKS.values() if _plain(path.stem) in map(_plain, one.names)]
        if len(names) != 1:
            raise ConfigError(
                f"{path}: expected the name of a published file, as in metis-fast benchmark list, got {path.name!r}; say which "
                "benchmark it is of (--benchmark NAME)"
            )
        by_name.setdefault(names[0], []).append(path)
    return [(BENCHMARKS[one], files) for one, files in by_name.items()]


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9*]", "", name.lower())


def _bad_images(found: QuestionSet, progress: bool) -> list[str]:
    """What is wrong with images, each of which is decoded; questions of one row read them once."""
    from metis_fast.evaluate.files.images import decoded

    problems: list[str] = []

    def loaded() -> Iterator[tuple[Question, Images]]:
        last = None
        for question in tqdm(found.questions, desc="images", unit="row", disable=None if progress else True, leave=False):
            if question.load_images is last:
                continue
            last = question.load_images
            try:
                yield question, question.images()
            except DataError as error:
                problems.append(str(error))

    problems += [str(damage) for _, _, damage in decoded(loaded()) if damage]
    return problems


def _as_json(found: QuestionSet, bad: Sequence[str]) -> dict[str, Any]:
    return {
        "questions": len(found.questions),
        "clusters": len({question.cluster for question in found.questions}),
        "files": [dataclasses.asdict(file) for file in found.files],
        "bad_rows": list(bad),
        "warnings": list(found.warnings),
    }


def _as_text(found: QuestionSet, bad: Sequence[str]) -> str:
    lines = [f"bad row: {row}" for row in bad[:_MOST_SHOWN]]
    lines += [f"and {len(bad) - _MOST_SHOWN} more bad rows (--json has them all)"] if len(bad) > _MOST_SHOWN else []
    lines += [f"warning: {warning}" for warning in found.warnings]
    clusters = len({question.cluster for question in found.questions})
    lines.append(f"{found.benchmark.title}: {len(found.questions)} questions, {clusters} independent ones")
    for file in found.files:
        published = any(one.md5 for one in found.benchmark.files)
        known = f"the published {file.known}" if file.known else "not a published one" if published else "none is published"
        lines.append(f"  {file.path}: {file.rows} rows, MD5 {file.md5} ({known})")
    for tag in sorted({tag for question in found.questions for tag in question.tags}):
        values = Counter(question.tags[tag] for question in found.questions if tag in question.tags)
        lines.append(f"  {tag:10} {_counted(values.most_common(8))}{' ...' if len(values) > 8 else ''}")
    return "\n".join(lines)


def _counted(values: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{' '.join(value.split())[:40] or '(blank)'} {count}" for value, count in values)


def _standin(args: argparse.Namespace) -> int:
    from metis_fast.evaluate.benchmarks import find
    from metis_fast.evaluate.standin import write_standins
    from metis_fast.standin.sizes import picture_size

    size = picture_size(args.pixels)
    if args.count < 1:
        raise ConfigError(f"benchmark standin: expected --count from 1 on, got {args.count}")
    names = [find(name).name for name in args.names]
    written = write_standins(args.out, names, args.count, size, args.seed)
    if args.json:
        print(json.dumps({name: {"tsv": [*map(str, one.tsv)], "hub": [*map(str, one.hub)]} for name, one in written.items()}))
        return 0
    for name, one in written.items():
        print(f"{name:20} {', '.join(map(str, (*one.tsv, *one.hub[:1])))}{' ...' if len(one.hub) > 1 else ''}")
    return 0
