"""The one thread that loads and computes.

MLX streams belong to the thread that made them, and a lazy array can be evaluated in that thread only. So everything
that pipelines compute is computed here, one job after another, and callers may be any thread.

The thread is a daemon that is never ended. MLX's cache of compiled functions is local to a thread and needs the
interpreter to be torn down: a thread that ends together with the interpreter aborts the process (mlx 0.32.4), one that
sleeps does not.

A fork copies no thread: the child of a process that has computed gets an error, that of one that has not may compute.
"""

import atexit
import contextlib
import os
import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass
from typing import Any, Generic, ParamSpec, TypeVar

import mlx.core as mx

from .errors import Interrupted, UsageError, gpu_error
from .models.layers import smaller

_CACHED = 10**9  # bytes of freed memory, at most
_SWITCH = "FLUX_KREA_IN_FLIGHT"  # in the environment; 0: each part starts when the one before it has ended
P = ParamSpec("P")
T = TypeVar("T")


class WorkerJob(Generic[T]):
    """One call of a function in the worker's thread; from `Worker.submit`.

    Args:
        function: the call.
        jobs: the list that this job leaves when it ends.
    """

    def __init__(self, function: Callable[[], T], jobs: "list[WorkerJob[Any]]"):
        self._function: Callable[[], T] | None = function
        self._jobs = jobs
        self._stop = threading.Event()
        self._future: Future[T] = Future()

    @property
    def is_stopped(self) -> bool:
        """True once `stop` was called."""
        return self._stop.is_set()

    def stop(self) -> None:
        """Stops this job and the jobs inside it at their next `check`; a job that waits never starts. Any thread."""
        self._stop.set()

    def result(self) -> T:
        """Waits for the function's result.

        An exception that reaches the waiting caller, such as KeyboardInterrupt, stops this job and no other. It
        propagates once the job has ended.

        Raises:
            Interrupted: the job was stopped.
        """
        try:
            while not self._future.done():  # a signal that comes just before an endless wait would not end it
                wait([self._future], timeout=0.2)
            return self._future.result()
        finally:
            if not self._future.done():
                self.stop()
                wait([self._future])

    def call(self) -> None:
        """Calls the function in this thread, which must be the worker's, for `result` to return or raise."""
        function, self._function = self._function, None  # a job that is still referenced holds no arrays
        _running.append(self)
        try:
            if self.is_stopped or function is None:
                raise Interrupted("stopped on request")
            result = function()
        except BaseException as error:
            self._end()
            self._future.set_exception(explained(error))
        else:
            self._end()
            self._future.set_result(result)

    def _end(self) -> None:
        """Leaves both lists before anybody can see the result: `interrupt` must not choose a job that has ended."""
        _running.remove(self)
        self._jobs.remove(self)


class Worker:
    """A pipeline's share of the thread: its jobs, and the means to stop them."""

    def __init__(self):
        self._jobs: list[WorkerJob[Any]] = []  # those that wait or run, in the order in which they came

    def submit(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> WorkerJob[T]:
        """Queues a call for the thread. From within that thread it is made at once, inside the running job.

        Raises:
            UsageError: this process was forked from one that had computed.
        """
        thread = _thread()
        job = WorkerJob(lambda: function(*args, **kwargs), self._jobs)
        self._jobs.append(job)
        if threading.current_thread() is thread:
            job.call()
        else:
            _waiting.put(job)
        return job

    def run(self, function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Returns the function's result, computed in the worker's thread; see `WorkerJob.result`.

        Raises:
            UsageError: this process was forked from one that had computed.
            Interrupted: the job was stopped.
        """
        return self.submit(function, *args, **kwargs).result()

    def interrupt(self) -> None:
        """Stops one job at its next `check`; without effect where this worker has none. For any thread.

        In the worker's thread, where callbacks run, it is the job that calls this. From any other thread it is the job
        that runs, with all jobs inside it; if none runs, the one that has waited longest.
        """
        jobs = list(self._jobs)
        running = [job for job in list(_running) if job in jobs]
        if running and threading.current_thread() is _thread():
            running[-1].stop()
        elif jobs:
            (running or jobs)[0].stop()

    def check(self) -> None:
        """Stops the job at hand, if that was asked for. Called between evaluations, in the worker's thread.

        Raises:
            Interrupted: this job, or one that it is inside of, was stopped.
        """
        if any(job.is_stopped for job in _running):
            raise Interrupted("stopped on request")

    def stoppable(self, run: Callable, report: Callable[[int], None]) -> Callable:
        """Returns a `run` that can be stopped after each part, and then reports how many are done."""
        done = 0

        def run_stoppable(part, *args):
            nonlocal done
            result = run(part, *args)
            self.check()
            done += 1
            report(done)
            return result

        return run_stoppable


def limit_cache(most: int | None = None) -> None:
    """Limits the freed memory that MLX keeps on a GPU for its next arrays; its own limit is all of a small Mac's.

    Args:
        most: bytes; None: a sixteenth of what the GPU offers. A gigabyte at most.
    """
    if mx.default_device().type == mx.gpu:
        offered = int(mx.device_info().get("max_recommended_working_set_size", 0))
        mx.set_cache_limit(min(offered // 16 if most is None else most, _CACHED))


def evaluated(part: Callable, *args):
    """The `run` of networks whose weights are in memory: evaluates one part after the other.

    A part whose command failed on the GPU is computed once more, in smaller commands.

    Raises:
        ResourceError: it failed again.
    """
    try:
        return _evaluate(part, *args)
    except RuntimeError as error:
        return _repeated(part, args, error)


def is_in_flight() -> bool:
    """Returns False where the environment switches `Flight` off."""
    return os.environ.get(_SWITCH) != "0"


@dataclass(frozen=True)
class _Started:
    """A part in flight: its call, its results, and what to do when it has ended."""

    part: Callable
    args: tuple
    results: tuple[mx.array, ...]
    ended: Callable[[], None]

    def repeat(self, error: RuntimeError) -> None:
        """Computes the part once more, and puts the new results in the place of the old ones.

        Raises:
            ResourceError: it failed again.
            RuntimeError: the error, where it is none of the GPU.
        """
        for old, new in zip(self.results, _arrays(_repeated(self.part, self.args, error)), strict=True):
            old[:] = new
        mx.eval(self.results)


class Flight:
    """Evaluates the parts of a network with one in flight: each starts before the one before it is waited for.

    So a GPU finds its next commands while it still computes, and does not wait until Python has written them. Results
    are those of `evaluated`, to the bit.

    MLX raises the failure of a command when the next one is written, or when a result is waited for (mlx 0.32,
    backend/metal/device.cpp). Then both parts are computed once more, in smaller commands: the one in flight, whose
    results are replaced where they are, and the one that has read them. What else was computed from the old results
    would stay wrong; so only a part that gets results as they are starts before the one in flight has ended.

    Args:
        is_on: False: each part starts when the one before it has ended.
    """

    def __init__(self, is_on: bool = True):
        self._is_on = is_on and is_in_flight()
        self._last: _Started | None = None
        self._results: weakref.WeakValueDictionary[int, mx.array] = weakref.WeakValueDictionary()  # by id

    @property
    def is_empty(self) -> bool:
        """True where no part is in flight."""
        return self._last is None

    def start(self, part: Callable, args: tuple, ended: Callable[[], None]) -> Any:
        """Starts a part, waits for the one before it, and returns the part's result, which is still computed.

        Args:
            part: to compute.
            args: of the call.
            ended: called once the part has ended, and is not computed again.

        Raises:
            ResourceError: it failed again.
        """
        if not self._is_on or not self._are_results(args):
            result = self.run(part, args)
            ended()
            return result
        before, self._last = self._last, None
        try:
            result = _start(part, *args)
            if before:
                _wait(before.results)
        except RuntimeError as error:
            with contextlib.suppress(RuntimeError):
                mx.synchronize()  # what comes next meets no failure of these commands
            if before:
                before.repeat(error)
            result = _repeated(part, args, error)
        if before:
            before.ended()
        self._last = _Started(part, args, self._noted(result), ended)
        return result

    def run(self, part: Callable, args: tuple) -> Any:
        """Returns the result of a part, evaluated, after the one in flight.

        Raises:
            ResourceError: one of them failed again.
        """
        self.settle(args)
        result = evaluated(part, *args)
        self._noted(result)
        return result

    def settle(self, args: tuple = ()) -> None:
        """Waits for the part in flight.

        Args:
            args: of the next part.

        Raises:
            ResourceError: it failed again, or it failed and the arguments may be computed from its old results.
        """
        last, self._last = self._last, None
        if last is None:
            return
        try:
            _wait(last.results)
        except RuntimeError as error:
            if args and not self._are_results(args):
                raise explained(error) from None
            last.repeat(error)
        last.ended()

    def end(self) -> None:
        """Waits for the part in flight, whose result nobody will read."""
        last, self._last = self._last, None
        if last:
            with contextlib.suppress(RuntimeError):
                _wait(last.results)

    def _are_results(self, args: tuple) -> bool:
        """True where some of the arguments are results as they are, so that the others are computed from none."""
        return any(self._results.get(id(one)) is one for one in args if isinstance(one, mx.array))

    def _noted(self, result: Any) -> tuple[mx.array, ...]:
        """Returns the arrays of a result, which are known from now on."""
        arrays = _arrays(result)
        self._results.update({id(array): array for array in arrays})
        return arrays


def _repeated(part: Callable, args: tuple, error: RuntimeError) -> Any:
    """Computes a part once more, in smaller commands, after an error.

    Raises:
        ResourceError: it failed again.
        RuntimeError: the error, where it is none of the GPU.
    """
    if gpu_error(error) is None:
        raise error
    with smaller():
        try:
            return _evaluate(part, *args)
        except RuntimeError as again:
            raise explained(again) from None


def explained(error: BaseException) -> BaseException:
    """Returns a failure of the GPU as an error for a person, and any other error as it is."""
    return gpu_error(error) or error


def _evaluate(part: Callable, *args):
    result = part(*args)
    mx.eval(result)
    return result


def _start(part: Callable, *args):
    result = part(*args)
    mx.async_eval(result)
    return result


def _wait(results: tuple[mx.array, ...]) -> None:
    mx.eval(results)


def _arrays(result: Any) -> tuple[mx.array, ...]:
    return tuple(result) if isinstance(result, tuple | list) else (result,)


_waiting: "queue.SimpleQueue[WorkerJob]" = queue.SimpleQueue()
_running: list[WorkerJob] = []  # the job at hand, and the jobs inside it
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
    limit_cache()
    while True:
        job = _waiting.get()
        job.call()
        del job  # a sleeping thread holds no arrays


def _after_fork() -> None:
    """In the child: nobody holds the lock, which another thread may have held."""
    global _starting
    _starting = threading.Lock()


os.register_at_fork(after_in_child=_after_fork)


def _stop_all() -> None:
    """Stops the running jobs when the interpreter ends; then the thread sleeps."""
    if not _started[0].is_alive():  # in a forked child
        return
    for job in list(_running):
        job.stop()
    Worker().run(lambda: None)
