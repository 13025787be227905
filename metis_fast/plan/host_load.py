"""What a step asks of the machines around the GPUs, what that costs, and what stands on which of them.

A machine may have the run, ranks, and nodes with their engines. Whatever rollouts need is done by nodes, each for its share.
"""

from __future__ import annotations

from dataclasses import dataclass

from metis_fast.config import MegatronConfig, RolloutConfig
from metis_fast.errors import ConfigError
from metis_fast.plan.duration import DECODE, DELTA_SHARE, ENCODE, Setting
from metis_fast.plan.gpus import GIB, NODE
from metis_fast.plan.workload import mini_batch
from metis_fast.train.megatron.layout import place
from metis_fast.types import ToolName


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
    message_ms: float = 0.64  # of a node's event loop ("The rollout loop")
    rollout_ms: float = 0.57  # of it: a prompt encoded, headers of its images read ("What images cost in a step")
    session_ms: float = 12.0  # a sandbox begun and ended (docs/tools.md)
    python_ms: float = 100.0  # a call: what the code itself computes
    search_ms: float = 5.0  # a call of text_search or image_search
    judge_ms: float = 15.0  # a rollout; one comparison of math-verify takes 1 to 50
    run_ms: float = 0.2  # a rollout, of the run: 0.16 to 0.2 with one to eight nodes ("What a rollout costs the run")
    poll_ms: float = 2.0  # a second and node, of the run: 14.7 ms with eight, 8.5 with four (there)
    gather_gbs: float = 0.7  # ranks to run, both ends: 0.56 to 0.85 ("Megatron-core 0.16.1 without Transformer Engine")
    put_gbs: float = 2.0  # ranks to Ray's store of their machine, by way of a file in its memory: two copies
    pull_gbs: float = 1.0  # Ray's objects between machines, at each end: 0.8 to 1.0 between two Ray nodes over loopback
    stage_gbs: float = 2.0  # copied into shared memory and checked: 3.5 for CRC-32, 5 for the copy
    load_gbs: float = 2.2  # an engine: checksums 3.5; 3.0 s for 17.5 GB for the rest (docs/rollouts.md)
    encode_gbs: float = ENCODE / 1e9  # changes found and checked, where a tenth of the elements changed
    decode_gbs: float = DECODE / 1e9  # and made into weights again, likewise
    delta_share: float = DELTA_SHARE  # of the bytes, likewise
    driving: float = 1.0  # cores that a rank or an engine keeps busy for its GPU
    encoded_bytes: float = 1.33  # a pixel: a PNG of 2048 x 1536 has 4.0 MiB, a JPEG a seventh
    crop_bytes: float = 640e3  # an 800 x 600 PNG at the same bytes a pixel
    token_bytes: float = 24.0  # of a rollout: its arrays have 13, the rest is text
    summary_bytes: float = 800.0  # of a rollout, pickled: 226, its scores 288, its job 5, what ranks are told 272 (there)
    process_bytes: float = 4.0 * GIB  # a rank, an engine, a node or the run, before it holds anything


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

    def check(self, rollout: RolloutConfig) -> None:
        """Raises ConfigError for a number out of its range."""
        for option, number, low, high in (
            ("--cores", self.cores, 1, 4096),
            ("--memory-gb", self.memory_gb, 1, 1 << 20),
            ("--image-megapixels", self.image_megapixels, 0.001, 1000),
        ):
            if not low <= number <= high:
                raise ConfigError(f"{option}: expected a number from {low} to {high}, got {number}; change it")
        compact = rollout.protocol == "compact"  # whose last turn answers; in the other one a further message does
        most = rollout.max_turns - compact
        if not 0 <= self.calls <= most:
            less = "one less than " if compact else ""
            raise ConfigError(
                f"--calls: expected 0 to {most}, {less}rollout.max_turns={rollout.max_turns}, got {self.calls}; "
                "change one of the two"
            )


@dataclass(frozen=True, slots=True)
class Role:
    """What stands on each of `count` machines, on the worst of them. runs: the run itself. replicas: of the trainer, that have
    ranks there. first_stage: ranks of it. engines, nodes, ranks: their numbers."""

    name: str
    count: int
    runs: bool
    ranks: int
    replicas: int
    first_stage: int
    engines: int
    nodes: int


@dataclass(frozen=True, slots=True)
class Load:
    """Of one step, in all. images: of prompts. crops: images that calls return. live: share of the groups that are trained.

    parts: that a group is cut into. replicas: of the trainer. hosts: machines with GPUs for engines. machines: of every kind.
    by_ray: whether nodes are processes of their own, and groups and weights objects of Ray's.
    """

    rollouts: int
    images: int
    python_calls: float
    searches: float
    crops: float
    live: float
    parts: int
    replicas: int
    nodes: int
    hosts: int
    machines: int
    by_ray: bool

    def share(self, role: Role) -> float:
        """Of what nodes do and keep: that of the machine."""
        return role.nodes / self.nodes

    def fetched(self, replicas: int) -> float:
        """Share of a step's groups that a machine with ranks of so many replicas fetches, or a rank reads, of one: those of
        which a part was dealt to them. Packs are dealt by cost, which says nothing of groups: as if at random."""
        return self.live * (1 - (1 - replicas / self.replicas) ** self.parts)


def hosts(setting: Setting) -> int:
    """Machines with GPUs for engines."""
    return -(-setting.num_gpus // NODE)


def roles(setting: Setting, layout: MegatronConfig) -> list[Role]:
    """Ranks stand in their order, eight a machine; an engine for every `rollout.vllm.tensor_parallel` GPUs, with them or on
    as many machines of their own. Nodes stand evenly on machines with GPUs for engines; without a node there are no engines."""
    per, count, nodes = min(NODE, setting.num_gpus), hosts(setting), setting.config.workers.nodes
    engines = max(1, per // setting.config.rollout.vllm.tensor_parallel)
    shares = [nodes // count + (i < nodes % count) for i in range(count)]
    apart = not setting.asleep and setting.engine_share == 0
    machines: list[Role] = []
    for i in range(count):
        own = [place(rank, layout) for rank in range(i * per, (i + 1) * per)]
        here = 0 if apart else shares[i]
        replicas, first_stage = len({one.data for one in own}), sum(one.stage == 0 for one in own)
        name = "first" if i == 0 else "other" if here or apart else "ranks"
        machines.append(Role(name, 1, i == 0, per, replicas, first_stage, engines * (here > 0), here))
    if apart:
        machines += [Role("engines", 1, False, 0, 0, 0, engines, here) for here in shares if here]
    return [_worst([one for one in machines if one.name == name]) for name in dict.fromkeys(one.name for one in machines)]


def _worst(machines: list[Role]) -> Role:
    """One for all of a name."""
    first = machines[0]
    return Role(
        first.name,
        len(machines),
        first.runs,
        first.ranks,
        max(one.replicas for one in machines),
        max(one.first_stage for one in machines),
        first.engines,
        max(one.nodes for one in machines),
    )


def load(setting: Setting, layout: MegatronConfig, calls: float, roles: list[Role]) -> Load:
    """calls: of tools, a rollout."""
    config = setting.config
    rollouts = config.rollout.prompts_per_step * config.rollout.rollouts_per_prompt
    images = config.rollout.prompts_per_step * setting.load.images
    # which tool is called, nobody knows: each as often as the others
    enabled = config.tools.enabled
    tools = len(enabled) + len(config.tools.own) + len(config.tools.mcp)
    all_calls = calls * rollouts if enabled else 0.0
    python = all_calls * (ToolName.PYTHON in enabled) / max(1, tools)
    batch = mini_batch(config, setting.load, setting.flops)
    machines = sum(role.count for role in roles)
    return Load(
        rollouts=rollouts,
        images=images,
        python_calls=python,
        searches=all_calls * len(enabled) / max(1, tools) - python,
        crops=python if setting.load.images else 0.0,
        live=1 - batch.uniform,
        parts=batch.parts,
        replicas=layout.data_parallel,
        nodes=config.workers.nodes,
        hosts=hosts(setting),
        machines=machines,
        by_ray=machines > 1 or config.workers.launcher == "ray",
    )
