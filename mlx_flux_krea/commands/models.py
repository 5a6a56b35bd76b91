"""flux-krea models: what is installed, which model is meant where none is named, and how one is removed."""

import json
from dataclasses import asdict

import click

from mlx_flux_krea.errors import ModelError


@click.group(invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.pass_context
def models(context, as_json):
    """List the installed models and filters.

    Sizes are compared with what was written; `verify` compares every byte.

    \b
    Examples:
      flux-krea models
      flux-krea models default FLUX.1-Krea-dev-8bit
      flux-krea models rm FLUX.1-Krea-dev-4bit
    """
    if context.invoked_subcommand:
        return

    from mlx_flux_krea import home

    from .shared.installed import find_installed
    from .shared.terminal import say, size, table

    found = find_installed()
    if as_json:
        click.echo(json.dumps([{**asdict(one), "path": str(one.path)} for one in found], ensure_ascii=False))
    elif found:
        rows = [("name", "", "size", "precision", "licence", "")]
        for one in found:
            state = one.problem or ("default" if one.default else "")
            rows.append((one.name, one.kind, size(one.bytes), one.precision, one.license, state))
        click.echo(table(rows, right=(2,)))
    else:
        say(f"nothing is installed in {home.root()}: flux-krea setup")


@models.command()
@click.argument("name")
def default(name):
    """Make NAME the model that is meant where none is named."""
    from mlx_flux_krea.weights import open_model

    from .config import set_model
    from .shared.terminal import say

    open_model(_installed(name, "model").path)
    set_model(name)
    say(f"{name} is what generate takes now")


@models.command()
@click.argument("name")
@click.option("--yes", is_flag=True, help="Do not ask.")
def rm(name, yes):
    """Delete the model or filter NAME."""
    from mlx_flux_krea.convert.folder import remove_folder
    from mlx_flux_krea.home import default_model

    from .config import set_model
    from .shared.terminal import agreed, say, size

    one = _installed(name)
    if not agreed(f"delete {one.path}, {size(one.bytes)}", yes):
        say("nothing was deleted")
        return
    linked = one.path.is_symlink()
    remove_folder(one.path)
    if one.kind == "model" and default_model() == name:
        set_model(None)
    say(f"{name} was a link: what it led to is still there" if linked else f"{size(one.bytes)} freed")


def _installed(name: str, kind: str | None = None):
    """What is installed under a name; of a model and a filter, the model.

    Raises:
        ModelError: nothing is.
    """
    from .shared.installed import find_installed

    found = [one for one in find_installed() if kind in (None, one.kind)]
    for one in found:
        if one.name == name:
            return one
    names = ", ".join(one.name for one in found) or "nothing is"
    raise ModelError(f"no {kind or 'model or filter'} is installed as {name!r}", names, "see flux-krea models")
