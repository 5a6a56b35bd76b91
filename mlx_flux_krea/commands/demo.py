"""flux-krea demo: the whole pipeline on the small model that comes with the program."""

import itertools
from pathlib import Path

import click

from mlx_flux_krea import FluxPipeline
from mlx_flux_krea.provenance import Picture

from .shared import signals
from .shared.options import FILE
from .shared.output import check_output, names_from, save
from .shared.sheet import contact_sheet as make_sheet
from .shared.terminal import Console, PipelineProgress, counted, say_path
from .shared.text import stage_times

_PROMPT = "a large yellow circle to the left of a small white star on a blue background"
_SCALES = (1.0, 2.0, 4.5, 8.0)  # guidance, across the sheet
_SEEDS = 4  # down the sheet
_Files = list[tuple[Path, Picture]]


@click.command()
@click.argument("prompt", default=_PROMPT)
@click.option("-o", "--output", type=FILE, default="demo.png", show_default=True, help="PNG, JPEG or WebP file.")
@click.option("--seed", type=int, default=1, show_default=True, help="Seed: the same seed repeats a picture.")
@click.option("--contact-sheet", is_flag=True, help="Make a sheet instead: four seeds, each at four guidance scales.")
@click.option("--force", is_flag=True, help="Replace the output; otherwise the next free name is taken.")
def demo(prompt, output, seed, contact_sheet, force):
    """Make a picture with the small built-in model.

    The model knows coloured circles, squares, triangles, stars, crosses and rings.

    \b
    Example:
      flux-krea demo "a large yellow star above a small pink ring on a purple background"
    """
    check_output(output)
    console = Console()
    with console.library_notes():
        pipe = FluxPipeline.from_pretrained("nano")
        make = _sheet if contact_sheet else _picture
        pictures = make(pipe, prompt, seed=seed, output=output, console=console)
    with signals.held():
        signals.finish()
        for path, picture in pictures:
            say_path(save(picture, names_from(path), force=force))
    console.say("This toy model shows that the installation works. It knows nothing but coloured shapes.")
    console.say("It gets 99 % of sentences about one shape right, and 98 % of those about two.")
    console.say("Next, the real model: flux-krea setup")


def _picture(pipe: FluxPipeline, prompt: str, *, seed: int, output: Path, console: Console) -> _Files:
    """Generates the picture. Returns it, and an enlarged copy."""
    progress = PipelineProgress(console)
    try:
        result = pipe(prompt, seed=seed, progress=progress)
    finally:
        progress.close()
    console.say(stage_times(result.seconds))
    native = result.images[0]
    return [(output, native), (output.with_stem(f"{output.stem}-large"), native.enlarged(5))]


def _sheet(pipe: FluxPipeline, prompt: str, *, seed: int, output: Path, console: Console) -> _Files:
    """Generates a sheet with seeds down and guidance scales across."""
    seeds = range(seed, seed + _SEEDS)
    cells = counted(list(itertools.product(seeds, _SCALES)), "generating the sheet", "picture")
    pictures = [pipe(prompt, seed=s, guidance_scale=scale, progress=False).images[0] for s, scale in cells]
    rows = [pictures[i : i + len(_SCALES)] for i in range(0, len(pictures), len(_SCALES))]
    labels = [f"guidance {scale:g}" for scale in _SCALES], [f"seed {s}" for s in seeds]
    return [(output, make_sheet(rows, *labels))]
