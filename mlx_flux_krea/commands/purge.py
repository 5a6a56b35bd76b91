"""flux-krea purge: deletes kinds of data from the home folder."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import click

from mlx_flux_krea import home
from mlx_flux_krea.checkpoint import unfinished as unfinished_runs
from mlx_flux_krea.errors import UsageError
from mlx_flux_krea.files import try_lock
from mlx_flux_krea.filters.ledger import Ledger

from .shared import settings
from .shared.installed import disk_bytes
from .shared.terminal import Console, confirmed, is_interactive
from .shared.text import json_text, size

KINDS = {  # in the order in which they are deleted: folder and description
    "weights": (home.MODELS, "all installed models"),
    "adapters": (home.ADAPTERS, "all installed adapters"),
    "components": (home.COMPONENTS, "all installed components: Redux, the depth network"),
    "filters": (home.FILTERS, "both content filters"),
    "logs": (home.LOG, "the log of checks and releases, your evidence of keeping the licence"),
    "quarantine": (home.QUARANTINE, "all pictures that wait for review"),
    "unfinished": (home.CHECKPOINTS, "all unfinished runs, with their prompts"),
    "uploads": (home.UPLOADS, "all images that the page was given"),
    "page": (home.PAGE, "the page's queue, settings and prompts used before; pictures stay"),
}


@click.command()
@click.option("--weights", is_flag=True, help="Delete the installed models.")
@click.option("--adapters", is_flag=True, help="Delete the installed adapters.")
@click.option("--components", is_flag=True, help="Delete Redux and the depth network.")
@click.option("--filters", is_flag=True, help="Delete the installed filters.")
@click.option("--logs", is_flag=True, help="Delete the log of checks and releases: your evidence, with no other copy.")
@click.option("--quarantine", is_flag=True, help="Delete the pictures that wait for review.")
@click.option("--unfinished", is_flag=True, help="Delete the unfinished runs.")
@click.option("--uploads", is_flag=True, help="Delete the images that the page was given.")
@click.option("--page", is_flag=True, help="Delete the page's queue, settings and prompts; its pictures stay.")
@click.option("--yes", is_flag=True, help="Delete without asking.")
@click.option("--json", "as_json", is_flag=True, help="Print the bytes freed as JSON.")
def purge(yes, as_json, **kinds):
    """Delete models, adapters, filters, logs, pictures or runs.

    Without an option, each kind is asked about, the page's data too. If you breach the licence it ends, and weights
    and filters must be deleted. Links are deleted, but not their targets. Released pictures stay.

    \b
    Example:
      flux-krea purge --weights --filters
    """
    console = Console()
    chosen = [kind for kind in KINDS if kinds[kind]]
    if not chosen and (yes or not is_interactive()):
        names = ", ".join(f"--{kind}" for kind in KINDS)
        raise UsageError("no option says which data to delete", names, "give one or more of them")
    freed = {}
    for kind in chosen or KINDS:
        place, description = KINDS[kind]
        folder = home.path(place)
        found = _files_of_page() if kind == "page" else [folder] * os.path.lexists(folder)
        if not found:
            if chosen:
                console.say(f"{kind}: nothing is there")
            continue
        count = sum(map(disk_bytes, found))
        if confirmed(f"delete {description} ({folder}, {size(count)})", yes):
            left, links = _DELETE[kind](folder)
            freed[kind] = count - left
            for link in links:
                console.say(f"{link} was a link: its target is still there")
            console.say(f"{kind}: {size(freed[kind])} freed")
    if as_json:
        click.echo(json_text({"freed": freed, "bytes": sum(freed.values())}))


def _delete(folder: Path) -> tuple[int, list[Path]]:
    """Deletes a folder. Returns the bytes that are left, and the links that were deleted."""
    if folder.is_symlink():
        folder.unlink()
        return 0, [folder]
    links = [path for path in folder.rglob("*") if path.is_symlink()]
    try:
        shutil.rmtree(folder)  # follows no link
    except OSError as error:
        raise UsageError(f"{error.filename or folder} cannot be deleted: {error.strerror}") from None
    return 0, links


def _delete_models(folder: Path) -> tuple[int, list[Path]]:
    """Deletes the models, and the default that names one of them."""
    if home.default_model() in home.installed_models():
        settings.set_model(None)
    return _delete(folder)


def _delete_pictures(folder: Path) -> tuple[int, list[Path]]:
    """Deletes pictures through the ledger, which logs it. Pictures of a run at work stay."""
    Ledger().purge()
    return disk_bytes(folder), []


def _delete_runs(folder: Path) -> tuple[int, list[Path]]:
    """Deletes unfinished runs, except those that a process is working on."""
    for path in unfinished_runs():
        path.unlink(missing_ok=True)
    for runs in [*folder.glob("bench-*"), *folder.glob("gptq-*")]:  # of `bench --fast` and of `convert --gptq`
        if (lock := try_lock(runs / "lock")) is not None:
            shutil.rmtree(runs, ignore_errors=True)
            os.close(lock)
    return disk_bytes(folder), []


def _files_of_page() -> list[Path]:
    """Returns the files of the page's database, and of damaged ones that were set aside."""
    return sorted(home.root().glob(f"{home.PAGE}*"))


def _delete_page(file: Path) -> tuple[int, list[Path]]:
    """Deletes the page's database."""
    with _closed_page():
        for path in _files_of_page():
            path.unlink(missing_ok=True)
    return 0, []


def _delete_uploads(folder: Path) -> tuple[int, list[Path]]:
    """Deletes the images that the page was given."""
    with _closed_page():
        return _delete(folder)


@contextlib.contextmanager
def _closed_page() -> Iterator[None]:
    """Keeps the page from being opened within the block.

    Raises:
        UsageError: it is open.
    """
    lock = try_lock(home.path(home.PAGE_LOCK))
    if lock is None:
        raise UsageError("flux-krea ui is running and uses these files", "a page that is not open", "end it first")
    try:
        yield
    finally:
        os.close(lock)


_DELETE = {
    "weights": _delete_models,
    "adapters": _delete,
    "components": _delete,
    "filters": _delete,
    "logs": _delete,
    "quarantine": _delete_pictures,
    "unfinished": _delete_runs,
    "uploads": _delete_uploads,
    "page": _delete_page,
}
