"""The picture classifier: a vision transformer (Dosovitskiy et al. 2021) with two logits.

Falconsai/nsfw_image_detection is one. Written after transformers' ViTForImageClassification. B batch, N positions
(patches after the class token), H heads, D head width, C width.
"""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from PIL import Image, ImageOps

from . import Runner, call
from .filter_config import NSFW_VIT, ViTConfig
from .vision import LEVELS, self_attention


def preprocess(image: Image.Image, size: int = NSFW_VIT.image_size) -> mx.array:
    """Resizes a picture to a square in -1 to 1, as in the classifier's training.

    Args:
        image: any mode and size; it is turned as its EXIF says.
        size: pixels of each side.

    Returns:
        (1, size, size, 3) float32, bit for bit as transformers' ViTImageProcessor with Pillow.
    """
    image = ImageOps.exif_transpose(image).convert("RGB").resize((size, size), Image.Resampling.BILINEAR)
    return mx.array(LEVELS[np.asarray(image)][None])


class ViTLayer(nn.Module):
    """Pre-norm attention and MLP with residuals."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        dim, hidden = config.hidden_size, config.intermediate_size
        self._num_heads = config.num_attention_heads
        self.layernorm_before = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.query = nn.Linear(dim, dim)
        self.key = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.projection = nn.Linear(dim, dim)
        self.layernorm_after = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.intermediate = nn.Linear(dim, hidden)
        self.output = nn.Linear(hidden, dim)

    def __call__(self, x: mx.array) -> mx.array:
        """(B, N, C) to a new (B, N, C)."""
        x = x + self._attend(self.layernorm_before(x))
        return x + self.output(nn.gelu(self.intermediate(self.layernorm_after(x))))

    def _attend(self, x: mx.array) -> mx.array:
        return self_attention(x, (self.query, self.key, self.value), self.projection, self._num_heads)


class ViT(nn.Module):
    """The classifier: pictures to logits."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        dim = config.hidden_size
        self.config = config
        self.cls_token = mx.zeros((1, 1, dim))
        self.position_embeddings = mx.zeros((1, config.positions, dim))
        self.patch_embeddings = nn.Conv2d(3, dim, config.patch_size, config.patch_size)
        self.layers = [ViTLayer(config) for _ in range(config.num_hidden_layers)]
        self.layernorm = nn.LayerNorm(dim, eps=config.layer_norm_eps)
        self.classifier = nn.Linear(dim, len(config.labels))

    def embed(self, pixels: mx.array) -> mx.array:
        """Embeds (B, height, width, 3): the class token and all patches, row by row, with positions, (B, N, C)."""
        patches = self.patch_embeddings(pixels.astype(self.cls_token.dtype)).flatten(1, 2)
        cls = mx.broadcast_to(self.cls_token, (len(pixels), *self.cls_token.shape[1:]))
        return mx.concatenate([cls, patches], axis=1) + self.position_embeddings

    def classify(self, x: mx.array) -> mx.array:
        """(B, N, C) to logits (B, 2), from the class token alone."""
        return self.classifier(self.layernorm(x[:, 0]))

    def __call__(self, pixels: mx.array, run: Runner = call) -> mx.array:
        """Computes the logits of pictures.

        Args:
            pixels: (B, image_size, image_size, 3), from `preprocess`.
            run: called as run(stage, *args) for each stage in order, so that the caller evaluates stage by stage.

        Returns:
            (B, 2) logits in the type of the weights, in the order of `config.labels`.
        """
        x = run(self.embed, pixels)
        for layer in self.layers:
            x = run(layer, x)
        return run(self.classify, x)
