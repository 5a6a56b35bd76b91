"""Opens safetensors and GGUF files, sharded checkpoints, and folders of these. Reads headers only.

A source is a list of tensors with their places in files. Layouts are unknown here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from mlx_flux_krea.errors import ModelError, printable
from mlx_flux_krea.files import read_json
from mlx_flux_krea.first_bytes import GGUF, look, promises
from mlx_flux_krea.weights import read_header

from . import dfloat11, svdq
from .formats import GROUP_SIZE, check_method, join_parts, read_statements
from .gguf_header import read_gguf
from .sets import FileSet, listed_shards
from .tensors import Tensor
from .walk import Found, find


@dataclass(frozen=True)
class Source:
    """A checkpoint: the tensors of a file, or of all its shards."""

    path: Path  # the file, or the folder of the shards
    files: tuple[Path, ...]
    tensors: dict[str, Tensor]
    metadata: dict[str, str]  # GGUF's strings and numbers, without its lists
    component: str | None = None  # the component that its folder's name states
    stem: str = ""  # the name that all variants of one model share
    notes: tuple[str, ...] = ()  # contradictions that were found in opening it

    @property
    def folder(self) -> Path:
        """The folder of its files."""
        return self.path if self.path.is_dir() else self.path.parent

    def config(self) -> dict | None:
        """Returns the `config.json` beside it; None: there is none."""
        beside = self.folder / "config.json"
        return read_json(beside) if beside.exists() else None


@dataclass(frozen=True)
class OpenedArgument:
    """The sources that one argument names.

    Attributes:
        path: as it was named.
        sources: its checkpoints.
        passed: reasons why files in it were passed over.
        is_tree: some of them lie in folders below, among which there may be anything.
    """

    path: Path
    sources: tuple[Source, ...]
    passed: tuple[ModelError, ...] = ()
    is_tree: bool = False


def open_arguments(paths: Sequence[Path]) -> list[OpenedArgument]:
    """Opens all checkpoints in the given files and folders. Reads headers only.

    Raises:
        ModelError: a path does not exist or holds no checkpoint, or a file is damaged or of another kind.
    """
    return [_open(found) for found in find(paths)]


def open_sources(paths: Sequence[Path]) -> list[Source]:
    """Opens all checkpoints in the given files and folders, as `open_arguments` does."""
    return [source for argument in open_arguments(paths) for source in argument.sources]


def _open(found: Found) -> OpenedArgument:
    sources, passed = [], list(found.passed)
    for files in found.sets:
        try:
            sources.append(_join_shards(files))
        except ModelError as error:
            if not found.is_tree and any(map(promises, files.files)):
                raise
            passed.append(error)  # a file whose name promises nothing is often half of one
    return OpenedArgument(found.path, tuple(sources), tuple(passed), found.is_tree)


def _join_shards(files: FileSet) -> Source:
    """Returns one source with the tensors of all files."""
    tensors, metadata = {}, {}
    for file in files.files:
        read, facts = _read_tensors(file)
        if twice := read.keys() & tensors.keys():
            raise ModelError(f"{sorted(twice)[0]} is in two shards of {files.path}", "every tensor once")
        tensors |= read
        metadata |= facts
    _check_split(files, metadata)
    notes = tuple(note for index in files.indexes if (note := _contradiction(index, tensors)))
    source = Source(files.path, files.files, tensors, metadata, files.component, files.stem, notes)
    if files.component:
        check_method(source.config() or {}, tensors, str(source.folder / "config.json"))
    statements = read_statements(tensors, metadata)
    whole = dfloat11.join(svdq.join(tensors, metadata), lambda: source.config() or {})
    joined = join_parts(whole, _group_sizes(source), statements)
    return replace(source, tensors=joined)


def _check_split(files: FileSet, metadata: dict[str, str]) -> None:
    """Checks that a GGUF that calls itself a part is not alone (llama.cpp's gguf-split)."""
    count = metadata.get("split.count", "1")
    if count.isdigit() and int(count) > max(1, len(files.files)):
        number = int(metadata.get("split.no", "0")) + 1
        found = f"{files.path} is part {number} of {count}, and the other parts are not beside it"
        raise ModelError(found, "NAME-00001-of-00003.gguf and so on", "name all parts, or their folder")


def _contradiction(index: Path, tensors: dict[str, Tensor]) -> str | None:
    """Says how an index contradicts the tensors that are there, which count."""
    try:
        listed = listed_shards(index)
    except ModelError as error:
        return f"{error.found}: the tensors that are there count"
    _check_names(index, [*listed, *listed.values()])
    wrong = [n for n in listed.keys() | tensors.keys() if n not in tensors or tensors[n].path.name != listed.get(n)]
    if not wrong:
        return None
    name, more = min(wrong), f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
    return f"{index} is wrong about {name}{more}: the tensors that are there count"


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    infos, metadata = read_gguf(path) if _is_gguf(path) else read_header(path)
    _check_names(path, infos)
    facts = {key: str(value) for key, value in metadata.items() if isinstance(value, str | int | float)}
    return {n: Tensor(n, path, i.dtype, i.shape, i.start, i.end) for n, i in infos.items()}, facts


def _is_gguf(path: Path) -> bool:
    try:
        return look(path) is GGUF
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}", "a file") from None


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


def _check_names(path: Path, names) -> None:
    """Refuses names that are not printable, so that messages can show names as they are."""
    if odd := next((n for n in names if not n.isprintable()), None):
        raise ModelError(f"{path} holds the name {printable(odd)}", "letters, numbers and dots")
