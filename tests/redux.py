"""Small Redux of random weights, converted from files as transformers and Black Forest Labs name their tensors."""

import json
from pathlib import Path

import mlx.core as mx
import numpy as np
from mlx_flux_krea.convert import convert

WIDTH = 16  # of SigLIP


def write(folder: Path, *, width: int, side: int = 27, seed: int = 5, layers: int = 2) -> list[Path]:
    """Writes siglip.safetensors with a config.json, and flux1-redux.safetensors.

    Args:
        folder: an existing one.
        width: of T5.
        side: patches along each side of a picture.
        seed: of the weights.
        layers: of SigLIP.
    """
    draw, hidden = np.random.default_rng(seed), 3 * WIDTH
    shapes = {
        "embeddings.patch_embedding.weight": (WIDTH, 3, 2, 2),
        "embeddings.patch_embedding.bias": (WIDTH,),
        "embeddings.position_embedding.weight": (side**2, WIDTH),
        "post_layernorm.weight": (WIDTH,),
        "post_layernorm.bias": (WIDTH,),
        "head.probe": (1, 1, WIDTH),
    }
    for n in range(layers):
        layer = f"encoder.layers.{n}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes |= {f"{layer}.self_attn.{name}.weight": (WIDTH, WIDTH), f"{layer}.self_attn.{name}.bias": (WIDTH,)}
        for name, shape in (("fc1", (hidden, WIDTH)), ("fc2", (WIDTH, hidden))):
            shapes |= {f"{layer}.mlp.{name}.weight": shape, f"{layer}.mlp.{name}.bias": shape[:1]}
        for name in ("layer_norm1", "layer_norm2"):
            shapes |= {f"{layer}.{name}.weight": (WIDTH,), f"{layer}.{name}.bias": (WIDTH,)}

    def drawn(name: str, shape: tuple[int, ...]) -> mx.array:
        array = draw.normal(size=shape) / (np.sqrt(np.prod(shape[1:])) if len(shape) > 1 else 4)
        return mx.array((array + ("norm" in name and name.endswith("weight"))).astype(np.float32))

    siglip, redux = folder / "siglip.safetensors", folder / "flux1-redux.safetensors"
    mx.save_safetensors(str(siglip), {f"vision_model.{n}": drawn(n, shape) for n, shape in shapes.items()})
    ends = {"redux_up.weight": (3 * width, WIDTH), "redux_up.bias": (3 * width,)}
    ends |= {"redux_down.weight": (width, 3 * width), "redux_down.bias": (width,)}
    mx.save_safetensors(str(redux), {n: drawn(n, shape) for n, shape in ends.items()})
    config = {"model_type": "siglip_vision_model", "hidden_size": WIDTH, "intermediate_size": hidden}
    config |= {"num_hidden_layers": layers, "num_attention_heads": 2, "image_size": 2 * side, "patch_size": 2}
    (folder / "config.json").write_text(json.dumps(config))
    return [redux, siglip]


def install(folder: Path, *, width: int, dtype: str = "float32", **sizes) -> Path:
    """Converts one into the home folder, for a model whose T5 has this width."""
    source = folder / "redux-source"
    source.mkdir(exist_ok=True)
    return convert(write(source, width=width, **sizes), dtype=dtype, quantize=None, force=True).path
