"""What one rank runs: passes through its stages, the optimizer's steps, weights in and out.

Every rank is told of the same groups and plans the same packs; a data-parallel replica reads the groups of its share of them,
and runs that by Megatron-core's schedule. Gradients are sums over the whole mini-batch, since the loss has its denominators in
it.

Shape letters: N tokens of a pack, T tokens of its loss, B = 1, H hidden size, V rows of the LM head.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch import Tensor

from metis_fast.checkpoint.safetensors_folder import FolderReader
from metis_fast.cluster.weights import pack as pack_weights
from metis_fast.errors import NonFiniteError
from metis_fast.model_folder import hf_shapes, load_processor, may_have, read_config
from metis_fast.pictures import ImagePreparer
from metis_fast.summary import Outline
from metis_fast.sync.manifest import Place
from metis_fast.train.flops import FlopModel
from metis_fast.train.megatron import cpu, groups, layout, shared
from metis_fast.train.megatron import names as hf_names
from metis_fast.train.megatron.checkpoint import Checkpoints
from metis_fast.train.megatron.feed import GroupReader, PicturesAhead
from metis_fast.train.megatron.optimizer import Optimizer
from metis_fast.train.megatron.passes import Context, HeadReady, PackLoss, Pass, Table, finalize, with_values
from metis_fast.train.megatron.policy import MegatronPolicy, PassInput, megatron_config
from metis_fast.train.megatron.rank import Aborted
from metis_fast.train.megatron.task import StepResult, Task
from metis_fast.train.minibatch import (
    MiniBatch,
    Scored,
    Trained,
    denominators,
    engine_gaps,
    imitation_loss,
    imitation_packs,
    imitation_result,
    names,
    pack_logprobs,
    pack_loss,
    plans,
    prunes,
    spread,
)
from metis_fast.train.optimizer import Schedule
from metis_fast.train.pack import UNSCORED, Family, Pack, Sample, build, filler, itself, split
from metis_fast.train.processor import limited
from metis_fast.train.savings import deal
from metis_fast.types import Rollout
from metis_kernels import Segments
from metis_kernels._shard import VocabShard


class Worker:
    """A rank of the trainer. Methods are called on all ranks together."""

    def __init__(self, context: Context, task: Task) -> None:
        cpu.install()
        self._context, self._config = context, task.config
        self._layout = task.config.train.megatron
        self._place = layout.place(context.rank, self._layout)
        config = task.config
        if config.run.threads and context.device.type == "cpu":
            torch.set_num_threads(max(1, config.run.threads // self._layout.num_ranks))
        self._hf = read_config(task.folder)
        self._groups = groups.build(self._layout, timedelta(seconds=self._layout.timeout_s))
        # nothing draws random numbers; Megatron asks for the tracker under sequence parallelism and recomputation
        model_parallel_cuda_manual_seed(
            config.run.seed, tp_rank=self._place.tensor, ep_rank=0, etp_rank=0, force_reset_rng=True
        )
        dtype = getattr(torch, config.model.dtype)
        self._megatron = megatron_config(self._layout, self._hf, dtype)
        self._chunks = layout.chunks(self._layout, layout.parts(self._hf)[0].num_hidden_layers)[self._place.stage]
        frozen = config.model.freeze
        _, vision = layout.parts(self._hf)
        self._images: ImagePreparer | None = None
        self._ahead = ThreadPoolExecutor(1, thread_name_prefix="ahead")  # of `PicturesAhead`
        self._shared: shared.Shared | None = None  # made with the first weights that go out
        self._fetched: dict[int, int] = {}
        self._merge = 1
        if vision is not None:
            self._merge = vision.spatial_merge_size
            if self._place.stage == 0:
                processor = limited(load_processor(task.folder), task.image_max_pixels)
                self._images = ImagePreparer(processor, round(config.model.image_cache_gb * (1 << 30)))
        self._policies = [
            MegatronPolicy(
                self._megatron,
                self._hf,
                chunk,
                self._groups,
                with_transformer_engine=self._layout.transformer_engine == "auto",
                attention=config.train.attention,
                vision_trained="vision" not in frozen,
                images=self._images,
                tower_bytes=round(config.model.tower_memory_gb * (1 << 30)),
                vp_stage=i if len(self._chunks) > 1 else None,
            )
            for i, chunk in enumerate(self._chunks)
        ]
        self._load_weights(task.folder)
        head_trained = "embeddings" not in frozen
        for policy in self._policies:
            for name, parameter in policy.named_parameters():
                is_embedding = name.startswith(("embedding.", "output_layer."))
                if (name.startswith("visual.") and "vision" in frozen) or (is_embedding and not head_trained):
                    parameter.requires_grad_(False)
        overlap = self._layout.overlap_reduction
        self._overlap = overlap == "on" or (overlap == "auto" and context.device.type == "cuda")
        self._models = [self._wrap(policy) for policy in self._policies]
        self._optimizer = Optimizer(self._models, task.optim, dtype, self._layout.distributed_optimizer, self._groups)
        self._schedule = Schedule(task.optim, task.total_steps)
        self._prunes = prunes(config)
        self._trained = Trained(FlopModel.of(self._hf), "vision" not in frozen, head_trained)
        self._megatron.finalize_model_grads_func = finalize
        if self._overlap:
            syncs = [model.no_sync for model in self._models]
            self._megatron.no_sync_func = cast(Any, syncs if len(syncs) > 1 else syncs[0])
        self._communicator = P2PCommunicator(pp_group=self._groups.pp, config=self._megatron)
        self._run_schedule = get_forward_backward_func(
            pp_size=self._layout.pipeline_parallel,
            vp_size=self._layout.virtual_pipeline if self._layout.virtual_pipeline > 1 else None,
        )
        self._checkpoints = Checkpoints(self._policies, self._optimizer, self._groups.dp, context.control)
        self._reference = self._copy_of_weights() if config.loss.kl_coef > 0 else []
        self.num_updates = 0

    # -- set-up -------------------------------------------------------------------------------------------------------

    def _load_weights(self, folder: Path) -> None:
        """Read what this rank holds from a Hugging Face folder, slice by slice."""
        reader = FolderReader(folder)
        reader.check(hf_shapes(self._hf), may_have(self._hf))
        with torch.no_grad():
            for policy, chunk in zip(self._policies, self._chunks, strict=True):
                own = dict(policy.named_parameters())
                for param in hf_names.params(self._layout, self._hf, chunk):
                    target = own.pop(param.name)
                    read = partial(reader.read, dtype=target.dtype)
                    target.copy_(hf_names.local(param, self._place.tensor, self._layout, self._hf, read))
                assert not own, f"no source for {sorted(own)}"

    def _wrap(self, policy: MegatronPolicy) -> DistributedDataParallel:
        settings = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=self._layout.distributed_optimizer,
            overlap_grad_reduce=self._overlap,
            check_for_nan_in_grad=False,  # the norm says it, and the step is not applied then
        )
        return DistributedDataParallel(
            config=self._megatron,
            ddp_config=settings,
            module=policy,
            # as Megatron's own training loop does it: later chunks are reduced when all of them are done
            disable_bucketing=bool(policy.vp_stage),
            pg_collection=self._groups,
        )

    # -- passes -------------------------------------------------------------------------------------------------------

    @property
    def _last(self) -> bool:
        return self._place.stage == self._layout.pipeline_parallel - 1

    def _passes(
        self,
        packs: Sequence[Sequence[Family]],
        every_row: bool = False,
        whole: Callable[[Outline], Rollout] = itself,
    ) -> list[Pass]:
        """This replica's share of the packs, by predicted cost; as many passes on every replica, the rest with nothing in
        them, and a multiple of the stages where chunks are interleaved."""
        if not packs:
            return []
        shares = deal(packs, self._trained.flops, self._layout.data_parallel)
        share = shares[self._place.data]
        count = max(map(len, shares))
        if self._layout.virtual_pipeline > 1:
            count = -(-count // self._layout.pipeline_parallel) * self._layout.pipeline_parallel
        share_images = self._config.train.share_images
        built = [build(packs[i], self._merge, share_images, every_row, whole) for i in share]
        if self._images is None:  # no stage but the first one has any use for them
            built = [replace(pack, images=()) for pack in built]
        every = (*built, *(filler() for _ in range(count - len(built))))
        # Megatron's interleaved schedule, told of every pass's length as it comes, waits for ever: there they are made equal
        shortest = max(len(pack.tokens_N) for pack in every) if self._layout.virtual_pipeline > 1 else 0
        return [self._prepare(pack, shortest) for pack in every]

    def _prepare(self, pack: Pack, shortest: int) -> Pass:
        device = self._context.device
        num_tokens = max(len(pack.tokens_N), shortest)
        # sequence parallelism gives every rank the same number of tokens; what fills up sees itself only
        num_tokens += -num_tokens % (self._layout.tensor_parallel if self._layout.sequence_parallel else 1)
        extra = num_tokens - len(pack.tokens_N)
        segments = pack.segments
        if extra:
            offsets = (*segments.offsets, segments.num_tokens + extra)
            segments = Segments(offsets, (*segments.prefix, -1))
        given = PassInput(
            torch.nn.functional.pad(pack.tokens_N, (0, extra)).to(device),
            torch.nn.functional.pad(pack.positions_3N, (0, extra)).to(device),
            segments,
            (),
            pack.image_order,
        )
        return Pass(pack, given)

    def _run(self, passes: Sequence[Pass], then: Any, forward_only: bool) -> list[Any]:
        """All passes through all stages. then(pass, hidden_NBH, policy) -> (loss, result) on the last stage, where the
        results are returned, in order."""
        if not passes:
            return []

        pictures = None
        if self._images is not None:
            pictures = PicturesAhead(self._images, self._ahead, [one.pack.images for one in passes])

        def step(source: Iterator[tuple[int, Pass]], model: DistributedDataParallel) -> tuple[Tensor, Any]:
            number, one = next(source)
            policy = cast(MegatronPolicy, model.module)
            given = one.given
            if pictures is not None and policy.pre_process:
                given = replace(given, images=pictures.take(number))
            # overlapped reduction waits for a gradient of every parameter in the last pass
            complete = self._overlap and not forward_only and number == len(passes) - 1
            hidden_NBH = model(given, complete)

            def finish(hidden_NBH: Tensor) -> tuple[Tensor, Tensor, Any]:
                loss, result = then(one, hidden_NBH, policy)
                return loss, torch.zeros((), dtype=torch.int, device=loss.device), result

            return hidden_NBH, finish

        sources = [enumerate(passes) for _ in self._models]
        several = len(self._models) > 1
        return self._run_schedule(
            forward_step_func=step,
            data_iterator=cast(Any, sources if several else sources[0]),
            model=cast(Any, self._models if several else self._models[0]),
            num_microbatches=len(passes),
            seq_length=len(passes[0].given.tokens_N),  # read only where all are equal; else stages tell each other
            micro_batch_size=1,
            forward_only=forward_only,
            p2p_communicator=self._communicator,
            pg_collection=self._groups,
        )

    def _head_input(self, one: Pass, hidden_NBH: Tensor, policy: MegatronPolicy) -> tuple[Tensor, Tensor, VocabShard | None]:
        """Hidden states that predict the pack's targets, [T, H]; this rank's rows of the head; where they stand."""
        hidden_TH = policy.whole_hidden(hidden_NBH)[one.pack.select_T.to(hidden_NBH.device)]
        head = policy.head
        if self._layout.tensor_parallel == 1:
            return hidden_TH, head, None
        return hidden_TH, head, VocabShard(self._place.tensor * len(head), self._groups.tp)

    def _logprob_passes(self, passes: Sequence[Pass]) -> list[tuple[Tensor, Tensor]]:
        """Log-probability and log-sum-exp of the passes' targets, on the CPU of the last stage; nothing elsewhere."""

        def then(one: Pass, hidden_NBH: Tensor, policy: MegatronPolicy) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            hidden_TH, head, shard = self._head_input(one, hidden_NBH, policy)
            logp, lse = pack_logprobs(hidden_TH, head, one.pack, self._config, shard)
            return logp.sum(), (logp.cpu(), lse.cpu())

        for model in self._models:
            model.eval()
        with torch.no_grad():
            found = self._run(passes, then, forward_only=True)
        for model in self._models:
            model.train()
        return found

    def logprobs(self, rollouts: Sequence[Rollout]) -> dict[int, np.ndarray]:
        """Of this replica's share of the rollouts, by their place; empty but on the first rank of the last stage."""
        return self._logprobs(rollouts, itself)

    def gaps(self, groups: Sequence[Scored], files: Sequence[Mapping[int, str]]) -> dict[int, np.ndarray]:
        """See `Trainer.gaps`, as `logprobs`. files: see `update`."""
        fetched = GroupReader(groups, files[self._context.rank])
        every = [rollout for group in groups for rollout in group.rollouts]
        return {i: engine_gaps(fetched.rollout(every[i]), own) for i, own in self._logprobs(every, fetched.rollout).items()}

    def _logprobs(self, rollouts: Sequence[Outline], whole: Callable[[Outline], Rollout]) -> dict[int, np.ndarray]:
        samples = [Sample(rollout, UNSCORED) for rollout in rollouts]
        where = {id(sample): i for i, sample in enumerate(samples)}
        train = self._config.train
        packs = split(samples, train.tokens_per_micro_batch, train.share_prompt, train.share_packs)
        passes = self._passes(packs, whole=whole)
        found = self._logprob_passes(passes)
        if not self._last or self._place.tensor:
            return {}
        packed = zip(passes, found, strict=True)
        return {where[id(s)]: own for one, (logp, _) in packed for s, own in spread(one.pack, logp, whole)}

    # -- HDPO ---------------------------------------------------------------------------------------------------------

    def update(self, groups: Sequence[Scored], files: Sequence[Mapping[int, str]] = ()) -> list[StepResult]:
        """See `Trainer.update`; an abort before the first optimizer step leaves weights and state as they were.

        files: of every rank, where on its machine each group lies that it needs; none, if all rollouts are whole.

        Raises:
            DataError, NonFiniteError: as there, on every rank.
            Aborted: the run asked for it.
        """
        batches = plans(groups, self._config, self._prunes, self._trained)
        fetched = GroupReader(groups, files[self._context.rank] if files else {})
        passes = [self._passes(batch.packs, batch.every_row, fetched.rollout) for batch in batches]
        self._fetched = fetched.num_bytes
        del fetched  # packs have copies of what they need
        if self._config.loss.proximal == "engine":
            passes = [[with_values(one, old_logp_T=one.pack.engine_logp_T) for one in own] for own in passes]
        for i, batch in enumerate(batches):
            if batch.owed and passes[i]:
                self._check()
                passes[i] = self._with_old(passes[i])
        if self._reference:
            passes = self._with_reference(passes)
        results = [self._step(batch, own, i) for i, (batch, own) in enumerate(zip(batches, passes, strict=True))]
        if self._config.rollout.vllm.sleep and self._context.device.type == "cuda":
            torch.cuda.empty_cache()  # the engine wakes up on this GPU: what torch keeps for later would not be free
        return results

    def fetched(self) -> dict[int, int]:
        """Bytes of the groups that this rank has read for the last update, by their number."""
        return self._fetched

    def steps_taken(self) -> int:
        """Optimizer steps."""
        return self.num_updates

    def _check(self) -> None:
        if self._context.aborted():
            raise Aborted

    @torch.no_grad()
    def _with_reference(self, passes: list[list[Pass]]) -> list[list[Pass]]:
        """Log-probabilities under the starting policy, whose weights stand in for the current ones meanwhile."""
        current = self._copy_of_weights()
        self._put_weights(self._reference)
        found = [self._logprob_passes(own) if own else [] for own in passes]
        self._put_weights(current)
        if not self._last:
            return passes
        return [
            [with_values(one, ref_logp_T=logp) for one, (logp, _) in zip(own, values, strict=True)]
            for own, values in zip(passes, found, strict=True)
        ]

    def _copy_of_weights(self) -> list[Tensor]:
        return [p.detach().clone() for policy in self._policies for p in policy.parameters()]

    def _put_weights(self, values: Sequence[Tensor]) -> None:
        for parameter, value in zip((p for policy in self._policies for p in policy.parameters()), values, strict=True):
            parameter.detach().copy_(value)

    def _with_old(self, passes: list[Pass]) -> list[Pass]:
        found = self._logprob_passes(passes)
        if not self._last:  # only the last stage has a loss
            return passes
        return [with_values(one, old_logp_T=logp, anchor_T=lse) for one, (logp, lse) in zip(passes, found, strict=True)]

    def _step(self, batch: MiniBatch, passes: Sequence[Pass], index: int) -> StepResult:
        def loss(pack: Pack, hidden_TH: Tensor, head_VH: Tensor, **where: Any) -> tuple[Tensor, Tensor]:
            return pack_loss(hidden_TH, head_VH, pack, self._config, *denominators(batch, pack, self._config), **where)

        if passes and index == 0:
            self._check()
        table = self._gradients(passes, loss)
        for values, which in table:
            if not math.isfinite(values[0]):
                raise NonFiniteError(
                    f"loss is {values[0]} in mini-batch {index} (rollouts {which}, …); the step was not applied"
                )
        if index == 0:
            self._check()
        result = self._apply(table)
        if not math.isfinite(result.norm):
            raise NonFiniteError(f"gradient norm is {result.norm} in mini-batch {index}; the step was not applied")
        return result

    def _gradients(self, passes: Sequence[Pass], loss: PackLoss) -> Table:
        """Those of a step, in the buffers; the numbers that the loss gives of every pack, of all replicas."""
        for model in self._models:
            model.zero_grad_buffer()
        self._optimizer.zero_grad()

        def then(one: Pass, hidden_NBH: Tensor, policy: MegatronPolicy) -> tuple[Tensor, Tensor]:
            hidden_TH, head, shard = self._head_input(one, hidden_NBH, policy)
            value, numbers = loss(
                one.pack,
                hidden_TH,
                head,
                shard=shard,
                reduce_hidden=False,  # where the hidden states come from sums their gradients (`whole_hidden`)
                main_grad=head.main_grad if head.requires_grad else None,  # pyright: ignore[reportAttributeAccessIssue]
            )
            if self._overlap and head.requires_grad:
                value = cast(Tensor, HeadReady.apply(value, head))
            return value, numbers

        return self._table(self._run(passes, then, forward_only=False) if passes else [], passes)

    def _apply(self, table: Table) -> StepResult:
        """The optimizer's step. A norm that is not finite leaves weights and state as they were."""
        lr = self._schedule.lr(self.num_updates)
        norm = self._optimizer.step(lr)
        self.num_updates += math.isfinite(norm)
        return StepResult(table, norm, lr)

    # -- SFT ----------------------------------------------------------------------------------------------------------

    def imitate(self, trajectories: Sequence[Scored], files: Sequence[Mapping[int, str]]) -> StepResult:
        """See `TorchTrainer.imitate`. The table has of every pack its loss, and the sum of its log-likelihoods.

        Raises:
            DataError, NonFiniteError: as there, on every rank.
        """
        rollouts = [rollout for group in trajectories for rollout in group.rollouts]
        count = sum(rollout.num_sampled for rollout in rollouts)
        fetched = GroupReader(trajectories, files[self._context.rank])
        passes = self._passes(imitation_packs(rollouts, self._config), whole=fetched.rollout)

        def loss(pack: Pack, hidden_TH: Tensor, head_VH: Tensor, **where: Any) -> tuple[Tensor, Tensor]:
            value, total = imitation_loss(hidden_TH, head_VH, pack, self._config, count, **where)
            return value, torch.stack([value.detach().double(), total])

        table = self._gradients(passes, loss)
        total = sum(values[1] for values, _ in table)
        if not math.isfinite(total):
            imitation_result(total, count, math.nan)
        result = self._apply(table)
        imitation_result(total, count, result.norm)
        return result

    def _table(self, rows: Sequence[Tensor], passes: Sequence[Pass]) -> Table:
        """The rows of all replicas, on every rank."""
        own: Table = []
        if self._last and self._place.tensor == 0 and rows:
            values = torch.stack(list(rows)).tolist()
            own = [(row, names(one.pack)) for row, one in zip(values, passes, strict=True) if one.pack.samples]
        out: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(out, own, group=self._context.control)
        return [row for part in out for row in part]

    # -- weights ------------------------------------------------------------------------------------------------------

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Whole tensors by Hugging Face names, of this stage's chunks; from the first tensor rank of the first replica."""
        tensor = self._groups.tp
        for policy, chunk in zip(self._policies, self._chunks, strict=True):
            own = dict(policy.named_parameters())
            for param in hf_names.params(self._layout, self._hf, chunk):
                value = own[param.name].detach()
                shards = [torch.empty_like(value) for _ in range(self._layout.tensor_parallel)]
                dist.all_gather(shards, value.contiguous(), group=tensor)
                if self._place.tensor == 0 and self._place.data == 0:
                    yield from hf_names.whole(param, shards, self._hf).items()

    def buckets(self, bucket_bytes: int) -> Iterator[tuple[str, tuple[Place, ...]]]:
        """As `weights`, in files of shared memory, which whoever takes them removes: path and what is where in it."""
        self._shared = self._shared or shared.Shared()
        for number, bucket in enumerate(pack_weights(self.weights(), bucket_bytes)):
            path = self._shared.path(f"bucket-{number}")
            bucket.data.tofile(path)
            yield str(path), bucket.places

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def save(self, folder: Path) -> None:
        """See `Checkpoints`."""
        self._checkpoints.save(folder)

    def saved(self) -> None:
        """See `Checkpoints`."""
        self._checkpoints.saved()

    def load(self, folder: Path, num_updates: int) -> None:
        """See `Checkpoints`."""
        self._checkpoints.load(folder, num_updates)
        self.num_updates = num_updates
