"""The layer in which two models part is the one that is named."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from metis_fast.config import Config, ModelConfig
from metis_fast.model import Policy, load_policy
from metis_fast.rollout.chat import Chat
from metis_fast.rollout.engine import Completion
from metis_fast.rollout.episode import Trace
from metis_fast.rollout.layers import DIRECTIONS, LayerRecorder, Layers, first_difference, reference, unpack
from metis_fast.train.torch_backend import TorchTrainer
from metis_fast.types import ImageBlob, Outcome, Prompt, Rollout

CONFIG = Config.model_validate({"model": {"dtype": "float32"}})


@pytest.fixture
def rollout(policy: Policy, make_prompt: Callable[..., Prompt], picture: Callable[..., ImageBlob]) -> Rollout:
    """A prompt with an image and a message of five tokens."""
    prompt = make_prompt("<image> Which city is that?", [picture(0)])
    piece = Chat(policy.tokenizer, policy.images).encode_prompt(prompt)
    trace = Trace(len(piece.tokens), list(piece.tokens), list(piece.images), list(piece.spans))
    tokens = np.arange(5, dtype=np.int32) + 20
    trace.sampled.append((len(trace.tokens), Completion(tokens, np.zeros(5, np.float32), np.zeros(5, np.int32), False)))
    trace.tokens += tokens.tolist()
    return trace.finish(prompt, 0, Outcome.LENGTH)


def _layers(policy: Policy, weights: Policy, rollout: Rollout) -> Layers:
    own = ((name, tensor.detach()) for name, tensor in weights.model.named_parameters())
    return reference(policy, own, rollout, 1.0).layers


def test_transformers_own_model_says_what_the_trainer_says(load_tiny: Callable[..., Policy], rollout: Rollout) -> None:
    policy = load_tiny()
    with torch.no_grad():
        policy.decoder.norm.weight.mul_(1.1)  # pyright: ignore[reportArgumentType, reportCallIssue]
    trainer = TorchTrainer(policy, CONFIG, CONFIG.train.optim, 1)
    (own,) = trainer.logprobs([rollout])
    found = reference(policy, trainer.weights(), rollout, CONFIG.rollout.temperature)
    np.testing.assert_allclose(found.logp, own[rollout.sampled], rtol=0, atol=1e-5)
    names = list(found.layers)
    assert names[0] == "visual.blocks.0.attn" and names[-1] == "norm" and "visual.merger" in names
    decoder = [f"layers.{i}.{part}" for i in range(len(policy.decoder.layers)) for part in ("self_attn", "mlp")]
    assert [name for name in names if name.startswith("layers.")] == decoder
    assert found.layers["norm"].shape == (len(rollout.tokens) - 1, DIRECTIONS)


def test_nothing_is_read_of_the_folder_whose_layout_may_be_an_older_one(
    tiny_folder: Path, rollout: Rollout, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(tiny_folder, tmp_path / "model"))
    policy = load_policy(ModelConfig(path=folder, dtype="float32"))
    trainer = TorchTrainer(policy, CONFIG, CONFIG.train.optim, 1)
    (own,) = trainer.logprobs([rollout])
    shutil.rmtree(folder)
    found = reference(policy, trainer.weights(), rollout, CONFIG.rollout.temperature)
    np.testing.assert_allclose(found.logp, own[rollout.sampled], rtol=0, atol=1e-5)
    (again,) = trainer.logprobs([rollout])  # whose attention is still its own
    np.testing.assert_array_equal(again, own)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ("layers.1.mlp.down_proj", "the likely layer is layers.1.mlp:"),
        ("layers.0.self_attn.k_norm", "the likely layer is layers.0.self_attn or the embeddings before it:"),
        ("visual.patch_embed", "the likely layer is visual.blocks.0.attn or how images are cut up:"),
        ("visual.blocks.1.attn", "the likely layer is visual.blocks.1.attn:"),
        ("visual.merger.", "the likely layer is visual.merger:"),
        ("language_model.norm", "the likely layer is norm:"),
        ("nothing of this name", "no layer stands out"),
    ],
)
def test_the_first_layer_whose_output_differs_is_named(
    policy: Policy, load_tiny: Callable[..., Policy], rollout: Rollout, weights: str, said: str
) -> None:
    other = load_tiny()
    with torch.no_grad():
        for name, parameter in other.model.named_parameters():
            if weights in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    found = first_difference(_layers(policy, other, rollout), _layers(policy, policy, rollout), "float32")
    assert found.startswith(said), found


def test_what_cannot_be_compared_is_said(policy: Policy, rollout: Rollout) -> None:
    model = dict(_layers(policy, policy, rollout))
    compiled = {name: rows for name, rows in model.items() if name.startswith("visual.")}
    assert "layers.0.self_attn, whose code it has compiled" in first_difference(compiled, model, "float32")
    short = model | {"visual.merger": model["visual.merger"][1:]}
    num = len(model["visual.merger"])
    assert f"visual.merger gets {num - 1} rows in the engine and {num} in" in first_difference(short, model, "float32")
    broken = model | {"layers.1.mlp": model["layers.1.mlp"] * np.nan}
    assert first_difference(broken, model, "float32").startswith("the likely layer is layers.1.mlp:")


@pytest.mark.parametrize("names", [("language_model", "model"), ("model",)], ids=["with images", "text only"])
def test_vllms_layers_are_read_by_the_same_names(names: tuple[str, ...]) -> None:
    """In as many calls as the prompt is cut into; of a tuple the first is the output."""

    class Norm(torch.nn.Module):
        def forward(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return rows, rows * 3.0

    norm = Norm()
    model = torch.nn.ModuleDict({"norm": norm})
    for name in reversed(names):
        model = torch.nn.ModuleDict({name: model})
    rows = torch.randn(5, 32)
    recorder = LayerRecorder(model)
    norm(rows[:3])
    norm(rows[3:])
    recorded = unpack(recorder.stop())
    norm(rows)
    assert list(recorded) == ["norm"] and recorded["norm"].shape == (5, DIRECTIONS)
    length = float(rows.norm()) * DIRECTIONS**0.5
    assert float(np.linalg.norm(recorded["norm"])) == pytest.approx(length, rel=0.3)  # distances are kept
