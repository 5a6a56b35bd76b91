"""Output files: names are checked before any work, and existing files are not replaced."""

import contextlib
import hashlib
import itertools
import os
import shlex
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from mlx_flux_krea.errors import UsageError, Waiting, Withheld, amount
from mlx_flux_krea.files import sha256_if_exists, try_writing, written_whole
from mlx_flux_krea.presets import CREDENTIALS, METADATA
from mlx_flux_krea.provenance import FORMATS, Picture, check_quality

from . import signals


def check_output(output: Path, quality: int | None = None) -> None:
    """Checks that a picture can be written to a file.

    Raises:
        UsageError: it cannot be written, or its format or quality is not known.
    """
    if str(output) == "-":
        raise UsageError("- is standard output", "a file", "write -o out.png")
    if os.path.isdir(output):
        raise UsageError(f"{output} is a folder", "a file", f"write -o {shlex.quote(str(output / 'out.png'))}")
    if os.path.exists(output) and not os.path.isfile(output):
        raise UsageError(f"{output} is a device or a pipe", "a file")
    if output.suffix.lower() not in FORMATS:
        found = f"{output} ends in {output.suffix!r}" if output.suffix else f"{output} has no ending"
        todo = f"write -o {shlex.quote(str(output.with_suffix('.png') if output.name else 'out.png'))}"
        raise UsageError(found, f"one of {', '.join(FORMATS)}", todo)
    check_quality(quality, FORMATS[output.suffix.lower()])
    folder = output.parent
    if not os.path.isdir(folder):  # as the system sees it: a/../b needs a folder a, too
        raise _no_folder(folder)
    try:
        with signals.held():
            try_writing(output)
    except OSError as error:
        raise UsageError(f"{output} cannot be written: {error.strerror}", "", "choose another place with -o") from None


def _no_folder(folder: Path) -> UsageError:
    """Returns the error for a folder that cannot hold an output."""
    if os.path.lexists(folder) and not os.path.islink(folder):
        return UsageError(f"{folder} is a file", "a folder", "choose another place with -o")
    todo = f"make it: mkdir -p {shlex.quote(str(folder))}"
    return UsageError(f"there is no folder {folder}", "one that exists", todo)


def names_from(output: Path, taken: int = 0) -> Iterator[Path]:
    """Yields a name, then the same with -2, -3 and so on, without the first `taken` of them."""
    return (output if n == 1 else output.with_stem(f"{output.stem}-{n}") for n in itertools.count(taken + 1))


def save(
    picture: Picture,
    names: Iterator[Path],
    *,
    force: bool,
    before: Callable[[Path, bytes], None] = lambda path, encoded: None,
    **options,
) -> Path:
    """Saves a picture under the next name that is free, even if other programs write too.

    Args:
        picture: the picture.
        names: endless names to choose from.
        force: take the first name, and replace a file that has it.
        before: called with a name and the file's bytes before the file gets the name.
        options: of `Picture.save`.
    """
    for path in names:
        if force or not os.path.lexists(path):
            try:
                picture.save(path, force=force, before=partial(before, path), **options)
                return path
            except FileExistsError:
                continue
    raise ValueError("[save] No name is free.")


def save_bytes(data: bytes, names: Iterator[Path], *, force: bool) -> Path:
    """Saves a file under the first name that is free, or whose file holds the same bytes already. Returns its path.

    Args:
        data: the file.
        names: endless names to choose from.
        force: take the first name, and replace a file that has it.
    """
    digest = hashlib.sha256(data).hexdigest()
    for path in names:
        if not force and os.path.isfile(path) and sha256_if_exists(path) == digest:
            return path
        if force or not os.path.lexists(path):
            with contextlib.suppress(FileExistsError), written_whole(path, force) as file:
                file.write(data)
                return path
    raise ValueError("[save_bytes] No name is free.")


def meant_for(output: Path, options: dict) -> dict:
    """Returns the file that a picture is meant for, as JSON that is kept with it while it waits for review."""
    how = {name: options[name] for name in ("quality", "metadata", "credentials") if name in options}
    return {"folder": os.getcwd(), "output": str(output), **how}


def meant_file(meant: dict) -> tuple[Path | None, dict]:
    """Reads the JSON of `meant_for`. Returns the file (None: not known) and options of the command
    for it: metadata, credentials and quality."""
    folder, output = meant.get("folder"), meant.get("output")
    if not (isinstance(folder, str) and isinstance(output, str)):
        return None, {}
    same = os.path.realpath(folder) == os.getcwd()
    path = Path(output) if same else Path(folder, output)
    if not path.parent.is_dir():  # removed since
        path = Path(path.name)
    try:
        check_output(path, meant.get("quality"))
    except UsageError:
        return None, {}
    known = {"metadata": METADATA, "credentials": CREDENTIALS}
    how = {name: meant[name] for name, values in known.items() if meant.get(name) in values}
    return path, how | ({"quality": meant["quality"]} if meant.get("quality") is not None else {})


def check_outcomes(outcomes: list[str]) -> None:
    """Checks that every picture of a run was released.

    Raises:
        Waiting: some wait for review.
        Withheld: a filter withheld some, and none waits.
    """
    waiting, withheld = outcomes.count("waiting"), sum(outcome.startswith("withheld") for outcome in outcomes)
    of = f"of {amount(len(outcomes), 'picture')}"
    if waiting:
        also = f", {withheld} withheld by a filter" * (withheld > 0)
        raise Waiting(f"{waiting} {of} waiting for review{also}", "", "review it: flux-krea review")
    if withheld:
        raise Withheld(f"{withheld} {of} withheld by a filter", "", "if the filter is wrong: flux-krea review")
