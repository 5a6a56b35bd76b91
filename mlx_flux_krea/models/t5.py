"""The T5 v1.1 encoder (Raffel et al. 2020; Shazeer 2020 for the gated GELU).

Parameter names are those of transformers' T5EncoderModel, which every checkpoint uses. Padding is attended to, as in
the references: there is no mask. B batch, S tokens, H heads, D head width, C model width.
"""

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from . import Runner, call
from .config import T5Config


def relative_position_buckets(relative: np.ndarray, num_buckets: int, max_distance: int) -> np.ndarray:
    """Returns the bucket of each relative position, in both directions.

    Half of the buckets are for each sign; half of those are exact, the others widen with the logarithm of the distance
    up to `max_distance`. Computed in numpy's float32, operation by operation as the reference: a GPU's logarithm may
    round to another bucket.

    Args:
        relative: integers, position of the key minus position of the query.
        num_buckets: number of buckets in all.
        max_distance: distance from which all positions share the last bucket.
    """
    num_buckets //= 2
    max_exact = num_buckets // 2
    distance = np.abs(relative)
    far = np.log(np.maximum(distance, 1).astype(np.float32) / np.float32(max_exact))
    far = far / np.float32(np.log(max_distance / max_exact)) * np.float32(num_buckets - max_exact)
    far = np.minimum(max_exact + far.astype(np.int64), num_buckets - 1)
    return np.where(relative > 0, num_buckets, 0) + np.where(distance < max_exact, distance, far)


class T5LayerNorm(nn.Module):
    """RMS norm, no mean and no bias."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = mx.ones((dim,))
        self._eps = eps

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.rms_norm(x, self.weight, self._eps)


class T5Attention(nn.Module):
    """Self-attention with a bias for relative positions and without scaling by the head width."""

    def __init__(self, config: T5Config, has_relative_attention_bias: bool):
        super().__init__()
        inner = config.num_heads * config.d_kv
        self._num_heads = config.num_heads
        self.q = nn.Linear(config.d_model, inner, bias=False)
        self.k = nn.Linear(config.d_model, inner, bias=False)
        self.v = nn.Linear(config.d_model, inner, bias=False)
        self.o = nn.Linear(inner, config.d_model, bias=False)
        if has_relative_attention_bias:
            self.relative_attention_bias = nn.Embedding(config.relative_attention_num_buckets, config.num_heads)

    def __call__(self, x: mx.array, bias: mx.array) -> mx.array:
        b, s, _ = x.shape
        q, k, v = (
            layer(x).reshape(b, s, self._num_heads, -1).transpose(0, 2, 1, 3) for layer in (self.q, self.k, self.v)
        )
        x = mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0, mask=bias)
        return self.o(x.transpose(0, 2, 1, 3).reshape(b, s, -1))


class T5DenseGatedActDense(nn.Module):
    """gelu(wi_0 x) * wi_1 x, then wo."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.wi_0 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wi_1 = nn.Linear(config.d_model, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, config.d_model, bias=False)

    def __call__(self, x: mx.array) -> mx.array:
        gate = nn.gelu_approx(self.wi_0(x).astype(mx.float32)).astype(x.dtype)
        return self.wo(gate * self.wi_1(x))


class T5LayerSelfAttention(nn.Module):
    """Norm, attention, residual."""

    def __init__(self, config: T5Config, has_relative_attention_bias: bool):
        super().__init__()
        self.SelfAttention = T5Attention(config, has_relative_attention_bias)
        self.layer_norm = T5LayerNorm(config.d_model, config.layer_norm_epsilon)

    def __call__(self, x: mx.array, bias: mx.array) -> mx.array:
        return x + self.SelfAttention(self.layer_norm(x), bias)


class T5LayerFF(nn.Module):
    """Norm, gated MLP, residual."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.DenseReluDense = T5DenseGatedActDense(config)
        self.layer_norm = T5LayerNorm(config.d_model, config.layer_norm_epsilon)

    def __call__(self, x: mx.array) -> mx.array:
        return x + self.DenseReluDense(self.layer_norm(x))


class T5Block(nn.Module):
    """One layer of the encoder."""

    def __init__(self, config: T5Config, has_relative_attention_bias: bool):
        super().__init__()
        self.layer = [T5LayerSelfAttention(config, has_relative_attention_bias), T5LayerFF(config)]

    def __call__(self, x: mx.array, bias: mx.array) -> mx.array:
        """(B, S, C) and the (1, H, S, S) bias to a new (B, S, C)."""
        attention, feed_forward = self.layer
        return feed_forward(attention(x, bias))


class T5Stack(nn.Module):
    """Blocks and last norm; a level of names in the checkpoints."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.block = [T5Block(config, has_relative_attention_bias=i == 0) for i in range(config.num_layers)]
        self.final_layer_norm = T5LayerNorm(config.d_model, config.layer_norm_epsilon)


class T5Encoder(nn.Module):
    """T5 encoder: token ids to the hidden states that the transformer reads."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.d_model)
        self.encoder = T5Stack(config)

    @property
    def dtype(self) -> mx.Dtype:
        """The compute type."""
        return self.encoder.final_layer_norm.weight.dtype

    @property
    def stages(self) -> list[nn.Module]:
        """The parts with matrices, in the order in which they run."""
        return [self.shared, *self.encoder.block]

    def position_bias(self, length: int) -> mx.array:
        """Returns the (1, H, S, S) bias that every block adds to its scores; its table is in the first block."""
        position = np.arange(length)
        buckets = relative_position_buckets(
            position[None, :] - position[:, None],
            self.config.relative_attention_num_buckets,
            self.config.relative_attention_max_distance,
        )
        table = self.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
        bias = table(mx.array(buckets.astype(np.int32))).transpose(2, 0, 1)[None]
        return mx.contiguous(bias)  # otherwise every block's attention copies it on Metal

    def __call__(self, ids: mx.array, run: Runner = call) -> mx.array:
        """Encodes padded ids.

        Args:
            ids: (B, S) integers, padded with 0; the padding is attended to.
            run: called as run(stage, *args) for each stage in order, so that the caller evaluates stage by stage.

        Returns:
            (B, S, d_model) in the type of the weights.
        """
        x = run(self.shared, ids)
        bias = run(self.position_bias, ids.shape[1])
        for block in self.encoder.block:
            x = run(block, x, bias)
        return run(self.encoder.final_layer_norm, x)
