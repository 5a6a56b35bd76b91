"""The server on 127.0.0.1: its lock, its socket, the connections that it takes, its start and its end."""

import asyncio
import contextlib
import os
import resource
import socket
import threading
from collections.abc import Iterator

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from mlx_flux_krea import home
from mlx_flux_krea.commands.shared.settings import make_folder
from mlx_flux_krea.errors import UsageError
from mlx_flux_krea.files import try_lock

from . import store
from .api import Services
from .app import make_app

ADDRESS = "127.0.0.1"  # and no other: use is personal
PORT = 7860
PORTS = 20  # that are tried, where none is named
_CONNECTIONS = 1100  # at a time, and fewer where the system allows fewer open files
_FILES = 4096  # open files that are asked for: the worker needs some of them
_SPARE = 256
_IDLE = 30  # seconds that a connection may stay without a first request


class _BoundedProtocol(H11Protocol):
    """HTTP over a connection; those above the limit are closed, and those that send nothing."""

    most = _CONNECTIONS

    def connection_made(self, transport) -> None:  # type: ignore[override]
        """Takes a connection."""
        if len(self.connections) >= self.most:
            transport.close()
            return
        super().connection_made(transport)
        asyncio.get_running_loop().call_later(_IDLE, self._close_if_silent)

    def connection_lost(self, exc) -> None:
        """Forgets a connection, if it was taken."""
        if getattr(self, "transport", None) is not None:
            super().connection_lost(exc)

    def _close_if_silent(self) -> None:
        if self.cycle is None and not self.transport.is_closing():
            self.transport.close()


class PageServer:
    """The server, in threads of its own.

    Args:
        port: to listen on; None: the first free one from `PORT` on.

    Attributes:
        token: that requests carry.
        port: that it listens on.
    """

    def __init__(self, port: int | None):
        self._socket = _listening(port)
        self.port: int = self._socket.getsockname()[1]
        self.services = Services(store.Store(store.path()))
        self.token = self.services.store.token()
        app = make_app(self.services, port=lambda: self.port, token=self.token)
        _BoundedProtocol.most = _connections()
        config = uvicorn.Config(
            app,
            http=_BoundedProtocol,
            ws="none",
            lifespan="on",
            log_level="warning",
            access_log=False,
            server_header=False,
            date_header=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=2,
            h11_max_incomplete_event_size=65536,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._serve, name="flux-krea-http", daemon=True)

    @property
    def url(self) -> str:
        """The link of the page, with the token in its fragment."""
        return f"http://{ADDRESS}:{self.port}/#token={self.token}"

    def start(self) -> None:
        """Starts the queue and the server."""
        self.services.pictures.scan()
        self.services.queue.start()
        self._thread.start()

    def wait(self) -> None:
        """Waits until the server ends, which it does on its own only if it fails."""
        while self._thread.is_alive():
            self._thread.join(0.2)

    def stop(self) -> None:
        """Ends the streams, the server and the queue; the running job is resumed at the next start."""
        self.services.events.close()
        self._server.should_exit = True
        self.services.setup.stop()
        self.services.queue.stop()
        self._thread.join(5)
        self.services.store.close()

    def _serve(self) -> None:
        self._server.run(sockets=[self._socket])


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Holds the lock of the home folder's page within the block.

    Raises:
        UsageError: another server has it.
    """
    make_folder(home.root())
    lock = try_lock(home.path(home.PAGE_LOCK))
    if lock is None:
        todo = "open its link, or end it first"
        raise UsageError("flux-krea ui runs already with this home folder", "one server", todo)
    try:
        yield
    finally:
        os.close(lock)


def _listening(port: int | None) -> socket.socket:
    """Returns a socket that listens on this machine alone.

    Raises:
        UsageError: the port is taken, or may not be used.
    """
    for tried in range(PORT, PORT + PORTS) if port is None else (port,):
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((ADDRESS, tried))
            listener.listen(128)
            return listener
        except OSError as error:
            listener.close()
            reason = error.strerror
    named = f"the ports {PORT} to {PORT + PORTS - 1}" if port is None else f"the port {port}"
    raise UsageError(f"{named} cannot be used: {reason}", "a free one", "name it with --port")


def _connections() -> int:
    """Returns how many connections are taken, so that files stay for the worker."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _FILES if hard == resource.RLIM_INFINITY else min(_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
            soft = wanted
    return _CONNECTIONS if soft == resource.RLIM_INFINITY else max(16, min(_CONNECTIONS, soft - _SPARE))
