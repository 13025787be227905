"""Bytes that a rank of the Megatron back end holds, by part. The formulas with their units are in docs/plan.md.

Lower-case letters: t tensor-parallel ranks, s t under sequence parallelism and 1 otherwise, b bytes of an element of weights
and activations.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from functools import lru_cache

from transformers import PretrainedConfig

from metis_fast.config import Config, MegatronConfig
from metis_fast.plan.gpus import GIB
from metis_fast.plan.shape import Shape, TowerShape
from metis_fast.tower import SHARE
from metis_fast.train.megatron.layout import Chunk, Place, chunks, place

RESERVE = 4 * GIB
"""CUDA context, NCCL's and cuBLAS's buffers, and what the allocator loses to fragments. An assumption."""

_HEAD_ROWS = 2048
"""Live tokens whose logits hdpo_loss holds at once on a GPU (docs/kernels.md)."""

ELEMENT = {"bfloat16": 2, "float32": 4}
"""Bytes of a weight."""


@dataclass(frozen=True, slots=True)
class Pass:
    """One forward and backward pass: its tokens, those of them that distinct images stand for, rows at the LM head."""

    tokens: int
    image_tokens: int
    rows: int

    @staticmethod
    def largest(config: Config, shape: Shape) -> Pass:
        """Full, with all of one longest prompt an image, and the head on every token."""
        tokens = config.train.tokens_per_micro_batch
        images = min(tokens, config.rollout.max_prompt_tokens) if shape.tower is not None else 0
        return Pass(tokens, images, tokens)


@dataclass(frozen=True, slots=True)
class RankMemory:
    """Bytes at the worst moment of an update.

    weights, gradients, optimizer: held all the time, the vision tower's included; weights with those of a reference policy
    where `loss.kl_coef` asks for one. activations: of the decoder, all passes in
    flight, and the working set of a layer in the backward pass. head: of hdpo_loss. vision: activations of the tower.
    communication: buffers between ranks. reserve: see `RESERVE`. engine: what a rollout engine on the same GPU keeps.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    head: int
    vision: int
    communication: int
    reserve: int
    engine: int

    @property
    def persistent(self) -> int:
        """What a rank holds between updates."""
        return self.weights + self.gradients + self.optimizer

    @property
    def total(self) -> int:
        """All of it."""
        passing = self.activations + self.head + self.vision + self.communication
        return self.persistent + passing + self.reserve + self.engine


@dataclass(frozen=True, slots=True)
class _Elements:
    """Elements of the weights of one model chunk, trained and not, and of the buffer that holds the trained ones."""

    trained: int
    frozen: int
    buffer: int


def memory(
    config: Config,
    model_config: PretrainedConfig,
    layout: MegatronConfig,
    rank: int,
    size: Pass | None = None,
    engine: int = 0,
    fused: bool = True,
) -> RankMemory:
    """Of one rank of a layout that `layout.check` takes; `config` gives dtype, frozen parts, head chunk.

    size: the pass; None: the largest that the settings allow. engine: bytes that a rollout engine keeps on this GPU. fused:
    norms and SwiGLU are one kernel each, as on a GPU; False: plain torch, which keeps their intermediate results.
    """
    shape = Shape.of(model_config)
    return stage_memory(config, shape, layout, place(rank, layout), size or Pass.largest(config, shape), engine, fused)


def waiting(
    config: Config, model_config: PretrainedConfig, layout: MegatronConfig, rank: int, size: Pass, fused: bool = True
) -> tuple[int, int]:
    """Bytes of one pass through one of a rank's chunks that wait for its backward pass: of the decoder with the final norm, and
    of the tower. Arguments as for `memory`."""
    at = place(rank, layout)
    chunk = chunks(layout, Shape.of(model_config).layers)[at.stage][-1]
    element, trained = ELEMENT[config.model.dtype], "vision" not in config.model.freeze
    count = _Activations(Shape.of(model_config), layout, size, element, fused, trained)
    decoder = count.waiting(chunk) + (count.final_norm() if chunk.last else 0)
    return math.ceil(decoder * size.tokens), math.ceil(count.tower_waiting()) if chunk.first and trained else 0


def stage_memory(
    config: Config,
    shape: Shape,
    layout: MegatronConfig,
    at: Place,
    size: Pass,
    engine: int,
    fused: bool = True,
    gpu_memory: int | None = None,
) -> RankMemory:
    """See `memory`. Ranks of a stage hold the same. gpu_memory: bytes, of which the tower may take its share."""
    own = chunks(layout, shape.layers)[at.stage]
    # Megatron-core aligns each parameter to 64 elements, and the end to equal shares of whole 128
    aligned = math.lcm(layout.data_parallel, 128) if layout.distributed_optimizer else 0
    held = [_elements(shape, layout.tensor_parallel, aligned, chunk, config.model.freeze) for chunk in own]
    element = ELEMENT[config.model.dtype]
    # a float32 weight is its own master
    states = 8 + (4 if config.model.dtype == "bfloat16" else 0)
    split = layout.data_parallel if layout.distributed_optimizer else 1
    room = int(config.model.tower_memory_gb * GIB) or (sys.maxsize if gpu_memory is None else gpu_memory // SHARE)
    count = _Activations(shape, layout, size, element, fused, "vision" not in config.model.freeze, room)
    first, last = own[0].first, own[-1].last
    return RankMemory(
        weights=sum(e.buffer + e.frozen + (e.trained + e.frozen if config.loss.kl_coef else 0) for e in held) * element,
        gradients=sum(e.buffer for e in held) * 4,
        optimizer=math.ceil(sum(e.trained for e in held) * states / split),
        activations=count.decoder(own, at.stage),
        head=count.head(config.loss.token_chunk or _HEAD_ROWS) if last else 0,
        vision=count.vision() if first else 0,
        communication=count.communication(),
        reserve=RESERVE,
        engine=engine,
    )


def _up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


@lru_cache(maxsize=65536)
def _elements(shape: Shape, tensor: int, aligned: int, chunk: Chunk, freeze: tuple[str, ...]) -> _Elements:
    trained = list(shape.layer_parameters(tensor)) * (chunk.stop - chunk.start)
    frozen: list[int] = []
    embedding = shape.vocab * shape.hidden // tensor
    still = "embeddings" in freeze
    if chunk.first:
        (frozen if still else trained).append(embedding)
        if shape.tower is not None:
            (frozen if "vision" in freeze else trained).extend(shape.tower.parameters())
    if chunk.last:
        trained.append(shape.hidden)
        if not (shape.tied and chunk.first):  # a tied head has a copy of its own where the embeddings are elsewhere
            (frozen if still else trained).append(embedding)
    buffer = sum(trained)
    if aligned:
        buffer = _up(sum(_up(number, 64) for number in trained), aligned)
    return _Elements(sum(trained), sum(frozen), buffer)


def in_flight(layout: MegatronConfig, stage: int) -> int:
    """Passes through one of a stage's chunks whose activations are held at once (1F1B)."""
    ahead = layout.pipeline_parallel - stage
    if layout.virtual_pipeline == 1:
        return ahead
    return 2 * (ahead - 1) + (layout.virtual_pipeline - 1) * layout.pipeline_parallel + 1


@dataclass(frozen=True, slots=True)
class _Activations:
    """Counts for one pass size. trained: the tower's weights are. tower_room: see `tower.cut`."""

    shape: Shape
    layout: MegatronConfig
    size: Pass
    element: int
    fused: bool
    trained: bool
    tower_room: int = sys.maxsize

    @property
    def _split(self) -> int:
        return self.layout.tensor_parallel if self.layout.sequence_parallel else 1

    def _norm(self, width: float, rows: float) -> float:
        """Bytes that a norm keeps a token: its input and a statistic a row; in plain torch the input in float32 and the
        normalised rows."""
        return width * (self.element if self.fused else 4 + self.element) + 4 * rows

    def layer(self, recompute: str) -> float:
        """Bytes of one layer that wait for the backward pass, a token."""
        shape, t, s, b = self.shape, self.layout.tensor_parallel, self._split, self.element
        hidden, mlp = shape.hidden / s, shape.intermediate / t
        heads, kv_heads = shape.heads / t, shape.kv_heads / t
        query, key = heads * shape.head_size, kv_heads * shape.head_size
        if recompute == "full":
            return hidden * b
        # the product, normalised and rotated query and key, output and log-sum-exp; value is a view of the product
        attention = (query + 2 * key) * b + (query + key) * b + query * b + 4 * heads
        # q and k lie apart in the product: a norm of ours reads copies, plain torch a copy of q in float32 too
        attention += self._norm(query + key, heads + kv_heads)
        if not self.fused and b == 4:
            attention -= (key if kv_heads > 1 else query + key) * b
        norms = 2 * (self._norm(hidden, 1 / s) + hidden * b)
        if recompute == "selective":
            return norms + attention
        return norms + attention + (3 if self.fused else 4) * mlp * b

    def waiting(self, chunk: Chunk) -> float:
        """Bytes of a pass through a chunk's layers that wait for its backward pass, a token."""
        rotary = 2 * self.shape.head_size * self.element
        return (chunk.stop - chunk.start) * self.layer(self.layout.recompute) + rotary

    def final_norm(self) -> float:
        """Bytes that it keeps, a token; its result is the head's."""
        return self._norm(self.shape.hidden / self._split, 1 / self._split)

    def decoder(self, own: list[Chunk], stage: int) -> int:
        shape, b = self.shape, self.element
        held = in_flight(self.layout, stage) * self.waiting(own[0])  # chunks of a stage are equal
        again = self.layer("none") - self.layer(self.layout.recompute)
        # gradients of the MLP's product and of fc1's output, of the layer, and fc1's whole input with its gradient
        gradients = (3 * shape.intermediate / self.layout.tensor_parallel + 3 * shape.hidden) * b
        return math.ceil((held + again + gradients) * self.size.tokens)

    def head(self, chunk: int) -> int:
        shape, s, b = self.shape, self._split, self.element
        tokens, rows = self.size.tokens, self.size.rows
        norm = (self.final_norm() + shape.hidden / s * b) * tokens
        gathered = shape.hidden * b * tokens if s > 1 else 0
        selected = 2 * shape.hidden * b * rows  # and its gradient
        live = min(chunk, rows)
        logits = live * shape.vocab / self.layout.tensor_parallel * (4 + (b if b < 4 else 0))
        return math.ceil(norm + gathered + selected + logits + live * shape.hidden * (4 + b))

    def _block(self, tower: TowerShape) -> int:
        """Bytes that a block of the tower keeps a patch: both norms' inputs and outputs, the product, rotated query and key,
        output and its copy, fc1's output, the MLP's."""
        return (11 * tower.hidden + 2 * tower.intermediate) * self.element + 16

    def _tower_again(self, tower: TowerShape) -> bool:
        """Whether blocks are computed again, by a setting or because all of them would take more than the tower's share."""
        whole = self.size.image_tokens * tower.merge**2 * tower.depth * self._block(tower)
        return self.layout.recompute != "none" or whole > self.tower_room

    def tower_waiting(self) -> int:
        """Bytes of a pass through a trained tower that wait for its backward pass."""
        tower, b = self.shape.tower, self.element
        if tower is None:
            return 0
        patches = self.size.image_tokens * tower.merge**2
        again = self._tower_again(tower)
        blocks = tower.depth * (tower.hidden * b if again else self._block(tower))
        # pixels, and what the last block gives
        kept = (blocks + (tower.pixels + tower.hidden) * b) * patches
        return kept + (1 + tower.deepstack) * 3 * tower.wide * b * self.size.image_tokens

    def vision(self) -> int:
        tower, b = self.shape.tower, self.element
        if tower is None or not self.size.image_tokens:
            return 0
        images = self.size.image_tokens
        patches = images * tower.merge**2
        h, i = tower.hidden, tower.intermediate
        outputs = (1 + tower.deepstack) * tower.out * b * images
        # deepstack addends are as long as the pack
        addends = tower.deepstack * self.shape.hidden * b * self.size.tokens
        if not self.trained:
            return math.ceil((4 * h + 2 * i) * b * patches + 2 * outputs + addends)
        again = self._tower_again(tower)
        # of one block: what is computed again, and the gradients of its MLP and residual
        working = ((self._block(tower) if again else 0) + (2 * i + 2 * h) * b) * patches
        return math.ceil(self._tower_passes() * self.tower_waiting() + max(working, 2 * outputs + addends))

    def _tower_passes(self) -> int:
        stages = self.layout.pipeline_parallel
        return stages if self.layout.virtual_pipeline == 1 else 2 * stages - 1

    def communication(self) -> int:
        whole = self.shape.hidden * self.element * self.size.tokens
        gathered = whole if self._split > 1 else 0  # Megatron-core's buffer for the whole input of a layer
        # hidden states and gradients, arriving and leaving
        return gathered + (4 * whole // self._split if self.layout.pipeline_parallel > 1 else 0)
