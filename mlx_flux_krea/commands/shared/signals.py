"""SIGINT, SIGTERM and SIGHUP as one exception, raised only where it is not lost.

A signal handler may run between any two instructions. An exception raised there is swallowed or breaks an extension
module during an import, is printed and forgotten in `__del__`, and is caught by nobody before `main`. In these places
the signal is kept pending. A timer tries again until `finish`, even after the exception was raised, since other code
may have swallowed it. While the work is being undone nothing is raised, so that a second Ctrl-C does not disturb it.
"""

import contextlib
import signal
import sys

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_RETRY = 0.02  # seconds
_arrived: list[int] = []  # pending signals
_holds = ["until main"]  # reasons to keep them pending


class Stopped(BaseException):
    """Raised where a signal stops the command."""

    def __init__(self, number: int):
        self.message, self.exit_code = ("interrupted", 130) if number == signal.SIGINT else ("terminated", 143)


@contextlib.contextmanager
def continued(how: str):
    """Adds to the message of a signal that stops the block how the work is continued.

    Args:
        how: a command, and that it continues.
    """
    try:
        yield
    except Stopped as stopped:
        stopped.message = f"{stopped.message}; {how}"
        raise


def install() -> None:
    """Takes the signals and keeps them pending until `listen`. Ignored signals (nohup) stay ignored."""
    for number in _STOPPING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _arrive)


def listen() -> None:
    """Lets signals raise `Stopped` from now on, until `finish`."""
    _holds.clear()


def check() -> None:
    """Raises `Stopped` again where another exception replaced it, such as a failure in a `finally`."""
    if _undoing():
        raise Stopped(_arrived[0])


@contextlib.contextmanager
def held():
    """Keeps signals pending within the block, for work that must not be interrupted."""
    _holds.append("block")
    try:
        yield
    finally:
        _holds.remove("block")


def hold() -> None:
    """Keeps signals pending until `let_go`, from any thread. A signal that arrived earlier is raised."""
    if "hold" in _holds:
        return
    _holds.append("hold")
    if _arrived:
        let_go()
        raise Stopped(_arrived[0])


def let_go() -> None:
    """Ends `hold`, if there was one."""
    with contextlib.suppress(ValueError):
        _holds.remove("hold")


def forget() -> None:
    """Drops pending signals; later ones raise again."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    _arrived.clear()


def finish() -> None:
    """Ignores signals from now on: the work is done or undone, and the exit code stands."""
    for number in (*_STOPPING, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)
    signal.setitimer(signal.ITIMER_REAL, 0)


def _arrive(number: int, frame) -> None:
    _arrived.append(number)
    signal.signal(signal.SIGALRM, _look)
    signal.setitimer(signal.ITIMER_REAL, _RETRY, _RETRY)
    _look(number, frame)


def _look(_, frame) -> None:
    if not (_holds or _fragile(frame) or _undoing()):
        raise Stopped(_arrived[0])


def _undoing() -> bool:
    """True while a `Stopped` is being handled, for example in a `finally`."""
    error = sys.exc_info()[1]
    while error and not isinstance(error, Stopped):
        error = error.__context__
    return error is not None


def _fragile(frame) -> bool:
    """True inside an import or `__del__`, where an exception would be lost."""
    while frame:
        if frame.f_code.co_filename.startswith("<frozen importlib") or frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False
