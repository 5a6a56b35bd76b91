"""The page's database, page.sqlite in the home folder: jobs, an index of the pictures, prompts and settings.

One connection, which threads take in turn; write-ahead log. A damaged or missing file is made again: the index from the
records in the files of pictures, the jobs from the checkpoints of runs that have not ended.
"""

import contextlib
import json
import secrets
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mlx_flux_krea import home

# Numbered steps: a database has taken as many of them as its `user_version` says.
MIGRATIONS = (
    """
    CREATE TABLE jobs (
        id TEXT PRIMARY KEY, place INTEGER NOT NULL, state TEXT NOT NULL, created REAL NOT NULL, started REAL,
        ended REAL, model TEXT NOT NULL, checkpoint TEXT NOT NULL DEFAULT '', request TEXT NOT NULL,
        seeds TEXT NOT NULL, pictures TEXT NOT NULL, notes TEXT NOT NULL, error TEXT NOT NULL
    );
    CREATE INDEX jobs_by_state ON jobs (state, place);
    CREATE TABLE pictures (
        id TEXT PRIMARY KEY, name TEXT NOT NULL UNIQUE, changed INTEGER NOT NULL, created REAL NOT NULL,
        width INTEGER NOT NULL, height INTEGER NOT NULL, bytes INTEGER NOT NULL, format TEXT NOT NULL,
        prompt TEXT NOT NULL, record TEXT NOT NULL, job TEXT NOT NULL DEFAULT ''
    );
    CREATE INDEX pictures_by_time ON pictures (created DESC, id);
    CREATE TABLE prompts (prompt TEXT PRIMARY KEY, used REAL NOT NULL);
    CREATE TABLE settings (name TEXT PRIMARY KEY, value TEXT NOT NULL);
    """,
    "ALTER TABLE pictures ADD COLUMN signed INTEGER NOT NULL DEFAULT 0;",  # the file has content credentials
)
_JSON = ("request", "seeds", "pictures", "notes", "error", "record")  # columns that hold JSON
_PROMPTS = 1000  # that are remembered


class Store:
    """The open database.

    Args:
        path: of its file.
    """

    def __init__(self, path: Path):
        self._lock = threading.RLock()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)  # SQLite gives its other files the same rights
        path.chmod(0o600)
        try:
            self._base = _opened(path)
            self.is_new = _migrate(self._base)
        except sqlite3.DatabaseError:
            for end in ("", "-wal", "-shm"):
                with contextlib.suppress(FileNotFoundError):
                    path.with_name(path.name + end).rename(path.with_name(f"{path.name}{end}.damaged"))
            path.touch(mode=0o600)
            self._base = _opened(path)
            self.is_new = _migrate(self._base)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Gives the connection for changes that are kept together, or not at all."""
        with self._lock, self._base:
            yield self._base

    def rows(self, query: str, values: Sequence[Any] = ()) -> list[dict[str, Any]]:
        """Returns the rows of a query; columns of JSON are read."""
        with self._lock:
            found = self._base.execute(query, values).fetchall()
        return [{name: _read(name, row[name]) for name in row.keys()} for row in found]  # noqa: SIM118

    def row(self, query: str, values: Sequence[Any] = ()) -> dict[str, Any] | None:
        """Returns the first row of a query."""
        return next(iter(self.rows(query, values)), None)

    def insert(self, table: str, row: dict[str, Any]) -> None:
        """Inserts a row, or replaces the one with its key."""
        names, marks = ", ".join(row), ", ".join("?" * len(row))
        with self.transaction() as base:
            base.execute(f"INSERT OR REPLACE INTO {table} ({names}) VALUES ({marks})", _written(row))

    def update(self, table: str, key: str, **row: Any) -> None:
        """Changes columns of the row with this id."""
        changes = ", ".join(f"{name} = ?" for name in row)
        with self.transaction() as base:
            base.execute(f"UPDATE {table} SET {changes} WHERE id = ?", [*_written(row), key])

    def delete(self, table: str, keys: Sequence[str]) -> None:
        """Deletes rows by their ids."""
        with self.transaction() as base:
            base.executemany(f"DELETE FROM {table} WHERE id = ?", [(key,) for key in keys])

    def remember(self, prompt: str, used: float | None = None) -> None:
        """Adds a prompt to those used before."""
        if not prompt.strip():
            return
        with self.transaction() as base:
            base.execute(
                "INSERT INTO prompts VALUES (?, ?) ON CONFLICT DO UPDATE SET used = max(used, excluded.used)",
                (prompt, time.time() if used is None else used),
            )
            base.execute(
                "DELETE FROM prompts WHERE prompt NOT IN (SELECT prompt FROM prompts ORDER BY used DESC LIMIT ?)",
                (_PROMPTS,),
            )

    def prompts(self, words: Sequence[str], limit: int) -> list[dict[str, Any]]:
        """Returns prompts used before that hold these words, newest first."""
        where, values = matching("prompt", words)
        return self.rows(f"SELECT prompt, used FROM prompts WHERE {where} ORDER BY used DESC LIMIT ?", [*values, limit])

    def settings(self, defaults: dict[str, Any]) -> dict[str, Any]:
        """Returns the settings by name."""
        known = {row["name"]: json.loads(row["value"]) for row in self.rows("SELECT * FROM settings")}
        return {name: known.get(name, value) for name, value in defaults.items()}

    def set(self, name: str, value: Any) -> None:
        """Changes a setting."""
        with self.transaction() as base:
            base.execute("INSERT OR REPLACE INTO settings VALUES (?, ?)", (name, json.dumps(value)))

    def token(self) -> str:
        """Returns the token that requests carry: made once, so that open pages and programs outlive a restart."""
        if not (token := self.settings({"token": ""})["token"]):
            token = secrets.token_urlsafe(32)
            self.set("token", token)
        return token

    def close(self) -> None:
        """Closes the file."""
        with self._lock:
            self._base.close()


def path() -> Path:
    """Returns the path of the database."""
    return home.path(home.PAGE)


def matching(column: str, words: Sequence[str]) -> tuple[str, list[str]]:
    """Returns a condition that a column holds every word, and its values."""
    escaped = [word.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_") for word in words]
    where = " AND ".join([f"{column} LIKE ? ESCAPE '\\'"] * len(words))
    return where or "1", [f"%{word}%" for word in escaped]


def _opened(path: Path) -> sqlite3.Connection:
    base = sqlite3.connect(path, check_same_thread=False, timeout=10)
    base.row_factory = sqlite3.Row
    base.execute("PRAGMA journal_mode = WAL")
    base.execute("PRAGMA synchronous = NORMAL")
    if base.execute("PRAGMA quick_check").fetchone()[0] != "ok":
        raise sqlite3.DatabaseError("the file is damaged")
    return base


def _migrate(base: sqlite3.Connection) -> bool:
    """Brings the tables to this version. Returns True where there were none."""
    version = base.execute("PRAGMA user_version").fetchone()[0]
    for number in range(version, len(MIGRATIONS)):
        base.executescript(f"BEGIN; {MIGRATIONS[number]}; PRAGMA user_version = {number + 1}; COMMIT;")
    return version == 0


def _read(name: str, value: Any) -> Any:
    return json.loads(value) if name in _JSON and isinstance(value, str) else value


def _written(row: dict[str, Any]) -> list[Any]:
    return [json.dumps(value) if name in _JSON else value for name, value in row.items()]
