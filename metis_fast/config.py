"""Configuration: a small tree of frozen typed classes.

A YAML file holds only what differs from the defaults here (the paper's recipe); `base: other.yaml` starts from another file;
`section.key=value` on the command line overrides both. Unknown keys are refused with the nearest known one, and every
cross-check is done once, in `Config`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from metis_fast.errors import ConfigError
from metis_fast.types import Ability, ToolName

Positive = Annotated[int, Field(gt=0)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


def _dtype_here(value: object) -> object:
    """Without bfloat16 instructions torch multiplies bfloat16 matrices many times slower than float32 ones."""
    if value != "auto":
        return value
    import torch  # at first use: reading a config needs nothing else of it

    cpu = torch.cpu.get_capabilities()
    native = torch.cuda.is_available() or any(cpu.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
    return "bfloat16" if native else "float32"


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=())


class RunConfig(_Section):
    """Where a run lives and what makes it repeatable."""

    dir: Path = Path("runs/default")
    """Folder of this run: resolved config, metrics, rollouts, checkpoints, report."""
    seed: int = 0
    """Seeds data order, sampling and initialisation."""
    threads: NonNegative = 0
    """CPU threads for torch; 0 leaves torch's own choice. Runs are bit-repeatable for a fixed number."""


class DataConfig(_Section):
    """Prompts, in the Metis-RL Parquet schema."""

    train: tuple[Path, ...] = ()
    """Parquet files (or folders of them) to train on."""
    heldout: tuple[Path, ...] = ()
    """Parquet files (or folders of them) to evaluate on."""
    shuffle: bool = True
    """Shuffle every epoch, by `run.seed` and the epoch's number."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """What a row that does not fit the schema does: stop the run, or be skipped and counted."""


class ModelConfig(_Section):
    """The policy: any Qwen3-VL folder with safetensors."""

    path: Path = Path("models/Metis-8B-ColdStart")
    """Folder with config.json, *.safetensors, tokenizer and processor."""
    config: Path | None = None
    """A config.json that describes the model where `path` is not there yet, for `metis-fast plan`."""
    dtype: Annotated[Literal["bfloat16", "float32"], BeforeValidator(_dtype_here)] = "bfloat16"
    """Type of weights and activations. With bfloat16 the optimizer keeps float32 masters. `auto`: bfloat16 on a machine with a
    GPU or instructions for it (AVX-512 bf16, AMX), else float32; a run folder keeps which."""
    freeze: tuple[Literal["vision", "embeddings"], ...] = ()
    """Parts that are not trained: the vision tower (with its mergers), the token embeddings (with a tied LM head)."""


class VllmConfig(_Section):
    """vLLM engines (`rollout.engine=vllm`; docs/rollouts.md)."""

    replicas: Positive = 1
    """Engines, each a process of its own with the whole model; a rollout stays on the one that holds its cache."""
    tensor_parallel: Positive = 1
    """GPUs of an engine; without any, its processes."""
    max_num_seqs: Positive = 256
    """Requests that an engine runs at once."""
    gpu_memory: Annotated[float, Field(gt=0, le=1)] = 0.85
    """Share of a GPU's memory that an engine takes; lower where it shares the GPU with the trainer."""
    cpu_cache_gb: Positive = 1
    """KV cache of an engine without a GPU."""
    cpu_threads: NonNegative = 0
    """Threads of each process of an engine without a GPU; 0: as vLLM chooses."""
    sleep: bool = False
    """Engine and trainer share GPUs: while the trainer works, the engine gives its memory back. For `rollout.mode=sync`."""
    speculative: dict[str, str | int | float | bool] | None = None
    """vLLM's speculative_config, for example {method: ngram, num_speculative_tokens: 2, prompt_lookup_min: 2,
    prompt_lookup_max: 3}. Needs a GPU."""
    arguments: dict[str, str | int | float | bool | None] = {}
    """Further engine arguments of vLLM, by their names there."""
    request_s: PositiveFloat = 1800.0
    """Longest time of one message; then the engine counts as hung."""
    stall_s: PositiveFloat = 300.0
    """Longest time of one step of an engine; then it ends itself, and says where it hung."""
    restarts: NonNegative = 5
    """How often one engine is started again before the run stops."""


class RolloutConfig(_Section):
    """How rollouts are sampled (paper's values)."""

    engine: Literal["native", "vllm"] = "native"
    """`native`: the trainer's own model in process. `vllm`: vLLM engines."""
    vllm: VllmConfig = VllmConfig()
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
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Nucleus; only 1, off, is what the loss assumes."""
    top_k: NonNegative = 0
    """Only 0, off, is what the loss assumes."""
    max_prompt_tokens: Positive = 24576
    """A longer prompt is an error of the data."""
    max_response_tokens: Positive = 16384
    """Sampled tokens and observations of one rollout, together."""
    max_observation_tokens: Positive = 8192
    """Longer observations are cut at a part border (text or whole image)."""
    max_turns: Positive = 10
    """Assistant messages in a rollout."""
    max_turn_tokens: NonNegative = 0
    """Sampled tokens in one message; 0 means only `max_response_tokens` limits it."""
    max_concurrent: Positive = 512
    """Rollouts in flight at once."""
    retries: NonNegative = 2
    """How often an infrastructure failure is retried before the rollout loses its verdict."""
    deterministic: bool = True
    """Native engine in `sync` mode: admit requests in waves of fixed order, so that a run repeats bit for bit. False, and the
    other modes, admit at any time."""


class PythonToolConfig(_Section):
    """The `python` tool: one sandboxed session a rollout."""

    timeout_s: PositiveFloat = 20.0
    """Wall seconds a call may take."""
    memory_mb: Positive = 1024
    """Address-space limit of a session, beyond what the warm interpreter holds."""
    scratch_mb: Positive = 64
    """Size of the session's private scratch folder."""
    max_output_chars: Positive = 20000
    """Longer output is cut in the middle."""
    unsafe: bool = False
    """Run model-written code without a sandbox. Only for machines that you can throw away."""


class TextSearchConfig(_Section):
    """The `text_search` tool over a local corpus."""

    corpus: Path | None = None
    """Parquet with columns `title`, `link`, `text`; indexed on first use, the index kept beside it."""
    max_results: Positive = 3
    """Results in an observation."""
    snippet_chars: Positive = 300
    """Length of a snippet."""


class ImageSearchConfig(_Section):
    """The `image_search` tool over a local set of images."""

    corpus: Path | None = None
    """Parquet with columns `title`, `link`, `image` (encoded bytes); indexed on first use."""
    max_results: Positive = 2
    """Results in an observation, each with a thumbnail."""
    thumbnail_px: Positive = 256
    """Longest side of a thumbnail."""


class ToolsConfig(_Section):
    """Which tools the agent has."""

    enabled: tuple[ToolName, ...] = (ToolName.PYTHON, ToolName.TEXT_SEARCH, ToolName.IMAGE_SEARCH)
    """Calling another one is the agent's error."""
    python: PythonToolConfig = PythonToolConfig()
    text_search: TextSearchConfig = TextSearchConfig()
    image_search: ImageSearchConfig = ImageSearchConfig()


class LlmJudgeConfig(_Section):
    """LLM judge: any endpoint that speaks the OpenAI chat-completions protocol."""

    base_url: str = ""
    """For example http://127.0.0.1:8000/v1. Empty: rows of style `llm` are an error at start."""
    model: str = ""
    """Model name to ask for."""
    api_key_env: str = "METIS_JUDGE_API_KEY"
    """Environment variable that holds the key, if the endpoint wants one."""
    timeout_s: PositiveFloat = 60.0
    """Seconds for one request."""
    concurrency: Positive = 32
    """Requests in flight."""
    retries: NonNegative = 3
    """Tries after the first, with exponential back-off; then there is no verdict."""
    cache: Path | None = None
    """SQLite file of past verdicts; none: kept in memory."""


class WorkersConfig(_Section):
    """Processes that work for a run: where they run, and when they count as dead (docs/rollouts.md)."""

    launcher: Literal["local", "ray"] = "local"
    """`local`: processes of this machine. `ray`: Ray places them, on a running cluster or one that is started here."""
    ray_address: str = "auto"
    """`auto`: the cluster that RAY_ADDRESS or `ray start` on this machine names; else this machine becomes one."""
    tools: NonNegative = 0
    """Processes that run the tools; 0: the run itself does."""
    judges: NonNegative = 0
    """Processes that judge; 0: the run itself does."""
    listen: str = "127.0.0.1:0"
    """Address at which workers find the run; port 0 takes a free one. With Ray: that of this machine in the cluster."""
    silence_s: PositiveFloat = 20.0
    """A worker that does not answer for so long is killed and started again."""
    start_s: PositiveFloat = 600.0
    """Time that a worker may take to be ready."""
    wait_s: PositiveFloat = 600.0
    """How long to wait for room in a Ray cluster."""


class SyncConfig(_Section):
    """How weights go from the trainer to vLLM engines (docs/rollouts.md)."""

    transport: Literal["staged", "nccl", "ipc"] = "staged"
    """`staged`: through shared memory, over the workers' connections to other machines; an engine loads only what has arrived
    whole. `nccl`, `ipc`: vLLM's own, between GPUs."""
    mode: Literal["full", "delta"] = "full"
    """`delta`: only what differs from the version that an engine has, without loss. For `staged`."""
    bucket_mb: Positive = 64
    """Bytes that are sent and checked together."""
    retries: NonNegative = 2
    """How often a failed transfer is made again before the engine is started anew."""


class GateConfig(_Section):
    """Truth gate: engine log-probs against the trainer's, on the same tokens (docs/rollouts.md)."""

    threshold: NonNegativeFloat = 0.0
    """Largest mean difference over a message with which a run starts or goes on; 0: 2e-2 with bfloat16, 1e-4 with float32."""
    prompts: NonNegative = 4
    """Prompts that are tried, those with images first; 0: no gate."""
    tokens: Positive = 64
    """Tokens that are sampled of each."""
    every: NonNegative = 0
    """Steps between further checks; 0: only at the start, and with vLLM after the first update."""


class ScoreConfig(_Section):
    """Rewards and advantages (ALGORITHM sections 2 to 4)."""

    w_ans: NonNegativeFloat = 0.9
    """Weight of the answer in r_acc."""
    w_fmt: NonNegativeFloat = 0.1
    """Weight of the format in r_acc."""
    estimator: Literal["hdpo", "grpo", "coupled", "gdpo"] = "hdpo"
    """`hdpo`: two channels. Baselines: `grpo` (accuracy only), `coupled` (r_acc + alpha r_tool, one channel), `gdpo` (each
    reward normalised over the group, summed, normalised over the batch)."""
    alpha: NonNegativeFloat = 0.15
    """Weight of r_tool in `coupled` and `gdpo`."""
    norm_by_std: bool = True
    """False leaves out the division by the standard deviation (Dr. GRPO)."""
    number_tolerance: NonNegativeFloat = 1e-4
    """Relative tolerance of the rule judge for numbers."""
    llm: LlmJudgeConfig = LlmJudgeConfig()


class LossConfig(_Section):
    """The clipped dual-surrogate loss (ALGORITHM section 4)."""

    w_acc: NonNegativeFloat = 1.0
    """Weight of the accuracy surrogate."""
    w_tool: NonNegativeFloat = 0.15
    """Weight of the tool-efficiency surrogate: the price of an error, in calls. 0 is GRPO."""
    eps_low: Fraction = 0.2
    """Lower clip range."""
    eps_high: NonNegativeFloat = 0.2
    """Upper clip range."""
    dual_clip: Annotated[float, Field(gt=1)] = 3.0
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
    impl: Literal["auto", "triton", "cpu", "reference"] = "auto"
    """Implementation of head and loss (docs/kernels.md)."""
    token_chunk: NonNegative = 0
    """Tokens whose logits exist at once; 0 leaves it to the implementation."""


class OptimConfig(_Section):
    """AdamW, with Muon for matrices where asked for."""

    lr: PositiveFloat = 1e-6
    """Learning rate of AdamW."""
    muon_lr: NonNegativeFloat = 0.0
    """Learning rate of Muon on the matrices of layers and blocks; 0 leaves them to AdamW."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """AdamW's averages."""
    eps: PositiveFloat = 1e-8
    """AdamW's epsilon."""
    weight_decay: NonNegativeFloat = 0.01
    """On matrices only."""
    grad_clip: PositiveFloat = 1.0
    """Largest global gradient norm."""
    warmup_steps: NonNegative = 0
    """Linear warm-up."""
    final_lr: Fraction = 1.0
    """Learning rate at the last step as a share of `lr`, reached linearly after the warm-up; 1 is constant."""


class MegatronConfig(_Section):
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
    """`local`: the run starts its ranks, on this machine or through `workers.launcher`. `join`: they are started elsewhere, by
    `metis-fast rank`."""
    listen: str = "127.0.0.1:0"
    """Address at which ranks find the run; port 0 takes a free one. For `join` one that other machines reach. With Ray: that of
    this machine in the cluster."""
    timeout_s: PositiveFloat = 1800.0
    """Longest silence of a rank or a collective operation before the job ends."""

    @property
    def num_ranks(self) -> int:
        """Processes; one GPU each where there are some."""
        return self.tensor_parallel * self.pipeline_parallel * self.data_parallel


class TrainConfig(_Section):
    """The update."""

    backend: Literal["torch", "megatron"] = "torch"
    """Trainer back end."""
    steps: Positive = 200
    """Rollout steps."""
    prompts_per_mini_batch: Positive = 64
    """Prompts in one optimizer step."""
    tokens_per_micro_batch: Positive = 40960
    """Tokens in one forward and backward pass, whole rollouts. Changes memory and speed, not the gradient."""
    share_packs: bool = True
    """Several prompts in one pass (exact)."""
    share_prompt: bool = True
    """Run a prompt once for all its rollouts in a pass (exact)."""
    share_images: bool = True
    """Run the vision tower once for every distinct image of a pass (exact)."""
    skip_zero_advantage: bool = True
    """Do not run rollouts whose advantages are both exactly 0 (exact; off by itself when entropy or KL need them)."""
    skip_head_rows: bool = True
    """Only tokens with a gradient coefficient reach the LM head (exact)."""
    skip_old_logprobs: bool = True
    """No old-log-prob pass for the first mini-batch of a step, whose old policy is the current one (exact)."""
    attention: Literal["auto", "flash", "triton", "cpu", "reference"] = "auto"
    """Implementation of the prefix-shared attention (docs/kernels.md)."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass (torch back end; for Megatron see `megatron.recompute`)."""
    megatron: MegatronConfig = MegatronConfig()
    optim: OptimConfig = OptimConfig()


class SftPhase(_Section):
    """A stretch of SFT on one set of trajectories."""

    trajectories: Path
    """Folder of stored rollouts (`metis-fast data demo` writes two)."""
    steps: Positive
    """Optimizer steps."""
    abilities: tuple[Ability, ...] = ()
    """Only trajectories of these; none: all. A curriculum: what is hard to learn amid the rest comes first, by itself."""


class SftConfig(_Section):
    """Cold start on played trajectories."""

    phases: tuple[SftPhase, ...] = ()
    """Run one after the other, under one learning-rate schedule."""
    batch_size: Positive = 64
    """Trajectories in a step."""
    tokens_per_micro_batch: Positive = 32768
    """Tokens in one forward and backward pass."""
    optim: OptimConfig = OptimConfig(lr=1e-5)


class CheckpointConfig(_Section):
    """Resume state and exports."""

    every: NonNegative = 10
    """Steps between checkpoints; 0 writes only the last."""
    keep_last: Positive = 2
    """Older ones are deleted; the best one (held-out accuracy, fewer calls on a tie) is kept too."""


class EvalConfig(_Section):
    """Evaluation on the held-out prompts."""

    every: NonNegative = 0
    """Steps between evaluations while training; 0: only before and after."""
    rollouts_per_prompt: Positive = 1
    """Samples of each held-out prompt."""
    temperature: NonNegativeFloat = 1.0
    """Sampling temperature; 0 is greedy."""
    max_prompts: NonNegative = 0
    """Only the first ones; 0: all."""


class LogConfig(_Section):
    """What is written while training."""

    rollouts: bool = True
    """Store every rollout in Parquet."""
    tensorboard: bool = True
    """Write TensorBoard events."""
    progress: bool = True
    """Progress bars (they also go away by themselves where stderr is not a terminal)."""


class DemoConfig(_Section):
    """The demo set and its tiny model (`metis-fast demo`). Everything is made under `run.dir`."""

    model_shape: Path = Path("configs/demo_model.json")
    """Shape of the tiny Qwen3-VL."""
    base_prompts: Positive = 11000
    """Trajectories that teach the skills, direct answers and tools alike."""
    cold_start_prompts: Positive = 3000
    """Trajectories that teach the habit of calling tools for everything, often badly."""
    train_prompts: Positive = 3000
    """Prompts for HDPO."""
    heldout_prompts: Positive = 600
    """Prompts for the evaluation before and after."""
    direct_share: Fraction = 0.5
    """Share of prompts in every ability that can be answered directly, in the cold start, training and held-out sets."""


class Config(_Section):
    """The whole tree. Defaults are the recipe of the Metis paper (ALGORITHM section 5)."""

    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    rollout: RolloutConfig = RolloutConfig()
    tools: ToolsConfig = ToolsConfig()
    workers: WorkersConfig = WorkersConfig()
    sync: SyncConfig = SyncConfig()
    gate: GateConfig = GateConfig()
    score: ScoreConfig = ScoreConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()
    sft: SftConfig = SftConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    log: LogConfig = LogConfig()
    demo: DemoConfig = DemoConfig()

    @model_validator(mode="after")
    def _cross_check(self) -> Self:
        rollout, train = self.rollout, self.train
        if rollout.prompts_per_step % train.prompts_per_mini_batch:
            raise ValueError(
                f"rollout.prompts_per_step={rollout.prompts_per_step} is no multiple of "
                f"train.prompts_per_mini_batch={train.prompts_per_mini_batch}; choose a divisor for the latter"
            )
        if rollout.rollouts_per_prompt == 1:
            raise ValueError("rollout.rollouts_per_prompt=1 gives every advantage 0; use 2 or more (paper: 16)")
        if self.score.w_ans + self.score.w_fmt == 0:
            raise ValueError("score.w_ans and score.w_fmt are both 0, so every reward is; set one of them")
        if self.loss.w_acc == 0 and self.loss.w_tool == 0:
            raise ValueError("loss.w_acc and loss.w_tool are both 0, so nothing is learnt; set one of them")
        if self.loss.normalization == "reference" and self.score.estimator != "hdpo":
            raise ValueError("loss.normalization=reference reproduces HDPO only; set score.estimator=hdpo")
        if rollout.max_prompt_tokens + rollout.max_response_tokens > train.tokens_per_micro_batch:
            raise ValueError(
                f"a rollout may have rollout.max_prompt_tokens + rollout.max_response_tokens = "
                f"{rollout.max_prompt_tokens + rollout.max_response_tokens} tokens, more than "
                f"train.tokens_per_micro_batch={train.tokens_per_micro_batch}; raise the latter or lower one of the former"
            )
        if self.loss.proximal == "engine" and self.loss.tis_cap:
            raise ValueError(
                "loss.tis_cap corrects logp_old to the engine's; with loss.proximal=engine they are the same; set it to 0"
            )
        if rollout.mode != "sync" and self.loss.proximal == "policy" and self.loss.tis_cap == 0:
            raise ValueError(
                f"rollout.mode={rollout.mode} trains on what older weights sampled; set loss.tis_cap (2 is usual), which "
                "corrects it, or loss.proximal=engine"
            )
        if (
            rollout.mode == "sync"
            and rollout.over_provision
            and rollout.slow == "carry"
            and (self.loss.proximal == "policy" and self.loss.tis_cap == 0)
        ):
            raise ValueError(
                "rollout.over_provision with rollout.slow=carry trains on what older weights sampled; set loss.tis_cap (2 is "
                "usual), or rollout.slow=drop"
            )
        if rollout.mode == "sync" and rollout.over_provision and rollout.deterministic:
            raise ValueError(
                "rollout.over_provision takes what finishes first, which no seed decides; set rollout.deterministic=false"
            )
        if rollout.vllm.sleep and (rollout.engine != "vllm" or rollout.mode != "sync" or rollout.over_provision):
            raise ValueError(
                "rollout.vllm.sleep lets engine and trainer take turns; set rollout.engine=vllm, rollout.mode=sync and "
                "rollout.over_provision=0"
            )
        if rollout.engine == "vllm" and self.sync.transport == "ipc" and not rollout.vllm.sleep:
            raise ValueError("sync.transport=ipc is for an engine that shares the trainer's GPU; set rollout.vllm.sleep=true")
        if (
            rollout.engine == "vllm"
            and self.sync.transport == "ipc"
            and rollout.vllm.replicas * rollout.vllm.tensor_parallel > 1
        ):
            raise ValueError(
                "sync.transport=ipc reaches an engine on the run's own GPU only, got "
                f"rollout.vllm.replicas={rollout.vllm.replicas}, tensor_parallel={rollout.vllm.tensor_parallel}; "
                "set both to 1, or sync.transport=staged"
            )
        if rollout.vllm.sleep and self.sync.transport == "nccl":
            raise ValueError(
                "rollout.vllm.sleep is for an engine that shares the trainer's GPU, and NCCL does not send within one; set "
                "sync.transport=staged, or rollout.vllm.sleep=false and give the engine GPUs of its own"
            )
        if self.sync.mode == "delta" and self.sync.transport != "staged":
            raise ValueError(f"sync.mode=delta needs sync.transport=staged, got {self.sync.transport}")
        if rollout.max_turn_tokens > rollout.max_response_tokens:
            raise ValueError("rollout.max_turn_tokens is larger than rollout.max_response_tokens; lower it or set 0")
        if rollout.top_p < 1 or rollout.top_k:
            raise ValueError(
                "rollout.top_p < 1 or rollout.top_k > 0 samples from another distribution than the log-probs that the loss "
                "compares are of, which no importance weight corrects; set both off"
            )
        if max(*train.optim.betas, *self.sft.optim.betas) >= 1:
            raise ValueError("optim.betas must be below 1; the usual values are [0.9, 0.999]")
        return self


def _leaf_paths(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, info in model.model_fields.items():
        nested = info.annotation
        if isinstance(nested, type) and issubclass(nested, BaseModel):
            yield prefix + name
            yield from _leaf_paths(nested, f"{prefix}{name}.")
        else:
            yield prefix + name


def known_keys() -> tuple[str, ...]:
    """Every dotted key of the tree, sections included."""
    return tuple(_leaf_paths(Config))


def _nearest(path: str) -> str:
    keys = known_keys()
    leaf = path.rsplit(".", 1)[-1]
    close = [key for key in keys if "." in key and key.rsplit(".", 1)[-1] == leaf]  # a right leaf in a wrong section
    close = close or difflib.get_close_matches(path, keys, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; sections are {', '.join(Config.model_fields)}"


def merge(low: dict[str, Any], high: dict[str, Any]) -> dict[str, Any]:
    """`low` with what `high` says; sections are merged, values replaced."""
    out = dict(low)
    for key, value in high.items():
        old = out.get(key)
        out[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return out


def _read_tree(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    if path.resolve() in seen:
        raise ConfigError(f"{path}: `base:` leads back to this file; remove one of the links")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read config {path}: {error.strerror}; give the path of a YAML file") from None
    try:
        tree = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
    tree = {} if tree is None else tree
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: expected sections like `loss:`, got a {type(tree).__name__}")
    base = tree.pop("base", None)
    if base is None:
        return tree
    if not isinstance(base, str):
        raise ConfigError(f"{path}: `base` must be the path of another config, got {base!r}")
    return merge(_read_tree(path.parent / base, (*seen, path.resolve())), tree)


def _override_tree(override: str) -> dict[str, Any]:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"override {override!r}: expected section.key=value, for example loss.w_tool=0.2")
    try:
        value = yaml.safe_load(text) if text else ""
    except yaml.YAMLError:
        value = text
    tree: dict[str, Any] = {}
    node = tree
    *parents, leaf = key.strip().split(".")
    for part in parents:
        node = node.setdefault(part, {})
    node[leaf] = value
    return tree


def _explain(error: ValidationError, source: str) -> ConfigError:
    lines = []
    for item in error.errors():
        path = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            lines.append(f"unknown key {path!r}{_nearest(path)}")
        elif item["type"] == "value_error":
            lines.append(str(item.get("ctx", {}).get("error", item["msg"])))
        else:
            lines.append(f"{path}: {item['msg'][0].lower()}{item['msg'][1:]}, got {item['input']!r}")
    return ConfigError(f"{source}: " + "; ".join(lines))


def build(tree: dict[str, Any], source: str = "config") -> Config:
    """Check a tree of plain values.

    Raises:
        ConfigError: unknown key (the nearest known one is named), wrong type, or a combination that cannot work.
    """
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise _explain(error, source) from None


def load(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a config file (None: the defaults), apply `section.key=value` overrides, check everything once.

    Raises:
        ConfigError: see `build`; also an unreadable file or a malformed override.
    """
    tree = _read_tree(path) if path is not None else {}
    for override in overrides:
        tree = merge(tree, _override_tree(override))
    return build(tree, str(path) if path is not None else "config")


def to_yaml(config: Config, only_changes: bool = False) -> str:
    """The config as YAML; `only_changes` leaves out what equals the defaults."""
    tree = config.model_dump(mode="json", exclude_defaults=only_changes)
    return yaml.safe_dump(tree, sort_keys=False, default_flow_style=None, allow_unicode=True, width=110)
