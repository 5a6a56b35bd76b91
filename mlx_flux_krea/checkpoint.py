"""What an unfinished run has reached, in a private file: latents after a step, and what else decides the rest.

    HOME/interrupted/NAME.safetensors
        latents    (B, L, C) float32 after `done` steps; not there before the first
        image      (H, W, 3) uint8: the input image, where the picture has one
        metadata   "flux-krea": {"format", "done", "total", "run"} as JSON; the command knows what is in "run"

Folder and file are for their owner alone: of a model that requires filters, latents are a picture that nobody has
judged. A file takes its name when it is complete. Whoever draws holds its lock, so that nobody else goes on with it;
the lock goes with the process, however that ends.
"""

import contextlib
import fcntl
import json
import logging
import os
import secrets
import time
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save

from . import home
from .errors import FluxKreaError, UsageError
from .files import try_lock
from .weights import read_header

logger = logging.getLogger("mlx_flux_krea")

EVERY = 1.0  # seconds: steps that follow each other faster are not all written
KEEP_DAYS = 30  # then a file that nobody went on with is deleted
_FORMAT = 2
_KEY = "flux-krea"
_LONGEST = 2**26  # characters of JSON
_KINDS = {"latents": ("F32", 3), "image": ("U8", 3)}  # types and dimensions


class Checkpoint:
    """Where a run is kept while it goes on, and from where it is gone on with.

    Attributes:
        path: of its file.
        run: what the command keeps in it, as JSON.
        done: steps that the picture at hand has behind it.
        total: of how many; 0 before the first.
        image: its input image, (H, W, 3) uint8, or None.
        is_ours: whether it was read from our own folder.
    """

    def __init__(self, run: dict):
        self.run, self.path = run, folder() / f"{secrets.token_hex(4)}.safetensors"
        self.is_ours = False
        self.done = self.total = 0
        self.image: np.ndarray | None = None
        self._latents: np.ndarray | None = None
        self._source: Path | None = None  # a file that was read, and whose latents were not yet
        self._lock: int | None = None
        self._written = 0.0
        self._failed = False

    @classmethod
    def read(cls, path: Path) -> "Checkpoint":
        """What a file holds; it may be anybody's. Its latents are read when their shape is known to be right.

        A file outside of our folder is left as it is: the run goes on in a new one.

        Raises:
            UsageError: missing, damaged, not such a file, or one whose run is still going on.
        """
        facts, shapes = _header(path)
        checkpoint = cls(facts["run"])
        if path.resolve().parent == folder().resolve():
            checkpoint.path, checkpoint.is_ours, checkpoint._lock = path.resolve(), True, _locked(path)
        checkpoint.done, checkpoint.total = facts["done"], facts["total"]
        checkpoint._source = path if "latents" in shapes else None
        checkpoint.image = _tensor(path, "image") if "image" in shapes else None
        return checkpoint

    @property
    def name(self) -> str:
        """What `find` finds it by; of a file that was read elsewhere and not written yet, that file's path."""
        return self.path.stem if self.path.exists() else str(self._source)

    @property
    def exists(self) -> bool:
        """Whether there is anything to go on from."""
        return self.path.exists() or self._source is not None

    @property
    def is_denoised(self) -> bool:
        """Whether only decoding is left."""
        return bool(self.total) and self.done == self.total

    def latents(self, shape: tuple[int, ...], total: int) -> np.ndarray | None:
        """Latents to go on from, float32; None: from the beginning.

        Args:
            shape: that they must have.
            total: steps that the picture takes.

        Raises:
            UsageError: they are of another picture, or hold NaN or infinities.
        """
        if self._latents is None and self._source is None:
            return None
        if self._latents is None:
            found = _header(self._source)[1].get("latents")
            if found != tuple(shape) or self.total != total:
                what = f"{self._source} holds latents {found} of {self.total} steps"
                raise UsageError(what, f"{tuple(shape)} of {total}", "it was damaged, or made for another picture")
            self._latents = _tensor(self._source, "latents")
        if not np.isfinite(self._latents).all():
            raise UsageError(f"{self._source} holds NaN or infinities", "finite latents", "it was damaged")
        return self._latents

    def reached(self, done: int, total: int, latents: np.ndarray) -> None:
        """Takes in the latents after a step; writes them at once after the last step, else at most once a second."""
        self.done, self.total, self._latents = done, total, latents
        if done == total or time.monotonic() - self._written >= EVERY:
            self.write()

    def begin(self, run: dict, image: np.ndarray | None = None) -> None:
        """A new picture of the run, from its beginning.

        Args:
            run: as the attribute.
            image: (H, W, 3) uint8.
        """
        self.run, self.image, self.done, self.total, self._latents, self._source = run, image, 0, 0, None, None
        self.write()

    def write(self) -> None:
        """Writes all of it. Where that fails the run goes on, and a note says that it cannot be resumed."""
        if self._failed:
            return
        try:
            if self._latents is None and self._source is not None:  # it was read, and is as it was
                return
            self._write()
        except (OSError, FluxKreaError) as error:
            self._failed = True
            logger.warning("if this run is interrupted it cannot be resumed: %s", getattr(error, "strerror", error))
        self._written = time.monotonic()

    def close(self) -> None:
        """Lets others go on with it."""
        if self._lock is not None:
            os.close(self._lock)
        self._lock = None

    def remove(self) -> None:
        """Deletes the file: there is nothing left to do."""
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)
        self.close()

    def _write(self) -> None:
        facts = {"format": _FORMAT, "done": self.done, "total": self.total, "run": self.run}
        text = json.dumps(facts)
        if len(text) > _LONGEST:
            raise UsageError("it has too much text")
        tensors = {"latents": self._latents, "image": self.image}
        encoded = save({name: array for name, array in tensors.items() if array is not None}, {_KEY: text})
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path.parent.chmod(0o700)
        partial = self.path.with_name(f".{self.path.stem}.partial")
        descriptor = os.open(partial, os.O_CREAT | os.O_TRUNC | os.O_RDWR | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with open(descriptor, "wb", closefd=False) as file:
                file.write(encoded)
            os.replace(partial, self.path)
        except BaseException:
            os.close(descriptor)
            partial.unlink(missing_ok=True)
            raise
        self.close()
        self._lock = descriptor


def folder() -> Path:
    """Where files of unfinished runs lie."""
    return home.path(home.CHECKPOINTS)


def unfinished() -> list[Path]:
    """Files that can be gone on with, newest first. What is too old, or was left half-written, is deleted."""
    found = {}
    for path in [*folder().glob(".*.partial"), *folder().glob("*.safetensors")]:
        with contextlib.suppress(OSError, UsageError):
            lock, seconds = _locked(path), path.stat().st_mtime
            if path.suffix == ".partial" or time.time() - seconds > KEEP_DAYS * 86400:
                path.unlink(missing_ok=True)
            else:
                found[path] = seconds
            os.close(lock)
    return sorted(found, key=found.get, reverse=True)


def find(name: str | None) -> Path:
    """The file meant by a path or a name; None: the newest.

    Raises:
        UsageError: there is none.
    """
    if name is None:
        if not (paths := unfinished()):
            raise UsageError(f"there is no unfinished run in {folder()}", "", "name a file")
        return paths[0]
    inside = folder() / f"{name}.safetensors"
    return inside if os.sep not in name and inside.exists() else Path(os.path.expanduser(name))


def _locked(path: Path) -> int:
    """The file, open and locked."""
    if (descriptor := try_lock(path, create=False)) is not None:
        return descriptor
    raise UsageError(f"the run of {path} is still going on", "one that has ended", "wait for it, or stop it")


def _header(path: Path) -> tuple[dict, dict[str, tuple[int, ...]]]:
    """The JSON and the shapes of a file, when both are such as we write them."""
    whole = "a file that an unfinished run left behind"
    try:
        infos, metadata = read_header(path)
        if len(metadata.get(_KEY, "")) > _LONGEST:
            raise ValueError
        facts = json.loads(metadata[_KEY])
    except FluxKreaError as error:
        raise UsageError(error.found, whole) from None
    except (KeyError, ValueError, RecursionError):
        raise UsageError(f"{path} does not say what it is", whole) from None
    shapes = {name: info.shape for name, info in infos.items()}
    kinds = {name: (info.dtype, len(info.shape)) for name, info in infos.items()}
    counts = [facts.get(name) for name in ("format", "done", "total")] if isinstance(facts, dict) else []
    sound = (
        kinds.items() <= _KINDS.items()
        and [type(count) for count in counts] == [int] * 3
        and 0 <= counts[1] <= counts[2]
        and ("latents" in kinds) == (counts[1] > 0)
        and isinstance(facts.get("run"), dict)
    )
    height, width, colours = shapes.get("image", (1, 1, 3))
    if not sound or colours != 3 or not 0 < height * width <= 2 * Image.MAX_IMAGE_PIXELS:
        raise UsageError(f"{path} holds something else", whole)
    if counts[0] != _FORMAT:
        raise UsageError(f"{path} has format {counts[0]}", f"format {_FORMAT}", "go on with the version that wrote it")
    return facts, shapes


def _tensor(path: Path, name: str) -> np.ndarray:
    with safe_open(path, "numpy") as file:
        return file.get_tensor(name)
