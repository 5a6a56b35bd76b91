"""Work of a GPU for one picture, counted from the exported graph without running it.

    python benchmarks/graph.py [--width 1024] [--height 1024] [--dtype bfloat16] [-v]

No Mac is needed: `mx.export_function` lists every primitive with shapes and types, and weights are views of one zero,
so that the full model takes no memory. On a CPU the `mx.fast` functions fall apart into primitives, and compiled
functions are inlined, so each of them is replaced by one marker primitive with the same result type, to count as a GPU
would launch; what is inside them is listed apart (`kernels`). Strides are followed from view to view, because Metal
copies where a kernel cannot read them: a reshape that is no view, a norm of rows that do not lie side by side, a mask.

A pass is a kernel that reads or writes an array at least as large as the text stream (512 x 3072 values) and is no
matrix product, convolution or attention. Traffic is what passes read and write. What products, convolutions and
attention read and write is counted apart: each array once for each product that reads it, also packed weights, and the
array that AddMM adds. So a product in parts reads its weights again, and layers apart read their input again. Ends with
one JSON line.
"""

import argparse
import contextlib
import json
import math
from collections import Counter
from dataclasses import dataclass, field
from unittest import mock

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map
from numpy.lib.stride_tricks import as_strided

from mlx_flux_krea.inputs import style as styles
from mlx_flux_krea.models import clip, depth, layers, pixtral, siglip, t5, transformer, vae, vit
from mlx_flux_krea.models.config import CLIP_L, FLUX_DEV, FLUX_VAE, REDUX_DEV, SIGLIP_SO400M, T5_XXL
from mlx_flux_krea.models.depth_config import DEPTH_ANYTHING_V2_SMALL
from mlx_flux_krea.models.filter_config import NSFW_VIT, PIXTRAL_12B
from mlx_flux_krea.sampling import sampler

TEXT_TOKENS, STEPS = 512, 28
BIG = TEXT_TOKENS * FLUX_DEV.hidden_size
VIEWS = {"Transpose", "ExpandDims", "Squeeze", "Broadcast", "Slice", "Split", "Reshape", "Flatten", "Unflatten"}
# one primitive stands for each fused kernel; none of them is used by the networks themselves
MARKERS = {
    "ArcSinh": "fast.rms_norm",
    "ArcTanh": "fast.layer_norm",
    "Depends": "fast.scaled_dot_product_attention",  # or a stand-in, see there
    "Expm1": "gelu",
    "Log1p": "rope",
    "Remainder": "gated_residual",
    "Power": "affine",
    "LogAddExp": "affine_silu",
    "Negative": "squared_deviation",
    "Erf": "silu",
    "ArcTan2": "swiglu",
    "Floor": "contiguous",  # no fused kernel, but a primitive that cannot be exported
}
NORMS, DEPENDS = ("ArcSinh", "ArcTanh"), "Depends"
FUSED_HEADS = (64, 72, 80, 96, 128)  # widths whose attention Metal has in one kernel (ScaledDotProductAttention)


STAND_INS = {1: "dequantize", 2: "moments"}  # by the number of results


def has_a_leading_axis(x: np.ndarray) -> bool:
    """True for a matrix that Metal's dense product reads: rows or columns whose values lie side by side."""
    return 1 in x.strides[-2:]


def has_matrices_side_by_side(x: np.ndarray) -> bool:
    """True for the layout that Metal's quantized product needs of all that it reads."""
    return x.strides[-1] == 1 and x.strides[-2] in (x.shape[-1], 0)


def is_gapless(x: np.ndarray) -> bool:
    """True for an array whose values lie in memory in their order, which convolutions need."""
    expected = layout(x.shape).strides
    return all(n == 1 or a == b for n, a, b in zip(x.shape, x.strides, expected, strict=True))


# What each product reads without a copy (check_transpose, ensure_row_contiguous_matrix of MLX's Metal backend)
PRODUCTS = {
    "Matmul": has_a_leading_axis,
    "AddMM": has_a_leading_axis,
    "GatherMM": has_a_leading_axis,
    "QuantizedMatmul": has_matrices_side_by_side,
    "Convolution": is_gapless,
}


@dataclass
class Count:
    """Counts of one graph."""

    primitives: int = 0
    products: int = 0
    float32_products: int = 0
    passes: int = 0
    small: int = 0  # kernels on small arrays
    largest: int = 0  # elements of the largest array that a kernel writes
    traffic: int = 0  # bytes of the passes
    operands: int = 0  # bytes that products, convolutions and attention read and write
    names: Counter = field(default_factory=Counter)  # all primitives
    big: Counter = field(default_factory=Counter)  # the passes
    dtypes: Counter = field(default_factory=Counter)  # of all outputs
    results: list = field(default_factory=list)  # types of what comes out


def count(function, *args, fused: bool = True) -> Count:
    """Exports the graph of function(*args) and counts it, with markers for fused kernels or with their contents."""
    events, result = [], Count()
    with as_on_a_gpu() if fused else contextlib.nullcontext():
        mx.export_function(events.append, function, *args)
    layouts, dtypes, constants = {}, {}, set()

    def nbytes(name):  # what is broadcast is read once
        read = (n for n, stride in zip(layouts[name].shape, layouts[name].strides, strict=True) if stride)
        return math.prod(read) * dtypes[name].size

    def kernel(name, inputs, outputs):
        if max(layouts[array].size for array in (*inputs, *outputs)) < BIG:
            result.small += 1
        else:
            result.passes += 1
            result.traffic += sum(map(nbytes, (*inputs, *outputs)))
            result.big[MARKERS.get(name, name)] += 1

    for event in events:
        if event["type"] in ("inputs", "outputs"):
            dtypes.update({name: dtype for name, _, dtype in event[event["type"]]})
            layouts.update({name: layout(shape) for name, shape, _ in event[event["type"]]})
            result.results = [dtype for _, _, dtype in event[event["type"]]]  # the outputs come last
        elif event["type"] == "constants":
            constants.update(name for name, _ in event["constants"])
            dtypes.update({name: array.dtype for name, array in event["constants"]})
            layouts.update({name: layout(array.shape) for name, array in event["constants"]})
        elif event["type"] == "primitive":
            name, inputs, outputs = event["name"], *([a[0] for a in event[side]] for side in ("inputs", "outputs"))
            dtypes.update({array: dtype for array, _, dtype in event["outputs"]})
            layouts.update({array: layout(shape) for array, shape, _ in event["outputs"]})
            result.primitives += 1
            result.names[name] += 1
            if name not in VIEWS:
                result.largest = max(result.largest, *(math.prod(shape) for _, shape, _ in event["outputs"]), 0)
            result.dtypes.update(str(dtype).removeprefix("mlx.core.") for _, _, dtype in event["outputs"])
            if name in VIEWS:
                try:
                    views = view(name, layouts[inputs[0]], event["outputs"], event["arguments"])
                    layouts.update(zip(outputs, views, strict=True))
                except ValueError:  # no strides say it
                    kernel(f"copy in {name}", inputs, outputs)
                continue
            if name in PRODUCTS:
                result.products += 1
                result.float32_products += dtypes[outputs[0]] == mx.float32
                for array in inputs:
                    if array not in inputs[2:] * (name == "AddMM") and not PRODUCTS[name](layouts[array]):
                        kernel(f"copy before {name}", [array], [array])
                result.operands += sum(map(nbytes, (*inputs, *outputs)))
            elif name == "SliceUpdate":  # in place
                kernel(name, inputs[1:2], inputs[1:2])
            elif name == DEPENDS and inputs[0] in constants:
                kernel(STAND_INS[len(outputs)], inputs[len(outputs) :], outputs)
            elif name == DEPENDS:
                for array in inputs:
                    if layouts[array].strides[-1] != 1:
                        kernel("copy before attention", [array], [array])
                b, h, s, d = layouts[outputs[0]].shape  # it writes heads side by side
                layouts[outputs[0]] = layout((b, s, h, d)).transpose(0, 2, 1, 3)
                result.operands += sum(map(nbytes, (*inputs, *outputs)))
            else:
                if name in NORMS and not has_rows_side_by_side(layouts[inputs[0]]):
                    kernel(f"copy before {MARKERS[name]}", inputs, outputs)
                kernel(name, outputs if name == "Gather" else inputs, outputs)  # of a table only some rows are read
    return result


def layout(shape) -> np.ndarray:
    """An array of nothing but shape and strides, in elements: it owns no memory, and nobody may read it."""
    strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
    return as_strided(np.empty(1, np.int8), tuple(shape), strides)


def view(name: str, x: np.ndarray, outputs: list, arguments: list) -> list[np.ndarray]:
    """The layouts of views of x.

    Raises:
        ValueError: it takes a copy.
    """
    if name == "Transpose":
        return [x.transpose(arguments[0])]
    if name == "Broadcast":
        return [np.broadcast_to(x, outputs[0][1])]
    if name == "Slice":
        return [x[tuple(map(slice, *arguments))]]
    if name == "Split":
        return np.split(x, *arguments)
    return [x.reshape(outputs[0][1], copy=False)]


def has_rows_side_by_side(x: np.ndarray) -> bool:
    """True for the layout that Metal's norms need: no gaps, and rows of the last axis one after the other."""
    gapless = sum((n - 1) * stride for n, stride in zip(x.shape, x.strides, strict=True)) == x.size - 1
    return gapless and x.strides[-1] == 1 and (x.ndim == 1 or x.shape[-2] == 1 or x.strides[-2] == x.shape[-1])


@contextlib.contextmanager
def as_on_a_gpu():
    """Replaces each function that is one kernel on a GPU by one primitive."""
    in_pieces = mx.fast.scaled_dot_product_attention

    def promoted(*arrays):
        dtypes = [a.dtype for a in arrays if a is not None]
        return mx.float32 if mx.float32 in dtypes else dtypes[0]

    def rms_norm(x, weight, eps):
        return mx.arcsinh(x.astype(promoted(x, weight)))

    def layer_norm(x, weight, bias, eps):
        return mx.arctanh(x.astype(promoted(x, weight, bias)))

    def attention(q, k, v, *, scale, mask=None):
        if q.shape[-1] not in FUSED_HEADS:
            return in_pieces(q, k, v, scale=scale, mask=mask)
        others = [array for array in (k, v, mask) if isinstance(array, mx.array)]
        return mx.depends([q.astype(promoted(q, k, v))], others)[0]

    def dequantized(weight, scales, biases, kind, dtype):
        return stand_in((len(weight), weight.shape[1] * 32 // kind[1]), dtype, (weight, scales, biases))[0]

    def dense(layer, x, bias):
        return layer._dense(x, layer.weight, layer.scales, layer.get("biases"), bias)

    patches = [
        mock.patch.object(mx.fast, "rms_norm", rms_norm),
        mock.patch.object(mx.fast, "layer_norm", layer_norm),
        mock.patch.object(mx.fast, "scaled_dot_product_attention", attention),
        mock.patch.object(mx, "contiguous", mx.floor),
        mock.patch.object(nn, "silu", mx.erf),
        mock.patch.object(nn, "gelu", mx.expm1),
        mock.patch.object(nn, "gelu_approx", lambda x: mx.expm1(mx.expm1(x))),  # too long for one kernel
        mock.patch.object(nn, "gelu_fast_approx", mx.expm1),
        mock.patch.object(transformer, "gelu", mx.expm1),
        mock.patch.object(transformer, "apply_rope", lambda x, pe: mx.log1p(x)),
        mock.patch.object(transformer, "gated_residual", lambda x, gate, y: mx.remainder(x, y)),
        mock.patch.object(pixtral, "rotate", lambda x, pe: mx.log1p(x)),
        mock.patch.object(pixtral, "swiglu", mx.arctan2),
        mock.patch.object(vae, "moments", lambda *parts: stand_in(parts[0].shape, mx.float32, parts, 2)),
        mock.patch.object(layers, "_dequantized", dequantized),
        mock.patch.object(layers.QuantizedLinear, "_dense_in_chunks", dense),  # in chunks on the CPU alone
        mock.patch.object(vae, "squared_deviation", lambda x, mean: mx.negative(x.astype(mx.float32))),
        mock.patch.object(vae, "affine", lambda x, scale, shift: mx.power(x, (scale + shift).astype(x.dtype))),
        mock.patch.object(vae, "affine_silu", lambda x, scale, shift: mx.logaddexp(x, (scale + shift).astype(x.dtype))),
    ]
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(patch)
        yield


def zeros(shape, dtype: mx.Dtype) -> mx.array:
    """An array of any size that takes no memory."""
    array = mx.broadcast_to(mx.zeros((1,), dtype), shape)
    mx.eval(array)
    return array


def stand_in(shape, dtype: mx.Dtype, inputs, outputs: int = 1) -> list[mx.array]:
    """Results of one kernel that reads the inputs; constants, which are not read, give shape and type."""
    return mx.depends([zeros(shape, dtype)] * outputs, list(inputs))


def weightless(module, dtype: mx.Dtype):
    """The module with weights that take no memory; packed ones stay integers."""
    kinds = {mx.uint32: mx.uint32}
    module.update(tree_map(lambda a: zeros(a.shape, kinds.get(a.dtype, dtype)), module.parameters()))
    return module


def transformer_graphs(
    width: int, height: int, dtype: mx.Dtype, config=FLUX_DEV, bits: int | None = None
) -> dict[str, Count]:
    """One double block, one single block, a whole step, and the work that is done once for all steps."""
    tokens, size = (width // 16) * (height // 16), config.hidden_size
    flux = transformer.Flux(config)
    if bits:
        for block in flux.blocks:
            nn.quantize(block, group_size=64, bits=bits)
        layers.adopt(flux)
    weightless(flux, dtype)
    ids = sampler.position_ids(TEXT_TOKENS, width // 8, height // 8)
    pe = transformer.rope(ids, config.axes_dim, config.theta)
    vec, mods = zeros((1, size), dtype), []
    flux.modulations(vec, run=lambda stage, *args: mods.append(tree_map(lambda a: zeros(a.shape, dtype), stage(*args))))
    img, txt = zeros((1, tokens, size), dtype), zeros((1, TEXT_TOKENS, size), dtype)
    x = zeros((1, TEXT_TOKENS + tokens, size), dtype)
    double, single = flux.double_blocks[0], flux.single_blocks[0]

    def conditioning(times, guidance, pooled, text, ids):
        modulations = flux.modulations(flux.vec(times, guidance, pooled))
        arrays = flux.txt_in(text), modulations, transformer.rope(ids, config.axes_dim, config.theta)
        return [array for _, array in tree_flatten(arrays)]

    rows = [zeros((STEPS,), mx.float32)] * 2 + [zeros((STEPS, config.vec_in_dim), dtype)]
    text = zeros((1, TEXT_TOKENS, config.context_in_dim), dtype)
    return {
        "double block": count(lambda img, txt: double(img, txt, mods[0], pe), img, txt),
        "single block": count(lambda x: single(x, mods[config.depth], pe), x),
        "step": count(
            lambda latents, txt: flux.forward(latents, txt, mods, pe), zeros((1, tokens, 64), mx.float32), txt
        ),
        "conditioning": count(conditioning, *rows, text, ids),
    }


def quantized_graphs(width: int, height: int, dtype: mx.Dtype, bits: int) -> dict[str, Count]:
    """The step of quantized blocks, whose layers multiply directly, or by their dequantized weights."""
    result = {}
    for way, is_dense in (("", False), (", dequantized", True)):
        kinds = {(64, bits, "affine", dtype, many): is_dense for many in (False, True)}
        with mock.patch.object(layers, "_faster_dense", kinds):
            graphs = transformer_graphs(width, height, dtype, bits=bits)
        result |= {f"{name}, {bits} bits{way}": graphs[name] for name in ("single block", "step")}
    return result


def chained_block(self, x: mx.array, mod: mx.array, pe: tuple) -> mx.array:
    """A single block that is not ours: two chained products instead of one of attention and MLP side by side."""
    shift, scale, gate = mx.split(mod, 3, axis=-1)
    normed = transformer.modulated_norm(x, shift, scale)
    qkv, mlp = mx.split(transformer.multiply(self.linear1, normed), [3 * x.shape[-1]], axis=-1)
    parts = transformer.attention(*self.norm(qkv, self._num_heads), pe), transformer.gelu(mlp)
    layer, (first, last) = self.linear2, (slice(0, x.shape[-1]), slice(x.shape[-1], None))
    if not isinstance(layer, nn.QuantizedLinear):
        weight = layer.weight
    elif layers._faster_dense[(*layers.kind(layer), x.dtype, True)]:
        weight = layers._dequantized(layer.weight, layer.scales, layer.biases, layers.kind(layer), x.dtype)
    else:
        arrays = [mx.split(a, [a.shape[1] // 5], axis=1) for a in (layer.weight, layer.scales, layer.biases)]
        packed = zip(parts, *arrays, strict=True)
        a, b = (mx.quantized_matmul(one, *w, True, layer.group_size, layer.bits) for one, *w in packed)
        return transformer.gated_residual(x, gate[:, None], a + b + layer.bias)
    y = mx.addmm(mx.addmm(layer.bias, parts[0], weight[:, first].T), parts[1], weight[:, last].T)
    return transformer.gated_residual(x, gate[:, None], y)


def text_graphs(dtype: mx.Dtype, t5_config=T5_XXL, clip_config=CLIP_L) -> dict[str, Count]:
    """The text encoders, one prompt."""
    networks = {
        "T5": (t5.T5Encoder(t5_config), TEXT_TOKENS),
        "CLIP": (clip.CLIPText(clip_config), clip_config.max_position_embeddings),
    }
    return {
        name: count(weightless(network, dtype), zeros((1, length), mx.int32))
        for name, (network, length) in networks.items()
    }


def filter_graphs(dtype: mx.Dtype, rows: int = 32, columns: int = 32, text: int = 194) -> dict[str, Count]:
    """The classifier, which computes in float32, and Pixtral with one picture, its decoder in 4 bits."""
    classifier = weightless(vit.ViT(NSFW_VIT), mx.float32)
    network = pixtral.Pixtral(PIXTRAL_12B)
    for block in network.layers:
        nn.quantize(block, group_size=64, bits=4)
    network = weightless(network, dtype)
    vision, decoder = PIXTRAL_12B.vision_config, PIXTRAL_12B.text_config
    ids = [1] * text + ([PIXTRAL_12B.image_token_index] * columns + [12]) * rows
    pixels = zeros((1, rows * vision.patch_size, columns * vision.patch_size, 3), mx.float32)
    patches = zeros((1, rows * columns, vision.hidden_size), dtype)
    x = zeros((1, len(ids), decoder.hidden_size), dtype)
    turn, turn_patches = network.positions(len(ids)), network.vision_tower.positions(rows, columns)
    return {
        "ViT": count(classifier, zeros((1, NSFW_VIT.image_size, NSFW_VIT.image_size, 3), mx.float32)),
        "Pixtral block": count(lambda x: network.layers[0](x, turn), x),
        "Pixtral tower block": count(lambda x: network.vision_tower.layers[0](x, turn_patches), patches),
        "Pixtral": count(lambda pixels: network.logits([(ids, [pixels])])[0], pixels),
    }


def map_graphs() -> dict[str, Count]:
    """The depth network, which computes in float32, on a wide photo."""
    network = weightless(depth.DepthAnything(DEPTH_ANYTHING_V2_SMALL), mx.float32)
    return {"depth": count(network, zeros((1, 518, 686, 3), mx.float32))}


def style_graphs(dtype: mx.Dtype) -> dict[str, Count]:
    """SigLIP and Redux, as they read a style image, and its grid of tokens shrunk to half a side."""
    encoder, side = weightless(siglip.SigLIP(SIGLIP_SO400M), dtype), SIGLIP_SO400M.image_size
    embedder = weightless(siglip.Redux(REDUX_DEV), dtype)
    vectors = zeros((1, SIGLIP_SO400M.positions, SIGLIP_SO400M.hidden_size), dtype)
    tokens = zeros((1, SIGLIP_SO400M.positions, REDUX_DEV.txt_in_features), dtype)
    return {
        "SigLIP": count(encoder, zeros((1, side, side, 3), mx.float32)),
        "Redux": count(embedder, vectors),
        "shrunk grid": count(lambda tokens: styles.shrink(tokens, 14), tokens),
    }


def kernel_graphs(dtype: mx.Dtype) -> dict[str, Count]:
    """The contents of the kernels behind the markers, except for MLX's own."""
    x, wide, row = zeros((1, 1, 8, 128), dtype), zeros((1, 1, 8, 128), mx.float32), zeros((128,), mx.float32)
    pe = transformer.rope(sampler.position_ids(0, 8, 4), FLUX_DEV.axes_dim, FLUX_DEV.theta)
    turns = pixtral.rotations(np.zeros((8, 64)))
    calls = {
        "gelu": (transformer.gelu, x),
        "rope": (lambda x: transformer.apply_rope(x, pe), x),
        "gated_residual": (transformer.gated_residual, x, x, x),
        "affine": (vae.affine, x, row, row),
        "affine_silu": (vae.affine_silu, x, row, row),
        "squared_deviation": (vae.squared_deviation, x, row),
        "moments": (vae.moments, *[x] * 16),
        "silu": (nn.silu, x),
        "rope of Pixtral": (lambda x: pixtral.rotate(x, turns), x),
        "swiglu": (pixtral.swiglu, x, x),
        "gelu of the filters": (nn.gelu, x),
        "gelu of T5": (nn.gelu_approx, wide),
        "gelu of CLIP": (nn.gelu_fast_approx, wide),
        "bytes": (lambda x: vae.pixels_to_bytes(x, "round"), x),
    }
    return {name: count(*call, fused=False) for name, call in calls.items()}


def vae_graphs(width: int, height: int, dtype: mx.Dtype, config=FLUX_VAE) -> dict[str, Count]:
    """Decoding and encoding, stage by stage as the pipeline evaluates them, and all stages together."""
    net = weightless(vae.VAE(config), dtype)
    down, graphs = config.downsampling, {}
    starts = {
        "decode": (net.decoder, (1, height // down, width // down, config.z_channels)),
        "encode": (net.encoder, (1, height, width, config.in_channels)),
    }
    for name, (half, shape) in starts.items():
        graphs[name] = total = Count()

        def run(stage, *args, total=total):
            arrays = [arg for arg in args if isinstance(arg, mx.array)]
            one = count(lambda *traced, stage=stage, args=args: stage(*_with(args, traced)), *arrays)
            for attribute in ("primitives", "products", "float32_products", "passes", "small", "traffic", "operands"):
                setattr(total, attribute, getattr(total, attribute) + getattr(one, attribute))
            for attribute in ("names", "big", "dtypes"):
                getattr(total, attribute).update(getattr(one, attribute))
            total.results, total.largest = one.results, max(total.largest, one.largest)
            return tree_map(lambda a: zeros(a.shape, a.dtype), stage(*args))

        half(zeros(shape, dtype), run)
    return graphs


def _with(args: tuple, arrays: tuple) -> list:
    """The arguments, with others for their arrays."""
    arrays = iter(arrays)
    return [next(arrays) if isinstance(arg, mx.array) else arg for arg in args]


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--height", type=int, default=1024)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--bits", type=int, default=8, choices=[3, 4, 5, 6, 8], help="of the quantized step")
    parser.add_argument("--chained", action="store_true", help="single blocks with two chained products")
    parser.add_argument("-v", "--verbose", action="store_true")
    args = parser.parse_args()
    dtype = getattr(mx, args.dtype)
    if args.chained:
        transformer.SingleStreamBlock.__call__ = chained_block
    graphs = transformer_graphs(args.width, args.height, dtype) | vae_graphs(args.width, args.height, dtype)
    graphs |= quantized_graphs(args.width, args.height, dtype, args.bits)
    graphs |= text_graphs(dtype) | filter_graphs(dtype) | map_graphs() | style_graphs(dtype)
    print("| graph | primitives | products (float32) | passes | traffic, GB | of products, GB | small kernels |")
    print("|---|---|---|---|---|---|---|")
    for name, c in graphs.items():
        products = f"{c.products} ({c.float32_products})"
        both = f"{c.traffic / 1e9:.2f} | {c.operands / 1e9:.2f}"
        print(f"| {name} | {c.primitives} | {products} | {c.passes} | {both} | {c.small} |")
        if args.verbose:
            print("   ", dict(c.big), "|", dict(c.names), "|", dict(c.dtypes))
    fields = ("primitives", "products", "float32_products", "passes", "small", "traffic", "operands")
    print(json.dumps({name: {f: getattr(c, f) for f in fields} for name, c in graphs.items()}))


if __name__ == "__main__":
    main()
