"""Quantized layers, which multiply directly or by their dequantized weight, and the branches of adapters beside layers.

The faster way depends on the chip, the rows, the bits and the type. Metal's quantized product is up to four times
slower than the dense one on an M1 or M2, and equal on an M3; the CPU's is 10 to 50 times slower. So both are timed
once, on a GPU at the shapes of the network's own layers, and the result is stored: the two ways agree to rounding only,
and a seed should give the same picture tomorrow.
"""

import contextlib
import contextvars
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from ..presets import CHIPS, SHARE_OF_PEAK
from .config import Quantization

# Rows, outputs and inputs of products that are timed: few rows (a modulation), and many (tokens of a picture). On a GPU
# products of quantized layers have the outputs and inputs of the network's own layers, the `_MOST` largest of a kind,
# and 32 or 96 rows: less than half a second of an M1, where the slower way takes four times as long as the faster one.
_SHAPES = {"cpu": ((16, 64, 512), (128, 64, 512)), "gpu": ((32, 3072, 3072), (1024, 3072, 3072))}
_TIMED, _MOST = (32, 96), 4
ROWS = {"transformer": 4608}  # of a network: tokens of a picture of 1024 x 1024 and of its text; of others 512
_FEW = 64  # a product of at most so many rows follows the timing for few rows
CHUNK = 2**22  # weights dequantized at one time on the CPU, where the intermediate arrays take five times their size

LONGEST = 0.25  # seconds of one product on a GPU: the system may end longer ones while the display needs it
_ROWS = 64  # of which parts of a product are made, so that each row is computed by the same kernel in the same order
_pieces = contextvars.ContextVar("pieces", default=1)  # of each product, beyond those that its time asks for

_HEADROOM = 128.0  # in float16, inputs are made as much smaller before a product, and its gain larger

Kind = tuple[int, int, str]  # group size, bits and mode
# By kind, compute type, "many rows", and on a GPU the shapes of the network's layers of that kind.
_faster_dense: dict[tuple[Any, ...], bool] = {}


class QuantizedLinear(nn.QuantizedLinear):
    """A quantized layer that multiplies in the way that `choose_products` chose.

    Layers of files of others may have further arrays (`add_arrays`), which are a branch of their own (`Branch`).
    """

    def __call__(self, x: mx.array) -> mx.array:
        own = self._own(x.dtype)
        if own is None:
            return self._product(x, self.get("bias"))
        return own(self._product, self.weight.shape[1] * 32 // self.bits, x)

    def _own(self, dtype: mx.Dtype) -> "Branch | None":
        """Returns the further arrays as a branch, with the bias; None: the layer has none."""
        gain, intake = (None if name not in self else self[name].view(mx.float32) for name in ("gain", "intake"))
        down, up, bias = (self.get(name) for name in ("down", "up", "bias"))
        if gain is None and intake is None and down is None:
            return None
        if gain is not None and dtype == mx.float16:  # products before the gain would be too large
            gain, intake = gain * _HEADROOM, 1 / _HEADROOM * (mx.array(1.0) if intake is None else intake)
        return Branch(down, up, gain=gain, intake=intake, offset=bias)

    def _product(self, x: mx.array, bias: mx.array | None = None) -> mx.array:
        many = x.size // x.shape[-1] > _FEW
        if not _faster_dense.get((*kind(self), x.dtype, many, *self.__dict__.get("_timed", ())), False):
            group_size, bits, mode = kind(self)
            y = mx.quantized_matmul(
                x, self.weight, self.scales, self.get("biases"), True, group_size=group_size, bits=bits, mode=mode
            )
            return y if bias is None else y + bias
        if mx.default_device().type.name == "cpu":
            return self._dense_in_chunks(x, bias)
        return self._dense(x, self.weight, self.scales, self.get("biases"), bias)

    def _dense(
        self, x: mx.array, weight: mx.array, scales: mx.array, biases: mx.array | None, bias: mx.array | None
    ) -> mx.array:
        dense = _dequantized(weight, scales, biases, kind(self), x.dtype).T
        return x @ dense if bias is None else mx.addmm(bias, x, dense)

    def _dense_in_chunks(self, x: mx.array, bias: mx.array | None) -> mx.array:
        """Multiplies some outputs at a time; each chunk is dequantized after the one before it was multiplied."""
        outputs, step = len(self.weight), max(1, CHUNK // x.shape[-1])
        result, before = mx.zeros((*x.shape[:-1], outputs), x.dtype), x
        biases = self.get("biases")
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


# --- branches of adapters, beside layers whose own weights stay as they are ---


@dataclass(frozen=True)
class Kronecker:
    """A change w1 (a, b) x w2 (c, d) of some output rows: a c rows, b d inputs, never built as a matrix.

    Attributes:
        w1: the outer factor.
        w2: the inner factor.
        start: first output row.
        gain: (a c,) factors of the outputs; None: 1.
    """

    w1: mx.array
    w2: mx.array
    start: int
    gain: mx.array | None = None

    def __call__(self, x: mx.array) -> mx.array:
        """Maps x (..., b d) to (..., a c)."""
        y = x.reshape(*x.shape[:-1], self.w1.shape[1], self.w2.shape[1]) @ self.w2.T
        y = (y.swapaxes(-1, -2) @ self.w1.T).swapaxes(-1, -2).reshape(*x.shape[:-1], -1)
        return y if self.gain is None else y * self.gain


@partial(mx.compile, shapeless=True)
def _times(x: mx.array, factors: mx.array) -> mx.array:
    """Returns x times factors, which may have more bits, in its own type."""
    return (x * factors).astype(x.dtype)


@dataclass(frozen=True)
class Branch:
    """Everything that adapters change in one layer W x + b, whatever their number.

    ((W (intake x) + b) gain + offset) + (x down) up + x dense + each Kronecker product. None: left out.

    Attributes:
        down: (in, R), of all adapters side by side.
        up: (R, out), with their weights.
        dense: (in, out).
        gain: (out,).
        intake: (in,).
        offset: (out,).
        products: the Kronecker products.
    """

    down: mx.array | None = None
    up: mx.array | None = None
    dense: mx.array | None = None
    gain: mx.array | None = None
    intake: mx.array | None = None
    offset: mx.array | None = None
    products: tuple[Kronecker, ...] = ()

    @property
    def arrays(self) -> list[mx.array]:
        """Everything that is in memory."""
        own = (self.down, self.up, self.dense, self.gain, self.intake, self.offset)
        of_products = (array for one in self.products for array in (one.w1, one.w2, one.gain))
        return [array for array in (*own, *of_products) if array is not None]

    def __call__(self, layer: Callable[[mx.array], mx.array], width: int, x: mx.array) -> mx.array:
        """Returns the layer's result with the changes. Inputs beyond the layer's own are for the branch alone."""
        inputs = x if x.shape[-1] == width else x[..., :width]
        y = layer(inputs if self.intake is None else _times(inputs, self.intake))
        if self.gain is not None:
            y = _times(y, self.gain)
        if self.offset is not None:
            y = y + self.offset
        if self.down is not None and self.up is not None:
            y = mx.addmm(y, x @ self.down, self.up)
        if self.dense is not None:
            y = mx.addmm(y, x, self.dense)
        for product in self.products:
            change = product(x)
            rows = slice(product.start, product.start + change.shape[-1])
            y[..., rows] = y[..., rows] + change
        return y


class BranchedLinear(nn.Linear):
    """A layer with a branch, from `set_branch`."""

    _branch: Branch

    def __call__(self, x: mx.array) -> mx.array:
        return self._branch(super().__call__, self.weight.shape[1], x)


class BranchedQuantizedLinear(QuantizedLinear):
    """A quantized layer with a branch, from `set_branch`."""

    _branch: Branch

    def __call__(self, x: mx.array) -> mx.array:
        return self._branch(super().__call__, self.weight.shape[1] * 32 // self.bits, x)


def set_branch(layer: nn.Module, branch: Branch | None) -> None:
    """Gives a linear layer a branch, or takes it away.

    A branch is no part of the layer's parameters: it is not streamed with them, and not counted among them.
    """
    quantized = isinstance(layer, nn.QuantizedLinear)
    if branch is None:
        layer.__class__ = QuantizedLinear if quantized else nn.Linear
        layer.__dict__.pop("_branch", None)
    else:
        layer.__class__ = BranchedQuantizedLinear if quantized else BranchedLinear
        layer._branch = branch


def constant(layer: nn.Module) -> mx.array:
    """Returns what a layer gives for zeros, in float32: its bias, with what a branch makes of it."""
    bias, branch = layer["bias"].astype(mx.float32), layer.__dict__.get("_branch")
    if branch is None:
        return bias
    bias = bias if branch.gain is None else bias * branch.gain.astype(mx.float32)
    return bias if branch.offset is None else bias + branch.offset.astype(mx.float32)


def adopt(network: nn.Module) -> None:
    """Turns the quantized layers of a network into `QuantizedLinear`; their arrays stay as they are."""
    for layer in _layers(network):
        layer.__class__ = QuantizedLinear


def choose_products(
    network: nn.Module, dtype: mx.Dtype, remembered: Mapping[str, object] | None = None, rows: int = 512
) -> dict[str, bool]:
    """Chooses how the quantized layers of a network multiply, by timing each kind that is not yet known.

    Args:
        network: its layers went through `adopt`.
        dtype: the compute type.
        remembered: earlier results on this machine (`machine`), as this function returned them.
        rows: that products of many rows usually have, see `ROWS`.

    Returns:
        Results that this process did not have: whether the dense product of a kind of layers is faster, by its name.
    """
    chosen = {}
    for of_kind, layers in _by_kind(network).items():
        timed = timed_layers(layers) if _on_gpu() else []
        shapes = tuple(f"{outputs}x{inputs}" for outputs, inputs in map(_shape, timed))
        for layer in layers:
            layer.__dict__["_timed"] = shapes
        for many in (False, True):
            key = (*of_kind, dtype, many, *shapes)
            if key in _faster_dense:
                continue
            name = " ".join(map(str, key))
            known = remembered.get(name) if remembered else None
            if not isinstance(known, bool):
                known = (
                    _is_dense_faster_in(timed, dtype, many, rows) if timed else _is_dense_faster(of_kind, dtype, many)
                )
            chosen[name] = _faster_dense[key] = known
    return chosen


def _on_gpu() -> bool:
    return mx.default_device().type.name == "gpu"


def timed_layers(layers: Sequence[nn.QuantizedLinear]) -> list[nn.QuantizedLinear]:
    """Returns a layer of each of the largest shapes among layers of one kind, the largest first."""
    by_shape = {_shape(layer): layer for layer in layers}
    largest = sorted(by_shape, key=lambda shape: (-shape[0] * shape[1], shape))
    return [by_shape[shape] for shape in largest[:_MOST]]


def machine() -> str:
    """Names the chip, the device that MLX uses and its version: results of `choose_products` hold for these."""
    return f"{mx.device_info().get('device_name')}, {mx.default_device().type.name}, mlx {version('mlx')}"


def dequantized(layer: nn.Module) -> mx.array:
    """Returns the matrix (out, in) of a linear layer, in float32 where it was quantized."""
    if not isinstance(layer, nn.QuantizedLinear):
        return layer["weight"]
    weight = _dequantized(layer.weight, layer.scales, layer.get("biases"), kind(layer), mx.float32)
    return whole_weight(weight, layer)


def whole_weight(product: mx.array, arrays: Mapping[str, mx.array]) -> mx.array:
    """Returns the matrix (out, in) of a layer with the further arrays of `add_arrays`, in float32.

    Args:
        product: its dequantized codes.
        arrays: its arrays by name.
    """
    if "intake" in arrays:
        product = product * arrays["intake"].view(mx.float32)
    if "gain" in arrays:
        product = product * arrays["gain"].view(mx.float32)[:, None]
    if "down" in arrays:
        product = product + (arrays["down"].astype(mx.float32) @ arrays["up"].astype(mx.float32)).T
    return product


def add_arrays(layer: nn.QuantizedLinear, q: Quantization) -> None:
    """Gives a quantized layer the arrays that its quantization has besides codes, scales and biases.

    It computes ((x intake) W) gain + bias + (x down) up. Factors keep 32 bits in every compute type: they are stored as
    integers with the bits of float32.
    """
    outputs, inputs = layer.weight.shape[0], layer.weight.shape[1] * 32 // layer.bits
    if q.gain:
        layer.gain = mx.zeros((outputs,), mx.uint32)
    if q.intake:
        layer.intake = mx.zeros((inputs,), mx.uint32)
    if q.rank:
        layer.down, layer.up = mx.zeros((inputs, q.rank)), mx.zeros((q.rank, outputs))


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


def _is_dense_faster_in(layers: Sequence[nn.QuantizedLinear], dtype: mx.Dtype, many: bool, rows: int) -> bool:
    """Times both products of layers, on arrays like theirs, which are not read.

    A dense product dequantizes once, whatever its rows: what is timed with fewer is multiplied, but for that.

    Args:
        layers: of one kind.
        dtype: the compute type.
        many: for products of many rows.
        rows: of these.
    """
    timed = _TIMED[many]
    more, quantized, dense = rows / timed if many else 1.0, 0.0, 0.0
    for layer in layers:
        outputs, inputs = _shape(layer)
        x, whole = mx.ones((timed, inputs), dtype), mx.ones((outputs, inputs), dtype)
        weight, scales = (mx.ones_like(layer[name]) for name in ("weight", "scales"))
        scales = scales if scales.dtype == mx.uint8 else scales.astype(dtype)
        biases = mx.zeros_like(scales) if "biases" in layer else None
        mx.eval(x, whole, weight, scales, biases)
        own = kind(layer)
        group_size, bits, mode = own
        quantized += more * _seconds(
            partial(mx.quantized_matmul, x, weight, scales, biases, True, group_size=group_size, bits=bits, mode=mode)
        )
        dense += more * _seconds(partial(mx.matmul, x, whole.T))
        dense += _seconds(partial(_dequantized, weight, scales, biases, own, dtype))
    return dense < quantized


def _shape(layer: nn.QuantizedLinear) -> tuple[int, int]:
    """Returns the outputs and inputs of a layer."""
    return layer.weight.shape[0], layer.weight.shape[1] * 32 // layer.bits


def _by_kind(network: nn.Module) -> dict[Kind, list[nn.QuantizedLinear]]:
    found: dict[Kind, list[nn.QuantizedLinear]] = {}
    for layer in _layers(network):
        found.setdefault(kind(layer), []).append(layer)
    return found


def seconds_of_product(dtype: mx.Dtype) -> float:
    """Returns the seconds of one product of many rows, of the size that is timed on this device, in a type."""
    rows, outputs, inputs = _SHAPES[mx.default_device().type.name][True]
    x, weight = mx.ones((rows, inputs), dtype), mx.ones((inputs, outputs), dtype)
    mx.eval(x, weight)
    return _seconds(lambda: x @ weight)


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
