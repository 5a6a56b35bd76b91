"""The one door of the server: every request passes `Guard`, which checks Host, Origin and token, and sets headers."""

import hmac
from collections.abc import Callable
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import HTTPProblem

PROTECTED = ("/api", "/v1")  # first parts of paths that need the token
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; font-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}
_NAMES = ("127.0.0.1", "localhost")  # of this machine, in Host


class Guard:
    """Refuses requests that do not come from the page or from a program with the token.

    Args:
        app: what answers the others.
        port: of the server.
        token: that requests carry.
    """

    def __init__(self, app: ASGIApp, *, port: Callable[[], int], token: str):
        self._app, self._port, self._token = app, port, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":  # websockets, of which there are none
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers.update({name: value for name, value in HEADERS.items() if name not in headers})
                if _is_protected(scope["path"]):
                    headers["Cache-Control"] = "no-store"
            await send(message)

        refused = self._problem(Headers(scope=scope), scope["path"])
        if refused is None:
            await self._app(scope, receive, send_with_headers)
        else:
            more: dict[str, Any] = {"WWW-Authenticate": "Bearer"} if refused.status == 401 else {}
            response = JSONResponse(refused.to_json(), refused.status, headers=more | {"Connection": "close"})
            await response(scope, receive, send_with_headers)

    def _problem(self, headers: Headers, path: str) -> HTTPProblem | None:
        """Returns why a request is refused, or None."""
        hosts = [f"{name}:{self._port()}" for name in _NAMES]
        if headers.getlist("host") not in [[host] for host in hosts]:
            return HTTPProblem(403, "forbidden", f"the Host header is another; expected {' or '.join(hosts)}")
        origins = headers.getlist("origin")
        if origins and origins != [f"http://{headers['host']}"]:
            return HTTPProblem(403, "forbidden", "the request comes from another page")
        if headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
            return HTTPProblem(403, "forbidden", "the request comes from another page")
        if not _is_protected(path):
            return None
        given = headers.getlist("authorization")
        scheme, _, token = given[0].partition(" ") if len(given) == 1 else ("", "", "")
        same = hmac.compare_digest(token.strip().encode("utf-8", "replace"), self._token.encode())
        if scheme.lower() != "bearer" or not same:
            return HTTPProblem(
                401, "invalid_api_key", "the token is missing or wrong; open the link that flux-krea ui showed"
            )
        return None


def _is_protected(path: str) -> bool:
    return any(path == one or path.startswith(f"{one}/") for one in PROTECTED)
