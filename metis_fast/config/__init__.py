"""Configuration: a small tree of frozen typed classes, a file for each section.

A YAML file holds only what differs from the defaults here (the paper's recipe); `base: other.yaml` starts from another file;
`section.key=value` on the command line overrides both (`reading.py`). Unknown keys are refused with the nearest known one
(`load.py`); what concerns one section is checked there, what concerns several in `Config` (`tree.py`).
"""

from metis_fast.config.benchmark import BenchmarkConfig
from metis_fast.config.demo import DemoConfig
from metis_fast.config.load import build, load, to_yaml
from metis_fast.config.log import LogConfig
from metis_fast.config.loss import LossConfig
from metis_fast.config.model import ModelConfig
from metis_fast.config.reading import merge
from metis_fast.config.rollout import RolloutConfig
from metis_fast.config.score import LlmJudgeConfig, ScoreConfig
from metis_fast.config.serve import ServeConfig
from metis_fast.config.sft import SftPhase
from metis_fast.config.sync import SyncConfig
from metis_fast.config.tool_server import ToolServeConfig, ToolServerConfig
from metis_fast.config.tools import (
    CallSyntax,
    HttpSearchConfig,
    ImageSearchConfig,
    McpServerConfig,
    PythonToolConfig,
    TextSearchConfig,
    ToolsConfig,
)
from metis_fast.config.train import MegatronConfig, OptimConfig
from metis_fast.config.tree import Config, by_content, deciding, known_keys
from metis_fast.config.workers import WorkersConfig

__all__ = [
    "BenchmarkConfig",
    "CallSyntax",
    "Config",
    "DemoConfig",
    "HttpSearchConfig",
    "ImageSearchConfig",
    "LlmJudgeConfig",
    "LogConfig",
    "LossConfig",
    "McpServerConfig",
    "MegatronConfig",
    "ModelConfig",
    "OptimConfig",
    "PythonToolConfig",
    "RolloutConfig",
    "ScoreConfig",
    "ServeConfig",
    "SftPhase",
    "SyncConfig",
    "TextSearchConfig",
    "ToolServeConfig",
    "ToolServerConfig",
    "ToolsConfig",
    "WorkersConfig",
    "build",
    "by_content",
    "deciding",
    "known_keys",
    "load",
    "merge",
    "to_yaml",
]
