"""Opens what people hold: one safetensors file, shards with an index, or a folder of either. Reads headers only.

A source is a lazy list of tensors; each reads itself when asked. Nothing here knows a layout.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_flux_krea.errors import ModelError, printable
from mlx_flux_krea.weights import COMPONENTS, TensorInfo, read_header, read_json

# How stored types become arrays: the numpy type of the bytes, and MLX's view of it. A plan with others is refused.
STORED = {
    "F32": (np.float32, mx.float32),
    "F16": (np.float16, mx.float16),
    "BF16": (np.uint16, mx.bfloat16),
}
# Files that execute what they hold when they are opened.
_PICKLED = {".ckpt", ".pt", ".pth", ".bin", ".pkl"}
_LISTED = (".safetensors", ".gguf", *_PICKLED)


@dataclass(frozen=True)
class Tensor:
    """One stored tensor."""

    name: str
    path: Path
    info: TensorInfo

    @property
    def shape(self) -> tuple[int, ...]:
        """In torch's order of axes."""
        return self.info.shape

    @property
    def dtype(self) -> str:
        """As stored, in safetensors' spelling."""
        return self.info.dtype

    def read(self) -> mx.array:
        """The tensor as an array of its own type, one of `STORED`.

        Raises:
            ModelError: the file cannot be read, or ends too early.
        """
        stored, view = STORED[self.dtype]
        try:
            with open(self.path, "rb") as file:
                file.seek(self.info.start)
                data = file.read(self.info.end - self.info.start)
        except OSError as error:
            raise ModelError(f"{self.path} cannot be read: {error.strerror}", "a file that can") from None
        if len(data) < self.info.end - self.info.start:
            raise ModelError(f"{self.path} ended inside {self.name}", "a complete file", "copy or download it again")
        return mx.array(np.frombuffer(data, stored).reshape(self.shape)).view(view)


@dataclass(frozen=True)
class Source:
    """One checkpoint: the tensors of a file, or of all shards of an index."""

    path: Path  # the file, or the folder of the shards
    files: tuple[Path, ...]
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    component: str | None = None  # what the folder that it came in says it is

    @property
    def bytes(self) -> int:
        """Size of its files."""
        return sum(path.stat().st_size for path in self.files)

    @property
    def folder(self) -> Path:
        """Where its files lie."""
        return self.path if self.path.is_dir() else self.path.parent

    def config(self) -> dict | None:
        """The `config.json` beside it, if there is one."""
        beside = self.folder / "config.json"
        return read_json(beside) if beside.exists() else None


def open_sources(paths: list[Path]) -> list[Source]:
    """Everything that the given files and folders hold.

    Raises:
        ModelError: nothing there, nothing that is a checkpoint, a pickle, or a damaged file.
    """
    return [source for path in paths for source in _open(path)]


def is_model_folder(path: Path) -> bool:
    """Whether this is a model folder that the converter made, and not one in diffusers' layout.

    Raises:
        ModelError: its model_index.json cannot be read, so that it could be either.
    """
    index = path / "model_index.json"
    return os.path.lexists(index) and "format" in read_json(index)


def _open(path: Path) -> list[Source]:
    _check_path(path)
    if not os.path.exists(path):
        raise ModelError(f"there is nothing at {path}", "a folder or a .safetensors file")
    if path.is_file():
        return [_open_file(path)]
    if (path / "model_index.json").exists():  # a pipeline: one folder a component
        folders = [path / name for name in COMPONENTS if (path / name).is_dir()]
        if not folders:
            raise ModelError(f"{path} has a model_index.json and no component folder", f"{', '.join(COMPONENTS)}")
        return [source for folder in folders for source in _open_folder(folder, component=folder.name)]
    return _open_folder(path)


def _open_folder(folder: Path, component: str | None = None) -> list[Source]:
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if len(indexes) > 1:
        raise ModelError(f"{folder} holds {len(indexes)} indexes", "one", "name the files one by one")
    if indexes:
        return [_open_shards(indexes[0], component)]
    files = sorted(p for p in folder.iterdir() if p.suffix in _LISTED and not p.name.startswith("."))
    checkpoints = [p for p in files if p.suffix == ".safetensors"]
    if not checkpoints:
        if not files:
            raise ModelError(f"{folder} holds no weights", ".safetensors files")
        todo = "GGUF is not read yet, pickles never"
        raise ModelError(f"{folder} holds only {files[0].name}", ".safetensors files", todo)
    if component and len(checkpoints) > 1:
        names = ", ".join(p.name for p in checkpoints[:3])
        raise ModelError(f"{folder} holds {len(checkpoints)} files and no index ({names})", "one, or an index")
    return [_open_file(path, component) for path in checkpoints]


def _open_file(path: Path, component: str | None = None) -> Source:
    _check_path(path)
    if path.suffix in _PICKLED:
        todo = "take the .safetensors of the same model"
        raise ModelError(f"{path} is a pickle, which can run any program when opened", "a .safetensors file", todo)
    if path.suffix == ".gguf":
        raise ModelError(f"{path} is a GGUF file, which is not read yet", "a .safetensors file")
    tensors, metadata = _read_tensors(path)
    return Source(path, (path,), tensors, metadata, component)


def _open_shards(index: Path, component: str | None) -> Source:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index} has no weight_map", "an index of shards")
    _check_names(index, weight_map)
    tensors, files, metadata = {}, [], {}
    for shard in sorted({str(s) for s in weight_map.values()}):
        if shard != os.path.basename(shard) or not re.fullmatch(r"[^/\\\0]+\.safetensors", shard):
            raise ModelError(f"{index} names the file {shard!r}", "a .safetensors file in the same folder")
        _check_names(index, [shard])
        path = index.parent / shard
        if not path.exists():
            raise ModelError(f"{index.parent} lacks the shard {shard}", "every file of the index", "download it again")
        shard_tensors, shard_metadata = _read_tensors(path)
        if twice := shard_tensors.keys() & tensors.keys():
            raise ModelError(f"{sorted(twice)[0]} is in two shards of {index.parent}", "every tensor once")
        tensors |= shard_tensors
        files.append(path)
        metadata |= shard_metadata
    if lost := weight_map.keys() - tensors.keys():
        raise ModelError(f"{sorted(lost)[0]} is in {index.name} and in no shard", "shards that match their index")
    return Source(index.parent, tuple(files), tensors, metadata, component)


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    infos, metadata = read_header(path)
    _check_names(path, infos)
    return {n: Tensor(n, path, i) for n, i in infos.items()}, metadata


def _check_path(path: Path) -> None:
    try:
        os.path.realpath(path).encode()
    except UnicodeEncodeError:
        raise ModelError(f"the name of {printable(str(path))} is not UTF-8", "one that is", "rename it") from None


def _check_names(path: Path, names) -> None:
    """No network has such names; from here on they can be shown as they are."""
    if odd := next((n for n in names if not n.isprintable()), None):
        raise ModelError(f"{path} holds the name {printable(odd)}", "letters, numbers and dots")
