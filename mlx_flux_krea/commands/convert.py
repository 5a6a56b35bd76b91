"""flux-krea convert: foreign weights into a model folder."""

import contextlib
import dataclasses
import json
from pathlib import Path

import click

from . import signals


@click.command()
@click.argument("sources", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="The model folder to make.  [default: in the home folder]"
)
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float16", "float32"]),
    default="bfloat16",
    show_default=True,
    help="Type of the weights in the folder.",
)
@click.option("--tokenizers", type=click.Path(path_type=Path), help="A folder with tokenizer/ and tokenizer_2/ in it.")
@click.option("--force", is_flag=True, help="Replace an existing model folder.")
@click.option("--allow-nonfinite", is_flag=True, help="Accept weights that hold NaN or infinities.")
@click.option("--json", "as_json", is_flag=True, help="Print a report as JSON.")
def convert(sources, output, dtype, tokenizers, force, allow_nonfinite, as_json):
    """Convert weights into a model folder.

    SOURCES is a folder in diffusers' layout, or the files of transformer, CLIP, T5 and VAE one by one.

    \b
    Examples:
      flux-krea convert FLUX.1-Krea-dev
      flux-krea convert flux1-krea-dev.safetensors clip_l.safetensors \\
          t5xxl_fp16.safetensors ae.safetensors --tokenizers FLUX.1-schnell
    """
    from mlx_flux_krea.convert import convert as run

    from .terminal import ByteProgress, Stopwatch, number, say, size, table

    watch, progress = Stopwatch(), ByteProgress()
    try:
        report = run(
            sources,
            output,
            dtype=dtype,
            tokenizers=tokenizers,
            force=force,
            allow_nonfinite=allow_nonfinite,
            progress=progress,
            placing=_placing,
        )
    finally:
        progress.close()
    rows = [("component", "parameters", "size", "from")]
    rows += [(c.name, number(c.parameters), size(c.bytes), c.layout) for c in report.components]
    say(table(rows, right=(1, 2)))
    for component in report.components:
        for reason in dict.fromkeys(reason for _, reason in component.dropped):
            name, *more = (name for name, why in component.dropped if why == reason)
            say(f"left out of {component.name}: {name}{f' and {len(more)} more' if more else ''} ({reason})")
        for name, reason in component.lost:
            say(f"zero in {component.name}: {name} ({reason})")
    say(f"{report.base}, {dtype}, in {watch.seconds:.1f} s")
    click.echo(json.dumps({**dataclasses.asdict(report), "path": str(report.path)}) if as_json else report.path)


@contextlib.contextmanager
def _placing():
    """A folder that has its name is a success, whatever signal comes."""
    with signals.held():
        yield
        signals.finish()
