"""What the job talks to: tools, judges, Ray. With `offline` nothing outside of this machine is asked."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path

from metis_fast.config import Config, TextSearchConfig
from metis_fast.config.cold_start import training_config
from metis_fast.doctor.finding import Finding
from metis_fast.errors import ConfigError, InfrastructureError, JudgeError, ToolSetupError, one_line
from metis_fast.own_folder import OwnFolder
from metis_fast.recording.opening import open_recording
from metis_fast.recording.tools import ReplayingToolbox
from metis_fast.run.room import ranks_by_ray
from metis_fast.score.judge import open_judge
from metis_fast.tools import open_toolbox, other_tools
from metis_fast.tools.protocol import Toolbox, ToolSpec
from metis_fast.tools.results import PythonResult, TextSearchResult, ToolResult
from metis_fast.tools.search.web import WebText
from metis_fast.tools.server.client import ServerToolbox
from metis_fast.tools.server.link import ServerAddress
from metis_fast.tools.toolbox import LocalToolbox
from metis_fast.types import Observation, ToolName

_QUERY = "capital of France"
_JUDGE_S = 30.0  # for the only try


def tool(config: Config, name: ToolName, offline: bool) -> Iterator[Finding]:
    """It is opened as the job opens it; then a line of Python is run, or something is searched for."""
    what, alone = str(name), config.tools.model_copy(update={"enabled": (name,), "own": (), "mcp": ()})
    if config.tools.replay is not None:
        yield _replayed(config, what)
        return
    with ExitStack() as stack:
        scratch = OwnFolder(Path(tempfile.gettempdir()), "metis-tools-")
        stack.callback(scratch.close)
        toolbox = open_toolbox(alone, scratch.path)
        stack.callback(toolbox.close)
        if name is ToolName.PYTHON:
            python = toolbox.python if isinstance(toolbox, LocalToolbox) else None
            layers = str(python.layers) if python is not None else ""
            yield _python(what, asyncio.run(_call(toolbox, name, {"code": "print(6 * 7)"})), config, layers)
        elif name is ToolName.TEXT_SEARCH and (not offline or config.tools.text_search.provider == "local"):
            web = config.tools.text_search.provider != "local"
            yield _web_search(what, config.tools.text_search) if web else _search(what, toolbox)
        else:
            yield Finding(what, "ok", "opens; nothing was asked of it")


def others(config: Config) -> Iterator[Finding]:
    """Tools of one's own and of MCP servers: they are opened, and nothing is asked of them."""
    if config.tools.replay is not None:
        return
    for key in ("own", "mcp"):
        for place in getattr(config.tools, key):
            alone = config.tools.model_copy(update={"own": (), "mcp": (), key: (place,)})
            try:
                names = ", ".join(tool.name for tool in other_tools(alone))
            except ToolSetupError as error:
                yield Finding(f"tools.{key}", "error", one_line(error), "see docs/own-tools.md")
                continue
            yield Finding(f"tools.{key}", "ok", f"opens: {names}; nothing was asked of it")


def server(config: Config, offline: bool) -> Iterator[Finding]:
    """The tool server that has the run's tools: it is asked for them, as the job asks it at its start; no call is made."""
    what, ours = "tools.server", config.tools.server
    if config.workers.tools:
        yield Finding(
            what, "error", f"workers.tools={config.workers.tools} and tools.server.url both run the tools", "choose one"
        )
    if offline:
        yield Finding(what, "ok", f"{ServerAddress(ours)} was not asked")
        return
    with closing(ServerToolbox(config.tools)) as toolbox:
        names = ", ".join(toolbox.names)
        yield Finding(what, "ok", f"{toolbox.address} has the tools of these settings: {names}; none of them was called")
    if ours.token_env and not os.environ.get(ours.token_env):
        yield Finding(what, "ok", f"{ours.token_env} is not set: requests go without a token")


def described(config: Config, offline: bool) -> Sequence[ToolSpec]:
    """The tools that prompts of the job tell of, from where it has them; none where that cannot be asked.

    Raises:
        ToolSetupError, RecordingError: they cannot be opened.
    """
    recording = open_recording(config) if config.tools.replay is not None else None
    if recording is not None:
        with closing(recording):
            return ReplayingToolbox(config.tools, recording).tools
    if not config.tools.server.url:
        return other_tools(config.tools)
    if offline:
        return ()
    with closing(ServerToolbox(config.tools)) as toolbox:
        return toolbox.tools


def _replayed(config: Config, what: str) -> Finding:
    """Of a tool that a recording answers for: nothing else is needed for it."""
    recording = open_recording(config)
    assert recording is not None
    with closing(recording):
        if what in ReplayingToolbox(config.tools, recording).names:
            return Finding(what, "ok", f"answers from {recording.path} (tools.replay)")
    return Finding(
        what, "warning", f"was not recorded in {recording.path}", "remove it from tools.enabled, or record a run that has it"
    )


async def _call(toolbox: Toolbox, name: ToolName, arguments: dict[str, object]) -> ToolResult | Observation:
    session = toolbox.session(())
    try:
        return await session.call(name, arguments)
    finally:
        await session.close()


def _python(what: str, result: ToolResult | Observation, config: Config, layers: str) -> Finding:
    if not (isinstance(result, PythonResult) and result.ok and result.stdout.strip() == "42"):
        return Finding(
            what, "error", f"6 * 7 gave {one_line(result)[:200]}", "see docs/tools.md, and that numpy can be imported"
        )
    if config.tools.python.unsafe:
        return Finding(
            what, "warning", "runs code without a sandbox (tools.python.unsafe)", "only on machines that you can throw away"
        )
    return Finding(what, "ok", f"runs code in its sandbox ({layers})")


def _search(what: str, toolbox: Toolbox) -> Finding:
    try:
        result = asyncio.run(_call(toolbox, ToolName.TEXT_SEARCH, {"query": _QUERY}))
    except InfrastructureError as error:
        return Finding(what, "error", one_line(error), "see key, address and the provider's status (docs/web-search.md)")
    assert isinstance(result, TextSearchResult)
    return Finding(what, "ok", f"answers: {len(result.pages)} pages for {_QUERY!r}")


def _web_search(what: str, config: TextSearchConfig) -> Finding:
    """The provider is asked, whatever the caches have."""
    source = WebText(config)
    try:
        asyncio.run(source.check())
    except ToolSetupError as error:
        return Finding(what, "error", one_line(error), "see key, address and the provider's status (docs/web-search.md)")
    finally:
        source.close()
    if config.offline:
        return Finding(what, "ok", "opens; it answers from its caches alone (tools.text_search.offline)")
    return Finding(what, "ok", f"{config.provider} answers with pages")


def judges(config: Config, styles: Collection[str], offline: bool) -> Iterator[Finding]:
    """Those of the data's styles are opened; one that asks a model is asked for a right and for a wrong verdict."""
    if config.tools.replay is not None:
        yield Finding("judges", "ok", f"answer from {config.tools.replay} (tools.replay)")
        return
    if config.score.judge != "by_row":
        styles = {config.score.judge}
    llm = config.score.llm  # a minute is too short for all the tries that a run makes
    once = llm.model_copy(update={"timeout_s": min(llm.timeout_s, _JUDGE_S), "retries": 0})
    asked = config.score.model_copy(update={"llm": once})
    for style in sorted(styles):
        judge = open_judge(asked, [style])
        try:
            if not offline:
                asyncio.run(judge.check())
        except JudgeError as error:
            found, _, advice = str(error).rpartition("; ")
            yield Finding(f"judge {style}", "error", found or advice, advice if found else "")
            continue
        finally:
            judge.close()
        yield Finding(f"judge {style}", "ok", "opens; it was not asked" if offline else "opens and judges")
    for key in config.score.llm.key_names() if "llm" in styles else ():
        if os.environ.get(key):
            continue
        yield Finding("judge key", "ok", f"{key} is not set: requests go without a key")


def ray(config: Config) -> Iterator[Finding]:
    """What the cluster has, beside what the job reserves."""
    try:
        from metis_fast.cluster import room
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise ConfigError(
            "workers.launcher=ray needs Ray; in the project's folder: pip install -e '.[ray]', or set workers.launcher=local"
        ) from None
    plays = bool(config.data.train)  # a cold start alone has ranks only
    ranks = ranks_by_ray(config if plays else training_config(config, config.run.dir))
    machines = room.survey(config.workers)
    if machines is None:
        yield Finding(
            "cluster", "warning", "no Ray cluster runs here: the job would make this machine one",
            "on a cluster start Ray first, as configs/launch/ray.sbatch does",
        )  # fmt: skip
        return
    has = Counter[str]()
    for machine in machines:
        has.update({name: int(number) for name, number in machine.items() if name in ("CPU", "GPU")})
    bundles = room.plan(config, ranks, on_gpus=has["GPU"] > 0, plays=plays)
    need = {"CPU": sum(bundle.cpus for bundle in bundles), "GPU": sum(bundle.gpus for bundle in bundles)}
    short = [f"{number} {name}s of {has[name]}" for name, number in need.items() if number > has[name]]
    yield Finding(
        "cluster",
        "error" if short else "ok",
        f"{len(machines)} machines with {has['CPU']} CPU slots and {has['GPU']} GPUs; the job reserves {need['CPU']} and "
        f"{need['GPU']}",
        "add machines, or ask for less (workers, rollout.vllm, train.megatron)" if short else "",
    )
    largest = max(bundles, key=lambda bundle: (bundle.gpus, bundle.cpus), default=None)
    if largest is not None and not any(m.get("CPU", 0) >= largest.cpus and m.get("GPU", 0) >= largest.gpus for m in machines):
        yield Finding(
            "cluster", "error", f"no machine has the {largest.cpus} CPU slots and {largest.gpus} GPUs that a node takes",
            "raise workers.nodes, so that each has less",
        )  # fmt: skip
    if plays and len(machines) < config.workers.nodes:
        yield Finding("cluster", "warning", f"workers.nodes={config.workers.nodes} share {len(machines)} machines", "lower it")
