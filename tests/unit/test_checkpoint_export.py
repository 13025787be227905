"""An exported model is the trained one, for transformers without any of this package; what it needs is tried at the start."""

from __future__ import annotations

import gc
import json
import os
import resource
import shutil
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from folders import LFS, copy_through, shapes_of, tiny, weights_of
from safetensors import safe_open
from transformers import AutoConfig, AutoProcessor, Qwen3Config, Qwen3ForCausalLM, Qwen3VLForConditionalGeneration
from transformers.utils.import_utils import is_torchvision_available

from metis_fast.checkpoint.export import (
    LOGITS_DIFFER,
    MARK,
    Source,
    check_export,
    check_logits,
    check_logprobs,
    export_model,
    export_policy,
    probe_rollout,
    read_source,
    write_weights,
)
from metis_fast.checkpoint.safetensors_folder import FolderReader
from metis_fast.config import ModelConfig, build
from metis_fast.errors import CheckpointError, ModelError
from metis_fast.model import load_policy
from metis_fast.train.torch_backend import TorchTrainer


@pytest.mark.parametrize("max_shard_bytes", [50_000, 10**9])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_transformers_loads_what_was_written(tied, dtype, max_shard_bytes, tmp_path):
    source = tiny(tmp_path / "model", tied, torch.bfloat16 if dtype == torch.float32 else torch.float32)
    trained = {
        name: torch.randn(tensor.shape, generator=torch.Generator().manual_seed(i)).to(dtype)
        for i, (name, tensor) in enumerate(weights_of(source).items())
    }
    export_model(
        iter(trained.items()), shapes_of(trained), read_source(source), tmp_path / "out", max_shard_bytes=max_shard_bytes
    )
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
    """Byte for byte, links followed; what is no part of a model is left behind."""
    real = tiny(tmp_path / "model")
    extra = {"vocab.json": "{}", "merges.txt": "#version\n", "chat_template.json": "{ }", "added_tokens.json": "{ }"}
    for name, text in extra.items():
        (real / name).write_text(text)
    (real / "video_preprocessor_config.json").write_text('{"video_processor_type": "Qwen3VLVideoProcessor"} ')
    # a temperature without sampling: transformers reads it, and refuses to save it
    (real / "generation_config.json").write_text('{"do_sample": false, "temperature": 0.6,\n "eos_token_id": [5, 6]}')
    for stray in ("optimizer.pt", "training_args.bin", "README.md"):
        (real / stray).write_text("not a part of the model")
    (real / "checkpoint-10").mkdir()
    source = tmp_path / "snapshot"  # as the hub's cache has it
    source.mkdir()
    for path in real.iterdir():
        (source / path.name).symlink_to(Path("..") / "model" / path.name)
    copy_through(source, tmp_path / "out")
    found = {path.name for path in (tmp_path / "out").iterdir()}
    assert found - {path.name for path in (tmp_path / "out").glob("model*")} == {
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
        "preprocessor_config.json", "video_preprocessor_config.json", *extra,
    }  # fmt: skip
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    for name in found - {"config.json"} - {path.name for path in (tmp_path / "out").glob("model*")}:
        assert (tmp_path / "out" / name).read_bytes() == (real / name).read_bytes()
    assert load_policy(ModelConfig(path=tmp_path / "out", dtype="float32")).reads_images


def test_nothing_is_asked_of_the_source_when_the_run_ends(tmp_path):
    source = tiny(tmp_path / "model")
    weights, kept = weights_of(source), read_source(source)
    shutil.rmtree(source)
    export_model(weights.items(), shapes_of(weights), kept, tmp_path / "out")
    assert load_policy(ModelConfig(path=tmp_path / "out", dtype="float32")).reads_images


def test_exports_of_equal_models_are_equal_files(tmp_path):
    source = tiny(tmp_path / "model")
    for name in ("one", "other"):
        copy_through(source, tmp_path / name)
    one, other = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "other"))
    assert one == other and MARK in one


@pytest.mark.parametrize("umask", [0o022, 0o027])
def test_modes_follow_the_umask(umask, tmp_path):
    source = tiny(tmp_path / "model")
    (source / "tokenizer.json").chmod(0o400)  # as a hub's cache may have it
    before = os.umask(umask)
    try:
        copy_through(source, tmp_path / "out")
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()} == {0o666 & ~umask}
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o777 & ~umask


@pytest.mark.skipif(is_torchvision_available(), reason="with torchvision, transformers can construct the processor")
def test_transformers_still_cannot_construct_the_processor_without_torchvision(tmp_path):
    """One of the reasons why processor files are copied."""
    copy_through(tiny(tmp_path / "model"), tmp_path / "out")
    with pytest.raises(ImportError, match="Torchvision"):
        AutoProcessor.from_pretrained(tmp_path / "out")


def test_the_config_changes_in_its_dtypes_only(tmp_path):
    source = tiny(tmp_path / "model", dtype=torch.bfloat16)
    path = source / "config.json"
    config = json.loads(path.read_text()) | {"something_new": [1, {"dtype": "int8"}]}
    assert config["dtype"] == config["text_config"]["dtype"] == "bfloat16"
    for key in ("dtype", "torch_dtype"):
        given: dict[str, Any] = {name: value for name, value in config.items() if name != "dtype"} | {key: "bfloat16"}
        path.write_text(json.dumps(given))
        weights = {name: tensor.float() for name, tensor in weights_of(source).items()}
        export_model(weights.items(), shapes_of(weights), read_source(source), tmp_path / "out")
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
        vocab_size=300, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, head_dim=8,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    model.save_pretrained(source)
    (source / "tokenizer.json").write_bytes((tmp_path / "model" / "tokenizer.json").read_bytes())
    copy_through(source, tmp_path / "out", max_shard_bytes=4000)
    loaded = Qwen3ForCausalLM.from_pretrained(tmp_path / "out")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in loaded.state_dict().items())


def test_at_most_one_weight_file_is_held(tmp_path):
    shapes, reused = {f"t{i}": (1 << 18,) for i in range(40)}, torch.empty(1 << 18)  # 1 MiB each
    written = []

    def stream() -> Iterator[tuple[str, torch.Tensor]]:
        for i, name in enumerate(shapes):
            parts = tmp_path.glob("*.safetensors")
            written.append(sum(path.stat().st_size for path in parts) >> 20)
            yield name, reused.fill_(i)

    write_weights(stream(), shapes, tmp_path, 4 << 20)
    assert all(i - size <= 4 for i, size in enumerate(written)), written
    reader = FolderReader(tmp_path)  # the sender's buffer was its own to reuse
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
        export_model(stream[:-1] + last[wrong], shapes, read_source(source), tmp_path / "out", max_shard_bytes=50_000)
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


def check_start(source: Path, out: Path) -> Source:
    return check_export(source, out, "float32")


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "lacks tokenizer.json; copy it"),
        (
            lambda folder: (folder / "preprocessor_config.json").unlink(),
            "lacks preprocessor_config.json, or a processor_config",
        ),
        (lambda folder: (folder / "config.json").unlink(), "lacks config.json"),
        (lambda folder: (folder / "generation_config.json").write_text("{"), "generation_config.json is not valid JSON"),
        (lambda folder: (folder / "generation_config.json").write_text('{"eos_token_id": 9000}'), "eos_token_id in generation"),
        (lambda folder: (folder / "merges.txt").symlink_to("../blobs/gone"), "merges.txt is a link to ../blobs/gone, which"),
        (lambda folder: (folder / "vocab.json").write_bytes(LFS), "vocab.json is a git-lfs pointer"),
        (lambda folder: (folder / "tokenizer_config.json").write_bytes(b""), "tokenizer_config.json is empty"),
        (
            lambda folder: (folder / "special_tokens_map.json").mkdir(),
            "special_tokens_map.json cannot be read (Is a",
        ),
    ],
)
def test_what_cannot_be_exported_is_said_when_the_run_starts(spoil, says, tmp_path):
    source = tiny(tmp_path / "model")
    check_start(source, tmp_path / "run" / "trained")
    spoil(source)
    with pytest.raises(ModelError) as caught:
        check_start(source, tmp_path / "run" / "trained")
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_where_an_export_cannot_be_is_said_when_the_run_starts(tmp_path, monkeypatch, caplog):
    source = tiny(tmp_path / "model")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    (tmp_path / "link").symlink_to("model")
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    weights, kept = weights_of(source), read_source(source)
    for out, says in (
        ("home", "holds no exported model"),
        ("home/thesis.tex", "holds no exported model"),
        ("model/../model", "folder of the model that was trained"),
        ("link", "folder of the model that was trained"),
        (".", "folder of the model that was trained"),
    ):
        with pytest.raises(CheckpointError, match=says):
            check_start(source, tmp_path / out)
        with pytest.raises(CheckpointError, match=says):
            export_model(weights.items(), shapes_of(weights), kept, tmp_path / out)
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years of work"
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    assert not caplog.records
    with pytest.raises(CheckpointError, match=r"thesis\.tex is no folder that can be written"):
        check_start(source, tmp_path / "home" / "thesis.tex" / "trained")
    if os.geteuid():
        (tmp_path / "home").chmod(0o500)
        with pytest.raises(CheckpointError, match=r"home is no folder that can be written"):
            check_start(source, tmp_path / "home" / "run" / "trained")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 1000))
    check_start(source, tmp_path / "new" / "trained")
    assert "the trained model will take 0.000452 GB" in caplog.text and caplog.text.count("\n") == 1


@pytest.mark.parametrize(
    ("add", "names"),
    [
        (lambda out: (out / "README.md").write_text("A model card."), "README.md"),
        (lambda out: (out / ".gitattributes").write_text("*.safetensors filter=lfs"), ".gitattributes"),
        (lambda out: (out / "optimizer.pt").write_bytes(b"moments"), "optimizer.pt"),
        (lambda out: (out / "adapter_model.safetensors").write_bytes(b"weights"), "adapter_model.safetensors"),
        (lambda out: (out / "model.safetensors.bak").write_bytes(b"weights"), "model.safetensors.bak"),
        (lambda out: shutil.copytree(out, out / "checkpoint-500"), "checkpoint-500"),
        (lambda out: (out / "merges.txt").symlink_to("../notes"), "merges.txt"),
        (lambda out: (out / MARK).unlink(), "no model.export.json"),  # as a downloaded model
    ],
)
def test_an_export_replaces_an_export_and_nothing_else(add, names, tmp_path):
    source, out = tiny(tmp_path / "model"), tmp_path / "out"
    copy_through(source, out, max_shard_bytes=10**9)
    check_start(source, out)
    add(out)
    before = {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(CheckpointError) as caught:
        check_start(source, out)
    assert f"({names}); choose another folder, or move it away" in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="holds no exported model, or more than that"):
        copy_through(source, out)
    assert {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_the_model_that_a_run_starts_from_is_never_where_it_is_exported_to(tmp_path):
    top = tmp_path / "hf"
    copy_through(tiny(tmp_path / "model"), top)
    inside = top / "checkpoint-500"  # where transformers' Trainer saves them
    shutil.copytree(tmp_path / "model", inside)
    linked = tmp_path / "linked"  # its files are those of an export
    linked.mkdir()
    copy_through(tmp_path / "model", tmp_path / "older")
    for path in (tmp_path / "older").iterdir():
        (linked / path.name).symlink_to(path)
    (tmp_path / "way").symlink_to("hf")
    for source, out in ((inside, top), (inside, tmp_path / "way"), (tmp_path / "way" / "checkpoint-500", top),
                        (linked, tmp_path / "older")):  # fmt: skip
        with pytest.raises(CheckpointError, match="it is or holds the folder of the model that was trained"):
            check_start(source, out)
        with pytest.raises(CheckpointError, match="it is or holds the folder of the model that was trained"):
            copy_through(source, out)
    check_start(inside, inside / "trained")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(CheckpointError, match=r"cannot export to .*loop"):
        check_start(inside, tmp_path / "loop")


@pytest.mark.parametrize(
    "top", [{}, {"dtype": 1}, {"torch_dtype": 1}, {"dtype": 1, "torch_dtype": 1}, {"dtype": 1, "torch_dtype": 0}]
)
def test_any_spelling_of_the_dtype_is_that_of_the_weights_when_the_run_ends(top, tmp_path):
    source, names = tiny(tmp_path / "model"), {0: "float32", 1: "bfloat16"}
    path = source / "config.json"
    tree = json.loads(path.read_text())
    del tree["dtype"]
    given = {key: names[which] for key, which in top.items()}
    for part in (tree, tree["text_config"], tree["vision_config"]):
        part |= given
    path.write_text(json.dumps(tree))
    for dtype in (torch.float32, torch.bfloat16):
        weights = {name: tensor.to(dtype) for name, tensor in weights_of(source).items()}
        export_model(weights.items(), shapes_of(weights), check_start(source, tmp_path / "out"), tmp_path / "out")
        assert AutoConfig.from_pretrained(tmp_path / "out").dtype == dtype
        found = json.loads((tmp_path / "out" / "config.json").read_text())
        for part in (found, found["text_config"], found["vision_config"]):
            assert all(part[key] == str(dtype).removeprefix("torch.") for key in given)


def test_the_second_model_of_the_check_is_gone_when_it_returns(tmp_path):
    def models() -> int:
        return sum(type(one) is Qwen3VLForConditionalGeneration for one in gc.get_objects())

    source = tiny(tmp_path / "model")
    policy = load_policy(ModelConfig(path=source, dtype="float32"))
    config = json.loads((source / "config.json").read_text())
    gc.collect()
    gc.disable()  # nor is it left to the collector, which runs when it likes
    try:
        before = models()
        check_logits(policy, source)
        assert models() == before > 0
        (source / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
        with pytest.raises(ModelError, match=r"its weights are loaded as torch\.bfloat16, expected torch\.float32") as caught:
            check_logits(policy, source)
        assert models() == before and caught.value.__traceback__ is not None
    finally:
        gc.enable()


def test_an_export_whose_logits_are_not_the_trainers_gets_no_name(tmp_path):
    for dtype in ("float32", "bfloat16"):
        source = tiny(tmp_path / dtype)
        policy = load_policy(ModelConfig.model_validate({"path": source, "dtype": dtype}))
        with torch.no_grad():  # weights that a wrong one shows among
            for weight in policy.model.parameters():
                weight.mul_(8)
        kept, out = read_source(source), tmp_path / f"{dtype}-out"
        export_policy(policy, kept, out)
        assert check_logits(policy, out) < LOGITS_DIFFER[policy.head.dtype] / 5
        before = {path.name: path.read_bytes() for path in out.iterdir()}
        # the folder's config is another one than the model was loaded with
        text = kept.config["text_config"]
        other = text | {"rope_parameters": text["rope_parameters"] | {"rope_theta": 10.0}}
        with pytest.raises(CheckpointError, match=r"not usable, and was removed: the logits of plain transformers differ by"):
            export_policy(policy, replace(kept, config={**kept.config, "text_config": other}), out)
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before
        assert not list(tmp_path.glob(".tmp-*"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_log_probs_tell_an_export_of_other_weights_too(tmp_path, dtype):
    source = tiny(tmp_path / "model")
    config = build({"model": {"path": source, "dtype": dtype}, "rollout": {"temperature": 0.7}})
    policy = load_policy(config.model)
    with torch.no_grad():
        for weight in policy.model.parameters():
            weight.mul_(8)
    trainer = TorchTrainer(policy, config, config.train.optim, 1)
    probe = probe_rollout(policy)
    (logp,) = trainer.logprobs([probe])
    assert probe.images and (logp[probe.sampled] < 0).all()
    export_policy(policy, read_source(source), tmp_path / "out")
    assert check_logprobs(policy, probe, logp, 0.7, tmp_path / "out") < LOGITS_DIFFER[policy.head.dtype]
    with pytest.raises(ModelError, match="log-probs of plain transformers differ"):
        check_logprobs(policy, probe, logp, 1.0, tmp_path / "out")
    with torch.no_grad():
        dict(policy.model.named_parameters())["model.visual.merger.linear_fc2.weight"].add_(1.0)
    export_policy(policy, read_source(source), tmp_path / "out")
    with pytest.raises(ModelError, match="log-probs of plain transformers differ"):
        check_logprobs(policy, probe, logp, 0.7, tmp_path / "out")


def test_an_export_that_plain_transformers_reads_as_another_model_gets_no_name(tmp_path):
    source = tiny(tmp_path / "model")
    weights, kept = weights_of(source), read_source(source)
    for config, says in (
        ({**kept.config, "tie_word_embeddings": False}, r"lacks 1 tensors \(lm_head\.weight\)"),
        ({**kept.config, "model_type": "qwen9"}, "transformers cannot read its config"),
    ):
        with pytest.raises(CheckpointError, match=says):
            export_model(weights.items(), shapes_of(weights), replace(kept, config=config), tmp_path / "out")
        assert {path.name for path in tmp_path.iterdir()} == {"model"}


_KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from metis_fast.checkpoint.export import export_model, read_source
from metis_fast.checkpoint.safetensors_folder import FolderReader

source = Path(sys.argv[1])
shapes = FolderReader(source).shapes

def stream():
    for i, (name, shape) in enumerate(shapes.items()):
        if i == len(shapes) - 2:
            os.kill(os.getpid(), signal.SIGKILL)
        yield name, torch.zeros(shape)

export_model(stream(), shapes, read_source(source), Path(sys.argv[2]), max_shard_bytes=50_000)
"""


def test_a_killed_export_leaves_the_older_one_and_the_next_removes_its_remains(tmp_path):
    source = tiny(tmp_path / "model")
    copy_through(source, tmp_path / "out")
    killed = subprocess.run([sys.executable, "-c", _KILLED, source, tmp_path / "out"])  # not forked: torch has threads here
    assert killed.returncode == -signal.SIGKILL
    assert len(list(tmp_path.glob(".tmp-out-*/*.safetensors"))) > 2
    found, expected = weights_of(tmp_path / "out"), weights_of(source)
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    copy_through(source, tmp_path / "out")
    assert_export_is(source, tmp_path)
