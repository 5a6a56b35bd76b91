"""Sizes of the depth network, with the published one as an instance. Field names are those of transformers."""

from dataclasses import dataclass
from typing import Annotated

from .config import Count, Epsilon, Width


@dataclass(frozen=True)
class DepthConfig:
    """Sizes of a depth network (transformers' DepthAnythingConfig over a Dinov2Config; relative depth).

    The backbone has an erf GELU, biases everywhere and a layer scale; its normed states after some layers go on.
    """

    hidden_size: Width
    num_hidden_layers: Count
    num_attention_heads: Count
    mlp_ratio: Annotated[int, 1, 64]
    layer_norm_eps: Epsilon
    image_size: Annotated[int, 1, 4096]  # pixels of each side in training: the grid of the position embeddings
    patch_size: Annotated[int, 1, 1024]
    out_indices: tuple[Count, ...]  # numbers of the layers whose states the neck reads, from 1
    reassemble_factors: tuple[Annotated[float, 1 / 16, 16.0], ...]  # of each state: its size in patches
    neck_hidden_sizes: tuple[Width, ...]
    fusion_hidden_size: Annotated[int, 2, 2**16]
    head_hidden_size: Width

    @property
    def grid(self) -> int:
        """Patches of each side in training."""
        return self.image_size // self.patch_size

    def problem(self) -> str | None:
        """Returns a contradiction between these numbers, or None."""
        if self.hidden_size % self.num_attention_heads:
            return f"hidden_size {self.hidden_size} is not divisible by {self.num_attention_heads} heads"
        if self.image_size % self.patch_size:
            return f"image_size {self.image_size} is not divisible by patch_size {self.patch_size}"
        if not len(self.out_indices) == len(self.reassemble_factors) == len(self.neck_hidden_sizes) > 0:
            return "out_indices, reassemble_factors and neck_hidden_sizes are not of the same length"
        if list(self.out_indices) != sorted(set(self.out_indices)) or self.out_indices[-1] > self.num_hidden_layers:
            return f"out_indices {list(self.out_indices)} are not layers in order, {self.num_hidden_layers} at most"
        if any(factor != int(factor) and 1 / factor != int(1 / factor) for factor in self.reassemble_factors):
            return f"reassemble_factors {list(self.reassemble_factors)} are not whole numbers or their inverses"
        return None


DEPTH_ANYTHING_V2_SMALL = DepthConfig(
    hidden_size=384, num_hidden_layers=12, num_attention_heads=6, mlp_ratio=4, layer_norm_eps=1e-6, image_size=518,
    patch_size=14, out_indices=(3, 6, 9, 12), reassemble_factors=(4.0, 2.0, 1.0, 0.5),
    neck_hidden_sizes=(48, 96, 192, 384), fusion_hidden_size=64, head_hidden_size=32,
)  # fmt: skip
