"""Weights on their way from the trainer to engines. One update, in the order in which data flows:

staging     the run's process writes a version into shared memory, tensor by tensor, and describes it by a `Manifest`
local_copy  on another machine: buckets come, in full or as a `delta`, and become a staged version there
reader      an engine checks a staged version, all of it, before it loads anything

vLLM's side of it is `rollout/vllm/transfer.py`; `rollout/vllm/staged.py` sends. The native engine runs the trainer's torch
module, or copies weights itself.
"""
