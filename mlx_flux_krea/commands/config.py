"""flux-krea config: generate's default options, kept in a file."""

import json

import click

from mlx_flux_krea.errors import UsageError

from .shared import settings
from .shared.options import LASTING, cast
from .shared.terminal import Console
from .shared.text import table


@click.command()
@click.argument("option", required=False)
@click.argument("value", nargs=-1)
@click.option("--unset", is_flag=True, help="Remove OPTION.")
@click.option("--json", "as_json", is_flag=True, help="Print all options as JSON.")
def config(option, value, unset, as_json):
    """Show or change generate's default options.

    OPTION is an option of generate. Command-line options override it.

    \b
    Examples:
      flux-krea config
      flux-krea config steps 20
      flux-krea config steps --unset
    """
    console, options = Console(), settings.read()
    if option and (value or unset):
        options = _changed(options, option, value=" ".join(value), unset=unset)
        settings.write(options)
        console.say(f"written to {settings.path()}")
    elif option or unset:
        raise UsageError(f"there is no value for {option}" if option else "--unset has no option", "both")
    else:
        settings.checked(options)
    if as_json:
        click.echo(json.dumps(options))
    elif options:
        click.echo(table(sorted(options.items())))
    else:
        console.say(f"no option is set in {settings.path()}")


def _changed(options: dict, option: str, *, value: str, unset: bool) -> dict:
    """Returns the options with one more, another value, or one fewer."""
    if value and unset:
        raise UsageError(f"{option} has a value, and --unset", "one of them")
    if value:
        name, _ = cast(option, value, LASTING)
        return options | {name: value}
    name = option.lstrip("-").replace("-", "_")
    if name not in options:
        raise UsageError(f"{option} is not set", f"one of {', '.join(options) or 'nothing'}")
    return {n: v for n, v in options.items() if n != name}
