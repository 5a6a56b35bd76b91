"""flux-krea review, at a terminal and without one, and flux-krea log."""

import base64
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers import SHOWS_PICTURES, acknowledge, at_terminal, edit_json, run_command
from PIL import Image

from mlx_flux_krea.commands.shared.terminal import Console, show_picture
from mlx_flux_krea.filters.ledger import Ledger, Verdict
from mlx_flux_krea.filters.log import Log
from mlx_flux_krea.provenance import SOFTWARE, read_record

PIXELS = np.arange(24 * 16 * 3, dtype=np.uint8).reshape(16, 24, 3)
PROMPT = "a secret frog\x1b[31m"
RECORD = {"software": SOFTWARE, "prompt": PROMPT, "seed": 7}
SHOWN = {"LC_TERMINAL": "iTerm2"}


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def keep(event="waiting", **facts) -> None:
    """A picture in quarantine, by default as a run in review mode leaves it."""
    with Ledger().run("review" if event == "waiting" else "filters") as run:
        one = run.keep(PIXELS, RECORD)
        run.ledger.settle(one, Verdict(event, one.facts["pixels"], **facts))


def answered(out: Path, answers: list[str], *options, **environment) -> tuple[int, str, str]:
    """The command at a terminal, each question answered in turn; end of file after the last answer."""
    todo = iter([f"{one}\n" for one in answers])

    def answer(shown: str) -> str:
        return next(todo, "\x04") if re.search(r"(later\): |\]: |releasing it: )$", shown) else ""

    return at_terminal("review", *options, cwd=out, answer=answer, **environment)


def files(folder) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def log(home) -> list[dict]:
    return Log(home / "log").read()


def test_two_times_no_and_a_name_release_a_picture(out, home):
    keep()
    code, stdout, seen = answered(out, ["Ada", "no", "no"], **SHOWN)
    assert (code, stdout, files(out)) == (0, "out.png\n", ["out.png"]), seen
    assert np.array_equal(np.asarray(Image.open(out / "out.png")), PIXELS)
    assert read_record(out / "out.png") == RECORD
    assert r"a secret frog\x1b[31m" in seen
    assert seen.index("\x1b]1337;File=inline=1") < seen.index("unlawful")  # looked at before it is asked about
    assert seen.index("unlawful") < seen.index("without the right")
    approved = log(home)[3]
    assert (approved["event"], approved["reviewer"]) == ("approved", "Ada")
    assert approved["answers"] == {"unlawful": False, "infringing": False}
    assert [e["event"] for e in log(home)[4:]] == ["released", "written"]
    assert files(home / "quarantine") == []


@pytest.mark.parametrize("answers", [["yes"], ["no", "yes"]])
def test_one_yes_rejects_and_deletes(out, home, answers):
    keep()
    code, stdout, seen = answered(out, answers, "--reviewer", "Ada", **SHOWN)
    assert (code, stdout, files(out), files(home / "quarantine")) == (0, "", [], [])
    assert "rejected and deleted" in seen
    assert (log(home)[-1]["event"], log(home)[-1]["reviewer"]) == ("rejected", "Ada")


@pytest.mark.parametrize(
    "answers", [[], ["later"], ["no"], ["no", "later"], ["maybe", "y", "", "later"], ["n", "n", "no", "later"]]
)
def test_whoever_does_not_answer_both_releases_nothing(out, home, answers):
    keep()
    code, stdout, seen = answered(out, answers, "--reviewer", "Ada", **SHOWN)
    assert (code, stdout, files(out)) == (5, "", []), seen
    assert "1 picture waits for review" in seen
    assert [kept.facts["event"] for kept in Ledger().waiting()] == ["waiting"]


def test_nobody_reviews_without_a_name(out):
    keep()
    code, _, seen = answered(out, [" ", "Ada", "later"], **SHOWN)
    assert code == 5
    assert seen.count("Your name") >= 1


def test_what_a_filter_flagged_needs_a_reason_too(out, home):
    keep("flagged", reasons=("it seems not to be safe for work (0.900)",), scores={"nsfw": 0.9, "integrity": -3.0})
    code, _, seen = answered(out, ["no", "no", " "], "--reviewer", "Ada", **SHOWN)
    assert (code, files(out)) == (5, []), seen
    assert "nsfw 0.900, integrity -3.000" in seen
    code, stdout, _ = answered(out, ["no", "no", "a statue in a museum"], "--reviewer", "Ada", **SHOWN)
    assert (code, stdout) == (0, "out.png\n")
    (approved,) = (e for e in log(home) if e["event"] == "approved")
    assert approved["reasons"] == ["a statue in a museum"]


def test_a_picture_that_cannot_be_shown_is_named(out, home):
    keep()
    code, _, seen = answered(out, ["later"], "--reviewer", "Ada")
    assert code == 5
    (path,) = (home / "quarantine").rglob("*.png")
    assert f"look at it first: {path}" in seen.replace("\r\n", "\n")


def test_names_and_options_are_those_of_generate(out):
    keep()
    keep()
    (out / "a.jpg").write_bytes(b"mine")
    options = ["-o", "a.jpg", "--quality", "50", "--metadata", "minimal", "--reviewer", "Ada"]
    code, stdout, seen = answered(out, ["no"] * 4, *options, **SHOWN)
    assert (code, stdout) == (0, "a-2.jpg\na-3.jpg\n"), seen
    assert (out / "a.jpg").read_bytes() == b"mine"
    assert read_record(out / "a-2.jpg") is None


def test_without_a_terminal_it_says_what_waits_and_releases_nothing(out):
    assert run_command("review", cwd=out).returncode == 0
    keep()
    ran = run_command("review", "--reviewer", "Ada", cwd=out)
    assert ran.returncode == 5
    assert r"a secret frog\x1b[31m" in ran.stdout
    assert "1 picture waits for review; review needs a terminal" in ran.stderr
    assert files(out) == []


def test_a_file_that_was_swapped_is_not_released_whatever_the_reviewer_says(out, home):
    keep()
    (path,) = (home / "quarantine").rglob("*.png")
    Image.fromarray(PIXELS[::-1]).save(path)
    code, stdout, seen = answered(out, ["no", "no"], "--reviewer", "Ada", **SHOWN)
    assert (code, stdout, files(out)) == (6, "", []), seen
    assert "changed after it was judged" in seen


def test_generate_in_review_mode_ends_with_5_and_review_releases_the_very_picture(model, out, tmp_path):
    size = ["--width", "48", "--height", "32", "--steps", "1", "--seed", "1"]
    assert run_command("generate", "a cat", "-m", model, *size, "-o", "free.png", cwd=tmp_path).returncode == 0
    edited = tmp_path / "strict"
    subprocess.run(["cp", "-r", model, edited], check=True)
    edit_json(edited / "model_index.json", filters="required")
    acknowledge(edited)
    ran = run_command("generate", "a cat", "-m", edited, *size, "--check", "review", "--json", cwd=out)
    assert (ran.returncode, files(out)) == (5, []), ran.stderr
    (image,) = json.loads(ran.stdout)["images"]
    assert (image["path"], image["outcome"]) == (None, "waiting")
    assert "review it: flux-krea review" in ran.stderr
    code, stdout, seen = answered(out, ["no", "no"], "--reviewer", "Ada", "-o", "cat.webp", **SHOWN)
    assert (code, stdout) == (0, "cat.webp\n"), seen
    assert read_record(out / "cat.webp")["prompt"] == "a cat"
    keep()
    assert run_command("log", "verify", cwd=out).returncode == 0
    free = np.asarray(Image.open(tmp_path / "free.png"), int)
    assert np.abs(np.asarray(Image.open(out / "cat.webp"), int) - free).mean() < 16


# --- pictures in a terminal ---


@pytest.mark.parametrize("variable", ["LC_TERMINAL=iTerm2", "TERM_PROGRAM=iTerm.app", "KITTY_WINDOW_ID=1"])
def test_terminals_that_can_show_the_picture_get_all_of_it(tmp_path, monkeypatch, capsys, variable):
    for name in SHOWS_PICTURES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(*variable.split("="))
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    assert show_picture(tmp_path / "a.png", Console())
    sent = capsys.readouterr().err
    if "KITTY" in variable:
        chunks = re.findall(r"\x1b_G(a=T,f=100,)?m=(\d);([^\x1b]*)\x1b\\", sent)
        assert [more for _, more, _ in chunks] == ["1"] * (len(chunks) - 1) + ["0"]
        assert [bool(head) for head, _, _ in chunks] == [True] + [False] * (len(chunks) - 1)
        data = "".join(chunk for *_, chunk in chunks)
        assert max(len(chunk) for *_, chunk in chunks) <= 4096
    else:
        data = re.search(r"File=inline=1[^:]*:([^\x07]*)\x07", sent)[1]
    assert base64.b64decode(data) == (tmp_path / "a.png").read_bytes()


def test_the_platforms_viewer_is_asked_where_there_is_a_display(tmp_path, monkeypatch):
    for name in SHOWS_PICTURES:
        monkeypatch.delenv(name, raising=False)
    viewer = tmp_path / ("open" if sys.platform == "darwin" else "xdg-open")
    viewer.write_text(f'#!/bin/sh\necho "$1" > {tmp_path}/seen\n')
    viewer.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    Image.fromarray(PIXELS).save(tmp_path / "a.png")
    assert show_picture(tmp_path / "a.png", Console()) == (sys.platform == "darwin")
    monkeypatch.setenv("DISPLAY", ":0")
    assert show_picture(tmp_path / "a.png", Console())
    assert (tmp_path / "seen").read_text() == f"{tmp_path}/a.png\n"
    viewer.write_text("#!/bin/sh\nexit 3\n")
    assert not show_picture(tmp_path / "a.png", Console())


# --- the log ---


def test_the_log_is_verified_and_exported_without_a_word_of_a_prompt(out, home):
    ran = run_command("log", "verify", cwd=out)
    assert (ran.returncode, ran.stderr) == (0, "0 entries, unchanged\n")
    assert json.loads(run_command("log", "export", cwd=out).stdout)["entries"] == []
    assert not home.exists()  # looking makes nothing
    keep()
    ran = run_command("log", "verify", cwd=out)
    assert (ran.returncode, ran.stdout) == (0, f"{home / 'log' / 'log.jsonl'}\n")
    exported = json.loads(run_command("log", "export", cwd=out).stdout)
    assert exported["events"] == {"run": 1, "generated": 1, "waiting": 1}
    assert exported["checks"] == {"review": 1}
    assert [entry["n"] for entry in exported["entries"]] == [1, 2, 3]
    assert "frog" not in json.dumps(exported)
    path = home / "log" / "log.jsonl"
    path.write_text(path.read_text().replace("waiting", "approved"))
    for verb in ("verify", "export"):
        ran = run_command("log", verb, cwd=out)
        assert (ran.returncode, ran.stdout) == (6, "")
        assert "log.jsonl was changed: " in ran.stderr
