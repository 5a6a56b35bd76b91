"""Mistakes that ports of this model have made, each made here once: the numeric tests must see it.

The bars are those of test_networks and test_pipeline; the reference's README lists how large each mistake is.
"""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from helpers import goldens, image, levels, nhwc, psnr, rel
from test_networks import forward
from test_pipeline import arguments, latents_of

from mlx_flux_krea import FluxPipeline, noise, sampler, t5, transformer, vae
from mlx_flux_krea.vae import pixels_from_image
from mlx_flux_krea.weights import open_model


@pytest.fixture
def load(model):
    return lambda name: open_model(model).load(name, mx.float32)


def transformer_error(load) -> float:
    return max(rel(forward(load("transformer"), i), goldens()[f"forward.{i}.output"]) for i in range(3))


def swapped(split):
    def split_and_swap(x, *args, **kwargs):
        shift, scale, *rest = split(x, *args, **kwargs)
        return [scale, shift, *rest]

    return split_and_swap


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
    """What mflux does."""
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


def test_guidance_not_times_1000_is_seen(load):
    g = goldens()
    flux = load("transformer")
    ids = [g[f"forward.0.{n}"] for n in ("pooled", "encoder_hidden_states", "img_ids", "txt_ids")]
    out = flux(g["forward.0.hidden_states"], g["forward.0.timestep"], g["forward.0.guidance"] / 1000, *ids)
    assert rel(out, g["forward.0.output"]) > 1e-3


def test_erf_gelu_in_t5_is_seen(load, monkeypatch):
    monkeypatch.setattr(t5.nn, "gelu_approx", nn.gelu)
    ids, hidden = goldens()["text.1.t5_ids"], goldens()["text.1.t5_hidden"]
    assert rel(load("text_encoder_2")(ids), hidden) > 3e-5


def test_gelu_for_quick_gelu_in_clip_is_seen(load, monkeypatch):
    monkeypatch.setattr(nn, "gelu_fast_approx", nn.gelu)
    _, pooled = load("text_encoder")(goldens()["text.1.clip_ids"])
    assert rel(pooled, goldens()["text.1.clip_pooled"]) > 2e-5


def test_clip_pooled_at_the_last_end_token_is_seen(load):
    hidden, _ = load("text_encoder")(goldens()["text.1.clip_ids"])
    assert rel(hidden[:, -1], goldens()["text.1.clip_pooled"]) > 2e-5


def test_the_vae_shift_left_out_is_seen(load):
    g = goldens()
    assert rel(load("vae").decode(nhwc(g["vae.z"]) / 0.3611), nhwc(g["vae.decoded"])) > 3e-5


def test_the_encoders_attention_left_out_is_seen(load):
    network = load("vae")
    network.encoder.mid.attn_1 = lambda x: x
    picture = image("images/input.png")
    mean, _ = network.encode(pixels_from_image(picture, *picture.size))
    assert rel(mean, nhwc(goldens()["vae.mean"])) > 5e-5


def test_padding_all_around_before_downsampling_is_seen(load, monkeypatch):
    def around(self, x):
        return self.conv(mx.pad(x, [(0, 0), (1, 0), (1, 0), (0, 0)]))

    monkeypatch.setattr(vae.Downsample, "__call__", around)
    picture = image("images/input.png")
    mean, _ = load("vae").encode(pixels_from_image(picture, *picture.size))
    assert rel(mean, nhwc(goldens()["vae.mean"])) > 5e-5


def test_sigmas_one_step_off_are_seen_in_latents_and_picture(model, monkeypatch):
    original = sampler.make_sigmas

    def one_off(schedule, image_seq_len, n, sigmas=()):
        return original(schedule, image_seq_len, n, np.linspace(1, 1 / (n + 1), n + 1)[:n])

    monkeypatch.setattr(sampler, "make_sigmas", one_off)
    result, latents = latents_of(FluxPipeline.from_pretrained(model), **arguments("t2i_4"))
    assert rel(latents[-1], goldens()["t2i_4.latents"][-1]) > 1e-4
    assert psnr(result.images[0], image("images/t2i_4.0.png")) < 60


def test_an_unshifted_schedule_is_seen(model, monkeypatch):
    original = sampler.make_sigmas
    monkeypatch.setattr(sampler, "make_sigmas", lambda schedule, *args: original(sampler.Schedule(shift="none"), *args))
    result, latents = latents_of(FluxPipeline.from_pretrained(model), **arguments("t2i_4"))
    assert rel(latents[-1], goldens()["t2i_4.latents"][-1]) > 1e-4
    assert levels(result.images[0], image("images/t2i_4.0.png")) > 1


def test_noise_drawn_before_the_posterior_is_seen(model, monkeypatch):
    """diffusers samples the posterior first; the other order shifts the stream."""
    original = noise.Stream.noise

    def noise_first(self, shape):
        fresh = noise.Stream(self._recipe, arguments("img2img_8.sample")["seed"], self._dtype)
        return original(fresh, shape)

    monkeypatch.setattr(noise.Stream, "noise", noise_first)
    _, latents = latents_of(FluxPipeline.from_pretrained(model), **arguments("img2img_8.sample"))
    assert rel(latents[-1], goldens()["img2img_8.sample.latents"][-1]) > 1e-4


def test_one_bfloat16_table_or_float32_weight_is_not_hidden_by_the_bars(load):
    """A rounded rope table would pass in bfloat16; in float32 it is seen."""
    original = transformer.rope

    def rounded(*args):
        return tuple(table.astype(mx.bfloat16).astype(mx.float32) for table in original(*args))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformer, "rope", rounded)
        assert transformer_error(load) > 3e-5
