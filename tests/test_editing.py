"""Kontext, Fill, control and inpainting against the reference's runs, with the order of their draws."""

import dataclasses
import functools
import runpy
import shutil

import adapters
import mlx.core as mx
import numpy as np
import pytest
from derived import EDIT, facts, goldens
from helpers import ROOT, edit_index, levels, psnr, rel
from pictures import is_right
from PIL import Image, ImageDraw

from mlx_flux_krea import FluxPipeline, Request, latents
from mlx_flux_krea.errors import UsageError
from mlx_flux_krea.generator import Generator
from mlx_flux_krea.inputs import canvas as canvases
from mlx_flux_krea.inputs.canvas import Canvas, fit_to, parse_borders
from mlx_flux_krea.inputs.reference import preferred_size, reference_size
from mlx_flux_krea.latents import Kept, Latents, _Drawing
from mlx_flux_krea.presets import KONTEXT_SIZES
from mlx_flux_krea.sampling import sampler

TASKS = ("kontext", "fill", "control")  # of a run, by the start of its name; else it is the base's
RECIPES = {"sample": "diffusers", "mean": "comfy"}  # what a run's name ends with: how it takes the posterior


RUNS = [name for name in facts()["runs"] if name.startswith(("kontext", "fill", "control", "inpaint_0", "inpaint_1"))]
RUNS += ["inpaint_cfg.sample", "inpaint_cfg.mean", "img2img_odd.sample", "img2img_odd.mean", "t2i_odd"]


def picture(name):
    return Image.open(EDIT / "images" / f"in_{name}.png")


@pytest.fixture(scope="module")
def pipes(request, tmp_path_factory):
    """Pipelines by task, in float32, with as many tokens of T5 as the reference's runs have."""
    folders = {"base": "model", "kontext": "kontext", "fill": "fill", "control": "control"}

    @functools.cache
    def opened(task, dtype="float32"):
        copy = shutil.copytree(request.getfixturevalue(folders[task]), tmp_path_factory.mktemp("full") / task)
        return FluxPipeline.from_pretrained(edit_index(copy, max_sequence_length=512), dtype=dtype)

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


@pytest.mark.core(
    "kontext_cfg", "fill_07.sample", "control_inpaint.sample", "control_nimg.mean", "inpaint_06.sample", others="parity"
)
@pytest.mark.parametrize("name", [name for name in RUNS if name != "kontext_auto"])
def test_runs_are_those_of_the_reference(pipes, name):
    check_run(pipes, name, 1e-4)


@pytest.mark.parity  # it takes a minute or more on this backend
def test_a_run_whose_reference_has_a_megapixel_is_that_of_the_reference(pipes):
    check_run(pipes, "kontext_auto", 3e-4)


def check_run(pipes, name, bar):
    made, images = run_latents(pipe_of(pipes, name), **arguments(name))
    golden = goldens()[f"{name}.latents"]
    assert len(made) == len(golden)
    assert max(rel(a.reshape(b.shape), b) for a, b in zip(made, golden, strict=True)) < bar
    for i, image in enumerate(images):
        reference = Image.open(EDIT / "images" / f"{name}.{i}.png")
        assert psnr(image, reference) > (45 if name.endswith(".mean") else 60)  # comfy cuts bytes off
        assert levels(image, reference) <= 1


# --- the image that comes back ---


def bordered(size=(40, 30), seed=0):
    """A noisy image, and a mask with a soft edge inside it."""
    image = Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))
    mask = Image.new("L", size)
    mask.paste(128, (9, 7, 31, 23))
    mask.paste(255, (10, 8, 30, 22))
    return image, mask


def outside(mask):
    return np.asarray(mask) == 0


@pytest.mark.parametrize("made", [np.uint8, np.float32])
def test_pixels_outside_a_mask_are_the_images_own_to_the_bit(made):
    image, mask = bordered()
    canvas = Canvas.of(image, mask)
    black = np.zeros((64, 80, 3), made)
    pasted = canvas.paste(black)
    own = np.asarray(image) if made is np.uint8 else np.asarray(image, np.float32) / np.float32(255)
    assert (pasted.dtype, pasted.shape) == (made, own.shape)
    assert np.array_equal(pasted[outside(mask)], own[outside(mask)])
    assert not pasted[12:18, 14:26].any()


def test_a_part_of_an_image_comes_back_where_it_was():
    image, mask = bordered((200, 120))
    canvas = Canvas.of(image, mask).cropped(64, 64, 5)
    left, top, right, bottom = canvas.box
    assert (left <= 4, top <= 2, right >= 36, bottom >= 28) == (True,) * 4
    assert abs((right - left) - (bottom - top)) <= 1
    pasted = canvas.paste(np.asarray(canvas.part(64, 64)))
    assert np.array_equal(pasted[outside(mask)], np.asarray(image)[outside(mask)])


def test_the_crop_and_the_overlay_are_those_of_the_reference(pipes, monkeypatch):
    monkeypatch.setattr(canvases, "seam", lambda mask, soft: mask)  # the reference has no softer one than its mask
    run = facts()["runs"]["inpaint_crop"]
    given = arguments("inpaint_crop") | {"padding_mask_crop": run["pad"], "paste": True}
    result = pipes("base")(**given)
    assert result.images[0].size == tuple(run["size_wh"])
    reference = Image.open(EDIT / "images" / "inpaint_crop.png")
    assert psnr(result.images[0], reference) > 55
    assert levels(result.images[0], reference) <= 1
    canvas = Canvas.of(picture("a"), picture("mask")).cropped(64, 64, run["pad"])
    assert list(canvas.box) == run["crop_xyxy"]


def test_borders_are_added_with_a_soft_inner_edge():
    image, _ = bordered((64, 48))
    canvas = Canvas.of(image).expanded(parse_borders("0,50%,0,16", 64, 48))
    assert canvas.image.size == (64 + 32 + 16, 48)
    mask = np.asarray(canvas.mask)
    assert (mask[:, :16].min(), mask[:, -32:].min()) == (255, 255)
    inner = mask[0, 16:80].astype(int)
    assert (np.diff(inner[:20]) <= 0).all()
    assert (inner[20:40] == 0).any()
    middle = np.asarray(canvas.image)[outside(canvas.mask)]
    assert np.array_equal(middle, np.asarray(image)[outside(mask[:, 16:80])])


@pytest.mark.parametrize(
    ("given", "borders"),
    [
        ("8", (8, 8, 8, 8)), ("8,16", (8, 16, 8, 16)), ("1,2,3,4", (1, 2, 3, 4)), ((1, 2, 3, 4), (1, 2, 3, 4)),
        ("10%", (10, 20, 10, 20)), ("0, 25 %, 0, 8px", (0, 50, 0, 8)), (5, (5, 5, 5, 5)),
    ],
)  # fmt: skip
def test_borders_are_written_as_in_css(given, borders):
    assert parse_borders(given, 200, 100) == borders


@pytest.mark.parametrize("given", ["", "a", "1,2,3", "-1", "1.5", "0", "0%,0", (1, 2, 3), {}, "1e3", "8 16"])
def test_other_borders_are_refused(given):
    with pytest.raises(UsageError, match="`expand` is"):
        parse_borders(given, 200, 100)


@pytest.mark.parametrize("fit", ["stretch", "crop", "pad"])
def test_only_stretch_changes_the_shape_of_an_image(fit):
    circle = Image.new("RGB", (120, 60))
    ImageDraw.Draw(circle).ellipse((40, 10, 80, 50), fill="white")
    seen = np.asarray(fit_to(circle, 64, 64, fit).convert("L")) > 127
    rows, columns = np.nonzero(seen.any(1))[0], np.nonzero(seen.any(0))[0]
    ratio = len(columns) / len(rows)
    assert (abs(ratio - 0.5) < 0.1) if fit == "stretch" else (abs(ratio - 1) < 0.1)


def test_a_soft_mask_is_a_schedule_and_a_hard_one_is_rounded():
    image, mask = bordered()
    hard, soft = (Canvas.of(image, mask).repainted(40, 30, soft=soft) for soft in (False, True))
    assert set(np.unique(hard)) == {0.0, 1.0}
    assert hard[7, 9] == 1  # 128 of 255 is rounded up, as diffusers does
    assert np.isclose(soft[7, 9], 128 / 255)
    clean, noise = mx.zeros((1, 3, 4)), mx.zeros((1, 3, 4))
    kept = Kept(clean, noise, mx.broadcast_to(mx.array([0.0, 0.5, 1.0])[None, :, None], (1, 3, 4)))
    changed = [kept.restore(mx.ones((1, 3, 4)), 0.5, 1 - (step + 1) / 4)[0, :, 0].tolist() for step in range(4)]
    assert changed == [[0, 0, 1], [0, 0, 1], [0, 1, 1], [0, 1, 1]]


# --- sizes ---


def test_references_have_the_sizes_of_the_reference():
    for row in facts()["kontext_reference_sizes"]:
        size = row["image_width"], row["image_height"]
        if "error" in row:
            with pytest.raises(UsageError):
                reference_size(*size, 16, auto_resize=row["auto_resize"])
        else:
            found = reference_size(*size, 16, auto_resize=row["auto_resize"])
            assert found == (row["width"], row["height"]), size
    assert [list(size) for size in KONTEXT_SIZES] == facts()["kontext_preferred_wh"]


def test_a_picture_of_kontext_has_its_references_shape_unless_a_size_is_given(pipes):
    folder = pipes("kontext").folder
    wide = Image.new("RGB", (1600, 900))
    made = [Request(prompt="a", image=wide, **size).resolve(folder) for size in ({}, {"width": 512, "height": 512})]
    assert [(one.width, one.height) for one in made] == [(1392, 752), (512, 512)]
    assert made[1].inputs.sizes == ((1392, 752),)
    assert made[1].inputs.fit == "crop"
    assert preferred_size(1, 1) == (1024, 1024)


# --- what does not go together ---

IMAGE, MASK = Image.new("RGB", (64, 64)), Image.new("L", (64, 64), 255)


@pytest.mark.parametrize(
    ("task", "given", "says"),
    [
        ("base", {"image": [IMAGE, IMAGE]}, "only FLUX.1 Kontext reads several"),
        ("base", {"mask_image": MASK}, "`mask_image` does nothing without an image"),
        ("base", {"expand": 8}, "`expand` does nothing without an image"),
        ("base", {"fit": "crop"}, "`fit` does nothing without an image"),
        ("base", {"image": IMAGE, "fit": "cut"}, "one of stretch, crop, pad"),
        ("base", {"soft_mask": True}, "`soft_mask` does nothing without an image and a mask"),
        ("base", {"image": IMAGE, "paste": False}, "`paste` does nothing without a mask"),
        ("base", {"image": IMAGE, "padding_mask_crop": 8}, "`padding_mask_crop` does nothing without a mask"),
        ("base", {"image": IMAGE, "mask_image": Image.new("L", (64, 64))}, "the mask is black"),
        ("base", {"image": IMAGE, "auto_resize": False}, "`auto_resize` is for references"),
        ("base", {"control_image": IMAGE}, "`control_image` means nothing to this model"),
        ("base", {"image": IMAGE, "mask_image": MASK, "soft_mask": "yes"}, "True or False"),
        ("kontext", {"image": IMAGE, "mask_image": MASK}, "`mask_image` means nothing to a Kontext model"),
        ("kontext", {"image": IMAGE, "strength": 0.5}, "`strength` means nothing to a Kontext model"),
        ("kontext", {"image": [IMAGE] * 5}, "holds 5 images"),
        ("kontext", {"image": Image.new("RGB", (900, 100))}, "a shape up to 8:1"),
        ("fill", {}, "this model fills an image, and there is none"),
        ("fill", {"image": IMAGE}, "there is no `mask_image`"),
        ("fill", {"image": IMAGE, "mask_image": MASK, "soft_mask": True}, "`soft_mask` means nothing to a Fill model"),
        ("fill", {"image": IMAGE, "mask_image": MASK, "control_image": IMAGE}, "`control_image` means nothing"),
        ("control", {}, "there is no `control_image`"),
        ("control", {"image": IMAGE}, "there is no `control_image`"),
    ],
)
def test_images_that_do_not_go_together_are_refused(pipes, task, given, says):
    with pytest.raises(UsageError, match=says):
        pipes(task)("a", num_inference_steps=1, width=64, height=64, seed=1, **given)


# --- BFL's control adapter ---


@pytest.mark.core("clora_4.sample", others="parity")
@pytest.mark.parametrize("name", ["clora_4.sample", "clora_4.mean"])
def test_a_control_adapter_makes_a_control_model_of_the_base(full_model, name):
    pipe = FluxPipeline.from_pretrained(full_model, dtype="float32")
    pipe.load_lora_weights(adapters.reference("control_bfl"), adapter_name="edges")
    made, _ = run_latents(pipe, **arguments(name))
    assert rel(made.reshape(goldens()[f"{name}.latents"].shape), goldens()[f"{name}.latents"]) < 1e-4
    with pytest.raises(UsageError, match="a control adapter is in use, and there is no `control_image`"):
        pipe("a", num_inference_steps=1, width=64, height=64)
    pipe.set_adapters("edges", 0.0)
    with pytest.raises(UsageError, match="`control_image` means nothing to this model"):
        pipe(**arguments(name))


# --- in memory or streamed, and in 16 bits ---

SHORT = {"kontext": "kontext_4", "fill": "fill_4.sample", "control": "control_4.sample"}


@pytest.mark.core("kontext", others="parity")
@pytest.mark.parametrize("task", SHORT)
def test_streamed_is_resident_to_the_bit(pipes, task):
    whole, _ = run_latents(pipes(task), **arguments(SHORT[task]))
    streamed = FluxPipeline.from_pretrained(pipes(task).folder.path, dtype="float32")
    streamed.memory = streamed.plan(**arguments(SHORT[task])).least
    read, _ = run_latents(streamed, **arguments(SHORT[task]))
    plan = streamed.plan(**arguments(SHORT[task]))
    assert plan.resident_blocks < plan.total_blocks
    assert np.array_equal(np.array(whole), np.array(read))


@pytest.mark.core("fill_4.sample", others="parity")
@pytest.mark.parametrize("name", [*SHORT.values(), "inpaint_06.sample"])
def test_in_bfloat16_runs_stay_near_the_reference(pipes, name):
    task = next((task for task in TASKS if name.startswith(task)), "base")
    made, _ = run_latents(pipes(task, "bfloat16"), **arguments(name))
    assert rel(made[-1:].reshape(goldens()[f"{name}.latents"][-1].shape), goldens()[f"{name}.latents"][-1]) < 0.05


# --- mistakes that the tolerance must tell ---


def patched(owner, name, change):
    """A mistake: a function of ours replaced by one that calls it otherwise."""

    def make(monkeypatch):
        own = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **more: change(own, *args, **more))

    return make


def swapped_ids(own, text_length, width, height, references=()):
    ids = own(text_length, width, height, references)
    ids[:, 0] = 0
    return ids


def going_on(own, text_length, width, height, references=()):
    ids = own(text_length, width, height, references)
    return mx.where(ids[:, :1] > 0, ids + mx.array([0, height // 2, 0]), ids)


def unscaled(own, self, z):
    return z


def sampled(own, self, image):
    mean, deviation = own(self, image)
    return mean + deviation * mx.random.normal(mean.shape, key=mx.random.key(0)), deviation


def mean_alone(own, self, image):
    mean, deviation = own(self, image)
    return mean, 0 * deviation


def soft(own, self, width, height, *, soft=False):
    return own(self, width, height, soft=True)


def inverted(own, self, width, height, *, soft=False):
    return 1 - own(self, width, height, soft=soft)


def averaged(own, self, inputs):
    return own(self, dataclasses.replace(inputs, soft=True))


def unblended(own, self, latents, sigma, left):
    return latents


def blended_now(own, self, latents, sigma, left):
    return own(self, latents, min(1.0, sigma + 0.15), left)


def condition_first(own, self, latents, i):
    return mx.concatenate([self.channels[:1], latents], axis=-1)


def noise_at_once(own, clean, noise, sigma):
    return noise


def of_all_tokens(own, schedule, length, steps, sigmas=()):
    return own(schedule, 2 * length, steps, sigmas)


def positive_alone(own, self, request, uses):
    return dataclasses.replace(own(self, request, uses), negative=[])


def at_centres(own, self, width, height, side, *, soft=False):
    return self.repainted(width, height, soft=soft)[side // 2 :: side, side // 2 :: side].copy()


def uncut(own, self, inputs, part):
    channels = own(self, inputs, part)
    whole = sampler.pack(self._scaled(self._posterior(part)[0]))
    return mx.concatenate([whole, channels[..., 64:]], axis=-1)


def turned_pixels(own, self, inputs, part):
    channels = own(self, inputs, part)
    mask = channels[..., 64:].reshape(*channels.shape[:2], 8, 8, 4).swapaxes(2, 3).reshape(*channels.shape[:2], 256)
    return mx.concatenate([channels[..., :64], mask], axis=-1)


def black(own, self, inputs, part):
    channels = own(self, inputs, part)
    return mx.concatenate([channels[..., :64] - 1, channels[..., 64:]], axis=-1)


def packed_otherwise(own, self, inputs, part):
    channels = own(self, inputs, part)
    mask = channels[..., 64:].reshape(*channels.shape[:2], 64, 4).swapaxes(-1, -2).reshape(*channels.shape[:2], 256)
    return mx.concatenate([channels[..., :64], mask], axis=-1)


def reversed_channels(own, image, width, height):
    return own(image, width, height)[..., ::-1]


MISTAKES = {
    "kontext: first axis 0": ("kontext_4", patched(sampler, "position_ids", swapped_ids)),
    "kontext: rows go on": ("kontext_4", patched(sampler, "position_ids", going_on)),
    "kontext: bicubic": ("kontext_4", lambda m: m.setattr(canvases, "_LANCZOS", Image.Resampling.BICUBIC)),
    "kontext: bilinear": ("kontext_4", lambda m: m.setattr(canvases, "_LANCZOS", Image.Resampling.BILINEAR)),
    "kontext: sample": ("kontext_4", patched(_Drawing, "_posterior", sampled)),
    "kontext: no shift and scale": ("kontext_4", patched(_Drawing, "_scaled", unscaled)),
    "kontext: mu of all tokens": ("kontext_4", patched(sampler, "make_sigmas", of_all_tokens)),
    "kontext: true CFG left out": ("kontext_cfg", patched(Generator, "_conditions", positive_alone)),
    "fill: mask (pw ph)": ("fill_4.sample", patched(_Drawing, "_fill", turned_pixels)),
    "fill: hole not cut": ("fill_4.mean", patched(_Drawing, "_fill", uncut)),
    "fill: mask inverted": ("fill_4.sample", patched(Canvas, "repainted", inverted)),
    "fill: mask soft": ("fill_4.sample", patched(Canvas, "repainted", soft)),
    "fill: mask packed (ph pw c)": ("fill_4.sample", patched(_Drawing, "_fill", packed_otherwise)),
    "fill: hole black": ("fill_4.sample", patched(_Drawing, "_fill", black)),
    "fill: condition first": ("fill_4.sample", patched(Latents, "around", condition_first)),
    "fill: mean": ("fill_4.sample", patched(_Drawing, "_posterior", mean_alone)),
    "control: condition first": ("control_4.sample", patched(Latents, "around", condition_first)),
    "control: mean": ("control_4.sample", patched(_Drawing, "_posterior", mean_alone)),
    "control: channels reversed": ("control_nimg.sample", patched(latents, "pixels_from_image", reversed_channels)),
    "control: no shift and scale": ("control_4.sample", patched(_Drawing, "_scaled", unscaled)),
    "control, image to image: pure noise": ("control_i2i.sample", patched(sampler, "add_noise", noise_at_once)),
    "control, inpainting: no blending": ("control_inpaint.sample", patched(Kept, "restore", unblended)),
    "control, inpainting: mask averaged": ("control_inpaint.sample", patched(_Drawing, "_mask", averaged)),
    "control, inpainting: mask inverted": ("control_inpaint.sample", patched(Canvas, "repainted", inverted)),
    "control, inpainting: another sigma": ("control_inpaint.sample", patched(Kept, "restore", blended_now)),
    "control, inpainting: mean": ("control_inpaint.sample", patched(_Drawing, "_posterior", mean_alone)),
    "control, image to image: mean": ("control_i2i.sample", patched(_Drawing, "_posterior", mean_alone)),
    "image to image: mean": ("img2img_odd.sample", patched(_Drawing, "_posterior", mean_alone)),
    "image to image: pure noise": ("img2img_odd.sample", patched(sampler, "add_noise", noise_at_once)),
    "inpainting: pure noise": ("inpaint_06.sample", patched(sampler, "add_noise", noise_at_once)),
    "inpainting: mask soft": ("inpaint_06.sample", patched(Canvas, "repainted", soft)),
    "inpainting: mask from centres": ("inpaint_06.sample", patched(Canvas, "grid", at_centres)),
    "inpainting: mask inverted": ("inpaint_06.sample", patched(Canvas, "repainted", inverted)),
    "inpainting: mask averaged": ("inpaint_06.sample", patched(_Drawing, "_mask", averaged)),
    "inpainting: no blending": ("inpaint_06.sample", patched(Kept, "restore", unblended)),
    "inpainting: another sigma": ("inpaint_06.sample", patched(Kept, "restore", blended_now)),
    "inpainting: mean": ("inpaint_06.sample", patched(_Drawing, "_posterior", mean_alone)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.core("kontext: bicubic", "inpainting: mask averaged", others="parity")
def test_each_mistake_exceeds_the_tolerance(pipes, mistake, monkeypatch):
    name, make = MISTAKES[mistake]
    make(monkeypatch)
    made, _ = run_latents(pipe_of(pipes, name), **arguments(name))
    golden = goldens()[f"{name}.latents"][-1]
    assert rel(made[-1].reshape(golden.shape), golden) > (3e-4 if "mu of all" in mistake else 1e-3)


@pytest.mark.core("control_4.sample", others="parity")
@pytest.mark.parametrize("name", ["fill_4.sample", "control_4.sample", "control_inpaint.sample", "inpaint_06.sample"])
def test_the_order_of_the_draws_decides_the_picture(pipes, name, monkeypatch):
    """Noise first, as one would draw it."""
    own = _Drawing.__init__

    def noise_first(self, *args):
        own(self, *args)
        self._streams[0].normal(self._shape)

    monkeypatch.setattr(_Drawing, "__init__", noise_first)
    made, _ = run_latents(pipe_of(pipes, name), **arguments(name))
    golden = goldens()[f"{name}.latents"][-1]
    assert rel(made[-1].reshape(golden.shape), golden) > 0.1


# --- plans ---


def test_a_plan_counts_references_and_the_pixels_of_images(pipes):
    size = {"prompt": "a", "width": 64, "height": 64}
    plain, one, two = (pipes("kontext").plan(**size, image=given) for given in (None, IMAGE, [IMAGE, IMAGE]))
    assert plain.stages["denoise"] < one.stages["denoise"] < two.stages["denoise"]
    assert "image" not in plain.stages
    big = Image.new("RGB", (3000, 2000))
    with_image = pipes("base").plan(**size, image=big, mask_image=Image.new("L", big.size, 255))
    assert with_image.stages["denoise"] - pipes("base").plan(**size).stages["denoise"] > 2 * 6_000_000


def test_the_plan_of_a_kontext_folder_has_a_reference(command, kontext):
    code, out, err = command("plan", kontext, "--width", "64", "--height", "64")
    assert code == 0, err
    assert "with a reference of 1024 x 1024" in out


# --- the small model ---

PAGE = runpy.run_path(str(ROOT / "docs" / "make.py"))


@pytest.mark.slow
def test_the_commands_of_the_page_repaint_and_widen_as_asked_and_keep_the_rest_to_the_bit(command, tmp_path):
    PAGE["draw_mask"](tmp_path / "mask.png")
    for words in PAGE["editing_commands"]():
        code, _, err = command(*words[1:])
        assert code == 0, err
    names = ("two", "star", "one", "wide", "mask")
    two, star, one, wide, mask = (np.asarray(Image.open(f"{name}.png")) for name in names)
    assert is_right(Image.fromarray(star), [("circle", "red"), ("star", "yellow")], "white")
    assert np.array_equal(star[mask == 0], two[mask == 0])
    assert is_right(Image.fromarray(wide), [("circle", "red"), ("star", "blue")], "white")
    assert wide.shape == (64, 128, 3)
    assert np.array_equal(wide[:, : 64 - 16], one[:, : 64 - 16])
