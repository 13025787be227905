"""The shape of the tests' tiny Qwen3-VL, and the texts that its tokenizer is made of."""

from __future__ import annotations

from dataclasses import replace

from metis_fast.testing.tiny import TinyShape

SHAPE = TinyShape(
    vocab_size=400,
    image_px=1024,
    text_config={
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "mrope_section": [4, 2, 2], "mrope_interleaved": True, "rope_theta": 1e4},
        "tie_word_embeddings": True,
    },
    vision_config={
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "patch_size": 8,
        "temporal_patch_size": 2,
        "spatial_merge_size": 2,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    },
)
HEADS_OF_32 = replace(  # the smallest that vLLM's attention takes
    SHAPE,
    text_config=SHAPE.text_config
    | {
        "head_dim": 32,
        "rope_parameters": SHAPE.text_config["rope_parameters"] | {"mrope_section": [8, 4, 4]},
    },
)
TEXTS = [
    "user\nWhich city lies in France?",
    '{"name": "python", "arguments": {"code": "print(1)"}}',
    "the answer is known",
    "cut",
]
