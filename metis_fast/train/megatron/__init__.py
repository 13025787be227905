"""The Megatron-core back end: tensor, pipeline, sequence and data parallel. Only `rank` and what it runs import megatron.

layout    which layers and slices a rank has; refuses what cannot work (no megatron)
backend   the `Trainer` in the process of the run; talks to the ranks (no megatron)
launch    calls the ranks; notices when one dies (no megatron)
door      starts them on this machine, or lets them join (no megatron); on Ray's it is `cluster.ranks`
peer      one of them as the run sees it: process, connection, how it ended (no megatron)
rank      a rank's process
wire      what the two say to each other (no megatron)
shared    groups and weights on their way, in shared memory (no megatron)
step      passes and optimizer steps of a rank
feed      what its passes are made of
optimizer Megatron-core's, with the state of each parameter
checkpoint  weights and that state into a checkpoint and back
policy    Qwen3-VL and Qwen3 of Megatron-core modules
names     Hugging Face names and shapes <-> Megatron's, both ways (no megatron)
cpu       what stands in for CUDA where there is none
"""
