"""Fetches files from the hub: given files, or the weights of a conversion while it converts those that arrived.

    folder = fetch(listing, names)                          returns when all files are in the cache

    with outlined(sources, offline) as remote:              fetches enough to plan a conversion
        with Fetching(remote.files, keep=True) as fetching:
            fetching.start()
            fetching.wait(files)                            returns when these have arrived; others still may not

Files are stored in the hub's own cache, where other programs find them too. A partly fetched file lies there as
blobs/DIGEST.incomplete; fetching continues after its last byte, and the file gets its name when its hash is the
announced one. (The hub's own client starts again, even after 9 of 10 GB.) Plain HTTP works with every repository and
can be interrupted anywhere.
"""

import contextlib
import hashlib
import itertools
import os
import struct
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

from mlx_flux_krea.errors import ModelError, UsageError
from mlx_flux_krea.files import chunks, parse_json, sha256, sync_path, try_lock

from .formats import LONGEST, MARK
from .hub import (
    INCOMPLETE,
    HubFile,
    Listing,
    explained,
    folder_of,
    is_repo_id,
    is_weights,
    look,
    patiently,
    place_of,
    split_id,
)

_HEADER, _LONGEST_HEADER = 2**18, 2**26  # bytes of the first request, and at most
_RANGE, _CONNECTIONS = 2**24, 4  # bytes of a range of a long file, and ranges that arrive at once
_GGUF_HEADER = 2**22  # it contains the vocabulary of a T5, 1 MB


def fetch(listing: Listing, names: Iterable[str], progress: Callable[[str, int, int], None] | None = None) -> Path:
    """Fetches files into the hub's cache.

    Args:
        listing: the repository.
        names: of files.
        progress: called with "fetching", the bytes fetched so far, and all bytes.

    Returns:
        The folder in the cache that holds the files of this commit.

    Raises:
        UsageError: another process is fetching from this repository.
        ModelError: access denied, hub not reachable, file removed meanwhile, or another hash than announced.
        ResourceError: the disk is full.
    """
    wanted = set(names)
    files = [file for file in listing.files if file.name in wanted]
    here, total = sum(file.here for file in files), sum(file.size for file in files)

    def got(count: int) -> None:
        nonlocal here
        here += count
        if progress:
            progress("fetching", here, total)

    with _locked(listing):
        for file in files:
            _fetch(listing, file, threading.Event(), got)
    return folder_of(listing.repo) / "snapshots" / listing.commit


# --- a conversion that starts before all files have arrived ---


@dataclass(frozen=True)
class Remote:
    """Sources of a conversion; outlines stand for repositories on the hub."""

    paths: list[Path]  # of files and folders, in the order of the sources
    files: dict[Path, tuple[Listing, HubFile]]  # the weight files that come from the hub


@contextlib.contextmanager
def outlined(
    sources: Iterable[str | Path], offline: bool, progress: Callable[[str, int, int], None] | None = None
) -> Iterator[Remote]:
    """Opens sources, some of them perhaps on the hub, without fetching weights.

    An outline is a folder with the small files of a repository, and with sparse weight files that have the size and the
    header of the real ones and use no disk space. `Fetching` puts the real files in their places.

    Args:
        sources: paths, and repositories as OWNER/NAME, or single files of them as OWNER/NAME:FILE.
        offline: use only the cache.
        progress: as for `fetch`.

    Raises:
        ModelError, ResourceError, UsageError: as `look` and `fetch`. Errors in the block name the repository instead of
            its outline.
    """
    remote, shown = Remote([], {}), {}
    with contextlib.ExitStack() as until_then:
        for source in sources:
            if not is_repo_id(source):
                remote.paths.append(Path(os.path.expanduser(source)))
                continue
            listing = look(str(source), offline)
            snapshot = fetch(listing, [f.name for f in listing.files if not is_weights(f.name)], progress)
            root = until_then.enter_context(TemporaryDirectory(prefix="flux-krea-", ignore_cleanup_errors=True))
            until_then.enter_context(_locked(listing))
            outline = Path(root, *snapshot.parts[-3:])  # which tells a conversion the name of the repository
            for file in listing.files:
                path = outline / file.name
                path.parent.mkdir(parents=True, exist_ok=True)
                if is_weights(file.name):
                    remote.files[path] = (listing, file)
                    _outline(listing, file, path)
                else:
                    _put(snapshot / file.name, path)
            remote.paths.append(outline / split_id(source)[1])
            shown[str(outline)] = listing.repo
        try:
            yield remote
        except ModelError as error:
            if not shown:
                raise
            parts = [error.found, error.expected, error.todo]
            for path, repo in shown.items():
                parts = [part.replace(path, repo) for part in parts]
            raise ModelError(*parts) from None


class Fetching:
    """Fetches weight files in the background.

    Args:
        files: their places in outlines, in the order in which they will be needed.
        keep: store them in the cache; else `discard` deletes them.
    """

    def __init__(self, files: dict[Path, tuple[Listing, HubFile]], keep: bool):
        self.hashes: dict[Path, Future[str]] = {path: Future() for path in files}  # sha256 of files that have arrived
        self.here = sum(file.here for _, file in files.values())
        self.total = sum(file.size for _, file in files.values())
        self._files, self._keep, self._stop = files, keep, threading.Event()
        self._thread = threading.Thread(
            target=self._run, daemon=True
        )  # daemon: a server that hangs does not block the exit

    def __enter__(self) -> "Fetching":
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        if self._thread.ident:
            self._thread.join(2)

    def start(self) -> None:
        """Starts to fetch; ends with the block."""
        self._thread.start()

    def left(self, paths: Iterable[Path]) -> int:
        """Returns the bytes of these files that are still missing."""
        return sum(file.size - file.here for _, file in (self._files[path] for path in paths if path in self._files))

    def wait(self, paths: Iterable[Path], progress: Callable[[str, int, int], None]) -> None:
        """Returns when these files are in their places, complete and with the announced hashes.

        Raises:
            ModelError, ResourceError: as `fetch`.
        """
        for path in paths:
            if path in self.hashes:
                while not self.hashes[path].done():
                    progress("fetching" if self.here < self.total else "checking", self.here, self.total)
                    futures.wait([self.hashes[path]], 0.2)
                self.hashes[path].result()

    def discard(self, paths: Iterable[Path]) -> None:
        """Deletes files that were fetched for this conversion."""
        for path in paths:
            place = Path(os.path.realpath(path))
            if path in self.hashes and not self._keep and place.suffix == INCOMPLETE:
                place.unlink(missing_ok=True)

    def _run(self) -> None:
        try:
            for path, (listing, file) in self._files.items():
                place = _fetch(listing, file, self._stop, self._got, self._keep)
                _put(place, path)
                self.hashes[path].set_result(file.digest if len(file.digest) == 64 else sha256(place, self._stop))
        except BaseException as error:
            for future in self.hashes.values():
                if not future.done():
                    future.set_exception(error)

    def _got(self, count: int) -> None:
        self.here += count


def _put(place: Path, path: Path) -> None:
    """Puts a link at `path`, replacing an existing file."""
    link = path.with_name(f".{path.name}")
    link.symlink_to(place)
    link.replace(path)


def _outline(listing: Listing, file: HubFile, path: Path) -> None:
    """Writes a sparse weight file with only its header; a link, if the file is in the cache."""
    place = place_of(listing.repo, listing.commit, file.name, file.digest)
    if place.suffix != INCOMPLETE:
        _put(place, path)
        return
    header = _read_header(listing, file)
    with open(path, "wb") as outline:
        outline.write(header)
        outline.truncate(file.size)
        places = [place for place in _statements(header) if place[1] > len(header)]
        with ThreadPoolExecutor(2 * _CONNECTIONS) as pool, explained(listing.repo, file.name, listing.gated):
            read = pool.map(lambda place: patiently(lambda: _read(listing, file, *place)), places)
            for (start, _), data in zip(places, read, strict=True):
                outline.seek(start)
                outline.write(data)


# --- one file ---


def _read_header(listing: Listing, file: HubFile) -> bytes:
    """Returns the header of a weight file, perhaps with some bytes after it."""
    with explained(listing.repo, file.name, listing.gated):
        first = min(file.size, _GGUF_HEADER if file.name.lower().endswith(".gguf") else _HEADER)
        header = patiently(lambda: _read(listing, file, 0, first)) if first else b""
        if not file.name.lower().endswith(".gguf") and first >= 8:
            end = min(file.size, 8 + struct.unpack("<Q", header[:8])[0], _LONGEST_HEADER)
            if end > first:
                header += patiently(lambda: _read(listing, file, first, end))
    return header


def _statements(header: bytes) -> list[tuple[int, int]]:
    """Returns the places of small tensors that say how others are stored; none where the header cannot be read."""
    try:
        (length,) = struct.unpack("<Q", header[:8])
        infos = parse_json(header[8 : 8 + length])
        names = [name for name in infos if name.endswith(MARK)]
        places = [[8 + length + int(n) for n in infos[name]["data_offsets"]] for name in names]
        return [(start, end) for start, end in places if 0 < end - start <= LONGEST]
    except (ValueError, TypeError, KeyError, AttributeError, struct.error):
        return []


def _fetch(
    listing: Listing, file: HubFile, stop: threading.Event, got: Callable[[int], None], keep: bool = True
) -> Path:
    """Fetches a file unless it is in the cache, compares its hash, and returns its place: in the cache if `keep`."""
    place, hashed = place_of(listing.repo, listing.commit, file.name, file.digest), _Hashed(file)
    with explained(listing.repo, file.name, listing.gated):
        if place.suffix == INCOMPLETE:
            place.parent.mkdir(parents=True, exist_ok=True)
            if place.exists() and place.stat().st_size > file.size:
                place.unlink()
            size = lambda: place.stat().st_size if place.exists() else 0  # noqa: E731
            patiently(lambda: _append(listing, file, place, stop, got, hashed), size, stop)
        hashed.catch_up(place, stop)
        if hashed.digest != file.digest:
            Path(os.path.realpath(place)).unlink()
            place.unlink(missing_ok=True)
            raise ModelError(
                f"{file.name} of {listing.repo} has other content than the hub announced",
                f"the hash {file.digest}",
                "it was deleted; start again to fetch it again",
            )
        if not keep and place.suffix == INCOMPLETE:
            return place
        return _keep(listing, file, place)


def _keep(listing: Listing, file: HubFile, place: Path) -> Path:
    """Gives a file its place in the cache, as the hub's own client does, and records the commit."""
    folder = folder_of(listing.repo)
    blob, ref = folder / "blobs" / file.digest, folder / "refs" / "main"
    snapshot = folder / "snapshots" / listing.commit / file.name
    if place.suffix == INCOMPLETE:
        sync_path(place)
        place.replace(blob)
    if not snapshot.exists():
        snapshot.parent.mkdir(parents=True, exist_ok=True)
        snapshot.unlink(missing_ok=True)  # a broken link
        try:
            snapshot.symlink_to(os.path.relpath(blob, snapshot.parent))
        except OSError:  # a disk without links
            blob.replace(snapshot)
    if not ref.exists() or ref.read_text() != listing.commit:
        ref.parent.mkdir(exist_ok=True)
        ref.write_text(listing.commit)
    return snapshot


class _Hashed:
    """The hash of the fetched part of a file, as the hub announces it: LFS's, or git's for small files."""

    def __init__(self, file: HubFile):
        self._file = file
        self.restart()

    def restart(self) -> None:
        """Starts again from an empty file."""
        is_lfs, self.count = len(self._file.digest) == 64, 0
        git = b"blob %d\0" % self._file.size
        self._hash = hashlib.sha256() if is_lfs else hashlib.sha1(git, usedforsecurity=False)

    def add(self, chunk: bytes | memoryview) -> None:
        """Adds bytes that arrived."""
        self._hash.update(chunk)
        self.count += len(chunk)

    def catch_up(self, place: Path, stop: threading.Event) -> None:
        """Hashes the existing part of the file, unless all of it went through `add`.

        Raises:
            CancelledError: `stop` was set.
            ModelError: the file cannot be read.
        """
        if not os.path.exists(place) or self.count != os.path.getsize(place):
            self.restart()
            for chunk in chunks(place, stop):
                self.add(chunk)

    @property
    def digest(self) -> str:
        """The hash in hexadecimal."""
        return self._hash.hexdigest()


def _append(
    listing: Listing, file: HubFile, place: Path, stop: threading.Event, got: Callable[[int], None], hashed: _Hashed
) -> None:
    """Continues a file where the last attempt ended: by several ranges at once, if it is long."""
    with open(place, "ab") as part:
        start = part.tell()
        hashed.catch_up(place, stop)
        if start == file.size:
            return
        if file.size - start > _RANGE:
            with contextlib.suppress(_NoRangesError):
                _write(part, file, _in_ranges(listing, file, start, stop), stop, got, hashed)
                return
            start = part.tell()
        with _stream(listing, file, start, file.size) as response:
            if response.status_code != 206 and start:  # the server sends the whole file
                part.truncate(0)
                hashed.restart()
                got(-start)
            _write(part, file, response.iter_bytes(), stop, got, hashed)


def _write(
    part: BinaryIO,
    file: HubFile,
    arriving: Iterable[bytes],
    stop: threading.Event,
    got: Callable[[int], None],
    hashed: _Hashed,
) -> None:
    """Writes bytes in their order, so that a part of a file is always its beginning.

    Raises:
        CancelledError: `stop` was set.
        ConnectionError: they ended too early.
    """
    for chunk in arriving:
        if stop.is_set():
            raise CancelledError
        part.write(chunk)
        hashed.add(chunk)
        got(len(chunk))
        if part.tell() > file.size:
            return  # the hash will differ
    if part.tell() < file.size:
        raise ConnectionError(f"it ended after {part.tell()} of {file.size} bytes")


class _NoRangesError(ConnectionError):
    """The server sends whole files only."""


def _in_ranges(listing: Listing, file: HubFile, start: int, stop: threading.Event) -> Iterator[bytes]:
    """Yields the rest of a file in its order, while the next ranges arrive over other connections."""
    first, enough = iter(range(start, file.size, _RANGE)), threading.Event()

    def read(begin: int) -> bytes:
        return _read(listing, file, begin, min(begin + _RANGE, file.size), lambda: enough.is_set() or stop.is_set())

    with ThreadPoolExecutor(_CONNECTIONS, thread_name_prefix="flux-krea-fetch") as pool:
        arriving = deque(pool.submit(read, begin) for begin in itertools.islice(first, _CONNECTIONS))
        try:
            while arriving:
                yield arriving.popleft().result()
                arriving.extend(pool.submit(read, begin) for begin in itertools.islice(first, 1))
        finally:
            enough.set()
            for future in arriving:
                future.cancel()


def _read(
    listing: Listing, file: HubFile, start: int, end: int, is_enough: Callable[[], bool] = lambda: False
) -> bytes:
    data = bytearray()
    with _stream(listing, file, start, end) as response:
        if response.status_code != 206 and start:
            raise _NoRangesError("the server gives no parts of files")
        for chunk in response.iter_bytes():
            data += chunk
            if len(data) >= end - start:
                return bytes(data[: end - start])
            if is_enough():
                raise CancelledError
    raise ConnectionError(f"it ended after {len(data)} of {end - start} bytes")


@contextlib.contextmanager
def _stream(listing: Listing, file: HubFile, start: int, end: int) -> Iterator:
    """Opens a response with the bytes from start to end; if its status is not 206, with the whole file."""
    from huggingface_hub import constants, get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status

    url = hf_hub_url(listing.repo, file.name, revision=listing.commit)
    headers = {**build_hf_headers(), "Accept-Encoding": "identity"}
    if (start, end) != (0, file.size):
        headers["Range"] = f"bytes={start}-{end - 1}"
    with get_session().stream("GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT) as response:
        hf_raise_for_status(response)
        yield response


@contextlib.contextmanager
def _locked(listing: Listing) -> Iterator[None]:
    """Locks a repository against other processes within the block; a dead process loses the lock."""
    if not listing.to_fetch:
        yield  # the cache may be on a read-only disk
        return
    folder = folder_of(listing.repo)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = try_lock(folder / ".flux-krea.lock", mode=0o666)  # other users may share the cache
    except OSError as error:
        raise UsageError(
            f"the hub's cache {folder.parent} cannot be written: {error.strerror}", todo="choose another with HF_HOME"
        ) from None
    if lock is None:
        raise UsageError(f"{listing.repo} is being fetched by another process", "one at a time", "wait for it")
    try:
        yield
    finally:
        os.close(lock)
