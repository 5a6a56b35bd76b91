"""Opens safetensors and GGUF files, sharded checkpoints, and folders of these. Reads headers only.

A source is a list of tensors with their places in files. Layouts are unknown here.
"""

import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_flux_krea.errors import ModelError, printable
from mlx_flux_krea.files import read_json
from mlx_flux_krea.weights import COMPONENTS, NETWORKS, read_header

from .decode import COMPOUNDS, GROUP_SIZE, PARTS
from .gguf_header import read_gguf

# Pickles: opening them executes code.
_PICKLED = {".ckpt", ".pt", ".pth", ".bin", ".pkl"}
_READ = {".safetensors", ".gguf"}
# Folders of ComfyUI's `models` that hold the components.
_COMFYUI = ("checkpoints", "diffusion_models", "unet", "text_encoders", "clip", "vae")


@dataclass(frozen=True)
class Tensor:
    """A stored tensor, or a weight that is stored in several tensors."""

    name: str
    path: Path
    dtype: str  # one of `decode.TYPES`, or a type that cannot be decoded
    shape: tuple[int, ...]  # in torch's order of axes, as if not packed
    start: int  # bytes from the start of the file
    end: int
    parts: tuple["Tensor", ...] = ()  # scales and the like, in the order of `decode.COMPOUNDS`

    @property
    def bytes(self) -> int:
        """Bytes in the file, including parts."""
        return self.end - self.start + sum(part.bytes for part in self.parts)

    def rows(self, first: int, count: int) -> "Tensor":
        """Returns some consecutive rows."""
        size = (self.end - self.start) // self.shape[0]
        start, shape = self.start + first * size, (count, *self.shape[1:])
        parts = tuple(part.rows(first, count) if part.shape[:1] == self.shape[:1] else part for part in self.parts)
        return replace(self, shape=shape, start=start, end=start + count * size, parts=parts)

    def read(self, data: "Data") -> mx.array:
        """Returns the tensor as an array, in a type that holds every value."""
        return PARTS[self.dtype].decode(data(self), self.shape, *(part.read(data) for part in self.parts))


Data = Callable[[Tensor], np.ndarray]  # returns the stored bytes of a tensor: `reading.Reading.data`


@dataclass(frozen=True)
class Source:
    """A checkpoint: the tensors of a file, or of all its shards."""

    path: Path  # the file, or the folder of the shards
    files: tuple[Path, ...]
    tensors: dict[str, Tensor]
    metadata: dict[str, str]  # GGUF's strings and numbers, without its lists
    component: str | None = None  # the component that its folder's name states

    @property
    def folder(self) -> Path:
        """The folder of its files."""
        return self.path if self.path.is_dir() else self.path.parent

    def config(self) -> dict | None:
        """Returns the `config.json` beside it; None: there is none."""
        beside = self.folder / "config.json"
        return read_json(beside) if beside.exists() else None


def open_sources(paths: list[Path]) -> list[Source]:
    """Opens all checkpoints in the given files and folders.

    Raises:
        ModelError: a path does not exist or holds no checkpoint, or a file is a pickle or damaged.
    """
    return [source for path in paths for source in _open(path)]


def is_model_folder(path: Path) -> bool:
    """Tells a folder that the converter wrote from one in diffusers' layout.

    Raises:
        ModelError: its model_index.json cannot be read.
    """
    index = path / "model_index.json"
    return os.path.lexists(index) and "format" in read_json(index)


def _open(path: Path) -> list[Source]:
    _check_path(path)
    if not os.path.exists(path):
        raise ModelError(f"there is nothing at {path}", "a folder, a .safetensors or a .gguf file")
    if path.is_file():
        return [_open_file(path)]
    pipeline = (path / "model_index.json").exists()
    if pipeline or (path / "transformer").is_dir():  # one folder for each component; mflux writes no model_index.json
        names = COMPONENTS if (path / "transformer").is_dir() else NETWORKS  # a model may have an encoder of pictures
        folders = [path / name for name in names if (path / name).is_dir()]
        if not folders:
            raise ModelError(f"{path} has a model_index.json and no component folder", f"{', '.join(COMPONENTS)}")
        return [source for folder in folders for source in _open_folder(folder, component=folder.name)]
    folders = [folder for name in _COMFYUI if (folder := path / name).is_dir() and _weights(folder)]
    return [source for folder in folders or [path] for source in _open_folder(folder)]


def _weights(folder: Path) -> list[Path]:
    """Returns the files in a folder that hold weights, including pickles."""
    return sorted(p for p in folder.iterdir() if p.suffix in _READ | _PICKLED and not p.name.startswith("."))


def _open_folder(folder: Path, component: str | None = None) -> list[Source]:
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if len(indexes) > 1:
        raise ModelError(f"{folder} holds {len(indexes)} indexes", "one", "name the files one by one")
    if indexes:
        return [_open_shards(indexes[0], component)]
    files = _weights(folder)
    checkpoints = [p for p in files if p.suffix in _READ]
    if not checkpoints:
        if not files:
            raise ModelError(f"{folder} holds no weights", ".safetensors or .gguf files")
        raise ModelError(f"{folder} holds only {files[0].name}", ".safetensors or .gguf files", _NO_PICKLES)
    if {p.name for p in checkpoints} == {f"{n}.safetensors" for n in range(len(checkpoints))}:  # as mflux writes them
        return [_join_shards(folder, checkpoints, component)]
    if component and len(checkpoints) > 1:
        names = ", ".join(p.name for p in checkpoints[:3])
        raise ModelError(f"{folder} holds {len(checkpoints)} files and no index ({names})", "one, or an index")
    return [_open_file(path, component) for path in checkpoints]


_NO_PICKLES = "pickles are never read: take the .safetensors of the same model"


def _open_file(path: Path, component: str | None = None) -> Source:
    _check_path(path)
    if path.suffix in _PICKLED:
        todo = "take the .safetensors of the same model"
        raise ModelError(f"{path} is a pickle, which can run any program when opened", "a .safetensors file", todo)
    return _join_shards(path, [path], component)


def _open_shards(index: Path, component: str | None) -> Source:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index} has no weight_map", "an index of shards")
    _check_names(index, weight_map)
    shards = sorted({str(s) for s in weight_map.values()})
    for shard in shards:
        if shard != os.path.basename(shard) or not re.fullmatch(r"[^/\\\0]+\.safetensors", shard):
            raise ModelError(f"{index} names the file {shard!r}", "a .safetensors file in the same folder")
        _check_names(index, [shard])
        if not (index.parent / shard).exists():
            raise ModelError(f"{index.parent} lacks the shard {shard}", "every file of the index", "download it again")
    source = _join_shards(index.parent, [index.parent / shard for shard in shards], component)
    stored = {t.name for tensor in source.tensors.values() for t in (tensor, *tensor.parts)}
    if lost := weight_map.keys() - stored:
        raise ModelError(f"{sorted(lost)[0]} is in {index.name} and in no shard", "shards that match their index")
    return source


def _join_shards(path: Path, files: list[Path], component: str | None) -> Source:
    """Returns one source with the tensors of all files."""
    tensors, metadata = {}, {}
    for file in files:
        read, facts = _read_tensors(file)
        if twice := read.keys() & tensors.keys():
            raise ModelError(f"{sorted(twice)[0]} is in two shards of {path}", "every tensor once")
        tensors |= read
        metadata |= facts
    source = Source(path, tuple(files), tensors, metadata, component)
    return replace(source, tensors=join_parts(tensors, _group_sizes(source)))


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    infos, metadata = read_gguf(path) if path.suffix == ".gguf" else read_header(path)
    _check_names(path, infos)
    facts = {key: str(value) for key, value in metadata.items() if isinstance(value, str | int | float)}
    return {n: Tensor(n, path, i.dtype, i.shape, i.start, i.end) for n, i in infos.items()}, facts


def join_parts(tensors: dict[str, Tensor], group_size=lambda layer: GROUP_SIZE) -> dict[str, Tensor]:
    """Joins tensors that store one weight together, such as codes and scales.

    Args:
        tensors: as the files have them.
        group_size: returns the group size of an MLX-quantized layer by its name.
    """
    joined = dict(tensors)
    for full, tensor in tensors.items():
        layer, _, last = full.rpartition(".")
        for stored, beside, combine in COMPOUNDS:
            parts = [tensors[name] for part in beside if (name := f"{layer}.{part}") in tensors]
            if last == "weight" and tensor.dtype == stored and len(parts) == len(beside):
                combined = combine(tensor, *parts, group_size(layer))
                if combined:
                    dtype, shape = combined
                    joined[full] = replace(tensor, dtype=dtype, shape=shape, parts=tuple(parts))
                    for part in parts:
                        del joined[part.name]
                    break
    return joined


def _group_sizes(source: Source) -> Callable[[str], int]:
    """Returns the function from a layer of a folder of ours to its group size, from its config.json."""

    @cache
    def quantization() -> dict:
        value = (source.config() or {}).get("quantization")
        return value if isinstance(value, dict) else {}

    def group_size(layer: str) -> int:
        own = quantization().get(layer)
        sizes = (own.get("group_size") if isinstance(own, dict) else None, quantization().get("group_size"), GROUP_SIZE)
        return next(size for size in sizes if type(size) is int and size > 0)

    return group_size


def _check_path(path: Path) -> None:
    try:
        os.path.realpath(path).encode()
    except UnicodeEncodeError:
        raise ModelError(f"the name of {printable(str(path))} is not UTF-8", "one that is", "rename it") from None


def _check_names(path: Path, names) -> None:
    """Refuses names that are not printable, so that messages can show names as they are."""
    if odd := next((n for n in names if not n.isprintable()), None):
        raise ModelError(f"{path} holds the name {printable(odd)}", "letters, numbers and dots")
