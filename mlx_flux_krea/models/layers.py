"""How a quantized layer multiplies: directly, or by its dequantized weight; whichever is faster on this machine.

Which one that is depends on the chip, the rows, the bits and the type: Metal's quantized product loses up to three
quarters to the dense one on an M1 or M2 and nothing on an M3, and the CPU's loses 10 to 50 times. So both are timed
once, for about a tenth of a second, and what was found is remembered: the two give the same numbers to rounding only,
and a seed should give the same picture tomorrow.
"""

import time
from collections.abc import Iterator, Mapping
from importlib.metadata import version

import mlx.core as mx
import mlx.nn as nn

# rows, outputs and inputs of the products that are timed: few rows (a modulation) and many (tokens of a picture)
_SHAPES = {"cpu": ((16, 64, 512), (128, 64, 512)), "gpu": ((32, 3072, 3072), (1024, 3072, 3072))}
_FEW = 64  # rows up to which the first of them speaks for a product
PIECE = 2**22  # weights that are dense at one time on the CPU, where what dequantizing leaves takes five times as much

_faster_dense: dict[tuple, bool] = {}  # by kind, type and number of rows: whether to dequantize


class QuantizedLinear(nn.QuantizedLinear):
    """A quantized layer that multiplies as `choose_products` found best."""

    def __call__(self, x: mx.array) -> mx.array:
        many = x.size // x.shape[-1] > _FEW
        if not _faster_dense.get((*self.kind, x.dtype, many), False):
            return super().__call__(x)
        packed = self.weight, self.scales, self.get("biases")
        if mx.default_device().type.name == "cpu":
            return self._in_pieces(x, packed)
        return self._dense(x, packed, self.get("bias"))

    def _dense(self, x: mx.array, packed: tuple, bias: mx.array | None) -> mx.array:
        weight = mx.dequantize(*packed, *self.kind, dtype=x.dtype).T
        return x @ weight if bias is None else mx.addmm(bias, x, weight)

    def _in_pieces(self, x: mx.array, packed: tuple) -> mx.array:
        """The same, some outputs at a time, none of which is dequantized before the one ahead of it is multiplied."""
        outputs, step = len(self.weight), max(1, PIECE // x.shape[-1])
        result, ahead = mx.zeros((*x.shape[:-1], outputs), x.dtype), x
        for first in range(0, outputs, step):
            some = slice(first, first + step)
            weight, scales, biases = (None if array is None else array[some] for array in packed)
            weight = mx.depends([weight], [ahead])[0]
            ahead = self._dense(x, (weight, scales, biases), self.bias[some] if "bias" in self else None)
            result[..., some] = ahead
        return result

    @property
    def kind(self) -> tuple[int, int, str]:
        """Group size, bits and mode."""
        return self.group_size, self.bits, self.mode


def adopt(network: nn.Module) -> None:
    """Makes the quantized layers of a network ours; their arrays stay as they are."""
    for layer in _layers(network):
        layer.__class__ = QuantizedLinear


def choose_products(
    network: nn.Module, dtype: mx.Dtype, remembered: Mapping[str, object] | None = None
) -> dict[str, bool]:
    """Chooses how the quantized layers of a network multiply, by timing each kind that is not yet known.

    Args:
        network: its layers through `adopt`.
        dtype: the compute type.
        remembered: earlier results on this machine (`machine`), as this function returned them.

    Returns:
        Results that this process did not have: whether the dense product of a kind of layers is faster, by its name.
    """
    keys = {(*layer.kind, dtype, many) for layer in _layers(network) for many in (False, True)} - _faster_dense.keys()
    chosen = {}
    for key in keys:
        name = " ".join(map(str, key))
        known = remembered.get(name) if remembered else None
        _faster_dense[key] = known if isinstance(known, bool) else _is_dense_faster(key[:3], dtype, key[4])
        chosen[name] = _faster_dense[key]
    return chosen


def machine() -> str:
    """Names the chip, the device that MLX uses and its version: results of `choose_products` hold for these."""
    return f"{mx.device_info().get('device_name')}, {mx.default_device().type.name}, mlx {version('mlx')}"


def _is_dense_faster(kind: tuple[int, int, str], dtype: mx.Dtype, many: bool) -> bool:
    rows, outputs, inputs = _SHAPES[mx.default_device().type.name][many]
    x = mx.ones((rows, inputs), dtype)
    packed = mx.quantize(mx.ones((outputs, inputs), dtype), *kind)
    mx.eval(x, packed)
    weight, scales, *biases = packed
    biases = biases[0] if biases else None
    products = (
        lambda: mx.quantized_matmul(
            x, weight, scales, biases, transpose=True, group_size=kind[0], bits=kind[1], mode=kind[2]
        ),
        lambda: x @ mx.dequantize(weight, scales, biases, *kind, dtype=dtype).T,
    )
    seconds = [_seconds(product) for product in products]
    return seconds[1] < seconds[0]


def _seconds(product) -> float:
    """The faster of two times; the first on a GPU also compiles its kernel."""
    times = []
    for _ in range(2):
        begin = time.perf_counter()
        mx.eval(product())
        times.append(time.perf_counter() - begin)
    return min(times)


def _layers(network: nn.Module) -> Iterator[nn.QuantizedLinear]:
    return (layer for _, layer in network.named_modules() if isinstance(layer, nn.QuantizedLinear))
