"""What fills Megatron-core's transformer layer: norm, MLP and attention that compute what transformers' Qwen3 computes.

Linear layers are Megatron-core's, or Transformer Engine's on a GPU where it is installed. Norm, SwiGLU and rotary positions run
Liger's kernels on a GPU where liger-kernel is installed, and plain torch otherwise.

Shape letters: N tokens of a pack (padded), B = 1, H hidden size, Q query heads and K key/value heads of this rank, D head size.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from megatron.core.extensions import transformer_engine
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from metis_kernels import Segments, prefix_attention
from metis_kernels.prefix_attention.api import AttentionImpl

_LIGER = importlib.util.find_spec("liger_kernel") is not None


def _use_liger(x: Tensor) -> bool:
    return x.is_cuda and _LIGER


class RMSNorm(nn.Module):
    """As transformers' Qwen3 has it: statistics in float32, rounded before the weight.

    Megatron-core's own without Transformer Engine refuses sequence parallelism; under it every rank sees a part of the
    tokens, and `sequence_parallel` on the weight makes Megatron sum its gradient.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_: object) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.eps = eps
        setattr(self.weight, "sequence_parallel", config.sequence_parallel)  # noqa: B010 (no attribute of Parameter)

    def forward(self, x: Tensor) -> Tensor:
        """[..., H] -> the same."""
        if _use_liger(x):
            from liger_kernel.ops.rms_norm import LigerRMSNormFunction

            # not in place: the gradient that arrives is the residual's too
            return cast(Tensor, LigerRMSNormFunction.apply(x, self.weight, self.eps, 0.0, "llama", False))
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


class SwiGlu(nn.Module):
    """silu(gate) * up, between the products of Megatron-core's MLP: one kernel on a GPU.

    It takes the place that Megatron-core has for Transformer Engine's activations, the one way in that needs no MLP of our own.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()

    def forward(self, both: Tensor) -> Tensor:
        """[N, B, 2 I] -> [N, B, I], gate before up."""
        gate, up = both.chunk(2, dim=-1)
        if _use_liger(gate):
            from liger_kernel.ops.swiglu import LigerSiLUMulFunction

            return cast(Tensor, LigerSiLUMulFunction.apply(gate, up))
        return F.silu(gate) * up

    def sharded_state_dict(self, *_: object) -> dict[str, object]:
        """Nothing; Megatron-core asks every part of an MLP."""
        return {}


@dataclass
class PackParams(PackedSeqParams):
    """What a pass attends to; Megatron-core hands it through every layer as it is.

    cos_ND, sin_ND: rotary angles of every token. The format keeps Megatron-core from taking the pack apart itself.
    """

    qkv_format: str = "sbhd"
    segments: Segments | None = None
    cos_ND: Tensor | None = None
    sin_ND: Tensor | None = None
    impl: AttentionImpl = "auto"


def _rotated(x: Tensor) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return torch.cat((-right, left), dim=-1)


def rotate(query_NQD: Tensor, key_NKD: Tensor, cos_ND: Tensor, sin_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Rotary positions, halves of a head as pairs."""
    if _use_liger(query_NQD):
        from liger_kernel.ops.rope import LigerRopeFunction

        heads_first = (part.transpose(0, 1)[None] for part in (query_NQD, key_NKD))
        query, key = cast(tuple[Tensor, Tensor], LigerRopeFunction.apply(*heads_first, cos_ND[None], sin_ND[None]))
        return query[0].transpose(0, 1), key[0].transpose(0, 1)
    cos, sin = cos_ND[:, None], sin_ND[:, None]
    return query_NQD * cos + _rotated(query_NQD) * sin, key_NKD * cos + _rotated(key_NKD) * sin


class PackedAttention(MegatronModule):
    """Megatron-core's core attention over packed groups: rotary positions, then `metis_kernels.prefix_attention`.

    The constructor's arguments are Megatron-core's. Rotation happens here since q and k are at hand normalised.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        *,
        pg_collection: ProcessGroupCollection,
        **_: object,
    ) -> None:
        super().__init__(config=config)
        self.tp_group = pg_collection.tp  # asked for where a checkpoint is made
        assert config.kv_channels is not None
        self._scale = softmax_scale or config.kv_channels**-0.5

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None = None,
        *,
        packed_seq_params: PackParams,
        **_: object,
    ) -> Tensor:
        """query [N, B, Q, D], key and value [N, B, K, D] -> [N, B, Q D]."""
        pack = packed_seq_params
        assert pack.segments is not None and pack.cos_ND is not None and pack.sin_ND is not None
        query_NQD, key_NKD = rotate(query[:, 0], key[:, 0], pack.cos_ND, pack.sin_ND)
        out = prefix_attention(query_NQD, key_NKD, value[:, 0], pack.segments, scale=self._scale, impl=pack.impl)
        return out.reshape(len(out), 1, -1)


def has_transformer_engine() -> bool:
    """Whether its linear layers can be used: it is installed, and there is a GPU to run them."""
    return torch.cuda.is_available() and transformer_engine.HAVE_TE


def layer_spec(with_transformer_engine: bool) -> ModuleSpec:
    """One decoder layer."""
    column: Any = transformer_engine.TEColumnParallelLinear if with_transformer_engine else ColumnParallelLinear
    row: Any = transformer_engine.TERowParallelLinear if with_transformer_engine else RowParallelLinear
    add: Any = get_bias_dropout_add  # a function, which Megatron-core's annotations leave out
    attention = SelfAttentionSubmodules(
        linear_qkv=column,
        core_attention=PackedAttention,  # pyright: ignore[reportArgumentType] (takes what Megatron-core gives it)
        linear_proj=row,
        q_layernorm=RMSNorm,
        k_layernorm=RMSNorm,
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=attention
            ),
            self_attn_bda=add,
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(module=MLP, submodules=MLPSubmodules(linear_fc1=column, activation_func=SwiGlu, linear_fc2=row)),
            mlp_bda=add,
        ),
    )
