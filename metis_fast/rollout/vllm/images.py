"""Images of an engine's requests: the encoded ones that it keeps, and what of them vLLM has to be given.

vLLM processes an image once (decoded pixels in, patches out) and holds the patches under its SHA-256, in a cache of
`rollout.vllm.image_cache_gb`; the encoded bytes are kept here up to the same size, for when the patches had to go.
"""

from __future__ import annotations

from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from metis_fast import pixels
from metis_fast.errors import EngineFailure
from metis_fast.rollout.vllm.settings import GenerateRequest

if TYPE_CHECKING:
    from vllm.multimodal.cache import BaseMultiModalProcessorCache

_DECODERS = 4  # threads


class ImagesMissingError(EngineFailure):
    """The engine does not have an image any more; send them all again."""


class Images:
    """Encoded images, at most `limit` bytes of them, and decoding. prepared: how many were decoded for vLLM."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._encoded: OrderedDict[str, bytes] = OrderedDict()
        self._num_bytes = 0
        self._decoders = ThreadPoolExecutor(_DECODERS, "decode")
        self.prepared = 0

    def keep(self, request: GenerateRequest) -> None:
        """Take a request's images; those that were used longest ago make room."""
        for sha256, data in request.images.items():
            if sha256 not in self._encoded:
                self._encoded[sha256] = data
                self._num_bytes += len(data)
        for _, _, sha256 in request.spans:
            if sha256 in self._encoded:
                self._encoded.move_to_end(sha256)
        while self._num_bytes > self._limit and len(self._encoded) > len(request.spans):
            self._num_bytes -= len(self._encoded.popitem(last=False)[1])

    def clear(self) -> None:
        """Forget all."""
        self._encoded.clear()
        self._num_bytes = 0

    def close(self) -> None:
        """End the threads."""
        self._decoders.shutdown(wait=False, cancel_futures=True)

    def prompt(self, request: GenerateRequest, pad: int, cache: BaseMultiModalProcessorCache | None) -> dict[str, Any]:
        """A prompt for vLLM's renderer: decoded images, or None where vLLM's cache has one. pad: placeholder of an image.

        Raises:
            ImagesMissingError: one is neither there nor here. ImageError: one cannot be decoded.
        """
        if not request.spans:
            return {"prompt_token_ids": request.tokens.tolist()}
        tokens: list[int] = []
        at = 0
        for start, stop, _ in request.spans:  # vLLM wants one placeholder an image, and repeats it itself
            tokens += [*request.tokens[at:start].tolist(), pad]
            at = stop
        tokens += request.tokens[at:].tolist()
        hashes = [sha256 for _, _, sha256 in request.spans]
        new = [sha256 for sha256 in dict.fromkeys(hashes) if cache is None or not cache.is_cached_item(sha256)]
        pictures = dict(zip(new, self._decoders.map(pixels.decode, map(self._bytes, new)), strict=True))
        self.prepared += len(pictures)
        return {
            "prompt_token_ids": tokens,
            "multi_modal_data": {"image": [pictures.get(sha256) for sha256 in hashes]},
            "multi_modal_uuids": {"image": hashes},
        }

    def _bytes(self, sha256: str) -> bytes:
        data = self._encoded.get(sha256)
        if data is None:
            raise ImagesMissingError(f"image {sha256} is not here")
        return data
