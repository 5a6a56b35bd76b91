"""flux-krea purge: what lies in the home folder is deleted, each kind of it by choice."""

import json
import os
import shutil
from pathlib import Path

import click

from mlx_flux_krea import home
from mlx_flux_krea.errors import UsageError

KINDS = {  # in the order in which they are deleted, with the folder of each
    "weights": (home.MODELS, "all installed models"),
    "filters": (home.FILTERS, "both content filters"),
    "logs": (home.LOG, "the log of checks and releases, which is what shows that the licence was kept"),
    "quarantine": (home.QUARANTINE, "all pictures that wait for review"),
    "unfinished": (home.CHECKPOINTS, "what unfinished runs have kept, prompts among it"),
}


@click.command()
@click.option("--weights", is_flag=True, help="Installed models.")
@click.option("--filters", is_flag=True, help="Installed filters.")
@click.option(
    "--logs", is_flag=True, help="The log of what was checked and released: your evidence, kept nowhere else."
)
@click.option("--quarantine", is_flag=True, help="Pictures that wait for review.")
@click.option("--unfinished", is_flag=True, help="What unfinished runs have kept.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@click.option("--json", "as_json", is_flag=True, help="Print what was freed as JSON.")
def purge(yes, as_json, **kinds):
    """Delete weights, filters, logs, waiting pictures or unfinished runs.

    Without an option, each is asked for. The licence ends with its breach, and then weights and filters have to go.
    Links are deleted, and not what they lead to. What a picture was released to is yours, and is not touched.

    \b
    Example:
      flux-krea purge --weights --filters
    """
    from .shared.installed import disk_bytes
    from .shared.terminal import agreed, is_typed, say, size

    chosen = [kind for kind in KINDS if kinds[kind]]
    if not chosen and (yes or not is_typed()):
        names = ", ".join(f"--{kind}" for kind in KINDS)
        raise UsageError("nothing was named that should go", names, "name one or more of them")
    freed = {}
    for kind in chosen or KINDS:
        folder, what = home.path(KINDS[kind][0]), KINDS[kind][1]
        if not os.path.lexists(folder):
            if chosen:
                say(f"{kind}: nothing is there")
            continue
        count = disk_bytes(folder)
        if agreed(f"delete {what} ({folder}, {size(count)})", yes):
            kept, links = _DELETE[kind](folder)
            freed[kind] = count - kept
            for link in links:
                say(f"{link} was a link: what it led to is still there")
            say(f"{kind}: {size(freed[kind])} freed")
    if as_json:
        click.echo(json.dumps({"freed": freed, "bytes": sum(freed.values())}))


def _delete(folder: Path) -> tuple[int, list[Path]]:
    """Deletes a folder. Gives the bytes that are left, and the links that went."""
    if folder.is_symlink():
        folder.unlink()
        return 0, [folder]
    links = [path for path in folder.rglob("*") if path.is_symlink()]
    try:
        shutil.rmtree(folder)  # which follows no link
    except OSError as error:
        raise UsageError(f"{error.filename or folder} cannot be deleted: {error.strerror}") from None
    return 0, links


def _delete_models(folder: Path) -> tuple[int, list[Path]]:
    from mlx_flux_krea.home import default_model, installed_models

    from .config import set_model

    if default_model() in installed_models():
        set_model(None)
    return _delete(folder)


def _delete_pictures(folder: Path) -> tuple[int, list[Path]]:
    """Through the ledger: the log says that they went, and what a run is at work on stays."""
    from mlx_flux_krea.filters.ledger import Ledger

    from .shared.installed import disk_bytes

    Ledger().purge()
    return disk_bytes(folder), []


def _delete_runs(folder: Path) -> tuple[int, list[Path]]:
    """But those that are still going on."""
    from mlx_flux_krea.checkpoint import unfinished

    from .shared.installed import disk_bytes

    for path in unfinished():
        path.unlink(missing_ok=True)
    return disk_bytes(folder), []


_DELETE = {
    "weights": _delete_models,
    "filters": _delete,
    "logs": _delete,
    "quarantine": _delete_pictures,
    "unfinished": _delete_runs,
}
