"""Weights on their way from the trainer to engines. One update, in the order in which data flows:

delta    between machines, which Ray carries weights to (`cluster/weights.py`): what differs from the version before
staging  a node's process writes a version into shared memory, tensor by tensor, and describes it by a `Manifest`
reader   an engine checks a staged version, all of it, before it loads anything

vLLM's side of it is `rollout/vllm/transfer.py`; `rollout/vllm/staged.py` tells engines. The native engine runs the trainer's
torch module, or copies weights itself.
"""
