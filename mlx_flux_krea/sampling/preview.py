"""Previews: predicts the picture after each step, and maps its latents to colours.

A rectified flow is nearly straight, so two points of a path predict its end. One matrix product then maps latents to
colours, at an eighth of the picture's size: a rough picture at no cost.

B batch, C channels, h and w latent size. A map is (C + 1, 3): a row of red, green and blue for each channel of the
transformer's latents, and one that is added; colours are in [-1, 1].
"""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

Map = Sequence[Sequence[float]]


def predicted(before: mx.array, after: mx.array, sigma: float, following: float) -> mx.array:
    """Returns the clean latents that a step from `sigma` to `following` heads for, in the shape and type of `after`."""
    return after - following / (following - sigma) * (after - before)


def colours(latents: mx.array, latent_rgb: Map) -> np.ndarray:
    """Maps latents (B, C, h, w) to colours (B, h, w, 3) uint8."""
    *factors, bias = mx.array(np.array(latent_rgb, np.float32))
    rgb = latents.astype(mx.float32).transpose(0, 2, 3, 1) @ mx.stack(factors) + bias
    return np.array(mx.round(mx.clip(rgb / 2 + 0.5, 0, 1) * 255).astype(mx.uint8))


def fit_latent_rgb(latents: np.ndarray, pixels: np.ndarray) -> list[list[float]]:
    """Fits the map of an autoencoder by least squares, for `latent_rgb` in a model folder's model_index.json.

    Args:
        latents: (N, C, h, w), N pictures, scaled and shifted as for the transformer.
        pixels: (N, H, W, 3), the same pictures in [-1, 1], H and W multiples of h and w.

    Raises:
        ValueError: the shapes do not match.
    """
    n, c, h, w = latents.shape
    if pixels.shape[0] != n or pixels.shape[1] % h or pixels.shape[2] % w or pixels.shape[3] != 3:
        raise ValueError(f"[fit_latent_rgb] pixels {pixels.shape} do not match latents {latents.shape}")
    small = pixels.reshape(n, h, pixels.shape[1] // h, w, pixels.shape[2] // w, 3).mean((2, 4))
    known = np.concatenate([latents.transpose(0, 2, 3, 1).reshape(-1, c), np.ones((n * h * w, 1))], axis=1)
    fitted, *_ = np.linalg.lstsq(known, small.reshape(-1, 3), rcond=None)
    return fitted.round(5).tolist()
