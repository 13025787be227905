"""The C++ ops of the LM head, as Python sees them (kernels/csrc/head_ops.cpp).

Shape letters: C tokens of a chunk, Cp the same rounded up to whole panels, H hidden size, V rows of the local head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

OPS = torch.ops.metis_kernels_cpu


def even_rows(tensor: Tensor) -> Tensor:
    """Contiguous rows of even length: the C++ side multiplies pairs. A zero column changes no product."""
    if tensor.shape[1] % 2:
        return F.pad(tensor, (0, 1))
    return tensor if tensor.stride(1) == 1 else tensor.contiguous()


@dataclass(frozen=True, slots=True, eq=False)
class Chunk:
    """Tokens whose logits are taken at once, and where their targets are.

    hidden_TH, head_VH: even_rows. rows_C: which hidden states. local_C: rows of the targets in this shard, -1 where another
    rank has them. workspace: uint8, shared by the chunks of a call. token_stride: Cp.
    """

    hidden_TH: Tensor
    rows_C: Tensor
    head_VH: Tensor
    local_C: Tensor
    sorted_target_C: Tensor
    sorted_token_C: Tensor
    temperature: float
    workspace: Tensor
    token_stride: int

    def forward(
        self,
        anchor_C: Tensor | None = None,
        exponentials: Tensor | None = None,
        logits: Tensor | None = None,
        moment: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """(reference, sum, moment, target, target_exp), [C] float64 each.

        With z = hidden @ head.T / temperature and the reference r (the anchor, or the maximum where there is none):
        sum = sum_j exp(z_j - r), moment = sum_j exp(z_j - r) (z_j - r), target = z of the target, 0 if another rank has it.
        With an anchor the moment is taken only where asked for, exponents are limited to 60, and target_exp is the target's
        exponential, exactly as it was summed (0 if another rank has it).
        exponentials [V, Cp] in the head's dtype takes exp(min(z - r, 60)), logits [V, Cp] float32 takes z - r.
        """
        anchor = None if anchor_C is None else self.padded(anchor_C)
        peak, total, first, target, target_exp = OPS.head_forward(
            self.hidden_TH, self.rows_C, self.head_VH, self.sorted_target_C, self.sorted_token_C, anchor, 1 / self.temperature,
            exponentials, logits, moment, self.workspace,
        ).unbind()  # fmt: skip
        return (peak if anchor_C is None else anchor_C.double()), total, first, target, target_exp

    def backward(
        self,
        scale_C: Tensor,
        exponentials: Tensor | None,
        logits: Tensor | None,
        vectors: Tensor | None,
        d_hidden_TH: Tensor | None,
        head_grad_VH: Tensor | None,
    ) -> None:
        """Both products with D, [V, Cp]: d_hidden[rows] = scale * (D.T @ head), head_grad += D @ (scale * hidden[rows]).

        D is `exponentials`, or made of `logits` and `vectors` ([4, Cp] float32: ln S, g, h, H; see kernels/csrc/head.h).
        d_hidden_TH: in the head's dtype. head_grad_VH: float32, contiguous.
        """
        OPS.head_backward(
            self.hidden_TH, self.rows_C, scale_C.float(), self.head_VH, self.sorted_target_C, self.sorted_token_C, exponentials,
            logits, vectors, d_hidden_TH, head_grad_VH, self.workspace,
        )  # fmt: skip

    def target_logits(self) -> Tensor:
        """[C] float32: z of the targets by a dot product each, 0 where another rank has them."""
        return OPS.target_logits(self.hidden_TH, self.rows_C, self.head_VH, self.local_C) / self.temperature

    def padded(self, value_C: Tensor) -> Tensor:
        """[Cp] float32, 0 beyond the tokens."""
        return F.pad(value_C.float(), (0, self.token_stride - len(value_C)))


def open_chunk(
    hidden_TH: Tensor,
    rows_C: Tensor,
    head_VH: Tensor,
    local_C: Tensor,
    temperature: float,
    workspace: Tensor | None,
    with_d_hidden: bool = False,
    from_logits: bool = False,
) -> Chunk:
    """Chunk of these tokens. workspace: of an earlier chunk, reused if it is large enough.

    with_d_hidden, from_logits: whether `backward` will be asked for d_hidden_TH, and from logits.
    """
    token_stride, num_bytes = OPS.workspace(head_VH, len(rows_C), with_d_hidden, from_logits)
    if workspace is None or workspace.numel() < num_bytes:
        workspace = torch.empty(num_bytes, dtype=torch.uint8)
    sorted_target, sorted_token = local_C.sort()
    return Chunk(
        hidden_TH, rows_C.contiguous(), head_VH, local_C, sorted_target, sorted_token, temperature, workspace, token_stride
    )
