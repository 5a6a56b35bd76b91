"""flux-krea verify: whether a model folder still is what the converter wrote."""

import json
import time

import click


@click.command()
@click.argument("model")
@click.option("--json", "as_json", is_flag=True, help="Print a report as JSON.")
def verify(model, as_json):
    """Hash every file of MODEL again and compare it with its manifest.

    MODEL is a model folder, or the name of an installed one.

    \b
    Example:
      flux-krea verify krea
    """
    from mlx_flux_krea.convert.folder import check_manifest
    from mlx_flux_krea.errors import ModelError, amount
    from mlx_flux_krea.home import find_model

    from .shared.terminal import ByteProgress, say, size

    begin, path, progress = time.perf_counter(), find_model(model), ByteProgress()
    try:
        files, problems = check_manifest(path, progress)
    finally:
        progress.close()
    if as_json:
        click.echo(json.dumps({"path": str(path), "files": len(files), "bytes": sum(files.values()), **problems}))
    found = "; ".join(f"{what}: {_some(names)}" for what, names in problems.items() if names)
    if found:
        raise ModelError(f"{path} is not what its manifest.json says ({found})", todo="convert the model again")
    count, took = amount(len(files), "file"), time.perf_counter() - begin
    say(f"{count}, {size(sum(files.values()))}, as they were written; in {took:.1f} s")
    if not as_json:
        click.echo(path)


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
