"""SIGINT, SIGTERM and SIGHUP as one exception, raised where it is neither lost nor taken for something else.

An exception out of a signal handler appears between any two instructions. In the middle of an import it is swallowed
or breaks an extension module, in `__del__` it is printed and forgotten, before `main` nobody catches it. There the
signal is kept. A timer looks again and again until `finish`, also after it was raised, for somebody may have swallowed
it unseen. Where what was done is being undone, nothing is raised: a second Ctrl-C does not disturb that.
"""

import contextlib
import signal
import sys

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_RETRY = 0.02  # seconds
_arrived: list[int] = []  # the signals that were kept
_holds = ["until main"]  # reasons to keep them


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
    if _undoing():
        raise Stopped(_arrived[0])


@contextlib.contextmanager
def held():
    """Within this block signals are kept: for what should be done as a whole."""
    _holds.append("block")
    try:
        yield
    finally:
        _holds.remove("block")


def hold() -> None:
    """Signals are kept until `let_go`; for any thread. What arrived before is raised: nothing falls in between."""
    if "hold" in _holds:
        return
    _holds.append("hold")
    if _arrived:
        let_go()
        raise Stopped(_arrived[0])


def let_go() -> None:
    """Ends `hold`, where there was one."""
    with contextlib.suppress(ValueError):
        _holds.remove("hold")


def forget() -> None:
    """What arrived was dealt with; what comes next raises again."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    _arrived.clear()


def finish() -> None:
    """What was asked for is done or undone: signals have no effect any more, and the exit code stands."""
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
    """Whether what runs now, such as a `finally`, runs because of a `Stopped`."""
    error = sys.exc_info()[1]
    while error and not isinstance(error, Stopped):
        error = error.__context__
    return error is not None


def _fragile(frame) -> bool:
    while frame:
        if frame.f_code.co_filename.startswith("<frozen importlib") or frame.f_code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False
