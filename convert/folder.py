"""Writes a model folder under a temporary name beside its target; an incomplete folder never has the final name.

The folder takes its final name only when everything in it is on disk and was read back. Hidden beside the target lie

    .NAME.flux-krea.lock      locked during a conversion: only one at a time has this target. A process that ends in any
                              way loses the lock, and the next process that gets it cleans up
    .NAME.flux-krea.partial   an incomplete folder, or a folder to be deleted
    .NAME.flux-krea.old       the model that is being replaced, until the new one is in its place
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

from mlx_flux_krea import macos
from mlx_flux_krea.errors import ModelError, ResourceError, UsageError
from mlx_flux_krea.files import (
    bypass,
    chunks,
    forget,
    identities,
    identity,
    read_json,
    sha256,
    sync,
    sync_path,
    try_lock,
)
from mlx_flux_krea.models.filter_config import SELF_TEST
from mlx_flux_krea.weights import open_folder

from .reading import hashing
from .walk import is_model_folder

_CACHED = 2**25  # bytes of a file in the system's cache before they are written to disk
_LAST = ("manifest.json", "model_index.json")
_UNLISTED = ("manifest.json", SELF_TEST)  # the manifest lists the others; the self-test is written later
_OF_THE_SYSTEM = {
    ".DS_Store",
    ".localized",
    macos.NEVER_INDEX,
    "Thumbs.db",
    "desktop.ini",
}  # which systems create by themselves


class NewFile:
    """A new file, whose chunks are written in any order, each once.

    Args:
        path: of the file, which does not exist.
    """

    def __init__(self, path: Path):
        self.path = path
        self._chunks: list[tuple[int, int, int]] = []  # start, length and crc32 of each
        self._file = open(path, "xb")  # noqa: SIM115
        self._cached = 0  # bytes that may be in the system's cache
        bypass(self._file.fileno())

    def __enter__(self) -> "NewFile":
        return self

    def __exit__(self, kind, *_) -> None:
        with self._file:
            if kind is None:
                self._to_disk()
                sync(self._file.fileno())

    @property
    def size(self) -> int:
        """Bytes written."""
        return sum(count for _, count, _ in self._chunks)

    def write(self, data: bytes | memoryview, start: int = 0) -> int:
        """Writes a chunk at its place; returns its length."""
        if not data:
            return 0
        self._file.seek(start)
        self._file.write(data)
        self._chunks.append((start, len(data), zlib.crc32(data)))
        self._cached += len(data)
        if self._cached >= _CACHED:
            self._to_disk()
        return len(data)

    def read_back(self, stop: threading.Event, done: Callable[[int], None]) -> str:
        """Returns the sha256, in hexadecimal, of the file on disk.

        Args:
            stop: ends reading early.
            done: called with the number of bytes just read.

        Raises:
            UsageError: the file differs from the bytes that were written.
            CancelledError: `stop` was set.
        """
        digest, written, size = hashlib.sha256(), sorted(self._chunks), self.size
        checksums, number, place, data = [0] * len(written), 0, 0, memoryview(b"")
        for data in chunks(self.path, stop):
            digest.update(data)
            done(len(data))
            while place < size and data:
                start, count, _ = written[number]
                part = data[: start + count - place]
                checksums[number] = zlib.crc32(part, checksums[number])
                place, data = place + len(part), data[len(part) :]
                number += place == start + count
        if place < size or data or checksums != [crc for *_, crc in written]:
            raise UsageError(
                f"{self.path.name} does not read back as it was written",
                "a disk that stores every byte",
                "choose another with `out`",
            )
        return digest.hexdigest()

    def _to_disk(self) -> None:
        """Writes to disk and drops the system's cache, so that reading back reads from the disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        forget(self._file.fileno())
        self._cached = 0


class NewFolder:
    """A new model folder.

    Args:
        path: the temporary folder; must exist.
    """

    def __init__(self, path: Path):
        self.path = path
        self._files: dict[str, NewFile] = {}

    def open(self, name: str) -> NewFile:
        """Opens a new file in the folder; it is on disk when its block ends."""
        path = self.path / name
        path.parent.mkdir(exist_ok=True)
        self._files[name] = NewFile(path)
        return self._files[name]

    def write(self, name: str, data: bytes) -> None:
        """Writes a whole file."""
        with self.open(name) as file:
            file.write(data)

    def write_json(self, name: str, obj) -> None:
        """Writes indented JSON, the same bytes for the same object."""
        self.write(name, _json(obj))

    def finish(self, index: dict, progress: Callable[[int, int], None] = lambda done, total: None) -> None:
        """Reads everything back; writes manifest.json and, last of all, model_index.json; checks the folder.

        Args:
            index: content of model_index.json.
            progress: called with the bytes read back so far, and all bytes.

        Raises:
            UsageError: a file differs from the bytes that were written.
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
            sync_path(folder)

    def _read_back(self, names: Sequence[str], progress: Callable[[int, int], None]) -> dict[str, str]:
        """Reads files back and returns their hashes."""
        done = _counting(sum(self._files[name].size for name in names), progress)
        with hashing({name: self._files[name].read_back for name in names}, done) as hashes:
            return {name: digest.result() for name, digest in hashes.items()}


@contextlib.contextmanager
def new_folder(
    target: Path,
    force: bool,
    sources: Iterable[Path] = (),
    placing: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
) -> Iterator[NewFolder]:
    """Opens a temporary folder that becomes `target` if the block succeeds, and is deleted otherwise.

    Args:
        target: the final name, resolved.
        force: replace an existing model folder, once the new one is complete.
        sources: files and folders that must not overlap the target.
        placing: returns the context in which the folder takes its name.

    Raises:
        UsageError: the target is taken, at the start or at the end, or cannot be written.
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
                macos.exclude(partial)  # before it is filled; the folder keeps this with its final name
                yield NewFolder(partial)
                with placing():
                    _place(partial, target, force)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(
                f"the disk of {target} is full", todo="make room, or choose another disk with `out`"
            ) from None
        reason = error.strerror or error
        raise UsageError(f"{target} cannot be written: {reason}", todo="choose another place with `out`") from None


def remove_folder(target: Path) -> None:
    """Deletes a model folder. It is renamed first, so that the next run can finish an interrupted deletion.

    Args:
        target: a folder of ours, perhaps damaged; of a link, only the link is deleted.

    Raises:
        UsageError: a conversion is writing it, it holds files of others, or it cannot be deleted.
    """
    try:
        if target.is_symlink():
            target.unlink()
            return
        with contextlib.suppress(ModelError):  # the manifest of a damaged folder tells nothing
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
        UsageError: one contains the other.
    """
    above = identities(target)
    for source in {Path(os.path.realpath(source)) for source in sources}:
        if source in (target, *target.parents) or identity(source) in above or identity(target) in identities(source):
            raise UsageError(
                f"the target {target} overlaps the source {source}", "a folder apart", "choose it with `out`"
            )


def check_target(target: Path, force: bool) -> None:
    """Refuses a target that must not be written.

    Args:
        target: resolved.
        force: allow an existing model folder that contains only files of the converter.

    Raises:
        UsageError: the target exists and must not be replaced.
    """
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        kind = "a broken link" if target.is_symlink() else "a file"
        raise UsageError(f"{target} is {kind}", "a new folder", "choose another with `out`")
    if not any(target.iterdir()):
        return
    try:
        if not is_model_folder(target):
            raise UsageError(
                f"{target} exists and is not a model folder; `force` replaces only model folders",
                "a new folder",
                "choose it with `out`",
            )
        if not force:
            raise UsageError(
                f"{target} exists", "a new folder", "choose another with `out`, or replace it with `force`"
            )
        other = _not_ours(target)
    except ModelError as error:  # a damaged folder
        raise UsageError(f"{target} exists, and {error.found}", "a new folder", "choose it with `out`") from None
    if other:
        raise UsageError(
            f"{target} also holds {other}, which `force` would delete",
            "only the files in its manifest.json",
            "move it away, or choose another folder with `out`",
        )


def check_disk(target: Path, need: int, todo: str = "choose another disk with `out`") -> None:
    """Refuses, before the first byte, if the disk is too small.

    Raises:
        ResourceError: with the free and the needed bytes.
    """
    parent = existing(target)
    free = shutil.disk_usage(parent).free
    if free < need:
        raise ResourceError(f"{free / 1e9:.1f} GB are free at {parent}", f"{need / 1e9:.1f} GB", todo)


def existing(target: Path) -> Path:
    """Returns the nearest existing folder above a path."""
    return next(p for p in target.absolute().parents if p.exists())


def check_manifest(
    folder: Path, progress: Callable[[str, int, int], None], derived: str = ""
) -> tuple[dict[str, int], dict[str, list[str]]]:
    """Compares every file of a model folder with its manifest.json.

    Args:
        folder: a folder of ours.
        progress: called with a label, the bytes hashed so far, and all bytes.
        derived: a pattern of names of files that are made later and can be made again; they are left out.

    Returns:
        The size of every existing file, and the names of files that differ, are missing or are not listed.

    Raises:
        ModelError: no manifest.json, or a file that cannot be read.
    """
    listed = read_json(folder / "manifest.json")
    paths = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}
    paths = {name: path for name, path in paths.items() if not _of_the_system(path) and name not in _UNLISTED}
    paths = {name: path for name, path in paths.items() if not derived or not path.match(derived)}
    files = {name: path.stat().st_size for name, path in paths.items()}
    done = _counting(sum(files.values()), partial(progress, "verifying"))
    with hashing({name: partial(sha256, path) for name, path in paths.items()}, done) as hashes:
        entries = {name: {"sha256": digest.result(), "bytes": files[name]} for name, digest in hashes.items()}
    problems = {
        "differs": [name for name in entries if name in listed and entries[name] != listed[name]],
        "missing": [name for name in listed if name not in entries],
        "not listed": [name for name in entries if name not in listed],
    }
    return files, problems


def _counting(total: int, progress: Callable[[int, int], None]) -> Callable[[int], None]:
    """Returns a function that adds up bytes from several threads and reports the sum, one call at a time."""
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
    """Gives a complete folder its name. At every moment the old model or the new one is complete on disk."""
    check_target(target, force)  # again, since a conversion takes long
    old = partial.with_suffix(".old")
    try:
        if force and target.exists():
            target.rename(old)
        partial.rename(target)  # fails if the target is anything but an empty folder
    except BaseException as error:
        if old.exists() and not target.exists():
            old.rename(target)
        if isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise UsageError(f"{target} appeared meanwhile", "a free name", "choose another with `out`") from None
        raise
    sync_path(target.parent)
    if old.exists():
        old.rename(partial)  # it is deleted under this name, by the next run at the latest


def _beside(target: Path, suffix: str) -> Path:
    return target.with_name(f".{target.name}.flux-krea.{suffix}")


@contextlib.contextmanager
def _parents(target: Path) -> Iterator[None]:
    """Makes the folders above a target; deletes those that are empty at the end."""
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
    """Locks a target against other conversions within the block. The lock file is removed while it is locked."""
    path = _beside(target, "lock")
    lock = try_lock(path)
    if lock is None:
        found, todo = f"another conversion is writing {target}", "wait for it, or choose another with `out`"
        raise UsageError(found, "one at a time", todo)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        os.close(lock)


def _recover(target: Path) -> None:
    """Cleans up after a killed run: moves a replaced model back to its place, and deletes everything else."""
    partial, old = _beside(target, "partial"), _beside(target, "old")
    if partial.exists():
        shutil.rmtree(partial)
    if old.exists():
        if not target.exists() or (target.is_dir() and not any(target.iterdir())):
            old.rename(target)
        else:  # the new model, or something that check_target refuses
            with contextlib.suppress(ModelError):
                if is_model_folder(target):
                    shutil.rmtree(old.rename(partial))


def _not_ours(target: Path) -> str | None:
    """Returns the first file or folder in a model folder that its manifest does not list; None: there is none."""
    known = {*map(Path, _UNLISTED), *map(Path, read_json(target / "manifest.json"))}
    known |= {folder for file in known for folder in file.parents}
    for path in sorted(target.rglob("*")):
        if path.relative_to(target) not in known and not _of_the_system(path):
            return path.relative_to(target).as_posix()
    return None


def _of_the_system(path: Path) -> bool:
    return path.name in _OF_THE_SYSTEM or path.name[:2] == "._"
