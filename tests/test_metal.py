"""The rules for Metal, which no test machine here has, held on the exported graphs of the full-size networks.

What the GPU would be asked for at 1024 x 1024 in bfloat16 is listed without running it (benchmarks/graph.py): only
primitives that MLX implements on the GPU, only types that it has, no float32 product, no more passes than the budget.
"""

import graph
import mlx.core as mx
import pytest

ALLOWED = {
    *graph.PRODUCTS,
    *graph.VIEWS,
    *graph.MARKERS,
    "Add",
    "AsType",
    "Concatenate",
    "Divide",
    "Multiply",
    "Pad",
    "Reduce",
    "Sqrt",
    "Square",
    "Subtract",
}
# primitives, passes, gigabytes of traffic
BUDGET = {
    "double block": (90, 20, 1.0),
    "single block": (35, 9, 0.95),
    "step": (2800, 730, 55),
    "decode": (2700, 550, 62),
    "encode": (1600, 320, 35),
}


@pytest.fixture(scope="module")
def graphs():
    return graph.transformer_graphs(1024, 1024, mx.bfloat16) | graph.vae_graphs(1024, 1024, mx.bfloat16)


@pytest.mark.parametrize("name", BUDGET)
def test_only_what_the_gpu_has_is_asked_for(graphs, name):
    assert set(graphs[name].names) <= ALLOWED
    assert set(graphs[name].dtypes) <= {"bfloat16", "float32"}


@pytest.mark.parametrize("name", BUDGET)
def test_no_product_of_a_bfloat16_model_is_float32(graphs, name):
    assert graphs[name].float32_products == 0
    assert set(graphs[name].results) == {mx.bfloat16}


@pytest.mark.parametrize("name", ["double block", "single block", "step"])
def test_nothing_in_the_transformer_is_float32_outside_a_fused_kernel(graphs, name):
    assert set(graphs[name].dtypes) == {"bfloat16"}


@pytest.mark.parametrize("name", BUDGET)
def test_the_budget_holds(graphs, name):
    primitives, passes, gigabytes = BUDGET[name]
    count = graphs[name]
    assert count.primitives <= primitives
    assert count.passes <= passes
    assert count.traffic <= gigabytes * 1e9


def test_products_of_a_step_are_those_of_the_model(graphs):
    """8 in a double block, 2 in a single one, the way in and the way out: qkv and qkv+mlp are one product each."""
    assert graphs["step"].products == 19 * 8 + 38 * 2 + 2


def test_a_silent_promotion_would_be_seen(monkeypatch):
    """One float32 vector in the stream, as in a peer: the count must show it."""
    from mlx_flux_krea import transformer

    original = transformer.modulated_norm
    monkeypatch.setattr(
        transformer, "modulated_norm", lambda x, shift, scale: original(x, shift, scale.astype(mx.float32))
    )
    counts = graph.transformer_graphs(256, 256, mx.bfloat16)
    assert counts["single block"].float32_products > 0
    assert "float32" in counts["step"].dtypes
