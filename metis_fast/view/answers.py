"""What the page asks for: JSON of runs and rollouts, whether a server answers or a file holds the answers. It only reads."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

import numpy as np

from metis_fast import __version__
from metis_fast.errors import DataError, one_line
from metis_fast.report.slices import main_abilities
from metis_fast.report.summary import compared, summary_rows
from metis_fast.view.advisories import advisories
from metis_fast.view.conversation import conversation
from metis_fast.view.index import Snapshot, filter_of
from metis_fast.view.pictures import Source, draw, points, variants
from metis_fast.view.run import Record, Run, default_settings

PAGE = 50
MOST_ROWS = 200
MOST_TOKENS = 4000
"""Of one answer: rollouts of a list where no number is given, at most, and tokens."""
SOON_S = 0.25
"""Seconds for which a first answer reads parts of rollouts: what is new is seen at once, the rest comes with the next one."""
_PATIENT_S = 5.0
_MOST_MEMBERS = 256  # of a group

Json = dict[str, Any]
Query = Mapping[str, str]


def _finite(tree: Any) -> Any:
    """NaN and infinities, which JSON lacks, as nothing."""
    if isinstance(tree, float):
        return tree if math.isfinite(tree) else None
    if isinstance(tree, Mapping):
        return {str(name): _finite(value) for name, value in tree.items()}
    if isinstance(tree, list | tuple):
        return [_finite(value) for value in tree]
    return tree


def as_json(tree: Json) -> str:
    """In one line; what JSON lacks is null."""
    try:
        return json.dumps(tree, separators=(",", ":"), default=str, allow_nan=False)
    except ValueError:
        return json.dumps(_finite(tree), separators=(",", ":"), default=str)


def _whole(query: Mapping[str, str], name: str, otherwise: int, most: int) -> int:
    text = query.get(name, "")
    if not text:
        return otherwise
    if not text.isdecimal() or len(text) > 12:
        raise DataError(f"{name}: expected a whole number, got {text[:40]!r}")
    return min(int(text), most)


class Answers:
    """An answer for each kind of question, from its query. Called from several threads; what they share locks itself.

    All raise DataError where what is asked for is not there, or the query is none.
    """

    def __init__(self, runs: Sequence[Run], soon_s: float | None = None) -> None:
        """soon_s: after so many seconds, overview and list are answered with the rollouts that are read by then; a query with
        wait=1 waits longer. None: they wait for all."""
        self._soon_s = soon_s
        self._runs = {run.name: run for run in runs}
        self._defaults = default_settings()
        self.by_name: Mapping[str, Callable[[Query], Json]] = {
            "runs": self.runs,
            "overview": self.overview,
            "rollouts": self.rollouts,
            "rollout": self.rollout,
            "group": self.group,
            "tokens": self.tokens,
        }

    def run_of(self, query: Query) -> Run:
        """The run that a query names."""
        name = query.get("run", "")
        if name not in self._runs:
            raise DataError(f"run: expected one of {', '.join(self._runs)}, got {name[:80]!r}")
        return self._runs[name]

    def _chosen(self, query: Query) -> list[Run]:
        names = [name for name in query.get("runs", "").split(",") if name]
        unknown = [name for name in names if name not in self._runs]
        if unknown:
            raise DataError(f"runs: expected some of {', '.join(self._runs)}, got {unknown[0][:80]!r}")
        return [self._runs[name] for name in names] or list(self._runs.values())

    def _within_s(self, query: Query) -> float | None:
        return None if self._soon_s is None else _PATIENT_S if query.get("wait") == "1" else self._soon_s

    def _place(self, query: Query) -> tuple[Run, Snapshot, int]:
        run = self.run_of(query)
        snapshot = run.index.snapshot()
        return run, snapshot, snapshot.find(query.get("part", ""), _whole(query, "row", 0, 1 << 40))

    def runs(self, query: Query) -> Json:
        """All runs, with what tells whether something is new in them."""
        records = {name: run.read() for name, run in self._runs.items()}
        labels = variants({name: record.config for name, record in records.items()})
        return {
            "version": __version__,
            "runs": [
                {
                    "name": name,
                    "variant": labels[name],
                    "steps": len(record.steps),
                    "last": record.steps[-1].stats.step if record.steps else None,
                    "planned": record.config.get("train.steps"),
                    "ended": record.summary is not None,
                    "stamp": _stamp(record),
                }
                for name, record in records.items()
            ],
        }

    def overview(self, query: Query) -> Json:
        """Headline, curves, advisories and what is missing, of the runs that are named, or all."""
        runs = self._chosen(query)
        records = {run.name: run.read() for run in runs}
        within_s = self._within_s(query)
        snapshots = {run.name: run.index.snapshot(None if within_s is None else within_s / len(runs)) for run in runs}
        labels = variants({name: record.config for name, record in records.items()})
        signal = {name: snapshot.signal for name, snapshot in snapshots.items()}
        sources = [
            Source(name, points(record.steps, record.evaluations, signal[name]), labels[name])
            for name, record in records.items()
        ]
        everything = [step for record in records.values() for step in record.steps]
        stages = list(dict.fromkeys(stage for step in everything for stage in step.stats.seconds))
        ages = max((len(step.stats.staleness) for step in everything), default=0)
        rated = [step.stats.slices for step in everything]
        rated += [one.slices for record in records.values() for one in record.evaluations]
        return {
            "pictures": draw(sources, query.get("bands") == "1", main_abilities(rated), stages, ages),
            "runs": [self._head(name, record, snapshots[name], labels[name]) for name, record in records.items()],
            **_reading(snapshots.values()),
        }

    def _head(self, name: str, record: Record, snapshot: Snapshot, label: str) -> Json:
        stats = [step.stats for step in record.steps]
        share = {int(entry["step"]): entry["acc_rollouts"] for entry in snapshot.signal}
        changed = [
            {"name": key, "value": str(value)[:200], "default": str(self._defaults.get(key))[:200]}
            for key, value in record.config.items()
            if value != self._defaults.get(key)
        ]
        outcomes: dict[str, int] = {}
        for one in stats:
            for outcome, num in one.outcomes.items():
                outcomes[outcome] = outcomes.get(outcome, 0) + num
        return {
            "name": name,
            "variant": label,
            "steps": len(stats),
            "planned": record.config.get("train.steps"),
            "seed": record.config.get("run.seed"),
            "seconds": record.summary.wall_s if record.summary else sum(sum(one.seconds.values()) for one in stats),
            "before_after": [asdict(row) for row in summary_rows(record.summary)] if record.summary else _first_last(record),
            "ended": record.summary is not None,
            "outcomes": outcomes,
            "tool_errors": sum(one.tool_errors for one in stats),
            "flops": _flops(record),
            "stored": snapshot.size,
            "gone": record.notes[0] if record.gone else "",
            "notes": [*record.notes, *snapshot.notes],
            "benchmarks": asdict(record.benchmarks) if record.benchmarks else None,
            "advisories": [asdict(one) for one in advisories(stats, record.config, share)],
            "settings": changed,
        }

    def rollouts(self, query: Query) -> Json:
        """A page of the rollouts that a filter wants, with a histogram of all of them."""
        run = self.run_of(query)
        snapshot, places = run.index.select(filter_of(query), self._within_s(query))
        places = snapshot.ordered(places, query.get("sort") or "newest")
        offset = _whole(query, "offset", 0, 1 << 40)
        shown = places[offset : offset + max(1, _whole(query, "limit", PAGE, MOST_ROWS))]
        steps = snapshot.columns["step"] if snapshot.size else np.zeros(0)
        return {
            "total": len(places),
            "all": snapshot.size,
            "offset": offset,
            "rows": [snapshot.row(place) for place in shown.tolist()],
            "hist": snapshot.histogram(query.get("hist") or "calls", places),
            "choices": snapshot.choices(),
            "steps": [int(steps.min()), int(steps.max())] if snapshot.size else [],
            "gone": run.gone,
            "notes": snapshot.notes,
            **_reading([snapshot]),
        }

    def rollout(self, query: Query) -> Json:
        """One rollout: what was said, its numbers, its neighbours, and the same prompt in other steps."""
        run, snapshot, place = self._place(query)
        entry = snapshot.row(place)
        row = run.index.rows.read(snapshot.parts[entry["part"]], entry["row"], tokens=False)
        members = snapshot.group(place)
        with _of_known_form():
            talk = conversation(row, run.images)
        return {
            "folder": str(run.folder),
            "head": entry,
            "weights": self._weights(run, entry["step"]),
            "talk": talk,
            "group": [snapshot.row(one) for one in members[:_MOST_MEMBERS]],
            "steps": snapshot.steps_of(place),
            "tokenizer": run.pieces().found,
        }

    def group(self, query: Query) -> Json:
        """The rollouts of a prompt in a step, beside one another."""
        run, snapshot, place = self._place(query)
        members = snapshot.group(place)[:_MOST_MEMBERS]
        entries = [snapshot.row(one) for one in members]
        reader, answers = run.index.rows, list[str]()
        for entry in entries:
            row = reader.read(snapshot.parts[entry["part"]], entry["row"], tokens=False)
            with _of_known_form():
                verdict, answers = row["verdict"] or {}, [answer[:300] for answer in row["answers"] or ()]
                entry["answer"] = (verdict.get("answer") or "")[:300]
                entry["reason"] = (verdict.get("reason") or row.get("no_verdict") or row["error"] or "")[:300]
                entry["tools"] = [(turn["call"]["name"] or "(malformed)")[:60] for turn in row["turns"] or () if turn["call"]]
        return {
            "question": entries[0]["question"],
            "answers": answers,
            "step": entries[0]["step"],
            "uid": entries[0]["uid"],
            "weights": self._weights(run, entries[0]["step"]),
            "members": entries,
            "steps": snapshot.steps_of(place),
        }

    def _weights(self, run: Run, step: int) -> Json:
        """What an advantage is multiplied with in the gradient: weight and number of tokens of each channel, the mean over the
        step's mini-batches. The number is missing where the step is not logged."""
        record = run.read()
        updates = next((one.stats.updates for one in record.steps if one.stats.step == step), ())

        def mean(name: str) -> float | None:
            values = [getattr(update, name) for update in updates if not update.skipped_step]
            return sum(values) / len(values) if values else None

        return {
            "w_acc": run.setting(record.config, "loss.w_acc", self._defaults["loss.w_acc"]),
            "w_tool": run.setting(record.config, "loss.w_tool", self._defaults["loss.w_tool"]),
            "n_acc": mean("n_acc"),
            "n_tool": mean("n_tool"),
            "mini_batches": len(updates),
        }

    def tokens(self, query: Query) -> Json:
        """Tokens of a rollout from `start` on, at most `count`, with log-prob, weight version and mask; and its image spans."""
        run, snapshot, place = self._place(query)
        entry = snapshot.row(place)
        part = snapshot.parts[entry["part"]]
        columns = run.index.rows.read(part, entry["row"], tokens=True)
        row = run.index.rows.read(part, entry["row"], tokens=False)
        with _of_known_form():
            return self._strip(run, row, columns, query)

    def _strip(self, run: Run, row: Mapping[str, Any], columns: Mapping[str, np.ndarray], query: Query) -> Json:
        total = len(columns["tokens"])
        start = min(_whole(query, "start", 0, 1 << 40), total)
        stop = min(total, start + max(1, _whole(query, "count", MOST_TOKENS, MOST_TOKENS)))
        ids = columns["tokens"][start:stop].tolist()
        return {
            "total": total,
            "start": start,
            "prompt_len": row["prompt_len"],
            "ids": ids,
            "texts": run.pieces().texts(ids),
            "sampled": columns["sampled"][start:stop].astype(np.int8).tolist(),
            "logp": np.round(columns["logp"][start:stop].astype(np.float64), 4).tolist(),
            "version": columns["weight_version"][start:stop].tolist(),
            "spans": [[span["start"], span["stop"], span["sha256"]] for span in row["image_spans"] or ()],
        }


@contextmanager
def _of_known_form() -> Iterator[None]:
    """Around what is done with a stored row, which another program or a newer version may have written."""
    try:
        yield
    except (TypeError, KeyError, AttributeError, IndexError) as error:
        raise DataError(f"this rollout has another form and cannot be shown: {one_line(repr(error))[:160]}") from None


def _reading(snapshots: Iterable[Snapshot]) -> Json:
    """How many parts of rollouts are not read yet, of how many."""
    known = [*snapshots]
    left = sum(snapshot.left for snapshot in known)
    return {"left": left, "parts": left + sum(len(snapshot.parts) + len(snapshot.notes) for snapshot in known)}


def _stamp(record: Record) -> str:
    """Another one when there is something new. By the seconds of its last step, a run that was made anew is new, too."""
    seconds = sum(record.steps[-1].stats.seconds.values()) if record.steps else 0.0
    return f"{len(record.steps)}.{len(record.evaluations)}.{record.summary is not None}.{record.gone}.{seconds:.6f}"


def _first_last(record: Record) -> list[Json]:
    """Of a run that goes on: the first and the last evaluation."""
    if not record.evaluations:
        return []
    first, last = record.evaluations[0], record.evaluations[-1]
    return [asdict(row) for row in compared(first.slices, last.slices)]


def _flops(record: Record) -> Json:
    """Of all updates: run, and avoided by each saving."""
    total: dict[str, float] = {}
    for step in record.steps:
        for tag, value in step.scalars.items():
            if tag == "flops/run" or tag.startswith("flops_avoided/"):
                total[tag.partition("/")[2]] = total.get(tag.partition("/")[2], 0.0) + value
    return total
