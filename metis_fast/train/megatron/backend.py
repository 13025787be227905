"""The Megatron-core trainer as the run sees it: ranks in processes of their own do the work."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor
from transformers import PretrainedConfig

from metis_fast.checkpoint.resume import Shards
from metis_fast.config import Config, OptimConfig
from metis_fast.errors import CheckpointError, ConfigError, NonFiniteError, TrainerError
from metis_fast.summary import RolloutSummary, ScoredSummary
from metis_fast.train.flops import FlopModel
from metis_fast.train.megatron import layout, names
from metis_fast.train.megatron.door import loopback
from metis_fast.train.megatron.launch import Ranks
from metis_fast.train.megatron.shared import Kept, Shared, Ungrouped, no_room
from metis_fast.train.megatron.task import Outlined, StepResult, Task
from metis_fast.train.minibatch import Trained, imitation_packs, imitation_result, plans, prunes, update_stats
from metis_fast.train.pack import UNSCORED, Family, Sample, split
from metis_fast.train.protocol import GroupsLost, TrainerState
from metis_fast.train.savings import deal
from metis_fast.types import Group, Rollout, ScoredGroup, UpdateStats

if TYPE_CHECKING:
    from metis_fast.cluster.ranks import RankKeepers
    from metis_fast.cluster.room import Room
    from metis_fast.cluster.weights import Published

_FOLDER = "trainer"


def _nothing() -> None:
    pass


def check_settings(config: Config, model: PretrainedConfig) -> None:
    """Whether a run of these settings could start. model: transformers' config.

    Raises:
        ConfigError: a layout or an option that cannot work.
    """
    layout.check(config.train.megatron, model)
    loopback(config.train.megatron.listen)
    if config.train.optim.muon_lr:
        raise ConfigError("train.optim.muon_lr works on whole matrices, which Megatron splits over the ranks; set it to 0")
    if config.train.activation_checkpointing:
        raise ConfigError(
            "train.activation_checkpointing is the torch back end's; set it to false and train.megatron.recompute instead"
        )
    if config.loss.normalization == "reference":
        raise ConfigError("loss.normalization=reference is for parity runs of the torch back end; set it to global")


class MegatronTrainer:
    """A `Trainer` whose weights live in the ranks. Close it to end them.

    model: transformers' config of `folder`. total_steps: optimizer steps of the whole run, for the schedule. check: called
    while the ranks start; what it raises goes on. room: in which Ray places the ranks; None: on this machine.
    image_max_pixels: see `limited`.

    Raises:
        ConfigError: a layout or an option that cannot work; nothing was started.
        TrainerError: a rank could not start.
    """

    def __init__(
        self,
        config: Config,
        optim: OptimConfig,
        total_steps: int,
        folder: Path,
        model: PretrainedConfig,
        check: Callable[[], None] = _nothing,
        room: Room | None = None,
        image_max_pixels: int = 0,
    ) -> None:
        check_settings(config, model)
        self._config = config
        self._prunes = prunes(config)
        frozen = config.model.freeze
        self._trained = Trained(FlopModel.of(model), "vision" not in frozen, "embeddings" not in frozen)
        self._num_weights = sum(math.prod(shape) for shape in names.hf_shapes(model).values())
        self._num_updates = 0
        logs = config.run.dir / "ranks"
        self._keepers: RankKeepers | None = None
        if room is not None:
            from metis_fast.cluster.ranks import RankKeepers  # at first use: nothing else needs Ray

            self._keepers = RankKeepers(room, logs, config.train.megatron.timeout_s, config.key_names())
        try:
            self._ranks = Ranks(
                config.train.megatron,
                "metis_fast.train.megatron.step:Worker",
                Task(config, folder.resolve(), optim, total_steps, image_max_pixels),
                logs,
                check,
                self._keepers,
                config.key_names(),
            )
        except BaseException:  # Ctrl-C, too: it goes on, and no keeper stays behind
            self._end_keepers()
            raise

    def close(self) -> None:
        """End the ranks."""
        try:
            self._ranks.close()
        finally:
            self._end_keepers()

    def _end_keepers(self) -> None:
        if self._keepers is not None:
            self._keepers.close()

    @property
    def num_updates(self) -> int:
        """See `Trainer`."""
        return self._num_updates

    @property
    def shares_policy(self) -> bool:
        """See `Trainer`: the ranks have weights of their own."""
        return False

    @property
    def fetches(self) -> bool:
        """See `Trainer`: ranks on Ray do."""
        return self._keepers is not None

    def update(
        self, groups: Sequence[ScoredGroup | ScoredSummary], check: Callable[[], None] = _nothing
    ) -> tuple[UpdateStats, ...]:
        """See `Trainer`; also raises TrainerError where a rank died, or groups have no room on the way to them."""
        check()
        outlined = [_outlined(group) for group in groups]
        batches = plans(outlined, self._config, self._prunes, self._trained)
        try:
            with self._brought(groups, self._needed(outlined, [batch.packs for batch in batches]), check) as files:
                results: list[StepResult] = self._ranks.call("update", outlined, files, check=check)[0]
        except NonFiniteError:  # maybe of a later mini-batch: what is there is no whole step then, and must not be saved as one
            self._num_updates = self._ranks.call("steps_taken")[0]
            raise
        self._num_updates += len(results)
        return tuple(
            update_stats(batch, [values for values, _ in result.table], result.norm, result.lr, self._config)
            for batch, result in zip(batches, results, strict=True)
        )

    def fetched(self) -> list[dict[int, int]]:
        """Bytes of the groups that each rank has read for the last update, by their number."""
        return self._ranks.call("fetched")

    def _needed(self, groups: Sequence[Outlined], batches: Sequence[list[list[Family]]]) -> list[set[int]]:
        """Numbers of the groups that each rank reads: those in the packs of its replica. batches: the packs of each."""
        which = {id(rollout): number for number, group in enumerate(groups) for rollout in group.rollouts}
        shape = self._config.train.megatron
        replicas: list[set[int]] = [set() for _ in range(shape.data_parallel)]
        for packs in batches:
            shares = deal(packs, self._trained.flops, shape.data_parallel)
            for replica, share in zip(replicas, shares, strict=True):
                replica |= {which[id(s.rollout)] for i in share for family in packs[i] for s in family.samples}
        return [replicas[layout.place(number, shape).data] for number in range(shape.num_ranks)]

    @contextmanager
    def _brought(
        self, groups: Sequence[ScoredGroup | ScoredSummary], needed: Sequence[set[int]], check: Callable[[], None]
    ) -> Iterator[Sequence[Mapping[int, str]]]:
        """Files of the groups for each rank, on its machine, until the block ends."""
        if self._keepers is not None:
            with self._keepers.fetched([_key(group) for group in groups], needed, check) as found:
                yield found
            return
        with self._written([_whole(group) for group in groups], needed) as written:
            yield written

    @contextmanager
    def _lent(self, groups: Sequence[Kept], needed: Sequence[set[int]]) -> Iterator[Sequence[Mapping[int, str]]]:
        """As `_brought`, of groups that are in this process, wherever the ranks are."""
        if self._keepers is None:
            with self._written(groups, needed) as written:
                yield written
            return
        try:
            with self._keepers.fetched(self._keepers.lend(groups), needed, _nothing) as found:
                yield found
        except GroupsLost:  # this process has them still, so Ray's store here is broken
            raise TrainerError("Ray has lost a batch of this process; run the same command again") from None

    @contextmanager
    def _written(self, groups: Sequence[Kept], needed: Sequence[set[int]]) -> Iterator[Sequence[Mapping[int, str]]]:
        """As `_brought`, of groups that are here, for ranks of this machine."""
        with ExitStack() as stack:
            try:
                shared = stack.enter_context(closing(Shared()))
                files = {number: str(shared.write(number, groups[number])) for number in sorted(set().union(*needed))}
            except OSError as error:
                raise TrainerError(no_room(error)) from None
            yield [files] * len(needed)

    def imitate(self, rollouts: Sequence[Rollout]) -> tuple[float, float]:
        """See `TorchTrainer.imitate`; also raises TrainerError as `update` does. Ranks read the packs of their replica."""
        outlined = [Outlined((RolloutSummary.of(rollout),), (UNSCORED,)) for rollout in rollouts]
        packs = imitation_packs([group.rollouts[0] for group in outlined], self._config)
        needed = self._needed(outlined, [packs])
        with self._lent([Ungrouped((rollout,)) for rollout in rollouts], needed) as files:
            result: StepResult = self._ranks.call("imitate", outlined, files)[0]
        self._num_updates += 1
        count = sum(rollout.num_sampled for rollout in rollouts)
        return imitation_result(sum(values[1] for values, _ in result.table), count, result.norm)

    def logprobs(self, rollouts: Sequence[Rollout]) -> list[np.ndarray]:
        """See `Trainer`."""
        return _by_place(self._ranks.call("logprobs", rollouts))

    def gaps(self, groups: Sequence[ScoredGroup | ScoredSummary]) -> list[np.ndarray]:
        """See `Trainer`."""
        outlined, train = [_outlined(group) for group in groups], self._config.train
        samples = [Sample(rollout, UNSCORED) for group in outlined for rollout in group.rollouts]
        packs = split(samples, train.tokens_per_micro_batch, train.share_prompt, train.share_packs)  # as the ranks do
        with self._brought(groups, self._needed(outlined, [packs]), _nothing) as files:
            return _by_place(self._ranks.call("gaps", outlined, files))

    def publish(self, version: int | None = None) -> Published:
        """The weights as objects of Ray's; for ranks on Ray. They never pass through this process.

        version: that later ones may be told against; None: none will.

        Raises:
            TrainerError: a rank died, or Ray has no room for them.
        """
        assert self._keepers is not None, "the ranks are not on Ray"
        kept = version if self._config.sync.mode == "delta" else None
        return self._keepers.put(self._ranks.stream("buckets", self._config.sync.bucket_mb << 20), kept)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """See `Trainer`."""
        if self._keepers is not None:
            from metis_fast.cluster.weights import read

            yield from read(self.publish())
            return
        for _, (name, tensor) in self._ranks.stream("weights"):
            yield name, tensor

    def state(self) -> TrainerState:
        """See `Trainer`; the tensors are written by the ranks."""
        weight = 2 if self._config.model.dtype == "bfloat16" else 4
        shards = Shards(
            begin=self._begin,
            finish=self._finish,
            num_bytes=self._num_weights * (weight + 12),  # masters and two moments
        )
        return TrainerState({}, {"num_steps": self._num_updates}, shards)

    def load(self, state: TrainerState, folder: Path) -> None:
        """See `Trainer`; also raises CheckpointError where another back end wrote it."""
        where = folder / _FOLDER
        if not where.is_dir():
            raise CheckpointError(f"{folder} was written by another back end; resume with its train.backend")
        self._num_updates = int(state.scalars["num_steps"])
        self._ranks.call("load", where.resolve(), self._num_updates)

    def _begin(self, folder: Path) -> None:
        where = (folder / _FOLDER).resolve()
        where.mkdir()
        self._ranks.call("save", where)

    def _finish(self) -> None:
        try:
            self._ranks.call("saved")
        except CheckpointError as error:  # the store says which checkpoints are safe
            raise OSError(str(error)) from None


def _by_place(parts: Sequence[Mapping[int, np.ndarray]]) -> list[np.ndarray]:
    """What ranks have found of rollouts, in the order of these."""
    return [value for _, value in sorted((i, value) for part in parts for i, value in part.items())]


def _outlined(group: ScoredGroup | ScoredSummary) -> Outlined:
    if isinstance(group, ScoredSummary):
        return Outlined(group.rollouts, group.scores)
    return Outlined(tuple(map(RolloutSummary.of, group.rollouts)), group.scores)


def _whole(group: ScoredGroup | ScoredSummary) -> Group:
    assert isinstance(group, ScoredGroup), "ranks that are not on Ray are given whole groups"
    return Group(group.prompt, group.rollouts)


def _key(group: ScoredGroup | ScoredSummary) -> object:
    assert isinstance(group, ScoredSummary), "ranks on Ray are given summaries"
    return group.group.key
