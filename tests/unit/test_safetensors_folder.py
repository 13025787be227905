"""Weights in Hugging Face folders: slices read, older layouts, and what is said of files that are not right."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
import torch
from folders import copy_through, shapes_of, tiny, weights_of
from safetensors.torch import load_file, save_file
from transformers import Qwen3VLForConditionalGeneration

from metis_fast.checkpoint.safetensors_folder import FolderReader
from metis_fast.errors import ModelError
from metis_fast.model_folder import hf_shapes, may_have


@pytest.fixture(params=["one file", "index"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A tiny model in one file, or in several with an index."""
    source = tiny(tmp_path / "model")
    if request.param == "index":
        copy_through(source, tmp_path / "many")
        assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
        return tmp_path / "many"
    return source


def test_any_slice_along_any_dim_is_that_of_the_tensor(folder):
    reader = FolderReader(folder)
    expected = weights_of(folder)
    assert reader.shapes == shapes_of(expected)
    for name, tensor in expected.items():
        for dim, size in enumerate(tensor.shape):
            start, stop = size // 3, size - size // 4
            assert torch.equal(reader.read(name, dim, start, stop), tensor.narrow(dim, start, stop - start))


def test_a_slice_of_a_large_tensor_costs_the_slice(tmp_path):
    rows, columns = 1 << 15, 1 << 16  # 4 GiB of bfloat16, of which the disk holds nothing
    tensor = {"dtype": "BF16", "shape": [rows, columns], "data_offsets": [0, 2 * rows * columns]}
    header = json.dumps({"w": tensor}).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 2 * rows * columns)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    reader = FolderReader(tmp_path)
    assert reader.shapes == {"w": (rows, columns)}
    assert reader.read("w", 0, 1000, 1008).shape == (8, columns)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB


@pytest.mark.parametrize(
    ("stored", "value", "wanted", "fits"),
    [
        (torch.float64, 1e300, torch.float32, False),
        (torch.float64, -1e39, torch.bfloat16, False),
        (torch.float32, 3.4e38, torch.bfloat16, False),  # rounded up, to more than bfloat16 has
        (torch.float32, 3.38e38, torch.bfloat16, True),
        (torch.bfloat16, 3e38, torch.float32, True),
        (torch.float16, 65504.0, torch.bfloat16, True),
    ],
)
def test_a_number_too_large_for_the_dtype_is_named_for_a_model_and_for_a_slice(stored, value, wanted, fits, tmp_path):
    save_file({"a": torch.ones(4, dtype=stored), "b": torch.tensor([1.0, value], dtype=stored)}, tmp_path / "model.safetensors")
    reader = FolderReader(tmp_path)
    name = str(wanted).removeprefix("torch.")
    if fits:
        assert torch.equal(reader.read_all(["a", "b"], wanted)["b"], reader.read("b").to(wanted))
        return
    for read in (lambda: reader.read_all(["a", "b"], wanted), lambda: reader.read("b", 0, 1, 2, wanted)):
        with pytest.raises(ModelError, match=f"b has 1 numbers that are NaN or Inf in {name}; give a model whose weights"):
            read()
    assert reader.read("b", 0, 0, 1, wanted) == 1.0


def test_missing_extra_and_misshaped_tensors_are_one_error_that_names_them(folder):
    reader = FolderReader(folder)
    names = list(reader.shapes)
    reader.check(dict(reader.shapes))
    expected = dict(reader.shapes) | {"model.more.weight": (2, 2)}
    extra = names[5]
    del expected[extra]
    expected[names[7]] = (7, 7, 7)
    with pytest.raises(ModelError) as caught:
        reader.check(expected)
    text = str(caught.value)
    assert "lacks 1 tensors (model.more.weight)" in text and f"has 1 that the model has not ({extra})" in text
    assert f"({names[7]} {reader.shapes[names[7]]}, expected (7, 7, 7))" in text and "\n" not in text
    reader.check({name: shape for name, shape in reader.shapes.items() if name != extra}, may_have=[extra])
    with pytest.raises(ModelError, match=r"lacks the tensor model\.more\.weight"):
        reader.read("model.more.weight", 0, 0, 1)


def test_a_published_copy_of_a_tied_head_is_no_error_and_any_other_is(tmp_path):
    source = tiny(tmp_path / "model")
    config = Qwen3VLForConditionalGeneration.from_pretrained(source).config
    weights = load_file(source / "model.safetensors")
    weights["lm_head.weight"] = weights["model.language_model.embed_tokens.weight"].clone()
    save_file(weights, source / "model.safetensors")
    reader = FolderReader(source)
    reader.check(hf_shapes(config), may_have(config))
    config.tie_word_embeddings = False
    reader.check(hf_shapes(config), may_have(config))
    assert not may_have(config)


def test_a_file_cut_anywhere_is_found_when_the_folder_is_opened(folder):
    path = max(folder.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    whole = path.read_bytes()
    for size in (len(whole) - 1, len(whole) // 2, 100, 8, 3):
        path.write_bytes(whole[:size])
        with pytest.raises(ModelError, match=rf"{path.name} is damaged or cut short .* copy it from its source again"):
            FolderReader(folder)
    path.unlink()
    with pytest.raises(ModelError, match=rf"lacks {path.name}; the folder is incomplete"):
        FolderReader(folder)


def test_an_index_that_is_wrong_is_named(tmp_path):
    copy_through(tiny(tmp_path / "model"), tmp_path / "many")
    index = tmp_path / "many" / "model.safetensors.index.json"
    good = json.loads(index.read_text())
    moved = good["weight_map"] | {"model.language_model.norm.weight": "model-00001-of-00002.safetensors"}
    first, second = sorted(set(good["weight_map"].values()))[:2]
    name = next(name for name, file in good["weight_map"].items() if file == first)
    moved = good["weight_map"] | {name: second}
    index.write_text(json.dumps({"weight_map": moved}))
    with pytest.raises(ModelError, match=rf"lists 1 tensors that are not where it says, such as {name} \({second}\)"):
        FolderReader(tmp_path / "many")
    for text in ("{", "[]", '{"weight_map": 3}', '{"weight_map": {"a": 3}}'):
        index.write_text(text)
        with pytest.raises(ModelError, match=r"index\.json .*restore the file from its source"):
            FolderReader(tmp_path / "many")
