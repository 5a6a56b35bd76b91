"""Errors as HTTP answers: one JSON form, that of OpenAI, without a path of the machine."""

import re
from pathlib import Path
from typing import Any

from mlx_flux_krea import home
from mlx_flux_krea.commands.doctor import without_paths
from mlx_flux_krea.commands.shared.options import ARGUMENTS
from mlx_flux_krea.errors import (
    CredentialsError,
    FiltersError,
    FluxKreaError,
    Interrupted,
    ModelError,
    ResourceError,
    UsageError,
    Waiting,
    Withheld,
    printable,
    shortened,
)

# Status and code of each class of error, the first that fits.
STATUSES: tuple[tuple[type[FluxKreaError], int, str], ...] = (
    (Withheld, 400, "content_policy_violation"),
    (Waiting, 409, "review_required"),
    (FiltersError, 503, "filters_unavailable"),
    (CredentialsError, 503, "credentials_unavailable"),
    (ResourceError, 507, "insufficient_resources"),
    (Interrupted, 499, "cancelled"),
    (ModelError, 404, "model_not_found"),
    (UsageError, 400, "invalid_value"),
)
_ABSOLUTE = re.compile(r"(?<![\w.~$/:])/(?:[^/\s'\",;:]+/)+")  # folders before the last part of a path
_ARGUMENT = re.compile(r"`(\w+)`")  # of the library
_OPTION = re.compile(r"(?<![\w-])--([a-z][a-z-]+)")  # of the command
_FIELDS: dict[str, str] = {argument: option for option, argument in ARGUMENTS.items()}  # of a request


class HTTPProblem(Exception):
    """An answer that is an error.

    Args:
        status: of HTTP.
        code: a row of the table in docs/http.md.
        message: found, expected, next step.
        param: the field at fault, or None.
        more: further fields beside the code.
    """

    def __init__(self, status: int, code: str, message: str, param: str | None = None, **more: Any):
        super().__init__(message)
        self.status, self.code, self.message, self.param, self.more = status, code, message, param, more

    def to_json(self) -> dict[str, Any]:
        """Returns the body."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        about = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": about | self.more}


def invalid(message: str, param: str | None = None) -> HTTPProblem:
    """Returns the answer to a field that cannot be used."""
    return HTTPProblem(400, "invalid_value", message, param)


def not_found(thing: str) -> HTTPProblem:
    """Returns the answer where there is no such thing."""
    return HTTPProblem(404, "not_found", f"there is no such {thing}")


def bug() -> HTTPProblem:
    """Returns the answer to a failure of this program, which the server's terminal describes."""
    return HTTPProblem(500, "internal_error", "this is a bug in flux-krea; the server's terminal describes it")


def refusal(error: FluxKreaError) -> HTTPProblem:
    """Returns an error of the library as an answer."""
    status, code = next(((status, code) for kind, status, code in STATUSES if isinstance(error, kind)), (500, "failed"))
    text = _OPTION.sub(lambda found: found[1].replace("-", "_"), _ARGUMENT.sub(_field, str(error)))
    named = _ARGUMENT.search(error.found) or _OPTION.search(error.found)
    param = _FIELDS.get(named[1].replace("-", "_"), named[1].replace("-", "_")) if named else None
    return HTTPProblem(status, code, plain(text), param)


def _field(found: re.Match) -> str:
    return _FIELDS.get(found[1]) or found[1]


def plain(text: str) -> str:
    """Returns a message without control characters, and without the folders in which files of the machine lie."""
    text = without_paths(shortened(text))
    for place in (home.root(), Path(__file__).parents[1]):
        text = text.replace(f"{place}/", "")
    text = re.sub(r"(?:~|\$FLUX_KREA_HOME)/(?:[^/\s'\",;:]+/)*", "", text)
    return printable(_ABSOLUTE.sub("", text))
