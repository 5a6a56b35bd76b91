"""Attention, a convolution, and compiled functions against numpy's results of the same numbers."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import mlx.core as mx
import numpy as np

from ..models import transformer, vae
from .check import CheckResult, Setting, as_numpy, distance, judged, normal

_SAMPLED = 8  # queries, and rows of pixels, that are compared
_LEAST = 64  # tokens and pixels that a divided shape keeps
ATTENTION_BOUND = 0.015  # in bfloat16: rounding the result gives 0.0017, rounding scores too, as a CPU does, 0.008
CONVOLUTION_BOUNDS = {"bfloat16": 0.004, "float16": 0.001}  # Winograd's algorithm in 16 bits gives 0.03 and more
COMPILED_BOUNDS = {"float32": 1e-5, "bfloat16": 0.004}


@dataclass(frozen=True)
class AttentionShape:
    """Sizes of one attention.

    Attributes:
        heads: of the queries.
        kv_heads: of keys and values.
        width: of a head.
        tokens: number of queries, and of keys.
        mask: "added" (T5's bias), "causal", or "".
    """

    heads: int
    kv_heads: int
    width: int
    tokens: int
    mask: str = ""

    def divided(self, divisor: int) -> "AttentionShape":
        """Returns the same attention with fewer heads and tokens."""
        kv_heads = max(1, self.kv_heads // divisor)
        tokens = max(_LEAST, self.tokens // divisor)
        return AttentionShape(kv_heads * self.heads // self.kv_heads, kv_heads, self.width, tokens, self.mask)


ATTENTIONS = {
    "128": AttentionShape(24, 24, 128, 4608),  # the transformer at 1024 x 1024
    "64 with mask": AttentionShape(64, 64, 64, 512, "added"),  # T5
    "72": AttentionShape(16, 16, 72, 729),  # SigLIP, for style images
    "512": AttentionShape(1, 1, 512, 8192),  # the image decoder, which has no fused kernel
    "128 grouped": AttentionShape(32, 8, 128, 1280, "causal"),  # Pixtral
}


def attention(shape: AttentionShape, setting: Setting) -> CheckResult:
    """Checks an attention in bfloat16: sampled queries against float32, and all queries at once against chunks."""
    one = shape.divided(setting.divisor)
    queries, keys, values = (
        normal((1, heads, one.tokens, one.width), mx.bfloat16, seed)
        for seed, heads in enumerate((one.heads, one.kv_heads, one.kv_heads))
    )
    mask = _mask(one)

    def attend(first: int, last: int) -> mx.array:
        part = None if mask is None else mask[:, :, first:last]
        return mx.fast.scaled_dot_product_attention(
            queries[:, :, first:last], keys, values, scale=one.width**-0.5, mask=part
        )

    whole, step = attend(0, one.tokens), -(-one.tokens // 4)
    chunks = mx.concatenate([attend(i, min(i + step, one.tokens)) for i in range(0, one.tokens, step)], axis=2)
    sampled = np.linspace(0, one.tokens - 1, _SAMPLED).astype(int)
    exact = _exact_attention((queries, keys, values), mask, sampled)
    error = max(distance(as_numpy(found[:, :, mx.array(sampled)]), exact) for found in (whole, chunks))
    between = distance(as_numpy(chunks), as_numpy(whole))
    how = "chunks have the same bits" if mx.array_equal(whole, chunks) else f"chunks differ by {between:.2g}"
    return judged(max(error, between), ATTENTION_BOUND, f", {how}", chunks=between)


def _mask(shape: AttentionShape) -> mx.array | None:
    """Returns what is added to the scores, (1, H or 1, T, T) bfloat16; None: nothing."""
    if shape.mask == "causal":
        hidden = mx.triu(mx.full((shape.tokens, shape.tokens), -1e9), 1)
        return hidden[None, None].astype(mx.bfloat16)
    return normal((1, shape.heads, shape.tokens, shape.tokens), mx.bfloat16, 3) if shape.mask else None


def _exact_attention(
    arrays: tuple[mx.array, mx.array, mx.array], mask: mx.array | None, sampled: np.ndarray
) -> np.ndarray:
    """Returns the attention of sampled queries in float32: softmax(q k / sqrt(D) + mask) v."""
    queries, keys, values = map(as_numpy, arrays)
    repeats = queries.shape[1] // keys.shape[1]
    keys, values = (np.repeat(array, repeats, axis=1) for array in (keys, values))
    scores = queries[:, :, sampled] @ keys.swapaxes(-1, -2) * queries.shape[-1] ** -0.5
    scores = scores if mask is None else scores + as_numpy(mask)[:, :, sampled]
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ values


def convolution(dtype: str, setting: Setting) -> CheckResult:
    """Checks a 3 x 3 convolution of the image decoder, 512 channels at 128 x 128, in a type of 16 bits."""
    side, channels = max(32, 128 // setting.divisor), max(32, 512 // setting.divisor)
    x = normal((1, side, side, channels), getattr(mx, dtype))
    weight = normal((channels, 3, 3, channels), getattr(mx, dtype), 1)
    y = mx.conv2d(x, weight, padding=1)
    rows = np.unique(np.linspace(0, side - 1, _SAMPLED).astype(int))
    padded = np.pad(as_numpy(x)[0], ((1, 1), (1, 1), (0, 0)))
    patches = np.stack([padded[i : i + 3, j : j + 3].ravel() for i in rows for j in range(side)])
    exact = patches @ as_numpy(weight).reshape(channels, -1).T
    error = distance(as_numpy(y[0, mx.array(rows)]).reshape(exact.shape), exact)
    return judged(error, CONVOLUTION_BOUNDS[dtype])


def compiled(setting: Setting) -> CheckResult:
    """Checks the compiled functions of the transformer and the image decoder, in float32 and bfloat16."""
    rows = max(_LEAST, 1024 // setting.divisor)
    errors: dict[str, float] = {}
    for dtype, bound in COMPILED_BOUNDS.items():
        arrays = [normal((rows, 3072 // setting.divisor), getattr(mx, dtype), seed) for seed in range(4)]
        for name, (function, exact, count) in _COMPILED.items():
            found = function()(*arrays[:count])
            expected = exact(*(as_numpy(array).astype(np.float64) for array in arrays[:count]))
            errors[f"{name} in {dtype}"] = distance(as_numpy(found), expected) / bound
    worst = max(errors, key=lambda name: errors[name])
    return judged(errors[worst], 1, f" of the bound in {worst}, of {len(errors)} results", errors=errors)


def _silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def _gelu(x: np.ndarray) -> np.ndarray:
    return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


# By name: the function (looked up when it is called), the same in numpy, and the number of its arrays.
_COMPILED: dict[str, tuple[Callable[[], Callable], Callable, int]] = {
    "gelu": (lambda: transformer.gelu, _gelu, 1),
    "gated_residual": (lambda: transformer.gated_residual, lambda x, gate, y: x + gate * y, 3),
    "rotate": (lambda: transformer.rotate, lambda a, b, first, second: first * a + second * b, 4),
    "affine": (lambda: vae.affine, lambda x, scale, shift: x * scale + shift, 3),
    "affine_silu": (lambda: vae.affine_silu, lambda x, scale, shift: _silu(x * scale + shift), 3),
    "squared_deviation": (lambda: vae.squared_deviation, lambda x, mean: (x - mean) ** 2, 2),
    "mean": (lambda: lambda *parts: vae.moments(*parts)[0], lambda *parts: np.mean(parts, axis=0), 4),
    "variance": (lambda: lambda *parts: vae.moments(*parts)[1], lambda *parts: np.var(parts, axis=0), 4),
}

ATTENTION_CHECKS = {name: partial(attention, shape) for name, shape in ATTENTIONS.items()}
