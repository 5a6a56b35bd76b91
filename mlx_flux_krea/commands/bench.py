"""flux-krea bench: the speed of this machine with a model, as a line to share."""

import platform
import time
from importlib.metadata import version
from itertools import pairwise
from statistics import median
from typing import Any

import click

from mlx_flux_krea import FluxPipeline, Result, __version__
from mlx_flux_krea.errors import UsageError
from mlx_flux_krea.fast import chosen_mode
from mlx_flux_krea.memory import step_flops
from mlx_flux_krea.presets import CHIPS
from mlx_flux_krea.sampling.rules import fast_skips

from .shared import choosing, estimates
from .shared.estimates import device, this_chip
from .shared.options import DTYPE, MODEL_DEFAULT, MODEL_HELP, SIDE
from .shared.terminal import Console, PipelineProgress
from .shared.text import duration, json_text, size, stage_times

_PROMPT = "a large red circle on a white background"  # of words that every model knows: steps take the same for any
_STEPS = 5


@click.command()
@click.option("-m", "--model", help=f"{MODEL_HELP}  [default: {MODEL_DEFAULT}]")
@click.option("--width", type=SIDE, help="Width in pixels.  [default: the model's]")
@click.option("--height", type=SIDE, help="Height in pixels.  [default: the model's]")
@click.option(
    "--steps",
    type=click.IntRange(2, 100),
    help=f"Number of steps; the first also loads the weights.  [default: {_STEPS}]",
)
@click.option("--fast", is_flag=True, help="Choose what --fast does with this model: 8 runs at 512 x 512, resumable.")
@click.option(
    "--memory", default="auto", show_default=True, help="Memory for this program (not the Mac's), such as 6GB."
)
@click.option("--dtype", type=DTYPE, help="Compute type.  [default: the model's]")
@click.option("--json", "as_json", is_flag=True, help="Print all measurements as JSON.")
def bench(model, width, height, steps, fast, memory, dtype, as_json):
    """Measure the speed of this machine.

    The picture is discarded, so that no filter is needed. On a GPU a model in bfloat16 is measured in float16 too, and
    the better type for this machine is recommended.

    --fast generates two pictures in several modes, compares their latents with those of the full run, and stores the
    nearest mode that computes at most two thirds of the steps. It says first how long that takes. After Ctrl-C, the
    same command continues.

    \b
    Examples:
      flux-krea bench -m krea --steps 5
      flux-krea bench -m krea --fast
    """
    console = Console()
    if fast:
        if given := [name for name, value in (("width", width), ("height", height), ("steps", steps)) if value]:
            raise UsageError(f"--fast, and --{given[0]}", "one of them", "it takes the model's steps, at 512 x 512")
        with console.library_notes():
            _choose(model, dtype, memory=memory, as_json=as_json, console=console)
        return
    steps = steps or _STEPS
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


def _choose(model: str | None, dtype: str | None, *, memory: str, as_json: bool, console: Console) -> None:
    """Chooses the mode of --fast for a model, after the speed of a step was measured."""
    pipe = FluxPipeline.from_pretrained(model, dtype=dtype, memory=memory)
    choosing.check_choice(pipe)
    _, seconds = _measure(pipe, choosing.shape_of(pipe), steps=3, console=console, output_type="latent")
    facts = choosing.choose(pipe, seconds, console) | {"device": device(), "version": __version__}
    click.echo(json_text(facts) if as_json else choosing.shown(facts))


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


def _measure(
    pipe: FluxPipeline, shape: tuple[int, int], *, steps: int, console: Console, **options: Any
) -> tuple[Result, float]:
    """Generates and discards a picture of (width, height). Returns the result and the median seconds of a step."""
    shown, ends = PipelineProgress(console), []

    def progress(stage: str, done: float, total: int) -> None:
        if stage == "denoise" and done + 1e-6 >= len(ends) + 1:
            ends.append(time.perf_counter())
        shown(stage, done, total)

    given: dict[str, Any] = {"width": shape[0], "height": shape[1], "num_inference_steps": steps, "seed": 1}
    try:
        result = pipe.rehearse(_PROMPT, progress=progress, **given, **options)
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
    taken = _evaluations(pipe)
    around = sum(seconds for stage, seconds in result.seconds.items() if stage != "denoise")
    return {
        "device": name, "model": index.name,
        "precision": f"{most.bits} bits, {most.mode}" if most else "16 bits or more",
        "dtype": pipe.dtype, "width": width, "height": height, "seconds_per_step": seconds, "tflops": tflops,
        "evaluations": taken, "seconds_per_picture": {mode: around + n * seconds for mode, n in taken.items()},
        "share_of_peak": peak and tflops / peak, "stages": result.seconds, "peaks": result.peaks,
        "predicted": plan and plan.stages, "blocks_in_memory": plan and plan.resident_blocks,
        "blocks": plan and plan.total_blocks,
        "mlx": version("mlx"), "version": __version__, "system": platform.platform(terse=True),
        "wanting": None if peak else f"the peak speed of {name} is not known, so its share is not given",
    }  # fmt: skip


def _evaluations(pipe: FluxPipeline) -> dict[str, int]:
    """Returns the evaluations of a picture in the model's own steps, and those with --fast where that skips some."""
    index = pipe.folder.index
    steps = index.defaults.num_inference_steps
    is_fast = fast_skips(index.schedule.shift, steps)
    return {"full": steps} | ({"fast": chosen_mode(pipe.folder.path)[0].evaluations(steps)} if is_fast else {})


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
            _pictures(facts),
            f"{size(max(facts['peaks'].values()))}, {facts['blocks_in_memory']} of {facts['blocks']} blocks in memory",
            f"flux-krea {facts['version']}, mlx {facts['mlx']}",
        )
    )


def _pictures(facts: dict[str, Any]) -> str:
    """Formats the time of a picture in the model's own steps, and with --fast."""
    times, steps = facts["seconds_per_picture"], facts["evaluations"]
    fast = f", {duration(times['fast'])} with --fast ({steps['fast']} evaluations)" if "fast" in times else ""
    return f"{steps['full']} steps in {duration(times['full'])}{fast}"
