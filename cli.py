"""The `flux-krea` command: its group, `generate`, and the one place that turns errors into exit codes.

Heavy imports stay inside the verbs, so that help answers at once.
"""

import json
import signal
import sys
import traceback
from pathlib import Path

import click

from mlx_flux_krea import __version__
from mlx_flux_krea.commands.convert import convert
from mlx_flux_krea.commands.inspect import inspect
from mlx_flux_krea.errors import FluxKreaError, UsageError


class Terminated(BaseException):
    """SIGTERM arrived."""


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
    "-n", "--num-images", type=click.IntRange(1), default=1, show_default=True, help="With seeds that count up."
)
@click.option(
    "--noise", default="diffusers", show_default=True, help="Whose seed: diffusers, bfl, comfy, mflux, mlx-examples."
)
@click.option("--negative-prompt", help="What to move away from; needs --true-cfg-scale.")
@click.option(
    "--true-cfg-scale", type=float, default=1.0, show_default=True, help="Above 1: doubles the time of a step."
)
@click.option("--image", type=click.Path(path_type=Path), help="An image to start from.")
@click.option("--strength", type=float, help="How far to go from the image, 0 to 1.  [default: 0.6]")
@click.option(
    "--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), help="Compute type.  [default: the model's]"
)
@click.option("--force", is_flag=True, help="Overwrite the output; otherwise the next free name is taken.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object instead of paths.")
def generate(prompt, model, output, num_images, dtype, force, as_json, **options):
    """Make a picture from PROMPT.

    \b
    Example:
      flux-krea generate "a frog holding a sign" --seed 7 -o frog.png
    """
    from mlx_flux_krea.commands.terminal import PipelineProgress, say, show_notes

    paths = _free_names(output, num_images, force)
    names = {"steps": "num_inference_steps", "guidance": "guidance_scale"}
    request = {names.get(name, name): value for name, value in options.items() if value is not None}
    seed = request.pop("seed", None)

    from mlx_flux_krea import FluxPipeline
    from mlx_flux_krea.request import random_seed

    show_notes()
    pipe = FluxPipeline.from_pretrained(model, dtype=dtype)
    seed = random_seed() if seed is None else seed
    progress = PipelineProgress()
    images = []
    try:
        for number, path in enumerate(paths):
            result = pipe(prompt, seed=seed + number, progress=progress, **request)
            result.images[0].save(path)
            stages = ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in result.seconds.items())
            say(f"seed {seed + number}: {stages}")
            images.append({"path": str(path), **result.records[0], "notes": result.notes, "seconds": result.seconds})
            if not as_json:
                click.echo(path)
    except FluxKreaError as error:
        if images and error.exit_code != 130:
            error.exit_code = 7
        raise
    finally:
        progress.close()
        if as_json and images:
            click.echo(json.dumps({"images": images}, ensure_ascii=False))


def _free_names(output: Path, count: int, force: bool) -> list[Path]:
    """The files to write: the name given, then with -2, -3 and so on; taken ones are passed over without --force.

    Raises:
        UsageError: not a name that can be written, or of a format that is not known.
    """
    import tempfile

    from mlx_flux_krea.provenance import FORMATS

    if output.is_dir():
        raise UsageError(f"{output} is a folder", "the name of a file", f"write -o {output / 'out.png'}")
    if output.suffix.lower() not in FORMATS:
        raise UsageError(f"{output} ends in {output.suffix or 'nothing'!r}", f"one of {', '.join(FORMATS)}")
    folder = output.parent
    if not folder.is_dir():
        raise UsageError(f"there is no folder {folder}", "one that exists", f"make it: mkdir -p {folder}")
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UsageError(f"{folder} cannot be written: {error.strerror}", "", "choose another folder with -o") from None
    paths: list[Path] = []
    number = 1
    while len(paths) < count:
        path = output if number == 1 else output.with_stem(f"{output.stem}-{number}")
        if force or not path.exists():
            paths.append(path)
        number += 1
    if not force and paths[0] != output:
        click.echo(f"note: {output} exists; writing {paths[0]}", err=True)
    return paths


def main(argv: list[str] | None = None) -> None:
    """The console script: runs the command and exits with its code."""

    def terminate(signum, frame):
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)
    try:
        code = cli.main(argv, standalone_mode=False) or 0
    except FluxKreaError as error:
        code = _fail(str(error), error.exit_code)
    except click.ClickException as error:
        error.show()
        code = 2
    except (KeyboardInterrupt, click.Abort):
        code = _fail("interrupted", 130)
    except Terminated:
        code = _fail("terminated", 143)
    except Exception:
        traceback.print_exc()
        code = _fail("this is a bug in flux-krea; please report it with the lines above", 1)
    for end in (signal.SIGINT, signal.SIGTERM):  # what there was to do is done or undone
        signal.signal(end, signal.SIG_IGN)
    sys.exit(code)


def _fail(message: str, code: int) -> int:
    click.echo(f"flux-krea: {message}", err=True)
    return code


if __name__ == "__main__":
    main()
