"""Products of matrices at FLUX.1's shapes, dense and quantized, against float32 on sampled rows, and their speed.

The last two shapes lie on the path of an earlier fault of MLX on an M5 (ml-explore/mlx#3797: products in bfloat16 with
at least 10240 inputs, and three times as many as rows or outputs, gave other numbers, silently).
"""

import time
from collections.abc import Callable, Iterator

import mlx.core as mx
import numpy as np

from ..commands.shared.estimates import this_chip
from ..presets import CHIPS
from .check import GROUP, CheckResult, Setting, as_numpy, distance, is_gpu, judged, normal

# Rows, inputs and outputs: linear1 and linear2 of a single block, the second layer of a double block's MLP.
SHAPES = ((4608, 3072, 21504), (4608, 15360, 3072), (4096, 12288, 3072))
FEW = 28  # rows of a modulation: one of each step
_SAMPLED = 16  # rows that are compared
# Distance from float32. Rounding a result to bfloat16 gives 0.0017 and to float16 0.0002; the quantized kernels round
# their dequantized weights too. TF32 would give 0.0003 in float32.
BOUNDS = {"float32": 1e-5, "bfloat16": 0.004, "float16": 0.001}
QUANTIZED_BOUNDS = {"bfloat16": 0.008, "float16": 0.0015}

Product = Callable[[mx.array], mx.array]


def dense(dtype: str, setting: Setting) -> CheckResult:
    """Checks dense products in a type."""

    def make(weight: mx.array) -> tuple[np.ndarray, dict[str, Product]]:
        return as_numpy(weight), {"dense": lambda x: mx.matmul(x, weight.T)}

    return _check(dtype, make, BOUNDS[dtype], setting)


def quantized(bits: int, dtype: str, setting: Setting) -> CheckResult:
    """Checks the product with a quantized matrix, in both of the ways that layers choose from.

    On a CPU only the one is checked that layers choose there: MLX's quantized product sums in 16 bits on it, with an
    error of several percent.
    """

    def make(weight: mx.array) -> tuple[np.ndarray, dict[str, Product]]:
        packed = mx.quantize(weight, GROUP, bits)
        mx.eval(packed)
        ways: dict[str, Product] = {"dequantized": lambda x: mx.matmul(x, mx.dequantize(*packed, GROUP, bits).T)}
        if is_gpu():
            ways["quantized"] = lambda x: mx.quantized_matmul(x, *packed, transpose=True, group_size=GROUP, bits=bits)
        return unpacked(packed, bits), ways

    return _check(dtype, make, QUANTIZED_BOUNDS[dtype], setting)


def unpacked(packed: tuple[mx.array, ...] | list[mx.array], bits: int) -> np.ndarray:
    """Returns a matrix of 8 or 4 bits in float32, without MLX's kernels.

    Args:
        packed: (out, in bits / 32) uint32, and (out, in / 64) scales and biases, from `mx.quantize`.
        bits: 8 or 4.
    """
    numbers = np.array(packed[0]).view(np.uint8)
    if bits == 4:
        numbers = np.stack([numbers & 15, numbers >> 4], axis=-1)
    scales, biases = (as_numpy(array)[..., None] for array in packed[1:])
    return (numbers.reshape(*scales.shape[:-1], GROUP) * scales + biases).reshape(len(scales), -1)


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
    error = distance(as_numpy(y[mx.array(sampled)]), as_numpy(x)[sampled] @ exact.T)
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
