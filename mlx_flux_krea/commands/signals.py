"""SIGINT, SIGTERM and SIGHUP as one exception, raised where it is neither lost nor taken for something else.

An exception out of a signal handler appears between any two instructions. In the middle of an import it is swallowed
or breaks an extension module, in `__del__` it is printed and forgotten, before `main` nobody catches it. There the
signal is kept, and a timer looks again and again. It is raised once: a second Ctrl-C does not disturb the undoing.
"""

import contextlib
import signal

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_RETRY = 0.02  # seconds
_arrived: list[int] = []  # the signals that were kept
_holds = ["until main"]  # reasons to keep them
_raised: list["Stopped"] = []


class Stopped(BaseException):
    """A signal asked the command to stop."""

    def __init__(self, number: int):
        self.message, self.exit_code = ("interrupted", 130) if number == signal.SIGINT else ("terminated", 143)


def install() -> None:
    """From now on signals are kept; after `listen` they raise `Stopped`. Ignored ones (nohup) stay ignored."""
    for number in _STOPPING:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _arrive)


def listen() -> None:
    """The caller is ready for `Stopped`, from here to `finish`."""
    _holds.clear()


def check() -> None:
    """Raises `Stopped` again where another exception has taken its place, such as a failure in a `finally`."""
    if _raised:
        raise _raised[0]


@contextlib.contextmanager
def held():
    """Within this block signals are kept: for what should be done as a whole."""
    _holds.append("block")
    try:
        yield
    finally:
        _holds.remove("block")


def finish() -> None:
    """What was asked for is done or undone: signals have no effect any more, and the exit code stands."""
    for number in (*_STOPPING, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)
    signal.setitimer(signal.ITIMER_REAL, 0)


def _arrive(number: int, frame) -> None:
    _arrived.append(number)
    _look(number, frame)


def _look(_, frame) -> None:
    if _holds or _fragile(frame):
        signal.signal(signal.SIGALRM, _look)
        signal.setitimer(signal.ITIMER_REAL, _RETRY, _RETRY)
    else:
        finish()
        _raised.append(Stopped(_arrived[0]))
        raise _raised[0]


def _fragile(frame) -> bool:
    while frame:
        if frame.f_code.co_filename.startswith("<frozen importlib") or frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False
