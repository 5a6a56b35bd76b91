"""OpenAI's images interface, over the same queue: /v1/images/generations, /v1/images/edits and /v1/models."""

import asyncio
import base64
import io
import json
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

from PIL import Image
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response, StreamingResponse

from . import asking, fields, uploads
from .errors import STATUSES, HTTPProblem, invalid, plain
from .events import Events
from .jobs import PageJob
from .pictures import Pictures, file_of
from .queue import Queue

logger = logging.getLogger("mlx_flux_krea.server")

MOST = 10  # pictures of a request, as there
MOST_PARTIAL = 3
MOST_FORM = 17 * uploads.MOST_BYTES // 2  # bytes of a form
_NO_EFFECT = ("quality", "style", "moderation", "user", "input_fidelity")
_OWN = ("n", "size", "response_format", "output_format", "output_compression", "stream", "partial_images", "background")
_NOT_OURS = ("num_images", "format", "image", "mask", "width", "height", "aspect", "megapixels", "preview")
_STATUSES = {code: status for _, status, code in STATUSES} | {"not_found": 404}  # of a job's error, by its code
_LOOK = 0.05  # seconds between looks at a job


class OpenAI:
    """The interface.

    Args:
        queue: that jobs are added to.
        pictures: the index.
        events: of the queue.
    """

    def __init__(self, queue: Queue, pictures: Pictures, events: Events):
        self._queue, self._pictures, self._events = queue, pictures, events

    async def generations(self, request: HTTPRequest) -> Response:
        """Answers /v1/images/generations."""
        asked = asking.json_object(await asking.body(request, asking.MOST_JSON))
        return await self._answer(request, asked, {}, "image_generation")

    async def edits(self, request: HTTPRequest) -> Response:
        """Answers /v1/images/edits."""
        if not request.headers.get("content-type", "").startswith("multipart/form-data"):
            raise invalid("the body is no form; expected multipart/form-data with image")
        asked: dict[str, Any] = {}
        files: dict[str, list[bytes]] = {"image": [], "mask": []}
        async with asking.bounded(request, MOST_FORM).form(max_files=17, max_fields=60, max_part_size=200_000) as form:
            for name, value in form.multi_items():
                if isinstance(value, UploadFile):
                    place = name.removesuffix("[]")
                    if place not in files:
                        raise invalid(f"there is no file {place[:40]!r}; expected image and mask")
                    if (value.size or 0) > uploads.MOST_BYTES:
                        raise asking.too_large(uploads.MOST_BYTES)
                    files[place].append(await value.read())
                else:
                    asked[name] = _value(name, value)
        if not files["image"]:
            raise invalid("there is no image", "image")
        if len(files["mask"]) > 1:
            raise invalid("there are several masks; expected one", "mask")
        images: dict[str, Any] = {}
        kept = [(await run_in_threadpool(uploads.keep, data))["id"] for data in files["image"]]
        images["image"] = kept[0]
        if kept[1:]:
            images["references"] = kept[1:]
        if files["mask"]:
            images["mask"] = await run_in_threadpool(uploads.keep_mask, files["mask"][0])
        return await self._answer(request, asked, images, "image_edit")

    def models(self) -> dict[str, Any]:
        """Answers /v1/models."""
        return {"object": "list", "data": [_model(name) for name in fields.models()]}

    def model(self, name: str) -> dict[str, Any]:
        """Answers /v1/models/NAME.

        Raises:
            HTTPProblem: there is none.
        """
        fields.model_folder(name)
        return _model(name)

    async def _answer(self, request: HTTPRequest, asked: dict[str, Any], images: dict[str, Any], kind: str) -> Response:
        wanted = request_of(asked) | images
        if "user" in asked:
            logger.info("user %s asks for a picture", plain(str(asked["user"]))[:80])
        since = self._events.now
        job = await run_in_threadpool(self._queue.add, wanted)
        if asked.get("stream"):
            parts = self._stream(job, asked, kind, since)
            return StreamingResponse(parts, media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})
        while not job.is_ended:
            if await request.is_disconnected():
                await run_in_threadpool(self._queue.cancel, job.id)
                raise HTTPProblem(499, "cancelled", "the client went away")
            await asyncio.sleep(_LOOK)
        return JSONResponse(await run_in_threadpool(self._result, job, asked))

    def _result(self, job: PageJob, asked: dict[str, Any]) -> dict[str, Any]:
        released = _released(job)
        data, size = [], "auto"
        for one in released:
            row = self._pictures.find(one["picture"])
            encoded = base64.b64encode(file_of(row).read_bytes()).decode()
            size = f"{row['width']}x{row['height']}"
            link = {"url": f"data:image/{row['format']};base64,{encoded}"}
            shown = link if asked.get("response_format") == "url" else {"b64_json": encoded}
            data.append(shown | {"seed": one["seed"], "id": one["picture"]})
        return {"created": int(time.time()), "data": data, **_about(asked, size)}

    async def _stream(self, job: PageJob, asked: dict[str, Any], kind: str, since: int) -> AsyncIterator[bytes]:
        """Yields the events of a job; cancels it where the client goes away."""
        try:
            partial, step = 0, -1
            most = asked.get("partial_images") or 0
            async for event in self._events.follow(since):
                if event and event[1] == "preview" and event[2]["job"] == job.id and partial < most:
                    done, total = event[2]["step"], event[2]["steps"]
                    due = (partial + 1) * total / (most + 1) <= done < total
                    if due and done != step and job.png:
                        about = {"b64_json": _encoded(job.png, asked), "partial_image_index": partial}
                        yield _event(f"{kind}.partial_image", about | _about(asked, _size_of(job)))
                        partial, step = partial + 1, done
                if job.is_ended:
                    break
                if event is None:
                    yield b": waiting\n\n"
            try:
                result = await run_in_threadpool(self._result, job, asked)
            except HTTPProblem as error:
                yield _event("error", error.to_json(), name=False)
                return
            for one in result.pop("data"):
                yield _event(f"{kind}.completed", {**result, **one, "usage": _USAGE})
        finally:
            if not job.is_ended:
                self._queue.cancel(job.id)


_USAGE = {
    "total_tokens": 0,
    "input_tokens": 0,
    "output_tokens": 0,
    "input_tokens_details": {"text_tokens": 0, "image_tokens": 0},
}


def request_of(asked: dict[str, Any]) -> dict[str, Any]:
    """Returns a request of OpenAI's as one of the page.

    Raises:
        HTTPProblem: a field that cannot be used.
    """
    known = fields.properties().keys() - set(_NOT_OURS)
    for name in asked:
        if name not in (*_OWN, *_NO_EFFECT) and name not in known:
            raise invalid(f"there is no field {name[:80]!r}", name[:80])
    request = {name: value for name, value in asked.items() if name in known and name not in _OWN + _NO_EFFECT}
    if not isinstance(asked.get("prompt"), str):
        raise invalid("there is no prompt; expected a text", "prompt")
    _choose(asked, "response_format", ("b64_json", "url"))
    _choose(asked, "background", ("auto", "opaque"))
    kind = _choose(asked, "output_format", tuple(fields.FORMATS)) or "png"
    request |= {"num_images": _number(asked, "n", 1, 1, MOST), "format": kind}
    compression = _number(asked, "output_compression", 100, 0, 100)
    if kind != "png" and asked.get("output_compression") is not None:
        request["quality"] = max(1, compression)
    elif compression != 100:
        raise invalid("output_compression does nothing in a PNG; expected jpeg or webp", "output_compression")
    if isinstance(request.get("seed"), list):
        del request["num_images"]
    if type(asked.get("stream") or False) is not bool:
        raise invalid("stream is neither true nor false", "stream")
    partial = _number(asked, "partial_images", 0, 0, MOST_PARTIAL)
    if partial:
        request["preview"] = True
    return request | _sides(asked.get("size"))


def _sides(size: Any) -> dict[str, int]:
    """Returns width and height of a size."""
    if size in (None, "auto"):
        return {}
    width, _, height = size.partition("x") if isinstance(size, str) else ("", "", "")
    if not all(side.isdecimal() and side.isascii() and len(side) < 6 for side in (width, height)):
        raise invalid(f"size is {str(size)[:40]!r}; expected auto, or WIDTHxHEIGHT", "size")
    if int(width) % 16 or int(height) % 16:
        raise invalid(f"size is {size}; expected multiples of 16", "size")
    return {"width": int(width), "height": int(height)}


def _choose(asked: dict[str, Any], name: str, known: tuple[str, ...]) -> str | None:
    value = asked.get(name)
    if value is not None and value not in known:
        raise invalid(f"{name} is {str(value)[:40]!r}; expected {' or '.join(known)}", name)
    return value


def _number(asked: dict[str, Any], name: str, usual: int, low: int, high: int) -> int:
    value = asked.get(name)
    if value is None:
        return usual
    if type(value) is not int or not low <= value <= high:
        raise invalid(f"{name} is {str(value)[:40]}; expected {low} to {high}", name)
    return value


def _value(name: str, text: str) -> Any:
    """Reads a field of a form by its type."""
    schema = fields.properties().get(name, {})
    kind = {"n": "integer", "output_compression": "integer", "partial_images": "integer", "stream": "boolean"}
    kind = kind.get(name.removesuffix("[]"), schema.get("type", "array" if "oneOf" in schema else "string"))
    if kind == "string":
        return text
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise invalid(f"{name} is {text[:40]!r}; expected JSON", name) from None


def _released(job: PageJob) -> list[dict[str, Any]]:
    """Returns the released pictures of a job.

    Raises:
        HTTPProblem: none was released, or the job failed.
    """
    outcomes = {name: [one for one in job.pictures if one["outcome"] == name] for name in ("released", "waiting")}
    if outcomes["waiting"]:
        ids = [one["review"] for one in outcomes["waiting"]]
        raise HTTPProblem(409, "review_required", f"pictures wait for review: {len(ids)}; open the page", review=ids)
    if outcomes["released"]:
        return outcomes["released"]
    if job.error:
        code = job.error["code"]
        raise HTTPProblem(_STATUSES.get(code, 500), code, job.error["message"], job.error["param"])
    if job.state == "cancelled":
        raise HTTPProblem(499, "cancelled", "the job was cancelled")
    reasons = "; ".join(dict.fromkeys(one.get("reason", "") for one in job.pictures))
    raise HTTPProblem(400, "content_policy_violation", f"withheld by a filter: {reasons}")


def _about(asked: dict[str, Any], size: str) -> dict[str, Any]:
    kind = asked.get("output_format") or "png"
    return {"output_format": kind, "size": size, "background": "opaque", "quality": "auto"}


def _encoded(png: bytes, asked: dict[str, Any]) -> str:
    kind = asked.get("output_format") or "png"
    data = io.BytesIO(png)
    if kind != "png":
        data = io.BytesIO()
        with Image.open(io.BytesIO(png)) as image:
            image.save(data, kind.upper())
    return base64.b64encode(data.getvalue()).decode()


def _size_of(job: PageJob) -> str:
    return f"{job.request['width']}x{job.request['height']}" if "width" in job.request else "auto"


def _event(kind: str, data: dict[str, Any], *, name: bool = True) -> bytes:
    about = {"type": kind, "created_at": int(time.time())} if name else {}
    return f"event: {kind}\ndata: {json.dumps(about | data)}\n\n".encode()


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "this machine"}
