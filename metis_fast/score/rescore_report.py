"""What `metis-fast judge rescore` says of verdicts that changed, for people and for programs."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from metis_fast.score.protocol import shown
from metis_fast.score.rescore import Changed, Rescoring, Side

_MOST_SHOWN = 5  # examples of each kind of change
_SIDES: tuple[Side, ...] = (True, False, None)
_WORDS: Mapping[Side, str] = {True: "right", False: "wrong", None: "no verdict"}


def render_text(found: Rescoring) -> str:
    """For people: examples of every kind of change, a table for each style, what failed, and the cost."""
    lines: list[str] = []
    for was in _SIDES:
        for now in _SIDES:
            own = [one for one in found.changed if (one.was, one.now.correct) == (was, now)]
            if own:
                lines.append(f"was {_WORDS[was]}, is {_WORDS[now]}: {len(own)}")
                lines += [f"  {_line(one)}" for one in own[:_MOST_SHOWN]]
                lines += [f"  and {len(own) - _MOST_SHOWN} more; --json has them all"] if len(own) > _MOST_SHOWN else []
    for style, counts in found.counts.items():
        lines.append(f"{style}: {sum(counts.values())} rollouts, accuracy {_rates(counts)}")
        lines.append(f"  {'':16} {'is right':>10} {'is wrong':>10} {'no verdict':>10}")
        for was in _SIDES:
            cells = " ".join(f"{counts.get((was, now), 0):10}" for now in _SIDES)
            lines.append(f"  {('had ' if was is None else 'was ') + _WORDS[was]:16} {cells}")
    lines += [f"no verdict: {count} x {reason}" for reason, count in found.failures.items()]
    if found.formats:
        lines.append(f"format judged otherwise: {found.formats}")
    if found.broken:
        lines.append(f"not judged, since the run broke them off: {found.broken}")
    cost = found.cost
    tokens = f", {cost.prompt_tokens} tokens in, {cost.completion_tokens} out" if cost.requests else ""
    lines.append(f"cost: {cost.requests} requests{tokens}, {cost.seconds:.1f} s of requests")
    again = f" ({found.resumed} were there)" if found.resumed else ""
    lines.append(f"verdicts: {found.path}{again}")
    return "\n".join(lines)


def _rates(counts: Mapping[tuple[Side, Side], int]) -> str:
    def rate(place: int) -> str:
        right = sum(count for sides, count in counts.items() if sides[place])
        judged = sum(count for sides, count in counts.items() if sides[place] is not None)
        return f"{right / judged:.1%}" if judged else "-"

    return f"{rate(0)} -> {rate(1)}"


def _line(one: Changed) -> str:
    now = one.now
    before = f"{one.before or 'before'}: {one.before_reason}" if one.before_reason else "before"
    truths = ", ".join(map(shown, one.answers))
    said = f"{now.judge or 'no judge was asked'}: {now.reason}"
    return f"{now.part} {now.prompt_uid} #{now.index}: {shown(now.answer)} for {truths}; {said}; {before}"


def render_json(found: Rescoring) -> str:
    """For programs: the fields of `Rescoring`; counts as a list of {style, was, is, rollouts}."""
    tree: dict[str, Any] = asdict(found) | {
        "path": str(found.path),
        "counts": [
            {"style": style, "was": was, "is": now, "rollouts": count}
            for style, counts in found.counts.items()
            for (was, now), count in counts.items()
        ],
    }
    return json.dumps(tree, indent=2)
