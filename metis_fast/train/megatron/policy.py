"""Qwen3-VL and text-only Qwen3 of Megatron-core modules: a chunk of layers, and at the ends of the model what belongs there.

The vision tower is transformers' own, whole on every tensor-parallel rank of the first stage.

Shape letters: N tokens of a pack (padded), B = 1, H hidden size, D head size, 3 rotary axes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.core.utils import make_tp_sharded_tensor_for_checkpoint, make_viewless_tensor
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding, Qwen3VLVisionModel

from metis_fast.attention import IMAGES
from metis_fast.config import MegatronConfig
from metis_fast.pictures import ImagePreparer, Picture
from metis_fast.tower import default_room, encode
from metis_fast.train.megatron.layout import Chunk, parts
from metis_fast.train.megatron.modules import PackParams, RMSNorm, has_transformer_engine, layer_spec
from metis_kernels import Segments
from metis_kernels.prefix_attention.api import AttentionImpl


@dataclass(frozen=True, slots=True, eq=False)
class PassInput:
    """One pack as a stage takes it. tokens_N, positions_3N, segments: padded to a multiple of the tensor-parallel size.

    images: for the tower, each once, and image_order: which of them each placeholder span shows; only the first stage reads
    them.
    """

    tokens_N: Tensor
    positions_3N: Tensor
    segments: Segments
    images: tuple[Picture, ...]
    image_order: tuple[int, ...]


def megatron_config(layout: MegatronConfig, config: PretrainedConfig, dtype: torch.dtype) -> TransformerConfig:
    """Megatron-core's description of a Qwen3 or the decoder of a Qwen3-VL."""
    text, _ = parts(config)
    on_gpu = torch.cuda.is_available()
    return TransformerConfig(
        num_layers=text.num_hidden_layers,
        hidden_size=text.hidden_size,
        num_attention_heads=text.num_attention_heads,
        num_query_groups=text.num_key_value_heads,
        kv_channels=text.head_dim,
        ffn_hidden_size=text.intermediate_size,
        normalization="RMSNorm",
        layernorm_epsilon=text.rms_norm_eps,
        qk_layernorm=True,
        add_bias_linear=False,
        add_qkv_bias=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        use_te_activation_func=True,  # `modules.SwiGlu`
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_backend=AttnBackend.auto,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        # weights are read from a folder before anything runs
        use_cpu_initialization=not on_gpu,
        perform_initialization=False,
        tensor_model_parallel_size=layout.tensor_parallel,
        pipeline_model_parallel_size=layout.pipeline_parallel,
        virtual_pipeline_model_parallel_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
        num_layers_in_first_pipeline_stage=layout.first_stage_layers or None,
        num_layers_in_last_pipeline_stage=layout.last_stage_layers or None,
        sequence_parallel=layout.sequence_parallel,
        recompute_granularity=None if layout.recompute == "none" else layout.recompute,
        recompute_method="uniform" if layout.recompute == "full" else None,
        recompute_num_layers=1 if layout.recompute == "full" else None,
        # attention keeps its output and log-sum-exps only; the MLP is what is worth computing again (Megatron-core 0.16 cannot
        # do so with norms without Transformer Engine)
        recompute_modules=["mlp"] if layout.recompute == "selective" else None,
        variable_seq_lengths=layout.virtual_pipeline == 1,
        moe_token_dispatcher_type="alltoall",  # asked for by variable_seq_lengths, also where there are no experts
        deallocate_pipeline_outputs=True,
        # the loss divides by its own denominators: Megatron's schedule must not divide by the number of micro-batches
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=on_gpu,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
    )


class Decoder(TransformerBlock):
    """Megatron-core's block of layers, which adds the vision tower's deepstack features behind the first ones."""

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, hidden_NBH: Tensor | None, pack: PackParams, deepstack: Sequence[Tensor]
    ) -> Tensor:
        """hidden_NBH: of the first stage; later ones are given theirs by the schedule. deepstack: addends [N, B, H]."""
        start = self.input_tensor if hidden_NBH is None else hidden_NBH
        assert start is not None
        # Megatron frees what a stage has sent, which must own its memory
        hidden: Tensor = make_viewless_tensor(inp=start, requires_grad=True, keep_graph=True)
        config = self.config
        # what each rank of a sequence-parallel group draws must differ; nothing draws today, and Megatron asks for it
        tracker = tensor_parallel.get_cuda_rng_tracker()
        assert tracker is not None
        with tracker.fork() if config.sequence_parallel else nullcontext():
            for layer in cast(Iterable[TransformerLayer], self.layers):

                def run(hidden: Tensor, layer: TransformerLayer = layer) -> Tensor:
                    return layer(hidden_states=hidden, attention_mask=None, packed_seq_params=pack)[0]

                if config.recompute_granularity == "full" and torch.is_grad_enabled():
                    hidden = cast(Tensor, tensor_parallel.checkpoint(run, False, hidden))
                else:
                    hidden = run(hidden)
                index = layer.layer_number - 1
                if index < len(deepstack):
                    hidden = hidden + deepstack[index]
        if self.final_layernorm is not None:
            hidden = self.final_layernorm(hidden)
        return cast(Tensor, make_viewless_tensor(inp=hidden, requires_grad=True, keep_graph=True))


class MegatronPolicy(LanguageModule):
    """A chunk of the policy.

    Weights are left as they come; `step.load_weights` reads them.

    transformer: `megatron_config` of config, which is transformers'. with_transformer_engine: use its linear layers where there
    is a GPU and they are installed. vision_trained: whether the tower needs a graph. images: of the first stage of a model that
    has a tower; tower_bytes: `model.tower_memory_gb`. vp_stage: number of the chunk, where a stage has several.
    """

    def __init__(
        self,
        transformer: TransformerConfig,
        config: PretrainedConfig,
        chunk: Chunk,
        groups: ProcessGroupCollection,
        *,
        with_transformer_engine: bool,
        attention: AttentionImpl,
        vision_trained: bool,
        images: ImagePreparer | None = None,
        tower_bytes: int = 0,
        vp_stage: int | None = None,
    ) -> None:
        super().__init__(config=transformer, pg_collection=groups)
        text, vision = parts(config)
        self.text = text
        self.pre_process, self.post_process, self.vp_stage = chunk.first, chunk.last, vp_stage
        self.chunk = chunk
        self.model_type = ModelType.encoder_or_decoder
        self.share_embeddings_and_output_weights = bool(config.tie_word_embeddings)
        self._attention: AttentionImpl = attention
        self._vision_trained = vision_trained
        self._images, self._tower_bytes = images, tower_bytes
        self._vision = vision
        self._image_token = getattr(config, "image_token_id", -1)
        self.rotary = (Qwen3RotaryEmbedding if vision is None else Qwen3VLTextRotaryEmbedding)(text)  # pyright: ignore[reportArgumentType]
        if chunk.first:
            self.embedding = LanguageModelEmbedding(
                config=transformer,
                vocab_size=text.vocab_size,
                max_sequence_length=0,
                position_embedding_type="none",  # pyright: ignore[reportArgumentType]
                scatter_to_sequence_parallel=False,
                tp_group=groups.tp,
            )
            if vision is not None:
                vision._attn_implementation = IMAGES
                self.visual = cast(Qwen3VLVisionModel, Qwen3VLVisionModel._from_config(vision, dtype=transformer.params_dtype))
                if transformer.recompute_granularity is not None and vision_trained:
                    self.visual.gradient_checkpointing_enable({"use_reentrant": False})
        num_layers = chunk.stop - chunk.start
        spec = layer_spec(with_transformer_engine and has_transformer_engine())
        self.decoder = Decoder(
            config=transformer,
            spec=TransformerBlockSubmodules(layer_specs=[spec] * num_layers, layer_norm=RMSNorm),  # pyright: ignore[reportArgumentType]
            pre_process=chunk.first,
            post_process=chunk.last,
            pg_collection=groups,
            vp_stage=vp_stage,
        )
        if chunk.last:
            self.output_layer = tensor_parallel.ColumnParallelLinear(
                transformer.hidden_size,
                text.vocab_size,
                config=transformer,
                init_method=lambda _: None,
                bias=False,
                gather_output=False,
                skip_weight_param_allocation=chunk.first and self.share_embeddings_and_output_weights,
                tp_group=groups.tp,
            )
        self._mark_split()
        self._mark_embeddings()
        if torch.cuda.is_available():
            self.cuda(torch.cuda.current_device())

    def _mark_split(self) -> None:
        """Which weights are split over tensor-parallel ranks: Megatron marks them where it initialises them, which is left out
        here, and its gradient norm would count only the first rank's."""
        for module in self.modules():
            if isinstance(module, tensor_parallel.ColumnParallelLinear | tensor_parallel.VocabParallelEmbedding):
                axis = 0
            elif isinstance(module, tensor_parallel.RowParallelLinear):
                axis = 1
            else:
                continue
            if module.weight is not None:
                set_tensor_model_parallel_attributes(module.weight, True, axis, 1)

    def _mark_embeddings(self) -> None:
        """What Megatron wants to know of them: not to count a tied copy twice in the norm, and to sum both gradients."""
        tied = self.share_embeddings_and_output_weights and not (self.pre_process and self.post_process)
        if self.pre_process:
            weight = self.embedding.word_embeddings.weight
            weight.is_embedding_or_output_parameter = True  # pyright: ignore[reportAttributeAccessIssue]
            weight.shared_embedding = tied  # pyright: ignore[reportAttributeAccessIssue]
        if self.post_process and self.output_layer.weight is not None:
            weight = self.output_layer.weight
            weight.is_embedding_or_output_parameter = True  # pyright: ignore[reportAttributeAccessIssue]
            weight.shared = weight.shared_embedding = tied  # pyright: ignore[reportAttributeAccessIssue]

    @property
    def head(self) -> nn.Parameter:
        """The last chunk's rows of the LM head, [V / tensor parallel, H]."""
        own = self.output_layer.weight
        return cast(nn.Parameter, self.embedding.word_embeddings.weight if own is None else own)

    def set_input_tensor(self, input_tensor: list[Tensor] | Tensor) -> None:
        """Called by Megatron's schedule with what the stage before sent."""
        self.decoder.set_input_tensor(input_tensor[0] if isinstance(input_tensor, list) else input_tensor)

    def forward(self, pack: PassInput, every_parameter: bool) -> Tensor:
        """Hidden states of all tokens, [N / tensor parallel if sequence parallel, B, H]; normalised in the last chunk.

        every_parameter: run the tower also where the pack has no image, to no effect, so that each of its parameters has a
        gradient; overlapped reduction waits for them.
        """
        hidden, deepstack = None, []
        if self.pre_process:
            hidden, deepstack = self._embed(pack, every_parameter)
        axes = pack.positions_3N[:, None] if self._vision is not None else pack.positions_3N[:1]
        like = torch.empty(0, dtype=self.config.params_dtype, device=pack.tokens_N.device)
        cos, sin = self.rotary(like, axes)
        params = PackParams(segments=pack.segments, cos_ND=cos[0], sin_ND=sin[0], impl=self._attention)
        return self.decoder(hidden, params, deepstack)

    def _embed(self, pack: PassInput, every_parameter: bool) -> tuple[Tensor, list[Tensor]]:
        embeds_NBH = self.embedding(input_ids=pack.tokens_N[None], position_ids=None)
        deepstack: list[Tensor] = []
        if self._vision is not None and (pack.images or every_parameter):
            features, layers = self._encode(pack)
            if pack.images:
                mask = (pack.tokens_N == self._image_token)[:, None, None].expand_as(embeds_NBH)
                embeds_NBH = embeds_NBH.masked_scatter(mask, features.to(embeds_NBH.dtype))
                deepstack = [torch.zeros_like(embeds_NBH).masked_scatter(mask, f.to(embeds_NBH.dtype)) for f in layers]
            else:
                idle = sum(part.sum() for part in (features, *layers))
                embeds_NBH = embeds_NBH + 0 * cast(Tensor, idle).to(embeds_NBH.dtype)
        if self.config.sequence_parallel:
            # backward gathers: embeddings and tower see the gradients of all tokens on every rank
            group = self.pg_collection.tp
            # cloned: the part is a slice, which would keep all tokens in memory until the backward pass
            embeds_NBH = scatter_to_sequence_parallel_region(embeds_NBH, group=group).clone()
            deepstack = [scatter_to_sequence_parallel_region(part, group=group) for part in deepstack]
        return embeds_NBH, deepstack

    def _encode(self, pack: PassInput) -> tuple[Tensor, list[Tensor]]:
        """Tower features of the placeholder spans, in reading order: embeddings, and one tensor a deepstack layer."""
        assert self._images is not None
        images = pack.images or (_blank(self.visual),)
        order = pack.image_order if pack.images else (0,)
        room = self._tower_bytes or default_room(pack.tokens_N.device)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._vision_trained):
            features = encode(self.visual, self._images, images, room).take(order)
        return torch.cat(features.embeds), [torch.cat(layer) for layer in features.deepstack]

    def tie_embeddings_and_output_weights_state_dict(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        sharded_state_dict: dict[str, Any],
        output_layer_weight_key: str,
        first_stage_word_emb_key: str,
        metadata: dict[str, Any],
    ) -> None:
        """In a checkpoint the last stage's copy of a tied embedding is that of the first one.

        Megatron-core's own asks its globals for the data-parallel rank.
        """
        if self.pre_process or not self.post_process:
            return
        sharded_state_dict[output_layer_weight_key] = make_tp_sharded_tensor_for_checkpoint(
            tensor=self.output_layer.weight,
            key=first_stage_word_emb_key,
            replica_id=(1, 0, metadata["dp_cp_group"].rank()),
            allow_shape_mismatch=True,
            tp_group=self.pg_collection.tp,
            dp_cp_group=metadata["dp_cp_group"],
        )

    def whole_hidden(self, hidden_NBH: Tensor) -> Tensor:
        """The last chunk's output as the LM head takes it, [N, H] on every rank; its gradients are summed over the ranks."""
        group = self.pg_collection.tp
        if self.config.sequence_parallel:
            return gather_from_sequence_parallel_region(hidden_NBH, tensor_parallel_output_grad=True, group=group)[:, 0]
        return copy_to_tensor_model_parallel_region(hidden_NBH, group=group)[:, 0]


def _blank(visual: Qwen3VLVisionModel) -> Picture:
    """The smallest image there is."""
    merge, side = visual.spatial_merge_size, visual.spatial_merge_size * visual.patch_size
    return Picture(torch.zeros(side, side, 3, dtype=torch.uint8), (1, merge, merge))
