"""The verb `metis-fast serve`."""

from __future__ import annotations

import json

from metis_fast.config import Config
from metis_fast.errors import ConfigError


def run(config: Config, as_json: bool) -> int:
    """Serve until SIGTERM or Ctrl-C. as_json: print the address as a JSON object."""
    try:
        from metis_fast.serve.serving import serve
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in ("fastapi", "starlette", "uvicorn", "prometheus_client"):
            raise
        raise ConfigError(f"serve needs {error.name}; in the project's folder: pip install -e '.[server]'") from None

    def ready(url: str) -> None:
        print(json.dumps({"url": f"{url}/v1"}) if as_json else f"agent server: {url}/v1", flush=True)

    serve(config, ready)
    return 0
