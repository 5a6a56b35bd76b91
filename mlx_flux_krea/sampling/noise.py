"""The random streams of the reference tools, so that a seed gives the same picture here as there.

torch's CPU generator is rebuilt on numpy's Mersenne Twister, without torch: `normal_fill` in
ATen/native/cpu/DistributionTemplates.h, `normal_distribution` in ATen/core/DistributionsHelper.h. MLX's streams are
MLX's own. Which tool draws how is data: `presets.RECIPES`.
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from ..errors import UsageError
from ..presets import NOT_REPRODUCIBLE, RECIPES, NoiseRecipe


def find_recipe(name: str) -> NoiseRecipe:
    """Returns a row of `presets.RECIPES` by its name.

    Raises:
        UsageError: there is no such row, or the tool's noise cannot be repeated.
    """
    known = ", ".join(RECIPES)
    if name in NOT_REPRODUCIBLE:
        raise UsageError(f'the noise of "{name}" cannot be repeated: it {NOT_REPRODUCIBLE[name]}', f"one of {known}")
    if name not in RECIPES:
        raise UsageError(f'no noise recipe is called "{name}"', f"one of {known}")
    return RECIPES[name]


def draw(
    recipe: str | NoiseRecipe, seed: int | Sequence[int], shape: tuple[int, int, int, int], dtype: mx.Dtype
) -> mx.array:
    """Draws initial noise.

    Args:
        recipe: a row of `presets.RECIPES`, or its name.
        seed: one stream for the whole batch; or a sequence, one stream for each image.
        shape: (B, 16, H/8, W/8).
        dtype: the compute type, in which recipes without a type of their own draw.

    Returns:
        Array of this shape and type, in torch's order of axes for every recipe.
    """
    if isinstance(seed, Sequence):
        return mx.concatenate([Stream(recipe, s, dtype).noise((1, *shape[1:])) for s in seed])
    return Stream(recipe, int(seed), dtype).noise(shape)


class Stream:
    """The random numbers of one seed and one recipe.

    Args:
        recipe: a row of `presets.RECIPES`, or its name.
        seed: 0 to 2^64 - 1.
        dtype: the compute type.
    """

    def __init__(self, recipe: str | NoiseRecipe, seed: int, dtype: mx.Dtype):
        self._recipe = find_recipe(recipe) if isinstance(recipe, str) else recipe
        self._dtype = dtype
        self._draw_dtype = getattr(mx, self._recipe.dtype) if self._recipe.dtype else dtype
        self._source = _SOURCES[self._recipe.stream](seed)

    def normal(self, shape: tuple[int, ...]) -> mx.array:
        """Draws the next standard normal numbers, in the tool's order."""
        return self._source.normal(shape, self._draw_dtype, self._recipe.era).astype(self._dtype)

    def noise(self, shape: tuple[int, int, int, int]) -> mx.array:
        """Draws the next numbers as noise (B, 16, H/8, W/8), from the tool's own layout."""
        b, c, h, w = shape
        if self._recipe.layout == "packed":
            x = self.normal((b, h * w // 4, 4 * c)).reshape(b, h // 2, w // 2, c, 2, 2)
            return x.transpose(0, 3, 1, 4, 2, 5).reshape(shape)
        if self._recipe.layout == "nhwc":
            return self.normal((b, h, w, c)).transpose(0, 3, 1, 2)
        return self.normal(shape)


class TorchStream:
    """The numbers of `torch.Generator("cpu").manual_seed(seed)`.

    Fewer than 16 numbers agree with torch to the bit, more to a few units in the last place (in torch these depend on
    the processor).
    """

    def __init__(self, seed: int):
        self._twister = np.random.MT19937()
        self._twister._legacy_seeding(seed & 0xFFFFFFFF)  # torch seeds with the low 32 bits
        self._second: float | None = None  # second half of a pair, where fewer than 16 numbers are drawn

    def normal(self, shape: tuple[int, ...], dtype: mx.Dtype, era: str | None) -> mx.array:
        """Draws as one call of `torch.randn`.

        Args:
            shape: shape of the result.
            dtype: float32, bfloat16 or float16.
            era: how 16-bit types are drawn from 16 numbers up. "rounded" (torch 2.13): the float32 numbers, rounded.
                "stepwise" (torch 2.7 and before): uniforms of 8 or 11 bits, and every operation rounded.
        """
        size = int(np.prod(shape))
        if size < 16:
            values = np.array([self._next() for _ in range(size)], np.float32)
        elif dtype == mx.float32:
            values = self._fill(size, size, 24, np.float32)
        elif era == "stepwise":
            values = self._fill(size, size, *_STEPWISE[dtype])
        else:
            values = self._fill(size, size - size % 16, 24, np.float32)
        return mx.array(values).astype(dtype).reshape(shape)

    def _next(self) -> float:
        """Draws one number in double precision: Box-Muller on uniforms of 53 bits, which gives two numbers."""
        if self._second is not None:
            value, self._second = self._second, None
            return value
        high1, low1, high2, low2 = (int(word) for word in self._twister.random_raw(4))
        u1, u2 = (((high << 32 | low) & (2**53 - 1)) * 2.0**-53 for high, low in ((high1, low1), (high2, low2)))
        radius, theta = np.sqrt(-2.0 * np.log1p(-u2)), 2.0 * np.pi * u1
        self._second = float(radius * np.sin(theta))
        return float(radius * np.cos(theta))

    def _fill(self, size: int, first: int, bits: int, rounded) -> np.ndarray:
        """Applies Box-Muller in blocks of 16, number j with number j + 8; after an open block the last 16 are redrawn.

        Args:
            size: at least 16.
            first: uniforms drawn before those 16: all, or only whole blocks of them.
            bits: bits of each uniform.
            rounded: rounds float32 values to the type drawn in, after every operation.
        """
        whole = size - size % 16
        values = np.empty(size, np.float32)
        values[:whole] = _box_muller(self._uniforms(first, bits)[:whole], rounded)
        if whole < size:
            values[-16:] = _box_muller(self._uniforms(16, bits), rounded)
        return values

    def _uniforms(self, count: int, bits: int) -> np.ndarray:
        words = self._twister.random_raw(count) & np.uint64(2**bits - 1)
        return words.astype(np.float32) * np.float32(2.0**-bits)


def _box_muller(uniforms: np.ndarray, rounded) -> np.ndarray:
    u1, u2 = uniforms.reshape(-1, 2, 8).transpose(1, 0, 2)
    radius = rounded(np.sqrt(-2 * rounded(np.log(1 - u1))))
    theta = rounded(np.float32(2 * np.pi) * u2)
    halves = [rounded(radius * rounded(turn(theta))) for turn in (np.cos, np.sin)]
    return np.stack(halves, axis=1).reshape(-1) + np.float32(0)  # as torch adds the mean: no negative zeros


def _bfloat16(x: np.ndarray) -> np.ndarray:
    """Rounds float32 values to bfloat16, to nearest and even."""
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


def _float16(x: np.ndarray) -> np.ndarray:
    return x.astype(np.float16).astype(np.float32)


# bits of the uniforms, and the rounding after every operation
_STEPWISE = {mx.bfloat16: (8, _bfloat16), mx.float16: (11, _float16)}


class MLXKeyStream:
    """`mx.random.normal(..., key=mx.random.key(seed))`: every draw starts from the key."""

    def __init__(self, seed: int):
        self._key = mx.random.key(seed)

    def normal(self, shape: tuple[int, ...], dtype: mx.Dtype, era: None) -> mx.array:
        """Draws from the key."""
        return mx.random.normal(shape, dtype=dtype, key=self._key)


class MLXSeedStream:
    """`mx.random.normal(...)` after `mx.random.seed(seed)`, without touching MLX's global state."""

    def __init__(self, seed: int):
        self._state = mx.random.key(seed)

    def normal(self, shape: tuple[int, ...], dtype: mx.Dtype, era: None) -> mx.array:
        """Draws; each call splits the state."""
        self._state, key = mx.random.split(self._state)
        return mx.random.normal(shape, dtype=dtype, key=key)


_SOURCES = {"torch": TorchStream, "mlx-key": MLXKeyStream, "mlx-seed": MLXSeedStream}
