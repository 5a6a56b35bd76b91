"""Folders, records, logs and resume files that an earlier version wrote are read as they were meant."""

import json
import shutil

import numpy as np
import pytest
from helpers import DATA, levels
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save_file

from mlx_flux_krea import FluxPipeline
from mlx_flux_krea.checkpoint import Checkpoint
from mlx_flux_krea.filters.ledger import Ledger
from mlx_flux_krea.provenance import read_record
from mlx_flux_krea.weights import open_filter, open_model

BEFORE = DATA / "written_before"
ROUNDING = 3  # levels between these pictures, which are of bfloat16, and the same in float32
CAT = {"prompt": "a cat", "seed": 7, "width": 32, "height": 32, "num_inference_steps": 2, "guidance_scale": 4.5}


@pytest.fixture
def earlier_home(home):
    """A copy of the home folder of then."""
    shutil.copytree(BEFORE / "home", home)
    return home


def test_a_model_folder_gives_its_picture_again():
    pipe = FluxPipeline.from_pretrained(BEFORE / "model")
    image = pipe("a cat", seed=7, width=32, height=32, num_inference_steps=2).images[0]
    assert levels(image, Image.open(BEFORE / "cat.png")) <= ROUNDING


@pytest.mark.parametrize("name", ["cat.png", "cat.jpg", "cat.webp"])
def test_a_record_says_what_made_the_picture(name, command):
    record = read_record(BEFORE / name)
    assert {key: record[key] for key in CAT} == CAT
    code, out, _ = command("inspect", BEFORE / name, "--json")
    assert code == 0
    assert "a cat" in out


def test_a_picture_is_made_again_from_its_record(command, tmp_path):
    code, _, err = command("generate", "--from", BEFORE / "cat.png", "-m", BEFORE / "model", "-o", "again.png")
    assert code == 0, err
    assert "other weights" not in err
    assert levels(Image.open(tmp_path / "again.png"), Image.open(BEFORE / "cat.png")) <= ROUNDING


def test_a_contact_sheet_is_known_as_one(command):
    code, _, err = command("generate", "--from", BEFORE / "sheet.png", "-m", BEFORE / "model")
    assert (code, "is a contact sheet" in err) == (2, True)


@pytest.mark.slow
def test_an_unfinished_run_is_continued(command, tmp_path):
    """In a copy that names this machine's place of the model."""
    with safe_open(BEFORE / "unfinished.safetensors", "numpy") as file:
        facts, latents = json.loads(file.metadata()["flux-krea"]), file.get_tensor("latents")
    assert (facts["done"], facts["total"]) == (5, 30)
    model = str(BEFORE / "model")
    facts["run"]["options"]["model"] = facts["run"]["jobs"][0]["options"]["model"] = model
    save_file({"latents": latents}, tmp_path / "run.safetensors", {"flux-krea": json.dumps(facts)})
    code, out, err = command("resume", tmp_path / "run.safetensors")
    assert code == 0, err
    whole = FluxPipeline.from_pretrained(model)("a cat on a mat", seed=9, width=64, height=64, num_inference_steps=30)
    assert levels(Image.open(tmp_path / out.strip()), whole.images[0]) <= 1


def test_an_unfinished_run_is_read():
    run = Checkpoint.read(BEFORE / "unfinished.safetensors")
    assert (run.done, run.total, np.isfinite(run.latents((1, 16, 64), 30)).all()) == (5, 30, True)


def test_the_log_is_whole_and_a_picture_waits(command, earlier_home):
    code, _, err = command("log", "verify")
    assert code == 0, err
    facts = Ledger().log.picture("a468b63714a94d79be178e98e0bcec4f")
    assert (facts["event"], facts["seed"]) == ("waiting", 7)


def test_settings_and_a_filter_are_found(command, earlier_home):
    code, out, _ = command("config", "--json")
    assert (code, json.loads(out)) == (0, {"steps": "3", "aspect": "1:1"})
    assert open_filter("nsfw").index.base == "a network of other sizes"


def test_a_model_folder_verifies(command):
    assert open_model(BEFORE / "model").index.name == "pipeline"
    code, _, err = command("verify", BEFORE / "model")
    assert code == 0, err
