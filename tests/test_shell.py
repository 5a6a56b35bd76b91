"""`flux-krea shell`: a line is a prompt, and no line ends it."""

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers import levels
from PIL import Image

from mlx_flux_krea.provenance import read_record

PROGRAM = str(Path(sys.executable).parent / "flux-krea")
TINY = ["--width", "32", "--height", "32", "--steps", "1"]


def piped(model, folder, *lines, options=()):
    command = [PROGRAM, "shell", "-m", str(model), *TINY, *options]
    text = "\n".join(lines)
    ran = subprocess.run(command, cwd=folder, input=text, capture_output=True, text=True, timeout=120, check=False)
    return ran.returncode, ran.stdout.split(), ran.stderr


@pytest.mark.slow
def test_lines_are_prompts_and_options_change_what_follows(model, tmp_path):
    lines = [
        "a {cat|dog}",
        "/w 48",
        "/s 7",
        "/steps 2",
        "/g 3",
        "/output {seed}-{prompt}.png",
        "a frog",
        "/noise mflux",
        "a frog",
    ]
    code, out, err = piped(model, tmp_path, *lines, "/noise", "/", "/q", "a newt")
    assert (code, out) == (0, ["out.png", "out-2.png", "7-a-frog.png", "7-a-frog-2.png"]), err
    record = read_record(tmp_path / "7-a-frog-2.png")
    said = {"width": 48, "height": 32, "seed": 7, "num_inference_steps": 2, "guidance_scale": 3.0, "noise": "mflux"}
    assert said.items() <= record.items()
    assert re.search(r"width +48\n", err)
    assert "noise  " not in err


def test_an_empty_line_is_the_last_picture_again_with_one_thing_changed(model, tmp_path):
    code, out, err = piped(model, tmp_path, "", "a frog", "", "/g 2", "", "a frog")
    assert (code, len(out)) == (0, 4), err
    records = [read_record(tmp_path / name) for name in out]
    assert len({r["seed"] for r in records[:3]}) == 1
    assert records[3]["seed"] != records[0]["seed"]
    assert levels(Image.open(tmp_path / out[0]), Image.open(tmp_path / out[1])) == 0
    assert records[2] == records[0] | {"guidance_scale": 2.0}


def test_a_failed_line_does_not_end_it(model, tmp_path):
    lines = ["/stesp 3", "/n 0", "/image nothing.png", "a frog", "/image", "/strength", "/colour", "{a|", "a frog"]
    code, out, err = piped(model, tmp_path, *lines)
    assert (code, out) == (7, ["out.png"]), err
    for says in (
        "did you mean steps?",
        "num-images is '0'; expected a whole number from 1 to 1000",
        "nothing.png cannot be opened",
        "/colour has no value",
    ):
        assert says in err
    assert err.splitlines()[-1] == "flux-krea: 6 lines failed"


def test_the_model_is_read_once(model, tmp_path):
    """The second picture of a prompt reads no text encoder: its first stage takes no time."""
    program = [PROGRAM, "shell", "-m", str(model), *TINY, "--json"]
    ran = subprocess.run(program, cwd=tmp_path, input="a frog\na frog\n", capture_output=True, text=True, check=True)
    first, second = (json.loads(line)["images"][0]["seconds"]["text"] for line in ran.stdout.splitlines())
    assert second < first / 10


@pytest.mark.slow
def test_ctrl_c_takes_back_a_line_or_stops_a_picture_and_the_lines_are_kept(model, tmp_path, home):
    leader, follower = pty.openpty()
    command = [PROGRAM, "shell", "-m", str(model), "--width", "256", "--height", "256", "--steps", "300"]
    process = subprocess.Popen(command, cwd=tmp_path, stdin=follower, stdout=follower, stderr=follower)
    os.close(follower)

    def wait_for(text: bytes, seconds: float = 60) -> bool:
        shown, end = b"", time.monotonic() + seconds
        while text not in shown and time.monotonic() < end:
            if select.select([leader], [], [], 0.2)[0]:
                shown += os.read(leader, 4096)
        assert text in shown or seconds < 60, shown
        return text in shown

    def press_ctrl_c(text: bytes) -> None:
        """Until it is seen: while readline handles a key, CPython does not notice a signal before the next one."""
        assert any(process.send_signal(signal.SIGINT) or wait_for(text, 5) for _ in range(12))

    try:
        wait_for(b"flux-krea> ")
        os.write(leader, b"half a line")
        wait_for(b"half a line")
        press_ctrl_c(b"flux-krea> ")
        os.write(leader, b"a frog\n")
        wait_for(b"1 picture: ")
        press_ctrl_c(b"interrupted")
        os.write(leader, b"/steps 1\n/w 32\n/h 32\na toad\n")
        wait_for(b"out.png")
        os.write(leader, b"/q\n")
        assert process.wait(30) == 0
    finally:
        process.kill()
        os.close(leader)
    assert read_record(tmp_path / "out.png")["prompt"] == "a toad"
    history = home / "history"
    assert "a toad" in history.read_text()
    assert history.stat().st_mode & 0o077 == 0


def test_hints_have_the_form_of_the_shell_and_options_are_told(model, tmp_path):
    lines = ["/w 48", "/true-cfg-scale 2", "a frog", "/true-cfg-scale", "/num-inference-steps 3", "exit"]
    err = piped(model, tmp_path, *lines)[2]
    for said in (
        "width is 48",
        "/true-cfg-scale 2 needs",
        '/negative-prompt "" is enough',
        "the default again",
        "steps 3",
    ):
        assert said in err, err
    assert "--" not in err
