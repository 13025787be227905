"""Model folders as other trainers and releases write them: the same model however it is spelled, or a line of what is wrong."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from folders import EMBED, LFS, Tree, Weights, change, load, refusal, respell
from tokenizers import AddedToken
from transformers import AutoTokenizer, Qwen3Config

from metis_fast import cli
from metis_fast.checkpoint.export import check_export, check_logits, export_policy, read_source
from metis_fast.config import Config
from metis_fast.demo.play import play
from metis_fast.demo.policy import BASE
from metis_fast.errors import ModelError
from metis_fast.model_folder import check_model_folder, hf_shapes, load_processor, read_config
from metis_fast.plan.shape import Shape, read_model_config
from metis_fast.types import ImageBlob


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


# -- config.json ------------------------------------------------------------------------------------------------------


def _version_4(tree: Tree) -> None:
    rope = tree["text_config"].pop("rope_parameters")
    tree["text_config"] |= {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    tree["torch_dtype"] = tree.pop("dtype")
    tree["vision_config"].pop("rope_parameters", None)
    tree["vision_config"]["model_type"] = "qwen3_vl"


def _both_ropes(tree: Tree) -> None:
    rope = tree["text_config"]["rope_parameters"]
    tree["text_config"]["rope_scaling"] = {name: rope[name] for name in ("rope_type", "mrope_section", "mrope_interleaved")}


def _theta_at_the_top(tree: Tree) -> None:
    tree["rope_theta"] = tree["text_config"]["rope_parameters"].pop("rope_theta")


def _old_type(tree: Tree) -> None:
    rope = tree["text_config"]["rope_parameters"]
    rope["type"] = rope.pop("rope_type")


def _flat(tree: Tree) -> None:
    tree |= {name: value for name, value in tree.pop("text_config").items() if name not in ("model_type", "dtype")}


def _tied_in_the_text_alone(tree: Tree) -> None:
    del tree["tie_word_embeddings"]
    tree["text_config"]["tie_word_embeddings"] = True


def _tied_at_the_top_alone(tree: Tree) -> None:
    tree["text_config"].pop("tie_word_embeddings", None)


def _other_ids(tree: Tree) -> None:
    tree |= {"eos_token_id": [1, 2], "bos_token_id": None, "pad_token_id": 0, "use_cache": False, "something_new": {"a": [1]}}
    tree["text_config"] |= {"eos_token_id": 2, "pad_token_id": 0, "bos_token_id": 0}


def _no_types(tree: Tree) -> None:
    del tree["dtype"]
    for part in ("text_config", "vision_config"):
        tree[part].pop("dtype", None)
        tree[part].pop("model_type", None)


def _other_kernels(tree: Tree) -> None:
    for part in (tree, tree["text_config"], tree["vision_config"]):
        part |= {"_attn_implementation": "flash_attention_2", "attn_implementation": "flash_attention_2"}


CONFIGS = [
    _other_kernels, _version_4, _both_ropes, _theta_at_the_top, _old_type, _flat, _tied_in_the_text_alone,
    _tied_at_the_top_alone, _other_ids, _no_types,
]  # fmt: skip


@pytest.mark.parametrize("edit", CONFIGS)
def test_a_config_means_the_same_however_it_is_spelled(edit, folder, tiny_folder, tmp_path):
    """To the model, to ranks and plans, and in what is exported, where plain transformers has to read it."""
    change(folder / "config.json", edit)
    policy = load(folder)
    assert check_logits(policy, tiny_folder) < 1e-5
    assert hf_shapes(read_config(folder)) == hf_shapes(read_config(tiny_folder))
    shapes = [Shape.of(read_model_config(Config(), path)) for path in (folder, tiny_folder)]
    assert shapes[0] == shapes[1] and shapes[0].tied
    rope = [read_config(path).get_text_config().rope_parameters for path in (folder, tiny_folder)]
    assert rope[0]["rope_theta"] == rope[1]["rope_theta"] == 1e4 and rope[0]["mrope_section"] == rope[1]["mrope_section"]
    export_policy(policy, read_source(folder), tmp_path / "out")  # compares logits by itself
    assert check_logits(load(tmp_path / "out"), tiny_folder) < 1e-5


def test_a_config_that_differs_shows_in_these_comparisons(folder, tiny_folder):
    change(folder / "config.json", lambda tree: tree["text_config"]["rope_parameters"].update(rope_theta=5e5))
    with pytest.raises(ModelError, match="differ by"):
        check_logits(load(folder), tiny_folder)


@pytest.mark.parametrize(
    ("edit", "says"),
    [
        (
            lambda tree: tree.update(model_type="qwen2_5_vl"),
            "expected model_type qwen3_vl (or qwen3 for text only), got",
        ),
        (lambda tree: tree.update(model_type=["qwen3_vl"]), "got ['qwen3_vl']"),
        (lambda tree: tree.update(quantization_config={"quant_method": "gptq"}), "has a quantization_config (gptq): quantised"),
        (lambda tree: tree["text_config"].update(quantization_config={"quant_method": "fp8"}), "quantization_config (fp8)"),
        (lambda tree: tree.update(compression_config={"format": "x"}), "has a compression_config (no method named)"),
        (lambda tree: tree.update(text_config=[1]), "text_config and vision_config must be objects"),
        (lambda tree: tree["text_config"].update(hidden_size="wide"), "config.json cannot be used"),
        (lambda tree: tree["text_config"].update(rope_scaling="linear"), "config.json cannot be used"),
        (
            lambda tree: tree.update(image_token_id=100_000),
            "image_token_id in config.json is 100000, but the embedding",
        ),
        (lambda tree: tree.update(eos_token_id=[3, -7]), "eos_token_id in config.json is -7, but the embedding has rows"),
        (lambda tree: tree.update(pad_token_id="<pad>"), "pad_token_id in config.json is '<pad>', expected token ids"),
        (lambda tree: tree["text_config"].update(pad_token_id=400), "pad_token_id in text_config of config.json is 400"),
        (lambda tree: tree.update(eos_token_id=True), "eos_token_id in config.json is True, expected token ids"),
        (lambda tree: tree.update(eos_token_id=[3, False]), "eos_token_id in config.json is [3, False], expected token ids"),
        (lambda tree: tree.update(eos_token_id=-1), "eos_token_id in config.json is -1, but the embedding has rows"),
        (lambda tree: tree["text_config"].update(pad_token_id=-2), "pad_token_id in text_config of config.json is -2"),
        (lambda tree: tree.update(image_token_id=tree["video_token_id"]), "but <|image_pad|> is"),
        (lambda tree: tree["text_config"].update(num_hidden_layers=3), "lacks 11 tensors"),
        (lambda tree: tree["text_config"].update(num_attention_heads=0), "config.json "),
        (lambda tree: tree["text_config"].update(num_key_value_heads=0), "config.json is of no model that can be built ("),
        (
            lambda tree: tree["text_config"].update(hidden_size=-4),
            "config.json is of no model that can be built (RuntimeError: ",
        ),
        (lambda tree: tree["text_config"].update(hidden_act="relu7"), "built (KeyError: 'relu7'); restore the file"),
        (lambda tree: tree["vision_config"].update(num_heads=0), "config.json is of no model that can be built (ZeroDivision"),
        (
            lambda tree: tree["text_config"]["rope_parameters"].update(rope_theta=0),
            "built (ValueError: positions become NaN or",
        ),
        (lambda tree: tree["text_config"]["rope_parameters"].update(rope_theta=-1e4), "see rope_parameters, now {"),
        (
            lambda tree: tree["text_config"]["rope_parameters"].update(mrope_section="4,2,2"),
            "config.json is of no model that can",
        ),
        (lambda tree: tree["text_config"]["rope_parameters"].update(mrope_section=[8]), "config.json is of no model that can"),
        (lambda tree: tree.update(tie_word_embeddings=False), "lacks 1 tensors (lm_head.weight)"),
        (lambda tree: tree["vision_config"].update(patch_size=16), "the image processor has patch_size 8, the vision_config"),
    ],
)
def test_a_config_that_cannot_be_is_a_line(edit, says, folder):
    change(folder / "config.json", edit)
    assert says in refusal(folder)


@pytest.mark.parametrize("number", [1001, 10**9, 1e12])
@pytest.mark.parametrize(("part", "name"), [("text_config", "num_hidden_layers"), ("vision_config", "depth")])
def test_layers_beyond_number_are_a_line_before_they_take_all_memory(part, name, number, folder, tmp_path):
    change(folder / "config.json", lambda tree: tree[part].update({name: number}))
    said = f"config.json: {name} is {number}, "
    assert f"{folder}/{said}the weights beside it have 2; correct it, or restore the file" in refusal(folder)
    shutil.move(folder / "config.json", tmp_path / "config.json")  # as plans are given it, without weights
    with pytest.raises(ModelError, match=re.escape(f"{said}expected at most 1000; correct it")):
        read_model_config(Config(), tmp_path / "config.json")


def test_layers_that_see_a_window_of_the_text_are_a_line():
    """They would be trained as if they saw all of it, and no text as short as that of the export's check would show it."""
    config = Qwen3Config(vocab_size=9, num_hidden_layers=2, use_sliding_window=True, sliding_window=4, max_window_layers=1)
    with pytest.raises(ModelError, match="its layers have a sliding window"):
        hf_shapes(config)


@pytest.mark.parametrize("name", ["pad_token_id", "bos_token_id"])
@pytest.mark.parametrize("place", ["generation_config.json", "config.json", "text_config"])
def test_a_token_of_minus_one_is_none(name, place, folder, tmp_path):
    """The embedding, too, has no row without a gradient; transformers takes -1 for its last one."""
    if place == "generation_config.json":
        (folder / place).write_text(json.dumps({name: -1, "eos_token_id": [3]}))
    else:
        change(
            folder / "config.json", lambda tree: (tree if place == "config.json" else tree["text_config"]).update({name: -1})
        )
    policy = load(folder)
    assert policy.decoder.embed_tokens.padding_idx is None
    if name == "pad_token_id":
        export_policy(policy, read_source(folder), tmp_path / "out")
        assert check_model_folder(tmp_path / "out") == "qwen3_vl"


@pytest.mark.parametrize("value", [True, [True], [3, False], -1, 9000, "3"])
def test_a_generation_config_whose_end_is_no_token_is_a_line(value, folder):
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": value}))
    assert f"{folder}: eos_token_id in generation_config.json is " in refusal(folder)


# -- tokenizer and processor ------------------------------------------------------------------------------------------


def _more_tokens(folder: Path, number: int) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([AddedToken(f"<more_{i}>") for i in range(number)])
    tokenizer.save_pretrained(folder)


def test_an_embedding_may_have_more_rows_than_the_tokenizer_has_tokens_and_not_fewer(folder, tiny_folder):
    def pad(weights: Weights) -> Weights:
        return weights | {EMBED: torch.cat([weights[EMBED], weights[EMBED][:40]])}

    rows = read_config(folder).get_text_config().vocab_size
    respell(folder, pad)
    change(folder / "config.json", lambda tree: tree["text_config"].update(vocab_size=rows + 40))
    assert load(folder).vocab_size == rows + 40
    _more_tokens(folder, 41)
    assert f"the embedding has {rows + 40} rows, but the tokenizer has ids up to {rows + 40} ('<more_40>')" in refusal(folder)


@pytest.mark.parametrize("both", [False, True], ids=["alone", "beside the old file"])
def test_a_processor_as_transformers_5_saves_it_is_the_same_one(both, folder, tiny_folder, tmp_path):
    path = folder / "preprocessor_config.json"
    nested = json.loads(path.read_text())
    tree = {"image_processor": nested, "processor_class": "Qwen3VLProcessor", "video_processor": {"patch_size": 8}}
    (folder / "processor_config.json").write_text(json.dumps(tree))
    if both:  # what transformers, and with it vLLM, would not read
        change(path, lambda old: old.update(size={"shortest_edge": 4096, "longest_edge": 4096}))
    else:
        path.unlink()
    noise = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    processors = [load_processor(one) for one in (folder, tiny_folder)]
    assert torch.equal(*(one([noise], return_tensors="pt")["pixel_values"] for one in processors if one is not None))
    policy = load(folder)
    export_policy(policy, read_source(folder), tmp_path / "out")
    assert (tmp_path / "out" / "processor_config.json").read_bytes() == (folder / "processor_config.json").read_bytes()
    assert (tmp_path / "out" / "preprocessor_config.json").exists() == both


def test_an_image_gives_the_same_tokens_from_either_processor_file(folder, picture):
    def tokens() -> int:
        blob: ImageBlob = picture(0, 70, 40)
        return load(folder).images.num_tokens(blob)

    before = tokens()
    nested = json.loads((folder / "preprocessor_config.json").read_text())
    (folder / "processor_config.json").write_text(json.dumps({"image_processor": nested}))
    (folder / "preprocessor_config.json").unlink()
    assert tokens() == before


def test_a_processor_config_without_an_image_processor_is_not_enough(folder):
    (folder / "preprocessor_config.json").unlink()
    (folder / "processor_config.json").write_text('{"processor_class": "Qwen3VLProcessor"}')
    assert "lacks preprocessor_config.json, or a processor_config.json with an image_processor" in refusal(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "preprocessor_config.json"])
@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda path: path.write_bytes(LFS), "is a git-lfs pointer and not the file itself; run `git lfs pull`"),
        (lambda path: path.write_bytes(b""), "is empty; copy it from its source again"),
        (
            lambda path: path.unlink() or path.symlink_to("../../blobs/4d7a"),
            "is a link to ../../blobs/4d7a, which does not exist",
        ),
        (lambda path: path.unlink() or path.mkdir(), "cannot be read (Is a directory)"),
        (lambda path: path.write_bytes(b"<html><body>404 Not Found</body></html>"), ""),
        (lambda path: path.write_bytes(b"\xff\xfe{\x00}\x00" * 9), ""),
        (lambda path: path.write_bytes(b"{}"), ""),
        (lambda path: path.write_bytes(b"[1]"), ""),
        (lambda path: path.write_bytes(b'{"a":' * 100_000), ""),
    ],
)
def test_a_file_that_is_not_what_its_name_says_is_a_line(name, spoil, says, folder):
    spoil(folder / name)
    assert says in refusal(folder)
    assert name in refusal(folder) or name.startswith(("tokenizer", "preprocessor"))


@pytest.mark.parametrize("name", ["trainer_state.json", "model-00001-of-00002.safetensors", "LICENSE"])
def test_a_link_to_nowhere_is_named_whatever_it_was(name, folder):
    (folder / name).symlink_to("../../blobs/4d7a")
    assert f"{folder / name} is a link to ../../blobs/4d7a, which does not exist; copy or download the folder again" in refusal(
        folder
    )
    (folder / name).unlink()
    (folder / name).symlink_to(name)
    assert f"{folder / name} cannot be read (Too many levels of symbolic links)" in refusal(folder)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"size": {"height": 64, "width": 64}}, "cannot be used (its size has no shortest_edge and longest_edge"),
        ({"size": {"shortest_edge": 64}}, "cannot be used (its size has no shortest_edge and longest_edge"),
        ({"size": {"shortest_edge": 0, "longest_edge": 0}}, "cannot be used (its size has no shortest_edge and longest_edge"),
        ({"size": {"shortest_edge": 10**12, "longest_edge": 10**13}}, "tokens, where the model reads "),
        ({"do_resize": False}, "cannot be used (of an image of 83 x 61: "),
        ({"image_mean": [0.5, 0.5]}, "cannot be used (of an image of 83 x 61: "),
        ({"image_std": "none"}, "cannot be used (of an image of 83 x 61: "),
        ({"resample": 99}, "image processor of "),
        ({"rescale_factor": "1/255"}, "cannot be used (of an image of 83 x 61: "),
        ({"image_std": [0.5, 0.0, 0.5]}, "cannot be used (pixels become NaN or Inf; see image_std, image_mean and"),
        ({"image_mean": [float("nan")] * 3}, "cannot be used (pixels become NaN or Inf"),
        ({"patch_size": "8"}, "the image processor has patch_size '8', the vision_config of config.json patch_size 8"),
        ({"patch_size": 0}, "the image processor has patch_size 0, the vision_config"),
        ({"merge_size": 0}, "the image processor has merge_size 0, the vision_config"),
        ({"temporal_patch_size": None}, "the image processor has temporal_patch_size "),
    ],
)
def test_a_processor_that_no_image_passes_is_a_line(settings, says, folder):
    change(folder / "preprocessor_config.json", lambda tree: tree.update(settings))
    said = refusal(folder)
    assert says in said and said.endswith(("copy it from its source", "copy both from the same model"))


@pytest.mark.parametrize("settings", [{"merge_size": 0}, {"patch_size": "8"}, {"do_resize": False}])
def test_a_processor_is_the_models_fault_for_data_check_and_a_playing_script_too(settings, folder, capsys):
    change(folder / "preprocessor_config.json", lambda tree: tree.update(settings))
    said = refusal(folder)
    assert cli.main(["data", "check", str(folder / "none.parquet"), "--model", str(folder)]) == 2
    assert capsys.readouterr().err.strip() == f"metis-fast: {said}"
    with pytest.raises(ModelError, match=re.escape(said)):
        config = Config.model_validate({"model": {"path": folder}})
        play(config, folder / "none.parquet", BASE, folder / "trajectories")


@pytest.mark.parametrize("both", [("patch_size", "patch_size"), ("merge_size", "spatial_merge_size")])
def test_patches_of_no_size_are_a_line_where_both_configs_agree(both, folder):
    change(folder / "preprocessor_config.json", lambda tree: tree.update({both[0]: 0}))
    change(folder / "config.json", lambda tree: tree["vision_config"].update({both[1]: 0}))
    assert str(folder) in refusal(folder)


def test_a_folder_that_is_something_else_is_a_line(folder):
    def said() -> str:
        with pytest.raises(ModelError) as caught:
            check_model_folder(folder)
        return str(caught.value)

    (folder / "adapter_config.json").write_text("{}")
    assert "holds a LoRA adapter; merge it into its model" in said()
    (folder / "adapter_config.json").unlink()
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "has no *.safetensors; convert the weights to safetensors first" in said()


# -- what exports take over -------------------------------------------------------------------------------------------


def warnings(folder: Path, caplog: pytest.LogCaptureFixture) -> list[str]:
    """Said when a run starts."""
    caplog.clear()
    check_export(folder, folder.parent / "trained", "float32")
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        (
            "chat_template.jinja",
            "{% for message in messages %}a",
            "expected a chat template that Jinja reads, got an error (Un",
        ),
        ("chat_template.jinja", "{{ messages | shout }}", "(No filter named 'shout'"),
        ("chat_template.json", '{"chat_template": "{{ a"}', "expected a chat template chat_template.json that Jinja reads"),
        ("chat_template.json", '{"chat_template": 3}', "expected a chat template chat_template.json that Jinja reads"),
    ],
)
def test_a_chat_template_that_cannot_be_read_is_a_warning(name, text, says, folder, caplog):
    assert warnings(folder, caplog) == []
    (folder / name).write_text(text)
    (said,) = warnings(folder, caplog)
    assert said.startswith(f"{folder}: ") and says in said and said.endswith("copy it from the model's source")


def test_chat_templates_that_jinja_reads_are_none(folder, caplog):
    for text in (
        "{% generation %}{{ raise_exception('never') }}{% endgeneration %}",
        "{% for a in b %}{% break %}{% endfor %}",
    ):
        (folder / "chat_template.jinja").write_text(text)
        assert warnings(folder, caplog) == []
    (folder / "chat_template.json").write_text("{ }")
    assert warnings(folder, caplog) == []


@pytest.mark.parametrize(
    ("generation", "config", "text", "says"),
    [
        ({"eos_token_id": 5}, None, None, "eos_token_id in generation_config.json is 5, expected {} (<|im_end|>), which ends"),
        ({"eos_token_id": [5, 6]}, "end", "end", "eos_token_id in generation_config.json is [5, 6], expected {} (<|im_end|>)"),
        ({}, 5, None, "eos_token_id in config.json is 5, expected {} (<|im_end|>)"),
        (None, None, 5, "eos_token_id in text_config of config.json is 5, expected {} (<|im_end|>)"),
        ({"eos_token_id": [5, "end"]}, 5, 5, ""),
        ({"eos_token_id": "end"}, None, None, ""),
        (None, "end", ["end", 6], ""),
        (None, None, None, ""),
    ],
)
def test_an_end_that_is_not_that_of_messages_is_a_warning(generation, config, text, says, folder, caplog):
    end = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("<|im_end|>")

    def ids(value: object) -> object:
        return [ids(one) for one in value] if isinstance(value, list) else end if value == "end" else value

    def ends(tree: Tree) -> None:
        tree["eos_token_id"], tree["text_config"]["eos_token_id"] = ids(config), ids(text)

    change(folder / "config.json", ends)
    (folder / "generation_config.json").unlink()
    if generation is not None:
        tree = {name: ids(value) for name, value in generation.items()}
        (folder / "generation_config.json").write_text(json.dumps(tree))
    said = warnings(folder, caplog)
    assert len(said) == bool(says) and all(f"{folder}: {says.format(end)}" in line for line in said)
