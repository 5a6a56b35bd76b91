"""The one thread that loads and runs.

MLX streams belong to the thread that made them, and a lazy array can be evaluated in that thread only. So everything
that pipelines compute is computed here, one job after another, and callers may be any thread.

The thread is a daemon that is never ended. MLX's cache of compiled functions is local to a thread and needs the
interpreter to be torn down: a thread that ends together with the interpreter aborts the process (mlx 0.32.4), one that
sleeps does not.

A fork copies no thread: the child of a process that has computed gets an error, that of one that has not may compute.
"""

import atexit
import os
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait

import mlx.core as mx

from .errors import Interrupted, UsageError


class Engine:
    """A pipeline's share of the thread: its jobs, and the means to stop them."""

    def __init__(self):
        self._stops: set[threading.Event] = set()  # one for each job that waits or runs

    def run(self, function: Callable, *args):
        """The function's result, computed in the engine's thread; from within that thread, directly.

        An exception that reaches the waiting caller, such as KeyboardInterrupt, stops the function at its next `check`
        and goes on once it has stopped.

        Raises:
            UsageError: this process was forked from one that had computed.
        """
        thread = _thread()
        future: Future = Future()
        stop = threading.Event()
        self._stops.add(stop)
        if threading.current_thread() is thread:
            _running.append(stop)
            try:
                return function(*args)
            finally:
                _running.remove(stop)
                self._stops.discard(stop)
        _jobs.put((future, stop, function, args))
        try:
            while not future.done():  # a signal that comes just before an endless wait would not end it
                wait([future], timeout=0.2)
            return future.result()
        finally:
            if not future.done():
                stop.set()
                wait([future])
            self._stops.discard(stop)

    def interrupt(self) -> None:
        """Stops what waits or runs, at its next `check`; without effect where nothing does."""
        for stop in list(self._stops):
            stop.set()

    def check(self) -> None:
        """Called between evaluations, in the engine's thread.

        Raises:
            Interrupted: somebody asked to stop.
        """
        if any(stop.is_set() for stop in _running):
            raise Interrupted("stopped on request")

    def watched(self, run: Callable, report: Callable[[int], None]) -> Callable:
        """A `run` that can be stopped after each piece, and then reports how many are done."""
        done = 0

        def run_watched(piece, *args):
            nonlocal done
            result = run(piece, *args)
            self.check()
            done += 1
            report(done)
            return result

        return run_watched


def evaluated(piece: Callable, *args):
    """The `run` of networks whose weights are in memory: one piece after the other is evaluated."""
    result = piece(*args)
    mx.eval(result)
    return result


_jobs: queue.SimpleQueue = queue.SimpleQueue()
_running: list[threading.Event] = []  # the stops of the job at hand and of those within it
_started: list[threading.Thread] = []
_starting = threading.Lock()


def _thread() -> threading.Thread:
    with _starting:
        if _started and not _started[0].is_alive():
            todo = 'start workers by "spawn": multiprocessing.set_start_method("spawn")'
            raise UsageError("this process was forked from one that had used MLX", "a process of its own", todo)
        if not _started:
            _started.append(threading.Thread(target=_work, name="flux-krea", daemon=True))
            _started[0].start()
            atexit.register(_stop_all)
    return _started[0]


def _work() -> None:
    while True:
        future, stop, function, args = _jobs.get()
        _running[:] = [stop]
        try:
            future.set_result(function(*args))
        except BaseException as error:
            future.set_exception(error)
        _running.clear()
        del future, stop, function, args  # a sleeping thread keeps nothing alive


def _after_fork() -> None:
    """In the child: nobody holds the lock, which another thread may have held."""
    global _starting
    _starting = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


def _stop_all() -> None:
    """The interpreter ends: what still runs stops after the piece at hand, and then the thread sleeps."""
    if not _started[0].is_alive():  # in a forked child
        return
    for stop in list(_running):
        stop.set()
    idle: Future = Future()
    _jobs.put((idle, threading.Event(), lambda: None, ()))
    wait([idle])
