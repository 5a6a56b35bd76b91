"""The installed command, as a user runs it: effects, messages and exit codes together."""

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import derived
import numpy as np
import pytest
from helpers import (
    MADE_FOR,
    PIPELINE,
    ROOT,
    TOKENIZERS,
    acknowledge,
    at_terminal,
    full_size_folder,
    image,
    levels,
    run_command,
)
from PIL import Image

from mlx_flux_krea import cli
from mlx_flux_krea.commands.shared.terminal import Console
from mlx_flux_krea.errors import printable
from mlx_flux_krea.provenance import Picture

CAT = "A cat holding a sign that says hello world"
MAKING = "1 picture: "  # written before the work starts
SMALL = ["--width", "48", "--height", "32", "--steps", "2"]
CODES = {signal.SIGINT: (130, "interrupted"), signal.SIGTERM: (143, "terminated"), signal.SIGHUP: (143, "terminated")}


# --- the real program ---


def test_convert_inspect_and_generate_as_a_user_runs_them(tmp_path):
    call = ["convert", PIPELINE, "--tokenizers", TOKENIZERS, "-q", "none", "--dtype", "float32", "-o", "tiny"]
    ran = run_command(*call, cwd=tmp_path)
    assert (ran.returncode, ran.stdout) == (0, "tiny\n"), ran.stderr
    assert "transformer, diffusers" in ran.stderr
    ran = run_command("inspect", "tiny", cwd=tmp_path)
    assert ran.returncode == 0
    assert "549.70 k" in ran.stdout
    call = ["-m", "tiny", "--width", 64, "--height", 64, "--steps", 4, "--guidance", 4.5, "--seed", 42, "-o", "cat.png"]
    ran = run_command("generate", CAT, *call, cwd=tmp_path)
    assert (ran.returncode, ran.stdout) == (0, "cat.png\n"), ran.stderr
    assert re.search(r"seed 42: text [\d.]+ s, denoise [\d.]+ s, decode [\d.]+ s", ran.stderr)
    assert levels(Image.open(tmp_path / "cat.png"), image("images/t2i_4.0.png")) <= 1
    ran = run_command("inspect", "cat.png", cwd=tmp_path)
    assert re.search(rf"prompt +{CAT}\n", ran.stdout)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cat.png", "tiny"]


def test_python_cli_py_works_from_the_checkout():
    ran = subprocess.run([sys.executable, "cli.py", "--version"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (0, "flux-krea, version 0.1.0\n")


def test_help_answers_at_once(tmp_path):
    """Within 0.2 seconds of the processor: how busy the machine is does not count."""
    before = os.times()
    assert "Example" in run_command("--help", cwd=tmp_path).stdout
    after = os.times()
    assert after.children_user + after.children_system - before.children_user - before.children_system < 0.2


@pytest.mark.slow
def test_help_fits_the_screen_and_shows_an_example(tmp_path):
    for verb in (), ("generate",), ("convert",), ("inspect",), ("review",), ("log",):
        text = run_command(*verb, "--help", cwd=tmp_path, COLUMNS="80").stdout
        assert max(map(len, text.splitlines())) <= 80
        assert len(text.splitlines()) < (130 if verb == ("generate",) else 60)
        assert "Example" in text


def start(arguments, folder, patch="", python=()):
    """The command as a process of its own, with a patch of this program's code that makes a moment visible.

    A patch that calls `sys.stdin.read()` waits there until `end` has sent its signal and closes this input.
    """
    code = f"import os, sys, time\nfrom mlx_flux_krea import cli\n{patch}\ncli.main(sys.argv[1:])"
    program = ["-c", code] if patch else [str(Path(sys.executable).parent / "flux-krea")]
    command = [sys.executable, *python, *program, *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def end(process, sent, marker, count=1):
    """Sends the signal when stderr showed the marker so often; gives stdout, and stderr without such lines."""
    seen = []
    for line in process.stderr:
        seen.append(line)
        count -= marker in line
        if not count:
            process.send_signal(sent)
            break
    try:
        out, rest = process.communicate(timeout=30)
    finally:
        process.kill()
    lines = "".join([*seen, rest]).splitlines()
    others = ("import time:", MAKING)
    return out, [s for s in lines if marker not in s and MADE_FOR not in s and not s.startswith(others)]


def stopped(line: str, word: str) -> bool:
    """True for a line that says that the command was stopped, and how to continue what remains."""
    more = r"( (at step \d+ of \d+|before the first step); continue with: flux-krea resume [0-9a-f]{8})?"
    return re.fullmatch(f"flux-krea: {word}{more}", line) is not None


SLOW = ["--width", "256", "--height", "256", "--steps", "200"]


@pytest.mark.core("5", "35", "65", "185")
@pytest.mark.parametrize("imports", range(5, 360, 30))
def test_a_signal_in_the_middle_of_the_imports_is_neither_lost_nor_a_crash(model, tmp_path, imports):
    sent = list(CODES)[imports // 30 % 3]
    process = start(["generate", CAT, "-m", model, *SLOW], tmp_path, python=["-X", "importtime"])
    for line in process.stderr:  # the first thing that the command imports: from here on it takes signals
        if "shared.signals" in line:
            break
    out, err = end(process, sent, "import time:", imports)
    code, word = CODES[sent]
    assert (process.returncode, out, len(err)) == (code, "", 1)
    assert stopped(err[0], word), err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("sent", "steps"), [(signal.SIGINT, 0), (signal.SIGTERM, 1), (signal.SIGHUP, 30), (signal.SIGINT, 30)]
)
@pytest.mark.core("2-0", "15-1")
def test_a_signal_ends_generating_and_leaves_nothing(model, tmp_path, sent, steps):
    patch = """
from mlx_flux_krea.commands.shared.terminal import PipelineProgress
PipelineProgress.__call__ = lambda *progress: print("at", *progress[1:], file=sys.stderr, flush=True)"""
    process = start(["generate", CAT, "-m", model, *SLOW], tmp_path, patch)
    out, err = end(process, sent, "at denoise" if steps else "at text", steps or 1)
    code, word = CODES[sent]
    assert (process.returncode, out) == (code, "")
    (line,) = [line for line in err if not line.startswith("at ")]
    assert stopped(line, word), line
    assert list(tmp_path.iterdir()) == []


KILL = "os.kill(os.getpid(), 15)"
LOSING = {
    "an import": "import swallowing",
    "__del__": "Odd()",
    "a weak reference": f"odd = Odd2(); kept = weakref.ref(odd, lambda _: {KILL}); del odd",
    "somebody's except": f"""
    try:
        {KILL}
    except BaseException:
        pass""",
    "what comes before main": KILL,
}


@pytest.mark.parametrize("where", LOSING)
def test_a_signal_where_an_exception_would_be_lost_waits_for_a_better_moment(model, tmp_path, where):
    (tmp_path / "swallowing.py").write_text(f"import os\ntry:\n    {KILL}\nexcept BaseException:\n    pass")
    inside = f"""
import signal, weakref
from mlx_flux_krea import pipeline
class Odd:
    def __del__(self): {KILL}
class Odd2: pass
def call(*args, **options):
    {LOSING[where]}
    while True:
        signal.pause()
pipeline.FluxPipeline.generate = call"""
    patch = LOSING[where] if "main" in where else inside
    process = start(["generate", CAT, "-m", model, *SLOW, "-o", "a.png"], tmp_path, patch)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (143, "")
    assert stopped(err.splitlines()[-1], "terminated"), err
    assert "Exception ignored" not in err or "weak" in where
    assert not (tmp_path / "a.png").exists()


@pytest.mark.parametrize("as_events", [False, True])
def test_a_line_is_written_at_once_so_that_a_signal_leaves_a_whole_one_or_none(monkeypatch, as_events):
    written = []
    monkeypatch.setattr(sys.stderr, "write", lambda text: written.append(text) if text else None)
    Console(as_events=as_events).say("a line")
    (text,) = written
    assert text.endswith("\n")


def test_a_second_ctrl_c_does_not_disturb_what_the_first_undoes(tmp_path):
    patch = """
import shutil
from mlx_flux_krea import convert
component, remove = convert.write_component, shutil.rmtree
def write_component(*args): print("moment", file=sys.stderr, flush=True); component(*args); sys.stdin.read()
def rmtree(*args, **kwargs): os.kill(os.getpid(), 2); remove(*args, **kwargs)
convert.write_component, shutil.rmtree = write_component, rmtree"""
    process = start(["convert", PIPELINE, "--tokenizers", TOKENIZERS, "-o", "tiny"], tmp_path, patch)
    out, err = end(process, signal.SIGINT, "moment")
    assert (process.returncode, out, err) == (130, "", ["flux-krea: interrupted"])
    assert list(tmp_path.iterdir()) == []


def test_a_signal_counts_even_where_undoing_fails(model, tmp_path):
    patch = """
from mlx_flux_krea import pipeline
def call(*args, **options):
    try:
        print("moment", file=sys.stderr, flush=True)
        sys.stdin.read()
    finally:
        open("nowhere/at all")
pipeline.FluxPipeline.generate = call"""
    process = start(["generate", CAT, "-m", model, *SMALL], tmp_path, patch)
    out, err = end(process, signal.SIGTERM, "moment")
    assert (process.returncode, out) == (143, "")
    assert err[0].startswith("note: the run is saved; continue with: flux-krea resume ")
    assert err[1:] == ["flux-krea: terminated"]


@pytest.mark.parametrize("moment", ["write_component", "write_component again", "sync_path", "_place", "after _place"])
def test_a_signal_ends_converting_and_leaves_nothing_or_the_whole(tmp_path, moment):
    name = moment.split()[1 if moment.startswith("after") else 0]
    count = 2 if moment.endswith("again") else 1
    room = "convert" if name == "write_component" else "convert.folder"
    patch = f"""
from mlx_flux_krea import convert
import mlx_flux_krea.convert.folder
original = {room}.{name}
moments = []
def visible(*args):
    if {moment.startswith("after")}: original(*args)
    moments.append(print("moment", file=sys.stderr, flush=True))
    if len(moments) == {count}:
        sys.stdin.read()
    if not {moment.startswith("after")}: original(*args)
{room}.{name} = visible"""
    process = start(["convert", PIPELINE, "--tokenizers", TOKENIZERS, "-o", "tiny"], tmp_path, patch)
    out, err = end(process, signal.SIGINT, "moment", count)
    if "_place" in moment:
        assert (process.returncode, out) == (0, "tiny\n"), err
        assert [p.name for p in tmp_path.iterdir()] == ["tiny"]
    else:
        assert (process.returncode, out, err) == (130, "", ["flux-krea: interrupted"])
        assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_signals_that_the_caller_ignores_stay_ignored(model, tmp_path):
    patch = """
from mlx_flux_krea.commands.shared.terminal import PipelineProgress
PipelineProgress.__call__ = lambda *progress: print("moment", file=sys.stderr, flush=True)"""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        process = start(["generate", CAT, "-m", model, *SMALL], tmp_path, patch)
        out, _ = end(process, signal.SIGHUP, "moment")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (process.returncode, out) == (0, "out.png\n")


@pytest.mark.slow
def test_a_picture_that_has_its_name_is_reported_whatever_arrives(model, tmp_path):
    for count, code, names in ((1, 130, ["out.png"]), (2, 0, ["out-2.png", "out-3.png"])):
        patch = f"""
from mlx_flux_krea.provenance import Picture
save, moments = Picture.save, []
def visible(*args, **kwargs):
    save(*args, **kwargs)
    moments.append(print("moment", file=sys.stderr, flush=True))
    if len(moments) == {count}:
        sys.stdin.read()
Picture.save = visible"""
        process = start(["generate", CAT, "-m", model, "-n", 2, *SMALL], tmp_path, patch)
        out, _ = end(process, signal.SIGINT, "moment", count)
        assert (process.returncode, out.split()) == (code, names)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out-2.png", "out-3.png", "out.png"]


def test_a_prompt_that_is_not_utf8_is_refused(model, tmp_path):
    command = [str(Path(sys.executable).parent / "flux-krea"), "generate", b"caf\xe9", "-m", str(model), *SMALL]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert "not valid UTF-8" in ran.stderr


@pytest.mark.slow
def test_progress_is_redrawn_in_a_terminal_and_nowhere_else(full_model, tmp_path):
    """Through a real pseudo-terminal: seconds per step and time left."""
    arguments = ["generate", CAT, "-m", full_model, "--width", 32, "--height", 32, "--steps", 12, "--seed", 1]
    code, _, text = at_terminal(*arguments, cwd=tmp_path)
    assert code == 0, text
    assert re.search(r"denoising +\d+% .*/12 steps, +[\d.]+(s/step|step/s)", text), text
    assert re.search(r"\d left, [\d.]+ [kMG]B", text), text
    quiet = run_command(*arguments, "-o", "b.png", cwd=tmp_path)
    assert quiet.returncode == 0
    assert not re.search(r"%|\r", quiet.stderr)


# --- generate ---


@pytest.mark.parametrize("links", [True, False], ids=["", "on a disk without links"])
def test_a_name_that_somebody_took_meanwhile_is_left_to_them(command, model, tmp_path, monkeypatch, links):
    from mlx_flux_krea.provenance import Picture

    original = Picture.save

    def late(self, path, **options):
        if path.name == "out.png":
            path.write_text("theirs")
        original(self, path, **options)

    def refuse(*args, **kwargs):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Picture, "save", late)
    if not links:
        monkeypatch.setattr(os, "link", refuse)
    code, out, err = command("generate", CAT, "-m", model, "-n", 2, *SMALL)
    assert (code, out.split()) == (0, ["out-2.png", "out-3.png"])
    assert "note: out.png exists; writing out-2.png" in err
    assert (tmp_path / "out.png").read_text() == "theirs"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out-2.png", "out-3.png", "out.png"]


@pytest.mark.slow
def test_a_link_is_replaced_and_not_followed(command, model, tmp_path):
    (tmp_path / "theirs.png").write_text("theirs")
    for target in ("theirs.png", "nowhere.png"):
        (tmp_path / "out.png").unlink(missing_ok=True)
        (tmp_path / "out.png").symlink_to(target)
        assert command("generate", CAT, "-m", model, *SMALL)[1] in ("out-2.png\n", "out-3.png\n")
        assert (tmp_path / "out.png").is_symlink()
        assert command("generate", CAT, "-m", model, "--force", *SMALL)[1] == "out.png\n"
        assert not (tmp_path / "out.png").is_symlink()
    assert (tmp_path / "theirs.png").read_text() == "theirs"
    assert not (tmp_path / "nowhere.png").exists()


@pytest.mark.skipif(sys.platform == "darwin", reason="its file systems take only UTF-8")
@pytest.mark.slow
def test_a_name_that_is_not_utf8_is_written_and_printed_as_it_is(model, tmp_path):
    command = [str(Path(sys.executable).parent / "flux-krea"), "generate", CAT, "-m", str(model), "-o", b"caf\xe9.png"]
    for says in (b"seed", b"note: caf\\udce9.png exists; writing caf\\udce9-2.png\n"):
        strict = {**os.environ, "PYTHONIOENCODING": "utf-8:strict"}
        ran = subprocess.run([*command, *SMALL], cwd=tmp_path, env=strict, capture_output=True, check=False)
        name = b"caf\xe9-2.png" if b"note" in says else b"caf\xe9.png"
        assert (ran.returncode, ran.stdout) == (0, name + b"\n"), ran.stderr
        (_, second, *_) = (line for line in ran.stderr.splitlines(keepends=True) if MADE_FOR.encode() not in line)
        assert second.startswith(says)
        assert (tmp_path / os.fsdecode(name)).exists()


@pytest.mark.slow
def test_every_image_starts_from_the_picture_that_was_there_before_the_first(command, model, tmp_path):
    image("images/input.png").save(tmp_path / "a.png")
    start = ["generate", CAT, "-m", model, "--image", "a.png", *SMALL, "--strength", 0.9]
    command(*start, "--seed", 8, "-o", "alone.png")
    code, _, err = command(*start, "--seed", 7, "-n", 2, "--force", "-o", "a.png")
    assert code == 0, err
    assert levels(Image.open(tmp_path / "a-2.png"), Image.open(tmp_path / "alone.png")) == 0


@pytest.mark.slow
def test_the_size_follows_the_options_and_is_floored_with_a_word(command, model, tmp_path):
    code, _, err = command("generate", CAT, "-m", model, "--width", 70, "--height", 40, "--steps", 1)
    assert code == 0
    assert "note: 70 x 40 is no multiple of 16: the picture is 64 x 32" in err
    assert Image.open(tmp_path / "out.png").size == (64, 32)
    _, _, err = command("generate", CAT, "-m", model, "-n", 3, "--width", 70, "--height", 40, "--steps", 1)
    assert err.count("note: 70 x 40") == 1


@pytest.mark.slow
def test_an_empty_prompt_works_and_a_long_one_is_reported(command, model):
    assert command("generate", "", "-m", model, *SMALL)[0] == 0
    code, _, err = command("generate", "cat " * 80, "-m", model, *SMALL)
    assert code == 0
    assert "note: CLIP reads 77 tokens; not read: 'cat cat cat cat cat'" in err


@pytest.mark.slow
def test_the_only_installed_model_is_used(command, model, home):
    shutil.copytree(model, home / "models" / "tiny-fp32")
    assert command("generate", CAT, *SMALL)[0] == 0
    assert command("generate", CAT, "-m", "tiny-fp32", "-o", "b.png", *SMALL)[0] == 0


def refused(result, code, says):
    assert result[0] == code, result[2]
    assert result[1] == ""
    (line,) = result[2].splitlines()
    assert line.startswith("flux-krea: ")
    assert says in line, line


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["-m", "nothing"], 3, "there is no model 'nothing'"),
        ([], 3, "no model is installed"),
        (["-m", PIPELINE], 3, "flux-krea convert"),
        (["-m", PIPELINE / "vae" / "diffusion_pytorch_model.safetensors"], 3, "flux-krea convert"),
        (["--width", "0"], 2, "--width is '0'; expected a whole number from 1 to "),
        (["--height", "-5"], 2, "--height is '-5'; expected a whole number"),
        (["--steps", "0"], 2, "--steps is '0'; expected a whole number from 1 to 1000"),
        (["--steps", "x"], 2, "--steps is 'x'; expected a whole number from 1 to 1000"),
        (["--guidance", "-1"], 2, "--guidance is '-1'; expected a number from 0 to 1000"),
        (["--seed", "-1"], 2, "for a random one leave --seed out"),
        (["--noise", "fal"], 2, "cannot be repeated"),
        (["-n", "0"], 2, "--num-images is '0'; expected a whole number from 1 to 1000"),
        (["--negative-prompt", "x"], 2, "does nothing at --true-cfg-scale 1; expected above 1; set --true-cfg-scale ("),
        (["--true-cfg-scale", "2"], 2, "flux-krea: --true-cfg-scale 2 needs a negative prompt"),
        (["--strength", "0.5"], 2, "without an image"),
        (["--image", "nothing.png"], 2, "cannot be opened"),
        (["--dtype", "int8"], 2, "--dtype is 'int8'; expected bfloat16, float16 or float32"),
        (["--colour", "red"], 2, "there is no option --colour; try"),
        (["-o", "."], 2, "is a folder"),
        (["-o", "a.gif"], 2, "ends in '.gif'"),
        (["-o", "a"], 2, "a has no ending; expected one of .png"),
        (["-o", "nowhere/a.png"], 2, "there is no folder nowhere"),
        (["-o", "/dev/null"], 2, "/dev/null is a device or a pipe"),
        (["-o", "a" * 300 + ".png"], 2, "cannot be written: File name too long"),
        (["-o", "a" * 240 + ".png"], 2, "cannot be written: File name too long"),
        (["--image", "a" * 300], 2, "File name too long"),
        (["-m", "a" * 300], 3, "File name too long"),
        (["-m", "red\x1b[31m\nred\udce9"], 3, r"'red\x1b[31m\nred\udce9'"),
        (["--widht", "3"], 2, "did you mean --width? Try flux-krea generate --help"),
        (["extra"], 2, "'extra' follows the prompt; expected a prompt in quotes"),
    ],
)
def test_what_cannot_be_used_ends_in_one_line_and_its_code(command, model, tmp_path, options, code, says):
    given = [] if code == 3 else ["-m", model]
    size = [] if "--width" in options or "--height" in options or "--steps" in options else SMALL
    refused(command("generate", CAT, *given, *size, *options), code, says)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_requires_filters_is_inspected_by_its_sizes_and_not_run(command, tmp_path):
    folder = full_size_folder(tmp_path / "big", filters="none")
    refused(command("generate", CAT, "-m", folder), 6, "licence of this model was not acknowledged")
    acknowledge(folder)
    refused(command("generate", CAT, "-m", folder), 6, "content filters")


def test_a_folder_that_cannot_be_written_is_refused_before_the_model_is_read(command, tmp_path):
    if os.getuid() == 0:  # root may write anywhere but on a filesystem that cannot be written
        locked = Path("/proc")
    else:
        locked = tmp_path / "locked"
        locked.mkdir(mode=0o500)
    refused(command("generate", CAT, "-m", "nothing", "-o", locked / "a.png"), 2, "cannot be written")


def test_an_output_that_is_a_pipe_is_refused_and_not_replaced(command, tmp_path):
    os.mkfifo(tmp_path / "a.png")
    refused(command("generate", CAT, "-m", "nothing", "--force", "-o", "a.png"), 2, "a.png is a device or a pipe")


@pytest.mark.slow
def test_a_picture_that_grows_beyond_what_the_system_allows_leaves_one_line_and_no_file(model, tmp_path):
    patch = """
import resource
from mlx_flux_krea.provenance import Picture
resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))"""
    process = start(["generate", CAT, "-m", model, *SMALL], tmp_path, patch)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (2, "")
    making, kept, note, line = (
        line for line in err.splitlines() if MADE_FOR not in line
    )  # a run that needs no filters goes on without its log
    assert making.startswith(MAKING)
    assert kept == "note: if this run is interrupted it cannot be resumed: File too large"
    assert note.startswith("note: this run is not in the log: ")
    assert line == "flux-krea: out.png cannot be written: File too large; choose another place"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("redirection", "code", "says"),
    [
        ("> /dev/full", 8, "flux-krea: the output cannot be written: No space left on device\n"),
        ("2> /dev/full", 0, ""),
        ("> /dev/full 2>&1", 8, ""),
        (">&-", 0, ""),
        ("2>&-", 0, ""),
        ("| true", 2, ""),
    ],
)
def test_output_that_nobody_takes_ends_quietly_and_with_its_code(model, tmp_path, redirection, code, says, unbuffered):
    if "/dev/full" in redirection and not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    program = Path(sys.executable).parent / "flux-krea"
    script = f"{program} inspect {model} {redirection}; exit ${{PIPESTATUS[0]}}"
    ran = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (ran.returncode, ran.stderr) == (code, says)


@pytest.mark.slow
def test_results_are_written_even_when_nobody_reads_what_is_said(model, tmp_path):
    script = f"{Path(sys.executable).parent / 'flux-krea'} generate cat -m {model} {' '.join(SMALL)} 2> /dev/full"
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    ran = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stdout) == (0, "out.png\n")


def test_without_arguments_the_command_shows_its_help(command):
    code, out, _ = command()
    assert (code, out) == (0, command("--help")[1])
    refused(command("genrate"), 2, "there is no command 'genrate'; did you mean flux-krea generate? Try")


def test_what_does_not_print_is_spelled_out():
    assert printable("a\x1b[2J\nb\u202ec\udce9é 漢字") == r"a\x1b[2J\nb\u202ec\udce9é 漢字"


def test_a_failure_after_the_first_picture_ends_with_7_and_keeps_it(command, model, tmp_path, monkeypatch):
    from mlx_flux_krea import pipeline
    from mlx_flux_krea.errors import ModelError

    original, calls = pipeline.FluxPipeline.generate, []

    def second_fails(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise ModelError("the disk went away")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(pipeline.FluxPipeline, "generate", second_fails)
    code, out, err = command("generate", CAT, "-m", model, "-n", 3, *SMALL)
    assert (code, out) == (7, "out.png\n")
    assert "the disk went away" in err
    assert [p.name for p in tmp_path.iterdir()] == ["out.png"]


def test_a_bug_ends_with_1_and_asks_for_a_report(command, model, monkeypatch):
    from mlx_flux_krea import pipeline

    def broken(self, *args, **kwargs):
        raise KeyError("oops")

    monkeypatch.setattr(pipeline.FluxPipeline, "generate", broken)
    code, _, err = command("generate", CAT, "-m", model, *SMALL)
    assert code == 1
    assert "report" in err


# --- convert and inspect ---


def test_convert_reports_as_json(command, tmp_path):
    code, out, _ = command("convert", PIPELINE, "--tokenizers", TOKENIZERS, "-o", "tiny", "--json")
    report = json.loads(out)
    assert code == 0
    assert report["path"] == "tiny"
    assert {c["name"]: c["parameters"] for c in report["components"]}["transformer"] == 549696


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ([], 2, "SOURCES is missing; expected a path"),
        (["nothing"], 3, "there is nothing at nothing"),
        ([PIPELINE], 3, "no tokenizer was found"),
        ([PIPELINE / "vae", "--tokenizers", TOKENIZERS], 3, "also transformer"),
        (
            [PIPELINE, "--tokenizers", TOKENIZERS, "--dtype", "int4"],
            2,
            "--dtype is 'int4'; expected bfloat16, float16 or float32",
        ),
    ],
)
def test_convert_refuses_in_one_line(command, tmp_path, arguments, code, says):
    refused(command("convert", *arguments), code, says)
    assert list(tmp_path.iterdir()) == []


def test_inspect_names_foreign_files_without_reading_tensors(command, monkeypatch):
    from mlx_flux_krea.convert.tensors import Tensor

    monkeypatch.setattr(Tensor, "read", None)
    code, out, _ = command("inspect", derived.single_files())
    assert code == 0
    assert re.search(r"flux1-tiny.safetensors +transformer, Black Forest Labs +92 F32 +92 +549.70 k", out)
    assert re.search(r"t5xxl.safetensors +T5 v1.1 encoder +21 F16", out)
    code, out, _ = command("inspect", PIPELINE, "--json")
    assert [s["component"] for s in json.loads(out)["sources"]] == [
        "transformer",
        "text_encoder",
        "text_encoder_2",
        "vae",
    ]


def test_inspect_shows_no_control_characters_of_a_picture(command, tmp_path):
    record = {"software": "s", "prompt": "a\x1b[2Jb\nseed  7"}
    Picture.from_pixels(np.zeros((16, 16, 3), np.uint8), record).save(tmp_path / "a.png")
    code, out, _ = command("inspect", tmp_path / "a.png")
    assert (code, r"a\x1b[2Jb\nseed" in out, "\x1b" in out, out.count("\n")) == (0, True, False, 4)


def test_inspect_says_what_it_does_not_know(command, tmp_path):
    import mlx.core as mx

    mx.save_safetensors(str(tmp_path / "odd.safetensors"), {"something": mx.zeros((2, 3))})
    code, out, _ = command("inspect", "odd.safetensors")
    assert code == 0
    assert "unknown" in out
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    code, out, _ = command("inspect", "plain.png")
    assert (code, out.splitlines()[0]) == (0, "plain.png has no record of ours")
    refused(command("inspect", "nothing"), 3, "there is nothing at nothing")
    (tmp_path / "text.safetensors").write_text("text")
    refused(command("inspect", "text.safetensors"), 3, "is a text, and no weights")
    (tmp_path / "broken.png").write_text("text")
    refused(command("inspect", "broken.png"), 2, "cannot be opened")


def test_inspect_shows_a_model_folder_of_any_size(command, model):
    code, out, _ = command("inspect", model, "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["kind"] == "model folder"
    assert facts["components"]["vae"]["parameters"] == 448147
    assert facts["filters"] == "none"


# --- the table of verbs ---


def test_the_table_has_the_first_sentence_of_each_verbs_own_help():
    for name, verb in cli.VERBS.items():
        command = verb.load()
        assert (command.name, command.get_short_help_str(100)) == (name, verb.help)
        assert len(verb.help) <= 80 - 6 - max(map(len, cli.VERBS)), "it does not fit a line of 80 columns"
    assert list(cli.VERBS) == sorted(cli.VERBS)


def test_every_file_of_a_verb_is_in_the_table():
    files = {path.stem for path in (ROOT / "mlx_flux_krea" / "commands").glob("*.py")} - {"__init__"}
    assert {verb.module for verb in cli.VERBS.values()} == files


def test_help_loads_no_verb(tmp_path):
    script = (
        "import sys; from mlx_flux_krea import cli\n"
        "try: cli.main(['--help'])\n"
        "finally: print(*sys.modules, file=sys.stderr)"
    )
    ran = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True)
    modules = set(ran.stderr.split())
    assert {"mlx", "numpy", "PIL", "tqdm"}.isdisjoint(modules)
    assert {f"mlx_flux_krea.commands.{verb.module}" for verb in cli.VERBS.values()} & modules == {
        "mlx_flux_krea.commands.completion"
    }


def test_what_verbs_share_imports_no_verb():
    verbs = {verb.module for verb in cli.VERBS.values()}
    for path in (ROOT / "mlx_flux_krea" / "commands" / "shared").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = {alias.name for alias in node.names} if isinstance(node, ast.ImportFrom) else set()
            module = getattr(node, "module", None) or ""
            assert not (isinstance(node, ast.ImportFrom) and node.level == 2), f"{path.name} imports {module} {names}"
            assert not (module == "mlx_flux_krea.commands" and names & verbs), path.name
            assert module.removeprefix("mlx_flux_krea.commands.").split(".")[0] not in verbs, path.name


def test_imports_stand_at_the_tops_of_files():
    """But in doctor, which reports libraries that cannot be imported, and for the message of an error in cli.py."""
    inside = set()
    for path in [ROOT / "mlx_flux_krea" / "cli.py", *(ROOT / "mlx_flux_krea" / "commands").rglob("*.py")]:
        functions = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef))
        if any(isinstance(node, ast.Import | ast.ImportFrom) for one in functions for node in ast.walk(one)):
            inside.add(path.name)
    assert inside == {"cli.py", "doctor.py"}
