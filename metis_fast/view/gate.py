"""Who may read the page: whoever has the token, in an address once, then in a cookie; and what a browser may do with it."""

from __future__ import annotations

import hmac
from urllib.parse import parse_qsl, urlencode

from starlette.datastructures import MutableHeaders
from starlette.requests import HTTPConnection
from starlette.responses import PlainTextResponse, RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from metis_fast.http_serving import HEALTH

_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
}


class Gate:
    """Lets requests in that bring the token: `?token=` (which becomes a cookie and leaves the address), the cookie, or a bearer
    header. Only GET and HEAD are taken: there is nothing to change."""

    def __init__(self, app: ASGIApp, token: str) -> None:
        self._app, self._token = app, token

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), self._token.encode())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Of ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers[name] = value
                headers.setdefault("Cache-Control", "no-store")
            await send(message)

        connection = HTTPConnection(scope)
        # cookies do not tell ports apart: two pages on one machine would take each other's
        cookie = f"metis_view_{(scope.get('server') or ('', 0))[1]}"
        pairs = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        given = [value for name, value in pairs if name == "token"]
        bearer = connection.headers.get("authorization", "").removeprefix("Bearer ")
        answer: PlainTextResponse | RedirectResponse | None = None
        if scope["method"] not in ("GET", "HEAD"):
            answer = PlainTextResponse("this page only reads\n", 405)
        elif scope["path"] == HEALTH:
            pass
        elif given and self._is_token(given[-1]):
            rest = urlencode([pair for pair in pairs if pair[0] != "token"])
            # a path of this server only: //elsewhere would be another one's
            answer = RedirectResponse(f"/{scope['path'].lstrip('/')}{'?' if rest else ''}{rest}", 303)
            answer.set_cookie(cookie, self._token, httponly=True, samesite="strict", path="/")
        elif not (self._is_token(connection.cookies.get(cookie, "")) or self._is_token(bearer)):
            answer = PlainTextResponse("open the address that metis-fast view printed, with its token\n", 401)
        await (answer or self._app)(scope, receive, with_headers)
