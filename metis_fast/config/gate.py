"""The truth gate."""

from __future__ import annotations

from metis_fast.config.section import NonNegative, NonNegativeFloat, Positive, Section


class GateConfig(Section):
    """Truth gate: engine log-probs against the trainer's, on the same tokens (docs/rollouts.md)."""

    threshold: NonNegativeFloat = 0.0
    """Largest mean difference over a message with which a run starts or goes on; 0: 2e-2 with bfloat16, 1e-4 with float32."""
    prompts: NonNegative = 4
    """Prompts that are tried, those with images first; 0: no gate."""
    tokens: Positive = 64
    """Tokens that are sampled of each."""
    every: NonNegative = 0
    """Steps between further checks; 0: only at the start, and with vLLM after the first update."""
