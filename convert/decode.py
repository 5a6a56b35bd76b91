"""Decodes stored bytes: a row for every type in which files store weights. One tensor at a time, for every layout.

Types have the names of the headers of safetensors and GGUF. A weight that is stored in several tensors (codes and
scales) has a type of its own, made by `COMPOUNDS`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Protocol

import mlx.core as mx
import numpy as np

from mlx_flux_krea.errors import ModelError


@dataclass(frozen=True)
class Type:
    """A way to store numbers: the numbers and the bytes of a block."""

    numbers: int
    bytes: int
    decode: Callable[..., mx.array]  # (bytes as uint8, shape, *parts) to an array that holds every value exactly
    package: str | None = None  # that decoding needs


class Stored(Protocol):
    """Type and shape of a tensor, known before it is read."""

    dtype: str
    shape: tuple[int, ...]


Combined = tuple[str, tuple[int, ...]]  # type and shape of a weight that is stored in several tensors


def _plain(stored: type, view: mx.Dtype) -> Callable[..., mx.array]:
    return lambda data, shape: mx.array(data.view(stored).reshape(shape)).view(view)


def _fp8(data: np.ndarray, shape: tuple[int, ...]) -> mx.array:
    """Decodes e4m3; bfloat16 holds all its values."""
    return mx.from_fp8(mx.array(data.reshape(shape)), mx.bfloat16)


def _e5m2(data: np.ndarray, shape: tuple[int, ...]) -> mx.array:
    """Decodes e5m2, which is the upper byte of float16."""
    return mx.array((data.astype(np.uint16) << 8).view(np.float16).reshape(shape))


def _scaled_fp8(data: np.ndarray, shape: tuple[int, ...], scale: mx.array) -> mx.array:
    return _fp8(data, shape).astype(mx.float32) * scale.astype(mx.float32).reshape(())


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

        rows = data.reshape(*shape[:-1], -1)
        with np.errstate(all="ignore"):  # NaN and infinities among the scales are found by whoever takes the result
            return mx.array(gguf.dequantize(rows, gguf.GGMLQuantizationType[name]))

    return decode


# (numbers, bytes) of a block of ggml's types; below, their numbers in a file
_BLOCKS = {
    "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22), "Q5_1": (32, 24), "Q8_0": (32, 34),
    "Q2_K": (256, 84), "Q3_K": (256, 110), "Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210),
    "IQ4_NL": (32, 18), "IQ4_XS": (256, 136),
}  # fmt: skip
GGML = {
    0: "F32", 1: "F16", 30: "BF16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0",
    10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 20: "IQ4_NL", 23: "IQ4_XS",
}  # fmt: skip

_MODES = (("mxfp4", 32, 4), ("nvfp4", 16, 4))  # name, group size, bits

TYPES = {
    "F32": Type(1, 4, _plain(np.float32, mx.float32)),
    "F16": Type(1, 2, _plain(np.float16, mx.float16)),
    "BF16": Type(1, 2, _plain(np.uint16, mx.bfloat16)),
    "F8_E4M3": Type(1, 1, _fp8),
    "F8_E5M2": Type(1, 1, _e5m2),
    "scaled F8_E4M3": Type(1, 1, _scaled_fp8),
    **{name: Type(*block, _ggml(name), "gguf") for name, block in _BLOCKS.items()},
    **{f"{bits}-bit MLX": Type(32, 4 * bits, _affine) for bits in (2, 3, 4, 5, 6, 8)},
    **{f"{mode} MLX": Type(8, bits, _float_blocks(mode, group, bits)) for mode, group, bits in _MODES},
}
PARTS = {**TYPES, "U8": Type(1, 1, lambda data, shape: mx.array(data.reshape(shape)))}  # of scales


def _scaled(weight: Stored, scale: Stored, group: int) -> Combined | None:
    """Combines fp8 with one scale for the whole weight. Other kinds of fp8 have one for each row or block."""
    return ("scaled F8_E4M3", weight.shape) if scale.dtype in _FLOATS and scale.shape in ((), (1,)) else None


def _packed(weight: Stored, scales: Stored, biases: Stored, group: int) -> Combined | None:
    """Combines affine codes, scales and biases; bits follow from the shapes and the group size."""
    *rows, codes = weight.shape or (0,)
    *same, groups = scales.shape or (0,)
    bits, rest = divmod(32 * codes, group * groups) if groups else (0, 0)
    fits = rows and rows == same and scales.shape == biases.shape and not rest and group in (32, 64, 128)
    known = (name := f"{bits}-bit MLX") in TYPES and {scales.dtype, biases.dtype} <= _FLOATS
    return (name, (*rows, group * groups)) if fits and known else None


def _packed_floats(weight: Stored, scales: Stored, group: int) -> Combined | None:
    """Combines codes and scales of small floats; the mode follows from the number of codes for each scale."""
    *rows, codes = weight.shape or (0,)
    for mode, numbers, bits in _MODES:
        if rows and scales.dtype == "U8" and scales.shape == (*rows, 32 * codes // (bits * numbers)) and codes:
            return f"{mode} MLX", (*rows, 32 * codes // bits)
    return None


_FLOATS = {"F32", "F16", "BF16"}
# Weights in several tensors: (stored type of `L.weight`, names beside it, function that returns type and shape of the
# weight, or None if they do not belong together)
COMPOUNDS: tuple[tuple[str, tuple[str, ...], Callable[..., Combined | None]], ...] = (
    ("F8_E4M3", ("scale_weight",), _scaled),  # ComfyUI's first files
    ("F8_E4M3", ("weight_scale",), _scaled),  # ComfyUI's present files
    ("U32", ("scales", "biases"), _packed),
    ("U32", ("scales",), _packed_floats),
)
GROUP_SIZE = 64  # of MLX-quantized weights whose folder states none, as mflux writes them


def check(dtype: str, where: str) -> None:
    """Refuses a type that cannot be decoded, before anything is written.

    Args:
        dtype: type of a tensor.
        where: file and tensor, for errors.

    Raises:
        ModelError: naming the types that can be decoded, or the missing package.
    """
    if dtype not in TYPES:
        raise ModelError(f"{where} is stored as {dtype}", f"one of {', '.join(TYPES)}")
    package = TYPES[dtype].package
    if package and not find_spec(package):
        todo = f"pip install 'mlx-flux-krea[{package}]'"
        raise ModelError(f"{where} is stored as {dtype}", f"the package {package}, which decodes it", todo)


# bits by which a type tells values apart, for types whose size says something else
_TELLING = {"BF16": 15.0, "F8_E4M3": 5.8, "F8_E5M2": 4.8}  # float16 has more bits of precision than bfloat16


def precision(dtype: str) -> float:
    """Returns the bits by which a type tells values apart; 0 of one that cannot be decoded."""
    base = dtype.rpartition(" ")[2]
    if base in _TELLING:
        return _TELLING[base]
    return 8 * TYPES[dtype].bytes / TYPES[dtype].numbers if dtype in TYPES else 0.0
