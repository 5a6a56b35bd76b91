"""flux-krea verify: compares the folder of a model or of an installed adapter with its manifest."""

import time

import click

from mlx_flux_krea import home
from mlx_flux_krea.adapters.installed import DERIVED, FACTS, installed
from mlx_flux_krea.convert.folder import check_manifest
from mlx_flux_krea.errors import ModelError, amount
from mlx_flux_krea.home import find_model, installed_components

from .shared.terminal import ByteProgress, Console, say_path
from .shared.text import json_text, size


@click.command()
@click.argument("model")
@click.option("--json", "as_json", is_flag=True, help="Print a report as JSON.")
def verify(model, as_json):
    """Compare every file of a model or adapter with its manifest.

    MODEL is a model folder, or the name of an installed model, component or adapter.

    \b
    Examples:
      flux-krea verify krea
      flux-krea verify paper
    """
    start, progress = time.perf_counter(), ByteProgress()
    apart = (installed() | installed_components()).get(home.composed(model))  # from models: adapters and components
    path = apart if apart and not home.named(model).exists() else find_model(model)
    try:
        files, problems = check_manifest(path, progress, derived=DERIVED if (path / FACTS).is_file() else "")
    finally:
        progress.close()
    if as_json:
        click.echo(json_text({"path": str(path), "files": len(files), "bytes": sum(files.values()), **problems}))
    damage = "; ".join(f"{kind}: {_some(names)}" for kind, names in problems.items() if names)
    if damage:
        again = f"flux-krea models rm {path.name}, then models add its file again"
        todo = again if (path / FACTS).is_file() else "convert the model again"
        raise ModelError(f"{path} differs from its manifest.json ({damage})", todo=todo)
    count, took = amount(len(files), "file"), time.perf_counter() - start
    Console().say(f"{count}, {size(sum(files.values()))}, unchanged; in {took:.1f} s")
    if not as_json:
        say_path(path)


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
