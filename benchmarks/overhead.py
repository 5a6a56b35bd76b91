"""Cost of a step beyond its matrix products and attention, and of a picture beyond its networks.

    LD_PRELOAD=libopenblas.so.0 python benchmarks/overhead.py [--side 512] [--double 1] [--single 2] [--rounds 3]
    python benchmarks/overhead.py --picture

Products and attention are timed alone, in alternation with the step, in the same run. The cost of a picture is the
processor's time of Python's own threads, by parts: MLX computes in threads of its own.

Blocks of FLUX.1's full width with random weights. MLX's own products on the CPU are slow, and would hide everything
else: preload OpenBLAS (Debian: libopenblas0-pthread). The ratio is the pipeline's overhead.
"""

import argparse
import contextlib
import dataclasses
import json
import statistics
import tempfile
import threading
import time
from collections import Counter
from unittest import mock

import mlx.core as mx
from mlx.utils import tree_map

from mlx_flux_krea import FluxPipeline, generator, prompts, provenance, weights, worker
from mlx_flux_krea.home import NANO
from mlx_flux_krea.models import config, transformer
from mlx_flux_krea.sampling import sampler


def step_of(flux: transformer.Flux, tokens: int, side: int, dtype: mx.Dtype):
    """A step as the pipeline runs it: block by block, everything else computed before."""
    img, txt = (mx.random.normal((1, n, 64 if n != 512 else flux.config.hidden_size)) for n in (tokens, 512))
    img, txt = img.astype(dtype), txt.astype(dtype)
    pe = transformer.rope(sampler.position_ids(512, side // 8, side // 8), flux.config.axes_dim, flux.config.theta)
    vec = mx.random.normal((1, flux.config.hidden_size)).astype(dtype)
    mods = flux.modulations(vec)
    mx.eval(img, txt, pe, mods)

    return lambda: mx.eval(flux.forward(img, txt, mods, pe, worker.evaluated))


def products_of(flux: transformer.Flux, tokens: int, dtype: mx.Dtype):
    """The products and attentions of the same step, on arrays that are there."""
    heads, width = flux.config.num_heads, flux.config.head_dim
    all_tokens = tokens + 512

    def x(*shape):
        array = mx.random.normal(shape).astype(dtype)
        mx.eval(array)
        return array

    q, inputs = x(1, heads, all_tokens, width), {}

    def product(layer, rows):
        wide = layer.weight.shape[1]
        inputs.setdefault((rows, wide), x(1, rows, wide))
        return lambda: layer(inputs[rows, wide])

    def attention():
        return mx.fast.scaled_dot_product_attention(q, q, q, scale=width**-0.5)

    calls = [product(flux.img_in, tokens)]
    for block in flux.double_blocks:
        for stream, rows in (("img", tokens), ("txt", 512)):
            attn, mlp = block[f"{stream}_attn"], block[f"{stream}_mlp"]
            calls += [product(layer, rows) for layer in (attn.qkv, attn.proj, mlp[0], mlp[2])]
        calls.append(attention)
    for block in flux.single_blocks:
        calls += [product(block.linear1, all_tokens), attention, product(block.linear2, all_tokens)]
    calls.append(product(flux.final_layer.linear, tokens))

    def run():
        for call in calls:
            mx.eval(call())

    return run


def parts_of(flux: transformer.Flux, tokens: int, dtype: mx.Dtype) -> dict:
    """Times everything in a single block but its products and attention, on arrays that exist."""
    size, heads = flux.config.hidden_size, flux.config.num_heads
    shapes = {"x": (tokens, size), "mlp": (tokens, flux.config.mlp_size), "product": (tokens, 3 * size), "mod": (size,)}
    x, mlp, product, mod = (mx.random.normal((1, *shape)).astype(dtype) for shape in shapes.values())
    pe = transformer.rope(mx.zeros((tokens, 3)), flux.config.axes_dim, flux.config.theta)
    q = mx.random.normal((1, heads, tokens, size // heads)).astype(dtype)
    mx.eval(x, mlp, product, mod, pe, q)
    block = flux.single_blocks[0]
    return {
        "norm and modulation": lambda: transformer.modulated_norm(x, mod, mod),
        "norms of queries and keys": lambda: block.norm(product, heads),
        "rope": lambda: [transformer.apply_rope(q, pe), transformer.apply_rope(q, pe)],
        "GELU": lambda: transformer.gelu(mlp),
        "concatenation": lambda: mx.concatenate([x, mlp], axis=-1),
        "gate": lambda: transformer.gated_residual(x, mod[:, None], x),
    }


# Parts of a picture besides its networks: where their functions are looked up. The last has all that is in no other.
PICTURE_PARTS = {
    "request": (FluxPipeline, "_resolve"),
    "memory plan": (FluxPipeline, "plan"),
    "facts of the record": (FluxPipeline, "_record"),
    "tokens": (prompts, "tokenize"),
    "noise": (generator, "make_latents"),
    "encoders and autoencoder, opened again": (weights.NetworkFolder, "load"),
    "PNG": (provenance.Picture, "save"),
    "everything else": (worker.WorkerJob, "call"),
}


def picture_parts(rounds: int, steps: int = 28) -> dict[str, float]:
    """Seconds of the processor of each part of a picture of the small model, medians; the first picture is left out."""
    seconds, threads = Counter(), threading.local()

    def timed(name, function):
        def call(*args, **kwargs):
            inner = threads.__dict__.setdefault("inner", [0.0])  # time of the parts inside each part at hand
            inner.append(0.0)
            begin = time.thread_time()
            try:
                return function(*args, **kwargs)
            finally:
                spent = time.thread_time() - begin
                seconds[name] += spent - inner.pop()
                inner[-1] += spent

        return call

    def evaluate(part, *args):
        result = timed("graphs of the networks", part)(*args)
        timed("handing them to MLX", mx.eval)(result)
        return result

    found = []
    with contextlib.ExitStack() as stack, tempfile.TemporaryDirectory() as folder:
        stack.enter_context(mock.patch.dict("os.environ", {"FLUX_KREA_HOME": f"{folder}/home"}))  # with an empty log
        pipe = FluxPipeline.from_pretrained(NANO)
        stack.enter_context(mock.patch.object(worker, "_evaluate", evaluate))
        for name, (owner, attribute) in PICTURE_PARTS.items():
            stack.enter_context(mock.patch.object(owner, attribute, timed(name, getattr(owner, attribute))))
        for i in range(rounds + 1):
            seconds.clear()
            image = timed("everything else", pipe)(
                f"{i + 1} rings", seed=i, width=64, height=64, num_inference_steps=steps
            )
            image.images[0].save(f"{folder}/{i}.png")
            found.append(dict(seconds))
    return {name: statistics.median(one.get(name, 0) for one in found[1:]) for name in found[-1]}


def processor_seconds(call) -> float:
    begin = time.process_time()
    mx.eval(call())
    return time.process_time() - begin


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--side", type=int, default=512, help="pixels")
    parser.add_argument("--double", type=int, default=1)
    parser.add_argument("--single", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--picture", action="store_true", help="a picture beyond its networks, and not a step")
    args = parser.parse_args()
    if args.picture:
        return print_picture(args.rounds)
    dtype, tokens = getattr(mx, args.dtype), (args.side // 16) ** 2
    sizes = dataclasses.replace(config.FLUX_DEV, depth=args.double, depth_single_blocks=args.single)
    flux = transformer.Flux(sizes)
    flux.update(tree_map(lambda a: a.astype(dtype), flux.parameters()))
    mx.eval(flux.parameters())
    step, products = step_of(flux, tokens, args.side, dtype), products_of(flux, tokens, dtype)
    step()
    seconds = {"step": [], "products": []}
    for _ in range(args.rounds):
        for name, call in (("step", step), ("products", products)):
            begin = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - begin)
    ratio = statistics.median(a / b for a, b in zip(*seconds.values(), strict=True))
    print("| blocks | side | type | step, s | products alone, s | ratio |")
    print("|---|---|---|---|---|---|")
    medians = [statistics.median(times) for times in seconds.values()]
    blocks = f"{args.double}+{args.single}"
    print(f"| {blocks} | {args.side} | {args.dtype} | {medians[0]:.2f} | {medians[1]:.2f} | {ratio:.3f} |")
    parts = parts_of(flux, tokens + 512, dtype)
    rounds = [{name: processor_seconds(call) for name, call in parts.items()} for _ in range(args.rounds)]
    of_parts = {name: statistics.median(one[name] for one in rounds) for name in parts}
    print(f"| besides, in a single block | {' | '.join(parts)} |")
    print(f"|{'---|' * (len(parts) + 1)}")
    print(f"| seconds of a processor | {' | '.join(f'{one:.3f}' for one in of_parts.values())} |")
    print(json.dumps({"ratio": ratio, **seconds, "pieces": of_parts}))


def print_picture(rounds: int):
    of_picture = picture_parts(rounds)
    print("| of a picture of 28 steps, besides its networks | seconds of a processor |\n|---|---|")
    for name, one in {**of_picture, "all": sum(of_picture.values())}.items():
        print(f"| {name} | {one:.4f} |")
    print(json.dumps({"picture": of_picture}))


if __name__ == "__main__":
    main()
