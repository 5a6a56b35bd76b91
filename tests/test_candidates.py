"""`generate --candidates` and `resume --pick`: judged predictions on a sheet, and pictures equal to those run alone."""

import json
import signal

import numpy as np
import pytest
from PIL import Image
from test_resume import CAT, events, failing, files, strict, struck  # noqa: F401

from mlx_flux_krea import FluxPipeline
from mlx_flux_krea.checkpoint import Checkpoint
from mlx_flux_krea.filters.gate import Gate
from mlx_flux_krea.generator import Generator
from mlx_flux_krea.provenance import read_record

SIZE = ["--width", "32", "--height", "32", "--steps", "7"]
HOW = {
    "first block": ["--cache", "first-block:0.3:1"],
    "skip": ["--cache", "skip", "--solver", "dpmpp_2m"],
    "heun": ["--solver", "heun"],
    "fast": ["--fast", "--steps", "12"],
    "image, streamed": ["--image", "given.png", "--strength", "0.9", "--memory", "least"],
    "soft mask around it": ["--image", "given.png", "--mask", "mask.png", "--soft-mask", "--crop-to-mask"],
    "borders": ["--image", "given.png", "--expand", "8,16"],
    "negative prompt": ["--negative-prompt", "rain", "--true-cfg-scale", "2"],
    "kontext": ["--image", "given.png", "--no-auto-resize"],
    "fill": ["--image", "given.png", "--mask", "mask.png", "--cache", "skip"],
    "control": ["--control-image", "given.png", "--control", "canny"],
}


def group() -> str:
    """The run of the candidates that are kept."""
    return files()[0].stem.partition("-")[0]


def given_images(folder) -> None:
    """An image to start from, and a mask."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(folder / "given.png")
    mask = Image.new("L", (32, 32))
    mask.paste(255, (8, 0, 24, 24))
    mask.save(folder / "mask.png")


def least_memory(model) -> str:
    """Memory in which no block of the transformer is resident, for --memory."""
    pipe = FluxPipeline.from_pretrained(model, memory="2GB")
    size = {"width": 32, "height": 32, "num_inference_steps": 7}
    return f"{(pipe.plan(prompt=CAT, image=Image.new('RGB', (32, 32)), **size).least + 1) / 1e6:.6f}MB"


@pytest.mark.core("first block")
@pytest.mark.parametrize("name", HOW)
def test_picked_candidates_equal_pictures_that_were_run_alone(command, request, tmp_path, name, monkeypatch):
    model = request.getfixturevalue(name if name in ("kontext", "fill", "control") else "model")
    given_images(tmp_path)
    resident, denoise = set(), Generator._denoise
    monkeypatch.setattr(
        Generator, "_denoise", lambda self, *args: (denoise(self, *args), resident.add(len(self.blocks.resident)))[0]
    )
    how = [least_memory(model) if option == "least" else option for option in HOW[name]]
    call = ["generate", CAT, "-m", model, *SIZE, *how]
    code, out, err = command(*call, "--seed", "7", "--candidates", "3")
    assert (code, out) == (0, "out-sheet.png\n"), err
    run = group()
    assert f"flux-krea resume {run} --pick 1 2; the others stay until: flux-krea purge --unfinished" in err
    assert [path.stem for path in files()] == [f"{run}-{number}" for number in (1, 2, 3)]
    record = read_record(tmp_path / "out-sheet.png") or {}
    assert [one["seed"] for one in record["sheet"]["candidates"]] == [7, 8, 9]
    for asked in ([], [run]):
        code, _, err = command("resume", *asked)
        assert (code, f"the run {run} has 3 candidates: 1, 2, 3" in err) == (2, True)
    done = []
    with pytest.MonkeyPatch.context() as patch:
        start = Generator._continued
        patch.setattr(Generator, "_continued", lambda self, *args: done.append(args[2].done) or start(self, *args))
        code, out, err = command("resume", run, "--pick", "3", "1")
    assert (code, len(out.split())) == (0, 2), err
    assert done == 2 * [4 if name == "fast" else 2]
    assert (resident == {0}) == ("streamed" in name)
    for seed, made in zip((9, 7), out.split(), strict=True):
        assert command(*call, "--seed", seed, "-o", f"alone-{seed}.png")[0] == 0
        assert (tmp_path / f"alone-{seed}.png").read_bytes() == (tmp_path / made).read_bytes()
    assert [path.stem for path in files()] == [f"{run}-2"]
    assert "no unfinished candidate 1" in command("resume", run, "--pick", "1")[2]
    assert command("purge", "--unfinished", "--yes")[0] == 0
    assert files() == []


@pytest.mark.slow
def test_candidates_go_on_after_an_interruption_with_the_same_sheet_and_so_do_picked_ones(command, model, tmp_path):
    call = ["generate", CAT, "-m", model, *SIZE, "--seed", "7", "--candidates", "3"]
    assert command(*call, "-o", "whole.png")[0] == 0
    command("purge", "--unfinished", "--yes")
    with failing("decode", 1, picture=2):
        assert command(*call)[0] == 1
    run = group()
    assert {path.stem for path in files()} == {run, f"{run}-1"}
    code, out, err = command("resume", run)
    assert code == 0, err
    assert (tmp_path / "out-sheet.png").read_bytes() == (tmp_path / "whole-sheet.png").read_bytes()
    with failing("denoise", 2.1):
        code, _, err = command("resume", run, "--pick", "2", "3", "--json")
    (ours,) = (path for path in files() if path.stem.partition("-")[0] != run)
    checkpoint = Checkpoint.read(ours)
    checkpoint.close()
    assert checkpoint.done >= 2
    code, out, err = command("resume", ours.stem, "--json")
    assert code == 0, err
    assert [one["seed"] for one in json.loads(out)["images"]] == [8, 9]
    assert [path.stem for path in files()] == [f"{run}-1"]


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "done"), [("denoise", 1.1), ("decode", 1), ("named", 1)])
def test_candidates_and_picked_ones_survive_a_kill(command, model, tmp_path, stage, done):
    call = ["generate", CAT, "-m", model, *SIZE, "--seed", "7", "--candidates", "2"]
    assert command(*call, "-o", "whole.png")[0] == 0
    command("purge", "--unfinished", "--yes")
    assert struck(stage, done, signal.SIGKILL, *call, cwd=tmp_path).returncode == -signal.SIGKILL
    run = group()
    assert command("resume", run)[0] == 0
    assert (tmp_path / "out-sheet.png").read_bytes() == (tmp_path / "whole-sheet.png").read_bytes()
    assert struck(stage, done, signal.SIGKILL, "resume", run, "--pick", "2", cwd=tmp_path).returncode < 0
    (ours,) = (path for path in files() if path.stem.partition("-")[0] != run)
    code, _, err = command("resume", ours.stem)
    assert code == 0, err
    assert command(*call[:-4], "--seed", "8", "-o", "alone.png")[0] == 0
    assert (tmp_path / "out.png").read_bytes() == (tmp_path / "alone.png").read_bytes()


def test_predictions_pass_the_filters_and_the_finished_pictures_too(command, strict, home, tmp_path):  # noqa: F811
    call = ["generate", CAT, "-m", strict, *SIZE, "--seed", "7", "--candidates", "2"]
    code, out, err = command(*call)
    assert (code, out) == (0, "out-sheet.png\n"), err
    judged = ["run", "prompts_passed", "generated", "passed", "released"]
    assert [event for event in events(home) if event in judged] == 2 * judged
    before = len(events(home))
    assert command("resume", group(), "--pick", "1")[0] == 0
    assert events(home)[before:] == [*judged, "written"]


@pytest.mark.parametrize("check", ["flagged", "failed", "review"])
def test_a_prediction_that_was_not_released_appears_nowhere(command, strict, home, tmp_path, monkeypatch, check):  # noqa: F811
    call = ["generate", CAT, "-m", strict, *SIZE, "--seed", "7", "--candidates", "2"]
    if check == "flagged":
        monkeypatch.setattr(Gate, "_reasons", lambda self, scores: ("a reason",) if scores else ())
    elif check == "failed":
        monkeypatch.setattr(Gate, "_scores", lambda self, pixels: 1 / 0)
    code, out, err = command(*call, *(["--check", "review"] if check == "review" else []))
    assert (code, out) == ({"flagged": 4, "failed": 1, "review": 5}[check], ""), err
    assert list(tmp_path.iterdir()) == []
    kept = [path for path in files() if "-" in path.stem]
    assert len(kept) == (2 if check == "review" else 0)
    assert all("candidate" not in Checkpoint.read(path).images for path in kept)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--candidates", "3", "-n", "2"], "--candidates and --num-images are both given"),
        (["--candidates", "3", "--seed", "1", "2"], "--candidates is given with 2 seeds"),
        (["--candidates", "3", "--steps", "1"], "a picture has one step"),
        (["--candidates", "1"], "candidates"),
    ],
)
def test_candidates_that_cannot_be_are_refused(command, model, options, said):
    code, out, err = command("generate", CAT, "-m", model, *SIZE, *options)
    assert (code, out, said in err, files()) == (2, "", True, []), err
    assert command("resume", "--pick", "x")[0] == command("resume", "--pick", "1")[0] == 2


# --- of several prompts, and of a picture's record ---


@pytest.mark.slow
def test_rows_of_a_file_have_candidates_of_their_own_on_one_sheet(command, model, tmp_path):
    rows = [{"prompt": CAT, "seed": 3}, {"prompt": "a dog", "seed": 8, "num_images": 1, "cache": "skip"}, {"steps": 1}]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"prompt": CAT} | row) for row in rows))
    code, out, err = command("generate", "--prompts", "a.jsonl", "-m", model, *SIZE, "--candidates", "2")
    assert (code, out, "skipped a.jsonl, line 3" in err) == (7, "out-sheet.png\n", True), err
    record = read_record(tmp_path / "out-sheet.png") or {}
    shown = [(one["prompt"], one["seed"]) for one in record["sheet"]["candidates"]]
    assert shown == [(CAT, 3), (CAT, 4), ("a dog", 8)]
    code, out, err = command("resume", group(), "--pick", "2", "3")
    assert code == 0, err
    for made, (prompt, seed, more) in zip(out.split(), [(CAT, 4, []), ("a dog", 8, ["--cache", "skip"])], strict=True):
        alone = ["generate", prompt, "-m", model, *SIZE, "--seed", seed, *more, "-o", f"alone-{seed}.png"]
        assert command(*alone)[0] == 0
        assert (tmp_path / f"alone-{seed}.png").read_bytes() == (tmp_path / made).read_bytes()


@pytest.mark.slow
def test_candidates_of_a_record_have_its_settings_and_its_seed_comes_first(command, model, tmp_path):
    given_images(tmp_path)
    images = ["--image", "given.png", "--mask", "mask.png"]
    made = ["generate", CAT, "-m", model, *SIZE, *images, "--strength", "0.9", "--cache", "skip", "--seed", "5"]
    assert command(*made, "-o", "one.png")[0] == 0
    code, _, err = command("generate", "--from", "one.png", "-m", model, *images, "--candidates", "2")
    assert code == 0, err
    code, out, err = command("resume", group(), "--pick", "1")
    assert code == 0, err
    again, one = (np.asarray(Image.open(tmp_path / name)) for name in (out.strip(), "one.png"))
    assert np.array_equal(again, one)
