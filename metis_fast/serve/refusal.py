"""Why a request gets no answer, in the form that OpenAI's clients read."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

RETRY_AFTER_S = 2


class Fault(StrEnum):
    """The `type` of an error. A closed set. The first three are the client's to mend; the others are to be tried again."""

    REQUEST = "invalid_request_error"
    UNAUTHORIZED = "authentication_error"
    MODEL = "not_found_error"
    BUSY = "rate_limit_error"
    DRAINING = "draining"
    INFRASTRUCTURE = "infrastructure_error"  # tools or engine failed, after retries: there is no answer to judge
    DEFECT = "server_error"


STATUS = {
    Fault.REQUEST: 400,
    Fault.UNAUTHORIZED: 401,
    Fault.MODEL: 404,
    Fault.BUSY: 429,
    Fault.DRAINING: 503,
    Fault.INFRASTRUCTURE: 503,
    Fault.DEFECT: 500,
}
"""HTTP's."""
RETRIED = (Fault.BUSY, Fault.DRAINING, Fault.INFRASTRUCTURE)
"""Those that tell when to come again."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """What a client is told. param: the field that is wrong, if one is. status: where it is not the one of `STATUS`."""

    fault: Fault
    message: str
    param: str | None = None
    code: str | None = None
    status: int = 0

    @property
    def body(self) -> dict[str, object]:
        """As JSON."""
        return {"error": {"message": self.message, "type": self.fault.value, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Beside the body."""
        return {"Retry-After": str(RETRY_AFTER_S)} if self.fault in RETRIED else {}


class Refused(Exception):
    """A request that gets no answer."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


def wrong(param: str | None, expected: str, code: str | None = None) -> Refused:
    """Of a request that cannot be answered. param: the field. expected: what should stand there, what does, what to do."""
    return Refused(Refusal(Fault.REQUEST, f"{param}: {expected}" if param else expected, param, code))
