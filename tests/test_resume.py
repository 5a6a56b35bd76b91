"""`flux-krea resume`: whatever stopped a run, and wherever, its pictures are those of the run that nobody stopped."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import judges
import numpy as np
import pytest
from helpers import REFERENCE, edit_json, run_command
from PIL import Image
from safetensors import safe_open
from safetensors.numpy import save_file

from mlx_flux_krea import FluxPipeline
from mlx_flux_krea import checkpoint as interrupted
from mlx_flux_krea.commands.shared.terminal import PipelineProgress
from mlx_flux_krea.errors import ModelError, UsageError
from mlx_flux_krea.filters import judges as filters_judges
from mlx_flux_krea.filters.ledger import Ledger, Verdict
from mlx_flux_krea.filters.log import Log
from mlx_flux_krea.generator import Generator
from mlx_flux_krea.provenance import Picture, read_record

CAT = "a cat"
TINY = ["--width", "32", "--height", "32", "--steps", "4", "--seed", "7"]

STRIKE = """
import os, sys, threading
sys.path.insert(0, sys.argv[1])
import judges
from mlx_flux_krea import cli
from mlx_flux_krea import checkpoint as interrupted, files
from mlx_flux_krea.commands.shared import delivery
from mlx_flux_krea.commands.shared.terminal import PipelineProgress
from mlx_flux_krea.filters import judges as filters_judges
from mlx_flux_krea.worker import WorkerJob
filters_judges.load_judge = judges.load_judge
interrupted.EVERY = 0
stage, done, number = sys.argv[2], float(sys.argv[3]), int(sys.argv[4])
struck, named, stopped, stop = [], [], threading.Event(), WorkerJob.stop
WorkerJob.stop = lambda job: (stop(job), stopped.set())[0]
def strike(*where):
    if not struck and where[0] == stage and where[1] >= done:
        struck.append(os.kill(os.getpid(), number))
        stopped.wait(30)
PipelineProgress.__call__ = lambda self, *where: strike(*where)
claim, save = files._claim, delivery.save
def claim_and_strike(*paths):
    strike("write", 0)
    named.append(claim(*paths))
    strike("named", len(named))
files._claim = claim_and_strike
delivery.save = lambda *args, **more: (save(*args, **more), strike("saved", len(named)))[0]
cli.main(sys.argv[5:])"""

STAGES = {
    "the text": ("text", 1, "before the first step"),
    "the first step": ("denoise", 0.1, "before the first step"),
    "a step": ("denoise", 2.1, "at step 2 of 4"),
    "the last step": ("denoise", 3.1, "at step 3 of 4"),
    "decoding": ("decode", 1, "at step 4 of 4"),
    "writing": ("write", 0, "at step 4 of 4"),
}


def struck(stage: str, done: float, number: int, *args, cwd: Path, **env) -> subprocess.CompletedProcess:
    """The command in a process of its own, to which a signal comes when a stage is so far."""
    call = [sys.executable, "-c", STRIKE, Path(__file__).parent, stage, done, int(number), *args]
    return subprocess.run(
        [*map(str, call)], cwd=cwd, env=os.environ | env, capture_output=True, text=True, timeout=120, check=False
    )


def files() -> list[Path]:
    return sorted(interrupted.folder().glob("*"))


@pytest.fixture
def generate(command, model):
    def run(*args):
        return command("generate", CAT, "-m", model, *TINY, *args)

    return run


@contextlib.contextmanager
def failing(stage: str, done: float, picture: int = 1):
    """Within it the program fails when a stage of a picture is so far."""
    seen = [""]

    def fail(self, *where):
        if where[0] != seen[-1]:
            seen.append(where[0])
        if where[0] == stage and where[1] >= done and seen.count("denoise") == picture:
            raise MemoryError("no more of it")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PipelineProgress, "__call__", fail)
        patch.setattr(interrupted, "EVERY", 0)
        yield


@pytest.fixture(scope="module")
def whole(model, tmp_path_factory):
    """The file that the usual run makes."""
    folder = tmp_path_factory.mktemp("whole")
    ran = run_command("generate", CAT, "-m", model, *TINY, cwd=folder, FLUX_KREA_HOME=str(folder / "home"))
    assert ran.returncode == 0, ran.stderr
    return (folder / "out.png").read_bytes()


# --- every stage, every way to stop it ---


@pytest.mark.parametrize(
    ("where", "number"),
    [(stage, signal.SIGKILL) for stage in STAGES]
    + [("the text", signal.SIGTERM), ("a step", signal.SIGINT), ("the last step", signal.SIGTERM)]
    + [("the first step", signal.SIGINT), ("decoding", signal.SIGINT)],
)
@pytest.mark.core("the first step-9", "a step-2", "decoding-9")
def test_a_run_that_was_stopped_makes_the_same_file(command, model, whole, tmp_path, where, number):
    stage, done, said = STAGES[where]
    ran = struck(stage, done, number, "generate", CAT, "-m", model, *TINY, cwd=tmp_path)
    expected = {signal.SIGINT: 130, signal.SIGTERM: 143}.get(number, -number)
    assert (ran.returncode, ran.stdout, list(tmp_path.glob("*.png"))) == (expected, "", []), ran.stderr
    (path,) = files()
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert said.removeprefix("at ") in command("resume", "--list")[1]
    if number != signal.SIGKILL:
        word = "interrupted" if number == signal.SIGINT else "terminated"
        assert ran.stderr.splitlines()[-1] == f"flux-krea: {word} {said}; continue with: flux-krea resume {path.stem}"
    code, out, err = command("resume")
    assert (code, out, files()) == (0, f"{tmp_path / 'out.png'}\n", []), err
    assert (tmp_path / "out.png").read_bytes() == whole


@pytest.mark.parametrize(
    "options",
    [
        ["--image", REFERENCE / "images" / "input.png", "--strength", "1"],
        ["--negative-prompt", "blurry", "--true-cfg-scale", "3"],
        ["--like", "comfy", "--steps", "4"],
        *(["--noise", recipe] for recipe in ("bfl", "mflux", "mlx-examples")),
        ["--dtype", "bfloat16", "--guidance", "2", "--metadata", "minimal", "-o", "x.webp", "--quality", "80"],
    ],
    ids=lambda options: " ".join(map(str, options[:2])),
)
@pytest.mark.slow
def test_every_kind_of_picture_goes_on_from_the_middle(command, generate, tmp_path, options):
    with failing("denoise", 2.1):
        code, out, err = generate(*options)
    assert (code, out) == (1, "")
    (path,) = files()
    assert f"note: the run is saved; continue with: flux-krea resume {path.stem}" in err
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Generator, "_latents", None)
        code, out, err = command("resume", path.stem)
    assert code == 0, err
    made = Path(out.strip())
    assert generate(*options, "-o", f"whole{made.suffix}")[0] == 0
    assert made.read_bytes() == made.with_name(f"whole{made.suffix}").read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("how", ["--cache first-block:0.3:1", "--fast --solver dpmpp_2m --schedule beta"])
def test_a_killed_run_goes_on_to_the_same_bytes_in_every_mode(command, model, tmp_path, how):
    call = ["generate", CAT, "-m", model, *TINY[:4], "--steps", "12", "--seed", "7", *how.split()]
    assert struck("denoise", 7.1, signal.SIGKILL, *call, cwd=tmp_path).returncode == -signal.SIGKILL
    (path,) = files()
    checkpoint = interrupted.Checkpoint.read(path)
    checkpoint.close()
    assert 4 <= checkpoint.done < 12
    code, out, err = command("resume")
    assert code == 0, err
    assert command(*call, "-o", "whole.png")[0] == 0
    assert Path(out.strip()).read_bytes() == (tmp_path / "whole.png").read_bytes()
    assert read_record(tmp_path / "whole.png")["evaluations"] < 12


@pytest.mark.parametrize("what", ["decoding", "writing"])
@pytest.mark.core("writing")
def test_a_failed_decode_or_a_full_disk_is_tried_again_and_nothing_is_sampled_again(
    command, generate, whole, tmp_path, what
):
    def full(*paths):
        raise OSError(28, "No space left on device")

    with failing("decode", 1) if what == "decoding" else pytest.MonkeyPatch.context() as patch:
        if patch:
            patch.setattr("mlx_flux_krea.files._claim", full)
        code, out, err = generate()
    assert (code, out) == (1 if what == "decoding" else 8, "")
    assert "continue with: flux-krea resume" in err
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Generator, "_conditions", None)
        patch.setattr(Generator, "_velocity", None)
        code, out, err = command("resume", "-o", "b.png", "--memory", "1GB", "--json")
    assert code == 0, err
    (entry,) = json.loads(out)["images"]
    assert (entry["path"], set(entry["seconds"])) == ("b.png", {"denoise", "decode"})
    assert (tmp_path / "b.png").read_bytes() == whole


# --- several pictures ---


@pytest.mark.slow
def test_of_several_pictures_the_one_at_hand_and_the_others_follow(command, model, tmp_path, monkeypatch):
    """With the names that --force gives, from another folder, and the sheet of all of them."""
    call = ["generate", "a {cat|dog}", "-m", model, *TINY[:-2], "--seed", "7", "8", "--contact-sheet", "--force"]
    assert command(*call)[0] == 0
    whole = {path.name: path.read_bytes() for path in tmp_path.glob("*.png")}
    assert len(whole) == 5
    for path in tmp_path.glob("*.png"):
        path.unlink()
    with failing("denoise", 2.1, picture=2):
        code, out, err = command(*call)
    assert (code, out) == (1, "out.png\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    os.chdir(elsewhere)
    assert "picture 2 of 4" in command("resume", "--list")[1]
    code, out, err = command("resume")
    assert code == 0, err
    assert out.split() == [str(tmp_path / name) for name in ("out-2.png", "out-3.png", "out-4.png", "out-sheet.png")]
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.png")} == whole
    assert list(elsewhere.iterdir()) == files() == []


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".jpg", ".webp"])
def test_a_sheet_of_files_that_lose_something_is_the_same_after_an_interruption(command, model, tmp_path, ending):
    """Its thumbnails are those of the files, whether this process wrote them or an earlier one."""
    how = ["--contact-sheet", "--force", "--quality", "60", "-o", f"out{ending}"]
    call = ["generate", CAT, "-m", model, *TINY, "8", *how]
    assert command(*call)[0] == 0
    whole = contents_of(tmp_path)
    assert len(whole) == 3
    for path in tmp_path.iterdir():
        path.unlink()
    with failing("denoise", 2.1, picture=2):
        assert command(*call)[0] == 1
    code, _, err = command("resume")
    assert (code, contents_of(tmp_path) == whole) == (0, True), err


def contents_of(folder: Path) -> dict[str, bytes]:
    """Every file in it, hidden ones included."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def two(model, tmp_path_factory):
    """A command that makes two pictures and their sheet, and the folder that it leaves if nobody stops it."""
    call = ["generate", CAT, "-m", model, *TINY, "8", "--contact-sheet"]
    folder, home = tmp_path_factory.mktemp("two"), tmp_path_factory.mktemp("home")
    ran = run_command(*call, cwd=folder, FLUX_KREA_HOME=str(home))
    assert ran.returncode == 0, ran.stderr
    return call, contents_of(folder)


@pytest.mark.core("named-1-told0-1")
@pytest.mark.parametrize(
    ("moment", "of", "told", "drawn"),
    [
        ("named", 1, ["out.png", "out-2.png", "out-sheet.png"], 1),
        ("saved", 2, ["out-2.png", "out-sheet.png"], 0),
        ("named", 3, ["out-sheet.png"], 0),
    ],
)
def test_a_file_that_had_its_name_when_the_process_was_killed_is_not_made_again(
    command, two, tmp_path, monkeypatch, moment, of, told, drawn
):
    """The file that was written beside it is removed too, and the one who resumes is told."""
    call, whole = two
    ran = struck(moment, of, signal.SIGKILL, *call, cwd=tmp_path)
    assert (ran.returncode, len(list(tmp_path.glob("*.png")))) == (-signal.SIGKILL, of), ran.stderr
    generate, asked = Generator.generate, []

    def count(self, *args, **more):
        asked.append(args)
        return generate(self, *args, **more)

    monkeypatch.setattr(Generator, "generate", count)
    code, out, err = command("resume", "--json")
    assert code == 0, err
    report = json.loads(out)
    paths = [*(entry["path"] for entry in report["images"]), report["contact_sheet"]]
    assert ([Path(path).name for path in paths], len(asked)) == (told, drawn)
    assert {entry["outcome"] for entry in report["images"]} <= {"released"}
    assert (contents_of(tmp_path) == whole, files()) == (True, [])


@pytest.mark.slow
def test_another_file_that_took_the_name_is_not_taken_for_the_picture(command, two, tmp_path):
    call, whole = two
    struck("saved", 1, signal.SIGKILL, *call, cwd=tmp_path)
    (tmp_path / "out.png").write_bytes(whole["out-2.png"])
    assert command("resume")[0] == 0
    made = contents_of(tmp_path)
    assert [made["out.png"], made["out-3.png"]] == [whole["out-2.png"]] * 2
    assert made["out-2.png"] == whole["out.png"]


@pytest.mark.slow
def test_rows_of_a_prompt_file_follow_though_the_file_is_gone(command, model, tmp_path, monkeypatch):
    rows = [{"prompt": "a frog", "seed": 1}, {"prompt": "x", "stesp": 1}, {"prompt": "a toad", "seed": 2, "steps": 3}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    call = ["generate", "--prompts", "a.jsonl", "-m", model, *TINY[:-2], "-o", "{seed}.png"]
    with failing("decode", 1):
        assert command(*call)[0] == 1
    (tmp_path / "a.jsonl").unlink()
    code, out, err = command("resume")
    assert (code, [Path(line).name for line in out.split()]) == (7, ["1.png", "2.png"]), err
    assert err.splitlines()[-1] == "flux-krea: 1 row of a.jsonl was skipped"
    assert files() == []


@pytest.mark.slow
def test_an_input_image_that_was_replaced_meanwhile_is_remembered(command, model, tmp_path, monkeypatch):
    shutil.copy(REFERENCE / "images" / "input.png", tmp_path / "a.png")
    call = ["generate", CAT, "-m", model, *TINY, "--image", "a.png", "--strength", "1"]
    assert command(*call, "-o", "whole.png")[0] == 0
    with failing("denoise", 2.1):
        command(*call)
    shutil.copy(tmp_path / "whole.png", tmp_path / "a.png")
    assert command("resume")[0] == 0
    assert (tmp_path / "out.png").read_bytes() == (tmp_path / "whole.png").read_bytes()


# --- what stays, and what goes ---


def test_nothing_is_kept_of_a_run_that_ended_or_never_began(command, generate, model, home):
    assert generate()[0] == 0
    assert generate("--noise", "nobodys")[0] == 2
    assert generate("--memory", "1MB")[0] == 8
    assert files() == []
    code, out, err = command("resume")
    assert (code, out) == (2, "")
    assert "there is no unfinished run" in err
    assert command("resume", "--list")[1:] == ("", "there is no unfinished run\n")


@pytest.mark.parametrize("jump", [31, -31])
def test_a_clock_that_jumps_deletes_no_run(home, monkeypatch, jump):
    """Every file is old then. Beyond a number, those that are old go, the oldest first."""
    for _ in range(interrupted.KEEP + 2):
        checkpoint = interrupted.Checkpoint({})
        checkpoint.write()
        checkpoint.close()
    oldest = files()[0]
    os.utime(oldest, (0, 0))
    now = time.time() + jump * 86400
    monkeypatch.setattr(interrupted.time, "time", lambda: now)
    assert len(interrupted.unfinished()) == len(files()) == interrupted.KEEP + (0 if jump > 0 else 1)
    assert not oldest.exists()


def test_what_is_old_is_deleted_and_what_still_runs_is_left_to_its_process(command, generate, home, monkeypatch):
    monkeypatch.setattr(interrupted, "KEEP", 1)
    for _ in range(2):
        with failing("decode", 1):
            generate()
    old, new = sorted(files(), key=lambda path: path.stat().st_mtime)
    os.utime(old, (0, 0))
    held = interrupted.Checkpoint.read(new)
    assert command("resume", "--list")[:2] == (0, "")
    assert files() == [new]
    code, _, err = command("resume", new.stem)
    assert (code, "has not ended" in err) == (2, True)
    held.close()
    assert command("resume", new.stem)[0] == 0


def test_fast_steps_are_not_all_written_and_slow_ones_are(tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr(interrupted.Checkpoint, "_write", lambda self: written.append(self.done))
    now = [100.0]
    monkeypatch.setattr(interrupted.time, "monotonic", lambda: now[0])
    for seconds, expected in ((0.095, [0, 11, 22, 28]), (1.0, list(range(29)))):
        checkpoint, written[:] = interrupted.Checkpoint({}), []
        checkpoint.start_picture({})
        for done in range(1, 29):
            now[0] += seconds
            checkpoint.save_step(done, 28, np.zeros((1, 4, 64), np.float32))
        assert written == expected, seconds


# --- files that somebody was sent ---


@pytest.fixture(scope="module")
def left(model, tmp_path_factory):
    """The folder of a run that stopped in its third step."""
    folder = tmp_path_factory.mktemp("left")
    call = ["generate", CAT, "-m", model, *TINY, "--image", REFERENCE / "images" / "input.png", "--strength", "1"]
    ran = struck("denoise", 2.1, signal.SIGTERM, *call, cwd=folder, FLUX_KREA_HOME=str(folder))
    assert ran.returncode == 143, ran.stderr
    return folder / "interrupted"


@pytest.fixture
def kept(left, home):
    """Its file, where ours are."""
    shutil.copytree(left, interrupted.folder())
    (path,) = files()
    return path


def contents(path: Path) -> tuple[dict, dict]:
    with safe_open(path, "numpy") as file:
        return json.loads(file.metadata()["flux-krea"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def change(path: Path, edit) -> None:
    facts, arrays = contents(path)
    text = edit(facts, arrays)
    save_file(arrays, path, {"flux-krea": text if isinstance(text, str) else json.dumps(facts)})


def job(facts: dict) -> dict:
    return facts["run"]["jobs"][0]


DAMAGED = {
    "text": (lambda f, a: "{", "has no description of a run"),
    "deep": (lambda f, a: "[" * 100000, "has no description of a run"),
    "a list": (lambda f, a: "[]", "is another kind of file"),
    "a later format": (lambda f, a: f.update(format=3), "has format 3"),
    "an earlier format": (lambda f, a: f.update(format=1), "has format 1"),
    "no run": (lambda f, a: f.pop("run"), "is another kind of file"),
    "steps": (lambda f, a: f.update(done=9), "is another kind of file"),
    "true": (lambda f, a: f.update(done=True), "is another kind of file"),
    "fewer steps": (lambda f, a: f.update(total=3), "of 3 steps"),
    "another size": (lambda f, a: a.update(latents=np.zeros((1, 9, 64), np.float32)), "holds latents (1, 9, 64)"),
    "another type": (lambda f, a: a.update(latents=a["latents"].astype(np.float64)), "is another kind of file"),
    "more": (lambda f, a: a.update(more=np.zeros(3)), "is another kind of file"),
    "NaN": (lambda f, a: a["latents"].fill(np.nan), "holds NaN"),
    "no colours": (lambda f, a: a.update(image=np.zeros((4, 4, 1), np.uint8)), "is another kind of file"),
    "a taken name": (lambda f, a: f["run"].update(named={"path": 3}), "list of pictures is damaged"),
    "no jobs": (lambda f, a: f["run"].update(jobs=[]), "finished pictures of 0"),
    "jobs": (lambda f, a: f["run"].update(jobs=[1]), "list of pictures is damaged"),
    "a field": (lambda f, a: f["run"].update(more=1), "list of pictures is damaged"),
    "a seed": (lambda f, a: job(f).update(seed=-1), "seed is -1"),
    "an option": (lambda f, a: job(f)["options"].update(stesp=1), "did you mean steps?"),
    "a value": (lambda f, a: job(f)["options"].update(steps="many"), "steps is 'many'; expected a whole number"),
    "a sampler": (lambda f, a: job(f)["options"].update(sigmas=[0.5, 0.9]), "sigmas are not falling"),
    "a name": (lambda f, a: job(f).update(output="a.gif"), "ends in '.gif'"),
    **{
        f"{field} {value!r}": (
            lambda f, a, field=field, value=value: job(f).update({field: value}),
            "list of pictures is damaged",
        )
        for field, value in (("output", None), ("output", ["a.png"]), ("label", None), ("seed", "7"), ("options", []))
    },
    **{
        f"half a character in {field}": (
            lambda f, a, field=field: job(f).update({field: "a\ud800.png"}),
            "has no description of a run",
        )
        for field in ("output", "label")
    },
    "no checks": (
        lambda f, a: f["run"]["options"].update(check="none"),
        "check is 'none'; expected filters, review or both",
    ),
    "a laxer check": (
        lambda f, a: f["run"]["options"].update(nsfw_threshold=0.99),
        "nsfw-threshold is '0.99'; expected a number from 0 to 0.85",
    ),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_refused_in_one_line(command, kept, tmp_path, damage):
    edit, says = DAMAGED[damage]
    change(kept, edit)
    code, out, err = command("resume", kept)
    (line,) = [line for line in err.splitlines() if not line.startswith(("1 picture: ", "note: "))]
    assert (code, out) == (2, ""), err
    assert line.startswith("flux-krea: ")
    assert says in line
    assert list(tmp_path.glob("*.png")) == []
    assert kept.exists()


@pytest.mark.parametrize("damage", ["cut", "foreign", "huge", "gone", "a folder"])
def test_what_is_no_such_file_is_refused_in_one_line(command, kept, tmp_path, damage):
    data = kept.read_bytes()
    if damage == "cut":
        kept.write_bytes(data[:-100])
    elif damage == "foreign":
        save_file({"a": np.zeros(3)}, kept)
    elif damage == "huge":  # a hole of 40 GB that it says are latents
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        header["latents"] |= {"shape": [1, 4, 64 * 40 * 10**6], "data_offsets": [0, 4 * 4 * 64 * 40 * 10**6]}
        del header["image"]
        text = json.dumps(header).encode()
        with open(kept, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(8 + len(text) + header["latents"]["data_offsets"][1])
    else:
        kept.unlink()
        if damage == "a folder":
            kept.mkdir()
    code, out, err = command("resume", kept)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("flux-krea: ")
    assert "Traceback" not in err


def test_a_run_of_another_model_ends_with_3(command, kept, model, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(model, other)
    edit_json(other / "manifest.json", other=True)
    code, out, err = command("resume", kept, "-m", other)
    assert (code, out) == (3, "")
    assert "is not the model that this run started with" in err
    assert command("resume", kept, "-m", model)[0] == 0


def test_a_model_that_moved_is_found_by_its_hash_and_other_versions_are_told(command, kept, model, home):
    shutil.copytree(model, home / "models" / "moved")

    def edit(facts, arrays):
        del facts["run"]["options"]["model"]
        facts["run"]["made_by"]["mlx"] = "0.1"

    change(kept, edit)
    code, _, err = command("resume", kept)
    assert code == 0, err
    assert "note: this run was started by mlx-flux-krea 0.1.0 with mlx 0.1 and is continued by" in err


def test_a_file_from_elsewhere_replaces_nothing_and_stays_as_it_is(command, kept, tmp_path):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "out.png").write_text("theirs")

    def edit(facts, arrays):
        facts["run"]["force"], job(facts)["output"] = True, str(theirs / "out.png")

    change(kept, edit)
    sent = kept.rename(tmp_path / "sent.safetensors")
    before = sent.read_bytes()
    code, out, err = command("resume", sent)
    assert (code, out) == (0, "out.png\n"), err
    assert (theirs / "out.png").read_text() == "theirs"
    assert (sent.read_bytes(), files()) == (before, [])


# --- filters ---


@pytest.fixture
def strict(model, tmp_path_factory, monkeypatch, home):
    """The tiny pipeline as a model whose licence requires filters, and both of them."""
    return judges.filtered_copy(model, tmp_path_factory.mktemp("strict") / "tiny", monkeypatch)


def events(home: Path) -> list[str]:
    return [entry["event"] for entry in Log(home / "log").read()]


@pytest.mark.slow
def test_a_run_that_goes_on_is_checked_like_a_new_one(command, strict, home, tmp_path):
    call = ["generate", CAT, "-m", strict, *TINY]
    with failing("denoise", 2.1):
        assert command(*call)[0] == 1
    assert (list(tmp_path.glob("*.png")), "generated" in events(home)) == ([], False)
    before = len(events(home))
    code, _, err = command("resume")
    assert code == 0, err
    assert events(home)[before:] == ["run", "prompts_passed", "generated", "passed", "released", "written"]
    assert CAT not in err
    command(*call, "-o", "whole.png")
    assert (tmp_path / "out.png").read_bytes() == (tmp_path / "whole.png").read_bytes()


@pytest.mark.core("True")
@pytest.mark.parametrize("is_logged", [True, False])
def test_a_file_that_had_its_name_counts_as_released_when_the_log_says_so(command, strict, home, tmp_path, is_logged):
    ran = struck("saved", 1, signal.SIGKILL, "generate", CAT, "-m", strict, *TINY, cwd=tmp_path)
    assert (ran.returncode, ran.stdout, len(files())) == (-signal.SIGKILL, "", 1), ran.stderr
    if not is_logged:
        shutil.rmtree(home / "log")
    before = events(home) if is_logged else []
    code, out, err = command("resume")
    assert (code, out) == (0, f"{tmp_path / ('out.png' if is_logged else 'out-2.png')}\n"), err
    judged = ["run", "prompts_passed", "generated", "passed", "released", "written"]
    assert events(home)[len(before) :] == ([] if is_logged else judged)
    assert files() == []


@pytest.mark.parametrize(
    ("asked", "is_ours", "answer"),
    [
        ("prompts", lambda texts: texts == [CAT], [9.0]),
        ("images", lambda pixels: pixels[0].shape == (32, 32, 3), [{"integrity": 9.0}]),
    ],
)
def test_what_a_filter_withholds_when_it_goes_on_is_withheld_and_not_kept(
    command, strict, tmp_path, monkeypatch, asked, is_ours, answer
):
    with failing("decode", 1):
        assert command("generate", CAT, "-m", strict, *TINY)[0] == 1
    real = getattr(judges.Reader, asked)  # the self-test asks for more than one thing at a time
    monkeypatch.setattr(judges.Reader, asked, lambda self, what: answer if is_ours(what) else real(self, what))
    code, out, err = command("resume")
    assert (code, out) == (4, ""), err
    assert (list(tmp_path.glob("*.png")), files()) == ([], [])


def test_the_stricter_of_file_and_config_holds(command, model, home, monkeypatch):
    judges.install()
    monkeypatch.setattr(filters_judges, "load_judge", judges.load_judge)
    with failing("decode", 1):
        assert command("generate", CAT, "-m", model, *TINY, "--check", "filters", "--nsfw-threshold", "0.5")[0] == 1
    command("config", "check", "review")
    command("config", "nsfw-threshold", "0.7")
    assert command("resume")[0] == 5
    run = [entry for entry in Log(home / "log").read() if entry["event"] == "run"][-1]
    assert (run["check"], run["thresholds"]["nsfw"]) == ("both", 0.5)


def test_python_hands_latents_to_nobody_elses_checkpoint(strict):
    class Spy(interrupted.Checkpoint):
        pass

    with pytest.raises(UsageError, match="expected a Checkpoint"):
        FluxPipeline.from_pretrained(strict)(CAT, width=32, height=32, num_inference_steps=1, checkpoint=Spy({}))


# --- resume files that say more than is true ---


def red(tmp_path: Path, home: Path, record: dict) -> Path:
    """Any image of the disk."""
    path = tmp_path / "red.png"
    Image.new("RGB", (32, 32), "red").save(path)
    return path


def red_with_record(tmp_path: Path, home: Path, record: dict) -> Path:
    """An image with the record of the run's own picture, and another seed."""
    path = tmp_path / "red.png"
    Picture.from_pixels(Image.new("RGB", (32, 32), "red"), record | {"seed": 99}).save(path)
    return path


def red_in_quarantine(tmp_path: Path, home: Path, record: dict) -> Path:
    """A picture that waits for a person, with exactly the record of the run's own picture."""
    pixels = np.asarray(Image.new("RGB", (32, 32), "red"))
    with Ledger().run("review") as run:
        kept = run.keep(pixels, record)
        Ledger().settle(kept, Verdict("waiting", kept.facts["pixels"]))
    return kept.path


@pytest.mark.core("filtered-red")
@pytest.mark.parametrize("foreign", [red, red_with_record, red_in_quarantine])
@pytest.mark.parametrize("kind", ["filtered", "free"])
def test_a_finished_picture_counts_only_as_the_file_that_was_released(
    command, request, model, home, tmp_path, kind, foreign
):
    folder = request.getfixturevalue("strict") if kind == "filtered" else model
    with failing("denoise", 2.1, picture=2):
        code, out, err = command("generate", CAT, "-m", folder, *TINY, "8", "--contact-sheet")
    assert (code, out) == (1, "out.png\n"), err
    path = foreign(tmp_path, home, read_record(tmp_path / "out.png"))
    change(files()[0], lambda facts, arrays: facts["run"]["done"][0].__setitem__(1, str(path)))
    code, out, err = command("resume")
    assert code == 0, err
    assert f"the contact sheet lacks a picture: {path}" in err
    sheet = np.asarray(Image.open(tmp_path / "out-sheet.png"))
    assert not (sheet == [255, 0, 0]).all(-1).any()


@pytest.mark.slow
def test_a_picture_that_was_changed_since_counts_no_more(command, strict, home, tmp_path):
    with failing("denoise", 2.1, picture=2):
        assert command("generate", CAT, "-m", strict, *TINY, "8", "--contact-sheet")[0] == 1
    record = read_record(tmp_path / "out.png")
    Picture.from_pixels(Image.new("RGB", (32, 32), "red"), record).save(tmp_path / "out.png")
    code, _, err = command("resume")
    assert (code, "the log does not say that this file was released" in err) == (0, True), err
    assert not (np.asarray(Image.open(tmp_path / "out-sheet.png")) == [255, 0, 0]).all(-1).any()


@pytest.mark.parametrize("is_old", [False, True], ids=["this version's", "without the field"])
def test_latents_of_a_filtered_model_never_decode_under_a_free_one(command, model, strict, home, tmp_path, is_old):
    """Also when the manifest was copied over, and by the command as from Python."""
    index = (strict / "model_index.json").read_bytes()
    edit_json(
        strict / "manifest.json",
        **{"model_index.json": {"sha256": hashlib.sha256(index).hexdigest(), "bytes": len(index)}},
    )
    with failing("denoise", 2.1):
        assert command("generate", CAT, "-m", strict, *TINY)[0] == 1
    (path,) = files()
    assert contents(path)[0]["filters"] == "required"
    if is_old:
        change(path, lambda facts, arrays: facts.pop("filters") and None)
    free = tmp_path / "free"
    shutil.copytree(model, free)
    shutil.copy(strict / "manifest.json", free)
    code, out, err = command("resume", "-m", free)
    assert (code, out, list(tmp_path.glob("*.png"))) == (3, "", []), err
    checkpoint = interrupted.Checkpoint.read(path)
    with pytest.raises(ModelError, match=r"without that duty|is not the model"):
        FluxPipeline.from_pretrained(free)(
            CAT, seed=7, width=32, height=32, num_inference_steps=4, checkpoint=checkpoint
        )
    checkpoint.close()
    code, _, err = command("resume")
    assert code == 0, err
    assert events(home)[-1] == "written"


def test_the_duty_of_a_checkpoint_is_one_of_two_words(command, kept):
    change(kept, lambda facts, arrays: facts.update(filters="never"))
    code, _, err = command("resume", kept)
    assert (code, "is another kind of file" in err) == (2, True)


@pytest.mark.parametrize("name", ["save_step", "write", "latents", "start_picture", "close", "anything"])
def test_no_method_of_a_checkpoint_can_be_replaced(name):
    with pytest.raises(AttributeError):
        setattr(interrupted.Checkpoint({}), name, lambda *args: None)


def test_a_checkpoint_whose_class_is_changed_meanwhile_gets_no_latents(strict):
    class Spy(interrupted.Checkpoint):
        __slots__ = ()

        def save_step(self, *args):
            pytest.fail("latents were handed over")

    checkpoint = interrupted.Checkpoint({})

    def change_class(stage, done, total):
        if stage == "denoise":
            checkpoint.__class__ = Spy

    with pytest.raises(UsageError, match="`checkpoint` is Spy"):
        FluxPipeline.from_pretrained(strict)(
            CAT, width=32, height=32, num_inference_steps=2, checkpoint=checkpoint, progress=change_class
        )


def test_the_folder_of_a_pipeline_cannot_be_replaced(strict, model, tmp_path):
    pipe, free = FluxPipeline.from_pretrained(strict), FluxPipeline.from_pretrained(model).folder
    for owner in (pipe, pipe._generator):
        with pytest.raises(AttributeError):
            owner.folder = free
    pipe._generator._folder, pipe._policy = free, None
    assert pipe.policy is not None
    with pytest.raises(UsageError, match="latents are pictures that nobody has checked"):
        pipe(CAT, output_type="latent")
