"""A vLLM engine at the lengths and image sizes of a real run, with seeds, which its CPU build takes for whole prompts only."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pytest
from tiny_shape import HEADS_OF_32, TEXTS

from metis_fast.config import Config, WorkersConfig
from metis_fast.errors import EngineError
from metis_fast.model import load_policy
from metis_fast.rollout.vllm import library
from metis_fast.rollout.vllm.engine import engine_settings
from metis_fast.rollout.vllm.opening import open_engine
from metis_fast.rollout.vllm.settings import SERVICE, EngineSettings, EngineStats, GenerateReply, GenerateRequest
from metis_fast.testing.tiny import build_tiny
from metis_fast.types import ImageBlob
from metis_fast.workers.hub import Hub
from metis_fast.workers.launch import LocalLauncher
from metis_fast.workers.worker import wait_ready

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed")

T = TypeVar("T")
Picture = Callable[..., ImageBlob]
_TOKENS = 4096  # a rollout, and so a step, of the quick tests; vLLM's own step without a GPU has 2048
_LIMIT_S = 300.0
_PX = 32  # of a token of an image, in both directions
_TEXT = (30, 230)  # token ids of letters


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> EngineSettings:
    """Of a model of 2 layers that sees images at their own sizes, as Qwen3-VL does."""
    folder = tmp_path_factory.mktemp("long")
    shape = replace(
        HEADS_OF_32,
        text_config=HEADS_OF_32.text_config | {"max_position_embeddings": 1 << 16},
        vision_config=HEADS_OF_32.vision_config | {"patch_size": _PX // 2, "num_position_embeddings": 2304},
    )
    build_tiny(folder, shape, TEXTS * 5, seed=0)
    processor = json.loads((folder / "preprocessor_config.json").read_text())
    processor["size"] = {"shortest_edge": 1 << 16, "longest_edge": 1 << 22}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    config = Config.model_validate(
        {
            "model": {"path": folder, "dtype": "float32"},
            "rollout": {
                "engine": "vllm",
                "max_prompt_tokens": _TOKENS - 64,
                "max_response_tokens": 64,
                "vllm": {"cpu_threads": 1, "max_num_seqs": 64},
            },
        }
    )
    return engine_settings(config, load_policy(config.model))


class Asker:
    """Asks an engine, in a process of its own, for messages. prompts: token ids, and images where they stand."""

    def __init__(self, settings: EngineSettings, hub: Hub) -> None:
        self._hub, self._pad = hub, settings.image_pad
        environment = {"OMP_NUM_THREADS": str(settings.cpu_threads)}
        self.worker = hub.worker("engine-0", "engine", SERVICE, settings, max_restarts=0, environment=environment)
        wait_ready([self.worker], lambda: None)

    def __call__(self, work: Coroutine[Any, Any, T]) -> T:
        return self._hub.now(work)

    async def message(self, prompt: Sequence[int | ImageBlob], seed: int, num: int = 16, send: bool = True) -> GenerateReply:
        """send: give the engine the images, too."""
        tokens: list[int] = []
        spans: list[tuple[int, int, str]] = []
        images = [part for part in prompt if isinstance(part, ImageBlob)]
        for part in prompt:
            if isinstance(part, ImageBlob):
                start = len(tokens)
                tokens += [self._pad] * _image_tokens(part)
                spans.append((start, len(tokens), part.sha256))
            else:
                tokens.append(part)
        data = {image.sha256: image.data for image in images} if send else {}
        request = GenerateRequest(np.array(tokens, np.int32), tuple(spans), data, num, (), 1.0, 1.0, 0, seed)
        return await self.worker.call("generate", request, deadline_s=_LIMIT_S)

    async def stats(self) -> EngineStats:
        """Of the engine."""
        return await self.worker.call("stats", deadline_s=_LIMIT_S)

    def prepared(self) -> int:
        """Images decoded so far."""
        return self(self.stats()).images_prepared


@contextmanager
def _opened(settings: EngineSettings, logs: Path) -> Iterator[Asker]:
    with Hub(WorkersConfig(), LocalLauncher(logs)) as hub:
        yield Asker(settings, hub)


@pytest.fixture(scope="module")
def asker(settings: EngineSettings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asker]:
    """An engine for the quick tests."""
    with _opened(settings, tmp_path_factory.mktemp("logs")) as asker:
        yield asker


def _image_tokens(image: ImageBlob) -> int:
    width, height = (int.from_bytes(image.data[at : at + 4], "big") for at in (16, 20))  # of a PNG
    return (width // _PX) * (height // _PX)


def _text(seed: int, num: int) -> list[int]:
    return np.random.default_rng(seed).integers(*_TEXT, num).tolist()


def _same(one: GenerateReply, other: GenerateReply) -> bool:
    return np.array_equal(one.tokens, other.tokens) and np.allclose(one.logp, other.logp, atol=1e-4)


def test_long_prompts_with_seeds_are_sampled_again_alike_alone_and_at_once(asker: Asker) -> None:
    prompts = [_text(seed, num) for seed, num in enumerate((3500, 2500, 900, 3200))]  # no step has room for all

    async def at_once() -> list[GenerateReply]:
        return await asyncio.gather(*(asker.message(prompt, seed) for seed, prompt in enumerate(prompts)))

    first = asker(at_once())
    assert all(len(reply.tokens) == 16 and np.isfinite(reply.logp).all() for reply in first)
    again = [asker(asker.message(prompt, seed)) for seed, prompt in enumerate(prompts)]
    assert all(_same(one, other) for one, other in zip(first, again, strict=True))
    other = asker(asker.message(prompts[0], 99))
    assert not np.array_equal(other.tokens, first[0].tokens)


def test_an_image_is_decoded_once_however_many_messages_see_it(asker: Asker, picture: Picture) -> None:
    one, other = picture(1, 256, 256), picture(2, 320, 256)
    prompt = [*_text(0, 20), one, *_text(1, 20)]
    before = asker.prepared()

    async def siblings() -> list[GenerateReply]:
        return await asyncio.gather(*(asker.message(prompt, seed) for seed in range(4)))

    first = asker(siblings())[0]
    assert asker.prepared() == before + 1
    second = [*prompt, *first.tokens.tolist(), one, other, *_text(2, 20)]
    replies = [asker(asker.message(second, 5))]
    assert asker.prepared() == before + 2
    replies += [asker(asker.message(second, 5, send=False)), asker(asker.message(prompt, 0, send=False))]
    assert asker.prepared() == before + 2
    assert _same(replies[0], replies[1]) and _same(replies[2], first)


def test_prompts_whose_images_have_no_room_in_one_step_wait_whole(asker: Asker, picture: Picture) -> None:
    """Only the end of each prompt is to be computed, from the middle of an image on, but the step's room for images counts
    them whole; three of the four fit."""
    seen = [picture(10 + i, 1024, 1024) for i in range(2)]
    new = [picture(20, 1280, 1280), picture(21, 1024, 1024)]
    prompts = [[*_text(10 + i, 51), image, *_text(12, 5)] for i, image in enumerate(seen)]
    longer = [[*prompt, image, *_text(13, 5)] for prompt, image in zip(prompts, new, strict=True)]

    async def go() -> list[GenerateReply]:
        for prompt in (*prompts, [*_text(14, 9), *new, *_text(15, 9)]):
            await asker.message(prompt, 0, num=1)
        others = [picture(30 + i, 1280, 1280) for i in range(2)]  # they displace what the vision tower made of those
        await asker.message([*_text(16, 9), *others, *_text(17, 9)], 0, num=1)
        # images are prepared while the steps of these run, so that what follows comes into one step
        fillers = [asker.message(_text(18 + i, 3900), 0, num=1) for i in range(3)]
        return await asyncio.gather(*fillers, *(asker.message(prompt, i) for i, prompt in enumerate(longer)))

    replies = asker(go())[3:]
    again = [asker(asker.message(prompt, i)) for i, prompt in enumerate(longer)]
    assert all(_same(one, other) for one, other in zip(replies, again, strict=True))


def test_an_image_that_is_none_is_refused_and_the_engine_goes_on(asker: Asker, picture: Picture) -> None:
    good = picture(40, 256, 256)
    bad = ImageBlob.of(good.data[:9000])
    with pytest.raises(EngineError, match="vLLM refuses a request"):
        asker(asker.message([*_text(0, 9), good, bad, *_text(1, 9)], 0))
    assert len(asker(asker.message([*_text(0, 9), good, *_text(1, 9)], 0)).tokens) == 16


def test_a_message_that_is_cancelled_while_its_images_are_prepared_leaves_them_to_others(
    asker: Asker, picture: Picture
) -> None:
    prompt = [*_text(0, 9), picture(50, 768, 768), *_text(1, 9)]

    async def go() -> GenerateReply:
        first = asyncio.ensure_future(asker.message(prompt, 0))
        await asyncio.sleep(0.01)
        second = asyncio.ensure_future(asker.message(prompt, 0))
        await asyncio.sleep(0)
        first.cancel()
        return await second

    before = asker.prepared()
    assert len(asker(go()).tokens) == 16
    assert asker.prepared() == before + 1 and asker(asker.stats()).unfinished == 0


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"arguments": {"max_num_batched_tokens": 2048}}, "max_num_batched_tokens=2048, which may cut a prompt"),
        ({"arguments": {"enable_chunked_prefill": True}}, "enable_chunked_prefill=True, which may cut"),
        ({"image_cache_gb": 0.01}, r"image_cache_gb=0.01 is less than .* of 4096 tokens can take; set 0.1 or more"),
    ],
)
def test_what_would_end_the_engine_later_is_refused_before_vllm_is_loaded(
    settings: EngineSettings, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any], match: str
) -> None:
    monkeypatch.setattr(library, "load", lambda *_, **__: pytest.fail("vLLM is loaded"))
    with pytest.raises(EngineError, match=match):
        open_engine(replace(settings, **change))


def test_a_refusal_comes_from_the_engines_process_in_one_line(settings: EngineSettings, tmp_path: Path) -> None:
    refused = replace(settings, image_cache_gb=0.01)
    with pytest.raises(EngineError, match=r"image_cache_gb=0.01 is less than") as raised, _opened(refused, tmp_path):
        pass
    assert "\n" not in str(raised.value)


@pytest.mark.slow
def test_a_rollout_of_20000_tokens_and_large_images_is_sampled_again_alike(
    settings: EngineSettings, picture: Picture, tmp_path: Path
) -> None:
    sizes = ((1024, 1024), (1280, 1024), (1024, 1536), (2048, 1536))
    images = [picture(60 + i, *size) for i, size in enumerate(sizes)]
    first = [*_text(0, 7000), images[0], *_text(1, 4100), images[1], *_text(2, 2000), images[2], *_text(3, 50)]
    with _opened(replace(settings, max_tokens=24576), tmp_path) as asker:

        def rollout() -> list[GenerateReply]:
            one = asker(asker.message(first, 1))
            return [one, asker(asker.message([*first, *one.tokens.tolist(), images[3], *_text(4, 50)], 2))]

        messages = rollout()
        assert len(first) + sum(map(_image_tokens, images)) > 20000
        again = rollout()
        assert asker.prepared() == 4
    assert all(_same(one, other) for one, other in zip(messages, again, strict=True))
