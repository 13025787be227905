"""Models in the Hugging Face layout, for plain transformers, vLLM or another run.

Training changes neither tokenizer nor image processor, so their files are copied from the model that the run started from, byte
for byte, wherever the caller names its folder. That is also the one way that always works: without torchvision, transformers
5.19 cannot construct a `Qwen3VLProcessor` (its video processor needs torchvision), so it could not be saved.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from transformers.image_processing_base import ImageProcessingMixin

from metis_fast.checkpoint.atomic import clean_leftovers, new_folder
from metis_fast.errors import CheckpointError
from metis_fast.model import Policy

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",  # older folders; read by the processor only
)
PROCESSOR_FILES = ("preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json")

Processor = ImageProcessingMixin | ProcessorMixin


def export_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | Path,
    processor: Processor | Path | None,
    out: Path,
    *,
    max_shard_size: str = "5GB",
) -> None:
    """Write a folder that `from_pretrained` of plain transformers loads; weights keep their dtype and bits.

    The folder appears whole or not at all. An older export at `out` is replaced, and kept until the new one is complete.

    tokenizer, processor: objects to save, or the model folder to copy their files from; a text-only model has no processor.
    max_shard_size: of a weight file.

    Raises:
        CheckpointError: `out` is something else than an export, a source folder lacks a needed file, or the disk failed.
    """
    sources = [part for part in (tokenizer, processor) if isinstance(part, Path)]
    with new_export(out, sources) as tmp:
        model.save_pretrained(tmp, max_shard_size=max_shard_size)
        if isinstance(processor, Path):
            copy_files(processor, tmp, PROCESSOR_FILES, needed="preprocessor_config.json")
        elif processor is not None:
            processor.save_pretrained(tmp)
        # after the processor: a ProcessorMixin saves a tokenizer, too
        if isinstance(tokenizer, Path):
            copy_files(tokenizer, tmp, TOKENIZER_FILES, needed="tokenizer.json")
        else:
            tokenizer.save_pretrained(tmp)


@contextmanager
def new_export(out: Path, sources: Iterable[Path]) -> Iterator[Path]:
    """Yield an empty folder to fill; when the block ends it becomes `out`, in place of an older export.

    sources: model folders that `out` must not be.

    Raises:
        CheckpointError: `out` is something else than an export, or the disk failed.
    """
    out = out.resolve()  # a link is followed, not replaced
    if out in {source.resolve() for source in sources}:
        raise CheckpointError(f"cannot export to {out}: it is the folder of the model that was trained; choose another one")
    if out.exists() and not _may_be_replaced(out):
        raise CheckpointError(f"cannot export to {out}: it exists and holds no exported model; choose another folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        clean_leftovers(out.parent, out.name)
        with new_folder(out) as tmp:
            yield tmp
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"cannot export the model to {out}: {' '.join(str(error).split())}; an earlier export there is unchanged; "
            "free some space or choose another folder"
        ) from error


def export_policy(policy: Policy, out: Path) -> None:
    """`export_model` of a policy, with the tokenizer and the image processor of the folder that it was loaded from."""
    export_model(policy.model, policy.folder, policy.folder if policy.reads_images else None, out)


def _may_be_replaced(out: Path) -> bool:
    """An empty folder, or one that has config and weights as an export does."""
    if not out.is_dir():
        return False
    return not any(out.iterdir()) or ((out / "config.json").is_file() and any(out.glob("*.safetensors")))


def copy_files(source: Path, target: Path, names: Iterable[str], *, needed: str) -> None:
    """Copy those of the named files that there are.

    Raises:
        CheckpointError: `needed` is not there.
    """
    if not (source / needed).is_file():
        raise CheckpointError(f"cannot export: {source} lacks {needed}; give the folder of the model that was trained")
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
