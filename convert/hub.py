"""The Hugging Face hub: which files of a repository are needed, and how they come here. Nothing else talks to it.

    listing = look("black-forest-labs/FLUX.1-Krea-dev")     sizes and hashes; nothing is fetched
    folder = fetch(listing, listing.licences)               some files of it, or all

Files are kept in the hub's own cache, where other programs find them too. What has come of a file lies there as
blobs/DIGEST.incomplete; it goes on from its last byte, and gets its name when its hash is the one that was announced.
(The hub's own client starts again, after 9 of 10 GB too.) Plain HTTP serves every repository and can be cut anywhere.

`convert` asks for more: `outline` makes a folder that looks like the repository, with real small files, and weight
files that are of their size but have only their headers. What a conversion needs to know is in there. Then `fetching`
puts each file into its place, while the converter works on those that have come.
"""

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import struct
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from mlx_flux_krea.errors import ModelError, ResourceError, UsageError, printable
from mlx_flux_krea.weights import NETWORKS

from .licence import LICENCE_NAMES
from .write import sha256

TOKENIZER_FILES = (
    "vocab.json", "merges.txt", "tokenizer.json", "spiece.model", "tokenizer_config.json", "special_tokens_map.json",
)  # fmt: skip
_WEIGHTS = (".safetensors", ".gguf")
_INDEX = ".safetensors.index.json"
_TRIES = 6  # in a row in which not a byte comes
_LONGEST = 300  # seconds to wait where the hub says how many; the window of its own limits
_GGUF_HEADER = 2**24  # bytes; the vocabulary of a T5 is in there, with 2 MB


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
    licences: tuple[str, ...]  # names of the files with its text

    @property
    def size(self) -> int:
        """Of all files, in bytes."""
        return sum(file.size for file in self.files)

    @property
    def to_fetch(self) -> int:
        """Bytes that are not here yet."""
        return sum(file.size - file.here for file in self.files)


def is_repo_id(source: str | Path) -> bool:
    """Whether this names a repository, OWNER/NAME, and nothing that is on this disk."""
    part = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
    return bool(re.fullmatch(f"{part}/{part}", str(source))) and not os.path.lexists(source)


def look(repo: str, offline: bool = False) -> Listing:
    """What would be fetched of a repository, and what is here of it.

    Args:
        repo: OWNER/NAME.
        offline: asks the cache alone, for what it has; $HF_HUB_OFFLINE means the same.

    Raises:
        ModelError: no such repository, not allowed, not reachable, not in the cache, or nothing in it to convert.
    """
    raise NotImplementedError


def check_access(repo: str) -> None:
    """Whether the files of a repository may be fetched by whoever is logged in.

    Raises:
        ModelError: with what to do: accept a licence, log in, or log in again.
    """
    raise NotImplementedError


def fetch(
    listing: Listing,
    names: Iterable[str] | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Path:
    """Brings files into the hub's cache.

    Args:
        listing: of the repository.
        names: of files; None: all.
        progress: called with "fetching", the bytes that are here and how many there will be.

    Returns:
        The folder in the cache that holds the files of this commit.

    Raises:
        ModelError: not allowed, not reachable, gone half-way, or with another hash than was announced.
        ResourceError: the disk is full.
    """
    raise NotImplementedError


def cached(repo: str) -> Path | None:
    """The folder in the cache with what is here of a repository."""
    raise NotImplementedError


def login() -> str | None:
    """Who is logged in; None: nobody. Offline, nobody can say who: then it is "someone".

    Raises:
        ModelError: the hub does not know this login any more, or cannot be reached.
    """
    raise NotImplementedError
