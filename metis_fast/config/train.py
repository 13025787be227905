"""The update: back ends and optimizer."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from metis_fast.config.section import (
    MAY_CHANGE,
    Fraction,
    Listed,
    NonNegative,
    NonNegativeFloat,
    Number,
    Positive,
    PositiveFloat,
    Section,
    Text,
)

Average = Annotated[float, Field(ge=0, lt=1), Number]


class OptimConfig(Section):
    """AdamW, with Muon for matrices where asked for."""

    lr: PositiveFloat = 1e-6
    """Learning rate of AdamW."""
    muon_lr: NonNegativeFloat = 0.0
    """Learning rate of Muon on the matrices of layers and blocks; 0 leaves them to AdamW."""
    betas: Annotated[tuple[Average, Average], Listed] = (0.9, 0.999)
    """AdamW's averages."""
    eps: PositiveFloat = 1e-8
    """AdamW's epsilon."""
    weight_decay: NonNegativeFloat = 0.01
    """On matrices only."""
    grad_clip: PositiveFloat = 1.0
    """Largest global gradient norm."""
    warmup_steps: NonNegative = 0
    """Linear warm-up."""
    schedule: Literal["linear", "cosine"] = "linear"
    """How the learning rate goes from `lr` after the warm-up to `final_lr` at the last step: on a line, or on half a cosine."""
    final_lr: Fraction = 1.0
    """Learning rate at the last step as a share of `lr`; 1 is constant, and so needs no cosine."""

    @model_validator(mode="after")
    def _cosine_falls(self) -> Self:
        if self.schedule == "cosine" and self.final_lr == 1:
            raise ValueError(
                "schedule=cosine with final_lr=1 stays at lr; set final_lr (0: down to nothing), or schedule=linear"
            )
        return self


class MegatronConfig(Section):
    """The Megatron-core back end (`train.backend=megatron`): how model and batch are cut over ranks (docs/cluster.md)."""

    tensor_parallel: Positive = 1
    """Ranks that share every matrix; divides attention heads, key/value heads, MLP width and vocabulary."""
    pipeline_parallel: Positive = 1
    """Stages of layers, run one-forward-one-backward."""
    virtual_pipeline: Positive = 1
    """Chunks of layers a stage (interleaved schedule). Passes are padded to one length, and their number is filled up to a
    multiple of `pipeline_parallel`."""
    data_parallel: Positive = 1
    """Replicas, each with its share of the packs; weights' states are split over them."""
    sequence_parallel: bool = False
    """Split norms and residuals over the tensor-parallel ranks by tokens."""
    first_stage_layers: NonNegative = 0
    """Layers of the first stage, which has the vision tower and the embeddings; 0: as many as the others."""
    last_stage_layers: NonNegative = 0
    """Layers of the last stage, which has the LM head; 0: as many as the others."""
    distributed_optimizer: bool = True
    """Split masters and moments over the data-parallel ranks."""
    overlap_reduction: Literal["auto", "on", "off"] = "auto"
    """Sum gradients over replicas while the backward pass goes on; `auto`: on GPUs."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations computed again in the backward pass. `selective`: of MLPs; `full`: of whole layers."""
    transformer_engine: Literal["auto", "off"] = "auto"
    """`auto`: Transformer Engine's linear layers on a GPU where it is installed."""
    launch: Literal["local", "join"] = "local"
    """`local`: the run starts its ranks, on this machine or through `workers.launcher`. `join`: somebody else on this machine
    starts them, by `metis-fast rank`."""
    listen: Text = "127.0.0.1:0"
    """Loopback address at which ranks of this machine find the run; port 0 takes a free one."""
    timeout_s: PositiveFloat = 1800.0
    """Longest silence of a rank or a collective operation before the job ends."""

    @property
    def num_ranks(self) -> int:
        """Processes; one GPU each where there are some."""
        return self.tensor_parallel * self.pipeline_parallel * self.data_parallel


class TrainConfig(Section):
    """The update."""

    backend: Literal["torch", "megatron"] = "torch"
    """Trainer back end."""
    steps: Annotated[Positive, MAY_CHANGE] = 200
    """Rollout steps."""
    prompts_per_mini_batch: Positive = 64
    """Prompts in one optimizer step."""
    tokens_per_micro_batch: Annotated[Positive, MAY_CHANGE] = 40960
    """Tokens in one forward and backward pass, whole rollouts. Changes memory and speed, not the gradient."""
    share_packs: Annotated[bool, MAY_CHANGE] = True
    """Several prompts in one pass (exact)."""
    share_prompt: Annotated[bool, MAY_CHANGE] = True
    """Run a prompt once for all its rollouts in a pass (exact)."""
    share_images: Annotated[bool, MAY_CHANGE] = True
    """Run the vision tower once for every distinct image of a pass (exact)."""
    skip_zero_advantage: Annotated[bool, MAY_CHANGE] = True
    """Do not run rollouts whose advantages are both exactly 0 (exact; off by itself when entropy or KL need them)."""
    skip_head_rows: Annotated[bool, MAY_CHANGE] = True
    """Only tokens with a gradient coefficient reach the LM head (exact)."""
    skip_old_logprobs: Annotated[bool, MAY_CHANGE] = True
    """No old-log-prob pass for the first mini-batch of a step, whose old policy is the current one (exact)."""
    attention: Annotated[Literal["auto", "flash", "triton", "cpu", "reference"], MAY_CHANGE] = "auto"
    """Implementation of the prefix-shared attention (docs/kernels.md)."""
    activation_checkpointing: Annotated[bool, MAY_CHANGE] = False
    """Recompute activations in the backward pass (torch back end; for Megatron see `megatron.recompute`)."""
    megatron: Annotated[MegatronConfig, MAY_CHANGE] = MegatronConfig()
    optim: OptimConfig = OptimConfig()
