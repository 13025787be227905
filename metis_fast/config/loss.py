"""The loss."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from metis_fast.config.section import MAY_CHANGE, Fraction, NonNegative, NonNegativeFloat, Number, Section


class LossConfig(Section):
    """The clipped dual-surrogate loss (ALGORITHM section 4)."""

    w_acc: NonNegativeFloat = 1.0
    """Weight of the accuracy surrogate."""
    w_tool: NonNegativeFloat = 0.15
    """Weight of the tool-efficiency surrogate: the price of a call, counted in errors. Higher: fewer calls, more risk for
    accuracy. At 0.15 an error costs as much as 6.7 calls. 0 is GRPO."""
    eps_low: Fraction = 0.2
    """Lower clip range."""
    eps_high: NonNegativeFloat = 0.2
    """Upper clip range."""
    dual_clip: Annotated[float, Field(gt=1), Number] = 3.0
    """c; `.inf` switches the dual clip off."""
    entropy_coef: NonNegativeFloat = 0.0
    """Entropy bonus."""
    kl_coef: NonNegativeFloat = 0.0
    """KL (k3 estimator) to the starting policy."""
    tis_cap: NonNegativeFloat = 0.0
    """C of the truncated importance weight min(exp(logp_old - logp_engine), C); 0 is off."""
    proximal: Literal["policy", "engine"] = "policy"
    """Whose log-probs are logp_old. `policy`: the weights at the start of the step. `engine`: those that sampled it; no pass
    is owed, and the ratio itself is the importance weight, truncated by clip and dual clip."""
    normalization: Literal["global", "reference"] = "global"
    """`global`: over the whole mini-batch. `reference`: the public recipe's, per micro-batch and with float noise in uniform
    groups; for parity runs only."""
    impl: Annotated[Literal["auto", "triton", "cpu", "reference"], MAY_CHANGE] = "auto"
    """Implementation of head and loss (docs/kernels.md)."""
    token_chunk: Annotated[NonNegative, MAY_CHANGE] = 0
    """Tokens whose logits exist at once; 0 leaves it to the implementation."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.w_acc == 0 and self.w_tool == 0:
            raise ValueError("loss.w_acc and loss.w_tool are both 0, so nothing is learnt; set one of them")
        if self.proximal == "engine" and self.tis_cap:
            raise ValueError(
                "loss.tis_cap corrects logp_old to the engine's; with loss.proximal=engine they are the same; set it to 0"
            )
        return self
