"""What the machines around the GPUs need in a step: CPU seconds and memory, part by part. All of it is predicted:
docs/plan.md has the formulas.

Nodes play, judge and keep groups, each its share, on their machines. The run, on the first machine, knows summaries alone.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields

from metis_fast.data.parquet import CACHE_BYTES
from metis_fast.plan.candidates import Candidate
from metis_fast.plan.duration import Setting
from metis_fast.plan.gpus import GIB, NODE
from metis_fast.plan.host_load import ASSUMED, HostCosts, HostOptions, Load, Role, load, roles
from metis_fast.plan.memory import ELEMENT
from metis_fast.rollout.schedule import Rules

_VERSIONS = 2
"""Of the weights, in shared memory and in Ray's: the one that is loaded, and the one before or after it."""
_AHEAD_BYTES = 1 << 30  # of a node: images of prompts that it has looked at and not played (`metis_fast.node.node`)
_STORE_SHARE, _STORE_BYTES = 0.3, 200e9  # of a machine's memory, that Ray's store has unless it is told otherwise, and at most


@dataclass(frozen=True, slots=True)
class HostSeconds:
    """CPU seconds of a machine in a step. episodes are of one thread a node. run: what summaries of all rollouts cost it.
    sending: weights from ranks to the run, or through Ray's store to every machine with engines; staging: all else of them.
    driving: processes that wait for their GPU without sleeping."""

    images: float
    episodes: float
    tools: float
    judging: float
    run: float
    staging: float
    sending: float
    driving: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(getattr(self, part.name) for part in fields(self))


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Bytes of a machine. groups: kept by nodes in the run's process until they are trained; store: Ray's, with the groups of
    other nodes, and weights. rank_groups: those that ranks are given of a step. summaries: what the run knows of all groups.
    pictures: decoded, of nodes and the first stage. engine_images: encoded, and as patches. models: copies on the CPU that run
    and nodes take tokens and shapes from. weights: versions in shared memory. data: decoded rows, and images of prompts that
    are not played yet. processes: before they hold anything."""

    groups: float
    store: float
    rank_groups: float
    summaries: float
    pictures: float
    engine_images: float
    models: float
    weights: float
    data: float
    processes: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(getattr(self, part.name) for part in fields(self))


@dataclass(frozen=True, slots=True)
class Machine:
    """What `count` machines of a kind need each, the worst of them. nodes: on it. cores: on average over a step."""

    name: str
    count: int
    nodes: int
    seconds: HostSeconds
    cores: float
    memory: HostMemory


@dataclass(frozen=True, slots=True)
class Host:
    """The machines of a layout whose step takes `step_s`."""

    layout: Candidate
    step_s: float
    options: HostOptions
    costs: HostCosts
    machines: tuple[Machine, ...]
    warnings: tuple[str, ...]


def host(setting: Setting, one: Candidate, options: HostOptions, costs: HostCosts | None = None) -> Host:
    """Of a layout's machines.

    Raises:
        ConfigError: an option is out of its range.
    """
    options.check(setting.config.rollout)
    costs = costs or HostCosts()
    places = roles(setting, one.layout)
    work = load(setting, one.layout, options.calls, places)
    step_s = one.seconds.total
    machines: list[Machine] = []
    for role in places:
        seconds = _seconds(setting, work, options, costs, role, step_s)
        memory = _memory(setting, work, options, costs, role)
        machines.append(Machine(role.name, role.count, role.nodes, seconds, seconds.total / step_s, memory))
    advice = _Advice(setting, one, work, costs)
    warnings = _warnings(advice, list(zip(places, machines, strict=True)), options, step_s)
    return Host(one, step_s, options, costs, tuple(machines), tuple(warnings))


# -- CPU seconds ------------------------------------------------------------------------------------------------------------


def _weight_bytes(setting: Setting) -> float:
    """Of a version that is staged."""
    staged = setting.config.sync.transport == "staged"
    return float(setting.shape.num_parameters * ELEMENT[setting.config.model.dtype]) if staged else 0.0


def _delta(setting: Setting, work: Load) -> bool:
    """Whether machines pull changes; where nothing is pulled there are none."""
    return work.by_ray and setting.config.sync.mode == "delta"


def _images(setting: Setting, work: Load, options: HostOptions, costs: HostCosts, role: Role) -> float:
    """Milliseconds. An image is prepared by the node that looks at it, by the engine of its rollouts, and by ranks with a
    tower whose passes it is in."""
    prepared = options.image_megapixels * (costs.decode_ms + costs.resize_ms)
    patches = setting.load.image_tokens * costs.patch_ms
    node = work.images * (2 * prepared + patches) + work.crops * (costs.crop_ms + costs.crop_engine_ms)
    crops = work.crops * work.live / work.replicas  # each is of one rollout, and that of one pass
    rank = work.images * work.fetched(1) * prepared + crops * costs.crop_ms
    return work.share(role) * node + role.first_stage * rank


def _tools(setting: Setting, work: Load, options: HostOptions, costs: HostCosts) -> float:
    """Milliseconds, on all machines. A session opens the prompt's images."""
    opened = setting.load.images * options.image_megapixels * costs.decode_ms
    sessions = min(work.rollouts, work.python_calls) * (costs.session_ms + opened)
    sandbox = sessions + work.python_calls * costs.python_ms + work.crops * costs.crop_made_ms
    return sandbox + work.searches * costs.search_ms


def _pulled(setting: Setting, work: Load, costs: HostCosts) -> float:
    """Bytes of a version that a machine with engines pulls, once."""
    return _weight_bytes(setting) * (costs.delta_share if _delta(setting, work) else 1.0)


def _weights(setting: Setting, work: Load, costs: HostCosts, role: Role) -> tuple[float, float]:
    """Seconds of staging and sending. Ranks of the first machine publish; each machine passes on at most what it has pulled."""
    size, pulled = _weight_bytes(setting) / 1e9, _pulled(setting, work, costs) / 1e9
    staging = role.nodes * size / costs.stage_gbs + role.engines * size / costs.load_gbs
    if not work.by_ray:
        return staging, size / costs.gather_gbs
    if _delta(setting, work):
        staging += role.runs * size / costs.encode_gbs + role.nodes * size / costs.decode_gbs
    moves = work.machines > 1 and (role.runs or role.nodes > 0)
    return staging, role.runs * size / costs.put_gbs + moves * pulled / costs.pull_gbs


def _seconds(setting: Setting, work: Load, options: HostOptions, costs: HostCosts, role: Role, step_s: float) -> HostSeconds:
    share, messages = work.share(role), work.rollouts * (options.calls + 1)
    staging, sending = _weights(setting, work, costs, role)
    processes = max(role.ranks, role.engines) if setting.asleep else role.ranks + role.engines
    polls = work.by_ray * work.nodes * costs.poll_ms * step_s
    return HostSeconds(
        images=_images(setting, work, options, costs, role) / 1e3,
        episodes=share * (work.rollouts * costs.rollout_ms + messages * costs.message_ms) / 1e3,
        tools=share * _tools(setting, work, options, costs) / 1e3,
        judging=share * work.rollouts * costs.judge_ms / 1e3,
        run=role.runs * (work.rollouts * costs.run_ms + polls) / 1e3,
        staging=staging,
        sending=sending,
        driving=processes * costs.driving * step_s,
    )


# -- memory -----------------------------------------------------------------------------------------------------------------


def _kept_steps(setting: Setting) -> float:
    """Steps' worth of groups that are begun and not trained yet, or are in training."""
    config = setting.config.rollout
    rules = Rules.of(config, setting.config.train.steps)
    trained_beside = config.mode == "one_step_off"  # in `async` they count as in flight until the update is done
    return 1 + rules.ahead + trained_beside + rules.extra / rules.per_step


def _weight_objects(setting: Setting, work: Load, costs: HostCosts, role: Role) -> float:
    """Bytes of Ray's objects: versions where they are published, with the changes that make the newer one; what is pulled."""
    if not work.by_ray:
        return 0.0
    pulled = _pulled(setting, work, costs)
    if role.runs:
        return _VERSIONS * _weight_bytes(setting) + _delta(setting, work) * pulled
    return (role.nodes > 0) * pulled


def _memory(setting: Setting, work: Load, options: HostOptions, costs: HostCosts, role: Role) -> HostMemory:
    config, mean = setting.config, setting.load
    a_step = work.images * options.image_megapixels * 1e6 * costs.encoded_bytes + work.crops * costs.crop_bytes
    a_step += work.rollouts * (mean.prompt + mean.response) * costs.token_bytes
    steps, version = _kept_steps(setting), setting.shape.num_parameters * ELEMENT[config.model.dtype]
    kept = work.share(role) * a_step * steps
    own = role.nodes if work.by_ray else 0  # nodes with a process of their own
    sees, preparing = setting.shape.tower is not None, own if work.by_ray else int(role.nodes > 0)
    return HostMemory(
        groups=0.0 if work.by_ray else kept,
        store=_weight_objects(setting, work, costs, role) + work.by_ray * kept,
        rank_groups=a_step * (work.fetched(role.replicas) + role.ranks * work.fetched(1)),  # files, and what is read from them
        summaries=role.runs * work.rollouts * steps * costs.summary_bytes,
        pictures=sees * (preparing + role.first_stage) * config.model.image_cache_gb * GIB,
        engine_images=sees * role.engines * 2 * config.rollout.vllm.image_cache_gb * GIB,
        models=float((role.runs + own) * version),
        weights=role.nodes * _VERSIONS * _weight_bytes(setting),
        data=float(preparing * CACHE_BYTES + role.nodes * _AHEAD_BYTES),
        processes=(role.runs + own + role.ranks + role.engines) * costs.process_bytes,
    )


# -- what it comes to -------------------------------------------------------------------------------------------------------

_CORES, _MEMORY = "take machines with more cores", "take machines with more memory"
_OFTEN = "take more prompts a step (rollout.prompts_per_step), which publishes less often"
_FEWER = "lower rollout.max_turns, or take fewer rollouts a step (rollout.prompts_per_step)"
_SHORT = {"rank_groups": "ranks' groups", "engine_images": "engines' images", "store": "Ray's store"}
_OF_NODES = ("images", "episodes", "tools", "judging", "groups", "store")


@dataclass(frozen=True, slots=True)
class _Advice:
    """What to change, for each part that may be the largest."""

    setting: Setting
    one: Candidate
    work: Load
    costs: HostCosts

    def nodes(self, least: int) -> str | None:
        """Settings for at least so many nodes, as few as Ray can place; None: so many there cannot be."""
        setting, config, gpus = self.setting, self.setting.config, self.setting.num_gpus
        vllm = config.rollout.vllm
        engines = gpus // vllm.tensor_parallel
        together = math.lcm(vllm.tensor_parallel, self.one.layout.tensor_parallel)
        for num in range(least, engines + 1):
            if setting.asleep and (gpus % num or gpus // num > NODE or gpus // num % together):
                continue  # nodes have the GPUs of whole tensor-parallel groups, on one machine
            parts = ["workers.launcher=ray"] * (config.workers.launcher != "ray") + [f"workers.nodes={num}"]
            parts += [f"rollout.vllm.replicas={engines}"] * (config.rollout.engine == "vllm" and vllm.replicas < engines)
            return "set " + (" and ".join(parts) if len(parts) < 3 else f"{', '.join(parts[:-1])} and {parts[-1]}")
        return None

    def seconds(self, part: str) -> str:
        """Where cores fall short."""
        if part in _OF_NODES and (spread := self._spread()):
            return spread
        if part == "staging" and _delta(self.setting, self.work):
            return "set sync.mode=full, which pulls more and computes less"
        return {
            "images": "scale the images of the data down",
            "episodes": _FEWER,
            "tools": f"{_CORES}, or lower rollout.max_turns, which bounds the calls",
            "judging": f"{_CORES}, or take fewer rollouts a step (rollout.prompts_per_step)",
            "staging": _OFTEN,
            "sending": _OFTEN,
        }.get(part, _CORES)

    def thread(self, episodes: float, step_s: float) -> str:
        """Where the thread of a node falls short. episodes: CPU seconds on all machines."""
        least = max(math.ceil(episodes / step_s), self.work.nodes * self.work.by_ray + 1)
        more = self.nodes(least)
        return f"{more}: each has a thread" if more else _FEWER

    def memory(self, part: str, role: Role, memory: HostMemory) -> str:
        """Where memory falls short."""
        if part == "store" and 2 * _weight_objects(self.setting, self.work, self.costs, role) > memory.store:
            return _MEMORY  # most of it is weights
        if part in _OF_NODES and (spread := self._spread()):
            return spread
        stale = "rollout.max_staleness or " if self.setting.config.rollout.mode == "async" else ""
        fewer = f"lower {stale}rollout.prompts_per_step, or scale the images of the data down"
        apart = self.nodes(self.work.hosts) if self.work.by_ray and role.nodes > 1 else None
        return {
            "groups": fewer,
            "store": fewer,
            "rank_groups": "scale the images of the data down, or lower rollout.prompts_per_step",
            "pictures": "lower model.image_cache_gb",
            "engine_images": "lower rollout.vllm.image_cache_gb",
        }.get(part, f"{apart}: fewer on a machine" if apart else _MEMORY)

    def _spread(self) -> str | None:
        """Nodes on all machines, where they are on some."""
        return self.nodes(self.work.hosts) if self.work.nodes < self.work.hosts else None


def _largest(parts: HostSeconds | HostMemory) -> tuple[str, float]:
    return max(asdict(parts).items(), key=lambda item: item[1])


def _warnings(advice: _Advice, machines: Sequence[tuple[Role, Machine]], options: HostOptions, step_s: float) -> Iterator[str]:
    work, launcher = advice.work, advice.setting.config.workers.launcher
    if work.machines > 1 and (work.nodes < work.hosts or launcher != "ray"):
        yield (
            f"the seconds of a step count engines on all GPUs, but an engine is a process of a node of its machine, and "
            f"workers.nodes={work.nodes} with workers.launcher={launcher} does not reach {work.hosts} machines; "
            f"{advice.nodes(work.hosts) or 'take fewer machines'}"
        )
    for role, machine in machines:
        where = f"machine {machine.name!r}"
        if machine.cores > options.cores:
            part, spent = _largest(machine.seconds)
            yield (
                f"{where} needs {machine.cores:.1f} cores and has {options.cores:g} (--cores), most of it for {part} "
                f"({spent:.0f} CPU s a step); {advice.seconds(part)}"
            )
        threads = machine.nodes if work.by_ray else 1  # without Ray the nodes are all on the run's loop
        if machine.nodes and machine.seconds.episodes > threads * step_s:
            yield (
                f"{where}: episodes take the one thread of a node {machine.seconds.episodes / threads:.0f} s, more than a step "
                f"of {step_s:.0f} s, which then takes longer; "
                f"{advice.thread(machine.seconds.episodes * work.nodes / machine.nodes, step_s)}"
            )
        if machine.memory.total > options.memory_gb * GIB:
            part, held = _largest(machine.memory)
            yield (
                f"{where} needs {machine.memory.total / GIB:.0f} GiB and has {options.memory_gb:g} (--memory-gb), "
                f"most of it for {_SHORT.get(part, part)} ({held / GIB:.0f} GiB); {advice.memory(part, role, machine.memory)}"
            )
        room = min(_STORE_SHARE * options.memory_gb * GIB, _STORE_BYTES)
        if machine.memory.store > room:
            yield (
                f"{where}: Ray's store needs {machine.memory.store / GIB:.0f} GiB, and has {room / GIB:.0f} unless Ray is told "
                f"otherwise; start it with --object-store-memory={math.ceil(machine.memory.store / 1e9)}000000000"
            )


def to_json(found: Host) -> dict[str, object]:
    """For machines. What is predicted stands under `predicted`."""
    return {
        "step_seconds": found.step_s,
        "options": asdict(found.options),
        "costs": asdict(found.costs),
        "assumed_costs": list(ASSUMED),
        "machines": [
            {
                "name": machine.name,
                "count": machine.count,
                "nodes": machine.nodes,
                "predicted": {
                    "cpu_seconds": {**asdict(machine.seconds), "total": machine.seconds.total},
                    "cores": machine.cores,
                    "memory_bytes": {**asdict(machine.memory), "total": machine.memory.total},
                },
            }
            for machine in found.machines
        ],
        "warnings": list(found.warnings),
    }


def to_lines(found: Host, layout: str) -> list[str]:
    """For people. layout: its name."""
    labels = [f"{machine.count:>3} x {machine.name}" for machine in found.machines]
    width = max(map(len, labels))
    parts = [part.name for part in fields(HostSeconds)]
    rooms = [part.name for part in fields(HostMemory)]
    seconds = [
        f"{label:{width}} {machine.nodes:>5} {machine.cores:7.1f} {machine.seconds.total:8.1f} "
        + " ".join(f"{getattr(machine.seconds, name):>{_wide(name)}.1f}" for name in parts)
        for label, machine in zip(labels, found.machines, strict=True)
    ]
    memory = [
        f"{label:{width}} {machine.memory.total / GIB:7.1f} "
        + " ".join(f"{getattr(machine.memory, name) / GIB:>{_wide(name)}.1f}" for name in rooms)
        for label, machine in zip(labels, found.machines, strict=True)
    ]
    options = found.options
    return [
        f"PREDICTED CPU seconds of a machine in a step of {found.step_s:.1f} s; cores of {options.cores:g}; {layout}",
        f"{'':{width}} {'nodes':>5} {'cores':>7} {'CPU s':>8} " + " ".join(f"{_SHORT.get(n, n):>{_wide(n)}}" for n in parts),
        *seconds,
        "",
        f"PREDICTED memory of a machine, GiB of {options.memory_gb:g}",
        f"{'':{width}} {'GiB':>7} " + " ".join(f"{_SHORT.get(n, n):>{_wide(n)}}" for n in rooms),
        *memory,
        *(f"WARNING: {warning}." for warning in found.warnings),
    ]


def _wide(name: str) -> int:
    return max(7, len(_SHORT.get(name, name)))
