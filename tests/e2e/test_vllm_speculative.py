"""Speculative decoding on a real vLLM engine: drafts come and are taken, and what is sampled is still the model's.

Run as a program (FOLDER OUT), it is the process of the engine: vLLM changes a process for good.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Coroutine, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from io import BytesIO
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from harness import HERE, Command
from PIL import Image
from transformers import Qwen3VLForConditionalGeneration

from metis_fast.config import Config
from metis_fast.errors import EngineError
from metis_fast.model import load_policy
from metis_fast.model_folder import hf_shapes
from metis_fast.rollout.chat import Chat, TokenPiece
from metis_fast.rollout.vllm import library
from metis_fast.rollout.vllm.engine import engine_settings
from metis_fast.rollout.vllm.opening import check_banned
from metis_fast.rollout.vllm.service import VllmService
from metis_fast.rollout.vllm.settings import GenerateReply, GenerateRequest
from metis_fast.sync.staging import Staging
from metis_fast.testing.tiny import build_tiny, read_shape
from metis_fast.train.torch_backend import TorchTrainer
from metis_fast.types import ImageBlob, Message, Outcome, Prompt, Rollout

pytestmark = [pytest.mark.slow, pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed")]

_LETTERS = "abcdefgh"
_STOP = "d"
_NUM, _TOKENS = 6, 100  # messages of each prompt, and tokens of each
_SPECULATIVE = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Found:
    """What the engine has sampled, `_NUM` messages of each of two prompts at a time, against the trainer's model.

    drafted, accepted: of the first time. gap: largest difference of a log-prob. wanted: placeholders that the model would have
    sampled, placeholders: that came. likelihood_z, counts_z: log-likelihood of the tokens, and how often each came, as standard
    deviations from what is expected of the model without placeholders (counts: the largest). same: messages of the same seeds,
    in a smaller batch, that were the same. ended: finish and tokens of messages with a stop token. refused: what is said of a
    tokenizer that splits a placeholder. versions, gaps_old, gaps_new: of messages during which the weights changed; gaps by
    version, under the weights before and after; accepted_old, accepted_new: drafts of each.
    """

    drafted: int
    accepted: int
    gap: float
    wanted: float
    placeholders: int
    likelihood_z: float
    counts_z: float
    same: int
    ended: list[tuple[str, list[int]]]
    ended_gap: float
    stop: int
    refused: str
    versions: list[list[int]]
    gaps_old: list[float]
    gaps_new: list[float]
    accepted_old: int
    accepted_new: int


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("speculative")
    done = subprocess.run(
        [sys.executable, __file__, folder / "model", folder / "out.json"],
        capture_output=True,
        text=True,
        timeout=2700,  # a machine with other work takes twenty minutes
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return Found(**json.loads((folder / "out.json").read_text()))


def test_drafts_are_proposed_and_some_are_taken(found: Found) -> None:
    assert found.drafted > 2 * _NUM * _TOKENS / 4
    assert found.drafted / 50 < found.accepted < found.drafted  # how many depends on the processor


def test_log_probs_are_those_of_the_trainer(found: Found) -> None:
    assert max(found.gap, found.ended_gap) < 1e-4


def test_tokens_are_samples_of_the_model_without_placeholders(found: Found) -> None:
    assert found.wanted > 20 and found.placeholders == 0
    assert abs(found.likelihood_z) < 4.5 and found.counts_z < 4.5


def test_seeds_give_the_same_messages_in_another_batch(found: Found) -> None:
    assert found.same == _NUM


def test_a_stop_token_ends_a_message_wherever_it_is_among_the_drafts(found: Found) -> None:
    assert any(finish == "stop" for finish, _ in found.ended)
    for finish, tokens in found.ended:
        assert (finish == "stop") == (tokens[-1] == found.stop) and found.stop not in tokens[:-1]
        assert finish == "stop" or (finish == "length" and len(tokens) == _TOKENS)


def test_each_token_tells_its_weights_when_they_change_amid_drafts(found: Found) -> None:
    for versions in found.versions:
        assert len(versions) == _TOKENS and versions == sorted(versions) and set(versions) == {0, 1}
    assert min(found.accepted_old, found.accepted_new) > 2
    (old_old, new_old), (old_new, new_new) = found.gaps_old, found.gaps_new
    assert max(old_old, new_new) < 1e-4 < 0.1 < min(new_old, old_new)


def test_a_placeholder_that_is_several_tokens_of_text_is_refused(found: Found) -> None:
    assert "excludes image placeholders by their text" in found.refused and "two words" in found.refused


@pytest.mark.skipif(torch.cuda.is_available(), reason="there it is right")
@pytest.mark.parametrize(
    ("more", "why"),
    [
        ("", "needs a GPU"),  # when this fails, vLLM is right, and `_right_vllm` and `opening._check_drafts` may go
        (", rejection_sample_method: synthetic, synthetic_acceptance_length: 2", "takes drafts at random"),
    ],
    ids=["no-gpu", "synthetic"],
)
def test_a_run_does_not_start_where_speculation_would_not_sample_from_the_model(
    demo: Path, tmp_path: Path, more: str, why: str
) -> None:
    settings = ["rollout.engine=vllm", "rollout.vllm.cpu_threads=1", "log.progress=false", "data.heldout=[]", "eval.every=0"]
    speculative = "rollout.vllm.speculative={method: ngram, num_speculative_tokens: 2, prompt_lookup_max: 3" + more + "}"
    arguments = ["train", demo / "config.yaml", f"run.dir={tmp_path / 'run'}", *settings, speculative]
    ended = Command(arguments, tmp_path / "process").wait()
    assert ended.code == 2 and not ended.orphans, ended
    assert why in ended.err.splitlines()[-1] and "starting it again" not in ended.err


# -- the engine's process ------------------------------------------------------------------------------------------------


def _right_vllm() -> None:
    """Give vLLM's CPU build what its issue 55005 asks for, so that its speculation is that of a GPU."""
    library.load()
    from vllm.utils import cpu_triton_utils

    def expand(output: Any, values: Any, ends: Any, replace_from: float, replace_to: float, MAX_NUM_TOKENS: int) -> None:
        counts = ends.diff(prepend=ends.new_zeros(1))
        output.copy_(values.masked_fill(values == replace_from, replace_to).repeat_interleave(counts))

    cpu_triton_utils._expand_kernel_impl = expand


def _build(folder: Path) -> None:
    """A model that goes on with a few letters, which placeholders are like: drafts are right at times.

    What it says depends on all that is read: a wrong entry in the KV cache, of a draft that was not taken, shows.
    """
    build_tiny(folder, read_shape(HERE / "small_model.json"), ["the cat sat on the mat"] * 5, seed=0)
    policy = load_policy(Config.model_validate({"model": {"path": folder, "dtype": "float32"}}).model)
    ids = policy.tokenizer.get_vocab()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in policy.decoder.named_parameters():
            if weight.ndim == 2 and "embed" not in name:
                weight.mul_(8.0)
        embedding = policy.decoder.embed_tokens.weight
        alike = torch.randn(embedding.shape[1], generator=generator)
        for token in (*(ids[letter] for letter in _LETTERS), *policy.placeholder_ids):
            embedding[token] = 1.5 * alike / alike.norm() + 0.4 * torch.randn(alike.shape, generator=generator)
    policy.model.save_pretrained(folder)


class _Run:
    """An engine and a trainer of the same model, a prompt with an image and one without."""

    def __init__(self, folder: Path) -> None:
        _build(folder)
        rollout = {"engine": "vllm", "max_prompt_tokens": 128, "max_response_tokens": 128}
        config = Config.model_validate(
            {
                "model": {"path": folder, "dtype": "float32"},
                "rollout": rollout | {"vllm": {"speculative": _SPECULATIVE, "cpu_threads": 1}},
            }
        )
        self.policy = load_policy(config.model)
        self.trainer = TorchTrainer(self.policy, config, config.train.optim, 10)
        data = BytesIO()
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(data, "PNG")
        chat = Chat(self.policy.tokenizer, self.policy.images)
        self.pieces = [
            chat.encode_prompt(Prompt("p", "test", (Message("user", text),), seen, "search", ("x",), "rule", text))
            for text, seen in (("<image> abcdabcdabcd", (ImageBlob.of(data.getvalue()),)), ("abcdabcdefgh", ()))
        ]
        self.settings = engine_settings(config, self.policy)
        self.service = VllmService(self.settings)
        self.staging = Staging(hf_shapes(self.policy.model.config), torch.float32, 1 << 20)
        self._loop = asyncio.new_event_loop()

    def __call__(self, work: Coroutine[Any, Any, T]) -> T:
        return self._loop.run_until_complete(work)

    async def sample(self, num: int = _NUM, stop_ids: Sequence[int] = ()) -> list[GenerateReply]:
        """Messages of both prompts, `num` of the first first."""
        requests = [
            GenerateRequest(
                np.array(piece.tokens, np.int32),
                tuple((span.start, span.stop, span.sha256) for span in piece.spans),
                {image.sha256: image.data for image in piece.images},
                _TOKENS,
                tuple(stop_ids),
                1.0,
                1.0,
                0,
                seed,
            )
            for piece in self.pieces
            for seed in range(num)
        ]
        return await asyncio.gather(*(self.service.generate(request) for request in requests))

    def gaps(self, replies: Sequence[GenerateReply], version: int) -> float:
        """Largest difference to the trainer's log-probs, of tokens of a weight version."""
        half = len(replies) // 2
        rollouts = [_rollout(self.pieces[index // half], reply) for index, reply in enumerate(replies)]
        own = self.trainer.logprobs(rollouts)
        return max(float(np.abs(o - r.logp)[r.weight_version == version].max()) for o, r in zip(own, rollouts, strict=True))

    def change(self) -> None:
        """Another trainer, which still goes on with those letters."""
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for name, weight in self.policy.decoder.named_parameters():
                if weight.ndim == 2 and "embed" not in name:
                    weight.add_(torch.randn(weight.shape, generator=generator) * weight.std() * 0.3)

    def expected(self, replies: Sequence[GenerateReply]) -> tuple[float, float, float]:
        """Placeholders wanted, and how far tokens are from what is expected, after the prompt without an image; see `Found`."""
        model = Qwen3VLForConditionalGeneration.from_pretrained(self.policy.folder, dtype=torch.float32)
        piece, banned = self.pieces[1], list(self.policy.placeholder_ids)
        wanted, likelihood, variance = 0.0, 0.0, 0.0
        seen, mean, spread = (torch.zeros(self.policy.vocab_size) for _ in range(3))
        for reply in replies[len(replies) // 2 :]:
            tokens_n = torch.from_numpy(reply.tokens).long()
            with torch.no_grad():
                logits_SV = model(input_ids=torch.cat([torch.tensor(piece.tokens), tokens_n])[None]).logits[0]
            logits_nV = logits_SV[len(piece.tokens) - 1 : -1]
            wanted += float(logits_nV.softmax(-1)[:, banned].sum())
            logits_nV[:, banned] = -1e9
            logp_nV = logits_nV.log_softmax(-1)
            p_nV = logp_nV.exp()
            mean_n = (p_nV * logp_nV).sum(-1)
            likelihood += float((logp_nV.gather(1, tokens_n[:, None])[:, 0] - mean_n).sum())
            variance += float(((p_nV * logp_nV**2).sum(-1) - mean_n**2).sum())
            seen += torch.bincount(tokens_n, minlength=len(seen))
            mean += p_nV.sum(0)
            spread += (p_nV * (1 - p_nV)).sum(0)
        often = spread > 5
        return wanted, likelihood / variance**0.5, float(((seen - mean).abs() / spread.sqrt())[often].max())

    async def change_amid(self) -> tuple[list[GenerateReply], int, int]:
        """Messages during which the weights change; drafts accepted before and after that."""
        begin = await self.service.stats()
        running = asyncio.ensure_future(self.sample())
        while (await self.service.stats()).accepted < begin.accepted + 10:
            assert not running.done(), "the messages had ended before ten drafts were accepted"
            await asyncio.sleep(0.01)
        self.change()
        await self.service.load_staged(self.staging.write(self.trainer.weights(), 1).to_dict())
        amid = await self.service.stats()
        replies = await running
        end = await self.service.stats()
        return replies, amid.accepted - begin.accepted, end.accepted - amid.accepted

    def refused(self) -> str:
        """What is said of a placeholder that is no token."""
        texts = ("two words", *self.settings.banned_text[1:])
        try:
            check_banned(self.service._engine, replace(self.settings, banned_text=texts))
        except EngineError as error:
            return str(error)
        return ""


def _rollout(piece: TokenPiece, reply: GenerateReply) -> Rollout:
    before = len(piece.tokens)
    tokens = np.array([*piece.tokens, *reply.tokens.tolist()], np.int32)
    logp, version = np.zeros(len(tokens), np.float32), np.full(len(tokens), -1, np.int32)
    logp[before:], version[before:] = reply.logp, reply.version
    sampled = np.arange(len(tokens)) >= before
    images, spans = tuple(piece.images), tuple(piece.spans)
    return Rollout("p", 0, tokens, before, sampled, logp, version, images, spans, (), Outcome.LENGTH)


def _find(folder: Path) -> Found:
    _right_vllm()
    run = _Run(folder)
    stop = run.policy.tokenizer.get_vocab()[_STOP]
    first = run(run.sample())
    stats = run(run.service.stats())
    wanted, likelihood_z, counts_z = run.expected(first)
    fewer = run(run.sample(_NUM // 2))
    again = [first[index] for half in (0, _NUM) for index in range(half, half + _NUM // 2)]
    ended = run(run.sample(stop_ids=[stop]))
    gap, ended_gap = run.gaps(first, 0), run.gaps(ended, 0)
    old = {name: tensor.clone() for name, tensor in run.policy.model.state_dict().items()}
    amid, accepted_old, accepted_new = run(run.change_amid())
    gaps_new = [run.gaps(amid, 0), run.gaps(amid, 1)]
    run.policy.model.load_state_dict(old)
    found = Found(
        drafted=stats.drafted,
        accepted=stats.accepted,
        gap=gap,
        wanted=wanted,
        placeholders=sum(int(np.isin(one.tokens, run.policy.placeholder_ids).sum()) for one in (*first, *ended, *amid)),
        likelihood_z=likelihood_z,
        counts_z=counts_z,
        same=sum(np.array_equal(one.tokens, other.tokens) for one, other in zip(again, fewer, strict=True)),
        ended=[(one.finish, one.tokens.tolist()) for one in ended],
        ended_gap=ended_gap,
        stop=stop,
        refused=run.refused(),
        versions=[one.version.tolist() for one in amid],
        gaps_old=[run.gaps(amid, 0), run.gaps(amid, 1)],
        gaps_new=gaps_new,
        accepted_old=accepted_old,
        accepted_new=accepted_new,
    )
    run.staging.close()
    run.service.close()
    return found


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(json.dumps(asdict(_find(Path(sys.argv[1])))))
