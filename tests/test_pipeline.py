"""Whole runs against diffusers' pipelines and BFL's sampling code, in float32 and in bfloat16."""

import gc
import hashlib
import io
import itertools
import struct
import sys
import threading
import weakref
import zlib
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from helpers import (
    REFERENCE,
    TOKENIZERS,
    acknowledge,
    assert_close,
    edit_json,
    facts,
    full_size_folder,
    goldens,
    image,
    levels,
    nhwc,
    psnr,
    rel,
    without_guidance,
)
from mlx.utils import tree_map
from mlx_flux_krea.convert import convert
from PIL import ExifTags, Image

from mlx_flux_krea import FluxPipeline
from mlx_flux_krea.errors import FiltersError, Interrupted, ResourceError, UsageError
from mlx_flux_krea.generator import Generator
from mlx_flux_krea.inputs.image import open_image
from mlx_flux_krea.models.config import Defaults
from mlx_flux_krea.models.transformer import Flux
from mlx_flux_krea.presets import RECIPES, SCHNELL_FILES
from mlx_flux_krea.provenance import SOFTWARE
from mlx_flux_krea.request import Request
from mlx_flux_krea.residency import Reader
from mlx_flux_krea.sampling import noise, sampler
from mlx_flux_krea.sampling.solvers import SOLVERS
from mlx_flux_krea.weights import NetworkFolder

CAT = "A cat holding a sign that says hello world"
SMALL = {"height": 32, "width": 48, "num_inference_steps": 2}


def arguments(name: str) -> dict:
    """The call that repeats a run of the goldens."""
    run = facts()["runs"][name]
    prompts = run["prompts"]
    call = {
        "prompt": prompts if len(prompts) > 1 else prompts[0],
        "height": run["height"],
        "width": run["width"],
        "num_inference_steps": run["steps"],
        "guidance_scale": run["guidance"],
        "seed": run["seed"],
    }
    for ours in ("prompt_2", "num_images_per_prompt", "max_sequence_length", "negative_prompt", "true_cfg_scale"):
        if run.get(ours):
            call[ours] = run[ours]
    if "strength" in run:
        call |= {"image": REFERENCE / run["image"], "strength": run["strength"]}
    return call


def latents_of(pipe, **call) -> tuple:
    """The result and the latents after every step."""
    seen = []
    result = pipe(callback_on_step_end=lambda pipe, step, timestep, kwargs: seen.append(kwargs["latents"]), **call)
    return result, mx.stack(seen)


def start_of(pipe, **call) -> mx.array:
    """The start of the loop."""
    seen, original = [], SOLVERS["euler"]

    def euler(model, state, *args):
        mx.eval(state.latents)
        seen.append(state.latents)
        return original(model, state, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SOLVERS, "euler", euler)
        pipe(**call)
    return seen[0]


@pytest.fixture
def loaded(monkeypatch):
    """A weak reference to every network that is loaded from here on, by its component."""
    networks, original = {}, NetworkFolder.load

    def load(self, dtype):
        network = original(self, dtype)
        networks[self.component] = weakref.ref(network)
        return network

    monkeypatch.setattr(NetworkFolder, "load", load)
    return networks


@pytest.mark.parametrize("name", ["t2i_4", "t2i_8", "t2i_list", "cfg_4", "t2i_short"])
def test_a_run_equals_diffusers_after_every_step_and_as_a_picture(full_pipe, name):
    result, latents = latents_of(full_pipe, **arguments(name))
    for step, (ours, theirs) in enumerate(zip(latents, goldens()[f"{name}.latents"], strict=True)):
        assert_close(ours, theirs, 1e-4, f"step {step}")
    run = facts()["runs"][name]
    for ours, theirs in zip(result.images, run["pngs"], strict=True):
        assert psnr(ours, image(theirs)) >= 60
        assert levels(ours, image(theirs)) <= 1
    assert result.outcomes == ("released",) * len(result.images)


@pytest.mark.parametrize("name", ["t2i_4", "t2i_list"])
def test_decoded_floats_equal_the_reference(full_pipe, name):
    floats = full_pipe(**arguments(name), output_type="np").images
    raw = np.array(nhwc(goldens()[f"{name}.raw"]))
    assert np.abs(floats - np.clip(raw / 2 + 0.5, 0, 1)).max() < 1e-4


def test_image_to_image_equals_diffusers(full_pipe):
    result, latents = latents_of(full_pipe, **arguments("img2img_8.sample"))
    assert_close(latents, goldens()["img2img_8.sample.latents"], 1e-4)
    assert psnr(result.images[0], image("images/img2img_8.sample.0.png")) >= 60
    assert levels(result.images[0], image("images/img2img_8.sample.0.png")) <= 1


@pytest.mark.slow
def test_image_to_image_from_the_mean_equals_the_reference(full_pipe):
    """`comfy` takes the posterior's mean, draws the golden's float32 noise, and truncates bytes."""
    result, latents = latents_of(full_pipe, **arguments("img2img_8.mean"), noise="comfy")
    assert_close(latents, goldens()["img2img_8.mean.latents"], 1e-4)
    floats = full_pipe(**arguments("img2img_8.mean"), noise="comfy", output_type="np").images[0]
    rounded = np.round(floats * 255).astype(np.int64)
    assert np.abs(rounded - np.asarray(image("images/img2img_8.mean.0.png"))).max() <= 1
    assert psnr(result.images[0], image("images/img2img_8.mean.0.png")) >= 49


@pytest.mark.parametrize("recipe", ["bfl", "comfy", "mflux", "mlx-examples"])
def test_other_recipes_start_from_the_mean_and_their_own_noise(pipe, recipe):
    """The noise is golden in test_noise; here: the mean, and the place where noise and image meet."""
    call = arguments("img2img_8.mean")
    drawn = noise.draw(recipe, call["seed"], (1, 16, 8, 12), mx.float32)
    mean = goldens()["img2img_8.mean.image_latents"]
    expected = sampler.add_noise(mean, drawn, facts()["runs"]["img2img_8.mean"]["start_sigma"])
    assert_close(start_of(pipe, **call, noise=recipe), sampler.pack(expected), 5e-5)


@pytest.mark.parametrize("seeds", [[9, 3, 9], [4]])
@pytest.mark.slow
def test_one_image_is_sampled_once_by_the_first_of_several_streams(pipe, seeds):
    """As diffusers does with a list of generators; the other streams draw their noise from their beginning."""
    call = arguments("img2img_8.sample") | {"seed": seeds, "num_images_per_prompt": len(seeds)}
    call["num_inference_steps"] = 2
    run = facts()["runs"]["img2img_8.sample"]
    mean, logvar = (goldens()[f"vae.{name}"] for name in ("mean", "logvar"))
    streams = [noise.Stream("diffusers", seed, mx.float32) for seed in seeds]
    clean = (mean + mx.exp(0.5 * logvar) * streams[0].normal(mean.shape) - 0.1159) * 0.3611
    drawn = mx.concatenate([stream.noise(mean.shape) for stream in streams])
    sigma = sampler.make_sigmas(pipe.folder.index.schedule, run["height"] * run["width"] // 256, 2)[0]
    assert_close(start_of(pipe, **call), sampler.pack(sampler.add_noise(clean, drawn, float(sigma))), 5e-5)
    records = pipe(**call).records
    assert [record.get("image_seed") for record in records] == [None, 9, 9][: len(seeds)]


@pytest.mark.parametrize("recipe", ["comfy", "mflux"])
def test_float32_noise_is_not_rounded_in_a_bfloat16_run(pipe_bf16, recipe):
    drawn = noise.draw(recipe, 3, (1, 16, 4, 6), mx.float32)
    assert mx.array_equal(start_of(pipe_bf16, prompt=CAT, seed=3, noise=recipe, **SMALL), sampler.pack(drawn))


@pytest.mark.parametrize("recipe", ["diffusers", "bfl", "mlx-examples"])
def test_bfloat16_noise_is_drawn_in_bfloat16(pipe_bf16, recipe):
    drawn = noise.draw(recipe, 3, (1, 16, 4, 6), mx.bfloat16).astype(mx.float32)
    start = start_of(pipe_bf16, prompt=CAT, seed=3, noise=recipe, **SMALL)
    assert start.dtype == mx.float32
    assert mx.array_equal(start, sampler.pack(drawn))


@pytest.mark.parametrize(
    ("recipe", "to_bytes"),
    [("diffusers", np.round), ("bfl", np.floor), ("comfy", np.floor), ("mflux", np.round), ("mlx-examples", np.floor)],
)
@pytest.mark.slow
def test_floats_become_bytes_as_in_the_tool(pipe, recipe, to_bytes):
    call = {"prompt": CAT, "seed": 3, "noise": recipe, **SMALL}
    floats = pipe(**call, output_type="np").images[0]
    assert (to_bytes(floats * 255) == np.asarray(pipe(**call).images[0])).mean() > 0.99


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_times_and_guidance_reach_the_transformer_as_the_tool_rounds_them(pipe_bf16, monkeypatch, recipe):
    seen, original = [], Flux.vec

    def vec(self, *args, **more):
        seen.append((*args, more))
        return original(self, *args, **more)

    monkeypatch.setattr(Flux, "vec", vec)
    pipe_bf16("a", seed=1, height=32, width=48, num_inference_steps=7, guidance_scale=4.7, noise=recipe)
    ((times, guidance, _, more),) = seen
    sigmas = sampler.make_sigmas(pipe_bf16.folder.index.schedule, 6, 7)[:-1]
    rounding = RECIPES[recipe].timestep_rounding
    assert mx.array_equal(times, sampler.embedded_times(sigmas, rounding, mx.bfloat16))
    assert set(guidance.astype(mx.float32).tolist()) == {4704.0 if rounding == "once" else 4672.0}
    assert more == {"in_float32": rounding == "once"}


@pytest.mark.parametrize(("bias", "clipped"), [(100.0, 20.0), (-100.0, -30.0)])
def test_the_posteriors_log_variance_is_clipped(model, bias, clipped):
    from mlx_flux_krea.weights import open_model

    vae = open_model(model).vae.load(mx.float32)
    vae.encoder.conv_out.bias = mx.full(vae.encoder.conv_out.bias.shape, bias)
    _, logvar = vae.encode(mx.zeros((1, 16, 16, 3)))
    assert mx.array_equal(logvar, mx.full(logvar.shape, clipped))


@pytest.mark.parametrize(("name", "golden"), [("t2i_4", "bfl_4"), ("t2i_8", "bfl_8")])
@pytest.mark.core("t2i_8-bfl_8")
def test_a_run_equals_black_forest_labs_own_code(full_pipe, name, golden):
    """From BFL's float32 noise; the `bfl` recipe then truncates bytes as BFL does."""
    call = arguments(name)
    del call["seed"]
    call.pop("num_images_per_prompt", None)
    start = sampler.pack(goldens()[f"{golden}.noise"])
    result, latents = latents_of(full_pipe, **call, latents=start, noise="bfl")
    assert_close(latents[-1], goldens()[f"{golden}.latents"], 1e-4)
    theirs = image(f"images/{golden}.png")
    assert levels(result.images[0], theirs) <= 1
    assert psnr(result.images[0], theirs) >= 60


def test_a_bfloat16_run_is_as_near_to_the_reference_as_torch_is(full_pipe_bf16):
    """torch's own run ends 0.0067 from the float32 latents, its picture at 50.3 dB."""
    call = arguments("t2i_4")
    result, latents = latents_of(full_pipe_bf16, **call)
    assert rel(latents[-1], goldens()["bf16.latents"][-1]) < 0.03
    assert rel(latents[-1], goldens()["t2i_4.latents"][-1]) < 0.009
    assert psnr(result.images[0], image("images/bf16.0.png")) >= 42
    assert psnr(result.images[0], image("images/t2i_4.0.png")) >= 48


def test_bfloat16_stays_bfloat16_at_every_edge(pipe_bf16, monkeypatch):
    """Only latents, which nothing large depends on, and the coefficients of group norms are float32."""
    from mlx.utils import tree_flatten

    seen = {}
    original = Generator.runner

    def runner(self, stage, *args, **more):
        run = original(self, stage, *args, **more)

        def observed(part, *inputs):
            result = run(part, *inputs)
            arrays = [a for _, a in tree_flatten([result]) if isinstance(a, mx.array)]
            arrays = [a for a in arrays if stage not in ("image", "decode") or a.size > a.shape[-1]]
            seen.setdefault(stage, set()).update(a.dtype for a in arrays if a.dtype != mx.int32)
            return result

        return observed

    monkeypatch.setattr(Generator, "runner", runner)
    pipe_bf16(**arguments("img2img_8.sample") | {"prompt": "a prompt that was not encoded before"})
    assert seen == {stage: {mx.bfloat16} for stage in ("text", "image", "modulation", "denoise", "decode")}


@pytest.mark.slow
def test_float16_computes_the_text_and_the_image_in_bfloat16(full_model):
    pipe = FluxPipeline.from_pretrained(full_model, dtype="float16")
    embeds, pooled = pipe.encode_prompt("a cat")
    assert (embeds.dtype, pooled.dtype) == (mx.bfloat16, mx.float16)
    assert (pipe.vae.dtype, pipe.transformer.dtype) == (mx.bfloat16, mx.float16)
    _, latents = latents_of(pipe, **arguments("t2i_4"))
    assert rel(latents[-1], goldens()["t2i_4.latents"][-1]) < 0.03


# --- what a call may say ---


def test_several_seeds_are_several_single_runs(pipe):
    both = pipe(CAT, seed=[3, 9], num_images_per_prompt=2, output_type="latent", **SMALL)
    assert both.seeds == (3, 9)
    for i, seed in enumerate((3, 9)):
        alone = pipe(CAT, seed=seed, output_type="latent", **SMALL)
        assert mx.array_equal(both.images[i : i + 1], alone.images)


@pytest.mark.slow
def test_one_seed_draws_the_whole_batch_and_prompts_come_before_their_copies(pipe):
    prompts = [CAT, "blurry"]
    batch = pipe(prompts, seed=3, num_images_per_prompt=2, output_type="latent", **SMALL).images
    start = sampler.pack(noise.draw("diffusers", 3, (4, 16, 4, 6), mx.float32))
    for i in range(4):
        alone = pipe(prompts[i // 2], latents=start[i : i + 1], output_type="latent", **SMALL).images
        assert mx.array_equal(batch[i : i + 1], alone)


@pytest.mark.slow
def test_a_seed_is_chosen_and_told_where_none_is_given_and_repeats_the_picture(pipe):
    first = pipe(CAT, **SMALL)
    again = pipe(CAT, seed=first.seeds[0], **SMALL)
    assert levels(first.images[0], again.images[0]) == 0
    assert pipe(CAT, **SMALL).seeds != first.seeds


def test_seed_zero_is_a_seed(pipe):
    assert pipe(CAT, seed=0, **SMALL).seeds == (0,)


@pytest.mark.slow
def test_embeds_stand_for_their_prompt(pipe):
    embeds, pooled = pipe.encode_prompt([CAT, ""])
    assert embeds.shape == (2, 32, 14)
    assert pooled.shape == (2, 16)
    by_text = pipe([CAT, ""], seed=1, output_type="latent", **SMALL).images
    by_embeds = pipe(prompt_embeds=embeds, pooled_prompt_embeds=pooled, seed=1, output_type="latent", **SMALL).images
    assert mx.array_equal(by_text, by_embeds)
    negative = {"negative_prompt_embeds": embeds[1:], "negative_pooled_prompt_embeds": pooled[1:], "true_cfg_scale": 2}
    by_text = pipe(CAT, negative_prompt="", true_cfg_scale=2, seed=1, output_type="latent", **SMALL).images
    assert mx.array_equal(by_text, pipe(CAT, **negative, seed=1, output_type="latent", **SMALL).images)


def test_prompt_2_is_what_t5_reads(pipe):
    embeds, pooled = pipe.encode_prompt(CAT, prompt_2="blurry")
    assert mx.array_equal(embeds, pipe.encode_prompt("blurry")[0])
    assert mx.array_equal(pooled, pipe.encode_prompt(CAT)[1])


@pytest.mark.slow
def test_sigmas_of_ones_own_are_shifted_like_the_models(pipe):
    own = pipe(CAT, seed=1, sigmas=[1.0, 0.75, 0.5, 0.25], height=32, width=48, output_type="latent").images
    assert mx.array_equal(
        own, pipe(CAT, seed=1, num_inference_steps=4, height=32, width=48, output_type="latent").images
    )


def test_the_callback_sees_every_step_and_may_replace_the_latents(pipe):
    seen = []

    def callback(pipe_, step, timestep, kwargs):
        seen.append((pipe_ is pipe, step, round(timestep, 3)))
        return {"latents": mx.zeros_like(kwargs["latents"])} if step == 1 else None

    sigmas = sampler.make_sigmas(pipe.folder.index.schedule, 6, 2)
    latents = pipe(CAT, seed=1, callback_on_step_end=callback, output_type="latent", **SMALL).images
    assert seen == [(True, i, round(1000 * float(sigmas[i]), 3)) for i in range(2)]
    assert mx.array_equal(latents, mx.zeros_like(latents))


@pytest.mark.slow
def test_replaced_latents_are_what_the_next_step_starts_from(pipe):
    start = pipe(CAT, seed=1, output_type="latent", **SMALL).images

    def callback(pipe_, step, timestep, kwargs):
        return {"latents": start} if step == 0 else None

    changed = pipe(CAT, seed=2, callback_on_step_end=callback, output_type="latent", **SMALL).images
    same = pipe(CAT, seed=3, callback_on_step_end=callback, output_type="latent", **SMALL).images
    assert mx.array_equal(changed, same)


def test_sizes_are_floored_and_the_caller_is_told(pipe):
    result = pipe(CAT, seed=1, height=47, width=63, num_inference_steps=1)
    assert result.images[0].size == (48, 32)
    assert "no multiple of 16" in result.notes[0]
    assert pipe(CAT, seed=1, height=32, width=48, num_inference_steps=1).notes == ()


def test_what_the_encoders_did_not_read_is_told(full_pipe):
    result = full_pipe("cat " * 90, seed=1, max_sequence_length=80, **SMALL)
    assert [note.split()[0] for note in result.notes] == ["CLIP", "T5"]
    assert full_pipe("cat " * 90, seed=1, max_sequence_length=80, **SMALL).notes == result.notes  # also from the cache


def test_an_image_without_a_size_keeps_its_shape_at_the_models_area(pipe):
    folder = replace(pipe.folder, index=replace(pipe.folder.index, defaults=Defaults(64, 64, 4, 4.5)))
    tall = image("images/input_other_size.png")  # 110 x 150
    resolved = Request(prompt="", image=tall).resolve(folder)
    assert (resolved.width, resolved.height) == (48, 64)
    resolved = Request(prompt="", image=tall, width=96).resolve(folder)
    assert (resolved.width, resolved.height) == (96, 128)


@pytest.mark.slow
def test_one_negative_embedding_serves_every_prompt(pipe):
    embeds, pooled = pipe.encode_prompt([CAT, "", "blurry"])
    negative = {"negative_prompt_embeds": embeds[2:], "negative_pooled_prompt_embeds": pooled[2:]}
    call = {"true_cfg_scale": 2, "seed": 1, "output_type": "latent", **SMALL}
    by_embeds = pipe([CAT, ""], **negative, **call).images
    assert mx.array_equal(by_embeds, pipe([CAT, ""], negative_prompt="blurry", **call).images)


@pytest.mark.slow
def test_numbers_and_sequences_of_any_library_are_taken(pipe):
    plain = {"height": 32, "width": 48, "seed": [3, 9], "guidance_scale": 2.5, "sigmas": [1.0, 0.5]}
    numpy = {
        "height": np.int64(32), "width": np.int32(48), "seed": np.array([3, 9]), "guidance_scale": np.float32(2.5),
        "sigmas": np.array([1.0, 0.5], np.float32), "num_images_per_prompt": np.uint8(2),
    }  # fmt: skip
    by_numpy = pipe((CAT,), **numpy)
    by_plain = pipe([CAT], **plain, num_images_per_prompt=2)
    assert by_numpy.records == by_plain.records
    assert levels(by_numpy.images[1], by_plain.images[1]) == 0
    assert type(by_numpy.seeds[0]) is int


@pytest.mark.slow
def test_the_record_says_everything_that_decides_the_picture(model):
    picture = image("images/input_other_size.png").convert("RGB")
    call = {
        "prompt": [CAT, ""], "prompt_2": ["a", "b"], "negative_prompt": "c", "negative_prompt_2": "d",
        "true_cfg_scale": 2.0, "height": 40, "width": 50, "sigmas": [0.9, 0.4], "guidance_scale": 3.5, "noise": "mflux",
        "num_images_per_prompt": 2, "seed": [5, 6, 7, 8], "image": picture, "strength": 0.7, "max_sequence_length": 16,
    }  # fmt: skip
    pipe = FluxPipeline.from_pretrained(model)
    record = pipe(**call).records[3]
    versions = {name: record.pop(name) for name in ("mlx", "manifest_sha256", "model", "base", "schedule")}
    assert versions["manifest_sha256"] == hashlib.sha256((model / "manifest.json").read_bytes()).hexdigest()
    assert versions["model"] == pipe.folder.index.name
    assert versions["schedule"]["shift"] == "dynamic"
    assert record.pop("license") == pipe.folder.index.license
    assert record == {
        "software": SOFTWARE, "dtype": "float32", "quantization": {}, "prompt": "", "prompt_2": "b",
        "negative_prompt": "c", "negative_prompt_2": "d", "true_cfg_scale": 2.0, "width": 48, "height": 32,
        "num_inference_steps": 2, "sigmas": [0.9, 0.4], "guidance_scale": 3.5, "seed": 8, "noise": "mflux",
        "strength": 0.7, "max_sequence_length": 16, "evaluations": 2,
        "image": {"width": 110, "height": 150, "rgb_sha256": hashlib.sha256(picture.tobytes()).hexdigest()},
    }  # fmt: skip
    batch = pipe([CAT, "x"], seed=5, **SMALL).records[1]
    assert (batch["seed"], batch["batch"]) == (5, [1, 2])
    assert pipe(CAT, latents=mx.zeros((1, 6, 64)), **SMALL).records[0]["given"] == ["latents"]


# --- memory ---


def test_the_encoders_are_gone_before_the_first_step(model, loaded):
    alive = []

    def callback(pipe, step, timestep, kwargs):
        gc.collect()
        alive.append([name for name, network in loaded.items() if network() is not None])

    FluxPipeline.from_pretrained(model)(CAT, seed=1, callback_on_step_end=callback, **SMALL)
    assert alive == [["transformer"]] * 2
    assert loaded.keys() == {"text_encoder", "text_encoder_2", "transformer", "vae"}


def test_the_traceback_of_an_interrupt_keeps_no_encoder(model, loaded):
    pipe = FluxPipeline.from_pretrained(model)
    with pytest.raises(Interrupted) as caught:
        pipe(CAT, seed=1, progress=lambda stage, done, total: done > 3 and pipe.interrupt(), **SMALL)
    gc.collect()
    assert caught.value.__traceback__ is not None
    assert loaded.keys() == {"text_encoder", "text_encoder_2"}
    assert [network() for network in loaded.values()] == [None, None]


def test_the_last_32_prompts_are_kept(model, loaded):
    pipe = FluxPipeline.from_pretrained(model)

    def encode(prompts) -> bool:
        """Returns True if an encoder was needed."""
        loaded.clear()
        pipe.encode_prompt(prompts, max_sequence_length=4)
        return bool(loaded)

    assert encode([str(i) for i in range(32)])
    assert not encode("0")  # and is now the last one used
    assert encode("new")
    assert not encode("0")
    assert encode("1")


def test_a_network_that_is_built_leaves_mlxs_random_stream_alone(model):
    from mlx_flux_krea.weights import open_model

    mx.random.seed(2**63 + 5)
    expected = mx.random.normal((3,))
    mx.random.seed(2**63 + 5)
    open_model(model).flux.load(mx.float32)
    assert mx.array_equal(mx.random.normal((3,)), expected)


def test_an_empty_prompt_works(pipe):
    assert pipe("", seed=1, **SMALL).images[0].size == (48, 32)


# --- threads and interruption ---


@pytest.mark.slow
def test_a_pipeline_made_in_one_thread_runs_in_others(model):
    made, pictures = [], []
    thread = threading.Thread(target=lambda: made.append(FluxPipeline.from_pretrained(model)))
    thread.start()
    thread.join()
    threads = [
        threading.Thread(target=lambda: pictures.append(made[0](CAT, seed=1, **SMALL).images[0])) for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    pictures.append(made[0](CAT, seed=1, **SMALL).images[0])
    assert len(pictures) == 3
    assert levels(pictures[0], pictures[1]) == levels(pictures[0], pictures[2]) == 0


@pytest.mark.slow
def test_the_low_level_parts_and_results_can_be_used_in_any_thread(pipe):
    latents = pipe(CAT, seed=1, output_type="latent", **SMALL).images
    decoded = []

    def work():
        z = sampler.unpack(latents, 6, 4).transpose(0, 2, 3, 1)
        decoded.append(np.array(pipe.vae.decode(z / 0.3611 + 0.1159)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    floats = pipe(CAT, seed=1, output_type="np", **SMALL).images
    assert np.abs(np.clip(decoded[0] / 2 + 0.5, 0, 1) - floats).max() < 1e-5


@pytest.mark.parametrize("stage", ["text", "modulation", "denoise", "decode"])
def test_interrupt_stops_after_the_piece_at_hand_and_the_pipeline_still_works(model, stage):
    pipe, after = FluxPipeline.from_pretrained(model), []

    def progress(now, done, total):
        if now == stage:
            after.append(done)
            pipe.interrupt()

    with pytest.raises(Interrupted):
        pipe(CAT, seed=1, progress=progress, **SMALL)
    assert len(after) == 1
    assert pipe(CAT, seed=1, **SMALL).images[0].size == (48, 32)


def test_of_two_calls_from_two_threads_one_is_stopped_and_the_other_finishes(model):
    pipe, runs, queued, results = FluxPipeline.from_pretrained(model), threading.Event(), threading.Event(), {}

    def call(name, progress=None):
        try:
            results[name] = pipe(CAT, seed=1, progress=progress, **SMALL).images[0].size
        except Interrupted:
            results[name] = "interrupted"

    def hold(*_):
        runs.set()
        assert queued.wait(30)

    first = threading.Thread(target=call, args=("first", hold))
    first.start()
    assert runs.wait(30)
    second = threading.Thread(target=call, args=("second",))
    second.start()
    pipe.interrupt()
    queued.set()
    first.join()
    second.join()
    assert results == {"first": "interrupted", "second": (48, 32)}


@pytest.mark.slow
def test_a_call_inside_a_callback_is_stopped_without_the_call_around_it(model):
    pipe, stopped = FluxPipeline.from_pretrained(model), []

    def callback(pipe, *_):
        try:
            pipe(CAT, seed=2, progress=lambda *_: pipe.interrupt(), **SMALL)
        except Interrupted:
            stopped.append(True)

    assert pipe(CAT, seed=1, callback_on_step_end=callback, **SMALL).images[0].size == (48, 32)
    assert stopped == [True, True]


def test_a_plan_takes_a_request_or_its_arguments(model):
    pipe = FluxPipeline.from_pretrained(model, dtype="float32", memory="2GB")  # what is free changes all the time
    plan = pipe.plan(Request(prompt=CAT, **SMALL))
    assert plan == pipe.plan(prompt=CAT, **SMALL) == pipe(CAT, seed=1, **SMALL).plan
    assert pipe.plan(prompt=CAT, width=512, height=512).peak > plan.peak
    for call in ({}, {"request": Request(prompt=CAT), "width": 64}):
        with pytest.raises(UsageError, match="a plan needs a request"):
            pipe.plan(**call)


def test_prompts_are_read_ahead_of_requests_as_a_caller_writes_them(model, monkeypatch):
    pipe = FluxPipeline.from_pretrained(model)
    pipe.read_ahead([Request(prompt="a"), Request(prompt=["b", "c"])])
    monkeypatch.setattr(NetworkFolder, "load", None)
    embeds, _ = pipe.encode_prompt(["a", "b", "c"])
    assert len(embeds) == 3


def test_modulations_of_prompts_that_are_read_together_are_computed_together(model, monkeypatch):
    """Each layer is read once for all of them, and the pictures are those of the prompts alone."""
    calls = [SMALL | {"prompt": text, "seed": 1, "guidance_scale": scale} for text, scale in (("a", 2), ("b c", 3))]
    alone = [FluxPipeline.from_pretrained(model, dtype="float32")(**call, output_type="np").images for call in calls]
    pipe, stages = FluxPipeline.from_pretrained(model, dtype="float32", memory="2GB"), []
    read, original = [], Reader.read
    monkeypatch.setattr(Reader, "read", lambda self, unit, buffer: read.append(unit) or original(self, unit, buffer))
    pipe.read_ahead([Request(**call) for call in calls], progress=lambda stage, *_: stages.append(stage))
    assert "modulation" in stages
    modulated = [unit for unit in read if any("mod" in name for name, *_ in unit.tensors)]
    assert len(modulated) == len(pipe._generator._streamed.modulation.units)
    for call, images in zip(calls, alone, strict=True):
        stages.clear()
        together = pipe(**call, output_type="np", progress=lambda stage, *_: stages.append(stage)).images
        assert np.array_equal(together, images)
        assert not {"text", "modulation"} & set(stages)


def test_a_request_opens_its_image(pipe, tmp_path):
    Image.fromarray(CORNERS).save(tmp_path / "a.png")
    request = Request(prompt=CAT, image=tmp_path / "a.png").resolve(pipe.folder)
    assert request.image.mode == "RGB"
    assert (request.image.width, request.image.height) == (CORNERS.shape[1], CORNERS.shape[0])
    assert open_image(request.image) is request.image


def test_interrupt_without_a_run_does_nothing(pipe):
    pipe.interrupt()
    assert pipe(CAT, seed=1, **SMALL).images


def test_an_error_in_the_callback_reaches_the_caller(pipe):
    def callback(*args):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        pipe(CAT, seed=1, callback_on_step_end=callback, **SMALL)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (lambda latents: {"latent": latents}, "the callback returned 'latent'"),
        (lambda latents: latents, "the callback returned array"),
        (lambda latents: {"latents": latents[:, 1:]}, r"the callback's latents are \(1, 5, 64\)"),
        (lambda latents: {"latents": 3}, "the callback's latents are int"),
        (lambda latents: {"latents": latents * float("nan")}, "the callback's latents holds NaN"),
        (lambda latents: {"latents": latents.astype(mx.int32)}, "the callback's latents holds mlx.core.int32"),
    ],
)
def test_what_a_callback_may_not_return_is_refused(pipe, answer, says):
    def callback(pipe, step, timestep, kwargs):
        return answer(kwargs["latents"])

    with pytest.raises(UsageError, match=says):
        pipe(CAT, seed=1, callback_on_step_end=callback, **SMALL)


@pytest.mark.slow
def test_a_callback_may_make_a_picture_and_progress_goes_on(pipe):
    stages = []

    def callback(pipe, step, timestep, kwargs):
        stages.clear()
        assert pipe("another", seed=step, **SMALL).images
        assert stages == []  # it reports to nobody

    pipe(CAT, seed=1, callback_on_step_end=callback, progress=lambda *args: stages.append(args[0]), **SMALL)
    assert set(stages) == {"decode"}


@pytest.mark.slow
def test_progress_counts_every_stage_to_its_end(model):
    seen = {}

    def progress(stage, done, total):
        assert done > seen.get(stage, (0, 0))[0]
        seen[stage] = (done, total)

    FluxPipeline.from_pretrained(model)(
        CAT,
        seed=1,
        negative_prompt="",
        true_cfg_scale=2,
        image=REFERENCE / "images" / "input.png",
        progress=progress,
        **SMALL,
    )
    assert set(seen) == {"text", "image", "modulation", "denoise", "decode"}
    for done, total in seen.values():
        assert done == pytest.approx(total)


# --- what is refused ---

IMAGE = {"image": REFERENCE / "images" / "input.png"}
EMBEDS = {"prompt_embeds": mx.zeros((1, 4, 14)), "pooled_prompt_embeds": mx.zeros((1, 16))}
NEGATIVE = {"negative_prompt_embeds": mx.zeros((2, 4, 14)), "negative_pooled_prompt_embeds": mx.zeros((2, 16))}


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({}, "there is no prompt"),
        ({"prompt": []}, "`prompt` is an empty list"),
        ({"prompt": 5}, "`prompt` is int; expected a text or a list of texts"),
        ({"prompt": {"a"}}, "`prompt` is set"),
        ({"prompt": [1]}, "`prompt` holds int"),
        ({"prompt": "\udcff"}, "not valid UTF-8"),
        ({"prompt": CAT, "prompt_2": ["a", "b"]}, "2 texts in `prompt_2`"),
        ({"prompt": CAT, **EMBEDS}, "both given"),
        ({"prompt_embeds": mx.zeros((1, 4, 14))}, "pooled form is missing"),
        (
            {"prompt_embeds": mx.zeros((1, 4, 3)), "pooled_prompt_embeds": mx.zeros((1, 16))},
            "^`prompt_embeds` has shape",
        ),
        (
            {"prompt_embeds": mx.zeros((1, 4, 14)), "pooled_prompt_embeds": mx.zeros((1, 3))},
            "`pooled_prompt_embeds` has sh",
        ),
        (
            {"prompt_embeds": mx.zeros((0, 4, 14)), "pooled_prompt_embeds": mx.zeros((0, 16))},
            "`prompt_embeds` has shape",
        ),
        (
            {"prompt_embeds": mx.zeros((1, 4, 14), mx.int32), "pooled_prompt_embeds": EMBEDS["pooled_prompt_embeds"]},
            "int32",
        ),
        ({**EMBEDS, "pooled_prompt_embeds": mx.full((1, 16), float("inf"))}, "`pooled_prompt_embeds` holds NaN or inf"),
        ({"prompt": ["a", "b", "c"], "true_cfg_scale": 2, **NEGATIVE}, "`negative_prompt_embeds` holds 2 prompts"),
        ({"prompt_embeds": "abc", "pooled_prompt_embeds": mx.zeros((1, 16))}, "`prompt_embeds` is str"),
        ({**EMBEDS, "prompt_2": "a"}, "`prompt_2` is given without `prompt`"),
        ({"prompt": CAT, "negative_prompt": "a"}, "does nothing at `true_cfg_scale` 1"),
        ({"prompt": CAT, "true_cfg_scale": 3}, "needs a negative prompt"),
        ({"prompt": CAT, "negative_prompt_2": "a", "true_cfg_scale": 3}, "without `negative_prompt`"),
        ({"prompt": CAT, "height": 0}, "`height` is 0"),
        ({"prompt": CAT, "width": -64}, "`width` is -64"),
        ({"prompt": CAT, "width": 8}, "sides from 16"),
        ({"prompt": CAT, "width": 100_000, "height": 100_000}, "sides from 16 to 4096"),
        ({"prompt": CAT, "num_inference_steps": 0}, "`num_inference_steps` is 0"),
        ({"prompt": CAT, "num_inference_steps": -3}, "`num_inference_steps` is -3"),
        ({"prompt": CAT, "guidance_scale": float("nan")}, "`guidance_scale` is nan"),
        ({"prompt": CAT, "guidance_scale": -1}, "`guidance_scale` is -1"),
        ({"prompt": CAT, "num_images_per_prompt": 0}, "`num_images_per_prompt` is 0"),
        ({"prompt": CAT, "seed": -1}, "`seed` is -1"),
        ({"prompt": CAT, "seed": 2**64}, "`seed` is"),
        ({"prompt": CAT, "seed": 1.5}, "`seed` is 1.5"),
        ({"prompt": CAT, "seed": True}, "`seed` is True"),
        ({"prompt": CAT, "seed": [2**64], "num_images_per_prompt": 1}, "`seed` is 18446744073709551616"),
        ({"prompt": CAT, "num_images_per_prompt": 10**9}, "`num_images_per_prompt` is 1000000000"),
        ({"prompt": [CAT] * 2, "num_images_per_prompt": 501}, "1002 images in one call; expected 1000 at most"),
        ({"prompt": CAT, "width": 48.0, "height": 32}, "`width` is 48.0"),
        ({"prompt": CAT, "true_cfg_scale": "3"}, "`true_cfg_scale` is '3'"),
        ({"prompt": CAT, "seed": [1, 2]}, "2 seeds for 1 image;"),
        ({"prompt": CAT, "noise": "krea"}, "cannot be repeated"),
        ({"prompt": CAT, "noise": "x"}, "no noise recipe"),
        ({"prompt": CAT, "noise": ["x"]}, r"`noise` is \('x',\)"),
        ({"prompt": CAT, "strength": 0.5}, "does nothing without an image"),
        ({"prompt": CAT, **IMAGE, "strength": 1.5}, "`strength` is 1.5"),
        ({"prompt": CAT, **IMAGE, "strength": 0.0, "num_inference_steps": 8}, "runs no step"),
        ({"prompt": CAT, "image": 3}, "`image` is int"),
        ({"prompt": CAT, "image": "nothing.png"}, "cannot be opened"),
        ({"prompt": CAT, "image": __file__}, "cannot be opened"),
        ({"prompt": CAT, "latents": mx.zeros((1, 5, 64))}, r"`latents` has shape \(1, 5, 64\); expected \(1, 6, 64\)"),
        ({"prompt": CAT, "latents": mx.full((1, 6, 64), float("nan"))}, "`latents` holds NaN"),
        ({"prompt": CAT, "latents": np.zeros((1, 6, 64), np.int64)}, "`latents` holds mlx.core.int64"),
        ({"prompt": CAT, "latents": mx.zeros((1, 6, 64)), "seed": 1}, "with `seed` or `image`"),
        ({"prompt": CAT, "sigmas": [0.5, 1.0]}, "falling numbers"),
        ({"prompt": CAT, "sigmas": 0.5}, "falling numbers"),
        ({"prompt": CAT, "sigmas": []}, "falling numbers"),
        ({"prompt": CAT, "sigmas": [0.5, 0.0]}, "falling numbers"),
        ({"prompt": CAT, "sigmas": ["a"]}, "a level of `sigmas` is 'a'"),
        ({"prompt": CAT, "sigmas": np.linspace(1, 0.1, 1001)}, "the number of `sigmas` is 1001"),
        ({"prompt": CAT, "sigmas": [1.0, 0.5], "num_inference_steps": 3}, "2 sigmas and 3 steps"),
        ({"prompt": CAT, "output_type": "pt"}, "`output_type` is 'pt'"),
        ({"prompt": CAT, "callback_on_step_end": 3}, "`callback_on_step_end` is int"),
        ({"prompt": CAT, "max_sequence_length": 513}, "`max_sequence_length` is 513"),
        ({"prompt": CAT, "num_inference_steps": True}, "`num_inference_steps` is True"),
    ],
)
def test_what_cannot_be_used_is_refused_before_any_weight_is_read(model, monkeypatch, call, says):
    pipe = FluxPipeline.from_pretrained(model)
    monkeypatch.delattr(NetworkFolder, "load")
    size = {"height": 32, "width": 48} if "height" not in call and "width" not in call else {}
    with pytest.raises(UsageError, match=says) as caught:
        pipe(**size, **call)
    assert caught.value.exit_code == 2
    assert isinstance(caught.value, ValueError)
    assert "\n" not in str(caught.value)


# --- input images ---

CORNERS = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[255, 255, 0], [0, 255, 255], [255, 0, 255]]], np.uint8)


@pytest.mark.parametrize("as_path", [True, False])
@pytest.mark.parametrize(
    ("orientation", "upright"),
    [(1, CORNERS), (2, CORNERS[:, ::-1]), (3, CORNERS[::-1, ::-1]), (6, np.rot90(CORNERS, -1)), (8, np.rot90(CORNERS))],
)
def test_an_image_is_turned_upright_before_its_size_is_taken(pipe, tmp_path, orientation, upright, as_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    Image.fromarray(CORNERS).save(tmp_path / "a.png", exif=exif)
    opened = open_image(tmp_path / "a.png" if as_path else Image.open(tmp_path / "a.png"))
    assert np.array_equal(np.asarray(opened), upright)
    folder = replace(pipe.folder, index=replace(pipe.folder.index, defaults=Defaults(64, 64, 4, 4.5)))
    resolved = Request(prompt="", image=opened).resolve(folder)
    assert (resolved.width > resolved.height) == (upright.shape[1] > upright.shape[0])


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "P"])
def test_transparency_is_flattened_on_white(mode):
    half = Image.fromarray(np.array([[[0, 0, 0, 128], [0, 0, 0, 0], [0, 0, 0, 255]]], np.uint8), "RGBA")
    if mode == "P":
        half = Image.new("P", (3, 1))
        half.putpalette([0, 0, 0, 9, 9, 9])
        half.putpixel((1, 0), 1)
        half.info["transparency"] = 1
        expected = [0, 255, 0]
    else:
        half, expected = half.convert(mode), [127, 255, 0]
    before = half.tobytes()
    assert np.asarray(open_image(half))[0].tolist() == [[v] * 3 for v in expected]
    assert half.tobytes() == before


@pytest.mark.parametrize("name", ["a.png", "a.tiff"])
def test_16_bit_grey_keeps_its_greys(tmp_path, name):
    grey = np.array([[0, 257, 128 * 257, 65535]], np.uint16)
    Image.fromarray(grey).save(tmp_path / name)
    assert np.asarray(open_image(tmp_path / name))[0, :, 0].tolist() == [0, 1, 128, 255]


@pytest.mark.parametrize("mode", ["I", "F"])
def test_images_whose_white_is_not_known_are_refused(mode):
    with pytest.raises(UsageError, match=f"the image has mode {mode}, whose white is not known"):
        open_image(Image.new(mode, (4, 4)))


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG by hand, grey; IHDR first."""
    header = (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    parts = [
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in (header, *chunks)
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def hostile() -> dict[str, bytes]:
    pixels = (b"IDAT", zlib.compress(b"\0" * 20))
    jpeg = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(jpeg, "JPEG", exif=b"Exif\0\0II*\0\x08\0\0\0\x01\0" + b"\xff" * 12)
    return {
        "bomb": png(60_000, 60_000, pixels, (b"IEND", b"")),
        "truncated": png(64, 64, (b"IDAT", zlib.compress(b"\0" * 20)[:6])),
        "no size": png(0, 5, pixels, (b"IEND", b"")),
        "broken exif": png(4, 4, (b"eXIf", b"II\x99\0junk"), pixels, (b"IEND", b"")),
        "text": b"no image",
        "nothing": b"",
        "truncated jpeg": jpeg.getvalue()[:-200],
    }


@pytest.mark.parametrize("name", hostile())
def test_hostile_images_are_refused_by_name(tmp_path, name):
    (tmp_path / "a.png").write_bytes(hostile()[name])
    with pytest.raises(UsageError, match=r"a\.png cannot be opened: \w") as caught:
        open_image(tmp_path / "a.png")
    assert "\n" not in str(caught.value)
    try:
        opened = Image.open(tmp_path / "a.png")
    except Exception:
        return  # Pillow refuses it at once
    with pytest.raises(UsageError, match="the image cannot be opened"):
        open_image(opened)


@pytest.mark.parametrize("size", [(0, 5), (5, 0)])
def test_an_image_without_pixels_is_refused(size):
    with pytest.raises(UsageError, match=r"the image (is|cannot be opened)"):
        open_image(Image.new("RGB", size))


def test_unknown_types_and_plans_are_refused(model):
    with pytest.raises(UsageError, match="float8"):
        FluxPipeline.from_pretrained(model, dtype="float8")
    with pytest.raises(UsageError, match="`memory` is 'plenty'"):
        FluxPipeline.from_pretrained(model, memory="plenty")


def test_guidance_is_refused_where_the_model_has_none(model, tmp_path):
    """schnell's kind: no guidance embedding, no shift."""
    source = without_guidance(tmp_path / "source")
    pipe = FluxPipeline.from_pretrained(convert([source], tmp_path / "model", tokenizers=TOKENIZERS).path)
    assert pipe.folder.index.schedule.shift == "none"
    assert pipe.folder.index.max_sequence_length == 256
    assert pipe.encode_prompt(CAT)[0].shape == (1, 256, 14)
    with pytest.raises(UsageError, match="`max_sequence_length` is 257"):
        pipe(CAT, max_sequence_length=257, **SMALL)
    with pytest.raises(UsageError, match="no guidance embedding"):
        pipe(CAT, guidance_scale=4.5, **SMALL)
    assert pipe(CAT, seed=1, **SMALL).images


def test_a_model_that_requires_filters_refuses_to_generate(tmp_path):
    """Whatever its JSON says: the sizes decide."""
    for filters in ("required", "none"):
        pipe = FluxPipeline.from_pretrained(full_size_folder(tmp_path / filters, filters=filters))
        acknowledge(pipe.folder.path)
        with pytest.raises(FiltersError, match="content filters") as caught:
            pipe(CAT)
        assert caught.value.exit_code == 6
    free = full_size_folder(tmp_path / "schnell", filters="none", guidance_embed=False)
    assert FluxPipeline.from_pretrained(free).folder.requires_filters
    published = {"file": "flux1-schnell.safetensors", "sha256": next(iter(SCHNELL_FILES)), "bytes": 1}
    edit_json(free / "model_index.json", source=[published | {"layout": "transformer, Black Forest Labs"}])
    assert not FluxPipeline.from_pretrained(free).folder.requires_filters


# --- GPU commands that failed without a word ---


def zeros(module: str, method: str, value: float = 0.0):
    """Makes a network give one number everywhere; other results of the method are as they are."""

    def patch(monkeypatch):
        original = getattr(sys.modules[f"mlx_flux_krea.{module.rpartition('.')[0]}"], module.rpartition(".")[2])
        real = getattr(original, method)

        def constant(self, *args, **options):
            result = real(self, *args, **options)
            return tree_map(lambda one: mx.full(one.shape, value, one.dtype), result)

        monkeypatch.setattr(original, method, constant)

    return patch


def biased(monkeypatch):
    """The transformer's last product is of zeros: every token gets the bias alone."""
    real = Flux.forward
    monkeypatch.setattr(Flux, "forward", lambda *args, **options: real(*args, **options) * 0 + mx.arange(64.0))


def one_condition(monkeypatch):
    """Every second velocity is zeros: that of the negative prompt."""
    real, calls = Flux.forward, itertools.count()
    monkeypatch.setattr(Flux, "forward", lambda *args, **options: real(*args, **options) * (next(calls) % 2 == 0))


ZEROS = {
    "T5's states": (zeros("models.t5.T5Encoder", "__call__"), "a text encoder"),
    "CLIP's vector": (zeros("models.clip.CLIPText", "__call__"), "a text encoder"),
    "a velocity": (zeros("models.transformer.Flux", "forward"), "step 1 of the transformer"),
    "a velocity of ones": (zeros("models.transformer.Flux", "forward", 1.0), "step 1 of the transformer"),
    "a velocity of biases": (biased, "step 1 of the transformer"),
    "a negative velocity": (one_condition, "step 1 of the transformer"),
    "an image's latents": (zeros("models.vae.VAE", "encode"), "the image encoder"),
    "a picture": (zeros("models.vae.VAE", "decode"), "the image decoder"),
    "a grey picture": (zeros("models.vae.VAE", "decode", 0.25), "the image decoder"),
}


@pytest.mark.core("a picture")
@pytest.mark.parametrize("what", ZEROS)
def test_results_without_variance_are_errors_that_say_to_try_again(model, monkeypatch, what):
    patch, source = ZEROS[what]
    pipe = FluxPipeline.from_pretrained(model)
    call = {**SMALL, "seed": 1, "negative_prompt": "a dog", "true_cfg_scale": 2.0}
    if "image" in what:
        call |= {"image": Image.new("RGB", (16, 16), "white"), "width": 16, "height": 16}  # as plain as can be
    says = rf"{source} gave the same numbers.*a GPU command may have failed: try again"
    with monkeypatch.context() as patched:
        patch(patched)
        with pytest.raises(ResourceError, match=says):
            pipe("a cat", **call)
    assert len(pipe("a cat", **call).images) == 1  # nothing is left of the first try


def test_the_smallest_picture_has_variance(model):
    """One token, and one position of T5."""
    call = {"width": 16, "height": 16, "num_inference_steps": 1, "seed": 1, "max_sequence_length": 1}
    assert FluxPipeline.from_pretrained(model)("", **call).images[0].size == (16, 16)
