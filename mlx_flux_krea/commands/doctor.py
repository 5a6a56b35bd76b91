"""flux-krea doctor: examines this machine and the installation, as a text to paste into a report.

Each examination imports its own libraries, so that one that cannot be imported becomes a finding.
"""

import contextlib
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import click

from mlx_flux_krea import __version__, home
from mlx_flux_krea.errors import FiltersError, FluxKreaError, ModelError, ResourceError, UsageError, amount
from mlx_flux_krea.files import bypass, forget

from .shared import macos
from .shared.text import json_text, size, table

_ENOUGH = 2**26  # bytes of a file that shows the speed of a disk
_SECONDS = 1.0  # of reading it, at most


class Finding(NamedTuple):
    """One line of the report."""

    name: str
    text: str
    error: FluxKreaError | None = None


@click.command()
@click.option("--full", is_flag=True, help="Also run the filters' self-tests, which takes a minute.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def doctor(full, as_json):
    """Examine this machine and the installation.

    Ends with an error if anything is wrong. The report holds no personal path, name or token.

    \b
    Example:
      flux-krea doctor
    """
    rows, errors = [], []
    for name, examine in _EXAMINATIONS.items():
        try:
            findings = examine(full)
        except FluxKreaError as error:
            findings = [Finding(name, "", error)]
        except (OSError, ImportError) as error:
            findings = [Finding(name, "", UsageError(f"cannot be examined: {error}"))]
        for finding in findings:
            errors += [finding.error] if finding.error else []
            text = f"WRONG: {finding.error}" if finding.error else finding.text
            rows.append((finding.name, without_paths(text)))
    if as_json:
        wrong = [{"error": without_paths(str(error)), "exit_code": error.exit_code} for error in errors]
        click.echo(json_text({"findings": dict(rows), "wrong": wrong}))
    else:
        click.echo(table(rows))
    if errors:
        count = amount(len(errors), "thing is wrong", "things are wrong")
        raise type(errors[0])(f"{count}: see the lines marked WRONG")


def without_paths(text: str) -> str:
    """Replaces the home folders, which show a user's name, by ~ and $FLUX_KREA_HOME."""
    places = {str(Path.home()): "~"}
    if os.environ.get("FLUX_KREA_HOME"):
        places[str(home.root())] = "$FLUX_KREA_HOME"
    places |= {os.path.realpath(place): name for place, name in places.items()}
    for place in sorted(places.keys() - {"/"}, key=len, reverse=True):
        text = text.replace(place, places[place])
    return text


def read_speed(place: Path) -> float:
    """Measures the bytes per second that a disk reads, from its largest file of weights or from a new file.

    Raises:
        OSError: the disk cannot be read, or the new file cannot be written.
    """
    files = [path for path in place.rglob("*.safetensors") if path.is_file()] if (place / "models").is_dir() else []
    largest = max(files, key=lambda path: path.stat().st_size, default=None)
    with contextlib.ExitStack() as stack:
        if largest and largest.stat().st_size >= _ENOUGH:
            file = stack.enter_context(open(largest, "rb", buffering=0))
        else:
            file = stack.enter_context(tempfile.TemporaryFile(dir=place, buffering=0))
            file.write(random.Random(0).randbytes(2**20) * (_ENOUGH // 2**20))
            os.fsync(file.fileno())
        bypass(file.fileno())  # cached pages would show the speed of memory
        forget(file.fileno())
        buffer, count, start = bytearray(2**23), 0, time.perf_counter()
        file.seek(0)
        spent = 0.0
        while spent < _SECONDS and (read := file.readinto(buffer)):
            count += read
            spent = time.perf_counter() - start
        return count / max(spent, 1e-9)


def _program(full: bool) -> list[Finding]:
    built = f"{platform.python_version()}, {platform.machine()}"
    libraries = ", ".join(f"{name} {version(name)}" for name in ("mlx", "huggingface-hub"))
    return [Finding("flux-krea", f"{__version__}, with {libraries}"), Finding("Python", built)]


def _machine(full: bool) -> list[Finding]:
    import mlx.core as mx

    from mlx_flux_krea.memory import machine_memory

    from .shared.estimates import device

    system = f"macOS {platform.mac_ver()[0]}" if sys.platform == "darwin" else platform.system()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    wired = macos.sysctl("iogpu.wired_limit_mb")
    limit = "" if wired is None else f", wired limit {'the default' if wired == '0' else f'{wired} MB'}"
    backend = "Metal" if mx.default_device().type == mx.DeviceType.gpu else "CPU"
    return [
        Finding("system", f"{system}, {platform.release()}"),
        Finding("chip", f"{device()}, {amount(os.cpu_count() or 1, 'core')}, MLX on {backend}"),
        Finding("memory", f"{size(memory)}, of which {size(machine_memory())} may be used{limit}"),
    ]


def _disk(full: bool) -> list[Finding]:
    from .shared.estimates import home_disk

    place, free = home_disk()
    error = ResourceError(f"{size(free)} are free on the disk of {home.root()}", "1 GB") if free < 10**9 else None
    try:
        speed = f"reads {read_speed(place) / 1e9:.1f} GB/s"
    except OSError as reason:
        speed = f"its speed cannot be measured: {reason.strerror}"
    return [Finding("disk", f"{size(free)} free, {speed}", error)]


def _filters(full: bool) -> list[Finding]:
    from mlx_flux_krea.filters.judges import FILTERS

    from .shared.installed import find_installed

    required = any(one.filters == "required" for one in find_installed())
    return [_filter(name, required, full) for name in FILTERS]


def _filter(name: str, required: bool, full: bool) -> Finding:
    from mlx_flux_krea.filters.judges import INSTALL

    from .shared import trials
    from .shared.terminal import Console

    label, path = f"filter {name}", home.path(home.FILTERS, name)
    if not path.is_dir():
        missing = FiltersError("not installed, and a model here requires it", "", "flux-krea setup")
        return Finding(label, "not installed", missing if required else None)
    if problem := trials.problem(name):
        return Finding(label, "", FiltersError(problem, "", INSTALL))
    if not full:
        return Finding(label, "complete by size, self-test recorded; --full repeats it")
    try:
        trials.repeat(name, path, Console())
    except FiltersError as error:
        return Finding(label, "", error)
    return Finding(label, "repeats its self-test")


def _log(full: bool) -> list[Finding]:
    from mlx_flux_krea.filters.log import Log

    log = Log(home.path(home.LOG))
    return [
        Finding("log", f"{amount(len(log.read()), 'entry', 'entries')}, unbroken" if log.path.exists() else "none yet")
    ]


def _hub(full: bool) -> list[Finding]:
    from huggingface_hub import constants, get_token

    offline = ", HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ""
    return [Finding("hub login", ("yes" if get_token() else "no") + offline)]


def _models(full: bool) -> list[Finding]:
    from .shared.installed import built_in, find_installed

    findings, installed = [], find_installed()
    for one in installed + built_in():
        if one.kind != "filter":
            text = f"{size(one.bytes)}, {one.precision}, {one.license}, filters {one.filters}, complete by size"
            todo = "convert it again: flux-krea setup" if one.kind == "model" else "install flux-krea again"
            error = ModelError(one.problem, "", todo) if one.problem else None
            findings.append(Finding(f"model {one.name}", text + ", default" * one.default, error))
    if not any(one.kind == "model" for one in installed):
        findings.append(Finding("models", "none but the built-in one; install one: flux-krea setup"))
    return findings


_EXAMINATIONS: dict[str, Callable[[bool], list[Finding]]] = {
    "program": _program,
    "machine": _machine,
    "disk": _disk,
    "hub login": _hub,
    "filters": _filters,
    "log": _log,
    "models": _models,
}
