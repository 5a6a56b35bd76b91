"""Brings files of the hub here: some of them, or the weights of a conversion while it is at work on those that came.

    folder = fetch(listing, names)                          in the cache, when all of these are here

    with outlined(sources, offline) as remote:              enough to plan a conversion
        with Fetching(remote.files, keep=True) as fetching:
            fetching.start()
            fetching.wait(files)                            these are here, the others are on their way

Files are kept in the hub's own cache, where other programs find them too. What has come of a file lies there as
blobs/DIGEST.incomplete; it goes on from its last byte, and gets its name when its hash is the one that was announced.
(The hub's own client starts again, after 9 of 10 GB too.) Plain HTTP serves every repository and can be cut anywhere.
"""

import contextlib
import fcntl
import hashlib
import os
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from mlx_flux_krea.errors import ModelError, UsageError
from mlx_flux_krea.files import chunks, sha256

from .hub import INCOMPLETE, WEIGHTS, File, Listing, explained, folder_of, is_repo_id, look, patiently, place_of

_HEADER, _LONGEST_HEADER = 2**18, 2**26  # bytes that are asked for at first, and at most
_GGUF_HEADER = 2**22  # the vocabulary of a T5 is in there, with 1 MB


def fetch(listing: Listing, names: Iterable[str], progress: Callable[[str, int, int], None] | None = None) -> Path:
    """Brings files into the hub's cache.

    Args:
        listing: of the repository.
        names: of files.
        progress: called with "fetching", the bytes that are here and how many there will be.

    Returns:
        The folder in the cache that holds the files of this commit.

    Raises:
        UsageError: another process is at it.
        ModelError: not allowed, not reachable, gone half-way, or with another hash than was announced.
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


# --- a conversion that begins before everything is here ---


@dataclass(frozen=True)
class Remote:
    """Sources of a conversion, those on the hub as outlines of what they will be."""

    paths: list[Path]  # what to convert, in the order of the sources
    files: dict[Path, tuple[Listing, File]]  # the weight files among it that come from the hub


@contextlib.contextmanager
def outlined(
    sources: Iterable[str | Path], offline: bool, progress: Callable[[str, int, int], None] | None = None
) -> Iterator[Remote]:
    """Opens sources, of which some may be on the hub, without fetching their weights.

    An outline is a folder with the small files of a repository, and with weight files that have their size and header;
    the rest of these is not there, and takes no room. `Fetching` puts the real files into their places.

    Args:
        sources: paths, and repositories as OWNER/NAME.
        offline: the cache is all there is.
        progress: as for `fetch`.

    Raises:
        ModelError, ResourceError, UsageError: as `look` and `fetch`. Errors in the block name the repository where
            they would name its outline.
    """
    remote, shown = Remote([], {}), {}
    with contextlib.ExitStack() as until_then:
        for source in sources:
            if not is_repo_id(source):
                remote.paths.append(Path(os.path.expanduser(source)))
                continue
            listing = look(str(source), offline)
            snapshot = fetch(listing, [f.name for f in listing.files if not f.name.endswith(WEIGHTS)], progress)
            root = until_then.enter_context(TemporaryDirectory(prefix="flux-krea-", ignore_cleanup_errors=True))
            until_then.enter_context(_locked(listing))
            outline = Path(root, *snapshot.parts[-3:])  # by which a conversion knows the name of the repository
            for file in listing.files:
                path = outline / file.name
                path.parent.mkdir(parents=True, exist_ok=True)
                if file.name.endswith(WEIGHTS):
                    remote.files[path] = (listing, file)
                    _outline(listing, file, path)
                else:
                    _put(snapshot / file.name, path)
            remote.paths.append(outline)
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
    """Weight files on their way.

    Args:
        files: the places in outlines, in the order in which they will be needed.
        keep: they go into the cache; else they are deleted by `discard`.
    """

    def __init__(self, files: dict[Path, tuple[Listing, File]], keep: bool):
        self.hashes: dict[Path, Future[str]] = {path: Future() for path in files}  # sha256 of those that are here
        self.here = sum(file.here for _, file in files.values())
        self.total = sum(file.size for _, file in files.values())
        self._files, self._keep, self._stop = files, keep, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)  # a server that hangs does not hold us up

    def __enter__(self) -> "Fetching":
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        if self._thread.ident:
            self._thread.join(2)

    def start(self) -> None:
        """Begins; until the end of the block."""
        self._thread.start()

    def left(self, paths: Iterable[Path]) -> int:
        """Bytes of these that are yet to come."""
        return sum(file.size - file.here for _, file in (self._files[path] for path in paths if path in self._files))

    def wait(self, paths: Iterable[Path], progress: Callable[[str, int, int], None]) -> None:
        """Returns when these are in their places, whole and as they were announced.

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
        """Deletes those of them that were fetched for this conversion."""
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
    """A link at `path`, whatever was there."""
    link = path.with_name(f".{path.name}")
    link.symlink_to(place)
    link.replace(path)


def _outline(listing: Listing, file: File, path: Path) -> None:
    """A weight file of which only the header is there; where all of it is in the cache, a link."""
    place = place_of(listing.repo, listing.commit, file.name, file.digest)
    if place.suffix != INCOMPLETE:
        _put(place, path)
        return
    with open(path, "wb") as outline:
        outline.write(_read_header(listing, file))
        outline.truncate(file.size)


# --- one file ---


def _read_header(listing: Listing, file: File) -> bytes:
    """The header of a weight file, and maybe more of its beginning."""
    with explained(listing.repo, file.name):
        first = min(file.size, _GGUF_HEADER if file.name.endswith(".gguf") else _HEADER)
        header = patiently(lambda: _read(listing, file, 0, first)) if first else b""
        if file.name.endswith(".safetensors") and first >= 8:
            end = min(file.size, 8 + struct.unpack("<Q", header[:8])[0], _LONGEST_HEADER)
            if end > first:
                header += patiently(lambda: _read(listing, file, first, end))
    return header


def _fetch(listing: Listing, file: File, stop: threading.Event, got: Callable[[int], None], keep: bool = True) -> Path:
    """Brings a file here, if it is not, and compares its hash. Gives the place of it: in the cache, if it is kept."""
    place, hashed = place_of(listing.repo, listing.commit, file.name, file.digest), _Hashed(file)
    with explained(listing.repo, file.name):
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
                f"{file.name} of {listing.repo} came with another content than the hub announces",
                f"the hash {file.digest}",
                "it was deleted; start again to fetch it again",
            )
        if not keep and place.suffix == INCOMPLETE:
            return place
        return _keep(listing, file, place)


def _keep(listing: Listing, file: File, place: Path) -> Path:
    """Gives a file its place in the cache, as the hub's own client does it, and remembers the commit."""
    folder = folder_of(listing.repo)
    blob, ref = folder / "blobs" / file.digest, folder / "refs" / "main"
    kept = folder / "snapshots" / listing.commit / file.name
    if place.suffix == INCOMPLETE:
        place.replace(blob)
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.unlink(missing_ok=True)  # a link that leads nowhere
        try:
            kept.symlink_to(os.path.relpath(blob, kept.parent))
        except OSError:  # a disk without links
            blob.replace(kept)
    if not ref.exists() or ref.read_text() != listing.commit:
        ref.parent.mkdir(exist_ok=True)
        ref.write_text(listing.commit)
    return kept


class _Hashed:
    """The hash that the hub announces of a file, over what is here of it: as LFS has it, or, of small files, as git."""

    def __init__(self, file: File):
        self._file = file
        self.restart()

    def restart(self) -> None:
        """Nothing is here."""
        is_lfs, self.count = len(self._file.digest) == 64, 0
        git = b"blob %d\0" % self._file.size
        self._hash = hashlib.sha256() if is_lfs else hashlib.sha1(git, usedforsecurity=False)

    def add(self, chunk: bytes | memoryview) -> None:
        """More came."""
        self._hash.update(chunk)
        self.count += len(chunk)

    def catch_up(self, place: Path, stop: threading.Event) -> None:
        """Reads what is there, unless all of it went through `add`.

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
        """In hexadecimal."""
        return self._hash.hexdigest()


def _append(
    listing: Listing, file: File, place: Path, stop: threading.Event, got: Callable[[int], None], hashed: _Hashed
) -> None:
    """Goes on where the last attempt ended."""
    with open(place, "ab") as part:
        begin = part.tell()
        hashed.catch_up(place, stop)
        if begin == file.size:
            return
        with _stream(listing, file, begin, file.size) as response:
            if response.status_code != 206 and begin:  # all of it is coming
                part.truncate(0)
                hashed.restart()
                got(-begin)
            for chunk in response.iter_bytes():
                if stop.is_set():
                    raise CancelledError
                part.write(chunk)
                hashed.add(chunk)
                got(len(chunk))
                if part.tell() > file.size:
                    return  # the hash will tell
        if part.tell() < file.size:
            raise ConnectionError(f"it ended after {part.tell()} of {file.size} bytes")


def _read(listing: Listing, file: File, start: int, end: int) -> bytes:
    data = b""
    with _stream(listing, file, start, end) as response:
        if response.status_code != 206 and start:
            raise ConnectionError("the server gives no parts of files")
        for chunk in response.iter_bytes():
            data += chunk
            if len(data) >= end - start:
                return data[: end - start]
    raise ConnectionError(f"it ended after {len(data)} of {end - start} bytes")


@contextlib.contextmanager
def _stream(listing: Listing, file: File, start: int, end: int) -> Iterator:
    """A response with the bytes from start to end, or, if its status is not 206, with all of them."""
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
    """Nobody else fetches from this repository within the block; the system ends it with the process."""
    if not listing.to_fetch:
        yield  # the cache may be on a disk that is only read
        return
    folder = folder_of(listing.repo)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".flux-krea.lock", "a")  # noqa: SIM115
    except OSError as error:
        raise UsageError(
            f"the hub's cache {folder.parent} cannot be written: {error.strerror}", todo="choose another with HF_HOME"
        ) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"{listing.repo} is being fetched by another process", "one at a time", "wait for it"
            ) from None
        yield
