"""The process of `test_sync_vllm.py`: a real vLLM engine and a torch trainer; what they say is written as JSON.

Usage: python sync_vllm_process.py FOLDER OUT RANKS
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).parents[1]))

import numpy as np
import torch
from PIL import Image
from tiny_shape import HEADS_OF_32, TEXTS

from metis_fast.cluster.weights import changes, pack
from metis_fast.config import Config, ModelConfig
from metis_fast.model import load_policy
from metis_fast.model_folder import hf_shapes
from metis_fast.rollout.chat import Chat
from metis_fast.rollout.layers import first_difference, reference, unpack
from metis_fast.rollout.vllm import library
from metis_fast.rollout.vllm.plugin import EXTENSION, TRANSFER
from metis_fast.sync.segment import FOLDER, HEADER
from metis_fast.sync.staging import Staging
from metis_fast.testing.tiny import build_tiny
from metis_fast.train.torch_backend import TorchTrainer
from metis_fast.types import ImageBlob, Message, Outcome, Prompt, Rollout

TOKENS = 6
Logp = list[list[float]]


def build(folder: Path) -> None:
    """As `tiny_folder` of the tests: predictions depend on what is read."""
    build_tiny(folder, HEADS_OF_32, TEXTS * 5, seed=0)
    policy = load_policy(ModelConfig(path=folder, dtype="float32"))
    with torch.no_grad():
        for name, weight in policy.decoder.named_parameters():
            if weight.ndim == 2:
                weight.mul_(20.0 if "embed" in name else 8.0)
    policy.model.save_pretrained(folder)


def picture(seed: int, width: int, height: int) -> ImageBlob:
    data = BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)).save(data, "PNG")
    return ImageBlob.of(data.getvalue())


class Run:
    """An engine and a trainer of the same model."""

    def __init__(self, folder: Path, dtype: str, ranks: int) -> None:
        library.load()
        from vllm import LLMEngine
        from vllm.config import WeightTransferConfig
        from vllm.engine.arg_utils import EngineArgs

        self.ranks = ranks
        config = Config.model_validate({"model": {"path": folder, "dtype": dtype}})
        self.policy = load_policy(config.model)
        self.trainer = TorchTrainer(self.policy, config, config.train.optim, 10)
        chat = Chat(self.policy.tokenizer, self.policy.images)
        images = (picture(0, 32, 32), picture(1, 96, 32))
        self.pieces = [
            chat.encode_prompt(Prompt("p", "test", (Message("user", text),), seen, "search", ("x",), "rule", text))
            for text, seen in (("Which city lies in France?", ()), ("<image> or <image>?", images))
        ]
        self.engine = LLMEngine.from_engine_args(
            EngineArgs(
                model=str(folder),
                dtype=dtype,  # pyright: ignore[reportArgumentType]
                max_model_len=512,
                max_num_seqs=4,
                enforce_eager=True,
                enable_prefix_caching=True,
                tensor_parallel_size=ranks,
                weight_transfer_config=WeightTransferConfig(backend=TRANSFER),
                worker_extension_cls=EXTENSION,
                limit_mm_per_prompt={"image": 2, "video": 0},
                mm_processor_kwargs={"use_fast": False},
            )
        )
        self.engine.collective_rpc("init_weight_transfer_engine", args=({},))
        self._requests = 0
        self.staging = Staging(hf_shapes(self.policy.model.config), getattr(torch, dtype), 1 << 14)

    def sample(self) -> list[Rollout]:
        """Greedy messages of both prompts, with the engine's log-probs."""
        from vllm import SamplingParams

        pad = self.policy.image_token_id
        never = {token: -1e9 for token in self.policy.placeholder_ids}
        params = SamplingParams(temperature=0, max_tokens=TOKENS, logprobs=0, ignore_eos=True, logit_bias=never)
        for index, piece in enumerate(self.pieces):
            request = self._request(index, piece.tokens)
            assert request["prompt_token_ids"].count(pad) == len(piece.spans)
            self.engine.add_request(f"{self._requests}-{index}", request, params)
        self._requests += 1
        done = {}
        while self.engine.has_unfinished_requests():
            done |= {int(out.request_id.split("-")[1]): out for out in self.engine.step() if out.finished}
        return [self._rollout(index, done[index].outputs[0]) for index in range(len(self.pieces))]

    def _request(self, index: int, tokens: Sequence[int]) -> Any:
        # an image is one token for vLLM, which makes as many of it as the image takes
        piece = self.pieces[index]
        inside = {at for span in piece.spans for at in range(span.start + 1, span.stop)}
        request: Any = {"prompt_token_ids": [t for i, t in enumerate(tokens) if i not in inside]}
        if piece.images:
            request["multi_modal_data"] = {"image": [Image.open(BytesIO(image.data)) for image in piece.images]}
        return request

    def first_difference(self, rollout: Rollout) -> str:
        """Of the engine's layers from those of transformers with the trainer's weights; rollout: the one with images."""
        from vllm import SamplingParams

        self.engine.reset_prefix_cache(reset_running_requests=True)
        self.engine.reset_encoder_cache()
        self.engine.collective_rpc("record_layers")
        self.engine.add_request("layers", self._request(1, rollout.tokens[:-1].tolist()), SamplingParams(max_tokens=1))
        while self.engine.has_unfinished_requests():
            self.engine.step()
        recorded = self.engine.collective_rpc("recorded_layers")
        assert len(recorded) == self.ranks and all(one.keys() == recorded[0].keys() for one in recorded)
        dtype = str(self.policy.head.dtype).removeprefix("torch.")
        model = reference(self.policy, self.trainer.weights(), rollout, 1.0)
        return first_difference(unpack(recorded[-1]), model.layers, dtype)

    def _rollout(self, index: int, out) -> Rollout:
        piece, new = self.pieces[index], list(out.token_ids)
        logp = [row[token].logprob for token, row in zip(new, out.logprobs, strict=True)]
        before = len(piece.tokens)
        sampled = np.arange(before + TOKENS) >= before
        return Rollout(
            "p",
            index,
            np.array([*piece.tokens, *new], np.int32),
            before,
            sampled,
            np.array([0.0] * before + logp, np.float32),
            np.where(sampled, 0, -1).astype(np.int32),
            tuple(piece.images),
            tuple(piece.spans),
            (),
            Outcome.LENGTH,
        )

    def gap(self, rollouts: list[Rollout]) -> float:
        """Between the engine's log-probs and those of the trainer now: the largest with float32, the mean with bfloat16."""
        own = self.trainer.logprobs(rollouts)
        gaps = np.concatenate([np.abs(mine - r.logp)[r.sampled] for mine, r in zip(own, rollouts, strict=True)])
        return float(gaps.max() if self.policy.head.dtype == torch.float32 else gaps.mean())

    def change(self, names: str, factor: float) -> None:
        """Another trainer: parameters with `names` in their name are moved by noise of `factor` times their size."""
        generator = torch.Generator().manual_seed(int(factor * 1e6))
        with torch.no_grad():
            for name, parameter in self.policy.model.named_parameters():
                if names in name:
                    noise = torch.randn(parameter.shape, generator=generator) * parameter.float().std(correction=0)
                    parameter.add_((noise * factor).to(parameter.dtype))

    def load(self, manifest: dict) -> str:
        """An update; returns what was refused: by all ranks, if by one."""
        refusals = self.engine.collective_rpc("load_staged", args=(manifest,))
        assert len(refusals) == self.ranks and len({bool(refusal) for refusal in refusals}) == 1
        if not any(refusals):
            self.engine.reset_prefix_cache(reset_running_requests=True)
            self.engine.reset_encoder_cache()
        return refusals[0]

    def close(self) -> None:
        from vllm.distributed import cleanup_dist_env_and_memory

        self.staging.close()
        self.engine.engine_core.shutdown()
        del self.engine
        cleanup_dist_env_and_memory()


def logp(rollouts: list[Rollout]) -> Logp:
    return [rollout.logp[rollout.sampled].tolist() for rollout in rollouts]


def everything(folder: Path, ranks: int) -> dict:
    """float32: updates of some weights and of all, faults, delta."""
    run = Run(folder, "float32", ranks)
    start = run.sample()
    found: dict = {"gaps": {"before": run.gap(start)}, "stale": {}, "said": {"before": logp(start)}, "layers": {}}
    found["layers"]["before"] = run.first_difference(start[1])

    def step(what: str, names: str, factor: float, version: int) -> None:
        before = run.sample()
        run.change(names, factor)
        found["stale"][what] = run.gap(before)
        found["layers"][what] = run.first_difference(before[1])
        assert run.load(run.staging.write(run.trainer.weights(), version).to_dict()) == ""
        now = run.sample()
        found["gaps"][what], found["said"][what] = run.gap(now), logp(now)

    step("qkv", "q_proj", 0.3, 1)
    step("vision", "visual.blocks.1.mlp", 0.5, 2)
    step("all", "", 0.1, 3)

    run.change("embed_tokens", 0.1)
    manifest = run.staging.write(run.trainer.weights(), 4).to_dict()
    if ranks == 1:  # in this process
        found["tied head of vLLM"] = without_tied_head(run, manifest)
    assert run.load(manifest) == ""
    assert run.load(manifest) == ""  # the same version may come again
    now = run.sample()
    found["gaps"]["again"], found["said"]["again"] = run.gap(now), logp(now)

    # a flipped byte: the old version goes on, to the bit; mended, it loads
    run.change("", 0.2)
    manifest = run.staging.write(run.trainer.weights(), 5)
    with (FOLDER / manifest.segment).open("r+b") as file:
        file.seek(HEADER + 40_000)
        byte = file.read(1)
        file.seek(HEADER + 40_000)
        file.write(bytes([byte[0] ^ 1]))
    found["refused"] = run.load(manifest.to_dict())
    found["after refusal"] = logp(run.sample())
    with (FOLDER / manifest.segment).open("r+b") as file:
        file.seek(HEADER + 40_000)
        file.write(byte)
    some = dict(list(hf_shapes(run.policy.model.config).items())[:-1])
    with Staging(some, torch.float32, 1 << 14) as partial:
        lacking = partial.write(((n, t) for n, t in run.trainer.weights() if n in some), 5)
        found["lacking"] = run.load(lacking.to_dict())
    found["after lacking"] = logp(run.sample())
    assert run.load(manifest.to_dict()) == ""
    now = run.sample()
    found["gaps"]["retried"], found["said"]["retried"] = run.gap(now), logp(now)

    # the engine has a copy of what it loaded: segments may be written again
    run.staging.write(run.trainer.weights(), 6)
    before = list(pack(run.trainer.weights(), 1 << 14))
    run.change("layers.1.mlp", 0.2)
    after = list(pack(run.trainer.weights(), 1 << 14))
    told = [changes(old, new) for old, new in zip(before, after, strict=True)]
    found["sent"] = [sum(one.data.nbytes for one in part) for part in (after, told)]
    held = run.staging.tensors()
    run.staging.write((pair for one in told for pair in one.applied(held).tensors()), 7)
    found["untouched"] = logp(run.sample())
    assert run.staging.current is not None and run.load(run.staging.current.to_dict()) == ""
    by_delta = run.sample()
    found["gaps"]["delta"], found["said"]["delta"] = run.gap(by_delta), logp(by_delta)
    assert run.load(run.staging.write(run.trainer.weights(), 8).to_dict()) == ""
    found["said"]["staged"] = logp(run.sample())
    found["older"] = run.load(manifest.to_dict())
    run.close()
    return found


def without_tied_head(run: Run, manifest: dict) -> float:
    """The gap that vLLM's own reloading leaves; `_refresh_tied_head` may go when it is none any more."""
    from metis_fast.rollout.vllm.transfer import StagedWeightTransfer

    refresh, StagedWeightTransfer._refresh_tied_head = StagedWeightTransfer._refresh_tied_head, lambda self: None
    assert run.load(manifest) == ""
    gap = run.gap(run.sample())
    StagedWeightTransfer._refresh_tied_head = refresh
    return gap


def bfloat16(folder: Path, ranks: int) -> dict:
    """One update."""
    run = Run(folder, "bfloat16", ranks)
    start = run.sample()
    found: dict = {"gaps": {"before": run.gap(start)}, "layers": {"before": run.first_difference(start[1])}}
    run.change("layers.1.mlp.up_proj", 0.5)
    found["layers"]["up_proj"] = run.first_difference(start[1])
    run.change("", 0.1)
    found["stale"] = run.gap(run.sample())
    assert run.load(run.staging.write(run.trainer.weights(), 1).to_dict()) == ""
    found["gaps"]["after"] = run.gap(run.sample())
    run.close()
    return found


if __name__ == "__main__":
    model, ranks = Path(sys.argv[1]), int(sys.argv[3])
    build(model)
    found = {"float32": everything(model, ranks), "bfloat16": bfloat16(model, ranks)}
    Path(sys.argv[2]).write_text(json.dumps(found, indent=1))
