"""`convert --gptq`: collects the inputs of a model, says first how long everything takes, and shows progress."""

from collections.abc import Callable
from functools import partial

from mlx_flux_krea import calibration, memory
from mlx_flux_krea.convert import Gptq
from mlx_flux_krea.convert.blockwise import LABEL, count_operations
from mlx_flux_krea.models.config import FluxConfig
from mlx_flux_krea.presets import CALIBRATION_PROMPTS, CALIBRATION_TIMES, CHIPS, SHARE_OF_PEAK
from mlx_flux_krea.weights import ModelFolder

from .estimates import SHARE_IN_WORDS, this_chip
from .terminal import Console
from .text import duration, table

UNITS = {calibration.LABEL: "evaluation", LABEL: "input"}
_SHORT = 60  # seconds that are not worth a table
_PROCESSOR = 0.3e12  # operations a second of factorizing and rounding, which run on a Mac's processor


def gptq(console: Console, progress: Callable[[str, int, int], None]) -> Gptq:
    """Returns the inputs for `convert`, collected by the generator."""
    collect = partial(calibration.collect, progress=progress)
    return Gptq(collect, begin=lambda folder, done: console.say(said(folder, done)))


def said(folder: ModelFolder, done: int) -> str:
    """Describes the work ahead and its time, on this chip or on each that is known.

    Args:
        folder: the model in 16 bits.
        done: blocks that are rounded already.
    """
    flux, index = folder.flux.sizes, folder.index
    blocks = flux.depth + flux.depth_single_blocks
    shape = {"width": index.defaults.width, "height": index.defaults.height, "length": index.max_sequence_length}
    this = this_chip()
    times = {chip: seconds(flux, chip, done=done, **shape) for chip in ([this] if this else CHIPS)}
    what = f"GPTQ reads the inputs of {len(CALIBRATION_PROMPTS)} prompts at {CALIBRATION_TIMES} times each"
    what += f"; {done} of {blocks} blocks are done" if done else ""
    how = f"computed for {SHARE_IN_WORDS}; after Ctrl-C the same command continues"
    if this:
        return f"{what}: about {duration(times[this])} here ({how})"
    if max(times.values()) < _SHORT:
        return f"{what}: less than a minute on any chip ({how})"
    rows = [("chip", "takes about"), *((chip, duration(time)) for chip, time in times.items())]
    return f"{what}:\n{table(rows, right=(1,))}\n{how}"


def seconds(flux: FluxConfig, chip: str, *, width: int, height: int, length: int, done: int = 0) -> float:
    """Estimates the seconds of GPTQ on a chip of `presets.CHIPS`.

    Args:
        flux: sizes of the transformer.
        chip: the chip.
        width: pixels.
        height: pixels.
        length: tokens of T5.
        done: blocks that are rounded already.
    """
    samples = len(CALIBRATION_PROMPTS) * CALIBRATION_TIMES
    image = width * height // 16**2
    graphics, processor = count_operations(flux, image=image, text=length, samples=samples, done=done)
    if not done:
        graphics += samples * memory.step_flops(flux, width, height, length)
    return graphics / (SHARE_OF_PEAK * CHIPS[chip] * 1e12) + processor / _PROCESSOR
