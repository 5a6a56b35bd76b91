"""Input images of jobs: opened once in a run, kept in its checkpoint, and compared with those of a record."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mlx_flux_krea.errors import UsageError
from mlx_flux_krea.inputs.arguments import opened_inputs
from mlx_flux_krea.inputs.style import open_images as open_styles

from .options import ARGUMENTS, spelled, split_style

_OPTIONS = ("image", "mask", "control_image")  # whose values are images
_WORDS = {"image": "image", "mask": "mask", "control_image": "control image", "reference": "reference"}
MOST_OPEN = 2**29  # bytes of images that stay open for the pictures that follow
_ALPHA = ".alpha"  # end of a name in a checkpoint
STYLE = "style_images"
RECORDED = "images_sha256"  # option: facts of the images of a record, by name
OPENED = "opened_sha256"  # option: facts of the images of a job when its run began, by name

Opened = dict[tuple[str, Path], Any]  # images by argument and path


def open_image(argument: str, path: Path, opened: Opened) -> Image.Image:
    """Returns an image, which is opened once and then in `opened`.

    Raises:
        UsageError: it is missing or cannot be opened.
    """
    key = argument, path
    if key not in opened:
        opened[key] = (
            (open_styles([path]) or (None,))[0] if argument == STYLE else opened_inputs({argument: path})[argument]
        )
    return opened[key]


def image_arguments(options: dict, opened: Opened) -> dict[str, Any]:
    """Returns the image arguments of a job, without its style images; those that this opens are added to `opened`.

    Raises:
        UsageError: an image is missing or cannot be opened.
    """
    arguments: dict[str, Any] = {}
    for argument, path in _paths(options).values():
        if argument == STYLE:
            continue
        image = open_image(argument, path, opened)
        arguments[argument] = (*_several(arguments[argument]), image) if argument in arguments else image
    return arguments


def stored_images(options: dict, opened: Opened) -> dict[str, np.ndarray]:
    """Returns the images of a job as arrays for a checkpoint, by name."""
    arrays: dict[str, np.ndarray] = {}
    for name, key in _paths(options).items():
        open_image(*key, opened)
        arrays[name] = np.asarray(opened[key])
        if (alpha := opened[key].info.get("alpha")) is not None:
            arrays[name + _ALPHA] = np.asarray(alpha)
    return arrays


def close_images(options: dict, opened: Opened) -> None:
    """Closes images that the job with these options does not need, where all take much memory: `open_image` can again.

    Args:
        options: of the next picture's job.
        opened: images.
    """
    if 4 * sum(image.width * image.height for image in opened.values()) > MOST_OPEN:
        for key in opened.keys() - _paths(options).values():
            del opened[key]


def restored_images(options: dict, arrays: dict[str, np.ndarray]) -> Opened:
    """Returns the images that `stored_images` stored for a job, as far as they are there."""
    opened: Opened = {}
    for name, key in _paths(options).items():
        if name not in arrays:
            continue
        opened[key] = Image.fromarray(arrays[name])
        if name + _ALPHA in arrays:
            opened[key].info["alpha"] = Image.fromarray(arrays[name + _ALPHA])
    return opened


def image_files(options: dict) -> dict[str, Path]:
    """Returns the files of a job's images, by the names that their hashes have in a record."""
    return {name: path for name, (_, path) in _paths(options).items()}


def recorded_images(record: dict) -> dict[str, str]:
    """Returns sizes and hashes of a picture's input images in its record, by name."""
    found = {}
    for name, facts in record.items():
        if isinstance(facts, dict) and (digest := facts.get("rgb_sha256") or facts.get("grey_sha256")):
            found[name] = f"{facts.get('width')} x {facts.get('height')} {digest}"
    return found


def require_images(options: dict) -> None:
    """Checks that the images of the record that a job repeats are given; a mask may still be the image's own.

    Raises:
        UsageError: one is not.
    """
    given = _paths(options)
    for name in _facts(options, RECORDED):
        if name not in given and name != "mask_image":
            raise _missing(options, name)


def check_images(options: dict, given: dict[str, str]) -> list[str]:
    """Compares the images of a job with those of the record that it repeats. Returns a note for each other one.

    Args:
        options: of the job.
        given: `recorded_images` of the job's own record.

    Raises:
        UsageError: one is not given.
    """
    recorded, made = _facts(options, RECORDED), options.get("from_", "the picture")
    notes, paths = [], _paths(options)
    for name, facts in recorded.items():
        if name not in given:
            raise _missing(options, name)
        if not given[name].endswith(str(facts)):  # earlier versions kept the hash alone
            shown = paths[name][1] if name in paths else "the transparent part of the image"
            notes.append(f"{shown} is not the {_WORDS[_option(name)]} that {made} was made from")
    return notes


def check_unchanged(options: dict, now: dict[str, str]) -> None:
    """Checks that the images of a job are those that its run began with; the next picture's are in the checkpoint.

    Args:
        options: of the job.
        now: `recorded_images` of the job's own record.

    Raises:
        UsageError: another image has taken the place of one.
    """
    began, paths = _facts(options, OPENED), _paths(options)
    if began and began != now:
        name = next((name for name in {**began, **now} if began.get(name) != now.get(name)), "image")
        path = paths[name if name in paths else "image"][1] if paths else "the image"
        raise UsageError(f"{path} was changed since this run began", "the image as it was", "generate a new picture")


def _facts(options: dict, name: str) -> dict[str, Any]:
    """Returns the facts of images by their names in a record; anybody may have written it.

    Raises:
        UsageError: they cannot be read.
    """
    facts = options.get(name) or {}
    if not isinstance(facts, dict):
        raise UsageError("the record names images that cannot be read", "a hash of each")
    return facts


def _missing(options: dict, name: str) -> UsageError:
    """Returns the error for an image of a record that is not given."""
    word = _WORDS[_option(name)]
    found = f"{options.get('from_', 'the picture')} was made from {'an' if word == 'image' else 'a'} {word}"
    return UsageError(found, f"that {word}", f"name it with {spelled(_option(name))}")


def _option(name: str) -> str:
    """Returns the option that gives an image of this name in a record; a second reference is image_2."""
    further = "reference" if name.startswith("image_") else "image"
    return next((option for option in _OPTIONS if ARGUMENTS.get(option, option) == name), further)


def _paths(options: dict) -> dict[str, tuple[str, Path]]:
    """Returns argument and path of each image of a job, by the names that their hashes have in a record."""
    paths: dict[str, tuple[str, Path]] = {}
    for option in _OPTIONS:
        if options.get(option) is not None:
            argument = ARGUMENTS.get(option, option)
            paths[argument] = argument, options[option]
    for path in options.get("reference", ()):
        number = 1 + sum(argument == "image" for argument, _ in paths.values())
        paths["image" if number == 1 else f"image_{number}"] = "image", path
    for number, text in enumerate(options.get("style", ()), 1):
        paths[f"style_{number}"] = STYLE, Path(split_style(text)[0])
    return paths


def _several(images: Any) -> tuple:
    return images if isinstance(images, tuple) else (images,)
