"""flux-krea config: what `generate` does where nothing is said, kept in a file.

The file is config.json in flux-krea's home folder: an object of options of `generate`, as a row of a prompt file.
"""

import json
from pathlib import Path

import click

from mlx_flux_krea.errors import UsageError

from .shared.options import LASTING, cast, check_together


@click.command()
@click.argument("option", required=False)
@click.argument("value", nargs=-1)
@click.option("--unset", is_flag=True, help="Forget OPTION.")
@click.option("--json", "as_json", is_flag=True, help="Print all of it as JSON.")
def config(option, value, unset, as_json):
    """Show or change what `generate` does where you say nothing.

    OPTION is one of generate's. The command line goes before it.

    \b
    Examples:
      flux-krea config
      flux-krea config steps 20
      flux-krea config steps --unset
    """
    from .shared.terminal import say, table

    path, options = _path(), _read()
    if option and (value or unset):
        if value and unset:
            raise UsageError(f"{option} has a value, and --unset", "one of them")
        text = " ".join(value)
        name, _ = cast(option, text, LASTING) if value else (_known(option, options), None)
        options = {n: v for n, v in options.items() if n != name} | ({name: text} if value else {})
        _write(options)
        say(f"written to {path}")
    elif option or unset:
        raise UsageError(f"there is no value for {option}" if option else "--unset has no option", "both")
    else:
        _checked(options, path)
    if as_json:
        click.echo(json.dumps(options))
    elif options:
        click.echo(table(sorted(options.items())))
    else:
        say(f"nothing is set in {path}")


def read_config() -> dict:
    """What the file says, as options by their names and with their types.

    Raises:
        UsageError: the file is damaged, or says what no option takes.
    """
    options = _checked(_read(), _path())
    return {name: value for name, value in options.items() if value is not False}


def set_model(name: str | None) -> None:
    """Makes a model the default, or none.

    Raises:
        UsageError: the file is damaged, or cannot be written.
    """
    options = {n: v for n, v in _read().items() if n != "model"}
    _write(options | ({} if name is None else {"model": name}))


def _write(options: dict) -> None:
    from mlx_flux_krea.files import replacing

    check_together(_checked(options, _path()))
    make_folder(_path().parent)
    with replacing(_path()) as file:
        file.write(json.dumps(options, indent=1, ensure_ascii=False).encode())


def make_folder(path: Path) -> None:
    """Makes a folder, and those above it.

    Raises:
        UsageError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{path} cannot be made: {error.strerror}", "", "name a place in $FLUX_KREA_HOME") from None


def _path() -> Path:
    from mlx_flux_krea import home

    return home.path(home.SETTINGS)


def _read() -> dict:
    try:
        options = json.loads(_path().read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{_path()} cannot be read: {error}", "a JSON object", "mend it, or remove it") from None
    if not isinstance(options, dict):
        raise UsageError(f"{_path()} holds a {type(options).__name__}", "a JSON object", "mend it, or remove it")
    return options


def _checked(options: dict, path: Path) -> dict:
    try:
        typed = dict(cast(name, value, LASTING) for name, value in options.items())
        check_together(typed)
        return typed
    except UsageError as error:
        raise UsageError(f"{path}: {error}", "", "change it with flux-krea config, or remove it") from None


def _known(option: str, options: dict) -> str:
    name = option.lstrip("-").replace("-", "_")
    if name not in options:
        raise UsageError(f"{option} is not set", f"one of {', '.join(options) or 'nothing'}")
    return name
