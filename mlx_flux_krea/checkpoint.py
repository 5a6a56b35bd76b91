"""The private file of an unfinished run: latents after a step, and everything that decides the remaining steps.

    HOME/interrupted/NAME.safetensors
        latents    (B, L, C) float32 after `done` steps; not there before the first
        NAME       (H, W, 3) or (H, W) uint8: each input image, mask or alpha channel, of which the picture has any
        state.NAME float32, or numbers of 16 bits as uint16: arrays of the solver and of the step cache, of 3 axes or 1
        metadata   "flux-krea": {"format", "done", "total", "filters", "run"} as JSON: "filters" is "required" where the
                   pictures must be judged before anybody sees them, else "none"; the command defines "run"

Folder and file are for their owner alone: of a model that requires filters, latents are a picture that nobody has
judged. A file takes its name when it is complete. The process that runs holds its lock, so that no other resumes it;
the lock ends with the process, however that ends.
"""

import contextlib
import fcntl
import json
import logging
import os
import secrets
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save

from . import home, macos
from .errors import FluxKreaError, ResourceError, UsageError
from .files import identity, parse_json, sync, try_lock
from .weights import read_header

logger = logging.getLogger("mlx_flux_krea")

EVERY = 1.0  # seconds: steps that follow each other faster are not all written
KEEP_DAYS = 30  # then a file that nobody resumed is deleted,
KEEP = 20  # unless it is one of so many newest: a clock that jumps makes every file old
_FORMAT = 2
_KEY = "flux-krea"
_LISTED = "flux-krea resume --list lists them"
_LONGEST = 2**26  # characters of JSON
_LATENTS = ("F32", 3)  # type and dimensions
_IMAGES = (("U8", 2), ("U8", 3))
_MOST_ARRAYS = 32  # and so many more for each picture of a batch
_STATE = "state."  # of a name
_STATES = (("F32", 1), ("F32", 3), ("U16", 3))


class Checkpoint:
    """The file that a run is saved in while it lasts, and resumed from.

    Attributes:
        path: of its file.
        run: the command's description of the run, as JSON.
        done: finished steps of the current picture.
        total: all its steps; 0 before the first.
        images: its input images by name, (H, W, 3) or (H, W) uint8.
        filters: "required": its latents are pictures that must be judged; "none"; or "" in files of earlier versions,
            and before the pipeline has set it.
        is_ours: True where it was read from our own folder.
    """

    __slots__ = (
        "_failed",
        "_latents",
        "_lock",
        "_source",
        "_state",
        "_written",
        "done",
        "filters",
        "images",
        "is_ours",
        "path",
        "run",
        "total",
    )  # fmt: skip  # and no other, so that no method of one object can be replaced by another

    def __init__(self, run: dict):
        self.run, self.path = run, folder() / f"{secrets.token_hex(4)}.safetensors"
        self.is_ours = False
        self.filters = ""
        self.done = self.total = 0
        self.images: dict[str, np.ndarray] = {}
        self._latents: np.ndarray | None = None
        self._state: dict[str, np.ndarray] = {}
        self._source: Path | None = None  # a file that was opened, and its latents not yet read
        self._lock: int | None = None
        self._written = 0.0
        self._failed = False

    @classmethod
    def read(cls, path: Path) -> "Checkpoint":
        """Reads a file, which may be anybody's. Its latents are read once their shape is known to be right.

        A file outside of our folder is left as it is: the run continues in a new one.

        Raises:
            UsageError: missing, damaged, another kind of file, or one whose run has not ended.
        """
        facts, shapes = _header(path)
        checkpoint = cls(facts["run"])
        if identity(path.resolve().parent) == identity(folder()):
            checkpoint.path, checkpoint.is_ours, checkpoint._lock = path.resolve(), True, _locked(path)
        checkpoint.done, checkpoint.total = facts["done"], facts["total"]
        checkpoint.filters = facts.get("filters", "")
        checkpoint._source = path if "latents" in shapes else None
        checkpoint.images = {name: _tensor(path, name) for name in shapes if _is_image(name)}
        return checkpoint

    @property
    def name(self) -> str:
        """The name that `find` takes; for a file outside of our folder, and not written yet, that file's path."""
        return self.path.stem if self.path.exists() else str(self._source)

    @property
    def exists(self) -> bool:
        """True where there is a file to resume from."""
        return self.path.exists() or self._source is not None

    @property
    def has_latents(self) -> bool:
        """True where there are latents to continue from."""
        return self._latents is not None or self._source is not None

    @property
    def is_denoised(self) -> bool:
        """True where only decoding is left."""
        return bool(self.total) and self.done == self.total

    def latents(self, shape: tuple[int, ...], total: int) -> np.ndarray | None:
        """Returns latents to continue from, float32; None: the picture starts at its first step.

        Args:
            shape: that they must have.
            total: steps that the picture takes.

        Raises:
            UsageError: they are of another picture, or hold NaN or infinities.
        """
        if self._latents is None and self._source is not None:
            found = _header(self._source)[1].get("latents")
            if found != tuple(shape) or self.total != total:
                held = f"{self._source} holds latents {found} of {self.total} steps"
                raise UsageError(held, f"{tuple(shape)} of {total}", "it was damaged, or made for another picture")
            self._latents = _tensor(self._source, "latents")
        if self._latents is not None and (self._latents.shape, self.total) != (tuple(shape), total):
            raise self.damaged()
        if self._latents is not None and not np.isfinite(self._latents).all():
            raise UsageError(f"{self._source} holds NaN or infinities", "finite latents", "it was damaged")
        return self._latents

    def state(self) -> dict[str, np.ndarray]:
        """Returns the arrays of `save_step`, by name."""
        if not self._state and self._source is not None:
            names = [name for name in _header(self._source)[1] if name.startswith(_STATE)]
            self._state = {name.removeprefix(_STATE): _tensor(self._source, name) for name in names}
        return self._state

    def damaged(self) -> UsageError:
        """Returns the error for arrays that cannot be those of this run."""
        held = f"{self._source or self.path} holds the steps of another run"
        return UsageError(held, "those that `generate` saved", "it was damaged: start the run again")

    def save_step(
        self, done: int, total: int, latents: np.ndarray, state: Mapping[str, np.ndarray] | None = None
    ) -> None:
        """Takes the latents after a step; writes them at once after the last step, else at most once a second.

        Args:
            done: steps, this one included.
            total: of the picture.
            latents: (B, L, C) float32.
            state: arrays that the next steps depend on, (N,) or (B, L, C) float32 or uint16.
        """
        self.done, self.total, self._latents, self._state = done, total, latents, dict(state or {})
        if done == total or time.monotonic() - self._written >= EVERY:
            self.write()

    def start_picture(
        self, run: dict, images: Mapping[str, np.ndarray] | None = None, begun: "Checkpoint | None" = None
    ) -> None:
        """Starts the next picture of the run.

        Args:
            run: as the attribute.
            images: as the attribute; None: it has none.
            begun: holds the first steps of the picture; None: they are not computed yet.
        """
        self.run, self.images, self.done, self.total = run, dict(images or {}), 0, 0
        self._latents, self._source, self._state = None, None, {}
        if begun is not None and begun._source is not None:
            self.done, self.total, self.filters = begun.done, begun.total, begun.filters
            self._latents, self._state = _tensor(begun._source, "latents"), begun.state()
        self.write()

    def copy(self, name: str, run: dict, images: Mapping[str, np.ndarray]) -> None:
        """Writes the steps of the current picture into a file of their own, as an unfinished run.

        Args:
            name: of the file.
            run: the command's description of that run.
            images: its images.

        Raises:
            ResourceError: the file cannot be written.
        """
        other = Checkpoint(run)
        other.path, other.filters, other.images = folder() / f"{name}.safetensors", self.filters, dict(images)
        other.done, other.total, other._latents = self.done, self.total, self._latents
        other._state = {key: array for key, array in self._state.items() if key != "predicted"}
        try:
            other._write()
        except OSError as error:
            raise ResourceError(f"{other.path} cannot be written: {error.strerror}", "", "make room there") from None
        finally:
            other.close()

    def write(self) -> None:
        """Writes the file. If that fails the run continues, and a note says that it cannot be resumed."""
        if self._failed:
            return
        try:
            if self._latents is None and self._source is not None:  # nothing has changed since it was read
                return
            self._write()
        except (OSError, FluxKreaError) as error:
            self._failed = True
            logger.warning("if this run is interrupted it cannot be resumed: %s", getattr(error, "strerror", error))
        self._written = time.monotonic()

    def close(self) -> None:
        """Releases the lock, so that others may resume it."""
        if self._lock is not None:
            os.close(self._lock)
        self._lock = None

    def remove(self) -> None:
        """Deletes the file, when nothing is left to do."""
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)
        self.close()

    def _write(self) -> None:
        facts = {"format": _FORMAT, "done": self.done, "total": self.total, "run": self.run}
        facts |= {"filters": self.filters} if self.filters else {}
        text = json.dumps(facts)
        if len(text) > _LONGEST:
            raise UsageError("the run has too much text")
        latents = {} if self._latents is None else {"latents": self._latents}
        state = {f"{_STATE}{name}": array for name, array in (self._state if latents else {}).items()}
        arrays = {name: np.ascontiguousarray(array) for name, array in (latents | state | self.images).items()}
        encoded = save(arrays, {_KEY: text})
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path.parent.chmod(0o700)
        macos.exclude(self.path.parent)
        partial = self.path.with_name(f".{self.path.stem}.partial")
        descriptor = os.open(partial, os.O_CREAT | os.O_TRUNC | os.O_RDWR | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with open(descriptor, "wb", closefd=False) as file:
                file.write(encoded)
            sync(descriptor)
            os.replace(partial, self.path)
        except BaseException:
            os.close(descriptor)
            partial.unlink(missing_ok=True)
            raise
        self.close()
        self._lock = descriptor


def folder() -> Path:
    """Returns the folder of unfinished runs."""
    return home.path(home.CHECKPOINTS)


def unfinished() -> list[Path]:
    """Returns the files that can be resumed, newest first. Deletes files that are too old or half-written."""
    seconds: dict[Path, float] = {}
    for path in folder().glob("*.safetensors"):
        with contextlib.suppress(OSError):
            seconds[path] = path.stat().st_mtime
    newest, found = sorted(seconds, key=lambda path: seconds[path], reverse=True), []
    old = [path for path in newest[KEEP:] if time.time() - seconds[path] > KEEP_DAYS * 86400]
    for path in [*folder().glob(".*.partial"), *newest]:
        with contextlib.suppress(OSError, UsageError):
            lock = _locked(path)
            if path in old or path.suffix == ".partial":
                path.unlink(missing_ok=True)
            else:
                found.append(path)
            os.close(lock)
    return found


def find(name: str | None) -> Path:
    """Returns the file with this path or name; None: the newest.

    Raises:
        UsageError: there is none.
    """
    if name is None:
        if not (paths := unfinished()):
            raise UsageError(f"there is no unfinished run in {folder()}", "", "there is nothing to resume")
        return paths[0]
    inside, path = folder() / f"{name}.safetensors", Path(os.path.expanduser(name))
    if os.sep not in name and inside.exists():
        return inside
    if not os.path.exists(path):
        raise UsageError(f"there is no unfinished run {name}", "an ID or a checkpoint file", _LISTED)
    return path


def _locked(path: Path) -> int:
    """Opens and locks a file.

    Raises:
        UsageError: another process holds the lock.
    """
    if (descriptor := try_lock(path, create=False)) is not None:
        return descriptor
    raise UsageError(f"the run of {path} has not ended", "an interrupted run", "wait for it, or stop it")


def _header(path: Path) -> tuple[dict, dict[str, tuple[int, ...]]]:
    """Returns the JSON and the shapes of a file, checked.

    Raises:
        UsageError: not a file as `Checkpoint.write` writes it.
    """
    whole = "a file that an unfinished run left behind"
    try:
        infos, metadata = read_header(path)
        if len(metadata.get(_KEY, "")) > _LONGEST:
            raise ValueError
        facts = parse_json(metadata[_KEY])
    except FluxKreaError as error:
        raise UsageError(error.found, whole, _LISTED) from None
    except (KeyError, ValueError, RecursionError):
        raise UsageError(f"{path} has no description of a run", whole, _LISTED) from None
    shapes = {name: info.shape for name, info in infos.items()}
    kinds = {name: (info.dtype, len(info.shape)) for name, info in infos.items()}
    facts = facts if isinstance(facts, dict) else {}
    version, done, total = (_count(facts.get(name)) for name in ("format", "done", "total"))
    sound = (
        kinds.get("latents", _LATENTS) == _LATENTS
        and len(kinds) <= _MOST_ARRAYS * (1 + shapes.get("latents", (0,))[0])
        and all(kind in _IMAGES for name, kind in kinds.items() if _is_image(name))
        and all(kind in _STATES for name, kind in kinds.items() if name.startswith(_STATE))
        and min(version, done, total) >= 0
        and done <= total
        and ("latents" in kinds) == (done > 0)
        and isinstance(facts.get("run"), dict)
        and facts.get("filters", "") in ("", "required", "none")
    )
    images = [(*shape, 3)[:3] for name, shape in shapes.items() if _is_image(name)]
    most = 2 * (Image.MAX_IMAGE_PIXELS or 2**27)
    if not sound or any(colours != 3 or not 0 < height * width <= most for height, width, colours in images):
        raise UsageError(f"{path} is another kind of file", whole)
    if version != _FORMAT:
        raise UsageError(f"{path} has format {version}", f"format {_FORMAT}", "use the version that wrote it")
    return facts, shapes


def _is_image(name: str) -> bool:
    return name != "latents" and not name.startswith(_STATE)


def _count(value) -> int:
    """Returns a whole number; -1 for anything else."""
    return value if type(value) is int else -1


def _tensor(path: Path, name: str) -> np.ndarray:
    with safe_open(path, "numpy") as file:
        return file.get_tensor(name)
