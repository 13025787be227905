"""The native engine: the trainer's own transformers model samples in process, in one batch, with a KV cache kept across turns.

Every session owns one row of a KV pool. The rows are kept in the order [live | idle | free], so that a decoding step reads
the live ones as one contiguous slice. Rollouts of the same prompt share its prefill: equal requests are run once and
their rows copied.

New weights may come between two steps (`update`): what is cached was computed with the old ones, so it is dropped, and requests
in flight are prefilled again with all that they have sampled so far.

Two ways to admit requests. Deterministic (default): a wave begins when every open session waits for a message, in the order of
the sessions; tools run while the wave goes on, and nothing depends on their timing. Otherwise requests join at every step.

Shape letters: N rows of the pool, A live rows, C cached tokens, L layers, K key/value heads, D head size, V vocabulary.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PretrainedConfig

from metis_fast.config import RolloutConfig
from metis_fast.errors import ConfigError, EngineError
from metis_fast.model import Policy, rope_positions
from metis_fast.rollout.engine import Completion, Sampling, SyncReport
from metis_fast.rollout.sampling import sample
from metis_fast.rollout.stops import StopStrings, Watch
from metis_fast.spans import Lane, spanned
from metis_fast.tower import ImageFeatures
from metis_fast.types import ImageBlob, ImageSpan, Rollout

_GROW = 64  # tokens by which the pool's length grows; a multiple of every SIMD width


def check_room(config: RolloutConfig, model: PretrainedConfig, element: int, memory: int) -> None:
    """Refuse, before anything is loaded, what this engine's cache cannot hold: keys and values of all rollouts at once.

    element: bytes of an activation. memory: of the device.

    Raises:
        ConfigError: not even a quarter of the longest responses would fit.
    """
    text = model.get_text_config()
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    token = text.num_hidden_layers * 2 * (text.num_key_value_heads or text.num_attention_heads) * head_size * element
    rows = min(config.max_concurrent, config.prompts_per_step * config.rollouts_per_prompt)
    if rows * token * config.max_response_tokens // 4 <= memory:
        return
    fits = memory * 4 // (token * config.max_response_tokens)
    advice = f"rollout.max_concurrent to {fits} or less" if fits else "rollout.max_response_tokens"
    raise ConfigError(
        f"the native engine would keep keys and values of {rows} rollouts, {rows * token * 1000 / 1e9:.3g} GB for every 1,000 "
        f"tokens of their length, and there are {memory / 1e9:.3g} GB in all; set rollout.engine=vllm, or lower {advice}"
    )


class _KvPool:
    """Keys and values of all sessions, [2, N, K, C, D] of each layer: of what is grown or moved, one layer is there twice."""

    def __init__(self, layers: int, heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> None:
        self._kv = [torch.zeros(2, 0, heads, 0, head_dim, dtype=dtype, device=device) for _ in range(layers)]

    def reserve(self, rows: int, length: int) -> None:
        _, have_rows, _, have_length, _ = self._kv[0].shape
        if rows <= have_rows and length <= have_length:
            return
        rows = max(have_rows, rows)
        if length > have_length:  # by half at least, so that a long decode copies the pool only now and then
            length = -(-max(length, have_length * 3 // 2) // _GROW) * _GROW
        length = max(have_length, length)
        for i, layer in enumerate(self._kv):
            grown = layer.new_zeros(2, rows, layer.shape[2], length, layer.shape[4])
            grown[:, :have_rows, :, :have_length] = layer
            self._kv[i] = layer = grown  # the name, too: it would keep the old one while the next is made

    def move(self, source: Sequence[int], target: Sequence[int], length: int | None = None) -> None:
        """Row target[i] becomes what source[i] was (all reads before all writes)."""
        if source and length != 0:  # rows without a cache may lie behind the end of the pool
            for layer in self._kv:
                layer[:, list(target), :, :length] = layer[:, list(source), :, :length]

    def layer(self, layer: int) -> tuple[Tensor, Tensor]:
        return self._kv[layer][0], self._kv[layer][1]


class _CachedAttention:
    """Appends new keys and values to rows [first, first + A) and attends to all of each row so far.

    start [A]: cached tokens of each row before this pass. A row with fewer than S new tokens is right-padded; what padding
    writes is overwritten before anything attends to it.
    """

    def __init__(self, pool: _KvPool, first: int, start: Tensor, new: int, longest: int) -> None:
        self._pool, self._first, self._num, self._longest = pool, first, len(start), longest
        self._where = start[:, None] + torch.arange(new, device=start.device)  # [A, S]
        self._rows = torch.arange(first, first + self._num, device=start.device)[:, None]
        seen = torch.arange(longest, device=start.device)
        self._mask = (seen <= self._where[:, :, None])[:, None]  # [A, 1, S, C]

    def attend(self, layer: int, query_BHSD: Tensor, key_BKSD: Tensor, value_BKSD: Tensor, scale: float) -> Tensor:
        keys, values = self._pool.layer(layer)
        keys[self._rows, :, self._where] = key_BKSD.transpose(1, 2)
        values[self._rows, :, self._where] = value_BKSD.transpose(1, 2)
        rows = slice(self._first, self._first + self._num)
        keys, values = keys[rows, :, : self._longest], values[rows, :, : self._longest]
        A, H, S, D = query_BHSD.shape
        K = keys.shape[1]
        if S == 1:  # the query heads of a key head become its query rows: no repeated keys
            query = query_BHSD.view(A, K, H // K, D)
            return F.scaled_dot_product_attention(query, keys, values, self._mask, scale=scale).reshape(A, H, 1, D)
        return F.scaled_dot_product_attention(query_BHSD, keys, values, self._mask, scale=scale, enable_gqa=True)


@dataclass(slots=True, eq=False)
class _Request:
    tokens: Sequence[int]
    images: Sequence[ImageBlob]
    spans: Sequence[ImageSpan]
    sampling: Sampling
    future: asyncio.Future[Completion]
    watch: Watch  # for stop strings
    out_tokens: list[int] = field(default_factory=list)
    out_logp: list[float] = field(default_factory=list)
    out_version: list[int] = field(default_factory=list)

    def so_far(self) -> list[int]:
        """What the next token follows."""
        return [*self.tokens, *self.out_tokens]


class _Session:
    """One row. `cached` counts the tokens whose keys are in the pool; `next_position` is the rotary position after them."""

    def __init__(self, engine: NativeEngine, order: int, row: int) -> None:
        self._engine, self.order, self.row = engine, order, row
        self.cached = 0
        self.request: _Request | None = None
        self.open = True

    async def generate(
        self, tokens: Sequence[int], images: Sequence[ImageBlob], spans: Sequence[ImageSpan], sampling: Sampling
    ) -> Completion:
        """See `EngineSession`."""
        if not self.open or self.request is not None:
            raise ValueError("a session takes one request at a time, until it is closed")
        if len(tokens) <= self.cached or sampling.max_tokens < 1:
            raise ValueError(
                f"{len(tokens)} tokens given, {self.cached} seen before; at least one more and one to sample needed"
            )
        new = {span.sha256 for span in spans if span.start >= self.cached}
        if new:  # what is damaged raises in the prefill; it was looked at before
            await self._engine.ready([image for image in images if image.sha256 in new])
        if not self.open:
            raise asyncio.CancelledError
        future: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        self.request = _Request(tokens, images, spans, sampling, future, self._engine.watch(sampling))
        self._engine.wake()
        return await future

    def close(self) -> None:
        """See `EngineSession`."""
        if self.open:
            self.open = False
            self._engine.drop(self)


class NativeEngine:
    """`Engine` over a `Policy` in this process.

    policy: the trainer's own, so that new weights need no copy, or one that `update` copies them into.
    prefill_tokens: padded tokens in one prefill pass.
    """

    def __init__(self, policy: Policy, deterministic: bool = True, prefill_tokens: int = 16384) -> None:
        self._policy = policy
        self._deterministic = deterministic
        self._prefill_tokens = prefill_tokens
        device = policy.head.device
        self._pool = self._new_pool()
        self._rows: list[_Session] = []  # session of each row in use, [live | idle]
        self._live = 0
        self._runner: asyncio.Task[None] | None = None
        self._wide: Tensor | None = None  # the head in float32
        self._wide_of = (0, 0)
        self._stops = StopStrings.of(policy.tokenizer)
        self._banned = torch.tensor(policy.placeholder_ids, dtype=torch.long, device=device)
        # state of the live rows, in row order
        self._logits = torch.zeros(0, policy.vocab_size, device=device)
        self._length = np.zeros(0, np.int64)
        self._position = np.zeros(0, np.int64)
        self.weight_version = 0

    num_replicas = 1

    def runs(self, policy: Policy) -> bool:
        """See `RunEngine`."""
        return policy is self._policy

    def wait(self, check: Callable[[], None]) -> None:
        """See `RunEngine`; it is ready."""

    async def rest(self) -> None:
        """See `RunEngine`; its memory is the trainer's."""

    async def resume(self) -> None:
        """See `RunEngine`."""

    def held(self) -> Mapping[str, Tensor]:
        """See `RunEngine`."""
        return dict(self._policy.model.named_parameters())

    def probe_session(self, order: int, prompt: str) -> _Session:
        """See `RunEngine`."""
        return self.session(order, prompt)

    async def layer_outputs(self, order: int, rollout: Rollout) -> None:
        """See `RunEngine`; they are the trainer's."""

    def session(self, order: int, prompt: str = "") -> _Session:
        """See `Engine`; rollouts of a prompt are found by its tokens."""
        session = _Session(self, order, len(self._rows))
        self._rows.append(session)
        return session

    def watch(self, sampling: Sampling) -> Watch:
        """For the stop strings of a message."""
        return self._stops.watch(sampling.stop)

    async def ready(self, images: Sequence[ImageBlob]) -> None:
        """Have the pixels of images at hand, without holding up the event loop."""
        await self._policy.images.ready(images)

    async def update(self, weights: Iterator[tuple[str, Tensor]], version: int) -> SyncReport:
        """See `Engine`. No step is under way where this is awaited, and none begins before it ends."""
        began = time.perf_counter()
        live = dict(self._policy.model.named_parameters())  # a tied LM head is in it once
        left, num_bytes = set(live), 0
        with torch.no_grad():
            for name, tensor in weights:
                live[name].copy_(tensor)
                left.discard(name)
                num_bytes += tensor.numel() * tensor.element_size()
        assert not left or len(left) == len(live), f"the trainer sent no {sorted(left)[:3]}"
        self.weight_version = version
        self._retire(range(self._live))  # requests stay with their sessions and are admitted again
        for session in self._rows:
            session.cached = 0
        if self._rows:
            self.wake()
        seconds = time.perf_counter() - began
        return SyncReport(version, "full" if num_bytes else "shared", num_bytes, seconds, seconds)

    def close(self) -> None:
        """Free the cache. Requests in flight are cancelled."""
        if self._runner is not None:
            self._runner.cancel()
        self._retire(range(self._live))
        for session in self._rows:
            session.open = False
            request, session.request = session.request, None
            if request is not None and not request.future.done():
                request.future.cancel()
        self._rows.clear()
        self._pool = self._new_pool()

    def _new_pool(self) -> _KvPool:
        text, head = self._policy.text, self._policy.head
        head_dim = text.head_dim or text.hidden_size // text.num_attention_heads
        return _KvPool(
            text.num_hidden_layers, text.num_key_value_heads or text.num_attention_heads, head_dim, head.dtype, head.device
        )

    def wake(self) -> None:
        """A request came or a session went: see to it that somebody runs."""
        if self._runner is None or self._runner.done():
            self._runner = asyncio.get_running_loop().create_task(self._run())
            self._runner.add_done_callback(self._stopped)

    def drop(self, session: _Session) -> None:
        """Give a session's row back."""
        request, session.request = session.request, None
        if request is not None and not request.future.done():
            request.future.cancel()
        if session.row < self._live:
            self._retire([session.row])
        last = len(self._rows) - 1
        if session.row != last:
            moved = self._rows[last]
            self._pool.move([last], [session.row], moved.cached)
            moved.row, self._rows[session.row] = session.row, moved
        self._rows.pop()
        if self._rows:
            self.wake()
        else:  # of a batch that is over: the update may need the memory
            self._pool = self._new_pool()

    async def _run(self) -> None:
        while True:
            self._admit()
            if not self._live:
                return
            self._decode()
            await asyncio.sleep(0)  # tools and other sessions go on between steps

    def _stopped(self, runner: asyncio.Task[None]) -> None:
        """A defect or an exhausted memory in a step reaches every waiting session; none of them may wait for ever."""
        error = None if runner.cancelled() else runner.exception()
        if error is None and not runner.cancelled():
            return
        for session in self._rows:
            request, session.request = session.request, None
            if request is not None and not request.future.done():
                request.future.cancel() if error is None else request.future.set_exception(error)
        self._retire(range(self._live))

    def _admit(self) -> None:
        waiting = sorted((s for s in self._rows[self._live :] if s.request is not None), key=lambda s: s.order)
        if not waiting or (self._deterministic and (self._live or len(waiting) < len(self._rows))):
            return
        # equal requests without a cache are run once: `leader` prefills, the others copy its row
        leaders: dict[tuple[object, ...], _Session] = {}
        followers: list[tuple[_Session, _Session]] = []
        for session in waiting:
            request = session.request
            assert request is not None
            key = (
                tuple(request.so_far()),
                tuple(span.sha256 for span in request.spans),
                session.order if session.cached else -1,
            )
            leader = leaders.setdefault(key, session)
            if leader is not session:
                followers.append((session, leader))
        # shortest first: rows of like length share a pass
        order = sorted(leaders.values(), key=lambda s: len(s.request.so_far()) - s.cached)  # pyright: ignore[reportOptionalMemberAccess]
        self._pool.reserve(len(self._rows), 0)
        self._bring_forward([*order, *(session for session, _ in followers)])
        logits: list[Tensor] = []
        batch: list[_Session] = []
        for session in order:
            assert session.request is not None
            new = len(session.request.so_far()) - session.cached
            if batch and new * (len(batch) + 1) > self._prefill_tokens:
                logits.append(self._prefill(batch))
                batch = []
            batch.append(session)
        logits.append(self._prefill(batch))
        by_row = torch.cat(logits)
        row_of = {id(session): i for i, session in enumerate(order)}
        source, target = [leader.row for _, leader in followers], [session.row for session, _ in followers]
        self._pool.move(source, target)
        for session, leader in followers:
            session.cached = leader.cached
        index = torch.tensor([row_of[id(s)] for s in order] + [row_of[id(leader)] for _, leader in followers])
        admitted = [*order, *(session for session, _ in followers)]
        self._logits = torch.cat([self._logits, by_row[index.to(by_row.device)]])
        self._length = np.concatenate([self._length, [s.cached for s in admitted]])
        position = [self._next_position(s) for s in admitted]
        self._position = np.concatenate([self._position, position])
        self._live += len(admitted)

    def _bring_forward(self, sessions: Sequence[_Session]) -> None:
        """Move idle rows so that `sessions`, in this order, follow the live rows."""
        wanted = {id(session) for session in sessions}
        order = [*sessions, *(s for s in self._rows[self._live :] if id(s) not in wanted)]
        self._reorder([*self._rows[: self._live], *order])

    def _reorder(self, rows: list[_Session]) -> None:
        moved = [(s.row, i, s) for i, s in enumerate(rows) if s.row != i]
        length = max((s.cached for _, _, s in moved), default=0)
        self._pool.move([a for a, _, s in moved if s.cached], [b for _, b, s in moved if s.cached], length)
        for _, i, session in moved:
            session.row = i
        self._rows = rows

    def _next_position(self, session: _Session) -> int:
        request = session.request
        assert request is not None
        return int(rope_positions(len(request.so_far()) + 1, request.spans, self._policy.merge)[0, -1])

    @spanned(Lane.ENGINE, "prefill")
    @torch.no_grad()
    def _prefill(self, batch: Sequence[_Session]) -> Tensor:
        """Run the new tokens of some sessions (adjacent rows); their next-token logits [len(batch), V]."""
        news, positions, images, order = [], [], [], []
        known: dict[str, int] = {}
        for session in batch:
            request = session.request
            assert request is not None
            so_far = request.so_far()
            news.append(so_far[session.cached :])
            positions.append(rope_positions(len(so_far), request.spans, self._policy.merge)[:, session.cached :])
            by_hash = {image.sha256: image for image in request.images}
            for span in request.spans:
                if span.start >= session.cached:
                    if span.sha256 not in known:
                        known[span.sha256] = len(images)
                        images.append(by_hash[span.sha256])
                    order.append(known[span.sha256])
        new = max(map(len, news))
        tokens, position = np.zeros((len(batch), new), np.int64), np.zeros((3, len(batch), new), np.int64)
        for i, (ids, pos) in enumerate(zip(news, positions, strict=True)):
            tokens[i, : len(ids)], position[:, i, : len(ids)] = ids, pos
        start = np.array([session.cached for session in batch])
        self._pool.reserve(len(self._rows), int(start.max()) + new)
        features: ImageFeatures | None = self._policy.encode_images(images).take(order) if images else None
        device = self._logits.device
        plan = _CachedAttention(self._pool, batch[0].row, torch.from_numpy(start).to(device), new, int(start.max()) + new)
        hidden = self._policy.hidden(torch.from_numpy(tokens).to(device), torch.from_numpy(position).to(device), features, plan)
        last = torch.tensor([len(ids) - 1 for ids in news], device=device)
        for session, ids in zip(batch, news, strict=True):
            session.cached += len(ids)
        return self._head(hidden[torch.arange(len(batch), device=device), last])

    def _head(self, hidden: Tensor) -> Tensor:
        """Float32 logits: a bfloat16 product would round them, and with them the log-probabilities."""
        head = self._policy.head
        if head.dtype == torch.float32:
            return F.linear(hidden, head)
        state = (id(head), head._version)  # torch counts in-place changes; the trainer's steps are such
        if self._wide is None or self._wide_of != state:
            self._wide, self._wide_of = head.detach().float(), state
        return F.linear(hidden.float(), self._wide)

    @spanned(Lane.ENGINE, "decode")
    @torch.no_grad()
    def _decode(self) -> None:
        """Sample one token for every live row, retire the finished ones, run the others one step on."""
        sessions = self._rows[: self._live]
        requests = [s.request for s in sessions]
        assert None not in requests
        chosen, logp = sample(
            self._logits, [r.sampling for r in requests if r], [len(r.out_tokens) for r in requests if r], self._banned
        )
        done = []
        for row, (session, token, value) in enumerate(zip(sessions, chosen.tolist(), logp.tolist(), strict=True)):
            request = session.request
            assert request is not None
            if not math.isfinite(value):
                raise EngineError(
                    f"the model's log-probabilities are {value} (weights of version {self.weight_version}): its weights or "
                    "activations overflow; look at the last updates in the report, start from an earlier checkpoint, or set "
                    "model.dtype=float32"
                )
            request.out_tokens.append(token)
            request.out_logp.append(value)
            request.out_version.append(self.weight_version)
            stopped = request.watch.ends(token) or token in request.sampling.stop_ids
            if stopped or len(request.out_tokens) >= request.sampling.max_tokens:
                done.append(row)
                session.request = None
                if not request.future.done():  # its episode may have been cancelled
                    request.future.set_result(self._completion(request, stopped))
        if done:
            chosen = chosen[torch.tensor(self._retire(done), dtype=torch.long, device=chosen.device)]
        if not self._live:
            return
        device = self._logits.device
        self._pool.reserve(len(self._rows), int(self._length.max()) + 1)
        length = torch.from_numpy(self._length).to(device)
        plan = _CachedAttention(self._pool, 0, length, 1, int(self._length.max()) + 1)
        position = torch.from_numpy(self._position).to(device)[None, :, None].expand(3, -1, 1)
        hidden = self._policy.hidden(chosen[:, None], position, None, plan)
        self._logits = self._head(hidden[:, 0])
        self._length += 1
        self._position += 1
        for session in self._rows[: self._live]:
            session.cached += 1

    def _retire(self, rows: Sequence[int]) -> list[int]:
        """Live rows become idle; live rows from the back fill the gaps. Returns the old row of every row still live."""
        gone = set(rows)
        live = self._live - len(gone)
        tail = iter(i for i in range(live, self._live) if i not in gone)
        keep = [next(tail) if i in gone else i for i in range(live)]
        leaving = [self._rows[i] for i in sorted(gone)]
        rest = self._rows[self._live :]
        self._live = live
        self._logits = self._logits[torch.tensor(keep, dtype=torch.long, device=self._logits.device)]
        self._length, self._position = self._length[keep], self._position[keep]
        self._reorder([*(self._rows[i] for i in keep), *leaving, *rest])
        return keep

    def _completion(self, request: _Request, stopped: bool) -> Completion:
        return Completion(
            tokens=np.asarray(request.out_tokens, np.int32),
            logp=np.asarray(request.out_logp, np.float32),
            weight_version=np.asarray(request.out_version, np.int32),
            stopped=stopped,
        )
