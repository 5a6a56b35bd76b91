"""flux-krea shell: prompts line by line, with the model in memory."""

import contextlib
import os
import re
import shutil
import sys
import textwrap
import traceback
from collections.abc import Iterator
from functools import partial
from typing import Any

import click

from mlx_flux_krea import FluxPipeline, home
from mlx_flux_krea.errors import FluxKreaError, PartlyDone, UsageError, amount, printable

from .shared import settings, signals
from .shared.answers import nearest
from .shared.generation import OF_THE_PIPELINE, Generation, open_pipeline, over_config
from .shared.jobs import merge
from .shared.options import LASTING, OPTIONS, GeneratingCommand, cast, given_options, with_option_names
from .shared.terminal import Console
from .shared.text import table

try:
    import readline
except ImportError:  # some builds of Python lack it
    readline = None

# of /NAME, as black-forest-labs/flux has them; -n, -o and -m are those of `generate`
SHORT = {
    "w": "width", "h": "height", "s": "seed", "g": "guidance", "n": "num_images", "o": "output", "m": "model",
}  # fmt: skip
# Lines that are no prompts, with or without a slash, and what they do.
WORDS = {
    "exit": "quit", "quit": "quit", "q": "quit", ":q": "quit", "bye": "quit", "help": "help", "?": "help",
    "clear": "clear", "cls": "clear",
}  # fmt: skip
HELP = """A line is a prompt. An empty line repeats the last prompt and seed with the options changed since.
/w 768  /h 512  /s 7  /g 3.5  /n 4   width, height, seed, guidance, number of pictures
/NAME VALUE                          set any other option
/NAME                                remove the option
/                                    list the options that are set
help, clear, exit                    are commands, with or without a slash
The options: {names}"""


@click.command(
    cls=GeneratingCommand, params=[option for option in OPTIONS if option.name in (*LASTING, "force", "as_json")]
)
def shell(**options):
    """Generate pictures line by line, with the model in memory.

    A line is a prompt; an empty line repeats the last one. /w, /h, /s, /g, /n and /NAME change options, help lists
    them, exit ends.

    \b
    Example:
      flux-krea shell --steps 20
    """
    given, force, as_json = given_options(options)
    session = _Session(given, force, as_json)
    is_typed = _is_typed()
    for line in _typed_lines() if is_typed else map(str.strip, sys.stdin):
        word = WORDS.get(line.removeprefix("/").lower())
        if word == "quit":
            break
        if word == "clear":
            click.clear()  # only at a terminal
        else:
            session.try_line("/help" if word else line)
    if session.failed and not is_typed:
        kind = PartlyDone if session.succeeded else UsageError
        raise kind(f"{amount(session.failed, 'line')} failed")


def in_shell(text: str) -> str:
    """Replaces options in a message by the shell's form: --steps 3 by /steps 3, -n 4 by /n 4."""
    ours = {spelling for option in OPTIONS if option.name in LASTING for spelling in option.opts}

    def replaced(match: re.Match) -> str:
        return f"/{match[0].lstrip('-')}" if match[0] in ours else match[0]

    return re.sub(r"(?<![\w/-])--?[A-Za-z][\w-]*", replaced, with_option_names(text))


class _Console(Console):
    """Console whose notes name options as the shell has them."""

    def note(self, text: str) -> None:
        """Writes a note."""
        super().note(in_shell(text))


class _Session:
    """Options, model and last prompt of a shell.

    Args:
        given: options of the command line.
        force: replace existing files.
        as_json: print JSON reports, and events on standard error.
    """

    def __init__(self, given: dict[str, Any], force: bool, as_json: bool):
        self._given, self._force, self._as_json = given, force, as_json
        self._console = _Console(as_events=as_json)
        self._config = settings.read_options()
        self._base = over_config(self._config, given)
        self._pipe: FluxPipeline | None = open_pipeline(self._base)
        self._prompt: str | None = None
        self._seeds: list[int] = []  # of the last prompt
        self.failed = self.succeeded = 0  # lines that failed, and prompts that succeeded

    def try_line(self, line: str) -> None:
        """Runs one line; the model stays in memory if it fails, and Ctrl-C stops only this line."""
        try:
            self._run_line(line)
        except FluxKreaError as error:
            self._fail(str(error))
        except signals.Stopped as stopped:
            if stopped.exit_code != 130:
                raise
            self._fail(stopped.message)
        except Exception as error:
            traceback.print_exception(error)
            self._fail("this is a bug in flux-krea; please report it with the lines above")
        signals.forget()

    def _run_line(self, line: str) -> None:
        if line == "/help":
            self._console.say(_help())
        elif line == "/":
            rows = sorted((name, str(value)) for name, value in self._given.items())
            self._console.say(table(rows) if rows else "no option is set")
        elif line.startswith("/"):
            command, _, value = line.removeprefix("/").partition(" ")
            self._change(command, value.strip())
        elif line or self._prompt is not None:
            self._generate(line)

    def _change(self, command: str, value: str) -> None:
        """Sets an option, or removes it where no value is given."""
        command = SHORT.get(command.lower(), command)
        if value:
            name, taken = cast(command, "" if value in ('""', "''") else value, LASTING)
            self._given = merge(self._given, {name: taken})
            self._console.say(f"{name.replace('_', '-')} is {value}")
            return
        name = command.lstrip("-").replace("-", "_").lower()
        if name not in self._given:
            near = nearest(name, (*WORDS, *LASTING))
            if near and near != name:
                raise UsageError(f"there is no command /{command}", "", f"did you mean /{near.replace('_', '-')}?")
            raise UsageError(f"/{command} has no value, and is not set", "/NAME VALUE", "see /help")
        self._given = {n: v for n, v in self._given.items() if n != name}
        self._console.say(f"{name.replace('_', '-')} is the default again")

    def _generate(self, line: str) -> None:
        """Generates a prompt; an empty line repeats the last prompt with its seeds."""
        prompt = line or self._prompt
        repeated = {}
        if not line and self._seeds and "seed" not in self._given:
            counts = "num_images" in self._given or "num_images" in self._base  # then the first seed decides the others
            repeated = {"seed": tuple(self._seeds[:1] if counts else self._seeds)}
        given = self._given | {"prompt": prompt} | repeated
        self._prompt, self._seeds = prompt, [] if line else self._seeds
        before, self._base = self._base, over_config(self._config, given)
        if self._pipe is None or any(before.get(n) != self._base.get(n) for n in ("model", *OF_THE_PIPELINE)):
            self._pipe = None  # frees its memory before another model is opened
            self._pipe = open_pipeline(self._base)
        generation = Generation(self._console, as_json=self._as_json, pipe=self._pipe, is_last=False)
        self._seeds = generation.run_options(self._base, given, self._force)
        self.succeeded += 1

    def _fail(self, message: str) -> None:
        self.failed += 1
        self._console.say(f"flux-krea: {printable(in_shell(message))}")


def _is_typed() -> bool:
    """True where lines come from a person at a terminal."""
    return sys.stdin.isatty() and sys.stdout.isatty()


def _help() -> str:
    """Returns the help, no wider than the terminal, with names of options in one piece."""
    width = min(shutil.get_terminal_size().columns, 100)
    names = " ".join(name.replace("_", "-") for name in LASTING)
    lines = HELP.format(names=names).splitlines()
    wrap = partial(textwrap.fill, width=width, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
    return "\n".join(line if len(line) <= width else wrap(line) for line in lines)


def _typed_lines() -> Iterator[str]:
    """Yields lines typed at a terminal, with a history. Ctrl-C discards a line, Ctrl-D ends."""
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
def _history() -> Iterator[None]:
    """Keeps typed lines for the arrow keys, in a file that only its owner can read."""
    if readline is None:
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
