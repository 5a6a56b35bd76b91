"""How much memory each stage of a run takes, known before anything is read, and what may therefore stay in memory.

Weights are counted exactly, from sizes and precisions alone. What a stage needs besides was measured on the CPU backend
(benchmarks/memory.py), which materialises attention scores and unfolds convolutions; for Metal, which does neither, it
is computed from the arrays that a block holds at one time, and was not measured.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from .errors import ResourceError, UsageError
from .models import config as configs
from .models.layers import CHUNK
from .models.tiles import SIDE
from .models.vae import STRIP
from .residency import SLOTS, kept, matrices
from .weights import PACKED, ModelFolder, build

GB = 10**9
_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": GB, "kib": 2**10, "mib": 2**20, "gib": 2**30}
# Arrays of T x C that a double and a single block hold at one time, and strips that a convolution needs: on the CPU in
# float32 and in 16 bits (whose element-wise kernels go through float32 there), and on Metal.
_BLOCK = {"cpu": {4: (15, 28), 2: (26, 55)}, "gpu": {4: (12, 18), 2: (12, 18)}}
_DENSE = {4: 9, 2: 10}  # bytes a weight that the CPU dequantizes takes on its way to float32 and to 16 bits
_STRIPS = {"cpu": {4: 12, 2: 24}, "gpu": {4: 6, 2: 6}}


@dataclass(frozen=True)
class Pieces:
    """What the matrices of a network's pieces take, in bytes: those of which few are in memory at one time.

    Attributes:
        stored: of each piece.
        computed: the same in the compute type.
        cast: what a piece that is not kept takes besides while it runs, where its stored type is not the compute type.
        dense: what the quantized matrices of the largest would take, dequantized.
    """

    stored: tuple[int, ...]
    computed: tuple[int, ...]
    cast: int
    dense: int


@dataclass(frozen=True)
class Weights:
    """What a model's weights take, in bytes.

    Attributes:
        blocks: of the transformer.
        modulation: its layers.
        t5: its table and blocks.
        rest: everything else of the transformer.
        t5_rest: everything else of T5.
        clip: all of it.
        encoder: of images, all of it.
        decoder: of images, all of it.
    """

    blocks: Pieces
    modulation: Pieces
    t5: Pieces
    rest: int
    t5_rest: int
    clip: int
    encoder: int
    decoder: int

    @property
    def disk(self) -> int:
        """Bytes of a folder that holds them, where the compute type is the stored one."""
        pieces = (sum(pieces.stored) for pieces in (self.blocks, self.modulation, self.t5))
        return sum(pieces) + self.rest + self.t5_rest + self.clip + self.encoder + self.decoder


@dataclass(frozen=True)
class Plan:
    """What a run takes.

    Attributes:
        budget: bytes that may be used.
        stages: the peak of each stage in bytes, in the order in which they run.
        blocks: how many blocks of the transformer stay in memory.
        of: how many there are.
        keep: bytes for those that stay.
        read: bytes read from disk in each step.
        least: the peak where none stays, and the picture is developed in tiles where that takes less.
        most: the peak where all stay.
        tiled: whether the picture is developed, and an input image read, in tiles, since strips need more.
    """

    budget: int
    stages: dict[str, int]
    blocks: int
    of: int
    keep: int
    read: int
    least: int
    most: int
    tiled: bool

    @property
    def peak(self) -> int:
        """The most of any stage."""
        return max(self.stages.values())


def parse_memory(text: str | int) -> int | None:
    """Bytes meant by "8GB", "512 MiB" or a number; None for "auto".

    Raises:
        UsageError: none of these.
    """
    if isinstance(text, str) and text.strip().lower() == "auto":
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?b)?", str(text).strip().lower())
    if isinstance(text, bool) or not match or not 0 < (count := float(match[1]) * _UNITS[match[2] or ""]) < 2**60:
        raise UsageError(f"memory is {text!r}", '"auto", or an amount such as 8GB')
    return int(count)


def machine_memory() -> int:
    """Bytes that a run may use on this machine where nobody says: four fifths of what the GPU, or Linux, offers."""
    device = mx.device_info()
    offered = device.get("max_recommended_working_set_size")
    if not offered:
        with open("/proc/meminfo") as file:
            offered = next(1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    return int(offered) * 4 // 5


def weigh(sizes: configs.ModelSizes, layers: dict[str, dict], stored: dict[str, str], dtype: mx.Dtype) -> Weights:
    """What a model's weights take.

    Args:
        sizes: of the four networks.
        layers: of each component, how its layers are quantized (`NetworkFolder.layers`).
        stored: of each component, the type of its arrays that are not quantized, MLX's name.
        dtype: the compute type.
    """
    flux, clip, t5, vae = (
        _Sizes(build(name, config, layers.get(name)), getattr(mx, stored[name]).size, dtype.size)
        for name, config in sizes.by_component().items()
    )
    blocks, modulation = flux.pieces(flux.network.blocks), flux.pieces(flux.network.modulated)
    layers = t5.pieces(t5.network.stages)
    rest, t5_rest = flux.all - sum(blocks.computed) - sum(modulation.computed), t5.all - sum(layers.computed)
    coders = vae.of(vae.network.encoder), vae.of(vae.network.decoder)
    return Weights(blocks, modulation, layers, rest, t5_rest, clip.all, *coders)


class _Sizes:
    """Bytes of a network's parameters, stored and in the compute type."""

    def __init__(self, network: nn.Module, stored: int, computed: int):
        self.network, self._stored, self._computed = network, stored, computed
        self.all = self.of(network)

    def of(self, module: nn.Module) -> int:
        """Bytes of a part of the network in the compute type."""
        return sum(self._bytes(array, self._computed) for _, array in tree_flatten(module.parameters()))

    def pieces(self, pieces: Sequence) -> Pieces:
        """What `residency.matrices` gives of each."""
        stored, computed, cast, dense = zip(*(self._matrices(*matrices(piece)) for piece in pieces), strict=True)
        return Pieces(stored, computed, max(cast), max(dense))

    def _matrices(self, module: nn.Module, names: list[str]) -> tuple[int, int, int, int]:
        parameters, layers = dict(tree_flatten(module.parameters())), dict(module.named_modules())
        arrays = [parameters[name] for name in names]
        stored, computed = (
            sum(self._bytes(array, size) for array in arrays) for size in (self._stored, self._computed)
        )
        cast = computed - sum(array.nbytes for array in arrays if array.dtype in PACKED)
        owners = [layers[path] for path in {name.rpartition(".")[0] for name in names}]
        dense = [8 * it.weight.nbytes // it.bits for it in owners if isinstance(it, nn.QuantizedLinear)]
        return stored, computed, cast * (self._stored != self._computed), sum(dense) * self._computed

    @staticmethod
    def _bytes(array: mx.array, size: int) -> int:
        return array.nbytes if array.dtype in PACKED else array.size * size


def weigh_folder(folder: ModelFolder, dtype: mx.Dtype) -> Weights:
    """What the weights of a model folder take."""
    layers = {name: network.layers() for name, network in folder.networks.items()}
    stored = {name: network.dtype for name, network in folder.networks.items()}
    return weigh(folder.sizes, layers, stored, dtype)


def plan(
    weights: Weights,
    sizes: configs.ModelSizes,
    dtype: mx.Dtype,
    *,
    width: int,
    height: int,
    text_length: int,
    steps: int = 28,
    conditions: int = 1,
    image: bool = False,
    budget: int | None = None,
    device: str | None = None,
) -> Plan:
    """The peak of each stage of a run, with as many blocks kept as the budget allows.

    Args:
        weights: from `weigh`.
        sizes: of the four networks.
        dtype: the compute type.
        width: pixels.
        height: pixels.
        text_length: S, tokens of T5.
        steps: n.
        conditions: prompts and negative prompts of the run.
        image: whether it begins with one.
        budget: bytes; None: what the machine offers.
        device: "cpu" or "gpu"; None: the one in use.

    Raises:
        ResourceError: not even the smallest plan fits.
    """
    budget = budget or machine_memory()
    device = device or mx.default_device().type.name
    flux, t5, vae = sizes.flux, sizes.t5, sizes.vae
    patch = 2 * vae.downsampling
    tokens = text_length + width * height // patch**2
    modulations = 12 * flux.depth + 3 * flux.depth_single_blocks + 2
    rows = steps * conditions * modulations * flux.hidden_size * dtype.size
    stays = weights.rest + rows  # of the transformer, from one picture to the next
    texts = conditions * text_length * flux.hidden_size * dtype.size
    fixed = {
        "text": weights.t5_rest
        + weights.clip
        + _slots(weights.t5.stored, weights.t5.cast)
        + _dense(weights.t5.dense, dtype, device)
        + _text(t5, text_length, dtype, device),
        **({"image": weights.encoder} if image else {}),
        "modulation": _slots(weights.modulation.stored, weights.modulation.cast)
        + _dense(weights.modulation.dense, dtype, device),
        "denoise": texts + _dense(weights.blocks.dense, dtype, device) + _block(flux, tokens, dtype, device),
        "decode": weights.decoder,
    }

    def needs_in(pieces: Callable) -> dict[str, int]:
        planes = {coder: pieces(vae, coder, width, height, dtype, device) for coder in ("image", "decode")}
        return {stage: stays + need + planes.get(stage, 0) for stage, need in fixed.items()}

    blocks = weights.blocks
    strips, tiles = needs_in(_planes), needs_in(_tiles)
    smaller = tiles if tiles["decode"] < strips["decode"] else strips
    tiled = smaller is tiles and max(strips.values()) > budget >= max(tiles.values())
    needs = tiles if tiled else strips
    stages = _stages(smaller, blocks, set())
    least, most = max(stages.values()), max(needs.values()) + sum(blocks.computed)
    if least > budget:
        worst = max(stages, key=stages.get)
        raise ResourceError(
            f"{width} x {height} needs {least / GB:.2f} GB of memory to {_VERBS[worst]}, "
            f"and {budget / GB:.2f} GB may be used",
            todo="a smaller picture needs less; --memory says what may be used",
        )
    keep = budget - max(max(needs.values()), needs["denoise"] + _slots(blocks.stored, blocks.cast))
    if most <= budget:
        keep = sum(blocks.computed)
    places = kept(blocks.computed, max(keep, 0))
    stages = _stages(needs, blocks, places)
    read = sum(size for place, size in enumerate(blocks.stored) if place not in places)
    return Plan(budget, stages, len(places), len(blocks.stored), max(keep, 0), read, least, most, tiled)


_VERBS = {
    "text": "read the prompt",
    "image": "read the image",
    "modulation": "prepare",
    "denoise": "draw",
    "decode": "develop",
}


def _stages(needs: dict[str, int], blocks: Pieces, places: set[int]) -> dict[str, int]:
    staying = sum(blocks.computed[place] for place in places)
    slots = _slots([size for place, size in enumerate(blocks.stored) if place not in places], blocks.cast)
    return {name: need + staying + (slots if name == "denoise" else 0) for name, need in needs.items()}


def _slots(streamed: Sequence[int], cast: int) -> int:
    """Buffers of what is streamed, and the copy in another compute type of the piece that runs."""
    return min(SLOTS, len(streamed)) * max(streamed) + cast if streamed else 0


def _text(t5: configs.T5Config, length: int, dtype: mx.Dtype, device: str) -> int:
    scores = 3 * t5.num_heads * length**2 * dtype.size if device == "cpu" else t5.num_heads * length**2 * dtype.size
    return scores + length * (4 * t5.d_ff * 4 + 4 * t5.d_model * dtype.size)


def _dense(matrices: int, dtype: mx.Dtype, device: str) -> int:
    """What is dequantized at one time: on the CPU pieces of the layers that read the same, three of them at most."""
    return min(matrices // dtype.size, 3 * CHUNK) * _DENSE[dtype.size] if device == "cpu" else matrices


def _block(flux: configs.FluxConfig, tokens: int, dtype: mx.Dtype, device: str) -> int:
    wide = max(_BLOCK[device][dtype.size]) if flux.depth_single_blocks else _BLOCK[device][dtype.size][0]
    scores = flux.num_heads * tokens**2 * dtype.size if device == "cpu" else 0
    return wide * tokens * flux.hidden_size * dtype.size + scores


def _planes(vae: configs.VAEConfig, coder: str, width: int, height: int, dtype: mx.Dtype, device: str) -> int:
    """The largest residual block of a coder: its input, what lies between, its output, and some strips."""
    size, most = 4 if dtype.size == 4 else 2, 0
    widths = [vae.ch * m for m in vae.ch_mult]
    inputs = [*widths[1:], widths[-1]] if coder == "decode" else [vae.ch, *widths[:-1]]
    for level, (i, o) in enumerate(zip(inputs, widths, strict=True)):
        plane = width * height // 4**level
        strips = _STRIPS[device][size] * min(STRIP, plane * max(i, o))
        most = max(most, plane * (i + 2 * o) + strips)
    return most * size


def _tiles(vae: configs.VAEConfig, coder: str, width: int, height: int, dtype: mx.Dtype, device: str) -> int:
    """One tile, and the picture in float32 before and after it is added."""
    side = SIDE * vae.downsampling
    tile = _planes(vae, coder, min(width, side), min(height, side), dtype, device)
    return tile + 2 * 4 * vae.out_ch * width * height


def step_flops(flux: configs.FluxConfig, width: int, height: int, text_length: int, patch: int = 16) -> float:
    """Operations of the products of one step: linear layers and attention of all blocks."""
    tokens, c = text_length + width * height // patch**2, flux.hidden_size
    double = 2 * tokens * (4 * c * c + 2 * c * flux.mlp_size)
    single = 2 * tokens * (c * (3 * c + flux.mlp_size) + (c + flux.mlp_size) * c)
    attention = 4 * tokens**2 * c
    return flux.depth * (double + attention) + flux.depth_single_blocks * (single + attention)
