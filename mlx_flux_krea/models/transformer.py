"""The flow transformer of FLUX.1: rope, modulation, double and single blocks.

Names are those of black-forest-labs/flux (src/flux/model.py, modules/layers.py), so that both files can be read side by
side and the main checkpoint needs almost no renaming. Shapes: B batch, L image tokens, S text tokens, T = S + L,
H heads, D head width, C hidden size.

Everything here is a function of arrays. Whoever runs the network decides when it is evaluated: `forward` passes each
block and layer through `run(stage, *args)`, which by default only calls it.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from . import Runner, call
from .config import FluxConfig
from .layers import constant, in_rows

# --- small kernels. Inside they compute in float32 and round once; on a GPU each is one pass over memory. ---


@mx.compile  # with shapeless=True, which puts a broadcast before each operation, it would be too long for one kernel
def gelu(x: mx.array) -> mx.array:
    """GELU in its tanh form (Hendrycks and Gimpel 2016, section 2), which FLUX.1 uses in both streams.

    By (1 + tanh z) / 2 = 1 / (1 + exp(-2 z)): exact also where tanh comes near -1, and one exponential is two thirds of
    a tanh on the CPU.
    """
    y = x.astype(mx.float32)
    z = math.sqrt(2 / math.pi) * (y + 0.044715 * y * y * y)
    return (y / (1 + mx.exp(-2 * z))).astype(x.dtype)


@partial(mx.compile, shapeless=True)
def gated_residual(x: mx.array, gate: mx.array, y: mx.array) -> mx.array:
    """Returns x + gate * y."""
    return (x.astype(mx.float32) + gate.astype(mx.float32) * y.astype(mx.float32)).astype(x.dtype)


@mx.compile
def rotate(a: mx.array, b: mx.array, first: mx.array, second: mx.array) -> mx.array:
    """Returns first * a + second * b, in the type of a."""
    return (first * a.astype(mx.float32) + second * b.astype(mx.float32)).astype(a.dtype)


def apply_rope(x: mx.array, pe: tuple[mx.array, mx.array]) -> mx.array:
    """Rotates adjacent pairs (2j, 2j+1) of the last axis by the angles of `rope`.

    Args:
        x: (B, H, T, D), any float type; the result has it too.
        pe: from `rope`.
    """
    pairs = x.reshape(*x.shape[:-1], -1, 2)
    return rotate(pairs[..., :1], pairs[..., 1:], *pe).reshape(x.shape)


def rope(ids: mx.array, axes_dim: tuple[int, ...], theta: int) -> tuple[mx.array, mx.array]:
    """Makes rotation tables for positions with several axes (Su et al. 2021, RoFormer; EmbedND in the reference).

    Args:
        ids: (T, 3) positions.
        axes_dim: part of the head width for each axis.
        theta: base of the frequencies.

    Returns:
        Two (T, D/2, 2) float32 arrays: a pair (a, b) becomes first * a + second * b.
    """
    ids = ids.astype(mx.float32)
    angles = []
    for axis, dim in enumerate(axes_dim):
        omega = theta ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
        angles.append(ids[:, axis, None] * mx.array(omega.astype(np.float32)))
    angle = mx.concatenate(angles, axis=-1)
    cos, sin = mx.cos(angle), mx.sin(angle)
    return mx.stack([cos, sin], axis=-1), mx.stack([-sin, cos], axis=-1)


def timestep_embedding(t: mx.array, dim: int = 256, max_period: int = 10_000) -> mx.array:
    """Returns sinusoids of t, the cosine half first (Vaswani et al. 2017, section 3.5).

    Args:
        t: (B,) already times 1000.
        dim: width of the result.
        max_period: longest period.

    Returns:
        (B, dim) float32.
    """
    # float32 up to the exponent as in torch, then correctly rounded: the same table on every chip
    exponent = np.float32(-math.log(max_period)) * np.arange(dim // 2, dtype=np.float32) / np.float32(dim // 2)
    freqs = mx.array(np.exp(exponent.astype(np.float64)).astype(np.float32))
    args = t.astype(mx.float32)[:, None] * freqs
    return mx.concatenate([mx.cos(args), mx.sin(args)], axis=-1)


def modulated_norm(x: mx.array, shift: mx.array, scale: mx.array) -> mx.array:
    """Applies LayerNorm without parameters, then (1 + scale) * x + shift (Peebles and Xie 2022, adaLN).

    Runs one kernel for each image: the weight of `mx.fast.layer_norm` has one axis. A picture therefore does not depend
    on its batch.

    Args:
        x: (B, T, C).
        shift: (B, C).
        scale: (B, C); its type is the type of the result.
    """
    rows = [mx.fast.layer_norm(x[i : i + 1], 1 + scale[i], shift[i], 1e-6) for i in range(len(x))]
    return (rows[0] if len(rows) == 1 else mx.concatenate(rows)).astype(scale.dtype)


class MLPEmbedder(nn.Module):
    """Linear, SiLU, Linear: embeds time, guidance and CLIP's vector for `vec`."""

    def __init__(self, in_dim: int, hidden_dim: int):
        super().__init__()
        self.in_layer = nn.Linear(in_dim, hidden_dim)
        self.out_layer = nn.Linear(hidden_dim, hidden_dim)

    def __call__(self, x: mx.array) -> mx.array:
        return self.out_layer(nn.silu(self.in_layer(x)))


class RMSNorm(nn.Module):
    """RMS norm with the reference's parameter name, `scale`."""

    def __init__(self, dim: int):
        super().__init__()
        self.scale = mx.ones((dim,))

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, self.scale, 1e-6)


class QKNorm(nn.Module):
    """RMS norms of queries and keys, over each head."""

    def __init__(self, dim: int):
        super().__init__()
        self.query_norm = RMSNorm(dim)
        self.key_norm = RMSNorm(dim)

    def __call__(self, qkv: mx.array, num_heads: int) -> tuple[mx.array, mx.array, mx.array]:
        """Splits (B, T, 3 H D), in the order (qkv, head, head width), into three (B, H, T, D) and norms two."""
        b, t, _ = qkv.shape
        q, k, v = qkv.reshape(b, t, 3, num_heads, -1).transpose(2, 0, 3, 1, 4)
        return self.query_norm(q), self.key_norm(k), v


class SelfAttention(nn.Module):
    """Projections and norms of one stream; the streams attend jointly, in the block."""

    def __init__(self, dim: int, head_dim: int):
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.norm = QKNorm(head_dim)
        self.proj = nn.Linear(dim, dim)


def guarded(down: nn.Linear, y: mx.array) -> mx.array:
    """Applies a layer whose sums may exceed float16's range: (8 W (y / 8)) + b, in float32.

    Draw Things does so in the last double blocks of FLUX.1 (Flux1.swift of draw-things-community); here in all of them.
    """
    return 8 * multiply(down, y / 8).astype(mx.float32) - 7 * constant(down)


class Activation(nn.Module):
    """GELU as a layer: the checkpoint counts it (`img_mlp.0`, `.1`, `.2`)."""

    def __call__(self, x: mx.array) -> mx.array:
        return gelu(x)


class Modulation(nn.Module):
    """One linear layer from silu(vec) to shifts, scales and gates."""

    def __init__(self, dim: int, multiplier: int):
        super().__init__()
        self.lin = nn.Linear(dim, multiplier * dim)


def attention(q: mx.array, k: mx.array, v: mx.array, pe: tuple[mx.array, mx.array]) -> mx.array:
    """Computes scaled dot-product attention over rotated queries and keys: (B, H, T, D) to (B, T, H D)."""
    b, h, t, d = q.shape
    q, k = apply_rope(q, pe), apply_rope(k, pe)

    def attend(queries: mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(queries, k, v, scale=d**-0.5)

    x = in_rows(attend, q, 4 * b * h * t**2 * d, axis=2)
    return x.transpose(0, 2, 1, 3).reshape(b, t, -1)


def multiply(layer: nn.Linear, x: mx.array) -> mx.array:
    """Applies a layer to (B, T, C), in parts where its time on the GPU asks for them."""
    return in_rows(layer, x, 2 * x.size * layer.bias.size)


class DoubleStreamBlock(nn.Module):
    """Image and text with weights of their own, attending jointly (Esser et al. 2024, MM-DiT)."""

    modulation_layers = ("img_mod", "txt_mod")  # evaluated apart from the rest, by `modulate`

    def __init__(self, config: FluxConfig):
        super().__init__()
        dim, mlp, head = config.hidden_size, config.mlp_size, config.head_dim
        self._num_heads = config.num_heads
        self.img_mod = Modulation(dim, 6)
        self.img_attn = SelfAttention(dim, head)
        self.img_mlp = [nn.Linear(dim, mlp), Activation(), nn.Linear(mlp, dim)]
        self.txt_mod = Modulation(dim, 6)
        self.txt_attn = SelfAttention(dim, head)
        self.txt_mlp = [nn.Linear(dim, mlp), Activation(), nn.Linear(mlp, dim)]

    def modulate(self, vec: mx.array) -> tuple[mx.array, mx.array]:
        """Maps silu(vec) (N, C) to two (N, 6 C), for image and text: shift, scale, gate of attention and of the MLP."""
        return self.img_mod.lin(vec), self.txt_mod.lin(vec)

    def __call__(
        self, img: mx.array, txt: mx.array, mod: tuple[mx.array, mx.array], pe: tuple[mx.array, mx.array]
    ) -> tuple[mx.array, mx.array]:
        """Returns new img (B, L, C) and txt (B, S, C) from these, rows of `modulate` and the rope tables."""
        img_mod, txt_mod = (tuple(mx.split(rows, 6, axis=-1)) for rows in mod)
        img_qkv = self._qkv(self.img_attn, img, img_mod)
        txt_qkv = self._qkv(self.txt_attn, txt, txt_mod)
        q, k, v = (mx.concatenate([t, i], axis=2) for t, i in zip(txt_qkv, img_qkv, strict=True))
        txt_attn, img_attn = mx.split(attention(q, k, v, pe), [txt.shape[1]], axis=1)
        img = self._residuals(self.img_attn, self.img_mlp, img, img_attn, img_mod)
        txt = self._residuals(self.txt_attn, self.txt_mlp, txt, txt_attn, txt_mod)
        return img, txt

    def _qkv(self, attn: SelfAttention, x: mx.array, mod: Sequence[mx.array]) -> tuple[mx.array, mx.array, mx.array]:
        shift, scale, *_ = mod
        return attn.norm(multiply(attn.qkv, modulated_norm(x, shift, scale)), self._num_heads)

    @staticmethod
    def _residuals(
        attn: SelfAttention, mlp: list, x: mx.array, attended: mx.array, mod: Sequence[mx.array]
    ) -> mx.array:
        _, _, attn_gate, shift, scale, mlp_gate = mod
        x = gated_residual(x, attn_gate[:, None], multiply(attn.proj, attended))
        up, activation, down = mlp
        y = activation(multiply(up, modulated_norm(x, shift, scale)))
        y = multiply(down, y) if y.dtype != mx.float16 else guarded(down, y)
        return gated_residual(x, mlp_gate[:, None], y)


class SingleStreamBlock(nn.Module):
    """Both streams in one sequence, attention and MLP in parallel (Dehghani et al. 2023, ViT-22B)."""

    modulation_layers = ("modulation",)

    def __init__(self, config: FluxConfig):
        super().__init__()
        dim, mlp = config.hidden_size, config.mlp_size
        self._num_heads = config.num_heads
        self.linear1 = nn.Linear(dim, 3 * dim + mlp)
        self.linear2 = nn.Linear(dim + mlp, dim)
        self.norm = QKNorm(config.head_dim)
        self.modulation = Modulation(dim, 3)

    def modulate(self, vec: mx.array) -> mx.array:
        """Maps silu(vec) (N, C) to (N, 3 C): shift, scale, gate."""
        return self.modulation.lin(vec)

    def __call__(self, x: mx.array, mod: mx.array, pe: tuple[mx.array, mx.array]) -> mx.array:
        """Returns a new x (B, T, C) from x, rows of `modulate` and the rope tables."""
        shift, scale, gate = mx.split(mod, 3, axis=-1)
        qkv, mlp = mx.split(multiply(self.linear1, modulated_norm(x, shift, scale)), [3 * x.shape[-1]], axis=-1)
        attended = attention(*self.norm(qkv, self._num_heads), pe)
        y = mx.concatenate([attended, gelu(mlp)], axis=-1)
        y = multiply(self.linear2, y) if y.dtype != mx.float16 else guarded(self.linear2, y)
        return gated_residual(x, gate[:, None], y)


class LastLayer(nn.Module):
    """Modulated norm and projection to the velocity of each packed latent."""

    modulation_layers = ("adaLN_modulation",)

    def __init__(self, config: FluxConfig):
        super().__init__()
        dim = config.hidden_size
        self.linear = nn.Linear(dim, config.out_channels)
        self.adaLN_modulation = [nn.SiLU(), nn.Linear(dim, 2 * dim)]

    def modulate(self, vec: mx.array) -> mx.array:
        """Maps silu(vec) (N, C) to (N, 2 C): shift, scale."""
        return self.adaLN_modulation[1](vec)

    def __call__(self, x: mx.array, mod: mx.array) -> mx.array:
        """Maps x (B, L, C), with rows of `modulate`, to (B, L, out_channels)."""
        shift, scale = mx.split(mod, 2, axis=-1)
        return self.linear(modulated_norm(x, shift, scale))


def _joined(txt: mx.array, img: mx.array) -> mx.array:
    """Returns both streams as one: (B, S, C) and (B, L, C) to (B, S + L, C)."""
    return mx.concatenate([txt, img], axis=1)


def _unchanged(*values: mx.array) -> tuple[mx.array, ...]:
    """Returns the values: a stage that evaluates them."""
    return values


class Flux(nn.Module):
    """The flow transformer: the velocity d latents / d sigma from latents, text, time and guidance."""

    def __init__(self, config: FluxConfig):
        super().__init__()
        self.config = config
        dim = config.hidden_size
        self.img_in = nn.Linear(config.in_channels, dim)
        self.txt_in = nn.Linear(config.context_in_dim, dim)
        self.time_in = MLPEmbedder(256, dim)
        self.vector_in = MLPEmbedder(config.vec_in_dim, dim)
        if config.guidance_embed:
            self.guidance_in = MLPEmbedder(256, dim)
        self.double_blocks = [DoubleStreamBlock(config) for _ in range(config.depth)]
        self.single_blocks = [SingleStreamBlock(config) for _ in range(config.depth_single_blocks)]
        self.final_layer = LastLayer(config)

    @property
    def dtype(self) -> mx.Dtype:
        """The compute type, which all layers have that are never quantized."""
        return self.img_in.bias.dtype

    @property
    def blocks(self) -> list[DoubleStreamBlock | SingleStreamBlock]:
        """All blocks, in the order in which `forward` runs them."""
        return [*self.double_blocks, *self.single_blocks]

    @property
    def modulated(self) -> list[Callable[[mx.array], Any]]:
        """The stages of `modulations`, in order."""
        return [layer.modulate for layer in (*self.blocks, self.final_layer)]

    def vec(
        self, times: mx.array, guidance: mx.array | None, pooled: mx.array, *, in_float32: bool = False
    ) -> mx.array:
        """Returns the conditioning vector, from which every modulation is computed.

        Args:
            times: (N,) in 0..1000, as rounded as they shall be.
            guidance: (N,) guidance scale times 1000, or None for a model without guidance embedding.
            pooled: (N, vec_in_dim), from CLIP.
            in_float32: computes the layers of times and guidance in float32, as mflux does.

        Returns:
            (N, C) in the compute type.
        """

        def embed(layer: MLPEmbedder, t: mx.array) -> mx.array:
            sinusoids = timestep_embedding(t)
            return layer(sinusoids if in_float32 else sinusoids.astype(self.dtype))

        vec = embed(self.time_in, times)
        if self.config.guidance_embed:
            if guidance is None:
                raise ValueError("[Flux] guidance is required: this transformer has a guidance embedding.")
            vec = vec + embed(self.guidance_in, guidance)
        return (vec + self.vector_in(pooled.astype(self.dtype))).astype(self.dtype)

    def modulations(self, vec: mx.array, run: Runner = call, places: Sequence[int] | None = None) -> list:
        """Computes shifts, scales and gates of every layer, from all rows of `vec` at once.

        They depend on time, guidance and the pooled vector alone. One pass over these weights (3.2 of the 11.9 billion)
        therefore serves all steps of a run.

        Args:
            vec: (N, C).
            run: evaluates the stages, see `forward`.
            places: of the layers to compute, among all; None: all of them.

        Returns:
            The argument of `forward`, in the order double blocks, single blocks, final layer; each with N rows.
        """
        vec, layers = nn.silu(vec), self.modulated
        return [run(layers[place], vec) for place in (range(len(layers)) if places is None else places)]

    def forward(
        self,
        img: mx.array,
        txt: mx.array,
        modulations: list,
        pe: tuple[mx.array, mx.array],
        run: Runner = call,
        between: Callable[[mx.array, mx.array, Callable[[], mx.array]], mx.array] | None = None,
    ) -> mx.array:
        """Evaluates the velocity, given everything that does not depend on the latents.

        Args:
            img: (B, L, in_channels) packed latents.
            txt: (B, S, C), already through `txt_in`.
            modulations: from `modulations`, B rows each.
            pe: from `rope`, text positions before image positions.
            run: called as run(stage, *args) for each stage in order; returns the stage's result, evaluated or not.
            between: called after the first double block as between(before, after, rest), with the image stream
                (B, L, C) on both sides of it, and a function that runs all other blocks and returns the stream. It
                returns that stream, or one to use instead (step caches).

        Returns:
            (B, L, out_channels).

        Raises:
            ValueError: `between` is given, and there is no double block.
        """
        if between is not None and not self.double_blocks:
            raise ValueError("[Flux] between is called after the first double block, and there is none.")
        # float16 is for arrays inside the blocks: the streams themselves grow beyond its range
        stream = mx.float32 if self.dtype == mx.float16 else self.dtype
        img, txt = run(self.img_in, img.astype(self.dtype)).astype(stream), txt.astype(stream)

        def through(start: int, img: mx.array, txt: mx.array) -> mx.array:
            """Runs the double blocks from one on, and all single blocks."""
            mods = iter(modulations[start:])
            for block in self.double_blocks[start:]:
                img, txt = run(block, img, txt, next(mods), pe)
            x = run(_joined, txt, img)
            for block in self.single_blocks:
                x = run(block, x, next(mods), pe)
            return x[:, txt.shape[1] :]

        if between is None:
            img = through(0, img, txt)
        else:
            after, txt = run(self.double_blocks[0], img, txt, modulations[0], pe)
            after, txt = run(_unchanged, after, txt)  # `between` looks at them
            img = between(img, after, partial(through, 1, after, txt))
        return run(self.final_layer, img, modulations[-1])

    def __call__(
        self,
        hidden_states: mx.array,
        timestep: mx.array,
        guidance: mx.array | None,
        pooled_projections: mx.array,
        encoder_hidden_states: mx.array,
        img_ids: mx.array,
        txt_ids: mx.array,
    ) -> mx.array:
        """Evaluates the velocity, with the argument names of diffusers' FluxTransformer2DModel.

        Args:
            hidden_states: (B, L, in_channels) packed latents.
            timestep: (B,) in 0..1.
            guidance: (B,) guidance scale, not times 1000; None for schnell.
            pooled_projections: (B, vec_in_dim), from CLIP.
            encoder_hidden_states: (B, S, context_in_dim), from T5.
            img_ids: (L, 3) positions.
            txt_ids: (S, 3) positions, all zero in FLUX.1.

        Returns:
            (B, L, out_channels) in the compute type.
        """
        pe = rope(mx.concatenate([txt_ids, img_ids]), self.config.axes_dim, self.config.theta)
        scales = None if guidance is None else guidance.astype(self.dtype) * 1000
        mods = self.modulations(self.vec(timestep.astype(self.dtype) * 1000, scales, pooled_projections))
        txt = self.txt_in(encoder_hidden_states.astype(self.dtype))
        return self.forward(hidden_states, txt, mods, pe)
