"""The invisible watermark: bit-equal to the public implementation, read back, and in the pictures of the command."""

import io
import json

import numpy as np
import pytest
from helpers import DATA
from PIL import Image

from mlx_flux_krea.commands.shared.jobs import record_options
from mlx_flux_krea.credentials import watermark
from mlx_flux_krea.errors import UsageError
from mlx_flux_krea.filters.ledger import Ledger, pixel_hash
from mlx_flux_krea.provenance import Picture, read_record

CASES = ("page", "flat", "colours")
SIZE = ["--width", "96", "--height", "64", "--steps", "1", "--seed", "1"]


def case(name: str) -> np.ndarray:
    with Image.open(DATA / "watermark" / f"{name}.png") as image:
        return np.asarray(image.convert("RGB"))


def as_jpeg(pixels: np.ndarray, quality: int) -> np.ndarray:
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "JPEG", quality=quality, subsampling=0)
    return np.asarray(Image.open(data))


@pytest.mark.parametrize("name", CASES)
def test_a_picture_is_marked_to_the_bit_as_the_public_implementation_marks_it(name):
    assert np.array_equal(watermark.embed(case(name)), case(f"{name}-marked"))


@pytest.mark.parametrize("name", CASES)
def test_it_is_read_back_after_jpeg_90_and_not_where_it_is_not(name):
    plain, marked = case(name), case(f"{name}-marked")
    assert not watermark.read(plain).is_there
    assert watermark.read(marked).right >= 43
    assert watermark.read(as_jpeg(marked, 90)).is_there


@pytest.mark.parametrize(
    ("mistake", "value"),
    [("_STEP", np.float32(30)), ("MESSAGE", watermark.MESSAGE[::-1]), ("_HALF", np.float32(0))],
)
def test_a_mistake_gives_another_picture(monkeypatch, mistake, value):
    monkeypatch.setattr(watermark, mistake, value)
    assert not np.array_equal(watermark.embed(case("page")), case("page-marked"))


def test_strips_give_the_picture_that_one_whole_gives(monkeypatch):
    pixels = np.random.default_rng(1).integers(0, 256, (301, 275, 3), dtype=np.uint8)
    in_strips, read = watermark.embed(pixels), watermark.read(pixels)
    monkeypatch.setattr(watermark, "_STRIP", 2**20)
    assert np.array_equal(watermark.embed(pixels), in_strips)
    assert watermark.read(pixels) == read


def test_a_surface_of_one_colour_is_read_where_marked_values_became_smaller():
    """The public decoder takes the largest value of a block, which is then another one."""
    blue = np.tile(np.array([[[40, 72, 208]]], np.uint8), (256, 256, 1))
    assert watermark.read(as_jpeg(watermark.embed(blue), 90)).right == 46


def test_small_pictures_are_refused_and_not_read(pipe):
    assert watermark.read(np.zeros((255, 256, 3), np.uint8)) is None
    with pytest.raises(UsageError, match=r"`watermark`, and the picture is 48 x 32; expected 65536 pixels"):
        pipe("cat", width=48, height=32, watermark=True)
    with pytest.raises(UsageError, match="`watermark` does nothing to latents"):
        pipe("cat", watermark=True, output_type="latent")
    with pytest.raises(UsageError, match="`watermark` is 1; expected True or False"):
        pipe("cat", watermark=1)


@pytest.fixture
def small(monkeypatch):
    """Pictures that are made in a second take it too: they have a block or two for each bit."""
    monkeypatch.setattr(watermark, "LEAST_PIXELS", 0)


def test_the_command_marks_a_picture_before_it_is_judged_and_inspect_reads_it(command, model, small):
    code, _, err = command("generate", "cat", "-m", model, *SIZE, "--watermark", "--check", "review")
    assert code == 5, err
    (waiting,) = Ledger().waiting()
    with Image.open(waiting.path) as image:
        pixels = np.asarray(image)
    assert waiting.facts["pixels"] == pixel_hash(pixels)
    assert watermark.read(pixels).is_there
    Picture.from_pixels(pixels, read_record(waiting.path)).save("a.jpg", quality=90)
    assert record_options("a.jpg")["watermark"] is True
    found = json.loads(command("inspect", "a.jpg", "--json")[1])["watermark"]
    assert 38 <= found["right"] <= 46
    assert f"watermark read {' ' * 14}flux, {found['right']} of 46 bits" in command("inspect", "a.jpg")[1]
    assert json.loads(command("inspect", DATA / "watermark" / "page.png", "--json")[1])["watermark"] is None


@pytest.mark.slow
def test_floats_hold_the_marked_pixels(pipe, small):
    size = {"width": 96, "height": 64, "num_inference_steps": 1, "seed": 1}
    floats = pipe("cat", output_type="np", watermark=True, **size).images[0]
    pixels = np.rint(floats * 255).astype(np.uint8)
    assert np.array_equal(floats, pixels.astype(np.float32) / 255)
    assert watermark.read(pixels).is_there
