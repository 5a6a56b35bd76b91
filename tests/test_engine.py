"""The thread that computes: stopping it, and leaving it."""

import subprocess
import sys
import threading
import time

import pytest

from mlx_flux_krea.errors import Interrupted
from mlx_flux_krea.worker import Engine


def busy(engine: Engine, started: threading.Event, ended: list) -> None:
    started.set()
    try:
        while True:
            engine.check()
            time.sleep(0.001)
    finally:
        ended.append(True)


def test_jobs_run_in_one_thread_that_is_not_the_callers():
    engine, other = Engine(), Engine()
    names = {e.run(lambda: threading.current_thread().name) for e in (engine, other)}
    assert names == {"flux-krea"}


def test_a_job_may_run_another_one():
    engine = Engine()
    assert engine.run(lambda: engine.run(lambda: 7)) == 7


def test_interrupt_stops_this_engines_job_and_the_next_one_runs():
    engine, started, ended = Engine(), threading.Event(), []
    threading.Thread(target=lambda: (started.wait(), engine.interrupt())).start()
    with pytest.raises(Interrupted):
        engine.run(busy, engine, started, ended)
    assert ended == [True]
    assert engine.run(lambda: engine.check() or 1) == 1


def test_interrupting_one_pipeline_leaves_anothers_job_alone():
    engine, other = Engine(), Engine()

    def work():
        other.interrupt()
        engine.check()
        return 1

    assert engine.run(work) == 1


def test_interrupt_reaches_a_job_within_anothers_job():
    engine, inner = Engine(), Engine()

    def job():
        inner.interrupt()
        inner.check()

    def outer():
        with pytest.raises(Interrupted):
            inner.run(job)
        engine.check()
        return 1

    assert engine.run(outer) == 1
    assert not inner._stops


def test_a_job_that_waits_is_stopped_too():
    engine, started, ended, seen = Engine(), threading.Event(), [], []

    def second():
        started.wait()
        try:
            engine.run(lambda: engine.check())
        except Interrupted:
            seen.append("second")

    def stop():
        started.wait()
        while len(engine._stops) < 2:
            time.sleep(0.001)
        engine.interrupt()

    threads = [threading.Thread(target=t) for t in (second, stop)]
    for thread in threads:
        thread.start()
    with pytest.raises(Interrupted):
        engine.run(busy, engine, started, ended)
    for thread in threads:
        thread.join()
    assert seen == ["second"]


def test_a_keyboard_interrupt_waits_until_the_job_has_stopped():
    """In a process of its own, since the signal goes to its main thread."""
    script = """
import os, signal, threading, time
from mlx_flux_krea.worker import Engine
engine = Engine()
ended = []
def job():
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        while True:
            engine.check()
            time.sleep(0.01)
    finally:
        time.sleep(0.2)
        ended.append(True)
try:
    engine.run(job)
except KeyboardInterrupt:
    print("interrupted", ended)
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=False)
    assert (ran.returncode, ran.stdout) == (0, "interrupted [True]\n"), ran.stderr


def test_the_process_ends_cleanly_with_compiled_functions_in_the_thread():
    """A thread that ends together with the interpreter aborts the process (mlx 0.32.4); ours must not."""
    script = """
import mlx.core as mx
from mlx_flux_krea.worker import Engine
square = mx.compile(lambda x: x * x + 1)
Engine().run(lambda: mx.eval(square(mx.ones(3))))
"""
    for _ in range(5):
        ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
        assert ran.returncode == 0, ran.stderr


def test_the_process_ends_cleanly_while_a_job_runs():
    script = """
import threading, time
from mlx_flux_krea.worker import Engine
engine, started = Engine(), threading.Event()
def job():
    started.set()
    while True:
        engine.check()
        time.sleep(0.01)
threading.Thread(target=lambda: engine.run(job), daemon=True).start()
started.wait()
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=30, check=False)
    assert ran.returncode == 0, ran.stderr


FORK = """
import os, signal, sys
import mlx.core as mx
from mlx_flux_krea.worker import Engine
engine = Engine()
product = lambda: float((mx.ones((64, 64)) @ mx.ones((64, 64))).sum())
{before}
child = os.fork()
if not child:
    signal.alarm(20)
    try:
        print(engine.run(product), flush=True)
    except ValueError as error:
        print(error, flush=True)
    sys.exit(3)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
print(engine.run(product))
"""


@pytest.mark.parametrize(
    ("before", "said"),
    [
        ("engine.run(product)", "this process was forked from one that had used MLX; expected a process"),
        ("", "262144.0"),
    ],
)
def test_a_forked_child_computes_or_says_why_not_and_ends(before, said):
    script = FORK.format(before=before)
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert lines[0].startswith(said)
    assert lines[1:] == ["3", "262144.0"]
