"""Quantized layers, which multiply directly or by their dequantized weight, whichever is faster on this machine.

The faster way depends on the chip, the rows, the bits and the type. Metal's quantized product is up to four times
slower than the dense one on an M1 or M2, and equal on an M3; the CPU's is 10 to 50 times slower. So both are timed
once, for about a tenth of a second, and the result is stored: the two ways agree to rounding only, and a seed should
give the same picture tomorrow.
"""

import contextlib
import contextvars
import math
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version

import mlx.core as mx
import mlx.nn as nn

from ..presets import CHIPS, SHARE_OF_PEAK

# Rows, outputs and inputs of the timed products: few rows (a modulation), and many (tokens of a picture).
_SHAPES = {"cpu": ((16, 64, 512), (128, 64, 512)), "gpu": ((32, 3072, 3072), (1024, 3072, 3072))}
_FEW = 64  # a product of at most so many rows follows the timing for few rows
CHUNK = 2**22  # weights dequantized at one time on the CPU, where the intermediate arrays take five times their size

LONGEST = 0.25  # seconds of one product on a GPU: the system may end longer ones while the display needs it
_ROWS = 64  # of which parts of a product are made, so that each row is computed by the same kernel in the same order
_pieces = contextvars.ContextVar("pieces", default=1)  # of each product, beyond those that its time asks for

Kind = tuple[int, int, str]  # group size, bits and mode
_faster_dense: dict[tuple[int, int, str, mx.Dtype, bool], bool] = {}  # by kind, compute type, and "many rows"


class QuantizedLinear(nn.QuantizedLinear):
    """A quantized layer that multiplies in the way that `choose_products` chose."""

    def __call__(self, x: mx.array) -> mx.array:
        many = x.size // x.shape[-1] > _FEW
        if not _faster_dense.get((*kind(self), x.dtype, many), False):
            return super().__call__(x)
        if mx.default_device().type.name == "cpu":
            return self._dense_in_chunks(x)
        return self._dense(x, self.weight, self.scales, self.get("biases"), self.get("bias"))

    def _dense(
        self, x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array | None, bias: mx.array | None
    ) -> mx.array:
        dense = _dequantized(weight, scales, biases, kind(self), x.dtype).T
        return x @ dense if bias is None else mx.addmm(bias, x, dense)

    def _dense_in_chunks(self, x: mx.array) -> mx.array:
        """Multiplies some outputs at a time; each chunk is dequantized after the one before it was multiplied."""
        outputs, step = len(self.weight), max(1, CHUNK // x.shape[-1])
        result, before = mx.zeros((*x.shape[:-1], outputs), x.dtype), x
        biases, bias = self.get("biases"), self.get("bias")
        for first in range(0, outputs, step):
            rows = slice(first, first + step)
            weight = mx.depends([self.weight[rows]], [before])[0]
            optional = (None if array is None else array[rows] for array in (biases, bias))
            before = self._dense(x, weight, self.scales[rows], *optional)
            result[..., rows] = before
        return result


@contextlib.contextmanager
def smaller(times: int = 4) -> Iterator[None]:
    """Makes so many times more, and smaller, parts of the products of `in_rows` within the block."""
    token = _pieces.set(_pieces.get() * times)
    try:
        yield
    finally:
        _pieces.reset(token)


def in_rows(function: Callable[[mx.array], mx.array], x: mx.array, operations: float, axis: int = 1) -> mx.array:
    """Applies a function of rows, to a part of them at a time where all at once would keep the GPU too long.

    Args:
        function: of rows that do not depend on each other; its result has the axes of x, of which the last may differ.
        x: the rows.
        operations: of all rows.
        axis: along which the rows lie.
    """
    count = x.shape[axis]
    pieces = max(_pieces.get(), math.ceil(operations / (LONGEST * rate())))
    step = -(-count // pieces // _ROWS) * _ROWS if pieces < count else _ROWS
    if pieces == 1 or step >= count:
        return function(x)
    out, before = mx.zeros(0), (slice(None),) * axis
    for first in range(0, count, step):
        place = (*before, slice(first, first + step))
        rows = function(x[place])
        if not first:
            out = mx.zeros((*x.shape[:-1], rows.shape[-1]), rows.dtype)
        out[place] = rows  # in place once it is evaluated
    return out


def rate() -> float:
    """Returns the operations a second that products reach on this chip; infinite where its commands have no limit."""
    name = str(mx.device_info().get("device_name", "")).removeprefix("Apple ")
    is_gpu = mx.default_device().type.name == "gpu"
    return CHIPS[name] * 1e12 * SHARE_OF_PEAK if is_gpu and name in CHIPS else math.inf


def adopt(network: nn.Module) -> None:
    """Turns the quantized layers of a network into `QuantizedLinear`; their arrays stay as they are."""
    for layer in _layers(network):
        layer.__class__ = QuantizedLinear


def choose_products(
    network: nn.Module, dtype: mx.Dtype, remembered: Mapping[str, object] | None = None
) -> dict[str, bool]:
    """Chooses how the quantized layers of a network multiply, by timing each kind that is not yet known.

    Args:
        network: its layers went through `adopt`.
        dtype: the compute type.
        remembered: earlier results on this machine (`machine`), as this function returned them.

    Returns:
        Results that this process did not have: whether the dense product of a kind of layers is faster, by its name.
    """
    keys = {(*kind(layer), dtype, many) for layer in _layers(network) for many in (False, True)}
    chosen = {}
    for key in keys - _faster_dense.keys():
        name = " ".join(map(str, key))
        known = remembered.get(name) if remembered else None
        group_size, bits, mode, _, many = key
        _faster_dense[key] = (
            known if isinstance(known, bool) else _is_dense_faster((group_size, bits, mode), dtype, many)
        )
        chosen[name] = _faster_dense[key]
    return chosen


def machine() -> str:
    """Names the chip, the device that MLX uses and its version: results of `choose_products` hold for these."""
    return f"{mx.device_info().get('device_name')}, {mx.default_device().type.name}, mlx {version('mlx')}"


def kind(layer: nn.QuantizedLinear) -> Kind:
    """Returns group size, bits and mode of a layer."""
    return layer.group_size, layer.bits, layer.mode


def _is_dense_faster(kind: Kind, dtype: mx.Dtype, many: bool) -> bool:
    """Times both products, on arrays of ones."""
    rows, outputs, inputs = _SHAPES[mx.default_device().type.name][many]
    group_size, bits, mode = kind
    x = mx.ones((rows, inputs), dtype)
    packed = mx.quantize(mx.ones((outputs, inputs), dtype), group_size, bits, mode)
    mx.eval(x, packed)
    weight, scales, *rest = packed
    biases = rest[0] if rest else None

    def quantized() -> mx.array:
        return mx.quantized_matmul(
            x, weight, scales, biases, transpose=True, group_size=group_size, bits=bits, mode=mode
        )

    def dense() -> mx.array:
        return x @ _dequantized(weight, scales, biases, kind, dtype).T

    return _seconds(dense) < _seconds(quantized)


def _dequantized(weight: mx.array, scales: mx.array, biases: mx.array | None, kind: Kind, dtype: mx.Dtype) -> mx.array:
    group_size, bits, mode = kind
    return mx.dequantize(weight, scales, biases, group_size, bits, mode, dtype=dtype)


def _seconds(product: Callable[[], mx.array]) -> float:
    """Returns the shorter of two times; the first on a GPU also compiles its kernel."""
    times = []
    for _ in range(2):
        start = time.perf_counter()
        mx.eval(product())
        times.append(time.perf_counter() - start)
    return min(times)


def _layers(network: nn.Module) -> Iterator[nn.QuantizedLinear]:
    return (layer for _, layer in network.named_modules() if isinstance(layer, nn.QuantizedLinear))
