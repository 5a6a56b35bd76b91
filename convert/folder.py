"""The place of a model folder: made under a temporary name, beside its target, and never seen half done.

The folder takes its final name only when everything in it is on disk and was read back. Beside the target lie, hidden,

    .NAME.flux-krea.lock      locked while a conversion runs: one at a time has this target. The system takes the lock
                              back from a process that ends in any way; whoever gets it next clears up
    .NAME.flux-krea.partial   a folder in the making, or one to be deleted
    .NAME.flux-krea.old       the model that is being replaced, until the new one stands in its place
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

from mlx_flux_krea.errors import ModelError, ResourceError, UsageError
from mlx_flux_krea.files import bypass, chunks, forget, read_json, sha256, sync_folder, try_lock
from mlx_flux_krea.models.filter_config import SELF_TEST
from mlx_flux_krea.weights import open_folder

from .reading import hashing
from .sources import is_model_folder

_CACHED = 2**25  # bytes of a file that wait for the disk
_LAST = ("manifest.json", "model_index.json")
_UNLISTED = ("manifest.json", SELF_TEST)  # the one lists the others, the other is written when they are tried
_OF_THE_SYSTEM = {".DS_Store", ".localized", ".metadata_never_index", "Thumbs.db", "desktop.ini"}  # nobody misses them


class File:
    """A file in the making, whose pieces are written in any order, each once.

    Args:
        path: of the file, which is new.
    """

    def __init__(self, path: Path):
        self.path = path
        self._pieces: list[tuple[int, int, int]] = []  # where each begins, its bytes and their crc32
        self._file = open(path, "xb")  # noqa: SIM115
        self._cached = 0  # bytes of it that may be in the system's cache
        bypass(self._file.fileno())

    def __enter__(self) -> "File":
        return self

    def __exit__(self, kind, *_) -> None:
        with self._file:
            if kind is None:
                self._to_disk()

    @property
    def size(self) -> int:
        """Bytes that were written."""
        return sum(count for _, count, _ in self._pieces)

    def write(self, data: bytes | memoryview, start: int = 0) -> int:
        """A piece, where it belongs. Gives its bytes."""
        if not data:
            return 0
        self._file.seek(start)
        self._file.write(data)
        self._pieces.append((start, len(data), zlib.crc32(data)))
        self._cached += len(data)
        if self._cached >= _CACHED:
            self._to_disk()
        return len(data)

    def read_back(self, stop: threading.Event, done: Callable[[int], None]) -> str:
        """The sha256, in hexadecimal, of what is on the disk.

        Args:
            stop: ends it early.
            done: called with the bytes just read.

        Raises:
            UsageError: it is not what was written.
            CancelledError: `stop` was set.
        """
        digest, pieces, size = hashlib.sha256(), sorted(self._pieces), self.size
        found, number, place, chunk = [0] * len(pieces), 0, 0, b""
        for chunk in chunks(self.path, stop):
            digest.update(chunk)
            done(len(chunk))
            while place < size and chunk:
                start, count, _ = pieces[number]
                part = chunk[: start + count - place]
                found[number] = zlib.crc32(part, found[number])
                place, chunk = place + len(part), chunk[len(part) :]
                number += place == start + count
        if place < size or chunk or found != [crc for *_, crc in pieces]:
            raise UsageError(
                f"{self.path.name} reads back as something else than was written",
                "a disk that keeps what it is given",
                "choose another with -o",
            )
        return digest.hexdigest()

    def _to_disk(self) -> None:
        """And out of memory: what is read back comes from the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        forget(self._file.fileno())
        self._cached = 0


class Folder:
    """A model folder in the making.

    Args:
        path: where it is made; must exist.
    """

    def __init__(self, path: Path):
        self.path = path
        self._files: dict[str, File] = {}

    def open(self, name: str) -> File:
        """A new file in it, which is on the disk when its block ends."""
        path = self.path / name
        path.parent.mkdir(exist_ok=True)
        self._files[name] = File(path)
        return self._files[name]

    def write(self, name: str, data: bytes) -> None:
        """A whole file."""
        with self.open(name) as file:
            file.write(data)

    def write_json(self, name: str, obj) -> None:
        """JSON as people read it, the same bytes for the same object."""
        self.write(name, _json(obj))

    def finish(self, index: dict, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Reads everything back; writes manifest.json and, last of all, model_index.json; opens it as the library will.

        Args:
            index: of model_index.json.
            progress: called with the bytes that were read back, and will be.

        Raises:
            UsageError: what is on the disk is not what was written.
        """
        text = _json(index)
        hashes = self._read_back(list(self._files), progress)
        files = {name: {"sha256": digest, "bytes": self._files[name].size} for name, digest in hashes.items()}
        files["model_index.json"] = {"sha256": hashlib.sha256(text).hexdigest(), "bytes": len(text)}
        self.write_json("manifest.json", dict(sorted(files.items())))
        self.write("model_index.json", text)
        self._read_back(_LAST, lambda *_: None)
        open_folder(self.path).check()
        for folder in {file.path.parent for file in self._files.values()}:
            sync_folder(folder)

    def _read_back(self, names: Sequence[str], progress: Callable[[int, int], None]) -> dict[str, str]:
        """The hashes of files."""
        done = _counting(sum(self._files[name].size for name in names), progress)
        with hashing({name: self._files[name].read_back for name in names}, done) as hashes:
            return {name: digest.result() for name, digest in hashes.items()}


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


def check_manifest(
    folder: Path, progress: Callable[[str, int, int], None]
) -> tuple[dict[str, int], dict[str, list[str]]]:
    """Compares every file of a model folder with its manifest.json.

    Args:
        folder: of ours.
        progress: called with a label, the bytes hashed so far and in all.

    Returns:
        The size of every file that is there, and the names of those that differ, are missing or are not listed.

    Raises:
        ModelError: no manifest.json, or a file that cannot be read.
    """
    listed = read_json(folder / "manifest.json")
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    paths = {name: path for name, path in paths.items() if not _of_the_system(path) and name not in _UNLISTED}
    files = {name: path.stat().st_size for name, path in paths.items()}
    done = _counting(sum(files.values()), partial(progress, "verifying"))
    with hashing({name: partial(sha256, path) for name, path in paths.items()}, done) as hashes:
        found = {name: {"sha256": digest.result(), "bytes": files[name]} for name, digest in hashes.items()}
    problems = {
        "differs": [name for name in found if name in listed and found[name] != listed[name]],
        "missing": [name for name in listed if name not in found],
        "not listed": [name for name in found if name not in listed],
    }
    return files, problems


def _counting(total: int, progress: Callable[[int, int], None]) -> Callable[[int], None]:
    """Adds up the bytes that several threads are done with, and reports them one at a time."""
    lock, sofar = threading.Lock(), 0

    def done(count: int) -> None:
        nonlocal sofar
        with lock:
            sofar += count
            progress(sofar, total)

    return done


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
    sync_folder(target.parent)
    if old.exists():
        old.rename(partial)  # as such it is deleted, by the next run at the latest


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
    lock = try_lock(path)
    if lock is None:
        found, todo = f"another conversion is writing {target}", "wait for it, or choose another with -o"
        raise UsageError(found, "one at a time", todo)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(lock)


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
