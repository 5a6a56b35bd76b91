"""Pixtral: a language model that reads pictures (Agrawal et al. 2024), asked for one word, "yes" or "no".

Written after transformers' LlavaForConditionalGeneration with a Pixtral vision tower and a Mistral decoder. Both have
the same kind of block: RMS norm, attention and a gated SiLU MLP without biases, rotation of the two halves of a head
against each other. (An early config.json has "gelu" for the tower; it was trained with SiLU, and the file was
corrected.) One evaluation gives the logits at the last position, for the few tokens in `config.head_ids`; no text is
generated. Several questions go through each block one after the other, so that a block is read once for all of them;
each is computed by itself, with the numbers that it has alone.
B batch (1), S tokens, N patches, H heads, D head width, C width of the decoder, V of the tower.
"""

from collections.abc import Mapping, Sequence
from functools import partial

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from PIL import Image

from . import Runner, call
from .filter_config import PIXTRAL_12B, PixtralConfig, PixtralVisionConfig

Question = tuple[Sequence[int], Sequence[mx.array]]  # token ids, and pictures (1, height, width, 3) from `preprocess`

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
        self._places: dict[int, int] | None = None  # rows of the table by token; None: it is whole
        self.embed_tokens = nn.Embedding(text.vocab_size, dim)
        self.layers = [
            Block(Attention(dim, *heads, causal=True), dim, text.intermediate_size, text.rms_norm_eps)
            for _ in range(text.num_hidden_layers)
        ]
        self.norm = nn.RMSNorm(dim, text.rms_norm_eps)
        self.lm_head = nn.Linear(dim, len(config.head_ids), bias=False)
        self.vision_tower = VisionTower(config.vision_config)
        self.multi_modal_projector = Projector(config)

    def features(self, pixels: Sequence[mx.array], run: Runner = call) -> list[mx.array]:
        """Encodes pictures for the decoder, each by itself.

        Args:
            pixels: (1, height, width, 3) each, from `preprocess`.
            run: called as run(stage, *args) for each stage in order, so that the caller evaluates stage by stage.

        Returns:
            (1, N, C) each, patches row by row.
        """
        tables = [self.vision_tower.positions(*grid(one, self.config.vision_config)) for one in pixels]
        xs = [run(self.vision_tower.embed, one) for one in pixels]
        for block in self.vision_tower.layers:
            xs = [run(block, x, pe) for x, pe in zip(xs, tables, strict=True)]
        return [run(self.multi_modal_projector, x) for x in xs]

    def keep_rows(self, tokens: Sequence[int], arrays: Mapping[str, mx.array]) -> None:
        """Replaces the table of tokens by some of its rows; other tokens are a KeyError from then on.

        Args:
            tokens: whose rows they are.
            arrays: the parameters of `embed_tokens`, with these rows alone.
        """
        self._places = {token: place for place, token in enumerate(tokens)}
        self.embed_tokens.update(dict(arrays))

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

    def hidden(self, questions: Sequence[Question], run: Runner = call) -> list[mx.array]:
        """Returns the result of the last block for each question, (1, S, C), for `head`. Arguments as in `logits`."""
        seen = iter(self.features([pixels for _, images in questions for pixels in images], run))
        tokens = [ids if self._places is None else [self._places[token] for token in ids] for ids, _ in questions]
        xs = [run(self.embed_tokens, mx.array(list(places))[None]) for places in tokens]
        features = [[next(seen) for _ in images] for _, images in questions]
        xs = [run(self.merge, x, ids, *of) for x, (ids, _), of in zip(xs, questions, features, strict=True)]
        del features
        tables = [self.positions(len(ids)) for ids, _ in questions]
        for block in self.layers:
            xs = [run(block, x, pe) for x, pe in zip(xs, tables, strict=True)]
        return xs

    def logits(self, questions: Sequence[Question], run: Runner = call) -> list[mx.array]:
        """Answers questions, each as if it were the only one.

        Args:
            questions: S token ids, one image token for each patch of the pictures, and the pictures.
            run: called as run(stage, *args) for each stage of each question, and for all questions before the next
                stage, so that the caller evaluates, and reads, stage by stage.

        Returns:
            (1, len(head_ids)) float32 logits of the next token, for each.

        Raises:
            ValueError: the numbers of image tokens and patches differ.
        """
        return [run(self.head, x[:, -1:])[:, 0] for x in self.hidden(questions, run)]

    def margins(self, questions: Sequence[Question], run: Runner = call) -> list[mx.array]:
        """Returns the logit of "yes" less that of "no" for each question, (1,) float32. Arguments as in `logits`."""
        return [logits[:, 0] - logits[:, 1] for logits in self.logits(questions, run)]

    def stages(self, questions: Sequence[Question]) -> int:
        """Returns the number of calls of `run` that answering takes."""
        eyes = len(self.vision_tower.layers) + 2  # and the first and last stage of the tower
        return sum(len(self.layers) + 3 + eyes * len(images) for _, images in questions)


def held_bytes(config: PixtralConfig, question: Question, size: int) -> int:
    """Returns the bytes that a question keeps in memory between two blocks, in numbers of `size` bytes.

    Those are its activations, its table of rotations, and its pictures.
    """
    text, sight = config.text_config, config.vision_config
    ids, images = question
    patches = sum(rows * columns for rows, columns in (grid(pixels, sight) for pixels in images))
    eye = patches * (sight.hidden_size * size + 8 * sight.head_dim) + sum(pixels.nbytes for pixels in images)
    features = patches * text.hidden_size * size
    return len(ids) * (text.hidden_size * size + 8 * text.head_dim) + features + eye
