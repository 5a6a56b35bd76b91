"""Input images of jobs: opened once in a run, kept in its checkpoint, and compared with those of a record."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mlx_flux_krea.errors import UsageError
from mlx_flux_krea.inputs import opened_inputs
from mlx_flux_krea.request import ResolvedRequest

from .options import ARGUMENTS, spelled

_OPTIONS = ("image", "mask", "control_image")  # whose values are images
_ALPHA = ".alpha"  # end of a name in a checkpoint

Opened = dict[tuple[str, Path], Any]  # images by argument and path


def open_images(options: dict, opened: Opened) -> dict[str, Any]:
    """Returns the image arguments of a job; those that this opens are added to `opened`.

    Raises:
        UsageError: an image is missing or cannot be opened.
    """
    arguments: dict[str, Any] = {}
    for name, path in _paths(options).items():
        argument = _argument(name)
        if (argument, path) not in opened:
            opened[argument, path] = opened_inputs({argument: path})[argument]
        arguments[name] = opened[argument, path]
    references = [arguments.pop(name) for name in list(arguments) if name.startswith("image_")]
    if references:
        arguments["image"] = (*([arguments["image"]] if "image" in arguments else []), *references)
    return arguments


def stored_images(options: dict, opened: Opened) -> dict[str, np.ndarray]:
    """Returns the images of a job as arrays for a checkpoint, by name."""
    arrays: dict[str, np.ndarray] = {}
    for name, path in _paths(options).items():
        image = opened[_argument(name), path]
        arrays[name] = np.asarray(image)
        if (alpha := image.info.get("alpha")) is not None:
            arrays[name + _ALPHA] = np.asarray(alpha)
    return arrays


def restored_images(options: dict, arrays: dict[str, np.ndarray]) -> Opened:
    """Returns the images that `stored_images` stored for a job, as far as they are there."""
    opened: Opened = {}
    for name, path in _paths(options).items():
        if name not in arrays:
            continue
        image = Image.fromarray(arrays[name])
        if name + _ALPHA in arrays:
            image.info["alpha"] = Image.fromarray(arrays[name + _ALPHA])
        opened[_argument(name), path] = image
    return opened


def recorded_images(record: dict) -> dict[str, str]:
    """Returns the hashes of a picture's input images in its record, by name."""
    found = {}
    for name, facts in record.items():
        if isinstance(facts, dict) and (digest := facts.get("rgb_sha256") or facts.get("grey_sha256")):
            found[name] = str(digest)
    return found


def check_images(options: dict, request: ResolvedRequest) -> list[str]:
    """Compares the images of a job with those of the record that it repeats. Returns a note for each other one.

    Raises:
        UsageError: one is not given.
    """
    notes, given = [], recorded_images(request.inputs.record())
    for name, digest in (options.get("images_sha256") or {}).items():
        argument = _argument(name)
        option = next((option for option in _OPTIONS if ARGUMENTS.get(option, option) == argument), argument)
        if name not in given:
            found = f"{options['from_']} was made from {'a mask' if option == 'mask' else 'an image'}"
            raise UsageError(found, "the same", f"name it with {spelled(option)}")
        if given[name] != digest:
            notes.append(f"{options.get(option, option)} is not the image that {options['from_']} was made from")
    return notes


def _argument(name: str) -> str:
    """Returns the argument of an image: further references are of `image`."""
    return "image" if name.startswith("image_") else name


def _paths(options: dict) -> dict[str, Path]:
    """Returns the paths of a job's images by the names that their hashes have in a record."""
    paths = {ARGUMENTS.get(name, name): options[name] for name in _OPTIONS if options.get(name) is not None}
    first = 2 if "image" in paths else 1
    more = options.get("reference", ())
    return paths | {f"image_{number}" if number > 1 else "image": path for number, path in enumerate(more, first)}
