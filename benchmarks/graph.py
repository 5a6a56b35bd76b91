"""What a GPU would be asked to do for one picture, counted from the exported graph without running it.

    python benchmarks/graph.py [--width 1024] [--height 1024] [--dtype bfloat16] [-v]

No Mac is needed: `mx.export_function` lists every primitive with shapes and types, and weights are views of one zero,
so that the full model takes no memory. On a CPU the `mx.fast` functions fall apart into primitives, and compiled
functions are inlined, so each of them is replaced by one marker primitive with the same result type, to count as a GPU
would launch.

A pass is a kernel that reads or writes an array at least as large as the text stream (512 x 3072 values) and is no
matrix product, convolution or attention. Traffic is what passes read and write. Ends with one JSON line.
"""

import argparse
import contextlib
import json
import math
from collections import Counter
from dataclasses import dataclass, field
from unittest import mock

import mlx.core as mx
from mlx.utils import tree_map

from mlx_flux_krea import sampler, transformer, vae
from mlx_flux_krea.config import FLUX_DEV, FLUX_VAE

TEXT_TOKENS = 512
BIG = TEXT_TOKENS * FLUX_DEV.hidden_size
PRODUCTS = {"Matmul", "AddMM", "QuantizedMatmul", "GatherMM", "Convolution"}
VIEWS = {
    "Transpose",
    "ExpandDims",
    "Squeeze",
    "Broadcast",
    "Slice",
    "Split",
    "Reshape",
    "Flatten",
    "Unflatten",
    "StopGradient",
}
# one primitive stands for each fused kernel; none of them is used by the networks themselves
MARKERS = {
    "ArcSinh": "fast.rms_norm",
    "ArcTanh": "fast.layer_norm",
    "ArcTan2": "fast.scaled_dot_product_attention",
    "Expm1": "gelu",
    "Log1p": "rope",
    "Remainder": "gated_residual",
    "Power": "affine",
    "LogAddExp": "affine_silu",
    "Negative": "squared_deviation",
}


@dataclass
class Count:
    """What one graph asks for."""

    primitives: int = 0
    products: int = 0
    float32_products: int = 0
    passes: int = 0
    small: int = 0  # kernels on small arrays
    traffic: int = 0  # bytes of the passes
    names: Counter = field(default_factory=Counter)  # all primitives
    big: Counter = field(default_factory=Counter)  # the passes
    dtypes: Counter = field(default_factory=Counter)  # of all outputs
    results: list = field(default_factory=list)  # types of what comes out


def count(function, *args) -> Count:
    """Exports the graph of function(*args) and counts it."""
    shapes, sources, nodes, result = {}, {}, [], Count()

    def callback(event):
        if event["type"] == "primitive":
            for name, shape, dtype in event["inputs"] + event["outputs"]:
                shapes[name] = (shape, dtype)
            inputs, outputs = [i[0] for i in event["inputs"]], [o[0] for o in event["outputs"]]
            nodes.append((event["name"], inputs, outputs))
            sources.update(dict.fromkeys(outputs, (event["name"], inputs)))
        elif event["type"] in ("inputs", "outputs"):
            for name, shape, dtype in event[event["type"]]:
                shapes[name] = (shape, dtype)
            if event["type"] == "outputs":
                result.results = [dtype for _, _, dtype in event["outputs"]]
        elif event["type"] == "constants":
            shapes.update({name: (array.shape, array.dtype) for name, array in event["constants"]})

    with as_on_a_gpu():
        mx.export_function(callback, function, *args)

    def bytes_of(name):  # what is broadcast is read once
        while name in sources and sources[name][0] == "Broadcast":
            name = sources[name][1][0]
        shape, dtype = shapes[name]
        return math.prod(shape) * dtype.size

    def is_transposed(name):
        while name in sources and sources[name][0] in VIEWS:
            if sources[name][0] == "Transpose":
                return True
            if sources[name][0] in ("Reshape", "Flatten"):
                return False
            name = sources[name][1][0]
        return False

    for name, inputs, outputs in nodes:
        size = max(math.prod(shapes[o][0]) for o in outputs)
        result.primitives += 1
        result.names[name] += 1
        result.dtypes.update(str(shapes[o][1]).removeprefix("mlx.core.") for o in outputs)
        copies = name in ("Reshape", "Flatten") and is_transposed(inputs[0])
        if name in PRODUCTS:
            result.products += 1
            result.float32_products += shapes[outputs[0]][1] == mx.float32
        elif name == "ArcTan2" or (name in VIEWS and not copies):
            continue
        elif max(size, *(math.prod(shapes[i][0]) for i in inputs), 0) < BIG:
            result.small += 1
        else:
            result.passes += 1
            result.traffic += sum(map(bytes_of, inputs)) + sum(map(bytes_of, outputs))
            result.big[MARKERS.get(name, name)] += 1
    return result


@contextlib.contextmanager
def as_on_a_gpu():
    """Replaces what is one kernel on a GPU by one primitive."""

    def promoted(*arrays):
        dtypes = [a.dtype for a in arrays if a is not None]
        return mx.float32 if mx.float32 in dtypes else dtypes[0]

    def rms_norm(x, weight, eps):
        return mx.arcsinh(x.astype(promoted(x, weight)))

    def layer_norm(x, weight, bias, eps):
        return mx.arctanh(x.astype(promoted(x, weight, bias)))

    def attention(q, k, v, *, scale, mask=None):
        dtype = promoted(q, k, v)
        return mx.arctan2(q.astype(dtype), (k[..., :1, :] + v[..., :1, :]).astype(dtype))

    patches = [
        mock.patch.object(mx.fast, "rms_norm", rms_norm),
        mock.patch.object(mx.fast, "layer_norm", layer_norm),
        mock.patch.object(mx.fast, "scaled_dot_product_attention", attention),
        mock.patch.object(transformer, "gelu", mx.expm1),
        mock.patch.object(transformer, "apply_rope", lambda x, pe: mx.log1p(x)),
        mock.patch.object(transformer, "gated_residual", lambda x, gate, y: mx.remainder(x, y)),
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


def weightless(module, dtype: mx.Dtype):
    """The module with weights that take no memory."""
    module.update(tree_map(lambda a: zeros(a.shape, dtype), module.parameters()))
    return module


def transformer_graphs(width: int, height: int, dtype: mx.Dtype, config=FLUX_DEV) -> dict[str, Count]:
    """One double block, one single block and a whole step."""
    tokens, size = (width // 16) * (height // 16), config.hidden_size
    flux = weightless(transformer.Flux(config), dtype)
    ids = sampler.position_ids(TEXT_TOKENS, height // 8, width // 8)
    pe = transformer.rope(ids, config.axes_dim, config.theta)
    vec, mods = zeros((1, size), dtype), []
    flux.modulations(vec, run=lambda piece, *args: mods.append(tree_map(lambda a: zeros(a.shape, dtype), piece(*args))))
    img, txt = zeros((1, tokens, size), dtype), zeros((1, TEXT_TOKENS, size), dtype)
    x = zeros((1, TEXT_TOKENS + tokens, size), dtype)
    double, single = flux.double_blocks[0], flux.single_blocks[0]
    return {
        "double block": count(lambda img, txt: double(img, txt, mods[0], pe), img, txt),
        "single block": count(lambda x: single(x, mods[config.depth], pe), x),
        "step": count(
            lambda latents, txt: flux.forward(latents, txt, mods, pe), zeros((1, tokens, 64), mx.float32), txt
        ),
    }


def vae_graphs(width: int, height: int, dtype: mx.Dtype, config=FLUX_VAE) -> dict[str, Count]:
    """Decoding and encoding, stage by stage as the pipeline evaluates them, and all stages together."""
    net = weightless(vae.VAE(config), dtype)
    down, graphs = config.downsampling, {}
    starts = {
        "decode": (net.decoder, (1, height // down, width // down, config.z_channels)),
        "encode": (net.encoder, (1, height, width, config.in_channels)),
    }
    for name, (half, shape) in starts.items():
        total = Count()
        for piece in half.pieces():
            one = count(piece, zeros(shape, dtype))
            shape = piece(zeros(shape, dtype)).shape
            for attribute in ("primitives", "products", "float32_products", "passes", "small", "traffic"):
                setattr(total, attribute, getattr(total, attribute) + getattr(one, attribute))
            for attribute in ("names", "big", "dtypes"):
                getattr(total, attribute).update(getattr(one, attribute))
            total.results = one.results
        graphs[name] = total
    return graphs


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--height", type=int, default=1024)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("-v", "--verbose", action="store_true")
    args = parser.parse_args()
    dtype = getattr(mx, args.dtype)
    graphs = transformer_graphs(args.width, args.height, dtype) | vae_graphs(args.width, args.height, dtype)
    print("| graph | primitives | products (float32) | passes | traffic, GB | small kernels |")
    print("|---|---|---|---|---|---|")
    for name, c in graphs.items():
        products = f"{c.products} ({c.float32_products})"
        print(f"| {name} | {c.primitives} | {products} | {c.passes} | {c.traffic / 1e9:.2f} | {c.small} |")
        if args.verbose:
            print("   ", dict(c.big), "|", dict(c.names), "|", dict(c.dtypes))
    fields = ("primitives", "products", "float32_products", "passes", "small", "traffic")
    print(json.dumps({name: {f: getattr(c, f) for f in fields} for name, c in graphs.items()}))


if __name__ == "__main__":
    main()
