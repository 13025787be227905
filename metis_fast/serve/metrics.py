"""What the server tells Prometheus. Its registry is its own, so that several servers fit into one process."""

from __future__ import annotations

from collections.abc import Collection

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from metis_fast.types import Rollout

_BUCKETS = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0, 600.0, 1800.0)  # seconds
_UNKNOWN = "unknown"
GONE = "gone"
"""In place of a status: the client did not wait."""


class Metrics:
    """Counts of one server. names: of the tools; calls of other names are counted together, since an agent may invent many."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = frozenset(names)
        self.registry = CollectorRegistry()
        own = self.registry
        self._requests = Counter("metis_serve_requests", "Requests for completions that ended", ("status",), registry=own)
        self._seconds = Histogram(
            "metis_serve_episode_seconds", "Seconds of an episode, without the queue", buckets=_BUCKETS, registry=own
        )
        self._episodes = Counter("metis_serve_episodes", "Episodes that ended", ("outcome",), registry=own)
        self._calls = Counter("metis_serve_tool_calls", "Calls of tools by episodes", ("tool",), registry=own)
        self._tokens = Counter("metis_serve_tokens", "Tokens of episodes", ("kind",), registry=own)
        self.running = Gauge("metis_serve_running", "Episodes that run", registry=own)
        self.waiting = Gauge("metis_serve_waiting", "Episodes that wait for their turn", registry=own)

    def request(self, status: int | str) -> None:
        """One ended. status: HTTP's, of a stream the one that fits how it ended; or `GONE`."""
        self._requests.labels(str(status)).inc()

    def episode(self, rollout: Rollout, seconds: float) -> None:
        """One ended by itself."""
        self._episodes.labels(rollout.outcome.value).inc()
        self._seconds.observe(seconds)
        for turn in rollout.turns:
            if turn.call is not None:
                self._calls.labels(turn.call.name if turn.call.name in self._names else _UNKNOWN).inc()
        sampled = rollout.num_sampled
        for kind, num in (
            ("prompt", rollout.prompt_len),
            ("sampled", sampled),
            ("observation", rollout.num_tokens - rollout.prompt_len - sampled),
        ):
            self._tokens.labels(kind).inc(num)

    def text(self) -> bytes:
        """In the format of Prometheus."""
        return generate_latest(self.registry)
