"""The installed command, as a user runs it: effects, messages and exit codes together."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import PIPELINE, REFERENCE, ROOT, TOKENIZERS, full_size_folder, image, levels, run_command
from PIL import Image

import cli
from mlx_flux_krea.provenance import read_record

CAT = "A cat holding a sign that says hello world"
SMALL = ["--width", "48", "--height", "32", "--steps", "2"]


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs the command's own main in this process and gives (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}

    def run(*args):
        with pytest.raises(SystemExit) as end:
            cli.main([str(a) for a in args])
        out, err = capsys.readouterr()
        return end.value.code or 0, out, err

    yield run
    for number, handler in before.items():
        signal.signal(number, handler)


# --- the real program ---


def test_convert_inspect_and_generate_as_a_user_runs_them(tmp_path):
    ran = run_command("convert", PIPELINE, "--tokenizers", TOKENIZERS, "--dtype", "float32", "-o", "tiny", cwd=tmp_path)
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
    """Well under half a second: no mlx. The best of three, since machines are noisy."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        assert "Example" in run_command("--help", cwd=tmp_path).stdout
        times.append(time.perf_counter() - start)
    assert min(times) < 0.4


def test_help_fits_the_screen_and_shows_an_example(tmp_path):
    for verb in (), ("generate",), ("convert",), ("inspect",):
        text = run_command(*verb, "--help", cwd=tmp_path, COLUMNS="80").stdout
        assert max(map(len, text.splitlines())) <= 80
        assert len(text.splitlines()) < 60
        assert "Example" in text


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.parametrize("delay", [0.25, 0.5, 1.0, 1.5, 2.5])
def test_a_signal_ends_generating_at_any_time_and_leaves_nothing(model, tmp_path, sent, code, delay):
    arguments = ["generate", CAT, "-m", str(model), "--width", "256", "--height", "256", "--steps", "200"]
    process = start(arguments, tmp_path)
    time.sleep(delay)
    process.send_signal(sent)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (code, ""), err
    assert err.splitlines()[-1] == f"flux-krea: {'interrupted' if code == 130 else 'terminated'}"
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("delay", [0.3, 0.4, 0.5, 0.6, 0.8])
def test_a_signal_ends_converting_at_any_time_and_leaves_nothing_or_the_whole(tmp_path, delay):
    arguments = ["convert", str(PIPELINE), "--tokenizers", str(TOKENIZERS), "-o", "tiny"]
    process = start(arguments, tmp_path)
    time.sleep(delay)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode in (0, 130), err
    assert "Traceback" not in err
    assert [p.name for p in tmp_path.iterdir()] == (["tiny"] if process.returncode == 0 else [])


def start(arguments, folder):
    command = [str(Path(sys.executable).parent / "flux-krea"), *arguments]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_prompt_that_is_not_utf8_is_refused(model, tmp_path):
    command = [str(Path(sys.executable).parent / "flux-krea"), "generate", b"caf\xe9", "-m", str(model), *SMALL]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 2
    assert "not valid UTF-8" in ran.stderr


def test_progress_is_shown_in_a_terminal_and_nowhere_else(model, tmp_path):
    """Through a real pseudo-terminal: seconds per step and time left."""
    import fcntl
    import pty
    import struct
    import termios

    arguments = ["generate", CAT, "-m", str(model), "--width", "128", "--height", "128", "--steps", "30", "--seed", "1"]
    leader, follower = pty.openpty()
    fcntl.ioctl(leader, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = [str(Path(sys.executable).parent / "flux-krea"), *arguments]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=follower)
    os.close(follower)
    shown = b""
    while True:
        try:
            part = os.read(leader, 4096)
        except OSError:
            break
        if not part:
            break
        shown += part
    process.wait(30)
    assert process.returncode == 0
    text = shown.decode()
    assert re.search(r"drawing +\d+% .*/30 steps, +[\d.]+s/step|drawing +\d+% .*/30 steps, +[\d.]+step/s", text), text
    assert "left" in text
    quiet = run_command(*arguments, "-o", "b.png", cwd=tmp_path)
    assert "drawing" not in quiet.stderr


# --- generate ---


def test_outputs_take_the_next_free_name_unless_forced(command, model, tmp_path):
    for expected in ("out.png", "out-2.png", "out-3.png"):
        code, out, err = command("generate", CAT, "-m", model, "--seed", 1, *SMALL)
        assert (code, out) == (0, expected + "\n")
        assert (f"writing {expected}" in err) == (expected != "out.png")
    first = (tmp_path / "out.png").read_bytes()
    code, out, _ = command("generate", CAT, "-m", model, "--seed", 2, "--force", *SMALL)
    assert (code, out) == (0, "out.png\n")
    assert (tmp_path / "out.png").read_bytes() != first


def test_several_images_have_seeds_that_count_up_each_drawn_alone(command, model, tmp_path):
    code, out, err = command("generate", CAT, "-m", model, "--seed", 7, "-n", 2, "-o", "a.webp", *SMALL)
    assert (code, out.split()) == (0, ["a.webp", "a-2.webp"])
    assert "seed 7:" in err
    assert "seed 8:" in err
    assert [read_record(tmp_path / name)["seed"] for name in ("a.webp", "a-2.webp")] == [7, 8]
    command("generate", CAT, "-m", model, "--seed", 8, "-o", "alone.webp", *SMALL)
    assert levels(Image.open(tmp_path / "a-2.webp"), Image.open(tmp_path / "alone.webp")) == 0


def test_a_seed_that_was_chosen_is_shown_and_repeats_the_picture(command, model, tmp_path):
    _, _, err = command("generate", CAT, "-m", model, *SMALL)
    seed = re.search(r"seed (\d+):", err)[1]
    command("generate", CAT, "-m", model, "--seed", seed, "-o", "again.png", *SMALL)
    assert levels(Image.open(tmp_path / "out.png"), Image.open(tmp_path / "again.png")) == 0


def test_json_holds_everything_and_stdout_nothing_else(command, model, tmp_path):
    code, out, _ = command("generate", CAT, "-m", model, "--seed", 5, "--json", *SMALL)
    (entry,) = json.loads(out)["images"]
    assert code == 0
    assert entry["path"] == "out.png"
    assert entry["seed"] == 5
    assert entry["prompt"] == CAT
    assert (entry["width"], entry["height"], entry["num_inference_steps"]) == (48, 32, 2)
    assert set(entry["seconds"]) == {"text", "denoise", "decode"}
    assert read_record(tmp_path / "out.png").items() <= entry.items()


@pytest.mark.parametrize(
    "options",
    [
        ["--guidance", 2],
        ["--noise", "mflux"],
        ["--negative-prompt", "blurry", "--true-cfg-scale", 3],
        ["--image", REFERENCE / "images" / "input.png", "--strength", 0.5],
        ["--steps", 3],
        ["--seed", 2],
        ["--dtype", "bfloat16"],
    ],
    ids=lambda o: o[0],
)
def test_every_option_has_its_effect(command, model, tmp_path, options):
    plain = ["generate", CAT, "-m", model, "--seed", 1, *SMALL]
    command(*plain, "-o", "plain.png")
    code, _, err = command(*plain, "-o", "other.png", *options)
    assert code == 0, err
    assert levels(Image.open(tmp_path / "plain.png"), Image.open(tmp_path / "other.png")) > 0
    name = options[0].removeprefix("--").replace("-", "_")
    name = {"guidance": "guidance_scale", "steps": "num_inference_steps", "image": "strength"}.get(name, name)
    value = options[3] if name == "strength" else options[1]
    assert read_record(tmp_path / "other.png")[name] == value


def test_the_size_follows_the_options_and_is_floored_with_a_word(command, model, tmp_path):
    code, _, err = command("generate", CAT, "-m", model, "--width", 70, "--height", 40, "--steps", 1)
    assert code == 0
    assert "note: 70 x 40 is no multiple of 16: the picture is 64 x 32" in err
    assert Image.open(tmp_path / "out.png").size == (64, 32)


def test_an_empty_prompt_works_and_a_long_one_is_reported(command, model):
    assert command("generate", "", "-m", model, *SMALL)[0] == 0
    code, _, err = command("generate", "cat " * 80, "-m", model, *SMALL)
    assert code == 0
    assert "note: CLIP reads 77 tokens; not read: 'cat cat cat cat cat'" in err


def test_the_only_installed_model_is_used(command, model, home):
    shutil.copytree(model, home / "models" / "tiny-fp32")
    assert command("generate", CAT, *SMALL)[0] == 0
    assert command("generate", CAT, "-m", "tiny-fp32", "-o", "b.png", *SMALL)[0] == 0


def refused(result, code, says):
    assert result[0] == code, result[2]
    assert result[1] == ""
    line = result[2].strip().splitlines()[-1]
    assert says in line, line
    assert "Traceback" not in result[2]


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["-m", "nothing"], 3, "there is no model 'nothing'"),
        ([], 3, "no model is installed"),
        (["-m", PIPELINE], 3, "flux-krea convert"),
        (["-m", REFERENCE / "bfl" / "ae.safetensors"], 3, "flux-krea convert"),
        (["--width", "0"], 2, "width is 0"),
        (["--height", "-5"], 2, "height is -5"),
        (["--steps", "0"], 2, "num_inference_steps is 0"),
        (["--steps", "x"], 2, "'x' is not a valid integer"),
        (["--guidance", "-1"], 2, "guidance_scale is -1"),
        (["--seed", "-1"], 2, "seed is -1"),
        (["--noise", "fal"], 2, "cannot be repeated"),
        (["-n", "0"], 2, "0 is not in the range"),
        (["--negative-prompt", "x"], 2, "true_cfg_scale"),
        (["--true-cfg-scale", "2"], 2, "needs a negative prompt"),
        (["--strength", "0.5"], 2, "without an image"),
        (["--image", "nothing.png"], 2, "cannot be opened"),
        (["--dtype", "int8"], 2, "'int8' is not one of"),
        (["--colour", "red"], 2, "No such option"),
        (["-o", "."], 2, "is a folder"),
        (["-o", "a.gif"], 2, "ends in '.gif'"),
        (["-o", "a"], 2, "ends in 'nothing'"),
        (["-o", "nowhere/a.png"], 2, "there is no folder nowhere"),
        (["extra"], 2, "unexpected extra argument"),
    ],
)
def test_what_cannot_be_used_ends_in_one_line_and_its_code(command, model, tmp_path, options, code, says):
    given = [] if code == 3 else ["-m", model]
    size = [] if "--width" in options or "--height" in options or "--steps" in options else SMALL
    refused(command("generate", CAT, *given, *size, *options), code, says)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_requires_filters_is_inspected_by_its_sizes_and_not_run(command, tmp_path):
    folder = full_size_folder(tmp_path / "big", filters="none")
    refused(command("generate", CAT, "-m", folder), 6, "content filters")


def test_a_folder_that_cannot_be_written_is_refused_before_the_model_is_read(command, tmp_path):
    if os.getuid() == 0:  # root may write anywhere but on a filesystem that cannot be written
        locked = Path("/proc")
    else:
        locked = tmp_path / "locked"
        locked.mkdir(mode=0o500)
    refused(command("generate", CAT, "-m", "nothing", "-o", locked / "a.png"), 2, "cannot be written")


def test_a_failure_after_the_first_picture_ends_with_7_and_keeps_it(command, model, tmp_path, monkeypatch):
    from mlx_flux_krea import pipeline
    from mlx_flux_krea.errors import ModelError

    original, calls = pipeline.FluxPipeline.__call__, []

    def second_fails(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise ModelError("the disk went away")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(pipeline.FluxPipeline, "__call__", second_fails)
    code, out, err = command("generate", CAT, "-m", model, "-n", 3, *SMALL)
    assert (code, out) == (7, "out.png\n")
    assert "the disk went away" in err
    assert [p.name for p in tmp_path.iterdir()] == ["out.png"]


def test_a_bug_ends_with_1_and_asks_for_a_report(command, model, monkeypatch):
    from mlx_flux_krea import pipeline

    def broken(self, *args, **kwargs):
        raise KeyError("oops")

    monkeypatch.setattr(pipeline.FluxPipeline, "__call__", broken)
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
        ([], 2, "Missing argument"),
        (["nothing"], 3, "there is nothing at nothing"),
        ([PIPELINE], 3, "no tokenizer was found"),
        ([PIPELINE / "vae", "--tokenizers", TOKENIZERS], 3, "also transformer"),
        ([PIPELINE, "--tokenizers", TOKENIZERS, "--dtype", "int4"], 2, "'int4' is not one of"),
    ],
)
def test_convert_refuses_in_one_line(command, tmp_path, arguments, code, says):
    refused(command("convert", *arguments), code, says)
    assert list(tmp_path.iterdir()) == []


def test_inspect_names_foreign_files_without_reading_tensors(command, monkeypatch):
    from mlx_flux_krea.convert.sources import Tensor

    monkeypatch.setattr(Tensor, "read", None)
    code, out, _ = command("inspect", REFERENCE / "bfl")
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


def test_inspect_says_what_it_does_not_know(command, tmp_path):
    import mlx.core as mx

    mx.save_safetensors(str(tmp_path / "odd.safetensors"), {"something": mx.zeros((2, 3))})
    code, out, _ = command("inspect", "odd.safetensors")
    assert code == 0
    assert "not known" in out
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    code, out, _ = command("inspect", "plain.png")
    assert (code, out) == (0, "plain.png carries no record of ours\n")
    refused(command("inspect", "nothing"), 3, "there is nothing at nothing")
    (tmp_path / "text.safetensors").write_text("text")
    refused(command("inspect", "text.safetensors"), 3, "cannot be read")
    (tmp_path / "broken.png").write_text("text")
    refused(command("inspect", "broken.png"), 2, "cannot be opened")


def test_inspect_shows_a_model_folder_of_any_size(command, model):
    code, out, _ = command("inspect", model, "--json")
    facts = json.loads(out)
    assert code == 0
    assert facts["kind"] == "model folder"
    assert facts["components"]["vae"]["parameters"] == 448147
    assert facts["filters"] == "none"
