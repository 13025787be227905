"""Weights on their way from the trainer to engines. One update, in the order in which data flows:

staging     the run's process writes a version into shared memory, tensor by tensor, and describes it by a `Manifest`
local_copy  on another machine: buckets come, in full or as a `delta`, and become a staged version there
reader      an engine checks a staged version, all of it, before it loads anything

The native engine runs the trainer's torch module, or gets a copy of other trainers' weights (`native`). vLLM's side of it is
`rollout/vllm/transfer.py`.
"""

from __future__ import annotations

from metis_fast.sync.native import push_weights

__all__ = ["push_weights"]
