"""CLIP's text model (Radford et al. 2021), as far as FLUX.1 uses it: the pooled vector.

Parameter names are those of transformers' CLIPTextModel with the `text_model.` prefix of every published file.
B batch, S tokens (77), H heads, C width.
"""

import mlx.core as mx
import mlx.nn as nn

from .config import CLIPConfig


class CLIPAttention(nn.Module):
    """Causal self-attention."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        dim = config.hidden_size
        self._num_heads = config.num_attention_heads
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, dim)
        self.v_proj = nn.Linear(dim, dim)
        self.out_proj = nn.Linear(dim, dim)

    def __call__(self, x: mx.array) -> mx.array:
        b, s, c = x.shape
        q, k, v = (
            layer(x).reshape(b, s, self._num_heads, -1).transpose(0, 2, 1, 3)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        x = mx.fast.scaled_dot_product_attention(q, k, v, scale=(c // self._num_heads) ** -0.5, mask="causal")
        return self.out_proj(x.transpose(0, 2, 1, 3).reshape(b, s, c))


class CLIPMLP(nn.Module):
    """Two layers with OpenAI's quick GELU, x * sigmoid(1.702 x)."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        x = self.fc1(x)
        return self.fc2(nn.gelu_fast_approx(x.astype(mx.float32)).astype(x.dtype))


class CLIPLayer(nn.Module):
    """Pre-norm attention and MLP with residuals."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = CLIPAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = CLIPMLP(config)

    def __call__(self, x: mx.array) -> mx.array:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPEmbeddings(nn.Module):
    """Tokens plus learned positions."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)

    def __call__(self, ids: mx.array) -> mx.array:
        return self.token_embedding(ids) + self.position_embedding(mx.arange(ids.shape[1]))


class CLIPEncoder(nn.Module):
    """The layers; a level of names in the checkpoints."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.layers = [CLIPLayer(config) for _ in range(config.num_hidden_layers)]


class CLIPTextTransformer(nn.Module):
    """Embeddings, layers, final norm."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.embeddings = CLIPEmbeddings(config)
        self.encoder = CLIPEncoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)


class CLIPText(nn.Module):
    """Token ids to hidden states and the pooled vector."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.config = config
        self.text_model = CLIPTextTransformer(config)

    def __call__(self, ids: mx.array) -> tuple[mx.array, mx.array]:
        """Encodes padded ids.

        Args:
            ids: (B, S) integers, S at most `max_position_embeddings`.

        Returns:
            Hidden states after the final norm (B, S, C), and the pooled vector (B, C): the hidden state at the first
            end token. Published configs say `eos_token_id` 2, which transformers reads as "the largest id", the same.
        """
        x = self.text_model.embeddings(ids)
        for layer in self.text_model.encoder.layers:
            x = layer(x)
        x = self.text_model.final_layer_norm(x)
        eos = self.config.eos_token_id
        end = mx.argmax(ids if eos == 2 else (ids == eos).astype(mx.int32), axis=1)
        return x, mx.take_along_axis(x, end[:, None, None], axis=1)[:, 0]
