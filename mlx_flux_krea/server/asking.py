"""One HTTP request as handlers need it: the body within its bounds, its JSON, and values of the query."""

from collections.abc import Mapping
from typing import Any

from starlette.requests import Request as HTTPRequest
from starlette.types import Message

from mlx_flux_krea.files import parse_json

from .errors import HTTPProblem, invalid

MOST_JSON = 1_000_000  # bytes


async def body(request: HTTPRequest, most: int) -> bytes:
    """Reads a body.

    Args:
        request: the request.
        most: bytes.

    Raises:
        HTTPProblem: it is larger.
    """
    check_length(request, most)
    chunks, count = [], 0
    async for chunk in request.stream():
        count += len(chunk)
        if count > most:
            raise too_large(most)
        chunks.append(chunk)
    return b"".join(chunks)


def check_length(request: HTTPRequest, most: int) -> None:
    """Checks the length that a request states.

    Raises:
        HTTPProblem: it is larger.
    """
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and (len(length) > 12 or int(length) > most):
        raise too_large(most)


def bounded(request: HTTPRequest, most: int) -> HTTPRequest:
    """Returns the request with a body that ends in an error after so many bytes, for the parser of forms."""
    check_length(request, most)
    receive, count = request.receive, 0

    async def counting() -> Message:
        nonlocal count
        message = await receive()
        count += len(message.get("body", b""))
        if count > most:
            raise too_large(most)
        return message

    return HTTPRequest(request.scope, counting)


def too_large(most: int) -> HTTPProblem:
    """Returns the answer to a body that is too large."""
    return HTTPProblem(413, "too_large", f"the body is larger than {most / 1e6:g} MB")


def json_object(data: bytes) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        HTTPProblem: it is none.
    """
    try:
        value = parse_json(data)
    except (ValueError, RecursionError) as error:
        raise invalid(f"the body is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise invalid(f"the body is a {type(value).__name__}; expected a JSON object")
    return value


def whole(query: Mapping[str, str], name: str, *, usual: int, low: int, high: int) -> int:
    """Returns a whole number of the query.

    Raises:
        HTTPProblem: it is none, or out of range.
    """
    text = query.get(name, str(usual))
    if not (text.isdecimal() and text.isascii() and len(text) < 10) or not low <= int(text) <= high:
        raise invalid(f"{name} is {text[:40]!r}; expected {low} to {high}", name)
    return int(text)


def only(data: dict[str, Any], *names: str) -> None:
    """Checks that a body has no other fields than these.

    Raises:
        HTTPProblem: it has.
    """
    for name in data.keys() - set(names):
        raise invalid(f"there is no field {name[:80]!r}; expected {' and '.join(names)}", name[:80])
