"""The pictures of the page: files in HOME/pictures, an index of their records, thumbnails, and the system's Trash.

Only pictures that the gate has released lie there. An id is made of a file's name, and found in the index alone.
"""

import base64
import contextlib
import functools
import hashlib
import io
import json
import os
import re
import threading
import time
from pathlib import Path
from typing import Any

from PIL import Image

from mlx_flux_krea import home
from mlx_flux_krea.commands.shared.settings import make_folder
from mlx_flux_krea.credentials.reading import has_credentials
from mlx_flux_krea.errors import FluxKreaError
from mlx_flux_krea.provenance import FORMATS, opened, read_record

from .errors import HTTPProblem, invalid, not_found
from .events import Events
from .store import Store, matching
from .trash import to_trash

MOST = 200  # pictures of one answer
SIDES = (64, 1024)  # of a thumbnail, in pixels
_BRIEF = ("id", "created", "width", "height", "bytes", "format", "prompt", "job")
_JOB_FILE = re.compile(r"([0-9a-f]{16})-(\d+)(?:-\d+)?\.\w+")  # of a job's picture
_HIDDEN = ("output", "folder", "path")  # fields of a record that could name a file
_TICK = 50_000_000  # nanoseconds; two changes of a folder that are nearer may bear one time
_few = threading.BoundedSemaphore(2)  # pictures that are decoded at a time


class Pictures:
    """The index.

    Args:
        store: the database.
        events: where pictures that came or went are published.
    """

    def __init__(self, store: Store, events: Events):
        self._store, self._events = store, events
        self._seen = 0  # time of the folder's last change that was indexed
        self._lock = threading.Lock()
        make_folder(folder())

    def scan(self) -> None:
        """Compares the index with the folder, and publishes the pictures that came or went.

        Whoever sees a picture first publishes it, so that a reader of the index takes no news from those who listen.
        """
        with self._lock:
            changed = folder().stat().st_mtime_ns
            if changed == self._seen:
                return
            known = {row["name"]: row["changed"] for row in self._store.rows("SELECT name, changed FROM pictures")}
            files = _files()
            gone = [identity(name) for name in known.keys() - files.keys()]
            self._store.delete("pictures", gone)
            added = []
            for name, changed_at in sorted(files.items(), key=lambda item: item[1]):
                if known.get(name) != changed_at and (row := _row(folder() / name)):
                    self._store.insert("pictures", row)
                    self._store.remember(row["prompt"], row["created"])
                    added.append(brief(row))
            self._seen = changed if time.time_ns() - changed > _TICK else 0
            if added or gone:
                self._events.publish("pictures", {"added": added, "removed": gone})

    def page(self, query: str, before: str, limit: int) -> dict[str, Any]:
        """Returns a page of pictures, newest first.

        Args:
            query: words that the prompt holds.
            before: `next` of the page before; "": the first page.
            limit: pictures of a page.
        """
        self.scan()
        where, values = matching("prompt", query.split()[:20])
        total = self._store.rows(f"SELECT count(*) AS n FROM pictures WHERE {where}", values)[0]["n"]
        after: list[Any] = []
        if before:
            after = _place(before)
            where += " AND (created, id) < (?, ?)"
        rows = self._store.rows(
            f"SELECT * FROM pictures WHERE {where} ORDER BY created DESC, id DESC LIMIT ?", [*values, *after, limit + 1]
        )
        shown = rows[:limit]
        following = _cursor(shown[-1]) if len(rows) > limit else None
        return {"pictures": list(map(brief, shown)), "next": following, "total": total}

    def find(self, key: str) -> dict[str, Any]:
        """Returns the row of a picture.

        Raises:
            HTTPProblem: there is none.
        """
        row = self._store.row("SELECT * FROM pictures WHERE id = ?", [key])
        if row is None:
            self.scan()
            row = self._store.row("SELECT * FROM pictures WHERE id = ?", [key])
        if row is None or not file_of(row).is_file():
            raise not_found("picture")
        return row

    def path(self, key: str) -> Path:
        """Returns the file of a picture.

        Raises:
            HTTPProblem: there is none.
        """
        return file_of(self.find(key))

    def thumbnail(self, key: str, side: int) -> bytes:
        """Returns a WebP no larger than so many pixels on either side.

        Raises:
            HTTPProblem: there is no such picture, or its file is damaged.
        """
        row = self.find(key)
        try:
            with _few:
                return _small(file_of(row), row["changed"], side)
        except FluxKreaError:
            raise HTTPProblem(409, "conflict", "the file of this picture is damaged") from None

    def remove(self, key: str) -> None:
        """Moves a picture to the system's Trash.

        Raises:
            HTTPProblem: there is none, or it cannot be moved.
        """
        path = self.path(key)
        try:
            to_trash(path)
        except OSError as error:
            raise HTTPProblem(409, "conflict", f"the picture cannot be moved to the Trash: {error.strerror}") from None
        self._store.delete("pictures", [key])
        self._events.publish("pictures", {"added": [], "removed": [key]})


def folder() -> Path:
    """Returns the folder of the pictures."""
    return home.path(home.PICTURES)


def file_of(row: dict[str, Any]) -> Path:
    """Returns the file of a picture by its row."""
    return folder() / row["name"]


def identity(name: str) -> str:
    """Returns the id of a picture by the name of its file."""
    return hashlib.sha256(os.fsencode(name)).hexdigest()[:16]


def job_of(name: str) -> tuple[str, int] | None:
    """Returns the job and the number of a picture by the name of its file; None: no job made it."""
    match = _JOB_FILE.fullmatch(name)
    return (match[1], int(match[2])) if match else None


def download_name(row: dict[str, Any]) -> str:
    """Returns a file name of ASCII letters, made of prompt and seed."""
    words = re.sub(r"[^A-Za-z0-9]+", "-", row["prompt"])[:40].strip("-").lower() or "picture"
    seed = row["record"].get("seed")
    return f"{words}{f'-{seed}' if type(seed) is int else ''}{Path(row['name']).suffix.lower()}"


def shown_record(record: dict[str, Any]) -> dict[str, Any]:
    """Returns a record without the folders that an adapter came from."""
    shown = {name: value for name, value in record.items() if name not in _HIDDEN}
    if isinstance(adapters := shown.get("adapters"), list):
        kept = [one for one in adapters if isinstance(one, dict)]
        shown["adapters"] = [one | {"source": str(one.get("source", "")).rpartition("/")[2]} for one in kept]
    return shown


def _files() -> dict[str, int]:
    """Returns the pictures in the folder by name, with the times of their last change."""
    files = {}
    with os.scandir(folder()) as entries:
        for entry in entries:
            name = entry.name
            if not name.startswith(".") and Path(name).suffix.lower() in FORMATS:
                with contextlib.suppress(OSError):
                    if entry.is_file(follow_symlinks=False):
                        files[name] = entry.stat(follow_symlinks=False).st_mtime_ns
    return files


def _row(path: Path) -> dict[str, Any] | None:
    """Reads a picture's row from its file; None: it is no picture, or damaged."""
    try:
        facts = path.stat()
        with opened(path, most=None) as image:
            width, height, kind = image.width, image.height, image.format or ""
        record = read_record(path) or {}
    except (FluxKreaError, OSError):
        return None
    prompt = record.get("prompt")
    job = job_of(path.name)
    return {
        "id": identity(path.name),
        "name": path.name,
        "changed": facts.st_mtime_ns,
        "created": facts.st_mtime,
        "width": width,
        "height": height,
        "bytes": facts.st_size,
        "format": kind.lower(),
        "prompt": prompt if isinstance(prompt, str) else "",
        "record": record,
        "job": job[0] if job else "",
        "signed": int(has_credentials(path)),
    }


def brief(row: dict[str, Any]) -> dict[str, Any]:
    """Returns the facts of a picture that lists have, by its row."""
    record = row["record"]
    about = {name: record.get(name) for name in ("seed", "model")}
    return {name: row[name] for name in _BRIEF} | about | {"job": row["job"] or None, "signed": bool(row["signed"])}


def _cursor(row: dict[str, Any]) -> str:
    return base64.urlsafe_b64encode(json.dumps([row["created"], row["id"]]).encode()).decode().rstrip("=")


def _place(cursor: str) -> list[Any]:
    """Reads the place of a page.

    Raises:
        HTTPProblem: it is none that `_cursor` wrote.
    """
    try:
        created, key = json.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
        return [float(created), str(key)]
    except (ValueError, TypeError, RecursionError, OverflowError):
        raise invalid("before is no place in the list; expected `next` of the page before", "before") from None


@functools.lru_cache(maxsize=512)
def _small(path: Path, changed: int, side: int) -> bytes:
    """Returns the thumbnail of a file that was last changed at a time."""
    with opened(path) as image:
        small = image.convert("RGB")
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    small.save(data, "WEBP", quality=80, method=2)
    return data.getvalue()
