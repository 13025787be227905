"""Opens a node from its settings: its workers, judge, tools and engine, one choice for each."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Coroutine, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from metis_fast.config import Config
from metis_fast.data.cursor import decode_all
from metis_fast.data.parquet import PromptFiles
from metis_fast.errors import ConfigError, ToolSetupError
from metis_fast.machine import memory_bytes
from metis_fast.model import Policy
from metis_fast.model_folder import read_config
from metis_fast.node.node import Keep, Node
from metis_fast.own_folder import OwnFolder
from metis_fast.recording.file import Recording
from metis_fast.recording.opening import open_recording, recorded_judge, recorded_toolbox
from metis_fast.rollout.chat import Chat
from metis_fast.rollout.engine import RunEngine
from metis_fast.rollout.native import NativeEngine, check_room
from metis_fast.rollout.offer import Offer
from metis_fast.rollout.protocols import open_dialect
from metis_fast.rollout.vllm.engine import VllmEngine
from metis_fast.score.judge import StyleJudge, open_judge
from metis_fast.score.remote import RemoteJudge, start_judge_workers
from metis_fast.summary import Data
from metis_fast.tools import open_toolbox
from metis_fast.tools.protocol import Toolbox
from metis_fast.tools.remote import RemoteToolbox, start_tool_workers
from metis_fast.tools.server.client import ServerToolbox
from metis_fast.workers.hub import Hub
from metis_fast.workers.launch import LocalLauncher
from metis_fast.workers.worker import WorkerError, wait_ready


@dataclass(frozen=True, slots=True)
class Host:
    """What a node runs on.

    gpus: ids for its engines, as CUDA_VISIBLE_DEVICES takes them. device: of a native engine. alone: whether nothing else runs
    on the model while it samples. check: called while something is waited for; what it raises goes on. run: runs a coroutine on
    the loop on which the node will be used.
    """

    gpus: Sequence[str]
    device: torch.device
    alone: bool
    check: Callable[[], None]
    run: Callable[[Coroutine[Any, Any, None]], None]


def share(total: int, nodes: int, i: int) -> int:
    """Of so many engines, tools or judges, those of node i."""
    return total // nodes + (i < total % nodes)


def share_of(config: Config, number: int) -> Config:
    """A node's settings: its share of engines, tools, judges and of what runs at once."""
    nodes = config.workers.nodes

    def own(total: int) -> int:
        return share(total, nodes, number)

    vllm = config.rollout.vllm.model_copy(update={"replicas": own(config.rollout.vllm.replicas)})
    rollout = config.rollout.model_copy(update={"vllm": vllm, "max_concurrent": max(1, own(config.rollout.max_concurrent))})
    workers = config.workers.model_copy(update={"tools": own(config.workers.tools), "judges": own(config.workers.judges)})
    return config.model_copy(update={"rollout": rollout, "workers": workers})


def needs_hub(config: Config) -> bool:
    """Whether a node of these settings has workers."""
    asks = config.tools.replay is None  # a replay has neither tools nor judges
    return config.rollout.engine == "vllm" or (asks and config.workers.tools + config.workers.judges > 0)


def _open_judge(config: Config, styles: Collection[str], hub: Hub | None) -> StyleJudge | RemoteJudge:
    if config.workers.judges == 0:
        return open_judge(config.score, styles)
    assert hub is not None
    return RemoteJudge(config.score, start_judge_workers(hub, config.score, styles, config.workers.judges))


def _open_toolbox(config: Config, scratch: Path, hub: Hub | None, host: Host) -> Toolbox:
    if config.tools.server.url:
        if config.workers.tools:
            raise ConfigError(f"workers.tools={config.workers.tools} and tools.server.url both run the tools; choose one")
        return ServerToolbox(config.tools)
    if config.workers.tools == 0:
        return open_toolbox(config.tools, scratch)
    assert hub is not None
    workers = start_tool_workers(hub, config.tools, config.workers.tools, scratch)
    try:
        wait_ready(workers, host.check)
        toolbox = RemoteToolbox(config.tools, workers)
        if config.tools.own or config.tools.mcp:
            host.run(toolbox.learn())
    except WorkerError as error:
        raise ToolSetupError(str(error)) from None
    return toolbox


@dataclass(frozen=True, slots=True)
class Agent:
    """What plays an episode. policy: the model that the engine samples with, or whose tokens and shapes it has."""

    policy: Policy
    chat: Chat
    engine: RunEngine
    toolbox: Toolbox


@dataclass(frozen=True, slots=True)
class _Base:
    """What tools, judge and engine of a node stand on. scratch: folder for tools."""

    scratch: Path
    hub: Hub | None
    recording: Recording | None


def _open_base(config: Config, host: Host, logs: Path, stack: ExitStack) -> _Base:
    scratch = OwnFolder(Path(tempfile.gettempdir()), "metis-tools-")
    stack.callback(scratch.close)
    hub = None
    if needs_hub(config):
        launcher = LocalLauncher(logs, host.gpus, withheld=config.key_names())
        stack.callback(launcher.close)
        hub = stack.enter_context(Hub(config.workers, launcher))
    recording = open_recording(config)
    if recording is not None:
        stack.callback(recording.close)
    return _Base(scratch.path, hub, recording)


def _open_tools(config: Config, base: _Base, host: Host, stack: ExitStack) -> Toolbox:
    toolbox = recorded_toolbox(config, base.recording, lambda: _open_toolbox(config, base.scratch, base.hub, host))
    stack.callback(toolbox.close)
    return toolbox


def _open_agent(
    config: Config, base: _Base, host: Host, policy: Callable[[], Policy], toolbox: Toolbox, stack: ExitStack
) -> Agent:
    native = config.rollout.engine == "native"
    if native:
        cuda = host.device.type == "cuda"
        memory = torch.cuda.get_device_properties(host.device).total_memory if cuda else memory_bytes()
        check_room(
            config.rollout, read_config(config.model.path), 4 if config.model.dtype == "float32" else 2, memory
        )  # fmt: skip
    sampler = policy()
    if native:
        engine: RunEngine = NativeEngine(sampler, config.rollout.deterministic and host.alone)
    else:
        assert base.hub is not None
        engine = VllmEngine(config, sampler, base.hub)
    stack.callback(engine.close)
    chat = Chat(sampler.tokenizer, sampler.images, open_dialect(config), Offer(config.tools, toolbox.tools))
    return Agent(sampler, chat, engine, toolbox)


@contextmanager
def open_agent(config: Config, host: Host, policy: Callable[[], Policy], logs: Path) -> Iterator[Agent]:
    """Open what plays episodes, without prompts and judge, and close it in reverse order. Its engine may still be starting
    (`RunEngine.wait`).

    Raises:
        ConfigError, ModelError, ToolSetupError, RecordingError: whatever cannot work is found here, before an episode.
    """
    with ExitStack() as stack:
        base = _open_base(config, host, logs, stack)
        yield _open_agent(config, base, host, policy, _open_tools(config, base, host, stack), stack)


@contextmanager
def open_node(
    number: int,
    config: Config,
    files: Mapping[Data, PromptFiles],
    styles: Collection[str],
    host: Host,
    policy: Callable[[], Policy],
    keep: Keep,
    logs: Path,
    room: float,
) -> Iterator[Node]:
    """Open everything that a node needs, cheapest checks first, and close it in reverse order. Its engine may still be starting
    (`Node.wait`).

    config: the node's share of the run's (`share_of`). styles: of judges. policy: gives the model that the node samples with,
    or whose tokens and shapes its engines have. logs: folder for the output of workers.

    Raises:
        ConfigError, DataError, ModelError, ToolSetupError, JudgeError, RecordingError: whatever cannot work is found here,
            before a rollout.
    """
    with ExitStack() as stack:
        base = _open_base(config, host, logs, stack)
        judge = recorded_judge(config, base.recording, lambda: _open_judge(config, styles, base.hub))
        stack.callback(judge.close)
        toolbox = _open_tools(config, base, host, stack)
        host.run(judge.check())
        agent = _open_agent(config, base, host, policy, toolbox, stack)
        # a model that reads text only says so of the first image that it meets; none is a bad one for that
        images = agent.policy.images
        check = images.broken if agent.policy.reads_images else decode_all
        yield Node(number, config, agent.chat, agent.engine, toolbox, judge, files, check, keep, room)
