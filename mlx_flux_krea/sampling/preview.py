"""Previews: what a step already knows of the picture, by a linear map from latents to colours.

A rectified flow runs straight, so that any two points of a path say where it would end. One matrix product then makes
colours of the latents at an eighth of the picture's size: poor ones, and free of cost.

B batch, C channels, h and w latent size. A map is (C + 1, 3): a row of red, green and blue for each channel of the
latents that the transformer sees, and one that is added; colours are in [-1, 1].
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

Map = Sequence[Sequence[float]]


def predicted(before: mx.array, after: mx.array, sigma: float, following: float) -> mx.array:
    """The clean latents that a step from `sigma` to `following` heads for; shapes and types are kept."""
    return after - following / (following - sigma) * (after - before)


def colours(latents: mx.array, latent_rgb: Map) -> np.ndarray:
    """(B, h, w, 3) uint8 of latents (B, C, h, w)."""
    *factors, bias = mx.array(latent_rgb, mx.float32)
    rgb = latents.astype(mx.float32).transpose(0, 2, 3, 1) @ mx.stack(factors) + bias
    return np.array(mx.round(mx.clip(rgb / 2 + 0.5, 0, 1) * 255).astype(mx.uint8))


def fit_latent_rgb(latents: np.ndarray, pixels: np.ndarray) -> list[list[float]]:
    """The map of an autoencoder by least squares, for `latent_rgb` in a model folder's model_index.json.

    Args:
        latents: (N, C, h, w) of N pictures, scaled and shifted as the transformer sees them.
        pixels: (N, H, W, 3) of the same pictures in [-1, 1], H and W multiples of h and w.

    Raises:
        ValueError: shapes that do not belong together.
    """
    n, c, h, w = latents.shape
    if pixels.shape[0] != n or pixels.shape[1] % h or pixels.shape[2] % w or pixels.shape[3] != 3:
        raise ValueError(f"[fit_latent_rgb] pixels {pixels.shape} do not belong to latents {latents.shape}")
    small = pixels.reshape(n, h, pixels.shape[1] // h, w, pixels.shape[2] // w, 3).mean((2, 4))
    known = np.concatenate([latents.transpose(0, 2, 3, 1).reshape(-1, c), np.ones((n * h * w, 1))], axis=1)
    fitted, *_ = np.linalg.lstsq(known, small.reshape(-1, 3), rcond=None)
    return fitted.round(5).tolist()
