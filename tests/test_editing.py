"""Kontext, Fill, control and inpainting against the reference's runs, with the order of their draws."""

import functools
import json

import mlx.core as mx
import pytest
from helpers import REFERENCE, levels, psnr, rel
from PIL import Image

from mlx_flux_krea import FluxPipeline

EDIT = REFERENCE / "edit"
TASKS = {
    "kontext": "kontext",
    "fill": "fill",
    "control": "control",
}  # of a run, by the start of its name; else the base
RECIPES = {"sample": "diffusers", "mean": "comfy"}  # what a run's name ends with: how it takes the posterior


@functools.cache
def goldens():
    return mx.load(str(EDIT / "goldens.safetensors"))


@functools.cache
def facts():
    return json.loads((EDIT / "goldens.json").read_text())


RUNS = [name for name in facts()["runs"] if name.startswith(("kontext", "fill", "control", "inpaint_0", "inpaint_1"))]
RUNS += ["inpaint_cfg.sample", "inpaint_cfg.mean", "img2img_odd.sample", "img2img_odd.mean", "t2i_odd"]


def picture(name):
    return Image.open(EDIT / "images" / f"in_{name}.png")


@pytest.fixture(scope="module")
def pipes(request):
    """Pipelines by task, in float32."""
    folders = {"base": "model", "kontext": "kontext", "fill": "fill", "control": "control"}

    @functools.cache
    def opened(task, dtype="float32"):
        return FluxPipeline.from_pretrained(request.getfixturevalue(folders[task]), dtype=dtype)

    return opened


def arguments(name):
    """The call of a run, in our arguments."""
    run = facts()["runs"][name]
    given = {
        "prompt": run["prompts"][0],
        "seed": run["seed"],
        "num_inference_steps": run["steps"],
        "guidance_scale": run["g"],
        "num_images_per_prompt": run.get("n", 1),
        "width": run.get("output_width", run["w"]),
        "height": run.get("output_height", run["h"]),
        "noise": RECIPES[name.rpartition(".")[2]] if name.endswith((".sample", ".mean")) else "diffusers",
    }
    if "cfg" in run:
        given |= {"true_cfg_scale": run["cfg"], "negative_prompt": run["call"]["negative_prompt"][0]}
    if "strength" in run:
        given["strength"] = run["strength"]
    if "control" in run:
        given["control_image"] = picture(run["control"])
    if "image" in run:
        given["image"] = picture(run["image"])
    if "mask" in run:
        given |= {"mask_image": picture(run["mask"]), "paste": False}
    if name.startswith("kontext"):
        given |= {"auto_resize": run["auto"], "fit": "stretch"}
    return given


def run_latents(pipe, **given):
    """Latents after each step, and the pictures."""
    after = []
    result = pipe(callback_on_step_end=lambda p, s, t, k: after.append(k["latents"]), **given)
    return mx.stack(after), result.images


def pipe_of(pipes, name):
    return pipes(next((task for task in TASKS if name.startswith(task)), "base"))


@pytest.mark.parametrize("name", RUNS)
def test_runs_are_those_of_the_reference(pipes, name):
    latents, images = run_latents(pipe_of(pipes, name), **arguments(name))
    golden = goldens()[f"{name}.latents"]
    assert len(latents) == len(golden)
    bar = 3e-4 if name == "kontext_auto" else 1e-4
    assert max(rel(a.reshape(b.shape), b) for a, b in zip(latents, golden, strict=True)) < bar
    for i, image in enumerate(images):
        reference = Image.open(EDIT / "images" / f"{name}.{i}.png")
        assert psnr(image, reference) > (
            60 if not name.endswith(".mean") else 45
        )  # its bytes are rounded, ours cut off
        assert levels(image, reference) <= 1
