"""flux-krea review, at a terminal and without one, and flux-krea log."""

import base64
import io
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

from mlx_flux_krea.commands.shared.output import meant_for
from mlx_flux_krea.commands.shared.terminal import Console, inline_picture, show_picture
from mlx_flux_krea.filters.ledger import Ledger, Verdict
from mlx_flux_krea.filters.log import Log
from mlx_flux_krea.provenance import SOFTWARE, read_record

PIXELS = np.arange(24 * 16 * 3, dtype=np.uint8).reshape(16, 24, 3)
PROMPT = "a secret frog\x1b[31m"
RECORD = {"software": SOFTWARE, "prompt": PROMPT, "seed": 7}
SHOWN = {"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}
HIDDEN = [  # environments whose variables promise a picture that nobody sees
    {"LC_TERMINAL": "iTerm2"},
    {"KITTY_WINDOW_ID": "1", "TERM": "xterm-256color"},
    *({"LC_TERMINAL": "iTerm2", "KITTY_WINDOW_ID": "1", **more} for more in (
        {**SHOWN, "TMUX": "/tmp/tmux-1/default,1,0"},
        {**SHOWN, "TERM": "tmux-256color"},
        {**SHOWN, "TERM": "screen.xterm-256color"},
        {**SHOWN, "STY": "1.pts-0.host"},
        {**SHOWN, "SSH_CONNECTION": "10.0.0.1 1 10.0.0.2 22"},
        {**SHOWN, "TERM": "dumb"},
        {**SHOWN, "TERM": "alacritty"},
        {**SHOWN, "VTE_VERSION": "7600"},
        {"TERM": "xterm-kitty", "SSH_CONNECTION": "10.0.0.1 1 10.0.0.2 22", "DISPLAY": ":0"},
        {"TERM": "xterm-ghostty", "TMUX": "/tmp/tmux-1/default,1,0", "DISPLAY": ":0"},
    )),
]  # fmt: skip


@pytest.fixture
def out(tmp_path):
    folder = tmp_path / "out"
    folder.mkdir()
    return folder


def keep(event="waiting", meant_for=None, **facts) -> None:
    """A picture in quarantine, by default as a run in review mode leaves it."""
    with Ledger().run("review" if event == "waiting" else "filters") as run:
        run.meant_for = meant_for or {}
        one = run.keep(PIXELS, RECORD)
        run.ledger.settle(one, Verdict(event, one.facts["pixels"], **facts))


def answered(out: Path, answers: list[str], *options, **environment) -> tuple[int, str, str]:
    """The command at a terminal, each question answered in turn; end of file after the last answer."""
    todo = iter([f"{one}\n" for one in answers])

    def answer(shown: str) -> str:
        return (
            next(todo, "\x04") if re.search(r"(later\): |\]: |releasing it: |none\): |lets it wait: )$", shown) else ""
        )

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


@pytest.mark.parametrize("answers", [["yes", "delete"], ["no", "yes", " Delete"]])
def test_one_yes_rejects_and_deletes(out, home, answers):
    keep()
    code, stdout, seen = answered(out, answers, "--reviewer", "Ada", **SHOWN)
    assert (code, stdout, files(out), files(home / "quarantine")) == (0, "", [], [])
    assert "rejected and deleted" in seen
    assert r'its prompt and seed can make it again: "a secret frog\x1b[31m", 7' in seen
    assert (log(home)[-1]["event"], log(home)[-1]["reviewer"]) == ("rejected", "Ada")


@pytest.mark.parametrize(
    "answers",
    [
        [],
        ["later"],
        ["no"],
        ["no", "later"],
        ["y", "y"],  # a reflex
        ["no", "y", ""],
        ["yes"],
        ["maybe", "yess", "", "l"],
        ["nn", "not", "N", "Later"],
        ["n", "ye", "0"],
    ],
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


@pytest.mark.core("variables1")
@pytest.mark.parametrize("variables", [{}, HIDDEN[0], HIDDEN[2]])
def test_a_picture_that_cannot_be_shown_is_named_and_the_reviewer_says_that_it_was_opened(out, home, variables):
    keep()
    (path,) = (home / "quarantine").rglob("*.png")
    for answers in (["later"], ["no", "no", "no"], ["n", "n"], []):
        code, _, seen = answered(out, answers, "--reviewer", "Ada", **variables)
        assert (code, files(out)) == (5, []), seen
        assert f"look at it first: {path}" in seen.replace("\r\n", "\n")
        assert "unlawful" not in seen
    code, _, seen = answered(out, ["yes", "no", "no"], "--reviewer", "Ada", **variables)
    assert (code, files(out)) == (0, ["out.png"]), seen
    assert seen.index(str(path)) < seen.index("Did you open it?") < seen.index("unlawful")


def test_the_path_stands_there_where_the_picture_is_shown_too(out, home):
    keep()
    (path,) = (home / "quarantine").rglob("*.png")
    seen = answered(out, ["n", "n"], "--reviewer", "Ada", **SHOWN)[2]
    assert seen.index(str(path)) < seen.index("unlawful")
    assert "Did you open it?" not in seen


def test_y_and_n_are_answers_the_choices_stand_once_and_the_release_is_said(out, home):
    keep()
    code, stdout, seen = answered(out, ["N", "n"], "--reviewer", "Ada", **SHOWN)
    assert (code, stdout) == (0, "out.png\n"), seen
    assert seen.count("(yes, no, later)") == 2
    assert "released out.png" in seen
    keep()
    code, stdout, seen = answered(out, ["n", "Y", "delete"], "--reviewer", "Ada", **SHOWN)
    assert (code, stdout, log(home)[-1]["event"]) == (0, "", "rejected"), seen


def test_a_contact_sheet_numbers_what_waits_and_each_chosen_picture_is_shown_and_asked_about(out, home):
    """Numbers that there are none of are asked for again; the sheet itself approves nothing and does not stay."""
    for _ in range(4):
        keep()
    names = [one.image for one in Ledger().waiting()]
    code, stdout, seen = answered(out, ["none"], "--contact-sheet", "--reviewer", "Ada", **SHOWN)
    assert (code, stdout, files(out)) == (5, "", []), seen
    chosen = ["5", "1 x", "3, 1 3", "n", "n", "n", "y", "delete"]
    code, stdout, seen = answered(out, chosen, "--contact-sheet", "--reviewer", "Ada", **SHOWN)
    assert (code, stdout) == (5, "out.png\n"), seen
    assert "'5' is no number from 1 to 4" in seen
    assert "'x' is no number from 1 to 4" in seen
    shown = [Image.open(io.BytesIO(base64.b64decode(one))).size for one in re.findall(r":([A-Za-z0-9+/=]+)\x07", seen)]
    assert shown == [(4 * 260 + 4, 278), (24, 16), (24, 16)]  # the sheet, and both pictures whole
    events = {one: Ledger().log.picture(one)["event"] for one in names}
    assert [events[name] for name in names] == ["rejected", "waiting", "written", "waiting"]
    assert [one.image for one in Ledger().waiting()] == [names[1], names[3]]
    assert not list((home / "quarantine").glob("*.temporary.noindex"))


def test_a_contact_sheet_that_cannot_be_shown_is_named_and_is_its_owners_alone(out, home):
    keep()
    seen = {}

    def answer(shown: str) -> str:
        if not shown.endswith("none): "):
            return ""
        (path,) = (home / "quarantine").glob("*.temporary.noindex/sheet.png")
        seen["mode"], seen["pixels"] = path.stat().st_mode & 0o777, np.asarray(Image.open(path))
        return "none\n"

    code, _, said = at_terminal("review", "--contact-sheet", cwd=out, answer=answer)
    assert (code, seen["mode"], "open the file" in said) == (5, 0o600, True), said
    assert np.array_equal(seen["pixels"][142:158, 120:144], PIXELS)


def test_a_sheet_of_a_process_that_was_killed_is_deleted_and_is_no_picture(home):
    keep()
    dead = home / "quarantine" / f"{'0' * 32}.temporary.noindex"
    dead.mkdir()
    (dead / "sheet.png").write_bytes(b"anything")
    with Ledger().temporary("sheet.png") as path:
        path.write_bytes(b"of a process that lives")
        assert [one.facts["event"] for one in Ledger().waiting()] == ["waiting"]
        assert (dead.exists(), path.exists()) == (False, True)
    assert not path.parent.exists()


@pytest.mark.parametrize("umask", [0o000, 0o077])
def test_what_is_private_is_so_whatever_the_umask_says(home, umask):
    before = os.umask(umask)
    try:
        keep()
    finally:
        os.umask(before)
    kept = [path for path in home.rglob("*") if path.is_file() and path.name != "licence.json"]
    assert {path.stat().st_mode & 0o077 for path in kept} == {0}, kept


def test_names_and_formats_given_to_generate_are_kept_to_the_end(out, home, tmp_path):
    away = tmp_path / "away"
    away.mkdir()
    keep(meant_for=meant_for(Path("frog_7.webp"), {"quality": 50, "metadata": "minimal"}) | {"folder": str(out)})
    keep(meant_for={"folder": str(away), "output": "b.jpg"})
    keep(meant_for={"folder": str(tmp_path / "removed"), "output": "c.png", "quality": None, "metadata": "?"})
    keep(meant_for={"folder": 1, "output": ["d.png"]})
    keep()
    assert {path.stat().st_mode & 0o77 for path in (home / "quarantine").rglob("*.json")} == {0}
    code, stdout, seen = answered(out, ["no"] * 10, "--reviewer", "Ada", **SHOWN)
    assert (code, stdout) == (0, f"frog_7.webp\n{away}/b.jpg\nc.png\nout.png\nout-2.png\n"), seen
    assert Image.open(out / "frog_7.webp").format == "WEBP"
    assert read_record(out / "frog_7.webp") is None  # minimal
    assert read_record(away / "b.jpg")["seed"] == 7
    assert files(home / "quarantine") == []
    assert "frog_7" not in (home / "log" / "log.jsonl").read_text()


def test_fields_of_a_name_are_filled_in_as_generate_does(out):
    for _ in range(2):
        keep(meant_for={"folder": str(out), "output": "other.jpg"})
    code, stdout, seen = answered(out, ["no"] * 4, "--reviewer", "Ada", "-o", "rel_{seed}_{n}.webp", **SHOWN)
    assert (code, stdout) == (0, "rel_7_1.webp\nrel_7_2.webp\n"), seen
    assert run_command("review", "-o", "rel_{sed}.webp", cwd=out).returncode == 2


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


@pytest.mark.slow
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
    where = ["-o", "frog_{seed}.webp", "--quality", "80"]
    assert run_command("generate", "a cat", "-m", edited, *size, "--check", "review", *where, cwd=out).returncode == 5
    code, stdout, seen = answered(out, ["n", "n"], "--reviewer", "Ada", **SHOWN)
    assert (code, stdout) == (0, "frog_1.webp\n"), seen
    assert read_record(out / "cat.webp")["prompt"] == "a cat"
    keep()
    assert run_command("log", "verify", cwd=out).returncode == 0
    free = np.asarray(Image.open(tmp_path / "free.png"), int)
    assert np.abs(np.asarray(Image.open(out / "cat.webp"), int) - free).mean() < 16


# --- pictures in a terminal ---


KNOWN = ["TERM=xterm-kitty", "TERM=xterm-ghostty", "TERM_PROGRAM=ghostty", "TERM_PROGRAM=iTerm.app"]


@pytest.mark.parametrize("variable", [*KNOWN, "TERM_PROGRAM=WezTerm"])
def test_terminals_that_can_show_the_picture_get_all_of_it(tmp_path, monkeypatch, capsys, variable):
    for name in SHOWS_PICTURES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(*variable.split("="))
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    assert show_picture(tmp_path / "a.png", Console())
    sent = capsys.readouterr().err
    if "kitty" in variable or "ghostty" in variable:
        chunks = re.findall(r"\x1b_G(a=T,f=100,)?m=(\d);([^\x1b]*)\x1b\\", sent)
        assert [more for _, more, _ in chunks] == ["1"] * (len(chunks) - 1) + ["0"]
        assert [bool(head) for head, _, _ in chunks] == [True] + [False] * (len(chunks) - 1)
        data = "".join(chunk for *_, chunk in chunks)
        assert max(len(chunk) for *_, chunk in chunks) <= 4096
    else:
        data = re.search(r"File=inline=1[^:]*:([^\x07]*)\x07", sent)[1]
    assert base64.b64decode(data) == (tmp_path / "a.png").read_bytes()


@pytest.mark.parametrize("variables", HIDDEN)
def test_terminals_that_may_swallow_the_picture_get_none_and_no_viewer_is_tried(tmp_path, monkeypatch, variables):
    for name in SHOWS_PICTURES:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert inline_picture(b"") is None
    if {"TMUX", "STY", "SSH_CONNECTION"} & variables.keys():
        monkeypatch.setenv("DISPLAY", ":0")
        for name in ("open", "xdg-open"):
            (tmp_path / name).write_text(f"#!/bin/sh\ntouch {tmp_path}/tried\n")
            (tmp_path / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
        Image.fromarray(PIXELS).save(tmp_path / "a.png")
        assert not show_picture(tmp_path / "a.png", Console())
        assert not (tmp_path / "tried").exists()


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
