"""flux-krea plan: what a picture takes of memory, disk and bandwidth, before anything is loaded or downloaded."""

import json
from dataclasses import asdict

import click


@click.command()
@click.argument("model", required=False)
@click.option("--width", type=int, default=None, help="Pixels.  [default: the model's]")
@click.option("--height", type=int, default=None, help="Pixels.  [default: the model's]")
@click.option("--memory", default="auto", show_default=True, help='What may be used: "auto", or such as 8GB.')
@click.option("--dtype", type=click.Choice(["bfloat16", "float16", "float32"]), help="Compute type.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def plan(model, width, height, memory, dtype, as_json):
    """Predict what a picture takes, without loading anything.

    With MODEL, a folder or an installed name: each stage of a run. Without: FLUX.1 Krea [dev] at every precision.

    \b
    Examples:
      flux-krea plan
      flux-krea plan krea --width 1536 --memory 8GB
    """
    from mlx_flux_krea.memory import machine_memory, parse_memory

    budget = parse_memory(memory) or machine_memory()
    if model is None:
        facts, text = _published(width or 1024, height or 1024, budget, dtype or "bfloat16")
    else:
        facts, text = _model(model, width, height, budget, dtype)
    click.echo(json.dumps(facts) if as_json else text)


def _model(model: str, width: int | None, height: int | None, budget: int, dtype: str | None) -> tuple[dict, str]:
    """The stages of a run with one model folder."""
    import mlx.core as mx

    from mlx_flux_krea.home import find_model
    from mlx_flux_krea.memory import plan as make_plan
    from mlx_flux_krea.memory import weigh_folder
    from mlx_flux_krea.weights import open_model

    from .shared.installed import disk_bytes
    from .shared.terminal import size, table

    folder = open_model(find_model(model))
    dtype = dtype or folder.flux.dtype
    width, height = width or folder.index.defaults.width, height or folder.index.defaults.height
    length, compute = folder.index.max_sequence_length, getattr(mx, dtype)
    weights = weigh_folder(folder, compute)
    made = make_plan(weights, folder.sizes, compute, width=width, height=height, text_length=length, budget=budget)
    disk = disk_bytes(folder.path.resolve())
    bandwidth = _bandwidth(made.read, folder.flux.sizes, width, height, length)
    facts = {"model": folder.index.name, "width": width, "height": height, "dtype": dtype, "disk": disk}
    reads = f"the others, {size(made.read)}, are read in each step" if made.read else "nothing is read while drawing"
    lines = [
        f"{folder.index.name} at {width} x {height}, {dtype}, in {size(budget)} of memory; {size(disk)} on disk",
        _BACKEND[mx.default_device().type.name],
        table([("stage", "peak"), *((name, size(count)) for name, count in made.stages.items())], right=(1,)),
        f"{made.blocks} of {made.of} blocks of the transformer stay in memory; {reads}",
        *(["the picture is developed in tiles: memory is too little for the whole"] if made.tiled else []),
        *_hidden(bandwidth),
    ]
    return facts | asdict(made) | {"bandwidth": bandwidth}, "\n".join(lines)


def _published(width: int, height: int, budget: int, dtype: str) -> tuple[dict, str]:
    """FLUX.1 Krea [dev] at every precision that `convert` knows."""
    import mlx.core as mx

    from mlx_flux_krea.convert.quantize import RECIPES
    from mlx_flux_krea.memory import plan as make_plan
    from mlx_flux_krea.models import config
    from mlx_flux_krea.presets import MAX_SEQUENCE_LENGTH

    from .shared.estimates import weigh_recipe
    from .shared.terminal import size, table

    sizes, compute = config.FLUX_DEV_MODEL, getattr(mx, dtype)
    rows = [("precision", "disk", "all in memory", "all streamed", "here", "blocks in memory", "read a step")]
    shape = {"width": width, "height": height, "text_length": MAX_SEQUENCE_LENGTH}
    facts, reads = {}, 0
    for quantize in RECIPES:
        weights = weigh_recipe(sizes, quantize, dtype)
        made = make_plan(weights, sizes, compute, **shape, budget=2**60)
        here = "too little", "", ""
        if made.least <= budget:
            made = make_plan(weights, sizes, compute, **shape, budget=budget)
            here = size(made.peak), f"{made.blocks} of {made.of}", size(made.read) if made.read else "nothing"
            reads = reads or made.read
        rows.append((quantize, size(weights.disk), size(made.most), size(made.least), *here))
        facts[quantize] = {"disk": weights.disk, "fits": made.least <= budget, **asdict(made)}
    bandwidth = _bandwidth(reads, sizes.flux, width, height, MAX_SEQUENCE_LENGTH)
    lines = [
        f"FLUX.1 Krea [dev] at {width} x {height}, {dtype}, in {size(budget)} of memory",
        _BACKEND[mx.default_device().type.name],
        table(rows, right=tuple(range(1, 7))),
        *_hidden(bandwidth),
    ]
    facts = {"width": width, "height": height, "dtype": dtype, "precisions": facts, "bandwidth": bandwidth}
    return facts, "\n".join(lines)


def _bandwidth(read: int, flux, width: int, height: int, text_length: int) -> dict[str, float]:
    """GB/s that hide a step's reading behind its products, on this chip, or on those that people have."""
    from mlx_flux_krea.memory import GB
    from mlx_flux_krea.presets import CHIPS

    from .shared.estimates import seconds_a_step, this_chip

    this = this_chip()
    chips = ([this] if this else CHIPS) if read else ()
    return {chip: read / GB / seconds_a_step(flux, width, height, text_length, chip) for chip in chips}


def _hidden(bandwidth: dict[str, float]) -> list[str]:
    """What the reading asks of a disk; computed, at three quarters of the chip's peak."""
    if not bandwidth:
        return []
    shown = [f"{chip} {gb:.1f}" for chip, gb in bandwidth.items() if len(bandwidth) == 1 or chip in _SHOWN]
    return [f"hidden behind computing where the disk reads, in GB/s (computed): {', '.join(shown)}"]


_BACKEND = {
    "gpu": "peaks on Metal: computed, not measured",
    "cpu": "peaks on MLX's CPU backend, as measured",
}
_SHOWN = ("M1", "M1 Max", "M2", "M3 Max", "M4", "M4 Pro", "M4 Max", "M5")
