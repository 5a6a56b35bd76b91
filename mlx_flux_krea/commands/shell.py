"""flux-krea shell: line by line, with the model warm."""

import contextlib
import os
import sys
import traceback
from collections.abc import Iterator

import click

from mlx_flux_krea.errors import FluxKreaError, PartlyDone, UsageError, amount, printable

from .shared import signals
from .shared.options import LASTING, OPTIONS, SeveralSeeds, cast
from .shared.options import said as read

SHORT = {"w": "width", "h": "height", "s": "seed", "g": "guidance", "n": "steps"}  # as black-forest-labs/flux has them
HELP = """A line is a prompt. An empty line draws the last one again, from the same seed, with what was changed since.
/w 768  /h 512  /s 7  /g 3.5  /n 20    width, height, seed, guidance, steps
/NAME VALUE   any other option: {names}
/NAME         as if it had never been said
/             what was said so far         /q   the end"""


@click.command(cls=SeveralSeeds, params=[option for option in OPTIONS if option.name in (*LASTING, "force", "as_json")])
def shell(**options):
    """Draw line by line, with the model warm.

    A line is a prompt, an empty one the last again; /w /h /s /g /n and every other option by its name. /help says more.

    \b
    Example:
      flux-krea shell --steps 20
    """
    from .config import read_config
    from .generate import OF_THE_PIPELINE, make_pictures, open_pipe
    from .shared.jobs import merge
    from .shared.terminal import say, table

    said, force, as_json = read(options)
    config = read_config()
    base = merge(config, said)
    pipe = open_pipe(base)
    last, seeds, drawn, failed = None, [], 0, 0
    typed = sys.stdin.isatty() and sys.stdout.isatty()
    for line in _typed_lines() if typed else map(str.strip, sys.stdin):
        try:
            command, _, value = line.removeprefix("/").partition(" ")
            if line in ("/q", "/quit"):
                break
            elif line == "/help":
                say(HELP.format(names=" ".join(name.replace("_", "-") for name in LASTING)))
            elif line == "/":
                say(table(sorted((name, printable(str(value))) for name, value in said.items())) if said else "nothing")
            elif line.startswith("/"):
                said = _changed(said, command, value.strip(), merge)
            elif line or last is not None:
                prompt = line or last
                held = {"seed": tuple(seeds)} if not line and seeds and "seed" not in said else {}
                given = said | {"prompt": prompt} | held
                last, seeds = prompt, seeds if not line else []
                before, base = base, merge(config, given)
                if pipe is None or any(before.get(name) != base.get(name) for name in ("model", *OF_THE_PIPELINE)):
                    pipe = None  # before another takes its memory
                    pipe = open_pipe(base)
                seeds = make_pictures(base, given, force, as_json, pipe, ends=False)
                drawn += 1
        except FluxKreaError as error:
            failed += 1
            say(f"flux-krea: {printable(str(error))}")
        except signals.Stopped as stopped:
            if stopped.exit_code != 130:
                raise
            failed += 1
            say(f"flux-krea: {stopped.message}")
        except Exception as error:  # the model stays warm, whatever is wrong with one line
            failed += 1
            traceback.print_exception(error)
            say("flux-krea: this is a bug in flux-krea; please report it with the lines above")
        signals.forget()
    if failed and not typed:
        raise (PartlyDone if drawn else UsageError)(f"{amount(failed, 'line')} failed")


def _changed(said: dict, command: str, value: str, merge) -> dict:
    """What was said, with one option more, another value, or one fewer."""
    command = SHORT.get(command, command)
    if value:
        return merge(said, dict([cast(command, value, LASTING)]))
    name = command.replace("-", "_")
    if name not in said:
        raise UsageError(f"/{command} has no value, and none was said before", "/NAME VALUE", "see /help")
    return {n: v for n, v in said.items() if n != name}


def _typed_lines() -> Iterator[str]:
    """What is typed, with a history that is kept. Ctrl-C takes back a line, Ctrl-D ends."""
    with _history():
        while True:
            line = None
            try:
                line = input("flux-krea> ").strip()
            except EOFError:
                click.echo()
                return
            except signals.Stopped as stopped:
                if stopped.exit_code != 130:
                    raise
                click.echo()
            signals.forget()
            if line is not None:
                yield line


@contextlib.contextmanager
def _history():
    """Lines of earlier times for the arrow keys, in a file that only its owner reads."""
    from mlx_flux_krea import home

    try:
        import readline
    except ImportError:  # some Pythons come without
        yield
        return
    path = home.path(home.HISTORY)
    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(1000)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))
            readline.write_history_file(path)
