"""The little world of the nano model, and the judge that will say what the model gets right."""

import random
from dataclasses import replace

import nano as judging
import numpy as np
import pytest
from PIL import Image

from mlx_flux_krea.nano import scenes

RED_LEFT_OF_WHITE = scenes.Scene(
    96,
    96,
    ("blue", "blue"),
    (scenes.Thing("square", "red", "large", 26, 48), scenes.Thing("circle", "white", "medium", 70, 48)),
    "left of",
)


@pytest.mark.parametrize("things", [1, 2, 3])
@pytest.mark.parametrize("canvas", scenes.CANVASES, ids=str)
def test_every_drawn_scene_is_right_for_its_judge(canvas, things):
    rng = random.Random(f"{canvas} {things}")
    for _ in range(12):
        scene = scenes.sample(rng, things, canvas, held_out=True)
        assert judging.judge(np.array(scenes.draw(scene)), scene) == []


def test_the_judge_tells_a_shape_that_adapters_add_from_every_other():
    rng, shapes = random.Random(3), (*scenes.SHAPES, *scenes.ADDED)
    for n in range(24):
        scene = scenes.sample(rng, 2, held_out=True, shapes=shapes)
        pixels = np.array(scenes.draw(scene))
        assert judging.judge(pixels, scene, shapes) == []
        one, other = scene.things
        another = replace(one, shape=shapes[(shapes.index(one.shape) + 1 + n % 6) % 7])
        assert judging.judge(pixels, replace(scene, things=(another, other)), shapes) != []


@pytest.mark.parametrize(
    ("things", "unsaid"),
    [(1, ("background",)), (2, ("background",)), (3, ("background",)), (1, ("background", "colour")), (2, ("place",))],
    ids=str,
)
def test_a_scene_whose_sentence_leaves_something_out_is_right_for_its_judge_too(things, unsaid):
    rng = random.Random(f"{things} {unsaid}")
    for _ in range(12):
        scene = scenes.sample(rng, things, held_out=True, unsaid=unsaid)
        said = scenes.describe(scene, rng)
        assert judging.judge(np.array(scenes.draw(scene)), scene) == []
        assert ("background" in unsaid) != any(word in said for word in ("background", "plain", "gradient"))
        assert (scene.things[0].colour in said) == ("colour" not in unsaid)


def test_a_background_that_is_not_said_is_white_unless_a_thing_is():
    rng = random.Random(0)
    for _ in range(100):
        scene = scenes.sample(rng, 1 + rng.randrange(3), unsaid=("background",))
        colours = [thing.colour for thing in scene.things]
        assert scene.background[0] == scene.background[1] not in colours
        assert (scene.background[0] == "white") == ("white" not in colours)


def test_the_judge_looks_only_for_what_was_said():
    scene = replace(RED_LEFT_OF_WHITE, where="right of")
    assert judging.judge(np.array(scenes.draw(scene)), scene) != []
    assert judging.judge(np.array(scenes.draw(scene)), replace(scene, unsaid=("place",))) == []
    one = replace(RED_LEFT_OF_WHITE, things=RED_LEFT_OF_WHITE.things[:1], where=None)
    pink = replace(one, things=(replace(one.things[0], colour="pink"),))
    assert judging.judge(np.array(scenes.draw(one)), pink) != []
    assert judging.judge(np.array(scenes.draw(one)), replace(pink, unsaid=("colour",))) == []


@pytest.mark.parametrize(
    ("said", "fault"),
    [
        ({"background": ("green", "green")}, "background is blue and not green"),
        ({"where": "right of"}, "the first is not right of the second"),
        ({"things": RED_LEFT_OF_WHITE.things[:1], "where": None}, "2 things and not 1"),
        (
            {"things": (replace(RED_LEFT_OF_WHITE.things[0], shape="star"), RED_LEFT_OF_WHITE.things[1])},
            "not a red star",
        ),
        ({"things": (replace(RED_LEFT_OF_WHITE.things[0], colour="pink"), RED_LEFT_OF_WHITE.things[1])}, "pink square"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_the_judge_names_what_is_wrong(said, fault):
    faults = judging.judge(np.array(scenes.draw(RED_LEFT_OF_WHITE)), replace(RED_LEFT_OF_WHITE, **said))
    assert any(fault in f for f in faults), faults


def test_a_blurred_or_noisy_picture_is_still_seen_and_noise_alone_is_not():
    picture = scenes.draw(RED_LEFT_OF_WHITE)
    small = picture.resize((48, 48), Image.Resampling.BOX).resize((96, 96), Image.Resampling.BICUBIC)
    assert judging.judge(np.array(small), RED_LEFT_OF_WHITE) == []
    noise = np.random.default_rng(0)
    grainy = np.clip(np.array(picture) + noise.normal(0, 6, (96, 96, 3)), 0, 255).astype(np.uint8)
    assert judging.judge(grainy, RED_LEFT_OF_WHITE) == []
    assert judging.judge(noise.integers(0, 256, (96, 96, 3), dtype=np.uint8), RED_LEFT_OF_WHITE) != []


@pytest.mark.slow
def test_held_out_combinations_are_never_drawn_for_training():
    rng = random.Random(0)
    for held_out in (True, False):
        for _ in range(300):
            scene = scenes.sample(rng, 1 + rng.randrange(3), held_out=held_out)
            kept = {scenes.is_held_out(t.shape, t.colour, scene.background) for t in scene.things}
            assert kept == {held_out}


def test_sentences_vary_and_name_everything():
    rng = random.Random(0)
    said = [scenes.describe(RED_LEFT_OF_WHITE, rng).lower() for _ in range(200)]
    assert len(set(said)) > 40
    for sentence in said:
        words = sentence.replace(".", "").replace(",", "").split()
        assert words.index("red") < words.index("square") < words.index("white") < words.index("circle")
        assert "blue" in words
        assert "large" in words
