"""Self-tests of filters: answers to known questions, recorded after conversion and compared later."""

from collections.abc import Callable
from pathlib import Path

from mlx_flux_krea.errors import FluxKreaError
from mlx_flux_krea.files import read_json
from mlx_flux_krea.filters import judges
from mlx_flux_krea.models.filter_config import SELF_TEST
from mlx_flux_krea.weights import open_filter
from mlx_flux_krea.worker import Worker

from .installed import missing_parts
from .terminal import Console, PipelineProgress


def record(name: str, folder: Path, console: Console) -> None:
    """Runs the self-test of a newly converted filter and writes the answers into its folder.

    Raises:
        FiltersError: the answers are wrong, so that the filter cannot be used.
    """
    _run(judges.record_self_test, name, folder=folder, console=console)


def repeat(name: str, folder: Path, console: Console) -> None:
    """Runs the self-test of an installed filter again.

    Raises:
        FiltersError: the filter is damaged, or its answers differ from the recorded ones.
    """

    def ask(name: str, folder: Path, make_run: Callable) -> None:
        judges.check_self_test(name, judges.load_judge(name, folder, make_run), folder / SELF_TEST)

    _run(ask, name, folder=folder, console=console)


def problem(name: str) -> str | None:
    """Returns why an installed filter cannot be used, judged without running it; None: nothing is wrong."""
    try:
        folder = open_filter(name)
        if missing := missing_parts(folder.path):
            return missing
        folder.check()
        read_json(folder.path / SELF_TEST)
    except PermissionError as error:
        return f"{error.filename or name} cannot be read: {error.strerror}"
    except FluxKreaError as error:
        return str(error)
    return None


def _run(test: Callable, name: str, *, folder: Path, console: Console) -> None:
    """Runs a test in a worker's thread with a progress line; Ctrl-C stops it."""
    worker, progress = Worker(), PipelineProgress(console)

    def make_run(count: int, run: Callable) -> Callable:
        return worker.stoppable(run, lambda done: progress("check", done, count))

    try:
        worker.run(test, name, folder, make_run)
    finally:
        progress.close()
