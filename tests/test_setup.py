"""`flux-krea setup` at a real terminal: from an empty home folder to a picture, whatever comes between.

The models are tiny, in the published layouts. The program is told that the sizes of FLUX.1 are those of the tiny one,
so that it asks for licence and filters, and to draw a small picture; nothing else of it is another than a user's.
"""

import hashlib
import json
import os
import re
import subprocess
import sys
import unicodedata
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import foreign
import pexpect
import pytest
from fitted import LICENCE, PICTURE, write_published
from helpers import ROOT, SHOWS_PICTURES, TOKENIZERS
from hub import Hub
from mac import Mac
from mlx_flux_krea.convert import convert, examine
from mlx_flux_krea.convert.job import Outline, _may_be_schnell
from mlx_flux_krea.convert.room import SMALL_FILES, Room, needs_in_turn
from pictures import is_right
from PIL import Image

from mlx_flux_krea import convert as convert_module
from mlx_flux_krea import memory as plan
from mlx_flux_krea.commands import setup as setup_verb
from mlx_flux_krea.commands.shared import estimates
from mlx_flux_krea.commands.shared.terminal import Console
from mlx_flux_krea.home import NANO
from mlx_flux_krea.licence import FLUX_1_DEV, FLUX_1_SCHNELL, Evidence
from mlx_flux_krea.models import config
from mlx_flux_krea.presets import FIRST_PROMPT
from mlx_flux_krea.provenance import read_record

PROGRAM = f"""
import dataclasses, json, os, socket, sys
if "MAC" in os.environ:
    import mac
    mac.install(os.environ["MAC"], os.environ.get("FOLDED"))
from pathlib import Path
from mlx_flux_krea import licence
from mlx_flux_krea.models import config
tiny = json.loads(Path(os.environ["TINY"], "config.json").read_text())
tiny.pop("dtype"), tiny.pop("quantization", None)
config.FLUX_DEV = config.from_json(config.FluxConfig, tiny, "the tiny one")
licence.SMALLEST, licence.HIDDEN_SIZE, licence.NUM_HEADS = 0, *config.FLUX_DEV.architecture[:2]
from mlx_flux_krea.commands import setup
setup.PICTURE = {PICTURE}
if "NO_SOCKETS" in os.environ:
    def forbidden(*_, **__):
        os.write(2, b"a socket was asked for")
        os._exit(99)
    socket.socket = type("socket", (socket.socket,), {{"__init__": forbidden}})
    socket.getaddrinfo = forbidden
if "FREE" in os.environ:
    import shutil
    shutil.disk_usage = lambda path, real=shutil.disk_usage: real(path)._replace(free=int(os.environ["FREE"]))
if "LARGEST" in os.environ:
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(os.environ["LARGEST"]),) * 2)
from mlx_flux_krea import cli
cli.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def published_folders(tmp_path_factory):
    """Model and filters as people hold them, and the converted tiny transformer, whose sizes stand for the real."""
    return write_published(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="module")
def ready(published_folders):
    """The ready copy of Pixtral."""
    return published_folders["ready"]()


@pytest.fixture
def place(published_folders, tmp_path, monkeypatch):
    """A user's folders, with a space and letters beyond ASCII in their names; nothing of this machine's is seen."""
    own = tmp_path / "Zoë's Mac"
    own.mkdir()
    monkeypatch.setenv("HOME", str(own))
    monkeypatch.setenv("FLUX_KREA_HOME", str(own / "krea и друзья"))
    monkeypatch.setenv("TINY", str(published_folders["tiny"]))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    for name in (*SHOWS_PICTURES, "MFLUX_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    return own


def named(folders: dict) -> list[str]:
    return [part for name in ("model", "nsfw", "pixtral") for part in (f"--{name}", str(folders[name]))]


def home_of(place: Path) -> Path:
    return place / "krea и друзья"


ANSWERS = {  # to what is asked, in this order
    "anything else ends setup": "i agree",
    "Precision (none, 8, 6, 5, 4) [none]": "",
    "Continue? [Y/n]": "y",
}


def at_terminal(place: Path, *args: str, stop_at: str | None = None, answers: dict[str, str] = ANSWERS):
    """The command at a terminal of its own, each question answered; at some text Ctrl-C.

    Returns:
        The exit code, all that was shown, and the questions that came.
    """
    child = pexpect.spawn(
        sys.executable, ["-c", PROGRAM, "setup", "--allow-unknown-filter", *args],
        cwd=str(place), encoding="utf-8", timeout=200,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, dimensions=(50, 200),
    )  # fmt: skip
    asked, shown, expected = [], "", [*answers, pexpect.EOF]
    if stop_at:
        expected = [stop_at, *(text for text in expected if text != stop_at)]
    while (found := child.expect_exact(expected)) is not None and expected[found] is not pexpect.EOF:
        shown += child.before + (child.after if isinstance(child.after, str) else "")
        if expected[found] == stop_at:
            child.sendintr()
            expected.remove(stop_at)
            expected.append(pexpect.TIMEOUT)
            child.timeout, tries = 20, 10
        elif expected[found] is pexpect.TIMEOUT:  # it came just before Python waited for an answer, and was not seen
            tries -= 1
            assert tries, shown
            child.sendintr()
        else:
            asked.append(expected[found])
            child.sendline(answers[expected[found]])
    shown += child.before
    child.close()
    return child.exitstatus if child.exitstatus is not None else -child.signalstatus, shown, asked


def piped(place: Path, *args: str, **environment) -> subprocess.CompletedProcess:
    """The command without a terminal."""
    command = [sys.executable, "-c", PROGRAM, *args]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"} | environment
    return subprocess.run(
        command, cwd=place, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )


def state(home: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in home.rglob("*") if path.is_file() and path.name != "log.jsonl"}


@pytest.mark.slow
def test_from_an_empty_home_to_a_picture_at_a_terminal_and_then_without_a_network(published_folders, place):
    code, shown, asked = at_terminal(place, *named(published_folders))
    assert (code, asked) == (0, list(ANSWERS)), shown
    assert shown.index("For déjà vu alone.") < shown.index("anything else ends setup") < shown.index("to download")
    assert "everything is ready" in shown
    home = home_of(place)
    (model,) = (home / "models").iterdir()
    assert model.name == "FLUX.1-Krea-dev-bf16"
    assert (model / "LICENSE.md").read_text(encoding="utf-8") == LICENCE
    record = read_record(home / "pictures" / "FLUX.1-Krea-dev-bf16.png")
    assert (record["prompt"], record["model"]) == (FIRST_PROMPT, "FLUX.1-Krea-dev")
    before = state(home)

    for arguments in ([], named(published_folders)):  # nobody is asked again, and nothing is made again
        ran = piped(place, "setup", "--allow-unknown-filter", *arguments, "--json", NO_SOCKETS="1")
        assert ran.returncode == 0, ran.stderr
        steps = json.loads(ran.stdout)["steps"]
        assert (steps["weights"], steps["picture"]) == ("the model is installed", "already made")
        assert state(home) == before
    size = ["--width", "48", "--height", "32", "--steps", "1", "--seed", "1"]
    ran = piped(place, "generate", FIRST_PROMPT, *size, NO_SOCKETS="1")
    assert (ran.returncode, ran.stdout) == (0, "out.png\n"), ran.stderr
    for verb in (["doctor", "--full"], ["models"], ["log", "verify"], ["verify", "FLUX.1-Krea-dev-bf16"]):
        ran = piped(place, *verb, NO_SOCKETS="1")
        assert ran.returncode == 0, ran.stderr + ran.stdout
        assert verb[0] in ("log", "verify") or str(place) not in ran.stdout


@pytest.mark.slow
def test_on_a_mac_it_calls_what_a_mac_has(published_folders, place, tmp_path):
    """All of it in one process that may open 256 files, in a locale without letters beyond ASCII."""
    home, machine = home_of(place), Mac(tmp_path, pytest.MonkeyPatch())
    machine.undo()
    digest = hashlib.sha256(LICENCE.encode()).hexdigest()
    arguments = ["--allow-unknown-filter", *named(published_folders), "--accept-licence", digest, "--json"]
    ran = piped(place, "setup", *arguments, MAC=str(tmp_path), LC_ALL="C")
    assert ran.returncode == 0, ran.stderr
    assert (home / "pictures" / "FLUX.1-Krea-dev-bf16.png").exists()
    names = (f"models/.{'FLUX.1-Krea-dev-bf16'}", "filters/.nsfw", "filters/.pixtral")
    excluded = [f"addexclusion {home / name}.flux-krea.partial" for name in names]
    excluded += [f"addexclusion {home / name}" for name in ("quarantine", "log")]
    assert sorted(machine.calls("tmutil")) == sorted(excluded)
    assert set(machine.calls("held")) == {"0"}
    assert len(machine.calls("caffeinate")) == 4  # each conversion, and the picture
    synced = machine.calls("F_FULLFSYNC")
    files = ("licences.json", "config.json", "log/log.jsonl", "log/.head", "models/", "filters/nsfw", "pictures/")
    assert [name for name in files if not any(str(home / name).rpartition("/")[2] in path for path in synced)] == []
    assert machine.calls("F_NOCACHE")

    before = state(home)
    other = unicodedata.normalize("NFD", str(home.with_name(home.name.upper())))
    named_so = {"FLUX_KREA_HOME": other, "FOLDED": str(tmp_path)}
    ran = piped(place, "setup", *arguments, MAC=str(tmp_path), **named_so)
    assert ran.returncode == 0, ran.stderr
    steps = json.loads(ran.stdout)["steps"]
    assert (steps["weights"], steps["picture"]) == ("the model is installed", "already made")
    assert state(home) == before
    size = ["--width", "48", "--height", "32", "--steps", "1", "--seed", "1"]
    for verb in (["doctor", "--full"], ["models"], ["log", "verify"], ["generate", FIRST_PROMPT, *size]):
        ran = piped(place, *verb, MAC=str(tmp_path), **named_so)
        assert ran.returncode == 0, ran.stderr + ran.stdout
    assert machine.calls("folded")


STOPS = [
    "anything else ends setup", "Precision (none", "Continue?", "converting model", "converting nsfw",
    "converting pixtral", "check:",
]  # fmt: skip


@pytest.mark.slow
def test_interrupted_at_any_step_it_goes_on(published_folders, place):
    """Each start is interrupted one step later; what was done before is not asked for or made again."""
    home, done = home_of(place), set()
    for number, stop in enumerate(STOPS):
        code, shown, asked = at_terminal(place, *named(published_folders), stop_at=stop)
        assert code == 130, shown
        assert "interrupted; flux-krea setup continues where it stopped" in shown
        assert ("anything else ends setup" in asked) == (number == 1)
        assert not list(home.rglob("*.partial"))
        now = {path.name for path in (home / "models", home / "filters") if path.exists() for path in path.iterdir()}
        assert done <= now
        done = now
    assert done == {"FLUX.1-Krea-dev-bf16", "nsfw", "pixtral"}
    code, shown, asked = at_terminal(place, *named(published_folders))
    assert (code, asked) == (0, []), shown
    assert list((home / "pictures").iterdir())


@pytest.mark.slow
def test_a_person_who_does_not_agree_installs_nothing(published_folders, place):
    for said in ("", "no", "I do not agree", "yes"):
        code, shown, _ = at_terminal(place, *named(published_folders), answers={"anything else ends setup": said})
        assert code == 6, shown
        assert "the licence was not acknowledged" in shown
    assert not home_of(place).exists()


@pytest.mark.slow
def test_a_script_agrees_by_the_hash_of_the_text_alone(published_folders, place):
    digest = hashlib.sha256(LICENCE.encode()).hexdigest()
    arguments = ["setup", "--allow-unknown-filter", *named(published_folders)]
    ran = piped(place, *arguments)
    assert (ran.returncode, ran.stdout) == (6, "")
    assert "For déjà vu alone." in ran.stderr
    assert f"--accept-licence {digest}" in ran.stderr
    for wrong in ("yes", digest[:-1], "0" * 64):
        assert piped(place, *arguments, "--accept-licence", wrong).returncode == 6
    assert not home_of(place).exists()
    ran = piped(place, *arguments, "--accept-licence", digest, FREE="1000000")
    assert (ran.returncode, ran.stdout) == (8, "")  # and so it came as far as the disk, which is too small
    assert re.search(r"1\.0 MB are free on the disk of .*; expected \d", ran.stderr)
    assert json.loads((home_of(place) / "licences.json").read_text()).keys() == {digest}
    ran = piped(place, *arguments, LARGEST="200000")
    assert ran.returncode == 2
    assert "cannot be written: File too large" in ran.stderr
    assert [path for path in home_of(place).rglob("*") if path.is_file()] == [home_of(place) / "licences.json"]


@pytest.mark.parametrize("where", ["below a file", "on a disk that is read-only"])
def test_a_home_that_cannot_be_written_is_named(published_folders, place, monkeypatch, where):
    """Nobody may write there, root neither."""
    home = home_of(place)
    home.write_text("")
    if where == "on a disk that is read-only":
        home = Path("/System" if sys.platform == "darwin" else "/sys", "flux krea")
        monkeypatch.setenv("FLUX_KREA_HOME", str(home))
    digest = hashlib.sha256(LICENCE.encode()).hexdigest()
    ran = piped(place, "setup", "--allow-unknown-filter", *named(published_folders), "--accept-licence", digest)
    assert ran.returncode == 6
    assert f"{home} cannot be" in ran.stderr or f"{home / 'licences.json'} cannot be" in ran.stderr
    assert "name another place in $FLUX_KREA_HOME" in ran.stderr
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize("how", [["--offline"], []], ids=["option", "variable"])
def test_without_weights_or_network_it_says_what_is_wanted(place, how):
    ran = piped(place, "setup", "--allow-unknown-filter", *how, HF_HUB_OFFLINE="0" if how else "1")
    assert ran.returncode == 3
    assert "there is no folder of " in ran.stderr
    assert "or name a folder: flux-krea setup --model /path/to/FLUX.1-Krea-dev" in ran.stderr
    assert "no source of the model is on this disk; expected black-forest-labs/FLUX.1-Krea-dev" in ran.stderr


# --- what is on this disk already ---


@pytest.mark.parametrize("tool", ["ComfyUI", "mflux"])
def test_files_of_other_programs_are_found_and_offered(published_folders, place, model, tool):
    """ComfyUI and mflux keep no tokenizers: they are named."""
    where = {"ComfyUI": place / "ComfyUI" / "models", "mflux": place / "cache" / "flux-krea-q"}[tool]
    foreign.write(model, where, tool, **({"text_encoder_2": "F16"} if tool == "ComfyUI" else {}))
    if tool == "ComfyUI":
        (where / "diffusion_models" / "another.safetensors").write_bytes(b"not one")
    environment = {"MFLUX_CACHE_DIR": str(place / "cache")}
    ran = piped(place, "setup", "--allow-unknown-filter", "--offline", "--tokenizers", str(TOKENIZERS), **environment)
    assert ran.returncode == 3
    assert re.search(rf"^weights: +model from {tool}, ", ran.stderr, re.M)
    assert re.search(rf"^looked in .*{tool}: ", ran.stderr, re.M)
    assert "no source of the nsfw is" in ran.stderr, ran.stderr  # the model can: the next is what is missing


@pytest.mark.slow
def test_a_gated_repository_is_explained_and_then_fetched(published_folders, place, tmp_path):
    others = named(published_folders)[2:]
    with Hub(published_folders["model"], "black-forest-labs/FLUX.1-Krea-dev", gated="auto") as hub:
        hub.tokens = {"hf_good": "somebody"}
        environment = hub.env(tmp_path)
        ran = piped(place, "setup", "--allow-unknown-filter", *others, **environment)
        assert (ran.returncode, hub.fetched()) == (3, [])
        assert "is gated, and nobody is logged in" in ran.stderr
        assert "hf auth login" in ran.stderr
        digest = hashlib.sha256(LICENCE.encode()).hexdigest()
        accept = ["--accept-licence", digest, "--json", "-q", "none"]
        ran = piped(place, "setup", "--allow-unknown-filter", *others, *accept, **environment | {"HF_TOKEN": "hf_good"})
        assert ran.returncode == 0, ran.stderr
        assert "black-forest-labs/FLUX.1-Krea-dev is open to somebody, who is logged in" in ran.stderr
    report = json.loads(ran.stdout)
    assert report["model"] == "FLUX.1-Krea-dev"
    assert Path(report["picture"]).exists()
    assert not list((tmp_path / "hub").rglob("*.safetensors"))  # what was fetched went when it was converted
    ran = piped(place, "setup", "--allow-unknown-filter", NO_SOCKETS="1", **environment)
    assert ran.returncode == 0, ran.stderr


# --- who checks ---


def accepted(*arguments: str) -> list[str]:
    """Arguments of a setup that agrees to the licence."""
    digest = hashlib.sha256(LICENCE.encode()).hexdigest()
    return ["setup", "--allow-unknown-filter", "--accept-licence", digest, "-q", "none", *arguments]


@pytest.mark.slow
def test_who_reviews_fetches_no_filter_and_is_told_the_next_command(published_folders, place):
    model = ["--model", str(published_folders["model"])]
    ran = piped(place, *accepted("--check", "review", *model), NO_SOCKETS="1")
    assert (ran.returncode, ran.stdout) == (0, ""), ran.stderr
    assert ran.stderr.endswith("next: flux-krea review\n")
    home = home_of(place)
    assert not (home / "filters").exists()
    assert json.loads((home / "config.json").read_text()) == {"check": "review"}
    (waiting,) = (home / "quarantine").rglob("*.png")
    again = piped(place, "setup", "--json", NO_SOCKETS="1")  # the answer is remembered, and nothing is made again
    assert again.returncode == 0, again.stderr
    report = json.loads(again.stdout)
    assert (report["check"], report["picture"]) == ("review", None)
    assert report["steps"]["picture"] == "it waits for your review"
    assert waiting.exists()
    nano = piped(place, "generate", "a red circle on a blue background", "-m", "nano", "--steps", "1", NO_SOCKETS="1")
    assert (nano.returncode, nano.stdout) == (0, "out.png\n"), nano.stderr  # its licence asks for nobody
    mine = piped(place, "generate", "a frog", "--width", "48", "--height", "32", "--steps", "1", NO_SOCKETS="1")
    assert mine.returncode == 5, mine.stderr


@pytest.mark.slow
def test_a_person_is_asked_who_checks_with_the_costs(published_folders, place):
    answers = {"Who checks (filters, review) [filters]": "review", **ANSWERS}
    code, shown, asked = at_terminal(place, "--model", str(published_folders["model"]), answers=answers)
    assert (code, asked) == (0, list(answers)), shown
    assert re.search(r"^filters +7\.5 GB +7\.1 GB +\d+ min +", shown, re.M)
    assert re.search(r"^review +nothing +nothing +nothing +you look at each", shown, re.M)
    assert "next: flux-krea review" in shown


@pytest.mark.slow
def test_the_ready_copy_of_pixtral_is_fetched_converted_and_answers(published_folders, ready, place, tmp_path):
    """The copy in mlx-vlm's names, from a hub that has nothing else."""
    model, nsfw = str(published_folders["model"]), str(published_folders["nsfw"])
    with Hub(ready, "mlx-community/pixtral-12b-4bit") as hub:
        ran = piped(place, *accepted("--model", model), "--nsfw", nsfw, **hub.env(tmp_path))
        assert ran.returncode == 0, ran.stderr
        assert "pixtral from the hub, mlx-community/pixtral-12b-4bit" in ran.stderr
        assert "model.safetensors" in hub.fetched()
    filters = home_of(place) / "filters"
    source = json.loads((filters / "pixtral" / "model_index.json").read_text())["source"]
    assert [one["published"] for one in source] == ["mlx-community/pixtral-12b-4bit"]  # by the hub's own answer
    assert json.loads((filters / "pixtral" / "selftest.json").read_text())
    assert not list((tmp_path / "hub").rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--check", "filters", "--model", "nano"], "no source of the nsfw is on this disk"),
        (["--check", "review", "--nsfw", "x"], "--check review needs no filter"),
        (["--check", "both"], "both"),
    ],
)
def test_answers_about_filters_do_not_speak_of_a_licence_that_asks_for_none(command, home, arguments, says):
    code, _, err = command("setup", "--offline", *arguments)
    assert code in (2, 3)
    assert says in err
    assert "licence asks" not in err


def test_filters_that_are_missing_are_asked_for_without_the_licences_name(command, home):
    code, _, err = command("generate", "a red circle", "-m", "nano", "--check", "filters", "--steps", "1")
    assert code == 6
    assert "licence" not in err


# --- what is known when ---

SCHNELL = Evidence(FLUX_1_SCHNELL, names=("flux1-schnell",))


@pytest.mark.parametrize(
    ("evidence", "unproven"),
    [
        (SCHNELL, True),
        (replace(SCHNELL, names=("anything",)), True),
        (replace(SCHNELL, sha256=frozenset({"0" * 64})), False),  # the hub states it
        (replace(SCHNELL, architecture=FLUX_1_DEV), False),
        (replace(SCHNELL, declared=True), False),
    ],
)
def test_a_local_schnell_file_is_known_after_hashing(evidence, unproven):
    assert _may_be_schnell(evidence) is unproven


def test_until_then_no_filter_is_fetched_and_no_licence_shown(home, capsys):
    index, options = SimpleNamespace(filters="required"), {"check": None, "nsfw": None, "pixtral": None}
    outline = Outline(index=index, sizes=None, licence=b"x", bytes=1, rooms={}, labels={}, is_unproven=True)
    it = setup_verb.Installation(options, Console(), outlines={"model": outline})
    assert not it.requires_filters
    assert setup_verb._checks(it) == "known after conversion"
    assert "after conversion" in setup_verb._licence(it)
    assert (it.check, it.sources) == ("", {})


def test_the_first_picture_is_one_that_the_model_can_draw():
    small, large = (SimpleNamespace(flux=SimpleNamespace(sizes=SimpleNamespace(hidden_size=n))) for n in (256, 3072))
    assert setup_verb._first_request(small).prompt == "a red circle on a blue background"
    assert setup_verb._first_request(small).width is None  # the model's own size and steps
    assert (setup_verb._first_request(large).prompt, setup_verb._first_request(large).width) == (FIRST_PROMPT, 512)


@pytest.mark.slow
def test_setup_of_the_small_model_draws_a_shape_and_says_where(command, home):
    code, out, err = command("setup", "--model", "nano")
    path = home / "pictures" / "nano.png"
    assert (code, out) == (0, f"{path}\n"), err
    assert '"a red circle on a blue background", in' in err
    assert err.count(str(path)) == 1
    assert is_right(Image.open(path), [("circle", "red")], "blue")


def test_the_next_command_names_the_model_where_another_would_be_taken(home, model):
    assert "-m nano" in setup_verb._draw_with(NANO)
    assert str(model) in setup_verb._draw_with(model)
    (home / "models").mkdir(parents=True)
    for name in ("a", "b"):
        (home / "models" / name).symlink_to(model)
        assert ("-m" in setup_verb._draw_with(home / "models" / name)) == (name == "b")


@pytest.mark.parametrize(
    ("chip", "says"), [("M1", "29 s each"), ("M4 Max", "4 s each"), (None, "29 s (M1) to 1 s (M5 Max)")]
)
def test_the_question_shows_what_filters_cost_on_this_chip(monkeypatch, capsys, chip, says):
    monkeypatch.setattr(estimates, "this_chip", lambda: chip)
    monkeypatch.setattr(setup_verb.click, "prompt", lambda *_, **__: "review")
    assert setup_verb._ask_who_checks(setup_verb.Installation({}, Console()), ["nsfw", "pixtral"]) == "review"
    shown = capsys.readouterr().err
    assert re.search(rf"^filters +7\.5 GB +7\.1 GB +\d+ min +{re.escape(says)}$", shown, re.M)
    assert ("at the start of a program" in shown) == (chip is not None)


@pytest.mark.slow
def test_a_network_that_is_down_is_said_once(place, tmp_path):
    environment = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path / "hub")}
    ran = piped(place, "setup", NO_PROXY="*", **environment)
    assert (ran.returncode, ran.stdout) == (3, "")
    assert ran.stderr.count("out of reach") == 1
    assert ran.stderr.startswith(f"there is no folder of the hub's cache ({tmp_path / 'hub' / 'hub'}), ComfyUI (")
    assert all(f"{program} (" in ran.stderr for program in ("mflux", "InvokeAI", "Draw Things"))
    assert "connect, and start again; or from a folder: flux-krea setup --model /path/to/FLUX.1-Krea-dev" in ran.stderr
    assert "--offline" not in ran.stderr  # which would lead back


# --- what fits ---


@pytest.mark.parametrize("part", ["model", "pixtral", pytest.param("ready", marks=pytest.mark.slow), "nsfw"])
def test_setup_asks_for_the_disk_that_convert_asks_for(published_folders, request, tmp_path, monkeypatch, part):
    source = request.getfixturevalue("ready") if part == "ready" else published_folders[part]
    asked = []
    monkeypatch.setattr(convert_module, "_check_disk", lambda target, room, discard: asked.append((room, discard)))
    outline = examine([source])
    for quantize in ("none", "8", "4") if part == "model" else (None,):
        usual = quantize or {"nsfw": "none"}.get(part, "4")
        report = convert([source], tmp_path / usual, quantize=quantize, allow_unknown_filter=True)
        (room, discard), *_ = [asked.pop()]
        assert (room, discard) == (outline.rooms[usual], False)
        assert sum(room.written) == sum(component.bytes for component in report.components)


@pytest.mark.parametrize(
    ("discard", "shared", "needs"),
    [(True, True, (42, 0)), (False, True, (52, 0)), (True, False, (18, 34)), (False, False, (18, 34))],
)
def test_space_is_counted_component_by_component(discard, shared, needs):
    """FLUX.1 Krea [dev] in 8 bits, in GB: encoders of 10 become 6, a transformer of 24 becomes 12."""
    most = Room((10, 24), (6, 12)).needs(discard=discard, shared=shared)
    assert (most[0] - SMALL_FILES, most[1]) == needs


def test_conversions_one_after_another_need_the_most_of_any_and_what_is_kept():
    parts = [(Room((30,), (18,)), True), (Room((7,), (6,)), True)]
    assert needs_in_turn(parts, shared=True)[0] - SMALL_FILES == 18 + 30
    parts = [(Room((30,), (18,)), False), (Room((7,), (6,)), True)]
    assert needs_in_turn(parts, shared=True)[0] - SMALL_FILES == 18 + 30 + 6 + 7
    assert needs_in_turn(parts, shared=False) == (18 + 6 + SMALL_FILES, 30 + 7)
    assert needs_in_turn([], shared=True) == (0, 0)


# --- what is proposed ---


@pytest.mark.parametrize(
    ("memory", "free", "proposed"),
    [(64, 100, "none"), (16, 100, "8"), (6, 100, "8"), (64, 20, "8"), (6, 13, "6"), (6, 10, "4"), (6, 1, "8")],
)
def test_the_precision_that_is_proposed_fits_disk_and_memory(monkeypatch, memory, free, proposed):
    monkeypatch.setattr(plan, "machine_memory", lambda: memory * 10**9)
    sizes = config.ModelSizes(flux=config.FLUX_DEV, t5=config.T5_XXL, clip=config.CLIP_L, vae=config.FLUX_VAE)
    made = {"none": 33.8e9, "8": 18e9, "6": 12.5e9, "5": 11e9, "4": 9.5e9}
    found = estimates.precisions(sizes, made, width=1024, height=1024, length=512)
    assert estimates.propose(found, free * 10**9) == proposed
    assert all(one.peak is None or one.peak <= memory * 10**9 for one in found.values())
