"""Model folders of the reference's tiny pipeline, made once a session by the converter."""

import gc
import itertools
import os
import resource
import shutil
import signal
import subprocess
from pathlib import Path

import derived
import pytest
from helpers import PIPELINE, TOKENIZERS, edit_index
from mac import FILES, PAGE, Mac
from mlx_flux_krea.convert import convert, reading

from mlx_flux_krea import FluxPipeline, files


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Marks as slow, or as its `others` says, the cases of a test that its mark `core` does not name."""
    for item in items:
        mark = item.get_closest_marker("core")
        if mark and item.callspec.id not in mark.args:
            item.add_marker(mark.kwargs.get("others", "slow"))


@pytest.fixture(scope="session", autouse=True)
def signals():
    """As a terminal has them: in the background, or under nohup, tests and what they start would ignore some."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture(scope="session")
def model(tmp_path_factory):
    """The tiny pipeline in float32, with few tokens of T5: with 512 a step takes ten times as long."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return edit_index(convert([PIPELINE], folder, dtype="float32", tokenizers=TOKENIZERS).path, max_sequence_length=32)


def _editing(name, folder):
    source = derived.editing_source(name, folder / "source")
    return edit_index(
        convert([source], folder / name, dtype="float32", tokenizers=TOKENIZERS).path, max_sequence_length=32
    )


@pytest.fixture(scope="session")
def kontext(tmp_path_factory):
    """The reference's tiny FLUX.1 Kontext in float32."""
    return _editing("kontext", tmp_path_factory.mktemp("editing"))


@pytest.fixture(scope="session")
def fill(tmp_path_factory):
    """The reference's tiny FLUX.1 Fill in float32."""
    return _editing("fill", tmp_path_factory.mktemp("editing"))


@pytest.fixture(scope="session")
def control(tmp_path_factory):
    """The reference's tiny FLUX.1 Canny or Depth in float32; which of the two, nothing says."""
    return _editing("control", tmp_path_factory.mktemp("editing"))


@pytest.fixture(scope="session")
def full_model(model, tmp_path_factory):
    """The tiny pipeline with as many tokens of T5 as the reference's runs have."""
    copy = shutil.copytree(model, tmp_path_factory.mktemp("full") / "tiny")
    return edit_index(copy, max_sequence_length=512)


@pytest.fixture(scope="session")
def pipe(model):
    return FluxPipeline.from_pretrained(model)


@pytest.fixture(scope="session")
def pipe_bf16(model):
    return FluxPipeline.from_pretrained(model, dtype="bfloat16")


@pytest.fixture(scope="session")
def full_pipe(full_model):
    return FluxPipeline.from_pretrained(full_model)


@pytest.fixture(scope="session")
def full_pipe_bf16(full_model):
    return FluxPipeline.from_pretrained(full_model, dtype="bfloat16")


@pytest.fixture(scope="session")
def published():
    """The published vocabularies, which are not ours to commit: the folder that $FLUX_KREA_TOKENIZERS names."""
    named = os.environ.get("FLUX_KREA_TOKENIZERS")
    if not named:
        pytest.skip("needs the published vocabularies, and FLUX_KREA_TOKENIZERS is not set (see CONTRIBUTING.md)")
    assert (Path(named) / "golden.json").exists(), f"{named} holds no golden.json"
    return Path(named)


@pytest.fixture(scope="session")
def no_viewers(tmp_path_factory):
    """Programs that open no picture on the screen of whoever runs the tests."""
    folder = tmp_path_factory.mktemp("viewers")
    for name in ("open", "xdg-open"):
        (folder / name).write_text("#!/bin/sh\nexit 1\n")
        (folder / name).chmod(0o755)
    return folder


@pytest.fixture(autouse=True)
def viewers(no_viewers, monkeypatch):
    """Comes first, so that a test may put its own before them."""
    monkeypatch.setenv("PATH", f"{no_viewers}{os.pathsep}{os.environ['PATH']}")


@pytest.fixture(scope="session")
def homes(tmp_path_factory):
    """A folder for each test's home. `mktemp` would list all folders before it, which takes longer than most tests."""
    folder = tmp_path_factory.mktemp("homes")
    return (folder / str(number) for number in itertools.count())


@pytest.fixture(autouse=True)
def home(homes, monkeypatch):
    """Nothing is read from or written to the home folder of whoever runs the tests."""
    folder = next(homes)
    folder.mkdir()
    monkeypatch.setenv("FLUX_KREA_HOME", str(folder / "home"))
    monkeypatch.setenv("HF_HOME", str(folder / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return folder / "home"


@pytest.fixture(autouse=True)
def processes(monkeypatch):
    """No process outlives the test that started it, so that a test that fails does not slow down the others."""
    started, start = [], subprocess.Popen.__init__

    def start_and_note(self, *args, **options):
        start(self, *args, **options)
        started.append(self)

    monkeypatch.setattr(subprocess.Popen, "__init__", start_and_note)
    yield
    for process in started:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs the command's own main in this process and gives (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    before = {
        number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM)
    }
    from mlx_flux_krea import cli  # takes the signals

    def run(*args):
        with pytest.raises(SystemExit) as end:
            cli.main([str(a) for a in args])
        out, err = capsys.readouterr()
        return end.value.code or 0, out, err

    yield run
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def mac(tmp_path_factory, monkeypatch):
    """A Mac (see mac.py), on which every test that uses it has called what it replaces."""
    machine = Mac(tmp_path_factory.mktemp("mac"), monkeypatch)
    for module in (files, reading):  # which have read the size of a page
        monkeypatch.setattr(module, "PAGE", PAGE)
    monkeypatch.setattr(reading, "_BUFFER", 2**23 + 2 * PAGE)
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, before[1]))
    yield machine
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def pytest_collection_finish():
    """Keeps the collector of garbage from looking at thousands of tests again and again."""
    gc.collect()
    gc.freeze()
