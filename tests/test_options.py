"""Every option of the verbs that draw, through the real command, on the small trained model: what it does to files.

`shows` says which options a test is about: each must be said in it, and together they must be all that a verb has.
"""

import csv
import gc
import io
import itertools
import json
import re
import sys
from collections import defaultdict
from pathlib import Path

import adapters
import judges
import mlx.core as mx
import nano as judging
import numpy as np
import pytest
import redux
from helpers import levels, psnr
from pictures import THINGS, is_right
from PIL import Image

from mlx_flux_krea import presets
from mlx_flux_krea.cli import VERBS
from mlx_flux_krea.commands import demo
from mlx_flux_krea.commands.shared.jobs import size_of
from mlx_flux_krea.commands.shared.options import given_options
from mlx_flux_krea.commands.shared.preview import Preview
from mlx_flux_krea.credentials.reading import has_credentials
from mlx_flux_krea.filters import judges as filters_judges
from mlx_flux_krea.filters.log import Log
from mlx_flux_krea.nano import scenes
from mlx_flux_krea.provenance import read_record

CROSS, *CROSS_IS = THINGS[4]
DRAWN = ["--steps", "4", "--seed", "1"]  # enough for the cross to be right
SIZE = ["--width", "32", "--height", "32"]
QUICK = [*SIZE, "--steps", "1", "--seed", "1"]  # where only bytes, names and records are looked at
SHOWN = defaultdict(set)


def shows(verb: str, *options: str):
    """A test of what these options of a verb do."""
    SHOWN[verb].update(options)

    def mark(test):
        test.shows = {(verb, option) for option in options if option.startswith("-")}
        return test

    return mark


@pytest.fixture
def run(command, tmp_path, monkeypatch, request):
    """Runs a verb with texts to read, and gives (exit code, paths or JSON, what was said)."""
    said = set()

    def run(verb, *args, reads=""):
        said.update((verb, str(arg)) for arg in args)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(reads.encode())))
        return command(verb, *args)

    yield run
    assert request.function.shows <= said


@pytest.fixture
def draw(run, tmp_path):
    """The files of a `generate` on the small model that must succeed."""

    def draw(*args, prompt=CROSS, how=DRAWN, **more) -> list[Path]:
        code, out, err = run("generate", *([prompt] if prompt else []), "-m", "nano", *how, *args, **more)
        assert code == 0, err
        return [tmp_path / name for name in out.split()]

    return draw


@pytest.fixture
def filters(home, monkeypatch):
    """Two small filters; see `judges`."""
    judges.install()
    monkeypatch.setattr(filters_judges, "load_judge", judges.load_judge)


def data(paths) -> list[bytes]:
    return [path.read_bytes() for path in paths]


def pixels(path: Path) -> bytes:
    return Image.open(path).tobytes()


def right(path: Path) -> bool:
    return is_right(Image.open(path), *CROSS_IS)


# --- what is drawn ---


@pytest.mark.slow
@shows("generate", "prompt")
def test_the_picture_shows_what_the_prompt_asks_for(draw):
    """Each of alternatives, and what standard input says."""
    star, *star_is = THINGS[1]
    made = draw(prompt=f"{{{CROSS}|{star}}}")
    assert [is_right(Image.open(path), *what) for path, what in zip(made, (CROSS_IS, star_is), strict=True)] == [
        True
    ] * 2
    assert data(draw(prompt="-", reads=f"\ufeff{star}\n")) == data(made[1:])


@shows("generate", "--model")
@pytest.mark.slow
def test_the_model_is_the_one_that_is_named(run, model):
    for named, name, fits in (("nano", "nano", True), (model, "pipeline", False)):
        code, out, err = run("generate", CROSS, "--model", named, *DRAWN, "--width", "96", "--height", "96")
        assert code == 0, err
        path = Path(out.strip())
        assert (read_record(path)["model"], right(path)) == (name, fits)


@pytest.mark.slow
@shows("generate", "--prompts")
def test_a_file_of_prompts_makes_the_pictures_that_single_runs_make(draw, tmp_path):
    one, two = draw("--seed", "5", how=QUICK), draw("--guidance", "2", prompt="a star", how=QUICK)
    rows = [{"prompt": CROSS, "seed": 5}, {"prompt": "a star", "guidance": 2}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    with open(tmp_path / "a.csv", "w") as file:
        writer = csv.DictWriter(file, ["prompt", "seed", "guidance"])
        writer.writeheader()
        writer.writerows(rows)
    for name in ("a.jsonl", "a.csv"):
        assert data(draw("--prompts", name, prompt=None, how=QUICK)) == data(one + two)
    (tmp_path / "a.txt").write_text(f"{CROSS}\na star\n")
    plain = draw(how=QUICK) + draw(prompt="a star", how=QUICK)
    assert data(draw("--prompts", "a.txt", prompt=None, how=QUICK)) == data(plain)


@shows("generate", "--width", "--height")
@pytest.mark.slow
def test_the_picture_is_as_wide_and_high_as_asked_for_and_shows_it(draw):
    for width, height in scenes.CANVASES[1::3]:
        (path,) = draw("--width", width, "--height", height)
        assert (Image.open(path).size, right(path)) == ((width, height), True)


@shows("generate", "--aspect", "--megapixels")
@pytest.mark.slow
def test_an_aspect_at_a_quarter_of_a_megapixel_is_replicates(draw):
    """cog-flux halves 1344 x 768."""
    assert size_of("16:9", 0.25, (1, 1)) == (672, 384)
    (path,) = draw("--aspect", "16:9", "--megapixels", "0.014", how=["--steps", "1"])
    assert Image.open(path).size == size_of("16:9", 0.014, (1, 1)) == (160, 96)


@shows("generate", "--upscale")
@pytest.mark.slow
def test_an_enlarged_picture_is_so_many_times_as_wide_and_says_so(draw):
    (path,) = draw("--upscale", "1.5", how=QUICK)
    assert (Image.open(path).size, (read_record(path) or {})["upscale"]) == ((48, 48), 1.5)


@pytest.mark.slow
@shows("generate", "--steps")
def test_the_more_steps_the_nearer_the_picture_is_to_that_of_many(draw):
    made = [draw("--steps", steps, how=["--seed", "1"])[0] for steps in ("1", "4", "12")]
    assert [read_record(path)["num_inference_steps"] for path in made] == [1, 4, 12]
    assert right(made[1])
    one, four, twelve = map(Image.open, made)
    assert psnr(one, twelve) + 5 < psnr(four, twelve)  # measured: 31.4 and 43.7


@shows("generate", "--guidance")
@pytest.mark.slow
def test_guidance_changes_the_picture_and_it_stays_right(draw):
    weak, strong = draw("--guidance", "1") + draw("--guidance", "4.5")
    assert (right(weak), right(strong)) == (True, True)
    assert psnr(Image.open(weak), Image.open(strong)) < 36


@shows("generate", "--seed", "--num-images")
@pytest.mark.slow
def test_several_seeds_make_the_pictures_that_single_runs_make(draw):
    quick = QUICK[:-2]
    single = [draw("--seed", n, how=quick)[0] for n in (7, 8, 9)]
    assert len(set(data(single))) == 3
    for several in (["--seed", "7", "8", "9"], ["--seed", "7+3"], ["--seed", "7", "--num-images", "3"]):
        assert data(draw(*several, how=quick)) == data(single)


@shows("generate", "--seed", "--json")
def test_a_seed_that_was_chosen_is_told_and_repeats_the_picture(run, draw):
    _, out, _ = run("generate", CROSS, "-m", "nano", *QUICK[:-2], "--json")
    (entry,) = json.loads(out)["images"]
    assert data(draw("--seed", entry["seed"], how=QUICK[:-2])) == data([Path(entry["path"])])


@shows("generate", "--like")
@pytest.mark.slow
def test_like_a_tool_the_picture_is_right_and_drawn_as_the_tool_does(run):
    for name, tool in presets.TOOLS.items():
        how = QUICK if name in presets.NOT_REPRODUCIBLE else [*DRAWN, "--width", "96", "--height", "96"]
        code, out, err = run("generate", CROSS, "-m", "nano", *how, "--like", name)
        assert code == 0, err
        path = Path(out.strip())
        record = read_record(path)
        assert (record["guidance_scale"], record["noise"]) == (tool.defaults.guidance_scale, tool.noise)
        assert ("sigmas" in record, right(path)) == (bool(tool.mu), how is not QUICK), name
        assert f"note: like {name}, by " in err
        named = f"note: {name} draws its noise on a CUDA device" in err and "match, the picture does not" in err
        assert named == (name in presets.NOT_REPRODUCIBLE)


@shows("generate", "--from")
@pytest.mark.slow
def test_a_picture_is_made_again_to_the_last_byte_and_what_is_said_beside_it_changes_it(draw):
    start = draw(prompt="a circle", how=QUICK)[0]
    for how in (
        ["--guidance", "3", "--dtype", "float32", "--metadata", "full"],
        ["--like", "comfy"],
        ["--negative-prompt", "a star", "--true-cfg-scale", "3", "--noise", "mflux"],
        ["--image", start, "--strength", "1"],
    ):
        (first,) = draw(*how, prompt="a {b} \\{cat|dog\\}", how=QUICK)
        image = ["--image", start] if "--image" in how else []
        (again,) = draw("--from", first, *image, prompt=None, how=[])
        assert data([again]) == data([first]), how
    (changed,) = draw("--from", first, *image, "--guidance", "2", prompt=None, how=[])
    assert read_record(changed) == read_record(first) | {"guidance_scale": 2.0}
    assert psnr(Image.open(changed), Image.open(first)) < 40


@shows("generate", "--noise")
@pytest.mark.slow
def test_each_recipe_of_noise_is_another_picture_and_right(draw):
    assert len({np.asarray(Image.open(draw("--noise", name, how=QUICK)[0])).tobytes() for name in presets.RECIPES}) == 5
    assert right(draw("--noise", "mlx-examples")[0])  # the others are drawn by --like


@shows("generate", "--negative-prompt", "--true-cfg-scale")
@pytest.mark.slow
def test_a_negative_prompt_moves_the_picture_away_from_it(draw):
    def redness(*args) -> float:
        options = ["--guidance", "1", "--steps", "6", "--seed", "7"]
        (path,) = draw(*options, *args, prompt="a large circle on a blue background", how=[])
        pixels = np.asarray(Image.open(path), float)
        return float(pixels[..., 0].mean() - pixels[..., 1:].mean())

    red = "a large red circle on a blue background"
    assert redness("--negative-prompt", red, "--true-cfg-scale", "3") < redness() - 20  # measured: -86 and -51


@pytest.mark.slow
@shows("generate", "--image", "--strength")
def test_image_to_image_keeps_the_layout_at_low_strength(draw, tmp_path):
    scene = scenes.Scene(
        96,
        96,
        ("green", "green"),
        (scenes.Thing("square", "red", "large", 26, 30), scenes.Thing("circle", "white", "large", 70, 66)),
        "left of",
    )
    scenes.draw(scene).save(tmp_path / "start.png")
    prompt = "a red circle to the left of a white square on a green background"

    def look(strength) -> list[tuple]:
        options = ["--image", "start.png", "--strength", strength, "--steps", "10", "--seed", "1"]
        seen = judging.look(np.array(Image.open(draw(*options, prompt=prompt, how=[])[0])))
        return sorted((s.shape, s.x, s.y) for s in seen)

    (circle, *left), (square, *beside) = look("0.3")
    assert (circle, square) == ("circle", "square")  # what was asked for, where the others stood
    assert np.allclose([left, beside], [(26, 30), (70, 66)], atol=6)
    assert not np.allclose([place for _, *place in look("1")], [(26, 30), (70, 66)], atol=12)


# --- how it is computed ---


@pytest.mark.slow
@shows("generate", "--prompts")
def test_rows_of_a_file_take_fast_solver_schedule_and_cache(run, tmp_path):
    rows = [{"fast": True}, {"solver": "heun"}, {"schedule": "beta", "cache": "first-block:0.9"}, {"cache": "none"}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"prompt": CROSS} | row) for row in rows))
    code, out, err = run("generate", "--prompts", "a.jsonl", "-m", "nano", *SIZE, "--steps", "12", "--seed", "1")
    assert code == 0, err
    records = [read_record(tmp_path / name) for name in out.split()]
    assert [record["evaluations"] for record in records] == [8, 23, 1, 12]
    assert [record.get("cache") for record in records] == ["skip", None, "first-block:0.9", None]
    assert (records[0]["fast"], records[1]["solver"], records[2]["levels"]) == (True, "heun", "beta")
    assert "8 evaluations (fast), 23 evaluations (heun)" in err


@pytest.mark.slow
@shows("generate", "--fast", "--solver", "--schedule", "--cache")
def test_solver_schedule_and_cache_are_recorded_counted_and_change_the_picture(run, tmp_path):
    how = ["generate", CROSS, "-m", "nano", *SIZE, "--steps", "12", "--seed", "1"]
    made = {}
    for option, evaluations in {
        "": 12, "--fast": 8, "--cache skip": 8, "--cache first-block:0.9": 1, "--solver heun": 23, "--schedule beta": 12
    }.items():  # fmt: skip
        code, out, err = run(*how, *option.split())
        assert code == 0, err
        record = read_record(tmp_path / out.strip())
        made[option] = pixels(tmp_path / out.strip())
        assert record["evaluations"] == evaluations
        name, _, value = option.removeprefix("--").partition(" ")
        named = {"schedule": "levels"}.get(name, name)
        assert record.get(named, "") == (value or (True if name else ""))
        line = next(line for line in err.splitlines() if line.startswith("1 picture"))
        most = 12 if "first" in option else evaluations
        assert (f"{most} evaluations (" in line) == bool(option)
    assert made["--fast"] == made["--cache skip"]
    assert len(set(made.values())) == 5
    code, out, err = run("generate", CROSS, "-m", "nano", *QUICK, "--fast")
    assert (code, "--fast changes nothing below 12 steps" in err) == (0, True)


@shows("generate", "--candidates")
def test_candidates_are_computed_for_a_third_of_their_steps(run, tmp_path):
    code, out, err = run("generate", CROSS, "-m", "nano", *SIZE, "--steps", "3", "--seed", "1", "--candidates", "2")
    assert (code, out, "stopped after step 1" in err) == (0, "out-sheet.png\n", True), err
    assert Image.open(tmp_path / "out-sheet.png").width > Image.open(tmp_path / "out-sheet.png").height


@shows("shell", "--fast", "--solver", "--schedule", "--cache")
@pytest.mark.slow
def test_a_shell_takes_solvers_and_caches_as_generate_does(run, tmp_path):
    how = ["-m", "nano", *SIZE, "--steps", "12", "--seed", "1"]
    options = [["--fast"], ["--solver", "dpmpp_2m", "--schedule", "simple"], ["--cache", "first-block:0.2:1"]]
    for given in options:
        code, out, err = run("generate", CROSS, *how, *given)
        assert code == 0, err
        code, typed, err = run("shell", *how, *given, reads=f"{CROSS}\n/exit\n")
        assert pixels(tmp_path / typed.split()[0]) == pixels(tmp_path / out.strip()), err


@shows("generate", "--dtype")
@pytest.mark.slow
def test_every_type_draws_nearly_the_same_picture(draw):
    names = ("float32", "bfloat16", "float16")
    made = [draw("--dtype", name)[0] for name in names]
    assert [(read_record(path)["dtype"], right(path)) for path in made] == [(name, True) for name in names]
    assert len(set(data(made))) == 3
    assert all(psnr(Image.open(a), Image.open(b)) > 25 for a, b in itertools.combinations(made, 2))


@shows("generate", "--memory", "--verbose")
@pytest.mark.slow
def test_with_less_memory_less_is_kept_and_the_picture_is_the_same(run, draw):
    """And verbose shows what was predicted beside what was measured."""
    whole, kept = draw(how=QUICK), []
    gc.collect()
    others = mx.get_active_memory() / 1e6  # what tests before this one keep in this process
    for memory in ("185MB", "auto"):
        code, out, err = run("generate", CROSS, "-m", "nano", *QUICK, "--memory", memory, "--verbose")
        assert (code, data([Path(out.strip())])) == (0, data(whole)), err
        kept.append(int(re.search(r"^(\d+) of 10 transformer blocks resident in memory$", err, re.M)[1]))
        rows = re.findall(r"^(\w+) +[\d.]+ +([\d.]+) MB +([\d.]+) MB$", err, re.M)
        assert [stage for stage, *_ in rows] == ["text", "denoise", "decode"]
        assert all(0 < float(measured) - others < 1.15 * float(predicted) for _, predicted, measured in rows), rows
    assert kept[0] < kept[1] == 10
    assert run("generate", CROSS, "-m", "nano", *QUICK, "--memory", "1MB")[:2] == (8, "")


@shows("generate", "--preview")
@pytest.mark.slow
def test_a_preview_shows_what_becomes_the_picture_and_changes_nothing(draw, tmp_path, monkeypatch):
    shown, call = [], Preview.__call__

    def watch(self, *step):
        call(self, *step)
        shown.append(Image.open(tmp_path / "now.png").convert("RGB"))

    monkeypatch.setattr(Preview, "__call__", watch)
    (path,) = draw("--preview", "now.png")
    assert data([path]) == data(draw())
    assert read_record(tmp_path / "now.png")["preview"] == [4, 4]
    small = Image.open(path).resize((12, 12), Image.Resampling.BOX)
    nearness = [psnr(one.resize((12, 12), Image.Resampling.BOX), small) for one in shown]
    assert len(shown) == 4
    assert min(nearness) > 20  # the paths of this model are straight: the first step heads for the picture already


# --- files and reports ---


@shows("generate", "--output", "--force")
@pytest.mark.slow
def test_outputs_have_the_names_and_formats_asked_for_and_take_free_ones_unless_forced(draw):
    made = draw("--output", "{n}-{seed}-{prompt}.webp", "--seed", "7", "8", prompt="a {red|blue} cross", how=QUICK)
    words = ("red", "red", "blue", "blue")
    assert [path.name for path in made] == [f"{n + 1}-{7 + n % 2}-a-{word}-cross.webp" for n, word in enumerate(words)]
    kinds = {draw("--output", f"a.{ending}", how=QUICK)[0]: ending for ending in ("png", "jpg", "jpeg", "webp")}
    assert [Image.open(path).format for path in kinds] == ["PNG", "JPEG", "JPEG", "WEBP"]
    first, second = draw(how=QUICK), draw(how=QUICK)
    assert [path.name for path in first + second] == ["out.png", "out-2.png"]
    assert (draw("--seed", "2", "--force", how=QUICK), data(first) == data(second)) == (first, False)


@shows("generate", "--quality", "--metadata")
def test_metadata_and_quality_are_what_the_command_asks_for(run, draw):
    (full,) = draw("--output", "a.jpg", prompt="кот", how=QUICK)
    (minimal,) = draw("--output", "a.jpg", "--metadata", "minimal", "--quality", "5", prompt="кот", how=QUICK)
    (rough,) = draw("--output", "a.jpg", "--quality", "5", prompt="кот", how=QUICK)
    assert minimal.stat().st_size < rough.stat().st_size < full.stat().st_size
    assert data([rough]) != data([full])
    assert psnr(Image.open(rough), Image.open(minimal)) == 99
    assert psnr(Image.open(rough), Image.open(full)) < 40
    assert (read_record(full)["prompt"], read_record(minimal)) == ("кот", None)
    out = run("inspect", minimal)[1]
    assert ("trainedAlgorithmicMedia" in out, "кот" in out) == (True, False)
    code, _, err = run("generate", CROSS, "-m", "nano", *QUICK, "--quality", "90")
    assert (code, "--quality does nothing in a PNG" in err) == (2, True)
    facts = json.loads(run("inspect", full, "--json")[1])
    assert facts["parameters"].startswith("кот\nSteps: 1, ")


@shows("generate", "--contact-sheet")
@pytest.mark.slow
def test_a_contact_sheet_holds_every_picture_a_row_for_each_prompt(draw):
    *made, path = draw("--contact-sheet", "--seed", "1", "2", "3", prompt="a {red|blue} circle", how=QUICK)
    sheet = np.asarray(Image.open(path))
    places = []
    for one in made:
        pixels = np.asarray(Image.open(one))
        found = np.argwhere((sheet == pixels[0, 0]).all(2))
        places += [(y, x) for y, x in found if np.array_equal(sheet[y : y + 32, x : x + 32], pixels)]
    assert len(made) == len(places) == 6
    assert places == sorted(places)
    assert read_record(path)["sheet"] == {"across": ["seed 1", "seed 2", "seed 3"], "down": ["red", "blue"]}


@shows("generate", "--contact-sheet", "--metadata", "--quality")
def test_a_contact_sheet_is_saved_as_its_pictures_are(draw):
    how = ["--contact-sheet", "--seed", "1", "2", "--output", "a.jpg", "--metadata", "minimal", "--quality", "30"]
    picture, _, sheet = draw(*how, how=QUICK)
    assert read_record(sheet) is None
    assert Image.open(sheet).quantization == Image.open(picture).quantization


@shows("generate", "--json")
def test_json_tells_what_happens_while_it_happens_and_all_of_it_at_the_end(run, tmp_path):
    rows = ['{"prompt": "a cross", "seed": 1}', '{"prompt": "x", "stesp": 1}', '{"prompt": "a ring", "seed": 2}']
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    how = ["-m", "nano", *SIZE, "--steps", "2", "--output", "{seed}.png", "--contact-sheet"]
    code, out, err = run("generate", "--prompts", "a.jsonl", "--json", *how)
    *lines, last = err.splitlines()
    assert (code, last) == (7, "flux-krea: 1 row of a.jsonl was skipped")
    events, report = list(map(json.loads, lines)), json.loads(out)
    (where,) = report["skipped"]
    assert (where, "did you mean steps?" in report["skipped"][where]) == ("a.jsonl, line 2", True)
    assert [e["where"] for e in events if e["event"] == "skipped"] == [where]
    assert [{n: v for n, v in e.items() if n != "event"} for e in events if e["event"] == "picture"] == report["images"]
    assert [image["path"] for image in report["images"]] == ["1.png", "2.png"]
    assert report["contact_sheet"] == "sheet.png"
    for image in report["images"]:
        assert read_record(tmp_path / image["path"]).items() <= image.items()
        assert set(image["seconds"]) == set(image["peaks"]) == {"text", "denoise", "decode"}
    steps = [(e["done"], e["total"]) for e in events if e["event"] == "progress" and e["stage"] == "denoise"]
    assert steps == [(1, 2), (2, 2)] * 2
    assert {e["stage"] for e in events if e["event"] == "progress"} == {"text", "modulation", "denoise", "decode"}
    assert any(e["text"].startswith("2 pictures: ") for e in events if e["event"] == "said")
    order = [e["event"] for e in events if e["event"] == "picture" or e.get("stage") == "denoise"]
    assert order == ["progress", "progress", "picture"] * 2


# --- who looks first ---


@shows("generate", "--check", "--nsfw-threshold", "--integrity-margin")
@pytest.mark.slow
def test_what_is_checked_is_released_when_it_passes_and_a_threshold_is_where_it_does(run, filters, home, tmp_path):
    def checked(*args) -> int:
        for path in tmp_path.glob("*.png"):
            path.unlink()
        code, out, err = run("generate", CROSS, "-m", "nano", *QUICK, "--check", *args)
        assert out.split() == [path.name for path in tmp_path.glob("*.png")], err
        assert (code == 0) == bool(out)
        return code

    assert checked("filters") == 0
    (scores,) = (entry["scores"] for entry in Log(home / "log").read() if entry["event"] == "passed")
    for option, codes in {"--nsfw-threshold": (4, 0), "--integrity-margin": (0, 4)}.items():
        at = abs(scores[option.strip("-").partition("-")[0]])
        assert [checked("filters", option, str(at * times)) for times in (0.99, 1.01)] == list(codes), option
    assert [checked("review"), checked("both")] == [5, 5]
    assert run("generate", CROSS, "-m", "nano", *QUICK, "--nsfw-threshold", "0.5")[0] == 2  # nobody looks


# --- demo ---


@shows("demo", "prompt", "--output", "--seed", "--contact-sheet", "--force")
@pytest.mark.slow
def test_the_demo_saves_right_pictures_of_a_seed_and_a_sheet_of_them(run, tmp_path, monkeypatch):
    star, *star_is = THINGS[1]
    (tmp_path / "star-large.png").write_text("mine")
    code, out, err = run("demo", star, "--output", "star.png")
    assert (code, out.split()) == (0, ["star.png", "star-large-2.png"]), err
    native, large = Image.open("star.png").convert("RGB"), Image.open("star-large-2.png")
    assert (is_right(native, *star_is), large.size) == (True, (480, 480))
    assert psnr(large.resize(native.size, Image.Resampling.BOX), native) > 30
    assert all(f"{stage} " in err for stage in ("text", "denoise", "decode"))
    assert "toy" in err
    assert err.endswith("flux-krea setup\n")
    code, out, err = run("demo", star, "--output", "star.png", "--force", "--seed", "5")
    assert (code, out.split()) == (0, ["star.png", "star-large.png"]), err
    other = Image.open("star.png")
    assert (is_right(other, *star_is), psnr(other, native) < 30) == (True, True)
    monkeypatch.setattr(demo, "_SCALES", (1.0, 4.5))
    monkeypatch.setattr(demo, "_SEEDS", 1)
    code, out, err = run("demo", star, "--contact-sheet", "--seed", "5")
    assert (code, out) == (0, "demo.png\n"), err
    assert read_record("demo.png")["sheet"] == {"across": ["guidance 1", "guidance 4.5"], "down": ["seed 5"]}
    assert psnr(np.array(Image.open("demo.png"))[-100:-4, -100:-4], other) == 99


# --- shell ---

ALL = {
    "like": "comfy", "model": "nano", "width": 48, "height": 32, "steps": 2, "guidance": 2, "seed": 5, "num-images": 2,
    "noise": "mflux", "negative-prompt": "a star", "true-cfg-scale": 3, "image": "start.webp", "strength": 0.5,
    "output": "{n}.jpg", "quality": 5, "metadata": "minimal", "dtype": "float32", "memory": "194MB",
    "contact-sheet": True, "preview": "now.png", "verbose": True,
}  # fmt: skip
BESIDE = {"force": True, "json": True}  # not in lines


def spelled(options: dict) -> list[str]:
    return [str(word) for name, value in options.items() for word in (f"--{name}", value) if word is not True]


@shows("shell", *(f"--{name}" for name in ALL | BESIDE))
@pytest.mark.slow
def test_options_of_a_shell_and_of_its_lines_do_what_they_do_in_generate(run, draw, model, tmp_path):
    start = draw("--output", "start.webp", how=QUICK)[0].read_bytes()

    def left(verb, *args, **more) -> tuple[dict, dict]:
        """The files that a run leaves in the folder, and its messages."""
        code, out, err = run(verb, *args, *spelled(BESIDE), **more)
        files = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        assert (code, set(files)) == (0, {"start.webp", "now.png", "1.jpg", "2.jpg", "sheet.jpg"}), err
        assert (files.pop("start.webp"), err.count("of 10 transformer blocks")) == (start, 2)
        for name in files:  # all are replaced by the next run; nothing but a preview takes a preview's name
            (tmp_path / name).unlink() if name == "now.png" else (tmp_path / name).write_text("mine")
        told = [
            {n: v for n, v in image.items() if n not in ("seconds", "peaks")} for image in json.loads(out)["images"]
        ]
        return files, told

    expected = left("generate", CROSS, *spelled(ALL))
    assert left("shell", *spelled(ALL), reads=CROSS) == expected
    lines = [f"/{name} {'true' if value is True else value}" for name, value in ALL.items()]
    assert left("shell", "--model", model, reads="\n".join([*lines, CROSS])) == expected


@shows("shell", "--aspect", "--megapixels", "--upscale", "--check", "--nsfw-threshold", "--integrity-margin")
@pytest.mark.slow
def test_what_a_shell_may_not_draw_it_does_not_draw_whenever_that_is_said(run, filters, tmp_path):
    """Too large for the memory, flagged, waiting for a person: before the first line, and in a line."""
    for options, says in (
        ({"aspect": "16:9", "megapixels": "0.14", "memory": "200MB"}, "512 x 256 needs"),
        ({"upscale": "4", "memory": "200MB"}, "128 x 128 needs"),
        ({"check": "filters", "nsfw-threshold": "0"}, "1 of 1 picture withheld by a filter"),
        ({"check": "filters", "integrity-margin": "5"}, "(margin -4.00); expected at most -5"),
        ({"check": "review"}, "1 of 1 picture waiting for review"),
    ):
        size = QUICK[4:] if "aspect" in options else QUICK
        code, out, err = run("shell", "-m", "nano", *size, *spelled(options), reads=CROSS)
        assert (code, out, says in err) == (2, "", True), err
        lines = [*(f"/{name} {value}" for name, value in options.items()), CROSS]
        lines += [*(f"/{name}" for name in options), "/width 32", "/height 32", CROSS]
        code, out, err = run("shell", "-m", "nano", *QUICK, "--force", reads="\n".join(lines))
        assert (code, out, says in err) == (7, "out.png\n", True), err


@shows("generate", "--lora")
def test_an_adapter_changes_what_is_drawn(draw, tmp_path):
    path = adapters.small(tmp_path / "style.safetensors")
    plain, half, whole = (data(draw(*more, how=QUICK))[0] for more in ([], ["--lora", f"{path}=0.5"], ["--lora", path]))
    assert len({plain, half, whole}) == 3


@shows("shell", "--lora")
@pytest.mark.slow
def test_a_shell_takes_adapters_in_its_options_and_in_lines(run, tmp_path):
    path = adapters.small(tmp_path / "style.safetensors")
    _, out, err = run("shell", "-m", "nano", *QUICK, "--lora", path, reads="\n".join([CROSS, "/lora", CROSS]))
    assert len(out.split()) == 2, err
    _, again, err = run("shell", "-m", "nano", *QUICK, reads="\n".join([f"/lora {path}", CROSS]))
    first, second, third = data(tmp_path / name for name in (*out.split(), *again.split()))
    assert first == third != second


@shows("generate", "--style", "--style-rule")
def test_style_images_change_what_is_drawn_by_their_weights_and_rule(draw, tmp_path):
    redux.install(tmp_path, width=128, side=5)
    Image.effect_mandelbrot((40, 30), (-2, -1, 1, 1), 60).save(tmp_path / "a.png")
    ways = [("none", "concat"), ("a.png", "concat"), ("a.png=0.6", "concat"), ("a.png=0.6", "sum")]
    ways += [("a.png=0.6", "grid"), (["a.png", "a.png=0.6"], "grid"), ("a.png", "grid")]
    rows = [
        {"prompt": CROSS} | ({"style": image, "style-rule": rule} if image != "none" else {}) for image, rule in ways
    ]
    rows[0] |= {"style": "none"}
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, [{"prompt": CROSS}, *rows])))
    given = ("--prompts", "rows.jsonl", "--style", "a.png=0.8", "--style-rule", "concat")
    *made, whole = map(pixels, draw(*given, prompt="", how=QUICK))
    assert len(set(made)) == len(made)
    assert whole == made[2], "grid at weight 1 is concat"


@shows("shell", "--style", "--style-rule")
@pytest.mark.slow
def test_a_shell_takes_style_images_in_its_options_and_in_lines(run, tmp_path):
    redux.install(tmp_path, width=128, side=5)
    Image.effect_mandelbrot((40, 30), (-2, -1, 1, 1), 60).save(tmp_path / "a.png")
    given = ("--style", "a.png=0.6", "--style-rule", "concat")
    lines = [CROSS, "/style", "/style-rule", CROSS, "/style a.png=0.6", "/style-rule concat", CROSS]
    _, out, err = run("shell", "-m", "nano", *QUICK, *given, reads="\n".join(lines))
    first, second, third = data(tmp_path / name for name in out.split())
    assert first == third != second, err


# --- images ---


@shows("generate", "--mask", "--soft-mask", "--no-paste", "--expand", "--crop-to-mask", "--fit")
@pytest.mark.slow
def test_what_is_repainted_is_the_mask_and_nothing_else(draw, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (40, 64, 3), np.uint8)
    Image.fromarray(noise).save("start.png")
    mask = np.zeros((40, 64), np.uint8)
    mask[8:28, 20:44], mask[8:28, 44:52] = 255, 96
    Image.fromarray(mask).save("mask.png")
    start = ["--image", "start.png", "--mask", "mask.png"]

    def made(*args) -> np.ndarray:
        (path,) = draw(*start, *args, "--force", how=["--steps", "3", "--seed", "1"])
        return np.asarray(Image.open(path))

    pasted = made()
    assert np.array_equal(pasted[mask == 0], noise[mask == 0])
    assert not np.array_equal(pasted[12:24, 24:40], noise[12:24, 24:40])
    whole = made("--no-paste")
    assert (whole.shape[0] % 16, whole.shape[1] % 16) == (0, 0)
    assert not np.array_equal(whole[:8, :8], noise[:8, :8])
    others = [made("--crop-to-mask"), made("--soft-mask")]
    assert all(np.array_equal(other[mask == 0], noise[mask == 0]) for other in others)
    assert len({other.tobytes() for other in (pasted, *others)}) == 3
    square = ["--width", "64", "--height", "64"]
    shapes = [made(*square, "--fit", fit) for fit in ("stretch", "crop", "pad")]
    assert {one.shape for one in shapes} == {(64, 64, 3)}
    assert len({one.tobytes() for one in shapes}) == 3
    start = ["--image", "start.png"]
    wider = made("--expand", "0,16,0,50%")
    assert wider.shape == (40, 64 + 16 + 32, 3)
    assert np.array_equal(wider[:, 32 + 32 : 32 + 64 - 32], noise[:, 32:32])


@pytest.mark.slow
@shows("generate", "--reference", "--no-auto-resize", "--control-image", "--control", "--keep-map")
def test_references_and_maps_change_what_is_drawn(run, kontext, control, tmp_path):
    for name, size in (("one", (64, 48)), ("two", (48, 64))):
        Image.fromarray(np.random.default_rng(len(name)).integers(0, 256, (*size, 3), np.uint8)).save(f"{name}.png")

    def made(model, *args) -> bytes:
        code, out, err = run("generate", CROSS, "-m", model, *QUICK, "--force", *args)
        assert code == 0, err
        return (tmp_path / out.strip()).read_bytes()

    one, two = ["--no-auto-resize", "--reference", "one.png"], ["--reference", "two.png"]
    references = [made(kontext), made(kontext, *one), made(kontext, *one, *two)]
    assert len(set(references)) == 3
    assert made(control, "--control-image", "one.png") != made(control, "--control-image", "two.png")
    edges = made(control, "--control-image", "one.png", "--control", "canny", "--keep-map")
    (file,) = tmp_path.glob("*-canny.png")
    by_hand = made(control, "--control-image", file)
    assert levels(*(Image.open(io.BytesIO(data)) for data in (edges, by_hand))) == 0


@shows("shell", "--mask", "--soft-mask", "--no-paste", "--expand", "--crop-to-mask", "--fit")
@shows("shell", "--reference", "--no-auto-resize", "--control-image", "--control", "--keep-map")
@pytest.mark.slow
def test_a_shell_takes_images_as_generate_does(run, kontext, control, tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)).save("start.png")
    Image.new("L", (64, 48), 200).save("mask.png")
    for model, options in {
        "nano": {"image": "start.png", "mask": "mask.png", "soft-mask": True, "no-paste": True, "fit": "pad"},
        "nano ": {"image": "start.png", "mask": "mask.png", "crop-to-mask": True, "expand": "16"},
        kontext: {"reference": "start.png", "no-auto-resize": True},
        control: {"control-image": "start.png", "control": "canny", "keep-map": True},
    }.items():
        model = str(model).strip()
        lines = [f"/{name} {'true' if value is True else value}" for name, value in options.items()]
        runs = (
            run("generate", CROSS, "-m", model, *QUICK, *spelled(options)),
            run("shell", "-m", model, *QUICK, *spelled(options), reads=CROSS),
            run("shell", "-m", model, *QUICK, reads="\n".join([*lines, CROSS])),
        )
        assert len({(tmp_path / out.strip()).read_bytes() for code, out, err in runs}) == 1, runs


@shows("generate", "--credentials")
@shows("shell", "--credentials")
def test_pictures_are_signed_where_that_is_asked_for(run, tmp_path):
    """More is in test_credentials.py."""
    pytest.importorskip("c2pa", reason="needs c2pa-python, the extra `credentials`")
    runs = (
        run("generate", CROSS, "-m", "nano", *QUICK, "--credentials", "require"),
        run("shell", "-m", "nano", *QUICK, "--credentials", "on", reads="\n".join([CROSS, "/credentials off", CROSS])),
    )
    paths = [tmp_path / name for _, out, _ in runs for name in out.split()]
    assert list(map(has_credentials, paths)) == [True, True, False], runs


@shows("generate", "--watermark")
@shows("shell", "--watermark")
def test_a_watermark_is_asked_for_and_needs_a_large_picture(run):
    """A large one is in test_watermark.py."""
    for ran in (
        run("generate", CROSS, "-m", "nano", *QUICK, "--watermark"),
        run("shell", "-m", "nano", *QUICK, "--watermark", reads=CROSS),
        run("shell", "-m", "nano", *QUICK, reads="\n".join(["/watermark true", CROSS])),
    ):
        assert ran[0] == 2, ran
        assert "watermark, and the picture is 32 x 32; expected 65536 pixels" in ran[2]


# --- all of them ---


@pytest.mark.parametrize("verb", ["generate", "demo", "shell"])
def test_no_option_of_a_verb_is_without_a_test_of_what_it_does(verb):
    assert {parameter.opts[-1] for parameter in VERBS[verb].load().params} == SHOWN[verb]


@pytest.mark.parametrize("option", ["guidance", "nsfw_threshold", "integrity_margin", "true_cfg_scale"])
def test_zero_is_a_value_that_was_given(option):
    """It equals False, and is none."""
    given, *_ = given_options({option: 0.0, "force": False, "image": None, "lora": ()})
    assert given == {option: 0.0}
