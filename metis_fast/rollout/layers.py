"""Where engine and trainer part: the message that they disagree on, layer by layer.

transformers' own model, with the trainer's weights, is asked as a third one. Whoever's log-probs it contradicts computes
something else; of the engine's layers the first whose output leaves the model's is the likely one. Outputs are compared as
projections on a few random directions, which keep relative distances (Johnson and Lindenstrauss) at a fraction of the size.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from metis_fast.model import Policy, build_model
from metis_fast.types import Rollout

DIRECTIONS = 16
_JUMP = 8.0  # a difference that is so many times the largest one before it, or the noise, is a layer's own
_NOISE = {"bfloat16": 1e-2, "float32": 1e-5}
# what has the same name and the same output in transformers and in vLLM, which runs whole vision blocks past their hooks
_LAYER = re.compile(
    r"(?:^|\.)(visual\.(?:blocks\.\d+\.(?:attn|mlp)|deepstack_merger_list\.\d+|merger)"
    r"|(?<=model\.)(?:layers\.\d+\.(?:self_attn|mlp)|norm))$"
)

_BEFORE = {"layers.0.self_attn": " or the embeddings before it", "visual.blocks.0.attn": " or how images are cut up"}

Layers = Mapping[str, npt.NDArray[np.float32]]
"""Name of a layer -> its output, [rows, DIRECTIONS], in the order in which they ran."""


class LayerRecorder:
    """Hooks on a Qwen3-VL or Qwen3, transformers' or vLLM's, from now until `stop`. Compiled layers run no hooks."""

    def __init__(self, model: nn.Module) -> None:
        self._seen: dict[str, list[Tensor]] = {}
        self._handles = []
        for name, module in model.named_modules():
            if found := _LAYER.search(name):
                self._handles.append(module.register_forward_hook(self._hook(found[1])))

    def _hook(self, name: str) -> Any:
        def hook(_module: nn.Module, _inputs: object, output: Any) -> None:
            if isinstance(output, tuple):  # with attention weights in transformers, with the sum before a norm in vLLM
                output = output[0]
            self._seen.setdefault(name, []).append(_project(output.detach()))

        return hook

    def stop(self) -> dict[str, bytes]:
        """What each layer made, [rows, DIRECTIONS] float32."""
        for handle in self._handles:
            handle.remove()
        return {name: torch.cat(parts).numpy().tobytes() for name, parts in self._seen.items()}


def unpack(recorded: Mapping[str, bytes]) -> Layers:
    """Of `LayerRecorder.stop`."""
    return {name: np.frombuffer(data, np.float32).reshape(-1, DIRECTIONS) for name, data in recorded.items()}


def _project(output: Tensor) -> Tensor:
    rows = output.reshape(-1, output.shape[-1]).float().cpu()
    directions = torch.randn(rows.shape[1], DIRECTIONS, generator=torch.Generator().manual_seed(0))
    return rows @ directions


@dataclass(frozen=True, slots=True, eq=False)
class Reference:
    """What transformers' own model makes of a rollout. logp: of its sampled tokens, at the temperature of the run."""

    logp: npt.NDArray[np.float32]
    layers: Layers


@torch.no_grad()
def reference(policy: Policy, weights: Iterator[tuple[str, Tensor]], rollout: Rollout, temperature: float) -> Reference:
    """Build the model a second time, in the memory of the host, and run it. weights: see `Trainer.weights`; all are read."""
    dtype = policy.head.dtype
    copies = {name: torch.empty(tensor.shape, dtype=dtype).copy_(tensor) for name, tensor in weights}
    model: Any = build_model(policy.model.config, copies, dtype, "sdpa")
    tokens = torch.from_numpy(rollout.tokens.astype(np.int64))
    extra: dict[str, Tensor] = {}
    if rollout.image_spans:
        by_hash = {image.sha256: image for image in rollout.images}
        patches = [policy.images(by_hash[span.sha256]) for span in rollout.image_spans]
        extra = {
            "pixel_values": torch.cat([one.pixels for one in patches]).to(dtype),
            "image_grid_thw": torch.tensor([one.grid for one in patches]),
            "mm_token_type_ids": (tokens[None, :-1] == policy.image_token_id).int(),
        }
    recorder = LayerRecorder(model)
    logits = model(input_ids=tokens[None, :-1], use_cache=False, **extra).logits[0].float() / temperature
    layers = unpack(recorder.stop())
    which = torch.from_numpy(np.flatnonzero(rollout.sampled))
    logp = logits[which - 1].log_softmax(-1).gather(1, tokens[which, None])[:, 0]
    return Reference(logp.numpy(), layers)


def first_difference(engine: Layers, model: Layers, dtype: str) -> str:
    """In words: the first layer whose output the engine makes differently. dtype: what they compute in."""
    missing = [name for name in model if name not in engine]
    if missing:
        return (
            f"the engine tells nothing of {missing[0]}, whose code it has compiled; with rollout.vllm.arguments="
            "{enforce_eager: true} its layers can be compared"
        )
    largest = _NOISE[dtype]
    for name, expected in model.items():
        got = engine[name]
        if got.shape != expected.shape:
            return f"{name} gets {len(got)} rows in the engine and {len(expected)} in the model"
        gap = float(np.linalg.norm(got - expected) / np.linalg.norm(expected))
        if not gap <= _JUMP * largest:  # nor is NaN
            where = name + _BEFORE.get(name, "")
            return f"the likely layer is {where}: its output differs by {gap:.1e} of its size, those before by less"
        largest = max(largest, gap)
    return f"no layer stands out (outputs differ by {largest:.1e} of their size at most): look at the LM head and sampling"
