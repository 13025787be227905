"""Kernels of HDPO training: grouped dual advantage, chunked log-prob, fused dual-surrogate loss, shared-prefix attention, and
what a vision tower needs beside them: attention of whole segments, images cut into patches.

Every op is a function with one contract and several implementations, chosen by `impl`:

    auto        the fastest that runs on the tensors' device and dtype
    triton      Triton kernels (CUDA; on the CPU under TRITON_INTERPRET=1, for tests)
    cpu         C++ (OpenMP; AMX, AVX-512 or AVX2, chosen at run time)
    reference   plain PyTorch, written like the formulas; any device, float64 included

`prefix_attention` has `flash` too, the kernels of the package flash-attn; `full_attention` has `sdpa`, torch's, and no triton.
"""

from metis_kernels._impl import Impl, available, cpu_library_status
from metis_kernels._launch import aot_status
from metis_kernels._shard import VocabShard
from metis_kernels.group_advantage.api import GroupAdvantage, group_advantage
from metis_kernels.hdpo_loss.api import HdpoLoss, HdpoMetrics, hdpo_loss
from metis_kernels.linear_logprob.api import LinearLogprob, linear_logprob
from metis_kernels.patchify.api import patchify
from metis_kernels.prefix_attention.api import AttentionImpl, FullAttentionImpl, full_attention, prefix_attention
from metis_kernels.prefix_attention.segments import Segments

__all__ = [
    "AttentionImpl",
    "FullAttentionImpl",
    "GroupAdvantage",
    "HdpoLoss",
    "HdpoMetrics",
    "Impl",
    "LinearLogprob",
    "Segments",
    "VocabShard",
    "aot_status",
    "available",
    "cpu_library_status",
    "full_attention",
    "group_advantage",
    "hdpo_loss",
    "linear_logprob",
    "patchify",
    "prefix_attention",
]
