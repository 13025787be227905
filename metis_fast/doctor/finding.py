"""What a check says, and how checks turn errors of the project into what they say."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from metis_fast.errors import InfrastructureError, MetisError, one_line

State = Literal["ok", "warning", "error"]


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the table. what: was looked at. found: in words. advice: what to do, empty where all is well."""

    what: str
    state: State
    found: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Check:
    """A part of the table. run: finds; its errors of the project become findings, of `what`, or of the whole area."""

    area: str
    run: Callable[[], Iterable[Finding]]
    what: str = ""

    def findings(self) -> Iterator[Finding]:
        """Of this part; an error ends it, and is the last one."""
        try:
            yield from self.run()
        except MetisError as error:
            yield refused(self.what or self.area, error)
        except InfrastructureError as error:
            yield Finding(
                self.what or self.area,
                "error",
                one_line(error),
                "see that what it names works on this machine, and ask metis-fast doctor again (docs/tools.md)",
            )
        except OSError as error:
            yield Finding(
                self.area,
                "error",
                f"{error.filename or ''}: {error.strerror or error}".lstrip(": "),
                "change it, or name another",
            )


def refused(what: str, error: MetisError) -> Finding:
    """What the job itself would say: a line whose last part is what to do."""
    found, _, advice = str(error).rpartition("; ")
    return Finding(what, "error", found or advice, advice if found else "")


def gigabytes(size: float) -> str:
    """Bytes in GB, with three digits."""
    return f"{size / 1e9:.3g} GB"
