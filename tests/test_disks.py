"""The speed of a disk, measured once, and the blocks that a default run therefore keeps in memory."""

import json
import os

import mlx.core as mx
import numpy as np
import pytest

from mlx_flux_krea import FluxPipeline, disks
from mlx_flux_krea.commands.shared.estimates import weigh_recipe
from mlx_flux_krea.memory import GB, Speeds, make_plan, step_flops
from mlx_flux_krea.models import config
from mlx_flux_krea.presets import CHIPS
from mlx_flux_krea.residency import hidden_places, resident_places, spread

SIZES = config.FLUX_DEV_MODEL
WEIGHTS = {precision: weigh_recipe(SIZES, precision, "bfloat16") for precision in ("none", "8", "4")}


def plan_of(precision, speeds, side=1024, budget=100 * GB):
    return make_plan(WEIGHTS[precision], SIZES, mx.bfloat16, width=side, height=side, text_length=512, budget=budget,
                     speeds=speeds, device="gpu")  # fmt: skip


def step_seconds(resident, blocks, seconds, disk) -> float:
    """Seconds of the third step, with the reads of two buffers: as `Blocks` streams, block by block."""
    clock = read = begun = 0.0
    order = [place for place in range(len(blocks)) if place not in resident]
    for _ in range(3):
        start = clock
        for place, took in enumerate(seconds):
            if order and place in order:
                before = begun if len(order) > 1 else 0.0  # a buffer is free once the streamed block before has begun
                read = max(read, before) + blocks[place] / disk
                clock = begun = max(clock, read)
            clock += took
    return clock - start


# Chip, GB/s of its disk, precision, pixels of a side, and blocks of 57 that stay in 100 GB of memory.
TABLE = [
    ("M1", 2.5, "8", 1024, 0), ("M1", 2.5, "none", 1024, 0), ("M1", 0.4, "none", 1024, 38), ("M1", 0.4, "8", 1024, 29),
    ("M1", 0.005, "8", 1024, 57), ("M1", 2.5, "none", 256, 43), ("M4", 3.0, "8", 1024, 0),
    ("M3 Max", 5.0, "none", 1024, 29), ("M5 Max", 6.0, "none", 1024, 46), ("M5 Max", 6.0, "4", 1024, 29),
]  # fmt: skip


@pytest.mark.parametrize(("chip", "disk", "precision", "side", "blocks"), TABLE)
def test_as_few_blocks_stay_as_the_disk_cannot_hide_and_no_step_takes_longer(chip, disk, precision, side, blocks):
    speeds, stored = Speeds(disk * GB, CHIPS[chip] * 1e12), WEIGHTS[precision].blocks.stored
    made, whole = plan_of(precision, speeds, side), plan_of(precision, None, side)
    assert whole.resident_blocks == 57
    assert (made.resident_blocks, made.hidden) == (blocks, blocks < 57)
    places = resident_places(WEIGHTS[precision].blocks.computed, made.resident_bytes)
    assert len(places) == blocks  # as `Blocks` will choose them
    total = step_flops(SIZES.flux, side, side, 512) / speeds.peak
    each = [total / 57] * 57
    assert step_seconds(places, stored, each, speeds.disk) == pytest.approx(total, rel=1e-6)
    if blocks:
        assert step_seconds(spread(blocks // 2, 57), stored, each, 0.8 * speeds.disk) > 1.001 * total
    assert made.peak <= whole.peak
    assert made.read_per_step == sum(size for place, size in enumerate(stored) if place not in places)


def test_a_budget_that_is_too_small_for_them_keeps_as_many_as_fit():
    slow = Speeds(0.1 * GB, 60e12)
    for budget in (4 * GB, 100 * GB):
        made, today = plan_of("8", slow, budget=budget), plan_of("8", None, budget=budget)
        assert (made, made.hidden) == (today, False)


def test_a_small_picture_keeps_more_blocks_than_a_large_one():
    kept = [plan_of("none", Speeds(6 * GB, 18.4e12), side).resident_blocks for side in (256, 512, 1024, 2048)]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] > kept[-1] == 0


def test_a_block_is_read_in_the_time_since_the_streamed_one_before_it():
    assert hidden_places([1] * 4, 4, [8] * 4, [1.0] * 4, 8.0) == set()
    assert hidden_places([1] * 4, 4, [8] * 4, [1.0] * 4, 4.0) == {1, 3}
    assert hidden_places([1] * 4, 1, [8] * 4, [1.0] * 4, 4.0) is None  # no room for them
    assert hidden_places([1] * 4, 4, [8] * 4, [1.0] * 4, 1e-3) == {0, 1, 2, 3}
    assert hidden_places([1] * 4, 4, [8] * 4, [1.0, 1.0, 0.5, 1.0], 8.0) != set()  # one that computes in half the time


@pytest.fixture
def measured(monkeypatch):
    """A chip whose speed is known, and the measurements of its disk."""
    taken = []
    monkeypatch.setattr(disks, "rate", lambda: 1.3e12)
    monkeypatch.setattr(disks, "read_speed", lambda *what: taken.append(what) or 2.5e9)
    return taken


def test_a_disk_is_measured_once(home, tmp_path, measured):
    assert disks.speeds(tmp_path) is None
    for _ in range(2):
        disks.remember_speed(tmp_path)
    assert measured == [(tmp_path.parent, disks.SAMPLE, disks.THREADS)]
    assert disks.speeds(tmp_path) == Speeds(2.5e9, 2.6e12)


@pytest.mark.parametrize("damage", ["", "[]", "{", '{"%s": "fast"}', '{"%s": 0.0}', '{"%s": NaN}', '{"%s": true}'])
def test_a_damaged_file_is_a_disk_that_is_not_known_and_is_measured_anew(home, tmp_path, measured, damage):
    home.mkdir(exist_ok=True)
    (home / "disks.json").write_text(damage.replace("%s", disks._name(tmp_path)))
    assert disks.speeds(tmp_path) is None
    disks.remember_speed(tmp_path)
    assert (len(measured), disks.known_speed(tmp_path)) == (1, 2.5e9)


def test_a_model_on_another_disk_or_an_unknown_chip_is_not_known(home, tmp_path, measured, monkeypatch):
    disks.remember_speed(tmp_path)
    stat, facts = os.stat, os.statvfs(tmp_path)
    other = os.statvfs_result([facts[0], facts[1], facts[2] + 1, *facts[3:]])
    with monkeypatch.context() as one:
        one.setattr(os, "statvfs", lambda _: other)  # the number of this disk, and another size
        assert disks.speeds(tmp_path) is None
    with monkeypatch.context() as one:
        one.setattr(os, "stat", lambda path: os.stat_result([*stat(path)[:2], -1, *stat(path)[3:10]]))
        assert disks.speeds(tmp_path) is None
    assert disks.speeds(tmp_path / "gone") is None
    monkeypatch.setattr(disks, "rate", lambda: float("inf"))
    assert disks.speeds(tmp_path) is None


def test_a_disk_that_cannot_be_measured_stays_unknown(home, tmp_path, measured, monkeypatch):
    def fails(*_):
        raise OSError("full")

    monkeypatch.setattr(disks, "read_speed", fails)
    disks.remember_speed(tmp_path)
    assert not (home / "disks.json").exists()
    monkeypatch.setattr(disks, "rate", lambda: float("inf"))  # as on this machine: nothing is written to measure
    disks.remember_speed(tmp_path)


def test_a_default_run_streams_what_is_hidden_and_one_with_an_amount_keeps_what_fits(
    model, command, measured, monkeypatch
):
    """The tiny model draws the same bits either way; in a second picture as many blocks stay as its plan says."""
    small = {"height": 32, "width": 48, "num_inference_steps": 2, "seed": 3, "output_type": "np"}
    monkeypatch.setattr(disks, "rate", lambda: 1e6)  # of a chip that is slow enough for so small a picture
    pipe = FluxPipeline.from_pretrained(model)
    whole = pipe("a cat", **small)
    disks.remember_speed(model)
    hidden = pipe("a cat", **small)
    assert (whole.plan.resident_blocks, whole.plan.hidden) == (5, False)
    assert (hidden.plan.resident_blocks, hidden.plan.hidden) == (0, True)
    assert len(pipe._generator.blocks.loaded) == 0
    assert np.array_equal(whole.images, hidden.images)
    pipe.memory = 4 * GB
    assert pipe("a cat", **small).plan.resident_blocks == len(pipe._generator.blocks.loaded) == 5
    assert "0 of 5 transformer blocks are resident in memory; the others" in command("plan", model)[1]
    assert ", in the time that it computes" in command("plan", model)[1]
    facts = json.loads(command("plan", model, "--json")[1])
    assert (facts["blocks"], facts["hidden"]) == (0, True)
    assert "5 of 5 transformer blocks" in command("plan", model, "--memory", "4GB")[1]
