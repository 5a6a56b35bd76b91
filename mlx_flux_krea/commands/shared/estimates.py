"""Disk, memory and time that an installation takes on this machine: computed, with the assumptions named."""

import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_flux_krea import home, macos, memory, presets
from mlx_flux_krea.convert.folder import existing
from mlx_flux_krea.convert.quantize import QuantizationRecipe, choose
from mlx_flux_krea.errors import ResourceError
from mlx_flux_krea.filters.instructions import CANARIES
from mlx_flux_krea.models.config import FluxConfig, ModelSizes
from mlx_flux_krea.models.filter_config import NSFW_VIT, PIXTRAL_12B, PixtralConfig, ViTConfig
from mlx_flux_krea.sampling.enlarge import View
from mlx_flux_krea.weights import build, layer_widths

_NETWORK = 12.5e6  # bytes per second: 100 Mbit/s
_CONVERSION = 0.25e9  # bytes of a source per second, with a laptop's disk and memory
SHARE_IN_WORDS = "half of the chip's peak"
ASSUMED = f"100 Mbit/s to fetch, 0.25 GB/s to convert, {SHARE_IN_WORDS} to generate"
_WORTH = 0.03  # share of the time by which float16 must be faster to be recommended
_PROMPT_TOKENS = 300  # of Pixtral's question about a prompt of a hundred words
_SEEN = 512 * 512  # pixels of a picture as Pixtral sees it
_SELF_TEST = (1, len(CANARIES))  # pictures and prompts that Pixtral is asked about once in a process
_READY_BITS = 4.5  # of a weight in the ready copy of Pixtral: 4, and scales and biases for every 64 weights


@dataclass(frozen=True)
class Precision:
    """A precision of the model on this machine.

    Attributes:
        disk: bytes of the model folder.
        need: bytes used on its disk while everything is installed.
        peak: bytes of memory for a picture; None: no picture fits.
        whole: all weights fit in memory.
    """

    disk: int
    need: int
    peak: int | None
    whole: bool


def precisions(
    sizes: ModelSizes,
    folders: Mapping[str, int],
    needs: Mapping[str, int] | None = None,
    *,
    width: int,
    height: int,
    length: int,
    **machine,
) -> dict[str, Precision]:
    """Estimates every precision that `setup` offers.

    Args:
        sizes: of the four networks.
        folders: bytes of the model folder in each precision.
        needs: bytes used on its disk while everything is installed; None: as many.
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
                weights, sizes, mx.bfloat16, width=width, height=height, text_length=length, filtered=True, **machine
            )
            peak, whole = plan.peak, plan.resident_blocks == plan.total_blocks
        except ResourceError:
            peak, whole = None, False
        found[precision] = Precision(folders[precision], (needs or folders)[precision], peak, whole)
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
    fits = [name for name, one in found.items() if one.need <= free and one.peak is not None]
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
    return memory.step_flops(flux, width, height, length) / (presets.SHARE_OF_PEAK * presets.CHIPS[chip] * 1e12)


def second_step_seconds(flux: FluxConfig, view: View, length: int, chip: str) -> float:
    """Estimates the seconds of a step of a second pass, whole or in tiles, with so many text tokens."""
    return memory.pass_flops(flux, view, length) / (presets.SHARE_OF_PEAK * presets.CHIPS[chip] * 1e12)


def question_flops(config: PixtralConfig, tokens: int, patches: int = 0) -> float:
    """Counts the operations of a question to Pixtral: linear layers and attention.

    Args:
        config: sizes of the network.
        tokens: of the whole question, those of a picture included.
        patches: of the picture; 0: the question is about a prompt.
    """
    text, sight = config.text_config, config.vision_config
    heads = 2 * text.num_attention_heads + 2 * text.num_key_value_heads  # of queries and outputs, keys and values
    layer = text.hidden_size * (heads * text.head_dim + 3 * text.intermediate_size)
    mixing = 4 * tokens**2 * text.num_attention_heads * text.head_dim
    seen = sight.hidden_size * (4 * sight.hidden_size + 3 * sight.intermediate_size)
    tower = sight.num_hidden_layers * (2 * patches * seen + 4 * patches**2 * sight.hidden_size)
    return text.num_hidden_layers * (2 * tokens * layer + mixing) + tower


def filter_seconds(chip: str | None = None) -> tuple[float, float] | None:
    """Estimates the seconds of both filters for a picture, and once more at a program's start; None: unknown chip.

    The classifier of pictures takes a thousandth of them and is left out.
    """
    chip = chip or this_chip()
    if chip is None:
        return None
    patches = _SEEN // PIXTRAL_12B.vision_config.patch_size**2
    prompt = question_flops(PIXTRAL_12B, _PROMPT_TOKENS)
    picture = question_flops(PIXTRAL_12B, _PROMPT_TOKENS + patches, patches)
    speed = presets.SHARE_OF_PEAK * presets.CHIPS[chip] * 1e12
    pictures, prompts = _SELF_TEST
    return (prompt + picture) / speed, (prompts * prompt + pictures * picture) / speed


def filter_bytes() -> dict[str, tuple[int, int]]:
    """Returns the bytes to fetch of each published filter, and those of its folder; Pixtral's are the ready copy's."""
    nsfw = _weigh_filter("nsfw", NSFW_VIT, "none", 4)
    text = PIXTRAL_12B.text_config
    head = text.vocab_size * text.hidden_size  # of which few rows are kept
    whole = _weigh_filter("pixtral", PIXTRAL_12B, "none", 2) / 2
    return {
        "nsfw": (nsfw, nsfw),
        "pixtral": (int((whole + head) * _READY_BITS / 8), int(whole * _READY_BITS / 8)),
    }


def _weigh_filter(name: str, sizes: ViTConfig | PixtralConfig, quantize: str, item: int) -> int:
    """Returns the bytes of a filter's folder in a precision.

    Args:
        name: "nsfw" or "pixtral".
        sizes: of its network.
        quantize: one of `presets.PRECISIONS`.
        item: bytes of a number that is not quantized.
    """
    layers = choose(name, layer_widths(name, sizes), QuantizationRecipe(quantize))[0]
    flat = cast(list[tuple[str, mx.array]], tree_flatten(build(name, sizes, layers).parameters()))
    arrays = [array for _, array in flat]
    return sum(array.nbytes if array.dtype in (mx.uint32, mx.uint8) else array.size * item for array in arrays)


def this_chip() -> str | None:
    """Returns the row of `presets.CHIPS` for this machine; None: it is not in the table."""
    name = device().removeprefix("Apple ")
    return name if name in presets.CHIPS else None


def device() -> str:
    """Returns the name of MLX's device, or of the processor."""
    name = mx.device_info().get("device_name") or macos.sysctl("machdep.cpu.brand_string")
    return str(name or platform.processor() or platform.machine())


def has_fast_halves() -> bool:
    """Tells if both types of 16 bits may be the faster one: on a GPU, where a CPU computes either in float32."""
    return mx.default_device().type.name == "gpu"


def recommendation(bfloat16: float, float16: float) -> str:
    """Recommends a compute type from the seconds that the same work takes in both."""
    saved = 1 - float16 / bfloat16
    if saved < _WORTH:
        return f"bfloat16 is the type to use here: float16 takes {float16 / bfloat16:.2f} times as long"
    return f"float16 takes {saved:.0%} less time here, and rounds less: flux-krea config dtype float16"
