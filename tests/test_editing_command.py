"""Editing on the command line: pictures that are repeated, resumed, listed in files and typed in the shell."""

import gc
import itertools
import json
import re
import signal

import numpy as np
import pytest
from PIL import Image
from test_masks import DEFAULTS, SIZE, masked, noisy, small, with_alpha
from test_resume import failing, struck

from mlx_flux_krea import FluxPipeline
from mlx_flux_krea.commands.shared import images
from mlx_flux_krea.provenance import read_record

SMALL = ["--steps", "2", "--seed", "7"]
OWN = ["--no-auto-resize", "--width", "64", "--height", "48"]
KINDS = {  # task, and options
    "start": ("base", ["--image", "a.png"]),
    "faint": ("base", ["--image", "faint.png"]),
    "mask": ("base", ["--image", "a.png", "--mask", "m.png"]),
    "width": ("base", ["--image", "a.png", "--mask", "m.png", "--width", "48"]),
    "aspect": ("base", ["--image", "a.png", "--mask", "m.png", "--aspect", "1:1", "--megapixels", "0.004"]),
    "soft": ("base", ["--image", "a.png", "--mask", "m.png", "--soft-mask"]),
    "no paste": ("base", ["--image", "a.png", "--mask", "m.png", "--no-paste"]),
    "part": ("base", ["--image", "a.png", "--mask", "m.png", "--crop-to-mask"]),
    "crop": ("base", ["--image", "a.png", "--mask", "m.png", "--fit", "crop"]),
    "alpha": ("base", ["--image", "hole.png"]),
    "alpha and borders": ("fill", ["--image", "hole.png", "--expand", "10%,8"]),
    "borders": ("base", ["--image", "a.png", "--expand", "3,7"]),
    "fill": ("fill", ["--image", "turned.png", "--mask", "m.png", "--crop-to-mask", "--strength", "0.9"]),
    "references": ("kontext", ["--image", "a.png", "--reference", "hole.png", *OWN, "--fit", "pad"]),
    "control": ("control", ["--control-image", "grey.png"]),
    "edges": ("control", ["--control-image", "a.png", "--control", "canny", "--image", "hole.png"]),
    "control and mask": ("control", ["--control-image", "grey.png", "--image", "a.png", "--mask", "m.png"]),
}
ALPHA = masked(0, 0, *SIZE)
ALPHA.paste(0, (10, 8, 50, 40))


@pytest.fixture(scope="module")
def folders(request, tmp_path_factory):
    """Model folders by task, whose pictures are small where no size is asked for."""
    made = {}
    for task, name in {"base": "model", "kontext": "kontext", "fill": "fill", "control": "control"}.items():
        made[task] = small(request.getfixturevalue(name), tmp_path_factory.mktemp(task))
        index = json.loads((made[task] / "model_index.json").read_text())
        (made[task] / "model_index.json").write_text(json.dumps(index | {"defaults": index["defaults"] | DEFAULTS}))
    return made


@pytest.fixture
def inputs(tmp_path):
    """Files of every kind of input."""
    noisy().save(tmp_path / "a.png")
    masked(10, 8, 50, 40).save(tmp_path / "m.png")
    with_alpha(ALPHA).save(tmp_path / "hole.png")
    with_alpha(Image.new("L", SIZE, 250)).save(tmp_path / "faint.png")
    noisy(mode="L").save(tmp_path / "grey.png")
    turned = Image.Exif()
    turned[0x112] = 6
    noisy().transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=turned.tobytes())
    return tmp_path


def calls(folders, kind):
    task, options = KINDS[kind]
    files = [text for text in options if text.endswith(".png")]
    return ["-m", folders[task], *SMALL], options, files


@pytest.mark.core("alpha and borders")
@pytest.mark.parametrize("kind", KINDS)
def test_a_picture_is_repeated_from_its_record_and_its_images(command, folders, inputs, kind):
    common, options, files = calls(folders, kind)
    code, _, err = command("generate", "a cat", *common, *options)
    assert code == 0, err
    named = [text for pair in itertools.pairwise(options) if pair[1] in files for text in pair]
    again = ["generate", "--from", "out.png", "-m", common[1], "-o", "b.png"]
    code, _, err = command(*again, *named)
    assert (code, "made from" in err) == (0, False), err
    assert (inputs / "b.png").read_bytes() == (inputs / "out.png").read_bytes()
    for i in range(0, len(named), 2):
        code, out, err = command(*again, *named[:i], *named[i + 2 :])
        assert (code, out) == (2, ""), err
        assert re.search("was made from an? |nothing without a mask|there is no --mask", err), err


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["start", "part", "references", "control and mask"])
def test_other_images_than_those_of_the_record_are_named(command, folders, inputs, kind):
    common, options, files = calls(folders, kind)
    assert command("generate", "a cat", *common, *options)[0] == 0
    others = [f"b{text}" if text in files else text for text in options]
    for name in files:
        image = Image.open(inputs / name).convert("RGB")
        other = masked(8, 8, 60, 40) if name == "m.png" else Image.fromarray(255 - np.asarray(image))
        other.save(inputs / f"b{name}")
    words = {"m.png": "mask", "grey.png": "control image", "hole.png": "reference"}
    code, _, err = command("generate", "--from", "out.png", *common[:2], *others, "-o", "b.png")
    assert code == 0, err
    for name in files:
        assert f"note: b{name} is not the {words.get(name, 'image')} that out.png was made from" in err


@pytest.mark.slow
def test_inspect_and_the_record_name_what_a_picture_was_made_of(command, folders, inputs):
    for kind, size in {"part": [67, 45], "borders": [81, 51], "mask": [67, 45], "no paste": None}.items():
        common, options, _ = calls(folders, kind)
        assert command("generate", "a cat", *common, *options, "-o", f"{kind}.png")[0] == 0
        record = read_record(inputs / f"{kind}.png")
        assert record.get("pasted_size") == size
        assert list(Image.open(inputs / f"{kind}.png").size) == (size or [64, 48])
        assert record["image"]["rgb_sha256"] in command("inspect", f"{kind}.png", "--json")[1]


@pytest.mark.core("references")
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_goes_on_though_its_images_are_gone_or_others(command, folders, inputs, kind):
    common, options, files = calls(folders, kind)
    assert command("generate", "a cat", *common, *options, "-o", "whole.png")[0] == 0
    with failing("denoise", 1.1):
        assert command("generate", "a cat", *common, *options)[0] == 1
    for number, name in enumerate(files):
        (inputs / name).unlink()
        if number % 2:
            Image.new("RGB", (16, 16)).save(inputs / name)
    code, _, err = command("resume")
    assert code == 0, err
    assert (inputs / "out.png").read_bytes() == (inputs / "whole.png").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize(("stage", "done"), [("text", 1), ("image", 3), ("denoise", 1.1), ("decode", 1)])
def test_a_process_that_is_stopped_at_any_moment_continues_without_its_images(
    command, folders, inputs, stage, done, number
):
    common, options, files = calls(folders, "alpha and borders")
    ran = struck(stage, done, number, "generate", "a cat", *common, *options, cwd=inputs)
    assert ran.returncode in (-9, 130), ran.stderr
    assert not (inputs / "out.png").exists()
    kept = {name: (inputs / name).read_bytes() for name in files}
    for name in files:
        (inputs / name).unlink()
    assert command("resume")[0] == 0
    for name, data in kept.items():
        (inputs / name).write_bytes(data)
    assert command("generate", "a cat", *common, *options, "-o", "whole.png")[0] == 0
    assert (inputs / "out.png").read_bytes() == (inputs / "whole.png").read_bytes()


# --- files of prompts ---

ROWS = [
    {"prompt": "a", "image": "a.png", "mask": "m.png", "crop-to-mask": True, "seed": 1},
    {"prompt": "b", "image": "hole.png", "expand": "0,25%,0,8", "strength": 0.9, "seed": 2},
    {"prompt": "c", "image": "a.png", "mask": "m.png", "no-paste": True, "fit": "crop", "seed": 3},
]


@pytest.mark.slow
@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_rows_of_a_file_set_every_option_of_editing(command, folders, inputs, ending, monkeypatch):
    """With images that are closed between pictures, too."""
    monkeypatch.setattr(images, "MOST_OPEN", 0 if ending == "csv" else images.MOST_OPEN)
    names = list(dict.fromkeys(name for row in ROWS for name in row))
    table = [names, *([f'"{row.get(name, "")}"' for name in names] for row in ROWS)]
    text = "\n".join(map(json.dumps, ROWS)) if ending == "jsonl" else "\n".join(map(",".join, table))
    (inputs / f"rows.{ending}").write_text(text)
    common = ["-m", folders["base"], "--steps", "2"]
    code, out, err = command("generate", "--prompts", f"rows.{ending}", *common, "-o", "{seed}.png")
    assert (code, out.split()) == (0, ["1.png", "2.png", "3.png"]), err
    for row in ROWS:
        options = [text for name, value in row.items() if name != "prompt" for text in (f"--{name}", str(value))]
        options = [text for text in options if text != "True"]
        assert command("generate", row["prompt"], *common, *options, "-o", "own.png", "--force")[0] == 0
        assert (inputs / "own.png").read_bytes() == (inputs / f"{row['seed']}.png").read_bytes()
    code, out, err = command("generate", "--prompts", f"rows.{ending}", *common, "--contact-sheet")
    assert (code, "pictures of several sizes" in err) == (2, True)


@pytest.mark.slow
def test_images_of_many_rows_are_not_all_open(command, folders, inputs, monkeypatch):
    most, jobs = [], 8
    for number in range(jobs):
        noisy().save(inputs / f"{number}.png")
    rows = [{"prompt": "a", "image": f"{number}.png", "expand": "8"} for number in range(jobs)]
    (inputs / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.setattr(images, "MOST_OPEN", 3 * 4 * SIZE[0] * SIZE[1])
    generate = FluxPipeline.generate

    def open_images():
        gc.collect()
        return sum(isinstance(one, Image.Image) and one.size == SIZE for one in gc.get_objects())

    def count(self, *args, **more):
        most.append(open_images())
        return generate(self, *args, **more)

    monkeypatch.setattr(FluxPipeline, "generate", count)
    before = open_images()
    code, _, err = command("generate", "--prompts", "rows.jsonl", "-m", folders["base"], *SMALL)
    assert code == 0, err
    assert len(most) == jobs
    assert max(most) - before <= 6, most


@pytest.mark.slow
def test_a_row_whose_image_was_changed_or_deleted_meanwhile_is_not_made_of_another(command, folders, inputs):
    rows = [{"prompt": name, "image": f"{name}.png", "seed": 1} for name in ("a", "grey", "hole", "faint")]
    (inputs / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    call = ["generate", "--prompts", "rows.jsonl", "-m", folders["base"], "--steps", "2", "-o", "{prompt}-made.png"]
    with failing("denoise", 0.1):
        assert command(*call)[0] == 1
    noisy(size=(5, 5)).save(inputs / "a.png")  # which the checkpoint has
    noisy(size=(64, 48)).save(inputs / "grey.png")
    (inputs / "hole.png").unlink()
    code, out, err = command("resume")
    assert (code, [text.rpartition("/")[2] for text in out.split()]) == (7, ["a-made.png", "faint-made.png"]), err
    assert "skipped rows.jsonl, line 2" in err
    assert "grey.png was changed since this run began; expected the image as it was" in err
    assert "skipped rows.jsonl, line 3" in err


@pytest.mark.slow
def test_an_answer_to_the_schema_edits_a_picture(command, folders, inputs):
    properties = json.loads(command("tool-schema", "-m", folders["base"])[1])["parameters"]["properties"]
    answer = {"prompt": "a", "image": "a.png", "mask": "m.png", "strength": 0.9, "expand": "8", "crop_to_mask": True}
    kinds = {name: properties[name]["type"] for name in answer}
    assert kinds == dict.fromkeys(answer, "string") | {"strength": "number", "crop_to_mask": "boolean"}
    assert {"fit", "control_image", "control", "style"} < set(properties)
    (inputs / "a.jsonl").write_text(json.dumps(answer | {"steps": 2, "seed": 1}))
    code, _, err = command("generate", "--prompts", "a.jsonl", "-m", folders["base"])
    assert code == 0, err
    assert Image.open(inputs / "out.png").size == (83, 61)
    kontext = json.loads(command("tool-schema", "-m", folders["kontext"])[1])["parameters"]["properties"]
    assert ("mask" in kontext, "strength" in kontext, kontext["reference"]["type"]) == (False, False, "array")
