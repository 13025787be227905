"""What vLLM loads in each of its processes (entry point `vllm.general_plugins`): makes our weight transfer known to it."""

from __future__ import annotations

TRANSFER = "metis_fast"
"""Name of `transfer.StagedWeightTransfer` in vLLM's factory."""

EXTENSION = "metis_fast.rollout.vllm.transfer.WorkerExtension"
"""vLLM's `worker_extension_cls`."""

WHOLE_SCHEDULER = "metis_fast.rollout.vllm.whole.WholeScheduler"
"""vLLM's `scheduler_cls` where it must not cut prompts."""


def register() -> None:
    """Called by vLLM, in some processes more than once."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    try:
        WeightTransferEngineFactory.register_engine(TRANSFER, "metis_fast.rollout.vllm.transfer", "StagedWeightTransfer")
    except ValueError:  # it is registered; the factory has no other way to ask
        return
