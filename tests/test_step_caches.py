"""Step caches within whole runs: the reference's runs, streaming, true CFG, batches, editing, and resumed runs."""

import functools
import json

import adapters as files
import mlx.core as mx
import numpy as np
import pytest
from helpers import REFERENCE, assert_close, rel
from PIL import Image

from mlx_flux_krea import FluxPipeline, checkpoint, residency
from mlx_flux_krea.checkpoint import Checkpoint
from mlx_flux_krea.commands.shared import runs
from mlx_flux_krea.errors import UsageError
from mlx_flux_krea.sampling import caches
from mlx_flux_krea.sampling.caches import _FirstBlock
from mlx_flux_krea.sampling.rules import skip_steps

EDIT = REFERENCE / "edit"
KNOWN = json.loads((EDIT / "caches.json").read_text())
CACHED = [name for name, run in KNOWN["runs"].items() if "threshold" in run]
CAT = "a cat"
SMALL = {"width": 32, "height": 32, "seed": 7, "output_type": "latent", "max_sequence_length": 8}
MODES = {
    "skip": {"cache": "skip"},
    "skip, few": {"cache": "skip", "num_inference_steps": 12},
    "first block": {"cache": "first-block:0.3"},
    "first block, order 1": {"cache": "first-block:0.3:1"},
    "dpmpp_2m": {"solver": "dpmpp_2m"},
    "heun": {"solver": "heun"},
    "dpmpp_2m, skip, beta": {"solver": "dpmpp_2m", "cache": "skip", "schedule": "beta"},
    "true CFG": {"cache": "first-block:0.3", "negative_prompt": "rain", "true_cfg_scale": 2.0},
    "batch": {"cache": "first-block:0.3:1", "num_images_per_prompt": 2},
}


@functools.cache
def finals() -> dict[str, mx.array]:
    return mx.load(str(EDIT / "caches.safetensors"))


def reference_run(pipe, **how):
    size = {name: KNOWN[name] for name in ("prompt", "height", "width", "seed")}
    steps = {"num_inference_steps": KNOWN["steps"], "guidance_scale": KNOWN["guidance"]}
    return pipe(**size, **steps, output_type="latent", **how)


@pytest.mark.core("tiny.fbc_0.35")
@pytest.mark.parametrize("name", CACHED)
def test_first_block_equals_diffusers_in_its_steps_and_latents(full_pipe, name):
    run = KNOWN["runs"][name]
    made = reference_run(full_pipe, cache=f"first-block:{run['threshold']}")
    assert made.steps_computed == (tuple(run["computed"]),)
    assert made.records[0]["evaluations"] == len(run["computed"])
    assert_close(made.images, finals()[f"{name}.final"], 1e-4)


def renewed(self, first, known):
    """Compares with the last step, where the rule compares with the last computed one."""
    is_near, self.first = _FirstBlock._is_near(self, first, known), first
    return is_near


class Renewing(_FirstBlock):
    _is_near = renewed


@pytest.mark.slow
@pytest.mark.parametrize("mistake", ["ten percent higher", "compared with the last step"])
def test_mistakes_of_the_rule_exceed_the_tolerance(full_pipe, mistake, monkeypatch):
    if mistake == "compared with the last step":
        monkeypatch.setattr(caches, "_FirstBlock", Renewing)
    made = reference_run(full_pipe, cache=f"first-block:{0.132 if mistake == 'ten percent higher' else 0.12}")
    assert rel(made.images, finals()["tiny.fbc_0.12.final"]) > 1e-3


@pytest.mark.slow
def test_extrapolated_caches_are_nearer_to_the_full_run_than_repeating_ones(full_pipe):
    full = finals()["tiny.none.final"]
    caches = "first-block:0.12", "first-block:0.12:1"
    distance = {cache: rel(reference_run(full_pipe, cache=cache).images, full) for cache in caches}
    assert 0 < distance["first-block:0.12:1"] < 0.5 * distance["first-block:0.12"]
    skipped = reference_run(full_pipe, fast=True)
    assert skipped.steps_computed == (skip_steps(28),)
    assert 0 < rel(skipped.images, full) < 5e-3


def test_a_second_run_starts_with_an_empty_cache(pipe):
    """diffusers compares its second step with the last of the run before."""
    how = SMALL | {"cache": "first-block:0.3", "num_inference_steps": 6}
    one, two = (pipe(CAT, **how) for _ in range(2))
    assert one.steps_computed == two.steps_computed
    assert len(one.steps_computed[0]) < 6
    assert mx.array_equal(one.images, two.images)


def test_pictures_of_a_batch_and_halves_of_true_cfg_are_decided_apart(pipe):
    how = SMALL | {"cache": "first-block:0.3", "num_inference_steps": 6}
    together = pipe(CAT, **how | {"seed": [7, 8], "num_images_per_prompt": 2})
    apart = [pipe(CAT, **how | {"seed": seed}) for seed in (7, 8)]
    assert together.steps_computed == tuple(one.steps_computed[0] for one in apart)
    assert mx.array_equal(together.images, mx.concatenate([one.images for one in apart]))
    # a scale near 1 leaves the positive half's path as it is, and the negative half has its own decisions
    guided = pipe(CAT, negative_prompt="", true_cfg_scale=1.0001, **how)
    assert {*apart[0].steps_computed[0]} <= {*guided.steps_computed[0]}
    assert rel(guided.images, apart[0].images) < 1e-2


@pytest.mark.parametrize("cache", [None, "skip", "first-block:0.3:1"])
def test_streamed_runs_are_equal_and_skipped_steps_read_no_weights_or_one_block(model, pipe, cache, monkeypatch):
    how = SMALL | {"cache": cache, "num_inference_steps": 8}
    whole = pipe(CAT, **how)
    streamed, read = FluxPipeline.from_pretrained(model, memory="2GB"), []
    plan = streamed.plan(prompt=CAT, **how)
    streamed.memory = plan.least + 1
    assert streamed.plan(prompt=CAT, **how).resident_blocks == 0
    start = residency.Reader.read

    def reading(self, unit, buffer):
        is_block = unit.prefix.startswith(("double_blocks", "single_blocks"))
        if is_block and not unit.tensors[0][0].split(".")[0].endswith(("mod", "modulation")):
            read.append(unit.prefix)
        return start(self, unit, buffer)

    monkeypatch.setattr(residency.Reader, "read", reading)
    made = streamed(CAT, **how)
    assert mx.array_equal(made.images, whole.images)
    computed, blocks = len(made.steps_computed[0]), plan.total_blocks
    if cache != "first-block:0.3:1":
        assert len(read) == computed * blocks
        assert computed == (8 if cache is None else 6)
    else:
        assert 1 < computed < 8
        assert len(read) <= computed * blocks + (8 - computed) + 2  # the first block, and what was read ahead


@pytest.mark.parametrize("cache", ["skip", "first-block:0.3:1"])
def test_editing_takes_caches(kontext, pipe, cache):
    """Kontext's tokens take part in the signal, and what a mask keeps is restored after skipped steps too."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8))
    mask = Image.new("L", (48, 32))
    mask.paste(255, (0, 0, 16, 32))
    how = {
        "max_sequence_length": 8,
        "num_inference_steps": 7,
        "seed": 7,
        "output_type": "latent",
        "image": image,
        "width": 48,
        "height": 32,
    }
    edit = functools.partial(FluxPipeline.from_pretrained(kontext), CAT, **how, auto_resize=False)
    paint = functools.partial(pipe, CAT, **how, mask_image=mask, strength=1.0)
    for run in (edit, paint):
        full, made = run(), run(cache=cache)
        assert len(made.steps_computed[0]) < 7
        assert 0 < rel(made.images, full.images) < 0.1
    kept = np.array(made.images)[0].reshape(2, 3, 64)[:, 1:]
    assert np.array_equal(kept, np.array(full.images)[0].reshape(2, 3, 64)[:, 1:])


@pytest.mark.parametrize("cache", ["skip", "first-block:0.3:1"])
def test_adapters_take_caches_streamed_and_resumed_too(model, pipe, cache, monkeypatch):
    """The cached run is that of the adapted model: far nearer to its full run than the model without the adapter."""
    monkeypatch.setattr(checkpoint, "EVERY", 0)
    how = SMALL | {"num_inference_steps": 7}
    plain, adapted = pipe(CAT, **how), FluxPipeline.from_pretrained(model)
    adapted.load_lora_weights(files.reference("kohya"))
    full, made = adapted(CAT, **how), adapted(CAT, **how, cache=cache)
    assert len(made.steps_computed[0]) < 7
    assert 0 < rel(made.images, full.images) < 0.3 * rel(plain.images, full.images)
    again = stopped(adapted, 4, how | {"cache": cache})
    assert mx.array_equal(adapted(CAT, **how, cache=cache, checkpoint=again).images, made.images)
    again.remove()
    adapted.memory = adapted.plan(prompt=CAT, **how, cache=cache).least + 1
    assert mx.array_equal(adapted(CAT, **how, cache=cache).images, made.images)
    assert not adapted._generator.blocks.resident
    adapted.unload_lora_weights()
    assert mx.array_equal(adapted(CAT, **how, cache=cache).images, pipe(CAT, **how, cache=cache).images)


def test_first_block_in_float16_takes_the_same_steps_and_is_resumed_to_the_bit(model, pipe, monkeypatch):
    monkeypatch.setattr(checkpoint, "EVERY", 0)
    how = SMALL | {"num_inference_steps": 7, "cache": "first-block:0.3:1"}
    half, exact = FluxPipeline.from_pretrained(model, dtype="float16"), pipe(CAT, **how)
    made = half(CAT, **how)
    assert made.steps_computed == exact.steps_computed
    assert len(made.steps_computed[0]) < 7
    usual = rel(*(one(CAT, **how | {"cache": None}).images for one in (half, pipe)))
    assert 0 < rel(made.images, exact.images) < 2 * usual
    again = stopped(half, 4, how)
    assert {array.dtype.name for array in again.state().values()} == {"float32"}  # as the stream is
    assert mx.array_equal(half(CAT, **how, checkpoint=again).images, made.images)
    again.remove()


@pytest.mark.parametrize("cache", [None, "skip", "first-block:0.3"])
def test_progress_rises_to_the_last_step_whatever_is_skipped(pipe, cache):
    seen = []
    made = pipe(
        CAT,
        **SMALL,
        num_inference_steps=7,
        cache=cache,
        progress=lambda *where: where[0] == "denoise" and seen.append(where[1:]),
    )
    done = [one for one, _ in seen]
    assert done == sorted(done)
    assert {total for _, total in seen} == {7}
    assert done[-1] == 7
    gaps = np.diff([0, *done])
    assert gaps.max() <= 7 / 6  # with skip the 6 computed steps share the line; the others count as they come
    assert (len(made.steps_computed[0]) < 7) == bool(cache)


# --- resumed runs ---


def new_checkpoint(pipe) -> Checkpoint:
    return Checkpoint({"made_by": runs.made_by(pipe.folder)})


@pytest.mark.core("skip", "first block, order 1", "dpmpp_2m, skip, beta", "heun")
@pytest.mark.parametrize("name", MODES)
def test_a_run_that_stops_is_continued_to_the_same_bytes(pipe, name, monkeypatch):
    monkeypatch.setattr(checkpoint, "EVERY", 0)
    how = SMALL | {"num_inference_steps": 7} | MODES[name]
    whole = pipe(CAT, **how)
    assert (len(whole.steps_computed[0]) < 7 or how["num_inference_steps"] > 7) == ("cache" in how)
    again = stopped(pipe, 4, how)
    assert again.done == 4
    made = pipe(CAT, **how, checkpoint=again)
    assert mx.array_equal(made.images, whole.images)
    assert made.steps_computed == whole.steps_computed
    again.close()
    ended = Checkpoint.read(again.path)  # only decoding is left
    assert ended.is_denoised
    assert pipe(CAT, **how, checkpoint=ended).steps_computed == whole.steps_computed
    ended.remove()


def stopped(pipe, after: int, how: dict) -> Checkpoint:
    """The checkpoint of a run that was stopped after so many steps."""
    saved = new_checkpoint(pipe)

    def stop(pipe, step, timestep, kwargs):
        if step == after:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        pipe(CAT, **how, checkpoint=saved, callback_on_step_end=stop)
    saved.close()
    return Checkpoint.read(saved.path)


@pytest.mark.core("skip", "first block, order 1")
@pytest.mark.parametrize("name", MODES)
def test_a_run_that_stops_after_some_steps_predicts_the_picture_and_goes_on_to_the_same_bytes(pipe, name):
    how = SMALL | {"num_inference_steps": 7} | MODES[name]
    whole, saved = pipe(CAT, **how), new_checkpoint(pipe)
    seen = []
    stop = {"stop_after": 5, "checkpoint": saved, "progress": lambda *where: seen.append(where)}
    predicted = pipe(CAT, **how, **stop)
    total = how["num_inference_steps"]
    assert (saved.done, saved.total, seen[-1]) == (5, total, ("denoise", 5, 5))
    assert {step for steps in predicted.steps_computed for step in steps} <= {*range(5)}
    left = mx.array(saved.latents(whole.images.shape, total))
    assert 0 < rel(predicted.images, whole.images) < 0.8 * rel(left, whole.images)
    assert predicted.records[0]["stop_after"] == 5
    seen.clear()
    again = pipe(CAT, **how, **stop)  # only the decoding is repeated
    assert mx.array_equal(again.images, predicted.images)
    assert seen == []
    with pytest.raises(UsageError, match="`stop_after` is 4, and 5 steps are done; expected 6 or more"):
        pipe(CAT, **how, **stop | {"stop_after": 4})
    made = pipe(CAT, **how, checkpoint=saved)
    assert mx.array_equal(made.images, whole.images)
    assert made.steps_computed == whole.steps_computed
    assert made.records == whole.records
    saved.remove()


def test_state_of_16_bits_is_saved_to_the_bit(pipe_bf16, monkeypatch):
    monkeypatch.setattr(checkpoint, "EVERY", 0)
    how = SMALL | {"num_inference_steps": 7, "cache": "first-block:0.3:1"}
    again = stopped(pipe_bf16, 4, how)
    assert {array.dtype.name for array in again.state().values()} == {"float32", "uint16"}
    made = pipe_bf16(CAT, **how, checkpoint=again)
    assert mx.array_equal(made.images, pipe_bf16(CAT, **how).images)
    again.remove()


def test_the_state_of_another_run_is_refused(pipe, monkeypatch):
    monkeypatch.setattr(checkpoint, "EVERY", 0)
    how = SMALL | {"num_inference_steps": 8, "cache": "skip"}
    saved = new_checkpoint(pipe)
    saved.filters = "none"
    latents, state = np.zeros((1, 4, 64), np.float32), {"velocity.0": np.zeros((1, 9, 64), np.float32)}
    saved.save_step(3, 8, latents, state | {"computed": np.arange(3, dtype=np.float32)})
    saved.close()
    again = Checkpoint.read(saved.path)
    with pytest.raises(UsageError, match="holds the steps of another run"):
        pipe(CAT, **how, checkpoint=again)
    again.remove()
