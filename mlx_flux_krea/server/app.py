"""The ASGI application: routes, errors as JSON, events, and the files of the page."""

import contextlib
import json
import traceback
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import ASGIApp, Receive, Scope, Send

from mlx_flux_krea.errors import FluxKreaError

from . import asking, uploads
from .api import ROUTES, APIRoute, Asked, File, Services
from .errors import HTTPProblem, bug, refusal
from .events import STREAMS
from .openapi import description
from .security import Guard

PAGE = Path(__file__).parent / "page"
_CODES = {404: "not_found", 405: "method_not_allowed", 413: "too_large"}
Answer = Callable[[HTTPRequest], Awaitable[Response]]


def make_app(services: Services, *, port: Callable[[], int], token: str) -> ASGIApp:
    """Returns the application.

    Args:
        services: what the routes use; its queue is started and stopped by the caller.
        port: of the server, once it listens.
        token: that requests carry.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        services.events.listen()
        yield

    page = Mount("/", StaticFiles(directory=PAGE, html=True))
    app = Starlette(
        routes=[*routes_of(services), page], lifespan=lifespan, exception_handlers={HTTPException: _http_error}
    )
    app.router.redirect_slashes = False
    return Guard(app, port=port, token=token)


def routes_of(services: Services) -> list[Route]:
    """Returns every route of the application but the page's files.

    There is one for each path, so that another method is answered with 405 and not with 404.
    """
    answers: list[tuple[str, str, Answer]] = [(row.method, row.path, _endpoint(row, services)) for row in ROUTES]
    answers += [
        ("GET", "/api/events", _answered(_events(services))),
        ("POST", "/v1/images/generations", _answered(services.openai.generations)),
        ("POST", "/v1/images/edits", _answered(services.openai.edits)),
        ("GET", "/openapi.json", _answered(_openapi)),
    ]
    merged: dict[str, dict[str, Answer]] = {}
    for method, path, answer in answers:
        merged.setdefault(path, {})[method] = answer

    def by_method(answers: dict[str, Answer]) -> Answer:
        async def answer(request: HTTPRequest) -> Response:
            return await answers["GET" if request.method == "HEAD" else request.method](request)

        return answer

    return [Route(path, by_method(answers), methods=list(answers)) for path, answers in merged.items()]


def _endpoint(row: APIRoute, services: Services) -> Answer:
    async def answer(request: HTTPRequest) -> Response:
        data = None
        if row.body == "json":
            data = asking.json_object(await asking.body(request, asking.MOST_JSON))
        elif row.body == "image":
            data = await asking.body(request, uploads.MOST_BYTES)
        asked = Asked(services, request.path_params, request.query_params, data)
        found = await run_in_threadpool(row.call, asked)
        if isinstance(found, File):
            name = {"Content-Disposition": f'attachment; filename="{found.name}"'} if found.name else {}
            return Response(found.data, media_type=found.kind, headers=name)
        return JSONResponse(found, row.status)

    return _answered(answer)


def _answered(answer: Answer) -> Answer:
    """Returns a handler whose failures are answers in the one JSON form."""

    async def answer_always(request: HTTPRequest) -> Response:
        try:
            return await answer(request)
        except HTTPProblem as error:
            refused = error
        except FluxKreaError as error:
            refused = refusal(error)
        except ClientDisconnect:
            refused = HTTPProblem(499, "cancelled", "the client went away")
        except HTTPException as error:  # of the parser of forms
            refused = HTTPProblem(error.status_code, _CODES.get(error.status_code, "invalid_value"), str(error.detail))
        except Exception as error:
            traceback.print_exception(error)
            refused = bug()
        return JSONResponse(refused.to_json(), refused.status)

    return answer_always


async def _http_error(request: HTTPRequest, error: Exception) -> Response:
    status = getattr(error, "status_code", 500)
    message = f"{request.method} is not answered here" if status == 405 else "there is nothing here"
    refused = HTTPProblem(status, _CODES.get(status, "invalid_value"), message)
    return JSONResponse(refused.to_json(), status, headers=getattr(error, "headers", None))


class _EventResponse(StreamingResponse):
    """An event stream, which was counted and is no longer when it ends."""

    def __init__(self, services: Services, last: str):
        super().__init__(services.events.stream(last), media_type="text/event-stream")
        self._services = services

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends events until the client goes away."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._services.events.streams -= 1


def _events(services: Services) -> Answer:
    async def answer(request: HTTPRequest) -> Response:
        if services.events.streams >= STREAMS:
            raise HTTPProblem(503, "too_many_streams", f"{STREAMS} event streams are open; close some pages")
        services.events.streams += 1
        return _EventResponse(services, request.headers.get("last-event-id", "")[:40])

    return answer


async def _openapi(request: HTTPRequest) -> Response:
    return Response(json.dumps(description(), indent=1), media_type="application/json")
