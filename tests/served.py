"""A running `flux-krea ui` in a process of its own, and a client that sees and sends every byte."""

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

PROGRAM = """
import os, sys, time
sys.path.insert(0, sys.argv[1])
import judges
from mlx_flux_krea import cli, checkpoint
from mlx_flux_krea.server import queue
from mlx_flux_krea.filters import judges as filters_judges
filters_judges.load_judge = judges.load_judge
checkpoint.EVERY = 0
queue.MINUTE = float(sys.argv[3])
if sys.argv[2] != "0":  # a step takes so long
    from mlx_flux_krea.generator import Generator
    show = Generator._show_preview
    Generator._show_preview = lambda *a, **b: (time.sleep(float(sys.argv[2])), show(*a, **b))[1]
cli.main(sys.argv[4:])"""


class Served:
    """The process, and requests to it.

    Args:
        home: its home folder.
        step: seconds that each step takes longer.
        minute: seconds of a minute in which the model is not used.
        port: that it listens on; 0: a free one.
    """

    def __init__(self, home: Path, step: float = 0.0, minute: float = 60.0, port: int = 0):
        self.home = home
        with socket.socket() as free:
            free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            free.bind(("127.0.0.1", port))
            self.port = free.getsockname()[1]
        words = [PROGRAM, Path(__file__).parent, step, minute, "ui", "--no-open", "--json", "--port", self.port]
        self.errors = open(home.parent / f"{home.name}-{self.port}.err", "w+")  # noqa: SIM115
        env = os.environ | {"FLUX_KREA_HOME": str(home), "XDG_DATA_HOME": str(home.parent / "data")}
        command = [sys.executable, "-c", *map(str, words)]
        self.process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=self.errors, text=True)
        line = self.process.stdout.readline() if self.process.stdout else ""
        assert line, self.said()
        self.token = json.loads(line)["token"]

    def said(self) -> str:
        self.errors.seek(0)
        return self.errors.read()

    def raw(self, method: str, path: str, body: bytes | None = None, **headers: str):
        """Sends a request. Returns status, headers and body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        sent = {"Authorization": f"Bearer {self.token}"} | {n.replace("_", "-"): v for n, v in headers.items()}
        try:
            connection.request(method, path, body, {name: value for name, value in sent.items() if value})
            answer = connection.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            connection.close()

    def ask(self, method: str, path: str, value=None):
        """Returns status and JSON."""
        status, _, data = self.raw(method, path, None if value is None else json.dumps(value).encode())
        return status, json.loads(data)

    def good(self, method: str, path: str, value=None):
        status, answer = self.ask(method, path, value)
        assert status < 300, answer
        return answer

    def until(self, true, seconds: float = 60):
        """Waits until a function of this server is true. Returns its value."""
        end = time.monotonic() + seconds
        while not (found := true(self)):
            assert time.monotonic() < end, self.said()
            assert self.process.poll() is None, self.said()
            time.sleep(0.05)
        return found

    def ended(self, key: str) -> dict:
        """Waits for the end of a job."""

        def is_ended(one):
            job = one.good("GET", f"/api/queue/{key}")
            return job if job["ended"] else None

        return self.until(is_ended)

    def make(self, **request) -> dict:
        """Makes the pictures of a request. Returns the ended job."""
        return self.ended(self.good("POST", "/api/queue", request)["id"])

    def stop(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(30)
        finally:
            with contextlib.suppress(OSError):
                self.process.kill()


@contextlib.contextmanager
def serving(home: Path, step: float = 0.0, minute: float = 60.0, port: int = 0):
    """A server within the block; what it wrote to standard error holds no traceback."""
    server = Served(home, step, minute, port)
    try:
        yield server
        assert "Traceback" not in server.said(), server.said()
    finally:
        server.stop()
