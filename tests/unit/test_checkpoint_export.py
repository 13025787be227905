"""An exported model is the trained one, for transformers without any of this package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoImageProcessor,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.utils.import_utils import is_torchvision_available

from metis_fast.checkpoint.export import export_model
from metis_fast.errors import CheckpointError

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
MESSAGES = [{"role": "user", "content": "2+2?"}]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.chat_template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    return fast


def tiny_model(tied: bool = True, seed: int = 0, dtype: torch.dtype = torch.float32) -> Qwen3VLForConditionalGeneration:
    tokenizer = tiny_tokenizer()
    ids = tokenizer.get_vocab()
    rope = {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True, "rope_theta": 10000.0}
    text = dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    text |= dict(
        num_key_value_heads=1, head_dim=16, max_position_embeddings=256, rope_parameters=rope, tie_word_embeddings=tied
    )
    vision = dict(depth=2, hidden_size=16, intermediate_size=32, num_heads=2, patch_size=8, spatial_merge_size=2)
    vision |= dict(out_hidden_size=32, num_position_embeddings=16, deepstack_visual_indexes=[0])
    config = Qwen3VLConfig(
        text_config=text | {"pad_token_id": None},
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=tied,
    )
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(config)
    for weight in model.parameters():  # as from_pretrained does; `model.to` would round the rotary frequencies, too
        weight.data = weight.data.to(dtype)
    model.generation_config = GenerationConfig(eos_token_id=ids["<|im_end|>"], do_sample=True, top_p=0.8)
    return model.eval()


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Tokenizer and processor files of a model that was trained, with bytes that saving anew would change."""
    folder = tmp_path / "source"
    tiny_tokenizer().save_pretrained(folder)
    size = {"shortest_edge": 1024, "longest_edge": 1024}
    Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, size=size).save_pretrained(folder)
    for name in ("preprocessor_config.json", "tokenizer.json"):
        path = folder / name
        path.write_text(path.read_text() + "\n")
    (folder / "video_preprocessor_config.json").write_text('{"video_processor_type": "Qwen3VLVideoProcessor"}')
    (folder / "unrelated.bin").write_text("not to be copied")
    return folder


def logits(model: Qwen3VLForConditionalGeneration) -> torch.Tensor:
    """Of a prompt with an image, so that vision tower, merger, deepstack and decoder all speak."""
    config, noise = model.config, torch.Generator().manual_seed(1)
    image = [config.vision_start_token_id] + [config.image_token_id] * 4 + [config.vision_end_token_id]
    input_ids = torch.tensor([[5, 6, *image, 7, 8]])
    with torch.no_grad():
        return model(
            input_ids=input_ids,
            mm_token_type_ids=(input_ids == config.image_token_id).int(),
            pixel_values=torch.randn(16, 3 * 2 * 8 * 8, generator=noise),
            image_grid_thw=torch.tensor([[1, 4, 4]]),
        ).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [True, False])
def test_plain_transformers_gives_bit_identical_logits(dtype, tied, source, tmp_path):
    model = tiny_model(tied, dtype=dtype)
    export_model(model, source, source, tmp_path / "out", max_shard_size="50KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    loaded = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert loaded.dtype == dtype
    assert torch.equal(logits(loaded.eval()), logits(model))
    weights = loaded.state_dict()
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.state_dict().items())
    assert (loaded.lm_head.weight is loaded.get_input_embeddings().weight) == tied
    assert (loaded.generation_config.top_p, loaded.generation_config.do_sample) == (0.8, True)


def test_files_of_a_source_folder_are_copied_byte_for_byte(source, tmp_path):
    export_model(tiny_model(), source, source, tmp_path / "out")
    for name in ("preprocessor_config.json", "video_preprocessor_config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()
    assert not (tmp_path / "out" / "unrelated.bin").exists()


@pytest.mark.parametrize("as_objects", [False, True], ids=["copied", "saved"])
def test_tokenizer_chat_template_and_image_processor_load_and_agree(as_objects, source, tmp_path):
    tokenizer, processor = tiny_tokenizer(), Qwen2VLImageProcessorPil.from_pretrained(source)
    if as_objects:
        export_model(tiny_model(), tokenizer, processor, tmp_path / "out")
    else:
        export_model(tiny_model(), source, source, tmp_path / "out")
    loaded = AutoTokenizer.from_pretrained(tmp_path / "out")
    expected = str(tokenizer.apply_chat_template(MESSAGES, tokenize=False))
    assert "2+2?" in expected and loaded.apply_chat_template(MESSAGES, tokenize=False) == expected
    assert loaded(expected).input_ids == tokenizer(expected).input_ids
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    again = AutoImageProcessor.from_pretrained(tmp_path / "out", backend="pil")
    found, known = again([image], return_tensors="pt"), processor([image], return_tensors="pt")
    assert torch.equal(found["pixel_values"], known["pixel_values"])
    assert torch.equal(found["image_grid_thw"], known["image_grid_thw"])


@pytest.mark.skipif(is_torchvision_available(), reason="with torchvision, transformers can construct the processor")
def test_transformers_still_cannot_construct_the_processor_without_torchvision(source, tmp_path):
    """The reason why processor files are copied; when this fails, `export_model` may save a processor object instead."""
    export_model(tiny_model(), source, source, tmp_path / "out")
    with pytest.raises(ImportError, match="Torchvision"):
        AutoProcessor.from_pretrained(tmp_path / "out")


def test_an_older_export_is_replaced_whole(source, tmp_path):
    out = tmp_path / "out"
    export_model(tiny_model(seed=1), source, source, out, max_shard_size="20KB")
    newer = tiny_model(seed=2)
    export_model(newer, source, source, out)
    assert len(list(out.glob("*.safetensors"))) == 1
    assert torch.equal(logits(Qwen3VLForConditionalGeneration.from_pretrained(out).eval()), logits(newer))
    assert {path.name for path in tmp_path.iterdir()} == {"out", "source"}


def test_a_failed_export_leaves_the_older_one_and_no_rubbish(source, tmp_path):
    out = tmp_path / "out"
    older = tiny_model(seed=1)
    export_model(older, source, source, out)
    (source / "tokenizer.json").unlink()  # found out after the weights were written
    with pytest.raises(CheckpointError, match=r"lacks tokenizer\.json"):
        export_model(tiny_model(seed=2), source, source, out)
    assert torch.equal(logits(Qwen3VLForConditionalGeneration.from_pretrained(out).eval()), logits(older))
    assert {path.name for path in tmp_path.iterdir()} == {"out", "source"}


def test_leftovers_of_a_killed_export_are_removed_by_the_next(source, tmp_path):
    (tmp_path / ".tmp-out-dead").mkdir()
    (tmp_path / ".tmp-other").mkdir()
    export_model(tiny_model(), source, source, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "source", ".tmp-other"}


def test_a_folder_that_is_no_export_is_never_replaced(source, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="holds no exported model"):
        export_model(tiny_model(), source, source, tmp_path / "home")
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years of work"


def test_the_model_that_was_trained_is_never_replaced(source):
    tiny_model().save_pretrained(source)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    with pytest.raises(CheckpointError, match="folder of the model that was trained"):
        export_model(tiny_model(seed=3), tiny_tokenizer(), source, source / ".." / "source")
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before
