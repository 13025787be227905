"""What goes wrong between us and a provider."""

from __future__ import annotations

from metis_fast.errors import one_line

_SHOWN = 300


class Failed(Exception):
    """A request that brought no result. It never leaves this package: `WebText` makes an `InfrastructureError` of the last one.

    reason: what happened. said: what the provider says, without the key, which has to be hidden before: it is cut here, and
    half a key would not be found. advice: what to do. again: whether another try may help. wait_s: for how long the provider
    asks to be left alone; 0: it does not say.
    """

    def __init__(self, reason: str, said: str = "", advice: str = "", again: bool = False, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.reason, self.said, self.advice, self.again, self.wait_s = reason, shown(said), advice, again, wait_s

    def __str__(self) -> str:
        said = f" ({self.said})" if self.said else ""
        return f"{self.reason}{said}" + (f"; {self.advice}" if self.advice else "")


def shown(text: str) -> str:
    """One printable line of at most 300 characters."""
    text = "".join(sign if sign.isprintable() else " " for sign in one_line(text))
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."
