"""The LoRAs of the small model, by the judge of pixels: a shape, and backgrounds (benchmarks/loras.py).

A share is of four sentences with combinations that training never drew.
"""

import adapters as files
import loras
import mlx.core as mx
import numpy as np
import pytest
from mlx_flux_krea.convert import convert

from mlx_flux_krea import nano
from mlx_flux_krea.weights import open_model, read_header

STEPS, COUNT = 4, 4


@pytest.fixture
def pipe():
    return loras.loaded(nano.FOLDER)


@pytest.fixture(scope="module")
def asked():
    return {"hearts": loras.asked(True, COUNT), "known": loras.asked(False, COUNT)}


def right(pipe, weights, some) -> float:
    """The share of pictures that are entirely right."""
    made, _ = loras.drawn(pipe, weights, [text for _, text in some], STEPS)
    return loras.share(made, [scene for scene, _ in some])


def at_dusk(some):
    """The sentences, with the background that the second adapter gives each scene."""
    return [(loras.at_dusk(scene), text) for scene, text in some]


@pytest.mark.parametrize("name", loras.FILES)
def test_a_trained_file_is_small_and_fits(name):
    path = loras.FILES[name]
    assert path.stat().st_size < 300_000
    infos, _ = read_header(path)
    assert {info.dtype for info in infos.values()} == {"F16"}
    facts = files.opened(path, open_model(nano.FOLDER).sizes).facts
    assert (facts.ranks, facts.dropped, facts.applied) == ((8,), (), facts.modules)
    assert facts.license == ("apache-2.0",)


def test_weight_zero_gives_the_bits_of_no_adapter(pipe, asked):
    sentences = [asked["hearts"][0][1]]
    (_, plain), (_, zero), (_, whole) = (
        loras.drawn(pipe, weights, sentences, 1) for weights in ({}, {"heart": 0.0, "dusk": 0.0}, {"heart": 1.0})
    )
    assert mx.array_equal(plain, zero)
    assert not mx.array_equal(plain, whole)


@pytest.mark.slow
def test_a_shape_that_the_model_does_not_know_is_added(pipe, asked):
    without, half, whole = (right(pipe, {"heart": weight}, asked["hearts"]) for weight in (0.0, 0.5, 1.0))
    assert without == 0
    assert without <= half <= whole
    assert whole >= 0.6
    assert right(pipe, {"heart": 1.0}, asked["known"]) >= 0.75, "the others are drawn as before"


@pytest.mark.slow
def test_backgrounds_change_by_the_weight(pipe, asked):
    fading, made = [], []
    for weight in (0.0, 0.75, 1.0):
        made, _ = loras.drawn(pipe, {"dusk": weight}, [text for _, text in asked["known"]], STEPS)
        fading.append(loras.darkness(made, [scene for scene, _ in asked["known"]]))
    assert np.all(np.diff(fading) > 0), fading
    assert fading[0] < 0.02
    assert fading[1] > 0.3
    assert fading[2] > 0.9
    assert loras.share(made, [scene for scene, _ in at_dusk(asked["known"])]) >= 0.75


@pytest.mark.slow
def test_both_at_once_do_both(pipe, asked):
    assert right(pipe, {"heart": 1.0, "dusk": 1.0}, at_dusk(asked["hearts"])) >= 0.25
    assert right(pipe, {"dusk": 1.0}, at_dusk(asked["hearts"])) == 0


@pytest.mark.slow
def test_beside_4_bits_the_shape_is_added_too(asked, tmp_path):
    pipe = loras.loaded(convert([nano.FOLDER], tmp_path / "small", quantize="4").path)
    assert right(pipe, {"heart": 1.0}, asked["hearts"]) >= 0.5
