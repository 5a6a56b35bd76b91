"""The Hugging Face hub: lists the files that a conversion needs, finds them in the cache, explains errors.

    listing = look("black-forest-labs/FLUX.1-Krea-dev")     names, sizes and hashes; `fetch` fetches the files
    login()                                                 the account that is logged in

The hub is reached only from here and from `fetch.py`, through its own client.
"""

import contextlib
import errno
import os
import re
import ssl
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import CancelledError
from dataclasses import dataclass
from pathlib import Path

from mlx_flux_krea.beside import is_licence, of_json
from mlx_flux_krea.errors import FluxKreaError, ModelError, ResourceError, UsageError, printable
from mlx_flux_krea.files import MOST_BYTES, read_small, sha256
from mlx_flux_krea.weights import COMPONENTS, NETWORKS

from .sets import key_of, stem

TOKENIZER_FILES = (
    "vocab.json", "merges.txt", "tokenizer.json", "spiece.model", "tokenizer_config.json", "special_tokens_map.json",
)  # fmt: skip
INCOMPLETE = ".incomplete"
WEIGHTS = (".safetensors", ".sft", ".gguf")
_INDEX = ".safetensors.index.json"
_STATED = ("license", "license_name", "license_link", "base_model")  # fields of a page, and below tags of it
_TAGS = ("license:", "base_model:")
_SIZES = ("config.json", "preprocessor_config.json")
_REPO_ID = re.compile(r"(?!.*(?:--|\.\.))[A-Za-z0-9][\w.-]{0,94}/[A-Za-z0-9_][\w.-]{0,95}(?<![.-])", re.ASCII)
_COMMIT, _DIGEST = re.compile("[0-9a-f]{40}"), re.compile("[0-9a-f]{40}|[0-9a-f]{64}")
_ONE_BY_ONE = ("one folder a component, or files on top", "download the files that you need, and name them one by one")
_TIMEOUT = 30  # seconds without an answer
# Errors of the hub's client that no further attempt heals; their modules have other names in other versions.
_LASTING = ("DecodingError", "InvalidURL", "LocalProtocolError", "TooManyRedirects", "UnsupportedProtocol")
_TRIES = 6  # attempts in a row without a byte; half a minute
_LARGEST = 2**43  # bytes of a file of weights
_LONGEST = 300  # longest wait in seconds that the hub may ask for: the length of its rate-limit windows


@dataclass(frozen=True)
class HubFile:
    """A file of a repository."""

    name: str
    size: int
    digest: str  # sha256, or git's sha1 of a small file; its name in the cache's blobs
    here: int  # bytes in the cache


@dataclass(frozen=True)
class Listing:
    """The files of a repository that a conversion needs."""

    repo: str
    commit: str
    files: tuple[HubFile, ...]
    gated: bool  # its licence must be accepted before fetching
    licences: tuple[str, ...] = ()  # ids that its page states

    @property
    def to_fetch(self) -> int:
        """Bytes to fetch."""
        return sum(file.size - file.here for file in self.files)


def is_repo_id(source: str | Path) -> bool:
    """Tells if a source names a repository, OWNER/NAME, or a file of one, OWNER/NAME:FILE, and is no existing path."""
    repo, file = split_id(source)
    is_file = not file or (not {"", ".", ".."} & {*file.split("/")} and file.isprintable())
    return bool(_REPO_ID.fullmatch(repo)) and is_file and not os.path.lexists(source)


def split_id(source: str | Path) -> tuple[str, str]:
    """Returns OWNER/NAME and FILE; "": all files that are needed."""
    repo, _, file = str(source).partition(":")
    return repo, file


def look(repo: str, offline: bool = False, wanted: Callable[[list[str]], list[str]] | None = None) -> Listing:
    """Lists the files of a repository that a conversion needs, with their bytes in the cache.

    Args:
        repo: OWNER/NAME, or OWNER/NAME:FILE for one file alone, with the other parts of its set.
        offline: use only the cache; $HF_HUB_OFFLINE means the same.
        wanted: selects other files among all names.

    Raises:
        ModelError: no such repository, access denied, hub not reachable, not in the cache, or nothing to convert.
    """
    repo, file = split_id(repo)
    if offline or is_offline():
        commit, known = _in_cache(repo, "leave out `offline`" if offline else "unset HF_HUB_OFFLINE")
        gated, licences = False, ()
    else:
        info = _info(repo)
        commit, gated, licences = info.sha, bool(info.gated), _licences(info)
        known = _files(info)
    sizes = {name: size for name, (size, _) in known.items() if type(size) is int}
    names = wanted(sorted(known)) if wanted else _of_one(repo, file, known) if file else _needed(known, sizes)
    if not any(is_weights(name) for name in names):
        raise ModelError(f"{repo} holds no weights that can be converted", *_ONE_BY_ONE)
    for name in names:
        size, digest = known[name]
        if type(size) is not int or not _DIGEST.fullmatch(str(digest)) or not _COMMIT.fullmatch(str(commit)):
            raise ModelError(f"the hub gives no size or no hash of {name} in {repo}", "both", "try again later")
        if not 0 <= size <= (_LARGEST if is_weights(name) else MOST_BYTES):
            raise ModelError(
                f"the hub gives a size of {name} in {repo} that it cannot have", "bytes", "try again later"
            )
    files = tuple(HubFile(name, *known[name], _count_here(repo, commit, name, *known[name])) for name in names)
    return Listing(repo, commit, files, gated, licences)


def stated_hashes(repo: str) -> set[str]:
    """Returns the sha256 of every weight file of a repository, as the hub states them.

    Raises:
        ModelError: the hub cannot be reached, is not to be asked, or denies access.
    """
    if is_offline():
        raise ModelError("the hub is not to be asked (HF_HUB_OFFLINE)")
    files = _files(_info(repo))
    return {str(digest) for name, (_, digest) in files.items() if is_weights(name)}


def _info(repo: str):
    """Asks the hub about a repository. Its answer may be anything: whatever cannot be read as one is an error.

    Raises:
        ModelError: no such repository, access denied, hub not reachable, or an answer that is none.
    """
    from huggingface_hub import model_info

    try:
        with explained(repo):
            return patiently(lambda: model_info(repo, files_metadata=True, timeout=_TIMEOUT), once=True)
    except (TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
        found = f"the hub's answer about {repo} cannot be read: {type(error).__name__}"
        raise ModelError(found, "the facts of a repository", "try again later") from None


def _files(info) -> dict[str, tuple[int, str]]:
    """Returns size and hash of every file in an answer whose name could be a file's in a repository."""
    files = {}
    for sibling in info.siblings or ():
        name = sibling.rfilename
        digest = getattr(sibling.lfs, "sha256", None) if sibling.lfs else sibling.blob_id
        if isinstance(name, str) and "\0" not in name and ".." not in name.split("/") and not name.startswith("/"):
            files[name] = (sibling.size, digest)
    return files


def _licences(info) -> tuple[str, ...]:
    """Returns the licence ids that a repository's page states."""
    card, tags = info.card_data, info.tags if isinstance(info.tags, list) else []
    stated = [card.get(key) for key in _STATED] if hasattr(card, "get") else []
    stated += [tag.partition(":")[2] for tag in tags if isinstance(tag, str) and tag.startswith(_TAGS)]
    return tuple(dict.fromkeys(text for _, text in of_json(stated)))


def check_access(repo: str) -> None:
    """Checks that the account that is logged in may fetch the files of a repository.

    Raises:
        ModelError: it may not; the next step is to accept a licence, log in, or log in again.
    """
    from huggingface_hub import auth_check

    with explained(repo, gated=True):
        patiently(lambda: auth_check(repo), once=True)


def login() -> str | None:
    """Returns the account that is logged in; None: there is none. Offline, where its name is unknown: "someone".

    Raises:
        ModelError: the login is not valid any more, or the hub cannot be reached.
    """
    from huggingface_hub import constants, get_token, whoami

    if get_token() is None:
        return None
    if constants.HF_HUB_OFFLINE:
        return "someone"
    with explained("this login"):
        return str(patiently(whoami, once=True)["name"])


def cached(repo: str) -> Path | None:
    """Returns the folder in the cache with the last fetched commit of a repository; None: there is none."""
    folder = folder_of(repo)
    try:
        commit = read_small(folder / "refs" / "main", most=1000).decode().strip()
    except (OSError, UnicodeDecodeError):
        return None
    snapshot = folder / "snapshots" / commit
    return snapshot if commit and os.path.isdir(snapshot) else None


# --- the cache ---


def cache_folder() -> Path:
    """Returns the cache of the hub's client, which all its users share."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def folder_of(repo: str) -> Path:
    """Returns the folder of a repository in the cache, as the hub's client names it."""
    return cache_folder() / f"models--{repo.replace('/', '--')}"


def place_of(repo: str, commit: str, name: str, digest: str) -> Path:
    """Returns the place of a file in the cache: its link, its blob, or its incomplete blob."""
    folder = folder_of(repo)
    places = (folder / "snapshots" / commit / name, folder / "blobs" / digest)
    return next((place for place in places if place.exists()), folder / "blobs" / f"{digest}{INCOMPLETE}")


def _count_here(repo: str, commit: str, name: str, size: int, digest: str) -> int:
    place = place_of(repo, commit, name, digest)
    return min(size, place.stat().st_size) if place.exists() else 0


def is_offline() -> bool:
    """Returns True where the hub's client is told by $HF_HUB_OFFLINE to leave the network alone."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _in_cache(repo: str, to_fetch: str) -> tuple[str, dict[str, tuple[int, str]]]:
    """Returns the last fetched commit, with size and digest of its files in the cache."""
    snapshot = cached(repo)
    if snapshot is None:
        raise ModelError(
            f"there is no file or folder {repo}, and nothing of such a repository in the hub's cache",
            "a path, or a repository that was fetched before",
            f"to fetch it, {to_fetch}",
        )
    paths = [path for path in snapshot.rglob("*") if path.is_file()]
    names = {path.relative_to(snapshot).as_posix(): Path(os.path.realpath(path)) for path in paths}
    files = {name: (place.stat().st_size, place.name) for name, place in names.items()}
    for name, (size, digest) in files.items():
        if not _DIGEST.fullmatch(digest):  # on a disk without links
            files[name] = (size, sha256(names[name]))
    return snapshot.name, files


# --- files that a conversion needs ---


def is_weights(name: str) -> bool:
    """Tells if a file has a name of weights that can be converted."""
    return name.lower().endswith(WEIGHTS)


def _needed(names: Iterable[str], sizes: Mapping[str, int] | None = None) -> list[str]:
    """Selects the names in a repository that a conversion reads.

    If the components have folders, their files, and no single files beside them, which hold the same weights again.
    Else the weight files at the top; if an index lists shards, only these. Of variants, the largest.
    """
    names = sorted(names)
    folders = {folder for name in names if is_weights(name) and (folder := _parent(name)) in NETWORKS}
    if "transformer" in folders:  # such a model may have an encoder of pictures, which it does not read itself
        folders &= COMPONENTS.keys()
    if not {"transformer", "model_index.json"} & {*folders, *names}:
        folders = {""}
    shards = tuple(name.removesuffix(_INDEX) + "-" for name in names if name.endswith(_INDEX))
    indexed = {_parent(name) for name in shards}
    is_gguf_only = not any(is_weights(n) and not n.lower().endswith(".gguf") and _parent(n) in folders for n in names)

    def is_wanted(name: str) -> bool:
        folder = _parent(name)
        if folder not in folders or not is_weights(name) or name.lower().endswith(".gguf") != is_gguf_only:
            return False
        return folder not in indexed or name.startswith(shards)

    def is_beside(name: str) -> bool:
        folder, file = _parent(name), _base(name)
        return (
            (folder in folders and (file.endswith(_INDEX) or file in _SIZES))
            or (folder in {"tokenizer", "tokenizer_2", *folders} and file in TOKENIZER_FILES)
            or name in ("model_index.json", "manifest.json", "scheduler/scheduler_config.json")
            or (name == "feature_extractor/preprocessor_config.json" and "image_encoder" in folders)
            or is_licence(name)
        )

    weights = _largest_variants([name for name in names if is_wanted(name)], sizes or {})
    return [name for name in names if name in weights or is_beside(name)]


def _largest_variants(names: list[str], sizes: Mapping[str, int]) -> set[str]:
    """Returns the files of the largest variant of every model among the names."""
    variants: dict[tuple, dict[tuple, list[str]]] = {}
    for name in names:
        folder, file = _parent(name), _base(name)
        variants.setdefault((folder, stem(file)), {}).setdefault(key_of(file) or (file,), []).append(name)
    largest = (max(sets.values(), key=lambda one: sum(sizes.get(n, 0) for n in one)) for sets in variants.values())
    return {name for one in largest for name in one}


def _of_one(repo: str, file: str, names: Iterable[str]) -> list[str]:
    """Selects one file, the other parts of its set, and the small files beside it.

    Raises:
        ModelError: there is no such file.
    """
    folder, name = _parent(file), _base(file)
    weights = [
        n for n in names if n == file or (_parent(n) == folder and key_of(name) and key_of(_base(n)) == key_of(name))
    ]
    if not weights:
        known = ", ".join(n for n in sorted(names) if is_weights(n)) or "none"
        raise ModelError(f"{repo} holds no file {file}", f"one of {known}")
    beside = [n for n in names if _parent(n) in (folder, "") and _base(n) in (*_SIZES, *TOKENIZER_FILES)]
    return sorted({*weights, *beside, *(n for n in names if is_licence(n) or n == "model_index.json")})


def _base(name: str) -> str:
    return name.rpartition("/")[2]


def _parent(name: str) -> str:
    return name.rpartition("/")[0]


# --- attempts, and their errors ---


def patiently(call: Callable, size: Callable[[], int] = lambda: 0, stop: threading.Event | None = None, *, once=False):
    """Returns the result of `call`, repeated after failures as long as bytes arrive, and a few times more.

    Args:
        call: the function to repeat.
        size: returns the bytes that have arrived so far.
        stop: ends the attempts.
        once: do not repeat a failed connection.
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
    """Returns the seconds until the next attempt; None: another attempt is useless."""
    response = getattr(error, "response", None)
    if response is None:
        return None if once or getattr(error, "errno", None) or _is_lasting(error) else 2 ** (tries - 1)
    if response.status_code not in (408, 429, 500, 502, 503, 504):
        return None
    asked = _asked_pause(response)
    return 2 ** (tries - 1) if asked is None else asked if asked <= _LONGEST else None


def _is_lasting(error: BaseException | None) -> bool:
    """Tells if a failure, or what caused it, is one that the next attempt meets again: a certificate, an address."""
    while error is not None:
        if isinstance(error, ssl.SSLCertVerificationError) or type(error).__name__ in _LASTING:
            return True
        error = error.__cause__ or error.__context__
    return False


def _asked_pause(response) -> int | None:
    """Returns the seconds that the hub asks to wait; None: it does not ask."""
    seconds = response.headers.get("retry-after", "")
    limits = re.search(r"\bt=(\d+)", response.headers.get("ratelimit", ""))
    return int(seconds) if seconds.isdigit() else int(limits[1]) if limits else None


def _failures() -> tuple[type[Exception], ...]:
    """Returns the errors of the hub's client; its connection errors have other classes in other versions."""
    from huggingface_hub.errors import HfHubHTTPError

    return HfHubHTTPError.__bases__  # one is OSError


@contextlib.contextmanager
def explained(repo: str, name: str = "", gated: bool = False) -> Iterator[None]:
    """Turns errors of the hub's client, and of the disk, into errors for the user.

    Args:
        repo: the repository.
        name: the file, if there is one.
        gated: the hub has said that its licence must be accepted, and need not say so again when it refuses.
    """
    from huggingface_hub import constants

    try:
        yield
    except FluxKreaError:
        raise
    except _failures() as error:
        response = getattr(error, "response", None)
        if response is not None:
            raise _refused(error, response, repo, name, gated) from None
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            raise ResourceError(
                f"the disk of the hub's cache {cache_folder()} is full", todo="make room, and start again"
            ) from None
        if getattr(error, "errno", None):
            raise UsageError(
                f"the hub's cache {cache_folder()} cannot be written: {getattr(error, 'strerror', error)}",
                todo="choose another with HF_HOME",
            ) from None
        failed = (
            f"{name} of {repo} was not fetched" if name else f"{repo} is not on this disk, and the hub is out of reach"
        )
        raise ModelError(
            f"{failed} ({_short(error)})",
            f"a connection to {constants.ENDPOINT}",
            "fetched files are kept: connect, and start again"
            + ", or use them with `offline`" * (cached(repo) is not None),
        ) from None
    except (ValueError, KeyError) as error:  # not the hub's JSON
        raise ModelError(
            f"the server at {constants.ENDPOINT} is not the hub ({_short(error)})",
            todo="check proxy and network",
        ) from None


def _refused(error: Exception, response, repo: str, name: str, gated: bool) -> ModelError:
    """Returns the error for a status of the hub."""
    from huggingface_hub import constants, get_token
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError

    status, known, page = response.status_code, get_token() is not None, f"{constants.ENDPOINT}/{repo}"
    log_in = "set another HF_TOKEN" if os.environ.get("HF_TOKEN") else "log in: hf auth login"
    accepted = "an account that has accepted its licence"
    if status == 429:
        seconds = _asked_pause(response)
        later = f"in {seconds} s" if seconds else "later"
        found = "the hub has had too many requests from here (429)"
        return ModelError(found, todo=f"fetched files are kept: start again {later}")
    is_gated = isinstance(error, GatedRepoError) or (gated and status == 401)
    if is_gated and not known:
        return ModelError(f"{repo} is gated, and nobody is logged in", accepted, f"accept it at {page}, then {log_in}")
    if status == 401 and known:
        return ModelError("the hub does not know this login: it is wrong, expired or withdrawn", "a valid one", log_in)
    if isinstance(error, GatedRepoError) or status == 403:
        reason = _short(getattr(error, "server_message", None) or "not allowed")
        return ModelError(
            f"{repo} is not open to this account ({reason})", accepted, f"accept it at {page}, or {log_in}"
        )
    if isinstance(error, EntryNotFoundError):
        return ModelError(f"{repo} has no {name} any more", "the file that was listed a moment ago", "start again")
    if status == 401 and "x-error-code" not in response.headers:
        found = f"the hub shows {repo} to nobody who is not logged in: it is gated, private, or not there"
        return ModelError(found, accepted, f"accept it at {page}, then {log_in}")
    if status in (401, 404):
        todo = f"look at {page}" if known else f"look at {page}; if it is private, {log_in}"
        return ModelError(
            f"there is neither a file or folder {repo} nor a repository on the hub", "a path, or OWNER/NAME", todo
        )
    return ModelError(f"the hub fails ({status})", todo="fetched files are kept: start again later")


def _short(reason) -> str:
    text = printable(" ".join(str(reason).split())) or type(reason).__name__
    return text if len(text) < 200 else f"{text[:200]}..."
