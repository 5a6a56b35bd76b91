"""The thread that computes: stopping it, and leaving it."""

import subprocess
import sys
import threading

import pytest

from mlx_flux_krea.errors import Interrupted
from mlx_flux_krea.worker import Worker


def check_until_stopped(worker: Worker, started: threading.Event, ended: list) -> None:
    started.set()
    try:
        while True:
            worker.check()
    finally:
        ended.append(True)


def wait_and_return(go: threading.Event, value):
    """A job that runs until the test lets it end."""
    assert go.wait(30)
    return value


def test_jobs_run_in_one_thread_that_is_not_the_callers():
    worker, other = Worker(), Worker()
    names = {w.run(lambda: threading.current_thread().name) for w in (worker, other)}
    assert names == {"flux-krea"}


def test_a_job_may_run_another_one():
    worker = Worker()
    assert worker.run(lambda: worker.run(lambda: 7)) == 7


def test_interrupt_stops_this_workers_job_and_the_next_one_runs():
    worker, started, ended = Worker(), threading.Event(), []
    threading.Thread(target=lambda: (started.wait(), worker.interrupt())).start()
    with pytest.raises(Interrupted):
        worker.run(check_until_stopped, worker, started, ended)
    assert ended == [True]
    assert worker.run(lambda: worker.check() or 1) == 1


def test_interrupting_one_pipeline_leaves_anothers_job_alone():
    worker, other = Worker(), Worker()

    def work():
        other.interrupt()
        worker.check()
        return 1

    assert worker.run(work) == 1


def test_interrupt_reaches_a_job_within_anothers_job():
    worker, inner = Worker(), Worker()

    def job():
        inner.interrupt()
        inner.check()

    def outer():
        with pytest.raises(Interrupted):
            inner.run(job)
        worker.check()
        return 1

    assert worker.run(outer) == 1


def test_a_job_that_stops_itself_leaves_the_job_around_it_running():
    """As a callback that generates with the pipeline that calls it."""
    worker = Worker()

    def inner():
        worker.interrupt()
        worker.check()

    def outer():
        with pytest.raises(Interrupted):
            worker.run(inner)
        worker.check()
        return worker.run(lambda: worker.check() or 1)

    assert worker.run(outer) == 1


def test_a_job_that_is_stopped_from_elsewhere_takes_the_jobs_within_it_along():
    worker, started, ended = Worker(), threading.Event(), []

    def outer():
        with pytest.raises(Interrupted):
            worker.run(check_until_stopped, worker, started, ended)
        worker.check()

    job = worker.submit(outer)
    assert started.wait(30)
    worker.interrupt()
    with pytest.raises(Interrupted):
        job.result()
    assert ended == [True]


def test_of_two_jobs_from_two_threads_one_is_stopped_and_the_other_finishes():
    worker, started, ended, results = Worker(), threading.Event(), [], {}

    def call(name, function, *args):
        try:
            results[name] = worker.run(function, *args)
        except Interrupted as error:
            results[name] = error

    first = threading.Thread(target=call, args=("first", check_until_stopped, worker, started, ended))
    first.start()
    assert started.wait(30)
    second = threading.Thread(target=call, args=("second", lambda: worker.check() or 2))
    second.start()
    worker.interrupt()
    first.join(30)
    second.join(30)
    assert isinstance(results["first"], Interrupted)
    assert results["second"] == 2


def test_a_job_that_waits_is_stopped_by_itself_and_never_starts():
    worker, go, called = Worker(), threading.Event(), []
    first, second, third = (
        worker.submit(wait_and_return, go, 1),
        worker.submit(lambda: called.append(2)),
        worker.submit(lambda: worker.check() or 3),
    )
    second.stop()
    go.set()
    assert (first.result(), third.result(), called) == (1, 3, [])
    with pytest.raises(Interrupted):
        second.result()


def test_interrupt_stops_the_job_that_waits_where_none_of_this_worker_runs():
    worker, other, go = Worker(), Worker(), threading.Event()
    running = other.submit(wait_and_return, go, 1)
    first, second = worker.submit(lambda: 2), worker.submit(lambda: 3)
    worker.interrupt()
    go.set()
    assert (running.result(), second.result()) == (1, 3)
    with pytest.raises(Interrupted):
        first.result()


def test_a_keyboard_interrupt_waits_until_the_job_has_stopped():
    """In a process of its own, since the signal goes to its main thread."""
    script = """
import os, signal, threading, time
from mlx_flux_krea.worker import Worker
worker = Worker()
ended, cleaned_up = [], threading.Event()
def job():
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        while True:
            worker.check()
    finally:
        cleaned_up.wait(0.2)  # as cleaning up may take a while
        ended.append(True)
try:
    worker.run(job)
except KeyboardInterrupt:
    print("interrupted", ended)
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=False)
    assert (ran.returncode, ran.stdout) == (0, "interrupted [True]\n"), ran.stderr


def test_the_process_ends_cleanly_with_compiled_functions_in_the_thread():
    """A thread that ends together with the interpreter aborts the process (mlx 0.32.4); ours must not."""
    script = """
import mlx.core as mx
from mlx_flux_krea.worker import Worker
square = mx.compile(lambda x: x * x + 1)
Worker().run(lambda: mx.eval(square(mx.ones(3))))
"""
    for _ in range(5):
        ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
        assert ran.returncode == 0, ran.stderr


def test_the_process_ends_cleanly_while_a_job_runs():
    script = """
import threading
from mlx_flux_krea.worker import Worker
worker, started = Worker(), threading.Event()
def job():
    started.set()
    while True:
        worker.check()
threading.Thread(target=lambda: worker.run(job), daemon=True).start()
started.wait()
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=False)
    assert ran.returncode == 0, ran.stderr


FORK = """
import os, signal, sys
import mlx.core as mx
from mlx_flux_krea.worker import Worker
worker = Worker()
product = lambda: float((mx.ones((64, 64)) @ mx.ones((64, 64))).sum())
{before}
child = os.fork()
if not child:
    signal.alarm(20)
    try:
        print(worker.run(product), flush=True)
    except ValueError as error:
        print(error, flush=True)
    sys.exit(3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
print(worker.run(product))
"""


@pytest.mark.parametrize(
    ("before", "expected"),
    [
        ("worker.run(product)", "this process was forked from one that had used MLX; expected a process"),
        ("", "262144.0"),
    ],
)
def test_a_forked_child_computes_or_says_why_not_and_ends(before, expected):
    script = FORK.format(before=before)
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert lines[0].startswith(expected)
    assert lines[1:] == ["3", "262144.0"]
