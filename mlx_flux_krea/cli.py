"""The `flux-krea` command: its group, the list of its verbs, and the one place that turns errors into exit codes.

Verbs keep heavy imports inside themselves, so that help answers at once.
"""

# ruff: noqa: E402
from mlx_flux_krea.commands.shared import signals

signals.install()  # before anything that takes time

import contextlib
import errno
import os
import sys
import traceback

import click

from mlx_flux_krea import __version__
from mlx_flux_krea.commands import bench, completion, config, schema, shell
from mlx_flux_krea.commands.convert import convert
from mlx_flux_krea.commands.demo import demo
from mlx_flux_krea.commands.doctor import doctor
from mlx_flux_krea.commands.generate import generate
from mlx_flux_krea.commands.inspect import inspect
from mlx_flux_krea.commands.log import log
from mlx_flux_krea.commands.models import models
from mlx_flux_krea.commands.plan import plan
from mlx_flux_krea.commands.purge import purge
from mlx_flux_krea.commands.resume import resume
from mlx_flux_krea.commands.review import review
from mlx_flux_krea.commands.setup import setup
from mlx_flux_krea.commands.shared import macos
from mlx_flux_krea.commands.verify import verify
from mlx_flux_krea.errors import FluxKreaError, printable


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="flux-krea")
def cli():
    """FLUX.1 Krea [dev] on Apple silicon.

    \b
    Examples:
      flux-krea convert FLUX.1-Krea-dev -o krea
      flux-krea generate "a frog holding a sign" -m krea -o frog.png
    """
    macos.check_python()


for verb in (
    demo, setup, generate, resume, shell.shell, review, convert, models, inspect, plan, bench.bench, verify, doctor,
    log, purge, config.config, schema.tool_schema, completion.completion,
):  # fmt: skip
    cli.add_command(verb)


def main(argv: list[str] | None = None) -> None:
    """The console script: runs the command and exits with its code."""
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
        except OSError:  # or the interpreter tries again at its end, complains, and exits with another code
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)


def _run(argv: list[str]) -> int:
    """Runs the command; every error becomes one line and its exit code."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started this
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    sys.stdout.reconfigure(errors="surrogateescape")  # names of files are bytes
    try:
        if asked := os.environ.get(completion.VARIABLE):
            return completion.answer(cli, asked)
        with cli.make_context("flux-krea", list(argv) or ["--help"]) as context:
            cli.invoke(context)
        return 0
    except Exception as error:
        signals.check()
        return _report(error)


def _report(error: Exception) -> int:
    """The one place that maps errors to exit codes."""
    if isinstance(error, click.exceptions.Exit):  # of --help and --version
        return error.exit_code
    if isinstance(error, FluxKreaError):
        return _fail(str(error), error.exit_code)
    if isinstance(error, click.ClickException):
        command = error.ctx.command_path if getattr(error, "ctx", None) else "flux-krea"
        return _fail(f"{error.format_message().rstrip('.?')}; try {command} --help", 2)
    if isinstance(error, OSError):
        return _os_error(error)
    traceback.print_exception(error)
    return _fail("this is a bug in flux-krea; please report it with the lines above", 1)


def _os_error(error: OSError) -> int:
    """What the system refused. Whatever writes files says itself that it cannot: this was our output, or a reading."""
    disk_full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    if not any(frame.f_code is click.echo.__code__ for frame, _ in traceback.walk_tb(error.__traceback__)):
        return _fail(f"{error.filename or 'a file'} cannot be read: {error.strerror or error}", 8 if disk_full else 3)
    if error.errno == errno.EPIPE:  # the reader went away, and knows it
        return 2
    return _fail(f"the output cannot be written: {error.strerror}", 8 if disk_full else 2)


def _fail(message: str, code: int) -> int:
    with contextlib.suppress(OSError):
        click.echo(f"flux-krea: {printable(message)}", err=True)
    return code


if __name__ == "__main__":
    main()
