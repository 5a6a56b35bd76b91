"""Calls to macOS, as far as another machine can see them: the commands that are run, the files written."""

import os
import platform
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import ROOT

from mlx_flux_krea.commands.shared import macos
from mlx_flux_krea.errors import UsageError


@pytest.fixture
def mac(tmp_path, monkeypatch):
    """A machine that says it is one, with programs of the system that write down how they were called."""
    programs = tmp_path / "bin"
    programs.mkdir()
    os.mkfifo(tmp_path / "ready")
    for name, does in (
        ("caffeinate", f"echo > {tmp_path}/ready; exec sleep 60"),
        ("tmutil", "true"),
        ("sysctl", 'cat "$0.$2"'),
    ):
        (programs / name).write_text(f'#!/bin/sh\necho "{name} $*" >> {tmp_path}/calls\n{does}\n')
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    return tmp_path


def calls(mac: Path) -> list[str]:
    return (mac / "calls").read_text().splitlines() if (mac / "calls").exists() else []


def says(mac: Path, name: str, value: str) -> None:
    (mac / "bin" / f"sysctl.{name}").write_text(value + "\n")


def test_the_machine_stays_awake_as_long_as_the_block_and_no_longer_than_the_process(mac, monkeypatch):
    started, ready = [], os.open(mac / "ready", os.O_RDONLY | os.O_NONBLOCK)
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(popen(*a, **k)) or started[-1])
    with macos.awake():
        assert select.select([ready], [], [], 30)[0]
        assert calls(mac) == [f"caffeinate -i -w {os.getpid()}"]
        assert started[0].poll() is None
    assert started[0].poll() is not None
    os.close(ready)


def test_a_program_that_ignores_the_request_to_end_holds_nobody_up(mac):
    """A child inherits signals that its parent ignores, as `signals.finish` leaves them after every verb."""
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    ready = os.open(mac / "ready", os.O_RDONLY | os.O_NONBLOCK)
    try:
        start = time.perf_counter()
        for _ in range(2):
            with macos.awake():
                assert select.select([ready], [], [], 30)[0]
                os.read(ready, 100)
        assert time.perf_counter() - start < 20
    finally:
        signal.signal(signal.SIGTERM, before)
        os.close(ready)


def test_a_machine_without_caffeinate_runs_all_the_same(mac, monkeypatch):
    monkeypatch.setenv("PATH", str(mac))
    with macos.awake():
        pass


def test_a_folder_of_weights_is_left_out_of_spotlight_and_time_machine(mac):
    macos.exclude(mac)
    assert (mac / ".metadata_never_index").read_bytes() == b""
    assert calls(mac) == [f"tmutil addexclusion {mac}"]


def test_elsewhere_nothing_is_done(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(subprocess, "Popen", None)
    with macos.awake():
        macos.exclude(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert macos.sysctl("hw.memsize") is None
    macos.check_python()


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"sysctl.proc_translated": "1"}, "is built for Intel and runs translated.*prints arm64"),
        ({"sysctl.proc_translated": "0", "machdep.cpu.brand_string": "Apple M2"}, "is built for Intel"),
        ({"machdep.cpu.brand_string": "Intel(R) Core(TM) i7"}, "has an Intel processor"),
        ({}, "has an Intel processor"),
    ],
)
def test_a_python_for_intel_is_named_as_the_problem(mac, monkeypatch, values, problem):
    macos.check_python()
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    for name, value in values.items():
        says(mac, name, value)
    with pytest.raises(UsageError, match=problem):
        macos.check_python()


def test_the_command_names_it_before_mlx_is_imported(mac):
    """The real command, where MLX cannot be imported at all."""
    says(mac, "sysctl.proc_translated", "1")
    script = (
        "import sys, platform; sys.platform = 'darwin'; platform.machine = lambda: 'x86_64'; sys.modules['mlx'] = None;"
        "from mlx_flux_krea import cli; cli.main(sys.argv[1:])"
    )
    for verb, code in (("plan", 2), ("doctor", 2)):
        ran = subprocess.run(
            [sys.executable, "-c", script, verb], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert ran.returncode == code, ran.stderr
        assert ran.stderr.startswith("flux-krea: this Python (")
        assert "is built for Intel and runs translated" in ran.stderr
