"""Blocks of FLUX.1's full width beside mflux's, in one run, with the same weights.

    pip install mflux==0.24.0 --no-deps && pip install platformdirs opencv-python-headless matplotlib piexif toml
    LD_PRELOAD=libopenblas.so.0 python benchmarks/blocks.py [--side 256] [--text 128] [--rounds 3]

mflux pins an mlx of its own, hence --no-deps; it also needs torch and transformers. Both sides take a step in their
own way: ours has modulation and positions from before the loop, mflux computes them in every step. The peer is also run
with the exact GELU of its image stream replaced by the reference's tanh form: where the difference comes from.
"""

import argparse
import dataclasses
import json
import statistics
import time
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn
from mflux.models.common.config import ModelConfig
from mflux.models.flux.model.flux_transformer.transformer import Transformer
from mlx.utils import tree_flatten, tree_map_with_path

from mlx_flux_krea.models import config, transformer
from mlx_flux_krea.models import layers as quantized
from mlx_flux_krea.sampling import sampler
from mlx_flux_krea.worker import evaluated

STREAMS = {"img": ("norm1", ("to_q", "to_k", "to_v"), "to_out.0", ("norm_q", "norm_k"), "ff")}
STREAMS["txt"] = (
    "norm1_context", ("add_q_proj", "add_k_proj", "add_v_proj"), "to_add_out", ("norm_added_q", "norm_added_k"),
    "ff_context",
)  # fmt: skip
OUTER = {
    "img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out",
    "final_layer.adaLN_modulation.1": "norm_out.linear",
    **{
        f"{ours}.{layer}": f"time_text_embed.{theirs}.{number}"
        for ours, theirs in (
            ("time_in", "timestep_embedder"), ("guidance_in", "guidance_embedder"), ("vector_in", "text_embedder"),
        )
        for layer, number in (("in_layer", "linear_1"), ("out_layer", "linear_2"))
    },
}  # fmt: skip
GUIDANCE, SIGMA = 4.5, 1.0


def peer_of(double: int, single: int) -> Transformer:
    """mflux's transformer with random weights whose activations stay near 1."""
    mx.random.seed(0)
    ModelConfig.precision = mx.float32
    peer = Transformer(ModelConfig.krea_dev(), num_transformer_blocks=double, num_single_transformer_blocks=single)

    def draw(path, array):
        if array.ndim == 2:
            return mx.random.normal(array.shape) * array.shape[1] ** -0.5
        return mx.random.normal(array.shape) * 0.01 + ("norm_" in path)

    peer.update(tree_map_with_path(draw, peer.parameters()))
    mx.eval(peer.parameters())
    return peer


def ours_of(peer: Transformer, double: int, single: int) -> transformer.Flux:
    """Our transformer with the peer's weights."""
    theirs, ours = dict(tree_flatten(peer.parameters())), {}

    def put(name, *sources):
        for part in ("weight", "bias"):
            arrays = [theirs[f"{source}.{part}"] for source in sources]
            ours[f"{name}.{part}"] = arrays[0] if len(arrays) == 1 else mx.concatenate(arrays)

    for name, source in OUTER.items():
        put(name, source)
    for part in ("weight", "bias"):  # mflux keeps diffusers' order, scale before shift
        name = f"final_layer.adaLN_modulation.1.{part}"
        ours[name] = mx.concatenate(mx.split(ours[name], 2)[::-1])
    for n in range(double):
        block = f"transformer_blocks.{n}"
        for stream, (norm, qkv, out, qk_norms, mlp) in STREAMS.items():
            here = f"double_blocks.{n}.{stream}"
            put(f"{here}_mod.lin", f"{block}.{norm}.linear")
            put(f"{here}_attn.qkv", *(f"{block}.attn.{name}" for name in qkv))
            put(f"{here}_attn.proj", f"{block}.attn.{out}")
            put(f"{here}_mlp.0", f"{block}.{mlp}.linear1")
            put(f"{here}_mlp.2", f"{block}.{mlp}.linear2")
            for kind, name in zip(("query", "key"), qk_norms, strict=True):
                ours[f"{here}_attn.norm.{kind}_norm.scale"] = theirs[f"{block}.attn.{name}.weight"]
    for n in range(single):
        block, here = f"single_transformer_blocks.{n}", f"single_blocks.{n}"
        put(f"{here}.modulation.lin", f"{block}.norm.linear")
        put(f"{here}.linear1", *(f"{block}.attn.to_{x}" for x in "qkv"), f"{block}.proj_mlp")
        put(f"{here}.linear2", f"{block}.proj_out")
        for kind, name in (("query", "norm_q"), ("key", "norm_k")):
            ours[f"{here}.norm.{kind}_norm.scale"] = theirs[f"{block}.attn.{name}.weight"]
    flux = transformer.Flux(dataclasses.replace(config.FLUX_DEV, depth=double, depth_single_blocks=single))
    flux.load_weights(list(ours.items()), strict=True)
    return flux


def steps_of(peer, flux, side: int, text: int):
    """A step of each, on the same inputs."""
    latents, states = mx.random.normal((1, (side // 16) ** 2, 64)), mx.random.normal((1, text, 4096)) * 0.2
    pooled = mx.random.normal((1, 768))
    settings = SimpleNamespace(
        height=side, width=side, guidance=GUIDANCE, num_train_steps=1000, precision=mx.float32,
        scheduler=SimpleNamespace(sigmas=mx.array([SIGMA, 0.9, 0.0])),
    )  # fmt: skip
    pe = transformer.rope(sampler.position_ids(text, side // 8, side // 8), flux.config.axes_dim, flux.config.theta)
    mods = flux.modulations(flux.vec(mx.array([1000 * SIGMA]), mx.array([1000 * GUIDANCE]), pooled))
    txt = flux.txt_in(states)
    mx.eval(latents, states, pooled, pe, mods, txt)

    def theirs():
        return peer(t=0, config=settings, hidden_states=latents, prompt_embeds=states, pooled_prompt_embeds=pooled)

    return lambda: flux.forward(latents, txt, mods, pe, evaluated), theirs


def timed(step) -> tuple[mx.array, float, int]:
    """Returns the result, the seconds, and the peak of memory above that at the start."""
    mx.clear_cache()
    base = mx.get_active_memory()
    mx.reset_peak_memory()
    begin = time.perf_counter()
    result = step()
    mx.eval(result)
    return result, time.perf_counter() - begin, mx.get_peak_memory() - base


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--side", type=int, default=256, help="pixels")
    parser.add_argument("--text", type=int, default=128, help="tokens")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    rows = []
    print("| blocks | precision | time | memory beside weights | difference | with tanh GELU |")
    print("|---|---|---|---|---|---|")
    for double, single, bits in ((1, 0, 0), (0, 1, 0), (1, 1, 0), (1, 1, 8)):
        peer = peer_of(double, single)
        flux = ours_of(peer, double, single)
        if bits:
            for network in (peer, flux):
                nn.quantize(
                    network, 64, bits, class_predicate=lambda _, m: isinstance(m, nn.Linear) and m.weight.ndim == 2
                )
            quantized.adopt(flux)
            quantized.choose_products(flux, mx.float32)
            mx.eval(peer.parameters(), flux.parameters())
        ours, theirs = steps_of(peer, flux, args.side, args.text)
        mx.eval(ours(), theirs())
        seconds, peaks = [], []
        for _ in range(args.rounds):
            (a, time_a, peak_a), (b, time_b, peak_b) = timed(ours), timed(theirs)
            seconds.append(time_a / time_b)
            peaks.append(peak_a / peak_b)
        for block in peer.transformer_blocks:
            block.ff.activation_function = nn.gelu_approx
        c = theirs()
        size = mx.linalg.norm(a).item()
        difference, explained = (mx.linalg.norm(a - other).item() / size for other in (b, c))
        row = {
            "double": double, "single": single, "bits": bits or 32, "time": statistics.median(seconds),
            "memory": statistics.median(peaks), "difference": difference, "with_tanh_gelu": explained,
        }  # fmt: skip
        rows.append(row)
        numbers = f"{row['time']:.2f} | {row['memory']:.2f} | {difference:.1e} | {explained:.1e}"
        print(f"| {double}+{single} | {f'{bits} bits' if bits else 'float32'} | {numbers} |", flush=True)
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
