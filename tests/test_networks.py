"""Each network alone, in float32, against diffusers, transformers and BFL's code; the bars are the reference's."""

import mlx.core as mx
import numpy as np
import PIL
import pytest
from helpers import assert_close, facts, goldens, image, max_abs, nhwc, rel
from mlx import nn
from mlx.utils import tree_flatten

from mlx_flux_krea.models import clip, t5, transformer, vae
from mlx_flux_krea.models.transformer import guarded
from mlx_flux_krea.models.vae import pixels_from_image, pixels_to_bytes
from mlx_flux_krea.sampling import sampler
from mlx_flux_krea.weights import build, open_model


@pytest.fixture(scope="module")
def networks(model):
    folder = open_model(model)
    return {name: network.load(mx.float32) for name, network in folder.networks.items()}


def forward(flux, i: int) -> mx.array:
    names = ("hidden_states", "timestep", "guidance", "pooled", "encoder_hidden_states", "img_ids", "txt_ids")
    return flux(*(goldens()[f"forward.{i}.{name}"] for name in names))


@pytest.mark.parametrize("i", range(3))
def test_a_transformer_call_equals_the_reference(networks, i):
    assert_close(forward(networks["transformer"], i), goldens()[f"forward.{i}.output"], 3e-5)


def test_every_block_of_a_call_equals_the_reference(networks):
    flux, g = networks["transformer"], goldens()
    seen = []

    def run(stage, *args):
        result = stage(*args)
        if isinstance(stage, transformer.DoubleStreamBlock):
            seen.append(result)
        if isinstance(stage, transformer.SingleStreamBlock):
            seen.append((result[:, 7:], result[:, :7]))
        return result

    i = "forward.0."
    vec = flux.vec(1000 * g[i + "timestep"], 1000 * g[i + "guidance"], g[i + "pooled"])
    assert_close(vec, g[i + "trace.temb"], 3e-5, "vec")
    pe = transformer.rope(mx.concatenate([g[i + "txt_ids"], g[i + "img_ids"]]), flux.config.axes_dim, flux.config.theta)
    cos, sin = pe[0][..., 0], pe[0][..., 1]
    assert max_abs(mx.repeat(cos, 2, axis=-1), g[i + "trace.rope_cos"]) < 1e-6
    assert max_abs(mx.repeat(sin, 2, axis=-1), g[i + "trace.rope_sin"]) < 1e-6
    flux.forward(g[i + "hidden_states"], flux.txt_in(g[i + "encoder_hidden_states"]), flux.modulations(vec), pe, run)
    for (img, txt), name in zip(seen, ("double0", "double1", "single0", "single1", "single2"), strict=True):
        assert_close(img, g[f"{i}trace.{name}.img"], 3e-5, f"{name} img")
        assert_close(txt, g[f"{i}trace.{name}.txt"], 3e-5, f"{name} txt")


def test_a_batch_gives_what_each_of_its_members_gives_alone(networks):
    flux, g = networks["transformer"], goldens()
    both = forward(flux, 1)
    names = ("hidden_states", "timestep", "guidance", "pooled", "encoder_hidden_states")
    for b in range(2):
        one = flux(*(g[f"forward.1.{n}"][b : b + 1] for n in names), g["forward.1.img_ids"], g["forward.1.txt_ids"])
        assert_close(one, both[b : b + 1], 1e-6)


@pytest.mark.parametrize("i", range(5))
def test_text_encoders_equal_the_reference(networks, i):
    g = goldens()
    assert_close(networks["text_encoder_2"](g[f"text.{i}.t5_ids"]), g[f"text.{i}.t5_hidden"], 3e-5, "T5")
    hidden, pooled = networks["text_encoder"](g[f"text.{i}.clip_ids"])
    assert_close(hidden, g[f"text.{i}.clip_hidden"], 2e-5, "CLIP hidden")
    assert_close(pooled, g[f"text.{i}.clip_pooled"], 2e-5, "CLIP pooled")


def test_t5_position_buckets_equal_the_reference():
    ours = t5.relative_position_buckets(np.arange(-300, 301), 32, 128)
    assert ours.tolist() == goldens()["text.t5_buckets"].tolist()


def test_clip_pools_at_the_end_token_that_its_config_names(networks):
    """With an end token other than 2 the first position of that id counts, whatever larger ids come before."""
    import dataclasses

    network = networks["text_encoder"]
    ids = mx.array([[49406, 49407, 320, 7, 320]])
    hidden, first_of_largest = network(ids)
    other = clip.CLIPText(dataclasses.replace(network.config, eos_token_id=7))
    other.update(network.parameters())
    assert mx.array_equal(first_of_largest, hidden[:, 1])
    assert mx.array_equal(other(ids)[1], hidden[:, 3])


def test_vae_decoding_equals_the_reference(networks):
    g = goldens()
    assert_close(networks["vae"].decode(nhwc(g["vae.z"]) / 0.3611 + 0.1159), nhwc(g["vae.decoded"]), 3e-5)


def test_vae_encoding_equals_the_reference(networks):
    g = goldens()
    picture = image("images/input.png")
    mean, logvar = networks["vae"].encode(pixels_from_image(picture, *picture.size))
    assert_close(mean, nhwc(g["vae.mean"]), 5e-5, "mean")
    assert_close(logvar, nhwc(g["vae.logvar"]), 5e-5, "logvar")
    config = networks["vae"].config
    assert_close((mean - config.shift_factor) * config.scale_factor, nhwc(g["vae.latents_from_mean"]), 5e-5, "latents")


def test_an_image_of_another_size_is_resized_as_the_reference_does():
    """The goldens were made with Pillow 13; earlier ones round on the way, there as here."""
    resized = pixels_from_image(image("images/input_other_size.png"), 96, 64)
    bar = 0 if int(PIL.__version__.split(".")[0]) >= 13 else 6.01 * 2 / 255
    assert max_abs(resized, nhwc(goldens()["vae.input_resized"])) <= bar


@pytest.mark.parametrize("mean", [0, 100, 1000])
@pytest.mark.parametrize(("dtype", "width"), [(mx.float32, 16), (mx.bfloat16, 16), (mx.float16, 16), (mx.float32, 5)])
def test_group_statistics_are_those_in_float64_whatever_the_chunks(monkeypatch, mean, dtype, width):
    x = (mx.random.normal((2, 37, width, 16), key=mx.random.key(0)) + mean).astype(dtype)
    assert_statistics(vae.group_statistics(x, 4), x, 4)
    monkeypatch.setattr(vae, "_STATISTICS_CHUNK", 2 * 5 * width * 16)
    assert_statistics(vae.group_statistics(x, 4), x, 4)


def test_group_statistics_of_millions_of_values_far_from_zero_are_exact():
    x = (mx.random.normal((1, 1024, 1024, 4), key=mx.random.key(0)) + 1000).astype(mx.bfloat16)
    assert_statistics(vae.group_statistics(x, 1), x, 1)
    y = x.astype(mx.float32)
    with pytest.raises(AssertionError):  # what one pass over squares makes of it
        assert_statistics((y.mean()[None, None], (mx.square(y).mean() - mx.square(y.mean()))[None, None]), x, 1)


def assert_statistics(found, x, groups):
    exact = np.array(x.astype(mx.float32), np.float64).reshape(len(x), -1, groups, x.shape[-1] // groups)
    np.testing.assert_allclose(found[0], exact.mean((1, 3)), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(found[1], exact.var((1, 3)), rtol=2e-5)


def test_attention_in_chunks_equals_attention_at_once(networks, monkeypatch):
    block = networks["vae"].decoder.mid.attn_1
    x = mx.random.normal((1, 6, 10, 32), key=mx.random.key(0))
    whole = block(x)
    monkeypatch.setattr(vae, "_ATTENTION_CHUNK", 7)
    assert_close(block(x), whole, 1e-6)


def test_floats_become_bytes_by_rounding_or_by_truncating():
    x = mx.array([-1.5, -1.0, -0.9999, 0.0, 0.0039, 0.999, 1.0, 2.0])
    assert pixels_to_bytes(x, "round").tolist() == [0, 0, 0, 128, 128, 255, 255, 255]
    assert pixels_to_bytes(x, "truncate").tolist() == [0, 0, 0, 127, 127, 254, 255, 255]


def test_packing_is_undone_by_unpacking_and_orders_channels_before_patches():
    x = mx.arange(2 * 16 * 4 * 6).reshape(2, 16, 4, 6)
    packed = sampler.pack(x)
    assert packed.shape == (2, 6, 64)
    assert mx.array_equal(sampler.unpack(packed, 6, 4), x)
    # token (row 1, column 2), channel 3, patch position (0, 1)
    assert packed[1, 5, 3 * 4 + 1].item() == x[1, 3, 2, 5].item()


def test_positions_are_row_and_column_after_zeros_for_the_text():
    assert sampler.position_ids(2, 6, 4).tolist() == [[0, 0, 0]] * 2 + [[0, r, c] for r in range(2) for c in range(3)]


@pytest.mark.parametrize(("who", "rows"), [("diffusers", 48), ("bfl", 52), ("krea", 12)])
def test_sigmas_equal_every_schedule_of_the_references(who, rows):
    # krea's code can also bend the schedule by an exponent, which none of its programs uses
    cases = [row for row in facts()["schedule"][who] if row.get("sigma", 1.0) == 1.0]
    assert len(cases) == rows
    for row in cases:
        bounds = {name: row[name] for name in ("base_shift", "max_shift") if name in row}
        schedule = sampler.Schedule(shift="dynamic" if row.get("shift", True) else "none", **bounds)
        ours = sampler.make_sigmas(schedule, row["image_seq_len"], row["steps"])
        theirs = np.array(row["sigmas"] if who == "diffusers" else row["timesteps"])
        assert np.abs(ours - theirs).max() <= (0 if who == "diffusers" else 5e-7), row
        if "mu" in row:
            assert abs(sampler.shift_mu(schedule, row["image_seq_len"]) - row["mu"]) < 1e-12


@pytest.mark.parametrize(
    ("steps", "strength", "left_out"), [(8, 0.6, 3), (10, 1.0, 0), (10, 0.9, 1), (28, 0.35, 18), (4, 0.1, 3)]
)
def test_strength_leaves_out_as_many_steps_as_diffusers_does(steps, strength, left_out):
    assert sampler.first_step(steps, strength) == left_out


# --- float16, an experiment: inside the blocks only ---


def test_in_float16_the_streams_are_float32_and_what_the_layers_do_is_not(networks):
    flux = build("transformer", networks["transformer"].config)
    flux.load_weights([(name, a.astype(mx.float16)) for name, a in tree_flatten(networks["transformer"].parameters())])
    seen = {}

    def run(stage, *args):
        result = stage(*args)
        seen.setdefault(type(stage).__name__, set()).update(a.dtype for _, a in tree_flatten([result]))
        return result

    g, i = goldens(), "forward.0."
    half = {
        name: g[i + name].astype(mx.float16) for name in ("timestep", "guidance", "pooled", "encoder_hidden_states")
    }
    mods = flux.modulations(flux.vec(1000 * half["timestep"], 1000 * half["guidance"], half["pooled"]))
    pe = transformer.rope(mx.concatenate([g[i + "txt_ids"], g[i + "img_ids"]]), flux.config.axes_dim, flux.config.theta)
    flux.forward(g[i + "hidden_states"], flux.txt_in(half["encoder_hidden_states"]), mods, pe, run)
    assert seen["DoubleStreamBlock"] == seen["SingleStreamBlock"] == {mx.float32}
    assert seen["Linear"] == seen["LastLayer"] == {mx.float16}


def test_a_sum_beyond_float16_does_not_overflow():
    """Beyond the range are the sums of the layer behind the MLP; the hidden values themselves are within."""
    mx.random.seed(0)
    down = nn.Linear(256, 32)
    x = 300 * mx.random.uniform(shape=(1, 5, 256)) + 300
    down.weight = mx.abs(down.weight) * 20
    exact = down(x)
    assert exact.max().item() > 65504
    half = nn.Linear(256, 32)
    half.load_weights([(name, a.astype(mx.float16)) for name, a in down.parameters().items()])
    assert not mx.isfinite(half(x.astype(mx.float16))).all().item()
    made = guarded(half, x.astype(mx.float16))
    assert made.dtype == mx.float32
    assert rel(made, exact) < 2e-3
