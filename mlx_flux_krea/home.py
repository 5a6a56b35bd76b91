"""The user's folder: every path in it, the installed models, and the default model.

The folder is $FLUX_KREA_HOME, else the platform's folder for application data. Names inside it are written only here.
"""

import os
import sys
from pathlib import Path

from .errors import ModelError
from .files import read_json

MODELS = "models"  # converted models, a folder each
FILTERS = "filters"  # nsfw/ and pixtral/
QUARANTINE = "quarantine"  # pictures that wait for review
LOG = "log"  # the chained log of checks and releases
CHECKPOINTS = "interrupted"  # a file for each unfinished run
PICTURES = "pictures"  # the first picture of `setup`
SETTINGS = "config.json"  # of `flux-krea config`
LICENCES = "licences.json"  # texts that a person has agreed to
PRODUCTS = "products.json"  # how quantized layers multiply fastest on this machine
HISTORY = "history"  # lines typed in the shell

NANO = Path(__file__).parent / "nano" / "model"  # comes with the package


def root() -> Path:
    """Returns $FLUX_KREA_HOME, else the platform's folder for application data."""
    if os.environ.get("FLUX_KREA_HOME"):
        return Path(os.path.expanduser(os.environ["FLUX_KREA_HOME"]))
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support" / "flux-krea"
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "flux-krea"


def path(place: str, *below: str) -> Path:
    """Returns a path in the user's folder; it need not exist.

    Args:
        place: one of the constants above.
        below: names inside that place.
    """
    return root().joinpath(place, *below)


def installed_models() -> dict[str, Path]:
    """Returns the folders of installed models by name, in order. Hidden folders are incomplete and left out."""
    indexes = path(MODELS).glob("*/model_index.json")
    return {p.parent.name: p.parent for p in sorted(indexes) if not p.parent.name.startswith(".")}


def default_model() -> str | None:
    """Returns the model used if none is named: `model` in the settings (`flux-krea models default`).

    Raises:
        ModelError: the file is damaged.
    """
    settings = path(SETTINGS)
    model = read_json(settings).get("model") if settings.exists() else None
    return model if isinstance(model, str) else None


def named(model: str | os.PathLike) -> Path:
    """Returns the folder of an installed model, or of `nano`, if nothing lies at a path of that name; else the path."""
    at = Path(os.path.expanduser(model))
    return at if at.exists() else ({"nano": NANO} | installed_models()).get(str(model), at)


def find_model(model: str | os.PathLike | None) -> Path:
    """Returns the folder of a model.

    Args:
        model: a path, or the name of an installed model or `nano`; None: the default, or the only installed one.

    Raises:
        ModelError: no such model, or several are installed and none was named.
    """
    model = default_model() if model is None else model
    if model is None:
        installed = installed_models()
        if len(installed) == 1:
            return next(iter(installed.values()))
        if installed:
            todo = "name one with `model`, or make it the default: flux-krea models default NAME"
            raise ModelError(f"several models are installed: {', '.join(installed)}", "", todo)
        todo = "install one: flux-krea setup, name a folder with `model`, or name the small model, nano"
        raise ModelError(f"no model is installed in {path(MODELS)}", "", todo)
    at = named(model)
    if not at.exists():
        known = f"a path, or one of {', '.join(['nano', *installed_models()])}"
        raise ModelError(
            f"there is no model {str(model)!r}", known, "convert a downloaded folder: flux-krea convert FOLDER"
        )
    return at
