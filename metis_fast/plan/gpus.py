"""The GPUs that plans are made for, and the shares of their peaks that are assumed to be reached."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 1 << 30
NODE = 8
"""GPUs of a node, all of which reach each other by NVLink (HGX boards)."""


@dataclass(frozen=True, slots=True)
class Gpu:
    """memory: bytes that torch sees. flops: bfloat16 without sparsity, a second. bandwidth: bytes a second of the memory.

    nvlink, network: bytes a second in one direction, of one GPU within its node and out of it.
    """

    memory: int
    flops: float
    bandwidth: float
    nvlink: float
    network: float


# NVIDIA's data sheets of H100 SXM, H200 SXM and HGX B200 (NVLink halved: they state both directions together); memory as
# the driver reports it, 81,559, 143,771 and 183,359 MiB, less half a GiB of its own. Network: one 400 Gb/s port a GPU
# (DGX reference architectures).
GPUS: dict[str, Gpu] = {
    "h100": Gpu(int(79.1 * GIB), 989e12, 3.35e12, 450e9, 50e9),
    "h200": Gpu(int(139.9 * GIB), 989e12, 4.8e12, 450e9, 50e9),
    "b200": Gpu(int(178.5 * GIB), 2250e12, 8.0e12, 900e9, 50e9),
}


@dataclass(frozen=True, slots=True)
class Efficiency:
    """Shares of the peaks that are reached. Assumptions, not measurements: bare products of cuBLAS run at about 0.75 of a
    Hopper's data sheet, FlashAttention-3 at about 0.63 forward and less backward as published; norms, launches and small
    shapes take the rest."""

    dense: float = 0.60
    attention: float = 0.50
    head: float = 0.68
    vision: float = 0.35
    prefill: float = 0.45
    memory: float = 0.75
    link: float = 0.70
