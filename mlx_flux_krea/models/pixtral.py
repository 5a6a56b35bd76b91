"""Pixtral: a language model that reads pictures (Agrawal et al. 2024), asked for one word, "yes" or "no".

Written after transformers' LlavaForConditionalGeneration with a Pixtral vision tower and a Mistral decoder. Both have
the same kind of block: RMS norm, attention and a gated SiLU MLP without biases, rotation of the two halves of a head
against each other. (An early config.json has "gelu" for the tower; it was trained with SiLU, and the file was
corrected.) One evaluation gives the logits at the last position, for the few tokens in `config.head_ids`; no text is
generated.
B batch (1), S tokens, N patches, H heads, D head width, C width of the decoder, V of the tower.
"""

from collections.abc import Sequence
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from PIL import Image

from . import Runner, call
from .filter_config import PIXTRAL_12B, PixtralConfig, PixtralVisionConfig

_AREA = 512 * 512
_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)  # CLIP's
_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
_LEVELS = ((np.arange(256) * (1 / 255)).astype(np.float32)[:, None] - _MEAN) / _STD
_NORM_EPS = 1e-5  # of the tower; no config.json says it


def to_area(image: Image.Image) -> Image.Image:
    """Resizes a picture to about 512 x 512 pixels in its own aspect, as Black Forest Labs' filter does.

    Raises:
        ValueError: the picture is so narrow that a side would have no pixel.
    """
    width, height = image.size
    factor = (_AREA / (width * height)) ** 0.5
    size = int(factor * width), int(factor * height)
    if not all(size):
        raise ValueError(
            f"[pixtral.to_area] a picture of {width} x {height} is too narrow for 512 x 512 pixels in its aspect"
        )
    return image.convert("RGB").resize(size, Image.Resampling.BICUBIC)


def preprocess(image: Image.Image, config: PixtralVisionConfig = PIXTRAL_12B.vision_config) -> mx.array:
    """Prepares a picture for the vision tower: no side longer than `image_size`, every side in whole patches.

    Returns:
        (1, height, width, 3) float32, bit for bit as transformers' PixtralImageProcessor with Pillow.
    """
    patch, ratio = config.patch_size, max(1.0, max(image.size) / config.image_size)
    sides = [-(-(int(side / ratio) if ratio > 1 else side) // patch) * patch for side in image.size]
    if not all(sides):
        width, height = image.size
        raise ValueError(f"[pixtral.preprocess] a picture of {width} x {height} is too narrow")
    pixels = np.asarray(image.convert("RGB").resize(sides, Image.Resampling.BICUBIC))
    return mx.array(_LEVELS[pixels, np.arange(3)][None])


def grid(pixels: mx.array, config: PixtralVisionConfig = PIXTRAL_12B.vision_config) -> tuple[int, int]:
    """Returns the numbers of rows and columns of patches in (1, height, width, 3)."""
    return pixels.shape[1] // config.patch_size, pixels.shape[2] // config.patch_size


# --- small kernels. Inside they compute in float32 and round once; on a GPU each is one pass over memory. ---


@partial(mx.compile, shapeless=True)
def swiglu(gate: mx.array, up: mx.array) -> mx.array:
    """Returns silu(gate) * up."""
    y = gate.astype(mx.float32)
    return (y * mx.sigmoid(y) * up.astype(mx.float32)).astype(gate.dtype)


@mx.compile
def turn(a: mx.array, b: mx.array, first: mx.array, second: mx.array) -> mx.array:
    """Returns first * a + second * b, in the type of a."""
    return (first * a.astype(mx.float32) + second * b.astype(mx.float32)).astype(a.dtype)


def rotations(angles: np.ndarray) -> mx.array:
    """Makes the tables of `rotate` for (N, D/2) angles: (2, N, 2, D/2) float32, for both halves of a head.

    Cosines and sines are computed in double precision: a GPU's would be inexact for the last of many positions.
    """
    cos, sin = np.cos(angles), np.sin(angles)
    halves = np.stack([cos, sin], axis=1), np.stack([-sin, cos], axis=1)
    return mx.array(np.stack(halves).astype(np.float32))


def rotate(x: mx.array, pe: mx.array) -> mx.array:
    """Turns the pairs (j, j + D/2) of every head of (B, H, N, D) by the angles of its position."""
    halves = x.reshape(*x.shape[:-1], 2, -1)
    return turn(halves[..., :1, :], halves[..., 1:, :], *pe).reshape(x.shape)


class Attention(nn.Module):
    """Self-attention; several heads may share keys and values."""

    def __init__(self, dim: int, num_heads: int, num_kv_heads: int, head_dim: int, causal: bool):
        super().__init__()
        self._head_dim = head_dim
        self._mask = "causal" if causal else None
        self.q_proj = nn.Linear(dim, num_heads * head_dim, bias=False)
        self.k_proj = nn.Linear(dim, num_kv_heads * head_dim, bias=False)
        self.v_proj = nn.Linear(dim, num_kv_heads * head_dim, bias=False)
        self.o_proj = nn.Linear(num_heads * head_dim, dim, bias=False)

    def __call__(self, x: mx.array, pe: mx.array) -> mx.array:
        b, n, _ = x.shape
        q, k, v = (
            layer(x).reshape(b, n, -1, self._head_dim).transpose(0, 2, 1, 3)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, pe), rotate(k, pe)
        x = mx.fast.scaled_dot_product_attention(q, k, v, scale=self._head_dim**-0.5, mask=self._mask)
        return self.o_proj(x.transpose(0, 2, 1, 3).reshape(b, n, -1))


class FeedForward(nn.Module):
    """silu(gate x) * up x, then down."""

    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))


class Block(nn.Module):
    """Pre-norm attention and MLP with residuals, of the tower or of the decoder."""

    def __init__(self, attention: Attention, dim: int, hidden: int, eps: float):
        super().__init__()
        self.attention_norm = nn.RMSNorm(dim, eps)
        self.attention = attention
        self.ffn_norm = nn.RMSNorm(dim, eps)
        self.feed_forward = FeedForward(dim, hidden)

    def __call__(self, x: mx.array, pe: mx.array) -> mx.array:
        """Returns a new x (B, N, C) from x and the result of `rotations`."""
        x = x + self.attention(self.attention_norm(x), pe)
        return x + self.feed_forward(self.ffn_norm(x))


class VisionTower(nn.Module):
    """Vision tower: one picture to one vector for each patch, without a norm after the last block."""

    def __init__(self, config: PixtralVisionConfig):
        super().__init__()
        dim, heads = config.hidden_size, config.num_attention_heads
        self.config = config
        self.patch_conv = nn.Conv2d(3, dim, config.patch_size, config.patch_size, bias=False)
        self.ln_pre = nn.RMSNorm(dim, _NORM_EPS)
        self.layers = [
            Block(Attention(dim, heads, heads, config.head_dim, causal=False), dim, config.intermediate_size, _NORM_EPS)
            for _ in range(config.num_hidden_layers)
        ]

    def embed(self, pixels: mx.array) -> mx.array:
        """Embeds (1, height, width, 3) as patches, row by row: (1, N, V)."""
        return self.ln_pre(self.patch_conv(pixels.astype(self.ln_pre.weight.dtype)).flatten(1, 2))

    def positions(self, rows: int, columns: int) -> mx.array:
        """Returns rotations of patches: even frequencies follow the row, odd ones the column."""
        width = self.config.head_dim
        frequencies = self.config.rope_theta ** -(np.arange(0, width, 2) / width)
        row, column = np.divmod(np.arange(rows * columns), columns)
        angles = np.outer(row, frequencies[::2]), np.outer(column, frequencies[1::2])
        return rotations(np.concatenate(angles, axis=1))


class Projector(nn.Module):
    """Projects vectors of patches to the width of the decoder."""

    def __init__(self, config: PixtralConfig):
        super().__init__()
        dim = config.text_config.hidden_size
        self.linear_1 = nn.Linear(config.vision_config.hidden_size, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def __call__(self, x: mx.array) -> mx.array:
        """Maps (1, N, V) to (1, N, C)."""
        return self.linear_2(nn.gelu(self.linear_1(x)))


class Pixtral(nn.Module):
    """Pixtral: token ids and pictures to the logits of the next token."""

    def __init__(self, config: PixtralConfig):
        super().__init__()
        text = config.text_config
        dim, heads = text.hidden_size, (text.num_attention_heads, text.num_key_value_heads, text.head_dim)
        self.config = config
        self.embed_tokens = nn.Embedding(text.vocab_size, dim)
        self.layers = [
            Block(Attention(dim, *heads, causal=True), dim, text.intermediate_size, text.rms_norm_eps)
            for _ in range(text.num_hidden_layers)
        ]
        self.norm = nn.RMSNorm(dim, text.rms_norm_eps)
        self.lm_head = nn.Linear(dim, len(config.head_ids), bias=False)
        self.vision_tower = VisionTower(config.vision_config)
        self.multi_modal_projector = Projector(config)

    def features(self, pixels: mx.array, run: Runner = call) -> mx.array:
        """Encodes a picture for the decoder.

        Args:
            pixels: (1, height, width, 3), from `preprocess`.
            run: called as run(stage, *args) for each stage in order, so that the caller evaluates stage by stage.

        Returns:
            (1, N, C), patches row by row.
        """
        pe = self.vision_tower.positions(*grid(pixels, self.config.vision_config))
        x = run(self.vision_tower.embed, pixels)
        for block in self.vision_tower.layers:
            x = run(block, x, pe)
        return run(self.multi_modal_projector, x)

    def merge(self, x: mx.array, ids: Sequence[int], *features: mx.array) -> mx.array:
        """Returns the embedded tokens (1, S, C), with image tokens replaced by the patches (1, N, C) of each picture.

        Raises:
            ValueError: the numbers of image tokens and patches differ.
        """
        is_image = np.asarray(ids) == self.config.image_token_index
        patches, tokens = sum(feature.shape[1] for feature in features), int(is_image.sum())
        if tokens != patches:
            raise ValueError(f"[Pixtral.merge] {tokens} image tokens for {patches} patches")
        index = np.where(is_image, len(ids) + np.cumsum(is_image) - 1, np.arange(len(ids)))
        return mx.take(mx.concatenate([x, *features], axis=1), mx.array(index.astype(np.int32)), axis=1)

    def positions(self, length: int) -> mx.array:
        """Returns rotations of the decoder; tokens of text and of pictures are counted alike."""
        config = self.config.text_config
        frequencies = config.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
        return rotations(np.outer(np.arange(length), frequencies))

    def head(self, x: mx.array) -> mx.array:
        """Maps (1, S, C) to float32 logits (1, S, len(head_ids)). In 16 bits many close answers would be equal."""
        return self.norm(x).astype(mx.float32) @ self.lm_head.weight.astype(mx.float32).T

    def hidden(self, ids: Sequence[int], images: Sequence[mx.array] = (), run: Runner = call) -> mx.array:
        """Returns the result of the last block, (1, S, C), for `head`. Arguments as in `__call__`."""
        features = [self.features(pixels, run) for pixels in images]
        x = run(self.embed_tokens, mx.array(list(ids))[None])
        x = run(self.merge, x, ids, *features)
        pe = self.positions(len(ids))
        for block in self.layers:
            x = run(block, x, pe)
        return x

    def __call__(self, ids: Sequence[int], images: Sequence[mx.array] = (), run: Runner = call) -> mx.array:
        """Reads a prompt.

        Args:
            ids: S token ids, one image token for each patch of the pictures.
            images: (1, height, width, 3) each, from `preprocess`.
            run: called as run(stage, *args) for each stage in order, so that the caller evaluates stage by stage.

        Returns:
            (1, len(head_ids)) float32 logits of the next token.

        Raises:
            ValueError: the numbers of image tokens and patches differ.
        """
        return run(self.head, self.hidden(ids, images, run)[:, -1:])[:, 0]

    def margin(self, ids: Sequence[int], images: Sequence[mx.array] = (), run: Runner = call) -> mx.array:
        """Returns the logit of "yes" less that of "no", (1,) float32. Arguments as in `__call__`."""
        logits = self(ids, images, run)
        return logits[:, 0] - logits[:, 1]
