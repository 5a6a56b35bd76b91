"""The log: one JSON object a line, appended under a lock, each with the hash of the line before.

A line is on disk before `append` returns, so before any release that depends on it. The owner of the machine can delete
the log or write another: it shows changes and does not prevent them. It holds hashes of prompts and pixels, never the
prompts, the pixels or the names of files.
"""

import contextlib
import errno
import hashlib
import json
import os
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from ..errors import FiltersError
from ..files import read_small, sync, wait_for_lock, written_whole

# events of a picture, each with the events that it may follow
FOLLOWS = {
    "generated": (None,),
    "passed": ("generated",),
    "flagged": ("generated",),
    "error": (None, "generated", "passed", "waiting", "flagged", "error", "approved", "released"),
    "waiting": ("generated", "passed", "approved", "released", "written", "unwritten"),  # for a person
    "approved": ("waiting", "flagged", "error"),
    "rejected": ("waiting", "flagged", "error"),
    "released": ("passed", "approved"),  # "passed" is enough where no review was asked for
    "written": ("released", "written", "unwritten"),
    "unwritten": ("written",),
    "purged": (None, "generated", "passed", "waiting", "flagged", "error", "approved", "released"),
}
_OF_THE_LINE = ("n", "previous", "image")  # and not about the picture
_KEPT = ("unknown_filters",)  # facts that every later entry about the same picture has too
_JSON = json.JSONDecoder()
_MOST = 2**30  # bytes of a log, which are held in memory: some two million events
_START = "0" * 64  # stands in the first line for the hash of the line before


class Log:
    """The log in a folder.

    Args:
        folder: an existing one; it holds log.jsonl and head.
    """

    def __init__(self, folder: Path):
        self.path = folder / "log.jsonl"
        self._head = folder / "head"
        self._entries: list[dict] = []
        self._hashes = [_START]  # of every line, including torn ones
        self._pictures: dict[str, dict] = {}
        self._read_to = 0  # bytes of the whole lines
        self._tail = b""  # part of a last line, left by a crash
        self._torn = False  # the last whole line is not an entry; an entry must follow that records this

    def picture(self, image: str) -> dict:
        """Returns the facts of all events of a picture; "event" is the last one's and "time" the first one's.

        Raises:
            FiltersError: the log is damaged.
        """
        with self._open():
            facts = self._pictures.get(image, {})
            return {name: value for name, value in facts.items() if name not in _OF_THE_LINE}

    def images(self) -> list[str]:
        """Returns the names of all pictures in the log, oldest first.

        Raises:
            FiltersError: the log is damaged.
        """
        with self._open():
            return list(self._pictures)

    def has_written(self, digest: str) -> bool:
        """Tells if a picture's last event is that it was written to a file with this SHA-256.

        Raises:
            FiltersError: the log is damaged.
        """
        with self._open():
            last = ((facts["event"], facts.get("file_sha256")) for facts in self._pictures.values())
            return ("written", digest) in last

    def has_released(self, pixels: str) -> bool:
        """Tells if a picture with these pixels, by `pixel_hash`, was released.

        Raises:
            FiltersError: the log is damaged.
        """
        with self._open():
            return any(
                facts.get("pixels") == pixels and facts["event"] in ("released", "written")
                for facts in self._pictures.values()
            )

    def is_withheld(self, pixels: str) -> bool:
        """Tells if these pixels, by `pixel_hash`, are of a picture that is known here and was not released.

        Raises:
            FiltersError: the log is damaged.
        """
        with self._open():
            events = {facts["event"] for facts in self._pictures.values() if facts.get("pixels") == pixels}
            return bool(events) and not events & {"released", "written", "unwritten"}

    def read(self) -> list[dict]:
        """Returns all entries.

        Raises:
            FiltersError: the log is damaged.
        """
        with self._open():
            return list(self._entries)

    def append(self, event: str, image: str | None = None, **facts) -> dict:
        """Writes one entry, and returns it when it is on disk.

        Args:
            event: its name; of a picture, a key of `FOLLOWS`.
            image: the random name of a picture; None: the entry is about none.
            facts: further values, as JSON holds them.

        Raises:
            FiltersError: the log is damaged or cannot be written, or the event may not follow the picture's last one.
        """
        with self._open() as file:
            if image is not None:
                self._check_order(event, image)
                facts = {name: value for name, value in self._pictures.get(image, {}).items() if name in _KEPT} | facts
            if self._tail:
                self._write(file, b"\n")
            if self._torn:
                self._write(file, self._line(event="torn"))
            self._write(file, self._line(event=event, **({} if image is None else {"image": image}), **facts))
            self._write_head()
            return self._entries[-1]

    def _check_order(self, event: str, image: str) -> None:
        facts = self._pictures.get(image, {})
        before = facts.get("event")
        if event == "released" and before == "passed" and facts["check"] != "filters":
            before = "passed and not reviewed"
        if before not in FOLLOWS[event]:
            raise FiltersError(f'a picture whose state is "{before}" cannot become "{event}"')

    @contextlib.contextmanager
    def _open(self) -> Iterator:
        """Opens and locks the file; reads and verifies new lines."""
        try:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK, 0o600)
        except OSError as error:
            raise self._unusable(f"cannot be opened: {error.strerror}") from None
        with open(descriptor, "r+b", buffering=0) as file:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode):
                raise self._unusable("is a device or a pipe")
            if status.st_size > _MOST:
                raise self._unusable(f"is larger than {_MOST / 1e9:.1f} GB")
            wait_for_lock(file.fileno())
            self._read(file)
            yield file

    def _read(self, file) -> None:
        """Verifies the lines that were appended since the last call.

        Raises:
            FiltersError: a line was changed, removed or added out of order, or the end is missing.
        """
        if os.fstat(file.fileno()).st_size < self._read_to:
            raise self._damaged("it is shorter than it was")
        file.seek(self._read_to)
        *lines, self._tail = file.read().split(b"\n")
        for line in lines:
            number, entry = len(self._hashes), _parse(line)
            follows = entry is None or (entry.get("n"), entry.get("previous")) == (number, self._hashes[-1])
            if not follows or (self._torn and (entry is None or entry["event"] != "torn")):
                raise self._damaged(f"line {number} does not follow from line {number - 1}")
            self._torn = entry is None
            self._hashes.append(_hash(line))
            if entry is not None:
                self._take(entry)
        self._read_to = file.tell() - len(self._tail)
        self._check_head()

    def _take(self, entry: dict) -> None:
        self._entries.append(entry)
        if "image" in entry:
            facts = self._pictures.setdefault(entry["image"], {})
            first = facts.get("time", entry["time"])
            facts.update(entry)
            facts["time"] = first

    def _line(self, **facts) -> bytes:
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        entry = {"n": len(self._hashes), "time": now, **facts, "previous": self._hashes[-1]}
        return json.dumps(entry, allow_nan=False).encode() + b"\n"

    def _write(self, file, data: bytes) -> None:
        """Appends bytes: on disk completely, or not at all."""
        size = file.seek(0, os.SEEK_END)
        try:
            if file.write(data) != len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            sync(file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                file.truncate(size)
            raise self._unusable(f"cannot be written: {error.strerror}") from None
        self._read(file)

    def _write_head(self) -> None:
        """Writes the last hash. The lock is held, so temporary files of other processes are leftovers of dead ones."""
        try:
            for leftover in self._head.parent.glob(f".{self._head.name}.*.partial"):
                leftover.unlink(missing_ok=True)
            with written_whole(self._head, mode=0o600) as file:
                file.write(f"{len(self._hashes) - 1} {self._hashes[-1]}\n".encode())
        except OSError as error:
            raise self._unusable(f"cannot be written: {error.strerror}") from None

    def _check_head(self) -> None:
        """Raises FiltersError if lines are missing at the end. After a crash the head may be one entry behind."""
        try:
            number, digest = read_small(self._head, most=1000).decode().split()
            known = self._hashes[int(number)] == digest
        except FileNotFoundError:
            known = len(self._entries) <= 1
        except (OSError, ValueError, IndexError):
            known = False
        if not known:
            raise self._damaged("its end is missing, or its head")

    def _damaged(self, how: str) -> FiltersError:
        todo = f"check it with flux-krea log verify; to start a new log, move {self.path.parent} to another place"
        return FiltersError(f"{self.path} was changed: {how}", "an unbroken chain", todo)

    def _unusable(self, why: str) -> FiltersError:
        return FiltersError(
            f"the log {self.path} {why}", "a file that can be written", "mend that; nothing is released"
        )


def _parse(line: bytes) -> dict | None:
    try:
        entry = _JSON.decode(line.decode())
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) and isinstance(entry.get("event"), str) and "time" in entry else None


def _hash(line: bytes) -> str:
    return hashlib.sha256(line).hexdigest()
