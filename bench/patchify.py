"""`patchify` beside a copy of what it has to move and transformers' image processor.

Shape letters: Y and X pixels of the image, P pixels of a patch's side, T frames, M patches of a block's side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from metis_kernels import Impl, patchify

from . import ours
from .candidate import DTYPES, BenchError, Candidate, Errors, Op, Outcome, PeerMissing, Plan, Request, Step, largest_error

LIMITS = Errors(values=0.0)
"""Bit for bit: the truth is rounded as it is defined, float64, float32, then the dtype."""

_MEAN, _STD, _RESCALE = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), 1 / 255

_CHECKED = 4
"""Blocks of the side of the part that is checked."""


@dataclass(frozen=True, slots=True, eq=False)
class ImageCase:
    """image_HWC: uint8, on the device."""

    image_HWC: Tensor
    patch: int
    temporal: int
    merge: int
    dtype: torch.dtype


def _make(request: Request, most: int | None = None) -> ImageCase:
    """most: blocks of a side."""
    patch, temporal, merge = (request.shape[letter] for letter in "PTM")
    unit = patch * merge
    if request.shape["Y"] % unit or request.shape["X"] % unit:
        raise BenchError(f"--shape: expected Y and X that are multiples of P x M = {unit}, got {request.shape}")
    height, width = (min(request.shape[letter], (most or request.shape[letter]) * unit) for letter in "YX")
    random = torch.Generator().manual_seed(request.seed)
    image = torch.randint(256, (height, width, 3), generator=random, dtype=torch.uint8).to(request.device)
    return ImageCase(image, patch, temporal, merge, DTYPES[request.dtype])


def _ours(impl: Impl) -> Callable[[ImageCase], Step]:
    def prepare(case: ImageCase) -> Step:
        def step() -> Outcome:
            return Outcome(
                patchify(
                    case.image_HWC, patch=case.patch, temporal=case.temporal, merge=case.merge, mean=_MEAN, std=_STD,
                    rescale=_RESCALE, dtype=case.dtype, impl=impl,
                )
            )  # fmt: skip

        return step

    return prepare


def _transformers(case: ImageCase) -> Step:
    """transformers' image processor without resizing, on the CPU; then to the device, then to the dtype."""
    import metis_fast  # noqa: F401  makes transformers importable where only a part of it can be

    try:
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
    except ImportError as error:
        raise PeerMissing(f"transformers does not import: {error}") from error
    processor = Qwen2VLImageProcessorPil(
        patch_size=case.patch, temporal_patch_size=case.temporal, merge_size=case.merge, image_mean=list(_MEAN),
        image_std=list(_STD), rescale_factor=_RESCALE, do_resize=False,
    )  # fmt: skip
    pixels = case.image_HWC.cpu().numpy()

    def step() -> Outcome:
        found = processor([pixels], return_tensors="pt", input_data_format="channels_last")["pixel_values"]
        return Outcome(found.to(case.image_HWC.device).to(case.dtype))

    return step


def _exact(case: ImageCase) -> Tensor:
    """Patch by patch, as written: [patches, 3 T P P]."""
    shift, spread = (torch.tensor(numbers, dtype=torch.float32)[:, None, None] for numbers in (_MEAN, _STD))
    image = ((case.image_HWC.cpu().permute(2, 0, 1).double() * _RESCALE).float() - shift) / spread
    rows = []
    size, merge = case.patch, case.merge
    for y in range(0, image.shape[1], size * merge):
        for x in range(0, image.shape[2], size * merge):
            for top in range(y, y + size * merge, size):
                for left in range(x, x + size * merge, size):
                    one = image[:, top : top + size, left : left + size]
                    rows.append(one[:, None].expand(-1, case.temporal, -1, -1).flatten())
    return torch.stack(rows).to(case.dtype).to(case.image_HWC.device)


PEERS: dict[str, Callable[[ImageCase], Step]] = {"transformers": _transformers}

OURS: dict[str, Callable[[ImageCase], Step]] = {"ours": _ours("auto"), "ours_reference": _ours("reference")}


def _floor(case: ImageCase) -> Step:
    """What has to be moved at the speed of memory: the image copied, and a result of constants, both into new memory."""
    written = case.image_HWC.numel() * case.temporal

    def step() -> Outcome:
        case.image_HWC.clone()
        case.image_HWC.new_empty(written, dtype=case.dtype).fill_(1)
        return Outcome()

    return step


def _plan(request: Request) -> Plan:
    case, part = _make(request), _make(request, _CHECKED)
    truth = _exact(part)

    def candidate(name: str, prepare: Callable[[ImageCase], Step], limits: Errors | None) -> Candidate:
        def check() -> Errors:
            found = prepare(part)().values
            assert found is not None
            return Errors(values=largest_error(found, truth))

        return Candidate(name, lambda: prepare(case), check, limits, 1.0)

    candidates = [candidate(name, prepare, LIMITS) for name, prepare in OURS.items()]
    candidates.append(Candidate("floor", lambda: _floor(case), None, None, 1.0))
    candidates += [candidate(name, PEERS[name], None) for name in request.peers]
    return Plan(
        candidates,
        shape=request.shape,
        gemm_flops=0,
        least_bytes=case.image_HWC.numel() * (1 + case.temporal * case.dtype.itemsize),
        flop_formulas={},
        notes=[
            "Errors: largest difference from the definition, patch by patch; ours has to be exact.",
            f"ours: impl auto is {ours.chosen(request)}; ours_reference: plain torch; floor: a copy of the image, and as many "
            "constants as the result has; transformers: its image processor, told not to resize, in numpy, whose memory is not "
            "counted.",
        ],
    )


OP = Op(
    summary="a resized image to the patches of a vision tower, bit for bit those of transformers",
    shape={"Y": 1536, "X": 2048, "P": 16, "T": 2, "M": 2},
    dtypes=("fp32", "bf16"),
    peers=tuple(PEERS),
    all_live=True,
    errors=("patches",),
    plan=_plan,
)
