"""The page's HTTP interface: JSON of runs and rollouts, images, and the files of the page. It only reads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from starlette.exceptions import HTTPException
from starlette.staticfiles import StaticFiles

from metis_fast import __version__
from metis_fast.errors import DataError
from metis_fast.http_serving import HEALTH
from metis_fast.view.answers import SOON_S, Answers, Json, Query, as_json
from metis_fast.view.bundle import whole_script
from metis_fast.view.gate import Gate
from metis_fast.view.images import FULL_PX, THUMB_PX
from metis_fast.view.run import Run

_JSON = "application/json"
_FOREVER = "private, max-age=31536000, immutable"
_ANEW = "private, no-cache"
_READ = ["GET", "HEAD"]


def _answer(tree: Json, status: int = 200) -> Response:
    return Response(as_json(tree), status, media_type=_JSON)


def _health() -> Response:
    """Whether the page is there."""
    return _answer({"status": "ok"})


def _route(ask: Callable[[Query], Json]) -> Callable[[Request], Response]:
    """A handler, which runs in a thread."""

    def handle(request: Request) -> Response:
        return _answer(ask(request.query_params))

    return handle


def _image(answers: Answers) -> Callable[[Request], Response]:
    """An image as PNG, encoded afresh. size: thumb or full."""

    def handle(request: Request) -> Response:
        query = request.query_params
        longest = FULL_PX if query.get("size") == "full" else THUMB_PX
        data = answers.run_of(query).images.png(query.get("sha", ""), longest)
        return Response(data, media_type="image/png", headers={"Cache-Control": _FOREVER})

    return handle


async def _failed(request: Request, error: Exception) -> Response:
    """What was asked for is not there, or the system does not let us read it."""
    text = str(error.detail) if isinstance(error, HTTPException) else str(error)
    return _answer({"error": text}, error.status_code if isinstance(error, HTTPException) else 404)


class _Files(StaticFiles):
    """The page's own files; asked for anew, but sent only where they changed."""

    def file_response(self, *args: Any, **more: Any) -> Response:
        """Of Starlette."""
        response = super().file_response(*args, **more)
        response.headers["Cache-Control"] = _ANEW
        return response


def make_app(runs: Sequence[Run], token: str) -> FastAPI:
    """Serves the page of `runs` to whoever has the token."""
    answers = Answers(runs, SOON_S)
    app = FastAPI(title="Runs of metis-fast", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_api_route(HEALTH, _health)
    for name, ask in answers.by_name.items():
        app.add_api_route(f"/api/{name}", _route(ask), methods=_READ)
    app.add_api_route("/api/image", _image(answers), methods=_READ)
    for error in (DataError, HTTPException, OSError):
        app.add_exception_handler(error, _failed)
    script = whole_script()  # one request in place of a dozen, which a busy machine answers late
    headers = {"Cache-Control": _ANEW}
    app.add_api_route("/main.js", lambda: Response(script, media_type="text/javascript", headers=headers), methods=_READ)
    with resources.as_file(resources.files("metis_fast.view").joinpath("static")) as folder:
        app.mount("/", _Files(directory=Path(folder), html=True))
    app.add_middleware(Gate, token=token)
    return app
