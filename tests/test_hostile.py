"""Samples of benchmarks/fuzz.py and benchmarks/kill.py, whose whole runs take half an hour each."""

import random

import fuzz
import kill
import pytest

pytestmark = pytest.mark.slow


def test_a_sample_of_damaged_files_ends_with_an_exit_code_each():
    found = fuzz.run(range(270), seed=1, kinds=list(fuzz.Cases.KINDS), jobs=2)
    assert found["cases"] == 270
    assert not found["failures"]


@pytest.mark.parametrize("name", ["generate", "resume", "convert", "review"])
def test_a_sample_of_kills_leaves_nothing_broken(tmp_path, name):
    (scenario,) = kill.scenarios(tmp_path, [name]).values()
    found = kill.run(scenario, 2, random.Random(f"sample {name}"), tmp_path, lambda: None)
    assert (found["kills"], found["broken"]) == (2, [])


def test_damage_is_seen(monkeypatch):
    """The checker itself: a command that ends in a traceback is a failure."""
    monkeypatch.setattr(fuzz, "BYTES", 1)
    found = fuzz.run(range(2), seed=1, kinds=["json"], jobs=1)
    assert len(found["failures"]) == 2
