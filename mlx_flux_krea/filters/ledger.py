"""Quarantine, log and release: a picture waits here until a filter or a person has approved exactly these pixels.

    HOME/quarantine/RUN.noindex/     one run: `lock`, held while its process lives; IMAGE.png with its record inside;
                                     IMAGE.json: the file that it is meant for, and the one that it is about to become
    HOME/quarantine/NAME.temporary.noindex/   a file that shows waiting pictures, while a command shows it
    HOME/log/log.jsonl               one JSON object a line for each event (see `Log`)
    HOME/log/head                    number and hash of the last line, so that a shortened log is noticed

Names are random. Folders are for their owner alone and not indexed by Spotlight. A picture's state is its last event in
the log, and `FOLLOWS` says which event may follow which; there is no other way out of the quarantine.
"""

import contextlib
import hashlib
import hmac
import io
import json
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .. import home, macos
from ..errors import FiltersError, FluxKreaError, ResourceError, UsageError
from ..files import (
    give_name,
    identities,
    identity,
    partials,
    read_json,
    read_small,
    replacing,
    sha256_if_exists,
    sync,
    try_lock,
    written_whole,
)
from ..provenance import SOFTWARE, Picture, opened, read_record
from .log import FOLLOWS, Log

_RUN, _TEMPORARY = ".noindex", ".temporary.noindex"  # endings of folders of `Ledger.run` and `Ledger.temporary`
_SYNCHRONISED = re.compile(
    "(mobile documents|cloudstorage|icloud drive|dropbox|onedrive|google ?drive)( ?[-(].*)?", re.I
)


@dataclass(frozen=True)
class Verdict:
    """The judgement of a filter or a person on one picture.

    Attributes:
        event: "passed", "flagged", "error", "waiting", "approved" or "rejected".
        pixels: `pixel_hash` of the picture.
        reasons: sentences.
        scores: the filters' scores by name.
        reviewer: name of the person who approved or rejected it.
        answers: that person's answers by question.
    """

    event: str
    pixels: str
    reasons: tuple[str, ...] = ()
    scores: dict[str, float] = field(default_factory=dict)
    reviewer: str = ""
    answers: dict[str, bool] = field(default_factory=dict)


@dataclass(frozen=True)
class QuarantinedImage:
    """A picture in quarantine.

    Attributes:
        image: its random name.
        path: its PNG file.
        facts: from the log: "event", "check", "pixels", "scores", "reasons", ...
    """

    image: str
    path: Path
    facts: dict


class Released(Picture):
    """A picture that a filter or a person has approved. Its `save` calls `Ledger.release`."""

    image: str
    root: Path
    _copied = ("record", "inputs", "image", "root")

    def _write(self, fp, encoded: bytes, force: bool, unsigned: bytes | None) -> None:
        Ledger(self.root).release(self, encoded, fp, force, unsigned)


def pixel_hash(pixels: np.ndarray) -> str:
    """Returns the SHA-256 of (H, W, 3) uint8 pixels and their size."""
    digest = hashlib.sha256(f"{pixels.dtype} {pixels.shape}".encode())
    digest.update(np.ascontiguousarray(pixels).data)
    return digest.hexdigest()


class Ledger:
    """Quarantine and log of one home folder, shared by all processes.

    Args:
        root: the home folder; None: `home.root()`.

    Raises:
        FiltersError: the folders cannot be made private or would be copied to a server, or the log is damaged.
    """

    def __init__(self, root: Path | None = None):
        self.root = (root or home.root()).resolve()
        self.quarantine = self.root / home.QUARANTINE
        for folder in (self.quarantine, self.root / home.LOG):
            _make_private(folder)
            macos.exclude(folder)
        self.log = Log(self.root / home.LOG)

    @contextlib.contextmanager
    def run(self, check: str, *, unknown: Sequence[str] = (), **about) -> Iterator["LedgerRun"]:
        """Starts a run of the pipeline, whose pictures are kept under its lock.

        Pictures of runs that died are recovered first.

        Args:
            check: "filters", "review" or "both".
            unknown: names of filters that were not made from their published files; every entry of the run says so.
            about: further facts of the run for the log.
        """
        self.recover()
        with contextlib.ExitStack() as stack:
            name, folder = self._new_folder(stack, _RUN)
            common: dict[str, Any] = {"unknown_filters": list(unknown)} if unknown else {}
            self.log.append("run", run=name, check=check, software=SOFTWARE, **about, **common)
            try:
                yield LedgerRun(self, folder, name, check, common)
            except BaseException:
                with contextlib.suppress(FluxKreaError):  # the log itself may have failed: then the next run recovers
                    self._recover_all(folder)
                raise

    def recover(self) -> None:
        """Marks pictures of dead runs as waiting for a person; they are never released automatically."""
        for folder in self._folders():
            with _locked(folder) as is_dead:
                if is_dead:
                    self._recover_all(folder)
        for folder in self.quarantine.glob(f"*{_TEMPORARY}"):
            with _locked(folder) as is_dead:
                if is_dead:
                    shutil.rmtree(folder, ignore_errors=True)

    @contextlib.contextmanager
    def temporary(self, name: str) -> Iterator[Path]:
        """Gives the path of a file that may show waiting pictures. It is deleted with the block, however that ends."""
        with contextlib.ExitStack() as stack:
            _, folder = self._new_folder(stack, _TEMPORARY)
            try:
                yield folder / name
            finally:
                shutil.rmtree(folder, ignore_errors=True)

    def _new_folder(self, stack: contextlib.ExitStack, ending: str) -> tuple[str, Path]:
        """Makes a folder in the quarantine with a random name, and holds its lock until the stack is closed.

        Returns:
            The name without its ending, and the folder.
        """
        while True:
            name = secrets.token_hex(16)
            folder = self.quarantine / f"{name}{ending}"
            _make_private(folder)
            if stack.enter_context(_locked(folder)):
                return name, folder  # else another process took the new folder for one of a dead run

    def _recover_all(self, folder: Path) -> None:
        for partial in folder.glob(".*.partial"):
            partial.unlink(missing_ok=True)
        for path in folder.glob("*.png"):
            self._recover(path)

    def _recover(self, path: Path) -> None:
        facts = self.log.picture(path.stem)
        event = facts.get("event")
        is_placed = self._finish(path, facts)
        if event in ("rejected", "purged") or is_placed:
            _delete(path)
        elif event is None:  # the run died between writing picture and log, or the log is new
            try:
                pixels, record = _read(path)
            except UsageError:
                self.log.append("purged", image=path.stem, reasons=["its file is damaged"])
                _delete(path)
                return
            known = {"check": "review", "pixels": pixel_hash(pixels), "record_sha256": _hash_json(record)}
            self.log.append("error", image=path.stem, reasons=["never judged: its run died"], **known)
        elif event == "generated":
            self.log.append("error", image=path.stem, reasons=["never judged: its run died"])
        elif event not in ("waiting", "flagged", "error"):  # approved, and never written, or no longer there
            if event == "written":
                self.log.append("unwritten", image=path.stem)
            self.log.append("waiting", image=path.stem, reasons=["its run died before it was written"])

    def waiting(self) -> list[QuarantinedImage]:
        """Returns the pictures that a person may review, oldest first: waiting, flagged, or not judged."""
        self.recover()
        images = []
        for folder in self._folders():
            for path in folder.glob("*.png"):
                facts = self.log.picture(path.stem)
                if facts.get("event") in ("waiting", "flagged", "error"):
                    images.append(QuarantinedImage(path.stem, path, facts))
        order = {image: number for number, image in enumerate(self.log.images())}  # times in the log are whole seconds
        return sorted(images, key=lambda quarantined: order[quarantined.image])

    def purge(self) -> None:
        """Deletes every picture except those that a running process holds.

        Raises:
            FiltersError: the log is damaged, or cannot be written.
        """
        for folder in self._folders():
            with _locked(folder) as is_mine:
                for path in folder.glob("*.png") if is_mine else ():
                    if self.log.picture(path.stem).get("event") in FOLLOWS["purged"]:
                        self.log.append("purged", image=path.stem, reasons=["its owner deleted it"])
                    _delete(path)

    @contextlib.contextmanager
    def claimed(self, quarantined: QuarantinedImage) -> Iterator[bool]:
        """Claims a picture for this process within the block; gives False if another process has it, or had it."""
        with _locked(quarantined.path.parent) as is_mine:
            yield is_mine and quarantined.path.exists()

    def settle(self, quarantined: QuarantinedImage, verdict: Verdict) -> QuarantinedImage:
        """Writes a verdict into the log, and returns the picture with its new facts.

        Raises:
            ValueError: not a verdict, or a verdict about other pixels.
            FiltersError: the picture's state does not allow it, or the log cannot be written.
        """
        if not isinstance(verdict, Verdict):
            raise ValueError(f"[Ledger.settle] {type(verdict).__name__} is not a Verdict")
        if verdict.pixels != quarantined.facts["pixels"]:
            raise ValueError("[Ledger.settle] the verdict is about other pixels")
        more = {name: value for name, value in vars(verdict).items() if value and name not in ("event", "pixels")}
        self.log.append(verdict.event, image=quarantined.image, pixels=verdict.pixels, **more)
        return QuarantinedImage(quarantined.image, quarantined.path, self.log.picture(quarantined.image))

    def hand_over(self, quarantined: QuarantinedImage) -> Released:
        """Returns an approved picture, read from its file.

        Raises:
            FiltersError: it was not approved, or the file is not the judged one.
        """
        try:
            pixels, record = _read(quarantined.path)
            wrong = (
                pixel_hash(pixels) != quarantined.facts["pixels"]
                or _hash_json(record) != quarantined.facts["record_sha256"]
            )
        except UsageError:
            wrong = True
        if wrong:
            self.log.append("error", image=quarantined.image, reasons=["its file is not the one that was judged"])
            raise FiltersError(
                f"{quarantined.path} changed after it was judged", "the same pixels and record", "it stays where it is"
            )
        self.log.append("released", image=quarantined.image, pixels=quarantined.facts["pixels"])
        picture = Released.from_pixels(pixels, record)
        picture.image, picture.root = quarantined.image, self.root
        return picture

    def discard(self, quarantined: QuarantinedImage) -> None:
        """Deletes the file of a picture that was handed over, written elsewhere or rejected."""
        _delete(quarantined.path)

    def meant_for(self, quarantined: QuarantinedImage) -> dict:
        """Returns what `LedgerRun.meant_for` says of a picture; {}: nothing, as in earlier versions."""
        meant = _about(quarantined.path).get("meant_for")
        return meant if isinstance(meant, dict) else {}

    def release(self, picture: Released, encoded: bytes, fp, force: bool, unsigned: bytes | None = None) -> None:
        """Writes a released picture; pictures of a model that requires filters are written by no other function.

        Order: the log confirms the release of these pixels; the encoded file is decoded and compared; a temporary file
        beside the target is written and read back; the file's hash is written to the log; the file gets its name. After
        a kill before the last step, `recover` takes it: a picture is written once, in the log and on the disk.

        Args:
            picture: from `hand_over`.
            encoded: the file's bytes.
            fp: a path, or a file open for writing.
            force: replace an existing file.
            unsigned: the file's bytes before it was signed, whose hash the log has too; None: it is not signed.

        Raises:
            UsageError: the pixels were changed since, or the path cannot be written.
            FiltersError: the log does not know it, or cannot be written; or the encoded file shows another picture.
            FileExistsError: without `force`, the path is taken.
            ResourceError: the disk is full.
        """
        pixels, facts = np.asarray(picture), self.log.picture(picture.image)
        if facts.get("event") not in ("released", "written", "unwritten"):
            raise FiltersError(f"the log in {self.log.path} does not say that this picture was released")
        if pixel_hash(pixels) != facts["pixels"]:
            todo = "save a plain copy: PIL.Image.fromarray(numpy.asarray(image))"
            raise UsageError("the picture was changed after it was released", "the same pixels", todo)
        _compare(pixels, encoded)
        digest = hashlib.sha256(encoded).hexdigest()
        files = {"file_sha256": digest, "unsigned_sha256": unsigned and hashlib.sha256(unsigned).hexdigest()}
        try:
            if not hasattr(fp, "write"):
                self._note_target(picture.image, Path(fp), force)
            with contextlib.nullcontext() if hasattr(fp, "write") else replacing(Path(fp), force) as file:
                if file:
                    file.write(encoded)
                    file.flush()
                    sync(file.fileno())
                    if hashlib.sha256(Path(file.name).read_bytes()).hexdigest() != digest:
                        raise FiltersError(f"{fp} was changed while it was written", "", "write it elsewhere")
                self.log.append("written", image=picture.image, pixels=facts["pixels"], **_known(files))
            if not file:
                fp.write(encoded)
        except BaseException:
            with contextlib.suppress(FluxKreaError):
                self.log.append("unwritten", image=picture.image)
            raise

    def fingerprint(self, text: str) -> str:
        """Returns a hash by which this installation recognises a text, and nobody else can guess it: it is salted.

        Raises:
            FiltersError: the salt cannot be read or made.
        """
        path = self.root / home.LOG / "salt"
        try:
            if not path.exists():
                with contextlib.suppress(FileExistsError), written_whole(path, force=False, mode=0o600) as file:
                    file.write(secrets.token_bytes(32))
            salt = read_small(path, most=1000)
        except OSError as error:
            raise FiltersError(f"{path} cannot be read: {error.strerror}", "a private file") from None
        return hmac.new(salt, text.encode("utf-8", "surrogatepass"), "sha256").hexdigest()

    def _note_target(self, image: str, target: Path, force: bool) -> None:
        """Keeps beside a picture in quarantine which file it is about to become, for `_finish`."""
        if path := next(self.quarantine.glob(f"*/{image}.png"), None):
            names = {"path": os.path.abspath(target), "force": force, "process": os.getpid()}
            _note(path, _about(path) | names)

    def _finish(self, path: Path, facts: dict) -> bool:
        """Ends what a dead process began: gives the file of a picture its name, if the log says that it was written.

        What the process left beside the target otherwise is deleted.

        Args:
            path: of the picture in quarantine.
            facts: from the log.

        Returns:
            True where the file is in its place.
        """
        about, digest = _about(path), facts.get("file_sha256")
        is_logged = facts.get("event") == "written"
        try:
            target, process = Path(about["path"]), about.get("process")
            for partial in partials(target, process) if type(process) is int else ():
                if is_logged and sha256_if_exists(partial) == digest:
                    with contextlib.suppress(FileExistsError):
                        give_name(partial, target, about.get("force") is True)
                partial.unlink(missing_ok=True)
            return is_logged and sha256_if_exists(target) == digest
        except (OSError, KeyError, TypeError, ValueError):
            return False

    def _folders(self) -> list[Path]:
        return sorted(set(self.quarantine.glob(f"*{_RUN}")) - set(self.quarantine.glob(f"*{_TEMPORARY}")))


class LedgerRun:
    """The part of one run in the quarantine; from `Ledger.run`.

    Attributes:
        meant_for: the file that its pictures are meant for, kept beside each for `flux-krea review`; {}: none.
    """

    def __init__(self, ledger: Ledger, folder: Path, name: str, check: str, common: dict):
        self.ledger, self.folder, self.name, self.check = ledger, folder, name, check
        self.meant_for: dict = {}
        self._common = common  # facts of every entry

    def keep(self, pixels: np.ndarray, record: dict) -> QuarantinedImage:
        """Puts (H, W, 3) uint8 pixels with their record into quarantine.

        Raises:
            ResourceError: the disk is full.
            FiltersError: the quarantine or the log cannot be written.
        """
        image = secrets.token_hex(16)
        path = self.folder / f"{image}.png"
        try:
            if self.meant_for:
                _note(path, {"meant_for": self.meant_for})
            with replacing(path, mode=0o600) as file:
                Picture.from_pixels(pixels, record).save(file, "PNG", compress_level=1)
        except ResourceError:
            raise
        except (FluxKreaError, OSError) as error:
            raise FiltersError(f"the quarantine cannot be written: {error}") from None
        facts = {"pixels": pixel_hash(pixels), "record_sha256": _hash_json(record), "seed": record.get("seed")}
        facts |= {"height": pixels.shape[0], "width": pixels.shape[1], **self._common}
        self.ledger.log.append("generated", image=image, run=self.name, check=self.check, **facts)
        return QuarantinedImage(image, path, self.ledger.log.picture(image))

    def note(self, event: str, **facts) -> None:
        """Logs an event that is not about a picture of this run, such as a flagged prompt."""
        self.ledger.log.append(event, run=self.name, **facts, **self._common)


def _known(facts: dict[str, Any]) -> dict[str, Any]:
    """Returns the facts that have a value."""
    return {name: value for name, value in facts.items() if value is not None}


def _hash_json(record: dict | None) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _read(path: Path) -> tuple[np.ndarray, dict]:
    """Returns pixels and record of a picture in quarantine."""
    with opened(path) as image:
        pixels = np.asarray(image)
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise UsageError(f"{path} is not an RGB image")
    return pixels, read_record(path) or {}


def _note(path: Path, facts: dict) -> None:
    """Writes facts beside a picture in quarantine, for its owner alone."""
    with written_whole(path.with_suffix(".json"), mode=0o600) as file:
        file.write(json.dumps(facts).encode())


def _about(path: Path) -> dict:
    """Returns the facts beside a picture in quarantine; {}: there are none."""
    try:
        return read_json(path.with_suffix(".json"))
    except FluxKreaError:
        return {}


def _delete(path: Path) -> None:
    """Deletes a picture in quarantine, and the facts beside it."""
    path.unlink(missing_ok=True)
    path.with_suffix(".json").unlink(missing_ok=True)


def _compare(pixels: np.ndarray, encoded: bytes) -> None:
    """Decodes a file and compares it: equal pixels in PNG, a similar picture in other formats."""
    with opened(io.BytesIO(encoded)) as image:
        format, frames, shown = image.format, getattr(image, "n_frames", 1), image.convert("RGB")
    same = frames == 1 and shown.size == (pixels.shape[1], pixels.shape[0])
    if same and format == "PNG":
        same = np.array_equal(np.asarray(shown), pixels)
    elif same:  # means of its quarters, which no quality setting changes by 64 of 255
        quarters = (
            np.asarray(image.resize((2, 2), Image.Resampling.BOX), int) for image in (shown, Image.fromarray(pixels))
        )
        same = np.abs(np.subtract(*quarters)).max() <= 64
    if not same:
        raise FiltersError("the encoded file does not show the released picture", "the same picture")


def _make_private(folder: Path) -> None:
    """Makes a folder that its owner alone can read.

    Raises:
        FiltersError: that fails, or the folder lies where files are copied to a server.
    """
    own = Path.home()
    copied = {identity(own / "Desktop"), identity(own / "Documents")} - {None}  # by iCloud, where a person chose it
    desktop = sys.platform == "darwin" and copied & identities(folder)
    if desktop or any(map(_SYNCHRONISED.fullmatch, folder.parts)):
        todo = "name another place in $FLUX_KREA_HOME"
        raise FiltersError(f"{folder} looks like a folder that is copied to a server", "a private place", todo)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.is_symlink():
            raise FiltersError(f"{folder} is a link", "a folder", "remove it")
        folder.chmod(0o700)
        if not os.access(folder, os.R_OK | os.W_OK | os.X_OK):
            raise PermissionError(13, "Permission denied")
    except OSError as error:
        todo = "mend its rights, or name another place in $FLUX_KREA_HOME"
        raise FiltersError(f"{folder} cannot be written: {error.strerror}", "a private folder", todo) from None


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Locks a folder within the block; gives False if another process holds it. A dead process loses its lock.

    At the end of the block, a folder without pictures is deleted.
    """
    try:
        lock = try_lock(folder / "lock")
    except OSError:  # another process has just removed it
        lock = None
    try:
        yield lock is not None
    finally:
        if lock is not None:
            if not any(folder.glob("*.png")):
                shutil.rmtree(folder, ignore_errors=True)
            os.close(lock)
