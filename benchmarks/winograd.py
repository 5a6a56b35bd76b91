"""MLX's Winograd convolutions on Metal, emulated: what they would do to the image decoder in 16 bits.

    python benchmarks/winograd.py

On Metal MLX sends large 3 x 3 convolutions through F(6,3) (Lavin and Gray, arXiv:1509.09308): tiles of 8 x 8 inputs
are transformed, multiplied with transformed weights, and transformed back to 6 x 6 outputs; each array between has the
type of the input. When, is read from `dispatch_conv_2D_gpu` in mlx/backend/metal/conv.cpp, how, from the kernels in
mlx/backend/metal/kernels/conv.metal (ml-explore/mlx 846d176). MLX_CONV_WINOGRAD=0 turns it off (ml-explore/mlx#4639),
which the package sets. `emulated` makes `mx.conv2d` do here what it does there, the variable included.
"""

import contextlib
import os
from collections.abc import Iterator
from unittest import mock

import mlx.core as mx
import numpy as np
from PIL import Image

_POINTS = np.array([1, -1, 2, -2, 1 / 2, -1 / 2])
_OUT = np.column_stack([np.eye(6)[0], np.power(_POINTS, np.arange(6)[:, None]), np.eye(6)[5]])  # A^T of the paper
_IN = np.array([  # B^T
    [1, 0, -21 / 4, 0, 21 / 4, 0, -1, 0],
    [0, 1, 1, -17 / 4, -17 / 4, 1, 1, 0],
    [0, -1, 1, 17 / 4, -17 / 4, -1, 1, 0],
    [0, 1 / 2, 1 / 4, -5 / 2, -5 / 4, 2, 1, 0],
    [0, -1 / 2, 1 / 4, 5 / 2, -5 / 4, -2, 1, 0],
    [0, 2, 4, -5 / 2, -5, 1 / 2, 1, 0],
    [0, -2, 4, 5 / 2, -5, -1 / 2, 1, 0],
    [0, -1, 0, 21 / 4, 0, -21 / 4, 0, 1],
])  # fmt: skip
_WEIGHT = np.array([  # G
    [1, 0, 0],
    [-2 / 9, -2 / 9, -2 / 9],
    [-2 / 9, 2 / 9, -2 / 9],
    [1 / 90, 1 / 45, 2 / 45],
    [1 / 90, -1 / 45, 2 / 45],
    [32 / 45, 16 / 45, 8 / 45],
    [32 / 45, -16 / 45, 8 / 45],
    [0, 0, 1],
])  # fmt: skip


def is_sent(
    x: tuple[int, ...], weight: tuple[int, ...], stride: int | tuple[int, int] = 1, least: tuple[int, int] = (4096, 256)
) -> bool:
    """Tells if MLX sends a convolution without dilation or groups through Winograd's algorithm on Metal.

    Args:
        x: shape of the input, (B, H, W, C).
        weight: shape of the weights, (O, 3, 3, C).
        stride: of the convolution.
        least: positions B H W, and channels C + O, from which MLX does so.
    """
    (b, h, w, c), o = x, weight[0]
    is_possible = stride in (1, (1, 1)) and weight[1:3] == (3, 3) and c % 32 == 0 and o % 32 == 0
    return is_possible and b * h * w >= least[0] and c + o >= least[1]


def convolve(x: mx.array, weight: mx.array, padding: tuple[int, int] = (0, 0)) -> mx.array:
    """Returns the convolution as F(6,3) computes it, products and sums in float32, every array in x's type.

    Args:
        x: (B, H, W, C).
        weight: (O, 3, 3, C).
        padding: zeros above and below, left and right.
    """
    into, back, kernel = (mx.array(matrix.astype(np.float32)) for matrix in (_IN, _OUT, _WEIGHT))
    (down, across), (b, h, w, c), o = padding, x.shape, weight.shape[0]
    rows, columns = h + 2 * down - 2, w + 2 * across - 2  # of the result
    tall, wide = -(-rows // 6), -(-columns // 6)  # tiles
    edges = [(down, 6 * tall + 2 - h - down), (across, 6 * wide + 2 - w - across)]
    x = mx.pad(x, [(0, 0), *edges, (0, 0)])
    ys, xs = (6 * mx.arange(tiles)[:, None] + mx.arange(8) for tiles in (tall, wide))
    tiles = x[:, ys][:, :, :, xs].astype(mx.float32)  # (B, tall, 8, wide, 8, C)
    tiles = mx.einsum("ij,btjukc,lk->iltubc", into, tiles, into).astype(x.dtype).reshape(64, -1, c)
    weights = mx.einsum("ij,ojkc,lk->ilco", kernel, weight.astype(mx.float32), kernel).astype(x.dtype)
    products = (tiles.astype(mx.float32) @ weights.reshape(64, c, o).astype(mx.float32)).astype(x.dtype)
    products = products.reshape(8, 8, tall, wide, b, o).astype(mx.float32)
    y = mx.einsum("ij,jktubo,lk->btiulo", back, products, back).astype(x.dtype)
    return y.reshape(b, 6 * tall, 6 * wide, o)[:, :rows, :columns]


@contextlib.contextmanager
def emulated(least: tuple[int, int] = (4096, 256)) -> Iterator[dict[str, int]]:
    """Makes `mx.conv2d` do what it does on Metal within the block. Gives the multiplications that were sent or not.

    Args:
        least: as of `is_sent`.
    """
    direct, counts = mx.conv2d, {"sent": 0, "direct": 0}

    def conv2d(x, weight, stride=1, padding=0, dilation=1, groups=1):
        is_on = os.environ.get("MLX_CONV_WINOGRAD", "1") != "0"  # read at each convolution, as MLX does
        is_plain = dilation in (1, (1, 1)) and groups == 1
        way = "sent" if is_on and is_plain and is_sent(x.shape, weight.shape, stride, least) else "direct"
        counts[way] += x.size * weight.size // x.shape[-1]
        if way == "sent":
            return convolve(x, weight, (padding, padding) if isinstance(padding, int) else padding)
        return direct(x, weight, stride, padding, dilation, groups)

    with mock.patch.object(mx, "conv2d", conv2d):
        yield counts


def decoder_errors(side: int, seed: int = 0) -> dict[str, tuple[float, int]]:
    """Decodes a soft picture's latents with the small model in bfloat16, directly and through Winograd's algorithm.

    Its convolutions have too few channels for MLX to send them; here they are sent nevertheless.

    Args:
        side: pixels.
        seed: of the picture.

    Returns:
        Of both: the PSNR in dB and the largest difference in levels of 255, against the direct float32 picture.
    """
    from mlx_flux_krea.home import NANO
    from mlx_flux_krea.models.vae import pixels_from_image, pixels_to_bytes
    from mlx_flux_krea.weights import open_model

    vae = open_model(NANO).vae.load(mx.float32)
    rng = np.random.default_rng(seed)
    soft = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8)).resize((side, side), Image.Resampling.BICUBIC)
    latents = vae.encode(pixels_from_image(soft, side, side))[0]
    expected = vae.decode(latents)
    with_type = open_model(NANO).vae.load(mx.bfloat16)
    found = {}
    for name, variable in (("direct", "0"), ("Winograd", "1")):
        with mock.patch.dict(os.environ, MLX_CONV_WINOGRAD=variable), emulated(least=(0, 0)):
            pixels = with_type.decode(latents)
        error = mx.clip(pixels.astype(mx.float32), -1, 1) - mx.clip(expected, -1, 1)
        levels = mx.abs(pixels_to_bytes(pixels, "round").astype(mx.int32) - pixels_to_bytes(expected, "round"))
        found[name] = -10 * np.log10(float(mx.square(error / 2).mean())), int(levels.max())
    return found


def main() -> None:
    """Prints the errors of one convolution, and of the small model's decoder."""
    rng = np.random.default_rng(0)
    x, weight = (
        mx.array(rng.standard_normal(shape)).astype(mx.bfloat16) for shape in ((1, 64, 64, 128), (128, 3, 3, 128))
    )
    exact = mx.conv2d(x.astype(mx.float32), weight.astype(mx.float32), padding=1)
    for name, y in (("direct", mx.conv2d(x, weight, padding=1)), ("Winograd", convolve(x, weight, (1, 1)))):
        error = mx.linalg.norm(y.astype(mx.float32) - exact) / mx.linalg.norm(exact)
        print(f"one convolution of white noise, bfloat16, {name:10}{100 * error.item():6.2f} %")
    for way, (psnr, levels) in decoder_errors(256).items():
        print(f"decoder of the small model, bfloat16, {way:10}{psnr:6.1f} dB, at most {levels} of 255 levels")


if __name__ == "__main__":
    main()
