"""The autoencoder: pixels in [-1, 1] to 16-channel latents at an eighth of the size, and back; images in, bytes out.

Names are those of black-forest-labs/flux (src/flux/modules/autoencoder.py). Arrays are NHWC, convolution weights OHWI,
the projections of the attention plain matrices. B batch, H and W pixels or latent positions, C channels, G groups.

Like the other networks this is a function of arrays; `run(stage, *args)` lets the caller evaluate stage by stage. Large
activations are computed in strips of rows with the statistics of the whole image: the same numbers, in less memory.
Some activations must be in memory whole, 1 KiB a pixel in 16 bits; `tiles.py` is for pictures too large for that.
"""

import math
from collections.abc import Callable
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from PIL import Image

from . import Runner, call
from .config import VAEConfig

# Values whose group statistics are taken at one time, and neighbours of which one kernel leaves mean and squared
# deviations alone (two float32 arrays of 32 MiB).
_STATISTICS_CHUNK, _NEIGHBOURS = 2**27, 16
# Values of one strip, where an activation is computed in strips (32 MiB in 16 bits).
STRIP = 2**24
# Queries of the mid attention at one time: its head width, 512, has no fused kernel, so scores are materialised.
_ATTENTION_CHUNK = 1024

Strip = Callable[[int, int], mx.array]  # strip(top, bottom): these rows of an activation


@partial(mx.compile, shapeless=True)
def affine(x: mx.array, scale: mx.array, shift: mx.array) -> mx.array:
    """Returns x * scale + shift, computed in float32 and rounded once: one pass on a GPU."""
    return (x.astype(mx.float32) * scale + shift).astype(x.dtype)


@partial(mx.compile, shapeless=True)
def affine_silu(x: mx.array, scale: mx.array, shift: mx.array) -> mx.array:
    """Returns silu(x * scale + shift), computed in float32 and rounded once: one pass on a GPU."""
    y = x.astype(mx.float32) * scale + shift
    return (y * mx.sigmoid(y)).astype(x.dtype)


@partial(mx.compile, shapeless=True)
def squared_deviation(x: mx.array, mean: mx.array) -> mx.array:
    """Returns (x - mean)^2 in float32: one pass on a GPU."""
    return mx.square(x.astype(mx.float32) - mean)


@mx.compile
def moments(*parts: mx.array) -> tuple[mx.array, mx.array]:
    """Returns mean and variance over arrays of one shape, place by place, in float32.

    One pass on a GPU, which reads each array once. Deviations from the first are small where the values are alike, so
    that nothing cancels. MLX fuses at most eleven operations one after the other, and two results only where one is
    needed for the other. Therefore sums are taken in pairs, the variance asks for the mean, and the function is
    compiled for each shape (shapeless=True would put a broadcast before each operation).
    """
    values = [part.astype(mx.float32) for part in parts]
    deviations = [value - values[0] for value in values]
    shift = _sum(deviations) / len(parts)
    mean = values[0] + shift
    return mean, _sum([mx.square(one) for one in deviations]) / len(parts) - shift * (mean - values[0])


def _sum(terms: list[mx.array]) -> mx.array:
    half = len(terms) // 2
    return _sum(terms[:half]) + _sum(terms[half:]) if half else terms[0]


def group_statistics(x: mx.array, groups: int) -> tuple[mx.array, mx.array]:
    """Returns mean and variance of each group over the whole image, in float32 for any type of x.

    x is read once, and never copied to float32: the moments of neighbouring positions are an eighth as many values.
    They, and those of chunks of rows, are joined after Chan, Golub and LeVeque (1979), as accurate as two passes.

    Args:
        x: (B, H, W, C).
        groups: G.

    Returns:
        Two (B, G) float32 arrays.
    """
    b, h, w, c = x.shape
    rows = max(1, _STATISTICS_CHUNK // (b * w * c))
    count, mean, variance = 0, mx.zeros(0), mx.zeros(0)  # the first chunk sets them
    for top in range(0, h, rows):
        part = x[:, top : top + rows]
        n, near = part.shape[1] * w, math.gcd(part.shape[1] * w, _NEIGHBOURS)
        part = part.reshape(b, -1, near, groups, c // groups)
        means, variances = moments(*(part[:, :, i] for i in range(near)))
        part_mean = _mean(means)
        part_variance = _mean(variances) + _mean(squared_deviation(means, part_mean[:, None, :, None]))
        if not count:
            mean, variance = part_mean, part_variance
        else:
            delta, share = part_mean - mean, n / (count + n)
            mean = mean + delta * share
            variance = variance * (1 - share) + part_variance * share + mx.square(delta) * share * (1 - share)
        count += n
    return mean, variance


def _mean(x: mx.array) -> mx.array:
    """Returns means of groups, (B, N, G, C/G) to (B, G), in two steps: the CPU adds one value after the other."""
    b, n, groups, per_group = x.shape
    return x.reshape(b, math.gcd(n, 512), -1, groups, per_group).mean(axis=(2, 4)).mean(axis=1)


class GroupNorm(nn.Module):
    """Group normalisation (Wu and He 2018) over the whole image: the statistics; rows apply them when they are used."""

    def __init__(self, groups: int, channels: int):
        super().__init__()
        self._groups = groups
        self.weight = mx.ones((channels,))
        self.bias = mx.zeros((channels,))

    def coefficients(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """Returns scale and shift, each (B, 1, 1, C) float32: x * scale + shift is the normalised and weighted x."""
        mean, variance = group_statistics(x, self._groups)
        per_group = x.shape[-1] // self._groups
        scale = mx.repeat(mx.rsqrt(variance + 1e-6), per_group, axis=-1) * self.weight
        shift = self.bias - mx.repeat(mean, per_group, axis=-1) * scale
        return scale[:, None, None], shift[:, None, None]


def in_strips(run: Runner, strip: Strip, height: int, row: int) -> mx.array:
    """Computes an activation in strips of rows, so that intermediate arrays are smaller than the activation.

    Args:
        run: evaluates a stage.
        strip: called as strip(top, bottom); returns the rows from top to bottom - 1, (B, rows, W, C).
        height: number of all rows.
        row: values that one row needs.
    """
    step = max(1, STRIP // row)
    if step >= height:
        return run(strip, 0, height)
    out = mx.zeros(0)  # the first strip makes it
    for top in range(0, height, step):
        rows = run(strip, top, min(top + step, height))
        out = run(_write, out, rows, top, height)
    return out


def _write(out: mx.array, rows: mx.array, top: int, height: int) -> mx.array:
    """Writes a strip into the activation; the first strip makes the array."""
    if top == 0:
        out = mx.zeros((rows.shape[0], height, *rows.shape[2:]), rows.dtype)
    out[:, top : top + rows.shape[1]] = rows  # in place, once it is evaluated: nobody else holds the old array
    return out


def convolve(
    x: mx.array, conv: nn.Conv2d, top: int, bottom: int, before: Callable[[mx.array], mx.array] | None = None
) -> mx.array:
    """Computes rows of a 3 x 3 convolution of the whole image, which is padded with zeros at its edges.

    Args:
        x: (B, H, W, C), the whole input.
        conv: holds the weights.
        top: first row of the result.
        bottom: row after the last.
        before: applied to the rows of the input first.
    """
    rows = x[:, max(top - 1, 0) : bottom + 1]
    if before:
        rows = before(rows)
    edges = int(top == 0), int(bottom == x.shape[1])
    if any(edges):
        rows = mx.pad(rows, [(0, 0), edges, (0, 0), (0, 0)])
    return mx.conv2d(rows, conv.weight, padding=(0, 1)) + conv.bias


class AttnBlock(nn.Module):
    """Single-head attention over all positions; queries in chunks, so that scores stay small."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = GroupNorm(groups, channels)
        self.q = nn.Linear(channels, channels)
        self.k = nn.Linear(channels, channels)
        self.v = nn.Linear(channels, channels)
        self.proj_out = nn.Linear(channels, channels)

    def __call__(self, x: mx.array, run: Runner = call) -> mx.array:
        b, h, w, c = x.shape
        y = run(lambda: affine(x, *self.norm.coefficients(x)).reshape(b, 1, h * w, c))
        q, k, v = (run(layer, y) for layer in (self.q, self.k, self.v))
        chunks = [
            run(partial(mx.fast.scaled_dot_product_attention, scale=c**-0.5), q[:, :, i : i + _ATTENTION_CHUNK], k, v)
            for i in range(0, h * w, _ATTENTION_CHUNK)
        ]
        y = chunks[0] if len(chunks) == 1 else mx.concatenate(chunks, axis=2)
        return run(lambda: x + self.proj_out(y).reshape(b, h, w, c))


class ResnetBlock(nn.Module):
    """Two normalised convolutions with a residual."""

    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = GroupNorm(groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = GroupNorm(groups, out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def __call__(self, x: mx.array, run: Runner = call) -> mx.array:
        height, row = x.shape[1], x.shape[2] * max(x.shape[3], self.conv1.bias.size)
        shortcut = self.nin_shortcut if "nin_shortcut" in self else lambda rows: rows
        y = in_strips(run, _activated(run, self.norm1, self.conv1, x), height, row)
        second = _activated(run, self.norm2, self.conv2, y)
        return in_strips(run, lambda a, b: second(a, b) + shortcut(x[:, a:b]), height, row)


def _activated(run: Runner, norm: GroupNorm, conv: nn.Conv2d, x: mx.array) -> Strip:
    """Makes the strips for `in_strips` that norm the whole image, apply SiLU and convolve."""
    scale, shift = run(norm.coefficients, x)
    return lambda top, bottom: convolve(x, conv, top, bottom, lambda rows: affine_silu(rows, scale, shift))


class Downsample(nn.Module):
    """Strided convolution, padded at the bottom and right only."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def __call__(self, x: mx.array, run: Runner = call) -> mx.array:
        def strip(top: int, bottom: int) -> mx.array:
            rows = x[:, 2 * top : 2 * bottom + 1]
            edge = 2 * bottom + 1 - 2 * top - rows.shape[1]
            return self.conv(mx.pad(rows, [(0, 0), (0, edge), (0, 1), (0, 0)]))

        return in_strips(run, strip, x.shape[1] // 2, 2 * x.shape[2] * x.shape[3])


class Upsample(nn.Module):
    """Nearest neighbour, then a convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def __call__(self, x: mx.array, run: Runner = call) -> mx.array:
        b, h, w, c = x.shape

        def strip(top: int, bottom: int) -> mx.array:
            first, last = max(top // 2 - 1, 0), min((bottom + 1) // 2 + 1, h)
            rows = mx.broadcast_to(x[:, first:last, None, :, None], (b, last - first, 2, w, 2, c))
            rows = rows.reshape(b, 2 * (last - first), 2 * w, c)
            return convolve(rows, self.conv, top - 2 * first, bottom - 2 * first)

        return in_strips(run, strip, 2 * h, 2 * w * c)


class Level(nn.Module):
    """The residual blocks of one resolution, and the change of resolution after them, if any."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, groups: int, resample: str | None):
        super().__init__()
        self.block = [ResnetBlock(in_channels if i == 0 else out_channels, out_channels, groups) for i in range(blocks)]
        if resample:
            self[resample] = Upsample(out_channels) if resample == "upsample" else Downsample(out_channels)

    def stages(self) -> list[nn.Module]:
        """Returns the modules in the order in which they run."""
        return [*self.block, *(self[name] for name in ("upsample", "downsample") if name in self)]


class Mid(nn.Module):
    """The middle: two residual blocks around attention."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, groups)

    def stages(self) -> list[nn.Module]:
        """Returns the modules in the order in which they run."""
        return [self.block_1, self.attn_1, self.block_2]


class Encoder(nn.Module):
    """Pixels to the moments of the posterior."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        groups, last = config.norm_num_groups, len(widths) - 1
        self.conv_in = nn.Conv2d(config.in_channels, config.ch, 3, padding=1)
        self.down = [
            Level(i, o, config.num_res_blocks, groups, "downsample" if n < last else None)
            for n, (i, o) in enumerate(zip([config.ch, *widths], widths, strict=False))
        ]
        self.mid = Mid(widths[-1], groups)
        self.norm_out = GroupNorm(groups, widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.z_channels, 3, padding=1)

    def __call__(self, x: mx.array, run: Runner = call) -> mx.array:
        """(B, H, W, 3) to (B, H/8, W/8, 2 * 16)."""
        first = partial(convolve, x, self.conv_in)
        x = in_strips(run, first, x.shape[1], x.shape[2] * self.conv_in.bias.size)
        levels = [stage for level in self.down for stage in level.stages()]
        for stage in (*levels, *self.mid.stages()):
            x = stage(x, run)
        return _last(run, self, x)


class Decoder(nn.Module):
    """Latents to pixels. As in the checkpoint, `up` counts from the largest resolution, and runs from its end."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        groups = config.norm_num_groups
        self.conv_in = nn.Conv2d(config.z_channels, widths[-1], 3, padding=1)
        self.mid = Mid(widths[-1], groups)
        self.up = [
            Level(i, o, config.num_res_blocks + 1, groups, "upsample" if n > 0 else None)
            for n, (i, o) in enumerate(zip([*widths[1:], widths[-1]], widths, strict=True))
        ]
        self.norm_out = GroupNorm(groups, widths[0])
        self.conv_out = nn.Conv2d(widths[0], config.out_ch, 3, padding=1)

    def __call__(self, x: mx.array, run: Runner = call) -> mx.array:
        """(B, h, w, 16) to (B, 8 h, 8 w, 3)."""
        x = run(self.conv_in, x)
        levels = [stage for level in reversed(self.up) for stage in level.stages()]
        for stage in (*self.mid.stages(), *levels):
            x = stage(x, run)
        return _last(run, self, x)


def _last(run: Runner, coder: Encoder | Decoder, x: mx.array) -> mx.array:
    strip = _activated(run, coder.norm_out, coder.conv_out, x)
    return in_strips(run, strip, x.shape[1], x.shape[2] * x.shape[3])


class VAE(nn.Module):
    """Encoder and decoder of one checkpoint."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    @property
    def dtype(self) -> mx.Dtype:
        """The compute type."""
        return self.decoder.conv_in.bias.dtype

    def encode(self, x: mx.array, run: Runner = call) -> tuple[mx.array, mx.array]:
        """Encodes an image.

        Args:
            x: (B, H, W, 3) in [-1, 1], sides divisible by 8.
            run: called as run(stage, *args) for each stage in order, so that the caller evaluates stage by stage.

        Returns:
            Mean and log variance of the posterior (clipped to [-30, 20] as the references do), each (B, H/8, W/8, 16).
        """
        mean, logvar = mx.split(self.encoder(x.astype(self.dtype), run), 2, axis=-1)
        return mean, mx.clip(logvar, -30.0, 20.0)

    def decode(self, z: mx.array, run: Runner = call) -> mx.array:
        """Decodes latents.

        Args:
            z: (B, h, w, 16), not scaled: latents / scale_factor + shift_factor.
            run: as in `encode`.

        Returns:
            (B, 8 h, 8 w, 3), about [-1, 1], not clipped.
        """
        return self.decoder(z.astype(self.dtype), run)


def pixels_from_image(image: Image.Image, width: int, height: int) -> mx.array:
    """Returns an RGB image as the encoder reads it, (1, height, width, 3) float32 in [-1, 1].

    Resizes with Lanczos, as diffusers' VaeImageProcessor does.
    """
    if image.size != (width, height):
        image = image.resize((width, height), Image.Resampling.LANCZOS)
    values = np.asarray(image, dtype=np.float32) / 255.0
    return mx.array(2.0 * values - 1.0)[None]


def pixels_to_bytes(x: mx.array, rule: str) -> mx.array:
    """Rounds decoded pixels to uint8.

    Args:
        x: (B, H, W, 3), about [-1, 1].
        rule: "round" as diffusers, or "truncate" as BFL's save_image and ComfyUI.
    """
    x = mx.clip(x.astype(mx.float32), -1.0, 1.0)
    if rule == "round":
        return mx.round((x * 0.5 + 0.5) * 255).astype(mx.uint8)
    return (127.5 * (x + 1.0)).astype(mx.uint8)
