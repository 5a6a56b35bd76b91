"""Editing with a model that requires filters: images as the networks see them, and the picture as it comes back."""

import judges
import numpy as np
import pytest
from helpers import rel
from PIL import Image
from test_gate import files, filters, log, out, waiting  # noqa: F401  # fixtures

from mlx_flux_krea import FluxPipeline, generator
from mlx_flux_krea.errors import UsageError, Withheld
from mlx_flux_krea.models.vae import pixels_from_image

SIZE, GIVEN = (67, 45), {"prompt": "a cat", "num_inference_steps": 1, "seed": 1, "width": 64, "height": 48}
RED = Image.new("RGB", SIZE, (255, 0, 0))


def noisy(seed=0, size=SIZE):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


MASK = Image.new("L", SIZE)
MASK.paste(255, (10, 8, 50, 40))
ROLES = {  # task, arguments, and how many images are judged
    "image": ("base", {"image": noisy(), "strength": 1.0}, 1),
    "mask": ("base", {"image": noisy(), "mask_image": MASK}, 1),
    "part": ("base", {"image": noisy(), "mask_image": MASK, "padding_mask_crop": 4}, 1),
    "expand": ("fill", {"image": noisy(), "expand": "8,16"}, 1),
    "fill": ("fill", {"image": noisy(), "mask_image": MASK, "padding_mask_crop": 4}, 1),
    "references": ("kontext", {"image": [noisy(), noisy(1)], "auto_resize": False}, 2),
    "control": ("control", {"control_image": noisy(), "image": noisy(1), "mask_image": MASK, "fit": "pad"}, 2),
}


@pytest.fixture
def opened(request, filters):  # noqa: F811
    names = {"base": "model", "kontext": "kontext", "fill": "fill", "control": "control"}

    def open_pipe(task, check="filters"):
        return FluxPipeline.from_pretrained(request.getfixturevalue(names[task]), check=check, dtype="float32")

    return open_pipe


@pytest.fixture
def judged(monkeypatch):
    """Every picture that the eye has looked at, in order."""
    seen, look = [], judges.Eye.images

    def look_and_keep(self, pixels):
        seen.extend(pixels)
        return look(self, pixels)

    monkeypatch.setattr(judges.Eye, "images", look_and_keep)
    return seen


@pytest.mark.core("control")
@pytest.mark.parametrize("role", ROLES)
def test_what_the_encoder_reads_is_what_was_judged_and_what_is_released_too(opened, judged, monkeypatch, role):
    task, given, count = ROLES[role]
    read, make = [], generator.make_latents

    def keep(request, sigma, vae, dtype, encode):
        return make(request, sigma, vae, dtype, lambda pixels: read.append(pixels) or encode(pixels))

    monkeypatch.setattr(generator, "make_latents", keep)
    result = opened(task)(**GIVEN, **given)
    *inputs, released = judged[-count - 1 :]
    seen = [pixels_from_image(Image.fromarray(one), one.shape[1], one.shape[0]) for one in inputs]
    holes = [one for one in read if not any(one.shape == own.shape and rel(one, own) == 0 for own in seen)]
    assert len(holes) == (1 if task == "fill" else 0)  # the masked image, of which the whole was judged
    assert len(read) - len(holes) == count
    assert np.array_equal(released, np.asarray(result.images[0]))
    assert result.outcomes == ("released",)


@pytest.mark.core("references")
@pytest.mark.parametrize("role", ROLES)
def test_a_flagged_image_in_any_role_stops_before_a_weight_is_read(opened, monkeypatch, home, role):
    task, given, _ = ROLES[role]
    monkeypatch.setattr("mlx_flux_krea.weights.NetworkFolder.load", lambda *args: pytest.fail("weights were loaded"))
    images = [name for name in ("image", "control_image") if name in given]
    for name in images:
        bad = [noisy(), RED] if role == "references" else RED
        with pytest.raises(Withheld, match="the input image was withheld"):
            opened(task)(**GIVEN, **given | {name: bad})
    assert [entry["event"] for entry in log(home)].count("input_flagged") == len(images)
    assert waiting() == []


def test_the_whole_picture_is_judged_where_its_part_alone_is_generated(opened, home):
    """Its part passes, and the rest of the image does not."""
    image = RED.resize((670, 450))
    image.paste(noisy(size=(80, 80)), (20, 20))
    mask = Image.new("L", image.size)
    mask.paste(255, (40, 40, 80, 80))
    result = opened("base")(**GIVEN | {"height": 64}, image=image, mask_image=mask, padding_mask_crop=4)
    assert (result.images, result.outcomes[0][:8]) == ([], "withheld")
    events = [entry["event"] for entry in log(home)]
    assert events[events.index("input_passed") :].count("released") == 0


def test_a_pasted_picture_waits_for_review_in_its_own_size(opened, home):
    result = opened("fill", "review")(**GIVEN, image=noisy(), mask_image=MASK, padding_mask_crop=4)
    assert (result.images, result.outcomes, waiting()) == ([], ("waiting",), ["waiting"])
    (kept,) = (home / "quarantine").rglob("*.png")
    made, own = np.asarray(Image.open(kept).convert("RGB")), np.asarray(noisy())
    assert np.array_equal(made[np.asarray(MASK) == 0], own[np.asarray(MASK) == 0])
    assert (made != own).any()


@pytest.mark.slow
def test_arrays_of_a_filtered_model_are_those_that_were_judged(opened, judged):
    pixels = opened("base")(**GIVEN, image=noisy(), mask_image=MASK, padding_mask_crop=4, output_type="np").images
    assert pixels.shape == (1, *SIZE[::-1], 3)
    assert np.array_equal(np.round(pixels[0] * 255).astype(np.uint8), judged[-1])


@pytest.mark.core("fill")
@pytest.mark.parametrize("task", ["fill", "control"])
def test_a_prompt_is_encoded_without_the_images_that_a_run_needs(request, task):
    pipe = FluxPipeline.from_pretrained(request.getfixturevalue(task), dtype="float32")
    embeds, pooled = pipe.encode_prompt("a cat")
    given = {name: value for name, value in GIVEN.items() if name != "prompt"}
    images = ROLES[task][1]
    own = pipe(prompt_embeds=embeds, pooled_prompt_embeds=pooled, **given, **images).images[0]
    assert np.array_equal(np.asarray(own), np.asarray(pipe(**GIVEN, **images).images[0]))
    with pytest.raises(UsageError, match="there is no"):
        pipe(**GIVEN)
