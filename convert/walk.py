"""Finds the checkpoints below the paths that somebody names: files, pipelines, repositories, trees of other programs.

Hidden files are skipped and capitals ignored everywhere. Only names, first bytes and indexes are read here.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from mlx_flux_krea import first_bytes
from mlx_flux_krea.errors import ModelError, printable
from mlx_flux_krea.files import identity, read_json, read_small
from mlx_flux_krea.weights import COMPONENTS, NETWORKS

from .sets import FileSet, group, indexes_in, key_of, missing_shard

_DEEPEST, _MOST = 8, 50_000  # levels of folders, and entries in them, that are searched
# folders that hold no models, in trees of programs and on disks of other systems
_NO_MODELS = {
    "__macosx",
    "@eadir",
    "$recycle.bin",
    "__pycache__",
    "node_modules",
    "site-packages",
    "venv",
    "custom_nodes",
}
_MODELS = "models"  # the folder of ComfyUI's, Forge's, InvokeAI's and Draw Things' roots that counts
# beginnings of the classes of pipelines whose encoders or autoencoder have FLUX.1's names and sizes
_OTHER_PIPELINES = (
    "StableDiffusion", "LatentConsistency", "Chroma", "Flux2", "QwenImage", "ZImage", "Wan", "Hunyuan", "Lumina",
    "HiDream", "PixArt", "AuraFlow", "Sana", "CogV", "LTX", "Mochi", "Kandinsky", "Kolors", "Cosmos", "Bria", "Ovis",
    "LongCat", "AllegroPipeline", "Krea2",
)  # fmt: skip
_WANTED = ".safetensors or .gguf files"


@dataclass(frozen=True)
class Found:
    """The checkpoints of one argument.

    Attributes:
        path: the argument.
        sets: complete checkpoints, each of one or more files.
        passed: files that stand for weights and cannot be read, with the reason.
        is_tree: some lie in folders below, among which there may be anything.
    """

    path: Path
    sets: tuple[FileSet, ...]
    passed: tuple[ModelError, ...] = ()
    is_tree: bool = False


def is_model_folder(path: Path) -> bool:
    """Tells a folder that the converter wrote from one in diffusers' layout.

    Raises:
        ModelError: its model_index.json cannot be read.
    """
    index = path / "model_index.json"
    return os.path.lexists(index) and "format" in read_json(index)


def find(paths: Iterable[Path]) -> list[Found]:
    """Finds the checkpoints below every path. Parts of one set may be named one by one.

    Raises:
        ModelError: a path does not exist, holds no weights, or is a file that cannot be read as weights; a part of a
            set is missing; a folder has too many files to search.
    """
    paths = list(paths)
    found, joined, more = [], set(), _parts_in(paths)
    for path in paths:
        _check_path(path)
        if not os.path.exists(path):
            raise ModelError(f"there is nothing at {path}", "a folder, a .safetensors or a .gguf file")
        if not path.is_file() and not path.is_dir():
            raise ModelError(f"{path} is a device or a pipe", "a folder, or a file of weights", "name the file itself")
        if path.is_dir():
            found.append(_folder(path, more))
        elif path not in joined:
            files = _with_parts(path, more)
            joined |= {*files}
            found.append(Found(path, _read_all(files)))
    return found


def _read_all(files: list[Path]) -> tuple[FileSet, ...]:
    """Groups files that were named: each must be readable."""
    for file in files:
        _refuse(file)
    sets, errors = group(files)
    if errors:
        raise errors[0][1]
    return tuple(sets)


def _parts_in(paths: list[Path]) -> list[Path]:
    """Returns the parts of sets that are named, beside those, or in named folders; a set may be spread over several."""
    files = [path for path in paths if key_of(path.name) and path.is_file()]
    folders = [path for path in paths if path.is_dir()] if len(paths) > 1 else []
    beside = [entry for folder in (*folders, *(file.parent for file in files)) for entry in _entries(folder)]
    return list(dict.fromkeys((*files, *(entry for entry in beside if key_of(entry.name) and entry.is_file()))))


def _with_parts(path: Path, more: list[Path]) -> list[Path]:
    """Returns a file and the other parts of its set, of which the first of each name counts."""
    if (key := key_of(path.name)) is None:
        return [path]
    others = [file for file in (path, *more) if key_of(file.name) == key]
    return list({file.name.lower(): file for file in reversed(others)}.values())[::-1]


def _folder(path: Path, more: list[Path]) -> Found:
    """Finds the checkpoints of a folder; parts of its sets may lie elsewhere."""
    if first_bytes.is_downloading(path):
        raise first_bytes.refused(path, first_bytes.DOWNLOADING)
    root, path = path, _snapshot(path) or path
    coming = _coming(root)
    if path == root and (other := _other_pipeline(path)):
        raise other
    if folders := _components(path):
        found = _pipeline(path, folders)
        return replace(found, passed=(*coming, *found.passed))
    if (path / "model_index.json").exists():
        raise ModelError(f"{path} has a model_index.json and no component folder", f"{', '.join(COMPONENTS)}")
    sets, passed, is_tree = [], [*coming], False
    for place, files in _walk(_models_in(path) or path):
        is_tree |= place != path
        if first_bytes.is_downloading(place):
            passed.append(first_bytes.refused(place, first_bytes.DOWNLOADING))
            continue
        if place != path and (other := _other_pipeline(place)):
            passed.append(other)
            continue
        if is_model_folder(place):
            passed.append(ModelError(f"{place} is a model folder of ours", "", "name it alone"))
            continue
        if inner := _components(place) if place != path else []:
            nested = _pipeline(place, inner, is_tree=True)
            sets += nested.sets
            passed += nested.passed
            continue
        keys, names = {key_of(file.name) for file in files}, {file.name.lower() for file in files}
        files += [part for part in more if key_of(part.name) in keys and part.name.lower() not in names]
        here, others = _here(place, files, is_tree=is_tree)
        sets += here
        passed += others
    if not sets:
        raise _none(path, passed)
    return Found(path, tuple(sets), tuple(passed), is_tree)


def _none(path: Path, passed: list[ModelError]) -> ModelError:
    """Returns the error about a folder without weights that can be read."""
    if not passed:
        return ModelError(f"{path} holds no weights", _WANTED)
    more = f", and {len(passed) - 1} more" if len(passed) > 1 else ""
    return ModelError(f"{path} holds no weights that can be read: {passed[0].found}{more}", _WANTED, passed[0].todo)


def _pipeline(path: Path, folders: list[Path], is_tree: bool = False) -> Found:
    """Finds the checkpoints of a folder with one folder for each component."""
    sets, passed = [], []
    for folder in folders:
        here, others = _here(folder, _files(folder), folder.name.lower(), is_tree)
        sets += here
        passed += others or ([] if here else [ModelError(f"{folder} holds no weights", _WANTED)])
    if not sets and not is_tree:
        raise _none(path, passed)
    return Found(path, tuple(sets), tuple(passed), is_tree)


def _here(
    folder: Path, files: list[Path], component: str | None = None, is_tree: bool = False
) -> tuple[list[FileSet], list[ModelError]]:
    """Groups the weight files of one folder.

    Raises:
        ModelError: a file is not what its name promises, or a set lacks a part; in a tree it is passed over instead.
    """
    readable, passed, broken = [], [], []
    for file in files:
        kind = _look(file)
        if isinstance(kind, ModelError):
            (broken if first_bytes.promises(file) else passed).append(kind)
        elif kind:
            readable.append(file)
    sets, lost = group(readable, component)
    whole = {one.stem for one in sets}
    if not readable and (absent := next(filter(None, map(missing_shard, indexes_in(folder))), None)):
        broken.append(absent)
    broken += [error for name, error in lost if name not in whole]
    if broken and not is_tree:
        raise broken[0]
    return sets, [*passed, *broken]


def _look(file: Path) -> first_bytes.Kind | ModelError | None:
    """Returns what a file of weights is, or the error about one that cannot be read; None: it has nothing to do with
    weights."""
    try:
        if not file.exists():
            todo = "download it again, or name the folder where it is"
            return ModelError(f"{file} is a link to nothing", "a file", todo) if first_bytes.is_named(file) else None
        if not first_bytes.is_weights(file):
            return None
        _check_path(file)
        kind = first_bytes.look(file)
    except ModelError as error:
        return error
    except OSError as error:
        return ModelError(f"{file} cannot be read: {error.strerror}", "a file")
    return kind if kind in first_bytes.READABLE else first_bytes.refused(file, kind)


def _refuse(file: Path) -> None:
    """Refuses a named file that is not one of weights.

    Raises:
        ModelError: it says what the file is.
    """
    try:
        kind = first_bytes.look(file)
    except OSError as error:
        raise ModelError(f"{file} cannot be read: {error.strerror}", "a file") from None
    if kind not in first_bytes.READABLE:
        raise first_bytes.refused(file, kind)


def _other_pipeline(path: Path) -> ModelError | None:
    """Returns the error about the pipeline of another model, whose encoders may be FLUX.1's; None: it is none."""
    if _has_unet(path):
        kind = "a pipeline of Stable Diffusion"
    elif not (path / "model_index.json").exists() or is_model_folder(path):
        return None
    else:
        name = read_json(path / "model_index.json").get("_class_name")
        if not isinstance(name, str) or not name.startswith(_OTHER_PIPELINES):
            return None
        kind = f"a {printable(name[:100])}"
    return ModelError(f"{path} is {kind}", "a pipeline of FLUX.1", "name the folder or the files of FLUX.1")


def _has_unet(path: Path) -> bool:
    """Returns True for a pipeline in diffusers' layout with a U-Net; ComfyUI keeps transformers in `models/unet`."""
    config = path / "unet" / "config.json"
    if (path / "transformer").is_dir() or not config.is_file():
        return False
    return str(read_json(config).get("_class_name")).startswith("UNet")


def _coming(path: Path) -> list[ModelError]:
    """Returns the error about unfinished downloads of the hub's programs into a folder, which are in hidden places."""
    inside = path / ".cache" / "huggingface" / "download"
    folders = [path / "blobs"] if (path / "snapshots").is_dir() else [inside, *(inside / name for name in NETWORKS)]
    for folder in folders:
        try:
            names = [name for name in sorted(os.listdir(folder)) if name.endswith(".incomplete")]
        except OSError:
            continue
        if names:
            return [first_bytes.refused(folder / names[0], first_bytes.DOWNLOADING)]
    return []


# --- folders ---


def _files(folder: Path) -> list[Path]:
    """Returns the entries of a folder that are not folders, without hidden ones; files kept in iCloud count as shown.

    Raises:
        ModelError: it cannot be listed.
    """
    return [entry for entry in _entries(folder) if not entry.is_dir()]


def _entries(folder: Path) -> list[Path]:
    try:
        names = sorted(os.listdir(folder))
    except OSError as error:
        raise ModelError(f"{folder} cannot be read: {error.strerror}", "a folder") from None
    kept = (name for name in names if name.lower() not in _NO_MODELS)
    return [folder / name for name in kept if not name.startswith(".") or name.lower().endswith(".icloud")]


def _walk(root: Path) -> Iterator[tuple[Path, list[Path]]]:
    """Yields a folder and those below, each with its files; none twice, whatever the links.

    Raises:
        ModelError: there is too much to search.
    """
    waiting, seen, count = [(root, 0)], set(), 0
    while waiting:
        folder, depth = waiting.pop(0)
        if (this := identity(folder)) in seen:
            continue
        seen.add(this)
        if depth and (snapshot := _snapshot(folder)):
            waiting.insert(0, (snapshot, depth))
            continue
        try:
            entries = _entries(folder)
        except ModelError:
            if not depth:
                raise
            continue
        count += len(entries)
        if count > _MOST:
            todo = "name the files, or a folder nearer to them"
            raise ModelError(f"{root} holds more than {_MOST} files", "a folder of models", todo)
        yield folder, _once([entry for entry in entries if not entry.is_dir()], seen)
        is_unit = first_bytes.is_downloading(folder) or (
            depth and (_components(folder) or is_model_folder(folder) or _has_unet(folder))
        )
        if depth < _DEEPEST and not is_unit:
            waiting += [(entry, depth + 1) for entry in entries if entry.is_dir()]


def _once(files: list[Path], seen: set) -> list[Path]:
    """Returns the files that were not met under another name."""
    kept = []
    for file in files:
        if (this := identity(file)) is None or this not in seen:
            kept.append(file)
        seen.add(this)
    return kept


def _components(path: Path) -> list[Path]:
    """Returns the component folders of a pipeline; none if it is no pipeline. mflux writes no model_index.json."""
    there = {entry.name.lower(): entry for entry in _entries(path) if entry.is_dir()}
    has_index = (path / "model_index.json").exists()
    if not has_index and ("transformer" not in there or not _entries(there["transformer"])):
        return []
    names = COMPONENTS if "transformer" in there else NETWORKS  # a model may have an encoder of pictures
    return [there[name] for name in names if name in there]


def _models_in(path: Path) -> Path | None:
    """Returns the folder of models in the root folder of a program; None where files of weights lie beside it."""
    entries = _entries(path)
    if any(first_bytes.is_named(entry) for entry in entries):
        return None
    return next((entry for entry in entries if entry.name.lower() == _MODELS and entry.is_dir()), None)


def _snapshot(path: Path) -> Path | None:
    """Returns the folder of files of a repository in the hub's cache; None: it is none.

    It is that of the main branch, or the newest with weights where that holds none: programs that ask for a
    configuration alone leave such folders.
    """
    snapshots = path / "snapshots"
    if not snapshots.is_dir() or (not (path / "refs").is_dir() and not path.name.startswith("models--")):
        return None
    try:
        main = snapshots / read_small(path / "refs" / "main", most=1000).decode().strip()
        if main != snapshots and main.is_dir() and _has_weights(main):
            return main
    except (OSError, UnicodeDecodeError):
        pass
    there = [entry for entry in _entries(snapshots) if entry.is_dir()]
    return max(there, key=lambda entry: (_has_weights(entry), entry.stat().st_mtime), default=None)


def _has_weights(folder: Path) -> bool:
    """Returns True for a folder with files named as weights in it, or in its own folders."""
    inside = _entries(folder)
    inside += [entry for one in inside if one.is_dir() for entry in _entries(one)]
    return any(map(first_bytes.is_named, inside))


def _check_path(path: Path) -> None:
    try:
        os.path.realpath(path).encode()
    except UnicodeEncodeError:
        raise ModelError(f"the name of {printable(str(path))} is not UTF-8", "one that is", "rename it") from None
