"""Keys of providers: which variables of the environment hold them, and texts without them.

A key is read where searches are made, and nowhere else. It is in no setting, so that no record of a run has it, and no text of
a provider passes without `Key.hide`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from metis_fast.config import TextSearchConfig
from metis_fast.errors import ToolSetupError
from metis_fast.redaction import SHORTEST, redact


@dataclass(frozen=True, slots=True)
class Key:
    """A provider's key. variable: where it came from; both empty where there is none. zone: of Bright Data, else empty."""

    variable: str = ""
    value: str = field(default="", repr=False)
    zone: str = field(default="", repr=False)

    def hide(self, text: str) -> str:
        """`text` without the key; see `redact`."""
        return redact(text, self.value)


NO_KEY = Key()


def environment(config: TextSearchConfig) -> Mapping[str, str]:
    """Those of `config.variables()` that are set, for a worker that runs `text_search`."""
    return {name: os.environ[name] for name in config.variables() if name in os.environ}


def read_key(config: TextSearchConfig) -> Key:
    """The key of the provider; none for a local corpus, or an endpoint for which no variable is named.

    Raises:
        ToolSetupError: its variable, or that of the zone, is not set, or holds what is no key.
    """
    name = config.key_name
    if not name:
        return NO_KEY
    value = _variable(config, name, "the key", "api_key_env")
    if len(value) < SHORTEST or not re.fullmatch(r"[!-~]+", value):
        raise ToolSetupError(
            f"the environment variable {name} holds no key for provider {config.provider}: expected at least {SHORTEST} "
            "printable ASCII characters without blanks; set it anew"
        )
    return Key(
        name, value, _variable(config, config.zone_env, "the zone", "zone_env") if config.provider == "brightdata" else ""
    )


def _variable(config: TextSearchConfig, name: str, what: str, setting: str) -> str:
    value = os.environ.get(name, "").strip()
    if not value:
        raise ToolSetupError(
            f"text_search with provider {config.provider} needs {what} in the environment variable {name}, which is not set; "
            f"set it, or name another one in tools.text_search.{setting}"
        )
    return value
