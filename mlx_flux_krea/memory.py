"""Plans memory: the peak of each stage, known before anything is read, and the blocks that may therefore be resident.

Weights are counted exactly, from sizes and precisions alone. Other needs were measured on the CPU backend
(benchmarks/memory.py), which materialises attention scores and unfolds convolutions. For Metal, which does neither,
they are computed from the arrays that a block holds at one time, and were not measured.
"""

import contextlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from .errors import ResourceError, UsageError
from .models import config as configs
from .models.depth import input_size
from .models.depth_config import DepthConfig
from .models.layers import CHUNK
from .models.tiles import SIDE
from .models.vae import STRIP
from .residency import SLOTS, hidden_places, matrices, resident_places
from .sampling.enlarge import View
from .weights import PACKED, ModelFolder, build, count_parameters, parameters
from .worker import is_in_flight

GB = 10**9
# Bytes of the process that MLX does not count: the interpreter, libraries, the vocabularies of CLIP and T5, pixels; and
# Pixtral's vocabulary where filters check. Measured by `benchmarks/memory.py --process`.
PROCESS, VOCABULARY = 180_000_000, 190_000_000
INDEXABLE = 2**31  # elements of an array, from which on kernels of Metal that count in 32 bits go wrong
HIDING = 0.8  # of the least time that a block computes, that reading the next one may take
_MOST_GB = 4096  # a number up to this, without a unit, is of gigabytes
# Arrays of T x C that a double and a single block hold at one time, and strips that a convolution needs: on the CPU in
# float32 and in 16 bits (whose element-wise kernels compute in float32 there), and on Metal.
_BLOCK = {"cpu": {4: (15, 28), 2: (26, 41)}, "gpu": {4: (12, 18), 2: (12, 18)}}
# More of them, since the next block starts before a block has ended.
_IN_FLIGHT = {"cpu": {4: 7, 2: 11}, "gpu": {4: 8, 2: 8}}
_DENSE = {4: 9, 2: 10}  # bytes a weight that the CPU dequantizes takes on its way to float32 and to 16 bits
# Bytes of a pixel of the image that a picture comes back into, its mask included, and of a pixel of the picture at the
# size of its part: where pixels are bytes, and where they are float32.
_PASTED = {False: (9, 4), True: (16, 14)}
HELD, _COPIED = 4, 3  # bytes of a pixel of an image in memory, as Pillow holds it, and of its array
_EDGES = 120  # bytes of a pixel while edges are found, in numpy
_HEAD = {"cpu": 41, "gpu": 12}  # bytes of a pixel and of each of its features in the head of the depth network
_STRIPS = {"cpu": {4: 12, 2: 24}, "gpu": {4: 6, 2: 6}}


@dataclass(frozen=True)
class BlockSizes:
    """Bytes of the matrices of a network's blocks, of which few need be in memory at one time.

    Attributes:
        stored: of each block, as in the file.
        computed: of each block, in the compute type.
        cast: copy of a streamed block while it runs, where its stored type is not the compute type.
        dense: the quantized matrices of the largest block, dequantized.
    """

    stored: tuple[int, ...]
    computed: tuple[int, ...]
    cast: int
    dense: int


@dataclass(frozen=True)
class WeightSizes:
    """Bytes of a model's weights.

    Attributes:
        blocks: of the transformer.
        modulation: of the transformer's modulation layers.
        t5: of T5's table and blocks.
        rest: everything else of the transformer.
        t5_rest: everything else of T5.
        clip: all of it.
        encoder: of images, all of it.
        decoder: of images, all of it.
    """

    blocks: BlockSizes
    modulation: BlockSizes
    t5: BlockSizes
    rest: int
    t5_rest: int
    clip: int
    encoder: int
    decoder: int

    @property
    def disk(self) -> int:
        """Bytes of a folder that holds them, where the compute type is the stored one."""
        blocks = (sum(sizes.stored) for sizes in (self.blocks, self.modulation, self.t5))
        return sum(blocks) + self.rest + self.t5_rest + self.clip + self.encoder + self.decoder


@dataclass(frozen=True)
class InputNeeds:
    """Images that a run starts from or reads.

    Attributes:
        held: bytes of all of them, which stay in memory.
        read: bytes beside them while they are read: the largest again, or one that is made of it for a moment.
        pasted: bytes while a picture comes back into its image; 0: it does not.
    """

    held: int
    read: int
    pasted: int = 0


def input_needs(
    images: Sequence[int], whole: int = 0, part: int = 0, *, made: int = 0, as_floats: bool = False
) -> InputNeeds | None:
    """Returns the memory of input images; None: there are none.

    Args:
        images: bytes of each.
        whole: pixels of the image that a picture comes back into, or 0.
        part: pixels of the part of it where the picture has its place.
        made: bytes of an image that is made of another one, brought to size, and dropped.
        as_floats: the pixels are float32.
    """
    whole_bytes, part_bytes = _PASTED[as_floats]
    pasted = whole_bytes * whole + part_bytes * part
    return InputNeeds(sum(images), max(*images, made), pasted) if images else None


@dataclass(frozen=True)
class StyleNeeds:
    """Style images of a run, and the weights of the networks that read them.

    Attributes:
        encoder: sizes of SigLIP.
        embedder: sizes of Redux.
        layers: bytes of SigLIP's layers.
        rest: bytes of everything else of SigLIP.
        last: bytes of Redux.
        images: number of style images.
        pixels: of all of them.
        tokens: that stand beside those of each prompt.
        prompts: number of prompts.
    """

    encoder: configs.SiglipConfig
    embedder: configs.ReduxConfig
    layers: BlockSizes
    rest: int
    last: int
    images: int
    pixels: int
    tokens: int
    prompts: int

    def kept(self, size: int) -> int:
        """Returns the bytes of the tokens of all images, which stay in memory, in numbers of this size."""
        return self.images * self.encoder.positions * self.embedder.txt_in_features * size


@dataclass(frozen=True)
class Speeds:
    """Speeds of a machine: bytes a second that its disk reads, and operations a second of its chip's peak."""

    disk: float
    peak: float


@dataclass(frozen=True)
class MemoryPlan:
    """Memory of a run, in bytes.

    Attributes:
        budget: bytes that may be used.
        process: bytes of the process apart from arrays, all the time.
        stages: the peak of each stage in arrays, in the order in which they run.
        resident_blocks: number of the transformer's blocks that stay in memory.
        total_blocks: number of all of them.
        resident_bytes: bytes for those that stay.
        read_per_step: bytes read from disk in each step.
        hidden: more blocks would fit, and need not stay: this disk reads the others while a step computes.
        least: `peak` with no resident block, and with decoding in tiles where that takes less.
        most: `peak` with all blocks resident.
        tiled: True where the VAE decodes, and encodes an input image, in tiles, since strips would not fit or would
            make arrays too large for a kernel.
        in_flight: True where a block starts before the one before it has ended: memory has room for both.
        view: how the transformer sees the second pass, whole or in tiles; None: there is none.
        second: the plan of the second pass, of a picture that is enlarged; stages, least and most are those of both.
    """

    budget: int
    process: int
    stages: dict[str, int]
    resident_blocks: int
    total_blocks: int
    resident_bytes: int
    read_per_step: int
    hidden: bool
    least: int
    most: int
    tiled: bool
    in_flight: bool
    view: View | None = None
    second: "MemoryPlan | None" = None

    def after(self, first: "MemoryPlan | None") -> "MemoryPlan":
        """Returns the plan of both passes from that of the second, which decodes and encodes the first one's picture.

        Args:
            first: of the first pass; None: an image is enlarged.
        """
        both, own = first or self, ("image", "modulation", "denoise")
        enlarge = max([self.stages[name] for name in own] + ([first.stages["decode"]] if first else []))
        kept = {name: peak for name, peak in both.stages.items() if first or name not in own}
        stages = {**kept, "enlarge": enlarge, "decode": self.stages["decode"]}
        least, most = max(both.least, self.least), max(both.most, self.most)
        return replace(both, stages=stages, least=least, most=most, view=self.view, second=self)

    @property
    def tiles(self) -> int:
        """Parts of the picture that the transformer sees one after the other in a step of the second pass."""
        return self.view.count if self.view else 1

    @property
    def peak(self) -> int:
        """The bytes of the process in the stage that takes most."""
        return self.process + max(self.stages.values())

    def to_json(self) -> dict[str, Any]:
        """Returns the plan in the names that programs read."""
        return {
            "budget": self.budget,
            "process": self.process,
            "stages": self.stages,
            "blocks": self.resident_blocks,
            "of": self.total_blocks,
            "keep": self.resident_bytes,
            "read": self.read_per_step,
            "hidden": self.hidden,
            "least": self.least,
            "most": self.most,
            "tiled": self.tiled,
            "in_flight": self.in_flight,
            "tiles": self.tiles,
        }


def parse_memory(text: str | int) -> int | None:
    """Parses an amount of memory such as "8GB", "8G" or "512 MiB"; returns None for "auto".

    A number alone is bytes, or gigabytes where it is small: nobody has a budget of 64 bytes.

    Raises:
        UsageError: neither an amount nor "auto".
    """
    if isinstance(text, str) and text.strip().lower() == "auto":
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(?:(bytes|b)|([kmgt])(i?)b?)?", str(text).strip().lower())
    if isinstance(text, bool) or not match:
        raise UsageError(f"`memory` is {text!r}", '"auto", or an amount such as 8GB')
    unit = (1024 if match[4] else 1000) ** (" kmgt".index(match[3]) if match[3] else 0)
    count = float(match[1]) * (GB if not (match[2] or match[3]) and float(match[1]) <= _MOST_GB else unit)
    if not 0 < count < 2**60:
        raise UsageError(f"`memory` is {text!r}", '"auto", or an amount such as 8GB')
    return int(count)


def _size(count: int) -> str:
    """Formats bytes for a comparison: 1.27 GB, 23.4 MB."""
    return f"{count / GB:.2f} GB" if count >= GB else f"{count / 1e6:.1f} MB"


def machine_memory() -> int:
    """Returns the default budget on this machine: four fifths of the memory that the GPU, or the system, offers."""
    return int(mx.device_info().get("max_recommended_working_set_size", 0) or _system_memory()) * 4 // 5


def physical_memory() -> int:
    """Returns the bytes of memory that are built in."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _system_memory() -> int:
    """Returns what a system offers a program that has no GPU.

    Linux says what is free. macOS, which compresses the memory of others and takes it from caches, does not: there it
    is the share that it recommends for a GPU.
    """
    with contextlib.suppress(OSError, ValueError, StopIteration), open("/proc/meminfo") as file:
        return next(1024 * int(line.split()[1]) for line in file if line.startswith("MemAvailable"))
    return physical_memory() * 3 // 4


def weigh(
    sizes: configs.ModelSizes,
    layers: Mapping[str, Mapping[str, configs.Quantization | None]],
    stored: Mapping[str, str],
    dtype: mx.Dtype,
) -> WeightSizes:
    """Counts the bytes of a model's weights.

    Args:
        sizes: of the four networks.
        layers: of each component, how its layers are quantized (`NetworkFolder.layers`).
        stored: of each component, the type of its arrays that are not quantized, MLX's name.
        dtype: the compute type.
    """
    flux, clip, t5, vae = (
        _Scales(build(name, config, layers.get(name)), getattr(mx, stored[name]).size, dtype.size)
        for name, config in sizes.by_component().items()
    )
    blocks, modulation = flux.weigh_blocks(flux.network.blocks), flux.weigh_blocks(flux.network.modulated)
    t5_blocks = t5.weigh_blocks(t5.network.stages)
    return WeightSizes(
        blocks=blocks,
        modulation=modulation,
        t5=t5_blocks,
        rest=flux.all - sum(blocks.computed) - sum(modulation.computed),
        t5_rest=t5.all - sum(t5_blocks.computed),
        clip=clip.all,
        encoder=vae.weigh(vae.network.encoder),
        decoder=vae.weigh(vae.network.decoder),
    )


class _Scales:
    """Weighs the parameters of a network, as stored and in the compute type.

    Args:
        network: without weights.
        stored: bytes of a stored number that is not quantized.
        computed: bytes of a number in the compute type.
    """

    def __init__(self, network: Any, stored: int, computed: int):
        self.network, self._stored, self._computed = network, stored, computed
        self.all = self.weigh(network)

    def weigh(self, module: nn.Module) -> int:
        """Returns the bytes of a part of the network in the compute type."""
        return sum(self._bytes(array, self._computed) for array in parameters(module).values())

    def weigh_blocks(self, blocks: Sequence[Callable]) -> BlockSizes:
        """Returns the bytes of each block's matrices, those of `residency.matrices`."""
        stored, computed, cast, dense = zip(*(self._weigh_matrices(block) for block in blocks), strict=True)
        return BlockSizes(stored=stored, computed=computed, cast=max(cast), dense=max(dense))

    def _weigh_matrices(self, block: Callable) -> tuple[int, int, int, int]:
        module, names = matrices(block)
        everything, layers = parameters(module), dict(module.named_modules())
        arrays = [everything[name] for name in names]
        stored, computed = (
            sum(self._bytes(array, size) for array in arrays) for size in (self._stored, self._computed)
        )
        cast = computed - sum(array.nbytes for array in arrays if array.dtype in PACKED)
        owners = [layers[path] for path in {name.rpartition(".")[0] for name in names}]
        dense = [8 * layer.weight.nbytes // layer.bits for layer in owners if isinstance(layer, nn.QuantizedLinear)]
        return stored, computed, cast * (self._stored != self._computed), sum(dense) * self._computed

    @staticmethod
    def _bytes(array: mx.array, size: int) -> int:
        return array.nbytes if array.dtype in PACKED else array.size * size


def weigh_folder(folder: ModelFolder, dtype: mx.Dtype) -> WeightSizes:
    """Counts the bytes of the weights of a model folder."""
    layers = {name: network.layers() for name, network in folder.networks.items()}
    stored = {name: network.dtype for name, network in folder.networks.items()}
    return weigh(folder.sizes, layers, stored, dtype)


def style_needs(
    sizes: Mapping[str, Any],
    stored: str,
    dtype: mx.Dtype,
    *,
    images: int,
    tokens: int | None = None,
    pixels: int = 0,
    prompts: int = 1,
) -> StyleNeeds:
    """Counts what style images need.

    Args:
        sizes: of SigLIP and of Redux, by the names of their folders.
        stored: the type of their arrays, MLX's name.
        dtype: the compute type.
        images: number of style images.
        tokens: that stand beside those of each prompt; None: all of every image.
        pixels: of all style images.
        prompts: number of prompts.
    """
    encoder, embedder = (_Scales(build(name, one), getattr(mx, stored).size, dtype.size) for name, one in sizes.items())
    layers = encoder.weigh_blocks(encoder.network.layers)
    return StyleNeeds(
        encoder=encoder.network.config,
        embedder=embedder.network.config,
        layers=layers,
        rest=encoder.all - sum(layers.computed),
        last=embedder.all,
        images=images,
        pixels=pixels,
        tokens=images * encoder.network.config.positions if tokens is None else tokens,
        prompts=prompts,
    )


def map_needs(config: DepthConfig | None, width: int, height: int, device: str | None = None) -> int:
    """Returns the bytes of making the map of a photo.

    Args:
        config: of the depth network; None: edges are found, which takes none.
        width: of the picture, pixels.
        height: of the picture, pixels.
        device: "cpu" or "gpu"; None: the one in use.
    """
    if config is None:
        return _EDGES * width * height
    at_cpu = (device or mx.default_device().type.name) == "cpu"
    wide, high = input_size((width, height), config)
    tokens = wide * high // config.patch_size**2 + 1
    scores = config.num_attention_heads * tokens**2 * 4 * (3 if at_cpu else 1)
    head = wide * high * config.fusion_hidden_size * _HEAD["cpu" if at_cpu else "gpu"]
    return 4 * count_parameters("depth", config) + max(scores, head) + 4 * _COPIED * width * height


def make_plan(
    weights: WeightSizes,
    sizes: configs.ModelSizes,
    dtype: mx.Dtype,
    *,
    width: int,
    height: int,
    text_length: int,
    steps: int = 28,
    conditions: int = 1,
    images: InputNeeds | None = None,
    style: StyleNeeds | None = None,
    map_bytes: int = 0,
    references: Sequence[tuple[int, int]] = (),
    adapters: int = 0,
    cached: int = 0,
    filtered: bool = False,
    view: View | None = None,
    budget: int | None = None,
    speeds: Speeds | None = None,
    device: str | None = None,
) -> MemoryPlan:
    """Plans the memory of a run, with as many resident blocks as the budget allows, or as its machine needs.

    Args:
        weights: from `weigh`.
        sizes: of the four networks.
        dtype: the compute type.
        width: pixels.
        height: pixels.
        text_length: S, tokens of T5.
        steps: n.
        conditions: prompts and negative prompts of the run.
        images: that the run starts from or reads; None: there are none.
        references: width and height at which FLUX.1 Kontext reads each of its references.
        style: style images; None: there are none.
        map_bytes: from `map_needs`; 0: no map is made.
        adapters: bytes of their branches, which are in memory all the time.
        cached: bytes of the step cache.
        filtered: filters check the pictures.
        view: how the transformer sees a second pass; None: the whole.
        budget: bytes; None: as many as the machine offers.
        speeds: of the machine, where no more blocks need stay than its disk cannot hide; None: as many stay as fit.
        device: "cpu" or "gpu"; None: the one in use.

    Raises:
        ResourceError: not even the smallest plan fits.
    """
    budget, process = budget or machine_memory(), PROCESS + filtered * VOCABULARY
    arrays = budget - process  # bytes for these
    working = WorkingMemory(dtype, device or mx.default_device().type.name)
    flux, blocks = sizes.flux, weights.blocks
    more = style.tokens if style else 0
    areas = [width * height, *(wide * high for wide, high in references)]
    tokens = text_length + more + sum(areas) // (2 * sizes.vae.downsampling) ** 2
    if view:
        tokens = text_length + more + max(wide * high for wide, high in view.sizes) // 4
    always = weights.rest + modulation_bytes(flux, steps * conditions, dtype)  # from one picture to the next
    always += (images.held if images else 0) + adapters
    texts = conditions * text_length * flux.hidden_size * dtype.size
    if style:
        always += HELD * style.pixels + style.kept(dtype.size)
        texts += style.prompts * style.tokens * flux.hidden_size * dtype.size
    stages = {
        "text": weights.t5_rest
        + weights.clip
        + _slots(weights.t5.stored, weights.t5.cast)
        + working.dense(weights.t5.dense)
        + working.text(sizes.t5, text_length),
        **({"style": working.style(style)} if style else {}),
        **({"map": map_bytes} if map_bytes else {}),
        **({"image": weights.encoder + images.read} if images else {}),
        "modulation": _slots(weights.modulation.stored, weights.modulation.cast)
        + working.dense(weights.modulation.dense),
        "denoise": cached + texts + working.dense(blocks.dense) + working.block(flux, tokens),
        "decode": weights.decoder + (images.pasted if images else 0),
    }

    if dtype == mx.float16:  # a step that exceeds its range is repeated by another network, in bfloat16
        stages["denoise"] += weights.rest + _slots(blocks.stored, blocks.cast)

    flight = working.flight(flux, tokens, is_dense=blocks.dense > 0)
    least_denoise = always + stages["denoise"] + _slots(blocks.stored, blocks.cast)
    in_flight = is_in_flight() and least_denoise + flight <= arrays
    stages["denoise"] += in_flight * flight

    def needs_with(coder_memory: Callable[..., int]) -> dict[str, int]:
        coders = {"decode": coder_memory(sizes.vae, "decode", width=width, height=height)}
        largest = max([(width, height), *references], key=lambda size: size[0] * size[1])
        coders["image"] = coder_memory(sizes.vae, "image", width=largest[0], height=largest[1])
        return {stage: always + need + coders.get(stage, 0) for stage, need in stages.items()}

    strips, tiles = needs_with(working.strips), needs_with(working.tiles)
    countable = max(areas) / (width * height) * largest_array(sizes.vae, width=width, height=height) < INDEXABLE
    smaller = tiles if tiles["decode"] < strips["decode"] or not countable else strips
    tiled = smaller is tiles and (not countable or max(strips.values()) > arrays >= max(tiles.values()))
    needs = tiles if tiled else strips
    alone = smaller | {"denoise": smaller["denoise"] - in_flight * flight}
    least, most = _peaks(alone, blocks, set()), max(needs.values()) + sum(blocks.computed)
    if max(least.values()) > arrays:
        worst = max(least, key=lambda stage: least[stage])
        smaller_one = "input image or picture" if images else "picture"
        raise ResourceError(
            f"{width} x {height} needs {_size(process + least[worst])} of memory to {_VERBS[worst]}, "
            f"and {_size(budget)} may be used",
            todo=f"a smaller {smaller_one} needs less; `memory` sets the limit",
        )
    room = max(arrays - max(max(needs.values()), needs["denoise"] + _slots(blocks.stored, blocks.cast)), 0)
    if most <= arrays:
        room = sum(blocks.computed)
    places, hidden = resident_places(blocks.computed, room), None
    if speeds:
        beside = more + sum(areas[1:]) // (2 * sizes.vae.downsampling) ** 2
        seen = (width, height)
        if view and view.tile:  # blocks are streamed for each tile
            seen = view.tile[0] * sizes.vae.downsampling, view.tile[1] * sizes.vae.downsampling
        seconds = _block_seconds(flux, *seen, text_length + beside, speeds.peak)
        hidden = hidden_places(blocks.computed, room, blocks.stored, [HIDING * one for one in seconds], speeds.disk)
    if hidden is not None and len(hidden) < len(places):
        places, room = hidden, sum(blocks.computed[place] for place in hidden)
    return MemoryPlan(
        budget=budget,
        process=process,
        stages=_peaks(needs, blocks, places),
        resident_blocks=len(places),
        total_blocks=len(blocks.stored),
        resident_bytes=room,
        read_per_step=sum(size for place, size in enumerate(blocks.stored) if place not in places),
        hidden=places is hidden,
        least=process + max(least.values()),
        most=process + most,
        tiled=tiled,
        in_flight=in_flight,
        view=view,
    )


def _block_seconds(flux: configs.FluxConfig, width: int, height: int, beside: int, peak: float) -> list[float]:
    """Returns the least seconds that each block computes, with so many tokens beside those of the picture."""
    double, single = (
        step_flops(replace(flux, depth=depth, depth_single_blocks=1 - depth), width, height, beside) / peak
        for depth in (1, 0)
    )
    return [double] * flux.depth + [single] * flux.depth_single_blocks


def pass_flops(flux: configs.FluxConfig, view: View, text_length: int) -> float:
    """Counts the operations of a step of a second pass: of all tiles, or of the whole."""
    largest = max(view.sizes, key=lambda size: size[0] * size[1])
    return view.count * step_flops(flux, *largest, text_length, patch=2)


def choose_view(
    flux: configs.FluxConfig, whole: View, tiles: View, text_length: int, plan: Callable[[View], MemoryPlan]
) -> tuple[MemoryPlan, str]:
    """Returns the plan of a second pass, whole or in tiles, and why it is in tiles; "": it is whole.

    Args:
        flux: sizes of the transformer.
        whole: the latents, seen whole.
        tiles: the latents, seen in tiles.
        text_length: tokens.
        plan: of a view.

    Raises:
        ResourceError: neither fits.
    """
    if tiles.count > 1 and pass_flops(flux, tiles, text_length) < pass_flops(flux, whole, text_length):
        return plan(tiles), "they are faster"
    try:
        return plan(whole), ""
    except ResourceError:
        if tiles.count == 1:
            raise
        return plan(tiles), "memory is too little for the whole"


def modulation_bytes(flux: configs.FluxConfig, rows: int, dtype: mx.Dtype) -> int:
    """Returns the bytes of the modulations of so many rows: steps times conditions."""
    return rows * (12 * flux.depth + 3 * flux.depth_single_blocks + 2) * flux.hidden_size * dtype.size


def largest_array(vae: configs.VAEConfig, *, width: int, height: int) -> int:
    """Returns the number of elements of the largest array that decodes or encodes a picture in strips."""
    widths = [vae.ch * m for m in vae.ch_mult]
    arrays = zip([*widths[1:], widths[-1]], widths, strict=True)  # before and after the blocks of a resolution
    return max(width * height // 4**level * max(arriving, leaving) for level, (arriving, leaving) in enumerate(arrays))


_VERBS = {
    "text": "read the prompt",
    "style": "read the style images",
    "map": "make the map",
    "image": "read the image",
    "modulation": "prepare",
    "denoise": "denoise",
    "enlarge": "denoise the second pass",
    "decode": "decode",
}


def _peaks(needs: dict[str, int], blocks: BlockSizes, places: set[int]) -> dict[str, int]:
    """Returns the peak of each stage with these blocks resident."""
    resident = sum(blocks.computed[place] for place in places)
    slots = _slots([size for place, size in enumerate(blocks.stored) if place not in places], blocks.cast)
    return {name: need + resident + (slots if name == "denoise" else 0) for name, need in needs.items()}


def _slots(streamed: Sequence[int], cast: int) -> int:
    """Returns the bytes of the buffers for streamed blocks, and of the running block's copy in the compute type."""
    return min(SLOTS, len(streamed)) * max(streamed) + cast if streamed else 0


@dataclass(frozen=True)
class WorkingMemory:
    """Bytes that computing takes beside weights, in one compute type on one device ("cpu" or "gpu")."""

    dtype: mx.Dtype
    device: str

    def text(self, t5: configs.T5Config, length: int) -> int:
        """Returns the bytes of a block of T5."""
        scores = t5.num_heads * length**2 * self.dtype.size * (3 if self.device == "cpu" else 1)
        return scores + length * (4 * t5.d_ff * 4 + 4 * t5.d_model * self.dtype.size)

    def style(self, style: StyleNeeds) -> int:
        """Returns the bytes of SigLIP, layer by layer, and of Redux after it, with their weights."""
        encoder, count, size = style.encoder, style.encoder.positions, self.dtype.size
        scores = encoder.num_attention_heads * count**2 * size * (3 if self.device == "cpu" else 1)
        attention, mlp = scores + 5 * count * encoder.hidden_size * size, 4 * count * encoder.intermediate_size * 4
        last = 2 * count * 3 * style.embedder.txt_in_features * size
        weights = style.rest + style.last + _slots(style.layers.stored, style.layers.cast)
        return weights + max(attention, mlp, last) + _COPIED * style.pixels

    def dense(self, matrices: int) -> int:
        """Returns the bytes of dequantized weights at one time.

        On the CPU those are parts of the layers that read the same input, three of them at most.
        """
        size = self.dtype.size
        return min(matrices // size, 3 * CHUNK) * _DENSE[size] if self.device == "cpu" else matrices

    def block(self, flux: configs.FluxConfig, tokens: int) -> int:
        """Returns the bytes of a block of the transformer."""
        double, single = _BLOCK[self.device][self.dtype.size]
        wide = max(double, single) if flux.depth_single_blocks else double
        scores = flux.num_heads * tokens**2 * self.dtype.size if self.device == "cpu" else 0
        return wide * tokens * flux.hidden_size * self.dtype.size + scores

    def flight(self, flux: configs.FluxConfig, tokens: int, *, is_dense: bool) -> int:
        """Returns the bytes that the next block of the transformer takes beside one, since it starts before its end.

        On the CPU, where weights that are dequantized take most, they are free before it does.
        """
        if is_dense and self.device == "cpu":
            return 0
        return _IN_FLIGHT[self.device][self.dtype.size] * tokens * flux.hidden_size * self.dtype.size

    def strips(self, vae: configs.VAEConfig, coder: str, *, width: int, height: int) -> int:
        """Returns the bytes of a coder's largest residual block: input, intermediate arrays, output, some strips."""
        size, most = 4 if self.dtype.size == 4 else 2, 0
        widths = [vae.ch * m for m in vae.ch_mult]
        inputs = [*widths[1:], widths[-1]] if coder == "decode" else [vae.ch, *widths[:-1]]
        for level, (i, o) in enumerate(zip(inputs, widths, strict=True)):
            plane = width * height // 4**level
            strips = _STRIPS[self.device][size] * min(STRIP, plane * max(i, o))
            most = max(most, plane * (i + 2 * o) + strips)
        return most * size

    def tiles(self, vae: configs.VAEConfig, coder: str, *, width: int, height: int) -> int:
        """Returns the bytes of one tile, and of the picture in float32 before and after it is added."""
        side = SIDE * vae.downsampling
        tile = self.strips(vae, coder, width=min(width, side), height=min(height, side))
        return tile + 2 * 4 * vae.out_ch * width * height


def step_flops(
    flux: configs.FluxConfig, width: int, height: int, text_length: int, patch: int = 16, references: int = 0
) -> float:
    """Counts the operations of one step's products: linear layers and attention of all blocks.

    Args:
        flux: sizes of the transformer.
        width: of the picture, pixels.
        height: of the picture, pixels.
        text_length: tokens.
        patch: pixels along each side of a token.
        references: tokens of references.
    """
    tokens, c = text_length + width * height // patch**2 + references, flux.hidden_size
    double = 2 * tokens * (4 * c * c + 2 * c * flux.mlp_size)
    single = 2 * tokens * (c * (3 * c + flux.mlp_size) + (c + flux.mlp_size) * c)
    attention = 4 * tokens**2 * c
    return flux.depth * (double + attention) + flux.depth_single_blocks * (single + attention)
