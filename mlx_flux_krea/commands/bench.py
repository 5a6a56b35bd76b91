"""flux-krea bench: the speed of this machine with a model, as a line to share."""

import platform
import time
from importlib.metadata import version
from itertools import pairwise
from statistics import median
from typing import Any

import click

from mlx_flux_krea import FluxPipeline, Result, __version__
from mlx_flux_krea.memory import step_flops
from mlx_flux_krea.presets import CHIPS

from .shared import estimates
from .shared.estimates import device, this_chip
from .shared.options import DTYPE, MODEL_DEFAULT, MODEL_HELP, SIDE
from .shared.terminal import Console, PipelineProgress
from .shared.text import json_text, size, stage_times

_PROMPT = "a large red circle on a white background"  # of words that every model knows: steps take the same for any


@click.command()
@click.option("-m", "--model", help=f"{MODEL_HELP}  [default: {MODEL_DEFAULT}]")
@click.option("--width", type=SIDE, help="Width in pixels.  [default: the model's]")
@click.option("--height", type=SIDE, help="Height in pixels.  [default: the model's]")
@click.option(
    "--steps",
    type=click.IntRange(2, 100),
    default=5,
    show_default=True,
    help="Number of steps; the first also loads the weights.",
)
@click.option(
    "--memory", default="auto", show_default=True, help="Memory for this program (not the Mac's), such as 6GB."
)
@click.option("--dtype", type=DTYPE, help="Compute type.  [default: the model's]")
@click.option("--json", "as_json", is_flag=True, help="Print all measurements as JSON.")
def bench(model, width, height, steps, memory, dtype, as_json):
    """Measure the speed of this machine.

    The picture is discarded, so that no filter is needed. On a GPU a model in bfloat16 is measured in float16 too, and
    the better type for this machine is recommended.

    \b
    Example:
      flux-krea bench -m krea --steps 5
    """
    console = Console()
    with console.library_notes():
        facts = _bench(model, dtype, memory=memory, width=width, height=height, steps=steps, console=console)
        compared = None
        if dtype is None and facts["dtype"] == "bfloat16" and estimates.has_fast_halves():
            compared = _bench(model, "float16", memory=memory, width=width, height=height, steps=steps, console=console)
    if facts["wanting"]:
        console.say(f"note: {facts['wanting']}")
    if as_json:
        click.echo(json_text(facts | ({} if compared is None else {"float16": compared})))
        return
    click.echo(_line(facts))
    if compared:
        click.echo(_line(compared))
        console.say(estimates.recommendation(facts["seconds_per_step"], compared["seconds_per_step"]))


def _bench(
    model: str | None, dtype: str | None, *, memory: str, width: int | None, height: int | None, steps: int,
    console: Console,
) -> dict[str, Any]:  # fmt: skip
    """Measures a model in one compute type. Returns the facts."""
    pipe = FluxPipeline.from_pretrained(model, dtype=dtype, memory=memory)
    index = pipe.folder.index
    shape = width or index.defaults.width, height or index.defaults.height
    result, seconds = _measure(pipe, shape, steps=steps, console=console)
    return _facts(pipe, shape, result=result, seconds=seconds)


def _measure(pipe: FluxPipeline, shape: tuple[int, int], *, steps: int, console: Console) -> tuple[Result, float]:
    """Generates and discards a picture of (width, height). Returns the result and the median seconds of a step."""
    shown, ends = PipelineProgress(console), []

    def progress(stage: str, done: float, total: int) -> None:
        if stage == "denoise" and done + 1e-6 >= len(ends) + 1:
            ends.append(time.perf_counter())
        shown(stage, done, total)

    try:
        result = pipe.rehearse(
            _PROMPT, seed=1, width=shape[0], height=shape[1], num_inference_steps=steps, progress=progress
        )
    finally:
        shown.close()
    return result, median(b - a for a, b in pairwise(ends))


def _facts(pipe: FluxPipeline, shape: tuple[int, int], *, result: Result, seconds: float) -> dict[str, Any]:
    """Collects the measurements, the share of the chip's peak, and versions."""
    index, flux = pipe.folder.index, pipe.folder.flux.sizes
    width, height = shape
    tflops = step_flops(flux, width, height, index.max_sequence_length) / seconds / 1e12
    name, chip = device(), this_chip()
    peak = CHIPS[chip] if chip else None
    most = pipe.folder.flux.quantization
    plan = result.plan
    return {
        "device": name, "model": index.name,
        "precision": f"{most.bits} bits, {most.mode}" if most else "16 bits or more",
        "dtype": pipe.dtype, "width": width, "height": height, "seconds_per_step": seconds, "tflops": tflops,
        "share_of_peak": peak and tflops / peak, "stages": result.seconds, "peaks": result.peaks,
        "predicted": plan and plan.stages, "blocks_in_memory": plan and plan.resident_blocks,
        "blocks": plan and plan.total_blocks,
        "mlx": version("mlx"), "version": __version__, "system": platform.platform(terse=True),
        "wanting": None if peak else f"the peak speed of {name} is not known, so its share is not given",
    }  # fmt: skip


def _line(facts: dict[str, Any]) -> str:
    """Formats the measurements for a table or a message."""
    share = f" ({facts['share_of_peak']:.0%} of its peak)" if facts["share_of_peak"] else ""
    stages = stage_times({stage: seconds for stage, seconds in facts["stages"].items() if stage != "denoise"})
    return " | ".join(
        (
            facts["device"],
            f"{facts['model']}, {facts['precision']}, {facts['dtype']}",
            f"{facts['width']} x {facts['height']}",
            f"{facts['seconds_per_step']:.3g} s per step, {facts['tflops']:.3g} TFLOP/s{share}",
            stages,
            f"{size(max(facts['peaks'].values()))}, {facts['blocks_in_memory']} of {facts['blocks']} blocks in memory",
            f"flux-krea {facts['version']}, mlx {facts['mlx']}",
        )
    )
