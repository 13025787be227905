"""Weights in Hugging Face folders: slices read, streams written, and what is said of a folder that is not right."""

from __future__ import annotations

import json
import os
import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GenerationConfig, Qwen3Config, Qwen3ForCausalLM, Qwen3VLForConditionalGeneration

from metis_fast.checkpoint.safetensors_folder import FolderReader, write_folder
from metis_fast.config import ModelConfig
from metis_fast.errors import CheckpointError, ModelError
from metis_fast.model import load_policy
from metis_fast.testing.tiny import TinyShape, build_tiny
from metis_fast.train.megatron.names import hf_shapes, may_have

Weights = dict[str, torch.Tensor]


def tiny(folder: Path, tied: bool = True, dtype: torch.dtype = torch.float32, seed: int = 0) -> Path:
    """A model folder as `from_pretrained` saves it, with a generation config of its own."""
    shape = TinyShape(
        vocab_size=300,
        image_px=1024,
        text_config={
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "tie_word_embeddings": tied,
            "rope_parameters": {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True},
        },
        vision_config={
            "depth": 2, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "patch_size": 8,
            "spatial_merge_size": 2, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
        },
    )  # fmt: skip
    build_tiny(folder, shape, ["a word of it"] * 5, seed=seed)
    if dtype != torch.float32:
        Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=dtype).save_pretrained(folder)
    GenerationConfig(top_p=0.7, do_sample=True).save_pretrained(folder)
    return folder


def weights_of(folder: Path) -> Weights:
    return dict(Qwen3VLForConditionalGeneration.from_pretrained(folder).named_parameters())


def shapes_of(weights: Weights) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def copy_through(source: Path, out: Path, max_shard_bytes: int = 50_000) -> None:
    """Read every tensor and write it again."""
    with FolderReader(source) as reader:
        stream = ((name, reader.read(name, 0, 0, shape[0])) for name, shape in reader.shapes.items())
        write_folder(stream, reader.shapes, source, out, max_shard_bytes=max_shard_bytes)


# -- reading ----------------------------------------------------------------------------------------------------------


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
    with FolderReader(folder) as reader:
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
    with FolderReader(tmp_path) as reader:
        assert reader.shapes == {"w": (rows, columns)}
        assert reader.read("w", 0, 1000, 1008).shape == (8, columns)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024  # KiB


def test_missing_extra_and_misshaped_tensors_are_one_error_that_names_them(folder):
    with FolderReader(folder) as reader:
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
    with FolderReader(source) as reader:
        reader.check(hf_shapes(config), may_have(config))
        config.tie_word_embeddings = False
        reader.check(hf_shapes(config), may_have(config))
        assert not may_have(config)


def test_a_file_cut_anywhere_is_found_when_the_folder_is_opened(folder):
    path = max(folder.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    whole = path.read_bytes()
    for size in (len(whole) - 1, len(whole) // 2, 100, 8, 3, 0):
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


# -- writing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_shard_bytes", [50_000, 10**9])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_transformers_loads_what_was_written(tied, dtype, max_shard_bytes, tmp_path):
    source = tiny(tmp_path / "model", tied, torch.bfloat16 if dtype == torch.float32 else torch.float32)
    trained = {
        name: torch.randn(tensor.shape, generator=torch.Generator().manual_seed(i)).to(dtype)
        for i, (name, tensor) in enumerate(weights_of(source).items())
    }
    write_folder(iter(trained.items()), shapes_of(trained), source, tmp_path / "out", max_shard_bytes=max_shard_bytes)
    loaded = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path / "out")
    found = dict(loaded.named_parameters())
    assert found.keys() == trained.keys() and loaded.dtype == dtype
    assert all(torch.equal(found[name], tensor) and found[name].dtype == dtype for name, tensor in trained.items())
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied == ("lm_head.weight" not in trained)
    assert loaded.generation_config.top_p == 0.7
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    if max_shard_bytes == 10**9:
        assert files == ["model.safetensors"] and not list((tmp_path / "out").glob("*.index.json"))
        return
    assert files == [f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))] and len(files) > 2
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in trained.values())
    listed = set()
    for file in files:
        with safe_open(tmp_path / "out" / file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            names = list(opened.keys())
            listed |= {(name, file) for name in names}
        size = sum(trained[name].nbytes for name in names)
        assert size <= max_shard_bytes or len(names) == 1
    assert listed == set(index["weight_map"].items()) and len(listed) == len(trained)


def test_the_rest_of_the_folder_is_the_sources(tmp_path):
    source = tiny(tmp_path / "model")
    copy_through(source, tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert (tmp_path / "out" / "generation_config.json").read_bytes() == (source / "generation_config.json").read_bytes()
    assert AutoTokenizer.from_pretrained(tmp_path / "out").encode("a word")
    assert load_policy(ModelConfig(path=tmp_path / "out", dtype="float32")).reads_images


def test_the_config_changes_in_its_dtypes_only(tmp_path):
    source = tiny(tmp_path / "model", dtype=torch.bfloat16)
    path = source / "config.json"
    config = json.loads(path.read_text()) | {"something_new": [1, {"dtype": "int8"}]}
    assert config["dtype"] == config["text_config"]["dtype"] == "bfloat16"
    for key in ("dtype", "torch_dtype"):
        given: dict[str, Any] = {name: value for name, value in config.items() if name != "dtype"} | {key: "bfloat16"}
        path.write_text(json.dumps(given))
        weights = {name: tensor.float() for name, tensor in weights_of(source).items()}
        write_folder(weights.items(), shapes_of(weights), source, tmp_path / "out")
        found = json.loads((tmp_path / "out" / "config.json").read_text())
        assert found[key] == found["text_config"]["dtype"] == found["vision_config"]["dtype"] == "float32"
        for tree in (found, given):
            del tree[key]
            for part in ("text_config", "vision_config"):
                tree[part] = {name: value for name, value in tree[part].items() if name != "dtype"}
        assert found == given


def test_a_text_only_model_needs_no_processor(tmp_path):
    tiny(tmp_path / "model")
    source = tmp_path / "text"
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, head_dim=8,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    model.save_pretrained(source)
    (source / "tokenizer.json").write_bytes((tmp_path / "model" / "tokenizer.json").read_bytes())
    copy_through(source, tmp_path / "out", max_shard_bytes=4000)
    loaded = Qwen3ForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def test_at_most_one_weight_file_is_held(tmp_path):
    source = tiny(tmp_path / "model")
    shapes, reused = {f"t{i}": (1 << 18,) for i in range(40)}, torch.empty(1 << 18)  # 1 MiB each
    written = []

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        for i, name in enumerate(shapes):
            parts = tmp_path.glob(".tmp-out-*/*.safetensors")
            written.append(sum(path.stat().st_size for path in parts) >> 20)
            yield name, reused.fill_(i)

    write_folder(stream(), shapes, source, tmp_path / "out", max_shard_bytes=4 << 20)
    assert all(i - size <= 4 for i, size in enumerate(written)), written
    with FolderReader(tmp_path / "out") as reader:  # the sender's buffer was its own to reuse
        assert [float(reader.read(name, 0, 5, 6)) for name in shapes] == list(range(40))


@pytest.mark.parametrize("wrong", ["missing", "extra", "misshaped", "twice", "mixed dtypes"])
def test_a_stream_that_is_not_the_model_leaves_the_older_export(wrong, tmp_path):
    source = tiny(tmp_path / "model")
    copy_through(source, tmp_path / "out")
    weights = weights_of(source)
    shapes, stream = shapes_of(weights), [(name, tensor + 1) for name, tensor in weights.items()]
    name, tensor = stream[-1]
    last = {
        "missing": [],
        "extra": [(name, tensor), ("other", tensor)],
        "misshaped": [(name, tensor[:-1])],
        "twice": [(name, tensor), (name, tensor)],
        "mixed dtypes": [(name, tensor.double())],
    }
    with pytest.raises(ValueError, match=r"did not come|came, expected"):
        write_folder(stream[:-1] + last[wrong], shapes, source, tmp_path / "out", max_shard_bytes=50_000)
    assert_export_is(source, tmp_path)


def assert_export_is(source: Path, tmp_path: Path) -> None:
    """`out` holds the source's weights, and nothing lies about."""
    found, expected = weights_of(tmp_path / "out"), weights_of(source)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert {path.name for path in tmp_path.iterdir()} == {"model", "out"}


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_fails_at_any_file_leaves_the_older_export(tmp_path):
    source = tiny(tmp_path / "model")
    copy_through(source, tmp_path / "out")
    sizes = {path.stat().st_size for path in (tmp_path / "out").iterdir()}
    for limit in sorted(size - 1 for size in sizes)[::3]:
        with (
            file_size_limit(limit),
            pytest.raises(CheckpointError, match=r"File too large.*; an earlier export there is unchanged; free some space"),
        ):
            copy_through(source, tmp_path / "out", max_shard_bytes=60_000)
        assert_export_is(source, tmp_path)


def test_a_source_that_lacks_a_file_is_found_before_anything_is_written(tmp_path):
    for name, says in (
        ("tokenizer.json", r"lacks tokenizer\.json"),
        ("preprocessor_config.json", r"lacks preprocessor_config\.json"),
        ("config.json", r"config\.json cannot be read"),
    ):
        source = tiny(tmp_path / name)
        (source / name).unlink()

        def stream() -> Iterator[tuple[str, torch.Tensor]]:
            pytest.fail("asked for a tensor")
            yield "", torch.empty(0)

        with pytest.raises(CheckpointError, match=says):
            write_folder(stream(), {}, source, tmp_path / "out")
    with pytest.raises(CheckpointError, match="folder of the model that was trained"):
        write_folder([], {}, tmp_path / "config.json", tmp_path / "config.json")


def test_a_killed_export_leaves_the_older_one_and_the_next_removes_its_remains(tmp_path):
    source = tiny(tmp_path / "model")
    copy_through(source, tmp_path / "out")
    with FolderReader(source) as reader:
        shapes = reader.shapes

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        for i, (name, shape) in enumerate(shapes.items()):
            if i == len(shapes) - 2:
                os.kill(os.getpid(), signal.SIGKILL)
            yield name, torch.zeros(shape)

    child = os.fork()
    if child == 0:
        try:
            write_folder(stream(), shapes, source, tmp_path / "out", max_shard_bytes=50_000)
        finally:
            os._exit(1)  # not reached
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert len(list(tmp_path.glob(".tmp-out-*/*.safetensors"))) > 2
    found, expected = weights_of(tmp_path / "out"), weights_of(source)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    copy_through(source, tmp_path / "out")
    assert_export_is(source, tmp_path)
