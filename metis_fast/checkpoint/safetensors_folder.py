"""A model's weights in a Hugging Face folder: read slice by slice, written as they come.

Neither side ever holds more than a slice, or a file: a rank reads what it keeps, and the one that exports gets a tensor at a
time from the others.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from metis_fast.checkpoint.export import PROCESSOR_FILES, TOKENIZER_FILES, copy_files, new_export
from metis_fast.errors import CheckpointError, ModelError

_ONE_FILE = "model.safetensors"
_INDEX = "model.safetensors.index.json"

MAX_SHARD_BYTES = 5_000_000_000
"""Of a weight file, as `save_pretrained` has it by default."""


class FolderReader:
    """The tensors of a folder with one `model.safetensors`, or with several files and their index.

    Opening reads the headers of all files, which is where a file that was cut short shows.

    shapes: of every tensor.
    """

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            ModelError: a file is missing, damaged, or not what the index says.
        """
        self._folder = folder
        self._open = ExitStack()
        self._files: dict[str, Any] = {}
        try:
            self.shapes = self._read_headers()
        except BaseException:
            self._open.close()
            raise

    def __enter__(self) -> FolderReader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open.close()

    def _read_headers(self) -> Mapping[str, tuple[int, ...]]:
        index = self._folder / _INDEX
        # transformers, too, takes the single file where there are both
        if (self._folder / _ONE_FILE).is_file() or not index.is_file():
            file = self._file(_ONE_FILE)
            self._files = dict.fromkeys(file.keys(), file)
        else:
            self._files = self._indexed(index)
        return {name: tuple(file.get_slice(name).get_shape()) for name, file in self._files.items()}

    def _indexed(self, index: Path) -> dict[str, Any]:
        try:
            document = json.loads(index.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ModelError(f"cannot read {index} ({error}); restore the file from its source") from None
        match document:
            case {"weight_map": dict(where)} if all(isinstance(name, str) for name in where.values()):
                pass
            case _:
                raise ModelError(f"{index} has no weight_map; restore the file from its source")
        opened = {name: self._file(name) for name in sorted(set(where.values()))}
        held = {name: frozenset(file.keys()) for name, file in opened.items()}
        lost = [f"{tensor} ({name})" for tensor, name in where.items() if tensor not in held[name]]
        if lost:
            raise ModelError(
                f"{index} lists {len(lost)} tensors that are not where it says, such as {lost[0]}; "
                "index and files are of different models"
            )
        return {tensor: opened[name] for tensor, name in where.items()}

    def _file(self, name: str) -> Any:
        path = self._folder / name
        try:
            return self._open.enter_context(safe_open(path, framework="pt"))
        except FileNotFoundError:
            raise ModelError(f"{self._folder} lacks {name}; the folder is incomplete") from None
        except (OSError, SafetensorError) as error:
            reason = " ".join(str(error).split())
            raise ModelError(f"{path} is damaged or cut short ({reason}); copy it from its source again") from None

    def check(self, expected: Mapping[str, tuple[int, ...]], may_have: Collection[str] = ()) -> None:
        """Compare names and shapes with a model's; to be done before reading, since a slice of a larger tensor looks right.

        may_have: names that are of no use and do no harm.

        Raises:
            ModelError: tensors are missing, unknown or of another shape.
        """
        problems = []
        if missing := [name for name in expected if name not in self.shapes]:
            problems.append(f"lacks {len(missing)} tensors ({_some(missing)})")
        if extra := [name for name in self.shapes if name not in expected and name not in may_have]:
            problems.append(f"has {len(extra)} that the model has not ({_some(extra)})")
        if other := [name for name, shape in expected.items() if self.shapes.get(name, shape) != shape]:
            first = other[0]
            problems.append(f"has {len(other)} of another shape ({first} {self.shapes[first]}, expected {expected[first]})")
        if problems:
            raise ModelError(f"{self._folder} {', '.join(problems)}; weights and config.json are of different models")

    def read(self, name: str, dim: int, start: int, stop: int) -> Tensor:
        """The slice [start, stop) of a tensor along a dim, in the folder's dtype; only that is read from disk.

        Raises:
            ModelError: there is no such tensor.
        """
        if name not in self._files:
            raise ModelError(f"{self._folder} lacks the tensor {name}; weights and config.json are of different models")
        return self._files[name].get_slice(name)[(*(slice(None),) * dim, slice(start, stop))]


def _some(names: Collection[str]) -> str:
    return ", ".join(sorted(names)[:3])


def write_folder(
    tensors: Iterable[tuple[str, Tensor]],
    expected: Mapping[str, tuple[int, ...]],
    source: Path,
    out: Path,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Write the folder of a trained model, which plain transformers and vLLM load, from a stream of its tensors.

    The folder appears whole or not at all; an older export at `out` is kept until the new one is complete. At most one weight
    file is held in memory.

    tensors: Hugging Face names and whole tensors of one dtype, on any device, in any order. expected: all of them, with shapes.
    source: the model folder that training started from; configs, tokenizer and processor are its own.

    Raises:
        CheckpointError: `out` is something else than an export, `source` lacks a needed file, or the disk failed.
        ValueError: the stream is not what was expected.
    """
    with new_export(out, [source]) as tmp:
        # what can be found missing is, before the weights are written
        config = _read_config(source)
        copy_files(source, tmp, TOKENIZER_FILES, needed="tokenizer.json")
        if "vision_config" in config:
            copy_files(source, tmp, PROCESSOR_FILES, needed="preprocessor_config.json")
        copy_files(source, tmp, ["generation_config.json"], needed="config.json")
        dtype = _write_weights(tensors, expected, tmp, max_shard_bytes)
        (tmp / "config.json").write_text(json.dumps(_with_dtype(config, dtype), indent=2) + "\n", encoding="utf-8")


def _read_config(source: Path) -> dict[str, Any]:
    path = source / "config.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot export: {path} cannot be read ({error}); restore it from its source") from None


def _with_dtype(config: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The config as it was, with another dtype at the top and wherever a part names one."""
    name = str(dtype).removeprefix("torch.")
    key = "torch_dtype" if "torch_dtype" in config else "dtype"  # what older versions wrote is what they read
    changed = config | {key: name}
    for part, tree in config.items():
        if isinstance(tree, dict):
            changed[part] = tree | {its: name for its in ("dtype", "torch_dtype") if its in tree}
    return changed


def _write_weights(
    tensors: Iterable[tuple[str, Tensor]], expected: Mapping[str, tuple[int, ...]], folder: Path, max_bytes: int
) -> torch.dtype:
    dtypes: set[torch.dtype] = set()
    files: list[list[str]] = []
    held: dict[str, Tensor] = {}
    seen: set[str] = set()
    size = total = 0

    def flush() -> None:
        save_file(held, folder / _part(len(files)), metadata={"format": "pt"})
        files.append(list(held))
        held.clear()

    for name, tensor in tensors:
        if name in seen or expected.get(name) != tuple(tensor.shape):
            raise ValueError(f"{name} {tuple(tensor.shape)} came, expected {expected.get(name)}, once")
        if held and size + tensor.nbytes > max_bytes:
            flush()
            size = 0
        # a copy: what came may be a view of something larger, or be overwritten before the file is full
        held[name] = torch.empty(tensor.shape, dtype=tensor.dtype).copy_(tensor.detach())
        seen.add(name)
        dtypes.add(tensor.dtype)
        size += tensor.nbytes
        total += tensor.nbytes
    if seen != expected.keys() or len(dtypes) != 1:
        lost = sorted(expected.keys() - seen)
        raise ValueError(f"{len(lost)} tensors did not come ({_some(lost)}); dtypes {sorted(map(str, dtypes))}, expected one")
    flush()
    if len(files) == 1:
        (folder / _part(0)).rename(folder / _ONE_FILE)
        return dtypes.pop()
    where = {}
    for at, names in enumerate(files):
        final = f"model-{at + 1:05d}-of-{len(files):05d}.safetensors"
        (folder / _part(at)).rename(folder / final)
        where |= dict.fromkeys(names, final)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    (folder / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return dtypes.pop()


def _part(number: int) -> str:
    """Name of a weight file while it is not known how many there will be."""
    return f"part-{number}.safetensors"
