"""The process groups of a layout, made once and passed on: nothing below looks one up in a global."""

from __future__ import annotations

from datetime import timedelta
from itertools import product
from typing import Any, cast

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from metis_fast.config import MegatronConfig
from metis_fast.train.megatron.layout import place


def build(layout: MegatronConfig, timeout: timedelta) -> ProcessGroupCollection:
    """The groups that this rank is in. All ranks call this together.

    timeout: of a collective operation.
    """
    here = place(dist.get_rank(), layout)
    made: dict[tuple[int, ...], dist.ProcessGroup] = {}

    def group(tensors: range, datas: range, stages: range) -> dist.ProcessGroup:
        ranks = tuple(
            (stage * layout.data_parallel + data) * layout.tensor_parallel + tensor
            for stage, data, tensor in product(stages, datas, tensors)
        )
        if ranks not in made:
            new = dist.new_group(list(ranks), timeout=timeout, use_local_synchronization=True)
            made[ranks] = cast(dist.ProcessGroup, new)  # this rank is in it
        return made[ranks]

    def only(index: int) -> range:
        return range(index, index + 1)

    tensors, datas, stages = (range(n) for n in (layout.tensor_parallel, layout.data_parallel, layout.pipeline_parallel))
    tensor, data, stage = only(here.tensor), only(here.data), only(here.stage)
    alone = group(tensor, data, stage)
    last = layout.pipeline_parallel - 1
    # scratch memory of sequence parallelism, the one global of Megatron-core that cannot be passed
    if parallel_state._GLOBAL_MEMORY_BUFFER is None:
        parallel_state._set_global_memory_buffer()
    groups: Any = ProcessGroupCollection()  # its annotations leave out that a group may be None
    groups.tp = group(tensors, data, stage)
    groups.pp = group(tensor, data, stages)
    groups.dp = groups.dp_cp = groups.intra_dp_cp = group(tensor, datas, stage)
    groups.mp = groups.tp_ep_pp = group(tensors, data, stages)
    # one instance of the distributed optimizer: its norm is summed over all ranks
    groups.intra_dist_opt = group(tensors, datas, stages)
    groups.tp_cp, groups.tp_dp_cp = groups.tp, group(tensors, datas, stage)
    # no context parallelism, no experts
    groups.cp = groups.ep = groups.expt_tp = groups.tp_ep = alone
    groups.expt_dp = groups.intra_expt_dp = groups.dp
    groups.pos_embd = None
    # tied embeddings: the copies of the first and the last stage
    ends = sorted({0, last})
    groups.embd = group(tensor, data, range(0, last + 1, max(1, last))) if here.stage in ends else None
    return groups
