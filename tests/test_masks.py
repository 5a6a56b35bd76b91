"""Masks of every kind, and what is left of them at the size of a picture; images that a strip or a hole makes hard."""

import resource
import sys
import tracemalloc

import numpy as np
import pytest
from helpers import edit_json
from PIL import Image
from test_maps import KINDS

from mlx_flux_krea import Request
from mlx_flux_krea.errors import UsageError
from mlx_flux_krea.inputs.canvas import Canvas, fit_to, open_mask, parse_borders
from mlx_flux_krea.inputs.image import filled, open_image
from mlx_flux_krea.weights import open_model

SIZE = (67, 45)  # no multiple of 16


def noisy(size=SIZE, mode="RGB"):
    shape = (size[1], size[0], 3) if mode == "RGB" else size[::-1]
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, shape, np.uint8))


def masked(*box, value=255, size=SIZE):
    mask = Image.new("L", size)
    mask.paste(value, box)
    return mask


def with_alpha(alpha, size=SIZE):
    image = noisy(size)
    image.putalpha(alpha)
    return image


@pytest.fixture(scope="module")
def folders(request):
    """Model folders by task."""
    names = {"base": "model", "kontext": "kontext", "fill": "fill"}
    return {task: open_model(request.getfixturevalue(name)) for task, name in names.items()}


def resolved(folder, **given):
    return Request(prompt="a", num_inference_steps=2, seed=1, **{"width": 64, "height": 48} | given).resolve(folder)


# --- what is left of a mask ---


@pytest.mark.parametrize(
    ("task", "given", "says"),
    [
        ("base", {"mask_image": masked(10, 10, 40, 30, value=127)}, "dark, 127 of 255 .*`soft_mask` repaints grey"),
        ("base", {"mask_image": masked(33, 22, 34, 23)}, "the mask is too small or too thin: nothing is repainted"),
        ("base", {"mask_image": masked(0, 20, 67, 21)}, "too thin: .*`padding_mask_crop` generates its surroundings"),
        ("fill", {"mask_image": masked(300, 200, 301, 201, size=(670, 450))}, "the mask is too small or too thin"),
        ("base", {"mask_image": masked(0, 0, 6, 45), "fit": "crop", "width": 32}, "outside of the part"),
        ("base", {"mask_image": masked(0, 0, 9, 9, value=1)}, "the mask is dark, 1 of 255"),
        ("base", {"image": with_alpha(masked(0, 0, 67, 44)), "mask_image": None}, "transparent part of the image, its"),
    ],
)  # fmt: skip
def test_a_mask_of_which_nothing_is_left_is_refused(folders, task, given, says):
    with pytest.raises(UsageError, match=says):
        resolved(folders[task], **{"image": noisy(), "width": 64, "height": 48} | given)


@pytest.mark.parametrize(
    ("task", "given"),
    [
        ("base", {"mask_image": masked(33, 22, 34, 23), "padding_mask_crop": 0}),
        ("base", {"mask_image": masked(33, 22, 34, 23), "padding_mask_crop": 5}),
        ("base", {"mask_image": masked(10, 10, 40, 30, value=100), "soft_mask": True}),
        ("base", {"mask_image": masked(33, 22, 34, 23), "soft_mask": True}),
        ("fill", {"mask_image": masked(0, 20, 67, 21)}),
        ("fill", {"mask_image": masked(33, 22, 35, 24)}),
        ("base", {"mask_image": masked(0, 0, 67, 45)}),
        ("base", {"mask_image": masked(57, 35, 67, 45), "padding_mask_crop": 500}),
    ],
)  # fmt: skip
def test_small_and_soft_masks_that_repaint_something_are_taken(folders, task, given):
    inputs = resolved(folders[task], image=noisy(), **given).inputs
    assert inputs.canvas.repainted(64, 48, soft=inputs.soft).any()


@pytest.mark.parametrize("soft", [False, True])
def test_an_image_that_is_nearly_opaque_has_no_mask_of_its_own(folders, soft):
    faint = with_alpha(Image.new("L", SIZE, 200))
    if soft:
        assert resolved(folders["base"], image=faint, soft_mask=True).inputs.is_masked
        return
    request = resolved(folders["base"], image=faint)
    assert (request.inputs.is_masked, request.strength, "mask_image" in request.record(0)) == (False, 0.6, False)
    with pytest.raises(UsageError, match="there is no `mask_image`"):
        resolved(folders["fill"], image=faint)


def test_a_mask_from_memory_is_upright_and_flat_as_its_image_is():
    turned = Image.Exif()
    turned[0x112] = 6
    mask = masked(0, 0, 30, 45)
    mask.info["exif"] = turned.tobytes()
    assert np.array_equal(np.asarray(open_mask(mask)), np.rot90(np.asarray(mask), -1))
    shown = masked(0, 0, 67, 45)
    shown.info["transparency"] = 255
    assert not np.asarray(open_mask(shown)).any()
    with pytest.raises(UsageError, match="at least one pixel"):
        open_mask(Image.new("L", (0, 5)))


def test_a_mask_that_is_drawn_on_the_upright_picture_lies_on_a_turned_photo(tmp_path):
    upright, mask = noisy(), masked(10, 5, 40, 30)
    turned = Image.Exif()
    turned[0x112] = 6
    upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.png", exif=turned.tobytes())
    inputs = Request(prompt="a", image=tmp_path / "a.png", mask_image=mask)
    assert np.array_equal(np.asarray(inputs.image), np.asarray(upright))
    pasted = Canvas.of(inputs.image, inputs.mask_image).paste(np.zeros((48, 64, 3), np.uint8))
    outside = np.asarray(mask) == 0
    assert np.array_equal(pasted[outside], np.asarray(upright)[outside])


# --- images of every kind ---

ROLES = {  # task, and the arguments beside the image in that role
    "image": ("base", lambda image: {"image": image}),
    "image of a mask": ("base", lambda image: {"image": image, "mask_image": Image.new("L", (8, 8), 255)}),
    "image that is filled": ("fill", lambda image: {"image": image, "mask_image": Image.new("L", (8, 8), 255)}),
    "reference": ("kontext", lambda image: {"image": image}),
    "second reference": ("kontext", lambda image: {"image": [Image.new("RGB", (48, 36)), image]}),
    "mask": ("base", lambda image: {"image": Image.new("RGB", (48, 36)), "mask_image": image}),
}

REFERENCES, STRIPS = ("reference", "second reference"), ("a strip", "a column")


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("kind", KINDS)
def test_images_of_every_kind_are_upright_and_flat_in_every_role(folders, kind, role, tmp_path):
    """Control images and style images have tables of their own: test_maps.py and test_style.py."""
    make, size = KINDS[kind]
    task, given = ROLES[role]
    arguments = given(make(tmp_path / "photo.png"))
    says = {("one pixel", "mask"): "drawn in a dark colour"} | {
        (strip, r): "8:1" for strip in STRIPS for r in REFERENCES
    }
    if refused := says.get((kind, role)):
        with pytest.raises(UsageError, match=refused):
            resolved(folders[task], **arguments)
        return
    made = resolved(folders[task], **arguments).inputs
    opened = made.given[{"mask": "mask_image", "second reference": "image_2"}.get(role, "image")]
    assert (opened.size, opened.mode) == (size, "L" if role == "mask" else "RGB")
    assert [seen.mode for _, seen in made.seen(64, 48)] == ["RGB"] * (2 if role == "second reference" else 1)


# --- sizes and borders ---


def test_a_strip_is_cropped_in_bounded_memory():
    strip = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 20000, 3), np.uint8))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    cropped = fit_to(strip, 1024, 1024, "crop")  # the whole of it at this height takes 3 GB
    assert np.array_equal(np.asarray(cropped), np.asarray(strip.resize((1024, 1024), 1, box=(9990, 0, 10010, 20))))
    small = fit_to(strip.crop((0, 0, 1000, 20)), 64, 64, "crop")
    whole = strip.crop((0, 0, 1000, 20)).resize((3200, 64), 1).crop((1568, 0, 1632, 64))
    assert np.abs(np.asarray(small, int) - np.asarray(whole, int)).mean() < 2
    now, unit = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 1 if sys.platform == "darwin" else 1024
    assert (now - before) * unit < 2**27


def test_the_borders_of_an_image_of_many_strips_are_its_outermost_pixels():
    image, mask = noisy((7, 700)), masked(2, 2, 5, 40)
    canvas = Canvas.of(image, mask).expanded((300, 5, 1, 0))
    assert np.array_equal(np.asarray(canvas.image), np.pad(np.asarray(image), ((300, 1), (0, 5), (0, 0)), mode="edge"))
    alone, over = Canvas.of(image).expanded((300, 5, 1, 0)), np.asarray(Canvas.of(image, mask).mask_over)
    own = np.pad(over, ((300, 1), (0, 5)), constant_values=255)
    assert np.array_equal(np.asarray(canvas.mask), np.maximum(np.asarray(alone.mask), own))


@pytest.mark.slow
def test_a_large_image_is_expanded_and_comes_back_in_bounded_memory(folders):
    """The picture of a telephone: 36 MB as bytes."""
    image = Image.new("RGB", (4000, 3000), "orange")
    tracemalloc.start()
    canvas = Canvas.of(image).expanded((0, 400, 0, 0))
    pasted = canvas.paste(np.zeros((768, 1024, 3), np.uint8))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (pasted.shape, pasted[:, :3960].mean((0, 1)).round().tolist()) == ((3000, 4400, 3), [255, 165, 0])
    assert peak < 16 * pasted.size / 3

    plans = [resolved(folders["base"], image=image, padding_mask_crop=8, mask_image=masked(8, 8, 90, 90)).inputs]
    plans.append(resolved(folders["base"], image=image, mask_image=masked(8, 8, 90, 90), fit="crop").inputs)
    assert [(sum(one.bytes), one.pasted_pixels[0]) for one in plans] == [
        (4 * 12_000_000 + 67 * 45, 12_000_000),
        (4 * 12_000_000 + 67 * 45 + 4 * 64 * 48, 64 * 48),
    ]
    made = resolved(folders["base"], image=image, expand="0,50%,0,0").inputs
    assert made.made == 5 * 6000 * 3000  # at a size, the expanded image is there for a moment


@pytest.mark.parametrize("given", ["9" * 5000, "9999999", "1" * 7 + "%"])
def test_a_huge_border_is_refused_in_few_words(given):
    with pytest.raises(UsageError, match="`expand` is") as error:
        Canvas.of(noisy()).expanded(parse_borders(given, *SIZE))
    assert len(str(error.value)) < 200
    with pytest.raises(UsageError, match="million pixels at most"):
        Canvas.of(noisy()).expanded(parse_borders("99999%", *SIZE))


@pytest.mark.parametrize("borders", ["1", "7,13", "0,1,0,0", "100%"])
@pytest.mark.parametrize("size", [(1, 1), SIZE])
def test_odd_borders_leave_the_image_where_it_is(borders, size):
    top, right, bottom, left = parse_borders(borders, *size)
    canvas = Canvas.of(noisy(size)).expanded((top, right, bottom, left))
    assert canvas.image.size == (size[0] + left + right, size[1] + top + bottom)
    inside = np.s_[top : top + size[1], left : left + size[0]]
    padded = np.pad(np.asarray(noisy(size)), ((top, bottom), (left, right), (0, 0)), mode="edge")
    assert np.array_equal(np.asarray(canvas.image), padded)
    made = canvas.paste(np.zeros((48, 64, 3), np.uint8))
    own = np.asarray(canvas.mask)[inside] == 0
    assert np.array_equal(made[inside][own], np.asarray(noisy(size))[own])


@pytest.mark.parametrize("corner", [(0, 0), (57, 0), (0, 35), (57, 35), (30, 20)])
@pytest.mark.parametrize("shape", [(64, 64), (128, 16), (16, 128)])
@pytest.mark.parametrize("padding", [0, 3, 1000])
def test_a_part_at_a_corner_comes_back_into_the_whole(corner, shape, padding):
    mask = masked(*corner, corner[0] + 10, corner[1] + 10)
    canvas = Canvas.of(noisy(), mask).cropped(*shape, padding)
    left, top, right, bottom = canvas.box
    assert 0 <= left < right <= SIZE[0]
    assert 0 <= top < bottom <= SIZE[1]
    assert canvas.repainted(*shape).any()
    pasted, outside = canvas.paste(np.zeros((shape[1], shape[0], 3), np.uint8)), np.asarray(mask) == 0
    assert np.array_equal(pasted[outside], np.asarray(noisy())[outside])
    assert (pasted[~outside] != np.asarray(noisy())[~outside]).any()


def test_a_fit_that_a_part_around_the_mask_does_not_follow_is_refused(folders):
    with pytest.raises(UsageError, match="`fit` does nothing with `padding_mask_crop`"):
        resolved(folders["base"], image=noisy(), mask_image=masked(1, 1, 40, 40), padding_mask_crop=4, fit="crop")


def test_a_strip_is_a_reference_at_its_own_size_where_a_size_is_asked_for(folders):
    strip = noisy((2000, 20))
    request = resolved(folders["kontext"], image=strip, auto_resize=False)
    assert (request.inputs.sizes, request.width, request.height) == (((2000, 16),), 64, 48)
    with pytest.raises(UsageError, match="a shape up to 8:1"):
        resolved(folders["kontext"], image=strip)


def test_images_of_the_same_bytes_in_another_shape_are_others(folders):
    """As an even mask of another size."""
    one, other = (Request(prompt="a", image=Image.new("RGB", size)) for size in ((64, 32), (32, 64)))
    assert one.resolve(folders["base"]).record(0)["image"] != other.resolve(folders["base"]).record(0)["image"]


def test_the_record_says_the_size_of_a_picture_that_comes_back_into_its_image(folders, tmp_path):
    given = {"image": noisy(), "mask_image": masked(10, 10, 40, 40)}
    edit_json(small(folders["base"].path, tmp_path) / "model_index.json", defaults=DEFAULTS)
    folder = open_model(tmp_path / "small")
    record = resolved(folder, **given, width=None, height=None).record(0)
    assert (record["width"], record["height"], record["pasted_size"]) == (64, 48, [67, 45])
    assert "pasted_size" not in resolved(folder, **given).record(0)
    assert resolved(folder, **given, padding_mask_crop=4).record(0)["pasted_size"] == [67, 45]


DEFAULTS = {"width": 64, "height": 64, "num_inference_steps": 2, "guidance_scale": 4.5}


def small(model, folder):
    """A link to a model, whose JSON is its own."""
    made = folder / "small"
    made.mkdir()
    for path in model.iterdir():
        (made / path.name).symlink_to(path)
    text = (model / "model_index.json").read_text()
    (made / "model_index.json").unlink()
    (made / "model_index.json").write_text(text)
    return made


def test_a_hole_leaves_no_edge_of_the_colour_that_transparency_is_shown_on():
    """Else a bar of white stands where the picture fades into the image."""
    dark = np.full((64, 96, 3), 30, np.uint8)
    alpha = np.full((64, 96), 255, np.uint8)
    alpha[:, 48:], dark[:, 48:] = 0, 255
    image = open_image(Image.fromarray(np.dstack([dark, alpha])))
    assert np.asarray(image)[0, -1].tolist() == [255, 255, 255]
    around = np.asarray(filled(image))
    assert around.max() <= 36  # bytes of a blur are rounded
    assert np.array_equal(around[:, :48], dark[:, :48])


def test_a_soft_mask_is_pasted_whole_and_its_steps_have_seen_to_the_rest():
    grey = Image.fromarray(np.tile(np.arange(0, 256, 4, dtype=np.uint8), (64, 1)))
    pasted = Canvas.of(Image.new("RGB", (64, 64), "white"), grey, soft=True).paste(
        np.zeros((64, 64, 3), np.uint8), soft=True
    )
    assert pasted[32, 16:, 0].max() == 0
    assert pasted[32, 0, 0] == 255
