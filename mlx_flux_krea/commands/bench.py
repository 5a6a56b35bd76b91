"""flux-krea bench: how fast this machine draws with a model, as a line to share."""

import json
import time
from itertools import pairwise

import click


@click.command()
@click.option(
    "-m", "--model", help="A model folder, or the name of an installed one.  [default: the only one, or models default]"
)
@click.option("--width", type=int, help="Pixels.  [default: the model's]")
@click.option("--height", type=int, help="Pixels.  [default: the model's]")
@click.option("--steps", type=click.IntRange(2, 100), default=5, show_default=True, help="The first one also loads.")
@click.option("--memory", default="auto", show_default=True, help="What may be used, such as 8GB.")
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), help="Compute type.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def bench(model, width, height, steps, memory, dtype, as_json):
    """Measure a short run; its picture is thrown away, so that no filter is needed.

    \b
    Example:
      flux-krea bench -m krea --steps 5
    """
    from statistics import median

    from mlx_flux_krea import FluxPipeline

    from .setup import PROMPT
    from .shared.terminal import PipelineProgress, say, show_notes

    show_notes()
    pipe = FluxPipeline.from_pretrained(model, dtype=dtype, memory=memory)
    size = {name: value for name, value in (("width", width), ("height", height)) if value}
    shown, ends = PipelineProgress(), []

    def progress(stage: str, done: float, total: int) -> None:
        if stage == "denoise" and done + 1e-6 >= len(ends) + 1:
            ends.append(time.perf_counter())
        shown(stage, done, total)

    try:
        result = pipe.rehearse(PROMPT, seed=1, num_inference_steps=steps, progress=progress, **size)
    finally:
        shown.close()
    facts = _facts(pipe, size, result, median(b - a for a, b in pairwise(ends)))
    if facts["wanting"]:
        say(f"note: {facts['wanting']}")
    click.echo(json.dumps(facts) if as_json else _line(facts))


def _facts(pipe, size: dict, result, seconds: float) -> dict:
    """What was measured, and what it means."""
    import platform
    from importlib.metadata import version

    from mlx_flux_krea import __version__
    from mlx_flux_krea.memory import step_flops
    from mlx_flux_krea.presets import CHIPS

    from .shared.estimates import device, this_chip

    index, flux = pipe.folder.index, pipe.folder.flux.sizes
    width, height = size.get("width", index.defaults.width), size.get("height", index.defaults.height)
    tflops = step_flops(flux, width, height, index.max_sequence_length) / seconds / 1e12
    name, peak = device(), CHIPS.get(this_chip())
    most = pipe.folder.flux.quantization
    return {
        "device": name, "model": index.name,
        "precision": f"{most.bits} bits, {most.mode}" if most else "16 bits or more",
        "dtype": pipe.dtype, "width": width, "height": height, "seconds_per_step": seconds, "tflops": tflops,
        "share_of_peak": peak and tflops / peak, "stages": result.seconds, "peaks": result.peaks,
        "predicted": result.plan.stages, "blocks_in_memory": result.plan.blocks, "blocks": result.plan.of,
        "mlx": version("mlx"), "version": __version__, "system": platform.platform(terse=True),
        "wanting": None if peak else f"the peak of {name} is not in our table, so that no share of it is given",
    }  # fmt: skip


def _line(facts: dict) -> str:
    """For a table or a message."""
    from .shared.terminal import size, stage_times

    share = f" ({facts['share_of_peak']:.0%} of its peak)" if facts["share_of_peak"] else ""
    stages = stage_times({stage: seconds for stage, seconds in facts["stages"].items() if stage != "denoise"})
    return " | ".join(
        (
            facts["device"],
            f"{facts['model']}, {facts['precision']}, {facts['dtype']}",
            f"{facts['width']} x {facts['height']}",
            f"{facts['seconds_per_step']:.3g} s a step, {facts['tflops']:.3g} TFLOP/s{share}",
            stages,
            f"{size(max(facts['peaks'].values()))}, {facts['blocks_in_memory']} of {facts['blocks']} blocks in memory",
            f"flux-krea {facts['version']}, mlx {facts['mlx']}",
        )
    )
