"""What an installation takes of disk, memory and time on this machine: computed, and said by what assumption."""

import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

from mlx_flux_krea.models.config import ModelSizes

from . import macos

PREFERRED = ("none", "8", "6", "5", "4")  # precisions that are proposed, the best first
_NETWORK = 12.5e6  # bytes a second: 100 Mbit/s
_CONVERT = 0.25e9  # bytes of a source a second, where disk and memory are a laptop's
_SHARE = 0.75  # of a chip's peak that the products of a step get
ASSUMED = "fetching at 100 Mbit/s, converting 0.25 GB/s, drawing at three quarters of the chip's peak"


@dataclass(frozen=True)
class Precision:
    """A precision on this machine.

    Attributes:
        disk: bytes of the model folder.
        peak: bytes of memory that a picture takes here; None: it does not fit at all.
        whole: whether all weights stay in memory.
    """

    disk: int
    peak: int | None
    whole: bool


def precisions(
    sizes: ModelSizes, made: dict[str, int], width: int, height: int, length: int, **machine
) -> dict[str, Precision]:
    """What each precision that may be proposed takes.

    Args:
        sizes: of the four networks.
        made: bytes of the folder in each precision.
        width: pixels of a picture.
        height: pixels.
        length: tokens of T5.
        machine: budget and device of another one, see `plan.plan`.
    """
    import mlx.core as mx

    from mlx_flux_krea.errors import ResourceError
    from mlx_flux_krea.memory import plan

    found = {}
    for quantize in PREFERRED:
        try:
            weights = weigh_recipe(sizes, quantize, "bfloat16")
            made_plan = plan(weights, sizes, mx.bfloat16, width=width, height=height, text_length=length, **machine)
            peak, whole = made_plan.peak, made_plan.blocks == made_plan.of
        except ResourceError:
            peak, whole = None, False
        found[quantize] = Precision(made[quantize], peak, whole)
    return found


def weigh_recipe(sizes: ModelSizes, quantize: str, dtype: str):
    """The `plan.Weights` of a model that is not there, as `convert -q` would make it.

    Args:
        sizes: of the four networks.
        quantize: a key of `convert.quantize.RECIPES`.
        dtype: of what stays unquantized, and to compute in.
    """
    import mlx.core as mx

    from mlx_flux_krea.convert.quantize import Recipe, choose
    from mlx_flux_krea.memory import weigh
    from mlx_flux_krea.weights import layer_widths

    networks = sizes.by_component()
    layers = {name: choose(name, layer_widths(name, one), Recipe(quantize))[0] for name, one in networks.items()}
    return weigh(sizes, layers, dict.fromkeys(networks, dtype), getattr(mx, dtype))


def propose(found: dict[str, Precision], free: int) -> str:
    """The best that stays in memory as a whole, else 8 bits, read block by block; and that the disk can hold."""
    fits = [name for name, one in found.items() if one.disk < free and one.peak is not None]
    whole = [name for name in fits if found[name].whole and name in ("none", "8")]
    return next(iter(whole or [name for name in fits if name != "none"] or fits), "8")


def home_disk() -> tuple[Path, int]:
    """The home folder, or the nearest above it that exists, and the bytes free on its disk."""
    from mlx_flux_krea import home
    from mlx_flux_krea.convert.folder import existing

    folder = existing(home.path(home.MODELS))
    return folder, shutil.disk_usage(folder).free


def minutes(seconds: float) -> str:
    """A duration for people."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def seconds_to_make(fetch: int, size: int) -> float:
    """Of bytes that are fetched and bytes that are converted."""
    return fetch / _NETWORK + size / _CONVERT


def seconds_to_draw(flux, width: int, height: int, length: int, steps: int, chip: str | None = None) -> float | None:
    """Of a picture on a chip, by default this one; None: its speed is not known."""
    chip = chip or this_chip()
    return steps * seconds_a_step(flux, width, height, length, chip) if chip else None


def seconds_a_step(flux, width: int, height: int, length: int, chip: str) -> float:
    """Of computing, on a chip of `presets.CHIPS`."""
    from mlx_flux_krea.memory import step_flops
    from mlx_flux_krea.presets import CHIPS

    return step_flops(flux, width, height, length) / (_SHARE * CHIPS[chip] * 1e12)


def this_chip() -> str | None:
    """The row of `presets.CHIPS` that MLX computes on here; None: it is not in there."""
    from mlx_flux_krea.presets import CHIPS

    name = device().removeprefix("Apple ")
    return name if name in CHIPS else None


def device() -> str:
    """The name of what MLX computes on, or the system's of its processor."""
    import mlx.core as mx

    name = mx.device_info().get("device_name") or macos.sysctl("machdep.cpu.brand_string")
    return str(name or platform.processor() or platform.machine())
