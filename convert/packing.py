"""Layers that files keep packed in a way that MLX has too: their codes and scales go over unchanged.

    find(sources, op)         the quantization that MLX would call it; None: values have to be rounded anew
    packed(sources, op, data) the arrays of `Quantization.arrays`, in their order

Parts of a fused matrix stay packed too: nunchaku has two of them in each single block, with the same factors of inputs
where they have the same inputs.
"""

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np

from mlx_flux_krea.models.config import MODES, Quantization

from . import unpack
from .decode import BESIDE
from .maps import Columns, Rows
from .tensors import Data, Tensor, stored_bytes

Layer = dict[str, mx.array]  # by the names of `Quantization.arrays`
_CHUNK = 2**21  # codes that are unpacked at a time


def find(sources: Sequence[Tensor], op: type) -> Quantization | None:
    """Returns the quantization of stored weights, one or several that are parts of one, if MLX has it.

    Raises:
        ModelError: a file cannot be read.
    """
    kinds = [_of(source) for source in sources]
    first = kinds[0] if kinds else None
    if first is None or first.problem() or op not in (str, Rows, Columns):
        return None
    if len(kinds) == 1:
        return first if op is str else None
    if any(kind is None or replace(kind, rank=first.rank) != first for kind in kinds):
        return None
    is_svdq = all(source.dtype.startswith("svdq") for source in sources)
    if (op is Columns or first.intake) and not is_svdq:
        return None
    if op is Columns and not all(factor.numbers == 1 for source in sources for factor in source.parts[4:]):
        return None
    if op is Rows and first.intake and len({stored_bytes(source.parts[1]) for source in sources}) > 1:
        return None
    return replace(first, rank=sum(kind.rank for kind in kinds if kind))


def _of(tensor: Tensor) -> Quantization | None:
    """Returns the quantization of one stored weight; None: MLX has none like it."""
    kind, _, rest = tensor.dtype.partition(" ")
    if rest.startswith("MLX"):
        return _of_mlx(tensor, kind, BESIDE[rest.removeprefix("MLX").removeprefix(" with ")])
    if rest == "in tiles":
        return Quantization(MODES[kind][0][0], MODES[kind][1][0], kind, gain=len(tensor.parts) > 1)
    own = _NUNCHAKU.get(tensor.dtype)
    if own is None or not own.intake:
        return own
    rank = tensor.parts[3].shape[1]
    return replace(own, rank=rank) if rank else None


_NUNCHAKU = {
    "awq 3": Quantization(4, 64),
    "awq 6": Quantization(4, 64),
    "svdq int4": Quantization(4, 64, intake=True),
    "svdq fp4": Quantization(4, 16, "nvfp4", gain=True, intake=True),
}


def _of_mlx(tensor: Tensor, kind: str, more: tuple[str, ...]) -> Quantization:
    """Returns the quantization of a layer that MLX packed, with the arrays that it has beside."""
    if kind in MODES:
        (bits, *_), (size, *_) = MODES[kind]
        own = Quantization(bits, size, kind)
    else:
        own = Quantization(int(kind.removesuffix("-bit")), tensor.shape[-1] // tensor.parts[0].shape[-1])
    rank = tensor.parts[-1].shape[0] if "up" in more else 0
    return replace(own, gain="gain" in more, intake="intake" in more, rank=rank)


def packed(sources: Sequence[Tensor], op: type, data: Data) -> list[mx.array]:
    """Returns codes, scales and further arrays of a weight for which `find` has a quantization."""
    layers = [_layer(source, data) for source in sources]
    if len(layers) == 1:
        return list(layers[0].values())
    return list((_in_columns(layers) if op is Columns else _in_rows(layers)).values())


def _layer(tensor: Tensor, data: Data) -> Layer:
    """Returns the arrays of one stored weight."""
    kind, _, rest = tensor.dtype.partition(" ")
    stored, parts = data(tensor), [part.read(data) for part in tensor.parts]
    rows, width = tensor.shape
    if rest.startswith("MLX"):
        q = _of(tensor)
        assert q is not None
        return dict(zip(q.arrays, [mx.array(stored.view(np.uint32).reshape(rows, -1)), *parts], strict=True))
    if rest == "in tiles":
        codes = stored << 4 | stored >> 4 if kind == "nvfp4" else stored
        scales = mx.contiguous(parts[0][:rows, : width // MODES[kind][1][0]])
        own = {"weight": mx.array(codes.view(np.uint32).reshape(rows, -1)), "scales": scales}
        return own | ({"gain": _bits(unpack.product(tuple(parts[1:]), rows))} if parts[1:] else {})
    if kind == "awq":
        codes, scales, biases = unpack.modulation_codes(stored, tensor.shape, parts[0], parts[1], int(rest))
        return {"weight": _words(codes), "scales": scales, "biases": biases}
    return _svdq(rest, stored, tensor.shape, *parts)


def _svdq(kind: str, stored: np.ndarray, shape: tuple[int, ...], scales, smooth, down, up, *factors) -> Layer:
    """Returns the arrays of a layer of nunchaku's."""
    rows, width = shape
    own: Layer = {"weight": _svdq_words(stored, rows, width, flip=8 if kind == "int4" else 0)}
    if kind == "int4":  # two's complement: with the highest bit flipped, codes count from -8
        own["scales"] = unpack.vectors(scales, width // 64)
        own["biases"] = -8 * own["scales"]
    else:
        own["scales"] = unpack.in_small_tiles(scales, width // 16)
        own["gain"] = _bits(unpack.product(factors, rows))
    own["intake"] = _bits(1 / unpack.vectors(smooth).reshape(-1))
    return own | {"down": unpack.low_rank(down, is_down=True).T, "up": unpack.low_rank(up, is_down=False).T}


def _svdq_words(stored: np.ndarray, rows: int, width: int, flip: int) -> mx.array:
    """Returns the words of codes from nunchaku's tiles; some tiles at a time, since codes take 8 times their size."""
    step = max(1, _CHUNK // width // 128) * 128
    words = []
    for first in range(0, rows, step):
        count = min(step, rows - first)
        tiles = stored.reshape(rows, -1)[first : first + count]
        words.append(_words(unpack.codes(tiles, count, width) ^ flip))
        mx.eval(words[-1])
    return mx.concatenate(words)


def _in_rows(layers: list[Layer]) -> Layer:
    """Joins layers of the same inputs."""
    joined = {name: mx.concatenate([layer[name] for layer in layers]) for name in layers[0] if name in _BY_ROWS}
    if "intake" in layers[0]:
        joined |= {"intake": layers[0]["intake"]}
        joined |= {"down": mx.concatenate([layer["down"] for layer in layers], axis=1), "up": _diagonal(layers, "up")}
    return joined


_BY_ROWS = ("weight", "scales", "biases", "gain")


def _in_columns(layers: list[Layer]) -> Layer:
    """Joins layers whose results are added; each of their gains is one number, which may as well scale its inputs."""
    joined = {name: mx.concatenate([layer[name] for layer in layers], axis=1) for name in ("weight", "scales")}
    intakes = [layer["intake"].view(mx.float32) for layer in layers]
    if "biases" in layers[0]:
        joined["biases"] = mx.concatenate([layer["biases"] for layer in layers], axis=1)
    if "gain" in layers[0]:
        gains = [layer["gain"].view(mx.float32)[0] for layer in layers]
        intakes = [intake * (gain / gains[0]) for intake, gain in zip(intakes, gains, strict=True)]
        joined["gain"] = layers[0]["gain"]
    joined["intake"] = _bits(mx.concatenate(intakes))
    return joined | {"down": _diagonal(layers, "down"), "up": mx.concatenate([layer["up"] for layer in layers])}


def _diagonal(layers: list[Layer], name: str) -> mx.array:
    """Returns the block diagonal matrix of one factor of each layer."""
    factors = [layer[name] for layer in layers]
    ranks = [factor.shape[1] for factor in factors]
    rows = []
    for number, factor in enumerate(factors):
        before, after = sum(ranks[:number]), sum(ranks[number + 1 :])
        rows.append(mx.pad(factor, [(0, 0), (before, after)]))
    return mx.concatenate(rows)


def _words(codes: mx.array) -> mx.array:
    """Returns words of eight 4-bit codes, the first in the lowest bits."""
    eight = codes.reshape(codes.shape[0], -1, 8) << mx.arange(0, 32, 4, dtype=mx.uint32)
    return eight.sum(axis=-1).astype(mx.uint32)


def _bits(factors: mx.array) -> mx.array:
    """Returns factors as words with the bits of float32."""
    return mx.contiguous(factors.astype(mx.float32)).view(mx.uint32)
