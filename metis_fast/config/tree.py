"""The whole tree, what has to fit across its sections, and its keys."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Self

from pydantic import model_validator

from metis_fast.config.benchmark import BenchmarkConfig
from metis_fast.config.checkpoint import CheckpointConfig
from metis_fast.config.data import DataConfig
from metis_fast.config.demo import DemoConfig
from metis_fast.config.eval import EvalConfig
from metis_fast.config.gate import GateConfig
from metis_fast.config.log import LogConfig
from metis_fast.config.loss import LossConfig
from metis_fast.config.model import ModelConfig
from metis_fast.config.rollout import RolloutConfig
from metis_fast.config.run import RunConfig
from metis_fast.config.score import ScoreConfig
from metis_fast.config.section import BY_CONTENT, MAY_CHANGE, Section
from metis_fast.config.serve import ServeConfig
from metis_fast.config.sft import SftConfig
from metis_fast.config.sync import SyncConfig
from metis_fast.config.tools import ToolsConfig
from metis_fast.config.train import TrainConfig
from metis_fast.config.workers import WorkersConfig


class Config(Section):
    """The whole tree. Defaults are the recipe of the Metis paper (ALGORITHM section 5)."""

    run: RunConfig = RunConfig()
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    rollout: RolloutConfig = RolloutConfig()
    tools: ToolsConfig = ToolsConfig()
    workers: Annotated[WorkersConfig, MAY_CHANGE] = WorkersConfig()
    sync: Annotated[SyncConfig, MAY_CHANGE] = SyncConfig()
    gate: Annotated[GateConfig, MAY_CHANGE] = GateConfig()
    score: ScoreConfig = ScoreConfig()
    loss: LossConfig = LossConfig()
    train: TrainConfig = TrainConfig()
    sft: SftConfig = SftConfig()
    checkpoint: Annotated[CheckpointConfig, MAY_CHANGE] = CheckpointConfig()
    eval: EvalConfig = EvalConfig()
    benchmark: Annotated[BenchmarkConfig, MAY_CHANGE] = BenchmarkConfig()
    serve: Annotated[ServeConfig, MAY_CHANGE] = ServeConfig()
    log: Annotated[LogConfig, MAY_CHANGE] = LogConfig()
    demo: DemoConfig = DemoConfig()

    def key_names(self) -> frozenset[str]:
        """Environment variables that hold keys and tokens: they are for the processes that need them, and no other."""
        servers = self.tools.mcp
        names = {*self.tools.text_search.variables(), *self.score.llm.key_names(), *(one.token_env for one in servers)}
        names |= {self.tools.server.token_env, self.tools.serve.token_env, self.serve.token_env}
        # a server may be given $PATH, too
        names |= {name for one in servers for name in one.variables() if re.search("KEY|TOKEN|SECRET|PASS|CREDENTIAL", name)}
        return frozenset(names - {""})

    @model_validator(mode="after")
    def _sizes_fit(self) -> Self:
        rollout, train = self.rollout, self.train
        if rollout.prompts_per_step % train.prompts_per_mini_batch:
            raise ValueError(
                f"rollout.prompts_per_step={rollout.prompts_per_step} is no multiple of "
                f"train.prompts_per_mini_batch={train.prompts_per_mini_batch}; choose a divisor for the latter"
            )
        longest = rollout.max_prompt_tokens + rollout.max_response_tokens
        if longest > train.tokens_per_micro_batch:
            raise ValueError(
                f"a rollout may have rollout.max_prompt_tokens + rollout.max_response_tokens = {longest} tokens, more than "
                f"train.tokens_per_micro_batch={train.tokens_per_micro_batch}; raise the latter or lower one of the former"
            )
        return self

    @model_validator(mode="after")
    def _loss_fits_what_was_sampled(self) -> Self:
        rollout, loss = self.rollout, self.loss
        if loss.normalization == "reference" and self.score.estimator != "hdpo":
            raise ValueError("loss.normalization=reference reproduces HDPO only; set score.estimator=hdpo")
        if loss.proximal == "engine" or loss.tis_cap:  # both correct for older weights
            return self
        if rollout.mode != "sync":
            raise ValueError(
                f"rollout.mode={rollout.mode} trains on what older weights sampled; set loss.tis_cap (2 is usual), which "
                "corrects it, or loss.proximal=engine"
            )
        if rollout.over_provision and rollout.slow == "carry":
            raise ValueError(
                "rollout.over_provision with rollout.slow=carry trains on what older weights sampled; set loss.tis_cap (2 is "
                "usual), or rollout.slow=drop"
            )
        return self

    @model_validator(mode="after")
    def _benchmarks_have_files(self) -> Self:
        for name in self.eval.benchmarks:
            if name not in self.benchmark.files:
                known = ", ".join(self.benchmark.files) or "none"
                raise ValueError(f"eval.benchmarks names {name!r}, but benchmark.files has {known}; add its file there")
        return self

    @model_validator(mode="after")
    def _every_node_has_an_engine(self) -> Self:
        nodes, engines = self.workers.nodes, self.rollout.vllm.replicas
        if self.rollout.engine == "vllm" and nodes > engines:
            raise ValueError(
                f"workers.nodes={nodes} need an engine each, but rollout.vllm.replicas={engines}; lower the one or raise the "
                "other"
            )
        return self

    @model_validator(mode="after")
    def _weights_reach_the_engines(self) -> Self:
        vllm, transport = self.rollout.vllm, self.sync.transport
        if vllm.sleep and transport == "nccl":
            raise ValueError(
                "rollout.vllm.sleep is for an engine that shares the trainer's GPU, and NCCL does not send within one; set "
                "sync.transport=staged, or rollout.vllm.sleep=false and give the engine GPUs of its own"
            )
        if self.rollout.engine != "vllm" or transport != "ipc":
            return self
        if not vllm.sleep:
            raise ValueError("sync.transport=ipc is for an engine that shares the trainer's GPU; set rollout.vllm.sleep=true")
        if vllm.replicas * vllm.tensor_parallel > 1:
            raise ValueError(
                "sync.transport=ipc reaches an engine on the run's own GPU only, got "
                f"rollout.vllm.replicas={vllm.replicas}, tensor_parallel={vllm.tensor_parallel}; "
                "set both to 1, or sync.transport=staged"
            )
        return self


def deciding(section: Section) -> dict[str, Any]:
    """The settings that decide a run's result, as plain values: all but those that are marked `MAY_CHANGE`, and the paths of
    files that are known by what is in them (`by_content`)."""
    tree = section.model_dump(mode="json")
    for name, info in type(section).model_fields.items():
        value = getattr(section, name)
        if MAY_CHANGE in info.metadata or BY_CONTENT in info.metadata:
            del tree[name]
        elif isinstance(value, Section):
            tree[name] = deciding(value)
        elif isinstance(value, tuple) and any(isinstance(part, Section) for part in value):
            tree[name] = [deciding(part) for part in value]
    return tree


def by_content(section: Section, prefix: str = "") -> Iterator[tuple[str, Path | None]]:
    """Dotted key and path (None: not set) of every file or folder whose content decides a result, but for lists of them. Keys
    in lists of sections have a number."""
    for name, info in type(section).model_fields.items():
        value = getattr(section, name)
        if BY_CONTENT in info.metadata and not isinstance(value, tuple):
            yield prefix + name, value
        parts = value if isinstance(value, tuple) else (value,)
        for number, part in enumerate(parts):
            if isinstance(part, Section):
                yield from by_content(part, f"{prefix}{name}.{number}." if isinstance(value, tuple) else f"{prefix}{name}.")


def settings(model: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, type[Section] | None]]:
    """Every dotted key in the tree's order; with a section its class, and its keys behind it."""
    for name, info in model.model_fields.items():
        kind = info.annotation
        section = kind if isinstance(kind, type) and issubclass(kind, Section) else None
        yield prefix + name, section
        if section is not None:
            yield from settings(section, f"{prefix}{name}.")


def known_keys() -> tuple[str, ...]:
    """Every dotted key of the tree, sections included."""
    return tuple(key for key, _ in settings())
