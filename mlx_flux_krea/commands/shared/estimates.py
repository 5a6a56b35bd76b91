"""Disk, memory and time that an installation takes on this machine: computed, with the assumptions named."""

import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx

from mlx_flux_krea import home, memory, presets
from mlx_flux_krea.convert.folder import existing
from mlx_flux_krea.convert.quantize import QuantizationRecipe, choose
from mlx_flux_krea.errors import ResourceError
from mlx_flux_krea.models.config import FluxConfig, ModelSizes
from mlx_flux_krea.weights import layer_widths

from . import macos

_NETWORK = 12.5e6  # bytes per second: 100 Mbit/s
_CONVERSION = 0.25e9  # bytes of a source per second, with a laptop's disk and memory
_SHARE = 0.75  # of a chip's peak that the products of a step reach
ASSUMED = "100 Mbit/s to fetch, 0.25 GB/s to convert, three quarters of the chip's peak to generate"


@dataclass(frozen=True)
class Precision:
    """A precision of the model on this machine.

    Attributes:
        disk: bytes of the model folder.
        peak: bytes of memory for a picture; None: no picture fits.
        whole: all weights fit in memory.
    """

    disk: int
    peak: int | None
    whole: bool


def precisions(
    sizes: ModelSizes, folders: Mapping[str, int], *, width: int, height: int, length: int, **machine
) -> dict[str, Precision]:
    """Estimates every precision that `setup` offers.

    Args:
        sizes: of the four networks.
        folders: bytes of the model folder in each precision.
        width: pixels of a picture.
        height: pixels.
        length: tokens of T5.
        machine: `budget` and `device` of another machine, see `memory.make_plan`.
    """
    found = {}
    for precision in presets.PROPOSED_PRECISIONS:
        weights = weigh_recipe(sizes, precision, "bfloat16")
        try:
            plan = memory.make_plan(
                weights, sizes, mx.bfloat16, width=width, height=height, text_length=length, **machine
            )
            peak, whole = plan.peak, plan.resident_blocks == plan.total_blocks
        except ResourceError:
            peak, whole = None, False
        found[precision] = Precision(folders[precision], peak, whole)
    return found


def weigh_recipe(sizes: ModelSizes, precision: str, dtype: str) -> memory.WeightSizes:
    """Weighs a model that does not exist yet, as `convert -q` would write it.

    Args:
        sizes: of the four networks.
        precision: one of `presets.PRECISIONS`.
        dtype: type of everything that is not quantized, and of the computation.
    """
    networks = sizes.by_component()
    recipe = QuantizationRecipe(precision)
    layers = {name: choose(name, layer_widths(name, network), recipe)[0] for name, network in networks.items()}
    return memory.weigh(sizes, layers, dict.fromkeys(networks, dtype), getattr(mx, dtype))


def propose(found: Mapping[str, Precision], free: int) -> str:
    """Chooses a precision that the disk can hold: the best that fits in memory whole, else 8 bits, streamed."""
    fits = [name for name, one in found.items() if one.disk < free and one.peak is not None]
    whole = [name for name in fits if found[name].whole and name in ("none", "8")]
    return next(iter(whole or [name for name in fits if name != "none"] or fits), "8")


def home_disk() -> tuple[Path, int]:
    """Returns the home folder, or its nearest parent that exists, and the bytes free on its disk."""
    folder = existing(home.path(home.MODELS))
    return folder, shutil.disk_usage(folder).free


def conversion_seconds(fetch: int, size: int) -> float:
    """Estimates the seconds to fetch and to convert so many bytes."""
    return fetch / _NETWORK + size / _CONVERSION


def picture_seconds(
    flux: FluxConfig, *, width: int, height: int, length: int, steps: int, chip: str | None = None
) -> float | None:
    """Estimates the seconds of a picture on a chip, by default on this one; None: the chip's speed is not known."""
    chip = chip or this_chip()
    return steps * step_seconds(flux, width=width, height=height, length=length, chip=chip) if chip else None


def step_seconds(flux: FluxConfig, *, width: int, height: int, length: int, chip: str) -> float:
    """Estimates the seconds of a step on a chip of `presets.CHIPS`."""
    return memory.step_flops(flux, width, height, length) / (_SHARE * presets.CHIPS[chip] * 1e12)


def this_chip() -> str | None:
    """Returns the row of `presets.CHIPS` for this machine; None: it is not in the table."""
    name = device().removeprefix("Apple ")
    return name if name in presets.CHIPS else None


def device() -> str:
    """Returns the name of MLX's device, or of the processor."""
    name = mx.device_info().get("device_name") or macos.sysctl("machdep.cpu.brand_string")
    return str(name or platform.processor() or platform.machine())
