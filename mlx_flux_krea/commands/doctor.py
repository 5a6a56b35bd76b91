"""flux-krea doctor: what this machine and this installation are, and what is wrong, to paste into a report."""

import contextlib
import json
import os
import platform
import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click

from mlx_flux_krea.errors import FiltersError, FluxKreaError, ModelError, ResourceError, UsageError, amount

from .shared import macos

_ENOUGH = 2**26  # bytes of a file that tells the speed of a disk
_SECONDS = 1.0  # that reading it may take


@click.command()
@click.option("--full", is_flag=True, help="Also ask both filters again, which takes a minute.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def doctor(full, as_json):
    """Examine this machine and what is installed.

    Ends with an error where something is wrong. No path of yours, no name and no token is in what it prints.

    \b
    Example:
      flux-krea doctor
    """
    from .shared.terminal import table

    rows, wrong = [], []
    for name, examine in _EXAMINED.items():
        try:
            found = examine(full)
        except FluxKreaError as error:
            found = [(name, "", error)]
        except (OSError, ImportError) as error:
            found = [(name, "", UsageError(f"cannot be examined: {error}"))]
        for label, says, error in found:
            if error:
                wrong.append(error)
                says = f"WRONG: {error}"
            rows.append((label, without_paths(str(says))))
    if as_json:
        problems = [{"error": without_paths(str(error)), "exit_code": error.exit_code} for error in wrong]
        click.echo(json.dumps({"findings": dict(rows), "wrong": problems}, ensure_ascii=False))
    else:
        click.echo(table(rows))
    if wrong:
        count = amount(len(wrong), "thing is wrong", "things are wrong")
        summary = FluxKreaError(f"{count}: see the lines that say so")
        summary.exit_code = wrong[0].exit_code
        raise summary


def without_paths(text: str) -> str:
    """The text without the folders that tell who and where somebody is."""
    from mlx_flux_krea import home

    places = {str(Path.home()): "~"}
    if os.environ.get("FLUX_KREA_HOME"):
        places[str(home.root())] = "$FLUX_KREA_HOME"
    places |= {os.path.realpath(place): name for place, name in places.items()}
    for place in sorted(places.keys() - {"/"}, key=len, reverse=True):
        text = text.replace(place, places[place])
    return text


def _program(full: bool) -> list:
    from importlib.metadata import version

    from mlx_flux_krea import __version__

    built = f"{platform.python_version()}, {platform.machine()}"
    libraries = ", ".join(f"{name} {version(name)}" for name in ("mlx", "huggingface-hub"))
    return [("flux-krea", f"{__version__}, with {libraries}", None), ("Python", built, None)]


def _machine(full: bool) -> list:
    import mlx.core as mx

    from mlx_flux_krea.memory import machine_memory

    from .shared.estimates import device
    from .shared.terminal import size

    system = f"macOS {platform.mac_ver()[0]}" if sys.platform == "darwin" else platform.system()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    wired = macos.sysctl("iogpu.wired_limit_mb")
    limit = "" if wired is None else f", wired limit {'the default' if wired == '0' else f'{wired} MB'}"
    backend = "Metal" if mx.default_device().type == mx.gpu else "CPU"
    return [
        ("system", f"{system}, {platform.release()}", None),
        ("chip", f"{device()}, {amount(os.cpu_count(), 'core')}, MLX on {backend}", None),
        ("memory", f"{size(memory)}, of which {size(machine_memory())} may be used{limit}", None),
    ]


def _disk(full: bool) -> list:
    from mlx_flux_krea import home

    from .shared.estimates import home_disk
    from .shared.terminal import size

    place, free = home_disk()
    wrong = ResourceError(f"{size(free)} are free on the disk of {home.root()}", "1 GB") if free < 10**9 else None
    try:
        speed = f"reads {read_speed(place) / 1e9:.1f} GB/s"
    except OSError as error:
        speed = f"its speed cannot be measured: {error.strerror}"
    return [("disk", f"{size(free)} free, {speed}", wrong)]


def read_speed(place: Path) -> float:
    """Bytes per second that come from the disk of a folder, from the largest file of weights in it, or a new one.

    Raises:
        OSError: it cannot be read, or the new one cannot be written.
    """
    from mlx_flux_krea.files import bypass, forget

    files = [path for path in place.rglob("*.safetensors") if path.is_file()] if (place / "models").is_dir() else []
    largest = max(files, key=lambda path: path.stat().st_size, default=None)
    with contextlib.ExitStack() as stack:
        if largest and largest.stat().st_size >= _ENOUGH:
            file = stack.enter_context(open(largest, "rb", buffering=0))
        else:
            file = stack.enter_context(tempfile.TemporaryFile(dir=place, buffering=0))
            file.write(random.Random(0).randbytes(2**20) * (_ENOUGH // 2**20))
            os.fsync(file.fileno())
        bypass(file.fileno())  # what is in memory of a file is not what a disk reads
        forget(file.fileno())
        buffer, count, begin = bytearray(2**23), 0, time.perf_counter()
        file.seek(0)
        while (read := file.readinto(buffer)) and (spent := time.perf_counter() - begin) < _SECONDS:
            count += read
        return count / max(spent, 1e-9)


def _filters(full: bool) -> list:
    from mlx_flux_krea import home
    from mlx_flux_krea.filters.judges import FILTERS, INSTALL

    from .shared import trials
    from .shared.installed import find_installed

    needed = any(one.filters == "required" for one in find_installed())
    rows = []
    for name in FILTERS:
        path, error = home.path(home.FILTERS, name), None
        if not path.is_dir():
            error = (
                FiltersError("not installed, and a model here requires it", "", "flux-krea setup") if needed else None
            )
            rows.append((f"filter {name}", "not installed", error))
            continue
        if says := trials.problem(name):
            error = FiltersError(says, "", INSTALL)
        elif full:
            try:
                trials.repeat(name, path)
            except FiltersError as wrong:
                error = wrong
        says = "answers its self-test as it did" if full else "whole by size, self-test recorded; --full asks it again"
        rows.append((f"filter {name}", says, error))
    return rows


def _log(full: bool) -> list:
    from mlx_flux_krea import home
    from mlx_flux_krea.filters.log import Log

    log = Log(home.path(home.LOG))
    return [
        ("log", f"{amount(len(log.read()), 'entry', 'entries')}, unbroken" if log.path.exists() else "none yet", None)
    ]


def _hub(full: bool) -> list:
    from huggingface_hub import constants, get_token

    offline = ", HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else ""
    return [("hub login", ("yes" if get_token() else "no") + offline, None)]


def _models(full: bool) -> list:
    from .shared.installed import find_installed
    from .shared.terminal import size

    found = [one for one in find_installed() if one.kind == "model"]
    rows = []
    for one in found:
        says = f"{size(one.bytes)}, {one.precision}, {one.license}, filters {one.filters}, whole by size"
        error = ModelError(one.problem, "", "convert it again: flux-krea setup") if one.problem else None
        rows.append((f"model {one.name}", says + ", default" * one.default, error))
    return rows or [("models", "", ModelError("none is installed", "", "flux-krea setup"))]


_EXAMINED: dict[str, Callable[[bool], list]] = {
    "program": _program,
    "machine": _machine,
    "disk": _disk,
    "hub login": _hub,
    "filters": _filters,
    "log": _log,
    "models": _models,
}
