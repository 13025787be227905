"""The Megatron back end on a real Ray, driven directly: ranks fetch the groups of their own packs, weights go out as objects,
and what dies is said. Each rank is on a node of Ray's of its own, all of them on this machine."""

from __future__ import annotations

import os
import pickle
import signal
import time
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from megatron_cases import DP, PP, settings_of
from trainer_cases import score
from transformers import AutoConfig

from metis_fast.errors import Interrupted, TrainerError
from metis_fast.summary import GroupSummary, Job, ScoredSummary
from metis_fast.sync.segment import FOLDER
from metis_fast.train.megatron.backend import MegatronTrainer
from metis_fast.train.protocol import GroupsLost
from metis_fast.types import Group

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.slow

from ray.cluster_utils import Cluster  # noqa: E402

from metis_fast.cluster import weights as ray_weights  # noqa: E402
from metis_fast.cluster.ranks import RankKeepers  # noqa: E402
from metis_fast.cluster.room import Room  # noqa: E402

STORE = 100 << 20  # bytes of each node's objects


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory):
    """Nodes with a CPU slot each, so that every bundle is alone on one, and one for who holds groups."""
    patch = pytest.MonkeyPatch()
    patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))
    patch.delenv("RAY_ADDRESS", raising=False)
    patch.setenv("OMP_NUM_THREADS", "1")
    patch.setenv("PYTHONPATH", str(Path(__file__).parent))  # for `Holder`
    full = {"local_fs_capacity_threshold": 0.0}  # a store that is full does not go on in files
    head = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": STORE, "_system_config": full}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(2):
        cluster.add_node(num_cpus=1, object_store_memory=STORE)
    cluster.add_node(num_cpus=0, resources={"holder": 100}, object_store_memory=STORE)
    ray.init(cluster.address, log_to_driver=False)
    yield cluster
    ray.shutdown()
    cluster.shutdown()
    patch.undo()


class Holder:
    """A node, as far as it keeps groups."""

    def keep(self, group: Group):
        return [ray.put(group)]

    def keep_bytes(self, size: int):
        return [ray.put(np.zeros(size, np.uint8))]


@pytest.fixture
def hold():
    """Groups as the run knows them, kept by an actor of their own on a node with a resource."""
    actors = []

    def run(groups, resource="holder"):
        actors.append(ray.remote(Holder).options(num_cpus=0, resources={resource: 1}).remote())
        found = []
        for i, group in enumerate(groups):
            whole = Group(group.prompt, group.rollouts)
            (key,) = ray.get(actors[-1].keep.remote(whole))
            verdicts = [one.verdict for one in group.scores]
            found.append(ScoredSummary(GroupSummary.of(whole, verdicts, Job("train", i, "train", i), 0, key), group.scores))
        return found

    yield run
    for actor in actors:
        ray.kill(actor)


@pytest.fixture(scope="module")
def many(groups):
    """Six groups of two prompts, so that replicas of a step have different ones; one that nothing is learnt from."""
    again = [replace(g, scores=g.scores[1:] + g.scores[:1]) for g in groups]
    blank = replace(groups[0], scores=tuple(score(0.0, 0.0) for _ in groups[0].scores))
    return [*groups, blank, *again, groups[0]]


@pytest.fixture
def open_trainer(models, tmp_path):
    """Opens trainers of a layout: on Ray, and on this machine."""
    opened = []

    def run(settings, on_ray):
        settings = settings.model_copy(
            update={
                "run": settings.run.model_copy(update={"dir": tmp_path / ("ray" if on_ray else "here")}),
                "workers": settings.workers.model_copy(update={"launcher": "ray", "wait_s": 240.0}),
            }
        )
        room = Room(settings, True, lambda: None) if on_ray else None
        if room is not None:
            opened.append(room)
        model = AutoConfig.from_pretrained(models("untied"))
        opened.append(MegatronTrainer(settings, settings.train.optim, 10, models("untied"), model, room=room))
        return opened[-1]

    yield run
    for one in reversed(opened):
        one.close()


def left():
    """Groups in shared memory that live processes of these tests have left there."""
    found = []
    for path in FOLDER.glob("metis-fast-ranks-*/group-*"):
        with suppress(psutil.Error):
            owner = psutil.Process(int(path.parent.name.split("-")[3]))
            if owner.pid == os.getpid() or owner.environ().get("HOME") == os.environ["HOME"]:  # of this cluster
                found.append(path)
    return found


def ranks():
    """Processes of ranks below the nodes of this cluster, known by its home folder."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            line = process.cmdline()
            if "rank" in line and "--join" in line and process.environ().get("HOME") == os.environ["HOME"]:
                found.append(process)
    return found


@pytest.mark.parametrize("layout", [pytest.param(DP, id="dp2"), pytest.param(PP, id="pp2", marks=pytest.mark.slow)])
def test_ranks_on_ray_compute_bit_for_bit_what_those_of_this_machine_do(open_trainer, many, hold, layout):
    settings = settings_of(many, layout).model_copy()
    settings = settings.model_copy(update={"train": settings.train.model_copy(update={"prompts_per_mini_batch": 3})})
    here, there = open_trainer(settings, False), open_trainer(settings, True)
    assert there.fetches and not here.fetches
    summaries = hold(many)
    for _ in range(2):
        assert there.update(summaries) == here.update(many)
    assert [one.keys() for one in there.fetched()] == [one.keys() for one in here.fetched()]
    expected = dict(here.weights())
    for got in (dict(there.weights()), dict(ray_weights.read(there.publish()))):
        assert got.keys() == expected.keys()
        assert all(torch.equal(got[name], tensor) for name, tensor in expected.items())
    rollouts = [rollout for group in many[:2] for rollout in group.rollouts]
    assert all((a == b).all() for a, b in zip(there.logprobs(rollouts), here.logprobs(rollouts), strict=True))
    assert not left()


def test_a_machine_is_brought_the_groups_of_its_replica_and_no_others(open_trainer, many, hold, monkeypatch):
    brought = []

    @contextmanager
    def seen(self, *arguments):
        with fetched(self, *arguments) as files:
            brought.append([{path: Path(path).stat().st_size for path in one.values()} for one in files])
            yield files

    fetched = RankKeepers.fetched
    monkeypatch.setattr(RankKeepers, "fetched", seen)
    trainer = open_trainer(settings_of(many, DP), True)
    trainer.update(hold(many))
    one, two = trainer.fetched()
    assert one.keys() | two.keys() == {0, 1, 3, 4, 5}  # of the third one nothing is learnt, so nobody fetches it
    assert one.keys() != two.keys()
    ((first, second),) = brought
    assert not first.keys() & second.keys()  # of two machines
    assert [sorted(one.values()), sorted(two.values())] == [sorted(first.values()), sorted(second.values())]
    size = [len(pickle.dumps(Group(group.prompt, group.rollouts), protocol=5)) for group in many]
    assert all(abs(got[number] - size[number]) < 100 for got in (one, two) for number in got)


def test_groups_that_are_lost_with_their_node_are_named_and_the_next_update_works(open_trainer, many, hold, cluster):
    trainer = open_trainer(settings_of(many, PP), True)
    doomed = cluster.add_node(num_cpus=0, resources={"doomed": 1}, object_store_memory=STORE)
    kept, gone = hold(many), hold(many, "doomed")
    cluster.remove_node(doomed, allow_graceful=False)
    mixed = [gone[i] if i in (1, 2, 4) else kept[i] for i in range(len(many))]
    before = dict(trainer.weights())
    with pytest.raises(GroupsLost) as lost:
        trainer.update(mixed)
    assert lost.value.numbers == (1, 4)  # of the third one nothing is learnt
    assert trainer.num_updates == 0
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.weights())
    assert not left()
    calls = iter([False, True])

    def check():
        if next(calls, True):
            raise Interrupted

    with pytest.raises(Interrupted):
        trainer.update(kept, check)
    trainer.update(kept)
    assert trainer.num_updates == len(many)
    assert not left()


def test_a_store_that_is_full_on_fetch_is_said_and_the_next_update_works(open_trainer, many, hold, cluster):
    trainer = open_trainer(settings_of(many, PP), True)
    cluster.add_node(num_cpus=0, resources={"large": 1}, object_store_memory=3 * STORE)
    summaries = hold(many)
    holder = ray.remote(Holder).options(num_cpus=0, resources={"large": 1}).remote()
    (key,) = ray.get(holder.keep_bytes.remote(STORE * 3 // 2))
    large = replace(summaries[0], group=replace(summaries[0].group, key=key))
    with pytest.raises(TrainerError, match=r"^Ray's object store is full where groups.*--object-store-memory.*$") as full:
        trainer.update([large, *summaries[1:]])
    assert "\n" not in str(full.value)
    ray.kill(holder)
    assert trainer.num_updates == 0
    assert not left()
    trainer.update(summaries)
    assert trainer.num_updates == len(many)
    assert not left()


@pytest.mark.parametrize("victim", [pytest.param("rank", marks=pytest.mark.slow), "keeper"])
def test_kill_9_of_a_rank_or_of_its_keeper_is_said_and_leaves_nothing(open_trainer, many, hold, victim):
    trainer = open_trainer(settings_of(many, PP), True)
    summaries = hold(many)
    trainer.update(summaries)
    found = ranks()
    assert len(found) == 2
    os.kill(found[0].pid if victim == "rank" else found[0].ppid(), signal.SIGKILL)
    said = "was killed by SIGKILL" if victim == "rank" else "ended with exit code 255"
    with pytest.raises(TrainerError, match=rf"^rank \d on .* {said}.*rank-\d\.log.*run the same command again"):
        trainer.update(summaries)
    deadline = time.monotonic() + 60
    while any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in found):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert not left()


def test_nothing_listens_on_another_address_than_loopback(open_trainer, many):
    open_trainer(settings_of(many, DP), True)
    found = ranks()
    assert len(found) == 2
    listening = [one for process in found for one in process.net_connections("tcp") if one.status == psutil.CONN_LISTEN]
    assert listening and all(one.laddr.ip.startswith(("127.", "::ffff:127.", "::1")) for one in listening), listening
