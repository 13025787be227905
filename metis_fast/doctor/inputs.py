"""What the job reads: model folder, prompts, trajectories. Weights are not loaded, and of the rows a sample is read."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import PretrainedConfig

from metis_fast.checkpoint.export import check_export
from metis_fast.checkpoint.safetensors_folder import INDEX
from metis_fast.config import Config
from metis_fast.data.cursor import decode_all
from metis_fast.data.offers import enabled, offered_tools
from metis_fast.data.parquet import PromptFiles
from metis_fast.data.row import BadRow, BadRowError
from metis_fast.doctor.finding import Finding, gigabytes
from metis_fast.doctor.services import described
from metis_fast.errors import ModelError, RecordingError, ToolSetupError, one_line
from metis_fast.model_folder import doubts, hf_shapes, load_processor, load_tokenizer, read_config, read_json
from metis_fast.pictures import ImagePreparer
from metis_fast.plan.command import awake, own_layout
from metis_fast.plan.gpus import GIB, GPUS, Gpu
from metis_fast.plan.shape import read_model_config
from metis_fast.rollout.chat import Chat
from metis_fast.rollout.offer import Offer
from metis_fast.tools.protocol import ToolSpec
from metis_fast.train.megatron.backend import check_settings
from metis_fast.types import Prompt

_ROWS = 48  # of a set of prompts


def num_parameters(config: PretrainedConfig, freeze: Sequence[str] = ()) -> int:
    """Of the model that a config.json describes, without its tower where `freeze` has "vision"."""
    shapes = hf_shapes(config)
    return sum(math.prod(shape) for name, shape in shapes.items() if "vision" not in freeze or ".visual." not in name)


def model(config: Config) -> Iterator[Finding]:
    """The folder, its weight files by their headers, and what an export of it would lack."""
    folder = config.model.path
    if not folder.exists() and config.model.config is not None:
        shape = read_model_config(config, None)
        yield Finding(
            "model.path",
            "error",
            f"{folder} is not there; {config.model.config} describes {num_parameters(shape) / 1e9:.3g} B parameters",
            "download the model, or name its folder",
        )
        return
    check_export(folder, config.run.dir / "trained", config.model.dtype)
    shape = read_config(folder)
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    yield Finding(
        "model.path",
        "ok",
        f"{shape.model_type}, {num_parameters(shape) / 1e9:.3g} B parameters, {gigabytes(size)} at {folder}; used in "
        f"{config.model.dtype}",
    )
    missing = _missing_weights(folder, shape)
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        yield Finding(
            "weights", "error", f"{folder} lacks {', '.join(missing[:3])}{more}", "download the folder again, all of its files"
        )
    for doubt in doubts(folder):
        found, _, advice = doubt.rpartition(": ")
        yield Finding("export", "warning", found, advice)


def _missing_weights(folder: Path, shape: PretrainedConfig) -> list[str]:
    """Names that the index or the headers of the files lack."""
    index = folder / INDEX
    names = set[str]()
    files = sorted(folder.glob("*.safetensors"))
    if index.is_file():
        match read_json(index):
            case {"weight_map": dict(where)} if all(isinstance(name, str) for name in where.values()):
                files = sorted({folder / name for name in where.values()})
            case _:
                raise ModelError(f"{index} has no weight_map from tensors to files; restore the file from its source")
    for path in files:
        try:
            with safe_open(path, "pt") as weights:
                names.update(weights.keys())
        except (OSError, SafetensorError) as error:
            raise ModelError(f"{path} cannot be read ({one_line(error)}); download it again") from None
    return sorted(hf_shapes(shape).keys() - names)


def layout(config: Config) -> Iterator[Finding]:
    """Whether the model can be cut as `train.megatron` says, and, by what `metis-fast plan` predicts, fits on the GPUs."""
    shape = read_model_config(config, None)
    check_settings(config, shape)
    name, gpu = _gpu()
    one = own_layout(config, shape, gpu)
    ranks = f"{config.train.megatron.num_ranks} ranks"
    found = f"{ranks}; {one.memory.total / GIB:.0f} of {gpu.memory / GIB:.0f} GiB of {name} predicted"
    advice = awake(gpu.memory, one, config) or "see metis-fast plan for layouts that fit"
    yield Finding("train.megatron", "ok" if one.fits else "error", found, "" if one.fits else advice)


def _gpu() -> tuple[str, Gpu]:
    """Of this machine; where it has none, the one that plans are made for by default."""
    if not torch.cuda.is_available():
        return "an h100", GPUS["h100"]
    like = next((gpu for name, gpu in GPUS.items() if name in torch.cuda.get_device_name(0).lower()), GPUS["h100"])
    return "this machine's GPU", replace(like, memory=torch.cuda.get_device_properties(0).total_memory)


def prompts(config: Config, key: str, paths: Sequence[Path], offline: bool) -> Iterator[Finding]:
    """Files, a sample of their rows with their images, judges and lengths. key: the setting. offline: ask no tool server."""
    files = PromptFiles(paths, any_style=config.score.judge != "by_row")
    step = max(1, len(files) // _ROWS)
    chat = _chat(config, offline)
    good: list[Prompt] = []
    bad: list[BadRow] = []
    lengths: list[int] = []
    for index in range(0, len(files), step):
        row = _row(files, index)
        if isinstance(row, BadRowError):
            bad.append(row.bad_row)
            continue
        good.append(row)
        if chat is not None:
            lengths.append(len(chat.encode_prompt(row).tokens))
    read = len(good) + len(bad)
    of = "all" if step == 1 else f"{read} of {len(files)}"
    yield Finding(
        key, "ok" if good else "error", f"{len(files)} rows; {of} read, {len(bad)} of them bad", "" if good else "see below"
    )
    if bad:
        state = "warning" if config.data.on_bad_row == "skip" and good else "error"
        yield Finding(key, state, str(bad[0]), "mend the rows (metis-fast data check names all), or set data.on_bad_row=skip")
    if good:
        yield Finding(key, "ok", f"abilities: {_counts(prompt.ability for prompt in good)}")
    longest = max(lengths, default=0)
    if longest > config.rollout.max_prompt_tokens:
        yield Finding(
            key,
            "error",
            f"a prompt has {longest} tokens, rollout.max_prompt_tokens is {config.rollout.max_prompt_tokens}",
            "raise that, or remove the rows (metis-fast data check FILE --model FOLDER --max-prompt-tokens "
            f"{config.rollout.max_prompt_tokens})",
        )
    elif longest:
        yield Finding(key, "ok", f"the longest prompt read has {longest} of at most {config.rollout.max_prompt_tokens} tokens")
    specs = () if config.tools.server.url else _tools(config, offline)  # a server says in its own check what it has
    known = enabled(config.tools.enabled).union(one.name for one in specs)
    lacking = Counter(name for prompt in good for name in offered_tools(prompt) if name not in known)
    if lacking and not config.tools.server.url:
        yield Finding(
            key,
            "warning",
            "system messages offer tools that the run does not have: "
            + ", ".join(f"{name} ({number} of {len(good)} rows)" for name, number in lacking.most_common(4)),
            "add them to tools.enabled, or leave the rows: a call of one is told that there is none",
        )
    silent = sum(not any("<answer>" in message.content for message in prompt.messages) for prompt in good)
    if silent:
        yield Finding(
            key,
            "warning",
            f"{silent} of {len(good)} prompts never ask for <answer>...</answer>: an answer without it scores 0",
            "say so in the system message",
        )


def _chat(config: Config, offline: bool) -> Chat | None:
    """As a run would encode prompts; None where the model is not there (which is another finding)."""
    folder = config.model.path
    if not folder.is_dir():
        return None
    images = ImagePreparer(load_processor(folder), cache_bytes=0)
    return Chat(load_tokenizer(folder), images, offer=Offer(config.tools, _tools(config, offline)))


def _tools(config: Config, offline: bool) -> Sequence[ToolSpec]:
    try:
        return described(config, offline)
    except (ToolSetupError, RecordingError):  # the check of the tools says so
        return ()


def _row(files: PromptFiles, index: int) -> Prompt | BadRowError:
    """A row with its images decoded, or what is wrong with it."""
    try:
        prompt = files.read(index)
        return files.unusable(index, prompt, decode_all(prompt.images)) or prompt
    except BadRowError as error:
        return error


def _counts(values: Iterator[str]) -> str:
    return ", ".join(f"{name} {number}" for name, number in Counter(values).most_common(8))
