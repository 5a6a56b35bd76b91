"""Where a picture is written: the name is checked before any work, and nobody else's file is taken."""

import errno
import itertools
import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from mlx_flux_krea.errors import UsageError, Waiting, Withheld, amount

from . import signals


def check_output(output: Path, quality: int | None = None) -> None:
    """Finds out before any work whether a picture can be written there.

    Raises:
        UsageError: not a name that can be written, or of a format or a quality that is not known.
    """
    import tempfile

    from mlx_flux_krea.provenance import FORMATS, check_quality

    if os.path.isdir(output):
        raise UsageError(f"{output} is a folder", "the name of a file", f"write -o {output / 'out.png'}")
    if os.path.exists(output) and not os.path.isfile(output):
        raise UsageError(f"{output} is a device or a pipe", "the name of a file")
    if output.suffix.lower() not in FORMATS:
        raise UsageError(f"{output} ends in {output.suffix or 'nothing'!r}", f"one of {', '.join(FORMATS)}")
    check_quality(quality, FORMATS[output.suffix.lower()])
    folder = output.parent
    try:  # under a name a little longer than any that will be needed
        with signals.held():
            tempfile.NamedTemporaryFile(
                prefix=f".{output.name}-", suffix=".0000000-0000000.partial", dir=folder
            ).close()
    except OSError as error:
        if error.errno == errno.ENOENT and not os.path.exists(folder):
            raise UsageError(f"there is no folder {folder}", "one that exists", f"make it: mkdir -p {folder}") from None
        raise UsageError(f"{output} cannot be written: {error.strerror}", "", "choose another place with -o") from None


def names_from(output: Path, taken: int = 0) -> Iterator[Path]:
    """The name given, then with -2, -3 and so on; without the first, that were taken."""
    return (output if n == 1 else output.with_stem(f"{output.stem}-{n}") for n in itertools.count(taken + 1))


def save(picture, names: Iterator[Path], force: bool, noting=lambda path, encoded: None, **options) -> Path:
    """Saves under the next name; without --force under the next that is free at this moment, whoever else writes.

    Args:
        picture: what to save.
        names: to choose from.
        force: the first of them, whatever stands there.
        noting: called with a name and the file's bytes before they take it.
        options: of `Picture.save`.
    """
    for path in names:
        if force or not os.path.lexists(path):
            try:
                picture.save(path, force=force, before=partial(noting, path), **options)
                return path
            except FileExistsError:
                continue


def check_outcomes(outcomes: list[str]) -> None:
    """Ends a run that did not release every picture.

    Raises:
        Waiting: some wait for a person.
        Withheld: filters flagged some, and none waits.
    """
    waiting, withheld = outcomes.count("waiting"), sum(outcome.startswith("withheld") for outcome in outcomes)
    of = f"of {amount(len(outcomes), 'picture')}"
    if waiting:
        also = f", {withheld} withheld by a filter" * (withheld > 0)
        raise Waiting(f"{waiting} {of} waiting for review{also}", "", "look at it: flux-krea review")
    if withheld:
        raise Withheld(f"{withheld} {of} withheld by a filter", "", "if it is wrong: flux-krea review")
