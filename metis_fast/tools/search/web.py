"""`text_search` through a provider on the web: what is known already, then requests, at a pace, tried again."""

from __future__ import annotations

import asyncio
import random
import time
from dataclasses import dataclass, field

import httpx2

from metis_fast.config import TextSearchConfig
from metis_fast.errors import InfrastructureError, ToolSetupError
from metis_fast.tools.results import Page, Refused, TextSearchResult
from metis_fast.tools.search.cache import ReferenceCache, SearchCache, searched
from metis_fast.tools.search.failure import Failed, shown
from metis_fast.tools.search.http import Sender
from metis_fast.tools.search.keys import NO_KEY, read_key
from metis_fast.tools.search.pace import Pace
from metis_fast.tools.search.providers import PROVIDERS
from metis_fast.tools.search.reply import parse

MAX_QUERY_CHARS = 1000
_MAX_BACKOFF_S = 20.0
_CHECK_QUERY = "weather"
_Pages = tuple[Page, ...]


@dataclass(eq=False)
class _Lane:
    """What belongs to one event loop. pending: searches under way, so that equal ones of a group cost one."""

    loop: asyncio.AbstractEventLoop
    transport: httpx2.AsyncHTTPTransport
    slots: asyncio.Semaphore
    pending: dict[str, asyncio.Task[_Pages]] = field(default_factory=dict)


class WebText:
    """A `TextSource` over `tools.text_search.provider`.

    backoff_s: the first wait after a failed request; it doubles with each try, up to 20 s, less a random part.

    Raises:
        ToolSetupError: no key is set where one is needed, or the address, the proxy or a cache cannot be used.
    """

    def __init__(self, config: TextSearchConfig, backoff_s: float = 0.5) -> None:
        self._config, self._backoff_s = config, backoff_s
        key = NO_KEY if config.offline else read_key(config)
        self._provider = PROVIDERS[config.provider](config, key)
        self._sender = Sender(self._provider.url, key, config.connect_s, config.timeout_s)
        self._pace = Pace(config.requests_per_s)
        self._lane: _Lane | None = None
        self._reference = None if config.reference_cache is None else ReferenceCache(config.reference_cache)
        try:
            self._cache = SearchCache(config.cache)
        except ToolSetupError:
            if self._reference is not None:
                self._reference.close()
            raise

    async def search(self, query: str) -> TextSearchResult | Refused:
        """See `TextSource`."""
        query = searched(query)
        if not query.strip():
            return Refused("text_search needs words to search for; the query has none.")
        if len(query) > MAX_QUERY_CHARS:
            return Refused(f"The query has {len(query)} characters, more than {MAX_QUERY_CHARS}; search for less.")
        pages = await asyncio.to_thread(self._known, query)
        if pages is None:
            if self._config.offline:
                raise InfrastructureError(
                    f"text_search is offline, and no cache has {shown(query)!r}; set tools.text_search.offline=false"
                )
            pages = await self._shared(query)
        return TextSearchResult(query, pages)

    async def check(self) -> None:
        """Make one search, whatever the caches have; nothing where it is offline.

        Raises:
            ToolSetupError: it brings no page; the message says what to do.
        """
        if self._config.offline:
            return
        try:
            pages = await self._ask(_CHECK_QUERY)
        except InfrastructureError as error:
            raise ToolSetupError(str(error)) from None
        if not pages:
            raise ToolSetupError(
                f"{self._provider.name} finds nothing for {_CHECK_QUERY!r}; see the account, and tools.text_search.url"
            )

    def close(self) -> None:
        """Close the caches. May be called twice."""
        self._cache.close()
        if self._reference is not None:
            self._reference.close()

    def _known(self, query: str) -> _Pages | None:
        pages = self._cache.get(self._provider.version, query)
        if pages is None and self._reference is not None:
            pages = self._reference.get(query, self._config.max_results)
        return pages

    async def _shared(self, query: str) -> _Pages:
        """The pages of a search, which goes on for the others when one that waits for it gives up."""
        pending = self._get_lane().pending
        if query not in pending:
            task = asyncio.create_task(self._ask_and_keep(query))
            pending[query] = task

            def done(task: asyncio.Task[_Pages]) -> None:
                pending.pop(query, None)
                if not task.cancelled():
                    task.exception()  # seen, even if nobody waits any more

            task.add_done_callback(done)
        return await asyncio.shield(pending[query])

    def _get_lane(self) -> _Lane:
        loop = asyncio.get_running_loop()
        if self._lane is None or self._lane.loop is not loop:
            self._lane = _Lane(loop, self._sender.transport(), asyncio.Semaphore(self._config.concurrency))
        return self._lane

    async def _ask_and_keep(self, query: str) -> _Pages:
        pages = await self._ask(query)
        await asyncio.to_thread(self._cache.put, self._provider.version, self._provider.name, query, pages)
        return pages

    async def _ask(self, query: str) -> _Pages:
        """The pages that the provider has for a query.

        Raises:
            InfrastructureError: it has not answered, after all tries.
        """
        config = self._config
        last: Failed | None = None
        tries = 0
        end = time.monotonic() + config.deadline_s
        try:
            async with asyncio.timeout(config.deadline_s):
                while True:
                    tries += 1
                    try:
                        return await self._request(query, end)
                    except Failed as error:
                        last = error
                    pause_s = self._pause_s(tries, last.wait_s)
                    if not last.again or tries > config.retries or time.monotonic() + pause_s > end:
                        break
                    await asyncio.sleep(pause_s)
        except TimeoutError:
            late = f"no result within {config.deadline_s:g} s, the wait for its turn included"
            before = f"; before that, {last.reason}" if last else ""
            last = Failed(late + before, advice="raise tools.text_search.deadline_s, requests_per_s or concurrency")
        assert last is not None
        tried = f"{tries} tries; the last one: " if tries > 1 else ""
        raise InfrastructureError(f"text_search through {self._provider.name}: {tried}{self._provider.key.hide(str(last))}")

    async def _request(self, query: str, end: float) -> _Pages:
        """One try.

        end: on the monotonic clock, when the search has to be over.

        Raises:
            Failed: it brought nothing.
        """
        lane = self._get_lane()
        async with lane.slots:
            turn_s = self._pace.wait_s(end - time.monotonic())
            if turn_s is None:
                raise Failed(
                    f"its turn is more than {self._config.deadline_s:g} s away",
                    advice="raise tools.text_search.requests_per_s or deadline_s, or see whether the provider asks for quiet",
                )
            await asyncio.sleep(turn_s)
            try:
                body = await self._sender.send(lane.transport, self._provider.request(query))
            except Failed as error:
                if error.wait_s:
                    self._pace.rest(error.wait_s)  # the others would hear the same
                raise
        return self._provider.read(parse(body, self._provider.key))

    def _pause_s(self, tries: int, asked_s: float) -> float:
        """What the provider asked for and a little more, so that not all come back at once; else by the number of tries."""
        if asked_s > 0:
            return asked_s * random.uniform(1.0, 1.1)
        return min(self._backoff_s * 2 ** (tries - 1), _MAX_BACKOFF_S) * random.uniform(0.5, 1.0)
