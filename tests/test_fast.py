"""The mode of --fast: chosen by `bench --fast` on a model of one's own, stored, and kept by pictures and runs."""

import json
import shutil
import signal

import numpy as np
import pytest
from helpers import edit_index, edit_json
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from test_resume import CAT, files, struck

from mlx_flux_krea import FluxPipeline, Request
from mlx_flux_krea.checkpoint import Checkpoint
from mlx_flux_krea.commands.shared import choosing
from mlx_flux_krea.errors import ModelError, UsageError
from mlx_flux_krea.fast import FastMode, chosen_mode, store_choice
from mlx_flux_krea.provenance import read_record
from mlx_flux_krea.weights import open_model

STEPS = 14
DEFAULTS = {"width": 32, "height": 32, "num_inference_steps": STEPS, "guidance_scale": 4.5}
SMALL = ["--width", "32", "--height", "32", "--steps", "12", "--seed", "7"]
CHOICE = {"mode": "first-block:0.3:1", "share": 0.5, "distance": 0.01, "model": "tiny"}


@pytest.fixture(scope="module")
def quick(model, tmp_path_factory):
    """The tiny model, for small pictures in few steps."""
    folder = shutil.copytree(model, tmp_path_factory.mktemp("quick") / "tiny")
    edit_json(folder / "model_index.json", defaults=DEFAULTS)
    return folder


def resolved(folder, **given):
    return Request(prompt=CAT, **{"width": 32, "height": 32, "num_inference_steps": 12} | given).resolve(
        open_model(folder)
    )


# --- the choice ---


@pytest.mark.slow
def test_bench_fast_chooses_the_nearest_mode_and_goes_on_after_kills(command, quick, tmp_path):
    call = ["bench", "-m", quick, "--fast", "--json"]
    killed = struck("denoise", 10, signal.SIGKILL, *call, cwd=tmp_path)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    (first,) = files()
    assert {path.stem for path in first.iterdir() if path.suffix == ".safetensors"} == {"1-full"}
    ended = struck("denoise", 10, signal.SIGINT, *call, cwd=tmp_path)
    assert (ended.returncode, "the same command continues" in ended.stderr) == (130, True), ended.stderr
    assert {path.stem for path in first.iterdir() if path.suffix == ".safetensors"} == {"1-full", "1-skip"}
    assert command("resume", "--list")[1] == ""  # these are no pictures
    held = load_file(first / "1-full.safetensors")
    with safe_open(first / "1-full.safetensors", "numpy") as file:
        save_file(held | {"latents": np.nan * held["latents"]}, first / "1-full.safetensors", file.metadata())
    code, out, err = command(*call)
    assert code == 0, err
    assert (files(), "5 runs of one picture and 3 of another, at most" in err) == ([], True)
    facts, pipe = json.loads(out), FluxPipeline.from_pretrained(quick)

    def latents(prompt, seed, mode):
        how = {"num_inference_steps": STEPS} if mode is None else _how(FastMode.parse(mode))
        made = pipe(prompt, seed=seed, width=32, height=32, output_type="latent", **how)
        return np.array(made.images), len(made.steps_computed[0])

    for run in facts["runs"]:
        given = choosing.PICTURES[run["picture"] - 1], run["picture"]
        (full, _), (made, evaluations) = latents(*given, None), latents(*given, run["mode"])
        assert run["evaluations"] == evaluations
        assert run["distance"] == pytest.approx(np.linalg.norm(made - full) / np.linalg.norm(full), rel=1e-5)
    tried = [(run["picture"], run["mode"]) for run in facts["runs"]]
    assert tried[:5] == [(1, None), *((1, str(mode)) for mode in choosing.modes(STEPS))]
    means = {mode: _distances(facts, mode) for picture, mode in tried if picture == 2 and mode}
    assert len(means) == 2
    good = [run for run in facts["runs"][1:5] if run["evaluations"] <= 10]
    assert {*means} == {run["mode"] for run in sorted(good, key=lambda run: run["distance"])[:2]}
    assert facts["mode"] == min(means, key=lambda mode: means[mode])
    assert str(chosen_mode(quick)[0]) == facts["mode"]
    assert str(resolved(quick, fast=True).fast) == facts["mode"]
    again = command("bench", "-m", quick, "--fast")[1]
    assert f"--fast is now {facts['mode']} for" in again


def _how(mode: FastMode) -> dict:
    return {"num_inference_steps": mode.taken(STEPS)} | ({"cache": str(mode.cache)} if mode.cache else {})


def _distances(facts: dict, mode: str) -> float:
    return float(np.mean([run["distance"] for run in facts["runs"] if run["mode"] == mode]))


@pytest.mark.parametrize(
    ("evaluations", "order"),
    [
        ({"skip": [8, 8], "first-block:0.1": [7, 7], "8/12": [8, 8]}, ["first-block:0.1", "skip", "8/12"]),
        ({"skip": [8, 8], "first-block:0.1": [7, 9], "8/12": [8]}, ["skip"]),  # too many steps; one picture alone
        ({"first-block:0.1": [9, 9]}, []),
    ],
)
def test_the_nearest_mode_computes_two_thirds_of_every_picture_at_most(evaluations, order):
    distances = {"skip": [0.02, 0.03], "first-block:0.1": [0.01, 0.03], "8/12": [0.05, 0.02]}
    trials = [choosing.Trial(picture, None, 12, 0.0) for picture in (1, 2)]
    for mode, counts in evaluations.items():
        for i, count in enumerate(counts):
            trials.append(choosing.Trial(i + 1, FastMode.parse(mode), count, distances[mode][i]))
    assert [str(mode) for mode in choosing.nearest(trials, 12)] == order


@pytest.mark.parametrize(
    ("changes", "options", "said"),
    [
        ({"schedule": {"shift": "none"}}, [], "there is nothing to choose for --fast"),
        ({"defaults": DEFAULTS | {"num_inference_steps": 11}}, [], "was made for 11 steps"),
        ({}, ["--steps", "9"], "--fast, and --steps"),
    ],
)
def test_where_nothing_can_be_chosen_bench_says_so(command, quick, tmp_path, changes, options, said):
    folder = shutil.copytree(quick, tmp_path / "model")
    edit_json(folder / "model_index.json", **changes)
    code, out, err = command("bench", "-m", folder, "--fast", *options)
    assert (code, out, said in err) == (2, "", True), err


# --- its use ---


def test_fast_is_the_mode_that_was_chosen_for_the_model(model, quick, home):
    assert str(resolved(model, fast=True).cache) == "skip"
    store_choice(model, CHOICE)
    made = resolved(model, fast=True)
    assert (str(made.cache), made.num_inference_steps, made.record(0)["fast"]) == (CHOICE["mode"], 12, True)
    assert resolved(model).cache is None
    few = resolved(model, fast=True, num_inference_steps=11)
    assert (few.cache, few.fast, few.notes[-1]) == (
        None,
        None,
        "`fast` changes nothing below 12 steps: 11 steps are computed",
    )
    store_choice(model, CHOICE | {"mode": "8/12"})
    made = resolved(model, fast=True, num_inference_steps=24)
    assert (made.cache, made.num_inference_steps, made.record(0)["fast"]) == (None, 16, True)
    levels = resolved(model, fast=True, num_inference_steps=None, sigmas=np.linspace(1, 0.1, 12).tolist())
    assert (str(levels.cache), levels.num_inference_steps) == ("skip", 12)
    assert json.loads((home / "fast.json").read_text()).keys() == {choosing.sha256_if_exists(model / "manifest.json")}


def test_fast_changes_nothing_of_a_model_made_for_few_steps_whatever_was_chosen(quick, tmp_path):
    folder = edit_index(shutil.copytree(quick, tmp_path / "schnell"), schedule={"shift": "none"})
    store_choice(folder, CHOICE)
    made = resolved(folder, fast=True, num_inference_steps=28)
    assert (made.cache, made.fast, made.evaluations, "fast" in made.record(0)) == (None, None, 28, False)
    assert "this model was made for few steps, and all are computed" in made.notes[-1]


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"SHA": 3}', '{"SHA": {"mode": "tea", "share": 0.5}}', '{"SHA": {"mode": "skip", "share": 2.0}}'],
)
def test_a_damaged_file_of_choices_is_said_and_ignored(command, model, home, text):
    store_choice(model, CHOICE)
    key = next(iter(json.loads((home / "fast.json").read_text())))
    (home / "fast.json").write_text(text.replace("SHA", key))
    made = resolved(model, fast=True)
    assert (str(made.cache), ["fast.json is damaged" in note for note in made.notes]) == ("skip", [True])
    store_choice(model, CHOICE)
    assert str(resolved(model, fast=True).cache) == CHOICE["mode"]


@pytest.mark.parametrize("mode", ["16/12", "0/3", "28/28", "9999/99999", "skip:1", "", None, 3])
def test_other_modes_are_refused(mode):
    with pytest.raises(UsageError):
        FastMode.parse(mode)


LATER = {"first-block:0.3:1": ("8/12", "fast: first-block:0.3:1"), "8/12": ("skip", "fast: 8/12 steps")}


@pytest.mark.core("8/12")
@pytest.mark.parametrize("mode", LATER)
def test_pictures_and_runs_keep_their_mode_whatever_is_chosen_later(command, model, tmp_path, mode):
    """--from repeats the recorded cache or steps; a candidate that is finished later keeps those that it began with."""
    later, said = LATER[mode]
    store_choice(model, CHOICE | {"mode": mode})
    call = ["generate", CAT, "-m", model, *SMALL, "--fast"]
    code, _, err = command(*call, "-o", "one.png", "--force")
    assert (code, said in err) == (0, True), err
    code, _, err = command(*call, "--candidates", "2", "--force")
    assert code == 0, err
    run = files()[0].stem.partition("-")[0]
    store_choice(model, CHOICE | {"mode": later})
    code, _, err = command("generate", "--from", "one.png", "-m", model, "-o", "again.png", "--force")
    assert code == 0, err
    assert command("resume", run, "--pick", "1", "-o", "picked.png")[0] == 0
    one, again = (read_record(tmp_path / name) or {} for name in ("one.png", "again.png"))
    assert one.pop("fast") is True
    assert {**one, "date": 0} == {**again, "date": 0}
    assert (tmp_path / "picked.png").read_bytes() == (tmp_path / "one.png").read_bytes()


def test_unfinished_latents_of_a_filtered_model_stay_its_own(pipe, command, home):
    """Those of `bench --fast` too: a model without that duty does not continue them; purge deletes them."""
    saved = Checkpoint({})
    saved.filters = "required"
    with pytest.raises(ModelError, match="must be filtered or reviewed"):
        pipe.rehearse(CAT, checkpoint=saved, **{"width": 32, "height": 32, "num_inference_steps": 1})
    saved.path = home / "interrupted" / "bench-0" / "1-full.safetensors"
    saved.save_step(1, 1, np.zeros((1, 4, 64), np.float32))
    saved.close()
    assert command("purge", "--unfinished", "--yes")[0] == 0
    assert files() == []


def test_plan_and_bench_count_the_evaluations_of_the_chosen_mode(command, model):
    def seconds(*args):
        facts = json.loads(command("plan", model, *args, "--json")[1])["seconds"]
        return next(iter(facts.values()))["picture"]

    for mode, share in (("first-block:0.3", 0.5), ("7/14", 0.5), ("skip", 16 / 28)):
        store_choice(model, CHOICE | {"mode": mode, "share": share})
        assert seconds("--fast") == pytest.approx(seconds() * share)
    store_choice(model, CHOICE)
    size = ["--width", 32, "--height", 32, "--steps", 3, "--dtype", "float32", "--memory", "1GB"]
    facts = json.loads(command("bench", "-m", model, *size, "--json")[1])
    assert facts["evaluations"] == {"full": 28, "fast": 14}
    around = facts["stages"]["text"] + facts["stages"]["decode"]
    for mode, count in facts["evaluations"].items():
        assert facts["seconds_per_picture"][mode] == pytest.approx(around + count * facts["seconds_per_step"])
    assert "28 steps in " in command("bench", "-m", model, *size)[1]
