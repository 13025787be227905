"""The receiving end of staged weight updates, in every worker process of a vLLM engine.

vLLM makes one by the name `plugin.TRANSFER` (`weight_transfer_config`). An update is three calls in each worker, made by
`WorkerExtension.load_staged`: `start_weight_update`, `update_weights` with the manifest, `finish_weight_update`. Until the
whole version is verified, by all tensor-parallel ranks, the model is not touched: a refused version leaves the old one serving,
and vLLM's session closed, so that it may come again. The caller makes vLLM forget what was computed with the old weights
(prefix cache, encoder cache).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from metis_fast.errors import EngineError, SyncError
from metis_fast.model_folder import GATE_UP, QKV
from metis_fast.rollout.layers import LayerRecorder
from metis_fast.sync.manifest import Manifest
from metis_fast.sync.reader import Reader

if TYPE_CHECKING:
    from vllm.v1.worker.gpu_worker import Worker

# what vLLM makes of the matrices that both it and Megatron-core fuse; `load_weights` does it, here it only names them
_FUSED = {f".{name}.": ".qkv_proj." for name in QKV} | {f".{name}.": ".gate_up_proj." for name in GATE_UP}


@dataclass
class StagedInitInfo(WeightTransferInitInfo):
    """Nothing: a manifest says where its version lies."""


@dataclass
class StagedUpdateInfo(WeightTransferUpdateInfo):
    """A staged version on the worker's machine."""

    manifest: Manifest


class StagedWeightTransfer(WeightTransferEngine[StagedInitInfo, StagedUpdateInfo]):
    """Loads staged versions. `update_weights` takes `Manifest.to_dict`."""

    init_info_cls = StagedInitInfo
    update_info_cls = StagedUpdateInfo
    supports_draft_weight_update = False

    _newest: int | None = None
    _loading = False  # between the first byte that the model gets and its last
    _loaded: frozenset[str] = frozenset()

    def init_transfer_engine(self, init_info: StagedInitInfo) -> None:
        """Nothing to agree on."""

    def parse_update_info(self, update_dict: dict[str, Any]) -> StagedUpdateInfo:
        """
        Raises:
            SyncError: it is no manifest, or a damaged one.
        """
        return StagedUpdateInfo(Manifest.from_dict(update_dict))

    def start_weight_update(self) -> None:
        """Nothing: vLLM's reloading takes the old weights away, and the new ones are not verified yet.

        Raises:
            EngineError: an earlier update failed half-way.
        """
        if self._loading:
            raise EngineError("an engine has weights of two versions, because loading one failed half-way; start it again")

    def receive_weights(self, update_info: StagedUpdateInfo) -> None:
        """Verify a version, then load it.

        Raises:
            SyncError: it did not arrive as it was sent, on this rank or another one; the old weights are untouched.
            EngineError: loading failed; the engine must be started again.
        """
        reader = self._verified(update_info.manifest)
        self._loading = True
        initialize_layerwise_reload(self.model)
        load = cast(Callable[[Iterator[tuple[str, Tensor]]], set[str]], self.model.load_weights)
        self._loaded = frozenset(load(self._tensors(reader)))
        try:
            reader.check_unchanged()
        except SyncError as error:
            raise EngineError(f"a weight version changed while it was loaded ({error}); start the engine again") from None
        self._newest = update_info.manifest.version

    def finish_weight_update(self) -> None:
        """
        Raises:
            EngineError: no version came, or parameters did not get theirs; the engine must be started again.
        """
        if not self._loading:
            raise SyncError("a weight update was finished without a version; call update_weights with a manifest first")
        with _quiet():
            finalize_layerwise_reload(self.model, self.model_config)
        self._refresh_tied_head()
        lost = sorted(self._parameters() - self._loaded)
        if lost:
            raise EngineError(f"{len(lost)} parameters were not loaded ({', '.join(lost[:3])}); start the engine again")
        self._loading = False

    def shutdown(self) -> None:
        """Nothing is held between updates."""

    def _verified(self, manifest: Manifest) -> Reader:
        """The version, once every rank has verified it: they load all or none."""
        error: SyncError | None = None
        reader: Reader | None = None
        try:
            reader = Reader(manifest, self._newest)
            self._check_names(manifest)
        except SyncError as refused:
            error = refused
        refusals = self._refusals(error is not None)
        if error is not None:
            raise error
        if refusals:
            raise SyncError(f"refused by {refusals} other ranks of the engine")
        assert reader is not None
        return reader

    def _refusals(self, own: bool) -> int:
        """Of all ranks."""
        if self.parallel_config.world_size == 1:
            return int(own)
        from vllm.distributed.parallel_state import get_world_group

        count = torch.tensor(int(own))
        torch.distributed.all_reduce(count, group=get_world_group().cpu_group)
        return int(count)

    def _parameters(self) -> set[str]:
        """vLLM's names; a tied LM head is in them once."""
        return {name for name, _ in self.model.named_parameters()}

    def _check_names(self, manifest: Manifest) -> None:
        """Whether every parameter of vLLM's model gets something and nothing is left over, before anything is touched."""
        covered = fused_names((place.name for place in manifest.places), getattr(self.model, "hf_to_vllm_mapper", None))
        own = self._parameters()
        for problem, names in (("lacks", own - covered.keys()), ("has unknown", covered.keys() - own)):
            if names:
                first = sorted(names)[0]
                raise SyncError(
                    f"weight version {manifest.version} {problem} {len(names)} of the engine's {len(own)} parameters, such as "
                    f"{covered.get(first, first)}; trainer and engine must be of one model"
                )

    def _refresh_tied_head(self) -> None:
        """vLLM 0.32 packs the LM head for a CPU's matrix products, and reloading packs again only what got weights by its own
        name: a tied head, which has got them as the embedding, would go on with its old copy."""
        modules = list(self.model.modules())
        embeddings = {id(m.weight) for m in modules if type(m) is VocabParallelEmbedding}
        for module in modules:
            if isinstance(module, ParallelLMHead) and id(module.weight) in embeddings:
                module.quant_method.process_weights_after_loading(module)

    def _tensors(self, reader: Reader) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in reader:
            # out of page-locked memory a GPU reads twice as fast, and vLLM's loaders take the rank's part from there
            yield name, tensor.pin_memory() if self.device.type == "cuda" else tensor


class WorkerExtension:
    """What every worker of an engine can do besides vLLM's own (`worker_extension_cls`), which mixes this into its worker."""

    _recorder: LayerRecorder | None = None

    def load_staged(self, manifest: dict[str, Any]) -> str:
        """A whole update; returns why the version was refused, or "". A refusal is no exception: vLLM's multi-process executor
        raises the first rank's at once and takes the next rank's, which it has left unread, for the answer to its next call.

        Raises:
            EngineError: see `StagedWeightTransfer`; the engine must be started again.
        """
        worker = cast("Worker", self)
        worker.start_weight_update()
        try:
            worker.update_weights(manifest)
        except SyncError as error:
            return str(error)
        worker.finish_weight_update()
        return ""

    def record_layers(self) -> None:
        """From here on, keep what the layers make."""
        self._recorder = LayerRecorder(cast("Worker", self).get_model())

    def recorded_layers(self) -> dict[str, bytes]:
        """Stop that, and give it back (`LayerRecorder.stop`)."""
        assert self._recorder is not None
        recorder, self._recorder = self._recorder, None
        return recorder.stop()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without vLLM's warnings of layers with nothing to load (rotary tables, a tied LM head); what lacks is checked here."""
    logger = logging.getLogger("vllm.model_executor.model_loader.reload.layerwise")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def fused_names(names: Iterator[str], mapper: Any) -> Mapping[str, str]:
    """vLLM's parameters that tensors go to -> one of those tensors. mapper: vLLM's `WeightsMapper` of the model, or None."""
    found: dict[str, str] = {}
    for name in names:
        mapped = name if mapper is None else mapper.map_name(name)
        for part, whole in _FUSED.items():
            mapped = mapped.replace(part, whole)
        found[mapped] = name
    return found
