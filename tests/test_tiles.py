"""Tiles: only where strips do not fit, without seams, and said."""

import logging
import math

import mlx.core as mx
import numpy as np
import pytest
from helpers import rel
from PIL import Image
from test_plan import plan_of, weights_of

from mlx_flux_krea import FluxPipeline
from mlx_flux_krea import memory as plan
from mlx_flux_krea.models import tiles
from mlx_flux_krea.presets import ASPECTS
from mlx_flux_krea.provenance import read_record
from mlx_flux_krea.weights import open_model
from mlx_flux_krea.worker import evaluated

SMALLEST_MAC = int(8 * 2**30 * 2 / 3 * 0.8)  # 8 GB, of which two thirds are the GPU's, and a fifth of that others'


@pytest.mark.parametrize("length", [1, 127, 128, 129, 160, 225, 512, 1024])
@pytest.mark.parametrize("unit", [1, 8])
def test_at_each_place_the_weights_of_all_tiles_add_up_to_one(length, unit):
    total = np.zeros(length * unit)
    for start, weights in tiles.fades(length, unit):
        assert len(weights) == min(length, tiles.SIDE) * unit
        assert weights.min() > 0
        total[start * unit :][: len(weights)] += weights
    assert np.abs(total - 1).max() < 1e-6


@pytest.mark.parametrize(("unit", "unit_out"), [(1, 8), (8, 1)])
def test_what_looks_at_no_neighbour_is_the_same_in_tiles(unit, unit_out, monkeypatch):
    monkeypatch.setattr(tiles, "SIDE", 16)

    def resized(x, run):
        x = x[:, ::unit, ::unit] if unit > 1 else mx.repeat(mx.repeat(x, unit_out, axis=1), unit_out, axis=2)
        return run(mx.abs, x)

    x = mx.random.normal((2, 40 * unit, 23 * unit, 3), key=mx.random.key(1))
    assert rel(tiles.in_tiles(resized, x, unit=unit, unit_out=unit_out, run=evaluated), resized(x, evaluated)) < 1e-6


def test_tiles_that_differ_have_no_seam_between_them(monkeypatch):
    """From black to white it takes what two neighbours share, at least."""
    monkeypatch.setattr(tiles, "SIDE", 16)
    colours = iter([0.0, 1.0] * 3)
    out = np.array(
        tiles.in_tiles(lambda x, run: x * 0 + next(colours), mx.ones((1, 16, 60, 1)), unit=1, unit_out=1, run=evaluated)
    )[0]
    assert out.min() == 0
    assert out.max() == 1
    assert np.abs(np.diff(out, axis=1)).max() < 1.1 / (tiles.SIDE // 4)


@pytest.mark.slow
def test_decoded_and_encoded_in_tiles_a_picture_is_nearly_the_same(model, monkeypatch):
    """One tile is exactly the whole; several have group statistics of their own."""
    vae = open_model(model).vae.load(mx.float32)
    z = mx.random.normal((1, 24, 40, 16), key=mx.random.key(1))
    x = vae.decode(z)
    whole = x, *vae.encode(x)
    for side, bar in ((40, 1e-6), (24, 0.2)):
        monkeypatch.setattr(tiles, "SIDE", side)
        for a, b in zip((tiles.decode(vae, z, evaluated), *tiles.encode(vae, x, evaluated)), whole, strict=True):
            assert a.dtype == mx.float32
            assert rel(a, b) < bar


@pytest.mark.parametrize("quantize", ["none", "8", "4"])
def test_the_smallest_mac_develops_whatever_it_can_draw(quantize):
    """In every aspect, up to the size from which drawing itself is refused; in tiles only where strips do not fit."""
    weights, seen = weights_of(quantize), set()
    for wide, high in ASPECTS.values():
        for megapixels in (0.25, 1, 2, 4, 5, 6):
            scale = math.sqrt(megapixels * 1e6 / (wide * high))
            size = [int(side * scale) // 16 * 16 for side in (wide, high)]
            made = plan_of(weights, size, budget=SMALLEST_MAC)
            free = plan_of(weights, size)
            assert made.peak <= SMALLEST_MAC
            assert not free.tiled
            strips = free.stages["decode"] - sum(weights.blocks.computed)
            assert made.tiled == (strips > SMALLEST_MAC - made.process)
            seen.add(made.tiled)
    assert seen == {True, False}


@pytest.mark.slow
def test_a_picture_in_tiles_that_is_repeated_as_a_whole_says_that_it_is_a_little_different(command, monkeypatch):
    monkeypatch.setattr(tiles, "SIDE", 8)
    monkeypatch.setattr(plan, "SIDE", 8)
    size = {"width": 112, "height": 80, "num_inference_steps": 1}
    least = FluxPipeline.from_pretrained("nano").rehearse("a ring", **size).plan.least
    call = ["generate", "a ring", "-m", "nano", "--seed", "1", "--steps", "1", "--width", "112", "--height", "80"]
    assert command(*call, "--memory", least, "-o", "tiled.png")[0] == 0
    assert read_record("tiled.png")["tiled"] is True

    def repeat(*args) -> tuple[int, float]:
        code, out, err = command("generate", "--from", "tiled.png", "-m", "nano", *args)
        assert code == 0, err
        note = "note: tiled.png was decoded in tiles, since memory was short; decoded whole, it differs a little"
        difference = np.abs(np.subtract(*(np.asarray(Image.open(name), float) for name in ("tiled.png", out.strip()))))
        return err.count(note), difference.mean()

    assert repeat("--memory", least) == (0, 0)
    told, difference = repeat()
    assert (told, difference > 0) == (1, True)
    code, _, err = command("generate", "--from", "tiled.png", "-m", "nano", "--width", "64", "--height", "64")
    assert (code, "tiles" in err) == (0, False)  # another picture anyway


@pytest.mark.slow
def test_a_picture_in_tiles_says_so_and_takes_what_was_planned(model, monkeypatch, caplog):
    monkeypatch.setattr(tiles, "SIDE", 12)
    monkeypatch.setattr(plan, "SIDE", 12)
    sides = {"height": 192, "width": 288, "num_inference_steps": 1, "seed": 1, "max_sequence_length": 32}
    whole = FluxPipeline.from_pretrained(model, memory="auto")("a cat", **sides)
    assert not whole.plan.tiled
    assert "tiled" not in whole.records[0]
    with caplog.at_level(logging.WARNING):
        made = FluxPipeline.from_pretrained(model, memory=whole.plan.least)("a cat", **sides)
    assert made.plan.tiled
    assert made.records[0]["tiled"] is True
    assert any("it is decoded in tiles" in note for note in made.notes)
    assert "it is decoded in tiles" in caplog.text
    assert made.peaks["decode"] < whole.peaks["decode"]
    a, b = (np.asarray(result.images[0], np.float32) for result in (made, whole))
    assert 0 < np.abs(a - b).mean() < 10
