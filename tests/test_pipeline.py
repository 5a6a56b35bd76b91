"""Whole runs against diffusers' pipelines and BFL's sampling code, in float32 and in bfloat16."""

import threading

import mlx.core as mx
import numpy as np
import pytest
from helpers import (
    REFERENCE,
    TOKENIZERS,
    assert_close,
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
from mlx_flux_krea.convert import convert

from mlx_flux_krea import FluxPipeline, sampler
from mlx_flux_krea.errors import FiltersError, Interrupted, UsageError

CAT = "A cat holding a sign that says hello world"


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


@pytest.mark.parametrize("name", ["t2i_4", "t2i_8", "t2i_list", "cfg_4", "t2i_short"])
def test_a_run_equals_diffusers_after_every_step_and_as_a_picture(pipe, name):
    result, latents = latents_of(pipe, **arguments(name))
    for step, (ours, theirs) in enumerate(zip(latents, goldens()[f"{name}.latents"], strict=True)):
        assert_close(ours, theirs, 1e-4, f"step {step}")
    run = facts()["runs"][name]
    for ours, theirs in zip(result.images, run["pngs"], strict=True):
        assert psnr(ours, image(theirs)) >= 60
        assert levels(ours, image(theirs)) <= 1
    assert result.outcomes == ("released",) * len(result.images)


@pytest.mark.parametrize("name", ["t2i_4", "t2i_list"])
def test_decoded_floats_equal_the_reference(pipe, name):
    floats = pipe(**arguments(name), output_type="np").images
    raw = np.array(nhwc(goldens()[f"{name}.raw"]))
    assert np.abs(floats - np.clip(raw / 2 + 0.5, 0, 1)).max() < 1e-4


def test_image_to_image_equals_diffusers(pipe):
    result, latents = latents_of(pipe, **arguments("img2img_8.sample"))
    assert_close(latents, goldens()["img2img_8.sample.latents"], 1e-4)
    assert psnr(result.images[0], image("images/img2img_8.sample.0.png")) >= 60
    assert levels(result.images[0], image("images/img2img_8.sample.0.png")) <= 1


def test_image_to_image_from_the_mean_equals_the_reference(pipe):
    """Of the recipes that take the posterior's mean, `comfy` draws the golden's float32 noise; it truncates bytes."""
    result, latents = latents_of(pipe, **arguments("img2img_8.mean"), noise="comfy")
    assert_close(latents, goldens()["img2img_8.mean.latents"], 1e-4)
    floats = pipe(**arguments("img2img_8.mean"), noise="comfy", output_type="np").images[0]
    rounded = np.round(floats * 255).astype(np.int64)
    assert np.abs(rounded - np.asarray(image("images/img2img_8.mean.0.png"))).max() <= 1
    assert psnr(result.images[0], image("images/img2img_8.mean.0.png")) >= 49


def test_the_bfl_recipe_starts_from_the_mean_and_its_own_noise(pipe):
    """Its noise is golden in test_noise; here: the mean, and the place where noise and image meet."""
    from mlx_flux_krea import noise

    call = arguments("img2img_8.mean")
    drawn = noise.draw("bfl", call["seed"], (1, 16, 8, 12), mx.float32)
    start = sampler.add_noise(
        goldens()["img2img_8.mean.image_latents"], drawn, facts()["runs"]["img2img_8.mean"]["start_sigma"]
    )
    seen = []
    flux = pipe.transformer
    original = type(flux).forward

    def forward(self, img, *args):
        seen.append(img)
        return original(self, img, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(flux), "forward", forward)
        pipe(**call, noise="bfl")
    assert len(seen) == 5
    assert_close(seen[0], sampler.pack(start), 5e-5)


@pytest.mark.parametrize(("name", "golden"), [("t2i_4", "bfl_4"), ("t2i_8", "bfl_8")])
def test_a_run_equals_black_forest_labs_own_code(pipe, name, golden):
    """From BFL's float32 noise; the `bfl` recipe then truncates bytes as BFL does."""
    call = arguments(name)
    del call["seed"]
    call.pop("num_images_per_prompt", None)
    start = sampler.pack(goldens()[f"{golden}.noise"])
    result, latents = latents_of(pipe, **call, latents=start, noise="bfl")
    assert_close(latents[-1], goldens()[f"{golden}.latents"], 1e-4)
    theirs = image(f"images/{golden}.png")
    assert levels(result.images[0], theirs) <= 1
    assert psnr(result.images[0], theirs) >= 60


def test_a_bfloat16_run_is_as_near_to_the_reference_as_torch_is(pipe_bf16):
    """torch's own run ends 0.0067 from the float32 latents, its picture at 50.3 dB."""
    call = arguments("t2i_4")
    result, latents = latents_of(pipe_bf16, **call)
    assert rel(latents[-1], goldens()["bf16.latents"][-1]) < 0.03
    assert rel(latents[-1], goldens()["t2i_4.latents"][-1]) < 0.009
    assert psnr(result.images[0], image("images/bf16.0.png")) >= 42
    assert psnr(result.images[0], image("images/t2i_4.0.png")) >= 48


def test_bfloat16_stays_bfloat16_at_every_edge(pipe_bf16, monkeypatch):
    """Only latents, which nothing large depends on, are float32."""
    from mlx.utils import tree_flatten

    seen = {}
    original = FluxPipeline._runner

    def runner(self, stage, *args):
        run = original(self, stage, *args)

        def watched(piece, *inputs):
            result = run(piece, *inputs)
            arrays = [a for _, a in tree_flatten([result]) if isinstance(a, mx.array)]
            seen.setdefault(stage, set()).update(a.dtype for a in arrays if a.dtype != mx.int32)
            return result

        return watched

    monkeypatch.setattr(FluxPipeline, "_runner", runner)
    pipe_bf16(**arguments("img2img_8.sample") | {"prompt": "a prompt that was not encoded before"})
    assert seen == {stage: {mx.bfloat16} for stage in ("text", "image", "modulation", "denoise", "decode")}


def test_float16_computes_the_text_and_the_image_in_bfloat16(model):
    pipe = FluxPipeline.from_pretrained(model, dtype="float16")
    embeds, pooled = pipe.encode_prompt("a cat")
    assert (embeds.dtype, pooled.dtype) == (mx.bfloat16, mx.float16)
    assert (pipe.vae.dtype, pipe.transformer.dtype) == (mx.bfloat16, mx.float16)
    _, latents = latents_of(pipe, **arguments("t2i_4"))
    assert rel(latents[-1], goldens()["t2i_4.latents"][-1]) < 0.03


# --- what a call may say ---

SMALL = {"height": 32, "width": 48, "num_inference_steps": 2}


def test_several_seeds_are_several_single_runs(pipe):
    both = pipe(CAT, seed=[3, 9], num_images_per_prompt=2, output_type="latent", **SMALL)
    assert both.seeds == (3, 9)
    for i, seed in enumerate((3, 9)):
        alone = pipe(CAT, seed=seed, output_type="latent", **SMALL)
        assert mx.array_equal(both.images[i : i + 1], alone.images)


def test_one_seed_draws_the_whole_batch_and_prompts_come_before_their_copies(pipe):
    from mlx_flux_krea import noise

    prompts = [CAT, "blurry"]
    batch = pipe(prompts, seed=3, num_images_per_prompt=2, output_type="latent", **SMALL).images
    start = sampler.pack(noise.draw("diffusers", 3, (4, 16, 4, 6), mx.float32))
    for i in range(4):
        alone = pipe(prompts[i // 2], latents=start[i : i + 1], output_type="latent", **SMALL).images
        assert mx.array_equal(batch[i : i + 1], alone)


def test_a_seed_is_chosen_and_told_where_none_is_given_and_repeats_the_picture(pipe):
    first = pipe(CAT, **SMALL)
    again = pipe(CAT, seed=first.seeds[0], **SMALL)
    assert levels(first.images[0], again.images[0]) == 0
    assert pipe(CAT, **SMALL).seeds != first.seeds


def test_seed_zero_is_a_seed(pipe):
    assert pipe(CAT, seed=0, **SMALL).seeds == (0,)


def test_embeds_stand_for_their_prompt(pipe):
    embeds, pooled = pipe.encode_prompt([CAT, ""])
    assert embeds.shape == (2, 512, 14)
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


def test_what_the_encoders_did_not_read_is_told(pipe):
    result = pipe("cat " * 90, seed=1, max_sequence_length=80, **SMALL)
    assert [note.split()[0] for note in result.notes] == ["CLIP", "T5"]
    assert pipe("cat " * 90, seed=1, max_sequence_length=80, **SMALL).notes == result.notes  # also from the cache


def test_an_image_without_a_size_keeps_its_shape_at_the_models_area(pipe):
    from dataclasses import replace

    from mlx_flux_krea.config import Defaults
    from mlx_flux_krea.request import Request

    index = replace(pipe.folder.index, defaults=Defaults(64, 64, 4, 4.5))
    tall = image("images/input_other_size.png")  # 110 x 150
    resolved, _ = Request(prompt="", image=tall).resolved(index, pipe.folder.sizes["transformer"], 16)
    assert (resolved.width, resolved.height) == (48, 64)
    resolved, _ = Request(prompt="", image=tall, width=96).resolved(index, pipe.folder.sizes["transformer"], 16)
    assert (resolved.width, resolved.height) == (96, 128)


def test_an_empty_prompt_works(pipe):
    assert pipe("", seed=1, **SMALL).images[0].size == (48, 32)


# --- threads and interruption ---


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


def test_the_low_level_parts_and_results_can_be_used_in_any_thread(pipe):
    latents = pipe(CAT, seed=1, output_type="latent", **SMALL).images
    decoded = []

    def work():
        z = sampler.unpack(latents, 4, 6).transpose(0, 2, 3, 1)
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


def test_interrupt_without_a_run_does_nothing(pipe):
    pipe.interrupt()
    assert pipe(CAT, seed=1, **SMALL).images


def test_an_error_in_the_callback_reaches_the_caller(pipe):
    def callback(*args):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        pipe(CAT, seed=1, callback_on_step_end=callback, **SMALL)


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


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ({}, "there is no prompt"),
        ({"prompt": []}, "a text or a list of texts"),
        ({"prompt": [1]}, "prompt holds int"),
        ({"prompt": "\udcff"}, "not valid UTF-8"),
        ({"prompt": CAT, "prompt_2": ["a", "b"]}, "2 texts in prompt_2"),
        ({"prompt": CAT, **EMBEDS}, "both given"),
        ({"prompt_embeds": mx.zeros((1, 4, 14))}, "pooled form is missing"),
        ({"prompt_embeds": mx.zeros((1, 4, 3)), "pooled_prompt_embeds": mx.zeros((1, 16))}, "prompt embeds have shape"),
        ({"prompt_embeds": mx.zeros((1, 4, 14)), "pooled_prompt_embeds": mx.zeros((1, 3))}, "pooled embeds have shape"),
        ({**EMBEDS, "prompt_2": "a"}, "prompt_2 is given without prompt"),
        ({"prompt": CAT, "negative_prompt": "a"}, "does nothing at true_cfg_scale 1"),
        ({"prompt": CAT, "true_cfg_scale": 3}, "needs a negative prompt"),
        ({"prompt": CAT, "negative_prompt_2": "a", "true_cfg_scale": 3}, "without negative_prompt"),
        ({"prompt": CAT, "height": 0}, "height is 0"),
        ({"prompt": CAT, "width": -64}, "width is -64"),
        ({"prompt": CAT, "width": 8}, "sides from 16"),
        ({"prompt": CAT, "width": 100_000, "height": 100_000}, "sides from 16 to 8192"),
        ({"prompt": CAT, "num_inference_steps": 0}, "num_inference_steps is 0"),
        ({"prompt": CAT, "num_inference_steps": -3}, "num_inference_steps is -3"),
        ({"prompt": CAT, "guidance_scale": float("nan")}, "guidance_scale is nan"),
        ({"prompt": CAT, "guidance_scale": -1}, "guidance_scale is -1"),
        ({"prompt": CAT, "num_images_per_prompt": 0}, "num_images_per_prompt is 0"),
        ({"prompt": CAT, "seed": -1}, "seed is -1"),
        ({"prompt": CAT, "seed": 2**64}, "seed is"),
        ({"prompt": CAT, "seed": 1.5}, "seed is 1.5"),
        ({"prompt": CAT, "seed": [1, 2]}, "2 seeds for 1 images"),
        ({"prompt": CAT, "noise": "krea"}, "cannot be repeated"),
        ({"prompt": CAT, "noise": "x"}, "no noise recipe"),
        ({"prompt": CAT, "strength": 0.5}, "does nothing without an image"),
        ({"prompt": CAT, **IMAGE, "strength": 1.5}, "strength is 1.5"),
        ({"prompt": CAT, **IMAGE, "strength": 0.0, "num_inference_steps": 8}, "runs no step"),
        ({"prompt": CAT, "image": 3}, "image is int"),
        ({"prompt": CAT, "image": "nothing.png"}, "cannot be opened"),
        ({"prompt": CAT, "image": __file__}, "cannot be opened"),
        ({"prompt": CAT, "latents": mx.zeros((1, 5, 64))}, "latents have shape"),
        ({"prompt": CAT, "latents": mx.zeros((1, 6, 64)), "seed": 1}, "beside a seed"),
        ({"prompt": CAT, "sigmas": [0.5, 1.0]}, "falling numbers"),
        ({"prompt": CAT, "sigmas": [1.0, 0.5], "num_inference_steps": 3}, "2 sigmas and 3 steps"),
        ({"prompt": CAT, "output_type": "pt"}, 'output_type is "pt"'),
        ({"prompt": CAT, "max_sequence_length": 513}, "max_sequence_length is 513"),
        ({"prompt": CAT, "num_inference_steps": True}, "num_inference_steps is True"),
    ],
)
def test_what_cannot_be_used_is_refused_before_any_weight_is_read(model, call, says):
    pipe = FluxPipeline.from_pretrained(model)
    size = {"height": 32, "width": 48} if "height" not in call and "width" not in call else {}
    with pytest.raises(UsageError, match=says) as caught:
        pipe(**size, **call)
    assert caught.value.exit_code == 2
    assert isinstance(caught.value, ValueError)
    if "embeds" not in says and "latents" not in says and "step" not in says:
        assert pipe._networks == {}


def test_unknown_types_and_plans_are_refused(model):
    with pytest.raises(UsageError, match="float8"):
        FluxPipeline.from_pretrained(model, dtype="float8")
    with pytest.raises(UsageError, match="memory is '8GB'"):
        FluxPipeline.from_pretrained(model, memory="8GB")


def test_guidance_is_refused_where_the_model_has_none(model, tmp_path):
    """schnell's kind: no guidance embedding, no shift."""
    source = without_guidance(tmp_path / "source")
    pipe = FluxPipeline.from_pretrained(convert([source], tmp_path / "model", tokenizers=TOKENIZERS).path)
    assert pipe.folder.index.schedule.shift == "none"
    with pytest.raises(UsageError, match="no guidance embedding"):
        pipe(CAT, guidance_scale=4.5, **SMALL)
    assert pipe(CAT, seed=1, **SMALL).images


def test_a_model_that_requires_filters_refuses_to_generate(tmp_path):
    """Whatever its JSON says: the sizes decide."""
    for filters in ("required", "none"):
        pipe = FluxPipeline.from_pretrained(full_size_folder(tmp_path / filters, filters=filters))
        with pytest.raises(FiltersError, match="content filters") as caught:
            pipe(CAT)
        assert caught.value.exit_code == 6
    free = FluxPipeline.from_pretrained(full_size_folder(tmp_path / "schnell", filters="none", guidance_embed=False))
    assert not free.folder.requires_filters
