"""Files that never end, that are something else than their name says, or that are far too large."""

import contextlib
import io
import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
import zlib
from pathlib import Path

import numpy as np
import pytest
from helpers import PIPELINE, run_command
from PIL import Image

from mlx_flux_krea import provenance
from mlx_flux_krea.commands.shared import rows
from mlx_flux_krea.commands.shared.terminal import Console
from mlx_flux_krea.errors import ModelError, UsageError, shortened
from mlx_flux_krea.filters import gate
from mlx_flux_krea.inputs.image import open_image
from mlx_flux_krea.provenance import read_picture

TINY = ["--width", "32", "--height", "32", "--steps", "1"]


# --- pipes and devices ---

PIPED = [
    (["generate", "a", "-m", "model", *TINY, "--image", "PIPE"], "pipe.png"),
    (["generate", "a", "-m", "model", *TINY, "--from", "PIPE"], "pipe.png"),
    (["generate", "-m", "model", *TINY, "--prompts", "PIPE"], "pipe.txt"),
    (["inspect", "PIPE"], "pipe.png"),
    (["inspect", "PIPE"], "pipe.safetensors"),
    (["inspect", "PIPE"], "pipe.gguf"),
    (["resume", "PIPE"], "pipe.safetensors"),
    (["convert", "PIPE", "-o", "out"], "pipe.safetensors"),
    *(
        (["convert", "source", "-o", "out"], f"source/{name}")
        for name in (
            "model_index.json",
            "transformer/config.json",
            "transformer/diffusion_pytorch_model.safetensors",
            "vae/diffusion_pytorch_model.safetensors",
            "tokenizer_2/tokenizer.json",
            "LICENSE.md",
        )
    ),
    *(
        ([verb, *arguments], f"model/{name}")
        for verb, arguments in (("plan", ["model"]), ("generate", ["a", "-m", "model", *TINY]))
        for name in ("model_index.json", "vae/config.json", "manifest.json", "tokenizer/vocab.json")
    ),
    (["generate", "a", "-m", "model", *TINY], "model/vae/model.safetensors"),
    (["verify", "model"], "model/vae/model.safetensors"),
]


@contextlib.contextmanager
def ended_after(seconds: int):
    """Fails where the block takes longer, also if it waits for a file to be opened."""

    def hang(number, frame):
        pytest.fail("it hangs")

    before = signal.signal(signal.SIGALRM, hang)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(("arguments", "pipe"), PIPED, ids=[f"{a[0]}-{pipe}" for a, pipe in PIPED])
def test_a_pipe_or_a_device_in_place_of_a_file_never_hangs(command, model, tmp_path, arguments, pipe):
    if "source" in arguments:
        shutil.copytree(PIPELINE, tmp_path / "source")
    if "model" in arguments:
        shutil.copytree(model, tmp_path / "model")
    path = tmp_path / pipe
    for make in (os.mkfifo, lambda path: os.symlink("/dev/zero", path)):
        path.unlink(missing_ok=True)
        path.parent.mkdir(exist_ok=True)
        make(path)
        with ended_after(60):
            code, _, err = command(*(pipe if a == "PIPE" else a for a in arguments))
        assert "Traceback" not in err
        assert code in (0, 2, 3), err  # 0: the file is not needed


# --- pictures ---


def test_other_formats_never_reach_their_plugins_whatever_their_name(tmp_path, monkeypatch):
    """An EPS would run gs."""
    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n%%EOF\n"
    for kind in ("PPM", "TGA", "ICO", "JPEG2000", "SGI", "PCX"):
        with io.BytesIO() as file:
            Image.new("RGB", (16, 16)).save(file, kind)
            (tmp_path / f"{kind}.png").write_bytes(file.getvalue())
    (tmp_path / "EPS.png").write_bytes(eps)
    for path in sorted(tmp_path.glob("*.png")):
        for read in (open_image, read_picture):
            with pytest.raises(UsageError, match="cannot be opened: it has another format; expected a PNG, JPEG"):
                read(path)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF"])
def test_these_formats_are_read_whatever_their_name(tmp_path, kind):
    Image.new("RGB", (16, 24), "red").save(tmp_path / "a.dat", kind)
    assert open_image(tmp_path / "a.dat").size == (16, 24)


@pytest.mark.parametrize("brand", [b"heic", b"mif1", b"avif"])
def test_heic_is_refused_with_what_to_do(tmp_path, brand):
    (tmp_path / "a.jpg").write_bytes(b"\0\0\0\x18ftyp" + brand + bytes(100))
    with pytest.raises(UsageError, match=r"a\.jpg cannot be opened: it is HEIC or AVIF; .*; convert it first"):
        open_image(tmp_path / "a.jpg")


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA", "P"])
def test_a_picture_far_too_large_is_refused_before_it_is_decoded(tmp_path, mode):
    Image.new(mode, (13_300, 13_300) if mode in "1L" else (8193, 8193)).save(tmp_path / "a.png", compress_level=1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UsageError, match=r"a\.png cannot be opened: it is \d+ x \d+; expected 67 million pixels"):
        open_image(tmp_path / "a.png")
    assert read_picture(tmp_path / "a.png")["record"] is None
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**15 * (
        1 if sys.platform == "linux" else 1024
    )


def test_a_picture_that_pillow_itself_refuses_is_answered_in_our_words(tmp_path):
    header = b"IHDR" + struct.pack(">IIBBBBB", 40_000, 10_000, 8, 0, 0, 0, 0)
    sound = b"\0\0\0\x0d" + header + struct.pack(">I", zlib.crc32(header))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + sound + b"\0\0\0\0IDAT")
    for read in (open_image, read_picture):
        with pytest.raises(
            UsageError, match="it is far too large; expected 67 million pixels at most; make it smaller"
        ):
            read(tmp_path / "a.png")


def test_large_jpegs_are_decoded_smaller(tmp_path, monkeypatch):
    monkeypatch.setattr(provenance.opened.__wrapped__, "__defaults__", (1000,))
    noise = np.random.default_rng(0).integers(0, 256, (10, 12, 3), np.uint8)
    Image.fromarray(noise).resize((120, 100), Image.Resampling.BICUBIC).save(tmp_path / "a.jpg", quality=95)
    assert open_image(tmp_path / "a.jpg").size == (30, 25)
    Image.new("RGB", (1000, 1000)).save(tmp_path / "b.jpg")
    with pytest.raises(UsageError, match="1000 x 1000"):
        open_image(tmp_path / "b.jpg")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "I;16", "P"])
def test_the_largest_pictures_are_decoded_within_a_gigabyte(tmp_path, mode):
    Image.new(mode, (8192, 8192)).save(tmp_path / "a.png", compress_level=1)
    program = """
        import resource, sys
        from mlx_flux_krea.inputs.image import open_image
        assert open_image("a.png").size == (8192, 8192)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    """
    ran = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert int(ran.stdout) * (1024 if sys.platform == "linux" else 1) < 1e9


# --- long prompts, names and messages ---

LONG = "a frog " * 14_286  # 100 002 bytes


def test_a_prompt_that_is_too_long_is_refused_at_once(command, model, pipe, tmp_path):
    says = "has 100002 bytes; expected 100000 at most"
    code, _, err = command("generate", LONG, "-m", tmp_path / "missing")
    assert (code, f"PROMPT {says}" in err) == (2, True), err
    code, _, err = command("generate", "a", "--negative-prompt", LONG, "--true-cfg-scale", "2", "-m", model)
    assert (code, f"--negative-prompt {says}" in err) == (2, True), err
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": LONG}) + "\n" + json.dumps({"prompt": "x" * 10**7}))
    code, _, err = command("generate", "--prompts", "a.jsonl", "-m", model)
    assert (code, says in err, len(err) < 1000) == (2, True, True), err
    for name in ("prompt", "prompt_2"):
        with pytest.raises(UsageError, match=f"`{name}` {says}"):
            pipe(**{"prompt": "a", name: LONG})
    with pytest.raises(UsageError, match=f"`prompt` {says}"):
        pipe(["a", LONG])
    with pytest.raises(UsageError, match="at most"):
        pipe.encode_prompt("\u1f600" * 40_000)


def test_a_prompt_of_standard_input_is_read_to_its_bound(model, tmp_path):
    program = str(Path(sys.executable).parent / "flux-krea")
    line = f"cat /dev/zero | tr '\\0' a | {program} generate - -m {model}"
    ran = subprocess.run(["sh", "-c", line], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert (ran.returncode, "standard input is too long" in ran.stderr) == (2, True), ran.stderr


def test_alternatives_that_expand_to_too_much_text_are_refused():
    with pytest.raises(UsageError, match="make 82 MB of prompts"):
        rows.alternatives("{a|b}" * 13 + "x" * 10_000, 10_000)


def test_a_prompt_that_the_filter_reads_in_many_parts_is_noted_before(monkeypatch, caplog):
    asked = []

    def margins(judge, texts):
        asked.append(caplog.text)
        return [-1.0 - i for i, _ in enumerate(texts)]

    monkeypatch.setattr(gate, "margins_of", margins)
    judge = type("Judge", (), {"about": {}, "free": lambda self: None})()
    one = gate.Gate(gate.Policy(), None, {"pixtral": judge})
    one._judged(["a frog"])
    assert caplog.text == ""
    one._judged([" ".join(map(str, range(2000)))])
    assert "the prompt is long: the filter reads" in asked[1]


def test_messages_with_long_names_are_shortened():
    name = "n" * 70_000
    text = str(ModelError(f"{name} is missing", name, f"look at {name}"))
    assert len(text) < 1500
    assert text.startswith("nnn")
    assert " is missing; expected nnn" in text
    assert "[... 69640 characters ...]" in text
    assert len(shortened("a b " * 10_000)) <= 4000
    assert shortened("as it is " * 40) == "as it is " * 40


STEERING = "a\x1b[31m\x07\x9b2J\u202e\u2028.png"


def test_no_name_steers_a_terminal(command, model, tmp_path, capsys):
    """Escapes of 7 and 8 bits, a change of direction, another end of line: in errors, notes, tables and JSON."""
    (tmp_path / STEERING).write_bytes(b"x")
    folder = shutil.copytree(model, tmp_path / f"{STEERING}.d")
    said = [command(*args) for args in (
        ("inspect", STEERING), ("inspect", folder), ("plan", folder), ("convert", STEERING),
        ("generate", "a", "-m", STEERING), ("generate", "a", "-m", model, "--image", STEERING),
        ("generate", "-m", model, "--prompts", STEERING), ("resume", STEERING), ("models", "default", STEERING),
        ("config", STEERING), (STEERING,), ("generate", f"--{STEERING}"), ("inspect", "--json", folder),
    )]  # fmt: skip
    Console().say(f"a note about {STEERING}")
    Console(as_events=True).say(f"an event about {STEERING}")
    Console().note(f"another note about {STEERING}")
    text = "".join(out + err for _, out, err in [*said, (0, *capsys.readouterr())])
    assert text.count("x1b[31m") + text.count("u001b[31m") >= len(said)
    assert not {c for c in text if not c.isprintable()} - {"\n"}


@pytest.mark.slow
def test_names_are_printed_safely_at_a_terminal_and_as_they_are_to_a_program(model, tmp_path):
    name = "a\x1b[31m\x07.png"
    ran = run_command("generate", "a", "-m", model, *TINY, "-o", name, cwd=tmp_path)
    assert (ran.returncode, ran.stdout) == (0, f"{name}\n"), ran.stderr
    code = """
        import os, pty, sys
        seen = []
        pty.spawn(sys.argv[1:], lambda end: seen.append(os.read(end, 9999)) or seen[-1])
        sys.exit(b"\\x1b[31m" in b"".join(seen) or b"\\\\x1b[31m" not in b"".join(seen))
    """
    program = str(Path(sys.executable).parent / "flux-krea")
    for arguments in (["generate", "a", "-m", str(model), *TINY, "-o", name], ["demo", "-o", name]):
        command = [sys.executable, "-c", textwrap.dedent(code), program, *arguments]
        ran = subprocess.run(command, cwd=tmp_path, capture_output=True, stdin=subprocess.DEVNULL, timeout=120)
        assert ran.returncode == 0, (ran.stdout, ran.stderr)
