"""Decodes stored bytes: a row for every type in which files store weights. One tensor at a time, for every layout.

Types have the names of the headers of safetensors and GGUF. A weight that is stored in several tensors (codes and
scales) has a type of its own, made by `formats.COMPOUNDS`.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec

import mlx.core as mx
import numpy as np

from mlx_flux_krea.errors import ModelError
from mlx_flux_krea.models.layers import whole_weight

from . import exponents, unpack


@dataclass(frozen=True)
class Type:
    """A way to store numbers: the numbers and the bytes of a block."""

    numbers: int
    bytes: int
    decode: Callable[..., mx.array]  # (bytes as uint8, shape, *parts) to an array that holds every value exactly
    package: str | None = None  # that decoding needs
    rows: int = 1  # that stay together where a tensor is cut; 0: all


def _plain(stored: type, view: mx.Dtype) -> Callable[..., mx.array]:
    return lambda data, shape: mx.array(data.view(stored).reshape(shape)).view(view)


def _fp8(data: np.ndarray, shape: tuple[int, ...]) -> mx.array:
    """Decodes e4m3; bfloat16 holds all its values."""
    return mx.from_fp8(mx.array(data.reshape(shape)), mx.bfloat16)


def _e5m2(data: np.ndarray, shape: tuple[int, ...]) -> mx.array:
    """Decodes e5m2, which is the upper byte of float16."""
    return mx.array((data.astype(np.uint16) << 8).view(np.float16).reshape(shape))


def _int8(data: np.ndarray, shape: tuple[int, ...]) -> mx.array:
    return mx.array(data.view(np.int8).reshape(shape)).astype(mx.float32)


def _scaled(base: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """Returns the decoder of numbers with one scale, or one for each row."""

    def decode(data: np.ndarray, shape: tuple[int, ...], scale: mx.array) -> mx.array:
        scale = scale.astype(mx.float32).reshape(() if scale.size == 1 else (-1, *(1,) * (len(shape) - 1)))
        return base(data, shape).astype(mx.float32) * scale

    return decode


@functools.cache
def hadamard(size: int) -> mx.array:
    """Returns the regular Hadamard matrix of ones and minus ones: symmetric, and its own inverse times its size."""
    four = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]], np.float32)
    whole = np.ones((1, 1), np.float32)
    while len(whole) < size:
        whole = np.kron(whole, four)
    return mx.array(whole)


def _rotated(size: int) -> Callable[..., mx.array]:
    """Returns the decoder of int8 whose rows were rotated in groups before they were rounded (ConvRot).

    Sums are of integers, and so exact.
    """

    def decode(data: np.ndarray, shape: tuple[int, ...], scale: mx.array) -> mx.array:
        sums = (_int8(data, shape).reshape(shape[0], -1, size) @ hadamard(size)).reshape(shape)
        return sums * (scale.astype(mx.float32).reshape(-1, 1) / float(size**0.5))

    return decode


def _with_more(decode: Callable[..., mx.array], names: tuple[str, ...]) -> Callable[..., mx.array]:
    """Returns the decoder of a layer with further arrays."""

    def whole(data: np.ndarray, shape: tuple[int, ...], *parts: mx.array) -> mx.array:
        own, more = parts[: -len(names)], parts[-len(names) :]
        return whole_weight(decode(data, shape, *own), dict(zip(names, more, strict=True)))

    return whole


def _after(read: Callable[..., mx.array], function: Callable[..., mx.array]) -> Callable[..., mx.array]:
    """Returns the decoder that applies a function to plain numbers, and to the parts beside them."""
    return lambda data, shape, *parts: function(read(data, shape), *parts)


# --- blocks of small floats with scales in tiles: a tile of 128 rows x 4 columns is stored as 32 x (4 x 4) ---

TILES, TILE_ROWS = "tiles", 128
WHOLE = "whole"  # before the type of a part that is not cut with the rows of a weight


def _tiles(data: np.ndarray, shape: tuple[int, ...]) -> mx.array:
    """Returns scales in their rows and columns, still padded to whole tiles."""
    rows, columns = shape
    tiles = mx.array(data).reshape(rows // TILE_ROWS, columns // 4, 32, 4, 4)
    return tiles.transpose(0, 3, 2, 1, 4).reshape(rows, columns)


_ONE = 0x38  # 1.0 in e4m3
_EXPONENTS = np.array([2.0 ** (n - 127) for n in range(255)] + [np.nan], np.float32)  # of e8m0


def _nvfp4_tiles(data: np.ndarray, shape: tuple[int, ...], scales: mx.array, whole: mx.array) -> mx.array:
    """Decodes e2m1, the first number in the upper half of a byte, times a scale in e4m3 times one of the whole."""
    rows, groups = shape[0], shape[1] // 16
    codes = mx.array((data << 4 | data >> 4).view(np.uint32).reshape(rows, -1))
    ones = mx.full((rows, groups), _ONE, mx.uint8)
    values = mx.dequantize(codes, ones, group_size=16, bits=4, mode="nvfp4", dtype=mx.float32)
    scale = mx.from_fp8(scales[:rows, :groups], mx.float32) * whole.astype(mx.float32).reshape(())
    return (values.reshape(rows, groups, 16) * scale[..., None]).reshape(shape)


def _mxfp8_tiles(data: np.ndarray, shape: tuple[int, ...], scales: mx.array) -> mx.array:
    """Decodes e4m3 times a power of two."""
    rows, groups = shape[0], shape[1] // 32
    values = mx.from_fp8(mx.array(data.reshape(rows, groups, 32)), mx.float32)
    return (values * mx.array(_EXPONENTS)[scales[:rows, :groups]][..., None]).reshape(shape)


def _affine(data: np.ndarray, shape: tuple[int, ...], scales: mx.array, biases: mx.array) -> mx.array:
    """Decodes MLX's affine codes, scale * code + bias, in float32, so that values are rounded only once."""
    codes = mx.array(data.view(np.uint32).reshape(*shape[:-1], -1))
    group, bits = shape[-1] // scales.shape[-1], 32 * codes.shape[-1] // shape[-1]
    scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
    return mx.dequantize(codes, scales, biases, group_size=group, bits=bits)


def _float_blocks(mode: str, group: int, bits: int) -> Callable[..., mx.array]:
    """Returns the decoder of MLX's blocks of small floats, without biases."""

    def decode(data: np.ndarray, shape: tuple[int, ...], scales: mx.array) -> mx.array:
        codes = mx.array(data.view(np.uint32).reshape(*shape[:-1], -1))
        return mx.dequantize(codes, scales, group_size=group, bits=bits, mode=mode, dtype=mx.float32)

    return decode


def _ggml(name: str) -> Callable[..., mx.array]:
    def decode(data: np.ndarray, shape: tuple[int, ...]) -> mx.array:
        import gguf

        blocks = data.reshape(-1, _BLOCKS[name][1])  # of the numbers in their order: rows may begin inside one
        with np.errstate(all="ignore"):  # NaN and infinities among the scales are found by whoever takes the result
            return mx.array(gguf.dequantize(blocks, gguf.GGMLQuantizationType[name]).reshape(shape))

    return decode


# (numbers, bytes) of a block of ggml's types; below, their numbers in a file
_BLOCKS = {
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34),
    "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
    "IQ1_S": (256, 50), "IQ1_M": (256, 56), "IQ2_XXS": (256, 66), "IQ2_XS": (256, 74), "IQ2_S": (256, 82),
    "IQ3_XXS": (256, 98), "IQ3_S": (256, 110), "IQ4_NL": (32, 18), "IQ4_XS": (256, 136),
    "TQ1_0": (256, 54), "TQ2_0": (256, 66), "MXFP4": (32, 17), "NVFP4": (64, 36),
}  # fmt: skip
GGML = {
    0: "F32", 1: "F16", 30: "BF16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0",
    10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS",
    19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0",
    39: "MXFP4", 40: "NVFP4",
}  # fmt: skip

FLOAT_MODES = (("mxfp4", 32, 4), ("nvfp4", 16, 4), ("mxfp8", 32, 8))  # name, group size, bits

ROTATIONS = (16, 64, 256, 1024)  # sizes of groups: powers of 4

TYPES = {
    "F32": Type(1, 4, _plain(np.float32, mx.float32)),
    "F16": Type(1, 2, _plain(np.float16, mx.float16)),
    "BF16": Type(1, 2, _plain(np.uint16, mx.bfloat16)),
    "F8_E4M3": Type(1, 1, _fp8),
    "F8_E5M2": Type(1, 1, _e5m2),
    **{name: Type(*block, _ggml(name), "gguf") for name, block in _BLOCKS.items()},
    **{f"{bits}-bit MLX": Type(32, 4 * bits, _affine) for bits in (2, 3, 4, 5, 6, 8)},
    **{f"{mode} MLX": Type(8, bits, _float_blocks(mode, group, bits)) for mode, group, bits in FLOAT_MODES},
    "nvfp4 in tiles": Type(2, 1, _nvfp4_tiles, rows=TILE_ROWS),
    "mxfp8 in tiles": Type(1, 1, _mxfp8_tiles, rows=TILE_ROWS),
    **{f"I8 rotated by {size}": Type(1, 1, _rotated(size)) for size in ROTATIONS},
}
_PLAIN = ("F8_E4M3", "F8_E5M2", "BF16", "F16", "F32")
TYPES |= {f"scaled {name}": Type(1, TYPES[name].bytes, _scaled(TYPES[name].decode)) for name in _PLAIN}
TYPES["scaled I8"] = Type(1, 1, _scaled(_int8))
# arrays that a layer of a folder of ours may have beside codes, scales and biases, by the end of the type's name
_BRANCH = ("down", "up")
BESIDE = {
    " ".join((*gain, *intake, *branch)): (*gain, *intake, *branch)
    for gain in ((), ("gain",))
    for intake in ((), ("intake",))
    for branch in ((), _BRANCH)
}
_PACKED = [name for name in TYPES if name.endswith(" MLX")]
TYPES |= {
    f"{name} with {end}": replace(TYPES[name], decode=_with_more(TYPES[name].decode, names), rows=int(end == "gain"))
    for name in _PACKED
    for end, names in BESIDE.items()
    if names
}
TYPES |= {f"svdq {kind}": Type(2, 1, unpack.weight(kind), rows=TILE_ROWS) for kind in ("int4", "fp4")}
TYPES |= {f"awq {parts}": Type(2, 1, unpack.modulation(parts), rows=0) for parts in (3, 6)}
for _name in ("BF16", "F16", "F32"):
    _read, _size = TYPES[_name].decode, TYPES[_name].bytes
    TYPES[f"svdq bias {_name}"] = Type(1, _size, _after(_read, unpack.bias), rows=TILE_ROWS)
    for _parts in (3, 6):
        _bias = functools.partial(unpack.modulation_bias, parts=_parts)
        TYPES[f"awq bias {_parts} {_name}"] = Type(1, _size, _after(_read, _bias), rows=0)
# types of parts that are no weights by themselves
PARTS = {**TYPES, "U8": Type(1, 1, lambda data, shape: mx.array(data.reshape(shape))), TILES: Type(1, 1, _tiles)}
TYPES["DFloat11"] = Type(1, 1, exponents.decode, rows=0)
PARTS |= {"DFloat11": TYPES["DFloat11"], f"{WHOLE} U8": PARTS["U8"]}
PARTS["count"] = Type(1, 0, lambda data, shape: mx.array(shape[0]))  # a number that its shape tells
PARTS["U32"] = Type(1, 4, lambda data, shape: mx.array(data.view(np.uint32).reshape(shape)))
PARTS |= {f"{WHOLE} {name}": TYPES[name] for name in _PLAIN} | {"svdq shift": Type(2, 1, unpack.shift)}


def check(dtype: str, where: str) -> None:
    """Refuses a type that cannot be decoded, before anything is written.

    Args:
        dtype: type of a tensor.
        where: file and tensor, for errors.

    Raises:
        ModelError: naming the types that can be decoded, or the missing package.
    """
    if dtype not in TYPES:
        known = dict.fromkeys(in_words(name).partition(" with ")[0] for name in TYPES)
        raise ModelError(f"{where} is stored as {dtype}", f"one of {', '.join(known)}")
    package = TYPES[dtype].package
    if package and not find_spec(package):
        todo = f"pip install 'mlx-flux-krea[{package}]'"
        raise ModelError(f"{where} is stored as {dtype}", f"the package {package}, which decodes it", todo)


def in_words(dtype: str) -> str:
    """Returns the name of a type for people: nunchaku's without the places of its numbers."""
    if " bias " in dtype:
        return dtype.rpartition(" ")[2]
    return "awq" if dtype.startswith("awq") else dtype


# bits by which a type tells values apart, for types whose size says something else
_TELLING = {
    "BF16": 15.0,
    "DFloat11": 15.0,
    "F8_E4M3": 5.8,
    "F8_E5M2": 4.8,
}  # float16 has more bits of precision than bfloat16


def precision(dtype: str) -> float:
    """Returns the bits by which a type tells values apart; 0 of one that cannot be decoded."""
    base = dtype.rpartition(" ")[2]
    if base in _TELLING:
        return _TELLING[base]
    return 8 * TYPES[dtype].bytes / TYPES[dtype].numbers if dtype in TYPES else 0.0
