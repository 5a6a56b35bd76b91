"""The `flux-krea` command: its table of verbs, and the one place that turns errors into messages and exit codes.

A verb's module is imported when the verb is called, so that `flux-krea --help` answers at once.
"""

# ruff: noqa: E402
import os
import sys


def _open_standard() -> None:
    """Opens closed descriptors of standard input, output and error on /dev/null.

    Else the next file gets such a number: a model's weights, or MLX's library, would be read as standard input.
    """
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest free number, which is this one
        if getattr(sys, name) is None:  # Python found it closed
            setattr(sys, name, open(descriptor, mode, closefd=False))  # noqa: SIM115


_open_standard()  # before anything that opens files

from mlx_flux_krea.commands.shared import signals

signals.install()  # before anything that takes time

import contextlib
import errno
import importlib
import re
import traceback
from dataclasses import dataclass

import click
from click.shell_completion import CompletionItem

from mlx_flux_krea import __version__, macos
from mlx_flux_krea.commands import completion
from mlx_flux_krea.errors import FluxKreaError, gpu_error, printable, shortened

_ODD = re.compile(r"[‐-―−“„‟«‘]|-[A-Za-z]=|--[\w-]+=[“„‟«‘]|--memory$")  # begins a word that `typed.check` may refuse


@dataclass(frozen=True)
class Verb:
    """A command of the group, which is loaded on demand."""

    module: str  # in mlx_flux_krea.commands
    attribute: str
    help: str  # the first sentence of the command's own help

    def load(self) -> click.Command:
        """Imports the command.

        Raises:
            UsageError: MLX does not work with this Python.
        """
        macos.check_python()
        return getattr(importlib.import_module(f"mlx_flux_krea.commands.{self.module}"), self.attribute)


VERBS = {
    "bench": Verb("bench", "bench", "Measure the speed of this machine."),
    "completion": Verb("completion", "completion", "Print the completion script for a shell."),
    "config": Verb("config", "config", "Show or change generate's default options."),
    "convert": Verb("convert", "convert", "Convert weights into a model folder."),
    "demo": Verb("demo", "demo", "Make a picture with the small built-in model."),
    "doctor": Verb("doctor", "doctor", "Examine this machine and the installation."),
    "generate": Verb("generate", "generate", "Generate pictures from PROMPT."),
    "inspect": Verb("inspect", "inspect", "Describe a model, an adapter, weights, or a picture."),
    "log": Verb("log", "log", "Verify or export the log of checks and releases."),
    "models": Verb("models", "models", "List installed models, adapters, components, filters."),
    "plan": Verb("plan", "plan", "Predict memory and disk of a picture, without loading."),
    "purge": Verb("purge", "purge", "Delete models, adapters, filters, logs, pictures or runs."),
    "resume": Verb("resume", "resume", "Continue a run that was interrupted, killed, or failed."),
    "review": Verb("review", "review", "Review waiting pictures, and release or reject them."),
    "setup": Verb("setup", "setup", "Install FLUX.1 Krea [dev] and make a first picture."),
    "shell": Verb("shell", "shell", "Generate pictures line by line, with the model in memory."),
    "tool-schema": Verb("schema", "tool_schema", "Print generate as a JSON tool for language models."),
    "ui": Verb("ui", "ui", "Open the page on this machine: queue, pictures, review."),
    "verify": Verb("verify", "verify", "Compare every file of a model or adapter with its manifest."),
}


class Verbs(click.Group):
    """The group of `VERBS`, which lists them without loading any."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Returns the names of the verbs."""
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Loads a verb; None: there is none of this name."""
        return VERBS[cmd_name].load() if cmd_name in VERBS else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the table of verbs."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, verb.help) for name, verb in VERBS.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Completes the name of a verb, or an option of the group."""
        verbs = [CompletionItem(name, help=verb.help) for name, verb in VERBS.items() if name.startswith(incomplete)]
        return verbs + click.Command.shell_complete(self, ctx, incomplete)


@click.group(cls=Verbs, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="flux-krea")
def cli():
    """FLUX.1 Krea [dev] on Apple silicon.

    \b
    Examples:
      flux-krea demo
      flux-krea setup
      flux-krea generate "a red circle on a blue background" -m nano --seed 7
    """


def main(argv: list[str] | None = None) -> None:
    """Runs the command and exits with its code. This is the console script."""
    try:
        signals.listen()
        code = _run(sys.argv[1:] if argv is None else argv)
        signals.finish()
    except signals.Stopped as stopped:
        signals.finish()
        code = _fail(stopped.message, stopped.exit_code)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:  # else the interpreter tries again at exit, complains, and changes the exit code
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)


def _run(argv: list[str]) -> int:
    """Runs the command. Turns every error into a message and returns the exit code."""
    if reconfigure := getattr(sys.stdout, "reconfigure", None):
        reconfigure(errors="surrogateescape")  # file names are bytes
    try:
        if instruction := os.environ.get(completion.VARIABLE):
            return completion.answer(cli, instruction)
        _check_words(argv)
        with cli.make_context("flux-krea", list(argv) or ["--help"]) as context:
            cli.invoke(context)
        return 0
    except Exception as error:
        signals.check()
        return _report(error, argv)


def _check_words(argv: list[str]) -> None:
    """Checks words that click would take for something else.

    Raises:
        UsageError: one of them.
    """
    if not argv or argv[0] not in VERBS or not any(_ODD.match(word) for word in argv):
        return
    from mlx_flux_krea.commands.shared import typed

    typed.check(_context(argv).command, argv[1:])


def _report(error: Exception, argv: list[str]) -> int:
    """Maps an error to its message and exit code; no other place does."""
    error = gpu_error(error) or error
    if isinstance(error, click.exceptions.Exit):  # of --help and --version
        return error.exit_code
    if isinstance(error, FluxKreaError):
        # here and below, since these would slow down --help
        from mlx_flux_krea.commands.shared.options import with_option_names

        return _fail(with_option_names(str(error)), error.exit_code)
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        click.echo(error.format_message(), err=True)
        return error.exit_code
    if isinstance(error, click.ClickException):
        from mlx_flux_krea.commands.shared.answers import answer

        context = getattr(error, "ctx", None) or _context(argv)
        message = re.sub(r"\s*[\n\t]\s*", " ", answer(error, context, argv))  # of lists, a line for each item
        return _fail(f"{message}{' Try' if message.endswith('?') else '; try'} {context.command_path} --help", 2)
    if isinstance(error, OSError):
        return _os_error(error)
    traceback.print_exception(error)
    return _fail("this is a bug in flux-krea; please report it with the lines above", 1)


def _context(argv: list[str]) -> click.Context:
    """Returns the context of the verb in a command line, which click leaves out of some of its errors."""
    group = click.Context(cli, info_name="flux-krea")
    name = next((word for word in argv if word in VERBS), None)
    return group if name is None else click.Context(VERBS[name].load(), info_name=name, parent=group)


def _os_error(error: OSError) -> int:
    """Reports an error of the system, in reading a file or printing; code that writes files reports its own."""
    disk_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    if not any(frame.f_code is click.echo.__code__ for frame, _ in traceback.walk_tb(error.__traceback__)):
        return _fail(f"{error.filename or 'a file'} cannot be read: {error.strerror or error}", 8 if disk_full else 3)
    if error.errno == errno.EPIPE:  # the reader closed the pipe on purpose
        return 2
    return _fail(f"the output cannot be written: {error.strerror}", 8 if disk_full else 2)


def _fail(message: str, code: int) -> int:
    with contextlib.suppress(OSError):
        click.echo(f"flux-krea: {printable(shortened(message))}", err=True)
    return code


if __name__ == "__main__":
    main()
