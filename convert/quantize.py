"""Recipes as data: the bits of every group of layers. Quantizes tensors and measures their loss."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import mlx.core as mx
import numpy as np

from mlx_flux_krea.errors import UsageError
from mlx_flux_krea.models.config import MODES, Quantization
from mlx_flux_krea.models.layers import whole_weight
from mlx_flux_krea.weights import DTYPES, PACKED

from .remap import ComponentPlan, Target
from .tensors import Data

Layers = dict[str, Quantization | None]  # by path: how each quantizable layer is stored
ITEM_BYTES = {DTYPES[name]: getattr(mx, name).size for name in DTYPES} | {t: d.size for d, t in PACKED.items()}

# Groups of layers in recipes and reports: component, group, names of tensors. The first matching row counts.
GROUPS = (
    ("transformer", "modulation", "double_blocks.*_mod.lin.*"),
    ("transformer", "modulation", "single_blocks.*.modulation.lin.*"),
    ("transformer", "modulation", "final_layer.adaLN_modulation.*"),
    ("transformer", "double blocks, img_attn", "double_blocks.*.img_attn.*"),
    ("transformer", "double blocks, img_mlp", "double_blocks.*.img_mlp.*"),
    ("transformer", "double blocks, txt_attn", "double_blocks.*.txt_attn.*"),
    ("transformer", "double blocks, txt_mlp", "double_blocks.*.txt_mlp.*"),
    ("transformer", "single blocks, linear1", "single_blocks.*.linear1.*"),
    ("transformer", "single blocks, linear2", "single_blocks.*.linear2.*"),
    ("transformer", "single blocks, norms", "single_blocks.*.norm.*"),
    ("transformer", "final layer", "final_layer.*"),
    ("transformer", "embedders", "*"),
    ("text_encoder_2", "T5 attention", "encoder.block.*.SelfAttention.[qkvo].*"),
    ("text_encoder_2", "T5 feed-forward", "encoder.block.*.DenseReluDense.*"),
    ("text_encoder_2", "T5 embeddings and norms", "*"),
    ("text_encoder", "CLIP", "*"),
    ("vae", "VAE", "*"),
    ("nsfw", "classifier of pictures", "*"),
    ("pixtral", "decoder attention", "layers.*.attention.*"),
    ("pixtral", "decoder feed-forward", "layers.*.feed_forward.*"),
    ("pixtral", "decoder embeddings", "embed_tokens.*"),
    ("pixtral", "decoder head and norms", "[ln]*"),
    ("pixtral", "vision tower and projector", "*"),
    ("image_encoder", "SigLIP", "*"),
    ("image_embedder", "Redux", "*"),
    ("depth", "depth of pictures", "*"),
)
_BLOCKS = tuple(dict.fromkeys(group for _, group, _ in GROUPS if "blocks, " in group))
_T5 = ("T5 attention", "T5 feed-forward")
_DECODER = ("decoder attention", "decoder feed-forward")


def _recipe(blocks: Quantization, t5: Quantization, modulation: Quantization) -> dict[str, Quantization]:
    rest = dict.fromkeys(("modulation", "decoder embeddings"), modulation)
    return dict.fromkeys(_BLOCKS, blocks) | dict.fromkeys((*_T5, *_DECODER), t5) | rest


_AFFINE = {bits: Quantization(bits, 64) for bits in MODES["affine"][0]}
_MXFP4, _NVFP4 = Quantization(4, 32, "mxfp4"), Quantization(4, 16, "nvfp4")

# The values of `--quantize`: groups of layers that are quantized; all others are not. Modulation steers every layer
# and is read once a picture, so its bits cost only disk space. Embedders and the final layer are 0.4 % of the
# parameters. Few rows of Pixtral's embeddings are read, but in 16 bits the table would be larger than all other parts
# in memory.
RECIPES: dict[str, dict[str, Quantization]] = {
    "none": {},
    "8": _recipe(_AFFINE[8], _AFFINE[8], _AFFINE[8]),
    "6": _recipe(_AFFINE[6], _AFFINE[6], _AFFINE[8]),
    "5": _recipe(_AFFINE[5], _AFFINE[5], _AFFINE[8]),
    "4": _recipe(_AFFINE[4], _AFFINE[4], _AFFINE[8]),
    "3": _recipe(_AFFINE[3], _AFFINE[4], _AFFINE[8]),
    "mxfp4": _recipe(_MXFP4, _MXFP4, _AFFINE[8]),
    "nvfp4": _recipe(_NVFP4, _NVFP4, _AFFINE[8]),
}
GROUP_SIZE = 64
_ROWS = 256  # rows of a layer, evenly spread, whose error is measured: within 1 % of the error of all rows


@dataclass(frozen=True)
class QuantizationRecipe:
    """A row of `RECIPES`, with a group size."""

    quantize: str
    group_size: int = GROUP_SIZE

    def of(self, group: str) -> Quantization | None:
        """Returns how the layers of a group are quantized; None: they are not."""
        row = RECIPES[self.quantize].get(group)
        return Quantization(row.bits, self.group_size) if row and row.mode == "affine" else row


def find_recipe(quantize: str, group_size: int | None) -> QuantizationRecipe:
    """Returns the recipe of these options.

    Raises:
        UsageError: no such recipe or group size, or a recipe with fixed groups.
    """
    if quantize not in RECIPES:
        raise UsageError(f'no precision is called "{quantize}"', f"one of {', '.join(RECIPES)}")
    if group_size is None:
        return QuantizationRecipe(quantize)
    if not quantize.isdigit():
        why = "quantizes nothing" if quantize == "none" else f"has groups of {MODES[quantize][1][0]}"
        raise UsageError(f"a group size of {group_size}, and {quantize} {why}", "no group size", "leave it out")
    if group_size not in MODES["affine"][1]:
        raise UsageError(f"a group size of {group_size}", f"one of {', '.join(map(str, MODES['affine'][1]))}")
    return QuantizationRecipe(quantize, group_size)


def group_of(component: str, name: str) -> str:
    """Returns the group of a tensor, or of a layer by the name of its weight."""
    return next(group for c, group, names in GROUPS if c == component and fnmatchcase(name, names))


def choose(component: str, widths: dict[str, int], recipe: QuantizationRecipe) -> tuple[Layers, dict[str, str]]:
    """Chooses how each layer of a component is stored.

    Args:
        component: a key of `NETWORKS`.
        widths: length of a row of every quantizable layer.
        recipe: the recipe.

    Returns:
        The quantization of every layer, and the reasons for layers that the recipe cannot quantize.
    """
    layers = {path: recipe.of(group_of(component, f"{path}.weight")) for path in widths}
    left = {
        path: f"its rows of {widths[path]} are no multiple of {q.group_size}"
        for path, q in layers.items()
        if q and widths[path] % q.group_size
    }
    return layers | dict.fromkeys(left), left


def keep_packed(plan: ComponentPlan, layers: Layers, always: bool) -> Layers:
    """Keeps the packing of source layers with as many bits or fewer, since more bits would restore nothing.

    Args:
        plan: its targets.
        layers: as the recipe has them.
        always: also where the recipe has the same packing with more bits, or none.
    """
    packed = {t.name.removesuffix(".weight"): t.q for t in plan.targets if t.q and (always or not t.is_ours)}
    if not always:
        packed = {path: q for path, q in packed.items() if layers.get(path)}
    return {path: packed[path] if has_fewer_bits(packed.get(path), q) else q for path, q in layers.items()}


def has_fewer_bits(one: Quantization | None, other: Quantization | None) -> bool:
    """Compares bits: True if the first has as many as the second or fewer; None stands for all bits."""
    return one is not None and (other is None or one.bits <= other.bits)


def layer_of(target: Target, layers: Layers) -> Quantization | None:
    """Returns the quantization of a tensor: that of its layer, if it is a layer's weight."""
    return layers.get(target.name.removesuffix(".weight")) if target.name.endswith(".weight") else None


def stored(target: Target, dtype: str, q: Quantization | None) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Lists the arrays that store a tensor of ours in a file.

    Args:
        target: the tensor.
        dtype: type of arrays that are not packed.
        q: its quantization.

    Returns:
        Types in safetensors' spelling and shapes by name, in their order.
    """
    if q is None:
        return {target.name: (DTYPES[dtype], target.shape)}
    (rows, width), path = target.shape, target.name.removesuffix("weight")
    scales = (DTYPES[dtype] if q.mode == "affine" else PACKED[mx.uint8], (rows, width // q.group_size))
    kinds = {
        "weight": (PACKED[mx.uint32], (rows, width * q.bits // 32)),
        "scales": scales,
        "biases": scales,
        "gain": (PACKED[mx.uint32], (rows,)),
        "intake": (PACKED[mx.uint32], (width,)),
        "down": (DTYPES[dtype], (width, q.rank)),
        "up": (DTYPES[dtype], (q.rank, rows)),
    }
    return {f"{path}{name}": kinds[name] for name in q.arrays}


def count_bytes(target: Target, dtype: str, q: Quantization | None) -> int:
    """Returns the bytes of a tensor of ours in a file."""
    return sum(math.prod(shape) * ITEM_BYTES[kind] for kind, shape in stored(target, dtype, q).values())


@dataclass(frozen=True)
class StoredChunk:
    """A chunk of a tensor in its stored form, perhaps still being computed.

    Attributes:
        target: the tensor.
        chunk: the chunk of it.
        sources: the source in its stored type; of a packed source, its parts.
        checked: arrays that must be finite, in the folder's type.
        parts: the arrays of `stored`.
        loss: (2,) sums of the squares of error and values; None: not quantized.
    """

    target: Target
    chunk: Target
    sources: tuple[mx.array, ...]
    checked: tuple[mx.array, ...]
    parts: tuple[mx.array, ...]
    loss: mx.array | None = None

    def problem(self, dtype: str) -> str | None:
        """Describes values that are not finite; None: all are."""
        if all(map(_is_finite, self.checked)):
            return None
        is_finite = all(mx.isfinite(source).all().item() for source in self.sources)
        return f"values too large for {dtype}" if is_finite else "NaN or infinities"


def make(target: Target, chunk: Target, dtype: str, q: Quantization | None, data: Data, stream) -> StoredChunk:
    """Reads a chunk of a tensor and starts to compute its stored form; reading a part of the result waits for it.

    Args:
        target: the tensor.
        chunk: the chunk of it.
        dtype: type of arrays that are not packed.
        q: its quantization.
        data: reads a tensor's bytes.
        stream: computes the stored form. The loss is computed in another stream, when it is read: MLX queues few
            operations in all its streams, and would not start the next chunk before.
    """
    kind, step, loss = getattr(mx, dtype), max(1, target.shape[0] // _ROWS), None
    is_packed = q is not None and q == chunk.q
    with mx.stream(stream):
        if q and is_packed:  # the source has this packing: rounding once is enough
            sources = chunk.packed(data)
            parts = tuple(mx.contiguous(part if part.dtype in PACKED else part.astype(kind)) for part in sources)
            checked = tuple(_numbers(parts, q))
        else:
            sources = (chunk.make(data),)
            array = mx.contiguous(sources[0].astype(kind))
            parts = checked = (array,)
            if q:
                parts = tuple(mx.quantize(array, **q.packing))
        mx.async_eval(*checked, *parts)
    if q:
        some = _dequantized_rows(sources, q, step) if is_packed else sources[0][::step].astype(mx.float32)
        error = _dequantized_rows(parts, q, step) - some
        loss = mx.stack([mx.square(error).sum(), mx.square(some).sum()]) * (chunk.shape[0] / len(some))
    return StoredChunk(target, chunk, tuple(sources), checked, parts, loss)


def _numbers(parts: Sequence[mx.array], q: Quantization) -> Iterator[mx.array]:
    """Yields the parts of a layer whose packing is kept as numbers, for the check that they are finite."""
    arrays = dict(zip(q.arrays, parts, strict=True))
    if q.mode != "affine":  # codes and scales have NaN of their own
        yield mx.dequantize(arrays["weight"], arrays["scales"], **q.packing, dtype=mx.bfloat16)
    for name, part in arrays.items():
        if name in ("gain", "intake"):
            yield part.view(mx.float32)
        elif part.dtype not in PACKED:
            yield part


def _dequantized_rows(parts: Sequence[mx.array], q: Quantization, step: int) -> mx.array:
    """Returns every `step`th row of a packed layer, in float32."""
    arrays = dict(zip(q.arrays, parts, strict=True))
    rows = {name: arrays[name][::step] for name in ("weight", "scales", "biases", "gain") if name in arrays}
    return dequantize(arrays | rows | ({"up": arrays["up"][:, ::step]} if "up" in arrays else {}), q)


def dequantize(arrays: Mapping[str, mx.array], q: Quantization) -> mx.array:
    """Returns the float32 values of a packed layer, from its arrays by name."""
    parts = {name: part if part.dtype in PACKED else part.astype(mx.float32) for name, part in arrays.items()}
    product = mx.dequantize(parts["weight"], parts["scales"], parts.get("biases"), **q.packing, dtype=mx.float32)
    return whole_weight(product, parts)


def _is_finite(array: mx.array) -> bool:
    """Compares the bits as integers: signed ones have the largest positive number first, unsigned ones the negative.

    Many times faster than `mx.isfinite` on a CPU.
    """
    kind, limit = _EXPONENTS[array.dtype]
    bits = np.asarray(array.reshape(-1).view(kind))
    sign = 1 << (8 * bits.itemsize - 1)
    return int(bits.view(f"i{bits.itemsize}").max()) < limit and int(bits.max()) < limit | sign


# NaN and infinities: integers of the positive ones are at least these, with all bits of the exponent set
_EXPONENTS = {
    mx.bfloat16: (mx.uint16, 0x7F80),
    mx.float16: (mx.uint16, 0x7C00),
    mx.float32: (mx.uint32, 0x7F800000),
}
