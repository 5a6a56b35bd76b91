"""Relative depth of a photo: Depth Anything V2 (Yang et al. 2024), a DINOv2 backbone under a DPT head.

Written after transformers' DepthAnythingForDepthEstimation and Dinov2Backbone. B batch, h and w patches, N positions
(patches after the class token), H heads, C width. The results grow towards the camera and have no unit.
"""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from PIL import Image

from . import Runner, call
from .depth_config import DepthConfig
from .vision import self_attention

_MEAN = np.array([0.485, 0.456, 0.406], np.float32)  # of ImageNet's channels
_STD = np.array([0.229, 0.224, 0.225], np.float32)
_LONGEST = 4  # of the longer side, in `image_size`: attention grows with its square


def preprocess(image: Image.Image, config: DepthConfig) -> mx.array:
    """Resizes and normalizes a photo as in the network's training.

    Its shape is kept, nearly: the side that then changes less gets `image_size`, both become multiples of the patch.
    Beyond transformers' rule, no side is shorter than a patch or longer than four times `image_size`.

    Args:
        image: in mode RGB.
        config: the network's sizes.

    Returns:
        (1, height, width, 3) float32, as transformers' DPTImageProcessor with Pillow.
    """
    width, height = input_size(image.size, config)
    levels = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    return mx.array(((levels * np.float32(1 / 255) - _MEAN) / _STD).astype(np.float32)[None])


def input_size(size: tuple[int, int], config: DepthConfig) -> tuple[int, int]:
    """Returns the width and height at which the network reads a picture of this size."""
    scales = [config.image_size / side for side in size]
    scale = scales[0] if abs(1 - scales[0]) < abs(1 - scales[1]) else scales[1]
    scale = min(scale, _LONGEST * config.image_size / max(size))
    patch = config.patch_size
    width, height = (max(round(scale * side / patch), 1) * patch for side in size)
    return width, height


# --- resizing, as products with small matrices ---


def _bilinear(old: int, new: int) -> mx.array:
    """Returns (new, old) float32: weights of linear interpolation whose first and last points are those of the old."""
    at = np.arange(new) * ((old - 1) / (new - 1) if new > 1 else 0.0)
    return mx.array(np.maximum(0, 1 - np.abs(at[:, None] - np.arange(old))).astype(np.float32))


def _bicubic(old: int, new: int) -> mx.array:
    """Returns (new, old) float32: weights of cubic interpolation (a = -0.75, edges repeated, not wider to shrink)."""
    at = (np.arange(new) + 0.5) * (old / new) - 0.5
    first = np.floor(at).astype(int)
    weights = np.zeros((new, old), np.float32)
    for place in range(-1, 3):
        x = np.abs(at - first - place)
        near = (1.25 * x - 2.25) * x * x + 1
        far = ((-0.75 * x + 3.75) * x - 6) * x + 3
        np.add.at(weights, (np.arange(new), np.clip(first + place, 0, old - 1)), np.where(x <= 1, near, far))
    return mx.array(weights)


def _resize(x: mx.array, rows: mx.array, columns: mx.array) -> mx.array:
    """(B, h, w, C) to (B, height, width, C) by the weights (height, h) and (width, w)."""
    b, h, w, c = x.shape
    x = (rows.astype(x.dtype) @ x.reshape(b, h, w * c)).reshape(b, -1, w, c)
    return columns.astype(x.dtype) @ x


# --- the backbone ---


class DINOv2Layer(nn.Module):
    """Pre-norm attention and MLP, each scaled by a vector before its residual."""

    def __init__(self, config: DepthConfig):
        super().__init__()
        dim, eps = config.hidden_size, config.layer_norm_eps
        self._num_heads = config.num_attention_heads
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.projection = nn.Linear(dim, dim)
        self.layer_scale1 = mx.ones((dim,))
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.fc1 = nn.Linear(dim, dim * config.mlp_ratio)
        self.fc2 = nn.Linear(dim * config.mlp_ratio, dim)
        self.layer_scale2 = mx.ones((dim,))

    def __call__(self, x: mx.array) -> mx.array:
        """(B, N, C) to a new (B, N, C)."""
        x = x + self._attend(self.norm1(x)) * self.layer_scale1
        return x + self.fc2(nn.gelu(self.fc1(self.norm2(x)))) * self.layer_scale2

    def _attend(self, x: mx.array) -> mx.array:
        return self_attention(x, (self.query, self.key, self.value), self.projection, self._num_heads)


# --- neck and head (DPT, Ranftl et al. 2021) ---


class Enlarge(nn.Module):
    """A transposed convolution whose stride is its kernel: every pixel becomes a square."""

    def __init__(self, channels: int, factor: int):
        super().__init__()
        self.weight = mx.zeros((channels, factor, factor, channels))  # (in, row, column, out)
        self.bias = mx.zeros((channels,))

    def __call__(self, x: mx.array) -> mx.array:
        """(B, h, w, C) to (B, h f, w f, C)."""
        (b, h, w, c), f = x.shape, self.weight.shape[1]
        x = (x @ self.weight.reshape(c, -1)).reshape(b, h, w, f, f, c)  # b h w (dy dx c)
        return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, h * f, w * f, c) + self.bias


class Reassemble(nn.Module):
    """Projects the states of a layer, and gives them the size of their level."""

    def __init__(self, config: DepthConfig, channels: int, factor: float):
        super().__init__()
        self.projection = nn.Linear(config.hidden_size, channels)
        if factor > 1:
            self.resize = Enlarge(channels, int(factor))
        elif factor < 1:
            self.resize = nn.Conv2d(channels, channels, 3, int(1 / factor), 1)

    def __call__(self, x: mx.array) -> mx.array:
        """(B, h, w, C) to (B, h factor, w factor, channels), rounded up."""
        x = self.projection(x)
        return self.resize(x) if "resize" in self else x


class ResidualConvolutions(nn.Module):
    """Two 3 x 3 convolutions, each after a ReLU, with a residual."""

    def __init__(self, channels: int):
        super().__init__()
        self.convolution1 = nn.Conv2d(channels, channels, 3, 1, 1)
        self.convolution2 = nn.Conv2d(channels, channels, 3, 1, 1)

    def __call__(self, x: mx.array) -> mx.array:
        """(B, h, w, C) to a new (B, h, w, C)."""
        return x + self.convolution2(nn.relu(self.convolution1(nn.relu(x))))


class Fusion(nn.Module):
    """Adds a level to the coarser ones, and resizes the sum."""

    def __init__(self, channels: int, is_first: bool):
        super().__init__()
        self.projection = nn.Linear(channels, channels)
        if not is_first:
            self.residual_layer1 = ResidualConvolutions(channels)
        self.residual_layer2 = ResidualConvolutions(channels)

    def __call__(self, x: mx.array, level: mx.array | None, size: tuple[int, int]) -> mx.array:
        """(B, h, w, C), and a level of the same shape but for the first, to (B, *size, C)."""
        if level is not None:
            x = x + self.residual_layer1(level)
        x = self.residual_layer2(x)
        return self.projection(_resize(x, _bilinear(x.shape[1], size[0]), _bilinear(x.shape[2], size[1])))


class DepthAnything(nn.Module):
    """The network: photos to relative depth."""

    def __init__(self, config: DepthConfig):
        super().__init__()
        dim, features = config.hidden_size, config.fusion_hidden_size
        self.config = config
        self.cls_token = mx.zeros((1, 1, dim))
        self.position_embeddings = mx.zeros((1, config.grid**2 + 1, dim))
        self.patch_embeddings = nn.Conv2d(3, dim, config.patch_size, config.patch_size)
        self.layers = [DINOv2Layer(config) for _ in range(config.num_hidden_layers)]
        self.layernorm = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        levels = list(zip(config.neck_hidden_sizes, config.reassemble_factors, strict=True))
        self.reassemble = [Reassemble(config, channels, factor) for channels, factor in levels]
        self.convs = [nn.Conv2d(channels, features, 3, 1, 1, bias=False) for channels, _ in levels]
        self.fusion = [Fusion(features, is_first=number == 0) for number in range(len(levels))]
        self.conv1 = nn.Conv2d(features, features // 2, 3, 1, 1)
        self.conv2 = nn.Conv2d(features // 2, config.head_hidden_size, 3, 1, 1)
        self.conv3 = nn.Linear(config.head_hidden_size, 1)

    @property
    def stages(self) -> int:
        """Number of stages that a call runs."""
        return 2 + self.config.out_indices[-1] + 2 * len(self.fusion)

    def embed(self, pixels: mx.array) -> mx.array:
        """Embeds (B, height, width, 3): the class token and all patches, row by row, with positions, (B, N, C)."""
        patches = self.patch_embeddings(pixels.astype(self.cls_token.dtype))
        b, h, w, c = patches.shape
        grid, positions = self.config.grid, self.position_embeddings
        if (h, w) != (grid, grid):
            square = positions[:, 1:].astype(mx.float32).reshape(1, grid, grid, c)
            resized = _resize(square, _bicubic(grid, h), _bicubic(grid, w)).reshape(1, h * w, c)
            positions = mx.concatenate([positions[:, :1], resized.astype(positions.dtype)], axis=1)
        cls = mx.broadcast_to(self.cls_token, (b, 1, c))
        return mx.concatenate([cls, patches.reshape(b, h * w, c)], axis=1) + positions

    def level(self, number: int, x: mx.array, h: int, w: int) -> mx.array:
        """States (B, N, C) of a layer to the features (B, rows, columns, fusion_hidden_size) of a level."""
        x = self.layernorm(x)[:, 1:].reshape(len(x), h, w, -1)
        return self.convs[number](self.reassemble[number](x))

    def estimate(self, x: mx.array, h: int, w: int) -> mx.array:
        """Features of the finest fusion to depth, (B, height, width)."""
        x, patch = self.conv1(x), self.config.patch_size
        x = _resize(x, _bilinear(x.shape[1], h * patch), _bilinear(x.shape[2], w * patch))
        return nn.relu(self.conv3(nn.relu(self.conv2(x)))).squeeze(-1)

    def __call__(self, pixels: mx.array, run: Runner = call) -> mx.array:
        """Estimates the depth of photos.

        Args:
            pixels: (B, height, width, 3), from `preprocess`; sides are multiples of `patch_size`.
            run: called as run(stage, *args) for each stage in order, so that the caller evaluates stage by stage.

        Returns:
            (B, height, width) in the type of the weights: 0 and more, larger where nearer.

        Raises:
            ValueError: another shape.
        """
        patch = self.config.patch_size
        if pixels.ndim != 4 or pixels.shape[-1] != 3 or pixels.shape[1] % patch or pixels.shape[2] % patch:
            raise ValueError(f"[DepthAnything] pixels have shape {pixels.shape}, not (B, {patch} h, {patch} w, 3).")
        h, w = pixels.shape[1] // patch, pixels.shape[2] // patch
        x, levels = run(self.embed, pixels), []
        for number, layer in enumerate(self.layers[: self.config.out_indices[-1]], 1):
            x = run(layer, x)
            if number in self.config.out_indices:
                levels.append(run(self.level, len(levels), x, h, w))
        x = None
        for fuse in self.fusion:  # from the coarsest level to the finest
            level = levels.pop()
            size = levels[-1].shape[1:3] if levels else (2 * level.shape[1], 2 * level.shape[2])
            x = run(fuse, level, None, size) if x is None else run(fuse, x, level, size)
        return run(self.estimate, x, h, w)
