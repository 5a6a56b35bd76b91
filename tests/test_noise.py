"""Random streams against torch's own numbers, both eras, and against MLX's."""

from types import SimpleNamespace

import mlx.core as mx
import numpy as np
import pytest
from helpers import facts, goldens, max_abs

from mlx_flux_krea.errors import UsageError
from mlx_flux_krea.models import transformer
from mlx_flux_krea.presets import RECIPES, TIMESTEP_ROUNDING, Schedule
from mlx_flux_krea.sampling import noise, sampler
from mlx_flux_krea.sampling.noise import MLXSeedStream, TorchStream, draw

SEEDS = (0, 1, 42, 2**31, 2**63 - 1)
CASES = [
    (prefix, era, seed, dtype)
    for prefix, era, dtypes in (
        ("rng", "rounded", ("float32", "bfloat16", "float16")),
        ("rng_legacy", "stepwise", ("bfloat16", "float16")),
    )
    for seed in SEEDS
    for dtype in dtypes
]


def assert_drawn(ours: mx.array, theirs: mx.array, small: int = 0) -> None:
    """The bars of the reference's README; the first `small` numbers were drawn below 16 at a time."""
    if theirs.dtype == mx.float32:
        assert max_abs(ours, theirs) <= 5e-6
        if small:
            assert max_abs(ours[:small], theirs[:small]) <= 5e-7
        return
    assert ours.dtype == theirs.dtype
    ours, theirs = (np.array(x.flatten().view(mx.int16), np.int64) for x in (ours, theirs))
    ours, theirs = (np.where(x < 0, -32768 - x, x) for x in (ours, theirs))  # neighbours in the type differ by one
    assert (ours == theirs).mean() >= 0.995
    assert np.abs(ours - theirs).max() <= 1


def repeated(prefix: str, era: str, seed: int, dtype: str) -> dict[str, tuple[mx.array, mx.array]]:
    """Our numbers and torch's of each kind of draw: sizes 1 to 40 each from the seed, several in a row, one large."""
    sizes, kind = facts()["rng"], getattr(mx, dtype)
    stream = TorchStream(seed)
    ours = {
        "small": mx.concatenate([TorchStream(seed).normal((n,), kind, era) for n in sizes["small_sizes"]]),
        "sequence": mx.concatenate([stream.normal((n,), kind, era) for n in sizes["sequence"]]),
        "big": TorchStream(seed).normal(tuple(sizes["big_shape"]), kind, era),
    }
    theirs = {name: goldens().get(f"{prefix}.{seed}.{dtype}.{name}") for name in ours}
    return {name: (ours[name], theirs[name]) for name in ours if theirs[name] is not None}


@pytest.mark.parametrize(("prefix", "era", "seed", "dtype"), CASES)
def test_torch_numbers_are_repeated(prefix, era, seed, dtype):
    pairs = repeated(prefix, era, seed, dtype)
    assert {"small", "sequence"} <= pairs.keys()
    for name, (ours, theirs) in pairs.items():
        assert_drawn(ours, theirs, small=sum(range(1, 16)) if name == "small" else 0)


def test_zeros_are_positive_as_torchs_are():
    drawn = np.array(TorchStream(0).normal((4096,), mx.bfloat16, "stepwise").astype(mx.float32))
    assert (drawn == 0).sum() > 4  # a uniform of 8 bits is often 0
    assert not np.signbit(drawn[drawn == 0]).any()


@pytest.mark.parametrize("k", range(4))
@pytest.mark.parametrize(("key", "recipe"), [("noise", "diffusers"), ("noise_legacy", "bfl")])
def test_bfl_noise_is_repeated(k, key, recipe):
    golden = goldens()[f"{key}.{k}.bfloat16"]
    seed = facts()["noise"][k]["seed"]
    assert_drawn(draw(recipe, seed, golden.shape, mx.bfloat16), golden)
    if key == "noise":
        assert_drawn(draw("diffusers", seed, golden.shape, mx.float32), goldens()[f"noise.{k}.float32"])


def test_a_seed_counts_with_its_low_32_bits_in_torch():
    assert mx.array_equal(
        draw("diffusers", 42, (1, 16, 8, 8), mx.float32), draw("diffusers", 2**32 + 42, (1, 16, 8, 8), mx.float32)
    )


def test_a_list_of_seeds_draws_each_picture_alone_and_one_seed_draws_the_batch():
    shape = (2, 16, 8, 8)
    alone = draw("diffusers", [7, 8], shape, mx.float32)
    assert mx.array_equal(alone[1:], draw("diffusers", 8, (1, *shape[1:]), mx.float32))
    batch = draw("diffusers", 7, shape, mx.float32)
    assert mx.array_equal(batch[:1], alone[:1])
    assert not mx.array_equal(batch[1:], alone[1:])
    assert mx.array_equal(draw("diffusers", np.int64(7), shape, mx.float32), batch)


def test_mlx_streams_are_what_mflux_and_mlx_examples_draw():
    shape = (1, 16, 8, 12)
    packed = mx.random.normal([1, 24, 64], key=mx.random.key(3))
    assert mx.array_equal(sampler.pack(draw("mflux", 3, shape, mx.float32)), packed)
    mx.random.seed(3)
    first, second = mx.random.normal((1, 8, 12, 16), dtype=mx.bfloat16), mx.random.normal((4,))
    assert mx.array_equal(draw("mlx-examples", 3, shape, mx.bfloat16), first.transpose(0, 3, 1, 2))
    stream = MLXSeedStream(3)
    stream.normal((1, 8, 12, 16), mx.bfloat16, None)
    assert mx.array_equal(stream.normal((4,), mx.float32, None), second)


def test_mlx_streams_give_the_numbers_of_the_mlx_that_the_recipes_were_read_from():
    """MLX could change its streams; a seed of these recipes would then mean another picture, and must say so."""
    packed = sampler.pack(draw("mflux", 3, (1, 16, 4, 4), mx.float32))[0, 0, :4]
    nhwc = draw("mlx-examples", 3, (1, 16, 4, 4), mx.float32).transpose(0, 2, 3, 1)[0, 0, 0, :4]
    np.testing.assert_allclose(packed, [-0.361305, 0.021158, 0.017233, -1.000535], atol=1e-5)
    np.testing.assert_allclose(nhwc, [-0.271484, -0.625, 0.898438, -0.06543], atol=0.02)  # drawn in bfloat16


def test_recipes_with_a_type_of_their_own_draw_in_it():
    drawn = draw("bfl", 0, (1, 16, 8, 8), mx.float32)
    assert drawn.dtype == mx.float32
    assert max_abs(drawn, draw("bfl", 0, (1, 16, 8, 8), mx.bfloat16)) == 0
    assert float(mx.abs(draw("bfl", 0, (1, 16, 64, 64), mx.float32)).max()) < 3.34  # uniforms of 8 bits end there


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_draws_standard_normal_numbers_of_the_right_shape(name):
    drawn = draw(name, 5, (2, 16, 32, 32), mx.float32)
    assert drawn.shape == (2, 16, 32, 32)
    assert abs(float(drawn.mean())) < 0.02
    assert abs(float(drawn.std()) - 1) < 0.02


def test_tools_that_draw_on_a_gpu_are_named_as_not_repeatable():
    with pytest.raises(UsageError, match="cannot be repeated"):
        noise.find_recipe("replicate")
    with pytest.raises(UsageError, match="one of diffusers, bfl"):
        noise.find_recipe("automatic1111")


# --- how times and guidance are rounded ---

SIGMAS = np.linspace(1, 0.001, 300, dtype=np.float32)


def bf16(x):
    """Rounds to bfloat16, ties to even, without MLX."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


@pytest.mark.parametrize(
    ("rounding", "formula"),
    [
        ("there and back", lambda sigma: bf16(bf16(bf16(1000 * sigma) / 1000) * 1000)),
        ("twice", lambda sigma: bf16(bf16(sigma) * 1000)),
        ("none", lambda sigma: 1000 * sigma),
        ("once", lambda sigma: bf16(1000 * sigma)),
    ],
)
def test_times_are_rounded_as_the_tools_write_it(rounding, formula):
    assert rounding in {recipe.timestep_rounding for recipe in RECIPES.values()}
    got = np.array(sampler.embedded_times(SIGMAS, rounding, mx.bfloat16).astype(mx.float32))
    assert np.array_equal(got, formula(SIGMAS))
    assert not any(
        np.array_equal(got, np.array(sampler.embedded_times(SIGMAS, other, mx.bfloat16).astype(mx.float32)))
        for other in TIMESTEP_ROUNDING.keys() - {rounding}
    )
    assert np.allclose(sampler.embedded_times(SIGMAS, rounding, mx.float32), 1000 * SIGMAS, rtol=2e-7, atol=0)


def test_diffusers_times_are_those_of_torch():
    """Rounded by torch 2.13 on diffusers' way, in the shifted schedule of 7 steps at 48 x 32."""
    sigmas = sampler.make_sigmas(Schedule(), 6, 7)[:-1]
    expected = [1.0, 0.90234375, 0.80078125, 0.6796875, 0.54296875, 0.388671875, 0.2080078125]
    times = sampler.embedded_times(sigmas, "there and back", mx.bfloat16)
    assert mx.array_equal(times, mx.array(expected).astype(mx.bfloat16) * 1000)


@pytest.mark.parametrize(("guidance", "twice", "once"), [(4.5, 4512, 4512), (4.7, 4672, 4704), (3.5, 3504, 3504)])
def test_guidance_is_rounded_with_the_times(guidance, twice, once):
    for rounding in TIMESTEP_ROUNDING:
        got = sampler.embedded_guidance(guidance, rounding, mx.bfloat16).astype(mx.float32).item()
        assert got == (once if rounding == "once" else twice), rounding
        assert abs(sampler.embedded_guidance(guidance, rounding, mx.float32).item() / 1000 - guidance) < 1e-6


def test_mfluxs_own_code_gives_the_same_conditioning_vector():
    """Its TimeTextEmbed and `Transformer.compute_text_embeddings` (mflux 0.24.0) with these weights in bfloat16."""
    rng, layers = np.random.default_rng(7), []
    for width in (256, 256, 8):
        layer = transformer.MLPEmbedder(width, 4)
        for linear, inputs in ((layer.in_layer, width), (layer.out_layer, 4)):
            linear.weight = mx.array(rng.standard_normal((4, inputs)) / inputs**0.5).astype(mx.bfloat16)
            linear.bias = mx.array(rng.standard_normal(4)).astype(mx.bfloat16)
        layers.append(layer)
    pooled = mx.array(rng.standard_normal((1, 8))).astype(mx.bfloat16)
    config = SimpleNamespace(guidance_embed=True)
    flux = SimpleNamespace(
        time_in=layers[0], guidance_in=layers[1], vector_in=layers[2], config=config, dtype=mx.bfloat16
    )
    theirs = {
        (1.0, 4.5): [0.72265625, 1.7734375, 3.5625, 1.34375],
        (0.7305, 3.3): [0.66015625, 1.3515625, 3.96875, 1.703125],
        (0.1234, 2.7): [0.46875, 0.94140625, 5.21875, 2.9375],
    }
    for (sigma, guidance), expected in theirs.items():
        times = sampler.embedded_times(np.array([sigma], np.float32), "once", mx.bfloat16)
        scales = sampler.embedded_guidance(guidance, "once", mx.bfloat16).reshape(1)
        vec = transformer.Flux.vec(flux, times, scales, pooled, in_float32=True)
        assert vec.astype(mx.float32)[0].tolist() == expected
        other = transformer.Flux.vec(flux, times, scales, pooled)
        assert other.astype(mx.float32)[0].tolist() != expected
