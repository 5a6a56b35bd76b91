"""The `flux-krea` command: its group, `generate`, and the one place that turns errors into exit codes.

Heavy imports stay inside the verbs, so that help answers at once.
"""

# ruff: noqa: E402
from mlx_flux_krea.commands import signals

signals.install()  # before anything that takes time

import contextlib
import errno
import itertools
import json
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

import click

from mlx_flux_krea import __version__, presets
from mlx_flux_krea.commands.convert import convert
from mlx_flux_krea.commands.inspect import inspect
from mlx_flux_krea.commands.verify import verify
from mlx_flux_krea.errors import FluxKreaError, UsageError, printable


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="flux-krea")
def cli():
    """FLUX.1 Krea [dev] on Apple silicon.

    \b
    Examples:
      flux-krea convert FLUX.1-Krea-dev -o krea
      flux-krea generate "a frog holding a sign" -m krea -o frog.png
    """


cli.add_command(convert)
cli.add_command(inspect)
cli.add_command(verify)


@cli.command()
@click.argument("prompt")
@click.option("-m", "--model", help="A model folder, or the name of an installed one.  [default: the only one]")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default="out.png", show_default=True, help="PNG, JPEG or WebP."
)
@click.option("--width", type=int, help="Pixels, a multiple of 16.  [default: the model's]")
@click.option("--height", type=int, help="Pixels, a multiple of 16.  [default: the model's]")
@click.option("--steps", type=int, help="Number of steps.  [default: the model's]")
@click.option("--guidance", type=float, help="How closely to follow the prompt.  [default: the model's]")
@click.option("--seed", type=int, help="Repeats a picture.  [default: a new one, which is shown]")
@click.option(
    "-n", "--num-images", type=click.IntRange(1, 1000), default=1, show_default=True, help="With seeds that count up."
)
@click.option(
    "--noise", default="diffusers", show_default=True, help="Whose seed: diffusers, bfl, comfy, mflux, mlx-examples."
)
@click.option("--negative-prompt", help="What to move away from; needs --true-cfg-scale.")
@click.option(
    "--true-cfg-scale", type=float, default=1.0, show_default=True, help="Above 1: doubles the time of a step."
)
@click.option("--image", type=click.Path(path_type=Path), help="An image to start from.")
@click.option("--strength", type=float, help=f"How far to go from the image, 0 to 1.  [default: {presets.STRENGTH}]")
@click.option(
    "--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), help="Compute type.  [default: the model's]"
)
@click.option("--quality", type=int, help="1 to 100, of JPEG and WebP.  [default: 95]")
@click.option(
    "--metadata", type=click.Choice(["full", "minimal"]), default="full", show_default=True,
    help="What the picture's file tells: all that made it, or only that a machine did.",
)  # fmt: skip
@click.option("--force", is_flag=True, help="Replace the output, also a link; otherwise the next free name is taken.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object instead of paths.")
def generate(prompt, model, output, num_images, dtype, image, quality, metadata, force, as_json, **options):
    """Make a picture from PROMPT.

    \b
    Example:
      flux-krea generate "a frog holding a sign" --seed 7 -o frog.png
    """
    from mlx_flux_krea.commands.terminal import PipelineProgress, say, show_notes

    _check_output(output, quality)
    in_python = {"steps": "num_inference_steps", "guidance": "guidance_scale"}
    request = {in_python.get(name, name): value for name, value in options.items() if value is not None}
    seed = request.pop("seed", None)

    from mlx_flux_krea import FluxPipeline
    from mlx_flux_krea.request import open_image, random_seed

    show_notes()
    pipe = FluxPipeline.from_pretrained(model, dtype=dtype)
    request["image"] = open_image(image)  # once: the first picture may take its name
    seed = random_seed() if seed is None else seed
    if seed + num_images > 2**64:
        raise UsageError(f"seed {seed} and {num_images - 1} after it", f"at most {2**64 - 1}")
    progress = PipelineProgress()
    names, images = _names(output), []
    try:
        for number in range(num_images):
            result = pipe(prompt, seed=seed + number, progress=progress, **request)
            with signals.held():  # a picture that has its name is also reported
                if number == num_images - 1:
                    signals.finish()
                path = _save(result.images[0], names, force, metadata=metadata, quality=quality)
                if path != output and not images:
                    say(f"note: {printable(str(output))} exists; writing {printable(str(path))}")
                stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in result.seconds.items())
                say(f"seed {seed + number}: {stages}")
                more = {"notes": result.notes, "seconds": result.seconds}
                images.append({"path": str(path), **result.records[0], **more})
                if not as_json:
                    click.echo(path)
    except FluxKreaError as error:
        if images:
            error.exit_code = 7
        raise
    finally:
        progress.close()
        if as_json and images:
            click.echo(json.dumps({"images": images}, ensure_ascii=False))


def _check_output(output: Path, quality: int | None = None) -> None:
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


def _names(output: Path) -> Iterator[Path]:
    """The name given, then with -2, -3 and so on."""
    return (output if n == 1 else output.with_stem(f"{output.stem}-{n}") for n in itertools.count(1))


def _save(picture, names: Iterator[Path], force: bool, **options) -> Path:
    """Saves under the next name; without --force under the next that is free at this moment, whoever else writes."""
    for path in names:
        if force or not os.path.lexists(path):
            try:
                picture.save(path, force=force, **options)
                return path
            except FileExistsError:
                continue


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
