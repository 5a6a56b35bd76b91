"""Weights already on this disk: in the hub's cache, ComfyUI's model folders, or mflux's cache."""

import contextlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mlx_flux_krea.convert.hub import cached
from mlx_flux_krea.convert.layouts import identify
from mlx_flux_krea.convert.sources import open_sources
from mlx_flux_krea.errors import ModelError

# Repositories that each part of an installation can be converted from, the original first.
REPOSITORIES = {
    "model": ("black-forest-labs/FLUX.1-Krea-dev",),
    "nsfw": ("Falconsai/nsfw_image_detection",),
    "pixtral": ("mistral-community/pixtral-12b", "mistral-labs/pixtral-12b", "mlx-community/pixtral-12b-4bit"),
}
_COMFYUI = ("diffusion_models", "unet", "checkpoints", "text_encoders", "clip", "vae")  # folders in its `models`


@dataclass(frozen=True)
class PartSource:
    """Weights that `convert` can read.

    Attributes:
        sources: SOURCES of `convert`.
        where: the same in words.
    """

    sources: tuple[str, ...]
    where: str


def find_sources(part: str, offline: bool) -> list[PartSource]:
    """Lists the sources of a part: those on this disk, then the hub.

    Args:
        part: a key of `REPOSITORIES`.
        offline: leave out the hub.
    """
    here = [repo for repo in REPOSITORIES[part] if cached(repo)]
    found = [PartSource((repo,), f"the hub's cache, {repo}") for repo in here]
    if part == "model":
        found += [*_comfyui_sources(), *_mflux_sources()]
    if not offline and REPOSITORIES[part][0] not in here:
        found.append(PartSource(REPOSITORIES[part][:1], f"the hub, {REPOSITORIES[part][0]}"))
    return found


def _comfyui_sources() -> Iterator[PartSource]:
    """Yields FLUX.1 Krea files of ComfyUI, with the largest file of each other component."""
    own = Path.home()
    for models in (own / "ComfyUI" / "models", own / "Documents" / "ComfyUI" / "models", Path("ComfyUI", "models")):
        files = [file for name in _COMFYUI if (models / name).is_dir() for file in (models / name).iterdir()]
        files = [file for file in files if file.suffix in (".safetensors", ".gguf") and file.is_file()]
        files.sort(key=lambda file: (-file.stat().st_size, file.name))
        others = {}
        for file in files:
            for component in _components(file):
                others.setdefault(component, file)
        for file in files:
            if "krea" in file.name.lower() and "transformer" in (inside := _components(file)):
                names = [file, *(others[name] for name in others if name not in inside)]
                yield PartSource(tuple(map(str, dict.fromkeys(names))), f"ComfyUI, {file}")


def _mflux_sources() -> Iterator[PartSource]:
    """Yields FLUX.1 Krea folders in mflux's cache."""
    usual = "Library/Caches/mflux" if sys.platform == "darwin" else ".cache/mflux"
    cache = Path(os.environ.get("MFLUX_CACHE_DIR") or Path.home() / usual)
    for folder in sorted(cache.glob("*")) + sorted(cache.glob("*/*")):
        if "krea" in folder.name.lower() and (folder / "transformer").is_dir() and (folder / "vae").is_dir():
            yield PartSource((str(folder),), f"mflux, {folder}")


def _components(file: Path) -> list[str]:
    """Returns the components in a file, from its header; none where the layout is unknown."""
    with contextlib.suppress(ModelError):
        return [one.layout.component for source in open_sources([file]) for one in identify(source)]
    return []
