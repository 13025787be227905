"""What changed in a bucket from one version to the next, without loss: elements are compared as integers, so that NaN payloads
and the sign of zero count.

full      the new bytes
bitmap    a bit for every element (numpy's bit order), then the new values of those that are set
gaps8     new values, then for each the number of elements between it and the one before, as uint8
gaps16    likewise, uint16

A gap too long for its type is bridged by elements that have not changed. The smallest of the four is taken: for bfloat16, gaps
below one element in eight, the bitmap above, all of it above 94 %.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from metis_fast.errors import SyncError

Encoding = Literal["full", "bitmap", "gaps8", "gaps16"]
Bytes = npt.NDArray[np.uint8]

_GAP: dict[str, type[np.unsignedinteger]] = {"gaps8": np.uint8, "gaps16": np.uint16}


def _elements(data: Bytes, itemsize: int) -> npt.NDArray[np.unsignedinteger]:
    return data.view({1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}[itemsize])


def encode(old: Bytes, new: Bytes, itemsize: int) -> tuple[Encoding, Bytes]:
    """How to make `new` of `old`, in fewest bytes. All of it comes as a view of `new`.

    old, new: of one length, a multiple of `itemsize`, the bytes of an element.
    """
    before, after = _elements(old, itemsize), _elements(new, itemsize)
    differs = before != after
    changed = int(np.count_nonzero(differs))
    sizes: dict[Encoding, int] = {"full": new.nbytes, "bitmap": -(-after.size // 8) + changed * itemsize}
    if min(sizes.values()) <= changed * (itemsize + 1):  # gaps could only be longer
        best: Encoding = "full" if sizes["full"] <= sizes["bitmap"] else "bitmap"
        return (best, new) if best == "full" else (best, _bitmap(differs, after))
    skipped = np.diff(np.flatnonzero(differs), prepend=-1) - 1  # unchanged elements before each
    for kind, gap in _GAP.items():
        longest = int(np.iinfo(gap).max)
        sizes["gaps8" if kind == "gaps8" else "gaps16"] = int((skipped // (longest + 1) + 1).sum()) * (
            itemsize + gap().itemsize
        )
    best = min(sizes, key=lambda kind: sizes[kind])
    if best == "full":
        return best, new
    return best, _bitmap(differs, after) if best == "bitmap" else _gaps(skipped, after, _GAP[best])


def _bitmap(differs: npt.NDArray[np.bool_], after: npt.NDArray[np.unsignedinteger]) -> Bytes:
    return np.concatenate([np.packbits(differs), after[differs].view(np.uint8)])


def _gaps(skipped: npt.NDArray[np.int64], after: npt.NDArray[np.unsignedinteger], gap: type[np.unsignedinteger]) -> Bytes:
    longest = int(np.iinfo(gap).max)
    bridges = skipped // (longest + 1)
    gaps = np.full(int((bridges + 1).sum()), longest, gap)
    gaps[np.cumsum(bridges + 1) - 1] = skipped % (longest + 1)
    where = np.cumsum(gaps.astype(np.int64) + 1) - 1
    return np.concatenate([after[where].view(np.uint8), gaps.view(np.uint8)])


def decode(encoding: str, payload: Bytes, target: Bytes, itemsize: int) -> None:
    """Make the new bytes in `target`, which holds the old ones (anything, for "full").

    Raises:
        SyncError: the payload does not fit the target; what is there then is neither version.
    """
    if encoding not in get_args(Encoding):
        raise SyncError(f"encoding {encoding!r}, expected one of {', '.join(get_args(Encoding))}; run one version everywhere")
    elements = _elements(target, itemsize)
    if encoding == "full":
        _expect(payload.nbytes == target.nbytes, payload, target)
        target[:] = payload
    elif encoding == "bitmap":
        bits = -(-elements.size // 8)
        _expect(payload.nbytes >= bits, payload, target)
        differs = np.unpackbits(payload[:bits], count=elements.size).view(np.bool_)
        _expect(payload.nbytes - bits == np.count_nonzero(differs) * itemsize, payload, target)
        elements[differs] = _elements(payload[bits:].copy(), itemsize)
    else:
        gap = _GAP[encoding]
        count, rest = divmod(payload.nbytes, itemsize + gap().itemsize)
        _expect(rest == 0, payload, target)
        gaps = payload[count * itemsize :].copy().view(gap)
        where = np.cumsum(gaps.astype(np.int64) + 1) - 1
        _expect(count == 0 or where[-1] < elements.size, payload, target)
        elements[where] = _elements(payload[: count * itemsize].copy(), itemsize)


def _expect(fits: bool, payload: Bytes, target: Bytes) -> None:
    if not fits:
        raise SyncError(f"a payload of {payload.nbytes} bytes does not fit a bucket of {target.nbytes}")
