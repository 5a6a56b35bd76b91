"""The fields of a request of the page, as JSON: to options of `generate`, and back from a picture's record.

A request names images by ids, models and adapters by names that are installed. No text of it is taken for a path.
"""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from mlx_flux_krea import home, presets
from mlx_flux_krea.adapters.installed import find_hash, installed
from mlx_flux_krea.commands.schema import json_type
from mlx_flux_krea.commands.shared.jobs import record_options
from mlx_flux_krea.commands.shared.options import BY_NAME, cast, check_together, split_lora
from mlx_flux_krea.errors import FluxKreaError
from mlx_flux_krea.files import sha256_if_exists
from mlx_flux_krea.weights import ModelFolder

from .errors import HTTPProblem, invalid

FORMATS = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}  # endings of files
MOST_IMAGES = 16  # pictures of one seed's row, and of a list
FindImage = Callable[[str], Path]

# Fields that are options of the same name and type.
PLAIN = (
    "prompt", "negative_prompt", "true_cfg_scale", "width", "height", "aspect", "megapixels", "upscale", "steps",
    "guidance", "strength", "fast", "solver", "schedule", "cache", "noise", "like", "expand", "crop_to_mask",
    "soft_mask", "no_paste", "no_auto_resize", "control", "fit", "style_rule", "quality", "metadata",
    "credentials", "watermark",
)  # fmt: skip
_IMAGES = ("image", "mask", "control_image")  # ids
_ID = {"type": "string", "pattern": "^[0-9a-f]{16}$"}
_TYPES = {"integer": int, "number": (int, float), "boolean": bool, "string": str}
_OF_RECORDS = ("prompt_2", "negative_prompt_2", "sigmas", "max_sequence_length", "padding_mask_crop", "batch")
# Options that a record may need, and a request cannot give.
_OF_RECORDS += ("image_seed", "upscale_tiles", "style_recorded")


def properties() -> dict[str, dict[str, Any]]:
    """Returns the JSON Schema of each field of a request."""
    found: dict[str, dict[str, Any]] = {name: _described(name) for name in PLAIN}
    seed = {"type": "integer", "minimum": 0, "maximum": 2**64 - 1}
    weighted = {"type": "number", "minimum": -presets.MAX_WEIGHT, "maximum": presets.MAX_WEIGHT}
    return found | {
        "model": {"type": "string", "description": "Name of an installed model."},
        "seed": {"oneOf": [seed, {"type": "array", "items": seed, "minItems": 1, "maxItems": MOST_IMAGES}]},
        "num_images": {"type": "integer", "minimum": 1, "maximum": MOST_IMAGES, "default": 1},
        "format": {"type": "string", "enum": list(FORMATS), "default": "png"},
        "preview": {"type": "boolean"},
        **{name: _ID | {"description": "Id of an upload or a picture."} for name in _IMAGES},
        "references": {"type": "array", "items": _ID, "maxItems": MOST_IMAGES},
        "loras": _list_of({"name": {"type": "string"}, "weight": weighted}, "name"),
        "styles": _list_of({"image": _ID, "weight": weighted}, "image"),
    }


def check(request: dict[str, Any]) -> None:
    """Checks names and types of the fields of a request.

    Raises:
        HTTPProblem: one is not known, or has another type.
    """
    known = properties()
    for name, value in request.items():
        if name not in known:
            raise invalid(f"there is no field {name[:80]!r}; expected one of {', '.join(known)}", name[:80])
        _check(name, value, known[name])


def options(request: dict[str, Any], find_image: FindImage) -> dict[str, Any]:
    """Returns a request as options of `generate`.

    Args:
        request: checked by `check`.
        find_image: returns the file of an upload or a picture.

    Raises:
        HTTPProblem: a value that cannot be used, or a thing that is not here.
    """
    given: dict[str, Any] = {}
    for name in PLAIN:
        if name in request and request[name] is not False:
            given |= [_cast(name, request[name])]
    if "model" in request:
        given["model"] = str(model_folder(request["model"]))
    if "seed" in request:
        seeds = request["seed"] if isinstance(request["seed"], list) else [request["seed"]]
        given["seed"] = tuple(seeds)
    if "num_images" in request:
        given["num_images"] = request["num_images"]
    given |= {name: find_image(request[name]) for name in _IMAGES if name in request}
    if "references" in request:
        given["reference"] = tuple(map(find_image, request["references"]))
    if "loras" in request:
        given["lora"] = tuple(map(_lora, request["loras"]))
    if "styles" in request:
        given["style"] = tuple(_with_weight(str(find_image(one["image"])), one) for one in request["styles"])
    try:
        check_together(given)
    except FluxKreaError as error:
        raise invalid(str(error)) from None
    return given


def images(request: dict[str, Any]) -> list[str]:
    """Returns the ids of the images of a request."""
    named = [request[name] for name in _IMAGES if name in request]
    return [*named, *request.get("references", ()), *(one["image"] for one in request.get("styles", ()))]


def models() -> dict[str, Path]:
    """Returns the folders of the models that a request may name, the small one among them."""
    return {home.NANO_NAME: home.NANO} | home.installed_models()


def model_name(folder: ModelFolder) -> str:
    """Returns the name by which a request names a model; its own where it is not installed."""
    return next((name for name, path in models().items() if path == folder.path), folder.index.name)


def model_folder(name: str) -> Path:
    """Returns the folder of an installed model.

    Raises:
        HTTPProblem: none has this name.
    """
    known = models()
    if name not in known:
        expected = ", ".join(known)
        raise HTTPProblem(404, "model_not_found", f"there is no model {name[:80]!r}; expected {expected}", "model")
    return known[name]


def from_record(path: Path, record: dict[str, Any] | None) -> tuple[dict[str, Any] | None, list[str]]:
    """Returns the request that makes a picture again, and the names of what it cannot say.

    Args:
        path: of the picture's file.
        record: its record, which anybody may have written.

    Returns:
        None where the record does not say enough.
    """
    if not record:
        return None, []
    try:
        found = record_options(path)
    except (FluxKreaError, ValueError, TypeError):
        return None, []
    request: dict[str, Any] = {name: found[name] for name in PLAIN if name in found}
    missing = [name for name in _OF_RECORDS if name in found]
    if seed := found.get("seed"):
        request["seed"] = seed[0]
    model = next((name for name, folder in models().items() if _made(folder, found.get("manifest_sha256"))), None)
    if model:
        request["model"] = model
    loras = [_recorded_lora(text) for text in found.get("lora", ())]
    if any(loras):
        request["loras"] = [one for one in loras if one]
    missing += ["loras"] * (not all(loras)) + ["styles"] * ("style_rule" in found)
    request.pop("style_rule", None)
    missing += ["mask" if name == "mask_image" else str(name) for name in found.get("images_sha256", {})]
    try:
        check(request)
    except HTTPProblem:
        return None, []
    return request, missing


def _described(name: str) -> dict[str, Any]:
    option = BY_NAME[name]
    text = (option.help or "").partition("  [default")[0]
    kind = json_type(option.type)
    return {**kind, "description": text}


def _list_of(fields: dict[str, Any], required: str) -> dict[str, Any]:
    one = {"type": "object", "properties": fields, "required": [required], "additionalProperties": False}
    return {"type": "array", "items": one, "maxItems": MOST_IMAGES}


def _check(name: str, value: Any, schema: dict[str, Any]) -> None:
    """Checks a value against the part of JSON Schema that `properties` uses.

    Raises:
        HTTPProblem: it is another kind of value.
    """
    if "oneOf" in schema:
        schema = schema["oneOf"][isinstance(value, list)]
    kind = schema["type"]
    if kind == "array":
        if not isinstance(value, list):
            raise invalid(f"{name} is {_kind_of(value)}; expected a list", name)
        if not schema.get("minItems", 0) <= len(value) <= schema["maxItems"]:
            raise invalid(f"{name} has {len(value)} entries; expected at most {schema['maxItems']}", name)
        for one in value:
            _check(name, one, schema["items"])
    elif kind == "object":
        fields = value if isinstance(value, dict) else {}
        if not set(schema["required"]) <= fields.keys() <= schema["properties"].keys():
            raise invalid(f"{name} has another form; expected {', '.join(schema['properties'])}", name)
        for inner, one in fields.items():
            _check(name, one, schema["properties"][inner])
    else:
        _check_value(name, value, schema)


def _check_value(name: str, value: Any, schema: dict[str, Any]) -> None:
    kind = _TYPES[schema["type"]]
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise invalid(f"{name} is {_kind_of(value)}; expected {_article(schema['type'])}", name)
    if isinstance(value, float) and not math.isfinite(value):
        raise invalid(f"{name} is no finite number", name)
    low, high = schema.get("minimum"), schema.get("maximum")
    if (low is not None and value < low) or (high is not None and value > high):
        raise invalid(f"{name} is {value}; expected {low} to {high}", name)
    if not isinstance(value, str):
        return
    if "enum" in schema and value not in schema["enum"]:
        raise invalid(f"{name} is {value[:80]!r}; expected one of {', '.join(schema['enum'])}", name)
    if "pattern" in schema and not re.fullmatch(schema["pattern"], value):
        raise invalid(f"{name} is no id of an upload or a picture", name)
    if re.search("[\ud800-\udfff\0]", value):
        raise invalid(f"{name} holds characters that no text has", name)


def _kind_of(value: Any) -> str:
    kinds = ((bool, "true or false"), (int, "a number"), (float, "a number"), (str, "a text"), (list, "a list"))
    return next((word for kind, word in kinds if isinstance(value, kind)), "null" if value is None else "an object")


def _article(kind: str) -> str:
    words = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "string": "a text"}
    return words[kind]


def _cast(name: str, value: Any) -> tuple[str, object]:
    try:
        return cast(name, value, PLAIN)
    except (FluxKreaError, click.ClickException) as error:
        raise invalid(str(error), name) from None


def _lora(one: dict[str, Any]) -> str:
    known = installed()
    if one["name"] not in known:
        expected = ", ".join(known) or "none is installed"
        raise HTTPProblem(404, "not_found", f"there is no adapter {one['name'][:80]!r}; expected {expected}", "loras")
    return _with_weight(one["name"], one)


def _with_weight(source: str, one: dict[str, Any]) -> str:
    return f"{source}={float(one['weight'])!r}" if "weight" in one else source


def _recorded_lora(text: str) -> dict[str, Any] | None:
    """Returns an adapter of a record as a field; None: it is not installed."""
    source, weight = split_lora(text)
    folder = find_hash(source.rpartition("@sha256:")[2])
    return None if folder is None else {"name": home.composed(folder.name), "weight": weight}


def _made(folder: Path, manifest_sha256: str | None) -> bool:
    return bool(manifest_sha256) and sha256_if_exists(folder / "manifest.json") == manifest_sha256
