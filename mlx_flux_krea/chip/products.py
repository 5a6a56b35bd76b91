"""Products of matrices at FLUX.1's shapes, dense and quantized, against float32 on sampled rows, and their speed.

The last two shapes lie on the path of an earlier fault of MLX on an M5 (ml-explore/mlx#3797: products in bfloat16 with
at least 10240 inputs, and three times as many as rows or outputs, gave other numbers, silently).
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from ..commands.shared.estimates import this_chip
from ..presets import CHIPS
from .check import CheckResult, Setting, as_numpy, distance, is_gpu, judged, normal

# Rows, inputs and outputs: linear1 and linear2 of a single block, the second layer of a double block's MLP.
SHAPES = ((4608, 3072, 21504), (4608, 15360, 3072), (4096, 12288, 3072))
FEW = 28  # rows of a modulation: one of each step
_SAMPLED = 16  # rows that are compared
# Distance from float32. Rounding a result to bfloat16 gives 0.0017 and to float16 0.0002; the quantized kernels round
# their dequantized weights too. TF32 would give 0.0003 in float32.
BOUNDS = {"float32": 1e-5, "bfloat16": 0.004, "float16": 0.001}
QUANTIZED_BOUNDS = {"bfloat16": 0.008, "float16": 0.0015}
# Ways to quantize, as arguments of MLX.
QUANTIZED: dict[str, dict[str, Any]] = {
    "8 bits": {"group_size": 64, "bits": 8, "mode": "affine"},
    "4 bits": {"group_size": 64, "bits": 4, "mode": "affine"},
    "mxfp4": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    "nvfp4": {"group_size": 16, "bits": 4, "mode": "nvfp4"},
}

Product = Callable[[mx.array], mx.array]


def dense(dtype: str, setting: Setting) -> CheckResult:
    """Checks dense products in a type."""

    def make(weight: mx.array) -> tuple[np.ndarray, dict[str, Product]]:
        return as_numpy(weight), {"dense": lambda x: mx.matmul(x, weight.T)}

    return _check(dtype, make, BOUNDS[dtype], setting)


def quantized(name: str, dtype: str, setting: Setting) -> CheckResult:
    """Checks the product with a matrix of one row of `QUANTIZED`, in both of the ways that layers choose from.

    On a CPU only the one is checked that layers choose there: MLX's quantized product sums in 16 bits on it, with an
    error of several percent.
    """

    how = QUANTIZED[name]

    def make(weight: mx.array) -> tuple[np.ndarray, dict[str, Product]]:
        packed = mx.quantize(weight, **how)
        mx.eval(packed)
        ways: dict[str, Product] = {
            "dequantized": lambda x: mx.matmul(x, _dequantized(packed, how, x.dtype).T),
        }
        if is_gpu():
            ways["quantized"] = lambda x: mx.quantized_matmul(x, *packed, transpose=True, **how)
        return unpacked(packed, how), ways

    return _check(dtype, make, QUANTIZED_BOUNDS[dtype], setting)


def unpacked(packed: Sequence[mx.array], how: Mapping[str, Any]) -> np.ndarray:
    """Returns a quantized matrix in float32, without MLX's kernels.

    Args:
        packed: (out, in bits / 32) uint32, and scales (out, in / group) with, in mode affine, biases of that shape.
        how: a row of `QUANTIZED`.
    """
    numbers = np.array(packed[0]).view(np.uint8)
    if how["bits"] == 4:
        numbers = np.stack([numbers & 15, numbers >> 4], axis=-1)
    rows, groups = packed[1].shape
    numbers = numbers.reshape(rows, groups, how["group_size"])
    if how["mode"] == "affine":
        scales, biases = (as_numpy(array)[..., None] for array in packed[1:])
        return (numbers * scales + biases).reshape(rows, -1)
    scales = _SCALES[how["mode"]](np.array(packed[1]).astype(np.int32))[..., None]
    return (_E2M1[numbers] * scales).reshape(rows, -1).astype(np.float32)


def _e4m3(codes: np.ndarray) -> np.ndarray:
    """Returns the positive numbers of fp8 codes: 4 bits of exponent, 3 of mantissa."""
    exponents, mantissas = codes >> 3 & 15, codes & 7
    return np.where(exponents > 0, (8 + mantissas) * 2.0 ** (exponents - 10), mantissas * 2.0**-9).astype(np.float32)


# Numbers of 4 bits, 2 of exponent and 1 of mantissa, and the scales of their modes (OCP MX 1.0, and NVIDIA's nvfp4).
_E2M1 = np.array([sign * one for sign in (1, -1) for one in (0, 0.5, 1, 1.5, 2, 3, 4, 6)], np.float32)
_SCALES = {"mxfp4": lambda codes: (2.0 ** (codes - 127)).astype(np.float32), "nvfp4": _e4m3}


def _dequantized(packed: Sequence[mx.array], how: Mapping[str, Any], dtype: mx.Dtype) -> mx.array:
    weight, scales, *rest = packed
    return mx.dequantize(weight, scales, rest[0] if rest else None, **how, dtype=dtype)


def _check(
    dtype: str, make: Callable[[mx.array], tuple[np.ndarray, dict[str, Product]]], bound: float, setting: Setting
) -> CheckResult:
    """Measures the products of all shapes in each way.

    Args:
        dtype: MLX's name of the type.
        make: from a matrix (out, in) to the same in float32 and the ways to multiply by it.
        bound: of the distance from float32.
        setting: divides the shapes.
    """
    worst, rates = 0.0, []
    for rows, inputs, outputs in (tuple(side // setting.divisor for side in shape) for shape in SHAPES):
        x, weight = (
            normal(shape, getattr(mx, dtype), i) for i, shape in enumerate(((rows, inputs), (outputs, inputs)))
        )
        exact, ways = make(weight)
        for way, multiply in ways.items():
            for count in (FEW, rows):
                error, seconds = _measure(multiply, x[:count], exact)
                worst = max(worst, error)
            rates.append((way, 2 * rows * inputs * outputs / seconds / 1e12))
    return judged(worst, bound, f"; {'; '.join(_speeds(rates))}", tflops=dict(_grouped(rates)))


def _measure(multiply: Product, x: mx.array, exact: np.ndarray) -> tuple[float, float]:
    """Returns the distance of sampled rows from float32, and the seconds of the product."""
    sampled = np.unique(np.linspace(0, len(x) - 1, _SAMPLED).astype(int))
    y = multiply(x)
    error = distance(as_numpy(y[mx.array(sampled)]), as_numpy(x[mx.array(sampled)]) @ exact.T)
    del y
    start = time.perf_counter()  # after the first, which compiles the kernel
    mx.eval(multiply(x))
    return error, time.perf_counter() - start


def _grouped(rates: list[tuple[str, float]]) -> Iterator[tuple[str, list[float]]]:
    for name in dict(rates):
        yield name, [rate for way, rate in rates if way == name]


def _speeds(rates: list[tuple[str, float]]) -> Iterator[str]:
    """Formats the speeds of each way, with their shares of the chip's peak where that is known."""
    chip = this_chip() if is_gpu() else None
    for way, each in _grouped(rates):
        shares = f" ({', '.join(f'{rate / CHIPS[chip]:.0%}' for rate in each)} of peak)" if chip else ""
        yield f"{way} {', '.join(f'{rate:.3g}' for rate in each)} TFLOP/s{shares}"
