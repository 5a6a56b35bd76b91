"""flux-krea doctor: examines this machine and the installation, as a text to paste into a report.

Each examination imports its own libraries, so that one that cannot be imported becomes a finding.
"""

import mmap
import os
import platform
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import click

from mlx_flux_krea import __version__, home, macos
from mlx_flux_krea.errors import FiltersError, FluxKreaError, ModelError, ResourceError, UsageError, amount
from mlx_flux_krea.files import bypass, forget, may_exist, sync

from .shared.text import json_text, size, table

_SAMPLE = 2**26  # bytes of a file that shows the speed of a disk
_SECONDS = 1.0  # of reading it, at most
_ACCELERATED = 5  # number of the first chip with accelerators for matrix products: M5
_ACCELERATORS_NEED = (26, 2)  # version of macOS


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
    """Measures the bytes per second that a disk reads, from a new file that never was in the system's cache.

    Raises:
        OSError: the file cannot be written or read.
    """
    with tempfile.TemporaryFile(dir=place, buffering=0) as file:
        bypass(file.fileno())  # before it is written: macOS takes no page back
        file.write(random.Random(0).randbytes(2**20) * (_SAMPLE // 2**20))
        sync(file.fileno())
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


def _mlx(full: bool) -> list[Finding]:
    """Reads MLX's libraries on a Mac as files, for the faults of an installation that no import shows."""
    spec = find_spec("mlx") if sys.platform == "darwin" else None
    for place in (spec and spec.submodule_search_locations) or ():
        library, kernels = Path(place, "lib", "libmlx.dylib"), Path(place, "lib", "mlx.metallib")
        if not library.is_file():
            continue
        known = _holds(library, b"MLX_CONV_WINOGRAD")
        problem = None if known else UsageError(
            "this mlx does not know MLX_CONV_WINOGRAD, and decodes pictures with errors of several percent",
            "a library of mlx 0.32.4 or later", "install it again: pip install --force-reinstall mlx",
        )  # fmt: skip
        problem = problem or _wrong_wheel(kernels)
        return [Finding("mlx's library", "fits this chip and this macOS", problem)]
    return []


def _wrong_wheel(kernels: Path) -> UsageError | None:
    """Returns the error for a library that was made for another macOS than an M5 or a later chip needs.

    Wheels for macOS 26 hold kernels (named *_nax) for the accelerators in these chips. They need macOS 26.2, and are
    used on 26.0 and 26.1 too (ml-explore/mlx#4525).
    """
    chip = re.match(r"Apple M(\d+)", macos.sysctl("machdep.cpu.brand_string") or "")
    if not chip or int(chip[1]) < _ACCELERATED or not kernels.is_file():
        return None
    found, has_kernels = _macos_version(), _holds(kernels, b"_nax")
    is_enough = _numbers(found) >= _ACCELERATORS_NEED
    if has_kernels and not is_enough:
        ahead = f"this mlx uses the accelerators of the {chip[0]}, which macOS {found} cannot do"
        return UsageError(ahead, "macOS 26.2 or later", "update macOS")
    if is_enough and not has_kernels:
        slow = (
            "this mlx was made for an older macOS: without the chip's accelerators its products take 2.7 times as long"
        )
        todo = "make a new environment with a newer Python, which asks for it: uv venv --python 3.13"
        return UsageError(slow, "the wheel of mlx-metal for macOS 26", todo)
    return None


def _macos_version() -> str:
    """Returns the version of macOS; a Python made for an older one is told 16.0 for 26."""
    return macos.sysctl("kern.osproductversion") or platform.mac_ver()[0]


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text))


def _holds(path: Path, text: bytes) -> bool:
    """Returns True where a file holds these bytes."""
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        return mapped.find(text) >= 0


def _types(full: bool) -> list[Finding]:
    """Compares the two types of 16 bits by one product, on a GPU."""
    import mlx.core as mx

    from mlx_flux_krea.models.layers import seconds_of_product

    from .shared import estimates

    if not estimates.has_fast_halves():
        return []
    return [Finding("16 bits", estimates.recommendation(*map(seconds_of_product, (mx.bfloat16, mx.float16))))]


def _machine(full: bool) -> list[Finding]:
    import mlx.core as mx

    from mlx_flux_krea.memory import machine_memory, physical_memory

    from .shared.estimates import device

    system = f"macOS {_macos_version()}" if sys.platform == "darwin" else platform.system()
    wired = macos.sysctl("iogpu.wired_limit_mb")
    limit = "" if wired is None else f", wired limit {'the default' if wired == '0' else f'{wired} MB'}"
    backend = "Metal" if mx.default_device().type == mx.DeviceType.gpu else "CPU"
    return [
        Finding("system", f"{system}, {platform.release()}"),
        Finding("chip", f"{device()}, {amount(os.cpu_count() or 1, 'core')}, MLX on {backend}"),
        Finding("memory", f"{size(physical_memory())}, of which {size(machine_memory())} may be used{limit}"),
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
    if not may_exist(path):
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
    "mlx's library": _mlx,
    "machine": _machine,
    "types of 16 bits": _types,
    "disk": _disk,
    "hub login": _hub,
    "filters": _filters,
    "log": _log,
    "models": _models,
}
