"""Lets torchvision be imported beside a torch that it was not built for.

Package indexes have torchvision as a CUDA build only. Beside torch's CPU build its extension does not load, and its import
then fails ("operator torchvision::nms does not exist"), because it describes operators that nobody has declared. vLLM's
Qwen3-VL and, once torchvision is there, transformers need that import; neither needs the operators. `tests/unit/test_compat.py`
fails as soon as torchvision can be imported without this.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

_DECLARED: list[object] = []  # torch forgets what a Library declared when it is collected


class _DeclareFirst(MetaPathFinder):
    """Finds nothing; declares the operators when torchvision's extension, which would do it, will not load."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname == "torchvision":
            sys.meta_path.remove(self)
            _declare()
        return None


def prepare() -> None:
    """Call it before anything imports torchvision; costs nothing until then."""
    if "torchvision" not in sys.modules and not any(isinstance(finder, _DeclareFirst) for finder in sys.meta_path):
        sys.meta_path.insert(0, _DeclareFirst())


def _declare() -> None:
    spec = find_spec("torchvision")
    if spec is None or spec.submodule_search_locations is None:
        return
    import torch

    with open(f"{spec.submodule_search_locations[0]}/version.py", encoding="utf-8") as file:
        version = next((line for line in file if line.startswith("__version__")), "")
    if "+cu" not in version or torch.version.cuda is not None:
        return  # they fit: the extension declares its operators itself
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _DECLARED.append(library)
