"""The Hugging Face hub: what a repository has of what is needed, what of it is here, and why it could not be had.

    listing = look("black-forest-labs/FLUX.1-Krea-dev")     names, sizes and hashes; `fetch` brings the files
    login()                                                 who is logged in

`look` and `fetch` are the only ones that talk to the hub, through its own client.
"""

import contextlib
import errno
import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass
from pathlib import Path

from mlx_flux_krea.errors import FluxKreaError, ModelError, ResourceError, UsageError, printable
from mlx_flux_krea.files import sha256
from mlx_flux_krea.weights import NETWORKS

from .licence import LICENCE_NAMES

TOKENIZER_FILES = (
    "vocab.json", "merges.txt", "tokenizer.json", "spiece.model", "tokenizer_config.json", "special_tokens_map.json",
)  # fmt: skip
INCOMPLETE = ".incomplete"
WEIGHTS = (".safetensors", ".gguf")
_INDEX = ".safetensors.index.json"
_SIZES = ("config.json", "preprocessor_config.json")
_REPO_ID = re.compile(r"(?!.*(?:--|\.\.))[A-Za-z0-9][\w.-]{0,94}/[A-Za-z0-9_][\w.-]{0,95}(?<![.-])", re.ASCII)
_COMMIT, _DIGEST = re.compile("[0-9a-f]{40}"), re.compile("[0-9a-f]{40}|[0-9a-f]{64}")
_ONE_BY_ONE = ("one folder a component, or files on top", "download what you need, and name the files one by one")
_TIMEOUT = 30  # seconds without an answer
_TRIES = 6  # in a row in which not a byte comes; half a minute
_LONGEST = 300  # seconds to wait where the hub says how many; its limits are counted in windows of this length


@dataclass(frozen=True)
class File:
    """A file of a repository."""

    name: str
    size: int
    digest: str  # sha256, or what git calls the content of a small file (sha1); its name among the blobs of the cache
    here: int  # bytes of it that are in the cache


@dataclass(frozen=True)
class Listing:
    """The files of a repository that a conversion needs."""

    repo: str
    commit: str
    files: tuple[File, ...]
    gated: bool  # whoever fetches must have accepted its licence

    @property
    def to_fetch(self) -> int:
        """Bytes that are not here yet."""
        return sum(file.size - file.here for file in self.files)


def is_repo_id(source: str | Path) -> bool:
    """Whether this names a repository, OWNER/NAME, and nothing that is on this disk."""
    return bool(_REPO_ID.fullmatch(str(source))) and not os.path.lexists(source)


def look(repo: str, offline: bool = False) -> Listing:
    """What would be fetched of a repository, and what is here of it.

    Args:
        repo: OWNER/NAME.
        offline: asks the cache alone, for what it has; $HF_HUB_OFFLINE means the same.

    Raises:
        ModelError: no such repository, not allowed, not reachable, not in the cache, or nothing in it to convert.
    """
    from huggingface_hub import constants, model_info

    if offline or constants.HF_HUB_OFFLINE:
        commit, known = _in_cache(repo)
        gated = False
    else:
        with explained(repo):
            info = patiently(lambda: model_info(repo, files_metadata=True, timeout=_TIMEOUT), once=True)
        commit, gated = info.sha, bool(info.gated)
        known = {s.rfilename: (s.size, s.lfs.sha256 if s.lfs else s.blob_id) for s in info.siblings or ()}
    names = _needed(known)
    if not any(name.endswith(WEIGHTS) for name in names):
        raise ModelError(f"{repo} holds no weights that can be converted", *_ONE_BY_ONE)
    for name in names:
        size, digest = known[name]
        if type(size) is not int or not _DIGEST.fullmatch(str(digest)) or not _COMMIT.fullmatch(str(commit)):
            raise ModelError(f"the hub says neither size nor hash of {name} in {repo}", "both", "try again later")
    files = tuple(File(name, *known[name], _count_here(repo, commit, name, *known[name])) for name in names)
    return Listing(repo, commit, files, gated)


def check_access(repo: str) -> None:
    """Whether the files of a repository may be fetched by whoever is logged in.

    Raises:
        ModelError: with what to do: accept a licence, log in, or log in again.
    """
    from huggingface_hub import auth_check

    with explained(repo):
        patiently(lambda: auth_check(repo), once=True)


def login() -> str | None:
    """Who is logged in; None: nobody. Offline, nobody can say who: then it is "someone".

    Raises:
        ModelError: the hub does not know this login any more, or cannot be reached.
    """
    from huggingface_hub import constants, get_token, whoami

    if get_token() is None:
        return None
    if constants.HF_HUB_OFFLINE:
        return "someone"
    with explained("this login"):
        return str(patiently(whoami, once=True)["name"])


def cached(repo: str) -> Path | None:
    """The folder in the cache with what is here of a repository, as it was when it was last looked at."""
    folder = folder_of(repo)
    try:
        commit = (folder / "refs" / "main").read_text().strip()
    except OSError:
        return None
    snapshot = folder / "snapshots" / commit
    return snapshot if commit and snapshot.is_dir() else None


# --- the cache ---


def cache_folder() -> Path:
    """Where the hub's client keeps files, for all who use it."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def folder_of(repo: str) -> Path:
    """Of a repository in the cache, as the hub's client names it."""
    return cache_folder() / f"models--{repo.replace('/', '--')}"


def place_of(repo: str, commit: str, name: str, digest: str) -> Path:
    """Where a file is: linked, without a link, or on its way."""
    folder = folder_of(repo)
    places = (folder / "snapshots" / commit / name, folder / "blobs" / digest)
    return next((place for place in places if place.exists()), folder / "blobs" / f"{digest}{INCOMPLETE}")


def _count_here(repo: str, commit: str, name: str, size: int, digest: str) -> int:
    place = place_of(repo, commit, name, digest)
    return min(size, place.stat().st_size) if place.exists() else 0


def _in_cache(repo: str) -> tuple[str, dict[str, tuple[int, str]]]:
    """The last commit that was fetched, and size and digest of its files that are here."""
    snapshot = cached(repo)
    if snapshot is None:
        raise ModelError(
            f"there is no file or folder {repo}, and nothing of such a repository in the hub's cache",
            "a path, or what was fetched before",
            "to fetch it, leave out --offline or unset HF_HUB_OFFLINE",
        )
    paths = [path for path in snapshot.rglob("*") if path.is_file()]
    names = {path.relative_to(snapshot).as_posix(): Path(os.path.realpath(path)) for path in paths}
    found = {name: (place.stat().st_size, place.name) for name, place in names.items()}
    for name, (size, digest) in found.items():
        if not _DIGEST.fullmatch(digest):  # on a disk without links
            found[name] = (size, sha256(names[name]))
    return snapshot.name, found


# --- what is needed ---


def _needed(names: Iterable[str]) -> list[str]:
    """Of all names in a repository those that a conversion reads.

    Where the components have folders, these, and no single files beside them, which hold the same weights once more.
    Else the weight files on top; where an index lists shards, these alone.
    """
    names = sorted(names)
    folders = {folder for name in names if name.endswith(WEIGHTS) and (folder := _parent(name)) in NETWORKS}
    if not {"transformer", "model_index.json"} & {*folders, *names}:
        folders = {""}
    shards = tuple(name.removesuffix(_INDEX) + "-" for name in names if name.endswith(_INDEX))
    indexed = {_parent(name) for name in shards}
    kind = WEIGHTS[0] if any(name.endswith(WEIGHTS[0]) and _parent(name) in folders for name in names) else WEIGHTS[1]

    def is_needed(name: str) -> bool:
        folder, file = _parent(name), name.rpartition("/")[2]
        if folder in folders and file.endswith(kind):
            return folder not in indexed or name.startswith(shards)
        return (
            (folder in folders and (file.endswith(_INDEX) or file in _SIZES))
            or (folder in {"tokenizer", "tokenizer_2", *folders} and file in TOKENIZER_FILES)
            or name in ("model_index.json", "manifest.json", "scheduler/scheduler_config.json", *LICENCE_NAMES)
        )

    return [name for name in names if is_needed(name)]


def _parent(name: str) -> str:
    return name.rpartition("/")[0]


# --- patience, and what to say when it ends ---


def patiently(call: Callable, size: Callable[[], int] = lambda: 0, stop: threading.Event | None = None, *, once=False):
    """What `call` gives, in as many attempts as it takes while bytes are coming, and a few more.

    Args:
        call: to be repeated.
        size: what has come so far.
        stop: ends it.
        once: a connection that fails is not tried again.
    """
    stop, tries = stop or threading.Event(), 0
    while True:
        before = size()
        try:
            return call()
        except _failures() as error:
            tries = tries + 1 if size() == before else 1
            pause = _pause(error, tries, once)
            if pause is None or tries == _TRIES:
                raise
        if stop.wait(pause):
            raise CancelledError


def _pause(error: Exception, tries: int, once: bool) -> float | None:
    """Seconds until the next attempt; None: there is no sense in one."""
    response = getattr(error, "response", None)
    if response is None:
        return None if once or getattr(error, "errno", None) else 2 ** (tries - 1)
    if response.status_code not in (408, 429, 500, 502, 503, 504):
        return None
    told = _told(response)
    return 2 ** (tries - 1) if told is None else told if told <= _LONGEST else None


def _told(response) -> int | None:
    """How many seconds the hub asks to wait."""
    said = response.headers.get("retry-after", "")
    limits = re.search(r"\bt=(\d+)", response.headers.get("ratelimit", ""))
    return int(said) if said.isdigit() else int(limits[1]) if limits else None


def _failures() -> tuple[type[Exception], ...]:
    """What the hub's client raises; the class of its connection's own errors differs between versions."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__bases__  # one is OSError


@contextlib.contextmanager
def explained(repo: str, name: str = "") -> Iterator[None]:
    """Errors of the hub's client, and of the disk, as errors for a person."""
    from huggingface_hub import constants

    try:
        yield
    except FluxKreaError:
        raise
    except _failures() as error:
        response = getattr(error, "response", None)
        if response is not None:
            raise _refused(error, response, repo, name) from None
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(
                f"the disk of the hub's cache {cache_folder()} is full", todo="make room, and start again"
            ) from None
        if getattr(error, "errno", None):
            raise UsageError(
                f"the hub's cache {cache_folder()} cannot be written: {error.strerror}",
                todo="choose another with HF_HOME",
            ) from None
        what = f"{name} of {repo} did not come" if name else f"{repo} is not on this disk, and the hub is out of reach"
        raise ModelError(
            f"{what} ({_short(error)})",
            f"a connection to {constants.ENDPOINT}",
            "what has come stays: start again where there is a network, or with --offline where all is here",
        ) from None
    except (ValueError, KeyError) as error:  # another page in JSON, or none
        raise ModelError(
            f"what answers at {constants.ENDPOINT} is not the hub ({_short(error)})",
            todo="look after proxy and network",
        ) from None


def _refused(error: Exception, response, repo: str, name: str) -> ModelError:
    """What a status of the hub means."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError

    status, known, page = response.status_code, get_token() is not None, f"{constants.ENDPOINT}/{repo}"
    log_in = "set another HF_TOKEN" if os.environ.get("HF_TOKEN") else "log in: hf auth login"
    accepted = "an account that has accepted its licence"
    if status == 429:
        told = _told(response)
        later = f"in {told} s" if told else "later"
        return ModelError(
            "the hub has had too many requests from here (429)", todo=f"what has come stays: start again {later}"
        )
    if isinstance(error, GatedRepoError) and not known:
        return ModelError(f"{repo} is gated, and nobody is logged in", accepted, f"accept it at {page}, then {log_in}")
    if status == 401 and known:
        return ModelError("the hub does not know this login: it is wrong, expired or withdrawn", "a valid one", log_in)
    if isinstance(error, GatedRepoError) or status == 403:
        said = _short(getattr(error, "server_message", None) or "not allowed")
        return ModelError(f"{repo} is not open to this account ({said})", accepted, f"accept it at {page}, or {log_in}")
    if isinstance(error, EntryNotFoundError):
        return ModelError(f"{repo} has no {name} any more", "what it had a moment ago", "start again")
    if status in (401, 404):
        todo = f"look at {page}" if known else f"look at {page}; if it is private, {log_in}"
        return ModelError(
            f"there is neither a file or folder {repo} nor a repository on the hub", "a path, or OWNER/NAME", todo
        )
    return ModelError(f"the hub fails ({status})", todo="what has come stays: start again later")


def _short(reason) -> str:
    text = printable(" ".join(str(reason).split())) or type(reason).__name__
    return text if len(text) < 200 else f"{text[:200]}..."
