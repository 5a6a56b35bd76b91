"""A hub on this machine: enough of its protocol for the hub's own client, with whatever can go wrong, on order.

    with Hub(folder, "owner/name") as hub:
        hub.cut_after = [1000, 250_000]         the next downloads of weights end there
        run_command("convert", "owner/name", cwd=..., **hub.env(home))
        hub.requests                            what was asked for: (method, path, first byte)

Repositories are folders. Files of weights are announced as LFS does it (sha256), the others as git does (sha1). As on
the hub, weights come from another host, which refuses requests that carry a login.
"""

import contextlib
import hashlib
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" * 6 + "c0de"
WEIGHTS = (".safetensors", ".gguf", ".bin")


class Hub:
    """Serves one repository.

    Args:
        folder: its files.
        repo: its name.
        gated: True, or "auto" as the hub says it.
    """

    def __init__(self, folder: Path, repo: str, gated=False):
        self.folder, self.repo, self.gated = folder, repo, gated
        self.requests: list[tuple[str, str, int]] = []
        self.refusals: list[tuple[int, dict]] = []  # (status, headers) of the next requests for files
        self.refuse_all: tuple[int, dict] | None = None  # of every request
        self.cut_after: list[int] = []  # bytes after which the next downloads of weights end
        self.spoiled: set[str] = set()  # names of files that come with another byte in them
        self.gone_after: int | None = None  # bytes of weights in all, after which nobody answers any more
        self.rate: float | None = None  # bytes a second, of each download of weights
        self.sent = 0  # bytes of weights
        self.tokens: dict[str, str] = {}  # who may log in
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True

    def __enter__(self):
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()
        return self

    def __exit__(self, *_):
        self.stop()

    def stop(self) -> None:
        """Nobody answers at this port any more."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def env(self, home: Path, **more: str) -> dict[str, str]:
        """The variables with which a command finds this hub, and an empty cache."""
        found = {"HF_ENDPOINT": self.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home / "hub"), "HF_TOKEN": ""}
        return {**found, "NO_PROXY": "*", **more}

    def fetched(self) -> list[str]:
        """Names of the files that were asked for, in this order."""
        return [path.split(f"/resolve/{COMMIT}/")[1] for _, path, _ in self.requests if "/resolve/" in path]

    def begun_at(self, name: str) -> list[int]:
        """The first bytes that were asked for of a file."""
        return [start for _, path, start in self.requests if path.endswith(f"/resolve/{COMMIT}/{name}")]

    def info(self) -> dict:
        """Describes a model with its files, as the hub does."""
        siblings = []
        for path in sorted(p for p in self.folder.rglob("*") if p.is_file()):
            data, name = path.read_bytes(), path.relative_to(self.folder).as_posix()
            entry = {"rfilename": name, "size": len(data), "blobId": _git_sha1(data)}
            if name.endswith(WEIGHTS):
                entry["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
            siblings.append(entry)
        return {"id": self.repo, "sha": COMMIT, "gated": self.gated, "private": False, "siblings": siblings}

    def _handler(hub):
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                with contextlib.suppress(OSError):  # the other side went away
                    hub._answer(self)

            do_HEAD = do_GET

            def log_message(self, *_):
                pass

        return Handler

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(urlsplit(request.path).path)
        asked = request.headers.get("Range", "bytes=0-").removeprefix("bytes=")
        start, end = (int(n) if n else None for n in asked.split("-"))
        self.requests.append((request.command, path, start))
        is_file = path.startswith(f"/{self.repo}/resolve/")
        if path.startswith("/cdn/") and "Authorization" in request.headers:
            self.refuse_all = (400, {})
        user = self.tokens.get(request.headers.get("Authorization", "").removeprefix("Bearer "))
        if refused := self.refuse_all or (self.refusals.pop(0) if is_file and self.refusals else None):
            _send(request, refused[0], b"<html>no</html>", refused[1])
        elif self.tokens and request.headers.get("Authorization") and user is None:
            _send(request, 401, b'{"error": "Invalid credentials"}', {"X-Error-Message": "Invalid credentials"})
        elif path.startswith("/cdn/"):
            self._send_file(request, path.removeprefix("/cdn/"), start, end)
        elif path == "/api/whoami-v2":
            _send(request, 200, json.dumps({"name": user, "type": "user"}).encode())
        elif path == f"/api/models/{self.repo}":
            _send(request, 200, json.dumps(self.info()).encode())
        elif not path.startswith((f"/{self.repo}/", f"/api/models/{self.repo}/")):
            _send(request, 404, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"})
        elif self.gated and user is None:
            _send(request, 401, b'{"error": "Access is restricted"}', {"X-Error-Code": "GatedRepo"})
        elif path == f"/api/models/{self.repo}/auth-check":
            _send(request, 200, b"{}")
        else:
            name = path.removeprefix(f"/{self.repo}/resolve/").partition("/")[2]
            if name.endswith(WEIGHTS) and request.command == "GET":
                _send(request, 302, b"", {"Location": f"{self.url.replace('127.0.0.1', 'localhost')}/cdn/{name}"})
            else:
                self._send_file(request, name, start, end)

    def _send_file(self, request, name: str, start: int, end: int | None) -> None:
        if not (self.folder / name).is_file():
            _send(request, 404, b'{"error": "Entry not found"}', {"X-Error-Code": "EntryNotFound"})
            return
        data, is_weight = (self.folder / name).read_bytes(), name.endswith(WEIGHTS)
        etag = hashlib.sha256(data).hexdigest() if is_weight else _git_sha1(data)
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        if is_weight:
            headers |= {"X-Linked-Etag": f'"{etag}"', "X-Linked-Size": str(len(data))}
        if name in self.spoiled:
            data = data[:-1] + bytes([data[-1] ^ 1])
        status = 206 if "Range" in request.headers else 200
        end = len(data) if end is None else min(end + 1, len(data))
        if status == 206:
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
        cut = self.cut_after.pop(0) if is_weight and self.cut_after and request.command == "GET" else None
        _send(request, status, data[start:end], headers, self._pace(is_weight, cut))

    def _pace(self, is_weight: bool, cut: int | None):
        """Writes a body as fast, and as far, as ordered."""

        def write(request, body: bytes) -> None:
            step = 2**14 if self.rate is None else max(1, int(self.rate / 50))
            for at in range(0, len(body), step) if is_weight else [0]:
                part = body[at : at + step] if is_weight else body
                if cut is not None and at + len(part) > cut:
                    request.wfile.write(part[: cut - at])
                    _hang_up(request)
                    return
                if is_weight and self.gone_after is not None and self.sent >= self.gone_after:
                    _hang_up(request)
                    self._server.socket.close()
                    return
                request.wfile.write(part)
                self.sent += len(part) if is_weight else 0
                if self.rate and is_weight:
                    time.sleep(len(part) / self.rate)

        return write


def _hang_up(request) -> None:
    """In the middle of what was promised."""
    request.close_connection = True
    request.connection.shutdown(socket.SHUT_RDWR)


def _send(request, status: int, body: bytes, headers: dict | None = None, write=None) -> None:
    request.send_response(status)
    for name, value in {"Content-Type": "application/json", **(headers or {}), "Content-Length": len(body)}.items():
        request.send_header(name, str(value))
    if status == 429:
        request.close_connection = True
    request.end_headers()
    if request.command == "GET":
        (write or (lambda request, body: request.wfile.write(body)))(request, body)


def _git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
