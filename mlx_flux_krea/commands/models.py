"""flux-krea models: lists and removes what is installed, adds adapters, and chooses the default model."""

import difflib
import shlex
from dataclasses import asdict

import click

from mlx_flux_krea import home
from mlx_flux_krea.convert.folder import remove_folder
from mlx_flux_krea.errors import ModelError
from mlx_flux_krea.presets import TASKS
from mlx_flux_krea.weights import open_model

from .shared import loras, settings
from .shared.installed import BUILT_IN, Installed, built_in, find_installed, formulas
from .shared.options import ADAPTER
from .shared.terminal import Console, confirmed
from .shared.text import json_text, size, table


@click.group(invoke_without_command=True)
@click.option("--json", "as_json", is_flag=True, help="Print the list as JSON.")
@click.pass_context
def models(context, as_json):
    """List installed models, adapters, components, filters.

    Files are checked by size; `flux-krea verify` checks every byte.

    \b
    Examples:
      flux-krea models
      flux-krea models default FLUX.1-Krea-dev-8bit
      flux-krea models add alimama-creative/FLUX.1-Turbo-Alpha
      flux-krea models rm FLUX.1-Krea-dev-4bit
    """
    if context.invoked_subcommand:
        return
    installed = find_installed() + built_in()
    if as_json:
        click.echo(json_text([{**asdict(one), "path": str(one.path)} for one in installed]))
    else:
        rows = [("name", "", "size", "precision", "licence", "")]
        for one in installed:
            words = f"words: {', '.join(one.triggers)}" if one.triggers else ""
            state = one.problem or ("default" if one.default else words)
            kind = one.kind if one.task in ("", TASKS[0]) else f"{one.kind}, {one.task}"
            rows.append((one.name, kind, size(one.bytes), one.precision, one.license, state))
        click.echo(table(rows, right=(2,)))
        if not any(one.kind == "model" for one in installed):
            Console().say(f"no other model is in {home.root()}; install one: flux-krea setup")


@models.command()
@click.argument("name")
def default(name):
    """Make NAME the default model."""
    open_model(_find(name, ("model",)).path)
    settings.set_model(name)
    Console().say(f"{name} is the default model now")


@models.command()
@click.argument("source", type=ADAPTER)
@click.option("--name", help="Name for --lora and <lora:NAME:WEIGHT>.  [default: the file's]")
def add(source, name):
    """Install the adapter SOURCE (LoRA, LoKr, LoHa, DoRA): a file, or OWNER/NAME[:FILE] on the hub."""
    console = Console()
    with console.library_notes():
        facts = loras.add(source, name)
    words = f"; its prompt needs: {', '.join(facts.triggers)}" if facts.triggers else ""
    console.say(f"{facts.name} is installed: {formulas(facts.kinds, facts.ranks)}, fits {facts.count}{words}")
    console.say(f"use it: flux-krea generate PROMPT --lora {shlex.quote(facts.name)}=1")


@models.command()
@click.argument("name")
@click.option("--yes", is_flag=True, help="Delete without asking.")
def rm(name, yes):
    """Delete the model, adapter, component or filter NAME."""
    console, one = Console(), _find(name, ("model", "adapter", "component", "filter"))
    if not confirmed(f"delete {one.path}, {size(one.bytes)}", yes):
        console.say("nothing was deleted")
        return
    linked = one.path.is_symlink()
    remove_folder(one.path)
    if one.kind == "model" and home.default_model() == one.name:
        settings.set_model(None)
    console.say(f"{name} was a link: its target is still there" if linked else f"{size(one.bytes)} freed")


def _find(name: str, kinds: tuple[str, ...]) -> Installed:
    """Finds an installed folder by name; a model comes before others of the same name.

    Raises:
        ModelError: there is none, or none of these kinds.
    """
    known = find_installed() + (built_in(always=True) if "filter" not in kinds else [])
    candidates = [one for one in known if one.kind in (*kinds, BUILT_IN)]
    for one in candidates:
        if one.name == home.composed(name):
            return one
    if name == home.NANO_NAME:
        raise ModelError(f"{name} is built in, and cannot be removed")
    names = [one.name for one in candidates]
    near = difflib.get_close_matches(name, names, 1)
    todo = f"did you mean {near[0]}?" if near else "see flux-krea models"
    raise ModelError(f"no {' or '.join(kinds)} is installed as {name!r}", ", ".join(names), todo)
