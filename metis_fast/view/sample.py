"""Which groups a page in one file holds, where it cannot hold all."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from metis_fast.view.index import Snapshot

RULE = (
    "Whole groups were taken: of the first step, the last one, the middle one, and so on between them, one of every kind "
    "(ability, where prompts have no kind), prompts that were taken before first; then another one of each."
)
"""What `groups_in_turn` does, for readers of the page."""


def spread(steps: Sequence[int]) -> list[int]:
    """The first, the last, the middle one, then the middles of the halves, and so on."""
    if len(steps) < 3:
        return list(steps)
    order, gaps = [steps[0], steps[-1]], [(0, len(steps) - 1)]
    while gaps:
        first, last = gaps.pop(0)
        if last - first < 2:
            continue
        middle = (first + last) // 2
        order.append(steps[middle])
        gaps += [(first, middle), (middle, last)]
    return order


def groups_in_turn(snapshot: Snapshot) -> Iterator[list[int]]:
    """All groups as places of the snapshot, in the order in which a sample takes them (`RULE`)."""
    if not snapshot.size:
        return
    columns = snapshot.columns
    order = np.lexsort((columns["row"], columns["part"], columns["sample"], columns["uid"], columns["step"]))
    step, uid = columns["step"][order], columns["uid"][order]
    starts = np.flatnonzero(np.r_[True, (step[1:] != step[:-1]) | (uid[1:] != uid[:-1])])
    no_kind = snapshot.words["kind"].index("") if "" in snapshot.words["kind"] else -1
    waiting: dict[int, dict[tuple[bool, int], list[list[int]]]] = {}
    for places in np.split(order, starts[1:]):
        first = int(places[0])
        kind = int(columns["kind"][first])
        key = (True, int(columns["ability"][first])) if kind == no_kind else (False, kind)
        waiting.setdefault(int(columns["step"][first]), {}).setdefault(key, []).append(places.tolist())
    for kinds in waiting.values():
        for groups in kinds.values():
            groups.sort(key=min)  # as they were stored
    taken = set[int]()
    while waiting:
        for one in spread(sorted(waiting)):
            kinds = waiting[one]
            for key in sorted(kinds):
                groups = kinds[key]
                again = (place for place, group in enumerate(groups) if int(columns["uid"][group[0]]) in taken)
                group = groups.pop(next(again, 0))
                taken.add(int(columns["uid"][group[0]]))
                yield group
                if not groups:
                    del kinds[key]
            if not kinds:
                del waiting[one]
