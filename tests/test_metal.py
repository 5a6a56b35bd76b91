"""The rules for Metal, which no test machine here has, held on the exported graphs of the full-size networks.

What the GPU would be asked for at 1024 x 1024 in bfloat16 is listed without running it (benchmarks/graph.py): only
primitives that MLX implements on the GPU, only types that it has, no float32 product, no more passes than the budget.
"""

import io
import math
import os
import re

import graph
import mlx.core as mx
import numpy as np
import pytest
import winograd
from helpers import rel
from mlx import nn
from mlx.utils import tree_flatten, tree_map

from mlx_flux_krea import memory
from mlx_flux_krea.home import NANO
from mlx_flux_krea.models import layers, pixtral, tiles, transformer, vae
from mlx_flux_krea.models.config import FLUX_VAE
from mlx_flux_krea.presets import MAX_SIDE
from mlx_flux_krea.weights import open_model

# what MLX has a Metal kernel for, of what the networks could use; no sort, no factorization, nothing that loads
ALLOWED = {
    *graph.PRODUCTS, *graph.VIEWS, *graph.MARKERS,
    "Add", "Arange", "ArgReduce", "AsType", "Concatenate", "Cos", "Divide", "Exp", "Full", "Gather", "GatherAxis",
    "Maximum", "Minimum", "Multiply", "Pad", "Reduce", "Round", "Sigmoid", "Sin", "Softmax", "Sqrt", "Square",
    "SliceUpdate", "Subtract", "Tanh",
}  # fmt: skip
INDICES = {"int32", "uint32"}
# primitives, passes, gigabytes of traffic, gigabytes that products read and write
BUDGET = {
    "double block": (90, 23, 1.05, 1.05),
    "single block": (35, 10, 1.0, 0.75),
    "step": (2800, 820, 58, 48),
    "single block, 8 bits": (35, 12, 1.45, 0.65),
    "step, 8 bits": (2300, 1050, 85, 40),
    "single block, 8 bits, dequantized": (40, 12, 1.35, 0.75),
    "step, 8 bits, dequantized": (2800, 1050, 84, 48),
    "conditioning": (330, 0, 0, 7),
    "T5": (1050, 220, 5.5, 12.5),
    "CLIP": (560, 0, 0, 0.21),
    "decode": (4200, 720, 44, 12),
    "encode": (2700, 410, 26.5, 7.1),
    "ViT": (550, 0, 0, 0.55),
    "Pixtral tower block": (45, 2, 0.03, 0.1),
    "Pixtral block": (25, 7, 0.3, 0.45),
    "Pixtral": (2000, 280, 11.5, 18.5),
    "depth": (800, 28, 0.75, 1.5),
    "SigLIP": (1200, 55, 0.7, 1.85),
    "Redux": (12, 2, 0.04, 0.2),
    "shrunk grid": (10, 2, 0.02, 0.04),
}
# all through, but for Pixtral, where it becomes logits, and for means of few tokens, which are rounded once
FLOAT32 = {"ViT", "depth", "Pixtral", "shrunk grid"}


@pytest.fixture(scope="module")
def graphs():
    full = (1024, 1024, mx.bfloat16)
    graphs = graph.transformer_graphs(*full) | graph.vae_graphs(*full) | graph.text_graphs(mx.bfloat16)
    graphs |= graph.quantized_graphs(*full, bits=8)
    return graphs | graph.filter_graphs(mx.bfloat16) | graph.map_graphs() | graph.style_graphs(mx.bfloat16)


@pytest.mark.parametrize("name", BUDGET)
def test_only_what_the_gpu_has_is_asked_for(graphs, name):
    assert set(graphs[name].names) <= ALLOWED
    assert set(graphs[name].dtypes) <= {"bfloat16", "float32"} | (INDICES if name in ("CLIP", "Pixtral") else set())


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32])
def test_inside_the_kernels_is_only_what_the_gpu_has(dtype):
    """Markers hide what they stand for, so that it is listed by itself."""
    given = str(dtype).removeprefix("mlx.core.")
    for name, count in graph.kernel_graphs(dtype).items():
        assert set(count.names) <= ALLOWED - {"Matmul", "Softmax"}, name
        assert set(count.dtypes) <= {given, "float32"} | ({"uint8"} if name == "bytes" else set()), name
        results = dict.fromkeys(("squared_deviation", "gelu of T5", "gelu of CLIP"), mx.float32) | {"bytes": mx.uint8}
        assert count.results == [results.get(name, dtype)] or name == "moments", name
    assert graph.kernel_graphs(dtype)["moments"].results == [mx.float32] * 2


COMPILED = {
    "silu": (nn.silu, 1),
    "gelu of the filters": (nn.gelu, 1),
    "gelu of CLIP": (nn.gelu_fast_approx, 1),
    "gelu": (transformer.gelu, 1),
    "gated_residual": (transformer.gated_residual, 3),
    "rotate": (transformer.rotate, 4),
    "rotate of Pixtral": (lambda x: pixtral.rotate(x, pixtral.rotations(np.zeros((8, 4)))), 1),
    "swiglu": (pixtral.swiglu, 2),
    "affine": (vae.affine, 3),
    "affine_silu": (vae.affine_silu, 3),
    "squared_deviation": (vae.squared_deviation, 2),
    "moments": (vae.moments, 16),
}


@pytest.mark.parametrize("name", COMPILED)
def test_each_compiled_function_is_one_kernel(name):
    """Beyond some depth and number of arrays MLX cuts a function in parts, without a word."""
    function, arrays = COMPILED[name]
    inputs, text = [mx.zeros((1, 2, 8, 8), mx.bfloat16) for _ in range(arrays)], io.StringIO()
    mx.eval(inputs)
    mx.export_to_dot(text, function(*inputs))
    kernels = [label for label in re.findall(r'label ="(\w+)"', text.getvalue()) if label not in graph.VIEWS]
    assert [label[:8] for label in kernels] == ["Compiled"], kernels


def test_group_statistics_read_an_activation_once_and_make_no_float32_copy():
    """16 neighbours become two numbers in float32, which are read, and of whose means a squared deviation is taken."""
    shape = (1, 4096, 4096, 128)
    count = graph.count(lambda x: vae.group_statistics(x, 32), graph.zeros(shape, mx.bfloat16))
    assert count.traffic == pytest.approx(math.prod(shape) * (2 + (2 + 5) * 4 / 16), rel=1e-3)
    assert count.largest == 2**27 / 16
    assert set(count.big) == {"moments", "Reduce", "squared_deviation"}


@pytest.mark.parametrize("name", sorted(BUDGET.keys() - FLOAT32))
def test_no_product_of_a_bfloat16_model_is_float32(graphs, name):
    assert graphs[name].products > 0
    assert graphs[name].float32_products == 0


@pytest.mark.parametrize("name", sorted(BUDGET.keys() - {"conditioning", *FLOAT32}))
def test_what_comes_out_of_a_bfloat16_model_is_bfloat16(graphs, name):
    assert set(graphs[name].results) == {mx.bfloat16}


def test_only_the_rope_tables_of_the_conditioning_are_float32(graphs):
    *modulations, cos, sin = graphs["conditioning"].results
    assert set(modulations) == {mx.bfloat16}
    assert cos == sin == mx.float32


def test_the_classifier_and_the_depth_network_are_float32_and_of_pixtral_the_head_alone(graphs):
    assert set(graphs["ViT"].dtypes) == set(graphs["depth"].dtypes) == {"float32"}
    assert graphs["ViT"].products == graphs["ViT"].float32_products == 12 * 6 + 2
    assert graphs["Pixtral"].results == [mx.float32]
    assert graphs["Pixtral"].float32_products == 1
    assert graphs["Pixtral"].products == 1 + 24 * 7 + 2 + 40 * 7 + 1
    assert set(graphs["Pixtral block"].dtypes) == set(graphs["Pixtral tower block"].dtypes) == {"bfloat16"}


@pytest.mark.parametrize("name", ["double block", "single block", "step"])
def test_nothing_in_the_transformer_is_float32_outside_a_fused_kernel(graphs, name):
    assert set(graphs[name].dtypes) == {"bfloat16"}


@pytest.mark.parametrize("name", BUDGET)
def test_the_budget_holds(graphs, name):
    primitives, passes, gigabytes, of_products = BUDGET[name]
    count = graphs[name]
    assert count.primitives <= primitives
    assert count.passes <= passes
    assert count.traffic <= gigabytes * 1e9
    assert count.operands <= of_products * 1e9


def test_products_are_those_of_the_model(graphs):
    """8 in a double block, 2 in a single one, the way in and the way out: qkv and qkv+mlp are one product each."""
    assert graphs["step"].products == 19 * 8 + 38 * 2 + 2
    # text, time, guidance and vector on their way in; two modulations of a double block, one of any other layer
    assert graphs["conditioning"].products == 1 + 3 * 2 + 19 * 2 + 38 + 1
    assert graphs["T5"].products == 24 * 7
    assert graphs["CLIP"].products == 12 * 6
    assert (graphs["SigLIP"].products, graphs["Redux"].products) == (27 * 6 + 1, 2)


def test_copies_that_metal_makes_are_counted(graphs):
    """Queries and keys are slices of one product, and a norm's rows must lie side by side; T5's bias is copied once."""
    copies = {name: sum(n for kernel, n in graphs[name].big.items() if kernel.startswith("copy")) for name in graphs}
    assert copies["double block"] == 4
    assert copies["single block"] == 2
    assert copies["step"] == 19 * 4 + 38 * 2
    assert copies["decode"] == 26  # one for each strip that is doubled in size
    assert copies["encode"] == copies["T5"] == 0
    assert graphs["T5"].big["contiguous"] == 1


def test_attention_that_metal_does_not_fuse_is_counted_in_its_parts(graphs):
    """Head width 512 of the autoencoder: 16 chunks of queries, each two products and a softmax over all positions."""
    for name in ("decode", "encode"):
        assert graphs[name].big["Softmax"] == graphs[name].names["Matmul"] / 2 == 16
        assert graph.MARKERS["Depends"] not in graphs[name].big


LAYOUTS = {
    "heads are a view": (lambda x: heads(x), {}),
    "undone by a copy": (lambda x: heads(x).reshape(1, -1), {"copy in Reshape": 1}),
    "repeated by a copy": (lambda x: mx.broadcast_to(x, (2, *x.shape[1:])).reshape(1, -1), {"copy in Reshape": 1}),
    "a norm of rows side by side": (lambda x: norm(x.reshape(1, 4608, -1, 128)), {"fast.rms_norm": 1}),
    "a norm of heads": (lambda x: norm(heads(x)), {"fast.rms_norm": 1, "copy before fast.rms_norm": 1}),
    "a norm of some columns": (lambda x: norm(heads(x)[:, :9]), {"fast.rms_norm": 1, "copy before fast.rms_norm": 1}),
    "a norm of half of the heads": (
        lambda x: norm(x.reshape(1, 4608, 72, 128)[:, :, :36]), {"fast.rms_norm": 1, "copy before fast.rms_norm": 1},
    ),
    "a norm of some rows": (lambda x: norm(x[:, 512:].reshape(1, 4096, -1, 128)), {"fast.rms_norm": 1}),
    "attention reads heads and writes them side by side": (
        lambda x: attend(*[heads(x)] * 3).transpose(0, 2, 1, 3).reshape(1, 4608, -1), {},
    ),
    "attention of columns": (
        lambda x: attend(*[x.reshape(1, -1, 128, 4608).swapaxes(2, 3)] * 3), {"copy before attention": 3},
    ),
}  # fmt: skip


X, W, C = (
    4608 * 3072 * 2,
    3072 * 3072 * 2,
    3072 * 2,
)  # bytes of an input, which is as large as its result; weights; a bias
PACKED = 3072 * (3072 + 2 * 2 * 3072 // 64)  # 8 bits, scales and biases
OPERANDS = {
    "a bias": (lambda x, w: mx.addmm(w[0], x, w.T), 2 * X + W + C, {}),
    "a residual": (lambda x, w: mx.addmm(x, x, w.T), 3 * X + W, {}),
    "an input of two layers": (lambda x, w: [x @ w.T, x @ w], 4 * X + 2 * W, {}),
    "half of the columns": (lambda x, w: x[..., :1536] @ w[:, :1536].T, 1.5 * X + W / 2, {}),
    "packed weights": (lambda x, w: packed(x), 2 * X + PACKED, {}),
    "half of their columns": (lambda x, w: packed(x, 1536), 1.5 * X + PACKED / 2, {"copy before QuantizedMatmul": 1}),
    "attention": (lambda x, w: attend(*[heads(x)] * 3), 4 * X, {}),
}


def packed(x, columns=3072):
    arrays = [graph.zeros((3072, n), dtype) for n, dtype in ((768, mx.uint32), (48, mx.bfloat16), (48, mx.bfloat16))]
    weight, scales, biases = (a[:, : a.shape[1] * columns // 3072] for a in arrays)
    return mx.quantized_matmul(x[..., :columns], weight, scales, biases, transpose=True, group_size=64, bits=8)


@pytest.mark.parametrize("name", OPERANDS)
def test_what_products_read_and_write_is_counted(name):
    function, operands, copies = OPERANDS[name]
    x, w = graph.zeros((1, 4608, 3072), mx.bfloat16), graph.zeros((3072, 3072), mx.bfloat16)
    count = graph.count(function, x, w)
    assert (count.operands, {key: n for key, n in count.big.items() if key.startswith("copy")}) == (operands, copies)


def test_products_in_parts_read_their_weights_again():
    layer, x = nn.Linear(3072, 3072), graph.zeros((1, 4608, 3072), mx.bfloat16)
    graph.weightless(layer, mx.bfloat16)
    whole = graph.count(lambda x: transformer.multiply(layer, x), x)
    with layers.smaller(4):
        parts = graph.count(lambda x: transformer.multiply(layer, x), x)
    assert (parts.products, parts.operands - whole.operands) == (4, 3 * (W + C))


def test_the_chained_block_that_is_counted_computes_what_ours_does():
    flux = open_model(NANO).flux.load(mx.float32)
    size = flux.config.hidden_size
    x, mod = (
        mx.random.normal((1, 24, size), key=mx.random.key(0)),
        mx.random.normal((1, 3 * size), key=mx.random.key(1)),
    )
    pe = transformer.rope(mx.arange(72).reshape(24, 3), flux.config.axes_dim, flux.config.theta)
    block = flux.single_blocks[0]
    assert rel(graph.chained_block(block, x, mod, pe), block(x, mod, pe)) < 1e-6


def heads(x):
    return x.reshape(1, 4608, -1, 128).transpose(0, 2, 1, 3)


def norm(x):
    return mx.fast.rms_norm(x, mx.ones((128,), mx.bfloat16), 1e-6)


def attend(q, k, v):
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=1.0)


@pytest.mark.parametrize("name", LAYOUTS)
def test_strides_are_followed_as_metal_follows_them(name):
    function, passes = LAYOUTS[name]
    assert graph.count(function, graph.zeros((1, 4608, 9216), mx.bfloat16)).big == passes


def test_a_silent_promotion_would_be_seen(monkeypatch):
    """One float32 vector in the stream, as in a peer: the count must show it."""
    original = transformer.modulated_norm
    monkeypatch.setattr(
        transformer, "modulated_norm", lambda x, shift, scale: original(x, shift, scale.astype(mx.float32))
    )
    counts = graph.transformer_graphs(256, 256, mx.bfloat16)
    assert counts["single block"].float32_products > 0
    assert "float32" in counts["step"].dtypes


# --- Winograd's algorithm, which MLX uses on Metal alone (benchmarks/winograd.py) ---


@pytest.mark.parametrize("shape", [(1, 12, 18, 32), (2, 13, 7, 32)])
@pytest.mark.parametrize("padding", [(0, 0), (1, 1), (0, 1)])
def test_the_emulated_convolution_is_the_convolution(shape, padding):
    x, weight = mx.random.normal(shape, key=mx.random.key(1)), mx.random.normal((32, 3, 3, 32), key=mx.random.key(2))
    error = winograd.convolve(x, weight, padding) - mx.conv2d(x, weight, padding=padding)
    assert mx.abs(error).max() < 1e-3


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_in_16_bits_it_is_many_times_further_off_than_the_direct_one(dtype):
    x, weight = (mx.random.normal(s, key=mx.random.key(1)).astype(dtype) for s in ((1, 24, 24, 64), (64, 3, 3, 64)))
    exact = mx.conv2d(x.astype(mx.float32), weight.astype(mx.float32))
    direct, sent = (y.astype(mx.float32) - exact for y in (mx.conv2d(x, weight), winograd.convolve(x, weight)))
    assert mx.linalg.norm(sent) > 10 * mx.linalg.norm(direct)
    assert (mx.linalg.norm(sent) / mx.linalg.norm(exact) > 0.03) == (dtype == mx.bfloat16)


@pytest.mark.parametrize(("variable", "least", "most"), [(None, 0.9, 1), ("0", 0, 0)])
def test_nearly_all_of_the_published_decoder_would_be_sent_there_and_the_variable_keeps_it_away(
    monkeypatch, variable, least, most
):
    """The graph alone is built, at 1024 x 1024; the package's own setting is the second row."""
    if variable is None:
        monkeypatch.delenv("MLX_CONV_WINOGRAD")
    assert os.environ.get("MLX_CONV_WINOGRAD") == variable
    decoder = vae.VAE(FLUX_VAE)
    with winograd.emulated() as counts:
        decoder.decode(mx.zeros((1, 128, 128, 16)))
        decoder.encode(mx.zeros((1, 1024, 1024, 3)))
    assert least <= counts["sent"] / (counts["sent"] + counts["direct"]) <= most


def test_a_decoded_picture_shows_the_harm_and_the_remedy(monkeypatch):
    found = winograd.decoder_errors(96)
    assert found["direct"][0] > found["Winograd"][0] + 0.5
    with winograd.emulated(least=(0, 0)) as counts:  # as the package sets it
        mx.eval(open_model(NANO).vae.load(mx.bfloat16).decode(mx.zeros((1, 4, 4, 16))))
    assert (counts["sent"], counts["direct"] > 0) == (0, True)


# --- arrays that kernels can count ---


@pytest.mark.slow
@pytest.mark.parametrize("side", [1024, 2896])
def test_the_largest_array_of_the_autoencoder_is_the_one_that_the_plan_counts(side):
    """2896 x 2896 is the largest square whose arrays have fewer than 2^31 elements."""
    graphs = graph.vae_graphs(side, side, mx.bfloat16)
    largest = max(graphs["decode"].largest, graphs["encode"].largest)
    assert largest == memory.largest_array(FLUX_VAE, width=side, height=side) < memory.INDEXABLE
    assert memory.largest_array(FLUX_VAE, width=2912, height=2896) >= memory.INDEXABLE


def test_no_array_of_a_picture_in_tiles_is_too_large_at_the_largest_size(monkeypatch):
    """The stages of one tile, and the whole picture that tiles are added to."""
    net, sizes = graph.weightless(vae.VAE(FLUX_VAE), mx.bfloat16), []

    def run(stage, *args):
        result = stage(*args)
        sizes.extend(array.size for _, array in tree_flatten([result]) if isinstance(array, mx.array))
        return tree_map(lambda a: graph.zeros(a.shape, a.dtype), result)

    latent = MAX_SIDE // FLUX_VAE.downsampling
    tiles.decode(net, graph.zeros((1, latent, latent, 16), mx.bfloat16), run)
    assert 3 * MAX_SIDE**2 <= max(sizes) < memory.INDEXABLE
