"""The flow sampler: schedules, packing and positions. Solvers stand in `solvers.py`.

Rectified flow (Liu et al. 2022; Lipman et al. 2022): x = (1 - sigma) * image + sigma * noise, and the transformer gives
dx / d sigma. Formulas are those of black-forest-labs/flux (src/flux/sampling.py) and of diffusers'
FlowMatchEulerDiscreteScheduler, which agree to 1.2e-7. B batch, L image tokens, h and w latent size.
"""

import math
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from ..models.config import Schedule

_TABLE = 10000  # levels of ComfyUI's table for FLUX.1
_TERMS = 64  # of a series, and halvings of an interval: as exact as float64


def shift_mu(schedule: Schedule, image_seq_len: int) -> float:
    """Returns mu, linear in the number of image tokens (Esser et al. 2024, section 5.3.2)."""
    slope = (schedule.max_shift - schedule.base_shift) / (schedule.max_image_seq_len - schedule.base_image_seq_len)
    return schedule.base_shift + slope * (image_seq_len - schedule.base_image_seq_len)


def make_sigmas(
    schedule: Schedule, image_seq_len: int, num_inference_steps: int, sigmas: Sequence[float] = ()
) -> np.ndarray:
    """Returns the noise levels of a run.

    Args:
        schedule: the model's shift.
        image_seq_len: L, the number of packed latents.
        num_inference_steps: n.
        sigmas: n levels before the shift, falling; empty: linspace(1, 1/n, n).

    Returns:
        (n + 1,) float32, from the first level down to 0.
    """
    levels = np.array(sigmas if len(sigmas) else np.linspace(1.0, 1 / num_inference_steps, num_inference_steps))
    levels = levels.astype(np.float32)  # float32 from here on, as in diffusers: equal to the last bit
    if schedule.shift == "dynamic":
        shift = np.float32(math.exp(shift_mu(schedule, image_seq_len)))
        levels = shift / (shift + (1 / levels - 1))
    return np.append(levels, np.float32(0))


def schedule_levels(name: str | None, num_inference_steps: int) -> np.ndarray | None:
    """Returns the noise levels of a schedule by its name, as levels before the model's shift.

    Both are ComfyUI's (comfy/samplers.py, simple_scheduler and beta_scheduler with ModelSamplingFlux), which pick n of
    a table of 10000 levels: "simple" evenly, "beta" at the quantiles of the beta distribution with both parameters 0.6
    (Lee et al. 2024, arXiv:2407.12173), so more of them near the noise and near the image.

    Args:
        name: one of `presets.SCHEDULES`, or None: the model's.
        num_inference_steps: n.

    Returns:
        (n,) float64, falling in (0, 1], for the argument `sigmas` of `make_sigmas`; None: evenly spaced ones.

    Raises:
        ValueError: a schedule that does not exist.
    """
    n = num_inference_steps
    if name is None:
        return None
    if name == "simple":
        return (_TABLE - np.floor(np.arange(n) * (_TABLE / n))) / _TABLE
    if name != "beta":
        raise ValueError(f"[schedule_levels] There is no schedule {name!r}.")
    places = np.rint(beta_quantiles(1 - np.arange(n) / n, 0.6) * (_TABLE - 1))
    return (places + 1) / _TABLE


def beta_quantiles(shares: np.ndarray, parameter: float) -> np.ndarray:
    """Returns quantiles of the beta distribution whose two parameters are equal, by bisection of its power series.

    Args:
        shares: (n,) in [0, 1].
        parameter: above 0.

    Returns:
        (n,) float64 in [0, 1].
    """
    low = np.minimum(shares, 1 - shares)  # the distribution is symmetric about one half
    orders = np.arange(_TERMS)
    factors = np.cumprod(np.append(1, (orders[1:] - parameter) / orders[1:])) / (parameter + orders)

    def below(x: np.ndarray) -> np.ndarray:
        return x**parameter * (factors * x[:, None] ** orders).sum(axis=1)

    half, least, most = below(np.array([0.5])), np.zeros(len(low)), np.full(len(low), 0.5)
    for _ in range(_TERMS):
        middle = (least + most) / 2
        is_low = below(middle) / (2 * half) < low
        least, most = np.where(is_low, middle, least), np.where(is_low, most, middle)
    found = np.select([low == 0, low == 0.5], [0.0, 0.5], (least + most) / 2)
    return np.where(shares > 0.5, 1 - found, found)


def fixed_shift(schedule: Schedule, image_seq_len: int, picked: np.ndarray | None, mu: float) -> np.ndarray:
    """Returns noise levels that are shifted by the same mu at every size, as levels before this schedule's shift.

    Args:
        schedule: the model's shift.
        image_seq_len: L, the number of packed latents.
        picked: (n,) levels before the shift, from `schedule_levels`.
        mu: the shift.

    Returns:
        (n,) float64, falling in (0, 1], for the argument `sigmas` of `make_sigmas`.
    """
    assert picked is not None
    own = shift_mu(schedule, image_seq_len) if schedule.shift == "dynamic" else mu
    return 1 / (1 + (1 / picked - 1) * math.exp(own - mu))


def embedded_times(sigmas: np.ndarray, rounding: str, dtype: mx.Dtype) -> mx.array:
    """Returns the numbers whose sinusoids the transformer reads, rounded on their way as a tool rounds them.

    Args:
        sigmas: (n,) float32 noise levels.
        rounding: a key of `presets.TIMESTEP_ROUNDING`.
        dtype: the compute type.

    Returns:
        (n,) 1000 sigma, float32 for "none", else in the compute type.
    """
    levels = mx.array(sigmas)
    if rounding == "there and back":
        return (levels * 1000).astype(dtype) / 1000 * 1000
    if rounding == "twice":
        return levels.astype(dtype) * 1000
    return levels * 1000 if rounding == "none" else (levels * 1000).astype(dtype)


def embedded_guidance(guidance: float, rounding: str, dtype: mx.Dtype) -> mx.array:
    """Returns 1000 times the guidance, in the compute type, rounded as `embedded_times` says."""
    return mx.array(1000 * guidance).astype(dtype) if rounding == "once" else mx.array(guidance).astype(dtype) * 1000


def first_step(num_inference_steps: int, strength: float) -> int:
    """Returns the first step of image-to-image: strength as in diffusers, 1 runs all steps."""
    return int(max(num_inference_steps - min(num_inference_steps * strength, num_inference_steps), 0))


def pack(x: mx.array) -> mx.array:
    """Packs patches of 2 x 2 as tokens: "b c (h ph) (w pw) -> b (h w) (c ph pw)"."""
    b, c, h, w = x.shape
    return x.reshape(b, c, h // 2, 2, w // 2, 2).transpose(0, 2, 4, 1, 3, 5).reshape(b, h * w // 4, 4 * c)


def unpack(x: mx.array, width: int, height: int) -> mx.array:
    """Reverses `pack` for a latent of this size: "b (h w) (c ph pw) -> b c (h ph) (w pw)"."""
    b, _, c = x.shape
    x = x.reshape(b, height // 2, width // 2, c // 4, 2, 2)
    return x.transpose(0, 3, 1, 4, 2, 5).reshape(b, c // 4, height, width)


def position_ids(text_length: int, width: int, height: int, references: Sequence[tuple[int, int]] = ()) -> mx.array:
    """Returns rope positions of all tokens of a picture.

    Args:
        text_length: S.
        width: w, the width of the latent.
        height: h, the height of the latent.
        references: height and width, in tokens, of each reference that follows (FLUX.1 Kontext).

    Returns:
        (S + h w / 4 + R, 3) int32: text at (0, 0, 0), image tokens at (0, row, column), those of the first reference at
        (1, row, column), of the second at (2, row, column).
    """
    grids = [np.zeros((text_length, 3), np.int32)]
    for number, (high, wide) in enumerate([(height // 2, width // 2), *references]):
        rows, columns = np.meshgrid(np.arange(high), np.arange(wide), indexing="ij")
        grids.append(np.stack([np.full_like(rows, number), rows, columns], axis=-1).reshape(-1, 3))
    return mx.array(np.concatenate(grids).astype(np.int32))


def add_noise(image_latents: mx.array, noise: mx.array, sigma: float) -> mx.array:
    """Returns the start of image-to-image: sigma * noise + (1 - sigma) * image."""
    return sigma * noise + (1.0 - sigma) * image_latents
