"""flux-krea doctor: examines this machine and the installation, as a text to paste into a report.

Each examination imports its own libraries, so that one that cannot be imported becomes a finding.
"""

import os
import platform
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import click

from mlx_flux_krea import __version__, home, macos
from mlx_flux_krea.errors import (
    FiltersError,
    FluxKreaError,
    MachineError,
    ModelError,
    ResourceError,
    UsageError,
    amount,
    printable,
)
from mlx_flux_krea.files import may_exist

from .shared.text import finite, json_text, size, table


class Finding(NamedTuple):
    """One line of the report."""

    name: str
    text: str
    error: FluxKreaError | None = None


@click.command()
@click.option("--full", is_flag=True, help="Also run the filters' self-tests, which takes a minute.")
@click.option("--chip", is_flag=True, help="Check instead that this machine computes correctly, and how fast.")
@click.option("--json", "as_json", is_flag=True, help="Print the report as JSON.")
def doctor(full, chip, as_json):
    """Examine this machine and the installation.

    Ends with an error if anything is wrong. The report holds no personal path, name or token.

    --chip takes up to two minutes on a Mac and needs no weights. It runs the small built-in model in every type, and
    products, attention and convolutions at FLUX.1's shapes, against stored or exact results; it streams blocks from
    disk, and tries the disk, locks, sleep and the terminal. Each line says what was found and what is expected.

    \b
    Examples:
      flux-krea doctor
      flux-krea doctor --chip
    """
    if chip:
        if full:
            raise UsageError("--chip, and --full", "one of them", "each is a report of its own")
        with macos.awake():
            _check_chip(as_json)
        return
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


def _check_chip(as_json: bool) -> None:
    """Makes the checks of this machine, and prints a line for each as soon as it is made.

    Raises:
        MachineError: something is wrong.
    """
    from mlx_flux_krea.chip.check import this_setting
    from mlx_flux_krea.chip.table import CHECKS, make_checks

    from .shared.estimates import device
    from .shared.terminal import Console, counted

    setting, console = this_setting(), Console()
    width, start = max(len(check.name) for check in CHECKS), time.perf_counter()
    console.say(f"{amount(len(CHECKS), 'check')} at {setting.in_words}")
    rows, wrong = [], []
    progress = counted(make_checks(setting), "checks", "check", len(CHECKS))
    for check, result, seconds in progress:
        wrong += [] if result.is_right else [check.name]
        facts = {"found": result.found, "expected": result.expected, "right": result.is_right, "next": result.todo}
        facts = {name: without_paths(text) if isinstance(text, str) else text for name, text in facts.items()}
        rows.append({"name": check.name} | facts | {"seconds": round(seconds, 3), "figures": finite(result.figures)})
        if as_json:
            console.say(f"{len(rows)} of {len(CHECKS)}: {check.name}")
            continue
        with progress.external_write_mode():
            click.echo(printable(f"{check.name:<{width}}  {without_paths(str(result))}"))
    seconds = time.perf_counter() - start
    console.say(f"took {seconds:.0f} s")
    if as_json:
        about = {"device": device(), "mlx": version("mlx"), "version": __version__, "divisor": setting.divisor}
        click.echo(json_text(about | {"seconds": seconds, "checks": rows, "wrong": wrong}))
    if wrong:
        count = amount(len(wrong), "check shows", "checks show")
        raise MachineError(f"{count} that something is wrong: {', '.join(wrong)}", "", "see the lines marked WRONG")


def without_paths(text: str) -> str:
    """Replaces the home folders, which show a user's name, by ~ and $FLUX_KREA_HOME."""
    places = {str(Path.home()): "~"}
    if os.environ.get("FLUX_KREA_HOME"):
        places[str(home.root())] = "$FLUX_KREA_HOME"
    places |= {os.path.realpath(place): name for place, name in places.items()}
    for place in sorted(places.keys() - {"/"}, key=len, reverse=True):
        text = text.replace(place, places[place])
    return text


def _program(full: bool) -> list[Finding]:
    built = f"{platform.python_version()}, {platform.machine()}"
    libraries = ", ".join(f"{name} {version(name)}" for name in ("mlx", "huggingface-hub"))
    return [Finding("flux-krea", f"{__version__}, with {libraries}"), Finding("Python", built)]


def _mlx(full: bool) -> list[Finding]:
    from mlx_flux_krea.chip.wheel import library_problem

    is_here, problem = library_problem()
    return [Finding("mlx's library", "fits this chip and this macOS", problem)] if is_here else []


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

    from mlx_flux_krea.chip.wheel import macos_version
    from mlx_flux_krea.memory import machine_memory, physical_memory

    from .shared.estimates import device

    system = f"macOS {macos_version()}" if sys.platform == "darwin" else platform.system()
    wired = macos.sysctl("iogpu.wired_limit_mb")
    limit = "" if wired is None else f", wired limit {'the default' if wired == '0' else f'{wired} MB'}"
    backend = "Metal" if mx.default_device().type == mx.DeviceType.gpu else "CPU"
    return [
        Finding("system", f"{system}, {platform.release()}"),
        Finding("chip", f"{device()}, {amount(os.cpu_count() or 1, 'core')}, MLX on {backend}"),
        Finding("memory", f"{size(physical_memory())}, of which {size(machine_memory())} may be used{limit}"),
    ]


def _disk(full: bool) -> list[Finding]:
    from mlx_flux_krea.disks import read_speed

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
