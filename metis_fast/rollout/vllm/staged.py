"""Weights for the replicas of vLLM by way of shared memory (`sync.transport: staged`), checked before they are used.

A version is staged once, and all replicas read it where it lies. Until a replica has taken it, the one before goes on serving.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor

from metis_fast.config import SyncConfig
from metis_fast.errors import EngineError, InfrastructureError, StagingError, SyncError
from metis_fast.model import Policy
from metis_fast.model_folder import hf_shapes
from metis_fast.rollout.engine import SyncReport
from metis_fast.rollout.vllm.replica import LOAD_S, Replica
from metis_fast.sync.staging import Staging
from metis_fast.workers.worker import Worker

_LOG = logging.getLogger(__name__)


class StagedWeights:
    """Sends versions to replicas. Its coroutines run on the hub's loop.

    policy: for shapes and dtype. replicas: of the engine; may be filled later. newest: last version that was sent, or is being
    sent. staging: None before the first.
    """

    def __init__(self, config: SyncConfig, policy: Policy, replicas: Sequence[Replica]) -> None:
        self._config, self._policy, self._replicas = config, policy, replicas
        self.newest = 0
        self.staging: Staging | None = None
        self._lock = asyncio.Lock()  # one sender at a time

    async def update(self, weights: Iterator[tuple[str, Tensor]], version: int) -> SyncReport:
        """See `Engine.update`. A replica that is being started gets the weights when it is up."""
        began = time.perf_counter()
        async with self._lock:
            if self.staging is None:
                shapes = {name: tuple(shape) for name, shape in hf_shapes(self._policy.model.config).items()}
                self.staging = Staging(shapes, self._policy.head.dtype, self._config.bucket_mb << 20)
            # reading a trainer's weights may take long, and pings must be answered meanwhile
            manifest = await asyncio.to_thread(self.staging.write, weights, version)
            self.newest = version
            living = [replica for replica in self._replicas if replica.worker.alive or replica.waits]
            results = await asyncio.gather(*(self._push(replica, replica.worker.restarts) for replica in living))
            if self.staging.damage:
                raise StagingError(f"what was staged has changed: {self.staging.damage}")
        done = [result for result in results if result is not None]
        if not done and all(replica.worker.broken is not None for replica in self._replicas):
            raise EngineError(f"no engine took weight version {version}: {self._replicas[0].worker.broken}")
        return SyncReport(
            version=version,
            mode="full",
            num_bytes=manifest.num_bytes,
            seconds=time.perf_counter() - began,
            pause_s=max((pause for pause, _ in done), default=0.0),
            retries=sum(retries for _, retries in done),
        )

    async def prepare(self, replica: Replica) -> None:
        """After a start of the replica, which has the weights of the model's folder: give it the newest ones.

        Raises:
            SyncError, InfrastructureError: it does not take them.
        """
        async with self._lock:
            if self.staging is None or self.staging.current is None:
                replica.got(0)
                return
            for attempt in range(self._config.retries + 1):
                try:
                    await self._send(replica.worker, preparing=True)
                    break
                except SyncError as error:
                    _LOG.warning("weights for %s, try %d: %s", replica.worker.name, attempt + 1, error)
                    if await self._damaged():  # no fault of its own
                        replica.wait()
                        return
                    if attempt == self._config.retries:
                        raise
            replica.got(self.staging.current.version)

    def held(self) -> Mapping[str, Tensor]:
        """See `RunEngine`."""
        return {} if self.staging is None else self.staging.tensors()

    @property
    def why_not(self) -> str:
        """Why a replica cannot have the newest version before the next update."""
        return self.staging.damage if self.staging is not None and self.staging.damage else "sync.transport=staged"

    def close(self) -> None:
        """Free the shared memory."""
        if self.staging is not None:
            self.staging.close()

    async def _push(self, replica: Replica, life: int) -> tuple[float, int] | None:
        """Seconds that its requests waited, retries; None if the replica was lost, or the version is damaged.

        life: `Worker.restarts` when it was up.
        """
        for attempt in range(self._config.retries + 1):
            try:
                # one that waits may have to be asked before the hub has noted that it is up
                pause = await self._send(replica.worker, preparing=replica.waits)
            except SyncError as error:
                _LOG.warning("weights for %s, try %d: %s", replica.worker.name, attempt + 1, error)
                if await self._damaged():
                    return None  # its old version goes on serving
                continue
            except InfrastructureError as error:
                _LOG.warning("weights for %s: %s", replica.worker.name, error)
                await replica.lose(life, f"it did not take the weights: {error}")
                return None  # it is being started again, and gets them then
            except EngineError as error:  # it is of no version any more
                await replica.worker.lose(str(error))
                return None
            assert self.staging is not None and self.staging.current is not None
            replica.got(self.staging.current.version)
            return pause, attempt
        await replica.worker.lose(f"it did not take the weights in {self._config.retries + 1} tries")
        return None

    async def _damaged(self) -> bool:
        """Whether the staged version itself is, so that trying again is of no use."""
        assert self.staging is not None
        return bool(await asyncio.to_thread(self.staging.examine))

    async def _send(self, worker: Worker, preparing: bool) -> float:
        """Seconds that requests waited."""
        assert self.staging is not None and self.staging.current is not None
        # one that was lost meanwhile gets them when it is up again, and that waits until this has ended
        manifest = self.staging.current.to_dict()
        return await worker.call("load_staged", manifest, deadline_s=LOAD_S, preparing=preparing, wait=False)
