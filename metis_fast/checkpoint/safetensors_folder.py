"""A model's weights in a Hugging Face folder, read slice by slice, whatever an older release or a wrapper has called them.

Never more than a slice is held: a rank reads what it keeps, and a whole model is read and cast a tensor at a time.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from metis_fast.errors import ModelError
from metis_fast.model_folder import read_json, trouble

ONE_FILE = "model.safetensors"
INDEX = "model.safetensors.index.json"

_FLOATS = ("F64", "F32", "F16", "BF16")
_READERS = 4
"""Threads that read a whole model; each holds a tensor."""

_WRAPPERS = ("module.", "_orig_mod.", "pretrained_model.")
"""Of DistributedDataParallel, torch.compile and models with a value head."""

_OLDER = (
    ("language_model.model.", "model.language_model."),
    ("language_model.lm_head.", "lm_head."),
    ("language_model.", "model.language_model."),
    ("visual.", "model.visual."),
    ("model.", "model.language_model."),
    ("", "model."),
)
"""Beginnings of names in older layouts, and of models without their head; and what they are now."""


class FolderReader:
    """The tensors of a folder with one `model.safetensors`, or with several files and their index.

    Opening reads the headers of all files, which is where a file that was cut short shows. No file stays open: until it is
    closed, all that was read of it counts as memory of the process.

    shapes: of every tensor.
    """

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            ModelError: a file is missing, damaged, or not what the index says.
        """
        self._folder = folder
        self._dtypes: dict[str, str] = {}
        index = folder / INDEX
        # transformers, too, takes the single file where there are both
        if os.path.lexists(folder / ONE_FILE) or not os.path.lexists(index):
            held = self._header(ONE_FILE)
            self._where = {name: (ONE_FILE, name) for name in held}
        else:
            held = self._indexed(index)
        self.shapes: dict[str, tuple[int, ...]] = {name: shape for name, (shape, _) in held.items()}
        self._dtypes = {name: dtype for name, (_, dtype) in held.items()}

    def _indexed(self, index: Path) -> dict[str, tuple[tuple[int, ...], str]]:
        match read_json(index):
            case {"weight_map": dict(where)} if all(isinstance(name, str) for name in where.values()):
                pass
            case _:
                raise ModelError(f"{index} has no weight_map; restore the file from its source")
        files = {name: self._header(name) for name in sorted(set(where.values()))}
        lost = [f"{tensor} ({name})" for tensor, name in where.items() if tensor not in files[name]]
        if lost:
            raise ModelError(
                f"{index} lists {len(lost)} tensors that are not where it says, such as {lost[0]}; "
                "index and files are of different models"
            )
        self._where = {tensor: (name, tensor) for tensor, name in where.items()}
        return {tensor: files[name][tensor] for tensor, name in where.items()}

    def _header(self, name: str) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of every tensor of a file."""
        path = self._folder / name
        if not os.path.lexists(path):
            parts = sorted(self._folder.glob("*.safetensors"))
            other = f", nor has it {INDEX} for {parts[0].name}" if name == ONE_FILE and parts else ""
            raise ModelError(f"{self._folder} lacks {name}{other}; the folder is incomplete")
        if problem := trouble(path):
            raise ModelError(f"{path} {problem}")
        try:
            with safe_open(path, framework="pt") as file:
                slices = {tensor: file.get_slice(tensor) for tensor in file.offset_keys()}
                return {tensor: (tuple(one.get_shape()), one.get_dtype()) for tensor, one in slices.items()}
        except (OSError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:200]
            raise ModelError(f"{path} is damaged or cut short ({reason}); copy it from its source again") from None

    def check(self, expected: Mapping[str, tuple[int, ...]], may_have: Collection[str] = ()) -> None:
        """Compare names, shapes and types with a model's; done before reading, since a slice of a larger tensor looks right.

        Tensors under names of an older layout have the model's own from here on.

        may_have: names that are of no use and do no harm.

        Raises:
            ModelError: tensors are missing, unknown, there twice, of another shape, or no floating-point numbers.
        """
        self._rename({*expected, *may_have})
        for name, dtype in self._dtypes.items():
            if name in expected and dtype not in _FLOATS:
                raise ModelError(
                    f"{self._path(name)}: {name} is {dtype}, expected one of {', '.join(_FLOATS)}; quantised weights cannot be "
                    "trained: give the bfloat16, float16 or float32 model that they were made from"
                )
        problems = []
        if missing := [name for name in expected if name not in self.shapes]:
            problems.append(f"lacks {len(missing)} tensors ({_some(missing)})")
        unused = {name for name in self.shapes if name.endswith(".inv_freq")}  # old releases saved what follows from the config
        if extra := [name for name in self.shapes if name not in expected and name not in may_have and name not in unused]:
            problems.append(f"has {len(extra)} that the model has not ({_some(extra)})")
        if other := [name for name, shape in expected.items() if self.shapes.get(name, shape) != shape]:
            first = other[0]
            problems.append(f"has {len(other)} of another shape ({first} {self.shapes[first]}, expected {expected[first]})")
        if problems:
            raise ModelError(f"{self._folder} {', '.join(problems)}; weights and config.json are of different models")

    def _rename(self, known: Collection[str]) -> None:
        renamed = {name: _name(name, known) for name in self.shapes}
        firsts: dict[str, str] = {}
        for old, new in renamed.items():
            if firsts.setdefault(new, old) != old:
                raise ModelError(f"{self._folder} has {new} twice, as {firsts[new]} and as {old}; remove one of them")
        self.shapes = {renamed[name]: shape for name, shape in self.shapes.items()}
        self._dtypes = {renamed[name]: dtype for name, dtype in self._dtypes.items()}
        self._where = {renamed[name]: where for name, where in self._where.items()}

    def check_same(self, name: str, other: str) -> None:
        """Of a tensor that may be there as a copy of another one.

        Raises:
            ModelError: it is there and differs.
        """
        if name in self.shapes and not torch.equal(self.read(name), self.read(other)):
            raise ModelError(
                f"{self._folder}: config.json ties {name} to {other}, but their weights differ; "
                "set tie_word_embeddings to false in config.json, or remove the one that is not the model's"
            )

    def read(
        self, name: str, dim: int = 0, start: int = 0, stop: int | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """The slice [start, stop) of a tensor along a dim; only that is read from disk.

        dtype: that of the copy that is returned; None is the folder's, and perhaps no copy.

        Raises:
            ModelError: there is no such tensor, or it has NaN or Inf, also where a number is too large for `dtype`.
        """
        if name not in self._where:
            raise ModelError(f"{self._folder} lacks the tensor {name}; weights and config.json are of different models")
        file, stored = self._where[name]
        with safe_open(self._folder / file, framework="pt") as opened:
            tensor: Tensor = opened.get_slice(stored)[(*(slice(None),) * dim, slice(start, stop))]
        within = ""
        if dtype is not None:
            within = "" if dtype == tensor.dtype else f" in {str(dtype).removeprefix('torch.')}"
            tensor = tensor.to(dtype, copy=True)
        # extremes pass NaN on, and take a tenth of the time of asking each number
        if tensor.numel() and not all(map(torch.isfinite, tensor.aminmax())):
            bad = tensor.numel() - int(torch.isfinite(tensor).sum())
            raise ModelError(
                f"{self._path(name)}: {name} has {bad} numbers that are NaN or Inf{within}; give a model whose weights are "
                "finite, such as an earlier checkpoint of it"
            )
        return tensor

    def read_all(self, names: Collection[str], dtype: torch.dtype) -> dict[str, Tensor]:
        """Whole tensors in a dtype. Beside the result, as many of the folder's as there are threads are held."""

        def one(name: str) -> Tensor:
            return self.read(name, dtype=dtype)

        with ThreadPoolExecutor(_READERS) as pool:
            return dict(zip(names, pool.map(one, names), strict=True))

    def _path(self, name: str) -> Path:
        return self._folder / self._where[name][0]


def _name(stored: str, known: Collection[str]) -> str:
    """What a tensor is called in the model, or what it is called in the file where the model has none such."""
    bare = stored
    while bare not in known and bare.startswith(_WRAPPERS):
        bare = bare.partition(".")[2]
    tried = [bare, *(new + bare.removeprefix(old) for old, new in _OLDER if bare.startswith(old))]
    return next((name for name in tried if name in known), stored)


def _some(names: Collection[str]) -> str:
    return ", ".join(sorted(names)[:3])
