"""The routes below /api as plain functions of the server and a request. `ROUTES` is their table, and OpenAPI's."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_flux_krea import __version__
from mlx_flux_krea.commands.shared import settings
from mlx_flux_krea.commands.shared.estimates import home_disk

from . import asking, facts, fields, pictures, uploads
from .errors import HTTPProblem, invalid
from .events import STREAMS, Events
from .installing import Setup
from .openai import OpenAI
from .pictures import Pictures
from .queue import MOST_WAITING, SETTINGS, Queue
from .reviews import Reviews
from .store import Store

_KINDS = {"png": "image/png", "jpeg": "image/jpeg", "webp": "image/webp"}


class Services:
    """Everything that the routes use.

    Args:
        store: the database.
    """

    def __init__(self, store: Store):
        self.store, self.events = store, Events()
        self.pictures = Pictures(store, self.events)
        self.queue = Queue(store, self.pictures, self.events)
        self.reviews = Reviews()
        self.setup = Setup(self._tell_setup)
        self.openai = OpenAI(self.queue, self.pictures, self.events)

    def _tell_setup(self, state: dict[str, Any]) -> None:
        self.events.publish("setup", state)
        if not state["running"]:
            self.events.publish("models", {})
            self.pictures.scan()  # the first one is of another process
            self.queue.tell_review()


@dataclass(frozen=True)
class Asked:
    """The parts of a request.

    Attributes:
        services: of the server.
        path: values of the path, by name.
        query: values of the query, by name.
        data: the body: a JSON object, bytes of an image, or None.
    """

    services: Services
    path: Mapping[str, str]
    query: Mapping[str, str]
    data: Any = None


@dataclass(frozen=True)
class File:
    """An answer that is a file."""

    data: bytes
    kind: str
    name: str = ""  # of a download


@dataclass(frozen=True)
class APIRoute:
    """A row of the table.

    Attributes:
        method: of HTTP.
        path: with {names}.
        call: returns JSON, or a `File`.
        summary: one sentence.
        body: "", "json" or "image".
        query: names of values in the query.
        status: of a good answer.
    """

    method: str
    path: str
    call: Callable[[Asked], Any]
    summary: str
    body: str = ""
    query: tuple[str, ...] = ()
    status: int = 200


# --- queue ---


def _queue(asked: Asked) -> Any:
    return {"jobs": asked.services.queue.listed()}


def _add_job(asked: Asked) -> Any:
    return asked.services.queue.add(asked.data).to_json()


def _job(asked: Asked) -> Any:
    return asked.services.queue.find(asked.path["id"]).to_json()


def _cancel(asked: Asked) -> Any:
    return asked.services.queue.cancel(asked.path["id"]).to_json()


def _order(asked: Asked) -> Any:
    keys = asked.data.get("ids")
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys) or len(asked.data) > 1:
        raise invalid("expected ids: a list of jobs that wait", "ids")
    asked.services.queue.order(keys)
    return _queue(asked)


def _preview(asked: Asked) -> Any:
    png = asked.services.queue.find(asked.path["id"]).png
    if png is None:
        raise HTTPProblem(404, "not_found", "there is no preview now")
    return File(png, "image/png")


# --- pictures and uploads ---


def _pictures(asked: Asked) -> Any:
    limit = asking.whole(asked.query, "limit", usual=60, low=1, high=pictures.MOST)
    return asked.services.pictures.page(asked.query.get("query", ""), asked.query.get("before", ""), limit)


def _picture(asked: Asked) -> Any:
    row = asked.services.pictures.find(asked.path["id"])
    request, missing = fields.from_record(pictures.file_of(row), row["record"])
    job = asked.services.store.row("SELECT * FROM jobs WHERE id = ?", [row["job"]])
    if job and request and all(map(_is_here(asked), fields.images(job["request"]))):
        kept = {name: value for name, value in job["request"].items() if name not in ("num_images", "seed")}
        request, missing = kept | {"seed": request["seed"], "prompt": request["prompt"]}, []
    return pictures.brief(row) | {
        "record": pictures.shown_record(row["record"]),
        "request": request,
        "missing": missing,
    }


def _is_here(asked: Asked) -> Callable[[str], bool]:
    def is_here(key: str) -> bool:
        try:
            return bool(asked.services.queue.find_image(key))
        except HTTPProblem:
            return False

    return is_here


def _picture_file(asked: Asked) -> Any:
    row = asked.services.pictures.find(asked.path["id"])
    name = pictures.download_name(row) if asked.query.get("download") == "1" else ""
    return File(pictures.file_of(row).read_bytes(), _KINDS.get(row["format"], "image/png"), name)


def _thumbnail(asked: Asked) -> Any:
    side = asking.whole(asked.query, "side", usual=256, low=pictures.SIDES[0], high=pictures.SIDES[1])
    return File(asked.services.pictures.thumbnail(asked.path["id"], side), "image/webp")


def _remove_picture(asked: Asked) -> Any:
    key = asked.path["id"]
    asked.services.pictures.remove(key)
    return {"id": key, "trash": True}


def _upload(asked: Asked) -> Any:
    kept = uploads.keep(asked.data)
    request, missing = fields.from_record(uploads.find(kept["id"]), kept["record"])
    record = kept["record"] and pictures.shown_record(kept["record"])
    return kept | {"record": record, "request": request, "missing": missing}


def _uploaded(asked: Asked) -> Any:
    return File(uploads.png(asked.path["id"]), "image/png")


# --- facts ---


def _models(asked: Asked) -> Any:
    return facts.models(asked.services.queue.model)


def _set_default(asked: Asked) -> Any:
    asking.only(asked.data, "name")
    name = asked.data.get("name")
    if not isinstance(name, str):
        raise invalid("expected name: a model", "name")
    fields.model_folder(name)
    settings.set_model(name)
    asked.services.events.publish("models", {})
    return {"name": name}


def _adapters(asked: Asked) -> Any:
    return facts.adapters(asked.query.get("model"))


def _options(asked: Asked) -> Any:
    found = facts.options()
    return found | {"limits": found["limits"] | {"queue": MOST_WAITING, "streams": STREAMS}}


def _plan(asked: Asked) -> Any:
    checked = asked.services.store.settings(SETTINGS)["checked_previews"]
    return facts.plan(asked.data, asked.services.queue.find_image, checked_previews=checked)


def _tokens(asked: Asked) -> Any:
    prompt, model = asked.data.get("prompt"), asked.data.get("model")
    asking.only(asked.data, "prompt", "model")
    fields.check({"prompt": prompt} | ({} if model is None else {"model": model}))
    return facts.tokens(prompt, model)


def _prompts(asked: Asked) -> Any:
    limit = asking.whole(asked.query, "limit", usual=50, low=1, high=pictures.MOST)
    return {"prompts": asked.services.store.prompts(asked.query.get("query", "").split()[:20], limit)}


def _settings(asked: Asked) -> Any:
    return asked.services.store.settings(SETTINGS)


def _change_settings(asked: Asked) -> Any:
    for name, value in asked.data.items():
        if name not in SETTINGS or type(value) is not type(SETTINGS[name]):
            raise invalid(f"{name[:80]!r} is no setting, or its value has another type", name[:80])
        if name == "idle_minutes" and not 1 <= value <= 24 * 60:
            raise invalid(f"idle_minutes is {value}; expected 1 to 1440", name)
    for name, value in asked.data.items():
        asked.services.store.set(name, value)
    return _settings(asked)


def _status(asked: Asked) -> Any:
    services = asked.services
    return {
        "version": __version__,
        "model": services.queue.model,
        "jobs": services.queue.waiting,
        "streams": services.events.streams,
        "memory": mx.get_active_memory(),
        "home_free": home_disk()[1],
    }


# --- review and setup ---


def _reviews(asked: Asked) -> Any:
    return asked.services.reviews.listed()


def _review_file(asked: Asked) -> Any:
    return File(asked.services.reviews.file(asked.path["id"]), "image/png")


def _judge(asked: Asked) -> Any:
    services = asked.services
    found = services.reviews.judge(asked.path["id"], asked.data)
    path, job, number = found.pop("file"), found.pop("job"), found.pop("number")
    services.pictures.scan()
    if path:
        found["picture"] = pictures.brief(services.pictures.find(pictures.identity(path.name)))
    if job:
        told = {"outcome": "released", "picture": pictures.identity(path.name)} if path else {}
        services.queue.settled(job, number, told or {"outcome": "withheld", "reason": "rejected in review"})
    services.queue.tell_review()
    return found


def _setup(asked: Asked) -> Any:
    return asked.services.setup.state()


def _start_setup(asked: Asked) -> Any:
    asked.services.setup.start(asked.data)
    return asked.services.setup.state()


def _stop_setup(asked: Asked) -> Any:
    asked.services.setup.stop()
    return asked.services.setup.state()


def _v1_models(asked: Asked) -> Any:
    return asked.services.openai.models()


def _v1_model(asked: Asked) -> Any:
    return asked.services.openai.model(asked.path["name"])


ROUTES = (
    APIRoute("GET", "/api/queue", _queue, "Lists the jobs."),
    APIRoute("POST", "/api/queue", _add_job, "Adds a job.", body="json", status=201),
    APIRoute("PUT", "/api/queue/order", _order, "Puts waiting jobs first, in an order.", body="json"),
    APIRoute("GET", "/api/queue/{id}", _job, "Returns a job."),
    APIRoute("DELETE", "/api/queue/{id}", _cancel, "Cancels a job, or removes one that has ended."),
    APIRoute("GET", "/api/queue/{id}/preview", _preview, "Returns the newest preview of a running job."),
    APIRoute("GET", "/api/pictures", _pictures, "Lists pictures, newest first.", query=("query", "before", "limit")),
    APIRoute("GET", "/api/pictures/{id}", _picture, "Returns a picture's record and the request that repeats it."),
    APIRoute("GET", "/api/pictures/{id}/file", _picture_file, "Returns a picture's file.", query=("download",)),
    APIRoute("GET", "/api/pictures/{id}/thumbnail", _thumbnail, "Returns a small picture.", query=("side",)),
    APIRoute("DELETE", "/api/pictures/{id}", _remove_picture, "Moves a picture to the system's Trash."),
    APIRoute("POST", "/api/uploads", _upload, "Keeps an image.", body="image", status=201),
    APIRoute("GET", "/api/uploads/{id}", _uploaded, "Returns an upload as PNG."),
    APIRoute("GET", "/api/models", _models, "Lists models, components and filters."),
    APIRoute("PUT", "/api/models/default", _set_default, "Chooses the default model.", body="json"),
    APIRoute("GET", "/api/adapters", _adapters, "Lists adapters.", query=("model",)),
    APIRoute("GET", "/api/options", _options, "Returns the fields of a request, with their choices and limits."),
    APIRoute("POST", "/api/plan", _plan, "Predicts memory and time of a request.", body="json"),
    APIRoute("POST", "/api/tokens", _tokens, "Counts the tokens of a prompt.", body="json"),
    APIRoute("GET", "/api/prompts", _prompts, "Lists prompts used before.", query=("query", "limit")),
    APIRoute("GET", "/api/settings", _settings, "Returns the settings."),
    APIRoute("PUT", "/api/settings", _change_settings, "Changes settings.", body="json"),
    APIRoute("GET", "/api/status", _status, "Returns the state of the server."),
    APIRoute("GET", "/api/review", _reviews, "Lists pictures that wait for review, and the questions."),
    APIRoute("GET", "/api/review/{id}/file", _review_file, "Returns a waiting picture at full size."),
    APIRoute("POST", "/api/review/{id}", _judge, "Releases or rejects a picture.", body="json"),
    APIRoute("GET", "/api/setup", _setup, "Returns what is missing, and how far setup is."),
    APIRoute("POST", "/api/setup", _start_setup, "Starts setup.", body="json", status=202),
    APIRoute("DELETE", "/api/setup", _stop_setup, "Stops setup."),
    APIRoute("GET", "/v1/models", _v1_models, "Lists models, as OpenAI's clients read them."),
    APIRoute("GET", "/v1/models/{name}", _v1_model, "Returns a model."),
)
