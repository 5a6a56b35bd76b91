"""Writes a model folder: shards in our order of tensors, pieces of a few in memory at a time, under a temporary name.

The folder takes its final name only when everything in it is on disk and was read back. Beside the target lie, hidden,

    .NAME.flux-krea.lock      locked while a conversion runs: one at a time has this target. The system takes the lock
                              back from a process that ends in any way; whoever gets it next clears up
    .NAME.flux-krea.partial   a folder in the making, or one to be deleted
    .NAME.flux-krea.old       the model that is being replaced, until the new one stands in its place
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import itertools
import json
import math
import os
import shutil
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_flux_krea.config import quantization_to_json
from mlx_flux_krea.errors import ModelError, ResourceError, UsageError
from mlx_flux_krea.filters.config import SELF_TEST
from mlx_flux_krea.weights import INDEX, open_folder, read_json

from .quantize import ITEM_BYTES, Layers, Made, count_bytes, layer_of, make, stored
from .remap import Plan, Target
from .sources import is_model_folder

SHARD_BYTES = 4 * 2**30  # a shard ends with the block that reaches this
_BEGUN = 4  # pieces of tensors that are in the making at a time
_MODULATION = ("_mod.lin.", ".modulation.lin.", "adaLN_modulation.")
_UNLISTED = ("manifest.json", SELF_TEST)  # the one lists the others, the other is written when they are tried
_OF_THE_SYSTEM = {".DS_Store", ".localized", ".metadata_never_index", "Thumbs.db", "desktop.ini"}  # nobody misses them


class Folder:
    """A model folder in the making. What is written is hashed as it passes by, and is on disk when the call returns.

    Args:
        path: where it is made; must exist.
    """

    def __init__(self, path: Path):
        self.path = path
        self.files: dict[str, dict] = {}  # as in manifest.json: name: {"sha256", "bytes"}

    def write(self, name: str, chunks: Iterable[bytes | memoryview]) -> None:
        """One file, of the chunks one after another."""
        path, digest, size = self.path / name, hashlib.sha256(), 0
        path.parent.mkdir(exist_ok=True)

        def put(chunk: bytes | memoryview) -> None:
            file.write(chunk)
            digest.update(chunk)

        with open(path, "xb") as file, ThreadPoolExecutor(1) as pool:
            writing: Future | None = None
            for chunk in chunks:  # the next one is made while this one is written
                if writing:
                    writing.result()
                writing = pool.submit(put, chunk)
                size += len(chunk)
            if writing:
                writing.result()
            file.flush()
            os.fsync(file.fileno())
        self.files[name] = {"sha256": digest.hexdigest(), "bytes": size}

    def write_json(self, name: str, obj) -> None:
        """JSON as people read it, the same bytes for the same object."""
        self.write(name, [_json(obj)])

    def finish(self, index: dict) -> None:
        """manifest.json and, last of all, model_index.json; then everything is read back as the library will.

        Args:
            index: of model_index.json.

        Raises:
            UsageError: what is on the disk is not what was written.
        """
        text = _json(index)
        last = {"model_index.json": {"sha256": hashlib.sha256(text).hexdigest(), "bytes": len(text)}}
        self.write_json("manifest.json", dict(sorted((self.files | last).items())))
        self.write("model_index.json", [text])
        with hashing([self.path / name for name in self.files], workers=4) as hashes:
            for name, written in self.files.items():
                if hashes[self.path / name].result() != written["sha256"]:
                    raise UsageError(
                        f"{name} reads back as something else than was written into {self.path.parent}",
                        "a disk that keeps what it is given",
                        "choose another with -o",
                    )
        open_folder(self.path).check()
        for folder in {(self.path / name).parent for name in self.files}:
            _sync(folder)


@contextlib.contextmanager
def new_folder(
    target: Path,
    force: bool,
    sources: Iterable[Path] = (),
    placing: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> Iterator[Folder]:
    """A temporary folder that becomes `target` when the block ends well, and nothing otherwise.

    Args:
        target: the final name, resolved.
        force: a model folder there is replaced, once the new one is complete.
        sources: none may lie in the target, nor the target in one of them.
        placing: gives the context in which the folder takes its name.

    Raises:
        UsageError: something is in the way, also by now, or the target cannot be written.
        ResourceError: the disk is full.
    """
    check_apart(target, sources)
    partial = _beside(target, "partial")
    try:
        with _parents(target), _lock(target):
            _recover(target)
            check_target(target, force)
            try:
                partial.mkdir()
                yield Folder(partial)
                with placing():
                    _place(partial, target, force)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(
                f"the disk of {target} is full", todo="make room, or choose another disk with -o"
            ) from None
        reason = error.strerror or error
        raise UsageError(f"{target} cannot be written: {reason}", todo="choose another place with -o") from None


def remove_folder(target: Path) -> None:
    """Deletes a model folder. First it loses its name: what an interruption leaves, the next one clears up.

    Args:
        target: of ours, or damaged; of a link the link goes, and not what it leads to.

    Raises:
        UsageError: a conversion is writing it, it holds what the converter did not write, or it cannot be deleted.
    """
    try:
        if target.is_symlink():
            target.unlink()
            return
        with contextlib.suppress(ModelError):  # what was in a damaged one, nobody knows
            if other := _not_ours(target):
                raise UsageError(f"{target} also holds {other}, which the converter did not write", "", "move it away")
        with _lock(target):
            _recover(target)
            shutil.rmtree(target.rename(_beside(target, "partial")))
    except OSError as error:
        raise UsageError(f"{target} cannot be deleted: {error.strerror or error}") from None


def check_apart(target: Path, sources: Iterable[Path]) -> None:
    """Refuses a target that overlaps a source.

    Args:
        target: resolved.
        sources: files and folders.

    Raises:
        UsageError: one lies in the other.
    """
    for source in {Path(os.path.realpath(source)) for source in sources}:
        if target == source or target in source.parents or source in target.parents:
            raise UsageError(f"the target {target} overlaps the source {source}", "a folder apart", "choose it with -o")


def check_target(target: Path, force: bool) -> None:
    """Refuses a target that is not to be written.

    Args:
        target: resolved.
        force: a model folder may stand there, with nothing in it but what the converter wrote.

    Raises:
        UsageError: something is in the way that is not to be replaced, or never is.
    """
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        what = "a link that leads nowhere" if target.is_symlink() else "a file"
        raise UsageError(f"{target} is {what}", "a new folder", "choose another with -o")
    if not any(target.iterdir()):
        return
    try:
        if not is_model_folder(target):
            raise UsageError(
                f"{target} exists and is no model folder, which alone --force replaces",
                "a new folder",
                "choose it with -o",
            )
        if not force:
            raise UsageError(f"{target} exists", "a new folder", "choose another with -o, or replace it with --force")
        other = _not_ours(target)
    except ModelError as error:  # what was here, nobody knows
        raise UsageError(f"{target} exists, and {error.found}", "a new folder", "choose it with -o") from None
    if other:
        raise UsageError(
            f"{target} also holds {other}, which --force would delete",
            "only the files in its manifest.json",
            "move it away, or choose another folder with -o",
        )


def check_disk(target: Path, need: int, todo: str = "choose another disk with -o") -> None:
    """Refuses before the first byte where the disk cannot hold what is to come.

    Raises:
        ResourceError: with the numbers.
    """
    parent = existing(target)
    free = shutil.disk_usage(parent).free
    if free < need:
        raise ResourceError(f"{free / 1e9:.1f} GB are free at {parent}", f"{need / 1e9:.1f} GB", todo)


def existing(target: Path) -> Path:
    """The nearest folder above a path that exists."""
    return next(p for p in target.absolute().parents if p.exists())


def write_component(
    folder: Folder,
    component: str,
    config: dict,
    plan: Plan,
    dtype: str,
    layers: Layers,
    done: Callable[[int], None],
    allow_nonfinite: bool = False,
) -> dict[str, tuple[float, float]]:
    """Writes config.json, shards and index of one component.

    Args:
        folder: the model folder.
        component: its name there.
        config: sizes, as JSON.
        plan: its tensors.
        dtype: "float32", "bfloat16" or "float16", of every array that is not packed.
        layers: how layers are quantized.
        done: called with the bytes just written.
        allow_nonfinite: NaN and infinities pass.

    Returns:
        Of every quantized tensor, the squares of error and values, summed.

    Raises:
        ModelError: NaN or infinities in a tensor, or a value that does not fit the type.
    """
    losses = {}

    def chunks(targets: list[Target]) -> Iterator[bytes | memoryview]:
        yield _header(targets, dtype, layers)
        for target, pieces in itertools.groupby(_made(targets, dtype, layers), lambda made: made.target):
            beside, lost = [], np.zeros(2)  # scales and biases come behind all of the codes
            for made in pieces:
                if not allow_nonfinite:
                    _check_finite(made, dtype)
                first, *others = (memoryview(np.asarray(part.reshape(-1).view(mx.uint8))) for part in made.parts)
                yield first
                done(len(first))
                beside.append(others)
                lost += 0 if made.loss is None else made.loss.tolist()
            for data in itertools.chain(*zip(*beside, strict=True)):
                yield data
                done(len(data))
            if layer_of(target, layers):
                losses[target.name] = tuple(lost.tolist())

    quantization = quantization_to_json(layers)
    fields = {"quantization": quantization} if quantization else {}
    folder.write_json(f"{component}/config.json", {"dtype": dtype, **fields, **config})
    shards = _shards(plan, dtype, layers)
    weight_map = {}
    for number, targets in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= {part: name for t in targets for part in stored(t, dtype, layer_of(t, layers))}
        folder.write(f"{component}/{name}", chunks(targets))
    metadata = {"total_size": sum(count_bytes(t, dtype, layer_of(t, layers)) for t in plan.targets)}
    folder.write_json(f"{component}/{INDEX}", {"metadata": metadata, "weight_map": weight_map})
    return losses


def check_manifest(
    folder: Path, progress: Callable[[str, int, int], None]
) -> tuple[dict[str, int], dict[str, list[str]]]:
    """Compares every file of a model folder with its manifest.json.

    Args:
        folder: of ours.
        progress: called with a label, the bytes hashed so far and in all; from several threads.

    Returns:
        The size of every file that is there, and the names of those that differ, are missing or are not listed.

    Raises:
        ModelError: no manifest.json, or a file that cannot be read.
    """
    listed = read_json(folder / "manifest.json")
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    paths = {name: path for name, path in paths.items() if not _of_the_system(path) and name not in _UNLISTED}
    files = {name: path.stat().st_size for name, path in paths.items()}
    hashed, total = dict.fromkeys(paths.values(), 0), sum(files.values())

    def done(path: Path, count: int) -> None:
        hashed[path] += count  # one thread a file
        progress("verifying", sum(hashed.values()), total)

    with hashing(paths.values(), workers=4, done=done) as hashes:
        found = {n: {"sha256": hashes[path].result(), "bytes": files[n]} for n, path in paths.items()}
    problems = {
        "differs": [name for name in found if name in listed and found[name] != listed[name]],
        "missing": [name for name in listed if name not in found],
        "not listed": [name for name in found if name not in listed],
    }
    return files, problems


@contextlib.contextmanager
def hashing(
    paths: Iterable[Path], workers: int = 1, done: Callable[[Path, int], None] | None = None
) -> Iterator[dict[Path, Future[str]]]:
    """The sha256 of files, computed beside other work; what is not done when the block ends is given up at once."""
    stop = threading.Event()
    with ThreadPoolExecutor(workers) as pool:
        try:
            yield {path: pool.submit(sha256, path, stop, done) for path in paths}
        finally:
            stop.set()


def sha256(path: Path, stop: threading.Event | None = None, done: Callable[[Path, int], None] | None = None) -> str:
    """Of a file, in hexadecimal.

    Args:
        path: the file.
        stop: ends it early.
        done: called with the file and the bytes just hashed.

    Raises:
        CancelledError: `stop` was set.
        ModelError: the file cannot be read.
    """
    digest = hashlib.sha256()

    def use(piece: memoryview) -> None:
        digest.update(piece)
        if done:
            done(path, len(piece))

    read_through(path, use, stop)
    return digest.hexdigest()


def read_through(path: Path, use: Callable[[memoryview], None], stop: threading.Event | None = None) -> None:
    """Hands all of a file to a function, piece after piece; each is there until the function returns.

    Raises:
        CancelledError: `stop` was set.
        ModelError: the file cannot be read.
    """
    buffer = memoryview(bytearray(2**20))  # one, of a size that stays in a cache
    try:
        with open(path, "rb") as file:
            while count := file.readinto(buffer):
                if stop and stop.is_set():
                    raise CancelledError
                use(buffer[:count])
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}", "a file that can") from None


def _json(obj) -> bytes:
    return (json.dumps(obj, indent=2, ensure_ascii=False) + "\n").encode()


def _place(partial: Path, target: Path, force: bool) -> None:
    """Gives a complete folder its name. At any moment the old model or the new one is whole on the disk."""
    check_target(target, force)  # much time has passed
    old = partial.with_suffix(".old")
    try:
        if force and target.exists():
            target.rename(old)
        partial.rename(target)  # fails on anything but an empty folder
    except BaseException as error:
        if old.exists() and not target.exists():
            old.rename(target)
        if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise UsageError(f"{target} appeared meanwhile", "a free name", "choose another with -o") from None
        raise
    _sync(target.parent)
    if old.exists():
        old.rename(partial)  # as such it is deleted, by the next run at the latest


def _made(targets: list[Target], dtype: str, layers: Layers) -> Iterator[Made]:
    """Pieces of tensors on two streams in turn: the next are read while those before them are computed."""
    begun: deque[Made] = deque()
    pieces = ((target, piece) for target in targets for piece in target.pieces())
    for (target, piece), stream in zip(pieces, itertools.cycle(_streams()), strict=False):
        with mx.stream(stream):
            begun.append(make(target, piece, dtype, layer_of(target, layers)))
        if len(begun) == _BEGUN:
            yield begun.popleft()
            mx.clear_cache()
    yield from begun


def _check_finite(made: Made, dtype: str) -> None:
    if problem := made.problem(dtype):
        tensor, nonfinite = made.piece.sources[0], problem.startswith("NaN")
        todo = "download it again" if nonfinite else "use another --dtype"
        raise ModelError(f"{tensor.path}: {tensor.name} holds {problem}", "finite weights" if nonfinite else "", todo)


@functools.cache
def _streams() -> tuple:
    """Two more; in every thread that converts they are its own."""
    return tuple(mx.new_thread_local_stream(mx.default_device()) for _ in range(2))


def _shards(plan: Plan, dtype: str, layers: Layers) -> list[list[Target]]:
    """Modulation apart from the rest; a shard never ends inside a block."""
    modulation = [t for t in plan.targets if any(part in t.name for part in _MODULATION)]
    rest = [t for t in plan.targets if not any(part in t.name for part in _MODULATION)]
    shards: list[list[Target]] = []
    for group in (modulation, rest):
        shard, size, block = [], 0, None
        for target in group:
            if size >= SHARD_BYTES and _block(target.name) != block:
                shards.append(shard)
                shard, size = [], 0
            shard.append(target)
            size += count_bytes(target, dtype, layer_of(target, layers))
            block = _block(target.name)
        shards += [shard] if shard else []
    return shards


def _block(name: str) -> str:
    """The part of a name up to and with its first number: double_blocks.7, encoder.block.3."""
    parts = name.split(".")
    number = next((i for i, part in enumerate(parts) if part.isdigit()), 0)
    return ".".join(parts[: number + 1])


def _header(targets: list[Target], dtype: str, layers: Layers) -> bytes:
    """A safetensors header in the order given; the library's own writers sort, and hold everything in memory."""
    entries: dict = {"__metadata__": {"format": "mlx"}}
    offset = 0
    for target in targets:
        for name, (kind, shape) in stored(target, dtype, layer_of(target, layers)).items():
            end = offset + math.prod(shape) * ITEM_BYTES[kind]
            entries[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [offset, end]}
            offset = end
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header


def _beside(target: Path, what: str) -> Path:
    return target.with_name(f".{target.name}.flux-krea.{what}")


@contextlib.contextmanager
def _parents(target: Path) -> Iterator[None]:
    """Makes the folders above a target; those that stay empty go again."""
    missing = [folder for folder in target.parents if not folder.exists()]  # the deepest first
    try:
        for folder in reversed(missing):
            folder.mkdir(exist_ok=True)
        yield
    finally:
        for folder in missing:
            with contextlib.suppress(OSError):
                folder.rmdir()


@contextlib.contextmanager
def _lock(target: Path) -> Iterator[None]:
    """No other conversion has this target in the block. The file is removed while it is locked."""
    path = _beside(target, "lock")
    with open(path, "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = os.path.samestat(os.fstat(file.fileno()), os.stat(path))
        except (BlockingIOError, FileNotFoundError):  # locked, or removed by its holder since we opened it
            ours = False
        if not ours:
            raise UsageError(
                f"another conversion is writing {target}", "one at a time", "wait for it, or choose another with -o"
            )
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _recover(target: Path) -> None:
    """Ends what a killed run left beside a target: an old model goes back to its place, everything else goes."""
    partial, old = _beside(target, "partial"), _beside(target, "old")
    if partial.exists():
        shutil.rmtree(partial)
    if old.exists():
        if not target.exists() or (target.is_dir() and not any(target.iterdir())):
            old.rename(target)
        else:  # the new one, or check_target refuses what it is
            with contextlib.suppress(ModelError):
                if is_model_folder(target):
                    shutil.rmtree(old.rename(partial))


def _not_ours(target: Path) -> str | None:
    """What somebody else put into a model folder: the first that its manifest does not name."""
    known = {*map(Path, _UNLISTED), *map(Path, read_json(target / "manifest.json"))}
    known |= {folder for file in known for folder in file.parents}
    for path in sorted(target.rglob("*")):
        if path.relative_to(target) not in known and not _of_the_system(path):
            return path.relative_to(target).as_posix()
    return None


def _of_the_system(path: Path) -> bool:
    return path.name in _OF_THE_SYSTEM or path.name[:2] == "._"


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
