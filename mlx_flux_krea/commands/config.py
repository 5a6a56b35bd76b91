"""flux-krea config: generate's default options, kept in a file."""

import os
import shlex

import click

from mlx_flux_krea.errors import UsageError, printable

from .shared import settings
from .shared.options import CONFIG, SIGNING, cast, find_name
from .shared.terminal import Console
from .shared.text import json_text, table


@click.command()
@click.argument("option", required=False)
@click.argument("value", nargs=-1)
@click.option("--unset", is_flag=True, help="Remove OPTION.")
@click.option("--json", "as_json", is_flag=True, help="Print all options as JSON.")
def config(option, value, unset, as_json):
    """Show or change generate's default options.

    OPTION is an option of generate; command-line options override it. certificate and certificate-key name PEM files to
    sign with, instead of the certificate that is made for this installation.

    \b
    Examples:
      flux-krea config
      flux-krea config steps 20
      flux-krea config steps
      flux-krea config steps --unset
    """
    console, options = Console(), settings.read()
    if option and "=" in option and not value:
        name, _, value = option.partition("=")
        found = f"{option} joins an option and its value"
        raise UsageError(found, "two words", f"write flux-krea config {name.lstrip('-')} {shlex.quote(value)}")
    if option and (value or unset):
        options = _changed(options, option, value=" ".join(value), unset=unset)
        settings.write(options)
        console.say(f"written to {settings.path()}")
    elif unset:
        raise UsageError("--unset has no option", "both", "name one, such as steps")
    else:
        settings.checked(options)
        options = options if option is None else _only(options, option, console)
    if as_json:
        click.echo(json_text(options))
    elif option and not value and not unset:
        for text in options.values():
            click.echo(printable(str(text)))
    elif options:
        click.echo(table(sorted(options.items())))
    else:
        console.say(f"no option is set in {settings.path()}")


def _only(options: dict, option: str, console: Console) -> dict:
    """Returns one of the options that are set; without it, says that generate's own default holds."""
    name = find_name(option, CONFIG)
    if name not in options:
        console.say(f"{name} is not set: generate's default holds")
    return {n: value for n, value in options.items() if n == name}


def _changed(options: dict, option: str, *, value: str, unset: bool) -> dict:
    """Returns the options with one more, another value, or one fewer."""
    if value and unset:
        raise UsageError(f"{option} has a value, and --unset", "one of them")
    if value:
        name, _ = cast(option, value, CONFIG)
        return options | {name: os.path.abspath(os.path.expanduser(value)) if name in SIGNING else value}
    name = find_name(option, CONFIG)
    if name not in options:
        raise UsageError(f"{option} is not set", f"one of {', '.join(options)}" if options else "")
    return {n: v for n, v in options.items() if n != name}
