"""How rollouts are sampled, and by which engine."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from metis_fast.config.section import (
    MAY_CHANGE,
    Fraction,
    Free,
    Named,
    NonNegative,
    Number,
    OrNone,
    Positive,
    PositiveFloat,
    Section,
)


def _off(value: object) -> object:
    return 0 if str(value).strip() in ("-1", "-1.0") else value


class VllmConfig(Section):
    """vLLM engines (`rollout.engine=vllm`; docs/rollouts.md)."""

    replicas: Positive = 1
    """Engines, each a process of its own with the whole model; a rollout stays on the one that holds its cache."""
    tensor_parallel: Positive = 1
    """GPUs of an engine; without any, its processes."""
    max_num_seqs: Positive = 256
    """Requests that an engine runs at once."""
    gpu_memory: Annotated[float, Field(gt=0, le=1), Number] = 0.85
    """Share of a GPU's memory that an engine takes; lower where it shares the GPU with the trainer."""
    cpu_cache_gb: Positive = 1
    """KV cache of an engine without a GPU."""
    cpu_threads: NonNegative = 0
    """Threads of each process of an engine without a GPU; 0: as vLLM chooses."""
    image_cache_gb: PositiveFloat = 4.0
    """Memory of an engine, in GiB, for processed images, which need not be decoded again then, and as much again at most for
    their encoded bytes. It must hold the images of one longest rollout."""
    sleep: bool = False
    """Engine and trainer share GPUs: while the trainer works, the engine gives its memory back. For `rollout.mode=sync`."""
    speculative: OrNone[dict[str, Free]] = None
    """vLLM's speculative_config, for example {method: ngram, num_speculative_tokens: 2, prompt_lookup_min: 2,
    prompt_lookup_max: 3}. Needs a GPU."""
    arguments: Annotated[dict[str, OrNone[Free]], Named] = Field(default={})
    """Further engine arguments of vLLM, by their names there."""
    request_s: PositiveFloat = 1800.0
    """Longest time of one message; then the engine counts as hung."""
    stall_s: PositiveFloat = 300.0
    """Longest time of one step of an engine; then it ends itself, and says where it hung."""
    restarts: NonNegative = 5
    """How often one engine is started again before the run stops."""


class RolloutConfig(Section):
    """How rollouts are sampled (paper's values)."""

    protocol: Literal["compact", "metis"] = "compact"
    """How the agent reads its tools (docs/protocols.md). `compact`: the demo's. `metis`: as the published checkpoints were
    trained."""
    strict: bool = False
    """`metis`: do as the reference does where it is broken, too; for comparisons."""
    engine: Literal["native", "vllm"] = "native"
    """`native`: the trainer's own model in process. `vllm`: vLLM engines."""
    vllm: Annotated[VllmConfig, MAY_CHANGE] = VllmConfig()
    mode: Literal["sync", "one_step_off", "async"] = "sync"
    """`sync`: sample, then update. `one_step_off`: sample the next step's rollouts during an update. `async`: sample all the
    time, weights change under way; see `max_staleness`."""
    max_staleness: Positive = 2
    """`async`: a step trains on no prompt that was begun more than so many updates ago."""
    over_provision: Fraction = 0.0
    """Prompts begun beyond those that a step needs, as a share; the step takes those that finish first. `async` begins the
    prompts of coming steps in any case; there it adds to them with `slow: drop` only."""
    slow: Literal["carry", "drop"] = "carry"
    """What happens to prompts that a step left over. `carry`: they go on, count for the next one, and are waited for when they
    would become too old (`sync`: one update, `one_step_off`: two). `drop`: what would be too old for the next step is dropped,
    counted, and begun again before new prompts."""
    prompts_per_step: Positive = 128
    """P, prompts in a step."""
    rollouts_per_prompt: Positive = 16
    """G, rollouts of each prompt."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature; the loss uses the same one."""
    top_p: Annotated[float, Field(gt=0, le=1), Number] = 1.0
    """Nucleus; only 1, off, is what the loss assumes."""
    top_k: Annotated[NonNegative, BeforeValidator(_off)] = 0
    """Only 0, off (vLLM writes -1), is what the loss assumes."""
    max_prompt_tokens: Positive = 24576
    """A longer prompt is an error of the data."""
    max_response_tokens: Positive = 16384
    """Sampled tokens and observations of one rollout, together."""
    max_observation_tokens: Positive = 8192
    """Longer observations are cut, images never in two. `compact` keeps the beginning; `metis` keeps the end of a text, and the
    beginning where there are images."""
    max_turns: Positive = 10
    """`compact`: assistant messages in a rollout. `metis`: tool calls, which one more message follows."""
    max_turn_tokens: NonNegative = 0
    """Sampled tokens in one message; 0 means only `max_response_tokens` limits it."""
    max_concurrent: Annotated[Positive, MAY_CHANGE] = 512
    """Rollouts in flight at once."""
    retries: Annotated[NonNegative, MAY_CHANGE] = 2
    """How often an infrastructure failure is retried before the rollout loses its verdict."""
    deterministic: bool = True
    """Native engine in `sync` mode: admit requests in waves of fixed order, so that a run repeats bit for bit. False, and the
    other modes, admit at any time."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.rollouts_per_prompt == 1:
            raise ValueError("rollout.rollouts_per_prompt=1 gives every advantage 0; use 2 or more (paper: 16)")
        if self.strict and self.protocol != "metis":
            raise ValueError(f"rollout.strict is for rollout.protocol=metis, got {self.protocol}; set the one, or strict=false")
        if self.max_turn_tokens > self.max_response_tokens:
            raise ValueError("rollout.max_turn_tokens is larger than rollout.max_response_tokens; lower it or set 0")
        if self.top_p < 1 or self.top_k:
            raise ValueError(
                "rollout.top_p < 1 or rollout.top_k > 0 samples from another distribution than the log-probs that the loss "
                "compares are of, which no importance weight corrects; set both off"
            )
        if self.mode == "sync" and self.over_provision and self.deterministic:
            raise ValueError(
                "rollout.over_provision takes what finishes first, which no seed decides; set rollout.deterministic=false"
            )
        if self.vllm.sleep and (self.engine != "vllm" or self.mode != "sync" or self.over_provision):
            raise ValueError(
                "rollout.vllm.sleep lets engine and trainer take turns; set rollout.engine=vllm, rollout.mode=sync and "
                "rollout.over_provision=0"
            )
        return self
