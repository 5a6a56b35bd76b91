"""A filter's answers to questions with known answers: recorded when it was converted, and asked for again."""

from pathlib import Path

from mlx_flux_krea.errors import FluxKreaError


def record(name: str, folder: Path) -> None:
    """Asks a filter that was just converted, and writes its answers beside it.

    Raises:
        FiltersError: the answers are wrong: it cannot be used.
    """
    from mlx_flux_krea.filters.judges import record_self_test

    _run(record_self_test, name, folder)


def repeat(name: str, folder: Path) -> None:
    """Asks an installed filter again.

    Raises:
        FiltersError: it is damaged, or answers something else than before.
    """
    from mlx_flux_krea.filters.judges import check_self_test, load_judge
    from mlx_flux_krea.models.filter_config import SELF_TEST

    def ask(name: str, folder: Path, make_run) -> None:
        check_self_test(name, load_judge(name, folder, make_run), folder / SELF_TEST)

    _run(ask, name, folder)


def problem(name: str) -> str | None:
    """Why an installed filter cannot be used, as far as can be seen without asking it; None: nothing is seen."""
    from mlx_flux_krea.files import read_json
    from mlx_flux_krea.models.filter_config import SELF_TEST
    from mlx_flux_krea.weights import open_filter

    from .installed import missing_parts

    try:
        folder = open_filter(name)
        if missing := missing_parts(folder.path):
            return missing
        folder.check()
        read_json(folder.path / SELF_TEST)
    except FluxKreaError as error:
        return str(error)
    return None


def _run(function, name: str, folder: Path) -> None:
    """In a worker's thread, with a line of progress, and so that Ctrl-C stops it."""
    from mlx_flux_krea.worker import Worker

    from .terminal import PipelineProgress

    worker, progress = Worker(), PipelineProgress()

    def make_run(pieces, run):
        return worker.stoppable(run, lambda done: progress("check", done, pieces))

    try:
        worker.run(function, name, folder, make_run)
    finally:
        progress.close()
