"""flux-krea plan: predicts memory, disk and bandwidth of a picture, before anything is loaded or downloaded."""

import contextlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import click
import mlx.core as mx

from mlx_flux_krea import memory as planning
from mlx_flux_krea.adapters.formulas import branch_bytes
from mlx_flux_krea.disks import speeds
from mlx_flux_krea.errors import ModelError, ResourceError, UsageError
from mlx_flux_krea.fast import FastMode, chosen_mode
from mlx_flux_krea.home import find_model, is_krea
from mlx_flux_krea.inputs.large import enlarged
from mlx_flux_krea.inputs.reference import preferred_size
from mlx_flux_krea.models import config
from mlx_flux_krea.models.config import REDUX_DEV, SIGLIP_SO400M
from mlx_flux_krea.models.depth_config import DEPTH_ANYTHING_V2_SMALL
from mlx_flux_krea.presets import (
    CHIPS,
    DYNAMIC_SHIFT,
    FAST,
    KINDS,
    KREA,
    MAX_SEQUENCE_LENGTH,
    MAX_SIDE,
    MAX_STYLES,
    MOST_ENLARGED,
    PRECISIONS,
    SOLVERS,
    Schedule,
)
from mlx_flux_krea.sampling.enlarge import RECIPE, View, second_views
from mlx_flux_krea.sampling.rules import count_evaluations, fast_skips
from mlx_flux_krea.sampling.sampler import first_step
from mlx_flux_krea.weights import open_model

from .shared.estimates import (
    SHARE_IN_WORDS,
    filter_seconds,
    home_disk,
    second_step_seconds,
    step_seconds,
    this_chip,
    weigh_recipe,
)
from .shared.installed import disk_bytes
from .shared.loras import planned
from .shared.options import DTYPE, LORA, NO_CACHE, Cache, check_together
from .shared.terminal import Console
from .shared.text import duration, json_text, size, table

_BACKEND = {
    "gpu": "peaks on Metal: computed, not measured",
    "cpu": "peaks as measured on MLX's CPU backend, which this machine has; times are computed for Macs",
}
_ENDLESS = 2**60  # bytes
_MULTIPLE = 16  # pixels; sides are multiples of it
_LATENT = 8  # pixels of a latent
_READ = {"text-to-image": 0, "kontext": 1, "fill": 2, "control": 1}  # images that a picture is made from, by task
_SIDE = click.IntRange(_MULTIPLE, MAX_SIDE)
_AMOUNT = re.compile(r"\d+(\.\d+)? *[kmgt]i?b?", re.I)
_SIZE = re.compile(r"(\d+) *[x×*] *(\d+)", re.I)
_SHARE = "that is the share of this program: by default a Mac's programs take half to three fifths of its memory"
_FIRST_BLOCK = "first-block computes fewer steps than that, depending on the picture: times are the most"


@click.command()
@click.argument("model", required=False)
@click.option("--width", type=_SIDE, help="Width in pixels.  [default: the model's]")
@click.option("--height", type=_SIDE, help="Height in pixels.  [default: the model's]")
@click.option(
    "--memory", default="auto", show_default=True, help="Memory for this program (not the Mac's), such as 6GB."
)
@click.option("--dtype", type=DTYPE, help="Compute type.  [default: the model's]")
@click.option(
    "--lora",
    type=LORA,
    multiple=True,
    metavar="FILE[=W]",
    help="Adapter of the picture: a file, or an installed one; repeatable.",
)
@click.option("--style", type=click.IntRange(0, MAX_STYLES), default=0, help="Number of style images, at weight 1.")
@click.option("--control", type=click.Choice(KINDS), help="Map that the picture has made of a photo.")
@click.option("--upscale", type=click.FloatRange(1, MOST_ENLARGED), help="Second pass of the picture, times its size.")
@click.option("--fast", is_flag=True, help="Times of a picture with --fast.")
@click.option("--cache", type=Cache(), metavar="NAME", help="Times of a picture with this cache.")
@click.option("--solver", type=click.Choice(SOLVERS), default=SOLVERS[0], help="Times of a picture with this solver.")
@click.option("--json", "as_json", is_flag=True, help="Print the prediction as JSON.")
def plan(model, width, height, memory, dtype, lora, style, control, upscale, fast, cache, solver, as_json):
    """Predict memory and disk of a picture, without loading.

    With MODEL, a folder or an installed name: each stage of a run. Without, or with krea where none of that name is
    installed: FLUX.1 Krea [dev] at every precision.

    \b
    Examples:
      flux-krea plan
      flux-krea plan krea --width 1536 --memory 8GB
      flux-krea plan krea --upscale 4 --memory 16GB
    """
    width, height = (side and side // _MULTIPLE * _MULTIPLE for side in (width, height))
    _check_model(model)
    cache = None if cache == NO_CACHE else cache
    check_together({name: value for name, value in (("fast", fast), ("cache", cache)) if value})
    if (fast or cache) and solver == "heun":
        raise UsageError(f"--{'fast' if fast else 'cache'} does not work with --solver heun", "euler or dpmpp_2m")
    taken = partial(_evaluations, is_fast=fast, cache=cache, solver=solver)
    given = planning.parse_memory(memory)
    budget = given or planning.machine_memory()
    enlarging = _Enlarging(None if upscale == 1 else upscale, solver)
    if budget > (built_in := planning.physical_memory()):
        Console().note(f"{size(budget)} is more than this machine has, {size(built_in)}: the plan is one for another")
    asked = {"lora": lora, "style": style, "control": control, "taken": taken, "enlarging": enlarging}
    asked |= {"budget": budget, "given": bool(given)}
    if model is None or (is_krea(model) and not _is_installed(model)):
        facts, text = _published(width or 1024, height or 1024, dtype=dtype or "bfloat16", **asked)
    else:
        facts, text = _model(model, width, height, dtype=dtype, **asked)
    if given:
        first, _, rest = text.partition("\n")
        text = f"{first}\n{_SHARE}\n{rest}"
    if cache and cache != "skip":
        text += f"\n{_FIRST_BLOCK}"
    click.echo(json_text(facts) if as_json else text)


@dataclass(frozen=True)
class _Enlarging:
    """The second pass of a picture.

    Attributes:
        factor: times the size; None: there is none.
        solver: of the picture.
    """

    factor: float | None
    solver: str

    def plan(
        self, predict: Callable[..., planning.MemoryPlan], flux: config.FluxConfig, width: int, height: int, length: int
    ) -> tuple[planning.MemoryPlan, str]:
        """Returns the plan of all passes, and a sentence about the second; "" without one.

        Args:
            predict: plans a pass, as predict(width, height, view, images).
            flux: sizes of the transformer.
            width: of the first pass, pixels.
            height: of the first pass, pixels.
            length: tokens besides the picture's.

        Raises:
            ResourceError: memory is too little.
        """
        first = predict(width, height, None, [])
        if not self.factor:
            return first, ""
        size = enlarged((width, height), self.factor, _MULTIPLE)
        views = second_views(size, (width, height), self.factor, _LATENT)
        read = [planning.HELD * size[0] * size[1]]
        second, why = planning.choose_view(flux, *views, length, lambda view: predict(*size, view, read))
        seen = f"in {second.tiles} tiles of {width} x {height}: {why}" if why else "whole"
        said = f"its second pass, at {size[0]} x {size[1]}, is seen {seen}"
        return second.after(first), said

    def steps(self, steps: int) -> int:
        """Returns the evaluations of the second pass, for a picture of so many steps."""
        count = steps - first_step(steps, RECIPE.strength)
        return count_evaluations(self.solver, count) if self.factor else 0


def _check_model(name: str | None) -> None:
    """Checks that a name is no amount of memory and no size.

    Raises:
        UsageError: it is one.
    """
    if name is None or os.path.exists(name):
        return
    if _AMOUNT.fullmatch(name):
        raise UsageError(
            f"{name} is an amount of memory", "a model", f"write flux-krea plan --memory {''.join(name.split())}"
        )
    if match := _SIZE.fullmatch(name):
        raise UsageError(f"{name} is a size", "a model", f"write flux-krea plan --width {match[1]} --height {match[2]}")


def _is_installed(model: str) -> bool:
    try:
        return find_model(model).exists()
    except ModelError:
        return False


def _model(
    name: str,
    width: int | None,
    height: int | None,
    *,
    budget: int,
    given: bool,
    dtype: str | None,
    lora: Sequence[str],
    style: int,
    control: str | None,
    taken: Callable[..., int],
    enlarging: _Enlarging,
) -> tuple[dict[str, Any], str]:
    """Predicts the stages of a run with one model folder."""
    folder = open_model(find_model(name))
    dtype = dtype or folder.flux.dtype
    width, height = width or folder.index.defaults.width, height or folder.index.defaults.height
    length, compute = folder.index.max_sequence_length, getattr(mx, dtype)
    references = [preferred_size(width, height)] if folder.index.task == "kontext" else []
    weights = planning.weigh_folder(folder, compute)
    adapters = _adapters(lora, folder.sizes, compute)

    def predict(wide: int, high: int, view: View | None, images: list[int]) -> planning.MemoryPlan:
        return planning.make_plan(
            weights,
            folder.sizes,
            compute,
            width=wide,
            height=high,
            text_length=length,
            images=planning.input_needs(_READ[folder.index.task] * [planning.HELD * wide * high] + images),
            references=references,
            map_bytes=_map_bytes(control, wide, high),
            style=_styles(style, compute),
            adapters=sum(one["bytes"] for one in adapters),
            view=view,
            filtered=folder.requires_filters,
            budget=budget,
            speeds=None if given else speeds(folder.path),
        )

    disk = disk_bytes(folder.path.resolve())
    beside = (
        length + style * SIGLIP_SO400M.positions + sum(wide * high for wide, high in references) // _MULTIPLE**2
    )  # tokens, besides the picture's
    plan, enlarges = enlarging.plan(predict, folder.flux.sizes, width, height, beside)
    shape = {"width": width, "height": height, "length": beside}
    last = plan.second or plan
    bandwidth = _bandwidth(plan.read_per_step, folder.flux.sizes, **shape)
    facts = {"model": folder.index.name, "width": width, "height": height, "dtype": dtype, "disk": disk}
    reads = (
        f"the others, {size(plan.read_per_step)}, are streamed in each step"
        if plan.read_per_step
        else "none is streamed"
    )
    reads += ", in the time that it computes" if plan.hidden else ""
    lines = [
        f"{folder.index.name} at {width} x {height}, {dtype}, in {size(budget)} of memory; {size(disk)} on disk",
        _BACKEND[mx.default_device().type.name],
        *("with a reference of {} x {}, whose tokens stand beside the picture's".format(*one) for one in references),
        table([("stage", "peak"), *((name, size(count)) for name, count in plan.stages.items())], right=(1,)),
        f"besides, {size(plan.process)} all the time: the program itself, and its vocabularies",
        f"{plan.resident_blocks} of {plan.total_blocks} transformer blocks are resident in memory; {reads}",
        *([enlarges] if enlarges else []),
        *(["the picture is decoded in tiles, since memory is too small for the whole"] if last.tiled else []),
        *_shown_adapters(adapters),
        *_streaming(bandwidth, folder.index.name),
    ]
    times = model_times(
        folder.flux.sizes,
        evaluations=taken(folder.index.schedule, folder.index.defaults.num_inference_steps, folder.path),
        is_filtered=folder.requires_filters,
        second=(plan.view, enlarging.steps(folder.index.defaults.num_inference_steps)),
        **shape,
    )
    facts |= plan.to_json() | {"adapters": adapters, "bandwidth": bandwidth, "seconds": times}
    return facts, "\n".join([*lines, *_shown_times(times)])


def _published(
    width: int,
    height: int,
    *,
    budget: int,
    given: bool,
    dtype: str,
    lora: Sequence[str],
    style: int,
    control: str | None,
    taken: Callable[..., int],
    enlarging: _Enlarging,
) -> tuple[dict[str, Any], str]:
    """Predicts FLUX.1 Krea [dev] at every precision of `convert`."""
    sizes, compute = config.FLUX_DEV_MODEL, getattr(mx, dtype)
    rows: list[tuple] = [
        ("precision", "disk", "all in memory", "all streamed", "here", "resident blocks", "streamed per step")
    ]
    by_precision, reads, streamed, enlarges, view = {}, 0, "", "", None
    length = MAX_SEQUENCE_LENGTH + style * SIGLIP_SO400M.positions
    adapters = _adapters(lora, sizes, compute)
    branches = sum(one["bytes"] for one in adapters)

    def predict(weights: planning.WeightSizes, budget: int) -> tuple[planning.MemoryPlan, str]:
        def one_pass(wide: int, high: int, view: View | None, images: list[int]) -> planning.MemoryPlan:
            return planning.make_plan(
                weights,
                sizes,
                compute,
                width=wide,
                height=high,
                text_length=MAX_SEQUENCE_LENGTH,
                map_bytes=_map_bytes(control, wide, high),
                images=planning.input_needs([planning.HELD * wide * high] * bool(control) + images),
                style=_styles(style, compute),
                adapters=branches,
                view=view,
                filtered=True,
                budget=budget,
                speeds=None if given or budget == _ENDLESS else speeds(home_disk()[0]),
            )

        return enlarging.plan(one_pass, sizes.flux, width, height, length)

    for precision in PRECISIONS:
        weights = weigh_recipe(sizes, precision, dtype)
        plan, enlarges = predict(weights, _ENDLESS)
        here, fits = ("too little", "", ""), False
        with contextlib.suppress(ResourceError):
            plan, enlarges = predict(weights, budget)
            fits = True
            read = size(plan.read_per_step) if plan.read_per_step else "nothing"
            here = size(plan.peak), f"{plan.resident_blocks} of {plan.total_blocks}", read
            streamed = streamed or (precision if plan.read_per_step else "")
            reads = reads or plan.read_per_step
        rows.append((precision, size(weights.disk), size(plan.most), size(plan.least), *here))
        by_precision[precision] = {"disk": weights.disk, "fits": fits, **plan.to_json()}
        view = plan.view
    shape = {"width": width, "height": height, "length": length}
    bandwidth = _bandwidth(reads, sizes.flux, **shape)
    times = model_times(
        sizes.flux,
        evaluations=taken(DYNAMIC_SHIFT, KREA.defaults.num_inference_steps),
        is_filtered=True,
        second=(view, enlarging.steps(KREA.defaults.num_inference_steps)),
        **shape,
    )
    lines = [
        f"FLUX.1 Krea [dev] at {width} x {height}, {dtype}, in {size(budget)} of memory",
        _BACKEND[mx.default_device().type.name],
        table(rows, right=tuple(range(1, 7))),
        *([enlarges] if enlarges else []),
        *_shown_adapters(adapters),
        *_streaming(bandwidth, f"precision {streamed}"),
        *_shown_times(times),
    ]
    facts = {"width": width, "height": height, "dtype": dtype, "precisions": by_precision}
    facts |= {"adapters": adapters, "bandwidth": bandwidth, "seconds": times}
    return facts, "\n".join(lines)


def _styles(count: int, compute: mx.Dtype) -> planning.StyleNeeds | None:
    """Returns what so many style images need, read by the published Redux; None: there are none."""
    sizes = {"image_encoder": SIGLIP_SO400M, "image_embedder": REDUX_DEV}
    return planning.style_needs(sizes, "bfloat16", compute, images=count) if count else None


def _map_bytes(control: str | None, width: int, height: int) -> int:
    """Returns the bytes of making the map of a photo at the size of the picture; 0: none is made."""
    depth = DEPTH_ANYTHING_V2_SMALL if control == "depth" else None
    return planning.map_needs(depth, width, height) if control else 0


def _adapters(texts: Sequence[str], sizes: config.ModelSizes, compute: mx.Dtype) -> list[dict[str, Any]]:
    """Returns the name, weight, count and bytes of each adapter, by its header."""
    return [
        {"name": one.facts.name, "weight": weight, "applied": one.facts.count,
         "bytes": branch_bytes([(one, weight)], sizes, compute)}
        for one, weight in planned(texts, sizes)
    ]  # fmt: skip


def _shown_adapters(adapters: list[dict[str, Any]]) -> list[str]:
    """Formats the memory of adapters, which the stages above contain."""
    return [
        f"adapter {one['name']}, weight {one['weight']:g}: {one['applied']} modules, {size(one['bytes'])} in memory"
        for one in adapters
    ]


def _bandwidth(read: int, flux: config.FluxConfig, *, width: int, height: int, length: int) -> dict[str, float]:
    """Returns the GB/s at which reading takes no longer than computing: on this chip, or on each of the table."""
    this = this_chip()
    chips = ([this] if this else list(CHIPS)) if read else []
    seconds = {chip: step_seconds(flux, width=width, height=height, length=length, chip=chip) for chip in chips}
    return {chip: read / planning.GB / seconds[chip] for chip in chips}


def _streaming(bandwidth: Mapping[str, float], what: str) -> list[str]:
    """Formats the speed of a disk from which streaming costs no time: of a model, or of one precision."""
    if not bandwidth:
        return []
    shown = [f"{chip} {gb:.2g}" for chip, gb in bandwidth.items()]
    return [f"streaming {what} costs no time if the disk reads at least (GB/s, computed): {', '.join(shown)}"]


def _evaluations(
    schedule: Schedule, steps: int, model: Path | None = None, *, is_fast: bool, cache: str | None, solver: str
) -> int:
    """Returns the evaluations of a picture of so many steps; with --cache first-block, the most.

    Args:
        schedule: of the model.
        steps: of the picture.
        model: its folder, for which `bench --fast` may have chosen a mode.
        is_fast: --fast is given.
        cache: the value of --cache.
        solver: that of --solver.
    """
    mode = FastMode.parse(cache) if cache else None
    if is_fast and fast_skips(schedule.shift, steps):
        mode = chosen_mode(model)[0] if model else FastMode.parse(FAST)
    return count_evaluations(solver, mode.evaluations(steps) if mode else steps)


def model_times(
    flux: config.FluxConfig,
    *,
    evaluations: int,
    is_filtered: bool,
    second: tuple[View | None, int] = (None, 0),
    **shape: int,
) -> dict[str, dict[str, float]]:
    """Returns seconds of a picture, of its filters, and of these at a program's start: here, or on each chip.

    Args:
        flux: sizes of the transformer.
        evaluations: of the transformer for a picture.
        is_filtered: the model's licence requires filters.
        second: how the transformer sees a second pass, and its evaluations.
        shape: width, height and length, as for `step_seconds`.
    """
    this, times, (view, count) = this_chip(), {}, second
    for chip in [this] if this else CHIPS:
        times[chip] = {"picture": evaluations * step_seconds(flux, chip=chip, **shape)}
        if view:
            times[chip]["picture"] += count * second_step_seconds(flux, view, shape["length"], chip)
        if is_filtered and (filters := filter_seconds(chip)):
            times[chip] |= {"filters": filters[0], "filters_at_start": filters[1]}
    return times


def _shown_times(times: Mapping[str, Mapping[str, float]]) -> list[str]:
    """Formats the times of each chip, and how to measure them."""
    rows: list[tuple[str, ...]] = [("chip", "a picture", "its filters", "at a program's start")]
    for chip, seconds in times.items():
        filters = (duration(seconds[name]) for name in ("filters", "filters_at_start") if name in seconds)
        rows.append((chip, duration(seconds["picture"]), *(tuple(filters) or ("none", "none"))))
    assumed = f"times are computed for {SHARE_IN_WORDS}; measure yours: flux-krea bench"
    return [table(rows, right=(1, 2, 3)), assumed]
