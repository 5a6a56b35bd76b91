"""flux-krea demo: the whole pipeline on the small model that comes with the program."""

import itertools
from pathlib import Path

import click

from . import signals
from .output import check_output, names_from, save

_SCALES = (1.0, 2.0, 4.5, 8.0)  # guidance, across the sheet
_SEEDS = 4  # down the sheet


@click.command()
@click.argument("prompt", default="a red circle on a blue background")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default="demo.png", show_default=True, help="PNG, JPEG or WebP."
)
@click.option("--seed", type=int, default=1, show_default=True, help="Repeats a picture.")
@click.option("--contact-sheet", is_flag=True, help="A sheet instead: four seeds, each at four guidance values.")
@click.option("--force", is_flag=True, help="Replace the output; otherwise the next free name is taken.")
def demo(prompt, output, seed, contact_sheet, force):
    """Make a picture with the small model that comes with the program.

    It has learned coloured circles, squares, triangles, stars, crosses and rings.

    \b
    Example:
      flux-krea demo "a large yellow star above a small pink ring on a purple background"
    """
    from .terminal import say, show_notes

    check_output(output)
    from mlx_flux_krea import FluxPipeline

    show_notes()
    pipe = FluxPipeline.from_pretrained("nano")
    pictures = _sheet(pipe, prompt, seed, output) if contact_sheet else _picture(pipe, prompt, seed, output)
    with signals.held():
        signals.finish()
        for path, picture in pictures:
            click.echo(save(picture, names_from(path), force))
    say("This is a toy: it proves that the installation works, and knows nothing but coloured shapes.")
    say("It gets 99 % of sentences about one of them right, and 98 % of those about two.")
    say("Next, the real model: flux-krea setup")


def _picture(pipe, prompt: str, seed: int, output: Path) -> list[tuple]:
    """The picture, and the same enlarged."""
    from .terminal import PipelineProgress, say, stage_times

    progress = PipelineProgress()
    try:
        result = pipe(prompt, seed=seed, progress=progress)
    finally:
        progress.close()
    say(stage_times(result.seconds))
    native = result.images[0]
    return [(output, native), (output.with_stem(f"{output.stem}-large"), native.enlarged(5))]


def _sheet(pipe, prompt: str, seed: int, output: Path) -> list[tuple]:
    """Seeds down, guidance across."""
    from .sheet import contact_sheet
    from .terminal import counted

    seeds = range(seed, seed + _SEEDS)
    asked = counted(list(itertools.product(seeds, _SCALES)), "drawing the sheet", "picture")
    drawn = [pipe(prompt, seed=s, guidance_scale=scale).images[0] for s, scale in asked]
    rows = [drawn[i : i + len(_SCALES)] for i in range(0, len(drawn), len(_SCALES))]
    labels = [f"guidance {scale:g}" for scale in _SCALES], [f"seed {s}" for s in seeds]
    return [(output, contact_sheet(rows, *labels))]
