"""What the tool server tells Prometheus. Its registry is its own, so that several servers fit into one process."""

from __future__ import annotations

from collections.abc import Collection

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from metis_fast.tools.results import ContentResult, PythonResult, Refused
from metis_fast.tools.server.wire import Fault, Result
from metis_fast.types import Observation, Outcome

_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 300.0)  # seconds
_UNKNOWN = "unknown"


def outcome_of(result: Result) -> Outcome:
    """TOOL_ERROR for a mistake of the agent's, else TOOL_RESULT."""
    match result:
        case Refused() | PythonResult(ok=False) | ContentResult(ok=False) | Observation(outcome=Outcome.TOOL_ERROR):
            return Outcome.TOOL_ERROR
    return Outcome.TOOL_RESULT


class Metrics:
    """Counts of one server. names: of its tools; calls of other names are counted together, since an agent may invent many."""

    def __init__(self, names: Collection[str]) -> None:
        self._names = frozenset(names)
        self.registry = CollectorRegistry()
        labels = ("tool", "outcome")
        self._calls = Counter("metis_tools_calls", "Calls that ended", labels, registry=self.registry)
        self._seconds = Histogram(
            "metis_tools_call_seconds",
            "Seconds of a call in the server, its turn included",
            ("tool",),
            buckets=_BUCKETS,
            registry=self.registry,
        )
        self._refused = Counter("metis_tools_refused", "Requests that were not done", ("fault",), registry=self.registry)
        self.sessions = Gauge("metis_tools_sessions", "Open sessions", registry=self.registry)
        self.opened = Counter("metis_tools_sessions_opened", "Sessions that were opened", registry=self.registry)
        self.idle = Counter("metis_tools_sessions_idle", "Sessions that ended after tools.serve.idle_s", registry=self.registry)
        self.queue = Gauge("metis_tools_queue", "Calls in the server, running and waiting", registry=self.registry)
        self.blob_bytes = Gauge("metis_tools_blob_bytes", "Bytes of kept images of prompts", registry=self.registry)

    def call(self, name: str, outcome: str, seconds: float) -> None:
        """One ended. outcome: an `Outcome`, or the `Fault` of a call that failed."""
        tool = name if name in self._names else _UNKNOWN
        self._calls.labels(tool, outcome).inc()
        self._seconds.labels(tool).observe(seconds)

    def refused(self, fault: Fault) -> None:
        """A request was answered with a failure."""
        self._refused.labels(fault).inc()

    def text(self) -> bytes:
        """In the format of Prometheus."""
        return generate_latest(self.registry)
