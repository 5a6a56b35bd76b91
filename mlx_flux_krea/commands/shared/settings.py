"""The config file: generate's default options, as `flux-krea config` and `flux-krea models default` write them.

It is config.json in the home folder, an object of options as in a row of a prompt file.
"""

import json
from pathlib import Path

from mlx_flux_krea import home
from mlx_flux_krea.errors import UsageError
from mlx_flux_krea.files import parse_json, read_small, replacing

from .options import CONFIG, SIGNING, cast, check_together


def path() -> Path:
    """Returns the path of the config file, which need not exist."""
    return home.path(home.SETTINGS)


def read() -> dict:
    """Reads the file as it is; {} where there is none.

    Raises:
        UsageError: the file is damaged.
    """
    try:
        options = parse_json(read_small(path()))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{path()} cannot be read: {error}", "a JSON object", "correct it, or remove it") from None
    if not isinstance(options, dict):
        raise UsageError(f"{path()} holds a {type(options).__name__}", "a JSON object", "correct it, or remove it")
    return options


def checked(options: dict) -> dict:
    """Returns the file's options with their names and types in the code.

    Raises:
        UsageError: an unknown option, a value that it does not take, or options that exclude each other.
    """
    try:
        typed = dict(cast(name, value, CONFIG) for name, value in options.items())
        check_together(typed)
        return typed
    except UsageError as error:
        raise UsageError(f"{path()}: {error}", "", "change it with flux-krea config, or remove it") from None


def read_options() -> dict:
    """Reads the options that were set, without the files to sign with.

    Raises:
        UsageError: the file is damaged, or holds a wrong option.
    """
    return {name: value for name, value in checked(read()).items() if value is not False and name not in SIGNING}


def own_certificate() -> tuple[Path | None, Path | None]:
    """Returns the files of one's own certificate and its key that were set; None: the installation's own is used.

    Raises:
        UsageError: as `read_options`, or one of the two is missing.
    """
    options = checked(read())
    certificate, key = (options.get(name) for name in SIGNING)
    if (certificate is None) != (key is None):
        missing = SIGNING[key is None].replace("_", "-")
        raise UsageError(
            f"{path()} has one of certificate and certificate-key", "both", f"flux-krea config {missing} FILE"
        )
    return certificate, key


def write(options: dict) -> None:
    """Writes the file.

    Raises:
        UsageError: a wrong option, or the file cannot be written.
    """
    checked(options)
    make_folder(path().parent)
    with replacing(path()) as file:
        file.write(json.dumps(options, indent=1, ensure_ascii=False).encode())


def set_model(name: str | None) -> None:
    """Sets the default model, or with None removes the setting.

    Raises:
        UsageError: the file is damaged, or cannot be written.
    """
    options = {n: v for n, v in read().items() if n != "model"}
    write(options | ({} if name is None else {"model": name}))


def make_folder(folder: Path) -> None:
    """Makes a folder and its parents.

    Raises:
        UsageError: it cannot be made.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"{folder} cannot be made: {error.strerror}", "", "name another place in $FLUX_KREA_HOME"
        ) from None
