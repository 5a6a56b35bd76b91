"""Measurements of `bench`: a step in each type, resident and streamed; a first and a second picture; the filters.

The pictures are thrown away, so that no filter has to check them.
"""

import platform
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import pairwise
from statistics import median
from typing import Any

import numpy as np
from PIL import Image

from mlx_flux_krea import FluxPipeline, Result, __version__, home
from mlx_flux_krea.chip.wheel import macos_version
from mlx_flux_krea.errors import FluxKreaError, ResourceError
from mlx_flux_krea.fast import chosen_mode
from mlx_flux_krea.files import may_exist
from mlx_flux_krea.filters.judges import FILTERS, drawn_picture, image_labels, margins_of, open_judges
from mlx_flux_krea.memory import MemoryPlan, physical_memory, step_flops
from mlx_flux_krea.presets import CHIPS, COMPUTE_TYPES
from mlx_flux_krea.sampling.rules import fast_skips
from mlx_flux_krea.worker import Worker

from .choosing import PICTURES
from .estimates import device, this_chip
from .terminal import Console, PipelineProgress
from .text import duration, size, stage_times, table

RESIDENT, STREAMED = "resident", "streamed"
HEAD = ("Mac", "model", "a step, resident", "streamed", "first and second picture", "filters: start, prompt, picture")


@dataclass(frozen=True)
class StepTimes:
    """A step in one type and one way to hold the blocks.

    Attributes:
        dtype: the compute type.
        way: "resident" (as many blocks as the memory allows), "streamed" (none), or the amount of --memory.
        seconds: the median of the steps but the first, which also loads the weights.
        tflops: operations a second, in 10^12.
        share_of_peak: of the chip; None: its peak is not known.
        resident_blocks: number of blocks that stayed in memory.
        total_blocks: number of all blocks.
        read_per_step: bytes that a step reads from disk.
        peak: bytes of memory, the highest of all stages.
    """

    dtype: str
    way: str
    seconds: float
    tflops: float
    share_of_peak: float | None
    resident_blocks: int
    total_blocks: int
    read_per_step: int
    peak: int


@dataclass(frozen=True)
class FilterTimes:
    """Seconds of both filters: to open them and run their self-tests, for a prompt, and for a picture."""

    start: float
    prompt: float
    picture: float


class StepBench:
    """Measures a model at one size.

    Args:
        model: name or folder; None: the default one.
        shape: width and height; None: the model's own.
        steps: of each run; the first also loads the weights.
        console: where progress is shown.
    """

    def __init__(self, model: str | None, shape: tuple[int | None, int | None], steps: int, console: Console):
        self.model, self.steps, self.console = model, steps, console
        self.pipe = FluxPipeline.from_pretrained(model)
        default = self.pipe.folder.index.defaults
        self.shape = shape[0] or default.width, shape[1] or default.height

    def plan(self, dtype: str, memory: str | int) -> MemoryPlan:
        """Returns the plan of a run; nothing is read.

        Raises:
            ResourceError: it does not fit.
        """
        return FluxPipeline.from_pretrained(self.model, dtype=dtype, memory=memory).plan(**self._arguments(0))

    def ways(self, dtype: str, memory: str) -> dict[str, str | int]:
        """Returns the ways to hold the blocks in a type, with the memory of each.

        Raises:
            ResourceError: not even streamed blocks fit.
        """
        plan = self.plan(dtype, memory)
        if memory != "auto":
            return {memory: memory}
        resident: dict[str, str | int] = {RESIDENT: plan.budget} if plan.resident_blocks or plan.hidden else {}
        return resident | {STREAMED: plan.least}

    def measure(self, dtype: str, way: str, memory: str | int, pictures: int = 1) -> tuple[StepTimes, list[Result]]:
        """Generates pictures, each of another prompt. Returns the times of a step of the last one, and the results."""
        pipe = FluxPipeline.from_pretrained(self.model, dtype=dtype, memory=memory)
        made = [self.generate(pipe, number) for number in range(pictures)]
        result, seconds = made[-1]
        plan = result.plan
        assert plan  # of a run
        index, flux = pipe.folder.index, pipe.folder.flux.sizes
        tflops = step_flops(flux, *self.shape, index.max_sequence_length) / seconds / 1e12
        peak = CHIPS.get(this_chip() or "")
        times = StepTimes(
            dtype=dtype,
            way=way,
            seconds=seconds,
            tflops=tflops,
            share_of_peak=peak and tflops / peak,
            resident_blocks=plan.resident_blocks,
            total_blocks=plan.total_blocks,
            read_per_step=plan.read_per_step,
            peak=max(result.peaks.values()),
        )
        return times, [result for result, _ in made]

    def generate(self, pipe: FluxPipeline, number: int, **options: Any) -> tuple[Result, float]:
        """Generates and discards a picture. Returns the result and the median seconds of a step.

        Args:
            pipe: the model.
            number: of the picture, from 0.
            options: further arguments of the call.
        """
        shown, ends = PipelineProgress(self.console), []

        def progress(stage: str, done: float, total: int) -> None:
            if stage == "denoise" and done + 1e-6 >= len(ends) + 1:
                ends.append(time.perf_counter())
            shown(stage, done, total)

        try:
            result = pipe.rehearse(progress=progress, **self._arguments(number), **options)
        finally:
            shown.close()
        return result, median(b - a for a, b in pairwise(ends))

    def _arguments(self, number: int) -> dict[str, Any]:
        width, height = self.shape
        given = {"width": width, "height": height, "num_inference_steps": self.steps, "seed": number + 1}
        return {"prompt": PICTURES[number % len(PICTURES)], **given}


def measure_model(bench: StepBench, dtype: str | None, memory: str) -> dict[str, Any]:
    """Measures a step in each type and way, and a first and a second picture in the first of them.

    Args:
        bench: the model and its size.
        dtype: the only type to measure; None: all, the model's own first.
        memory: "auto", or the only amount of memory to measure with.

    Returns:
        Facts that JSON can hold; times of pictures, stages and peaks are those of the first type and way.

    Raises:
        ResourceError: nothing fits.
    """
    own = bench.pipe.dtype
    types = [dtype] if dtype else [own, *(name for name in COMPUTE_TYPES if name != own)]
    times, results, left_out = [], [], {}
    for name in types:
        try:
            ways = bench.ways(name, memory)
        except ResourceError as error:
            left_out[name] = error
            bench.console.say(f"note: {name} is not measured: {error.found}")
            continue
        for way, amount in ways.items():
            bench.console.say(f"measuring {name}, {way}")
            step, made = bench.measure(name, way, amount, pictures=1 if times else 2)
            times, results = [*times, step], results or made
    if not times:
        raise left_out[types[0]]
    return _facts(bench, times, results)


def _facts(bench: StepBench, times: list[StepTimes], results: list[Result]) -> dict[str, Any]:
    """Collects the measurements and versions."""
    index, first, (width, height) = bench.pipe.folder.index, times[0], bench.shape
    most, seconds = bench.pipe.folder.flux.quantization, results[-1].seconds
    taken = _evaluations(bench.pipe)
    around = sum(took for stage, took in seconds.items() if stage != "denoise")
    name = device()
    return {
        "device": name, "memory": physical_memory(), "system": _system(), "mlx": version("mlx"),
        "version": __version__, "model": index.name,
        "precision": f"{most.bits} bits, {most.mode}" if most else "16 bits or more",
        "dtype": first.dtype, "width": width, "height": height, "steps": bench.steps,
        "seconds_per_step": first.seconds, "tflops": first.tflops, "share_of_peak": first.share_of_peak,
        "measured": [asdict(one) for one in times],
        "pictures": dict(zip(("first", "second"), (sum(one.seconds.values()) for one in results), strict=True)),
        "evaluations": taken,
        "seconds_per_picture": {mode: around + n * first.seconds for mode, n in taken.items()},
        "stages": seconds, "peaks": results[-1].peaks, "predicted": results[-1].plan and results[-1].plan.stages,
        "wanting": None if first.share_of_peak else f"the peak speed of {name} is not known, so its share is not given",
    }  # fmt: skip


def _system() -> str:
    return f"macOS {macos_version()}" if sys.platform == "darwin" else platform.platform(terse=True)


def _evaluations(pipe: FluxPipeline) -> dict[str, int]:
    """Returns the evaluations of a picture in the model's own steps, and those with --fast where that skips some."""
    index = pipe.folder.index
    steps = index.defaults.num_inference_steps
    is_fast = fast_skips(index.schedule.shift, steps)
    return {"full": steps} | ({"fast": chosen_mode(pipe.folder.path)[0].evaluations(steps)} if is_fast else {})


def measure_filters(shape: tuple[int, int], console: Console) -> FilterTimes | None:
    """Measures the installed filters with a drawn picture of (width, height); None: they are not both installed.

    Raises:
        FluxKreaError: a filter is damaged, or does not answer as it should.
    """
    if not all(may_exist(home.path(home.FILTERS, name)) for name in FILTERS):
        return None
    worker, progress = Worker(), PipelineProgress(console)
    picture = np.asarray(Image.fromarray(drawn_picture()).resize(shape))

    def make_run(parts: int, run: Any) -> Any:
        return worker.stoppable(run, lambda done: progress("check", done, parts))

    def ask() -> FilterTimes:
        marks = [time.perf_counter()]
        judges: dict[str, Any] = open_judges(make_run)[0]
        marks.append(time.perf_counter())
        margins_of(judges["pixtral"], [PICTURES[0]])
        marks.append(time.perf_counter())
        for name, judge in judges.items():
            image_labels(name, judge, [picture])
        marks.append(time.perf_counter())
        return FilterTimes(*(b - a for a, b in pairwise(marks)))

    try:
        return worker.run(ask)
    finally:
        progress.close()


def filter_facts(shape: tuple[int, int], console: Console) -> tuple[dict[str, float] | None, str]:
    """Returns the seconds of the filters by name, and the same in words; None: they could not be measured."""
    console.say("measuring the filters")
    try:
        times = measure_filters(shape, console)
    except FluxKreaError as error:
        return None, f"not measured: {error}"
    if times is None:
        return None, "not installed"
    words = f"{times.start:.2g} s at the start, {times.prompt:.2g} s a prompt, {times.picture:.2g} s a picture"
    return asdict(times), words


def block(facts: dict[str, Any], filters: str) -> str:
    """Formats the measurements as the block to share: a table of steps, pictures, filters, and a row for the README."""
    shares = any(one["share_of_peak"] for one in facts["measured"])
    rows = [("type", "blocks in memory", "s per step", "TFLOP/s", *(["of peak"] * shares), "read a step", "memory")]
    for one in facts["measured"]:
        share = [f"{one['share_of_peak'] or 0:.0%}"] * shares
        blocks = f"{one['resident_blocks']} of {one['total_blocks']}"
        speed = (f"{one['seconds']:.3g}", f"{one['tflops']:.3g}")
        rows.append((one["dtype"], blocks, *speed, *share, size(one["read_per_step"]), size(one["peak"])))
    stages = stage_times({stage: took for stage, took in facts["stages"].items() if stage != "denoise"})
    return "\n".join(
        (
            f"{_machine(facts)}; {facts['system']}, flux-krea {facts['version']}, mlx {facts['mlx']}",
            f"{facts['model']}, {facts['precision']}; {facts['width']} x {facts['height']}, {facts['steps']} steps",
            table(rows, range(2, len(rows[0]))),
            f"{_pictures(facts)}; {stages}",
            f"filters {filters}",
            readme_row(facts, filters),
        )
    )


def _machine(facts: dict[str, Any]) -> str:
    return f"{facts['device']}, {facts['memory'] / 1e9:.0f} GB"


def _pictures(facts: dict[str, Any]) -> str:
    """Formats the times of the two pictures, and of one in the model's own steps, with --fast too."""
    first, second = _first_and_second(facts)
    times, steps = facts["seconds_per_picture"], facts["evaluations"]
    fast = f", {duration(times['fast'])} with --fast ({steps['fast']} evaluations)" if "fast" in times else ""
    return f"first picture {first}, second {second}; {steps['full']} steps in {duration(times['full'])}{fast}"


def _first_and_second(facts: dict[str, Any]) -> list[str]:
    seconds = (facts["pictures"][name] for name in ("first", "second"))
    return [f"{one:.2g} s" if one < 10 else duration(one) for one in seconds]


def readme_row(facts: dict[str, Any], filters: str) -> str:
    """Formats the row of the README's table `HEAD`: steps in the type that was measured first."""
    steps = {one["way"]: f"{one['seconds']:.3g} s" for one in facts["measured"] if one["dtype"] == facts["dtype"]}
    resident = facts["measured"][0]
    part = "" if resident["resident_blocks"] == resident["total_blocks"] else f" ({resident['resident_blocks']} blocks)"
    model = f"{facts['model']}, {facts['precision']}, {facts['dtype']}, {facts['width']} x {facts['height']}"
    first, second = _first_and_second(facts)
    measured = next((way for way in steps if way != STREAMED), None)
    cells = (
        _machine(facts),
        model,
        "no room" if measured is None else f"{steps[measured]}{part}",
        steps.get(STREAMED, "not measured"),
        f"{first}, {second} ({facts['steps']} steps)",
        filters,
    )
    return f"| {' | '.join(cells)} |"
