"""What the machines around the GPUs need in a step: CPU seconds and memory, part by part. All of it is predicted:
docs/plan.md has the formulas.

Machines are of three kinds: the first, on which the run itself is; the others; those of engines with GPUs of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields

from metis_fast.config import MegatronConfig
from metis_fast.data.parquet import CACHE_BYTES
from metis_fast.errors import ConfigError
from metis_fast.plan.candidates import Candidate
from metis_fast.plan.duration import Setting
from metis_fast.plan.gpus import GIB, NODE
from metis_fast.plan.memory import ELEMENT
from metis_fast.plan.workload import mini_batch
from metis_fast.rollout.schedule import Rules
from metis_fast.train.megatron.layout import place
from metis_fast.types import ToolName

_VERSIONS = 2
"""Of the weights, in shared memory and in Ray's: the one that is loaded, and the one before or after it."""


@dataclass(frozen=True, slots=True)
class HostCosts:
    """CPU milliseconds, GB/s of a core and bytes. Measured ones are from bench/NOTES.md and docs/; the others are
    assumptions, named in `ASSUMED`."""

    decode_ms: float = 32.7  # a megapixel: a PNG of 2048 x 1536 takes 103 ms, a JPEG a third ("Images")
    resize_ms: float = 1.6  # a megapixel: 5.0 ms for 2048 x 1536 ("What images cost in a step")
    patch_ms: float = 0.088  # an image token in an engine: 294 ms for 3072 in transformers' processor, less decoding
    crop_ms: float = 16.8  # an 800 x 600 PNG decoded and resized ("What images cost in a step")
    crop_engine_ms: float = 44.0  # the same through transformers' processor
    crop_made_ms: float = 20.0  # cut out and encoded, in the sandbox
    message_ms: float = 0.64  # of the event loop ("The rollout loop")
    rollout_ms: float = 0.57  # of the event loop: its prompt with an image ("What images cost in a step")
    session_ms: float = 12.0  # a sandbox begun and ended (docs/tools.md)
    python_ms: float = 100.0  # a call: what the code itself computes
    search_ms: float = 5.0  # a call of text_search or image_search
    judge_ms: float = 15.0  # a rollout; one comparison of math-verify takes 1 to 50
    gather_gbs: float = 0.7  # ranks to run, both ends: 0.56 to 0.85 ("Megatron-core 0.16.1 without Transformer Engine")
    put_gbs: float = 2.0  # ranks to Ray's store of their machine, by way of a file in its memory: two copies
    pull_gbs: float = 1.0  # Ray's objects between machines, at each end: 0.8 to 1.0 between two Ray nodes over loopback
    stage_gbs: float = 2.0  # copied into shared memory and checked: 3.5 for CRC-32, 5 for the copy
    load_gbs: float = 2.2  # an engine: checksums 3.5; 3.0 s for 17.5 GB for the rest (docs/rollouts.md)
    encode_gbs: float = 0.3  # changes found and checked, where a tenth of the elements changed: 0.31 on a busy machine
    decode_gbs: float = 0.7  # and made into weights again, likewise
    delta_share: float = 0.15  # of the bytes, where a tenth of the elements changed (docs/rollouts.md)
    driving: float = 1.0  # cores that a rank or an engine keeps busy for its GPU
    encoded_bytes: float = 1.33  # a pixel: a PNG of 2048 x 1536 has 4.0 MiB, a JPEG a seventh
    crop_bytes: float = 640e3  # an 800 x 600 PNG at the same bytes a pixel
    token_bytes: float = 24.0  # of a rollout: its arrays have 13, the rest is text
    process_bytes: float = 4.0 * GIB  # a rank, an engine or the run, before it holds anything


ASSUMED = (
    "crop_made_ms", "python_ms", "search_ms", "judge_ms", "put_gbs", "stage_gbs", "delta_share", "driving", "token_bytes",
    "process_bytes",
)  # fmt: skip
"""Costs that nothing measured stands behind."""


@dataclass(frozen=True, slots=True)
class HostOptions:
    """cores, memory_gb: of a machine, GiB. image_megapixels: of an image in the data. calls: of tools, a rollout."""

    cores: float = 96
    memory_gb: float = 1024
    image_megapixels: float = 3.1
    calls: float = 1

    def check(self, max_turns: int) -> None:
        """Raises ConfigError for a number out of its range."""
        for option, number, low, high in (
            ("--cores", self.cores, 1, 4096),
            ("--memory-gb", self.memory_gb, 1, 1 << 20),
            ("--image-megapixels", self.image_megapixels, 0.001, 1000),
        ):
            if not low <= number <= high:
                raise ConfigError(f"{option}: expected a number from {low} to {high}, got {number}; change it")
        if not 0 <= self.calls <= max_turns - 1:
            raise ConfigError(
                f"--calls: expected 0 to {max_turns - 1}, one less than rollout.max_turns={max_turns}, got {self.calls}; "
                "change one of the two"
            )


@dataclass(frozen=True, slots=True)
class HostSeconds:
    """CPU seconds of a machine in a step. episodes are of one thread. sending: weights from ranks to the run, or through Ray's
    store to every machine with engines; staging: all else of them. driving: processes that wait for their GPU without
    sleeping."""

    images: float
    episodes: float
    tools: float
    judging: float
    staging: float
    sending: float
    driving: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(getattr(self, part.name) for part in fields(self))


@dataclass(frozen=True, slots=True)
class HostMemory:
    """Bytes of a machine. groups: kept by the run until they are trained; rank_groups: those of a step, which every rank
    is given. pictures: decoded, of the run and the first stage. engine_images: encoded, and as patches. weights: versions
    in shared memory, and as Ray's objects. data: decoded rows. processes: before they hold anything."""

    groups: float
    rank_groups: float
    pictures: float
    engine_images: float
    weights: float
    data: float
    processes: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(getattr(self, part.name) for part in fields(self))


@dataclass(frozen=True, slots=True)
class Machine:
    """What `count` machines of a kind need each, the worst of them. cores: on average over a step."""

    name: str
    count: int
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


@dataclass(frozen=True, slots=True)
class _Role:
    """What stands on a machine. runs: the run itself. ranks, first_stage, engines: numbers of processes."""

    name: str
    count: int
    runs: bool
    ranks: int
    first_stage: int
    engines: int


@dataclass(frozen=True, slots=True)
class _Load:
    """Of one step, in all. images: of prompts. crops: images that calls return.

    rank_images, rank_crops: that one rank of the first stage prepares. hosts: machines with engines. machines: of every kind.
    """

    rollouts: int
    images: int
    python_calls: float
    searches: float
    crops: float
    rank_images: float
    rank_crops: float
    hosts: int
    machines: int


def host(setting: Setting, one: Candidate, options: HostOptions, costs: HostCosts | None = None) -> Host:
    """Of a layout's machines.

    Raises:
        ConfigError: an option is out of its range.
    """
    options.check(setting.config.rollout.max_turns)
    costs = costs or HostCosts()
    roles = _roles(setting, one.layout)
    load = _load(setting, one.layout, options, roles)
    step_s = one.seconds.total
    machines: list[Machine] = []
    for role in roles:
        seconds = _seconds(setting, load, options, costs, role, step_s)
        memory = _memory(setting, load, options, costs, role)
        machines.append(Machine(role.name, role.count, seconds, seconds.total / step_s, memory))
    return Host(one, step_s, options, costs, tuple(machines), tuple(_warnings(setting, machines, options, step_s)))


def _roles(setting: Setting, layout: MegatronConfig) -> list[_Role]:
    """Ranks stand in their order, eight a machine; an engine for every `rollout.vllm.tensor_parallel` GPUs, with them or on
    as many machines of their own."""
    per, count = min(NODE, setting.num_gpus), -(-setting.num_gpus // NODE)
    apart = not setting.asleep and setting.engine_share == 0
    engines = max(1, per // setting.config.rollout.vllm.tensor_parallel)
    beside = 0 if apart else engines
    stages = [place(rank, layout).stage for rank in range(setting.num_gpus)]
    first_stage = [stages[at * per : (at + 1) * per].count(0) for at in range(count)]
    roles = [_Role("first", 1, True, per, first_stage[0], beside)]
    if count > 1:
        roles.append(_Role("other", count - 1, False, per, max(first_stage[1:]), beside))
    if apart:
        roles.append(_Role("engines", count, False, 0, 0, engines))
    return roles


def _load(setting: Setting, layout: MegatronConfig, options: HostOptions, roles: Sequence[_Role]) -> _Load:
    config, load, replicas = setting.config, setting.load, layout.data_parallel
    rollouts = config.rollout.prompts_per_step * config.rollout.rollouts_per_prompt
    images = config.rollout.prompts_per_step * load.images
    # which tool is called, nobody knows: each as often as the others
    enabled = config.tools.enabled
    calls = options.calls * rollouts if enabled else 0.0
    python = calls * (ToolName.PYTHON in enabled) / max(1, len(enabled))
    crops = python if load.images else 0.0
    batch = mini_batch(config, load, setting.flops)
    live = 1 - batch.uniform
    hosts = sum(role.count for role in roles if role.engines)
    return _Load(
        rollouts=rollouts,
        images=images,
        python_calls=python,
        searches=calls - python,
        crops=crops,
        # a group that is cut into parts has its images prepared by every replica that has one of them
        rank_images=images * live * min(batch.parts, replicas) / replicas,
        rank_crops=crops * live / replicas,
        hosts=hosts,
        machines=sum(role.count for role in roles),
    )


def _share(role: _Role, workers: int, machines: int) -> float:
    """Of the work that the run does itself, or workers that stand anywhere."""
    return 1 / machines if workers else float(role.runs)


def _weight_bytes(setting: Setting) -> float:
    """Of a version that is staged."""
    staged = setting.config.sync.transport == "staged"
    return float(setting.shape.num_parameters * ELEMENT[setting.config.model.dtype]) if staged else 0.0


def _images(setting: Setting, load: _Load, options: HostOptions, costs: HostCosts, role: _Role) -> float:
    """Milliseconds. An image is prepared where it is checked, by the engine of its rollouts, and by ranks with a tower."""
    prepared = options.image_megapixels * (costs.decode_ms + costs.resize_ms)
    spent = role.first_stage * (load.rank_images * prepared + load.rank_crops * costs.crop_ms)
    if role.runs:
        spent += load.images * prepared + load.crops * costs.crop_ms
    if role.engines:
        patches = setting.load.image_tokens * costs.patch_ms
        spent += (load.images * (prepared + patches) + load.crops * costs.crop_engine_ms) / load.hosts
    return spent


def _tools(setting: Setting, load: _Load, options: HostOptions, costs: HostCosts) -> float:
    """Milliseconds, wherever they run. A session opens the prompt's images."""
    opened = setting.load.images * options.image_megapixels * costs.decode_ms
    sessions = min(load.rollouts, load.python_calls) * (costs.session_ms + opened)
    sandbox = sessions + load.python_calls * costs.python_ms + load.crops * costs.crop_made_ms
    return sandbox + load.searches * costs.search_ms


def _by_ray(setting: Setting, load: _Load) -> bool:
    return load.machines > 1 or setting.config.workers.launcher == "ray"


def _pulled(setting: Setting, costs: HostCosts) -> float:
    """Bytes of a version that a machine with engines pulls, once."""
    return _weight_bytes(setting) * (costs.delta_share if setting.config.sync.mode == "delta" else 1.0)


def _weights(setting: Setting, load: _Load, costs: HostCosts, role: _Role) -> tuple[float, float]:
    """Seconds of staging and sending. Ranks of the first machine publish; each machine passes on at most what it has pulled."""
    size, pulled, engines = _weight_bytes(setting) / 1e9, _pulled(setting, costs) / 1e9, bool(role.engines)
    staging = engines * size / costs.stage_gbs + role.engines * size / costs.load_gbs
    if not _by_ray(setting, load):
        return staging, size / costs.gather_gbs
    if setting.config.sync.mode == "delta":
        staging += role.runs * size / costs.encode_gbs + engines * size / costs.decode_gbs
    moves = load.machines > 1 and (role.runs or engines)
    return staging, role.runs * size / costs.put_gbs + moves * pulled / costs.pull_gbs


def _seconds(setting: Setting, load: _Load, options: HostOptions, costs: HostCosts, role: _Role, step_s: float) -> HostSeconds:
    workers, messages = setting.config.workers, load.rollouts * (options.calls + 1)
    staging, sending = _weights(setting, load, costs, role)
    processes = max(role.ranks, role.engines) if setting.asleep else role.ranks + role.engines
    return HostSeconds(
        images=_images(setting, load, options, costs, role) / 1e3,
        episodes=role.runs * (load.rollouts * costs.rollout_ms + messages * costs.message_ms) / 1e3,
        tools=_tools(setting, load, options, costs) / 1e3 * _share(role, workers.tools, load.machines),
        judging=load.rollouts * costs.judge_ms / 1e3 * _share(role, workers.judges, load.machines),
        staging=staging,
        sending=sending,
        driving=processes * costs.driving * step_s,
    )


def _kept_steps(setting: Setting) -> float:
    """Steps' worth of groups that are begun and not trained yet, or are in training."""
    config = setting.config.rollout
    rules = Rules.of(config, setting.config.train.steps)
    trained_beside = config.mode == "one_step_off"  # in `async` they count as in flight until the update is done
    return 1 + rules.ahead + trained_beside + rules.extra / rules.per_step


def _weight_memory(setting: Setting, load: _Load, costs: HostCosts, role: _Role) -> float:
    versions, engines = _VERSIONS * _weight_bytes(setting), bool(role.engines)
    if not _by_ray(setting, load):
        return engines * versions
    return engines * versions + (versions if role.runs else engines * _pulled(setting, costs))


def _memory(setting: Setting, load: _Load, options: HostOptions, costs: HostCosts, role: _Role) -> HostMemory:
    config, mean = setting.config, setting.load
    a_step = load.images * options.image_megapixels * 1e6 * costs.encoded_bytes + load.crops * costs.crop_bytes
    a_step += load.rollouts * (mean.prompt + mean.response) * costs.token_bytes
    sees = setting.shape.tower is not None
    return HostMemory(
        groups=role.runs * a_step * _kept_steps(setting),
        rank_groups=role.ranks * 2 * a_step,  # the message, and what is read from it
        pictures=sees * (role.runs + role.first_stage) * config.model.image_cache_gb * GIB,
        engine_images=sees * role.engines * 2 * config.rollout.vllm.image_cache_gb * GIB,
        weights=_weight_memory(setting, load, costs, role),
        data=float(role.runs * CACHE_BYTES),
        processes=(role.runs + role.ranks + role.engines) * costs.process_bytes,
    )


# -- what it comes to -------------------------------------------------------------------------------------------------------

_LESS = {
    "images": "scale the images of the data down",
    "episodes": "take fewer rollouts a step (rollout.prompts_per_step)",
    "tools": "have workers run them on all machines (workers.tools)",
    "judging": "have workers judge on all machines (workers.judges)",
    "staging": "give engines GPUs of their own and set sync.transport=nccl",
    "sending": "take more prompts a step (rollout.prompts_per_step), which publishes less often",
    "driving": "take machines with more cores",
    "groups": "lower rollout.max_staleness or rollout.prompts_per_step, or scale the images of the data down",
    "rank_groups": "scale the images of the data down, or lower rollout.prompts_per_step",
    "pictures": "lower model.image_cache_gb",
    "engine_images": "lower rollout.vllm.image_cache_gb",
    "weights": "give engines GPUs of their own and set sync.transport=nccl",
    "data": "take machines with more memory",
    "processes": "take machines with more memory",
}
_SHORT = {"rank_groups": "ranks' groups", "engine_images": "engines' images"}


def _less(part: str, setting: Setting) -> str:
    """What to do about a part that is the largest."""
    workers, sync = setting.config.workers, setting.config.sync
    if (part == "tools" and workers.tools) or (part == "judging" and workers.judges):  # they are everywhere already
        return "take machines with more cores"
    if part == "sending" and sync.mode == "full" and setting.num_gpus > NODE:
        return "pull changes only (sync.mode=delta)"
    return _LESS[part]


def _largest(parts: HostSeconds | HostMemory) -> tuple[str, float]:
    return max(asdict(parts).items(), key=lambda item: item[1])


def _warnings(setting: Setting, machines: Sequence[Machine], options: HostOptions, step_s: float) -> Iterator[str]:
    for machine in machines:
        where = f"machine {machine.name!r}"
        if machine.cores > options.cores:
            part, spent = _largest(machine.seconds)
            yield (
                f"{where} needs {machine.cores:.1f} cores and has {options.cores:g} (--cores), most of it for {part} "
                f"({spent:.0f} CPU s a step); {_less(part, setting)}"
            )
        if machine.seconds.episodes > step_s:
            yield (
                f"{where}: episodes take one thread {machine.seconds.episodes:.0f} s, more than a step of {step_s:.0f} s, "
                f"which then takes longer; {_less('episodes', setting)}"
            )
        if machine.memory.total > options.memory_gb * GIB:
            part, held = _largest(machine.memory)
            yield (
                f"{where} needs {machine.memory.total / GIB:.0f} GiB and has {options.memory_gb:g} (--memory-gb), "
                f"most of it for {_SHORT.get(part, part)} ({held / GIB:.0f} GiB); {_less(part, setting)}"
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
        f"{label:{width}} {machine.cores:7.1f} {machine.seconds.total:8.1f} "
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
        f"{'':{width}} {'cores':>7} {'CPU s':>8} " + " ".join(f"{_SHORT.get(n, n):>{_wide(n)}}" for n in parts),
        *seconds,
        "",
        f"PREDICTED memory of a machine, GiB of {options.memory_gb:g}",
        f"{'':{width}} {'GiB':>7} " + " ".join(f"{_SHORT.get(n, n):>{_wide(n)}}" for n in rooms),
        *memory,
        *(f"WARNING: {warning}." for warning in found.warnings),
    ]


def _wide(name: str) -> int:
    return max(7, len(_SHORT.get(name, name)))
