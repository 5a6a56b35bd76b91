"""Weights already on this disk: in the hub's cache, and in the folders of other programs.

A folder that the system refuses to show (macOS asks before a program may look into Documents or another program's
container) is noted and passed over.
"""

import contextlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mlx_flux_krea.convert.hub import cache_folder, cached
from mlx_flux_krea.convert.identify import identify
from mlx_flux_krea.convert.sources import open_sources
from mlx_flux_krea.errors import FluxKreaError
from mlx_flux_krea.files import read_small

# Repositories that each part of an installation can be converted from, in the order in which they are offered. The
# ready copy of Pixtral has 4 bits, as ours has after conversion, and is a third as long to fetch.
REPOSITORIES = {
    "model": ("black-forest-labs/FLUX.1-Krea-dev",),
    "nsfw": ("Falconsai/nsfw_image_detection",),
    "pixtral": ("mlx-community/pixtral-12b-4bit", "mistral-community/pixtral-12b", "mistral-labs/pixtral-12b"),
}
_OFFERED = 2  # repositories of a part that are offered from the hub
_WEIGHTS = (".safetensors", ".gguf", ".sft")
_DEPTH, _MOST = 5, 5000  # of folders below a place, and entries that are looked at in it
# Folders that hold components, in ComfyUI's `models` and in Forge's.
_COMPONENTS = (
    "diffusion_models", "unet", "checkpoints", "text_encoders", "clip", "vae",
    "Stable-diffusion", "text_encoder", "VAE",
)  # fmt: skip
_NOT_READ = {".ckpt": "which is in Draw Things' own format, and cannot be converted"}


@dataclass(frozen=True)
class PartSource:
    """Weights that `convert` can read.

    Attributes:
        sources: SOURCES of `convert`.
        where: the same in words.
        is_here: they are on this disk, at least in part.
    """

    sources: tuple[str, ...]
    where: str
    is_here: bool = True


@dataclass
class Search:
    """A search of this disk.

    Attributes:
        looked: the places that exist, by program.
        absent: the places that do not, by program.
        refused: folders that the system does not show.
        notes: sentences about files that were found and cannot be used.
    """

    looked: dict[str, list[Path]] = field(default_factory=dict)
    absent: dict[str, list[Path]] = field(default_factory=dict)
    refused: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def entries(self, folder: Path) -> list[Path]:
        """Lists a folder; nothing where there is none, or where the system refuses."""
        try:
            return sorted(Path(entry) for entry in os.scandir(folder) if not entry.name.startswith("."))
        except (FileNotFoundError, NotADirectoryError):
            return []
        except OSError:
            if folder not in self.refused:
                self.refused.append(folder)
            return []

    def files(self, root: Path, suffixes: tuple[str, ...], depth: int = _DEPTH) -> list[Path]:
        """Lists the files below a folder that have one of these extensions, the largest first."""
        found, left, seen = [], [(root, depth)], 0
        while left and seen < _MOST:
            folder, levels = left.pop()
            for path in self.entries(folder):
                seen += 1
                if path.suffix.lower() in suffixes and os.path.isfile(path):
                    found.append(path)
                elif levels and os.path.isdir(path) and not os.path.islink(path):
                    left.append((path, levels - 1))
        return sorted(found, key=lambda file: (-_size(file), str(file)))

    def note_place(self, program: str, folder: Path) -> bool:
        """Notes a place to look in. Returns True where it exists, and was not looked in before."""
        places = self.looked.setdefault(program, [])
        if folder in places or not os.path.isdir(folder):
            self.entries(folder)  # notes a refusal
            self.absent.setdefault(program, []).extend([] if folder in places else [folder])
            return False
        places.append(folder)
        return True

    def told(self) -> list[str]:
        """Returns sentences that say where the search looked, and where it was refused."""
        short = {program: ", ".join(map(_short, places)) for program, places in self.looked.items() if places}
        none = {
            program: ", ".join(map(_short, self.absent[program])) for program in self.looked if program not in short
        }
        others = ", ".join(f"{program} ({places})" for program, places in none.items())
        lines = [f"looked in {'; '.join(f'{program}: {places}' for program, places in short.items())}"] if short else []
        lines += [f"there is no folder of {others}"] if others else []
        for folder in (one for one in self.refused if not set(one.parents) & set(self.refused)):
            allow = "allow it in System Settings, Privacy & Security" if sys.platform == "darwin" else "change its mode"
            lines.append(f"the system refuses to show {_short(folder)}: {allow}, or name the files with --model")
        return lines + self.notes


def find_sources(part: str, offline: bool, search: Search | None = None) -> list[PartSource]:
    """Lists the sources of a part: those on this disk, then the hub.

    Args:
        part: a key of `REPOSITORIES`.
        offline: leave out the hub.
        search: takes the places that were looked in.
    """
    search = search or Search()
    search.note_place("the hub's cache", cache_folder())
    here = [repo for repo in REPOSITORIES[part] if cached(repo)]
    found = [PartSource((repo,), f"the hub's cache, {repo}") for repo in here]
    found += [source for look in _LOOKS[part] for source in look(search)]
    offered = () if offline or here else REPOSITORIES[part][:_OFFERED]
    return found + [PartSource((repo,), f"the hub, {repo}", is_here=False) for repo in offered]


# --- programs ---


def _comfyui_sources(search: Search) -> Iterator[PartSource]:
    """Yields FLUX.1 Krea files of ComfyUI and Forge, with the largest file of each other component."""
    own = Path.home()
    roots = [own / "ComfyUI", own / "Documents" / "ComfyUI", own / "Desktop" / "ComfyUI", Path("ComfyUI").absolute()]
    roots += [own / "comfy" / "ComfyUI", own / "stable-diffusion-webui-forge", own / "Documents" / "Forge"]
    desktop = own / ("Library/Application Support" if sys.platform == "darwin" else ".config") / "ComfyUI"
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # none, or damaged
        roots.append(Path(json.loads(read_small(desktop / "config.json"))["basePath"]))
    folders = []
    for root in dict.fromkeys(roots):
        folders += [root / "models" / name for name in _COMPONENTS] if search.note_place("ComfyUI", root) else []
    lists = [root / "extra_model_paths.yaml" for root in roots] + [desktop / "extra_models_config.yaml"]
    extra = [folder for file in lists for folder in _listed_in(file, search)]
    for folder in extra:
        search.note_place("ComfyUI", folder)
    files = [file for folder in dict.fromkeys(folders + extra) for file in search.files(folder, _WEIGHTS, 2)]
    yield from _assembled(sorted(files, key=lambda file: (-_size(file), file.name)), "ComfyUI")


def _listed_in(file: Path, search: Search) -> list[Path]:
    """Reads ComfyUI's list of other folders of models, as far as it names components: plain YAML of two levels."""
    try:
        text = read_small(file).decode(errors="replace")
    except FileNotFoundError:
        return []
    except OSError:
        search.refused.append(file)
        return []
    base, key, folders = Path(), "", []
    for line in text.splitlines():
        line = line.split(" #")[0].rstrip()
        if not line or line.lstrip().startswith("#"):
            continue
        pair = re.fullmatch(r"(\s*)([\w-]+)\s*:\s*(.*)", line)
        if pair and not pair[1]:
            base, key = file.parent, ""  # another section
            continue
        key, value = (pair[2], pair[3]) if pair else (key, line)
        value = value.strip().removeprefix("- ").strip("\"' ")
        if key == "base_path" and value:
            base = file.parent / os.path.expanduser(value)
        elif key in _COMPONENTS and value.strip("|>- "):
            folders.append(base / os.path.expanduser(value))
    return folders


def _mflux_sources(search: Search) -> Iterator[PartSource]:
    """Yields FLUX.1 Krea folders in mflux's cache."""
    usual = "Library/Caches/mflux" if sys.platform == "darwin" else ".cache/mflux"
    cache = Path(os.environ.get("MFLUX_CACHE_DIR") or Path.home() / usual)
    if search.note_place("mflux", cache):
        top = search.entries(cache)
        for folder in top + [path for one in top if os.path.isdir(one) for path in search.entries(one)]:
            parts = (folder / "transformer", folder / "vae")
            if "krea" in folder.name.lower() and all(map(os.path.isdir, parts)):
                yield PartSource((str(folder),), f"mflux, {folder}")


def _invokeai_sources(search: Search) -> Iterator[PartSource]:
    """Yields FLUX.1 Krea files in InvokeAI's folder, with the largest file of each other component."""
    for root in (os.environ.get("INVOKEAI_ROOT"), Path.home() / "invokeai", Path.home() / "InvokeAI"):
        if root and search.note_place("InvokeAI", Path(root)):
            yield from _assembled(search.files(Path(root, "models"), _WEIGHTS), "InvokeAI")


def _draw_things_sources(search: Search) -> Iterator[PartSource]:
    """Yields nothing: notes files of Draw Things, whose format cannot be converted."""
    below = Path("Library", "Containers", "com.liuliu.draw-things", "Data", "Documents", "Models")
    if search.note_place("Draw Things", Path.home() / below):
        for file in search.files(Path.home() / below, (*_NOT_READ, *_WEIGHTS), 1):
            if "krea" in file.name.lower():
                why = _NOT_READ.get(file.suffix.lower(), "which holds one component of several")
                search.notes.append(f"Draw Things has {file.name}, {why}")
    yield from ()


def _cached_sources(search: Search) -> Iterator[PartSource]:
    """Yields other repositories of FLUX.1 Krea in the hub's cache."""
    for folder in search.entries(cache_folder()):
        owner, _, name = folder.name.removeprefix("models--").partition("--")
        repo, known = f"{owner}/{name}", REPOSITORIES["model"]
        if folder.name.startswith("models--") and "krea" in name.lower() and repo not in known and cached(repo):
            yield PartSource((repo,), f"the hub's cache, {repo}")


def _lm_studio_sources(search: Search) -> Iterator[PartSource]:
    """Yields copies of Pixtral that LM Studio has fetched."""
    for root in (Path.home() / ".lmstudio" / "models", Path.home() / ".cache" / "lm-studio" / "models"):
        if search.note_place("LM Studio", root):
            for repo in REPOSITORIES["pixtral"]:
                if search.files(root / repo, (".safetensors",), 0):
                    yield PartSource((str(root / repo),), f"LM Studio, {root / repo}")


_LOOKS: dict[str, tuple[Callable[[Search], Iterator[PartSource]], ...]] = {
    "model": (_comfyui_sources, _mflux_sources, _invokeai_sources, _draw_things_sources, _cached_sources),
    "nsfw": (),
    "pixtral": (_lm_studio_sources,),
}


def _assembled(files: list[Path], program: str) -> Iterator[PartSource]:
    """Yields each FLUX.1 Krea transformer among the files, with the first file of each other component."""
    inside = {file: _components(file) for file in files}
    others: dict[str, Path] = {}
    for file, components in inside.items():
        for component in components:
            others.setdefault(component, file)
    for file, components in inside.items():
        if "krea" in file.name.lower() and "transformer" in components:
            names = [file, *(others[name] for name in others if name not in components)]
            yield PartSource(tuple(map(str, dict.fromkeys(names))), f"{program}, {file}")


def _components(file: Path) -> list[str]:
    """Returns the components in a file, from its header; none where it cannot be read or its layout is unknown."""
    with contextlib.suppress(FluxKreaError, OSError):
        return [one.layout.component for source in open_sources([file]) for one in identify(source)]
    return []


def _size(file: Path) -> int:
    with contextlib.suppress(OSError):
        return file.stat().st_size
    return 0


def _short(path: Path) -> str:
    """Returns a path with ~ for the user's folder."""
    own = f"{Path.home()}{os.sep}"
    return f"~/{str(path).removeprefix(own)}" if str(path).startswith(own) else str(path)
