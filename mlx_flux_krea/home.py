"""The user's folder: every path in it, the installed models, and the default model.

The folder is $FLUX_KREA_HOME, else the platform's folder for application data. Names inside it are written only here.
"""

import os
import re
import shlex
import sys
import unicodedata
from difflib import get_close_matches
from pathlib import Path

from .errors import ModelError
from .files import read_json

MODELS = "models"  # converted models, a folder each
FILTERS = "filters"  # nsfw/ and pixtral/
COMPONENTS = "components"  # what any model can use beside its own networks: redux/ and depth/
ADAPTERS = "adapters"  # a folder each
QUARANTINE = "quarantine"  # pictures that wait for review
LOG = "log"  # the chained log of checks and releases
CHECKPOINTS = "interrupted"  # a file for each unfinished run
PICTURES = "pictures"  # those of the page, and the first one of `setup`
SETTINGS = "config.json"  # of `flux-krea config`
CREDENTIALS = "credentials"  # the certificate that signs pictures, and its key
LICENCES = "licences.json"  # texts that a person has agreed to
PRODUCTS = "products.json"  # how quantized layers multiply fastest on this machine
DISKS = "disks.json"  # how fast the disks of models read
FAST = "fast.json"  # the mode of `fast` that was measured to be nearest, of each model
HISTORY = "history"  # lines typed in the shell
PAGE = "page.sqlite"  # of the page: jobs, an index of the pictures
PAGE_LOCK = "page.lock"  # held while the page is served
UPLOADS = "uploads"  # images that the page was given

# Models as people and other tools call them, letters and digits alone, and the verb that installs each.
_PUBLISHED = {
    **dict.fromkeys(
        ("krea", "kreadev", "devkrea", "flux1kreadev", "fluxkrea", "fluxkreadev", "flux", "flux1"), "setup"
    ),
    **dict.fromkeys(("dev", "flux1dev", "fluxdev"), "convert black-forest-labs/FLUX.1-dev"),
    **dict.fromkeys(("schnell", "flux1schnell", "fluxschnell"), "convert black-forest-labs/FLUX.1-schnell"),
    **{
        name: f"convert black-forest-labs/FLUX.1-{model}-dev"
        for model in ("Kontext", "Fill", "Canny", "Depth")
        for known in (model.lower(), f"{model.lower()}dev", f"dev{model.lower()}")
        for name in (known, f"flux1{known}", f"flux{known}")
    },
}
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".heic", ".tif", ".tiff", ".bmp", ".avif")
_WEIGHTS = (".safetensors", ".gguf", ".sft", ".ckpt", ".pt", ".pth", ".bin", ".npz")
_PRECISION = re.compile(r"-(?:\d+bit|none|mxfp4|nvfp4)(?:-gptq)?$", re.I)  # end of an installed model's name
_LIKENESS = 0.7  # of a name and the nearest installed one, from 0 to 1

NANO_NAME = "nano"  # of the small model
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
    return {composed(p.parent.name): p.parent for p in sorted(indexes) if not p.parent.name.startswith(".")}


def installed_components() -> dict[str, Path]:
    """Returns the folders of installed components by name, in order. Hidden folders are incomplete and left out."""
    indexes = path(COMPONENTS).glob("*/model_index.json")
    return {p.parent.name: p.parent for p in sorted(indexes) if not p.parent.name.startswith(".")}


def composed(name: str) -> str:
    """Returns a name with its accents in the letters, as they are typed: a disk of macOS may keep them apart."""
    return unicodedata.normalize("NFC", name)


def default_model() -> str | None:
    """Returns the model used if none is named: `model` in the settings (`flux-krea models default`).

    Raises:
        ModelError: the file is damaged.
    """
    settings = path(SETTINGS)
    model = read_json(settings).get("model") if settings.exists() else None
    return composed(model) if isinstance(model, str) else None


def named(model: str | os.PathLike) -> Path:
    """Returns the folder of an installed model, or of `nano`, if nothing lies at a path of that name; else the path."""
    at = Path(os.path.expanduser(model))
    return at if os.path.exists(at) else ({NANO_NAME: NANO} | installed_models()).get(composed(str(model)), at)


def is_hub_id(model: str | os.PathLike) -> bool:
    """Recognises the form of a repository's name on the hub: OWNER/NAME."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", str(model)))


def _converted_from(repository: str) -> Path | None:
    """Returns the installed model that was converted from a repository of the hub.

    A source that was no part of the hub's cache has only a name, of a folder or file, to compare: letters and digits.

    Raises:
        ModelError: several were, and none of them is the default.
    """
    if not is_hub_id(repository):
        return None
    found = {}
    for name, folder in installed_models().items():
        try:
            index = read_json(folder / "model_index.json")
        except ModelError:  # one that is damaged is no answer
            continue
        recorded = index.get("repository") or index.get("name")
        asked = repository if index.get("repository") else repository.partition("/")[2]
        if _letters(recorded) == _letters(asked):
            found[name] = folder
    if len(found) > 1 and (default := default_model()) not in found:
        todo = "name one, or make it the default: flux-krea models default NAME"
        raise ModelError(f"several installed models were made from {repository}: {', '.join(found)}", "", todo)
    return found[default] if len(found) > 1 else next(iter(found.values()), None)


def is_krea(name: str) -> bool:
    """Recognises FLUX.1 Krea [dev] by a name that people and other tools give it, or by its hub id."""
    return _PUBLISHED.get(_plain(name.removeprefix("black-forest-labs/"))) == "setup"


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _letters(name: object) -> str:
    return re.sub(r"[^a-z0-9/]", "", str(name).lower())


def find_model(model: str | os.PathLike | None) -> Path:
    """Returns the folder of a model.

    Args:
        model: a path, the name of an installed model or `nano`, or the hub id that one was converted from; None: the
            default, or the only installed one.

    Raises:
        ModelError: no such model, or several are installed and none was named.
    """
    is_named = model is not None
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
    if not at.exists() and (converted := _converted_from(str(model))):
        return converted
    if not at.exists():
        error = _no_model(str(model))
        todo = "it was the default: flux-krea models default NAME sets another"
        raise error if is_named else error.with_next_step(todo)
    if at.is_file() and at.suffix.lower() in _PICTURES:
        todo = f"to start from it: `image`; the model that made it: flux-krea inspect {shlex.quote(str(model))}"
        raise ModelError(f"{model} is a picture", "a model", todo)
    return at


def _no_model(name: str) -> ModelError:
    """Returns the error for a name that is neither a path nor an installed model."""
    names = [NANO_NAME, *installed_models()]
    found, known = f"there is no model {name!r}", f"a path, or one of {', '.join(names)}"
    repository = re.sub(r"^(https?://)?(www\.)?(huggingface\.co|hf\.co)/|/(tree|blob)/.*$|/$", "", name)
    if is_hub_id(repository):
        found = f"{repository} is no folder here, and no installed model was converted from it"
        whole = " (flux-krea setup does everything)" if is_krea(repository) else ""
        return ModelError(found, known, f"convert it: flux-krea convert {repository}{whole}")
    if near := get_close_matches(name.lower(), [known.lower() for known in names], 1, _LIKENESS):
        return ModelError(found, known, f"did you mean {next(n for n in names if n.lower() == near[0])}?")
    if "/" not in name and (published := _PUBLISHED.get(_plain(_PRECISION.sub("", name)))):
        folder = "or convert a downloaded folder: flux-krea convert FOLDER"
        return ModelError(f"{name} is not installed", known, f"install it: flux-krea {published}, {folder}")
    if re.match(r"\w+://", name):
        return ModelError(f"{name} is an address, not a model", known, "download it, and convert it first")
    if "/" in name or Path(name).suffix.lower() in (*_WEIGHTS, *_PICTURES):
        return ModelError(f"there is nothing at {name}", known, "check the path")
    return ModelError(found, known, "convert a downloaded folder: flux-krea convert FOLDER")
