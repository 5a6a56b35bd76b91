"""SigLIP's encoder of pictures (Zhai et al. 2023), and Redux, which turns its tokens into tokens for the transformer.

Written after transformers' SiglipVisionModel, whose `last_hidden_state` is used and whose head is not, and after
black-forest-labs/flux, src/flux/modules/image_embedders.py. FLUX.1 Redux [dev] reads so400m-patch14-384: 27 x 27
patches. B batch, N patches, H heads, D head width, C width, T width of T5.
"""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from PIL import Image

from . import Runner, call
from .config import SIGLIP_SO400M, ReduxConfig, SiglipConfig
from .vision import LEVELS, self_attention


def to_square(image: Image.Image, size: int = SIGLIP_SO400M.image_size) -> Image.Image:
    """Resizes a picture to the square that the encoder reads, whatever its shape (bicubic, smoothed as Pillow does)."""
    return image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)


def preprocess(image: Image.Image, size: int = SIGLIP_SO400M.image_size) -> mx.array:
    """Prepares a picture for the encoder.

    Args:
        image: any size; an open one (`inputs.image.open_image`).
        size: pixels of each side.

    Returns:
        (1, size, size, 3) float32 in -1 to 1, bit for bit as transformers' SiglipImageProcessor with Pillow.
    """
    return mx.array(LEVELS[np.asarray(to_square(image, size))][None])


class SigLIPLayer(nn.Module):
    """Pre-norm attention and MLP with residuals."""

    def __init__(self, config: SiglipConfig):
        super().__init__()
        dim, hidden = config.hidden_size, config.intermediate_size
        self._num_heads = config.num_attention_heads
        self.layer_norm1 = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)
        self.layer_norm2 = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def __call__(self, x: mx.array) -> mx.array:
        """(B, N, C) to a new (B, N, C)."""
        x = x + self._attend(self.layer_norm1(x))
        return x + self.fc2(nn.gelu_approx(self.fc1(self.layer_norm2(x))))

    def _attend(self, x: mx.array) -> mx.array:
        return self_attention(x, (self.q_proj, self.k_proj, self.v_proj), self.out_proj, self._num_heads)


class SigLIP(nn.Module):
    """The encoder: pictures to one vector for each patch."""

    def __init__(self, config: SiglipConfig):
        super().__init__()
        dim = config.hidden_size
        self.config = config
        self.patch_embedding = nn.Conv2d(3, dim, config.patch_size, config.patch_size)
        self.position_embedding = mx.zeros((config.positions, dim))
        self.layers = [SigLIPLayer(config) for _ in range(config.num_hidden_layers)]
        self.post_layernorm = nn.LayerNorm(dim, eps=config.layer_norm_eps)

    def embed(self, pixels: mx.array) -> mx.array:
        """Embeds (B, height, width, 3) as patches, row by row, with positions: (B, N, C).

        Pixels at the right and at the bottom that fill no patch are not read.
        """
        patches = self.patch_embedding(pixels.astype(self.position_embedding.dtype)).flatten(1, 2)
        return patches + self.position_embedding

    def __call__(self, pixels: mx.array, run: Runner = call) -> mx.array:
        """Encodes pictures.

        Args:
            pixels: (B, image_size, image_size, 3), from `preprocess`.
            run: called as run(stage, *args) for each stage in order, so that the caller evaluates stage by stage.

        Returns:
            (B, N, C) after the last norm, in the type of the weights.
        """
        x = run(self.embed, pixels)
        for layer in self.layers:
            x = run(layer, x)
        return run(self.post_layernorm, x)


class Redux(nn.Module):
    """FLUX.1 Redux: vectors of patches to tokens that stand beside those of T5."""

    def __init__(self, config: ReduxConfig):
        super().__init__()
        self.config = config
        self.redux_up = nn.Linear(config.redux_dim, 3 * config.txt_in_features)
        self.redux_down = nn.Linear(3 * config.txt_in_features, config.txt_in_features)

    def __call__(self, x: mx.array) -> mx.array:
        """(B, N, C) to (B, N, T)."""
        return self.redux_down(nn.silu(self.redux_up(x)))
