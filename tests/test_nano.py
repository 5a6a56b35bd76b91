"""The small model that ships with the package: trained weights say what random ones cannot, whether a picture is right.

The judge is the benchmark's: it looks at pixels alone. Each bar has room for noise; what a mistake does to the same
pictures stands in the tests below.
"""

import nano as judging
import numpy as np
import pytest
from helpers import psnr
from mlx_flux_krea.convert.quantize import Recipe
from pictures import THINGS, is_right
from test_mistakes import half_rotated

from mlx_flux_krea import FluxPipeline, nano, transformer
from mlx_flux_krea.nano import scenes

BAR = 6  # of the eight pictures


def right(pipe, steps: int = 12) -> int:
    """How many of the eight pictures are right."""
    made = (
        (pipe(prompt, seed=3, num_inference_steps=steps).images[0], things, ground) for prompt, things, ground in THINGS
    )
    return sum(is_right(*one) for one in made)


@pytest.fixture(scope="module")
def pipe():
    return FluxPipeline.from_pretrained(nano.FOLDER, dtype="float32")


def test_the_pictures_are_right(pipe):
    assert right(pipe) >= BAR


def test_they_are_right_in_the_type_of_the_folder():
    assert right(FluxPipeline.from_pretrained(nano.FOLDER)) >= BAR


@pytest.mark.parametrize("bits", ["8", "4"])
def test_they_are_right_after_rounding_to(bits, tmp_path):
    folder = judging.rounded(nano.FOLDER, tmp_path / "rounded", Recipe(bits))
    assert right(FluxPipeline.from_pretrained(folder, dtype="float32")) >= BAR


def test_a_seed_repeats_its_picture_and_another_gives_another(pipe):
    one, again, other = (pipe(THINGS[0][0], seed=s, num_inference_steps=8).images[0] for s in (1, 1, 2))
    assert np.array_equal(one, again)
    assert psnr(one, other) < 30


def test_guidance_is_what_classifier_free_guidance_of_that_scale_would_do(pipe):
    """It was distilled into the embedding: the number must move the picture where the two-pass form moves it."""
    for prompt, *_ in THINGS[3:6]:
        two_passes = pipe(
            prompt, seed=3, num_inference_steps=12, guidance_scale=1.0, negative_prompt="", true_cfg_scale=6.0
        ).images[0]
        strong, weak = (pipe(prompt, seed=3, num_inference_steps=12, guidance_scale=g).images[0] for g in (6.0, 1.0))
        assert psnr(strong, weak) < 40
        assert psnr(strong, two_passes) > psnr(weak, two_passes) + 1


def test_image_to_image_keeps_the_layout_at_low_strength(pipe):
    scene = scenes.Scene(
        96,
        96,
        ("green", "green"),
        (scenes.Thing("square", "red", "large", 26, 48), scenes.Thing("circle", "white", "large", 70, 48)),
        "left of",
    )
    prompt = "a blue square to the left of a yellow circle on a green background"
    made = pipe(prompt, seed=1, image=scenes.draw(scene), strength=0.5, num_inference_steps=12).images[0]
    places = sorted((s.x, s.y) for s in judging.look(np.array(made)))
    assert np.allclose(places, [(26, 48), (70, 48)], atol=6)


def test_a_negative_prompt_moves_the_picture_away_from_it(pipe):
    def blueness(**options) -> float:
        made = pipe("a red circle", seed=1, num_inference_steps=8, guidance_scale=1.0, **options).images[0]
        return float(np.asarray(made, float)[..., 2].mean() - np.asarray(made, float)[..., :2].mean())

    away = blueness(negative_prompt="a red circle on a blue background", true_cfg_scale=3.0)
    assert away < blueness() - 5


def test_it_follows_width_and_height(pipe):
    for width, height in scenes.CANVASES[1:]:
        made = pipe(THINGS[0][0], seed=3, width=width, height=height, num_inference_steps=12).images[0]
        assert made.size == (width, height)
        assert is_right(made, *THINGS[0][1:])


def test_the_autoencoder_gives_scenes_back(pipe):
    assert judging.reconstruction(nano.FOLDER, 20) > 30


# --- mistakes: what they do to pictures. The ones that pictures survive are in test_mistakes, by numbers ---


def test_right_pictures_need_the_right_rotation(monkeypatch):
    monkeypatch.setattr(transformer, "apply_rope", half_rotated)
    assert right(FluxPipeline.from_pretrained(nano.FOLDER, dtype="float32")) < BAR


def test_right_pictures_need_shift_and_scale_in_their_places(monkeypatch):
    original = transformer.modulated_norm
    monkeypatch.setattr(transformer, "modulated_norm", lambda x, shift, scale: original(x, scale, shift))
    assert right(FluxPipeline.from_pretrained(nano.FOLDER, dtype="float32")) < BAR
