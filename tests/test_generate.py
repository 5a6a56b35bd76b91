"""`flux-krea generate` says what it will do, and does it: sizes, prompts, seeds, other tools, pictures made again."""

import csv
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import MADE_FOR, REFERENCE, edit_json, facts, image, levels
from PIL import Image

from mlx_flux_krea import files, presets
from mlx_flux_krea.commands.shared import jobs as planning
from mlx_flux_krea.commands.shared import rows
from mlx_flux_krea.commands.shared.output import check_output
from mlx_flux_krea.errors import UsageError
from mlx_flux_krea.files import sha256_if_exists
from mlx_flux_krea.home import NANO
from mlx_flux_krea.provenance import Picture, read_record
from mlx_flux_krea.sampling.sampler import make_sigmas
from mlx_flux_krea.weights import open_model

CAT = "A cat holding a sign that says hello world"
TINY = ["--width", "32", "--height", "32", "--steps", "1"]


@pytest.fixture
def tiny(command, model):
    """Runs `generate` on the tiny model, small and short where nothing else is asked for."""

    def run(*args, size=TINY):
        return command("generate", *args, "-m", model, *size)

    return run


def same(a: Path, b: Path) -> bool:
    return levels(Image.open(a), Image.open(b)) == 0


def prepared(model, config=None, **given):
    """Prepares the jobs of some options, without generating them."""
    base = planning.merge(config or {}, given)
    jobs, skipped = planning.make_jobs(base, given)
    assert skipped == []
    return [planning.prepare(job, open_model(model), {}) for job in jobs]


# --- sizes ---


def test_every_aspect_is_a_shape_near_its_name_and_its_area():
    for name, size in presets.ASPECTS.items():
        wide, high = map(float, name.split(":"))
        for megapixels in (0.25, 1.0, 1.5, 2.3):
            w, h = planning.size_of(name, megapixels, (0, 0))
            assert (w % 16, h % 16) == (0, 0)
            assert w / h == pytest.approx(wide / high, rel=0.06), name
            assert w * h / 2**20 == pytest.approx(megapixels, rel=0.08), name
        assert planning.size_of(name, 1.0, (0, 0)) == size


def test_megapixels_alone_keep_the_shape_of_the_image_or_of_the_model(model, tmp_path):
    Image.new("RGB", (300, 100)).save(tmp_path / "wide.png")
    (job,) = prepared(model, prompt=CAT, megapixels=0.75, image=tmp_path / "wide.png")
    assert (job.request.width, job.request.height) == (1536, 512)
    (job,) = prepared(model, prompt=CAT, megapixels=0.25)
    assert (job.request.width, job.request.height) == (512, 512)


def test_a_size_at_which_the_model_repeats_itself_is_drawn_with_a_warning(model):
    assert prepared(model, prompt=CAT, width=1280, height=1280)[0].notes == ()
    (note,) = prepared(model, prompt=CAT, width=1552, height=1552)[0].notes
    assert note.startswith("1552 x 1552 has 2.3 times the area that this model was made for, 1024 x 1024: it repeats")
    assert note.endswith("--upscale keeps it whole")
    assert prepared(model, prompt=CAT, aspect="1:1", megapixels=2.3)[0].notes == ()  # in two passes
    (note,) = prepared(model, prompt=CAT, width=256, height=256)[0].notes
    assert note.startswith(
        "256 x 256 has 0.062 times the area that this model was made for, 1024 x 1024: shapes get lost"
    )


@pytest.mark.parametrize(
    ("given", "size"),
    [
        ({"aspect": "3:2"}, (112, 80)),
        ({"aspect": "21:9"}, (144, 64)),
        ({"aspect": "1:1", "megapixels": 0.015}, (128, 128)),
        ({"aspect": "1:1", "megapixels": 0.0625}, (96, 96)),  # the first pass
        ({"like": "krea"}, (96, 96)),
        ({"like": "bfl"}, (128, 64)),
        ({"like": "fal"}, (96, 64)),
        ({"like": "bfl", "aspect": "2:3"}, (80, 112)),
        ({}, (96, 96)),
    ],
)
def test_sizes_start_from_the_models_own_area(given, size):
    request = prepared(NANO, prompt=CAT, **given)[0].request
    assert (request.width, request.height) == size


@pytest.mark.parametrize(
    ("image", "given", "size", "note"),
    [
        ((128, 96), {}, (128, 96), None),
        ((96, 128), {}, (96, 128), None),
        ((64, 64), {}, (64, 64), None),
        ((100, 75), {}, (96, 80), "the image is 100 x 75, the picture 96 x 80: sides are multiples of 16"),
        ((30, 20), {}, (112, 80), "the image is 30 x 20, the picture 112 x 80: this model was made for 96 x 96"),
        ((3000, 2000), {}, (112, 80), "the image is 3000 x 2000, the picture 112 x 80: this model was"),
        ((1, 1), {}, (96, 96), "the image is 1 x 1, the picture 96 x 96"),
        ((300, 200), {"width": 96}, (96, 64), None),
        ((300, 200), {"height": 96}, (144, 96), None),
        ((300, 200), {"width": 100}, (96, 64), "100 x 64 is no multiple of 16"),
        ((300, 200), {"width": 80, "height": 80}, (80, 80), "the image of 300 x 200 is stretched to 80 x 80; `fit`"),
        ((300, 200), {"width": 80, "height": 80, "fit": "crop"}, (80, 80), None),
    ],
    ids=str,
)
def test_an_image_keeps_its_size_where_it_fits_and_else_its_shape(tmp_path, image, given, size, note):
    Image.new("RGB", image).save(tmp_path / "a.png")
    request = prepared(NANO, prompt=CAT, image=tmp_path / "a.png", **given)[0].request
    assert (request.width, request.height) == size
    assert [text[: len(note or "")] for text in request.notes] == [note] * (note is not None)


@pytest.mark.parametrize("size", [(8000, 1), (2000, 10), (3, 900)])
def test_an_image_too_long_for_any_size_is_refused_with_its_own_numbers(tmp_path, size):
    Image.new("RGB", size).save(tmp_path / "a.png")
    with pytest.raises(
        UsageError, match=r"the image is .*; expected sides from 16 to .* pixels at the model's area; set `width`"
    ):
        prepared(NANO, prompt=CAT, image=tmp_path / "a.png")


def test_a_far_larger_or_smaller_size_gets_a_note_and_others_none():
    for (width, height), says in {
        (96, 96): None,
        (128, 128): None,
        (32, 32): None,
        (16, 16): "16 x 16 has 0.028 times the area that this model was made for, 96 x 96: shapes get lost",
        (160, 128): "160 x 128 has 2.2 times the area that this model was made for, 96 x 96: it repeats objects",
    }.items():
        notes = prepared(NANO, prompt=CAT, width=width, height=height)[0].notes
        assert [note[: len(says or "")] for note in notes] == [says] * (says is not None)


@pytest.mark.parametrize("other", [["--aspect", "1:1"], ["--megapixels", "1"]])
def test_width_and_aspect_together_are_an_error(tiny, tmp_path, other):
    code, out, err = tiny(CAT, *other)
    assert (code, out) == (2, "")
    assert f"--width and {other[0]} are both given" in err
    assert list(tmp_path.iterdir()) == []


# --- prompts ---


@pytest.mark.slow
def test_a_prompt_comes_from_standard_input(model, tmp_path):
    program = [str(Path(sys.executable).parent / "flux-krea"), "generate", "-", "-m", str(model), *TINY]
    ran = subprocess.run(program, cwd=tmp_path, input=f"\ufeff{CAT}\n".encode(), capture_output=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert read_record(tmp_path / "out.png")["prompt"] == CAT
    ran = subprocess.run(program, cwd=tmp_path, input=b"caf\xe9", capture_output=True, check=False)
    assert ran.returncode == 2
    assert b"standard input is not UTF-8" in ran.stderr


@pytest.mark.slow
def test_alternatives_make_a_picture_of_each_choice(tiny, tmp_path):
    code, out, err = tiny("a {red|green} {cat|dog}", "-o", "{prompt}.png", "--seed", "3")
    assert code == 0, err
    assert out.split() == [f"a-{c}-{a}.png" for c in ("red", "green") for a in ("cat", "dog")]
    assert read_record(tmp_path / "a-green-cat.png")["prompt"] == "a green cat"
    assert "4 pictures: 32 x 32 with 1 step" in err


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [
        ("a frog", ["a frog"]),
        ("{|red }frog", ["frog", "red frog"]),
        (r"\{a|b\}", ["{a|b}"]),
        (r"{a\|b|c}", ["a|b", "c"]),
        ('{"scene": "a frog"} | more', ['{"scene": "a frog"} | more']),
        ('{"scene": "a frog"}', ['{"scene": "a frog"}']),
        ("a | b", ["a | b"]),
        ("{a|{b|c}}", UsageError),
        ("{a|b", UsageError),
        ("{a b} c|d}", UsageError),
        ("{a|b}" * 14, UsageError),
    ],
)
def test_braces_without_a_bar_and_escaped_ones_are_literal(prompt, prompts):
    if prompts is UsageError:
        with pytest.raises(UsageError):
            rows.alternatives(prompt, 10000)
    else:
        assert [text for text, _ in rows.alternatives(prompt, 10000)] == prompts


@pytest.mark.slow
def test_how_much_of_a_prompt_is_read_is_said_before_the_work_starts(tiny, full_model):
    full = ["-m", full_model, *TINY]
    code, _, err = tiny("{a cat|" + "cat " * 80 + "}", size=full)
    assert code == 0
    announced, cut, first, *_ = (line for line in err.splitlines() if MADE_FOR not in line)
    t5 = [len(entry["t5_ids"]) for entry in facts()["tokens"] if entry["prompt"] == CAT]
    assert re.search(r"4 to 77 of 77 CLIP tokens used, \d+ to \d+ of 512 T5 tokens used", announced), announced
    assert cut.startswith("note: CLIP reads 77 tokens; not read: 'cat cat cat cat cat")
    assert first.startswith("seed ")
    assert err.count("not read") == 1
    assert f"{t5[0]} of 512 T5 tokens used" in tiny(CAT, size=full)[2]


CSV = [
    ["prompt", "steps", "seed", "negative-prompt", "true_cfg_scale", "output"],
    ["a frog, sitting", "2", "1 2", "", "", ""],
    ["a toad", "", "", "blurry", "2", "toad.webp"],
    ["a newt", "0", "", "", "", ""],
    ["an eel", "", "", "", "", "", "too many"],
    ["an olm", "", "", "blurry", "", ""],
    ["", "", "", "", "", ""],
    ["a {red|blue} crab", "", "9", "", "", "crab-{seed}-{n}.png"],
]


@pytest.mark.slow
def test_a_csv_has_any_option_in_its_rows_and_bad_rows_are_skipped(tiny, tmp_path):
    text = io.StringIO()
    csv.writer(text).writerows(CSV)
    (tmp_path / "list.csv").write_text(text.getvalue(), encoding="utf-8-sig")
    code, out, err = tiny("--prompts", "list.csv", "-o", "out_{seed}.png", "--guidance", "3")
    assert code == 7, err
    assert out.split() == ["out_1.png", "out_2.png", "toad.webp", "crab-9-5.png", "crab-9-6.png"]
    records = [read_record(tmp_path / name) for name in out.split()]
    assert [r["num_inference_steps"] for r in records] == [2, 2, 1, 1, 1]
    assert [r["prompt"] for r in records][2:] == ["a toad", "a red crab", "a blue crab"]
    assert {r["guidance_scale"] for r in records} == {3.0}
    assert records[2]["negative_prompt"] == "blurry"
    assert "skipped list.csv, line 4: steps is '0'; expected a whole number from 1 to 1000" in err
    assert "skipped list.csv, line 5: 7 cells; expected 6" in err
    assert "skipped list.csv, line 6: a negative prompt does nothing" in err
    assert err.splitlines()[-1] == "flux-krea: 3 rows of list.csv were skipped"


@pytest.mark.parametrize(
    "name", ["{outside}/x.png", "../x.png", "sub/../../x.png", "link/x.png", "{{seed}}/../../x.png"]
)
def test_a_row_writes_nothing_outside_the_folder_of_the_output(tiny, tmp_path, name):
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    for folder in (outside, tmp_path / "sub", tmp_path / "7"):
        folder.mkdir()
    (tmp_path / "link").symlink_to(outside)
    row = {"prompt": "a frog", "seed": [7], "output": name.format(outside=outside)}
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(row)}\n" + '{"prompt": "a toad", "output": "sub/b.png"}\n')
    code, out, err = tiny("--prompts", "a.jsonl")
    assert (code, out) == (7, "sub/b.png\n"), err
    assert "skipped a.jsonl, line 1: the row's output" in err
    assert "lies outside the folder of --output" in err
    assert list(outside.iterdir()) == []
    assert not (tmp_path.parent / "x.png").exists()


def test_a_row_writes_into_the_folder_that_was_typed(tiny, tmp_path):
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    outside.mkdir()
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "a frog", "output": f"{outside}/b.png"}))
    code, out, err = tiny("--prompts", "a.jsonl", "-o", outside / "a.png")
    assert (code, out) == (0, f"{outside}/b.png\n"), err


@pytest.mark.slow
def test_forty_prompts_in_one_process_one_of_them_bad(tiny, tmp_path, monkeypatch):
    """All are drawn but one; and once 32 prompts are kept, memory does not grow with their number."""
    import mlx.core as mx

    from mlx_flux_krea.commands.shared import delivery

    lines = [json.dumps({"prompt": f"frog {n}", "seed": n}) for n in range(42)]
    lines[20] = '{"prompt": "frog", "stesp": 3}'
    (tmp_path / "list.jsonl").write_text("\n".join(lines))
    save, held = delivery.save, []

    def measured(*args, **options):
        held.append(mx.get_active_memory())
        return save(*args, **options)

    monkeypatch.setattr(delivery, "save", measured)
    size = ["--width", "16", "--height", "16", "--steps", "1"]
    code, out, err = tiny("--prompts", "list.jsonl", "-o", "{seed}.png", size=size)
    assert code == 7
    assert out.split() == [f"{n}.png" for n in range(42) if n != 20]
    assert "skipped list.jsonl, line 21: there is no option 'stesp' here; did you mean steps?" in err
    assert max(held[37:]) <= held[35] + 4096, held


@pytest.mark.slow
def test_the_encoders_are_read_once_for_several_prompts(tiny, tmp_path, monkeypatch):
    from mlx_flux_krea.commands.shared import generation
    from mlx_flux_krea.weights import NetworkFolder

    load, loaded = NetworkFolder.load, []
    monkeypatch.setattr(NetworkFolder, "load", lambda self, dtype: loaded.append(self.component) or load(self, dtype))
    (tmp_path / "list.txt").write_text("\n".join(f"frog {n}" for n in range(5)))
    monkeypatch.setattr(generation, "_TOGETHER", 3)
    size = ["--width", "16", "--height", "16", "--steps", "1", "--negative-prompt", "mud", "--true-cfg-scale", "2"]
    code, out, err = tiny("--prompts", "list.txt", "--seed", "1", "-o", "{n}.png", size=size)
    assert (code, len(out.split())) == (0, 5), err
    assert loaded.count("text_encoder_2") == 2
    code, _, err = tiny("frog 4", "--seed", "1", "-o", "alone.png", size=size)
    assert same(tmp_path / "5.png", tmp_path / "alone.png")


@pytest.mark.parametrize(
    ("name", "text", "prompts"),
    [
        ("a.txt", "# heads\na frog\n  # tails\n\\# one\n", ["a frog", "# one"]),
        ("a", "a frog\r\na toad", ["a frog", "a toad"]),
        ("a.TXT", "a frog", ["a frog"]),
        ("a.csv", "# made by hand\nprompt,steps\n#a,1\na frog,2\n", ["a frog"]),
        ("a.csv", 'prompt;steps\n"a frog, green";2\n', ["a frog, green"]),
        ("a.tsv", "steps\tprompt\n2\ta frog, green\n", ["a frog, green"]),
        ("a.json", '["a frog", {"prompt": "a toad", "steps": 2}]', ["a frog", "a toad"]),
        ("a.json", '{"prompt": "a frog",\n "steps": 2}', ["a frog"]),
        ("a.jsonl", '# frogs\n{"prompt": "a frog"}\n"a toad"', ["a frog", "a toad"]),
        ("a.ndjson", '{"prompt": "a frog"}', ["a frog"]),
    ],
)
def test_a_prompt_file_is_read_by_its_ending_and_may_have_comments(tmp_path, name, text, prompts):
    (tmp_path / name).write_text(text)
    assert [options["prompt"] for _, options in rows.read_rows(tmp_path / name)] == prompts


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.txt", "", "holds no prompt"),
        ("a.txt", "a\0b", "is no text"),
        ("a.json", "[]", "holds no prompt"),
        ("a.csv", "frog\n", "names of options, with prompt"),
        ("a.csv", 'prompt\n"a', "a.csv, line 2"),
        ("a.jsonl", "[1]\n{", "no row can be used; a.jsonl, line 1: this is not a JSON object"),
        ("a.jsonl", '{"prompt": "a", "model": "x"}', "there is no option 'model' here"),
        ("a.jsonl", '{"prompt": "a", "steps": 2.5}', "steps is '2.5'; expected a whole number from 1 to 1000"),
        ("a.jsonl", '{"prompt": ["a"]}', "prompt is list"),
        ("a.jsonl", '{"prompt": "a", "width": 32, "aspect": "1:1"}', "--width and --aspect are both given"),
        ("a.jsonl", '{"seed": 1}', "there is no prompt"),
    ],
)
def test_a_prompt_file_without_a_usable_row_ends_with_2(tiny, tmp_path, name, text, says):
    (tmp_path / name).write_text(text)
    code, out, err = tiny("--prompts", name)
    assert (code, out) == (2, "")
    assert says in err
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_a_text_file_has_a_prompt_a_line(tiny, tmp_path):
    (tmp_path / "a.txt").write_text("a frog, sitting\n\n  a toad\r\n")
    code, out, _ = tiny("--prompts", "a.txt")
    assert (code, out.split()) == (0, ["out.png", "out-2.png"])
    assert read_record(tmp_path / "out-2.png")["prompt"] == "a toad"


# --- several ---


@pytest.mark.parametrize(
    ("options", "seeds"),
    [
        (["--seed", "5", "3", "8"], [5, 3, 8]),
        (["--seed=5", "3"], [5, 3]),
        (["--seed", "7+3"], [7, 8, 9]),
        (["--seed", "0,7+2"], [0, 7, 8]),
        (["--seed", "7", "-n", "2"], [7, 8]),
    ],
)
def test_several_seeds_are_several_pictures_named_by_their_seed(tiny, tmp_path, options, seeds):
    code, out, err = tiny(*options, "-o", "out_{seed}.png", CAT)
    assert code == 0, err
    assert out.split() == [f"out_{seed}.png" for seed in seeds]
    assert f"seed {', '.join(map(str, seeds))}, 11 of" in err
    assert [read_record(tmp_path / name)["seed"] for name in out.split()] == seeds


@pytest.mark.slow
def test_a_random_seed_is_chosen_once_for_all_prompts(tiny, tmp_path):
    _, out, err = tiny("a {cat|dog}", "-n", "2", "-o", "{n}-{seed}.png")
    seeds = [int(re.search(r"-(\d+)", name)[1]) for name in out.split()]
    assert seeds == [seeds[0], seeds[0] + 1] * 2
    assert f"seed {seeds[0]}, {seeds[1]}, 4 to" in err.splitlines()[0]


@pytest.mark.parametrize(
    ("options", "noted"),
    [
        (("a {cat|dog}", "--seed", "1", "2", "-o", "x_{seed}.png"), "x_{seed}.png makes 2 names for 4 pictures"),
        ((CAT, "--seed", "1", "2", "-o", "{prompt}.png"), "{prompt}.png makes 1 name for 2 pictures"),
        (("a {cat|dog}", "--seed", "1", "2", "-o", "x_{n}.png"), None),
        (("a {cat|dog}", "--seed", "1", "-o", "x.png"), None),  # no field: numbers are what is wanted
    ],
)
def test_names_that_do_not_tell_pictures_apart_are_noted(tiny, options, noted):
    code, out, err = tiny(*options)
    assert (code, len(set(out.split()))) == (0, len(out.split())), err
    assert ("tells them apart" in err, (noted or "") in err) == (bool(noted), True)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--seed", "1", "2", "-n", "2"], "--num-images is given with 2 seeds"),
        (["--seed", "7+0"], "range of 0 seeds"),
        (["--seed", "7+9999999"], "range of 9999999 seeds"),
        (["--seed", f"{2**64 - 1}+2"], "expected whole numbers from 0 to"),
        (["--seed", str(2**64 - 1), "-n", "2"], "at most 18446744073709551615"),
        (["--seed", "x"], "'x' is neither a seed nor a range"),
        (["-o", "{sede}.png"], "{sede}.png holds {sede}; expected {seed}, {n} or {prompt}"),
        (["-o", "{seed.png"], "write {{ for a brace"),
        (["-o", "{seed!x}.png"], "write {{ for a brace"),
        (["-o", "{}.png"], "write {{ for a brace"),
        (["-o", "{prompt}/a.png"], "there is no folder a-cat-holding"),
        (["--prompts", "a.txt"], "PROMPT and --prompts are both given"),
    ],
)
def test_what_cannot_be_several_is_refused_before_the_work(tiny, tmp_path, options, says):
    code, out, err = tiny(CAT, *options)
    assert (code, out) == (2, "")
    assert says in err
    assert list(tmp_path.iterdir()) == []


def test_without_any_prompt_the_ways_to_give_one_are_named(tiny):
    code, _, err = tiny()
    assert code == 2
    assert "there is no prompt; expected a text, - for standard input, --prompts FILE, or --from IMAGE" in err


def test_pictures_of_several_sizes_make_no_sheet(tiny, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "width": 48}')
    code, out, err = tiny("--prompts", "a.jsonl", "--contact-sheet")
    assert (code, out) == (2, "")
    assert "--contact-sheet has pictures of several sizes" in err


# --- like other tools ---

LIKE = {  # width, height, steps, guidance, noise: what each tool's own code or page says
    "bfl": (1360, 768, 50, 2.5, "bfl"),
    "krea": (1024, 1024, 28, 4.5, "bfl"),
    "diffusers": (1024, 1024, 28, 3.5, "diffusers"),
    "comfy": (1024, 1024, 20, 3.5, "comfy"),
    "mflux": (1024, 1024, 25, 3.5, "mflux"),
    "replicate": (1024, 1024, 28, 3.0, "bfl"),
    "fal": (1024, 768, 28, 4.5, "bfl"),
}


@pytest.mark.parametrize("tool", LIKE)
def test_like_sets_what_the_tool_does_and_options_beside_it_override(model, tool):
    def settings(**given):
        r = prepared(model, prompt=CAT, like=tool, **given)[0].request
        return r.width, r.height, r.num_inference_steps, r.guidance_scale, r.noise

    assert settings() == LIKE[tool]
    assert settings(aspect="16:9", steps=3, guidance=2.0, noise="comfy") == (1344, 768, 3, 2.0, "comfy")


@pytest.mark.slow
def test_a_picture_like_diffusers_is_the_picture_that_diffusers_made(tiny, full_model, tmp_path):
    size = ["-m", full_model, "--width", "64", "--height", "64", "--steps", "4", "--guidance", "4.5"]
    code, _, err = tiny(CAT, "--like", "diffusers", "--seed", "42", size=size)
    assert code == 0
    assert levels(Image.open(tmp_path / "out.png"), image("images/t2i_4.0.png")) <= 1
    assert "note: like diffusers, by huggingface/diffusers 58eb52c" in err


@pytest.mark.slow
def test_like_comfy_has_its_schedule_and_its_length_of_t5(tiny, full_model, tmp_path):
    """The table that ComfyUI shifts by 1.15 at every size, picked from as its scheduler `simple` does."""
    size = ["-m", full_model, "--width", "64", "--height", "48", "--steps", "7"]
    code, _, err = tiny(CAT, "--like", "comfy", "--seed", "1", size=size)
    assert code == 0, err
    record = read_record(tmp_path / "out.png")
    assert (record["max_sequence_length"], record["noise"]) == (256, "comfy")
    table = [np.exp(1.15) / (np.exp(1.15) + (1 / (n / 10000) - 1)) for n in range(1, 10001)]
    comfy = [table[-(1 + int(x * (10000 / 7)))] for x in range(7)]
    ours = make_sigmas(open_model(full_model).index.schedule, 12, 7, record["sigmas"])
    assert np.abs(ours[:-1] - comfy).max() < 1e-6


# --- made again ---


INPUT = REFERENCE / "images" / "input.png"


@pytest.mark.slow
def test_options_beside_from_change_the_picture(tiny, command, model, tmp_path):
    tiny(CAT, "--like", "comfy", "--seed", "7", "-o", "a.png")
    change = ["a dog", "--seed", "8", "9", "--width", "48", "--steps", "3", "--guidance", "2", "-o", "{seed}.png"]
    code, out, err = command("generate", "--from", "a.png", "-m", model, *change)
    assert (code, out.split()) == (0, ["8.png", "9.png"]), err
    record = read_record(tmp_path / "9.png")
    changed = {"prompt": "a dog", "seed": 9, "width": 48, "height": 32, "num_inference_steps": 3, "guidance_scale": 2.0}
    assert changed.items() <= record.items()
    assert (record["noise"], "sigmas" in record) == ("comfy", False)


@pytest.mark.slow
def test_one_picture_of_a_batch_is_made_again(command, model, pipe, tmp_path):
    """From one stream of numbers, and from streams of their own over one sampled input image."""
    size = {"width": 32, "height": 32, "num_inference_steps": 2}
    batch = pipe(CAT, seed=5, num_images_per_prompt=3, **size).images[2]
    sampled = pipe(CAT, seed=[5, 6], num_images_per_prompt=2, image=INPUT, **size).images[1]
    for picture, image_given in ((batch, []), (sampled, ["--image", INPUT])):
        picture.save(tmp_path / "a.png")
        code, _, err = command("generate", "--from", "a.png", "-m", model, "-o", "b.png", "--force", *image_given)
        assert code == 0, err
        assert same(tmp_path / "a.png", tmp_path / "b.png")


@pytest.mark.slow
def test_the_installed_model_that_made_a_picture_is_found(tiny, command, model, home, tmp_path):
    tiny(CAT, "-o", "a.png")
    shutil.copytree(model, home / "models" / "one")
    shutil.copytree(model, home / "models" / "two")
    edit_json(home / "models" / "one" / "manifest.json", other=True)
    code, _, err = command("generate", "--from", "a.png", "-o", "b.png")
    assert code == 0, err
    assert "other weights" not in err
    code, _, err = command("generate", "--from", "a.png", "-o", "c.png", "-m", "one")
    assert code == 0
    assert "note: a.png was made with other weights than those of" in err


def test_the_recorded_model_goes_before_the_default_and_the_small_one_counts(command, model, home, tmp_path):
    """Where -m is absent; it may be any model."""
    Picture.from_pixels(
        np.zeros((16, 16, 3), np.uint8),
        {"software": "s", "prompt": "a", "manifest_sha256": sha256_if_exists(NANO / "manifest.json")},
    ).save(tmp_path / "nano.png")
    shutil.copytree(model, home / "models" / "one")
    config = {"model": "one"}
    given = {"from_": tmp_path / "nano.png"}
    assert planning.merge(config, given)["model"] == str(NANO)
    assert planning.merge(config, given | {"model": "one"})["model"] == "one"
    record = {"software": "s", "prompt": "a", "manifest_sha256": "0" * 64}
    Picture.from_pixels(np.zeros((16, 16, 3), np.uint8), record).save(tmp_path / "other.png")
    assert planning.merge(config, {"from_": tmp_path / "other.png"})["model"] == "one"


def record_of(tmp_path, **record):
    Picture.from_pixels(np.zeros((16, 16, 3), np.uint8), {"software": "s", "prompt": "p"} | record).save("a.png")


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ({"given": ["latents"]}, "from arrays that its record does not hold"),
        ({"truncated": True}, "was cut to fit into a JPEG"),
        ({"sheet": {}}, "a.png is a contact sheet"),
        ({"image": {"rgb_sha256": "0"}, "strength": 0.6}, "name it with --image"),
        ({"batch": [2, 2]}, "the record says that the batch is [2, 2]"),
        ({"batch": "x"}, "the record says that the batch is 'x'"),
        ({"width": "wide"}, "width is 'wide'; expected a whole number from 1 to"),
        ({"seed": {}}, "seed is dict"),
        ({"sigmas": "x"}, "sigmas are not falling numbers"),
        ({"prompt_2": 5}, "prompt_2 is int"),
        ({"image_seed": "x"}, "seed is 'x'"),
        ({"max_sequence_length": 10**9}, "max_sequence_length is 1000000000"),
    ],
)
def test_a_record_that_cannot_be_followed_is_refused(command, model, tmp_path, monkeypatch, record, says):
    monkeypatch.chdir(tmp_path)
    record_of(tmp_path, **record)
    code, out, err = command("generate", "--from", "a.png", "-m", model)
    assert (code, out) == (2, ""), err
    assert says in err
    Image.new("RGB", (16, 16)).save("b.png")
    assert "b.png has no record of ours" in command("generate", "--from", "b.png", "-m", model)[2]


@pytest.mark.slow
def test_another_image_than_the_record_has_is_noted(tiny, command, model, tmp_path):
    tiny(CAT, "--image", INPUT, "--strength", "1", "-o", "a.png")
    code, _, err = command("generate", "--from", "a.png", "-m", model, "--image", "a.png", "-o", "b.png")
    assert code == 0
    assert "note: a.png is not the image that a.png was made from" in err


# --- defaults of one's own ---


@pytest.mark.slow
def test_the_config_file_holds_where_the_command_says_nothing(tiny, command, model, tmp_path):
    assert command("config")[:2] == (0, "")
    for words in (
        ["steps", "2"],
        ["--", "seed", "4", "5"],
        ["aspect", "16:9"],
        ["output", "{seed}.png"],
        ["model", model],
    ):
        code, _, err = command("config", *words)
        assert code == 0, err
    assert json.loads(command("config", "--json")[1])["seed"] == "4 5"
    code, out, err = command("generate", CAT, "--width", "32", "--height", "32")
    assert (code, out.split()) == (0, ["4.png", "5.png"]), err
    assert read_record(tmp_path / "5.png")["num_inference_steps"] == 2
    code, out, _ = command("generate", CAT, "--width", "32", "--height", "32", "--seed", "6", "--steps", "1")
    assert out.split() == ["6.png"]
    assert read_record(tmp_path / "6.png")["num_inference_steps"] == 1
    assert command("config", "--unset", "seed")[0] == 0
    assert "seed" not in json.loads(command("config", "--json")[1])


def test_like_and_from_go_before_the_config_file(model):
    config = {"steps": 5, "guidance": 2.0, "negative_prompt": "blurry", "true_cfg_scale": 2.0, "aspect": "1:1"}
    (job,) = prepared(model, config, prompt=CAT, like="bfl")
    request = job.request
    assert (request.width, request.num_inference_steps, request.guidance_scale) == (1360, 50, 2.5)
    assert request.negative_prompt == ("blurry",)
    (job,) = prepared(model, {"like": "bfl"}, prompt=CAT, steps=5)
    assert (job.request.width, job.request.num_inference_steps) == (1360, 5)


def test_a_picture_made_again_is_the_same_whatever_the_config_file_says(tiny, command, model, tmp_path):
    tiny(CAT, "-o", "a.png")
    for words in (["steps", "2"], ["negative-prompt", "blurry"], ["like", "comfy"], ["num-images", "2"]):
        command("config", *words)
    code, out, err = command("generate", "--from", "a.png", "-m", model, "-o", "b.png")
    assert (code, out) == (0, "b.png\n"), err
    assert same(tmp_path / "a.png", tmp_path / "b.png")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["stesp", "3"], "there is no option 'stesp' here; did you mean steps?"),
        (["prompt", "a"], "there is no option 'prompt' here"),
        (["steps", "many"], "steps is 'many'; expected a whole number from"),
        (["--unset"], "--unset has no option"),
        (["--unset", "steps"], "steps is not set"),
        (["--unset", "steps", "3"], "steps has a value, and --unset"),
        (["width", "64"], "--width and --aspect are both given"),
    ],
)
def test_what_the_config_file_cannot_hold_is_refused(command, home, words, says):
    command("config", "aspect", "1:1")
    code, out, err = command("config", *words)
    assert (code, out) == (2, "")
    assert says in err
    assert json.loads((home / "config.json").read_text()) == {"aspect": "1:1"}


@pytest.mark.parametrize("text", ["{", "[]", '{"steps": "many"}', '{"force": true}'])
def test_a_damaged_config_file_stops_generating_and_is_named(tiny, home, tmp_path, text):
    home.mkdir()
    (home / "config.json").write_text(text)
    code, out, err = tiny(CAT)
    assert (code, out) == (2, "")
    assert "config.json" in err
    assert list(tmp_path.glob("*.png")) == []


def test_a_file_that_tried_a_folder_and_was_left_by_a_kill_goes_with_the_next_check(tmp_path):
    stray = tmp_path / files._partial("a[1]-000000.png", files._NO_PROCESS, "0" * 16)
    others = [tmp_path / ".another.partial", tmp_path / files._partial("a[1].png", 17, "0" * 16)]
    for path in (stray, *others):
        path.touch()
    check_output(tmp_path / "a[1].png")
    assert sorted(tmp_path.iterdir()) == sorted(others)
