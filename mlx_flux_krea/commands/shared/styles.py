"""The style images of jobs: files with their weights, opened once in a run, and compared with those of a record."""

import hashlib
import os
from pathlib import Path
from typing import Any

from mlx_flux_krea.errors import UsageError, amount

from .images import STYLE, Opened, open_image
from .options import split_style

RECORDED = "style_recorded"  # option: hash, weight and pooled weight of each style image of a record


def style_arguments(options: dict, opened: Opened) -> tuple[dict[str, Any], list[str]]:
    """Returns the pipeline's arguments for the style images of a job, and notes about them.

    Args:
        options: of the job.
        opened: images; those that this opens are added.

    Raises:
        UsageError: an image is missing or cannot be opened, or a record needs images that are not given.
    """
    recorded = _checked(options.get(RECORDED, []))
    if "style" not in options and recorded:
        made = f"{options['from_']} was made from {amount(len(recorded), 'style image')}"
        raise UsageError(made, "the same", "name them in their order: --style FILE; or --style none")
    images, weights, pooled, notes = [], [], [], []
    for place, text in enumerate(options.get("style", ())):
        source, weight = split_style(text)
        path = Path(source)
        images.append(image := open_image(STYLE, path, opened))
        digest, known, known_pooled = recorded[place] if place < len(recorded) else ("", 1.0, 1.0)
        if recorded and hashlib.sha256(image.tobytes()).hexdigest() != digest:
            notes.append(f"{source} is not the style image that {options['from_']} was made from")
        weights.append(known if weight is None else weight)
        pooled.append(known_pooled)
    if not images:
        if "style_rule" in options and "style" not in options and not recorded:
            raise UsageError("--style-rule does nothing without a style image", "", "add --style FILE, or leave it out")
        return {}, []
    arguments: dict[str, Any] = {"style_images": images, "style_weights": weights}
    if "style_rule" in options:
        arguments["style_rule"] = options["style_rule"]
    if options.get("style_rule") == "sum":
        arguments["style_pooled_weights"] = pooled
    return arguments, notes


def absolute_style(text: str) -> str:
    """Returns FILE=WEIGHT with the file's absolute path."""
    source, weight = split_style(text)
    return os.path.abspath(source) + ("" if weight is None else f"={weight!r}")


def recorded_style(record: dict, path: Path) -> dict[str, Any]:
    """Returns the options that repeat the style of a picture, from its record, which anybody may have written.

    Raises:
        UsageError: it cannot be read, or the picture has no text, which the command line cannot repeat.
    """
    style = record.get("style")
    if style is None:
        return {}
    if "prompt" not in record:
        found = f"{path} was made from style images alone, without a text"
        raise UsageError(found, "a picture with a prompt", "repeat it in Python, or give a prompt: --style FILE")
    images = style.get("images") if isinstance(style, dict) else None
    if not isinstance(images, list) or not all(isinstance(one, dict) for one in images):
        raise UsageError(f"the record of {path} has style images that cannot be read", "a list")
    names = ("rgb_sha256", "weight", "pooled_weight")
    facts = [[one.get(name, 1.0) for name in names] for one in images]
    return {RECORDED: facts, "style_rule": style.get("rule")}


def _checked(recorded: Any) -> list[tuple[str, float, float]]:
    """Checks the facts of `recorded_style`, which a checkpoint may hold too."""
    rows: list[Any] = recorded if isinstance(recorded, list) else [None]
    for row in rows:
        good = isinstance(row, list | tuple) and len(row) == 3 and isinstance(row[0], str)
        if not good or not all(type(one) in (int, float) for one in row[1:]):
            raise UsageError("the record names style images that cannot be read", "a hash and weights of each")
    return [(digest, weight, pooled) for digest, weight, pooled in rows]
