"""The interface as an OpenAPI document, made from the table of routes."""

import re
from typing import Any

from mlx_flux_krea import __version__

from . import fields
from .api import ROUTES, APIRoute

_ERROR = {"$ref": "#/components/schemas/Error"}
_REQUEST = {"$ref": "#/components/schemas/Request"}
_BODIES = {"/api/queue": _REQUEST, "/api/plan": _REQUEST}  # others are objects that docs/http.md describes


def description() -> dict[str, Any]:
    """Returns the document."""
    paths: dict[str, dict[str, Any]] = {}
    for row in ROUTES:
        paths.setdefault(row.path, {})[row.method.lower()] = _operation(row)
    paths["/api/events"] = {"get": _described("Streams events.", "text/event-stream", {"type": "string"})}
    for name, kind in (("generations", "application/json"), ("edits", "multipart/form-data")):
        operation = _described(f"OpenAI's images/{name}.", "application/json", {"type": "object"})
        operation["requestBody"] = {"required": True, "content": {kind: {"schema": {"type": "object"}}}}
        paths[f"/v1/images/{name}"] = {"post": operation}
    error = {"type": "object", "properties": {name: {"type": "string"} for name in ("message", "type", "code")}}
    error["properties"]["param"] = {"type": ["string", "null"]}
    request = {"type": "object", "properties": fields.properties(), "additionalProperties": False}
    return {
        "openapi": "3.1.0",
        "info": {"title": "flux-krea ui", "version": __version__, "description": "See docs/http.md."},
        "servers": [{"url": "http://127.0.0.1:7860"}],
        "security": [{"token": []}],
        "paths": paths,
        "components": {
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
            "schemas": {"Error": {"type": "object", "properties": {"error": error}}, "Request": request},
        },
    }


def _operation(row: APIRoute) -> dict[str, Any]:
    kind = "image/*" if row.path.endswith(("/file", "/thumbnail", "/preview")) else "application/json"
    schema = {"type": "string", "format": "binary"} if kind == "image/*" else {"type": "object"}
    operation = _described(row.summary, kind, schema, row.status)
    names = [(name, "path") for name in re.findall(r"\{(\w+)\}", row.path)] + [(name, "query") for name in row.query]
    parameters = [
        {"name": name, "in": place, "required": place == "path", "schema": {"type": "string"}} for name, place in names
    ]
    operation |= {"parameters": parameters} if parameters else {}
    if row.body:
        sent = "image/*" if row.body == "image" else "application/json"
        own = (
            {"type": "string", "format": "binary"} if row.body == "image" else _BODIES.get(row.path, {"type": "object"})
        )
        operation["requestBody"] = {"required": True, "content": {sent: {"schema": own}}}
    return operation


def _described(summary: str, kind: str, schema: dict[str, Any], status: int = 200) -> dict[str, Any]:
    answers = {str(status): {"description": "done", "content": {kind: {"schema": schema}}}}
    answers["default"] = {"description": "an error", "content": {"application/json": {"schema": _ERROR}}}
    return {"summary": summary, "responses": answers}
