"""Mistakes that ports of this model have made, each made here once in our code: the numeric tests must see it.

The bars are those of test_networks and test_pipeline; the reference's README lists how large each mistake is.
"""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers import goldens, image, levels, nhwc, psnr, rel
from test_networks import forward
from test_pipeline import arguments, latents_of

from mlx_flux_krea import FluxPipeline, generator
from mlx_flux_krea.models import clip, t5, transformer, vae
from mlx_flux_krea.models.vae import pixels_from_image
from mlx_flux_krea.sampling import noise, sampler
from mlx_flux_krea.weights import NetworkFolder, open_model


@pytest.fixture
def load(model):
    return lambda name: open_model(model).networks[name].load(mx.float32)


def transformer_error(load) -> float:
    return max(rel(forward(load("transformer"), i), goldens()[f"forward.{i}.output"]) for i in range(3))


def run_error(full_model, name: str) -> float:
    """How far the latents of a whole run of the goldens are."""
    _, latents = latents_of(FluxPipeline.from_pretrained(full_model), **arguments(name))
    return rel(latents[-1], goldens()[f"{name}.latents"][-1])


def half_rotated(x, pe):
    """Rotation of the halves of a head instead of adjacent pairs."""
    a, b = mx.split(x.reshape(*x.shape[:-1], 2, -1), 2, axis=-2)
    cos, sin = pe[0][..., 0], pe[0][..., 1]
    a, b = a[..., 0, :], b[..., 0, :]
    return mx.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)


def test_erf_gelu_in_the_transformer_is_seen(load, monkeypatch):
    monkeypatch.setattr(transformer, "gelu", nn.gelu)
    assert transformer_error(load) > 3e-5


def test_erf_gelu_in_the_image_stream_alone_is_seen(load, monkeypatch):
    """Done by mflux."""
    flux = load("transformer")
    for block in flux.double_blocks:
        block.img_mlp[1] = nn.GELU()
    assert rel(forward(flux, 0), goldens()["forward.0.output"]) > 3e-5


def test_shift_for_scale_is_seen(load, monkeypatch):
    original = transformer.modulated_norm
    monkeypatch.setattr(transformer, "modulated_norm", lambda x, shift, scale: original(x, scale, shift))
    assert transformer_error(load) > 3e-2


def test_the_last_layers_halves_the_other_way_round_are_seen(load):
    flux = load("transformer")
    layer = flux.final_layer.adaLN_modulation[1]
    layer.weight, layer.bias = (mx.concatenate(mx.split(a, 2)[::-1]) for a in (layer.weight, layer.bias))
    assert rel(forward(flux, 0), goldens()["forward.0.output"]) > 3e-2


def test_rope_over_halves_is_seen(load, monkeypatch):
    monkeypatch.setattr(transformer, "apply_rope", half_rotated)
    assert transformer_error(load) > 1e-3


@pytest.mark.parametrize("factors", [(1, 1e-3), (1e-3, 1), (1000, 1)], ids=["guidance", "time", "time twice"])
def test_time_or_guidance_not_times_1000_is_seen(load, monkeypatch, factors):
    original = transformer.Flux.vec

    def vec(self, timestep, guidance, pooled):
        return original(self, timestep * factors[0], guidance * factors[1], pooled)

    monkeypatch.setattr(transformer.Flux, "vec", vec)
    assert transformer_error(load) > 1e-3


def test_erf_gelu_in_t5_is_seen(load, monkeypatch):
    monkeypatch.setattr(t5.nn, "gelu_approx", nn.gelu)
    ids, hidden = goldens()["text.1.t5_ids"], goldens()["text.1.t5_hidden"]
    assert rel(load("text_encoder_2")(ids), hidden) > 3e-5


def test_gelu_for_quick_gelu_in_clip_is_seen(load, monkeypatch):
    monkeypatch.setattr(nn, "gelu_fast_approx", nn.gelu)
    _, pooled = load("text_encoder")(goldens()["text.1.clip_ids"])
    assert rel(pooled, goldens()["text.1.clip_pooled"]) > 2e-5


def test_clip_pooled_at_the_last_end_token_is_seen(load, monkeypatch):
    monkeypatch.setattr(clip.mx, "argmax", lambda ids, axis: mx.full((len(ids),), ids.shape[axis] - 1))
    _, pooled = load("text_encoder")(goldens()["text.1.clip_ids"])
    assert rel(pooled, goldens()["text.1.clip_pooled"]) > 2e-5


@pytest.mark.parametrize("field", ["shift_factor", "scale_factor"])
@pytest.mark.slow
def test_the_vaes_shift_or_scale_left_out_is_seen_in_pictures_and_latents(full_model, monkeypatch, field):
    original = NetworkFolder.load

    def load(self, dtype):
        network = original(self, dtype)
        if self.component == "vae":
            network.config = replace(network.config, **{field: {"shift_factor": 0.0, "scale_factor": 1.0}[field]})
        return network

    monkeypatch.setattr(NetworkFolder, "load", load)
    picture = FluxPipeline.from_pretrained(full_model)(**arguments("t2i_4")).images[0]
    assert psnr(picture, image("images/t2i_4.0.png")) < 60
    own, left_out = generator.make_latents, {field: {"shift_factor": 0.0, "scale_factor": 1.0}[field]}

    def make_latents(request, sigma, sizes, *more):
        return own(request, sigma, replace(sizes, **left_out), *more)

    monkeypatch.setattr(generator, "make_latents", make_latents)
    assert run_error(full_model, "img2img_8.sample") > 1e-4


def test_the_encoders_attention_left_out_is_seen(load):
    network = load("vae")
    network.encoder.mid.attn_1 = lambda x, run: x
    picture = image("images/input.png")
    mean, _ = network.encode(pixels_from_image(picture, *picture.size))
    assert rel(mean, nhwc(goldens()["vae.mean"])) > 5e-5


def test_padding_all_around_before_downsampling_is_seen(load, monkeypatch):
    def around(self, x, run):
        return self.conv(mx.pad(x, [(0, 0), (1, 0), (1, 0), (0, 0)]))

    monkeypatch.setattr(vae.Downsample, "__call__", around)
    picture = image("images/input.png")
    mean, _ = load("vae").encode(pixels_from_image(picture, *picture.size))
    assert rel(mean, nhwc(goldens()["vae.mean"])) > 5e-5


@pytest.mark.slow
def test_sigmas_one_step_off_are_seen_in_latents_and_picture(full_model, monkeypatch):
    original = sampler.make_sigmas

    def one_off(schedule, image_seq_len, n, sigmas=()):
        return original(schedule, image_seq_len, n, np.linspace(1, 1 / (n + 1), n + 1)[:n])

    monkeypatch.setattr(sampler, "make_sigmas", one_off)
    result, latents = latents_of(FluxPipeline.from_pretrained(full_model), **arguments("t2i_4"))
    assert rel(latents[-1], goldens()["t2i_4.latents"][-1]) > 1e-4
    assert psnr(result.images[0], image("images/t2i_4.0.png")) < 60


@pytest.mark.slow
def test_an_unshifted_schedule_is_seen(full_model, monkeypatch):
    original = sampler.make_sigmas
    monkeypatch.setattr(sampler, "make_sigmas", lambda schedule, *args: original(sampler.Schedule(shift="none"), *args))
    result, latents = latents_of(FluxPipeline.from_pretrained(full_model), **arguments("t2i_4"))
    assert rel(latents[-1], goldens()["t2i_4.latents"][-1]) > 1e-4
    assert levels(result.images[0], image("images/t2i_4.0.png")) > 1


@pytest.mark.slow
def test_noise_drawn_before_the_posterior_is_seen(full_model, monkeypatch):
    """diffusers samples the posterior first; the other order shifts the stream."""
    original = noise.Stream.noise

    def noise_first(self, shape):
        fresh = noise.Stream(self._recipe, arguments("img2img_8.sample")["seed"], self._dtype)
        return original(fresh, shape)

    monkeypatch.setattr(noise.Stream, "noise", noise_first)
    assert run_error(full_model, "img2img_8.sample") > 1e-4


@pytest.mark.parametrize(
    "row", [{"layout": "nhwc"}, {"layout": "packed"}, {"dtype": "bfloat16"}, {"stream": "mlx-key"}], ids=str
)
@pytest.mark.slow
def test_noise_of_another_layout_type_or_stream_is_seen(full_model, monkeypatch, row):
    monkeypatch.setitem(noise.RECIPES, "diffusers", replace(noise.RECIPES["diffusers"], **row))
    assert run_error(full_model, "t2i_4") > 1e-4


@pytest.mark.slow
def test_the_numbers_of_another_seed_are_seen(full_model, monkeypatch):
    original = noise.TorchStream.__init__
    monkeypatch.setattr(noise.TorchStream, "__init__", lambda self, seed: original(self, seed + 1))
    assert run_error(full_model, "t2i_4") > 1e-4
    assert run_error(full_model, "img2img_8.sample") > 1e-4


@pytest.mark.slow
def test_the_halves_of_box_muller_exchanged_are_seen(full_model, monkeypatch):
    original = noise._box_muller
    swapped = lambda *args: original(*args).reshape(-1, 2, 8)[:, ::-1].reshape(-1)  # noqa: E731
    monkeypatch.setattr(noise, "_box_muller", swapped)
    assert run_error(full_model, "t2i_4") > 1e-4


@pytest.mark.slow
def test_a_mean_for_the_sample_of_an_image_is_seen(full_model, monkeypatch):
    monkeypatch.setitem(noise.RECIPES, "diffusers", replace(noise.RECIPES["diffusers"], posterior="mean"))
    assert run_error(full_model, "img2img_8.sample") > 1e-4


def test_one_bfloat16_table_or_float32_weight_is_not_hidden_by_the_bars(load):
    """A rounded rope table would pass in bfloat16; in float32 it is seen."""
    original = transformer.rope

    def rounded(*args):
        return tuple(table.astype(mx.bfloat16).astype(mx.float32) for table in original(*args))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformer, "rope", rounded)
        assert transformer_error(load) > 3e-5
