"""Parts that encoders of pictures share. B batch, N positions, C width."""

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

# What transformers' image processors make of a byte where mean and deviation are 0.5: numbers in -1 to 1, to the bit.
LEVELS = ((np.arange(256) * (1 / 255)).astype(np.float32) - np.float32(0.5)) / np.float32(0.5)


def self_attention(x: mx.array, projections: Sequence[nn.Module], output: nn.Module, num_heads: int) -> mx.array:
    """Attends every position to all (Vaswani et al. 2017, section 3.2).

    Args:
        x: (B, N, C).
        projections: to queries, keys and values.
        output: the projection of what the heads give.
        num_heads: number of heads.

    Returns:
        (B, N, C).
    """
    b, n, c = x.shape
    q, k, v = (layer(x).reshape(b, n, num_heads, -1).transpose(0, 2, 1, 3) for layer in projections)
    x = mx.fast.scaled_dot_product_attention(q, k, v, scale=(c // num_heads) ** -0.5)
    return output(x.transpose(0, 2, 1, 3).reshape(b, n, c))
